"""Linked working trees, commits kept under references, gitlinks, patches tried on an index, and
moves of a checkout between commits.

A move is recorded before its first file is touched, and the next run finishes it. Only with such a
record may a missing or truncated file come from a killed move, and only if it differs between the
two commits: every other file is the user's.
"""

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.core import hints, lock, records
from workspace.core.console import RunLog
from workspace.core.errors import CheckoutError, SourceError, ToolchainError
from workspace.core.paths import Layout
from workspace.core.records import Document
from workspace.repo.git.command import first_line, split
from workspace.repo.git.repository import Git

# References of one working tree alone (git-worktree(1), REFS): the other trees do not see them.
OWN_REFS = "refs/worktree"


def bring(git: Git, store: Path, commit: str, ref: str, *, run_log: RunLog) -> None:
    """Fetch a commit from another repository of this disk and make `ref` name it."""
    if git.resolve(ref) == commit:
        return
    # A commit that no reference leads to may be incomplete: a killed fetch leaves single objects.
    if is_kept(git, commit):
        git.set_ref(ref, commit)
        return
    lock.remove_packs(git.path_of("objects/pack"), git.path)
    git.fetch_from(store, f"+{commit}:{ref}", run_log=run_log)


def add(git: Git, path: Path, commit: str, *, run_log: RunLog) -> Git:
    """Make a linked working tree at `path`, HEAD detached at `commit`, without its files.

    A submodule's core.worktree has no effect there (git-config(1)). An incomplete tree of a killed
    run is made again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Forced twice, git replaces the records of a tree that was at this path.
    flags = ("--quiet", "--force", "--force", "--no-checkout", "--detach")
    git.write("worktree", "add", *flags, str(path.absolute()), commit, run_log=run_log)
    # Git does not sync the small files that make the folder a working tree.
    os.sync()
    return Git(path)


def forget(git: Git, path: Path) -> None:
    """Remove a linked working tree: its folder, and the repository's records of it.

    Other trees, even unreachable ones, stay. Not `git worktree remove`: killed in the middle, it
    leaves records that belong to no known folder.
    """
    if (path / ".git").is_file():
        shutil.rmtree(path, ignore_errors=True)
    own, folder = os.path.join(os.path.realpath(path), ".git"), git.path_of("worktrees")
    for gitdir in folder.glob("*/gitdir"):
        if gitdir.read_text(errors="surrogateescape").rstrip("\n") == own:
            # `gitdir`, which names the tree, goes last.
            for entry in set(gitdir.parent.iterdir()) - {gitdir}:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            shutil.rmtree(gitdir.parent)
    with contextlib.suppress(OSError):
        folder.rmdir()


def snapshot(
    git: Git,
    message: str,
    *,
    paths: Sequence[str] = (),
    gitlinks: Mapping[str, str] | None = None,
    after: str | None = None,
) -> str:
    """Commit the working content on HEAD and return the commit; HEAD itself if nothing differs.

    Nothing is moved. The commit `after` becomes a second parent. New files that are not ignored are
    included. With `paths` only files below them are taken, all others are as in HEAD; `gitlinks`
    are the commits of submodules. An index with conflicts is accepted.
    """
    with tempfile.TemporaryDirectory(prefix="workspace-index-") as folder:
        scratch = {"GIT_INDEX_FILE": f"{folder}/index"}
        _copy_index(git, Path(folder), scratch, from_head=bool(paths))
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
    parents = [flag for parent in (head, *others) if parent for flag in ("-p", parent)]
    return git.write("commit-tree", "-m", message, *parents, tree).out.strip()


def _copy_index(git: Git, folder: Path, env: Mapping[str, str], *, from_head: bool) -> None:
    """Fill the index that `env` names in `folder`, from HEAD or from the repository's index."""
    index = git.path_of("index")
    if from_head or not index.exists():
        git.write("read-tree", "HEAD", env=env)
        return
    # With its time: git reads a file again if its entry is as new as the index, because the file
    # was written in the same tick.
    shutil.copy2(index, folder / "index")
    # Edits of files that a user marked as unchanged (git-update-index(1)) are edits.
    git.write("update-index", "-q", "--really-refresh", env=env, check=False)


def require_way(git: Git, commit: str) -> None:
    """Raise CheckoutError where Git.move_to would be refused, as by an untracked file; move
    nothing.
    """
    git.write("update-index", "-q", "--refresh", check=False)
    git.write("read-tree", "-n", "-m", "-u", "HEAD", commit)


