"""Going on with what git waits for in a checkout: an am, the workspace's own or anybody's, a rebase, merge, cherry-pick or revert.

All state is git's own, so it does not matter who began it, nor when. Before anything is given up or left out, what lies in the
checkout, edits included, is kept as a commit under refs/patches/left.
"""

import contextlib
import os
from collections.abc import Sequence
from typing import Literal

from workspace.core.errors import CheckoutError, PatchConflict, WorkspaceError
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.source import checkout as checkouts
from workspace.source import conflict, mail, moves, patches, series, times
from workspace.source.checkout import Checkout
from workspace.source.content import first_line
from workspace.source.git import Git, am, worktree
from workspace.source.git.am import Applied
from workspace.source.pins import Pin
from workspace.source.stack import BASE_REF, LEFT_REF, TIP_REF, Attempt, Stack, State

How = Literal["continue", "skip", "abort"]


def go_on(layout: Layout, project: str, pin: Pin, checkout: Checkout, *, how: How, journal: Journal) -> Stack:
    """Continue, skip or abort whatever is under way in the checkout, and look at the stack that came of it.

    Raises CheckoutError where nothing is under way, or git refuses; PatchConflict where it stops at a conflict, old or new.
    """
    path = checkouts.folder_of(layout, pin)
    if checkout.head is None:
        raise CheckoutError(f"{layout.relative(path)} is {checkout.detail}, so nothing is under way there", hint="./scripts/inv bootstrap")
    git, known = Git(path), times.read(layout.times(project), path)
    names: tuple[str, ...] = ()
    try:
        names = tuple(f"patches/{project}/{name}" for name in series.read(layout.patches(project), pin=pin.commit).names)
    except WorkspaceError:
        # Whatever is wrong with the series, what is under way can be ended.
        journal.write("the series cannot be read, so patches are named by their subjects")
    again = conflict.CONTINUE + ("" if how == "continue" else f" --{how}") + ("" if project == "vllm" else f" --project {project}")
    with contextlib.ExitStack() as held:
        if verb := git.under_way():
            held.enter_context(moves.attempt(layout, project, git, Attempt(f"git {verb} --{how}", again), journal=journal))
        go_on_in(git, base=checkout.base or checkout.head, how=how, journal=journal, names=names, shown=layout.relative(path))
    times.restore(git, known)
    stack = patches.observe(layout, project, pin, checkouts.observe(layout, pin))
    # What was resolved otherwise than the series has it is named by the export that is due, which would else take the patch for the newer one.
    if stack.state is State.APPLIED and stack.base and stack.head and stack.head != stack.base:
        git.set_ref(TIP_REF, stack.head)
        git.set_ref(BASE_REF, stack.base)
    return stack


