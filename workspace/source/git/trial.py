"""Patches tried on a commit with an index and an object directory of their own: no file, ref or object of the repository is touched."""

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.core.errors import SourceError, ToolchainError
from workspace.source.content import first_line, split
from workspace.source.git.repository import Git

# Nothing here outlives the verb, so nothing has to reach the disk.
_FLEETING = ("-c", "core.fsync=none", "-c", "merge.directoryRenames=false")
_USAGE = 129


@dataclass(frozen=True)
class Merged:
    """What a three-way merge gave: the tree, or with conflict markers in it and the `conflicted` paths, as far as git names them."""

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
        """Apply patches as they stand, or by a merge of each file, all of them or none. A merge that failed leaves its conflicts in the index."""
        how = ("--3way",) if three_way else ()
        if self._run("apply", "--cached", "--whitespace=nowarn", *how, *map(str, patches), check=False)[0] != 0:
            return False
        self._tree = None
        return True

    def holds(self, patch: Path) -> bool:
        """Whether all of a patch can be taken back from the index: it is there already."""
        return self._run("apply", "--cached", "--check", "--reverse", "--whitespace=nowarn", str(patch), check=False)[0] == 0

    def tree(self) -> str:
        """The tree of the index, as 40 hex."""
        if self._tree is None:
            self._tree = self._run("write-tree", "--missing-ok")[1].strip()
        return self._tree

    def merge(self, before: str, after: str) -> Merged:
        """Bring what lies between two trees into the tree of the index, as `am --3way` does, renames followed. The index stays as it is.

        Raises ToolchainError for a git older than 2.38, which has no merge without a working tree (git-merge-tree(1)), and SourceError
        where contents are missing.
        """
        base = self._commit(before)
        ours, theirs = self._commit(self.tree(), base), self._commit(after, base)
        words = ("merge-tree", "--write-tree", "--name-only", "-z", "--no-messages", ours, theirs)
        answer = self._git.write(*_FLEETING, *words, env=self._env, check=False)
        if answer.status == _USAGE:
            raise ToolchainError("this git cannot merge without a working tree, which a forecast needs: 2.38 is the first that can", hint="git --version")
        if answer.status not in (0, 1):
            raise SourceError(f"git merge-tree in {self._git.path}: {first_line(answer.err)}", hint=f"rm -rf {self._git.path}    it is made anew")
        tree, *conflicted = split(answer.out)
        return Merged(tree.strip(), tuple(sorted(set(conflicted))) if answer.status else None)

    def _commit(self, tree: str, *parents: str) -> str:
        return self._run("commit-tree", "-m", "trial", *(word for parent in parents for word in ("-p", parent)), tree)[1].strip()

    def _run(self, *words: str, check: bool = True) -> tuple[int, str]:
        answer = self._git.write(*_FLEETING, *words, env=self._env, check=check)
        return answer.status, answer.out


def paths_of(git: Git, patches: Sequence[Path]) -> tuple[frozenset[str], ...]:
    """The paths that each patch file changes, asked in one call."""
    if not patches:
        return ()
    listed = [entry.split("\t", 2)[2] for entry in split(git.look("apply", "--numstat", "-z", *map(str, patches), check=False).out)]
    # format-patch begins every file with this line, and nothing else in a patch can begin so.
    counts = [b"\n".join((b"", patch.read_bytes())).count(b"\ndiff --git ") for patch in patches]
    if sum(counts) != len(listed):
        return tuple(frozenset(git.patch_paths(patch)) for patch in patches)
    ends = list(itertools.accumulate(counts))
    return tuple(frozenset(listed[end - count : end]) for count, end in zip(counts, ends, strict=True))


@contextlib.contextmanager
def on(git: Git, tree: str) -> Iterator[Trial]:
    """Begin with the tree of a commit, as 40 hex."""
    with tempfile.TemporaryDirectory(prefix="workspace-trial-") as folder:
        os.mkdir(f"{folder}/objects")
        yield Trial(git, Path(folder), tree)
