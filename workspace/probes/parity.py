"""Does vLLM compute what it should, and the same however it is asked? Greedy tokens and
log-probabilities, beside those of probes/reference.py.

Each engine runs in a forked child, so that a crash is told with its stage and imports are paid
once. The caller sets the environment that vLLM reads. One JSON document on stdout.
"""

import argparse
import faulthandler
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import mean

SCHEMA = 2
# Two heads, each longer than two blocks of a CPU's cache, that differ in their first block only;
# two tails of each. A block is right behind its own alone.
HEAD = "Once there was a kernel that nobody had compiled. " * 6
HEADS = (HEAD, "None" + HEAD[4:])
SHARED = tuple(
    head + tail
    for head in HEADS
    for tail in ("It waited.", "Then came a patch, and it was a small one.")
)
CONSISTENCY = ("repeat", "batch", "parts", "chunked", "prefix")
# Tokens of each answer where an engine is compared with itself, and where a long prompt is cut.
CONSISTENT_TOKENS = 12
CUTS = (33, 130, 200)
# What one step may take where a prompt is to come in chunks.
CHUNK = 96
KV_CACHE_BYTES = 256 << 20
# The caller's patience, less what it takes to tell.
LIMIT_S = float(os.environ.get("WORKSPACE_SMOKE_LIMIT_S", "0"))
WORDS_SHOWN = 200

Send = Callable[[dict], None]
Connection = multiprocessing.connection.Connection