def delete_ref(git: Git, name: str) -> None:
    """Delete a reference."""
    git.write("update-ref", "-d", name)


def references(git: Git, prefix: str) -> Mapping[str, str]:
    """Return the references below `prefix`, with the object that each names."""
    lines = git.look("for-each-ref", "--format=%(objectname) %(refname)", prefix).out.splitlines()
    return {name: oid for oid, name in (line.split(" ", 1) for line in lines)}


def set_gitlink(git: Git, path: str, commit: str, *, run_log: RunLog | None = None) -> None:
    """Make the superproject's index name another commit of a submodule.

    This clears the skip-worktree bit.
    """
    git.write("update-index", "--add", "--cacheinfo", f"160000,{commit},{path}", run_log=run_log)


def products(git: Git, *below: str) -> tuple[str, ...]:
    """Return the build products below these folders: ignored files, without bytecode."""
    # The user's own ignore file names other files, such as those of an editor.
    args = ("-c", "core.excludesFile=/dev/null", "ls-files", "--others", "--ignored")
    listed = git.look(*args, "--exclude-standard", "-z", "--", *below).out
    return tuple(path for path in split(listed) if not path.endswith((".pyc", "/")))


def range_diff(git: Git, old: tuple[str, str], new: tuple[str, str]) -> str:
    """Return how the commits base..tip of two stacks correspond (git-range-diff(1)).

    The text is empty where a stack has no commit, because git needs two ranges.
    """
    if old[0] == old[1] or new[0] == new[1]:
        return ""
    return git.write("range-diff", "--no-color", f"{old[0]}..{old[1]}", f"{new[0]}..{new[1]}").out


def commits_between(git: Git, old: str, new: str) -> int | None:
    """Return the number of commits that `new` has and `old` lacks, or None for a missing commit."""
    answer = git.look("rev-list", "--count", f"{old}..{new}", "--", check=False)
    return int(answer.out) if answer.status == 0 else None


def are_alike(git: Git, first: str, second: str) -> bool:
    """Return whether both commits exist and have the same content and the same parents."""
    lines = git.look(
        "log",
        "--no-walk=unsorted",
        "--no-show-signature",
        "--format=%T %P",
        first,
        second,
        "--",
        check=False,
    ).out.splitlines()
    return len(lines) == 2 and lines[0] == lines[1]


def is_kept(git: Git, commit: str) -> bool:
    """Return whether HEAD or a reference of the repository leads to the commit.

    References of a linked working tree alone do not count.
    """
    if commit not in git.present((commit,)):
        return False
    if git.is_ancestor(commit, "HEAD"):
        return True
    return bool(
        git.look("for-each-ref", "--count=1", "--format=1", "--contains", commit).out.strip()
    )


def start_over(tree: Git, commit: str, paths: Sequence[str]) -> None:
    """Reset an unused working tree to a commit, whatever a killed `am` has left there.

    `paths` are those of the patches' files.
    """
    shutil.rmtree(tree.path_of("rebase-apply"), ignore_errors=True)
    # Git reads the old index before it writes a new one, and fails if it was cut short.
    tree.path_of("index").unlink(missing_ok=True)
    tree.write("reset", "--quiet", "--hard", commit)
    # Without an index git does not know that these files are those of patches, and `am` would not
    # overwrite them.
    for path in set(paths) - tree.entries(paths, commit).keys() if paths else ():
        (tree.path / path).unlink(missing_ok=True)


# Nothing here outlives the verb, so nothing has to reach the disk.
_UNSYNCED = ("-c", "core.fsync=none", "-c", "merge.directoryRenames=false")
_USAGE_ERROR = 129


@dataclass(frozen=True)
class Merged:
    """Result of a three-way merge: the tree, and after a conflict the `conflicted` paths.

    The tree then has conflict markers; git may not name all paths. `conflicted` is None without a
    conflict.
    """

    tree: str
    conflicted: tuple[str, ...] | None


