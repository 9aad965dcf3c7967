"""Change every sampling parameter of vLLM alone, and ask for prompts that share some of their
blocks: compare the answers with those of `reference.py --sampling`, and the numbers of cached
tokens with the exact ones.

With --processed the log-probabilities are those after all parameters; with --adapter prompts have
an adapter, too. The caller sets the environment that vLLM reads. One JSON document on stdout: for
each group of checks its rows, each with a problem (a sentence or null) or a difference in nats.
"""

import json
import math
import os
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest

document = SimpleNamespace(**run_path(str(Path(__file__).with_name("document.py"))))
SCHEMA = 1
Record = dict[str, Any]
Rows = Iterator[Record]
# More requests than a batch has, and blocks for all of them and for the cached prompts.
SEQUENCES, BLOCKS = 64, 512
# Samples that are counted, twice, and the probability that a right engine fails either count.
SAMPLES, FALSE_ALARM = 512, 1e-6
# As in probes/reference.py: minus infinity, and what rounding may change (nats).
NEVER, TIE = -1e9, 2e-3
# Conversations, each with arguments of a request; what a tiny model's template makes of them has
# every branch of it (probes/small_model.py).
USER = {"role": "user", "content": "Is it built?\nÜbung: 練習"}
SYSTEM = {"role": "system", "content": "Be <s> brief."}
REPLY = {"role": "assistant", "content": "It is"}
TOOL = {"type": "function", "function": {"name": "build", "parameters": {"type": "object"}}}
CHATS: tuple[tuple[list[Record], Record], ...] = (
    ([USER], {}),
    ([SYSTEM, USER], {}),
    ([SYSTEM, USER, REPLY, USER], {}),
    ([USER, REPLY], {"add_generation_prompt": False}),
    ([USER, REPLY], {"add_generation_prompt": False, "continue_final_message": True}),
    ([USER], {"chat_template_kwargs": {"mood": "calm"}}),
    ([USER], {"tools": [TOOL]}),
)
TEXTS = ("Hello", "", "<s>Hello</s> <s>", "  Übung\n練習", "a<unk>b")
# The adapter changes queries and values by a product of two matrices of this rank.
RANK = 8


