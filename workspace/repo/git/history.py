"""Changes between two commits: changed and renamed files, commits by path, patches in upstream.

Everything here reads only what the repository holds, except `complete_range` and `carried`.
"""

import datetime
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.core.console import RunLog
from workspace.core.settings import Settings
from workspace.repo.git import command
from workspace.repo.git.command import split
from workspace.repo.git.repository import Git
from workspace.repo.git.worktree import try_on

_ABSENT = "0" * 40
# git's own default for renames (git-diff(1), -M).
_SIMILARITY = "-M50%"


@dataclass(frozen=True)
class Commit:
    """A commit, and for each changed path the blob OIDs before and after; None: no such file."""

    oid: str
    subject: str
    paths: Mapping[str, tuple[str | None, str | None]]

    def __str__(self) -> str:
        return f"{self.oid[:12]} {self.subject}"


def changed(git: Git, old: str, new: str) -> dict[str, tuple[str | None, str | None]]:
    """Return the blob OIDs before and after, by path, of all files that differ between two trees.

    Commits count as their trees.
    """
    return dict(
        _raw(
            split(
                git.look(
                    "diff-tree", "-r", "--raw", "--no-renames", "--no-abbrev", "-z", old, new
                ).out
            )
        )
    )


def log(git: Git, old: str, new: str, paths: Sequence[str]) -> tuple[Commit, ...]:
    """Return the commits in old..new that touched a path, newest first, without merges."""
    if not paths:
        return ()
    args = (
        "log",
        "--no-merges",
        "--raw",
        "--full-diff",
        "--no-renames",
        "--no-abbrev",
        "--no-show-signature",
        "--no-color",
        "-z",
        "--format=%x01%H %s",
    )
    commits = []
    for record in git.look(*args, f"{old}..{new}", "--", *paths).out.split("\x01")[1:]:
        head, *entries = [entry.strip("\n") for entry in split(record)]
        oid, _, subject = head.partition(" ")
        commits.append(Commit(oid, subject, dict(_raw([entry for entry in entries if entry]))))
    return tuple(commits)


