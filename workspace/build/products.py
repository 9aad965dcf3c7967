"""What a build leaves in the tree: compiled libraries, and what upstream's ignore file names below the package.

It belongs to one pin. A move to another takes it away before that one's comes, so that none is taken for the other's.
"""

import filecmp
import os
import shutil
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path

from workspace.core.files import read_regular
from workspace.core.layout import Layout
from workspace.source.git import Git, worktree


def found(tree: Path) -> tuple[str, ...]:
    """Return the paths of the products below a tree. What general rules ignore, as a log or an editor's file, is the user's and none of them."""
    ignore = tree / ".gitignore"
    text = read_regular(ignore).decode(errors="replace") if ignore.exists() else ""
    lines = (line.strip().removeprefix("/") for line in text.splitlines())
    named = [line.removesuffix("*").removesuffix("/") for line in lines if line.startswith("vllm/")]
    patterns = ("*.so", "vllm.egg-info/*", *named, *(f"{name}/*" for name in named))
    return tuple(path for path in worktree.products(Git(tree), "vllm", "vllm.egg-info") if any(fnmatchcase(path, pattern) for pattern in patterns))


def take_away(layout: Layout, paths: Collection[str], *, ours: Collection[str], kept: Path | None, left: Path) -> None:
    """Take products out of vendor/vllm: `ours`, and what is in the folder `kept` as well, for good; whatever else lies there is moved to `left`."""
    for path in paths:
        file = layout.vllm / path
        if not os.path.lexists(file):
            continue
        if path in ours or (kept and _is_same(file, kept / path)):
            file.unlink()
        else:
            (left / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, left / path)
        _clear(file.parent, top=layout.vllm)


def move(source: Path, target: Path, paths: Collection[str]) -> None:
    """Move products from one tree to another; those that a run before has moved are passed over."""
    for path in paths:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / path, target / path)


def _is_same(file: Path, other: Path) -> bool:
    if file.is_symlink() or other.is_symlink():
        return file.is_symlink() and other.is_symlink() and os.readlink(file) == os.readlink(other)
    return other.is_file() and filecmp.cmp(file, other, shallow=False)


def _clear(folder: Path, *, top: Path) -> None:
    """Remove folders that hold nothing any more but bytecode: Python would import them as packages without modules."""
    while folder != top and {entry.name for entry in folder.iterdir()} <= {"__pycache__"}:
        shutil.rmtree(folder)
        folder = folder.parent
