"""Where a repository stands before git itself goes on with an operation, kept so that one that was
killed, or lost its power, is taken back.

git syncs neither the files that it writes nor its notes on what is under way. Kept are these notes,
the index, what HEAD and its branch name, the content of tracked files, and of the others the names:
git writes over none of them, so what is new later is its own.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from workspace.core.files import read_regular
from workspace.repo.git import command
from workspace.repo.git.command import split
from workspace.repo.git.repository import Git, last_move, take_in

# At the top of its directory (git-am(1), git-rebase(1), git-merge(1), git-cherry-pick(1)); the
# index is replaced, never taken away.
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
    """`symbolic`: the branch that HEAD names; `branch`: that one, or the one that a rebase will
    move, at `tip`; `others`: files not tracked.
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
    # With its time: an entry is as new as the index where a file was written in the same tick, and
    # git then reads the file.
    _copy(index, folder / index.name)
    head, others = git.look("rev-parse", "--verify", "HEAD").out.strip(), _others(git)
    symbolic = git.look("symbolic-ref", "--quiet", "HEAD", check=False).out.strip() or None
    branch = symbolic or _rebased(index.parent)
    # Beside the repository, which would find them there already, and not sync its own.
    (folder / _OBJECTS).mkdir()
    with _content(git, but=others, objects=folder / _OBJECTS) as (_, tree):
        facts = Facts(head, symbolic, branch, git.resolve(branch) if branch else None, tree, others)
    (folder / _FACTS).write_text(json.dumps(asdict(facts)))


def restore(git: Git, folder: Path, *, ref: str, message: str) -> bool | None:
    """Bring the repository back to where `keep` found it. What lay there meanwhile, where that is
    anything else, is kept as a commit under `ref`.

    True where it did, and kept something; None where there is nothing that can be restored. False
    where HEAD was moved by somebody else: nothing is touched then, and it is the former content
    that is kept under `ref`.
    """
    facts = _read(git, folder)
    if facts is None:
        return None
    top = git.path_of("index").parent
    # Of a linked working tree what all of them share lies elsewhere.
    for place in {top, git.path_of("packed-refs").parent}:
        command.remove_at_top(place, git.path)
    if not _is_complete(top / "index"):
        _replace_index(top, folder)
    if not _is_left_so(git, facts.head):
        take_in(folder / _OBJECTS, git.path_of("objects"))
        git.set_ref(ref, _commit(git, message, facts.tree, facts.head, ref))
        return False
    with _content(git, but=facts.others) as (scratch, tree):
        is_other = (git.head(), tree) != (facts.head, facts.tree)
        if is_other:
            git.set_ref(ref, _commit(git, message, tree, git.head() or facts.head, ref))
            there = {"GIT_ALTERNATE_OBJECT_DIRECTORIES": str(folder / _OBJECTS)}
            git.write("read-tree", "-m", "-u", tree, facts.tree, env={**scratch, **there})
    for name in _NOTES:
        _remove(top / name)
        _copy(folder / name, top / name)
    _replace_index(top, folder)
    if facts.branch and facts.tip:
        git.set_ref(facts.branch, facts.tip)
    if facts.symbolic:
        git.write("symbolic-ref", "HEAD", facts.symbolic)
    elif (
        git.head() != facts.head
        or git.look("symbolic-ref", "--quiet", "HEAD", check=False).status == 0
    ):
        git.set_ref("HEAD", facts.head)
    git.write("update-index", "-q", "--refresh", check=False)
    os.sync()
    return True


def _is_complete(index: Path) -> bool:
    """Whether an index ends in the checksum of what it holds, or in zeros for none
    (gitformat-index(5)): git itself does not look.
    """
    content = index.read_bytes() if index.exists() else b""
    return content[-20:] in (hashlib.sha1(content[:-20]).digest(), bytes(20))


def _replace_index(top: Path, folder: Path) -> None:
    _copy(folder / "index", top / "index.restored")
    os.replace(top / "index.restored", top / "index")


def _read(git: Git, folder: Path) -> Facts | None:
    """What was kept, or None where that is not all there."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(read_regular(folder / _FACTS))
        facts = Facts(**{**known, "others": tuple(known["others"])})
        if (folder / "index").is_file() and facts.head in git.present((facts.head,)):
            return facts
    return None


def _is_left_so(git: Git, head: str) -> bool:
    """Whether HEAD is where it was, or where a git of the workspace's own has brought it."""
    now = git.head()
    if now in (None, head):
        return now == head
    if git.is_ancestor(head, now or "") and not git.has_own_commits(head, now or ""):
        return True
    # An abort goes back to the user's commits. This log may have been lost with the power.
    move = last_move(git)
    return move is not None and move.is_ours


@contextlib.contextmanager
def _content(
    git: Git, *, but: Collection[str], objects: Path | None = None
) -> Iterator[tuple[Mapping[str, str], str]]:
    """Work out the tree of the tracked files as they lie there, and of new ones that are not
    ignored, without those named.

    Yields with it the variables under which git has an index of that tree, in which each file
    counts as read. New objects go to the folder `objects`, else into the repository.
    """
    with tempfile.TemporaryDirectory(prefix="workspace-index-") as folder:
        scratch = {"GIT_INDEX_FILE": f"{folder}/index"}
        if objects:
            scratch |= {
                "GIT_OBJECT_DIRECTORY": str(objects),
                "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(git.path_of("objects")),
            }
        _copy(git.path_of("index"), Path(folder, "index"))
        # Edits of files that git was told to take for unchanged are edits.
        git.write("update-index", "-q", "--really-refresh", env=scratch, check=False)
        git.write("add", "--update", "--", ".", env=scratch)
        known = set(but)
        new = [path for path in _others(git) if path not in known]
        for start in range(0, len(new), _AT_ONCE):
            git.write("update-index", "--add", "--", *new[start : start + _AT_ONCE], env=scratch)
        yield scratch, git.write("write-tree", env=scratch).out.strip()


def _others(git: Git) -> tuple[str, ...]:
    """Files that git does not track and does not ignore; repositories in folders of their own are
    left out.
    """
    words = (
        "-c",
        "core.excludesFile=/dev/null",
        "ls-files",
        "--others",
        "--exclude-standard",
        "-z",
    )
    return tuple(path for path in split(git.look(*words).out) if not path.endswith("/"))


def _commit(git: Git, message: str, tree: str, head: str, ref: str) -> str:
    """A commit of the tree that leads to HEAD and to what `ref` has kept so far."""
    parents = dict.fromkeys(commit for commit in (head, git.resolve(ref)) if commit)
    return git.write(
        "commit-tree", "-m", message, *(word for parent in parents for word in ("-p", parent)), tree
    ).out.strip()


def _rebased(top: Path) -> str | None:
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
