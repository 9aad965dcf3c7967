"""Run vLLM where memory is tight, with guessed tokens, with adapters and as a pooling model, and
compare its answers with Hugging Face's, or with those to each request alone.

Without --part it is Hugging Face, in a process without vLLM, and writes the adapters, too. The
caller sets the environment that vLLM reads. One JSON document on stdout: for each check its rows,
each with a problem (a sentence or null) or a difference and its limit.
"""

import json
import math
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from runpy import run_path
from statistics import mean
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest

document = SimpleNamespace(**run_path(str(Path(__file__).with_name("document.py"))))
SCHEMA = 1
Record = dict[str, Any]
Rows = Iterator[Record]
# A token that leads by less may fall either way (nats); as in probes/reference.py.
TIE = 2e-3
# Nats, and a share of an embedding's length; as in checks/numeric.py.
EXACT = 1e-3
# Nats, the mean over an answer: vLLM's adapters on GPUs run in bfloat16 only. It costs 0.05 to 0.17
# on an x86-64 CPU, 0.29 on an H200; not measured on aarch64.
ROUNDED = 0.5
# A prompt that needs a second block after a few tokens, and as many requests as there are blocks.
BLOCK, REQUESTS = 32, 8
SHORT, ANSWER = BLOCK - 4, 20
# With few tokens to choose from, the answer of a random model repeats itself, so that some guesses
# are right and some are wrong.
FEW, GUESSED = (5, 6, 7, 8), 64
# Each adapter: its rank, alpha, and the parts of a layer that it changes.
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "one": (8, 16, PARTS),
    "two": (4, 12, ("q_proj", "v_proj", "down_proj")),
    "three": (16, 16, ("o_proj", "up_proj")),
}
# One slot stays free: vLLM 0.31.0 gives requests without an adapter, on a CPU, what is in the last
# slot (lora/ops/torch_ops/lora_ops.py: index -1). There prompt_logprobs fail with any adapter.
SLOTS, RANK = 4, 16
# The requests of one batch, then of another.
BATCHES = (("none", "one", "two", "none", "two", "one"), ("three", "two", "none"))
# Positions of an answer that are judged in a prefill.
FORCED = 4
LENGTHS, DIMENSIONS = (5, 28, 100), 64


row, tokens_of = document.row, document.tokens_of
PROMPTS = tuple(tokens_of(start, SHORT + 9 * start) for start in (1, 2))


def decoded(model: Any, prompt: list[int], count: int, allowed: Iterable[int] = ()) -> Record:
    """Return a greedy answer; with `allowed` it chooses among these tokens only."""
    import torch

    ids, past = torch.tensor([prompt], device=model.device), None
    tokens: list[int] = []
    logprobs: list[float] = []
    margins: list[float] = []
    for _ in range(count):
        out = model(ids, past_key_values=past, use_cache=True)
        scores, past = out.logits[0, -1].float(), out.past_key_values
        chances = torch.log_softmax(scores, dim=-1)
        choices = torch.tensor(sorted(allowed) or range(len(scores)), device=model.device)
        best, order = chances[choices].topk(2)
        token = int(choices[order[0]])
        tokens.append(token)
        logprobs.append(chances[token].item())
        margins.append((best[0] - best[1]).item())
        ids = torch.tensor([[token]], device=model.device)
    return {"prompt": prompt, "tokens": tokens, "logprobs": logprobs, "margins": margins}


def write_adapter(name: str, model: Any, folder: Path) -> "dict[str, Tensor]":
    """Write an adapter in the layout of Hugging Face's peft. Return what it adds to each weight."""
    import torch
    from safetensors.torch import save_file

    rank, alpha, parts = ADAPTERS[name]
    torch.manual_seed(len(name))
    tensors, added = {}, {}
    for place, weight in model.named_parameters():
        module = place.removesuffix(".weight")
        if module.rpartition(".")[2] in parts:
            rows, columns = weight.shape
            first, second = 0.3 * torch.randn(rank, columns), 0.1 * torch.randn(rows, rank)
            tensors[f"base_model.model.{module}.lora_A.weight"] = first
            tensors[f"base_model.model.{module}.lora_B.weight"] = second
            added[place] = (alpha / rank * (second @ first)).to(weight.device)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(parts)}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return added


def adapted(model: Any, folder: Path) -> Record:
    """Return the answers of the model without an adapter and with each merged into its weights."""
    found: Record = {"none": [decoded(model, prompt, ANSWER) for prompt in PROMPTS]}
    weights = dict(model.named_parameters())
    for name in ADAPTERS:
        added = write_adapter(name, model, folder / name)
        former = {place: weights[place].clone() for place in added}
        for place, change in added.items():
            weights[place].add_(change)
        found[name] = [decoded(model, prompt, ANSWER) for prompt in PROMPTS]
        for place, weight in former.items():
            weights[place].copy_(weight)
    return found


