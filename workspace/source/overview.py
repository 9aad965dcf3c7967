"""The stack patch by patch, as `inv patch` shows it, and what moved the checkout behind the stack's back."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from workspace.core.console import Console
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.source import checkout as checkouts
from workspace.source import conflict, mail, patches, pins
from workspace.source.checkout import Checkout
from workspace.source.git import Git, reflog, worktree
from workspace.source.git import mail as mails
from workspace.source.pins import Pin
from workspace.source.stack import BASE_REF, TIP_REF, Stack, State

_WIDTH = 12
_SHOWN_FILES = 3


@dataclass(frozen=True)
class Row:
    """The stack, or one patch of it: applied, pending, changed since it was exported, or unexported, a commit without a patch file.

    `name` is the patch file, the commit, or `stack`; `status` the text of Upstream-Status. The stack's `files` are those with edits.
    """

    state: str
    name: str
    subject: str
    status: str | None
    files: tuple[str, ...]


def rows(layout: Layout, project: str, pin: Pin, checkout: Checkout) -> tuple[Row, ...]:
    """Look at the stack, then at each patch in the order of the series, then at commits that are no patches. Raises what patches.observe raises."""
    return _rows(layout, project, pin, checkout, patches.observe(layout, project, pin, checkout))


def show(layout: Layout, settings: Settings, project: str, *, console: Console, as_json: bool = False) -> None:
    """Print one row for the stack, one a patch, and the next command; as JSON on stdout where a program asks."""
    pinned = pins.load(layout.pins)
    pin = pinned.triton if project == "triton" else pinned.vllm
    checkout = checkouts.observe(layout, pin)
    stack = patches.observe(layout, project, pin, checkout)
    table, following = _rows(layout, project, pin, checkout, stack), next_command(layout, pin, stack)
    sentence = moved(layout, project, pin, checkout, stack) or ""
    # The way back goes before the way on.
    following = next((sentence.split(mark, 1)[1] for mark in ("; back: ", "; to follow: ") if mark in sentence), following)
    if as_json:
        console.data(json.dumps({"schema": 1, "rows": [dataclasses.asdict(row) for row in table], "next": following}, indent=1))
        return
    for row in table:
        files = ", ".join(row.files[:_SHOWN_FILES]) + (f" and {len(row.files) - _SHOWN_FILES} more" if len(row.files) > _SHOWN_FILES else "")
        if row.name == "stack":
            told = [row.subject, *([f"edits: {files}"] if files else [])]
        else:
            told = [row.subject, row.status or "no Upstream-Status", *([files] if files else [])]
        console.say(f"{row.state:<{_WIDTH}}{'  '.join(told)}")
    console.say(f"next: {following}")


def next_command(layout: Layout, pin: Pin, stack: Stack) -> str:
    """What to type next."""
    path = checkouts.folder_of(layout, pin)
    if stack.state is State.APPLIED:
        return f"nothing is due; after commits in {layout.relative(path)}: {conflict.EXPORT}"
    if stack.state in (State.UNAPPLIED, State.UNEXPORTED):
        return patches.APPLY if stack.state is State.UNAPPLIED else conflict.EXPORT
    return conflict.refusal(layout.relative(path), Git(path), stack, verb=patches.APPLY).hint or patches.APPLY


def moved(layout: Layout, project: str, pin: Pin, checkout: Checkout, stack: Stack) -> str | None:
    """Say what has moved the checkout or the pin other than by a verb of the workspace, and the way back; None where nothing has."""
    path = checkouts.folder_of(layout, pin)
    shown, git = layout.relative(path), Git(path)
    if checkout.head is None or stack.state is State.IN_PROGRESS:
        return None
    outer = checkouts.superproject(layout)
    link = outer.gitlink(shown) if outer else None
    # Of a pin that is known by its archive alone upstream has no commit for the gitlink.
    is_archives = pin.archive is not None and pin.archive.commit == pin.commit
    if link and link.commit != pin.commit and not is_archives:
        return (
            f"the superproject's index has {shown} at {link.commit[:12]}, vendor/pins.toml at {pin.commit[:12]};"
            f" git log --oneline -3 -- vendor/pins.toml {shown}    shows which of the two moved"
        )
    references = worktree.references(git, "refs/patches/")
    tip, base = references.get(TIP_REF), references.get(BASE_REF)
    if checkout.base is None:
        way = f"git -C {shown} fetch {pin.url} {pin.commit} && git -C {shown} checkout --detach {pin.commit[:12]}"
        return f"{shown} is at {checkout.head[:12]} and lacks {pin.tag}: the pin moved, as by git pull, and the checkout did not; to follow: {way}"
    if tip is None or git.is_ancestor(tip, checkout.head):
        return _pin_moved(git, shown, checkout.head, checkout.base, base, tip, stack)
    return _head_moved(git, shown, checkout.head, checkout.base, tip, stack)


def _pin_moved(git: Git, shown: str, head: str, base: str, old: str | None, tip: str | None, stack: Stack) -> str | None:
    if stack.state is not State.FOREIGN or old in (None, base):
        return None
    keep = "" if tip == head else conflict.keeping(shown, git, head)
    way = f"{keep}git -C {shown} checkout --detach {base[:12]} && {patches.APPLY}"
    return f"{shown} stands on {(old or '')[:12]}, the pin is {base[:12]}: the pin moved, as by git pull, and the checkout did not; to follow: {way}"


def _head_moved(git: Git, shown: str, head: str, base: str, tip: str, stack: Stack) -> str | None:
    move = reflog.last_move(git)
    # A rebase or a commit is the user's work on the stack, as is a reset within it; submodule.recurse says nothing of itself.
    others = ("checkout:",) if stack.state is State.UNEXPORTED else ("checkout:", "reset:")
    if move is None or move.is_ours or (move.what and not move.what.startswith(others)):
        return None
    lost = move.before if move.before not in (head, base, tip) and git.is_ancestor(base, move.before) and not git.is_ancestor(move.before, head) else tip
    if lost == base or not git.is_ancestor(base, lost):
        return None
    is_series = lost == tip and stack.state in (State.UNAPPLIED, State.DIRTY) and git.tree(tip) == stack.expected_tree
    way = patches.APPLY if is_series else f"git -C {shown} checkout {TIP_REF if lost == tip else lost[:12]}"
    return f"something else moved {shown} from the stack to {head[:12]} ({move.what or 'submodule.recurse'}); its commits are at {lost[:12]}; back: {way}"


def _rows(layout: Layout, project: str, pin: Pin, checkout: Checkout, stack: Stack) -> tuple[Row, ...]:
    contents = {name: (layout.patches(project) / name).read_bytes() for name in stack.names}
    commits = _commits(layout, pin, checkout, stack)
    table = [_stack_row(layout, project, pin, checkout, stack)]
    for name, content in contents.items():
        state = "applied" if stack.state is State.APPLIED else "pending"
        if name in commits:
            written = commits[name][1]
            state = "applied" if written is None or mail.same_change(content, written, anywhere=True) else "changed"
        table.append(_row(state, name, content))
    for name, (oid, written) in commits.items():
        if name not in contents:
            table.append(_row("unexported", oid[:12], written) if written is not None else Row("unexported", oid[:12], name.removesuffix(".patch"), None, ()))
    return tuple(table)


def _row(state: str, name: str, content: bytes) -> Row:
    read = mail.parse(content)
    return Row(state, name, read.subject, read.status, tuple(dict.fromkeys(mails.paths(read.diff))))


def _commits(layout: Layout, pin: Pin, checkout: Checkout, stack: Stack) -> dict[str, tuple[str, bytes | None]]:
    """The commits of the stack by the name that each would have as a patch: OID and mail, None where git cannot make one of each.

    Of an applied stack they are known without looking: it has the tree of the series.
    """
    if checkout.base is None or checkout.head is None or stack.state not in (State.UNEXPORTED, State.IN_PROGRESS):
        return {}
    git = Git(checkouts.folder_of(layout, pin))
    if not git.is_ancestor(checkout.base, checkout.head):
        return {}
    found = mails.commits(git, checkout.base, checkout.head)
    written: Sequence[bytes | None] = ()
    if found and not any(len(commit.parents) > 1 for commit in found):
        written = mails.mails(git, checkout.base, found)
    if len(written) != len(found):
        written = [None] * len(found)
    named: dict[str, tuple[str, bytes | None]] = {}
    for commit, content in zip(found, written, strict=True):
        name = f"{commit.slug}.patch"
        named[commit.oid if name in named else name] = (commit.oid, content)
    return named


def _waiting(layout: Layout, pin: Pin, stack: Stack) -> str:
    if stack.ended:
        return f"{stack.ended.what} was ended in the middle"
    return f"it waits in the middle of git {Git(checkouts.folder_of(layout, pin)).under_way()}"


def _stack_row(layout: Layout, project: str, pin: Pin, checkout: Checkout, stack: Stack) -> Row:
    count = f"{len(stack.names)} {'patch' if len(stack.names) == 1 else 'patches'}"
    place = f"{layout.relative(checkouts.folder_of(layout, pin))}, {checkout.detail}"
    said = {
        State.APPLIED: f"tree {(stack.tree or '')[:12]}",
        State.UNEXPORTED: "its commits and the series differ",
        State.IN_PROGRESS: _waiting(layout, pin, stack) if stack.state is State.IN_PROGRESS else "",
        State.FOREIGN: f"at {(stack.head or 'no commit')[:12]}, which is not on the pin",
    }
    parts = [f"{count} for {place}", said.get(stack.state, ""), moved(layout, project, pin, checkout, stack) or ""]
    return Row(stack.state.value, "stack", "; ".join(part for part in parts if part), None, stack.dirty)
