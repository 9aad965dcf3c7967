"""What a move of the pin asks of git: a second working tree of one repository, commits kept under
references, and the gitlink.
"""

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.core.errors import SourceError, ToolchainError
from workspace.core.log import RunLog
from workspace.repo.git import command
from workspace.repo.git.command import first_line, split
from workspace.repo.git.repository import Git

# A reference of one working tree alone (git-worktree(1), REFS): the others do not see it.
OWN_REFS = "refs/worktree"


def bring(git: Git, store: Path, commit: str, ref: str, *, run_log: RunLog) -> None:
    """Fetch a commit from another repository of this disk and let `ref` name it."""
    if git.resolve(ref) == commit:
        return
    # One that is there and that nothing leads to may lack the rest: a fetch that was killed leaves
    # single objects.
    if is_kept(git, commit):
        git.set_ref(ref, commit)
        return
    command.remove_packs(git.path_of("objects/pack"), git.path)
    words = (
        "--quiet",
        "--no-tags",
        "--no-write-fetch-head",
        "--recurse-submodules=no",
        str(store.absolute()),
        f"+{commit}:{ref}",
    )
    git.write("fetch", *words, env={"GIT_ALLOW_PROTOCOL": "file"}, run_log=run_log)


def add(git: Git, path: Path, commit: str, *, run_log: RunLog) -> Git:
    """Make a linked working tree of the repository at `path`, HEAD detached at `commit`, no file
    written yet.

    A submodule's core.worktree does not count there (git-config(1)). A half-made one of a killed
    run is made anew.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_books(git, path)
    git.write(
        "worktree",
        "add",
        "--quiet",
        "--force",
        "--force",
        "--no-checkout",
        "--detach",
        str(path.absolute()),
        commit,
        run_log=run_log,
    )
    # Git itself syncs none of the small files that make it a working tree.
    os.sync()
    return Git(path)


def forget(git: Git, path: Path) -> None:
    """Take a linked working tree out of the repository's books, and its folder away; others, be
    they out of reach, are left alone.

    Not `git worktree remove`: one that was killed leaves books of which nobody can tell whose they
    were.
    """
    if (path / ".git").is_file():
        shutil.rmtree(path, ignore_errors=True)
    _drop_books(git, path)


def _drop_books(git: Git, path: Path) -> None:
    """Remove what the repository knows of a linked working tree at `path`, whose .git is gone; what
    says so goes last.

    Git cannot read what a power cut has cut short of it, and then neither makes nor lists any
    working tree, nor fetches.
    """
    ours, kept = os.path.join(os.path.realpath(path), ".git"), git.path_of("worktrees")
    for books in kept.glob("*"):
        leads_to = _first_line(books / "gitdir")
        # One that leads nowhere may have been anybody's; without an index nobody has worked there.
        is_begun = (
            books.name.startswith(path.name)
            and ours.startswith(leads_to)
            and not (books / "index").exists()
        )
        if leads_to == ours or is_begun:
            for entry in books.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != "gitdir":
                    entry.unlink()
            shutil.rmtree(books)
    with contextlib.suppress(OSError):
        kept.rmdir()


def _first_line(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape").partition("\n")[0]
    except OSError:
        return ""


def snapshot(
    git: Git,
    message: str,
    *,
    paths: Sequence[str] = (),
    gitlinks: Mapping[str, str] | None = None,
    after: str | None = None,
) -> str:
    """Commit the working content on HEAD without moving anything, and return the commit: HEAD
    itself where nothing differs.

    It leads to the commit `after` too, where there is one.

    New files that are not ignored go in. With `paths` only what lies below those counts and all
    else is as in HEAD; `gitlinks` are the commits of submodules. An index with conflicts is no
    hindrance.
    """
    with tempfile.TemporaryDirectory(prefix="workspace-index-") as folder:
        scratch = {"GIT_INDEX_FILE": f"{folder}/index"}
        index = git.path_of("index")
        if paths or not index.exists():
            git.write("read-tree", "HEAD", env=scratch)
        else:
            # With its time: an entry is as new as the index where a file was written in the same
            # tick, and git then reads the file.
            shutil.copy2(index, folder + "/index")
            # Edits of files that git was told to take for unchanged are edits.
            git.write("update-index", "-q", "--really-refresh", env=scratch, check=False)
        tracked = git.write("ls-files", "-z", "--", *paths, env=scratch).out if paths else ""
        present = [
            path
            for path in paths
            if (git.path / path).exists()
            or any(name == path or name.startswith(f"{path}/") for name in split(tracked))
        ]
        if present or not paths:
            git.write("add", "--all", "--", *(present or ["."]), env=scratch)
        for path, commit in (gitlinks or {}).items():
            git.write(
                "update-index", "--add", "--cacheinfo", f"160000,{commit},{path}", env=scratch
            )
        tree = git.write("write-tree", env=scratch).out.strip()
    head = git.head()
    others = (
        [after] if after and after != head and not (head and git.is_ancestor(after, head)) else []
    )
    if head is not None and git.tree(head) == tree and not others:
        return head
    parents = [word for parent in (head, *others) if parent for word in ("-p", parent)]
    return git.write("commit-tree", "-m", message, *parents, tree).out.strip()


def require_way(git: Git, commit: str) -> None:
    """Raise CheckoutError where Git.move_to would be refused, as by an untracked file that the
    commit has too; nothing is moved.
    """
    git.write("update-index", "-q", "--refresh", check=False)
    git.write("read-tree", "-n", "-m", "-u", "HEAD", commit)


def delete_ref(git: Git, name: str) -> None:
    git.write("update-ref", "-d", name)


def references(git: Git, prefix: str) -> Mapping[str, str]:
    """The references below `prefix`, with the object that each names."""
    lines = git.look("for-each-ref", "--format=%(objectname) %(refname)", prefix).out.splitlines()
    return {name: oid for oid, name in (line.split(" ", 1) for line in lines)}


def set_gitlink(git: Git, path: str, commit: str, *, run_log: RunLog | None = None) -> None:
    """Let the superproject's index name another commit of a submodule. The skip-worktree bit is
    lost by it.
    """
    git.write("update-index", "--add", "--cacheinfo", f"160000,{commit},{path}", run_log=run_log)


def products(git: Git, *below: str) -> tuple[str, ...]:
    """Files below these folders that git neither tracks nor sees, by the repository's own word:
    what a build left there, bytecode aside.
    """
    # The user's own ignore file names other things: what an editor leaves.
    words = (
        "-c",
        "core.excludesFile=/dev/null",
        "ls-files",
        "--others",
        "--ignored",
        "--exclude-standard",
        "-z",
        "--",
        *below,
    )
    return tuple(path for path in split(git.look(*words).out) if not path.endswith((".pyc", "/")))


def range_diff(git: Git, old: tuple[str, str], new: tuple[str, str]) -> str:
    """How the commits base..tip of two stacks correspond (git-range-diff(1)); nothing where one has
    none, which git takes for no range.
    """
    if old[0] == old[1] or new[0] == new[1]:
        return ""
    return git.write("range-diff", "--no-color", f"{old[0]}..{old[1]}", f"{new[0]}..{new[1]}").out


def commits_between(git: Git, old: str, new: str) -> int | None:
    """How many commits `new` has that `old` has not; None where one of them is not there."""
    answer = git.look("rev-list", "--count", f"{old}..{new}", "--", check=False)
    return int(answer.out) if answer.status == 0 else None


def are_alike(git: Git, one: str, other: str) -> bool:
    """Whether two commits are there that have the same content and the same parents."""
    lines = git.look(
        "log",
        "--no-walk=unsorted",
        "--no-show-signature",
        "--format=%T %P",
        one,
        other,
        "--",
        check=False,
    ).out.splitlines()
    return len(lines) == 2 and lines[0] == lines[1]


def is_kept(git: Git, commit: str) -> bool:
    """Whether a reference of the repository, its HEAD included, leads to the commit; a linked
    tree's own does not count.
    """
    if commit not in git.present((commit,)):
        return False
    if git.is_ancestor(commit, "HEAD"):
        return True
    return bool(
        git.look("for-each-ref", "--count=1", "--format=1", "--contains", commit).out.strip()
    )


def start_over(tree: Git, commit: str, paths: Sequence[str]) -> None:
    """Bring a working tree in which nobody has worked to a commit, whatever an `am` of files at
    these paths has left that was killed or lost its power.
    """
    shutil.rmtree(tree.path_of("rebase-apply"), ignore_errors=True)
    # Git reads it before it writes it anew, and gives up at one that was cut short.
    tree.path_of("index").unlink(missing_ok=True)
    tree.write("reset", "--quiet", "--hard", commit)
    # Without it git no longer knows which files are those of patches, and `am` would not write over
    # them.
    for path in set(paths) - tree.entries(paths, commit).keys() if paths else ():
        (tree.path / path).unlink(missing_ok=True)


# Nothing here outlives the verb, so nothing has to reach the disk.
_FLEETING = ("-c", "core.fsync=none", "-c", "merge.directoryRenames=false")
_USAGE = 129


@dataclass(frozen=True)
class Merged:
    """What a three-way merge gave: the tree, or with conflict markers in it and the `conflicted`
    paths, as far as git names them.
    """

    tree: str
    conflicted: tuple[str, ...] | None


class Trial:
    """One index that patches are applied to. Made by `on`; gone with its block."""

    def __init__(self, git: Git, folder: Path, tree: str) -> None:
        self._git = git
        self._env = {
            "GIT_INDEX_FILE": str(folder / f"index-{len(os.listdir(folder))}"),
            "GIT_OBJECT_DIRECTORY": str(folder / "objects"),
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(git.path_of("objects")),
        }
        self._folder = folder
        self._tree: str | None = None
        self.take(tree)

    def beside(self, tree: str) -> "Trial":
        """Another index over the same objects."""
        return Trial(self._git, self._folder, tree)

    def take(self, tree: str) -> None:
        """Let the index hold a tree."""
        self._run("read-tree", tree)
        self._tree = None

    def apply(self, patches: Sequence[Path], *, three_way: bool = False) -> bool:
        """Apply patches as they stand, or by a merge of each file, all of them or none. A merge
        that failed leaves its conflicts in the index.
        """
        how = ("--3way",) if three_way else ()
        if (
            self._run(
                "apply", "--cached", "--whitespace=nowarn", *how, *map(str, patches), check=False
            )[0]
            != 0
        ):
            return False
        self._tree = None
        return True

    def holds(self, patch: Path) -> bool:
        """Whether all of a patch can be taken back from the index: it is there already."""
        return (
            self._run(
                "apply",
                "--cached",
                "--check",
                "--reverse",
                "--whitespace=nowarn",
                str(patch),
                check=False,
            )[0]
            == 0
        )

    def tree(self) -> str:
        """The tree of the index, as 40 hex."""
        if self._tree is None:
            self._tree = self._run("write-tree", "--missing-ok")[1].strip()
        return self._tree

    def merge(self, before: str, after: str) -> Merged:
        """Bring what lies between two trees into the tree of the index, as `am --3way` does,
        renames followed. The index stays as it is.

        Raises ToolchainError for a git older than 2.38, which has no merge without a working tree
        (git-merge-tree(1)), and SourceError where contents are missing.
        """
        base = self._commit(before)
        ours, theirs = self._commit(self.tree(), base), self._commit(after, base)
        words = ("merge-tree", "--write-tree", "--name-only", "-z", "--no-messages", ours, theirs)
        answer = self._git.write(*_FLEETING, *words, env=self._env, check=False)
        if answer.status == _USAGE:
            raise ToolchainError(
                "this git cannot merge without a working tree, which a forecast needs: 2.38 is the"
                " first that can",
                hint="git --version",
            )
        if answer.status not in (0, 1):
            raise SourceError(
                f"git merge-tree in {self._git.path}: {first_line(answer.err)}",
                hint=f"rm -rf {self._git.path}    it is made anew",
            )
        tree, *conflicted = split(answer.out)
        return Merged(tree.strip(), tuple(sorted(set(conflicted))) if answer.status else None)

    def _commit(self, tree: str, *parents: str) -> str:
        return self._run(
            "commit-tree",
            "-m",
            "trial",
            *(word for parent in parents for word in ("-p", parent)),
            tree,
        )[1].strip()

    def _run(self, *words: str, check: bool = True) -> tuple[int, str]:
        answer = self._git.write(*_FLEETING, *words, env=self._env, check=check)
        return answer.status, answer.out


def paths_of(git: Git, patches: Sequence[Path]) -> tuple[frozenset[str], ...]:
    """The paths that each patch file changes, asked in one call."""
    if not patches:
        return ()
    listed = [
        entry.split("\t", 2)[2]
        for entry in split(
            git.look("apply", "--numstat", "-z", *map(str, patches), check=False).out
        )
    ]
    # format-patch begins every file with this line, and nothing else in a patch can begin so.
    counts = [b"\n".join((b"", patch.read_bytes())).count(b"\ndiff --git ") for patch in patches]
    if sum(counts) != len(listed):
        return tuple(frozenset(git.patch_paths(patch)) for patch in patches)
    ends = list(itertools.accumulate(counts))
    return tuple(
        frozenset(listed[end - count : end]) for count, end in zip(counts, ends, strict=True)
    )


@contextlib.contextmanager
def try_on(git: Git, tree: str) -> Iterator[Trial]:
    """Begin with the tree of a commit, as 40 hex."""
    with tempfile.TemporaryDirectory(prefix="workspace-trial-") as folder:
        os.mkdir(f"{folder}/objects")
        yield Trial(git, Path(folder), tree)