class Trial:
    """One index that patches are applied to; made by `try_on`, gone at the end of its block."""

    def __init__(self, git: Git, folder: Path, tree: str, *, is_kept: bool) -> None:
        self._git, self._folder, self._is_kept = git, folder, is_kept
        self._env = {"GIT_INDEX_FILE": str(folder / f"index-{len(os.listdir(folder))}")}
        if not is_kept:
            self._env |= {
                "GIT_OBJECT_DIRECTORY": str(folder / "objects"),
                "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(git.path_of("objects")),
            }
        self._flags = () if is_kept else _UNSYNCED
        self._tree: str | None = None
        self.take(tree)

    def beside(self, tree: str) -> "Trial":
        """Return another index over the same objects."""
        return Trial(self._git, self._folder, tree, is_kept=self._is_kept)

    def take(self, tree: str) -> None:
        """Load a tree into the index."""
        self._run("read-tree", tree)
        self._tree = None

    def apply(self, patches: Sequence[Path], *, three_way: bool = False) -> bool:
        """Apply all patches or none, directly or by a merge of each file.

        A merge that fails leaves its conflicts in the index.
        """
        how = ("--3way",) if three_way else ()
        if patches and not self._applies(*how, *map(str, patches)):
            return False
        self._tree = None
        return True

    def holds(self, patch: Path) -> bool:
        """Return whether the index has the patch already: all of it can be reverted."""
        return self._applies("--check", "--reverse", str(patch))

    def tree(self) -> str:
        """Return the tree of the index, as 40 hex."""
        if self._tree is None:
            self._tree = self._run("write-tree", "--missing-ok").strip()
        return self._tree

    def merge(self, before: str, after: str) -> Merged:
        """Merge the changes from one tree to another into the tree of the index, as `am --3way`.

        Renames are followed; the index does not change. Raises ToolchainError for a git older than
        2.38, which cannot merge without a working tree (git-merge-tree(1)), and SourceError where
        contents are missing.
        """
        base = self._commit(before)
        ours, theirs = self._commit(self.tree(), base), self._commit(after, base)
        args = ("merge-tree", "--write-tree", "--name-only", "-z", "--no-messages", ours, theirs)
        answer = self._git.write(*self._flags, *args, env=self._env, check=False)
        if answer.status == _USAGE_ERROR:
            raise ToolchainError(
                "this git cannot merge without a working tree, which a forecast needs; that takes"
                " git 2.38 or later",
                hint=hints.text("repo.git_version"),
            )
        if answer.status not in (0, 1):
            raise SourceError(
                f"git merge-tree in {self._git.path}: {first_line(answer.err)}",
                hint=hints.text("repo.delete_store", path=self._git.path),
            )
        tree, *conflicted = split(answer.out)
        return Merged(tree.strip(), tuple(sorted(set(conflicted))) if answer.status else None)

    def _commit(self, tree: str, *parents: str) -> str:
        flags = [flag for parent in parents for flag in ("-p", parent)]
        return self._run("commit-tree", "-m", "trial", *flags, tree).strip()

    def _run(self, *args: str) -> str:
        return self._git.write(*self._flags, *args, env=self._env).out

    def _applies(self, *args: str) -> bool:
        """Return whether git applied patches to the index.

        With --3way git writes a file that both sides add (load_current in its apply.c), so that it
        runs in an empty folder.
        """
        apply = (*self._flags, "apply", "--cached", "--whitespace=nowarn", *args)
        if "--3way" not in args:
            return self._git.write(*apply, env=self._env, check=False).status == 0
        with tempfile.TemporaryDirectory(prefix="workspace-tree-") as tree:
            git_dir = str(self._git.path_of("."))
            place = {**self._env, "GIT_DIR": git_dir, "GIT_WORK_TREE": tree}
            return self._git.write("-C", tree, *apply, env=place, check=False).status == 0


def paths_of(git: Git, patches: Sequence[Path]) -> tuple[frozenset[str], ...]:
    """Return the paths that each patch file changes, from one call of git."""
    if not patches:
        return ()
    listed = [
        entry.split("\t", 2)[2]
        for entry in split(
            git.look("apply", "--numstat", "-z", *map(str, patches), check=False).out
        )
    ]
    # format-patch begins every file with this line, and no other line of a patch can begin so.
    counts = [b"\n".join((b"", patch.read_bytes())).count(b"\ndiff --git ") for patch in patches]
    if sum(counts) != len(listed):
        return tuple(frozenset(git.patch_paths(patch)) for patch in patches)
    ends = list(itertools.accumulate(counts))
    return tuple(
        frozenset(listed[end - count : end]) for count, end in zip(counts, ends, strict=True)
    )