def pooled(model: Any) -> Record:
    """Return embeddings by kind of pooling, before they are normalized."""
    import torch

    found: Record = {"LAST": [], "MEAN": [], "CLS": []}
    for length in LENGTHS:
        ids = torch.tensor([tokens_of(length, length)], device=model.device)
        hidden = model.model(ids).last_hidden_state[0].float()
        for kind, vector in (("LAST", hidden[-1]), ("MEAN", hidden.mean(0)), ("CLS", hidden[0])):
            found[kind].append(vector.tolist())
    return found


def reference(arguments: Namespace) -> Record:
    import torch
    import transformers

    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True, warn_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    model.to(arguments.device).eval()
    with torch.no_grad():
        return {
            "guessed": [decoded(model, prompt, GUESSED, FEW) for prompt in PROMPTS],
            "free": [decoded(model, prompt, ANSWER) for prompt in PROMPTS],
            "adapters": adapted(model, arguments.adapters),
            "pooled": pooled(model),
        }


def start(arguments: Namespace, **changes: object) -> "LLM":
    """Start vLLM in this process."""
    import vllm

    options: Record = {
        "max_model_len": 256,
        "max_num_seqs": REQUESTS,
        # Counts preemptions, guessed tokens and the share of used blocks.
        "disable_log_stats": False,
        "num_gpu_blocks_override": 64,
    }
    common = document.engine_options(str(arguments.model.resolve()), arguments.device)
    return vllm.LLM(**(common | options | changes))


def greedy(**changes: object) -> "SamplingParams":
    import vllm

    given: Record = {"temperature": 0.0, "max_tokens": ANSWER, "ignore_eos": True, "logprobs": 2}
    return vllm.SamplingParams(**(given | changes))


def ask(
    llm: "LLM",
    prompts: Iterable[list[int]],
    params: "list[SamplingParams]",
    adapters: "list[LoRARequest | None] | None" = None,
) -> "list[RequestOutput]":
    """Return the outputs of a batch."""
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return list(llm.generate(inputs, params, use_tqdm=False, lora_request=adapters))


def counter(llm: "LLM", name: str) -> float:
    """Return a metric of vLLM: a counter, or a gauge after the last step."""
    for metric in llm.get_metrics():
        if metric.name == f"vllm:{name}":
            return float(metric.value)
    raise RuntimeError(f"vLLM has no metric {name}")


def row_of(output: "RequestOutput") -> Record:
    """Return an answer as a row of the reference; a margin is between the two most likely."""
    made = output.outputs[0]
    chances, tokens = made.logprobs or [], list(made.token_ids)
    best = [sorted((one.logprob for one in each.values()), reverse=True) for each in chances]
    return {
        "tokens": tokens,
        "logprobs": [each[token].logprob for each, token in zip(chances, tokens, strict=True)],
        "margins": [first - second for first, second, *_ in best],
    }


def compared(case: str, found: Record, expected: Record) -> Rows:
    """Compare an answer up to a tie: its length, its tokens, and their log-probabilities."""
    tied = [index for index, margin in enumerate(expected["margins"]) if margin < TIE]
    end = tied[0] if tied else len(expected["tokens"])
    yield row(f"{case}: number of tokens", len(found["tokens"]), len(expected["tokens"]))
    yield row(f"{case}: tokens", found["tokens"][:end], expected["tokens"][:end])
    pairs = zip(found["logprobs"][:end], expected["logprobs"][:end], strict=False)
    differences = [abs(one - other) for one, other in pairs]
    if found["tokens"][:end] == expected["tokens"][:end]:
        yield apart(f"{case}: log-probabilities", differences)


def apart(case: str, differences: list[float], limit: float = EXACT) -> Record:
    """Return the row of the largest of some differences, none of which may be missing."""
    if not all(map(math.isfinite, differences)):
        return {"case": case, "problem": "are no finite numbers"}
    return {"case": case, "difference": max(differences, default=0.0), "limit": limit}


# Requests that more memory is needed for than there is: some go another way in the sampler.
MANNERS: tuple[Record, ...] = (
    {},
    {"frequency_penalty": 0.7, "presence_penalty": 0.3},
    {"temperature": 0.8, "seed": 5},
)


def tight(arguments: Namespace) -> "LLM":
    """Start an engine whose blocks are as many as its requests, and one that it keeps empty."""
    longest = BLOCK * REQUESTS // 2
    return start(
        arguments, block_size=BLOCK, num_gpu_blocks_override=REQUESTS + 1, max_model_len=longest
    )


