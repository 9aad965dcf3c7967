"""The stack of local patches on a pin: its state, decided from git alone, and its application."""

import contextlib
import enum
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.core.errors import CheckoutError, PatchConflict, PatchDrift, WorkspaceError
from workspace.core.files import read_regular, write_atomic
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.source import checkout as checkouts
from workspace.source import leftover, scratch, series
from workspace.source.checkout import Checkout, Kind
from workspace.source.git import AM_BY_HAND, Applied, Git
from workspace.source.pins import Pin

# What keeps the commits of the last stack alive when something else moves HEAD (gitsubmodules(7)).
BASE_REF, TIP_REF = "refs/patches/base", "refs/patches/tip"


class State(enum.Enum):
    MISSING = "missing"
    IN_PROGRESS = "in progress"
    DIRTY = "dirty"
    UNAPPLIED = "unapplied"
    APPLIED = "applied"
    UNEXPORTED = "unexported"
    FOREIGN = "foreign"


@dataclass(frozen=True)
class Stack:
    """The stack as it stands. `dirty` are tracked paths with edits, whatever the state; DIRTY means that they stand in the way."""

    state: State
    base: str | None
    head: str | None
    tree: str | None
    expected_tree: str | None
    names: tuple[str, ...]
    dirty: tuple[str, ...]


def observe(layout: Layout, project: str, pin: Pin, checkout: Checkout) -> Stack:
    """Look at the stack; nothing in the checkout is written.

    The expected tree is None where the series does not apply to the base.
    Raises SettingsError and PatchDrift as series.read does.
    """
    wanted = series.read(layout.patches(project), pin=pin.commit)
    if checkout.base is None or checkout.head is None:
        state = State.MISSING if checkout.kind is Kind.MISSING else State.FOREIGN
        return Stack(state, checkout.base, checkout.head, None, None, wanted.names, ())
    git = Git(checkouts.folder_of(layout, pin))
    tree = git.tree(checkout.head)
    expected = _expected_tree(layout, project, git, checkout.base, wanted.names)
    dirty = git.edits()
    if git.under_way():
        state = State.IN_PROGRESS
    elif tree == expected and (checkout.head == checkout.base or git.is_ancestor(checkout.base, checkout.head)):
        state = State.APPLIED
    elif checkout.head == checkout.base:
        state = State.DIRTY if dirty else State.UNAPPLIED
    elif git.is_ancestor(checkout.base, checkout.head):
        state = State.UNEXPORTED
    else:
        state = State.FOREIGN
    return Stack(state, checkout.base, checkout.head, tree, expected, wanted.names, dirty)


def apply(layout: Layout, project: str, pin: Pin, checkout: Checkout, *, journal: Journal) -> Stack:
    """Put the whole series on its base, or nothing of it. An applied stack is left untouched.

    Raises CheckoutError where the checkout is missing, dirty, foreign or in the middle of something; PatchDrift where it holds
    commits that are no patches yet, or a patch changes nothing; PatchConflict, with the patch and its paths, where one does not apply.
    """
    stack = observe(layout, project, pin, checkout)
    if stack.state is State.APPLIED:
        return stack
    path = checkouts.folder_of(layout, pin)
    git = Git(path)
    if stack.state is State.DIRTY and stack.base is not None and _finish(git, stack.base, stack.expected_tree, journal):
        return observe(layout, project, pin, checkouts.observe(layout, pin))
    if stack.state is not State.UNAPPLIED or stack.base is None:
        raise _refusal(layout.relative(path), git, stack)
    files = [layout.patches(project) / name for name in stack.names]
    with scratch.beside(layout.state / f"{project}-stack") as folder:
        applied = git.applied(stack.base, files, scratch=folder)
    if applied.tip is None:
        raise _conflict(layout, project, path, stack, applied)
    made = git.slugs(stack.base, applied.tip)
    if len(made) != len(stack.names):
        lost = [name for name in stack.names if name.removesuffix(".patch") not in made]
        raise PatchDrift(
            f"{', '.join(lost) or 'a patch'} changes nothing on {stack.base[:12]}: {len(made)} of {len(stack.names)} patches make a commit",
            hint=f"if upstream has it, take its line out of patches/{project}/series",
        )
    if git.tree(applied.tip) != stack.expected_tree:
        raise PatchDrift(f"the series gives tree {git.tree(applied.tip)}, expected {stack.expected_tree}; nothing was changed", hint="./scripts/inv bootstrap")
    # First the references, so that the commits are safe whenever this run is killed.
    git.set_ref(TIP_REF, applied.tip)
    git.set_ref(BASE_REF, stack.base)
    git.move_to(applied.tip, journal=journal)
    return observe(layout, project, pin, checkouts.observe(layout, pin))