class Engine:
    """vLLM with one model and a prefix cache."""

    def __init__(self, folder: str, arguments: Namespace) -> None:
        import vllm

        self._vllm, self.folder = vllm, folder
        # vLLM's kernels of adapters for GPUs have no float32 (lora/ops/triton_ops).
        self.is_exact = arguments.device == "cpu" or not arguments.adapter
        options: Record = {
            "dtype": "float32" if self.is_exact else "bfloat16",
            "max_model_len": 1024,
            "max_num_seqs": SEQUENCES,
            "max_logprobs": -1,
            "enable_prefix_caching": True,
            "num_gpu_blocks_override": BLOCKS,
        }
        if arguments.processed:
            options["logprobs_mode"] = "processed_logprobs"
        if arguments.adapter:
            options |= {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 1}
        self._llm = vllm.LLM(**(document.engine_options(folder, arguments.device) | options))
        config = self._llm.llm_engine.vllm_config
        self.block: int = config.cache_config.block_size
        self.shape = config.model_config.hf_config

    def params(self, **changes: object) -> "SamplingParams":
        """Return parameters; by default those of a greedy answer of one token."""
        from vllm.sampling_params import RepetitionDetectionParams

        given: Record = {"temperature": 0.0, "max_tokens": 1, "ignore_eos": True} | changes
        if "repetition_detection" in given:
            given["repetition_detection"] = RepetitionDetectionParams(
                **given["repetition_detection"]
            )
        if "logit_bias" in given:
            given["logit_bias"] = {int(key): value for key, value in given["logit_bias"].items()}
        return self._vllm.SamplingParams(**given)

    def ask(
        self,
        prompts: list[list[int]],
        params: "list[SamplingParams]",
        *,
        salt: str | None = None,
        adapter: "LoRARequest | None" = None,
    ) -> "list[RequestOutput]":
        """Return the outputs of a batch."""
        more = {"cache_salt": salt} if salt else {}
        inputs = [{"prompt_token_ids": prompt} | more for prompt in prompts]
        outputs = self._llm.generate(inputs, params, use_tqdm=False, lora_request=adapter)
        return list(outputs)

    def rendered(self, messages: list[Record], more: Record) -> list[int]:
        """Return the tokens of a conversation."""
        greedy = self.params()
        (output,) = self._llm.chat(messages, greedy, use_tqdm=False, **more)
        return list(output.prompt_token_ids)

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a prompt that is a text."""
        (output,) = self._llm.generate([text], self.params(), use_tqdm=False)
        return list(output.prompt_token_ids)

    def cached(self, prompt: list[int], count: int = 1, **how: Any) -> tuple[int, list[int]]:
        """Return how many tokens of a prompt came from the cache, and its answer."""
        (output,) = self.ask([prompt], [self.params(max_tokens=count)], **how)
        return int(output.num_cached_tokens or 0), list(output.outputs[0].token_ids)


row, tokens_of = document.row, document.tokens_of


def answered(case: Record, output: "RequestOutput", kind: str) -> Rows:
    """Compare the answer to a case with the reference's; `kind` of log-probabilities is raw or
    processed.
    """
    name, made = case["case"], output.outputs[0]
    ids, wanted = list(made.token_ids), case["tokens"]
    if wanted is not None:
        yield row(f"{name}: its tokens are", ids[: len(wanted)] if case["is_cut"] else ids, wanted)
        if not case["is_cut"]:
            yield row(f"{name}: its text is", made.text, case["text"])
            ends = (made.finish_reason, made.stop_reason)
            yield row(f"{name}: it ends with", ends, (case["finish"], case.get("stop")))
        ids = ids[: len(wanted)]
    else:
        known = dict(zip(case[kind][0]["ids"], case[kind][0]["logprobs"], strict=True))
        if NEVER in known.values() and known.get(ids[0], NEVER) == NEVER:
            yield {"case": name, "problem": f"the token {ids[0]} is none that the filter leaves"}
    title = f"{name}: {kind} log-probabilities"
    found = made.logprobs or []
    if len(found) < len(ids):
        yield {"case": title, "problem": f"{len(found)} of {len(ids)} positions have any"}
    for chances, expected in zip(found, case[kind], strict=False):
        yield from position(
            title, chances, expected, is_listed="logprob_token_ids" in case["params"]
        )


def position(title: str, found: Any, expected: Record, *, is_listed: bool) -> Rows:
    """Compare the log-probabilities and ranks of one position, a dictionary by token."""
    known = dict(zip(expected["ids"], expected["logprobs"], strict=True))
    own = expected.get("token")
    if own is not None:
        known[own] = expected["logprob"]
        low, high = expected["ranks"]
        rank = found[own].rank if own in found else None
        if rank is None or not low <= rank <= high:
            text = f"token {own} has the rank {rank}, expected {low} to {high}"
            yield {"case": title, "problem": text}
    listed = {token: chance for token, chance in found.items() if token in known}
    if is_listed and listed.keys() != known.keys():
        text = f"the tokens are {sorted(found)}, expected {sorted(known)}"
        yield {"case": title, "problem": text}
    # A token that is none of the most likely ones may be among them where it ties with the last,
    # or because it was drawn.
    least = min(expected["logprobs"])
    differences = [
        abs(max(chance.logprob, NEVER) - known.get(token, least))
        for token, chance in found.items()
        if token in known or chance.rank <= len(known)
    ]
    if not differences or not all(map(math.isfinite, differences)):
        yield {"case": title, "problem": "are no finite numbers"}
    else:
        yield {"case": title, "difference": max(differences)}


def compared(engine: Engine, reference: Record, group: str, kind: str) -> Rows:
    """Ask for the cases of a group in one batch, or alone, and compare the answers."""
    # In a batch with logprob_token_ids, vLLM 0.31.0 gives no other request its most likely tokens
    # (github.com/vllm-project/vllm/pull/51789). A filter alone has a faster way than several.
    together: list[Record] = []
    batches = [together]
    for case in reference["cases"]:
        is_alone = group == "filters" or "logprob_token_ids" in case["params"]
        if case["check"] == group and is_alone:
            batches.append([case])
        elif case["check"] == group:
            together.append(case)
    for batch in filter(None, batches):
        params = [engine.params(**case["params"]) for case in batch]
        outputs = engine.ask([reference["prompt"]] * len(batch), params)
        for case, output in zip(batch, outputs, strict=True):
            yield from answered(case, output, kind)


def logprobs(engine: Engine, reference: Record) -> Rows:
    """Compare log-probabilities of the prompt, and those of the whole vocabulary."""
    prompt = reference["prompt"]
    changes: tuple[Record, ...] = ({"prompt_logprobs": 5}, {"logprobs": -1}, {"logprobs": 0})
    scored, whole, bare = engine.ask([prompt] * 3, [engine.params(**each) for each in changes])
    title, scores = "prompt_logprobs", scored.prompt_logprobs or ()
    yield row(f"{title}: positions", len(scores), len(prompt))
    for found, expected in zip(scores[1:], reference["prompt_logprobs"], strict=False):
        yield from position(title, found, expected, is_listed=False)
    chances = [chance.logprob for chance in whole.outputs[0].logprobs[0].values()]
    total = math.fsum(map(math.exp, chances))
    yield row("logprobs -1: the sum of all probabilities is", round(total, 3), 1.0)
    yield row("logprobs -1: tokens", len(chances), engine.shape.vocab_size)
    yield row("logprobs 0: tokens", list(bare.outputs[0].logprobs[0]), reference["plain"][:1])


def filters(engine: Engine, reference: Record) -> Rows:
    """Ask for random samples of which a filter leaves the most likely token only."""
    plain = reference["plain"]
    strict: tuple[Record, ...] = ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0})
    params = [engine.params(temperature=1.5, max_tokens=len(plain), **each) for each in strict]
    outputs = engine.ask([reference["prompt"]] * len(params), params)
    for each, output in zip(strict, outputs, strict=True):
        found = list(output.outputs[0].token_ids)
        yield row(f"{each}: its tokens are the greedy ones", found, plain)


def random(engine: Engine, reference: Record) -> Rows:
    """Compare samples: of one seed and of two, of one request, and many with the probabilities."""
    prompt, count = reference["prompt"], len(reference["plain"])

    def warm(**changes: object) -> "SamplingParams":
        return engine.params(**({"temperature": 1.5, "max_tokens": count} | changes))

    seeds = (7, 8, 7, None, None)
    made = [
        list(output.outputs[0].token_ids)
        for output in engine.ask([prompt] * len(seeds), [warm(seed=seed) for seed in seeds])
    ]
    (alone,) = engine.ask([prompt], [warm(seed=7)])
    yield row("seed: the same seed repeats", made[2], made[0])
    yield row("seed: the same seed repeats alone", list(alone.outputs[0].token_ids), made[0])
    yield row("seed: another seed differs", made[1] != made[0], True)
    yield row("seed: requests without a seed differ", made[3] != made[4], True)
    for seed in (None, 7):
        (several,) = engine.ask([prompt], [warm(n=4, seed=seed)])
        answers = {tuple(output.token_ids) for output in several.outputs}
        yield row(f"n 4, seed {seed}: different answers", len(answers), 4)
        indexes = [output.index for output in several.outputs]
        yield row(f"n 4, seed {seed}: indexes", indexes, [0, 1, 2, 3])
    # A request with a seed goes another way.
    for seed in (None, 9):
        counted = warm(n=SAMPLES, seed=seed, temperature=reference["temperature"], max_tokens=1)
        (many,) = engine.ask([prompt], [counted])
        drawn = [output.token_ids[0] for output in many.outputs]
        yield from distributed(drawn, reference["chances"])


def distributed(samples: list[int], chances: list[tuple[int, float]]) -> Rows:
    """Compare counts of samples with probabilities: each token's, and that of all other tokens.

    Each count has a binomial distribution, so that the sum of the tails bounds the probability of
    a false alarm, however the counts depend on each other (Bonferroni).
    """
    counts = Counter(samples)
    rest = len(samples) - sum(counts[token] for token, _ in chances)
    expected = [(str(token), counts[token], chance) for token, chance in chances]
    expected.append(("all others", rest, 1 - math.fsum(chance for _, chance in chances)))
    title = "temperature: samples"
    yield row(title, len(samples), SAMPLES)
    for name, count, chance in expected:
        if tail(count, len(samples), chance) < FALSE_ALARM / 2 / len(expected):
            yield {"case": title, "problem": f"token {name} is {count} of them, not {chance:.1%}"}


def tail(count: int, total: int, chance: float) -> float:
    """Return the probability of a count at least as far out on its side, twice."""

    def log_pmf(value: int) -> float:
        ways = math.lgamma(total + 1) - math.lgamma(value + 1) - math.lgamma(total - value + 1)
        return ways + value * math.log(chance) + (total - value) * math.log1p(-chance)

    pmf = [math.exp(log_pmf(value)) for value in range(total + 1)]
    return min(1.0, 2 * min(math.fsum(pmf[: count + 1]), math.fsum(pmf[count:])))


def blocks(engine: Engine, _: Record) -> Rows:
    """Demand the exact number of cached tokens of prompts that differ in one token."""
    size = engine.block
    prompt = tokens_of(0, 3 * size + 5)
    yield row("a new prompt: cached tokens", engine.cached(prompt)[0], 0)
    yield row("the same prompt again: cached tokens", engine.cached(prompt)[0], 3 * size)
    for block in range(3):
        for name, inside in (("first", 0), ("middle", size // 2), ("last", size - 1)):
            at = block * size + inside
            other = [*prompt[:at], prompt[at] + 1, *prompt[at + 1 :]]
            title = f"another token, the {name} of block {block + 1}: cached tokens"
            yield row(title, engine.cached(other)[0], block * size)
    # At least one token is computed, of which the answer comes.
    yield row("two blocks: cached tokens", engine.cached(prompt[: 2 * size])[0], size)
    longer = prompt[: 2 * size + 1]
    yield row("two blocks and a token: cached tokens", engine.cached(longer)[0], 2 * size)
    swapped = [*prompt[size : 2 * size], *prompt[:size], *prompt[2 * size :]]
    yield row("the blocks in another order: cached tokens", engine.cached(swapped)[0], 0)
    turned = [*reversed(prompt[:size]), *prompt[size:]]
    yield row("a block turned around: cached tokens", engine.cached(turned)[0], 0)
    begun = tokens_of(1, 2 * size - 4)
    made = engine.cached(begun, 12)[1]
    yield row(
        "a prompt with its answer: cached tokens", engine.cached([*begun, *made])[0], 2 * size
    )
    (output,) = engine.ask([prompt], [engine.params(prompt_logprobs=0)])
    yield row("prompt_logprobs: cached tokens", output.num_cached_tokens, 0)
    (output,) = engine.ask([prompt], [engine.params(skip_reading_prefix_cache=True)])
    yield row("skip_reading_prefix_cache: cached tokens", output.num_cached_tokens, 0)


def keys(engine: Engine, _: Record) -> Rows:
    """Demand the exact number of cached tokens of one prompt with different salts."""
    prompt = tokens_of(2, 2 * engine.block + 3)
    whole = 2 * engine.block
    for salt, expected in ((None, 0), ("a", 0), ("b", 0), ("a", whole), (None, whole)):
        found = engine.cached(prompt, salt=salt)[0]
        yield row(f"the salt {salt}: cached tokens", found, expected)


def adapters(engine: Engine, __: Record) -> Rows:
    """Demand the exact number of cached tokens of one prompt with an adapter and without."""
    from vllm.lora.request import LoRARequest

    prompt, whole = tokens_of(3, 2 * engine.block + 3), 2 * engine.block
    with tempfile.TemporaryDirectory(dir=".") as folder:
        write_adapter(Path(folder), engine.shape)
        adapter = LoRARequest("one", 1, str(Path(folder).resolve()))
        found = [engine.cached(prompt, 8, adapter=used) for used in 2 * (None, adapter)]
    names = ("without an adapter", "with an adapter")
    for name, (count, _), expected in zip(2 * names, found, (0, 0, whole, whole), strict=True):
        yield row(f"{name}: cached tokens", count, expected)
    plain, changed, *again = (answer for _, answer in found)
    yield row("with an adapter: another answer", changed != plain, True)
    if engine.is_exact:
        yield row("with an adapter and without: the same answers again", again, [plain, changed])


def chats(engine: Engine, reference: Record) -> Rows:
    """Compare the tokens of conversations and of texts with those of Hugging Face's tokenizer."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(engine.folder, local_files_only=True)
    for messages, more in CHATS:
        arguments = {key: value for key, value in more.items() if key != "chat_template_kwargs"}
        arguments = (
            {"add_generation_prompt": True} | arguments | more.get("chat_template_kwargs", {})
        )
        expected = tokenizer.apply_chat_template(messages, return_dict=False, **arguments)
        text = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
        known = {"messages": messages, "more": more, "tokens": expected, "text": text}
        reference.setdefault("chats", []).append(known)
        roles = " ".join(message["role"] for message in messages)
        title = " ".join([f"the conversation {roles}", *more])
        yield row(f"{title}: its tokens are", engine.rendered(messages, more), expected)
    for text in TEXTS:
        expected = tokenizer(text)["input_ids"]
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        known = {"text": text, "tokens": expected, "bare": bare}
        reference.setdefault("texts", []).append(known | {"decoded": tokenizer.decode(expected)})
        yield row(f"the text {text!r}: its tokens are", engine.tokens(text), expected)


