"""Greedy tokens and log-probabilities of Hugging Face's transformers on the prompts of the smoke,
for probes/parity.py to compare with; with --sampling also the answers to requests that change one
sampling parameter each, for probes/sampling.py.

One prompt at a time: no padding, no batching, plain attention. One JSON document on stdout.
"""

import argparse
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

document = SimpleNamespace(**run_path(str(Path(__file__).with_name("document.py"))))
SCHEMA = 1
# Lengths below, across and far beyond one block of the KV cache (16 tokens on a GPU, 128 on a CPU),
# so that a batch mixes them.
PROMPTS = (
    "Hello",
    "The quick brown fox jumps over the lazy dog.",
    (
        "In the beginning there was a kernel, and the kernel was compiled for one processor; on"
        " every other it was void."
    ),
    (
        "def add(a, b):\n    return a + b\n\n\ndef test_add():\n    assert add(2, 2) == 4\n   "
        " assert add(-1, 1) == 0\n\n\n# übung macht den Meister, 練習\n"
    ),
    "A patch that nobody carries is lost. " * 8,
)
# Questions for a model that answers some, with --chats.
CHATS = ("What is the capital of France?", "Explain in a few sentences how a bicycle works.")
# The chat whose next token is the least certain, for the sampling parameters.
SAMPLED = PROMPTS[2]
SAMPLED_TOKENS = 12
# Most likely tokens that a case keeps of each position; a request is for the first `TOP`.
KEPT, TOP = 8, 5
# Nats: a choice that is closer than this may fall either way, and ends what a case compares.
TIE = 2e-3
# Tokens of the prompt that an answer with a penalty has, beside as many others.
FEW = 3
# How many tokens the filters may keep, and the temperature of the samples that are counted.
LEFT, WARM = range(3, 7), 0.7
# Stands for minus infinity, which JSON lacks.
NEVER = -1e9

# From the tokens before and the scores of the next token to other scores, as in transformers.
Processor = Callable[["Tensor", "Tensor"], "Tensor"]

# A part of the document.
Record = dict[str, Any]


def forbid_tf32(*, is_compiled: bool) -> None:
    """Set full float32, and for a model in eager mode a fixed order of additions, as far as PyTorch
    can promise it (pytorch.org, notes/numerical_accuracy).
    """
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    # This also sets Inductor's deterministic mode (torch/__init__.py), in which it raises at every
    # benchmark that may change a sum's order (_inductor/runtime/benchmarking.py). vLLM asks for one
    # on GPUs, benchmark_combo_kernel, so a compiled engine runs as users run it.
    torch.use_deterministic_algorithms(not is_compiled, warn_only=True)


def dequantized(folder: str) -> dict[str, object]:
    """Return the options to load MXFP4 experts as the numbers that they stand for."""
    import transformers

    method = (
        json.loads((Path(folder) / "config.json").read_text())
        .get("quantization_config", {})
        .get("quant_method")
    )
    return (
        {"quantization_config": transformers.Mxfp4Config(dequantize=True)}
        if method == "mxfp4"
        else {}
    )


def decoded(model: "PreTrainedModel", prompt: list[int], tokens: int) -> dict[str, object]:
    """Return the row of one prompt."""
    import torch

    ids = torch.tensor([prompt], device=model.device)
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        # min_new_tokens forbids these tokens, which would change the log-probabilities.
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    chosen: list[int] = made.sequences[0, ids.shape[1] :].tolist()
    chances = torch.log_softmax(torch.stack([step[0].float() for step in made.logits]), dim=-1)
    best = chances.topk(2, dim=-1).values
    # Lead of each token over the second best: a smaller rounding cannot change the choice.
    margins = (best[:, 0] - best[:, 1]).tolist()
    return {
        "prompt": prompt,
        "tokens": chosen,
        "logprobs": [chances[i, token].item() for i, token in enumerate(chosen)],
        "margins": margins,
    }


@dataclass(frozen=True)
class Case:
    """A request that changes a sampling parameter: `params` in vLLM's names, and `processors` that
    do the same in transformers or in float64.

    The answer has at most `count` tokens, and one of `ends` ends it. `listed` are the tokens whose
    log-probabilities it has, None for the most likely ones. `outcome` are further facts.
    """

    name: str
    check: str
    params: Record
    processors: Sequence[Processor] = ()
    ends: Sequence[int] = ()
    count: int = SAMPLED_TOKENS
    listed: Sequence[int] | None = None
    outcome: Record = field(default_factory=dict)


