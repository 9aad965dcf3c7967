"""One `git am` for a whole series: its flags, its run aside or in a working tree, and where one
that stopped stands.

All state of one that stopped is git's own, so that it may be resumed tomorrow, and by hand. Its
exit code says little: a conflict gives the code of any other failure, and a patch that is upstream
already is dropped with 0. What counts are the commits.
"""

import codecs
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from workspace.core import files
from workspace.core.errors import CheckoutError, ToolchainError
from workspace.core.log import RunLog
from workspace.repo.git import command
from workspace.repo.git.command import Entries, first_line, index_entries, split, tree_entries
from workspace.repo.git.repository import Git, take_in

# See the git facts in the design: nothing here may depend on who applies, where and when.
_AM = (
    *(
        "am",
        "--quiet",
        "--3way",
        "--patch-format=mbox",
        "--keep-non-patch",
        "--keep-cr",
        "--no-scissors",
        "--no-signoff",
        "--no-gpg-sign",
    ),
    *("--no-message-id", "--whitespace=nowarn", "--committer-date-is-author-date"),
)
# The same in the hands of a person who resolves a conflict.
AM_BY_HAND = "am --3way --keep-non-patch --keep-cr --no-scissors --committer-date-is-author-date"
# git-update-index(1), --index-version; git 2.40 can leave its checksum out.
_SMALL_INDEX = ("-c", "index.version=4", "-c", "index.skipHash=true")
# `am` writes twenty small files a patch into its git directory: in memory (tmpfs(5)) that takes
# half the time.
_IN_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Applied:
    """What one `am` of a series led to: the last commit, or the place of the conflict, counted from
    1.
    """

    tip: str | None
    position: int = 0
    conflicted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Position:
    """Where an `am` stands: patch `number` of `last`, counted from 1. `is_begun` is False where it
    was killed before it came to that patch.
    """

    number: int
    last: int
    subject: str
    is_begun: bool


def applied(git: Git, base: str, patches: Sequence[Path], *, place: Path) -> Applied:
    """Make the commits of a series on `base` in one `am`, in a folder beside `place`: no file and
    no ref of the repository is touched.

    The commits lie in its objects afterwards, safely on the disk. The same input gives the same
    SHAs, whoever runs it.
    """
    done = tried(git, base, patches, place=place)
    return done if done.tip else _applied_in(place, git, base, patches, with_files=True)


def tried(
    git: Git,
    base: str,
    patches: Sequence[Path],
    *,
    place: Path,
    is_wanted: Callable[[], bool] = lambda: True,
) -> Applied:
    """What `applied` does where each patch applies as it stands; otherwise no tip, and the position
    says nothing.

    The same where `is_wanted`, asked when the commits are made and before the repository gets them,
    says no.
    """
    quick = (
        _IN_MEMORY / f"workspace-{os.getuid()}-{place.name}"
        if os.access(_IN_MEMORY, os.W_OK)
        else place
    )
    try:
        # `am` needs the files of a merge, never of a patch that applies as it stands: they are
        # written only when that failed.
        return _applied_in(quick, git, base, patches, with_files=False, is_wanted=is_wanted)
    except ToolchainError:
        # The memory may be full where the disk is not.
        return Applied(None)


def _applied_in(
    place: Path,
    git: Git,
    base: str,
    patches: Sequence[Path],
    *,
    with_files: bool,
    is_wanted: Callable[[], bool] = lambda: True,
) -> Applied:
    with files.folder_beside(place) as folder:
        scratch, objects = Git(folder / "tree", git_dir=folder / "git"), git.path_of("objects")
        scratch.path.mkdir()
        scratch.init()
        made = folder / "git" / "objects"
        (made / "info").mkdir(exist_ok=True)
        (made / "info" / "alternates").write_bytes(os.fsencode(objects) + b"\n")
        scratch.set_ref("HEAD", base)
        # It is written anew for each patch: the smaller the better.
        scratch.write(*_SMALL_INDEX, "read-tree", base)
        if with_files:
            scratch.write_files()
        # A sync for all is a third of the time of one for each object.
        if (
            scratch.write(
                *_SMALL_INDEX, "-c", "core.fsync=none", *_AM, *map(str, patches), check=False
            ).status
            == 0
        ):
            if not is_wanted():
                return Applied(None)
            take_in(made, objects)
            return Applied(scratch.head())
        there = position(scratch)
        number = there.number if there else 1
        return Applied(None, number, unmerged(scratch) or git.patch_paths(patches[number - 1]))


