"""Take every line that names torch out of the requirements below the working directory."""

import pathlib
import sys

PREFIXES = ("torch=", "torchvision=", "torchaudio=", "torchcodec=", '"torch =')


def main(arguments):
    only_prefixed = "--prefix" in arguments
    here = pathlib.Path()
    for path in (
        *here.glob("requirements/**/*.txt"),
        *here.glob("requirements/**/*.in"),
        *here.glob("pyproject.toml"),
    ):
        kept = []
        for line in path.read_text().splitlines(keepends=True):
            lower = line.lower()
            if lower.strip().startswith(PREFIXES) if only_prefixed else "torch" in lower:
                print(f">>> removed from {path}: {line.strip()}")
            else:
                kept.append(line)
        path.write_text("".join(kept))


main(sys.argv[1:])