def _finish(git: Git, base: str, expected_tree: str | None, journal: Journal) -> bool:
    """Finish the move to the stack's tip that a killed run began. False, and nothing done, where any edit may be the user's.

    Such a run leaves HEAD at the base and each file of the series as the base or the tip has it, or begun; perhaps an index.lock.
    """
    tip = git.resolve(TIP_REF)
    if tip is None or expected_tree is None or git.tree(tip) != expected_tree:
        return False
    before, after, now = git.entries((), base), git.entries((), tip), git.entries((), None)
    # A file that neither of them has is a new one of the user's, and stays.
    changed = [path for path in before.keys() | after.keys() if now.get(path) != after.get(path)]
    if not all(now.get(path) == before.get(path) or _is_begun(git, path, after.get(path)) for path in changed):
        return False
    journal.write(f"finishing the interrupted move of {git.path} to {tip}")
    leftover.remove_at_top(git.path_of("index").parent, git.path)
    git.read_index(tip)
    for gone in (path for path in changed if path not in after):
        (git.path / gone).unlink(missing_ok=True)
    if written := [path for path in changed if path in after]:
        git.write_files(*written)
    # As in Git.move_to: the files are on the disk before HEAD names them.
    os.sync()
    git.set_ref(BASE_REF, base)
    git.set_ref("HEAD", tip)
    return True


def _is_begun(git: Git, path: str, entry: str | None) -> bool:
    """Whether the file is gone, as git removes it before it writes it, or holds the first bytes of what it is to become."""
    file = git.path / path
    if not os.path.lexists(file):
        return True
    return entry is not None and file.is_file() and git.blob(entry.split()[1]).startswith(file.read_bytes())


def _expected_tree(layout: Layout, project: str, git: Git, base: str, names: Sequence[str]) -> str | None:
    """The tree of the base with all patches on it, remembered by base and content of the series."""
    files = [layout.patches(project) / name for name in names]
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    key = {"base": base, "series": digest.hexdigest()}
    memory = layout.state / "expected-trees" / f"{project}.json"
    with contextlib.suppress(OSError, ValueError, RecursionError):
        known = json.loads(read_regular(memory))
        if isinstance(known, dict) and {name: known.get(name) for name in key} == key and isinstance(known.get("tree"), str):
            return str(known["tree"])
    tree = git.tree_after(base, files)
    if tree is not None:
        # Only a memory: where it cannot be written, it is worked out again.
        with contextlib.suppress(OSError):
            write_atomic(memory, json.dumps(key | {"tree": tree}).encode())
    return tree


def _refusal(shown: str, git: Git, stack: Stack) -> WorkspaceError:
    """Why the series cannot be put on what is there, and the commands that lead on without loss."""
    base = (stack.base or "")[:12]
    if stack.state is State.MISSING:
        return CheckoutError(f"{shown} is not there", hint="./scripts/inv bootstrap")
    if stack.state is State.IN_PROGRESS:
        verb = git.under_way()
        return CheckoutError(f"{shown} is in the middle of a git {verb}", hint=f"git -C {shown} {verb} --continue    or --abort, then ./scripts/inv bootstrap")
    if stack.state is State.DIRTY:
        edited = ", ".join(stack.dirty[:3]) + (f" and {len(stack.dirty) - 3} more" if len(stack.dirty) > 3 else "")
        return CheckoutError(
            f"{shown} has edits ({edited}) where {len(stack.names)} patches are to be applied; they were left as they are",
            hint=f"git -C {shown} stash && ./scripts/inv bootstrap && git -C {shown} stash pop",
        )
    keep = f"git -C {shown} branch mine && git -C {shown} checkout --detach {base} && ./scripts/inv bootstrap"
    if stack.state is State.UNEXPORTED:
        return PatchDrift(f"{shown} has commits on {base} that are not what the series makes; they were left as they are", hint=f"to keep them aside: {keep}")
    return CheckoutError(
        f"{shown} is at {(stack.head or 'no commit')[:12]}, which is not on {base or 'the pin'}; it was left as it is", hint=f"to keep it aside: {keep}"
    )


def _conflict(layout: Layout, project: str, path: Path, stack: Stack, applied: Applied) -> PatchConflict:
    shown, name = layout.relative(path), stack.names[applied.position - 1]
    up_to = " ".join(f"../../patches/{project}/{earlier}" for earlier in stack.names[: applied.position])
    return PatchConflict(
        f"patch {applied.position} of {len(stack.names)}, patches/{project}/{name}, does not apply to {(stack.base or '')[:12]}; nothing was changed",
        hint=f"git -C {shown} {AM_BY_HAND} {up_to}    stops at the conflict; or take its line out of patches/{project}/series and run ./scripts/inv bootstrap",
        details=tuple(f"conflict in {conflicted}" for conflicted in applied.conflicted),
    )
