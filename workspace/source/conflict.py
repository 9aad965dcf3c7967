"""What is said where a verb on a stack stops: why, what was left as it is, and the commands that lead on without loss."""

import shlex
from collections.abc import Sequence

from workspace.core.errors import CheckoutError, PatchConflict, PatchDrift, WorkspaceError
from workspace.source.git import Applied, Git
from workspace.source.stack import Stack, State

CONTINUE = "./scripts/inv patch.continue"
EXPORT = "./scripts/inv patch.export"
_SHOWN = 3
# An old file under a busy path has hundreds; the newest say enough.
_SHOWN_COMMITS = 5


def refusal(shown: str, git: Git, stack: Stack, *, verb: str) -> WorkspaceError:
    """Why `verb`, a command line, cannot move the checkout `shown` from the state it is in."""
    base = (stack.base or "")[:12]
    if stack.state is State.MISSING:
        return CheckoutError(f"{shown} is not there", hint="./scripts/inv bootstrap")
    if stack.ended:
        return CheckoutError(f"{stack.ended.what} in {shown} was ended in the middle", hint=f"{stack.ended.again}    takes it back and begins it again")
    if stack.state is State.IN_PROGRESS:
        return CheckoutError(
            f"{shown} is in the middle of a git {git.under_way()}",
            hint=f"{CONTINUE}    goes on with it once its conflicts are resolved; to give it up: {CONTINUE} --abort && {verb}",
        )
    if stack.state is State.DIRTY or (stack.state is State.APPLIED and stack.dirty):
        done = "applied" if stack.state is State.DIRTY else "taken off"
        return edited(shown, stack.dirty, f"{len(stack.names)} {'patch is' if len(stack.names) == 1 else 'patches are'} to be {done}", verb=verb)
    keep = keeping(shown, git, stack.head) + f"git -C {shown} checkout --detach {base}" + (f" && {verb}" if "unapply" not in verb else "")
    if stack.state is State.UNEXPORTED:
        return PatchDrift(
            f"{shown} has commits on {base} that are not what the series makes; they were left as they are",
            hint=f"{EXPORT}    makes patches of them; to keep them aside: {keep}",
        )
    return CheckoutError(
        f"{shown} is at {(stack.head or 'no commit')[:12]}, which is not on {base or 'the pin'}; it was left as it is", hint=f"to keep it aside: {keep}"
    )


def edited(shown: str, paths: Sequence[str], purpose: str, *, verb: str) -> CheckoutError:
    """Why edits in the checkout `shown` are in the way of what is to be done there."""
    hint = f"git -C {shown} stash && {verb} && git -C {shown} stash pop"
    return CheckoutError(f"{shown} has edits ({_few(paths)}) where {purpose}; they were left as they are", hint=hint)


def keeping(shown: str, git: Git, commit: str | None) -> str:
    """The first part of a command line: a branch that keeps a commit, named by it. Nothing where that branch is there already."""
    return "" if not commit or git.resolve(f"refs/heads/{kept_as(commit)}") == commit else f"git -C {shown} branch {kept_as(commit)} && "


def kept_as(commit: str) -> str:
    """The name of the branch that is to keep a commit: no two commits share it, so that the same hint works a second time."""
    return f"mine-{commit[:12]}"


def refused(project: str, name: str, stack: Stack, applied: Applied) -> PatchConflict:
    """A series that does not apply, where nothing was changed."""
    return PatchConflict(
        f"patch {applied.position} of {len(stack.names)}, patches/{project}/{name}, does not apply to {(stack.base or '')[:12]}; nothing was changed",
        hint=f"./scripts/inv patch.apply    stops at the conflict; or take its line out of patches/{project}/series and run ./scripts/inv bootstrap",
        details=tuple(f"conflict in {path}" for path in applied.conflicted),
    )


def sentence(git: Git, applied: Applied, *, count: int, patch: str, shown: str, base: str, old: str | None = None) -> PatchConflict:
    """The conflict at which an `am` waits in the checkout `shown`. `patch` is its file as a person would type it, or its subject.

    `old` is the base that the patches were made for: where its history is there, each path has the upstream commits since then.
    """
    from workspace.source.git import am

    touched = _touching(git, old, base, applied.conflicted)
    details = [line for path in applied.conflicted for line in (f"conflict in {path}", *touched.get(path, ()))]
    paths = quoted(applied.conflicted)
    if am.unmerged(git):
        edit = f"edit {_few(applied.conflicted)}, then: git -C {shown} add {paths} && {CONTINUE}"
    else:
        # Without the contents that the patch was made from there is nothing to merge, so git changed no file (git-am(1), --3way).
        diff = shlex.quote(str(git.path_of("rebase-apply/patch")))
        edit = f"git -C {shown} apply --reject {diff}    writes what fits, and the rest beside it; when all is done: git -C {shown} add {paths} && {CONTINUE}"
    return PatchConflict(
        f"patch {applied.position} of {count}, {patch}, does not apply to {base[:12]}; {shown} waits at the conflict",
        hint=f"{edit}    to leave the patch out: {CONTINUE} --skip    to give up: {CONTINUE} --abort",
        details=tuple(details),
    )


def quoted(paths: Sequence[str]) -> str:
    """Paths as arguments of a command line."""
    return shlex.join(paths) or "PATHS"


def _touching(git: Git, old: str | None, base: str, paths: Sequence[str]) -> dict[str, tuple[str, ...]]:
    # A release lies on a branch of its own, so it is no ancestor of the next one; of an archive there is no history at all.
    if old is None or old == base or not paths or not git.have_common_history(old, base):
        return {}
    from workspace.source.git import history

    found = history.touching(history.log(git, old, base, paths), paths)
    return {path: _newest(lines) for path, lines in found.items()}


def _newest(lines: Sequence[str]) -> tuple[str, ...]:
    more = (f"  and by {len(lines) - _SHOWN_COMMITS} before",) if len(lines) > _SHOWN_COMMITS else ()
    return (*(f"  since changed by {line}" for line in lines[:_SHOWN_COMMITS]), *more)


def _few(paths: Sequence[str]) -> str:
    return ", ".join(paths[:_SHOWN]) + (f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else "")
