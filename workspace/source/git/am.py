"""One `git am` for a whole series: its flags, its run aside or in a working tree, and where one that stopped stands.

All state of one that stopped is git's own, so that it may be resumed tomorrow, and by hand. Its exit code says little: a conflict gives
the code of any other failure, and a patch that is upstream already is dropped with 0. What counts are the commits.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.core.errors import CheckoutError, ToolchainError
from workspace.core.journal import Journal
from workspace.source import hardening, scratch
from workspace.source.content import first_line, split
from workspace.source.git.objects import take_in
from workspace.source.git.repository import Git

# See the git facts in the design: nothing here may depend on who applies, where and when.
_AM = (
    *("am", "--quiet", "--3way", "--patch-format=mbox", "--keep-non-patch", "--keep-cr", "--no-scissors", "--no-signoff", "--no-gpg-sign"),
    *("--no-message-id", "--whitespace=nowarn", "--committer-date-is-author-date"),
)
# The same in the hands of a person who resolves a conflict.
AM_BY_HAND = "am --3way --keep-non-patch --keep-cr --no-scissors --committer-date-is-author-date"
# git-update-index(1), --index-version; git 2.40 can leave its checksum out.
_SMALL_INDEX = ("-c", "index.version=4", "-c", "index.skipHash=true")
# `am` writes twenty small files a patch into its git directory: in memory (tmpfs(5)) that takes half the time.
_IN_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Applied:
    """What one `am` of a series led to: the last commit, or the place of the conflict, counted from 1."""

    tip: str | None
    position: int = 0
    conflicted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Position:
    """Where an `am` stands: patch `number` of `last`, counted from 1. `is_begun` is False where it was killed before it came to that patch."""

    number: int
    last: int
    subject: str
    is_begun: bool


def applied(git: Git, base: str, patches: Sequence[Path], *, place: Path) -> Applied:
    """Make the commits of a series on `base` in one `am`, in a folder beside `place`: no file and no ref of the repository is touched.

    The commits lie in its objects afterwards, safely on the disk. The same input gives the same SHAs, whoever runs it.
    """
    done = tried(git, base, patches, place=place)
    return done if done.tip else _applied_in(place, git, base, patches, with_files=True)


def tried(git: Git, base: str, patches: Sequence[Path], *, place: Path, is_wanted: Callable[[], bool] = lambda: True) -> Applied:
    """What `applied` does where each patch applies as it stands; otherwise no tip, and the position says nothing.

    The same where `is_wanted`, asked when the commits are made and before the repository gets them, says no.
    """
    quick = _IN_MEMORY / f"workspace-{os.getuid()}-{place.name}" if os.access(_IN_MEMORY, os.W_OK) else place
    try:
        # `am` needs the files of a merge, never of a patch that applies as it stands: they are written only when that failed.
        return _applied_in(quick, git, base, patches, with_files=False, is_wanted=is_wanted)
    except ToolchainError:
        # The memory may be full where the disk is not.
        return Applied(None)


def _applied_in(place: Path, git: Git, base: str, patches: Sequence[Path], *, with_files: bool, is_wanted: Callable[[], bool] = lambda: True) -> Applied:
    with scratch.beside(place) as folder:
        aside, objects = Git(folder / "tree", git_dir=folder / "git"), git.path_of("objects")
        aside.path.mkdir()
        aside.init()
        made = folder / "git" / "objects"
        (made / "info").mkdir(exist_ok=True)
        (made / "info" / "alternates").write_bytes(os.fsencode(objects) + b"\n")
        aside.set_ref("HEAD", base)
        # It is written anew for each patch: the smaller the better.
        aside.write(*_SMALL_INDEX, "read-tree", base)
        if with_files:
            aside.write_files()
        # A sync for all is a third of the time of one for each object.
        if aside.write(*_SMALL_INDEX, "-c", "core.fsync=none", *_AM, *map(str, patches), check=False).status == 0:
            if not is_wanted():
                return Applied(None)
            take_in(made, objects)
            return Applied(aside.head())
        there = position(aside)
        number = there.number if there else 1
        return Applied(None, number, unmerged(aside) or git.patch_paths(patches[number - 1]))


def start(git: Git, patches: Sequence[Path], *, journal: Journal) -> Applied:
    """Put patches on HEAD in the working tree itself. At a conflict the `am` is left there, in progress.

    Raises CheckoutError where git refuses to begin.
    """
    answer = git.write(*_AM, *(str(patch.absolute()) for patch in patches), check=False, journal=journal)
    # git syncs the commits that it makes, and not the files.
    os.sync()
    there = position(git)
    if there and there.number == 1 and not there.is_begun:
        # An index that is not HEAD's, say: no commit was made, and no patch is at fault.
        git.write("am", "--quit", check=False)
    elif there:
        return Applied(None, there.number, unmerged(git) or git.patch_paths(patches[there.number - 1]))
    if answer.status != 0:
        raise CheckoutError(f"git am in {git.path}: {first_line(answer.err) or f'exited with {answer.status}'}")
    return Applied(git.head())


def position(git: Git) -> Position | None:
    """Where the `am` that is under way stands, or None where there is none."""
    state = git.path_of("rebase-apply")
    try:
        number, last = (int((state / name).read_text()) for name in ("next", "last"))
    except (OSError, ValueError):
        return None
    message = state / "final-commit"
    is_begun = message.exists()
    subject = message.read_text(errors="replace").split("\n", 1)[0] if is_begun else ""
    return Position(number, last, subject, is_begun)


def unmerged(git: Git) -> tuple[str, ...]:
    """Paths with a conflict that nobody has resolved."""
    return tuple(sorted({entry.split("\t", 1)[1] for entry in split(git.look("ls-files", "-u", "-z").out)}))


def staged(git: Git) -> tuple[str, ...]:
    """Paths whose content in the index is not HEAD's."""
    return tuple(split(git.look("diff-index", "--cached", "--name-only", "--no-renames", "-z", "HEAD", "--").out))


def user(git: Git) -> dict[str, str]:
    """Variables that name the user, by their own configuration, as the author of a commit; none where that says nobody."""
    known = {word: git.look("config", "--get", f"user.{word}", check=False).out.strip() for word in ("name", "email")}
    return {f"GIT_AUTHOR_{word.upper()}": value for word, value in known.items() if value} if all(known.values()) else {}


def drop_begun(git: Git) -> None:
    """Write the files of the patch at which an `am` stands as the index has them; conflicts are left to git, which resets those only."""
    diff = git.path_of("rebase-apply/patch")
    if diff.exists() and (mine := (set(git.patch_paths(diff)) & set(git.edits())) - set(unmerged(git))):
        held = split(git.look("ls-files", "-z", "--", *sorted(mine)).out)
        if held:
            git.write_files(*held)


def rewind(git: Git, *, journal: Journal) -> None:
    """Go back to where an aborted `am` began if git did not: it takes the commits of one that was killed for the user's.

    Only over commits that the workspace itself has made.
    """
    start, head = git.resolve("ORIG_HEAD"), git.head()
    if start is None or head is None or start == head or not git.is_ancestor(start, head):
        return
    if set(git.look("log", "--no-show-signature", "--format=%ce", f"{start}..{head}", "--").out.split()) == {hardening.IDENTITY[1]}:
        git.move_to(start, journal=journal)
