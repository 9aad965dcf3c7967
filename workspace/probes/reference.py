"""Greedy tokens and log-probabilities of Hugging Face's transformers on the prompts of the smoke,
for probes/parity.py to compare with.

One prompt at a time: no padding, no batching, plain attention. One JSON document on stdout.
"""

import argparse
import faulthandler
import json
import os
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


def forbid_tf32() -> None:
    """Set full float32 and a fixed order of additions, as far as PyTorch can promise it
    (pytorch.org, notes/numerical_accuracy).
    """
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)


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


def decoded(
    model: "PreTrainedModel", prompt: list[int], device: str, tokens: int
) -> dict[str, object]:
    """Return the row of one prompt."""
    import torch

    ids = torch.tensor([prompt], device=device)
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


def rows_of(folder: str, device: str, dtype: str, tokens: int) -> list[dict[str, object]]:
    """Return the rows of all prompts for one model."""
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
    with torch.inference_mode():
        return [
            {"text": text} | decoded(model, tokenizer(text)["input_ids"], device, tokens)
            for text in PROMPTS
        ]


def _model(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if folder and not Path(folder).exists():
        # The name of a model on the hub, whose files are in the cache.
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
    parser.add_argument(
        "--model",
        type=_model,
        action="append",
        required=True,
        metavar="NAME=FOLDER",
        help="a folder in Hugging Face's layout; repeatable",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--tokens", type=int, default=64, help="how many to generate for each prompt"
    )
    arguments = parser.parse_args()
    if arguments.tokens < 1:
        parser.error("--tokens is at least 1")
    return arguments


def main() -> None:
    arguments = arguments_of()
    # Libraries print to stdout: only the document may stay there.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if limit := float(os.environ.get("WORKSPACE_SMOKE_LIMIT_S", "0")):
        # A hang ends itself, with the stacks of all threads on stderr.
        faulthandler.dump_traceback_later(limit, exit=True)
    os.environ |= {"NVIDIA_TF32_OVERRIDE": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    started = time.monotonic()
    models: dict[str, object] = {}
    record: dict[str, object] = {"schema": SCHEMA, "error": None, "models": models}
    try:
        import transformers

        forbid_tf32()
        for name, folder in arguments.model:
            models[name] = rows_of(folder, arguments.device, arguments.dtype, arguments.tokens)
        record["transformers"] = transformers.__version__
    except Exception as exc:
        traceback.print_exc()
        record["error"] = f"{type(exc).__name__}: {' '.join(str(exc).split())[:200]}"
    record["seconds"] = round(time.monotonic() - started, 3)
    print(json.dumps(record), file=out, flush=True)


if __name__ == "__main__":
    main()