def go_on_in(git: Git, *, base: str, how: How, journal: Journal, names: Sequence[str] = (), shown: str | None = None) -> str | None:
    """Go on in any working tree, and return HEAD, or None after an abort. `names` are the patches' files, `base` what they are put on.

    What has stopped for the user's edit, as a rebase does that was told to, still is under way afterwards.
    Raises CheckoutError where nothing is under way, or git refuses; PatchConflict where it stops at a conflict, old or new.
    """
    shown = shown or str(git.path)
    verb = git.under_way()
    if verb is None:
        raise CheckoutError(f"nothing is under way in {shown}: no am, rebase, merge, cherry-pick or revert", hint="./scripts/inv patch")
    if verb == "merge" and how == "skip":
        raise CheckoutError(f"{shown} is in the middle of a merge, of which nothing can be skipped", hint=f"{conflict.CONTINUE}    or --abort")
    if how == "continue":
        _require_resolved(git, verb, base, names, shown)
    else:
        # Each leads to the one before it, so that a second --skip does not lose what was kept at the first.
        git.set_ref(LEFT_REF, worktree.snapshot(git, f"What lay in {shown} before git {verb} --{how}", after=git.resolve(LEFT_REF)))
        journal.console.say(f"what lay in {shown} is kept: git -C {shown} show {LEFT_REF}")
        if verb == "am":
            am.drop_begun(git)
    # Neither the dates nor the committer of an am are remembered over a conflict. In a revert or merge the user is the author.
    dates = ("--committer-date-is-author-date",) if verb == "am" and how != "abort" else ()
    author = am.user(git) if verb in ("merge", "revert") else {}
    before = am.position(git)
    answer = git.write(verb, *dates, f"--{how}", env=author, check=False, journal=journal)
    # git syncs the commits that it makes, and not the files.
    os.sync()
    waits = git.under_way()
    if waits is None and answer.status == 0:
        if how != "abort":
            return git.head()
        if before:
            am.rewind(git, journal=journal)
        return None
    unmerged = am.unmerged(git)
    if waits == "am" and (there := am.position(git)) and (there != before or unmerged):
        raise _stopped(git, there, base, names, shown)
    if unmerged:
        raise _unresolved(unmerged, waits or verb, shown)
    if answer.status != 0:
        raise CheckoutError(f"git {verb} --{how} in {shown}: {first_line(answer.err) or f'exited with {answer.status}'}", hint=_ways(waits or verb))
    return git.head()


def _require_resolved(git: Git, verb: str, base: str, names: Sequence[str], shown: str) -> None:
    """Raise where git would refuse to continue, or would continue without what the user meant to be in it."""
    if unmerged := am.unmerged(git):
        raise _unresolved(unmerged, verb, shown)
    if verb != "am" or am.staged(git) or (there := am.position(git)) is None:
        return
    patch = _patch(there, names)
    if not there.is_begun:
        raise PatchConflict(
            f"the am in {shown} was ended before it came to patch {there.number} of {there.last}",
            hint=f"{conflict.CONTINUE} --abort && ./scripts/inv patch.apply    begins anew",
        )
    if edits := git.edits():
        raise PatchConflict(
            f"{shown} has edits ({', '.join(edits[:3])}) for patch {there.number} of {there.last}, {patch}, that are not staged",
            hint=f"git -C {shown} add --update && {conflict.CONTINUE}    or, to give up: {conflict.CONTINUE} --abort",
        )
    raise PatchConflict(
        f"patch {there.number} of {there.last}, {patch}, changes nothing on {base[:12]} as {shown} stands",
        hint=f"{conflict.CONTINUE} --skip    where that is right; else edit, git -C {shown} add PATHS && {conflict.CONTINUE}; to give up: --abort",
    )


def _stopped(git: Git, there: am.Position, base: str, names: Sequence[str], shown: str) -> PatchConflict:
    diff = git.path_of("rebase-apply/patch")
    applied = Applied(None, there.number, am.unmerged(git) or (git.patch_paths(diff) if diff.exists() else ()))
    return conflict.sentence(git, applied, count=there.last, patch=_patch(there, names), shown=shown, base=base)


def _patch(there: am.Position, names: Sequence[str]) -> str:
    """The file of a patch where it is one of ours, which are named by their subjects, else its subject."""
    slug = mail.Mail(there.subject, "", "", "", None, b"").slug
    return next((name for name in names if f"/{name}".endswith(f"/{slug}.patch")), f"“{there.subject}”")


def _unresolved(paths: Sequence[str], verb: str, shown: str) -> PatchConflict:
    return PatchConflict(
        f"the {verb} in {shown} waits: {len(paths)} {'path has a conflict' if len(paths) == 1 else 'paths have conflicts'} left",
        hint=f"edit, then: git -C {shown} add {conflict.quoted(paths)} && {conflict.CONTINUE}    or {_ways(verb)}",
        details=tuple(f"conflict in {path}" for path in paths),
    )


def _ways(verb: str) -> str:
    return f"{conflict.CONTINUE} --abort" if verb == "merge" else f"{conflict.CONTINUE} --skip    or {conflict.CONTINUE} --abort"
