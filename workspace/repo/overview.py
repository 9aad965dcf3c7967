"""The stack patch by patch (`inv patch`), moves by other programs, and `inv patch.continue`."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from workspace.core import hints
from workspace.core.console import Console, Row, RunLog
from workspace.core.console import State as RowState
from workspace.core.errors import CheckoutError, PatchConflict, WorkspaceError, counted
from workspace.core.paths import Layout
from workspace.repo import checkout as checkouts
from workspace.repo import mail, patches, pins, series
from workspace.repo.checkout import Checkout
from workspace.repo.git import Git, am, command, history, worktree
from workspace.repo.git.command import first_line
from workspace.repo.pins import Pin
from workspace.repo.series import BASE_REF, LEFT_REF, TIP_REF, Stack, State


@dataclass(frozen=True)
class Entry:
    """The stack, or one patch or commit of it.

    `state` of a patch: applied, pending, changed since it was exported, or unexported (a commit
    without a patch file). `name` is the patch file, the commit, or `stack`; `status` the text of
    Upstream-Status. The `files` of the stack are those with edits.
    """

    state: str
    name: str
    subject: str
    status: str | None
    files: tuple[str, ...]


def show(layout: Layout, project: str, *, console: Console, as_json: bool = False) -> None:
    """Print a row for the stack, a row for each patch, and the next command; or all as JSON.

    Raises SettingsError for an unknown project.
    """
    checkouts.require_project(project)
    pin = pins.load(layout.pins).of(project)
    checkout = checkouts.observe(layout, pin)
    stack = patches.observe(layout, project, pin, checkout)
    move = moved(layout, pin, checkout, stack)
    found = entries(layout, project, pin, checkout, stack, move)
    # The way back has priority over the next step.
    # A commit of which git can make no mail has no files here; the export says what it needs.
    lacking = [
        entry.name
        for entry in found
        if entry.state == "unexported" and entry.status is None and entry.files
    ]
    following = (move and move.hint) or patches.next_command(layout, pin, stack, lacking)
    if as_json:
        rows = [dataclasses.asdict(entry) for entry in found]
        console.document({"schema": 1, "rows": rows, "next": following})
        return
    console.stdout.table([(entry.state, "  ".join(_columns(entry))) for entry in found])
    console.stdout.hint(following)


def _columns(row: Entry) -> list[str]:
    files = series.few(row.files)
    if row.name == "stack":
        return [row.subject, *([f"edits: {files}"] if files else [])]
    return [row.subject, row.status or "no Upstream-Status", *([files] if files else [])]


def moved(layout: Layout, pin: Pin, checkout: Checkout, stack: Stack) -> Row | None:
    """Return what another program moved, checkout or pin, with the way back; None if nothing.

    A move by a verb of the workspace does not count.
    """
    path = checkouts.folder_of(layout, pin)
    shown, git = layout.relative(path), Git(path)
    if checkout.head is None or stack.state is State.IN_PROGRESS:
        return None
    outer = checkouts.superproject(layout)
    link = outer.gitlink(shown) if outer else None
    # Upstream's commit is unknown for a pin from an archive alone, so no gitlink can name it.
    if link and link.commit != pin.commit and not pin.is_from_archive:
        return _move(
            f"the superproject's index has {shown} at {link.commit[:12]}, vendor/pins.toml at"
            f" {pin.commit[:12]}",
            hints.text("repo.which_moved", path=shown),
        )
    references = worktree.references(git, "refs/patches/")
    tip, base = references.get(TIP_REF), references.get(BASE_REF)
    if checkout.base is None:
        return _move(
            f"{shown} is at {checkout.head[:12]} and lacks {pin.tag}: the pin moved, for example by"
            " git pull, and the checkout did not",
            hints.text(
                "repo.fetch_and_detach",
                shown=shown,
                url=pin.url if pin.upstream else git.setting("remote.origin.url") or pin.url,
                commit=pin.commit,
            ),
        )
    if tip in (None, checkout.head) or git.is_ancestor(tip, checkout.head):
        return _pin_moved(git, shown, base, tip, stack)
    return _head_moved(git, shown, checkout.head, checkout.base, tip, stack)


def _pin_moved(git: Git, shown: str, old: str | None, tip: str | None, stack: Stack) -> Row | None:
    """Return the row of a stack on the former pin `old`, or None."""
    base = stack.base or ""
    if stack.state is not State.FOREIGN or old in (None, base):
        return None
    way = hints.text("repo.detach_then", shown=shown, commit=base[:12], command=patches.APPLY)
    if tip != stack.head:
        way = series.kept(shown, git, stack.head, way)
    return _move(
        f"{shown} is based on {(old or '')[:12]}, the pin is {base[:12]}: the pin moved, for"
        " example by git pull, and the checkout did not",
        way,
    )


def _head_moved(git: Git, shown: str, head: str, base: str, tip: str, stack: Stack) -> Row | None:
    """Return the row of a HEAD that another program moved away from the stack, or None."""
    move = history.last_move(git)
    # A rebase or a commit is the user's work on the stack, as is a reset within it. A move by
    # submodule.recurse has no message.
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
        hints.text("inv.patch_apply")
        if is_series
        else hints.text("repo.checkout", shown=shown, commit=TIP_REF if lost == tip else lost[:12])
    )
    return _move(
        f"another program moved {shown} from the stack to {head[:12]}"
        f" ({move.message or 'submodule.recurse'}); its commits are at {lost[:12]}",
        way,
    )


def _move(text: str, hint: str) -> Row:
    return Row(RowState.WARN, "source", text, hint=hint)


def entries(
    layout: Layout, project: str, pin: Pin, checkout: Checkout, stack: Stack, move: Row | None
) -> tuple[Entry, ...]:
    """Return the stack, each patch in order, and the commits that are no patches."""
    contents = {name: (layout.patches(project) / name).read_bytes() for name in stack.names}
    commits = _commits(layout, pin, checkout, stack)
    table = [_stack_row(layout, pin, checkout, stack, move)]
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
                else Entry("unexported", oid[:12], name.removesuffix(".patch"), None, ())
            )
    return tuple(table)


def _row(state: str, name: str, content: bytes) -> Entry:
    read = mail.parse(content)
    return Entry(state, name, read.subject, read.status, tuple(dict.fromkeys(am.paths(read.diff))))


def _commits(
    layout: Layout, pin: Pin, checkout: Checkout, stack: Stack
) -> dict[str, tuple[str, bytes | None]]:
    """Return the commits of an unexported stack: OID and mail, by the name of the future patch.

    The mail is None where git cannot make one of each commit. An applied stack needs no query: it
    has the tree of the series.
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
    found = am.commits(git, checkout.base, checkout.head)
    written: Sequence[bytes | None] = ()
    if found and not any(len(commit.parents) > 1 for commit in found):
        written = am.mails(git, checkout.base, found)
    if len(written) != len(found):
        written = [None] * len(found)
    named: dict[str, tuple[str, bytes | None]] = {}
    stems = series.file_stems(commit.slug for commit in found)
    for stem, commit, content in zip(stems, found, written, strict=True):
        named[f"{stem}.patch"] = (commit.oid, content)
    return named