class Child:
    """A forked stage that sends parts of its record as it goes; what killed it becomes part of the
    record.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., None],
        *arguments: object,
        is_outermost: bool = False,
    ) -> None:
        self.name = name
        self.record: dict = {"stage": "start", "error": None, "hangs": False, "seconds": {}}
        self._started = time.monotonic()
        fork = multiprocessing.get_context("fork")
        self._reader, writer = fork.Pipe(duplex=False)
        self._child = fork.Process(
            target=_run, args=(writer, function, arguments, 0.0 if is_outermost else LIMIT_S)
        )
        self._child.start()
        writer.close()

    def finish(self) -> dict:
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
            late = (
                f"gave no answer in {LIMIT_S:g} s, its stacks are in the log"
                if self.record["hangs"]
                else None
            )
            word = (
                f"killed by {signal.Signals(-status).name}"
                if status < 0
                else f"exited with {status}"
            )
            self.record["error"] = f"{late or word} (stage {self.record['stage']})"
        return self.record


def _run(
    writer: Connection, function: Callable[..., None], arguments: tuple[object, ...], limit_s: float
) -> None:
    # A crash is told by its signal; a core of several GiB is not wanted with it.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limit_s:
        # A hang ends itself, with the stacks of all threads on stderr.
        faulthandler.dump_traceback_later(limit_s, exit=True)
    current = {"stage": "start"}

    def send(part: dict) -> None:
        current.update({name: part[name] for name in ("stage",) if name in part})
        writer.send(part)

    try:
        function(send, *arguments)
    except Exception as exc:
        import traceback

        traceback.print_exc()
        # The first line of a validation error only counts them.
        words = " ".join(str(exc).split())[:WORDS_SHOWN]
        send({"error": f"{type(exc).__name__}: {words or 'no word'} (stage {current['stage']})"})


@contextmanager
def stage(send: Send, name: str) -> Iterator[None]:
    send({"stage": name})
    started = time.monotonic()
    yield
    send({"seconds": {name: round(time.monotonic() - started, 3)}})


def forbid_tf32() -> None:
    """Full float32 and the same order of additions each time, as far as PyTorch can promise it
    (pytorch.org, notes/numerical_accuracy).
    """
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)


class Engine:
    """vLLM with one model, and what it says in answer to a list of prompts."""

    def __init__(
        self, folder: str, arguments: argparse.Namespace, texts: list[str], **changes: object
    ) -> None:
        import vllm

        self._vllm = vllm
        longest = 2 * max(len(prompt.encode()) for prompt in (*texts, *SHARED)) + arguments.tokens
        # A GiB of KV cache takes a second to clear, and a few thousand tokens are wanted: enough
        # blocks of 16, of which a CPU's hold more.
        blocks = max(len(texts), len(SHARED)) * (longest // 16 + 2)
        asked = {
            "model": folder,
            "dtype": arguments.dtype,
            "enforce_eager": not arguments.compiled,
            "seed": 0,
            "max_model_len": longest,
        }
        asked |= {
            "max_num_seqs": max(len(texts), len(SHARED)),
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            "num_gpu_blocks_override": blocks,
        }
        asked |= {"kv_cache_memory_bytes": KV_CACHE_BYTES} if arguments.device == "cuda" else {}
        self._llm = vllm.LLM(**(asked | changes))

    def info(self, prompts: list, tokens: int) -> list[dict]:
        """Rows of a greedy answer; a prompt is a text or a list of token numbers."""
        asked = [
            prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
            for prompt in prompts
        ]
        greedy = self._vllm.SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1
        )
        rows = []
        for output in self._llm.generate(asked, greedy, use_tqdm=False):
            said = list(output.outputs[0].token_ids)
            logprobs = [
                chances[token].logprob
                for chances, token in zip(output.outputs[0].logprobs, said, strict=True)
            ]
            rows.append(
                {
                    "prompt": list(output.prompt_token_ids),
                    "tokens": said,
                    "logprobs": logprobs,
                    "cached": output.num_cached_tokens,
                }
            )
        return rows

    def judge(self, prompts: list[list[int]]) -> list[list[float]]:
        """The log-probability of each token of a prompt but the first: a prefill."""
        params = self._vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        heard = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
        return [
            [
                chances[token].logprob
                for token, chances in zip(
                    one.prompt_token_ids[1:], one.prompt_logprobs[1:], strict=True
                )
            ]
            for one in heard
        ]


def engines(send: Send, arguments: argparse.Namespace, expected: dict[str, list[dict]]) -> None:
    """Import vLLM once, then one forked child for each engine."""
    with stage(send, "import"):
        import vllm
        import vllm.entrypoints.llm
        from vllm.platforms import current_platform

    send(
        {
            "file": str(Path(vllm.__file__).resolve()),
            "version": vllm.__version__,
            "platform": current_platform.device_type,
        }
    )
    for name, folder in arguments.model:
        if not expected.get(name):
            continue
        with stage(send, name):
            done = Child(
                name, plain, folder, arguments, expected[name], name == arguments.consistency
            ).finish()
            send(
                {
                    f"engine {name}": done,
                    **({"kernels": done["kernels"]} if "kernels" in done else {}),
                }
            )
        if done["hangs"]:
            send({"error": f"not asked any more: {name} {done['error']}"})
            return
        if name == arguments.consistency:
            with stage(send, "cached"):
                send(
                    {
                        "engine cached": (
                            Child("cached", cached, folder, arguments, done.get("shared")).finish()
                        )
                    }
                )
    send({"stage": "done"})


def plain(
    send: Send,
    folder: str,
    arguments: argparse.Namespace,
    expected: list[dict],
    is_consistent: bool,
) -> None:
    """All prompts in one batch, then vLLM's opinion on the reference's tokens, which is a prefill;
    then the same again in other ways.
    """
    import vllm

    with stage(send, "load"):
        forbid_tf32()
        texts = [row["text"] for row in expected]
        engine = Engine(folder, arguments, texts)
    send({"kernels": libraries_in_use(Path(vllm.__file__).resolve().parents[1])})
    with stage(send, "generate"):
        made = engine.info(texts, arguments.tokens)
    send({"rows": made})
    with stage(send, "prefill"):
        heard = engine.judge([row["prompt"] + row["tokens"] for row in expected])
    send(
        {
            "forced": [
                chances[len(row["prompt"]) - 1 :]
                for chances, row in zip(heard, expected, strict=True)
            ]
        }
    )
    if arguments.dtype != "float32":
        # Near-ties part soon, and what is decoded behind them has nothing to be compared with but a
        # prefill of the same.
        with stage(send, "own"):
            heard = engine.judge([row["prompt"] + row["tokens"] for row in made])
        means = [
            mean(_differences(row["logprobs"], chances[len(row["prompt"]) - 1 :]))
            for chances, row in zip(heard, made, strict=True)
        ]
        send({"own": mean(means)})
    if is_consistent:
        with stage(send, "repeat"):
            first = [
                row | {name: row[name][:CONSISTENT_TOKENS] for name in ("tokens", "logprobs")}
                for row in made
            ]
            again = engine.info(texts, CONSISTENT_TOKENS)
        send({"repeat": summed(first, again, CONSISTENT_TOKENS)})
        with stage(send, "batch"):
            alone = [engine.info([prompt], CONSISTENT_TOKENS)[0] for prompt in texts]
        send({"batch": summed(first, alone, CONSISTENT_TOKENS)})
        with stage(send, "parts"):
            prompt = max((row["prompt"] for row in made), key=len)
            whole, *parts = engine.judge([prompt, *(prompt[:cut] for cut in CUTS)])
        rows = [
            {"prompt": [], "tokens": prompt[1:cut], "logprobs": whole[: cut - 1]} for cut in CUTS
        ]
        found = [
            {"prompt": [], "tokens": prompt[1:cut], "logprobs": part}
            for cut, part in zip(CUTS, parts, strict=True)
        ]
        send({"parts": summed(rows, found, None)})
        with stage(send, "shared"):
            send({"shared": engine.info(list(SHARED), CONSISTENT_TOKENS)})
    send({"stage": "done"})


def cached(
    send: Send, folder: str, arguments: argparse.Namespace, expected: list[dict] | None
) -> None:
    """The answers of an engine that caches prefixes and takes prompts in chunks, against those of
    one that does neither.
    """
    if not expected:
        raise RuntimeError("the plain engine gave nothing to compare with")
    with stage(send, "load"):
        forbid_tf32()
        engine = Engine(
            folder,
            arguments,
            [],
            enable_prefix_caching=True,
            enable_chunked_prefill=True,
            max_num_batched_tokens=CHUNK,
        )
    with stage(send, "chunked"):
        # The first prompt of an empty cache: nothing of it can be read there.
        found = engine.info([expected[0]["prompt"]], CONSISTENT_TOKENS)
    send(
        {
            "chunked": (
                summed(expected[:1], found, CONSISTENT_TOKENS)
                | {"chunks": -(-len(expected[0]["prompt"]) // CHUNK)}
            )
        }
    )
    with stage(send, "prefix"):
        # One after the other, each of which fills what the next may read; then all at once.
        found = [engine.info([row["prompt"]], CONSISTENT_TOKENS)[0] for row in expected]
        found += engine.info([row["prompt"] for row in expected], CONSISTENT_TOKENS)
    send(
        {
            "prefix": (
                summed(expected * 2, found, CONSISTENT_TOKENS)
                | {"cached": [row["cached"] for row in found]}
            ),
            "stage": "done",
        }
    )


def libraries_in_use(tree: Path) -> list[str]:
    """The compiled libraries below vLLM's own folder that this process has loaded (proc(5),
    maps).
    """
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    files = {Path(parts[5]) for line in lines if len(parts := line.split(maxsplit=5)) == 6}
    return sorted(
        str(file.relative_to(tree))
        for file in files
        if ".so" in file.name and file.is_relative_to(tree / "vllm")
    )


def compare(expected: dict, found: dict, forced: list[float]) -> dict:
    """One prompt: how far the tokens agree, and the largest difference of log-probability on the
    same tokens, in nats.
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
        "not_finite": sum(not math.isfinite(d) for d in every),
        "decode_difference": max((d for d in decode if math.isfinite(d)), default=0.0),
        "prefill_difference": max((d for d in prefill if math.isfinite(d)), default=0.0),
        "mean_difference": sum(d for d in prefill if math.isfinite(d)) / max(1, len(prefill)),
        "margin": min(margins),
        # How near the second choice was where the tokens part: a tie may fall either way. JSON
        # lacks infinity.
        "parting": margins[equal] if equal < len(margins) else 1e9,
    }


