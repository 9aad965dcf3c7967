"""When the files of a checkout were written last, by content: a move that brings a content back brings its time back, so that nothing recompiles.

A time stands for "no compiler ran since a file with this content and this time was there". Whoever is about to run one calls `forget`
first: an object that is made meanwhile from another content is newer than the time that would come back, and ninja would call it up to date.
For builds by hand, a ninja log that is younger than the memory makes it count as none; so does any damage.
"""

import contextlib
import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from workspace.core.errors import ToolchainError
from workspace.core.files import read_regular, write_atomic
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.source.content import Entries, split
from workspace.source.git import Git

# Path to `blob oid, mtime in ns`, the newest last: going to and fro between two stacks needs two, and more are seldom met again.
Memory = Mapping[str, Sequence[tuple[str, int]]]
_KEPT = 4
# Paths on one command line; the kernel takes 2 MiB (execve(2)).
_AT_ONCE = 5000


def move(git: Git, commit: str, *, memory: Path, journal: Journal) -> None:
    """Move the checkout as Git.move_to does; each file whose content was there before gets the time back that it had with it."""
    known = read(memory, git.path)
    remember(git, split(git.look("diff-tree", "-r", "-z", "--name-only", "--no-renames", "HEAD", commit).out), memory=memory)
    git.move_to(commit, journal=journal)
    restore(git, known)


def remember(git: Git, paths: Iterable[str], *, memory: Path) -> None:
    """Write down content and time of the files that are about to be rewritten. Where that cannot be written, no time comes back."""
    known = {path: list(seen) for path, seen in read(memory, git.path).items()}
    for path, entry in _entries(git, paths).items():
        if (mtime := _mtime(git.path / path)) is not None:
            oid = entry.split()[1]
            known[path] = [*(seen for seen in known.get(path, []) if seen[0] != oid), (oid, mtime)][-_KEPT:]
    with contextlib.suppress(OSError):
        write_atomic(memory, json.dumps(known).encode())


def restore(git: Git, known: Memory) -> None:
    """Give each remembered file that has a remembered content the time it had with it; all others keep theirs."""
    is_changed = False
    for path, entry in (_entries(git, known) if known else {}).items():
        file, mtime = git.path / path, dict(known[path]).get(entry.split()[1])
        if mtime is not None and _mtime(file) not in (None, mtime):
            # Without it the file is compiled anew, and that is all.
            with contextlib.suppress(OSError):
                os.utime(file, ns=(file.stat().st_atime_ns, mtime))
                is_changed = True
    if is_changed:
        # Or every look would have to read these files.
        git.write("update-index", "--refresh", check=False)


def forget(layout: Layout, project: str) -> None:
    """Drop the memory: a compiler is about to run. Raises ToolchainError where it cannot be dropped, for then none must."""
    memory = layout.times(project)
    try:
        memory.unlink(missing_ok=True)
    except OSError as exc:
        raise ToolchainError(f"{memory} cannot be removed: {exc.strerror}", hint=f"ls -ld {memory} {memory.parent}") from exc


def read(memory: Path, checkout: Path) -> Memory:
    """What is remembered of the files in `checkout`; nothing where the memory is damaged, or where ninja ran there since it was written."""
    try:
        written = memory.stat().st_mtime_ns
        if any(log.stat().st_mtime_ns > written for pattern in ("*/.ninja_log", "*/*/.ninja_log") for log in checkout.glob(pattern)):
            return {}
        known = json.loads(read_regular(memory))
        return {str(path): [(str(oid), int(mtime)) for oid, mtime in seen] for path, seen in known.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return {}


def _entries(git: Git, paths: Iterable[str]) -> Entries:
    """`mode oid` of the working content of those of the paths that are plain files."""
    wanted = set(paths)
    if not wanted:
        return {}
    entries = git.entries(sorted(wanted) if len(wanted) <= _AT_ONCE else (), None)
    return {path: entry for path, entry in entries.items() if path in wanted and entry.startswith("100")}


def _mtime(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        found = file.lstat()
        return found.st_mtime_ns if stat.S_ISREG(found.st_mode) else None
    return None
