"""What a bisection asks of git: the commits between two, one with patches carried along, and what a commit did.

Nothing here touches a reference, an index or a file: objects are added at most, and `git bisect` of the user's own is left alone.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.core.journal import Journal
from workspace.core.settings import Settings
from workspace.source.content import split
from workspace.source.git import history
from workspace.source.git.repository import Git


@dataclass(frozen=True)
class Commit:
    oid: str
    parents: tuple[str, ...]
    subject: str


@dataclass(frozen=True)
class Carried:
    """A commit with patches on it: `tip`, None where `failing` does not apply. `left_out` are those that it has already."""

    tip: str | None
    left_out: tuple[str, ...] = ()
    failing: str | None = None


@dataclass(frozen=True)
class Deed:
    """What a commit did: lines added and removed by path, None where they are not lines, or not there to be counted."""

    oid: str
    subject: str
    author: str
    date: str
    changes: Mapping[str, tuple[int | None, int | None]]


def between(git: Git, good: str, bad: str) -> tuple[Commit, ...]:
    """The commits that `bad` leads to and `good` does not, merges included, parents first."""
    words = ("log", "--topo-order", "--reverse", "--no-show-signature", "--no-color", "--no-notes", "-z", "--format=%H%x01%P%x01%s")
    records = (record.split("\x01", 2) for record in split(git.look(*words, bad, f"^{good}", "--").out))
    return tuple(Commit(oid, tuple(parents.split()), subject) for oid, parents, subject in records)


def forks(git: Git, one: str, other: str) -> tuple[str, ...]:
    """Where two histories parted (git-merge-base(1), --all); none where they have nothing in common."""
    return tuple(git.look("merge-base", "--all", one, other, check=False).out.split())


def subject(git: Git, commit: str) -> str:
    return git.look("log", "-1", "--no-show-signature", "--no-color", "--format=%s", commit, "--").out.rstrip("\n")


def tags(git: Git) -> tuple[str, ...]:
    return tuple(git.look("for-each-ref", "--format=%(refname:strip=2)", "refs/tags").out.split())


def complete(git: Git, present: str, commit: str, settings: Settings, *, journal: Journal) -> None:
    """Fetch, all at once, what a partial clone lacks of the files of `commit` that differ from those of `present`. Raises SourceError."""
    if git.setting("remote.origin.promisor") == "true":
        git.talk(("diff", "--shortstat", "--no-renames", present, commit), settings, journal, lambda line: None)


def carried(git: Git, commit: str, patches: Sequence[Path]) -> Carried:
    """Put patches on a commit, as `am --3way` would, without those that it has already. The same input gives the same tip."""
    left_out: list[str] = []
    with tempfile.TemporaryDirectory(prefix="workspace-index-") as folder:
        aside = {"GIT_INDEX_FILE": f"{folder}/index"}

        def applies(*words: str) -> bool:
            return git.write("apply", "--cached", "--whitespace=nowarn", *words, env=aside, check=False).status == 0

        def tree() -> str:
            return git.write("write-tree", "--missing-ok", env=aside).out.strip()

        git.write("read-tree", commit, env=aside)
        if patches and not applies(*map(str, patches)):
            for patch in patches:
                before = tree()
                if applies(str(patch)):
                    continue
                if not applies("--check", "--reverse", str(patch)) and not applies("--3way", str(patch)):
                    return Carried(None, tuple(left_out), patch.name)
                left_out += [patch.name] if tree() == before else []
        made = tree()
    if made == git.tree(commit):
        return Carried(commit, tuple(left_out))
    date = git.look("log", "-1", "--no-show-signature", "--format=%cd", "--date=raw", commit, "--").out.strip()
    dates = {"GIT_AUTHOR_DATE": f"@{date}", "GIT_COMMITTER_DATE": f"@{date}"}
    tip = git.write("commit-tree", "-p", commit, "-m", f"{commit[:12]} with the patches of the workspace", made, env=dates).out.strip()
    return Carried(tip, tuple(left_out))


def deed(git: Git, commit: str) -> Deed:
    """Tell what a commit did, a merge against its first parent. A partial clone may lack what the lines are counted from."""
    form = ("--no-show-signature", "--no-color", "--no-notes", "-z", "--format=%s%x01%an%x01%as")
    subject, author, date = git.look("log", "-1", *form, commit, "--").out.rstrip("\0\n").split("\x01")
    words = ("show", "--format=", "-m", "--first-parent", "--no-renames", "--no-ext-diff", "--no-textconv", "--no-color", "--no-show-signature", "-z")
    counted = git.look(*words, "--numstat", commit, "--", check=False)
    changes: dict[str, tuple[int | None, int | None]] = {}
    if counted.status == 0:
        for entry in split(counted.out):
            added, removed, path = entry.lstrip("\n").split("\t", 2)
            changes[path] = (int(added), int(removed)) if added.isdigit() else (None, None)
    else:
        changes = dict.fromkeys(split(git.look(*words, "--name-only", commit, "--").out), (None, None))
    return Deed(commit, subject, author, date, changes)


def last_in_common(git: Git, commits: Iterable[str], bad: str) -> str | None:
    """Where the nearest of the given commits left the history of `bad`, or stands in it; None where none did before `bad` itself."""
    parted = {fork for commit in commits for fork in forks(git, commit, bad)[:1]} - {bad}
    return min(parted, key=lambda fork: history.ahead(git, fork, bad), default=None)
