"""The series file `patches/<project>/series`, and the state of the stack that it describes."""

import enum
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.core import hints
from workspace.core.errors import (
    CheckoutError,
    PatchConflict,
    PatchDrift,
    SettingsError,
    WorkspaceError,
    counted,
)
from workspace.core.files import read_regular
from workspace.repo.git import Applied, Git

SERIES_FILE = "series"
_BASE = re.compile(r"# base: ([0-9a-f]{40})")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")
_SHOWN = 200
# The line with which format-patch begins each message (git-format-patch(1), DISCUSSION).
_MESSAGE = re.compile(rb"^From [0-9a-f]{40} Mon Sep 17 00:00:00 2001$", re.MULTILINE)

# A series lists file names of up to 200 letters; `.patch` and a number of four digits are added.
_LONGEST_STEM = 200 - len("-1000.patch")


def file_stems(slugs: Iterable[str]) -> tuple[str, ...]:
    """Return a name for the patch of each subject, given as `git log --format=%f` spells it.

    Equal subjects are numbered, long ones cut, and one without an ASCII letter is called `patch`.
    """
    stems: list[str] = []
    for slug in slugs:
        stem = slug.lstrip("-.")[:_LONGEST_STEM].rstrip("-.") or "patch"
        names = (stem if number == 1 else f"{stem}-{number}" for number in itertools.count(1))
        stems.append(next(name for name in names if name not in stems))
    return tuple(stems)


def stems_of(git: Git, base: str, tip: str) -> tuple[str, ...]:
    """Return the name for the patch of each commit in base..tip, oldest first."""
    log = ("log", "--reverse", "--no-show-signature", "--format=%f", f"{base}..{tip}", "--")
    return file_stems(git.look(*log).out.splitlines())


@dataclass(frozen=True)
class Series:
    """The commit that the patches are for, and their file names in the order of application."""

    base: str
    names: tuple[str, ...]


def read_series(folder: Path, *, pin: str) -> Series:
    """Read a series and check its patches; its base line must name the commit `pin`.

    Raises PatchDrift for a file without the form of a series, and where series, patches and pin do
    not match.
    """
    shown = f"patches/{folder.name}/{SERIES_FILE}"
    try:
        # Not splitlines: it also splits at form feeds and at Unicode's separators, where an editor
        # shows one line.
        lines = read_regular(folder / SERIES_FILE).decode().split("\n")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise PatchDrift(f"{shown} cannot be read: {reason}", hint=_restored(shown)) from exc
    base = _base(lines, shown, folder, pin)
    names: list[str] = []
    for number, line in enumerate(lines, 1):
        if name := _entry(line):
            place = f"{shown}, line {number}"
            _check_name(name, names, place, folder)
            _check_patch(folder / name, place)
            names.append(name)
    return Series(base, tuple(names))


def _restored(shown: str) -> str:
    """Return the command line that restores a committed file and keeps its edits in a stash."""
    return hints.text("repo.restore_file", path=shown)


def _base(lines: Sequence[str], shown: str, folder: Path, pin: str) -> str:
    bases = [found[1] for line in lines if (found := _BASE.fullmatch(line.strip()))]
    if len(bases) != 1:
        raise PatchDrift(
            f"{shown} has {len(bases)} lines `# base: <40 hex>`, expected one",
            hint=_restored(shown),
        )
    if bases[0] != pin:
        raise PatchDrift(
            f"{shown} is for base {bases[0]}, not for the pin {pin}",
            hint=hints.text("repo.which_moved", path=f"patches/{folder.name}"),
        )
    return bases[0]


