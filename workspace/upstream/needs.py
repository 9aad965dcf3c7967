"""What upstream's tests need and `.vllm` does not have: pytest and a few more, in a folder of their own.

Not in `.vllm`: its stamp lists every package, and what serves a user should not hold test tools. Not in a second virtual environment: one made on top of
another does not see that one's packages. A folder on PYTHONPATH goes *before* `.vllm`, so it must hold nothing that `.vllm` has: every name installed
there is barred from the resolution, torch first of all, and the folder's name is a digest of what it was made for.
"""

import hashlib
import os
import re
import shutil
from pathlib import Path

from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.environment import interpreter
from workspace.upstream.reach import Rules

_PINNED = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+$", re.MULTILINE)
_NEVER = 'sys_platform == "never"'


def place(layout: Layout) -> Path:
    """Where all that belongs to upstream's tests lies, but for their record."""
    return layout.state / "upstream-tests"


def put(layout: Layout, settings: Settings, known: Rules, *, device: str, journal: Journal) -> tuple[Path, str]:
    """Return the folder for PYTHONPATH, and a word on it. Where it is there nothing is installed, and no index is asked.

    Raises SourceError where the index cannot be reached or lacks a version, and BuildError.
    """
    there = interpreter.installed(layout)
    wanted = [name for name in known.requirements if name not in there]
    pinned = _pinned(layout.vllm, device)
    said = "\n".join([*wanted, "", *pinned, "", *(f"{name}=={version}" for name, version in there.items()), str(interpreter.site_packages(layout))])
    folder = place(layout) / f"site-{hashlib.sha256(said.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder, f"{len(wanted)} test requirements are there"
    # Without an index, the former ones are what a tree that goes back still needs.
    former = [found for found in place(layout).glob("site-*") if found.suffix != ".new"]
    new = folder.with_name(f"{folder.name}.new")
    for half_made in place(layout).glob("site-*.new"):
        shutil.rmtree(half_made)
    new.mkdir(parents=True)
    barred = tuple(f"{name} ; {_NEVER}" for name in there)
    if wanted:
        interpreter.install(layout, settings, ["--target", str(new), *wanted], journal=journal, constraints=pinned, overrides=barred)
    # uv syncs nothing; after a power cut the name would stand over empty files.
    os.sync()
    new.rename(folder)
    for old in former:
        shutil.rmtree(old)
    return folder, f"{', '.join(wanted)} in {layout.relative(folder)}"


def _pinned(tree: Path, device: str) -> tuple[str, ...]:
    """The exact versions that the tree tests with on this device, or on a GPU where it has no list for it (0.24)."""
    for name in (device, "cuda"):
        file = tree / "requirements" / "test" / f"{name}.txt"
        if file.is_file():
            return tuple(_PINNED.findall(file.read_text(encoding="utf-8")))
    return ()
