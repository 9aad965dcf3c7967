"""Models that are always there: made on this machine, kept by what they were made from.

How one is made is the business of probes/tiny_model.py, which runs in the built environment.
"""

import hashlib
import shlex
from pathlib import Path
from typing import Literal

from workspace.core import process
from workspace.core.errors import BuildError
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.environment import interpreter

Architecture = Literal["llama", "qwen3"]
SEED = 0
# 10 s on two cores, most of it imports.
TIMEOUT_S = 300.0


def tiny(layout: Layout, settings: Settings, *, journal: Journal, architecture: Architecture = "llama") -> Path:
    """Return the folder of the tiny model (25 MB, Hugging Face layout), which is made when there is none by this recipe.

    Raises BuildError where the built environment cannot make it, ToolchainError where it gives no answer.
    """
    arguments = ("--architecture", architecture, "--seed", str(SEED))
    folder = layout.models / f"tiny-{architecture}-{_recipe(layout, arguments)[:12]}"
    # The probe renames the folder into place when all files are in it.
    if not folder.is_dir():
        _make(layout, settings, folder, arguments, journal)
    return folder


def _make(layout: Layout, settings: Settings, folder: Path, arguments: tuple[str, ...], journal: Journal) -> None:
    argv = [str(layout.environment_python), str(layout.probes / "tiny_model.py"), str(folder), *arguments]
    journal.command(shlex.join(argv))
    done = process.capture(argv, env=settings.child_environment("run", {"HF_HUB_OFFLINE": "1"}), cwd=layout.root, timeout_s=TIMEOUT_S)
    lines = done.stderr.splitlines()
    for line in lines:
        journal.line(line)
    if done.returncode != 0 or not folder.is_dir():
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no word")
        raise BuildError(f"the tiny model could not be made, its probe {process.describe_status(done.returncode)}: {last}", hint="./scripts/inv bootstrap")


def _recipe(layout: Layout, arguments: tuple[str, ...]) -> str:
    """Digest of everything that decides the bytes: the probe, its arguments, and the library that draws and writes the weights."""
    installed = interpreter.installed(layout)
    versions = [f"{name} {installed.get(name, 'none')}" for name in ("transformers", "tokenizers")]
    recipe = hashlib.sha256((layout.probes / "tiny_model.py").read_bytes())
    recipe.update("\0".join([*arguments, *versions]).encode())
    return recipe.hexdigest()