def _check_name(name: str, names: Sequence[str], place: str, folder: Path) -> None:
    if not _NAME.fullmatch(name) or not name.endswith(".patch"):
        shown = repr(name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…")
        raise PatchDrift(
            f"{place}: {shown} is not the name of a .patch file in patches/{folder.name}",
            hint=hints.text("repo.series_lines", project=folder.name),
        )
    if name in names:
        raise PatchDrift(
            f"{place}: {name} is listed a second time",
            hint=hints.text("repo.two_lines", project=folder.name),
        )


def _check_patch(patch: Path, place: str) -> None:
    shown = f"patches/{patch.parent.name}/{patch.name}"
    try:
        content = read_regular(patch)
    except FileNotFoundError:
        raise PatchDrift(
            f"{place}: {shown} does not exist",
            hint=hints.text("repo.restore_or_drop", path=shown),
        ) from None
    except OSError as exc:
        raise PatchDrift(
            f"{shown} cannot be read: {exc.strerror}", hint=hints.text("core.list_file", path=shown)
        ) from exc
    messages = len(_MESSAGE.findall(content))
    if messages != 1 or not content.startswith(b"From ") or b"\ndiff --git " not in content:
        raise PatchDrift(
            f"{shown} is not a mail of git format-patch with exactly one commit",
            hint=hints.text("repo.format_patch"),
        )


# References that keep the commits of the last stack when another program moves HEAD
# (gitsubmodules(7)).
BASE_REF, TIP_REF = "refs/patches/base", "refs/patches/tip"
# Stacks of the user's own commits that a verb replaced by the commits of the same patches.
KEPT_REFS = "refs/patches/kept"
# The content of the checkout, edits included, when an operation was last aborted or undone, or one
# of its patches was skipped.
LEFT_REF = "refs/patches/left"


def text_of(folder: Path) -> str:
    """Return the text of a folder's series, empty where there is none. Raises SettingsError."""
    shown = f"patches/{folder.name}/{SERIES_FILE}"
    try:
        return read_regular(folder / SERIES_FILE).decode()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise SettingsError(f"{shown} cannot be read: {reason}", hint=_restored(shown)) from exc


def validate_text(folder: Path, pin: str) -> None:
    """Raise what `read_series` raises for the text of a series; its patches may be missing."""
    text = text_of(folder)
    names = entries(text)
    bases = [line.strip() for line in text.split("\n") if _BASE.fullmatch(line.strip())]
    if text and (
        bases != [f"# base: {pin}"]
        or len(set(names)) != len(names)
        or any("/" in name or not name.endswith(".patch") for name in names)
    ):
        read_series(folder, pin=pin)


def entries(text: str) -> list[str]:
    """Return the names that the text of a series lists."""
    return [name for line in text.split("\n") if (name := _entry(line))]


def _entry(line: str) -> str:
    return line.split("#", 1)[0].strip()


def with_entries(text: str, names: Sequence[str], base: str) -> str:
    """Return the text of a series with other entries; comments stay.

    A comment stays before the entry that followed it, else after the entry that preceded it.
    """
    lines = text.removesuffix("\n").split("\n")
    start = next((index for index, line in enumerate(lines) if _BASE.fullmatch(line.strip())), 0)
    if any(map(_entry, lines[:start])) or not _BASE.fullmatch(lines[start].strip()):
        start = 0
    head = [
        line
        for line in lines[: start + 1]
        if not _entry(line) and not _BASE.fullmatch(line.strip())
    ]
    rest = [
        line
        for index, line in enumerate(lines)
        if not _BASE.fullmatch(line.strip()) and (index > start or _entry(line))
    ]
    kept = {name: line for line in rest if (name := _entry(line)) in names}
    before: dict[str, list[str]] = {}
    comments: list[str] = []
    last = ""
    for line in rest:
        if not _entry(line):
            comments.append(line)
        elif _entry(line) in names:
            last = _entry(line)
            before[last], comments = comments, []
    made = [*head, f"# base: {base}"]
    made += [] if last else comments
    for name in names:
        made += [*before.get(name, []), kept.get(name, name), *(comments if name == last else [])]
    return "\n".join(made) + "\n"


class State(enum.Enum):
    """State of the stack in a checkout."""

    MISSING = "missing"
    IN_PROGRESS = "in progress"
    DIRTY = "dirty"
    UNAPPLIED = "unapplied"
    APPLIED = "applied"
    UNEXPORTED = "unexported"
    FOREIGN = "foreign"


@dataclass(frozen=True)
class Stack:
    """The stack in a checkout.

    `dirty` are tracked paths with edits, in any state; DIRTY means that they block the application.
    IN_PROGRESS has the git `operation` that is not finished, and FOREIGN a `git bisect`.
    `untracked` are files that git does not track, so that no patch has them.
    """

    state: State
    base: str | None
    head: str | None
    tree: str | None
    expected_tree: str | None
    names: tuple[str, ...]
    dirty: tuple[str, ...]
    untracked: tuple[str, ...] = ()
    operation: str = ""

    @property
    def has_patches(self) -> bool:
        """Whether the checkout has the patches, with or without further commits."""
        return self.state in (State.APPLIED, State.UNEXPORTED)


_SHOWN_FILES = 3
_NAMED_FILES = 20
# A file may have hundreds of commits; the newest are enough.
_SHOWN_COMMITS = 5


def refusal(shown: str, git: Git, stack: Stack, *, verb: str) -> WorkspaceError:
    """Return the error for a command line `verb` that cannot move the checkout `shown`."""
    if stack.state is State.MISSING:
        return CheckoutError(f"{shown} does not exist", hint=hints.text("inv.bootstrap"))
    if stack.state is State.IN_PROGRESS:
        return CheckoutError(
            f"{shown} is in the middle of a git {git.under_way()}",
            hint=hints.text("repo.resume_or_abort", command=verb),
        )
    if stack.state is State.DIRTY or (stack.state is State.APPLIED and stack.dirty):
        action = "applied" if stack.state is State.DIRTY else "unapplied"
        count = counted(len(stack.names), "patch", "patches")
        return edited_files(shown, stack.dirty, f"{count} must be {action}", verb=verb)
    return _unrelated_commits(shown, git, stack, verb)


def _unrelated_commits(shown: str, git: Git, stack: Stack, verb: str) -> WorkspaceError:
    """Return the error for commits that are not those of the series, or not on the pin."""
    base = (stack.base or "")[:12]
    away = (
        hints.text("repo.detach", shown=shown, commit=base)
        if "unapply" in verb
        else hints.text("repo.detach_then", shown=shown, commit=base, command=verb)
    )
    keep = kept(shown, git, stack.head, away)
    if stack.state is State.UNEXPORTED:
        return PatchDrift(
            f"{shown} has commits on {base} that differ from the series; they were not changed",
            hint=hints.text("repo.export_or_keep", command=keep),
        )
    return CheckoutError(
        f"{shown} is at {(stack.head or 'no commit')[:12]}, which is not on {base or 'the pin'}; it"
        " was not changed",
        hint=hints.text("repo.on_a_branch", command=keep),
    )


def edited_files(shown: str, paths: Sequence[str], purpose: str, *, verb: str) -> CheckoutError:
    """Return the error for edits in the checkout `shown` that block a purpose."""
    hint = hints.text("repo.stash_around", shown=shown, command=verb)
    return CheckoutError(
        f"{shown} has edits ({few(paths)}), but {purpose} there; the edits were not changed",
        hint=hint,
    )


def kept(shown: str, git: Git, commit: str | None, command: str) -> str:
    """Return a command line that first keeps a commit on a branch, where none has it."""
    if not commit or git.resolve(f"refs/heads/{kept_as(commit)}") == commit:
        return command
    return hints.text("repo.branch_then", shown=shown, branch=kept_as(commit), command=command)


def named_untracked(paths: Sequence[str]) -> str:
    """Return a sentence on files that git does not track."""
    return f"files that git does not track are in no patch: {few(paths)}"


def taking_hint(shown: str, paths: Sequence[str]) -> str:
    """Return the command line that takes untracked files into a commit and a patch."""
    if len(paths) <= _NAMED_FILES:
        return hints.text("repo.take_files", shown=shown, paths=list(paths))
    return hints.text("repo.take_all_files", shown=shown)


def kept_as(commit: str) -> str:
    """Return the name of the branch that keeps a commit; each commit has its own.

    So the same hint works a second time.
    """
    return f"mine-{commit[:12]}"


def refused(project: str, name: str, stack: Stack, applied: Applied) -> PatchConflict:
    """Return the error for a series that does not apply, where nothing was changed."""
    return PatchConflict(
        f"patch {applied.position} of {len(stack.names)}, patches/{project}/{name}, does not apply"
        f" to {(stack.base or '')[:12]}; nothing was changed",
        hint=hints.text("repo.stop_or_drop", project=project),
        details=applied.details,
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
    """Return the error for a patch at which an `am` waits in the checkout `shown`.

    `patch` is its file as a user would type it, or its subject. `old` is the base that the patches
    were made for: if its history is available, each path lists the upstream commits since then.
    """
    touched = _touching(git, old, base, applied.paths)
    kind = "conflict in" if applied.conflicted else "not applied:"
    details = [
        line for path in applied.paths for line in (f"{kind} {path}", *touched.get(path, ()))
    ]
    paths = list(applied.paths)
    where = "the conflict" if applied.conflicted else f"this patch (git: {applied.reason})"
    if applied.conflicted:
        hint = hints.text("repo.resolve", shown=shown, paths=paths, files=few(paths))
    else:
        # git lacks the contents that the patch was made from, so it merged and changed no file
        # (git-am(1), --3way).
        diff = git.path_of("rebase-apply/patch")
        hint = hints.text("repo.apply_hunks", shown=shown, path=diff, paths=paths)
    return PatchConflict(
        f"patch {applied.position} of {count}, {patch}, does not apply to {base[:12]}; {shown}"
        f" waits at {where}",
        hint=hint,
        details=tuple(details),
    )


def _touching(
    git: Git, old: str | None, base: str, paths: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    # Each release is on its own branch, so it is no ancestor of the next one; an archive has no
    # history at all.
    from workspace.repo.git import history

    if old is None or old == base or not paths or not history.forks(git, old, base):
        return {}
    found = history.touching(history.log(git, old, base, paths), paths)
    return {path: _newest(lines) for path, lines in found.items()}


def _newest(lines: Sequence[str]) -> tuple[str, ...]:
    earlier = len(lines) - _SHOWN_COMMITS
    more = (f"  and by {counted(earlier, 'earlier commit')}",) if earlier > 0 else ()
    return (*(f"  since changed by {line}" for line in lines[:_SHOWN_COMMITS]), *more)


def few(paths: Sequence[str]) -> str:
    """Return the first paths of a list, and the number of the others."""
    return ", ".join(paths[:_SHOWN_FILES]) + (
        f" and {len(paths) - _SHOWN_FILES} more" if len(paths) > _SHOWN_FILES else ""
    )
