"""The stack patch by patch, as `inv patch` shows it, and what moved the checkout behind the stack's
back.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from workspace.core.console import Console
from workspace.core.errors import CheckoutError, PatchConflict, WorkspaceError
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.repo import checkout as checkouts
from workspace.repo import mail, moves, patches, pins, series
from workspace.repo.checkout import Checkout
from workspace.repo.git import Git, am, repository, worktree
from workspace.repo.git import am as mails
from workspace.repo.git.am import Applied
from workspace.repo.git.command import first_line
from workspace.repo.pins import Pin
from workspace.repo.series import BASE_REF, LEFT_REF, TIP_REF, Attempt, Stack, State

_WIDTH = 12
_SHOWN_FILES = 3


@dataclass(frozen=True)
class Row:
    """The stack, or one patch of it: applied, pending, changed since it was exported, or
    unexported, a commit without a patch file.

    `name` is the patch file, the commit, or `stack`; `status` the text of Upstream-Status. The
    stack's `files` are those with edits.
    """

    state: str
    name: str
    subject: str
    status: str | None
    files: tuple[str, ...]


def rows(layout: Layout, project: str, pin: Pin, checkout: Checkout) -> tuple[Row, ...]:
    """Look at the stack, then at each patch in the order of the series, then at commits that are no
    patches. Raises what patches.observe raises.
    """
    return _rows(layout, project, pin, checkout, patches.observe(layout, project, pin, checkout))


def show(
    layout: Layout, settings: Settings, project: str, *, console: Console, as_json: bool = False
) -> None:
    """Print one row for the stack, one a patch, and the next command; as JSON on stdout where a
    program asks.
    """
    pinned = pins.load(layout.pins)
    pin = pinned.triton if project == "triton" else pinned.vllm
    checkout = checkouts.observe(layout, pin)
    stack = patches.observe(layout, project, pin, checkout)
    table, following = (
        _rows(layout, project, pin, checkout, stack),
        next_command(layout, pin, stack),
    )
    sentence = moved(layout, project, pin, checkout, stack) or ""
    # The way back goes before the way on.
    following = next(
        (sentence.split(mark, 1)[1] for mark in ("; back: ", "; to follow: ") if mark in sentence),
        following,
    )
    if as_json:
        console.data(
            json.dumps(
                {
                    "schema": 1,
                    "rows": [dataclasses.asdict(row) for row in table],
                    "next": following,
                },
                indent=1,
            )
        )
        return
    for row in table:
        files = ", ".join(row.files[:_SHOWN_FILES]) + (
            f" and {len(row.files) - _SHOWN_FILES} more" if len(row.files) > _SHOWN_FILES else ""
        )
        if row.name == "stack":
            told = [row.subject, *([f"edits: {files}"] if files else [])]
        else:
            told = [row.subject, row.status or "no Upstream-Status", *([files] if files else [])]
        console.info(f"{row.state:<{_WIDTH}}{'  '.join(told)}")
    console.info(f"next: {following}")


def next_command(layout: Layout, pin: Pin, stack: Stack) -> str:
    """What to type next."""
    path = checkouts.folder_of(layout, pin)
    if stack.state is State.APPLIED:
        return f"nothing is due; after commits in {layout.relative(path)}: {series.EXPORT}"
    if stack.state in (State.UNAPPLIED, State.UNEXPORTED):
        return patches.APPLY if stack.state is State.UNAPPLIED else series.EXPORT
    return (
        series.refusal(layout.relative(path), Git(path), stack, verb=patches.APPLY).hint
        or patches.APPLY
    )


def moved(layout: Layout, project: str, pin: Pin, checkout: Checkout, stack: Stack) -> str | None:
    """Say what has moved the checkout or the pin other than by a verb of the workspace, and the way
    back; None where nothing has.
    """
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
            f"the superproject's index has {shown} at {link.commit[:12]}, vendor/pins.toml at"
            f" {pin.commit[:12]}; git log --oneline -3 -- vendor/pins.toml {shown}    shows which"
            " of the two moved"
        )
    references = worktree.references(git, "refs/patches/")
    tip, base = references.get(TIP_REF), references.get(BASE_REF)
    if checkout.base is None:
        way = (
            f"git -C {shown} fetch {pin.url} {pin.commit} && git -C {shown} checkout --detach"
            f" {pin.commit[:12]}"
        )
        return (
            f"{shown} is at {checkout.head[:12]} and lacks {pin.tag}: the pin moved, as by git"
            f" pull, and the checkout did not; to follow: {way}"
        )
    if tip is None or git.is_ancestor(tip, checkout.head):
        return _pin_moved(git, shown, checkout.head, checkout.base, base, tip, stack)
    return _head_moved(git, shown, checkout.head, checkout.base, tip, stack)


def _pin_moved(
    git: Git, shown: str, head: str, base: str, old: str | None, tip: str | None, stack: Stack
) -> str | None:
    if stack.state is not State.FOREIGN or old in (None, base):
        return None
    keep = "" if tip == head else series.keeping_hint(shown, git, head)
    way = f"{keep}git -C {shown} checkout --detach {base[:12]} && {patches.APPLY}"
    return (
        f"{shown} stands on {(old or '')[:12]}, the pin is {base[:12]}: the pin moved, as by git"
        f" pull, and the checkout did not; to follow: {way}"
    )


def _head_moved(git: Git, shown: str, head: str, base: str, tip: str, stack: Stack) -> str | None:
    move = repository.last_move(git)
    # A rebase or a commit is the user's work on the stack, as is a reset within it;
    # submodule.recurse says nothing of itself.
    others = ("checkout:",) if stack.state is State.UNEXPORTED else ("checkout:", "reset:")
    if move is None or move.is_ours or (move.message and not move.message.startswith(others)):
        return None
    lost = (
        move.before
        if move.before not in (head, base, tip)
        and git.is_ancestor(base, move.before)
        and not git.is_ancestor(move.before, head)
        else tip
    )
    if lost == base or not git.is_ancestor(base, lost):
        return None
    is_series = (
        lost == tip
        and stack.state in (State.UNAPPLIED, State.DIRTY)
        and git.tree(tip) == stack.expected_tree
    )
    way = (
        patches.APPLY
        if is_series
        else f"git -C {shown} checkout {TIP_REF if lost == tip else lost[:12]}"
    )
    return (
        f"something else moved {shown} from the stack to {head[:12]}"
        f" ({move.message or 'submodule.recurse'}); its commits are at {lost[:12]}; back: {way}"
    )


def _rows(
    layout: Layout, project: str, pin: Pin, checkout: Checkout, stack: Stack
) -> tuple[Row, ...]:
    contents = {name: (layout.patches(project) / name).read_bytes() for name in stack.names}
    commits = _commits(layout, pin, checkout, stack)
    table = [_stack_row(layout, project, pin, checkout, stack)]
    for name, content in contents.items():
        state = "applied" if stack.state is State.APPLIED else "pending"
        if name in commits:
            written = commits[name][1]
            state = (
                "applied"
                if written is None or mail.same_change(content, written, anywhere=True)
                else "changed"
            )
        table.append(_row(state, name, content))
    for name, (oid, written) in commits.items():
        if name not in contents:
            table.append(
                _row("unexported", oid[:12], written)
                if written is not None
                else Row("unexported", oid[:12], name.removesuffix(".patch"), None, ())
            )
    return tuple(table)


def _row(state: str, name: str, content: bytes) -> Row:
    read = mail.parse(content)
    return Row(state, name, read.subject, read.status, tuple(dict.fromkeys(mails.paths(read.diff))))


def _commits(
    layout: Layout, pin: Pin, checkout: Checkout, stack: Stack
) -> dict[str, tuple[str, bytes | None]]:
    """The commits of the stack by the name that each would have as a patch: OID and mail, None
    where git cannot make one of each.

    Of an applied stack they are known without looking: it has the tree of the series.
    """
    if (
        checkout.base is None
        or checkout.head is None
        or stack.state not in (State.UNEXPORTED, State.IN_PROGRESS)
    ):
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
    parts = [
        f"{count} for {place}",
        said.get(stack.state, ""),
        moved(layout, project, pin, checkout, stack) or "",
    ]
    return Row(
        stack.state.value, "stack", "; ".join(part for part in parts if part), None, stack.dirty
    )


How = Literal["continue", "skip", "abort"]


def resume(
    layout: Layout, project: str, pin: Pin, checkout: Checkout, *, how: How, run_log: RunLog
) -> Stack:
    """Continue, skip or abort whatever is under way in the checkout, and look at the stack that
    came of it.

    Raises CheckoutError where nothing is under way, or git refuses; PatchConflict where it stops at
    a conflict, old or new.
    """
    path = checkouts.folder_of(layout, pin)
    if checkout.head is None:
        raise CheckoutError(
            f"{layout.relative(path)} is {checkout.detail}, so nothing is under way there",
            hint="./scripts/inv bootstrap",
        )
    git, known = Git(path), moves.read_times(layout.times(project), path)
    names: tuple[str, ...] = ()
    try:
        names = tuple(
            f"patches/{project}/{name}"
            for name in series.read_series(layout.patches(project), pin=pin.commit).names
        )
    except WorkspaceError:
        # Whatever is wrong with the series, what is under way can be ended.
        run_log.write("the series cannot be read, so patches are named by their subjects")
    again = (
        series.CONTINUE
        + ("" if how == "continue" else f" --{how}")
        + ("" if project == "vllm" else f" --project {project}")
    )
    with contextlib.ExitStack() as held:
        if verb := git.under_way():
            held.enter_context(
                moves.attempt(
                    layout, project, git, Attempt(f"git {verb} --{how}", again), run_log=run_log
                )
            )
        resume_in(
            git,
            base=checkout.base or checkout.head,
            how=how,
            run_log=run_log,
            names=names,
            shown=layout.relative(path),
        )
    moves.restore_times(git, known)
    stack = patches.observe(layout, project, pin, checkouts.observe(layout, pin))
    # What was resolved otherwise than the series has it is named by the export that is due, which
    # would else take the patch for the newer one.
    if stack.state is State.APPLIED and stack.base and stack.head and stack.head != stack.base:
        git.set_ref(TIP_REF, stack.head)
        git.set_ref(BASE_REF, stack.base)
    return stack


def resume_in(
    git: Git,
    *,
    base: str,
    how: How,
    run_log: RunLog,
    names: Sequence[str] = (),
    shown: str | None = None,
) -> str | None:
    """Go on in any working tree, and return HEAD, or None after an abort. `names` are the patches'
    files, `base` what they are put on.

    What has stopped for the user's edit, as a rebase does that was told to, still is under way
    afterwards. Raises CheckoutError where nothing is under way, or git refuses; PatchConflict where
    it stops at a conflict, old or new.
    """
    shown = shown or str(git.path)
    verb = git.under_way()
    if verb is None:
        raise CheckoutError(
            f"nothing is under way in {shown}: no am, rebase, merge, cherry-pick or revert",
            hint="./scripts/inv patch",
        )
    if verb == "merge" and how == "skip":
        raise CheckoutError(
            f"{shown} is in the middle of a merge, of which nothing can be skipped",
            hint=f"{series.CONTINUE}    or --abort",
        )
    if how == "continue":
        _require_resolved(git, verb, base, names, shown)
    else:
        # Each leads to the one before it, so that a second --skip does not lose what was kept at
        # the first.
        git.set_ref(
            LEFT_REF,
            worktree.snapshot(
                git, f"What lay in {shown} before git {verb} --{how}", after=git.resolve(LEFT_REF)
            ),
        )
        run_log.console.info(f"what lay in {shown} is kept: git -C {shown} show {LEFT_REF}")
        if verb == "am":
            am.drop_begun(git)
    # Neither the dates nor the committer of an am are remembered over a conflict. In a revert or
    # merge the user is the author.
    dates = ("--committer-date-is-author-date",) if verb == "am" and how != "abort" else ()
    author = am.user(git) if verb in ("merge", "revert") else {}
    before = am.position(git)
    answer = git.write(verb, *dates, f"--{how}", env=author, check=False, run_log=run_log)
    # git syncs the commits that it makes, and not the files.
    os.sync()
    waits = git.under_way()
    if waits is None and answer.status == 0:
        if how != "abort":
            return git.head()
        if before:
            am.rewind(git, run_log=run_log)
        return None
    unmerged = am.unmerged(git)
    if waits == "am" and (there := am.position(git)) and (there != before or unmerged):
        raise _stopped(git, there, base, names, shown)
    if unmerged:
        raise _unresolved(unmerged, waits or verb, shown)
    if answer.status != 0:
        raise CheckoutError(
            f"git {verb} --{how} in {shown}:"
            f" {first_line(answer.err) or f'exited with {answer.status}'}",
            hint=_ways(waits or verb),
        )
    return git.head()


def _require_resolved(git: Git, verb: str, base: str, names: Sequence[str], shown: str) -> None:
    """Raise where git would refuse to continue, or would continue without what the user meant to be
    in it.
    """
    if unmerged := am.unmerged(git):
        raise _unresolved(unmerged, verb, shown)
    if verb != "am" or am.staged(git) or (there := am.position(git)) is None:
        return
    patch = _patch(there, names)
    if not there.is_begun:
        raise PatchConflict(
            f"the am in {shown} was ended before it came to patch {there.number} of {there.last}",
            hint=f"{series.CONTINUE} --abort && ./scripts/inv patch.apply    begins anew",
        )
    if edits := git.edits():
        raise PatchConflict(
            f"{shown} has edits ({', '.join(edits[:3])}) for patch {there.number} of {there.last},"
            f" {patch}, that are not staged",
            hint=(
                f"git -C {shown} add --update && {series.CONTINUE}    or, to give up:"
                f" {series.CONTINUE} --abort"
            ),
        )
    raise PatchConflict(
        f"patch {there.number} of {there.last}, {patch}, changes nothing on {base[:12]} as {shown}"
        " stands",
        hint=(
            f"{series.CONTINUE} --skip    where that is right; else edit, git -C {shown} add PATHS"
            f" && {series.CONTINUE}; to give up: --abort"
        ),
    )


def _stopped(
    git: Git, there: am.Position, base: str, names: Sequence[str], shown: str
) -> PatchConflict:
    diff = git.path_of("rebase-apply/patch")
    applied = Applied(
        None, there.number, am.unmerged(git) or (git.patch_paths(diff) if diff.exists() else ())
    )
    return series.sentence(
        git, applied, count=there.last, patch=_patch(there, names), shown=shown, base=base
    )


def _patch(there: am.Position, names: Sequence[str]) -> str:
    """The file of a patch where it is one of ours, which are named by their subjects, else its
    subject.
    """
    slug = mail.Mail(there.subject, "", "", "", None, b"").slug
    return next(
        (name for name in names if f"/{name}".endswith(f"/{slug}.patch")), f"“{there.subject}”"
    )


def _unresolved(paths: Sequence[str], verb: str, shown: str) -> PatchConflict:
    return PatchConflict(
        f"the {verb} in {shown} waits: {len(paths)}"
        f" {'path has a conflict' if len(paths) == 1 else 'paths have conflicts'} left",
        hint=(
            f"edit, then: git -C {shown} add {series.quoted(paths)} && {series.CONTINUE}    or"
            f" {_ways(verb)}"
        ),
        details=tuple(f"conflict in {path}" for path in paths),
    )


def _ways(verb: str) -> str:
    return (
        f"{series.CONTINUE} --abort"
        if verb == "merge"
        else f"{series.CONTINUE} --skip    or {series.CONTINUE} --abort"
    )
