"""Patches as mails: `git am` for a whole series, its state when it stops, and format-patch.

git alone holds the state of an `am` that stopped, so that it may be resumed tomorrow, and by hand.
The exit code of `am` is not enough: a conflict has the code of any other failure, and a patch that
upstream has is dropped with 0. The commits count.
"""

import codecs
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from workspace.core import files
from workspace.core.console import RunLog
from workspace.core.errors import CheckoutError, ToolchainError
from workspace.repo.git import command
from workspace.repo.git.command import Answer, first_line, split
from workspace.repo.git.repository import Git

# The result must not depend on the user, the place and the time.
_AM = (
    *("am", "--quiet", "--3way", "--patch-format=mbox", "--keep-non-patch", "--keep-cr"),
    *("--no-scissors", "--no-signoff", "--no-gpg-sign", "--no-message-id", "--whitespace=nowarn"),
    "--committer-date-is-author-date",
)
_DIRECT = (*_AM, "--no-3way")
# The same command for a user who resolves a conflict by hand.
AM_BY_HAND = "am --3way --keep-non-patch --keep-cr --no-scissors --committer-date-is-author-date"
# git-update-index(1), --index-version; git 2.40 can omit the checksum.
_SMALL_INDEX = ("-c", "index.version=4", "-c", "index.skipHash=true")
# `am` writes twenty small files for each patch into its git directory: in memory (tmpfs(5)) that
# takes half the time.
_IN_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Applied:
    """Result of one `am` of a series: the last commit, or where it stopped.

    `position` is the number of the patch, from 1, `paths` are its files. Those in `conflicted` are
    unmerged; where there are none, `reason` is git's own line.
    """

    tip: str | None
    position: int = 0
    paths: tuple[str, ...] = ()
    conflicted: tuple[str, ...] = ()
    reason: str = ""

    @property
    def cause(self) -> str:
        """Why it stopped, as a phrase that follows the name of the patch."""
        if self.conflicted:
            return f"conflicts ({', '.join(self.conflicted)})"
        return f"does not apply (git: {self.reason})"

    @property
    def details(self) -> tuple[str, ...]:
        """Why it stopped, a line for each path with a conflict, or git's own line."""
        return tuple(f"conflict in {path}" for path in self.conflicted) or (f"git: {self.reason}",)


@dataclass(frozen=True)
class Position:
    """Position of an `am`: patch `number` of `last`, from 1.

    `is_begun` is False where the `am` was killed before it came to that patch.
    """

    number: int
    last: int
    subject: str
    is_begun: bool


def applied(
    git: Git, base: str, patches: Sequence[Path], *, place: Path, flags: Sequence[str] = ()
) -> Applied:
    """Make the commits of a series on `base` in one `am`, in a scratch folder beside `place`.

    No file and no reference of the repository changes; the commits are in its objects afterwards,
    synced to the disk. The same input gives the same SHAs for every user.
    """
    # `am` needs files only for a merge, so they are written only for the second attempt.
    done = applied_directly(git, base, patches, place=place, flags=flags)
    if done.tip is None:
        done = _applied_in(place, git, base, patches, (*_AM, *flags), has_files=True)
    return done


def applied_directly(
    git: Git, base: str, patches: Sequence[Path], *, place: Path, flags: Sequence[str] = ()
) -> Applied:
    """Make the commits as `applied` does, if each patch applies without a merge."""
    try:
        if os.access(_IN_MEMORY, os.W_OK):
            place_there = _IN_MEMORY / f"workspace-{os.getuid()}-{place.name}"
            return _applied_in(place_there, git, base, patches, (*_DIRECT, *flags))
    except ToolchainError:
        # The memory may be full where the disk is not.
        pass
    return _applied_in(place, git, base, patches, (*_DIRECT, *flags))