def write_adapter(folder: Path, shape: Any) -> None:
    """Write an adapter of queries and values in the layout of Hugging Face's peft."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(1)
    sizes = {"q_proj": shape.num_attention_heads, "v_proj": shape.num_key_value_heads}
    tensors = {}
    for layer in range(shape.num_hidden_layers):
        for name, heads in sizes.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(RANK, shape.hidden_size)
            tensors[f"{place}.lora_B.weight"] = torch.randn(heads * shape.head_dim, RANK) / RANK
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(sizes)}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


Group = Callable[[Engine, Record], Rows]


def of(name: str, kind: str) -> Group:
    return lambda engine, reference: compared(engine, reference, name, kind)


# The check that each group is a part of, and its rows.
RAW: tuple[tuple[str, Group], ...] = (
    ("sampling.logprobs", of("logprobs", "raw")),
    ("sampling.logprobs", logprobs),
    ("sampling.penalties", of("penalties", "raw")),
    ("sampling.masks", of("masks", "raw")),
    ("sampling.ends", of("ends", "raw")),
    ("sampling.filters", filters),
    ("sampling.random", random),
    ("cache.blocks", blocks),
    ("cache.keys", keys),
    ("templates.tokens", chats),
)
PROCESSED: tuple[tuple[str, Group], ...] = (
    ("sampling.logprobs", of("logprobs", "processed")),
    ("sampling.penalties", of("penalties", "processed")),
    ("sampling.masks", of("masks", "processed")),
    ("sampling.filters", of("filters", "processed")),
)
ADAPTER: tuple[tuple[str, Group], ...] = (("cache.keys", adapters),)


def arguments_of() -> Namespace:
    """Return the options of the command line."""
    parser = ArgumentParser(description="Compare each sampling parameter of vLLM with a reference.")
    parser.add_argument("model", type=Path, help="its folder")
    parser.add_argument(
        "--against", type=Path, required=True, metavar="FILE", help="of reference.py"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    meaning = "compare log-probabilities after all parameters"
    parser.add_argument("--processed", action="store_true", help=meaning)
    parser.add_argument("--adapter", action="store_true", help="prompts with an adapter, too")
    return parser.parse_args()


def main() -> None:
    arguments = arguments_of()
    os.environ |= document.FLOAT32
    started = time.monotonic()
    record: Record = {"schema": SCHEMA, "error": None, "groups": {}}
    with document.printed(record, speaker="vLLM: "):
        known = json.loads(arguments.against.read_text())
        reference = known.get("sampling")
        if not reference:
            raise RuntimeError(f"Hugging Face: {known.get('error') or 'no answer'}")
        engine = Engine(str(arguments.model.resolve()), arguments)
        record |= {"load_s": round(time.monotonic() - started, 3), "block": engine.block}
        groups = PROCESSED if arguments.processed else () if arguments.adapter else RAW
        groups += ADAPTER if arguments.adapter else ()
        record["groups"] = document.measured(
            (check, partial(group, engine, reference)) for check, group in groups
        )
        record |= {key: reference.get(key, []) for key in ("chats", "texts")}


if __name__ == "__main__":
    main()
