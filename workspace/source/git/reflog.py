"""Who moved HEAD last, and from where: a verb of the workspace signs what it moves with a name of its own."""

from dataclasses import dataclass

from workspace.source import hardening
from workspace.source.git.repository import Git


@dataclass(frozen=True)
class Move:
    """The newest entry of HEAD's reflog: what git calls it, the commit before it, and whether a verb of the workspace made it."""

    what: str
    before: str
    is_ours: bool


def last_move(git: Git) -> Move | None:
    """The last move of HEAD, or None where git keeps no such record, or only that of one commit."""
    words = ("log", "--walk-reflogs", "-2", "--no-show-signature", "--no-color", "--format=%H%x00%ge%x00%gs", "HEAD", "--")
    entries = [line.split("\0") for line in git.look(*words, check=False).out.splitlines()]
    if len(entries) != 2 or any(len(entry) != 3 for entry in entries):
        return None
    (_, by, what), (before, _, _) = entries
    return Move(what, before, by == hardening.IDENTITY[1])
