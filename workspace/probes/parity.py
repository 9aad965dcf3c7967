"""Compare vLLM's greedy tokens and log-probabilities with those of probes/reference.py, and with
vLLM's own when the same prompts come in other ways.

Each engine runs in a forked child, so that a crash is reported with its stage and imports are paid
once. The caller sets the environment that vLLM reads. One JSON document on stdout.
"""

import faulthandler
import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from runpy import run_path
from statistics import mean
from types import SimpleNamespace
from typing import Any


def beside(name: str) -> SimpleNamespace:
    """Load another probe of this folder, which is no place to import from (probes/imports.py)."""
    return SimpleNamespace(**run_path(str(Path(__file__).with_name(f"{name}.py"))))


document = beside("document")
SCHEMA = 2
# Two heads, each longer than two blocks of a CPU's cache, that differ in their first block only;
# two tails of each: a cached block is right only behind its own head.
HEAD = "Once there was a kernel that nobody had compiled. " * 6
HEADS = (HEAD, "None" + HEAD[4:])
TAILS = ("It waited.", "Then came a patch, and it was a small one.")
SHARED = tuple(head + tail for head in HEADS for tail in TAILS)
CONSISTENCY = ("repeat", "batch", "parts", "chunked", "prefix")
# Tokens of each answer where an engine is compared with itself, and where a long prompt is cut.
CONSISTENT_TOKENS = 12
CUTS = (33, 130, 200)
# Tokens of the answer whose layers are compared: a prefill, and steps that decode.
LAYER_TOKENS = 4
# Most tokens of one step, so that a long prompt comes in chunks.
CHUNK = 96
# The caller's time limit, less the time for the stack dumps.
LIMIT_S = float(os.environ.get("WORKSPACE_SMOKE_LIMIT_S", "0"))

# A part of the document; rows have the prompt, tokens and log-probabilities of one answer each.
Record = dict[str, Any]
Rows = list[Record]
Send = Callable[[Record], None]


class Child:
    """A forked stage that sends parts of its record; the cause of its death becomes its error."""

    def __init__(
        self, function: Callable[..., None], *arguments: object, limit_s: float = LIMIT_S
    ) -> None:
        self.record: Record = {"stage": "start", "error": None, "hangs": False, "seconds": {}}
        self._started = time.monotonic()
        fork = multiprocessing.get_context("fork")
        self._reader, writer = fork.Pipe(duplex=False)
        self._child = fork.Process(target=_run, args=(writer.send, function, arguments, limit_s))
        self._child.start()
        writer.close()

    def finish(self) -> Record:
        """Wait until the child has ended. Return its record."""
        try:
            while True:
                part = self._reader.recv()
                self.record["seconds"] |= part.pop("seconds", {})
                self.record |= part
        except EOFError:
            self._child.join()
        status = self._child.exitcode or 0
        self.record["hangs"] = bool(status and 0 < LIMIT_S <= time.monotonic() - self._started)
        if status and not self.record["error"]:
            if self.record["hangs"]:
                end = f"gave no answer in {LIMIT_S:g} s, its stacks are in the log"
            elif status < 0:
                end = f"killed by {signal.Signals(-status).name}"
            else:
                end = f"exited with {status}"
            self.record["error"] = f"{end} (stage {self.record['stage']})"
        return self.record


def _run(
    write: Send, function: Callable[..., None], arguments: tuple[object, ...], limit_s: float
) -> None:
    # A crash is reported by its signal; a core of several GiB is not wanted.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limit_s:
        # A hang ends itself, with the stacks of all threads on stderr.
        faulthandler.dump_traceback_later(limit_s, exit=True)
    current = "start"

    def send(part: Record) -> None:
        nonlocal current
        current = part.get("stage", current)
        write(part)

    try:
        function(send, *arguments)
    except Exception as exc:
        traceback.print_exc()
        # The first line of a validation error only counts the errors: join the lines.
        message = " ".join(str(exc).split())[:200] or "no message"
        send({"error": f"{type(exc).__name__}: {message} (stage {current})"})


@contextmanager
def stage(send: Send, name: str) -> Iterator[None]:
    """Send the name of a stage, then its seconds."""
    send({"stage": name})
    started = time.monotonic()
    yield
    send({"seconds": {name: round(time.monotonic() - started, 3)}})


