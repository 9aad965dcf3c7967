"""A move of a checkout from one commit to another, which a run that is killed leaves begun and the next one finishes.

It is written down before the first file is touched. Only then may a file that is missing or cut short be one of a killed move, and only one
that differs between the two commits: every other is the user's.
"""

import contextlib
import json
import os

from workspace.core.files import read_regular, write_atomic
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.source import leftover, times
from workspace.source.git import Git


def move(layout: Layout, project: str, git: Git, target: str, *, journal: Journal) -> None:
    """Move the checkout to a commit, as Git.move_to does, with content-true times."""
    note = layout.moving(project)
    write_atomic(note, json.dumps({"from": git.head(), "to": target}).encode())
    times.move(git, target, memory=layout.times(project), journal=journal)
    note.unlink(missing_ok=True)


def is_begun(layout: Layout, project: str) -> bool:
    return layout.moving(project).exists()


def finish(layout: Layout, project: str, git: Git, *, journal: Journal) -> bool:
    """Finish a move that a killed run began. False, and no file touched, where there is none, or where an edit may be the user's.

    Such a run leaves HEAD where it was and each file that differs as the one or the other commit has it, or begun; perhaps an index.lock.
    """
    note = layout.moving(project)
    try:
        record = json.loads(read_regular(note))
        source, target = str(record["from"]), str(record["to"])
    except (OSError, ValueError, KeyError, TypeError):
        source = target = ""
    is_done = bool(source) and git.head() == source and len(git.present((source, target))) == len({source, target})
    is_done = is_done and _finish(layout, project, git, source, target, journal)
    # What lies there is finished, or the user's from now on.
    note.unlink(missing_ok=True)
    return is_done


def _finish(layout: Layout, project: str, git: Git, source: str, target: str, journal: Journal) -> bool:
    before, after = git.entries((), source), git.entries((), target)
    touched = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    now = git.entries((), None)
    changed = [path for path in touched if now.get(path) != after.get(path)]
    # What git ignores is in no listing: a file of the user's may lie where a new one is to come.
    if not all((path in now and now[path] == before.get(path)) or _is_begun(git, path, after.get(path)) for path in changed):
        return False
    journal.write(f"finishing the interrupted move of {git.path} to {target}")
    known = times.read(layout.times(project), git.path)
    leftover.remove_at_top(git.path_of("index").parent, git.path)
    git.read_index(target)
    for gone in (path for path in changed if path not in after):
        (git.path / gone).unlink(missing_ok=True)
    if written := [path for path in changed if path in after]:
        git.write_files(*written)
    times.restore(git, known)
    # As in Git.move_to: the files are on the disk before HEAD names them.
    os.sync()
    git.set_ref("HEAD", target)
    return True


def _is_begun(git: Git, path: str, entry: str | None) -> bool:
    """Whether the file is gone, as git removes it before it writes it, or holds the first bytes of what it is to become."""
    file = git.path / path
    if not os.path.lexists(file):
        return True
    with contextlib.suppress(OSError):
        return entry is not None and file.is_file() and git.blob(entry.split()[1]).startswith(file.read_bytes())
    return False