def _applied_in(
    place: Path,
    git: Git,
    base: str,
    patches: Sequence[Path],
    am: Sequence[str],
    *,
    has_files: bool = False,
) -> Applied:
    """Run `am` with these flags in a scratch folder, with files for a merge if `has_files`."""
    with files.folder_beside(place) as folder:
        scratch = _scratch(folder, git)
        # git writes the index again for each patch: the smaller the better.
        scratch.write(*_SMALL_INDEX, "reset", "--quiet", "--hard" if has_files else "--mixed", base)
        # One sync for all takes a third of the time of a sync for each object.
        answer = scratch.write(*_SMALL_INDEX, *_UNSYNCED, *am, *map(str, patches), check=False)
        if answer.status == 0:
            _take_in(folder / "git" / "objects", git.path_of("objects"))
            return Applied(scratch.head())
        stopped = position(scratch)
        return stopped_at(scratch, stopped.number if stopped else 1, answer)


def _scratch(folder: Path, git: Git) -> Git:
    """Make a repository with its working tree in a folder, over the objects of another one."""
    scratch = Git(folder / "tree", git_dir=folder / "git")
    scratch.path.mkdir()
    scratch.init()
    info = folder / "git" / "objects" / "info"
    info.mkdir(exist_ok=True)
    (info / "alternates").write_bytes(os.fsencode(git.path_of("objects")) + b"\n")
    return scratch


def start(git: Git, patches: Sequence[Path], *, run_log: RunLog) -> Applied:
    """Apply patches to HEAD in the working tree; leave an `am` with a conflict in progress.

    Raises CheckoutError where git refuses to begin.
    """
    answer = git.write(
        *_AM, *(str(patch.absolute()) for patch in patches), check=False, run_log=run_log
    )
    # git syncs the commits that it makes, but not the files.
    os.sync()
    stopped = position(git)
    if stopped and stopped.number == 1 and not stopped.is_begun:
        # No commit was made, and no patch is at fault: for example, the index is not HEAD's.
        git.write("am", "--quit", check=False)
    elif stopped:
        return stopped_at(git, stopped.number, answer)
    if answer.status != 0:
        raise CheckoutError(
            f"git am in {git.path}: {first_line(answer.err) or f'exited with {answer.status}'}"
        )
    return Applied(git.head())


def stopped_at(git: Git, number: int, answer: Answer | None = None) -> Applied:
    """Return where and why the `am` that is under way stopped; `answer` is what git printed."""
    diff = git.path_of("rebase-apply/patch")
    paths = git.patch_paths(diff) if diff.exists() else ()
    if conflicted := unmerged(git):
        return Applied(None, number, conflicted, conflicted)
    refused = ""
    if diff.exists() and not staged(git):
        # The merge that `am` tries after a failed apply reports only its own failure.
        check = ("apply", "--cached", "--check", "--whitespace=nowarn", str(diff))
        refused = first_line(git.write(*check, check=False).err)
    reason = refused or (first_line(answer.err) if answer else "")
    return Applied(None, number, paths, (), reason or "no reason was given")


def position(git: Git) -> Position | None:
    """Return the position of the `am` that is under way, or None."""
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
    """Return the paths with an unresolved conflict."""
    return tuple(
        sorted({entry.split("\t", 1)[1] for entry in split(git.look("ls-files", "-u", "-z").out)})
    )


def staged(git: Git) -> tuple[str, ...]:
    """Return the paths whose content in the index is not HEAD's."""
    return tuple(
        split(
            git.look(
                "diff-index", "--cached", "--name-only", "--no-renames", "-z", "HEAD", "--"
            ).out
        )
    )


def user(git: Git) -> dict[str, str]:
    """Return variables that make the configured user a commit's author.

    Return none where the name or the email is not configured.
    """
    known = {
        key: git.look("config", "--get", f"user.{key}", check=False).out.strip()
        for key in ("name", "email")
    }
    return (
        {f"GIT_AUTHOR_{key.upper()}": value for key, value in known.items() if value}
        if all(known.values())
        else {}
    )


def begins_by_skip(git: Git) -> bool:
    """Return whether `git am --skip` resumes an `am` that was killed between two patches.

    Either the patch was not begun (its number is then set back by one, as `git am --retry` of git
    2.46 does), or its commit was made and not noted. Otherwise the `am` waits for the user.
    """
    stopped = position(git)
    if stopped is None or unmerged(git) or staged(git):
        return False
    state = git.path_of("rebase-apply")
    if not stopped.is_begun:
        files.write_atomic(state / "next", f"{stopped.number - 1}\n".encode())
        return True
    before = git.resolve("HEAD~1")
    is_noted = before is None or (state / "abort-safety").read_text().strip() != before
    return not (is_noted or git.has_own_commits(before or "", "HEAD"))


