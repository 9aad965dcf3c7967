"""What a move of the pin asks of git: a second working tree of one repository, commits kept under references, and the gitlink."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from workspace.core.journal import Journal
from workspace.source import leftover
from workspace.source.content import split
from workspace.source.git.repository import Git

# A reference of one working tree alone (git-worktree(1), REFS): the others do not see it.
OWN_REFS = "refs/worktree"


def bring(git: Git, store: Path, commit: str, ref: str, *, journal: Journal) -> None:
    """Fetch a commit from another repository of this disk and let `ref` name it."""
    if git.resolve(ref) == commit:
        return
    # One that is there and that nothing leads to may lack the rest: a fetch that was killed leaves single objects.
    if is_kept(git, commit):
        git.set_ref(ref, commit)
        return
    leftover.remove_packs(git.path_of("objects/pack"), git.path)
    words = ("--quiet", "--no-tags", "--no-write-fetch-head", "--recurse-submodules=no", str(store.absolute()), f"+{commit}:{ref}")
    git.write("fetch", *words, env={"GIT_ALLOW_PROTOCOL": "file"}, journal=journal)


def add(git: Git, path: Path, commit: str, *, journal: Journal) -> Git:
    """Make a linked working tree of the repository at `path`, HEAD detached at `commit`, no file written yet.

    A submodule's core.worktree does not count there (git-config(1)). A half-made one of a killed run is made anew.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_books(git, path)
    git.write("worktree", "add", "--quiet", "--force", "--force", "--no-checkout", "--detach", str(path.absolute()), commit, journal=journal)
    # Git itself syncs none of the small files that make it a working tree.
    os.sync()
    return Git(path)


def forget(git: Git, path: Path) -> None:
    """Take a linked working tree out of the repository's books, and its folder away; others, be they out of reach, are left alone.

    Not `git worktree remove`: one that was killed leaves books of which nobody can tell whose they were.
    """
    if (path / ".git").is_file():
        shutil.rmtree(path, ignore_errors=True)
    _drop_books(git, path)


def _drop_books(git: Git, path: Path) -> None:
    """Remove what the repository knows of a linked working tree at `path`, whose .git is gone; what says so goes last.

    Git cannot read what a power cut has cut short of it, and then neither makes nor lists any working tree, nor fetches.
    """
    ours, kept = os.path.join(os.path.realpath(path), ".git"), git.path_of("worktrees")
    for books in kept.glob("*"):
        leads_to = _first_line(books / "gitdir")
        # One that leads nowhere may have been anybody's; without an index nobody has worked there.
        is_begun = books.name.startswith(path.name) and ours.startswith(leads_to) and not (books / "index").exists()
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


def snapshot(git: Git, message: str, *, paths: Sequence[str] = (), gitlinks: Mapping[str, str] | None = None, after: str | None = None) -> str:
    """Commit the working content on HEAD without moving anything, and return the commit: HEAD itself where nothing differs.

    It leads to the commit `after` too, where there is one.

    New files that are not ignored go in. With `paths` only what lies below those counts and all else is as in HEAD; `gitlinks`
    are the commits of submodules. An index with conflicts is no hindrance.
    """
    with tempfile.TemporaryDirectory(prefix="workspace-index-") as folder:
        aside = {"GIT_INDEX_FILE": f"{folder}/index"}
        index = git.path_of("index")
        if paths or not index.exists():
            git.write("read-tree", "HEAD", env=aside)
        else:
            # With its time: an entry is as new as the index where a file was written in the same tick, and git then reads the file.
            shutil.copy2(index, folder + "/index")
            # Edits of files that git was told to take for unchanged are edits.
            git.write("update-index", "-q", "--really-refresh", env=aside, check=False)
        tracked = git.write("ls-files", "-z", "--", *paths, env=aside).out if paths else ""
        present = [path for path in paths if (git.path / path).exists() or any(name == path or name.startswith(f"{path}/") for name in split(tracked))]
        if present or not paths:
            git.write("add", "--all", "--", *(present or ["."]), env=aside)
        for path, commit in (gitlinks or {}).items():
            git.write("update-index", "--add", "--cacheinfo", f"160000,{commit},{path}", env=aside)
        tree = git.write("write-tree", env=aside).out.strip()
    head = git.head()
    others = [after] if after and after != head and not (head and git.is_ancestor(after, head)) else []
    if head is not None and git.tree(head) == tree and not others:
        return head
    parents = [word for parent in (head, *others) if parent for word in ("-p", parent)]
    return git.write("commit-tree", "-m", message, *parents, tree).out.strip()