@contextlib.contextmanager
def try_on(git: Git, tree: str, *, is_kept: bool = False) -> Iterator[Trial]:
    """Yield a Trial that begins with the tree of a commit, as 40 hex.

    If `is_kept`, the repository has the trees afterwards.
    """
    with tempfile.TemporaryDirectory(prefix="workspace-trial-") as folder:
        os.mkdir(f"{folder}/objects")
        yield Trial(git, Path(folder), tree, is_kept=is_kept)


def tree_after(git: Git, base: str, patches: Sequence[Path]) -> str | None:
    """Return the tree of `base` with all patches applied, or None on a conflict.

    Neither files nor the repository change. As in `am`, a patch that does not apply directly is
    merged three-way.
    """
    with try_on(git, base) as trial:
        is_applied = trial.apply(patches) or all(
            trial.apply([patch]) or trial.apply([patch], three_way=True) for patch in patches
        )
        return trial.tree() if is_applied else None


@dataclass(frozen=True)
class _Move(records.Record):
    """A move that is not finished. A git operation of the first edition names no commits."""

    source: str = ""
    to: str = ""

    @classmethod
    def upgrade(cls, document: Document) -> Document:
        return {**document, "source": document.get("from") or ""}


def move(layout: Layout, project: str, git: Git, target: str, *, run_log: RunLog) -> None:
    """Move the checkout to a commit, as Git.move_to does, with a record until it ends."""
    note, source = layout.moving(project), git.head() or ""
    records.write(note, {"from": source, "to": target})
    try:
        git.move_to(target, before=source, run_log=run_log)
    except CheckoutError:
        # Refused before any file was touched: the next run must not finish it.
        note.unlink(missing_ok=True)
        raise
    note.unlink(missing_ok=True)


def is_move_begun(layout: Layout, project: str) -> bool:
    """Return whether a move was begun and not finished."""
    return layout.moving(project).exists()


def finish_move(layout: Layout, project: str, git: Git, *, run_log: RunLog) -> bool:
    """Finish a move that a killed run began.

    Return False, with no file touched, where there is none, or where the changes may be the user's.
    A killed move leaves HEAD unmoved, each differing file as one of the two commits has it, or
    begun, and perhaps an index.lock.
    """
    note = layout.moving(project)
    record = records.read(note, _Move)
    source, target = (record.source, record.to) if record else ("", "")
    is_done = (
        bool(source and target)
        and git.head() == source
        and len(git.present((source, target))) == len({source, target})
    )
    is_done = is_done and _finish_move(git, source, target, run_log)
    # The files are finished, or the user's from now on.
    note.unlink(missing_ok=True)
    return is_done


def _finish_move(git: Git, source: str, target: str, run_log: RunLog) -> bool:
    before, after = git.entries((), source), git.entries((), target)
    touched = sorted(
        path for path in before.keys() | after.keys() if before.get(path) != after.get(path)
    )
    now = git.entries((), None)
    changed = [path for path in touched if now.get(path) != after.get(path)]
    # An ignored file is in no listing: a file of the user may have the path of a new file.
    if not all(
        (path in now and now[path] == before.get(path))
        or _is_file_begun(git, path, after.get(path))
        for path in changed
    ):
        return False
    run_log.write(f"finishing the interrupted move of {git.path} to {target}")
    lock.remove_at_top(git.path_of("index").parent, git.path)
    git.read_index(target)
    for removed in (path for path in changed if path not in after):
        (git.path / removed).unlink(missing_ok=True)
    _remove_empty(
        git.path,
        {folder for path in touched if path not in after for folder in Path(path).parents[:-1]},
    )
    if written := [path for path in changed if path in after]:
        git.write_files(*written)
    # The index is new: without a refresh each status query would read all files.
    git.write("update-index", "-q", "--refresh", check=False)
    # As in Git.move_to: the files are on the disk before HEAD names them.
    os.sync()
    git.set_ref("HEAD", target)
    return True


def _remove_empty(top: Path, folders: Collection[Path]) -> None:
    """Remove folders that are now empty, as git does at the end of a move."""
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        with contextlib.suppress(OSError):
            (top / folder).rmdir()


def _is_file_begun(git: Git, path: str, entry: str | None) -> bool:
    """Return whether git began to write the file.

    The file is then missing, or holds the start of its new content.
    """
    file = git.path / path
    if not os.path.lexists(file):
        return True
    with contextlib.suppress(OSError):
        return (
            entry is not None
            and file.is_file()
            and git.blob(entry.split()[1]).startswith(file.read_bytes())
        )
    return False