class Engine:
    """vLLM with one model."""

    def __init__(
        self, folder: str, arguments: Namespace, texts: list[str], *, has_cache: bool = False
    ) -> None:
        import vllm

        self._vllm = vllm
        longest = 2 * max(len(prompt.encode()) for prompt in (*texts, *SHARED)) + arguments.tokens
        most = max(len(texts), len(SHARED))
        options: dict[str, object] = {
            "dtype": arguments.dtype,
            "enforce_eager": not arguments.compiled,
            "max_model_len": longest,
            "max_num_seqs": most,
            "enable_prefix_caching": has_cache,
            # A GiB of KV cache takes a second to clear, and a few thousand tokens are wanted:
            # enough blocks of 16, of which a CPU's hold more.
            "num_gpu_blocks_override": most * (longest // 16 + 2),
        }
        if has_cache:
            options |= {"enable_chunked_prefill": True, "max_num_batched_tokens": CHUNK}
        self._llm = vllm.LLM(**(document.engine_options(folder, arguments.device) | options))

    def answer(self, prompts: Iterable[str | list[int]], tokens: int) -> Rows:
        """Return rows of greedy answers; a prompt is a text or a list of token ids."""
        inputs = [
            prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
            for prompt in prompts
        ]
        greedy = self._vllm.SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1
        )
        rows = []
        for output in self._llm.generate(inputs, greedy, use_tqdm=False):
            ids = list(output.outputs[0].token_ids)
            chances = zip(output.outputs[0].logprobs, ids, strict=True)
            rows.append(
                {
                    "prompt": list(output.prompt_token_ids),
                    "tokens": ids,
                    "logprobs": [chance[token].logprob for chance, token in chances],
                    "cached": output.num_cached_tokens,
                }
            )
        return rows

    def judge(self, prompts: list[list[int]]) -> list[list[float]]:
        """Return the log-probability of each token of a prompt but the first: a prefill."""
        params = self._vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [
            [
                chance[token].logprob
                for token, chance in zip(
                    output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
                )
            ]
            for output in self._llm.generate(inputs, params, use_tqdm=False)
        ]

    def layers(self, folder: str, prompts: list[str]) -> Record:
        """Compare the layers of a prompt and its answer with float64."""
        judged, path = beside("layers").judged, Path(folder)
        found: list[Record] = self._llm.apply_model(
            lambda model: judged(model, path, lambda: self.answer(prompts, LAYER_TOKENS))
        )
        return found[0]

    def judge_answers(self, rows: Rows) -> list[list[float]]:
        """Return the log-probabilities that a prefill gives to the tokens of answers."""
        judged = self.judge([row["prompt"] + row["tokens"] for row in rows])
        return [
            chances[len(row["prompt"]) - 1 :] for chances, row in zip(judged, rows, strict=True)
        ]


def engines(send: Send, arguments: Namespace, expected: dict[str, Rows]) -> None:
    """Import vLLM once, then run each engine in a forked child."""
    with stage(send, "import"):
        import vllm.entrypoints.llm
        from vllm.platforms import current_platform

    facts = {"version": vllm.__version__, "platform": current_platform.device_type}
    send({"file": str(Path(vllm.__file__).resolve())} | facts)
    for name, folder in [model for model in arguments.model if expected.get(model[0])]:
        is_consistent = name == arguments.consistency
        with stage(send, name):
            done = Child(plain, folder, arguments, expected[name], is_consistent).finish()
            send({f"engine {name}": done})
            if "kernels" in done:
                send({"kernels": done["kernels"]})
        if done["hangs"]:
            send({"error": f"later models were skipped: {name} {done['error']}"})
            return
        if is_consistent:
            with stage(send, "cached"):
                child = Child(cached, folder, arguments, done.get("shared"))
                send({"engine cached": child.finish()})
    send({"stage": "done"})


def plain(
    send: Send, folder: str, arguments: Namespace, expected: Rows, is_consistent: bool
) -> None:
    """Answer all prompts in one batch, then judge the reference's tokens by a prefill; with
    `is_consistent` answer the same prompts in other ways, too.
    """
    import vllm

    with stage(send, "load"):
        beside("reference").forbid_tf32(is_compiled=arguments.compiled)
        texts: list[str] = [row["text"] for row in expected]
        engine = Engine(folder, arguments, texts)
        if arguments.compiled and sys.modules["torch._inductor.config"].deterministic:
            raise RuntimeError("Inductor is in its deterministic mode and compiles for no GPU")
    send({"kernels": document.mapped(Path(vllm.__file__).resolve().parents[1])})
    with stage(send, "generate"):
        rows = engine.answer(texts, arguments.tokens)
        made: Rows = [{"text": text} | row for text, row in zip(texts, rows, strict=True)]
    send({"rows": made})
    with stage(send, "prefill"):
        forced = engine.judge_answers(expected)
    send({"forced": forced})
    if arguments.dtype != "float32":
        # Near-ties part soon, and the tokens decoded after that can only be compared with a prefill
        # of the same tokens.
        with stage(send, "own"):
            judged = engine.judge_answers(made)
        pairs = zip(judged, made, strict=True)
        send({"own": mean(mean(_differences(row["logprobs"], found)) for found, row in pairs)})
    if arguments.layers:
        with stage(send, "layers"):
            send({"layers": engine.layers(folder, [max(texts, key=len)])})
    if is_consistent:
        consistent(send, engine, texts, made)
    send({"stage": "done"})


