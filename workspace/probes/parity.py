"""Does vLLM compute what Hugging Face computes? Greedy tokens and log-probabilities of one model, in float32, side by side.

The reference and vLLM each run in a forked child, together where the device has room for both, so that a crash is told with its stage.
The caller sets the environment that vLLM reads. One JSON document on stdout.
"""

import argparse
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

SCHEMA = 1
# Of uneven length: below, across and far beyond one block of the KV cache (16 tokens on a GPU, 128 on a CPU), so that a batch mixes them.
PROMPTS = (
    "Hello",
    "The quick brown fox jumps over the lazy dog.",
    "In the beginning there was a kernel, and the kernel was compiled for one processor; on every other it was void.",
    "def add(a, b):\n    return a + b\n\n\ndef test_add():\n    assert add(2, 2) == 4\n    assert add(-1, 1) == 0\n\n\n# übung macht den Meister, 練習\n",
    "A patch that nobody carries is lost. " * 8,
)
KV_CACHE_BYTES = 256 << 20
WORDS_SHOWN = 200

Send = Callable[[dict], None]
Connection = multiprocessing.connection.Connection


class Child:
    """A forked stage that sends parts of its record as it goes; what killed it becomes part of the record."""

    def __init__(self, name: str, function: Callable[..., None], *arguments: object) -> None:
        self.name = name
        self.record: dict = {"stage": "start", "error": None, "seconds": {}}
        fork = multiprocessing.get_context("fork")
        self._reader, writer = fork.Pipe(duplex=False)
        self._child = fork.Process(target=_run, args=(writer, function, arguments))
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
        if status and not self.record["error"]:
            word = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
            self.record["error"] = f"{word} (stage {self.record['stage']})"
        return self.record


def _run(writer: Connection, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    # A crash is told by its signal; a core of several GiB is not wanted with it.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
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
    """Full float32 and the same order of additions each time, as far as PyTorch can promise it (pytorch.org, notes/numerical_accuracy)."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)


def reference(send: Send, model_folder: str, device: str, prompts: list[str], tokens: int) -> None:
    """Greedy decoding by Hugging Face, one prompt at a time: no padding, no batching, plain attention."""
    with stage(send, "import"):
        import torch
        import transformers
    with stage(send, "load"):
        forbid_tf32()
        if device == "cpu":
            # vLLM works beside it.
            torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True)
        model.to(device).eval()
    rows = []
    with stage(send, "generate"), torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=device)
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                # min_new_tokens forbids these while it lasts; forbidding a token would change what is compared.
                eos_token_id=None,
                output_logits=True,
                return_dict_in_generate=True,
            )
            said = made.sequences[0, ids.shape[1] :].tolist()
            chances = torch.log_softmax(torch.stack([step[0].float() for step in made.logits]), dim=-1)
            best = chances.topk(2, dim=-1).values
            rows.append(
                {
                    "prompt": ids[0].tolist(),
                    "tokens": said,
                    "logprobs": [chances[i, token].item() for i, token in enumerate(said)],
                    # How near the second best token came: within it no rounding can change the choice.
                    "margin": (best[:, 0] - best[:, 1]).min().item(),
                }
            )
    send({"stage": "done", "rows": rows, "transformers": transformers.__version__})


def engine(send: Send, model_folder: str, device: str, prompts: list[str], tokens: int, awaited: Connection) -> None:
    """Greedy decoding by vLLM, all prompts in one batch, then its opinion on the reference's tokens, which is a prefill."""
    with stage(send, "import"):
        import vllm
        from vllm.platforms import current_platform

    send({"file": str(Path(vllm.__file__).resolve()), "version": vllm.__version__, "platform": current_platform.device_type})
    with stage(send, "load"):
        forbid_tf32()
        longest = 2 * max(len(prompt.encode()) for prompt in prompts) + tokens
        # A GiB of KV cache takes a second to clear, and a few thousand tokens are wanted: enough blocks of 16, of which a CPU's hold more.
        blocks = len(prompts) * (longest // 16 + 2)
        llm = vllm.LLM(
            model=model_folder,
            dtype="float32",
            enforce_eager=True,
            seed=0,
            max_model_len=longest,
            max_num_seqs=len(prompts),
            enable_prefix_caching=False,
            disable_log_stats=True,
            num_gpu_blocks_override=blocks,
            **({"kv_cache_memory_bytes": KV_CACHE_BYTES} if device == "cuda" else {}),
        )
    send({"kernels": libraries_in_use(Path(vllm.__file__).resolve().parents[1])})
    with stage(send, "generate"):
        made = llm.generate(prompts, vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1), use_tqdm=False)
    rows = []
    for output in made:
        said = list(output.outputs[0].token_ids)
        rows.append(
            {
                "prompt": list(output.prompt_token_ids),
                "tokens": said,
                "logprobs": [chances[token].logprob for chances, token in zip(output.outputs[0].logprobs, said, strict=True)],
            }
        )
    send({"rows": rows})
    with stage(send, "wait"):
        expected = awaited.recv()
    if expected:
        with stage(send, "prefill"):
            forced = [{"prompt_token_ids": row["prompt"] + row["tokens"]} for row in expected]
            heard = llm.generate(forced, vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1), use_tqdm=False)
        send({"forced": [_opinion(output, len(row["prompt"])) for output, row in zip(heard, expected, strict=True)]})
    send({"stage": "done"})