def _differences(expected: list[float], found: list[float]) -> list[float]:
    return [abs(one - other) for one, other in zip(expected, found, strict=False)]


def summed(
    expected: list[dict],
    found: list[dict],
    tokens: int | None,
    forced: list[list[float]] | None = None,
) -> dict:
    """All prompts of one comparison; `tokens` says how many an answer has to have, where that is
    not what the expected one has.
    """
    rows = [
        compare(*three)
        for three in zip(expected, found, forced or [[] for _ in expected], strict=True)
    ]
    wanted = sum(row["total"] for row in rows) if tokens is None else len(rows) * tokens
    return {
        "error": None,
        "same_prompt": all(row["same_prompt"] for row in rows),
        "equal": sum(row["equal"] for row in rows),
        "total": wanted,
        "compared": sum(row["compared"] for row in rows),
        "wanted": wanted * (2 if forced else 1),
        "not_finite": sum(row["not_finite"] for row in rows),
        "decode_difference": max(row["decode_difference"] for row in rows),
        "prefill_difference": max(row["prefill_difference"] for row in rows),
        "mean_difference": sum(row["mean_difference"] for row in rows) / len(rows),
        "margin": min(row["margin"] for row in rows),
        "partings": [row["parting"] for row in rows if row["equal"] < row["total"]],
        # What was not compared behind a tie.
        "behind": sum(row["total"] - row["equal"] for row in rows),
    }


