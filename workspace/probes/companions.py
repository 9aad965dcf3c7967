"""Say which of torch's companions can be imported beside this torch.

One JSON object: the name of each one installed, with null where it works and otherwise the error in
a line.
"""

import contextlib
import importlib
import json
import sys
from importlib.util import find_spec

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def main() -> int:
    import torch  # noqa: F401  what they are companions of: its own failure is another probe's word

    said = {name: failure(name) for name in COMPANIONS if find_spec(name)}
    print(json.dumps(said))
    return 0


def failure(name: str) -> "str | None":
    try:
        # Extensions that fail to load like to print: stdout is for the answer.
        with contextlib.redirect_stdout(sys.stderr):
            importlib.import_module(name)
    except Exception as exc:
        lines = str(exc).strip().splitlines()
        return f"{type(exc).__name__}: {lines[0] if lines else ''}"
    return None


if __name__ == "__main__":
    sys.exit(main())