def drop_begun(git: Git) -> None:
    """Reset the files of an `am`'s current patch to the index.

    git itself resets files with conflicts, and only those.
    """
    diff = git.path_of("rebase-apply/patch")
    if diff.exists() and (
        mine := (set(git.patch_paths(diff)) & set(git.edits())) - set(unmerged(git))
    ):
        held = split(git.look("ls-files", "-z", "--", *sorted(mine)).out)
        if held:
            git.write_files(*held)


def rewind(git: Git, *, run_log: RunLog) -> None:
    """Return to where an aborted `am` began if git did not.

    git takes the commits of a killed `am` for the user's. Only commits of the workspace are
    dropped.
    """
    start, head = git.resolve_all("ORIG_HEAD", "HEAD")
    if start is None or head is None or start == head or not git.is_ancestor(start, head):
        return
    if set(
        git.look("log", "--no-show-signature", "--format=%ce", f"{start}..{head}", "--").out.split()
    ) == {command.IDENTITY[1]}:
        git.move_to(start, before=head, run_log=run_log)


# Settings that change the bytes of a patch and that no flag of format-patch overrides.
_SETTINGS = (
    *("-c", "diff.suppressBlankEmpty=false", "-c", "core.quotePath=true"),
    *("-c", "i18n.logOutputEncoding=UTF-8", "-c", "format.mboxrd=false"),
)
# git-format-patch(1): the bytes must not depend on the user's configuration.
_FORMAT = (
    *("--keep-subject", "--no-numbered", "--zero-commit", "--full-index", "--binary"),
    *("--no-signature", "--no-stat", "--no-renames", "--no-base", "--no-thread", "--no-attach"),
    *("--no-notes", "-U3", "--inter-hunk-context=0", "--diff-algorithm=myers"),
    *("--indent-heuristic", "--src-prefix=a/", "--dst-prefix=b/", "--encode-email-headers"),
    *("--no-signoff", "--no-from", "--no-to", "--no-cc", "--no-add-header", "--no-cover-letter"),
    *("--no-color", "--no-ext-diff", "--no-textconv", "--no-relative", "-O/dev/null"),
    *("--submodule=short", "--ignore-submodules=none"),
)
# Scratch content need not reach the disk.
_UNSYNCED = ("-c", "core.fsync=none")
_WORTH_TWO = 20
# The line with which format-patch begins each message. No other line of a header or a diff can be
# like it.
SEPARATOR = b"From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001\n"
_START = re.compile(rb"^" + re.escape(SEPARATOR), re.MULTILINE)
_DIFF = re.compile(rb'^diff --git (?:a/(.*) b/\1|"a/(.*)" "b/\2")$', re.MULTILINE)


@dataclass(frozen=True)
class Commit:
    """A commit as git prints it.

    `slug` is its subject as a file name, `date` is `seconds zone`, `author` is `name <email>`.
    """

    oid: str
    tree: str
    parents: tuple[str, ...]
    slug: str
    author: str
    date: str
    message: str


def commits(git: Git, base: str, tip: str) -> tuple[Commit, ...]:
    """Return the commits of base..tip, oldest first, merges and all that they bring included."""
    flags = (
        *("--reverse", "--topo-order", "--no-color", "--no-show-signature", "--no-notes"),
        *("--date=raw", "--format=%x00%H%x00%T%x00%P%x00%f%x00%an <%ae>%x00%ad%x00%B%x00"),
    )
    log = ("-c", "i18n.logOutputEncoding=UTF-8", "log", *flags, f"{base}..{tip}", "--")
    # No field of a commit holds a zero byte.
    parts = git.write(*log).out.split("\0")
    fields = [parts[start : start + 7] for start in range(1, len(parts) - 7, 8)]
    return tuple(
        Commit(oid, tree, tuple(parents.split()), slug, author, date, message)
        for oid, tree, parents, slug, author, date, message in fields
    )


