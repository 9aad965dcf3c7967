"""Moves of a checkout between commits, and the end of a killed move.

A move is recorded before its first file is touched, and the next run finishes it. Only with such a
record may a missing or truncated file come from a killed move, and only if it differs between the
two commits: every other file is the user's.
"""

import contextlib
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from workspace.core import records
from workspace.core.console import RunLog
from workspace.core.errors import CheckoutError
from workspace.core.paths import Layout
from workspace.core.records import Document
from workspace.repo.git import Git, command


@dataclass(frozen=True)
class _Note(records.Record):
    """A move that is not finished. A git operation of the first edition names no commits."""

    source: str = ""
    to: str = ""

    @classmethod
    def upgrade(cls, document: Document) -> Document:
        return {**document, "source": document.get("from") or ""}


def move(layout: Layout, project: str, git: Git, target: str, *, run_log: RunLog) -> None:
    """Move the checkout to a commit, as Git.move_to does, with a record until it ends."""
    note = layout.moving(project)
    records.write(note, {"from": git.head(), "to": target})
    try:
        git.move_to(target, run_log=run_log)
    except CheckoutError:
        # Refused before any file was touched: the next run must not finish it.
        note.unlink(missing_ok=True)
        raise
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
    is_done = is_done and _finish(git, source, target, run_log)
    # The files are finished, or the user's from now on.
    note.unlink(missing_ok=True)
    return is_done


def _finish(git: Git, source: str, target: str, run_log: RunLog) -> bool:
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