def require_way(git: Git, commit: str) -> None:
    """Raise CheckoutError where Git.move_to would be refused, as by an untracked file that the commit has too; nothing is moved."""
    git.write("update-index", "-q", "--refresh", check=False)
    git.write("read-tree", "-n", "-m", "-u", "HEAD", commit)


def delete_ref(git: Git, name: str) -> None:
    git.write("update-ref", "-d", name)


def references(git: Git, prefix: str) -> Mapping[str, str]:
    """The references below `prefix`, with the object that each names."""
    lines = git.look("for-each-ref", "--format=%(objectname) %(refname)", prefix).out.splitlines()
    return {name: oid for oid, name in (line.split(" ", 1) for line in lines)}


def set_gitlink(git: Git, path: str, commit: str, *, journal: Journal | None = None) -> None:
    """Let the superproject's index name another commit of a submodule. The skip-worktree bit is lost by it."""
    git.write("update-index", "--add", "--cacheinfo", f"160000,{commit},{path}", journal=journal)


def products(git: Git, *below: str) -> tuple[str, ...]:
    """Files below these folders that git neither tracks nor sees, by the repository's own word: what a build left there, bytecode aside."""
    # The user's own ignore file names other things: what an editor leaves.
    words = ("-c", "core.excludesFile=/dev/null", "ls-files", "--others", "--ignored", "--exclude-standard", "-z", "--", *below)
    return tuple(path for path in split(git.look(*words).out) if not path.endswith((".pyc", "/")))


def range_diff(git: Git, old: tuple[str, str], new: tuple[str, str]) -> str:
    """How the commits base..tip of two stacks correspond (git-range-diff(1)); nothing where one has none, which git takes for no range."""
    if old[0] == old[1] or new[0] == new[1]:
        return ""
    return git.write("range-diff", "--no-color", f"{old[0]}..{old[1]}", f"{new[0]}..{new[1]}").out


def commits_between(git: Git, old: str, new: str) -> int | None:
    """How many commits `new` has that `old` has not; None where one of them is not there."""
    answer = git.look("rev-list", "--count", f"{old}..{new}", "--", check=False)
    return int(answer.out) if answer.status == 0 else None


def are_alike(git: Git, one: str, other: str) -> bool:
    """Whether two commits are there that have the same content and the same parents."""
    lines = git.look("log", "--no-walk=unsorted", "--no-show-signature", "--format=%T %P", one, other, "--", check=False).out.splitlines()
    return len(lines) == 2 and lines[0] == lines[1]


def is_kept(git: Git, commit: str) -> bool:
    """Whether a reference of the repository, its HEAD included, leads to the commit; a linked tree's own does not count."""
    if commit not in git.present((commit,)):
        return False
    if git.is_ancestor(commit, "HEAD"):
        return True
    return bool(git.look("for-each-ref", "--count=1", "--format=1", "--contains", commit).out.strip())


def start_over(tree: Git, commit: str, paths: Sequence[str]) -> None:
    """Bring a working tree in which nobody has worked to a commit, whatever an `am` of files at these paths has left that was killed or lost its power."""
    shutil.rmtree(tree.path_of("rebase-apply"), ignore_errors=True)
    # Git reads it before it writes it anew, and gives up at one that was cut short.
    tree.path_of("index").unlink(missing_ok=True)
    tree.write("reset", "--quiet", "--hard", commit)
    # Without it git no longer knows which files are those of patches, and `am` would not write over them.
    for path in set(paths) - tree.entries(paths, commit).keys() if paths else ():
        (tree.path / path).unlink(missing_ok=True)