def mails(git: Git, base: str, stack: Sequence[Commit]) -> list[bytes]:
    """Return the mails of a stack of commits on `base`, without merges, oldest first.

    An empty commit has no mail. A message with a line like SEPARATOR gives two mails.
    """
    # Most of the time goes into diffs, which git computes on one core.
    middle = len(stack) // 2
    parts = [stack] if len(stack) < _WORTH_TWO else [stack[:middle], stack[middle:]]
    bases = [base, stack[middle - 1].oid]
    with ThreadPoolExecutor(len(parts)) as pool:
        written = pool.map(lambda start, part: _formatted(git, start, part[-1].oid), bases, parts)
        return [mail for part in written for mail in part]


def _formatted(git: Git, base: str, tip: str, *flags: str) -> list[bytes]:
    raw = git.write(
        *_SETTINGS, "format-patch", "--stdout", *_FORMAT, *flags, f"{base}..{tip}", "--"
    ).out.encode(errors="surrogateescape")
    # A blank line separates two mails and belongs to neither.
    *others, last = _START.split(raw)[1:] or [b""]
    return [
        SEPARATOR + part for part in (*(part.removesuffix(b"\n") for part in others), last) if part
    ]


def paths(mail: bytes) -> tuple[str, ...]:
    """Return the paths that a mail from `mails` changes, and lines of its message that look so."""
    found = ((plain or codecs.escape_decode(quoted)[0]) for plain, quoted in _DIFF.findall(mail))
    return tuple(path.decode(errors="surrogateescape") for path in found)


def split_mails(git: Git, mbox: Path, folder: Path) -> tuple[Path, ...]:
    """Write each mail of a file into the empty folder and return their paths in order."""
    git.write("mailsplit", "-b", "--keep-cr", f"-o{folder.absolute()}", str(mbox.absolute()))
    return tuple(sorted(folder.iterdir()))


def mails_of_request(git: Git, base: str, head: str) -> bytes:
    """Return the commits of a pull request, without merges, as mails."""
    return b"".join(_formatted(git, base, head))


def net_change(git: Git, base: str, head: str) -> bytes:
    """Return the difference of two commits, contents of binary files included."""
    flags = ("--binary", "--full-index", "--no-renames", "--submodule=short", "-O/dev/null")
    answer = git.write(*_SETTINGS, "diff", *flags, base, head, "--")
    return answer.out.encode(errors="surrogateescape")


def recommitted(
    git: Git, commit: Commit, parent: str, message: str, *, committer: tuple[str, str] | None = None
) -> str:
    """Commit the tree of a commit on `parent` with another message; author and date stay.

    Without `committer` (name and address) the result is the commit that `am` makes on every
    machine.
    """
    name, _, email = commit.author.partition(" <")
    env = {
        "GIT_AUTHOR_NAME": name,
        "GIT_AUTHOR_EMAIL": email.removesuffix(">"),
        "GIT_AUTHOR_DATE": f"@{commit.date}",
    }
    env |= (
        {"GIT_COMMITTER_NAME": committer[0], "GIT_COMMITTER_EMAIL": committer[1]}
        if committer
        else {"GIT_COMMITTER_DATE": f"@{commit.date}"}
    )
    with tempfile.NamedTemporaryFile(prefix="workspace-message-") as file:
        file.write(f"{message.strip(chr(10))}\n".encode(errors="surrogateescape"))
        file.flush()
        return git.write(
            "commit-tree", "-p", parent, "-F", file.name, commit.tree, env=env
        ).out.strip()


def _take_in(made: Path, objects: Path) -> None:
    """Copy loose objects from `made` into a repository; each reaches the disk before it is named.

    Git takes an object file that a power cut emptied for complete, and never writes it again.
    """
    copies: dict[Path, Path] = {}
    for file in made.glob("??/*"):
        target = objects / file.parent.name / file.name
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            # Git prunes files of such a name, which a kill may leave.
            copies[target] = target.with_name(f"tmp_obj_{file.name[:12]}")
            copies[target].unlink(missing_ok=True)
            shutil.copy(file, copies[target])
    if copies:
        os.sync()
        for target, copy in copies.items():
            os.replace(copy, target)
        os.sync()