def touching(commits: Iterable[Commit], paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return for each path the commits that touched it, as `12hex subject`, newest first."""
    known = tuple(commits)
    return {path: tuple(str(commit) for commit in known if path in commit.paths) for path in paths}


def ahead(git: Git, old: str, new: str) -> int:
    """Return the number of commits that `new` has and `old` lacks."""
    return int(git.look("rev-list", "--count", f"{old}..{new}", "--").out)


def described(git: Git, commit: str) -> tuple[str, int] | None:
    """Return the nearest tag `v…` before a commit, and the number of commits since, or None.

    setuptools-scm asks for the same.
    """
    answer = git.look("describe", "--tags", "--long", "--match=v[0-9]*", commit, check=False)
    if answer.status != 0:
        return None
    tag, count, _ = answer.out.strip().rsplit("-", 2)
    return tag, int(count)


def nearest_tag(git: Git, commit: str, tags: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """Return the tag, with its commit, that is the nearest ancestor of a commit, or None."""
    known = set(git.look("rev-list", commit, "--").out.split())
    found = [(tag, oid) for tag, oid in tags if oid in known]
    if not found:
        return None
    oids = dict.fromkeys(oid for _, oid in found)
    # Those that no other one of them leads to.
    last = git.look("merge-base", "--independent", *oids).out.split()
    return min(
        (pair for pair in found if pair[1] in last), key=lambda pair: ahead(git, pair[1], commit)
    )


def date_of(git: Git, commit: str) -> datetime.datetime:
    """Return the committer date of a commit, with its time zone."""
    return datetime.datetime.fromisoformat(
        git.look("log", "-1", "--no-show-signature", "--format=%cI", commit, "--").out.strip()
    )


def renames(
    git: Git,
    ends: tuple[str, str],
    gone: Iterable[str],
    differing: Mapping[str, tuple[str | None, str | None]],
) -> dict[str, str]:
    """Return the new paths of the `gone` paths between two commits, as far as git finds them.

    Only new files of the same type are compared. `differing` is the result of changed().
    """
    sought = [path for path in gone if path in differing]
    types = {path.rpartition("/")[2].rpartition(".")[2] for path in sought}
    added = [
        path
        for path, (before, _) in differing.items()
        if before is None and path.rpartition("/")[2].rpartition(".")[2] in types
    ]
    if not sought or not added:
        return {}
    args = ("diff-tree", "-r", _SIMILARITY, "--diff-filter=R", "--name-status", "-z", *ends, "--")
    listed = iter(split(git.look(*args, *sought, *added, check=False).out))
    return {
        before: after
        for _, before, after in zip(listed, listed, listed, strict=False)
        if before in sought
    }


def blobs(git: Git, oids: Iterable[str]) -> dict[str, bytes]:
    """Return the content of blobs, by OID, in one call; a missing blob is left out."""
    requested = list(dict.fromkeys(oids))
    answer = (
        git.pipe("".join(f"{oid}\n" for oid in requested).encode(), "cat-file", "--batch")
        if requested
        else b""
    )
    contents, place = {}, 0
    while place < len(answer):
        end = answer.index(b"\n", place)
        head, place = answer[place:end].split(b" "), end + 1
        if len(head) == 3:
            size = int(head[2])
            contents[head[0].decode()] = answer[place : place + size]
            place += size + 1
    return contents


def _raw(entries: Sequence[str]) -> Iterator[tuple[str, tuple[str | None, str | None]]]:
    """Yield pairs from `:mode mode oid oid status`, path (git-diff-tree(1), RAW OUTPUT FORMAT)."""
    for meta, path in zip(entries[::2], entries[1::2], strict=True):
        _, _, before, after, _ = meta.split(" ")
        yield path, (None if before == _ABSENT else before, None if after == _ABSENT else after)


@dataclass(frozen=True)
class Carried:
    """A commit with patches on it: `tip` is None where `failing` does not apply.

    `left_out` are patches that the commit has already.
    """

    tip: str | None
    left_out: tuple[str, ...] = ()
    failing: str | None = None


@dataclass(frozen=True)
class Move:
    """The newest entry of HEAD's reflog: its message, and the commit before it.

    `is_ours`: a verb of the workspace made the move.
    """

    message: str
    before: str
    is_ours: bool


def last_move(git: Git) -> Move | None:
    """Return the last move of HEAD, or None where the reflog has fewer than two entries."""
    args = (
        "log",
        "--walk-reflogs",
        "-2",
        "--no-show-signature",
        "--no-color",
        "--format=%H%x00%ge%x00%gs",
        "HEAD",
        "--",
    )
    entries = [line.split("\0") for line in git.look(*args, check=False).out.splitlines()]
    if len(entries) != 2 or any(len(entry) != 3 for entry in entries):
        return None
    (_, email, message), (before, _, _) = entries
    return Move(message, before, email == command.IDENTITY[1])


def forks(git: Git, first: str, second: str) -> tuple[str, ...]:
    """Return the commits where two histories parted (git-merge-base(1), --all), or none."""
    return tuple(git.look("merge-base", "--all", first, second, check=False).out.split())


def subject(git: Git, commit: str) -> str:
    """Return the subject of a commit."""
    return git.look(
        "log", "-1", "--no-show-signature", "--no-color", "--format=%s", commit, "--"
    ).out.rstrip("\n")


def tags(git: Git) -> tuple[str, ...]:
    """Return the names of all tags."""
    return tuple(git.look("for-each-ref", "--format=%(refname:strip=2)", "refs/tags").out.split())


def complete_range(
    git: Git, present: str, commit: str, settings: Settings, *, run_log: RunLog
) -> None:
    """Fetch the blobs of `commit` that differ from `present` and that a partial clone lacks.

    All come in one call. Raises SourceError.
    """
    if git.is_partial:
        git.talk(
            ("diff", "--shortstat", "--no-renames", "-O/dev/null", present, commit),
            settings,
            run_log,
            lambda line: None,
        )


def carried(git: Git, commit: str, patches: Sequence[Path]) -> Carried:
    """Commit a tree with the patches on a commit, without those that it has already.

    A patch that does not apply directly is merged as by `am --3way`. The same input gives the same
    tip.
    """
    left_out: list[str] = []
    with try_on(git, commit, is_kept=True) as trial:
        for patch in () if trial.apply(patches) else patches:
            before = trial.tree()
            if trial.apply([patch]):
                continue
            if not trial.holds(patch) and not trial.apply([patch], three_way=True):
                return Carried(None, tuple(left_out), patch.name)
            left_out += [patch.name] if trial.tree() == before else []
        made = trial.tree()
    if made == git.tree(commit):
        return Carried(commit, tuple(left_out))
    return Carried(_patched_commit(git, commit, made), tuple(left_out))


def _patched_commit(git: Git, commit: str, tree: str) -> str:
    """Commit a tree on a commit, with that commit's date, and return the new commit."""
    date = git.look(
        "log", "-1", "--no-show-signature", "--format=%cd", "--date=raw", commit, "--"
    ).out.strip()
    return git.write(
        "commit-tree",
        "-p",
        commit,
        "-m",
        f"{commit[:12]} with the patches of the workspace",
        tree,
        env={"GIT_AUTHOR_DATE": f"@{date}", "GIT_COMMITTER_DATE": f"@{date}"},
    ).out.strip()


def last_in_common(git: Git, commits: Iterable[str], bad: str) -> str | None:
    """Return the nearest fork of the given commits from the history of `bad`, or None.

    A commit within that history is its own fork; `bad` itself does not count.
    """
    parted = {fork for commit in commits for fork in forks(git, commit, bad)[:1]} - {bad}
    return min(parted, key=lambda fork: ahead(git, fork, bad), default=None)