def preemption(llm: "LLM", _: Record) -> Rows:
    """Answer more requests at once than there are blocks for, then each alone."""
    prompts = [tokens_of(start, SHORT) for start in range(REQUESTS)]
    params = [greedy(**MANNERS[index % len(MANNERS)]) for index in range(REQUESTS)]
    together = ask(llm, prompts, params)
    count = counter(llm, "num_preemptions")
    yield row("requests were preempted", count > 0, True)
    yield row("after the answers: used blocks", used(llm), 0)
    for index, prompt in enumerate(prompts):
        (alone,) = ask(llm, [prompt], [params[index]])
        title = f"request {index + 1} beside others"
        yield from compared(title, row_of(together[index]), row_of(alone))
    yield row("alone: preemptions", counter(llm, "num_preemptions"), count)


def used(llm: "LLM") -> int:
    """Return how many blocks were in use after the last step."""
    return round(counter(llm, "kv_cache_usage_perc") * REQUESTS)


def abort(llm: "LLM", _: Record) -> Rows:
    """Abort requests that run, wait, and have just come; then count the blocks in use."""
    engine = llm.llm_engine
    answers: dict[str, RequestOutput] = {}

    def add(names: Iterable[str]) -> None:
        for name in names:
            prompt = {"prompt_token_ids": tokens_of(ord(name), SHORT)}
            engine.add_request(name, prompt, greedy())

    def step(most: int) -> None:
        for _ in range(most):
            answers.update({output.request_id: output for output in engine.step()})

    add("abc")
    step(8)
    yield row("three requests of two blocks: used blocks", used(llm), 6)
    engine.abort_request(["a", "b"])
    step(1)
    yield row("two of them aborted: used blocks", used(llm), 2)
    # More than fit: the last wait, and the first that grow take their blocks.
    add("defghijklm")
    engine.abort_request(["m"])
    step(8)
    engine.abort_request(["d", "k", "l"])
    step(200)
    yield row("after the last request: used blocks", used(llm), 0)
    yield row("requests that never end", engine.has_unfinished_requests(), False)
    if engine.has_unfinished_requests():
        return
    ended = sorted(name for name, output in answers.items() if output.finished)
    yield row("answers that ended", ended, list("cefghij"))
    for name in "cj":
        (alone,) = ask(llm, [tokens_of(ord(name), SHORT)], [greedy()])
        if name in answers:
            title = f"a request beside aborted ones, {name}"
            yield from compared(title, row_of(answers[name]), row_of(alone))
    before = counter(llm, "num_preemptions")
    ask(llm, [tokens_of(start, SHORT) for start in range(90, 94)], [greedy()] * 4)
    again = counter(llm, "num_preemptions") - before
    yield row("requests that need all blocks: preemptions", again, 0)


def speculation(llm: "LLM", expected: Record) -> Rows:
    """Answer with guessed tokens as Hugging Face does without."""
    params = [greedy(max_tokens=GUESSED, allowed_token_ids=list(FEW))] * len(PROMPTS)
    params += [greedy()] * len(PROMPTS)
    answers = ask(llm, [*PROMPTS, *PROMPTS], params)
    for index, row_ in enumerate([*expected["guessed"], *expected["free"]]):
        yield from compared(f"answer {index + 1}", row_of(answers[index]), row_)
    drafted, accepted = (
        counter(llm, f"spec_decode_num_{name}_tokens") for name in ("draft", "accepted")
    )
    yield row("guessed tokens were accepted", accepted > 0, True)
    yield row("guessed tokens were rejected", drafted > accepted, True)


def guessing(arguments: Namespace) -> "LLM":
    guesses = {"method": "ngram", "num_speculative_tokens": 3}
    lengths = {"prompt_lookup_min": 2, "prompt_lookup_max": 3}
    return start(arguments, speculative_config=guesses | lengths)


def adapters(llm: "LLM", expected: Record, folder: Path) -> Rows:
    """Answer with several adapters in a batch as Hugging Face does with merged weights."""
    import torch
    from vllm.lora.request import LoRARequest

    known: dict[str, LoRARequest | None] = {
        name: LoRARequest(name, number, str((folder / name).resolve()))
        for number, name in enumerate(ADAPTERS, 1)
    }
    is_exact = llm.llm_engine.vllm_config.model_config.dtype == torch.float32
    for batch in BATCHES:
        cases = [(name, index) for index in range(len(PROMPTS)) for name in batch]
        chosen = [known.get(name) for name, _ in cases]
        rows = [expected["adapters"][name][index] for name, index in cases]
        titles = [f"adapter {name}, among {' '.join(batch)}" for name, _ in cases]
        if is_exact:
            prompts = [one["prompt"] for one in rows]
            answers = ask(llm, prompts, [greedy()] * len(cases), chosen)
            for title, answer, one in zip(titles, answers, rows, strict=True):
                yield from compared(title, row_of(answer), one)
        # In bfloat16 tokens part soon: each position is a request that may give one token only.
        far: dict[str, list[float]] = {}
        for place in range(FORCED):
            prompts = [one["prompt"] + one["tokens"][:place] for one in rows]
            params = [
                greedy(max_tokens=1, allowed_token_ids=[one["tokens"][place]]) for one in rows
            ]
            answers = ask(llm, prompts, params, chosen)
            for title, answer, one in zip(titles, answers, rows, strict=True):
                difference = abs(row_of(answer)["logprobs"][0] - one["logprobs"][place])
                far.setdefault(title, []).append(difference)
        for title, differences in far.items():
            worst = differences if is_exact else [mean(differences)]
            yield apart(f"{title}: log-probabilities", worst, EXACT if is_exact else ROUNDED)


