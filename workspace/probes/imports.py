"""Imports of this interpreter: `imports.py companions|origin|torch`. One JSON object on stdout.

companions: each installed companion of torch, with null if it can be imported beside this torch,
else its error in a line. origin: the file from which vLLM would be imported. torch: version, CUDA
version (null without CUDA) and file of the imported torch.
"""

import argparse
import contextlib
import importlib
import json
import sys
from importlib.util import find_spec

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def companions() -> dict[str, str | None]:
    # A torch that cannot be imported ends the probe: `torch` reports that.
    import torch  # noqa: F401

    return {name: failure(name) for name in COMPANIONS if find_spec(name)}


def failure(name: str) -> str | None:
    """Import a module. Return None on success, else the error in a line."""
    try:
        # An extension that fails to load may print: stdout is for the document.
        with contextlib.redirect_stdout(sys.stderr):
            importlib.import_module(name)
    except Exception as exc:
        lines = str(exc).strip().splitlines()
        return f"{type(exc).__name__}: {lines[0] if lines else ''}"
    return None


def origin() -> dict[str, object]:
    # Without importing vLLM.
    found = find_spec("vllm")
    return {"schema": 1, "vllm": found.origin if found else None}


def torch_build() -> dict[str, object]:
    import torch

    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "file": torch.__file__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Print as JSON what can be imported.")
    parser.add_argument("subject", choices=("companions", "origin", "torch"))
    subject = parser.parse_args().subject
    if subject == "companions":
        print(json.dumps(companions()))
    else:
        print(json.dumps(origin() if subject == "origin" else torch_build()))


if __name__ == "__main__":
    main()
