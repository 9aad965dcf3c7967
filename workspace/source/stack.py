"""What is known of the stack of local patches on a pin: its state, its commits, and the references that keep them."""

import enum
from dataclasses import dataclass

# What keeps the commits of the last stack alive when something else moves HEAD (gitsubmodules(7)).
BASE_REF, TIP_REF = "refs/patches/base", "refs/patches/tip"
# Stacks of the user's own commits that a verb has replaced by the commits of the same patches.
KEPT_REFS = "refs/patches/kept"
# What lay in the checkout, edits included, when an operation under way was last given up, or a patch of it skipped.
LEFT_REF = "refs/patches/left"


class State(enum.Enum):
    MISSING = "missing"
    IN_PROGRESS = "in progress"
    DIRTY = "dirty"
    UNAPPLIED = "unapplied"
    APPLIED = "applied"
    UNEXPORTED = "unexported"
    FOREIGN = "foreign"


@dataclass(frozen=True)
class Attempt:
    """An act of git's own that was ended in the middle: `what` it was, and the command line that takes it back and begins it `again`."""

    what: str
    again: str


@dataclass(frozen=True)
class Stack:
    """The stack as it stands. `dirty` are tracked paths with edits, whatever the state; DIRTY means that they stand in the way.

    IN_PROGRESS is also what an `ended` act of git's left.
    """

    state: State
    base: str | None
    head: str | None
    tree: str | None
    expected_tree: str | None
    names: tuple[str, ...]
    dirty: tuple[str, ...]
    ended: Attempt | None = None