def consistent(send: Send, engine: Engine, texts: list[str], made: Rows) -> None:
    """Compare the answers with those to the same prompts again, alone, and in parts."""
    first = [
        row | {name: row[name][:CONSISTENT_TOKENS] for name in ("tokens", "logprobs")}
        for row in made
    ]
    with stage(send, "repeat"):
        again = engine.answer(texts, CONSISTENT_TOKENS)
    send({"repeat": summed(first, again, CONSISTENT_TOKENS)})
    with stage(send, "batch"):
        alone = [engine.answer([text], CONSISTENT_TOKENS)[0] for text in texts]
    send({"batch": summed(first, alone, CONSISTENT_TOKENS)})
    with stage(send, "parts"):
        prompt: list[int] = max((row["prompt"] for row in made), key=len)
        whole, *parts = engine.judge([prompt, *(prompt[:cut] for cut in CUTS)])
    rows, found = (
        [
            {"prompt": [], "tokens": prompt[1:cut], "logprobs": chances[: cut - 1]}
            for cut, chances in zip(CUTS, judged, strict=True)
        ]
        for judged in ([whole] * len(CUTS), parts)
    )
    send({"parts": summed(rows, found, None)})
    with stage(send, "shared"):
        send({"shared": engine.answer(SHARED, CONSISTENT_TOKENS)})