def _stack_row(
    layout: Layout, pin: Pin, checkout: Checkout, stack: Stack, move: Row | None
) -> Entry:
    count = counted(len(stack.names), "patch", "patches")
    place = f"{layout.relative(checkouts.folder_of(layout, pin))}, {checkout.detail}"
    details = {
        State.APPLIED: f"tree {(stack.tree or '')[:12]}",
        State.UNEXPORTED: "its commits and the series differ",
        State.IN_PROGRESS: f"it waits in the middle of {stack.operation}",
        State.FOREIGN: _away(stack) if stack.head else "",
    }
    parts = [
        f"{count} for {place}",
        details.get(stack.state, ""),
        move.text if move else "",
        series.named_untracked(stack.untracked) if stack.untracked else "",
    ]
    return Entry(
        stack.state.value, "stack", "; ".join(part for part in parts if part), None, stack.dirty
    )


def _away(stack: Stack) -> str:
    why = f" in the middle of {stack.operation}" if stack.operation else ", which is not on the pin"
    return f"at {(stack.head or '')[:12]}{why}"


How = Literal["continue", "skip", "abort"]


def resume(
    layout: Layout, project: str, pin: Pin, checkout: Checkout, *, how: How, run_log: RunLog
) -> Stack:
    """Continue, skip or abort the git operation in the checkout, and return the new stack.

    Raises CheckoutError where no operation is under way, or git refuses; PatchConflict where it
    stops at a conflict, old or new.
    """
    path = checkouts.folder_of(layout, pin)
    if checkout.head is None:
        raise CheckoutError(
            f"{layout.relative(path)} is {checkout.detail}, so no operation is under way there",
            hint=hints.text("inv.bootstrap"),
        )
    git = Git(path)
    names = _patch_names(layout, project, pin, run_log)
    resume_in(
        git,
        base=checkout.base or checkout.head,
        how=how,
        run_log=run_log,
        names=names,
        shown=layout.relative(path),
    )
    stack = patches.observe(layout, project, pin, checkouts.observe(layout, pin))
    # After another resolution than the series has, the next export sets these references. Set now,
    # they would make that export take the patch file for newer than its commit.
    if stack.state is State.APPLIED and stack.base and stack.head and stack.head != stack.base:
        git.set_refs({TIP_REF: stack.head, BASE_REF: stack.base})
    return stack


def _patch_names(layout: Layout, project: str, pin: Pin, run_log: RunLog) -> tuple[str, ...]:
    """Return the patch files of the series for messages, or none for a broken series."""
    try:
        found = series.read_series(layout.patches(project), pin=pin.commit)
    except WorkspaceError:
        # An operation can be finished even if the series is broken.
        run_log.write("the series cannot be read, so patches are named by their subjects")
        return ()
    return tuple(f"patches/{project}/{name}" for name in found.names)