def adapting(arguments: Namespace) -> "LLM":
    # vLLM's kernels of adapters for GPUs have no float32 (lora/ops/triton_ops).
    kind = "float32" if arguments.device == "cpu" else "bfloat16"
    slots = {"max_loras": SLOTS, "max_lora_rank": RANK}
    return start(arguments, enable_lora=True, dtype=kind, **slots)


def embedding(arguments: Namespace, expected: Record, kind: str) -> Rows:
    """Compare embeddings with Hugging Face's: normalized, as they are, and cut to a length."""
    import torch
    from vllm import PoolingParams

    chunks = {"max_num_batched_tokens": 64} if kind == "LAST" else {}
    llm = start(
        arguments,
        runner="pooling",
        convert="embed",
        pooler_config={"pooling_type": kind},
        hf_overrides={"is_matryoshka": True},
        **chunks,
    )
    prompts = [{"prompt_token_ids": tokens_of(length, length)} for length in LENGTHS]
    vectors = torch.tensor(expected["pooled"][kind])
    cases: tuple[tuple[str, Record, Tensor], ...] = (
        ("normalized", {}, _unit(vectors)),
        ("as they are", {"use_activation": False}, vectors),
        ("cut", {"dimensions": DIMENSIONS}, _unit(vectors[:, :DIMENSIONS])),
    )
    for name, given, wanted in cases:
        params = PoolingParams(**given)
        outputs = llm.embed(prompts, pooling_params=params, use_tqdm=False)
        sizes = [len(output.outputs.embedding) for output in outputs]
        title = f"{kind}, {name}"
        yield row(f"{title}: dimensions", sizes, [wanted.shape[1]] * len(LENGTHS))
        if sizes == [wanted.shape[1]] * len(LENGTHS):
            found = torch.tensor([output.outputs.embedding for output in outputs])
            far = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
            yield apart(f"{title}: embeddings", far.tolist())


def _unit(vectors: "Tensor") -> "Tensor":
    return vectors / vectors.norm(dim=1, keepdim=True)


def runs(arguments: Namespace, expected: Record) -> Iterator[tuple[str, Callable[[], Rows]]]:
    """Yield the checks of a part, in the engine that they share."""
    if arguments.part == "memory":
        llm = tight(arguments)
        yield "engine.preemption", lambda: preemption(llm, expected)
        yield "engine.abort", lambda: abort(llm, expected)
    elif arguments.part == "speculation":
        yield "engine.speculation", lambda: speculation(guessing(arguments), expected)
    elif arguments.part == "adapters":
        folder = arguments.adapters
        yield "engine.adapters", lambda: adapters(adapting(arguments), expected, folder)
    else:
        for kind in ("LAST", "MEAN", "CLS"):
            yield "engine.pooling", partial(embedding, arguments, expected, kind)


def measured(arguments: Namespace) -> Record:
    """Return the rows of each check of a part."""
    known = json.loads(arguments.against.read_text())
    if known["error"]:
        raise RuntimeError(f"Hugging Face: {known['error']}")
    done: Record = document.measured(runs(arguments, known["reference"]))
    return done


def arguments_of() -> Namespace:
    """Return the options of the command line."""
    parser = ArgumentParser(description="Compare vLLM's engine with a reference.")
    add = parser.add_argument
    add("model", type=Path, help="its folder")
    parts = ("reference", "memory", "speculation", "adapters", "pooling")
    add("--part", choices=parts, default="reference")
    add("--adapters", type=Path, required=True, metavar="FOLDER", help="where they are")
    add("--against", type=Path, metavar="FILE", help="of the part reference")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args()


def main() -> None:
    arguments = arguments_of()
    os.environ |= {**document.FLOAT32, **document.ORDERED}
    record: Record = {"schema": SCHEMA, "error": None}
    is_reference = arguments.part == "reference"
    with document.printed(record, speaker="" if is_reference else "vLLM: "):
        if is_reference:
            record["reference"] = reference(arguments)
        else:
            record["groups"] = measured(arguments)


if __name__ == "__main__":
    main()