def start(git: Git, patches: Sequence[Path], *, run_log: RunLog) -> Applied:
    """Put patches on HEAD in the working tree itself. At a conflict the `am` is left there, in
    progress.

    Raises CheckoutError where git refuses to begin.
    """
    answer = git.write(
        *_AM, *(str(patch.absolute()) for patch in patches), check=False, run_log=run_log
    )
    # git syncs the commits that it makes, and not the files.
    os.sync()
    there = position(git)
    if there and there.number == 1 and not there.is_begun:
        # An index that is not HEAD's, say: no commit was made, and no patch is at fault.
        git.write("am", "--quit", check=False)
    elif there:
        return Applied(
            None, there.number, unmerged(git) or git.patch_paths(patches[there.number - 1])
        )
    if answer.status != 0:
        raise CheckoutError(
            f"git am in {git.path}: {first_line(answer.err) or f'exited with {answer.status}'}"
        )
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
    return tuple(
        sorted({entry.split("\t", 1)[1] for entry in split(git.look("ls-files", "-u", "-z").out)})
    )


def staged(git: Git) -> tuple[str, ...]:
    """Paths whose content in the index is not HEAD's."""
    return tuple(
        split(
            git.look(
                "diff-index", "--cached", "--name-only", "--no-renames", "-z", "HEAD", "--"
            ).out
        )
    )


def user(git: Git) -> dict[str, str]:
    """Variables that name the user, by their own configuration, as the author of a commit; none
    where that says nobody.
    """
    known = {
        word: git.look("config", "--get", f"user.{word}", check=False).out.strip()
        for word in ("name", "email")
    }
    return (
        {f"GIT_AUTHOR_{word.upper()}": value for word, value in known.items() if value}
        if all(known.values())
        else {}
    )


def drop_begun(git: Git) -> None:
    """Write the files of the patch at which an `am` stands as the index has them; conflicts are
    left to git, which resets those only.
    """
    diff = git.path_of("rebase-apply/patch")
    if diff.exists() and (
        mine := (set(git.patch_paths(diff)) & set(git.edits())) - set(unmerged(git))
    ):
        held = split(git.look("ls-files", "-z", "--", *sorted(mine)).out)
        if held:
            git.write_files(*held)


def rewind(git: Git, *, run_log: RunLog) -> None:
    """Go back to where an aborted `am` began if git did not: it takes the commits of one that was
    killed for the user's.

    Only over commits that the workspace itself has made.
    """
    start, head = git.resolve("ORIG_HEAD"), git.head()
    if start is None or head is None or start == head or not git.is_ancestor(start, head):
        return
    if set(
        git.look("log", "--no-show-signature", "--format=%ce", f"{start}..{head}", "--").out.split()
    ) == {command.IDENTITY[1]}:
        git.move_to(start, run_log=run_log)


# What some configuration would change in the bytes and no flag of format-patch overrides.
_SETTINGS = (
    *(
        "-c",
        "diff.suppressBlankEmpty=false",
        "-c",
        "core.quotePath=true",
        "-c",
        "i18n.logOutputEncoding=UTF-8",
    ),
    *("-c", "format.mboxrd=false"),
)
# git-format-patch(1); see the git facts in the design.
_FORMAT = (
    *(
        "--keep-subject",
        "--no-numbered",
        "--zero-commit",
        "--full-index",
        "--binary",
        "--no-signature",
        "--no-stat",
        "--no-renames",
        "--no-base",
    ),
    *(
        "--no-thread",
        "--no-attach",
        "--no-notes",
        "-U3",
        "--inter-hunk-context=0",
        "--diff-algorithm=myers",
        "--indent-heuristic",
    ),
    *(
        "--src-prefix=a/",
        "--dst-prefix=b/",
        "--encode-email-headers",
        "--no-signoff",
        "--no-from",
        "--no-to",
        "--no-cc",
        "--no-add-header",
    ),
    *(
        "--no-cover-letter",
        "--no-color",
        "--no-ext-diff",
        "--no-textconv",
        "--no-relative",
        "-O/dev/null",
        "--submodule=short",
        "--ignore-submodules=none",
    ),
)
_READ = (
    "--keep-non-patch",
    "--keep-cr",
    "--no-scissors",
    "--no-signoff",
    "--no-gpg-sign",
    "--no-message-id",
    "--patch-format=mbox",
)
# What is thrown away a moment later need not reach the disk.
_UNSYNCED = ("-c", "core.fsync=none")
_WORTH_TWO = 20
# A hundred small files come and go three times as fast in memory (tmpfs(5)).
_INDEX_FOLDER = "/dev/shm"
# The line with which format-patch begins each message; no other line of a header or a diff can be
# like it.
SEPARATOR = b"From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001\n"
_START = re.compile(rb"^" + re.escape(SEPARATOR), re.MULTILINE)
_DIFF = re.compile(rb'^diff --git (?:a/(.*) b/\1|"a/(.*)" "b/\2")$', re.MULTILINE)

