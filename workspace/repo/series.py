"""The order of the patches on one pin: `patches/<project>/series`."""

import enum
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.core.errors import CheckoutError, PatchConflict, PatchDrift, WorkspaceError
from workspace.core.files import read_regular
from workspace.repo.git import Applied, Git

SERIES_FILE = "series"
_BASE = re.compile(r"# base: ([0-9a-f]{40})")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")
_SHOWN = 200
# The line with which format-patch begins each message (git-format-patch(1), DISCUSSION).
_MESSAGE = re.compile(rb"^From [0-9a-f]{40} Mon Sep 17 00:00:00 2001$", re.MULTILINE)


@dataclass(frozen=True)
class Series:
    """The commit that the patches are for, and their file names in the order of application."""

    base: str
    names: tuple[str, ...]


def read_series(folder: Path, *, pin: str) -> Series:
    """Read a series and look at its patches. `pin` is the pinned commit, which the base line must
    name.

    Raises PatchDrift for a file that is not of its form, and where series, patches and pin do not
    fit together.
    """
    shown = f"patches/{folder.name}/{SERIES_FILE}"
    try:
        # Not splitlines: what an editor shows as one line may hold form feeds and Unicode's
        # separators.
        lines = read_regular(folder / SERIES_FILE).decode().split("\n")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise PatchDrift(
            f"{shown} cannot be read: {reason}", hint=f"git checkout -- {shown}"
        ) from exc
    bases = [found[1] for line in lines if (found := _BASE.fullmatch(line.strip()))]
    if len(bases) != 1:
        raise PatchDrift(
            f"{shown} has {len(bases)} lines `# base: <40 hex>`, expected one",
            hint=f"git checkout -- {shown}",
        )
    if bases[0] != pin:
        raise PatchDrift(
            f"{shown} is for base {bases[0]}, pinned is {pin}",
            hint=(
                f"git log --oneline -3 -- vendor/pins.toml patches/{folder.name}    shows which of"
                " the two moved"
            ),
        )
    names: list[str] = []
    for number, line in enumerate(lines, 1):
        name = line.split("#", 1)[0].strip()
        if not name:
            continue
        place = f"{shown}, line {number}"
        if not _NAME.fullmatch(name) or not name.endswith(".patch"):
            shown_name = repr(name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…")
            raise PatchDrift(
                f"{place}: {shown_name} is not the name of a .patch file in patches/{folder.name}",
                hint="one file name a line, without a folder",
            )
        if name in names:
            raise PatchDrift(
                f"{place}: {name} stands there a second time",
                hint="take one of the two lines out; two patches of one name need better subjects",
            )
        _look_at(folder / name, place)
        names.append(name)
    return Series(bases[0], tuple(names))


def _look_at(patch: Path, place: str) -> None:
    shown = f"patches/{patch.parent.name}/{patch.name}"
    try:
        content = read_regular(patch)
    except FileNotFoundError:
        raise PatchDrift(
            f"{place}: {shown} is not there",
            hint=f"git checkout -- {shown}    or take the line out of the series",
        ) from None
    except OSError as exc:
        raise PatchDrift(f"{shown} cannot be read: {exc.strerror}", hint=f"ls -l {shown}") from exc
    messages = len(_MESSAGE.findall(content))
    if messages != 1 or not content.startswith(b"From ") or b"\ndiff --git " not in content:
        raise PatchDrift(
            f"{shown} is not a mail of git format-patch with one commit in it",
            hint="make it with git format-patch --zero-commit -1 in the tree that has the commit",
        )


# What keeps the commits of the last stack alive when something else moves HEAD (gitsubmodules(7)).
BASE_REF, TIP_REF = "refs/patches/base", "refs/patches/tip"
# Stacks of the user's own commits that a verb has replaced by the commits of the same patches.
KEPT_REFS = "refs/patches/kept"
# What lay in the checkout, edits included, when an operation under way was last given up, or a
# patch of it skipped.
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
    """An act of git's own that was ended in the middle: `what` it was, and the command line that
    takes it back and begins it `again`.
    """

    what: str
    again: str


@dataclass(frozen=True)
class Stack:
    """The stack as it stands. `dirty` are tracked paths with edits, whatever the state; DIRTY means
    that they stand in the way.

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


CONTINUE = "./scripts/inv patch.continue"
EXPORT = "./scripts/inv patch.export"
_SHOWN_FILES = 3
# An old file under a busy path has hundreds; the newest say enough.
_SHOWN_COMMITS = 5


def refusal(shown: str, git: Git, stack: Stack, *, verb: str) -> WorkspaceError:
    """Why `verb`, a command line, cannot move the checkout `shown` from the state it is in."""
    base = (stack.base or "")[:12]
    if stack.state is State.MISSING:
        return CheckoutError(f"{shown} is not there", hint="./scripts/inv bootstrap")
    if stack.ended:
        return CheckoutError(
            f"{stack.ended.what} in {shown} was ended in the middle",
            hint=f"{stack.ended.again}    takes it back and begins it again",
        )
    if stack.state is State.IN_PROGRESS:
        return CheckoutError(
            f"{shown} is in the middle of a git {git.under_way()}",
            hint=(
                f"{CONTINUE}    goes on with it once its conflicts are resolved; to give it up:"
                f" {CONTINUE} --abort && {verb}"
            ),
        )
    if stack.state is State.DIRTY or (stack.state is State.APPLIED and stack.dirty):
        done = "applied" if stack.state is State.DIRTY else "taken off"
        return edited_files(
            shown,
            stack.dirty,
            f"{len(stack.names)} {'patch is' if len(stack.names) == 1 else 'patches are'} to be"
            f" {done}",
            verb=verb,
        )
    keep = (
        keeping_hint(shown, git, stack.head)
        + f"git -C {shown} checkout --detach {base}"
        + (f" && {verb}" if "unapply" not in verb else "")
    )
    if stack.state is State.UNEXPORTED:
        return PatchDrift(
            f"{shown} has commits on {base} that are not what the series makes; they were left as"
            " they are",
            hint=f"{EXPORT}    makes patches of them; to keep them aside: {keep}",
        )
    return CheckoutError(
        f"{shown} is at {(stack.head or 'no commit')[:12]}, which is not on {base or 'the pin'}; it"
        " was left as it is",
        hint=f"to keep it aside: {keep}",
    )


def edited_files(shown: str, paths: Sequence[str], purpose: str, *, verb: str) -> CheckoutError:
    """Why edits in the checkout `shown` are in the way of what is to be done there."""
    hint = f"git -C {shown} stash && {verb} && git -C {shown} stash pop"
    return CheckoutError(
        f"{shown} has edits ({_few(paths)}) where {purpose}; they were left as they are", hint=hint
    )


def keeping_hint(shown: str, git: Git, commit: str | None) -> str:
    """The first part of a command line: a branch that keeps a commit, named by it. Nothing where
    that branch is there already.
    """
    return (
        ""
        if not commit or git.resolve(f"refs/heads/{kept_as(commit)}") == commit
        else f"git -C {shown} branch {kept_as(commit)} && "
    )


def kept_as(commit: str) -> str:
    """The name of the branch that is to keep a commit: no two commits share it, so that the same
    hint works a second time.
    """
    return f"mine-{commit[:12]}"


def refused(project: str, name: str, stack: Stack, applied: Applied) -> PatchConflict:
    """A series that does not apply, where nothing was changed."""
    return PatchConflict(
        f"patch {applied.position} of {len(stack.names)}, patches/{project}/{name}, does not apply"
        f" to {(stack.base or '')[:12]}; nothing was changed",
        hint=(
            "./scripts/inv patch.apply    stops at the conflict; or take its line out of"
            f" patches/{project}/series and run ./scripts/inv bootstrap"
        ),
        details=tuple(f"conflict in {path}" for path in applied.conflicted),
    )


def sentence(
    git: Git,
    applied: Applied,
    *,
    count: int,
    patch: str,
    shown: str,
    base: str,
    old: str | None = None,
) -> PatchConflict:
    """The conflict at which an `am` waits in the checkout `shown`. `patch` is its file as a person
    would type it, or its subject.

    `old` is the base that the patches were made for: where its history is there, each path has the
    upstream commits since then.
    """
    from workspace.repo.git import am

    touched = _touching(git, old, base, applied.conflicted)
    details = [
        line
        for path in applied.conflicted
        for line in (f"conflict in {path}", *touched.get(path, ()))
    ]
    paths = quoted(applied.conflicted)
    if am.unmerged(git):
        edit = f"edit {_few(applied.conflicted)}, then: git -C {shown} add {paths} && {CONTINUE}"
    else:
        # Without the contents that the patch was made from there is nothing to merge, so git
        # changed no file (git-am(1), --3way).
        diff = shlex.quote(str(git.path_of("rebase-apply/patch")))
        edit = (
            f"git -C {shown} apply --reject {diff}    writes what fits, and the rest beside it;"
            f" when all is done: git -C {shown} add {paths} && {CONTINUE}"
        )
    return PatchConflict(
        f"patch {applied.position} of {count}, {patch}, does not apply to {base[:12]}; {shown}"
        " waits at the conflict",
        hint=(
            f"{edit}    to leave the patch out: {CONTINUE} --skip    to give up: {CONTINUE} --abort"
        ),
        details=tuple(details),
    )


def quoted(paths: Sequence[str]) -> str:
    """Paths as arguments of a command line."""
    return shlex.join(paths) or "PATHS"


def _touching(
    git: Git, old: str | None, base: str, paths: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    # A release lies on a branch of its own, so it is no ancestor of the next one; of an archive
    # there is no history at all.
    if old is None or old == base or not paths or not git.have_common_history(old, base):
        return {}
    from workspace.repo.git import history

    found = history.touching(history.log(git, old, base, paths), paths)
    return {path: _newest(lines) for path, lines in found.items()}


def _newest(lines: Sequence[str]) -> tuple[str, ...]:
    more = (
        (f"  and by {len(lines) - _SHOWN_COMMITS} before",) if len(lines) > _SHOWN_COMMITS else ()
    )
    return (*(f"  since changed by {line}" for line in lines[:_SHOWN_COMMITS]), *more)


def _few(paths: Sequence[str]) -> str:
    return ", ".join(paths[:_SHOWN_FILES]) + (
        f" and {len(paths) - _SHOWN_FILES} more" if len(paths) > _SHOWN_FILES else ""
    )