def resume_in(
    git: Git,
    *,
    base: str,
    how: How,
    run_log: RunLog,
    names: Sequence[str] = (),
    shown: str | None = None,
) -> str | None:
    """Continue, skip or abort in any working tree; return HEAD, or None after an abort.

    `names` are the files of the patches, `base` is the commit that they are applied to. An
    operation that stops for an edit by the user, such as `edit` in a rebase, stays under way.
    Raises CheckoutError where no operation is under way, or git refuses; PatchConflict where it
    stops at a conflict, old or new.
    """
    shown = shown or str(git.path)
    operation = _operation(git, how, shown)
    before = am.position(git)
    is_killed = how == "continue" and operation == "am" and am.begins_by_skip(git)
    if how != "continue":
        _keep_content(git, operation, how, shown, run_log)
    elif not is_killed:
        _require_resolved(git, operation, base, names, shown)
    answer = _run(git, operation, "skip" if is_killed else how, run_log)
    # git syncs the commits that it makes, but not the files.
    os.sync()
    waiting = git.under_way()
    if waiting is None and answer.status == 0:
        if how == "abort" and before:
            am.rewind(git, run_log=run_log)
        return None if how == "abort" else git.head()
    unmerged = am.unmerged(git)
    if waiting == "am" and (stopped := am.position(git)) and (stopped != before or unmerged):
        applied, patch = am.stopped_at(git, stopped.number, answer), _patch(stopped, names)
        raise series.sentence(git, applied, count=stopped.last, patch=patch, shown=shown, base=base)
    if unmerged:
        raise _unresolved(unmerged, waiting or operation, shown)
    if answer.status != 0:
        raise CheckoutError(
            f"git {operation} --{how} in {shown}:"
            f" {first_line(answer.err) or f'exited with {answer.status}'}",
            hint=hints.text("inv.patch_abort")
            if (waiting or operation) == "merge"
            else hints.text("repo.skip_or_abort"),
        )
    return git.head()


def _operation(git: Git, how: How, shown: str) -> str:
    """Return the operation that is under way. Raises CheckoutError for none, or a merge to skip."""
    operation = git.under_way()
    if operation is None:
        raise CheckoutError(
            f"no am, rebase, merge, cherry-pick or revert is under way in {shown}",
            hint=hints.text("inv.patch"),
        )
    if operation == "merge" and how == "skip":
        raise CheckoutError(
            f"{shown} is in the middle of a merge, which has no step to skip",
            hint=hints.text("inv.patch_continue_or_abort"),
        )
    return operation


def _run(git: Git, operation: str, how: How, run_log: RunLog) -> command.Answer:
    """Let git continue, skip or abort, with the dates and the author of the first attempt."""
    # An `am` loses dates and committer at a conflict. In a revert or merge the user is the author.
    is_dated = operation == "am" and how != "abort"
    dates = ("--committer-date-is-author-date",) if is_dated else ()
    author = am.user(git) if operation in ("merge", "revert") else {}
    return git.write(operation, *dates, f"--{how}", env=author, check=False, run_log=run_log)


def _keep_content(git: Git, operation: str, how: How, shown: str, run_log: RunLog) -> None:
    """Keep the working content under LEFT_REF before git drops it."""
    # Each snapshot leads to the one before, so that a second --skip does not lose the first.
    message = f"Content of {shown} before git {operation} --{how}"
    kept = worktree.snapshot(git, message, after=git.resolve(LEFT_REF))
    git.set_ref(LEFT_REF, kept)
    run_log.console.info(f"the content of {shown} is kept: git -C {shown} show {LEFT_REF}")
    if operation == "am":
        am.drop_begun(git)


def _require_resolved(
    git: Git, operation: str, base: str, names: Sequence[str], shown: str
) -> None:
    """Raise where git would refuse to continue, or would leave out edits that the user made."""
    if unmerged := am.unmerged(git):
        raise _unresolved(unmerged, operation, shown)
    if operation != "am" or am.staged(git) or (stopped := am.position(git)) is None:
        return
    patch, place = _patch(stopped, names), f"patch {stopped.number} of {stopped.last}"
    if edits := git.edits():
        raise PatchConflict(
            f"{shown} has edits ({series.few(edits)}) for {place}, {patch}, that are not staged",
            hint=hints.text("repo.add_or_abort", shown=shown),
        )
    raise PatchConflict(
        f"{place}, {patch}, changes nothing on {base[:12]} with the present content of {shown}",
        hint=hints.text("repo.skip_or_edit", shown=shown),
    )


def _patch(stopped: am.Position, names: Sequence[str]) -> str:
    """Return the file of a patch of the series, found by its subject, else the subject."""
    slug = mail.Mail(stopped.subject, "", "", "", None, b"").slug
    return next(
        (name for name in names if f"/{name}".endswith(f"/{slug}.patch")), f"“{stopped.subject}”"
    )


def _unresolved(paths: Sequence[str], operation: str, shown: str) -> PatchConflict:
    ways = "--abort" if operation == "merge" else "--skip, or --abort"
    return PatchConflict(
        f"git {operation} is stopped in {shown}: "
        + counted(len(paths), "file still has a conflict", "files still have conflicts"),
        hint=hints.text("repo.resolve_or", shown=shown, paths=list(paths), ways=ways),
        details=tuple(f"conflict in {path}" for path in paths),
    )