# What a path is, `mode oid`, on the one side and on the other, for every path that differs.
Differences = tuple[Entries, Entries]


@dataclass(frozen=True)
class Commit:
    """A commit as git reads it out: `slug` is its subject as a file name, `date` is `seconds zone`,
    `author` is `name <email>`.
    """

    oid: str
    tree: str
    parents: tuple[str, ...]
    slug: str
    author: str
    date: str
    message: str


def commits(git: Git, base: str, tip: str) -> tuple[Commit, ...]:
    """The commits of base..tip, oldest first, merges and all that they bring included."""
    form = "--format=%x00%H%x00%T%x00%P%x00%f%x00%an <%ae>%x00%ad%x00%B%x00"
    words = (
        "--reverse",
        "--topo-order",
        "--no-color",
        "--no-show-signature",
        "--no-notes",
        "--date=raw",
        form,
    )
    out = git.write("-c", "i18n.logOutputEncoding=UTF-8", "log", *words, f"{base}..{tip}", "--").out
    # No field of a commit holds a zero byte.
    parts = out.split("\0")
    fields = [parts[start : start + 7] for start in range(1, len(parts) - 7, 8)]
    return tuple(
        Commit(oid, tree, tuple(parents.split()), slug, author, date, message)
        for oid, tree, parents, slug, author, date, message in fields
    )


def mails(git: Git, base: str, stack: Sequence[Commit]) -> list[bytes]:
    """What git writes of the commits of a stack on `base`, which has no merge, oldest first. Empty
    commits have none.

    A message with a line like SEPARATOR gives two: the caller has looked at the messages.
    """
    # Most of it is the making of diffs, which git does with one core.
    middle = len(stack) // 2
    parts = [stack] if len(stack) < _WORTH_TWO else [stack[:middle], stack[middle:]]
    bases = [base, stack[middle - 1].oid]
    with ThreadPoolExecutor(len(parts)) as pool:
        written = pool.map(lambda start, part: _formatted(git, start, part[-1].oid), bases, parts)
        return [mail for part in written for mail in part]


def _formatted(git: Git, base: str, tip: str, *words: str) -> list[bytes]:
    raw = git.write(
        *_SETTINGS, "format-patch", "--stdout", *_FORMAT, *words, f"{base}..{tip}", "--"
    ).out.encode(errors="surrogateescape")
    # A blank line stands between two mails and belongs to neither.
    *others, last = _START.split(raw)[1:] or [b""]
    return [
        SEPARATOR + part for part in (*(part.removesuffix(b"\n") for part in others), last) if part
    ]


def differences(git: Git, base: str, tip: str) -> Differences:
    """What differs between two commits: `mode oid` by path, as the one and as the other has it."""
    changes = split(
        git.write(
            "diff-tree",
            "-r",
            "-z",
            "--no-renames",
            "--ignore-submodules=none",
            "--no-ext-diff",
            "-O/dev/null",
            base,
            tip,
        ).out
    )
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    for meta, path in zip(changes[::2], changes[1::2], strict=True):
        old_mode, mode, old_oid, oid, _ = meta.removeprefix(":").split(" ")
        before |= {path: f"{old_mode} {old_oid}"} if int(old_mode) else {}
        after |= {path: f"{mode} {oid}"} if int(mode) else {}
    return before, after