def _opinion(output: object, start: int) -> list[float]:
    pairs = zip(output.prompt_token_ids[start:], output.prompt_logprobs[start:], strict=True)  # type: ignore[attr-defined]
    return [chances[token].logprob for token, chances in pairs]


def libraries_in_use(tree: Path) -> list[str]:
    """The compiled libraries below vLLM's own folder that this process has loaded (proc(5), maps)."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    files = {Path(parts[5]) for line in lines if len(parts := line.split(maxsplit=5)) == 6}
    return sorted(str(file.relative_to(tree)) for file in files if ".so" in file.name and file.is_relative_to(tree / "vllm"))


def compare(expected: dict, found: dict, forced: list[float]) -> dict:
    """One prompt: how far the tokens agree, and the largest difference of log-probability on the same tokens, in nats."""
    pairs = list(zip(expected["tokens"], found["tokens"], strict=False))
    equal = next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs))
    decode = _differences(expected["logprobs"][:equal], found["logprobs"][:equal])
    prefill = _differences(expected["logprobs"], forced)
    every = [*decode, *prefill]
    return {
        "prompt_tokens": len(expected["prompt"]),
        "same_prompt": expected["prompt"] == found["prompt"],
        "equal": equal,
        "margin": expected["margin"],
        "reference": expected["tokens"],
        "vllm": found["tokens"],
        "decode_difference": max((d for d in decode if math.isfinite(d)), default=0.0),
        "prefill_difference": max((d for d in prefill if math.isfinite(d)), default=0.0),
        "not_finite": sum(not math.isfinite(d) for d in every),
        "compared": len(every),
    }


def _differences(expected: list[float], found: list[float]) -> list[float]:
    return [abs(one - other) for one, other in zip(expected, found, strict=False)]


def report(arguments: argparse.Namespace, prompts: list[str], said: dict, did: dict, torch_seconds: float) -> dict:
    import torch

    rows = []
    if said.get("rows") and did.get("rows"):
        forced = did.get("forced") or [[] for _ in prompts]
        rows = [compare(*three) for three in zip(said["rows"], did["rows"], forced, strict=True)]
    errors = [f"{name}: {record['error']}" for name, record in (("Hugging Face", said), ("vLLM", did)) if record["error"]]
    seconds = {"torch": torch_seconds}
    for name, record in (("reference", said), ("vllm", did)):
        seconds |= {f"{name} {key}": value for key, value in record["seconds"].items()}
    return {
        "schema": SCHEMA,
        "error": "; ".join(errors) or None,
        "device": arguments.device,
        "gpu": torch.cuda.get_device_name() if arguments.device == "cuda" else None,
        "vllm": {name: did.get(name) for name in ("file", "version", "platform", "kernels")},
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
        "transformers": said.get("transformers"),
        "python": sys.version.split()[0],
        "tokens": arguments.tokens,
        "prompts": rows,
        "equal": sum(row["equal"] for row in rows),
        "total": len(prompts) * arguments.tokens,
        "max_difference": max((row[name] for row in rows for name in ("decode_difference", "prefill_difference")), default=None),
        "margin": min((row["margin"] for row in rows), default=None),
        "not_finite": sum(row["not_finite"] for row in rows),
        "compared": sum(row["compared"] for row in rows),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare vLLM with Hugging Face on one model, in float32.")
    parser.add_argument("model", type=Path, help="a model folder in Hugging Face's layout")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help=f"how many, 1 to {len(PROMPTS)}")
    parser.add_argument("--tokens", type=int, default=64, help="how many to generate for each prompt")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        parser.error(f"{arguments.model} holds no config.json")
    if not 1 <= arguments.prompts <= len(PROMPTS) or arguments.tokens < 1:
        parser.error(f"--prompts is 1 to {len(PROMPTS)}, --tokens at least 1")
    # Both libraries talk on stdout; the document must stand there alone.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Read when Triton and cuBLAS are first used, in the children: float32 products in float32, sums in a fixed order.
    os.environ |= {"TRITON_F32_DEFAULT": "ieee", "NVIDIA_TF32_OVERRIDE": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    started = time.monotonic()
    import torch  # noqa: F401 - once, for both children

    torch_seconds = round(time.monotonic() - started, 3)
    prompts = list(PROMPTS[: arguments.prompts])
    task = (str(arguments.model.resolve()), arguments.device, prompts, arguments.tokens)
    first = Child("reference", reference, *task)
    # vLLM takes stock of a GPU's memory while it starts, and stops where another process gives some back.
    said = first.finish() if arguments.device == "cuda" else None
    awaited, told = multiprocessing.get_context("fork").Pipe(duplex=False)
    second = Child("vllm", engine, *task, awaited)
    # Its only reader is the child now: a dead one is seen, and not waited for.
    awaited.close()
    said = said or first.finish()
    with suppress(BrokenPipeError):
        told.send(said.get("rows"))
    print(json.dumps(report(arguments, prompts, said, second.finish(), torch_seconds)), file=out, flush=True)


if __name__ == "__main__":
    main()