def cached(send: Send, folder: str, arguments: Namespace, expected: Rows | None) -> None:
    """Compare an engine that caches prefixes and takes prompts in chunks with one that does not."""
    if not expected:
        raise RuntimeError("the plain engine gave no answers to compare with")
    with stage(send, "load"):
        beside("reference").forbid_tf32(is_compiled=arguments.compiled)
        engine = Engine(folder, arguments, [], has_cache=True)
    prompts = [row["prompt"] for row in expected]
    with stage(send, "chunked"):
        # The first prompt meets an empty cache.
        found = engine.answer(prompts[:1], CONSISTENT_TOKENS)
    chunked = summed(expected[:1], found, CONSISTENT_TOKENS)
    send({"chunked": chunked | {"chunks": -(-len(prompts[0]) // CHUNK)}})
    with stage(send, "prefix"):
        # One after the other, each of which fills the cache for the next; then all at once.
        found = [engine.answer([prompt], CONSISTENT_TOKENS)[0] for prompt in prompts]
        found += engine.answer(prompts, CONSISTENT_TOKENS)
    prefix = summed(expected * 2, found, CONSISTENT_TOKENS)
    send({"prefix": prefix | {"cached": [row["cached"] for row in found]}, "stage": "done"})


def compare(expected: Record, found: Record, forced: list[float]) -> Record:
    """Compare one answer: how many tokens agree, and the largest difference of log-probability on
    the same tokens, in nats.
    """
    pairs = list(zip(expected["tokens"], found["tokens"], strict=False))
    equal = next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs))
    decode = _differences(expected["logprobs"][:equal], found["logprobs"][:equal])
    prefill = _differences(expected["logprobs"], forced)
    every = [*decode, *prefill]
    margins = expected.get("margins") or [1e9]
    return {
        "same_prompt": expected["prompt"] == found["prompt"],
        "equal": equal,
        "total": len(expected["tokens"]),
        "compared": len(every),
        "not_finite": len(every) - len(_finite(every)),
        "decode_difference": max(_finite(decode), default=0.0),
        "prefill_difference": max(_finite(prefill), default=0.0),
        "mean_difference": sum(_finite(prefill)) / max(1, len(prefill)),
        "margin": min(margins),
        # Lead of the first choice where the tokens part; rounding decides a tie.
        "parting": margins[equal] if equal < len(margins) else 1e9,
    }


def _differences(expected: list[float], found: list[float]) -> list[float]:
    return [abs(one - other) for one, other in zip(expected, found, strict=False)]


def _finite(values: list[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def summed(
    expected: Rows, found: Rows, tokens: int | None, forced: list[list[float]] | None = None
) -> Record:
    """Sum up the comparisons of all prompts.

    `tokens` is the required length of an answer, None for the length of the expected one.
    """
    prefills = forced or [[] for _ in expected]
    rows = [compare(*three) for three in zip(expected, found, prefills, strict=True)]
    column = {key: [row[key] for row in rows] for key in rows[0]}
    wanted = sum(column["total"]) if tokens is None else len(rows) * tokens
    return {
        "error": None,
        "same_prompt": all(column["same_prompt"]),
        "equal": sum(column["equal"]),
        "total": wanted,
        "compared": sum(column["compared"]),
        "wanted": wanted * (2 if forced else 1),
        "not_finite": sum(column["not_finite"]),
        "decode_difference": max(column["decode_difference"]),
        "prefill_difference": max(column["prefill_difference"]),
        "mean_difference": sum(column["mean_difference"]) / len(rows),
        "margin": min(column["margin"]),
        "partings": [row["parting"] for row in rows if row["equal"] < row["total"]],
        # Tokens behind a tie, which were not compared.
        "behind": sum(row["total"] - row["equal"] for row in rows),
    }


def report(arguments: Namespace, reference: Record, done: Record) -> Record:
    """Return the document."""
    import torch

    triton_version = None
    with suppress(ImportError):
        import triton

        triton_version = str(triton.__version__)
    names, others = [n for n, _ in arguments.model], CONSISTENCY if arguments.consistency else ()
    engines_of: Record = {name: done.get(f"engine {name}", {}) for name in names}
    return {
        "schema": SCHEMA,
        "error": _problem(done),
        "device": arguments.device,
        "dtype": arguments.dtype,
        "gpu": torch.cuda.get_device_name() if arguments.device == "cuda" else None,
        "vllm": {name: done.get(name) for name in ("file", "version", "platform", "kernels")},
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
        "triton": triton_version,
        "transformers": reference.get("transformers"),
        "python": sys.version.split()[0],
        "tokens": arguments.tokens,
        "models": {name: _parity(name, arguments.tokens, reference, done) for name in names},
        "layers": {n: e.get("layers") or {"error": _problem(e)} for n, e in engines_of.items()},
        "consistency": {name: _consistency(name, arguments.consistency, done) for name in others},
        "seconds": {f"vllm {key}": value for key, value in done["seconds"].items()},
    }


def _parity(name: str, tokens: int, reference: Record, done: Record) -> Record:
    expected, engine = reference["models"].get(name), done.get(f"engine {name}", {})
    problem, compared = None, {}
    if not expected:
        problem = f"Hugging Face: {reference.get('error') or 'no answer'}"
    elif engine.get("rows") and "forced" in engine:
        compared = summed(expected, engine["rows"], tokens, engine["forced"])
    else:
        problem = _problem(engine) or _problem(done) or "vLLM: no answer"
    return compared | {
        "error": problem,
        "own_difference": engine.get("own"),
        "seconds": engine.get("seconds", {}),
    }


def _consistency(name: str, model: str, done: Record) -> Record:
    engine = done.get("engine cached" if name in ("chunked", "prefix") else f"engine {model}", {})
    problem = _problem(done) or _problem(engine) or "vLLM: no answer"
    found: Record = engine.get(name) or {"error": problem}
    return found | {"seconds": engine.get("seconds", {}).get(name, 0.0)}


def _problem(child: Record) -> str | None:
    return f"vLLM: {child['error']}" if child.get("error") else None


def arguments_of() -> Namespace:
    """Return the options of the command line."""
    parser = ArgumentParser(description="Compare vLLM with Hugging Face, and with itself.")
    add = parser.add_argument
    form, named = "a folder in Hugging Face's layout; repeatable", beside("reference").named_folder
    add("--model", type=named, action="append", required=True, metavar="NAME=FOLDER", help=form)
    add("--consistency", metavar="NAME", help="the model on which vLLM is compared with itself")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--compiled", action="store_true", help="without enforce_eager")
    add("--layers", action="store_true", help="compare each layer with float64, too")
    add("--against", type=Path, required=True, metavar="FILE", help="of reference.py or of --keep")
    add("--keep", type=Path, metavar="FILE", help="write vLLM's rows there, for --against")
    add("--tokens", type=int, default=64, help="how many to generate for each prompt")
    arguments = parser.parse_args()
    if arguments.tokens < 1:
        parser.error("--tokens is at least 1")
    if arguments.consistency and arguments.consistency not in dict(arguments.model):
        parser.error(f"--consistency {arguments.consistency} is none of the models")
    return arguments


def main() -> None:
    arguments = arguments_of()
    # Both libraries print to stdout: only the document may stay there.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # For the children.
    os.environ |= {**document.FLOAT32, **document.ORDERED}
    import torch  # noqa: F401 - once, for all children

    reference: Record = json.loads(arguments.against.read_text())
    done = Child(engines, arguments, reference["models"], limit_s=0.0).finish()
    if arguments.keep:
        models = {n: done.get(f"engine {n}", {}).get("rows") or [] for n, _ in arguments.model}
        arguments.keep.write_text(json.dumps({"models": models}))
    print(json.dumps(report(arguments, reference, done)), file=out, flush=True)


if __name__ == "__main__":
    main()
