"""A checkpoint of a repository, taken before git continues an operation, and its restoration.

git syncs neither the files that it writes nor its notes on the operation. A checkpoint keeps these
notes, the index, HEAD and its branch, the content of tracked files, and the names of the others:
git overwrites no untracked file, so a new one is git's own.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from workspace.core import records
from workspace.repo.git import command
from workspace.repo.git.command import split
from workspace.repo.git.repository import Git, last_move, take_in

# At the top of the git directory (git-am(1), git-rebase(1), git-merge(1), git-cherry-pick(1)). The
# index is replaced, never removed.
_NOTES = (
    *(
        "rebase-apply",
        "rebase-merge",
        "sequencer",
        "MERGE_HEAD",
        "MERGE_MODE",
        "MERGE_MSG",
        "MERGE_RR",
        "AUTO_MERGE",
        "SQUASH_MSG",
    ),
    *("CHERRY_PICK_HEAD", "REVERT_HEAD", "REBASE_HEAD", "ORIG_HEAD"),
)
_FACTS, _OBJECTS = "facts.json", "objects"
_AT_ONCE = 1000


@dataclass(frozen=True)
class Facts:
    """The state of a repository.

    `symbolic`: the branch that HEAD names; `branch`: that branch, or the branch that a rebase will
    move, at `tip`; `others`: untracked files.
    """

    head: str
    symbolic: str | None
    branch: str | None
    tip: str | None
    tree: str
    others: tuple[str, ...]


def keep(git: Git, folder: Path) -> None:
    """Write into an empty folder what `restore` needs. Raises OSError. The caller syncs."""
    index = git.path_of("index")
    for name in _NOTES:
        _copy(index.parent / name, folder / name)
    # With its time: git reads a file again if its entry is as new as the index, because the file
    # was written in the same tick.
    _copy(index, folder / index.name)
    head, others = git.look("rev-parse", "--verify", "HEAD").out.strip(), _others(git)
    symbolic = git.look("symbolic-ref", "--quiet", "HEAD", check=False).out.strip() or None
    branch = symbolic or _rebased(index.parent)
    # Outside of the repository: git would not write again, and sync, the objects that it has.
    (folder / _OBJECTS).mkdir()
    with _content(git, but=others, objects=folder / _OBJECTS) as (_, tree):
        facts = Facts(head, symbolic, branch, git.resolve(branch) if branch else None, tree, others)
    (folder / _FACTS).write_bytes(records.encode(facts))


def restore(git: Git, folder: Path, *, ref: str, message: str) -> bool | None:
    """Return the repository to the state that `keep` recorded; commit other content as `ref`.

    Return True if that was done, None if the checkpoint is incomplete, and False if HEAD was moved
    by another program: then nothing is touched, and `ref` keeps the recorded content.
    """
    facts = _read(git, folder)
    if facts is None:
        return None
    top = git.path_of("index").parent
    # What linked working trees share is in another folder.
    for place in {top, git.path_of("packed-refs").parent}:
        command.remove_at_top(place, git.path)
    if not _is_complete(top / "index"):
        _replace_index(top, folder)
    if not _is_head_ours(git, facts.head):
        take_in(folder / _OBJECTS, git.path_of("objects"))
        git.set_ref(ref, _commit(git, message, facts.tree, facts.head, ref))
        return False
    with _content(git, but=facts.others) as (scratch, tree):
        is_other = (git.head(), tree) != (facts.head, facts.tree)
        if is_other:
            git.set_ref(ref, _commit(git, message, tree, git.head() or facts.head, ref))
            recorded = {"GIT_ALTERNATE_OBJECT_DIRECTORIES": str(folder / _OBJECTS)}
            git.write("read-tree", "-m", "-u", tree, facts.tree, env={**scratch, **recorded})
    for name in _NOTES:
        _remove(top / name)
        _copy(folder / name, top / name)
    _replace_index(top, folder)
    _restore_head(git, facts)
    git.write("update-index", "-q", "--refresh", check=False)
    os.sync()
    return True


def _restore_head(git: Git, facts: Facts) -> None:
    """Make HEAD and its branch name what they named before."""
    if facts.branch and facts.tip:
        git.set_ref(facts.branch, facts.tip)
    if facts.symbolic:
        git.write("symbolic-ref", "HEAD", facts.symbolic)
    elif (
        git.head() != facts.head
        or git.look("symbolic-ref", "--quiet", "HEAD", check=False).status == 0
    ):
        git.set_ref("HEAD", facts.head)


def _is_complete(index: Path) -> bool:
    """Return whether an index ends in the checksum of its content, or in zeros
    (gitformat-index(5)).

    git itself does not check it.
    """
    content = index.read_bytes() if index.exists() else b""
    return content[-20:] in (hashlib.sha1(content[:-20]).digest(), bytes(20))


def _replace_index(top: Path, folder: Path) -> None:
    _copy(folder / "index", top / "index.restored")
    os.replace(top / "index.restored", top / "index")


def _read(git: Git, folder: Path) -> Facts | None:
    """Return the recorded state, or None where the checkpoint is incomplete."""
    facts = records.read(folder / _FACTS, Facts)
    is_complete = (
        facts is not None
        and (folder / "index").is_file()
        and facts.head in git.present((facts.head,))
    )
    return facts if is_complete else None


def _is_head_ours(git: Git, head: str) -> bool:
    """Return whether HEAD is unmoved, or was moved by a git that the workspace started."""
    now = git.head()
    if now in (None, head):
        return now == head
    if git.is_ancestor(head, now or "") and not git.has_own_commits(head, now or ""):
        return True
    # An abort returns to the user's commits. A power cut may have lost this entry of the reflog.
    move = last_move(git)
    return move is not None and move.is_ours


@contextlib.contextmanager
def _content(
    git: Git, *, but: Collection[str], objects: Path | None = None
) -> Iterator[tuple[Mapping[str, str], str]]:
    """Yield variables of an index that holds the working content, and its tree.

    That is the tracked files as they are, and new files that are not ignored, without those named
    in `but`. In that index each file counts as read. New objects go to the folder `objects`, else
    into the repository.
    """
    with tempfile.TemporaryDirectory(prefix="workspace-index-") as folder:
        scratch = {"GIT_INDEX_FILE": f"{folder}/index"}
        if objects:
            scratch |= {
                "GIT_OBJECT_DIRECTORY": str(objects),
                "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(git.path_of("objects")),
            }
        _copy(git.path_of("index"), Path(folder, "index"))
        # Edits of files that a user marked as unchanged (git-update-index(1)) are edits.
        git.write("update-index", "-q", "--really-refresh", env=scratch, check=False)
        git.write("add", "--update", "--", ".", env=scratch)
        known = set(but)
        new = [path for path in _others(git) if path not in known]
        for start in range(0, len(new), _AT_ONCE):
            git.write("update-index", "--add", "--", *new[start : start + _AT_ONCE], env=scratch)
        yield scratch, git.write("write-tree", env=scratch).out.strip()


def _others(git: Git) -> tuple[str, ...]:
    """Return files that git neither tracks nor ignores, without repositories in subfolders."""
    args = ("-c", "core.excludesFile=/dev/null", "ls-files", "--others", "--exclude-standard", "-z")
    return tuple(path for path in split(git.look(*args).out) if not path.endswith("/"))


def _commit(git: Git, message: str, tree: str, head: str, ref: str) -> str:
    """Commit the tree on HEAD and on the commit that `ref` names so far; return the commit."""
    parents = dict.fromkeys(commit for commit in (head, git.resolve(ref)) if commit)
    flags = [flag for parent in parents for flag in ("-p", parent)]
    return git.write("commit-tree", "-m", message, *flags, tree).out.strip()


def _rebased(top: Path) -> str | None:
    """Return the branch that a rebase under way will move, or None."""
    for name in ("rebase-merge", "rebase-apply"):
        with contextlib.suppress(OSError):
            branch = (top / name / "head-name").read_text().strip()
            return branch if branch.startswith("refs/heads/") else None
    return None


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    elif source.exists():
        shutil.copy2(source, target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