class Sampled:
    """Answers of one model to one prompt, each with another sampling parameter."""

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        self._model, self._tokenizer = model, tokenizer
        self._prompt = chat_tokens(tokenizer, SAMPLED)
        self._letters = sorted({*self._prompt} - {*tokenizer.all_special_ids})
        self._end = int(tokenizer.eos_token_id)

    def record(self) -> Record:
        """Return the cases, the log-probabilities of the prompt, and the probabilities of the next
        token at the temperature WARM.
        """
        plain = self._decode(Case("plain", "logprobs", {}))
        if plain["is_cut"]:
            raise RuntimeError("the choice of a token is too close for the cases of --sampling")
        scores = self._scores(self._prompt)
        best = (scores[-1] / WARM).softmax(-1).topk(2 * TOP)
        named: Record = {"logprob_token_ids": [plain["tokens"][1], 300, 301], "logprobs": 3}
        cases = [
            Case("logprobs", "logprobs", {}),
            Case("logprob_token_ids", "logprobs", named, listed=named["logprob_token_ids"]),
            *(*self._penalties(), *self._masks(plain)),
            *(*self._filters(scores[-1]), *self._ends(plain)),
        ]
        return {
            "message": SAMPLED,
            "prompt": self._prompt,
            "plain": plain["tokens"],
            "cases": [self._answered(case) for case in cases],
            "prompt_logprobs": _positions(scores[:-1].log_softmax(-1), self._prompt[1:], None),
            "temperature": WARM,
            "chances": list(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
        }

    def _answered(self, case: Case) -> Record:
        default: Record = {"temperature": 0.0, "max_tokens": case.count, "logprobs": TOP}
        params = default | {"ignore_eos": not case.ends} | case.params
        known = {"case": case.name, "check": case.check, "params": params}
        return known | self._decode(case) | case.outcome

    def _decode(self, case: Case) -> Record:
        """Decode greedily, up to a tie."""
        import torch

        raw: list[Tensor] = []
        processed: list[Tensor] = []
        ids, cache, is_cut = list(self._prompt), None, False
        while len(raw) < case.count and not (raw and ids[-1] in case.ends):
            given = torch.tensor([ids if cache is None else ids[-1:]], device=self._model.device)
            step = self._model(given, past_key_values=cache, use_cache=True)
            cache, scores = step.past_key_values, step.logits[:, -1].double()
            raw.append(scores[0].log_softmax(-1))
            for process in case.processors:
                scores = process(torch.tensor([ids], device=scores.device), scores.clone())
            processed.append(scores[0].log_softmax(-1))
            best = scores[0].topk(2)
            if is_cut := bool(best.values[0] - best.values[1] < TIE):
                break
            ids.append(int(best.indices[0]))
        made = ids[len(self._prompt) :]
        return {
            "tokens": made,
            "is_cut": is_cut,
            "text": self._tokenizer.decode(made, skip_special_tokens=True),
            "finish": "stop" if made[-1:] and made[-1] in case.ends else "length",
            "raw": _positions(torch.stack(raw), made, case.listed),
            "processed": _positions(torch.stack(processed), made, case.listed),
        }

    def _scores(self, ids: list[int]) -> "Tensor":
        """Return the scores of the token after each position, in float64."""
        import torch

        given = torch.tensor([ids], device=self._model.device)
        return self._model(given).logits[0].double()

    def _penalties(self) -> list[Case]:
        """Return penalties; from a few tokens alone an answer repeats its tokens."""
        import transformers

        start = len(self._prompt)
        repetition = transformers.RepetitionPenaltyLogitsProcessor(1.3)
        changes: tuple[tuple[str, float, Processor], ...] = (
            ("repetition_penalty", 1.3, repetition),
            ("presence_penalty", 1.7, presence(1.7, start)),
            ("presence_penalty", -1.3, presence(-1.3, start)),
            ("frequency_penalty", 0.9, frequency(0.9, start)),
        )
        letters = [*self._letters[-FEW:], 300, 301, 302]
        spelled, few = {"allowed_token_ids": letters}, only(letters)
        return [
            Case(f"{name} {value:g}", "penalties", {name: value} | spelled, (few, process))
            for name, value, process in changes
        ]

    def _masks(self, plain: Record) -> list[Case]:
        import transformers

        few = only(self._letters)
        allowed = Case("allowed_token_ids", "masks", {"allowed_token_ids": self._letters}, (few,))
        spelled, blank = self._decode(allowed)["tokens"], self._tokenizer(" ")["input_ids"][-1]
        # A pair of letters, and a letter. vLLM cuts a blank at the beginning, and searches the
        # answer only; transformers searches the end of the prompt, too.
        others = (blank, self._prompt[-1])
        pair = next(list(pair) for pair in pairwise(spelled) if pair[0] not in others)
        bad = [pair, next([one] for one in spelled[::-1] if one not in (blank, *pair))]
        texts = {"bad_words": [self._tokenizer.decode(tokens) for tokens in bad]}
        biases, won = {plain["tokens"][0]: -100.0, plain["tokens"][3]: 2.5}, {300: 100.0}
        ended = {self._end: 100.0}
        too_early = {"min_tokens": 5, "logit_bias": ended}
        banned = transformers.NoBadWordsLogitsProcessor(bad)
        late = transformers.MinNewTokensLengthLogitsProcessor(
            len(self._prompt), 5, [self._end], device=str(self._model.device)
        )
        return [
            allowed,
            Case("bad_words", "masks", texts | allowed.params, (few, banned)),
            Case("logit_bias", "masks", {"logit_bias": biases}, (biased(biases),)),
            Case("logit_bias 100", "masks", {"logit_bias": won}, (biased(won),), count=4),
            Case("min_tokens", "masks", too_early, (late, biased(ended)), (self._end,)),
        ]

    def _filters(self, scores: "Tensor") -> list[Case]:
        """Return filters of random samples, each between two tokens and far from both; of these
        cases only the first position is determined, and none of its tokens.
        """
        import transformers

        chances = scores.softmax(-1).sort(descending=True).values
        left = max(LEFT, key=lambda count: float(chances[count - 1] / chances[count]))
        total = chances.cumsum(-1)
        top_p = float(total[left - 2] + total[left - 1]) / 2
        min_p = float((chances[left - 1] * chances[left]).sqrt() / chances[0])
        changes: tuple[tuple[Record, Processor], ...] = (
            ({"temperature": WARM}, transformers.TemperatureLogitsWarper(WARM)),
            ({"top_k": left}, transformers.TopKLogitsWarper(left)),
            ({"top_p": top_p}, transformers.TopPLogitsWarper(top_p)),
            ({"min_p": min_p}, transformers.MinPLogitsWarper(min_p)),
        )
        drawn, none = {"temperature": 1.0, "seed": 1}, {"tokens": None, "text": None}
        return [
            Case(
                f"{name} {value:.3g}", "filters", drawn | params, (process,), count=1, outcome=none
            )
            for params, process in changes
            for name, value in params.items()
        ]

    def _ends(self, plain: Record) -> Iterator[Case]:
        """Yield answers that end early, by the tokens and the text of the plain one."""
        tokens, ended = plain["tokens"], {"logit_bias": {self._end: 100.0}}
        # Two tokens have a name in the text (probes/small_model.py): the stop string is the end of
        # the first name and the beginning of the second.
        found = re.search(r"<\d+><\d+>", plain["text"])
        if not found:
            raise RuntimeError(f"no two tokens of {plain['text']!r} have names")
        start, end = found.start() + 2, found.end() - 2
        stop = plain["text"][start:end]
        decoded = [self._tokenizer.decode(tokens[:count]) for count in range(len(tokens) + 1)]
        count = next(i for i, text in enumerate(decoded) if stop in text)
        stops = {"stop": [stop], "max_tokens": SAMPLED_TOKENS}
        kept = stops | {"include_stop_str_in_output": True}
        again = {"repetition_detection": {"max_pattern_size": 1, "min_count": 3}}
        special = ended | {"skip_special_tokens": False}
        repeated = {"finish": "repetition", "stop": "repetition_detected"}
        rows: tuple[tuple[str, Record, bool, int, Record], ...] = (
            ("stop", stops, False, count, {"text": plain["text"][:start]}),
            ("include_stop_str_in_output", kept, False, count, {"text": plain["text"][:end]}),
            ("ignore_eos", ended | {"ignore_eos": True}, True, 4, {}),
            ("skip_special_tokens", special, True, 4, {"text": 4 * self._tokenizer.eos_token}),
            ("detokenize", {"detokenize": False}, False, 4, {"text": ""}),
            ("repetition_detection", ended | again | {"max_tokens": 12}, True, 3, repeated),
        )
        for name, params, is_ended, length, outcome in rows:
            stopped = {"finish": "stop", "stop": stop} if "stop" in params else {}
            used = (biased(ended["logit_bias"]),) if is_ended else ()
            yield Case(name, "ends", params, used, count=length, outcome=stopped | outcome)
        third, outcome = tokens[2:3], {"stop": tokens[2], "text": decoded[2]}
        yield Case("stop_token_ids", "ends", {"stop_token_ids": third}, (), third, outcome=outcome)
        yield Case("the end of text", "ends", ended, (biased(ended["logit_bias"]),), [self._end])


def chat_tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return the tokens of a conversation of one message."""
    chat = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))


def presence(penalty: float, start: int) -> Processor:
    """Return OpenAI's penalty of each token that is in the answer; a prompt has `start` tokens."""

    def process(ids: "Tensor", scores: "Tensor") -> "Tensor":
        scores[0, ids[0, start:].unique()] -= penalty
        return scores

    return process


def frequency(penalty: float, start: int) -> Processor:
    """Return OpenAI's penalty of each token, for every time that the answer has it."""

    def process(ids: "Tensor", scores: "Tensor") -> "Tensor":
        return scores - penalty * ids[0, start:].bincount(minlength=scores.shape[1])

    return process


def only(allowed: Sequence[int]) -> Processor:
    def process(_: "Tensor", scores: "Tensor") -> "Tensor":
        found = scores.new_full(scores.shape, float("-inf"))
        found[0, allowed] = scores[0, allowed]
        return found

    return process


def biased(biases: dict[int, float]) -> Processor:
    def process(_: "Tensor", scores: "Tensor") -> "Tensor":
        for token, bias in biases.items():
            scores[0, token] += bias
        return scores

    return process


def _positions(
    chances: "Tensor", made: Sequence[int], listed: Sequence[int] | None
) -> list[Record]:
    """Return the log-probabilities of each position: the most likely tokens or the listed ones; of
    the token that was made also the lowest and the highest rank that rounding allows.
    """
    import torch

    rows = []
    for position, values in enumerate(chances.clamp_min(NEVER)):
        ids = values.topk(KEPT).indices if listed is None else torch.tensor(listed)
        row: Record = {"ids": ids.tolist(), "logprobs": values[ids].tolist()}
        if position < len(made):
            own = values[made[position]]
            ranks = [int((values > own + by).sum()) + 1 for by in (TIE, -TIE)]
            row |= {"token": made[position], "logprob": float(own), "ranks": ranks}
        rows.append(row)
    return rows


def load(
    folder: str, device: str, dtype: str
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Return a model with its tokenizer."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    loaded = {
        "dtype": getattr(torch, dtype),
        "attn_implementation": "eager",
        "local_files_only": True,
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, **loaded, **dequantized(folder)
    )
    model.to(device).eval()
    if dtype == "float32":
        # Dequantized MXFP4 comes in bfloat16, which holds it exactly, and would stay in bfloat16.
        model.float()
    return model, tokenizer


def rows_of(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", arguments: argparse.Namespace
) -> list[Record]:
    """Return the rows of all prompts for one model."""
    prompts = {text: tokenizer(text)["input_ids"] for text in PROMPTS}
    if arguments.chats:
        prompts = {text: chat_tokens(tokenizer, text) for text in CHATS}
    return [
        {"text": text} | decoded(model, prompt, arguments.tokens)
        for text, prompt in prompts.items()
    ]


def named_folder(text: str) -> tuple[str, str]:
    """Return the name and the folder of NAME=FOLDER; FOLDER may be a model's name on the hub, whose
    files are in the cache.
    """
    name, _, folder = text.partition("=")
    if folder and not Path(folder).exists():
        with suppress(Exception):
            import huggingface_hub

            folder = huggingface_hub.snapshot_download(folder, local_files_only=True)
    if not (Path(folder) / "config.json").is_file():
        raise argparse.ArgumentTypeError(
            f"{text} is not NAME=FOLDER, or the folder holds no config.json"
        )
    return name, str(Path(folder).resolve())


def arguments_of() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description="Decode the smoke's prompts with Hugging Face's transformers."
    )
    add, form = parser.add_argument, "a folder in Hugging Face's layout; repeatable"
    named = "NAME=FOLDER"
    add("--model", type=named_folder, action="append", required=True, metavar=named, help=form)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--tokens", type=int, default=64, help="how many to generate for each prompt")
    add("--chats", action="store_true", help="answer questions instead")
    add("--sampling", metavar="NAME", help="the model of the sampling parameters")
    arguments = parser.parse_args()
    if arguments.tokens < 1:
        parser.error("--tokens is at least 1")
    return arguments


def main() -> None:
    arguments = arguments_of()
    os.environ |= {"NVIDIA_TF32_OVERRIDE": "0", **document.ORDERED}
    record: Record = {"schema": SCHEMA, "error": None, "models": {}}
    with document.printed(record):
        started = time.monotonic()
        try:
            answer(arguments, record)
        finally:
            record["seconds"] = round(time.monotonic() - started, 3)


def answer(arguments: argparse.Namespace, record: Record) -> None:
    """Put the answers of each model into the record."""
    import torch
    import transformers

    forbid_tf32(is_compiled=False)
    for name, folder in arguments.model:
        model, tokenizer = load(folder, arguments.device, arguments.dtype)
        with torch.inference_mode():
            record["models"][name] = rows_of(model, tokenizer, arguments)
            if name == arguments.sampling:
                record["sampling"] = Sampled(model, tokenizer).record()
    record["transformers"] = transformers.__version__


if __name__ == "__main__":
    main()
