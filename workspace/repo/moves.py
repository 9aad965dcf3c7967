"""Moves of a checkout between commits, with modification times, and the end of a killed move.

A move is recorded before its first file is touched, and the next run finishes it. Only with such a
record may a missing or truncated file come from a killed move, and only if it differs between the
two commits: every other file is the user's.
"""

import contextlib
import os
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.core import hints, records
from workspace.core.console import RunLog
from workspace.core.errors import CheckoutError, ToolchainError
from workspace.core.paths import Layout
from workspace.core.records import Document
from workspace.repo.git import Git, command
from workspace.repo.git.command import Entries, split

# Path to `blob oid, mtime in ns`, the newest last. A switch between two stacks needs two entries;
# older ones are rarely used again.
Memory = Mapping[str, Sequence[tuple[str, int]]]
_KEPT = 4
# Paths on one command line; the kernel takes 2 MiB (execve(2)).
_AT_ONCE = 5000


def remember_times(git: Git, paths: Iterable[str], *, memory: Path) -> None:
    """Record content and time of the files that will be rewritten.

    If the record cannot be written, no time is restored.
    """
    known = {path: list(seen) for path, seen in read_times(memory, git.path).items()}
    for path, entry in _entries(git, paths).items():
        if (mtime := _mtime(git.path / path)) is not None:
            oid = entry.split()[1]
            known[path] = [*(seen for seen in known.get(path, []) if seen[0] != oid), (oid, mtime)][
                -_KEPT:
            ]
    with contextlib.suppress(OSError):
        records.write(memory, known, indent=None)


def restore_times(git: Git, known: Memory) -> None:
    """Set the recorded time of each file that has a recorded content; keep all other times."""
    is_changed = False
    for path, entry in (_entries(git, known) if known else {}).items():
        file, mtime = git.path / path, dict(known[path]).get(entry.split()[1])
        if mtime is not None and _mtime(file) not in (None, mtime):
            # Without it the file is only compiled again.
            with contextlib.suppress(OSError):
                os.utime(file, ns=(file.stat().st_atime_ns, mtime))
                is_changed = True
    if is_changed:
        # Otherwise each status query would read these files.
        git.write("update-index", "--refresh", check=False)


def forget_times(layout: Layout, project: str) -> None:
    """Delete the recorded times, because a compiler will run. Raises ToolchainError.

    After a build, no old time may be restored.
    """
    memory = layout.times(project)
    try:
        memory.unlink(missing_ok=True)
    except OSError as exc:
        raise ToolchainError(
            f"{memory} cannot be removed: {exc.strerror}",
            hint=hints.text("core.list_folders", folders=[memory, memory.parent]),
        ) from exc


def read_times(memory: Path, checkout: Path) -> Memory:
    """Return the recorded times of the files in `checkout`.

    Return nothing where the record is damaged, or where ninja ran there after it was written.
    """
    try:
        written = memory.stat().st_mtime_ns
        if any(
            log.stat().st_mtime_ns > written
            for pattern in ("*/.ninja_log", "*/*/.ninja_log")
            for log in checkout.glob(pattern)
        ):
            return {}
    except OSError:
        return {}
    return records.read(memory, dict[str, list[tuple[str, int]]]) or {}


def _entries(git: Git, paths: Iterable[str]) -> Entries:
    """Return `mode oid` of the working content of those paths that are plain files."""
    wanted = set(paths)
    if not wanted:
        return {}
    entries = git.entries(sorted(wanted) if len(wanted) <= _AT_ONCE else (), None)
    return {
        path: entry for path, entry in entries.items() if path in wanted and entry.startswith("100")
    }


def _mtime(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        found = file.lstat()
        return found.st_mtime_ns if stat.S_ISREG(found.st_mode) else None
    return None


@dataclass(frozen=True)
class _Note(records.Record):
    """A move that is not finished. A git operation of the first edition names no commits."""

    source: str = ""
    to: str = ""

    @classmethod
    def upgrade(cls, document: Document) -> Document:
        return {**document, "source": document.get("from") or ""}


def move(layout: Layout, project: str, git: Git, target: str, *, run_log: RunLog) -> None:
    """Move the checkout to a commit, as Git.move_to does, and restore modification times."""
    note, memory = layout.moving(project), layout.times(project)
    records.write(note, {"from": git.head(), "to": target})
    known = read_times(memory, git.path)
    touched = ("diff-tree", "-r", "-z", "--name-only", "--no-renames", "HEAD", target)
    remember_times(git, split(git.look(*touched).out), memory=memory)
    try:
        git.move_to(target, run_log=run_log)
    except CheckoutError:
        # Refused before any file was touched: the next run must not finish it.
        note.unlink(missing_ok=True)
        raise
    restore_times(git, known)
    note.unlink(missing_ok=True)


def is_begun(layout: Layout, project: str) -> bool:
    """Return whether a move was begun and not finished."""
    return layout.moving(project).exists()


def finish(layout: Layout, project: str, git: Git, *, run_log: RunLog) -> bool:
    """Finish a move that a killed run began.

    Return False, with no file touched, where there is none, or where the changes may be the user's.
    A killed move leaves HEAD unmoved, each differing file as one of the two commits has it, or
    begun, and perhaps an index.lock.
    """
    note = layout.moving(project)
    record = records.read(note, _Note)
    source, target = (record.source, record.to) if record else ("", "")
    is_done = (
        bool(source and target)
        and git.head() == source
        and len(git.present((source, target))) == len({source, target})
    )
    is_done = is_done and _finish(layout, project, git, source, target, run_log)
    # The files are finished, or the user's from now on.
    note.unlink(missing_ok=True)
    return is_done


def _finish(
    layout: Layout, project: str, git: Git, source: str, target: str, run_log: RunLog
) -> bool:
    before, after = git.entries((), source), git.entries((), target)
    touched = sorted(
        path for path in before.keys() | after.keys() if before.get(path) != after.get(path)
    )
    now = git.entries((), None)
    changed = [path for path in touched if now.get(path) != after.get(path)]
    # An ignored file is in no listing: a file of the user may have the path of a new file.
    if not all(
        (path in now and now[path] == before.get(path)) or _is_begun(git, path, after.get(path))
        for path in changed
    ):
        return False
    run_log.write(f"finishing the interrupted move of {git.path} to {target}")
    known = read_times(layout.times(project), git.path)
    command.remove_at_top(git.path_of("index").parent, git.path)
    git.read_index(target)
    for removed in (path for path in changed if path not in after):
        (git.path / removed).unlink(missing_ok=True)
    _remove_empty(
        git.path,
        {folder for path in touched if path not in after for folder in Path(path).parents[:-1]},
    )
    if written := [path for path in changed if path in after]:
        git.write_files(*written)
    # The index is new: without a refresh each status query would read all files.
    git.write("update-index", "-q", "--refresh", check=False)
    restore_times(git, known)
    # As in Git.move_to: the files are on the disk before HEAD names them.
    os.sync()
    git.set_ref("HEAD", target)
    return True


def _remove_empty(top: Path, folders: Collection[Path]) -> None:
    """Remove folders that are now empty, as git does at the end of a move."""
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        with contextlib.suppress(OSError):
            (top / folder).rmdir()


def _is_begun(git: Git, path: str, entry: str | None) -> bool:
    """Return whether git began to write the file.

    The file is then missing, or holds the start of its new content.
    """
    file = git.path / path
    if not os.path.lexists(file):
        return True
    with contextlib.suppress(OSError):
        return (
            entry is not None
            and file.is_file()
            and git.blob(entry.split()[1]).startswith(file.read_bytes())
        )
    return False