def report(arguments: argparse.Namespace, said: dict, did: dict, torch_seconds: float) -> dict:
    import torch

    failed = f"vLLM: {did['error']}" if did["error"] else None
    models: dict[str, dict] = {}
    for name, _ in arguments.model:
        expected, engine = said["models"].get(name), did.get(f"engine {name}", {})
        problem = None if expected else f"Hugging Face: {said.get('error') or 'no answer'}"
        if not problem and not (engine.get("rows") and "forced" in engine):
            problem = (
                f"vLLM: {engine['error']}" if engine.get("error") else failed or "vLLM: no answer"
            )
        whole = (
            {} if problem else summed(expected, engine["rows"], arguments.tokens, engine["forced"])
        )
        models[name] = whole | {
            "error": problem,
            "own_difference": engine.get("own"),
            "seconds": engine.get("seconds", {}),
        }
    consistency: dict[str, dict] = {}
    for name in CONSISTENCY if arguments.consistency else ():
        engine = did.get(
            "engine cached" if name in ("chunked", "prefix") else f"engine {arguments.consistency}",
            {},
        )
        found = engine.get(name) or {
            "error": failed or f"vLLM: {engine.get('error') or 'no answer'}"
        }
        consistency[name] = found | {"seconds": engine.get("seconds", {}).get(name, 0.0)}
    seconds = {f"vllm {key}": value for key, value in did["seconds"].items()}
    return {
        "schema": SCHEMA,
        "error": failed,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "gpu": torch.cuda.get_device_name() if arguments.device == "cuda" else None,
        "vllm": {name: did.get(name) for name in ("file", "version", "platform", "kernels")},
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
        "triton": _triton(),
        "transformers": said.get("transformers"),
        "python": sys.version.split()[0],
        "tokens": arguments.tokens,
        "models": models,
        "consistency": consistency,
        "seconds": {"torch": torch_seconds} | seconds,
    }


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _model(word: str) -> tuple[str, str]:
    name, _, folder = word.partition("=")
    if folder and not Path(folder).exists():
        # A name on the hub, whose files somebody has fetched.
        with suppress(Exception):
            import huggingface_hub

            folder = huggingface_hub.snapshot_download(folder, local_files_only=True)
    if not (Path(folder) / "config.json").is_file():
        raise argparse.ArgumentTypeError(
            f"{word} is not NAME=FOLDER, or the folder holds no config.json"
        )
    return name, str(Path(folder).resolve())


def arguments_of(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare vLLM with Hugging Face on models, and with itself."
    )
    parser.add_argument(
        "--model",
        type=_model,
        action="append",
        required=True,
        metavar="NAME=FOLDER",
        help="a folder in Hugging Face's layout; repeatable",
    )
    parser.add_argument(
        "--consistency", metavar="NAME", help="the model that vLLM is compared with itself on"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compiled", action="store_true", help="without enforce_eager")
    parser.add_argument(
        "--against",
        type=Path,
        required=True,
        metavar="FILE",
        help="what probes/reference.py or --keep wrote",
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="write vLLM's rows there, for --against"
    )
    parser.add_argument(
        "--tokens", type=int, default=64, help="how many to generate for each prompt"
    )
    arguments = parser.parse_args(words)
    if arguments.tokens < 1:
        parser.error("--tokens is at least 1")
    if arguments.consistency and arguments.consistency not in dict(arguments.model):
        parser.error(f"--consistency {arguments.consistency} is none of the models")
    return arguments


def main() -> None:
    arguments = arguments_of()
    # Both libraries talk on stdout; the document must stand there alone.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Read when Triton and cuBLAS are first used, in the children: float32 products in float32, sums
    # in a fixed order.
    os.environ |= {
        "TRITON_F32_DEFAULT": "ieee",
        "NVIDIA_TF32_OVERRIDE": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    started = time.monotonic()
    import torch  # noqa: F401 - once, for all children

    torch_seconds = round(time.monotonic() - started, 3)
    said = json.loads(arguments.against.read_text())
    did = Child("vllm", engines, arguments, said["models"], is_outermost=True).finish()
    if arguments.keep:
        rows = {name: did.get(f"engine {name}", {}).get("rows") for name, _ in arguments.model}
        texts = {name: [row["text"] for row in said["models"].get(name) or []] for name in rows}
        models = {
            name: [
                {"text": text} | row
                for text, row in zip(texts[name], rows[name] or [], strict=False)
            ]
            for name in rows
        }
        arguments.keep.write_text(json.dumps({"models": models}))
    print(json.dumps(report(arguments, said, did, torch_seconds)), file=out, flush=True)


if __name__ == "__main__":
    main()