def failing(git: Git, base: str, patches: Sequence[bytes], expected: Differences) -> int:
    """Apply mails to `base` in an index of their own: 0 where that gives what `differences` says,
    else the first that does not apply, from 1.

    -1 where all apply and give something else. No merge is tried: what is right applies as it
    stands. Only the paths that differ or that a mail names are looked at: no others can change.
    """
    before, after = expected
    # Changed and changed back.
    same = sorted(
        {path for patch in patches for path in paths(patch)} - before.keys() - after.keys()
    )
    unchanged = (
        tree_entries(git.look("ls-tree", "-z", "--full-tree", base, "--", *same).out)
        if same
        else {}
    )
    with tempfile.TemporaryDirectory(
        prefix="workspace-index-", dir=_INDEX_FOLDER if os.access(_INDEX_FOLDER, os.W_OK) else None
    ) as folder:
        os.mkdir(f"{folder}/objects")
        files = [f"{folder}/{number}" for number in range(len(patches))]
        for file, patch in zip(files, patches, strict=True):
            Path(file).write_bytes(patch)
        scratch = {"GIT_INDEX_FILE": f"{folder}/index", "GIT_OBJECT_DIRECTORY": f"{folder}/objects"}
        scratch["GIT_ALTERNATE_OBJECT_DIRECTORIES"] = str(git.path_of("objects"))
        start = [
            word
            for path, entry in {**before, **unchanged}.items()
            for word in ("--cacheinfo", f"{entry.replace(' ', ',')},{path}")
        ]

        def applies(*words: str) -> bool:
            return (
                git.write(
                    *_UNSYNCED,
                    "apply",
                    "--cached",
                    "--whitespace=nowarn",
                    *words,
                    env=scratch,
                    check=False,
                ).status
                == 0
            )

        git.write(*_UNSYNCED, "update-index", "--add", *start, env=scratch)
        if not applies(*files):
            # All at once, git is confused by what one by one is clear, such as a file that becomes
            # a link and a file again.
            os.unlink(f"{folder}/index")
            git.write(*_UNSYNCED, "update-index", "--add", *start, env=scratch)
            for number, file in enumerate(files, 1):
                if not applies(file):
                    return number
        found = index_entries(git.write("ls-files", "-s", "-z", env=scratch).out)
    return 0 if found == {**after, **unchanged} else -1


def paths(mail: bytes) -> tuple[str, ...]:
    """The paths that a mail as `mails` gives it changes; also what in its message looks so."""
    found = ((plain or codecs.escape_decode(quoted)[0]) for plain, quoted in _DIFF.findall(mail))
    return tuple(path.decode(errors="surrogateescape") for path in found)


def reread(messages: Sequence[bytes], *, folder: Path) -> tuple[tuple[Commit, ...], list[bytes]]:
    """What `git am` makes of mails without diffs, and the mails of that: commits, in an empty
    repository in the empty folder `folder`.

    Fewer than there are messages where git cannot read one.
    """
    git = Git(folder)
    git.init()
    root = git.write(
        "commit-tree",
        "-m",
        "root",
        git.write("hash-object", "-t", "tree", "-w", "/dev/null").out.strip(),
    ).out.strip()
    git.set_ref("HEAD", root)
    for number, message in enumerate(messages):
        (folder / f"{number}").write_bytes(message)
    files = [str((folder / f"{number}").absolute()) for number in range(len(messages))]
    git.write(*_UNSYNCED, "am", "--quiet", "--empty=keep", *_READ, *files, check=False)
    return commits(git, root, "HEAD"), _formatted(git, root, "HEAD", "--always")


def taken_apart(git: Git, mbox: Path, folder: Path) -> tuple[Path, ...]:
    """Write each mail of a file into the folder, which is empty, and return them in order."""
    git.write("mailsplit", "-b", "--keep-cr", f"-o{folder.absolute()}", str(mbox.absolute()))
    return tuple(sorted(folder.iterdir()))


def pull_request(mirror: Git, number: int) -> bytes | None:
    """The commits of a pull request, merges aside, in a copy of a forge's repository that has
    refs/pull; None where it has not this one.
    """
    head = mirror.resolve(f"refs/pull/{number}/head")
    if head is None:
        return None
    base = mirror.write("merge-base", "HEAD", head).out.strip()
    return b"".join(_formatted(mirror, base, head))


def recommitted(
    git: Git, commit: Commit, parent: str, message: str, *, committer: tuple[str, str] | None = None
) -> str:
    """Commit the tree of a commit on `parent` with another message: author and date stay.

    Without `committer`, a name and an address, it is the commit that `am` makes of it on every
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
