"""What a move of the pin would meet: each patch tried on the new base, and what else differs.
Nothing in the workspace is touched.

What has to be fetched for it lands in a store aside; see source/upstream.py.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from workspace.bump import changes
from workspace.bump.changes import Change, Topic
from workspace.core.console import Console
from workspace.core.console import State as Word
from workspace.core.errors import PatchConflict
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.repo import checkout, mail, patches, pins, upstream
from workspace.repo.checkout import Checkout, Kind
from workspace.repo.git import Git, history, worktree
from workspace.repo.git.history import Commit
from workspace.repo.git.worktree import Trial
from workspace.repo.mail import Mail
from workspace.repo.patches import Stack
from workspace.repo.upstream import Candidate

State = Literal["clean", "conflicts", "upstreamed"]
# By which of the three tests upstream has a patch: it changes nothing, `git cherry` finds its
# patch-id, or the commit it names is there.
Test = Literal["tree", "patch-id", "backport"]
_WORDS: Mapping[State, Word] = {"clean": "ok", "conflicts": "FAIL", "upstreamed": "done"}
_TOPICS: Mapping[Topic, Word] = {
    "variable": "warn",
    "flag": "warn",
    "sources": "warn",
    "moved": "warn",
    "precompiled": "missing",
    "unknown": "warn",
}
_SAID: Mapping[Test, str] = {
    "tree": "it changes nothing there",
    "patch-id": "a commit there has its patch-id",
    "backport": "the commit that it names is there",
}
_COMMIT = re.compile(r"\b[0-9a-f]{7,40}\b")
_SHOWN = 5


@dataclass(frozen=True)
class Conflict:
    """A file in which a patch does not apply: the upstream commits that touched it, `12hex
    subject`, newest first, None without history.
    """

    path: str
    commits: tuple[str, ...] | None
    moved_to: str | None = None


@dataclass(frozen=True)
class PatchForecast:
    """What becomes of one patch. `merged`: only a three-way merge takes it. `by` is upstream's
    commit where one is known.
    """

    name: str
    subject: str
    status: str | None
    state: State
    merged: bool = False
    test: Test | None = None
    by: str | None = None
    conflicts: tuple[Conflict, ...] = ()
    depends_on: str | None = None
    remark: str = ""


@dataclass(frozen=True)
class Forecast:
    """`tree` is what the new base with all patches would be that upstream has not, None where one
    conflicts.
    """

    candidate: Candidate
    present: str
    patches: tuple[PatchForecast, ...]
    changes: tuple[Change, ...]
    tree: str | None


@dataclass
class _Tried:
    """One patch on the new base by its text alone."""

    state: State = "clean"
    merged: bool = False
    conflicted: tuple[str, ...] = ()


@dataclass
class _Attempt:
    """A series on its way over. `old` follows it on the present base, whose trees a three-way merge
    needs.
    """

    new: Trial
    base: str
    files: Sequence[Path]
    tried: list[_Tried]
    old: Trial | None = None
    taken: int = 0
    trees: dict[int, str] = field(default_factory=dict)

    def run(self, start: int, end: int) -> None:
        """Try patches together, and where that fails by halves: each call to git costs more than
        what it does.
        """
        if start == end or self.new.apply(self.files[start:end]):
            return
        if end - start > 1:
            middle = (start + end) // 2
            self.run(start, middle)
            self.run(middle, end)
            return
        if self.new.holds(self.files[start]):
            self.tried[start] = _Tried("upstreamed")
            return
        merged = self.new.merge(self._before(start), self._before(start + 1))
        if merged.conflicted is not None:
            self.tried[start] = _Tried("conflicts", conflicted=merged.conflicted)
        elif merged.tree == self.new.tree():
            self.tried[start] = _Tried("upstreamed")
        else:
            self.new.take(merged.tree)
            self.tried[start] = _Tried("clean", merged=True)

    def _before(self, count: int) -> str:
        """The tree of the present base with the first `count` patches."""
        if self.old is None:
            self.old = self.new.beside(self.base)
        if count not in self.trees:
            between = self.files[self.taken : count]
            if between and not self.old.apply(between):
                for patch in between:
                    if not self.old.apply([patch]) and not self.old.apply([patch], three_way=True):
                        shown = f"{patch.parent.name}/{patch.name}"
                        raise PatchConflict(
                            f"patches/{shown} does not even apply to the present base"
                            f" {self.base[:12]}",
                            hint="./scripts/inv patch",
                        )
            self.taken = count
            self.trees[count] = self.old.tree()
        return self.trees[count]


def run(
    layout: Layout, settings: Settings, ref: str, *, console: Console, as_json: bool = False
) -> Forecast:
    """Forecast the move to `ref` and print it, as JSON on stdout where a program asks. The word
    triton stands for Triton's main.

    Raises what upstream.find raises, PatchDrift for a series that does not fit its pin, and
    PatchConflict for one that does not fit its base.
    """
    known = pins.load(layout.pins)
    pin, ref = (known.triton, known.triton.tag) if ref == "triton" else (known.vllm, ref)
    there = checkout.observe(layout, pin)
    stack = patches.observe(layout, pin.name, pin, there)
    with (
        RunLog(console, layout.logs, verb="pin.forecast", secrets=settings.secrets) as run_log,
        console.step("upstream") as view,
    ):
        run_log.phase("upstream", view)
        candidate = upstream.find(layout, pin, ref, settings, there, run_log=run_log, step=view)
        view.reason = (
            f"{candidate.pin.tag} {candidate.pin.commit[:12]} from"
            f" {'git' if candidate.kind is Kind.GIT else 'the release archive'}"
        )
    made = work_out(layout, settings, candidate, there, stack)
    if as_json:
        console.data(json.dumps(_record(made), indent=1))
    else:
        _show(made, console)
    return made


def work_out(
    layout: Layout, settings: Settings, candidate: Candidate, there: Checkout, stack: Stack
) -> Forecast:
    """Forecast from what upstream.find brought; the network is not asked. Raises PatchConflict for
    a series that does not fit its own base.
    """
    assert there.base is not None
    pin = getattr(pins.load(layout.pins), candidate.pin.name)
    git = Git(candidate.store)
    files = [layout.patches(pin.name) / name for name in stack.names]
    with worktree.try_on(git, candidate.base) as new:
        attempt = _Attempt(new, there.base, files, [_Tried() for _ in files])
        attempt.run(0, len(files))
        tree = new.tree()
    touched = worktree.paths_of(git, files)
    every = frozenset[str]().union(*touched)
    differing = history.changed(git, there.base, candidate.base)
    gone = [path for path in sorted(every) if path in differing and differing[path][1] is None]
    moved = history.renames(git, there.base, candidate.base, gone, differing)
    commits = None
    if candidate.kind is Kind.GIT:
        commits = history.log(git, there.base, candidate.base, sorted({*every, *moved.values()}))
    judged = _judged(
        git,
        candidate,
        [mail.read_mail(file) for file in files],
        stack.names,
        attempt.tried,
        touched,
        commits,
        moved,
    )
    found = changes.work_out(
        git,
        layout,
        settings,
        pin=pin,
        candidate=candidate,
        differing=differing,
        moved=moved,
        touched=every,
    )
    return Forecast(
        candidate,
        pin.tag,
        judged,
        found,
        None if any(patch.state == "conflicts" for patch in judged) else tree,
    )


def _judged(
    git: Git,
    candidate: Candidate,
    mails: Sequence[Mail],
    names: Sequence[str],
    tried: Sequence[_Tried],
    touched: Sequence[frozenset[str]],
    commits: Sequence[Commit] | None,
    moved: Mapping[str, str],
) -> tuple[PatchForecast, ...]:
    by_test = _upstreamed(git, candidate, mails, names, touched, commits)
    judged: list[PatchForecast] = []
    for name, letter, one, paths in zip(names, mails, tried, touched, strict=True):
        test, by = by_test.get(name, (None, None))
        made = PatchForecast(name, letter.subject, letter.status, one.state, one.merged)
        if one.state == "upstreamed":
            made = dataclasses.replace(made, test="tree", by=by)
        elif one.state == "conflicts" and test:
            made = dataclasses.replace(made, state="upstreamed", test=test, by=by)
        elif one.state == "conflicts":
            conflicts = _conflicts(one.conflicted or tuple(sorted(paths)), commits, moved)
            earlier = [
                other.name
                for other, its in zip(judged, touched, strict=False)
                if other.state == "conflicts" and its & paths
            ]
            made = dataclasses.replace(
                made, conflicts=conflicts, depends_on=earlier[-1] if earlier else None
            )
        elif test:
            # Reverted since, or taken in part: to leave it out would lose what it still does.
            made = dataclasses.replace(
                made, by=by, remark=f"upstream took it as {by}, and yet it changes the tree"
            )
        judged.append(made)
    return tuple(judged)


def _upstreamed(
    git: Git,
    candidate: Candidate,
    mails: Sequence[Mail],
    names: Sequence[str],
    touched: Sequence[frozenset[str]],
    commits: Sequence[Commit] | None,
) -> dict[str, tuple[Test, str]]:
    """Which patches upstream's history has, by which test and as which commit; none where there is
    no history.
    """
    if commits is None:
        return {}
    named: dict[str, str] = {}
    for name, letter in zip(names, mails, strict=True):
        if (
            letter.status
            and letter.status.startswith("Backport")
            and (spelled := _COMMIT.search(letter.status))
        ):
            named[name] = spelled[0]
    ancestors = history.ancestors(git, named.values(), candidate.base)
    subjects = {commit.oid: str(commit) for commit in commits}
    taken = history.taken(
        git,
        commits,
        {
            name: (letter.diff, paths)
            for name, letter, paths in zip(names, mails, touched, strict=True)
        },
    )
    found: dict[str, tuple[Test, str]] = {
        name: ("patch-id", str(commit)) for name, commit in taken.items()
    }
    for name, sha in named.items():
        if oid := ancestors.get(sha):
            found[name] = ("backport", subjects.get(oid, oid[:12]))
    return found


def _conflicts(
    paths: Sequence[str], commits: Sequence[Commit] | None, moved: Mapping[str, str]
) -> tuple[Conflict, ...]:
    former = {new: old for old, new in moved.items()}
    conflicts = []
    for path in paths:
        old = former.get(path, path)
        lines = (
            None
            if commits is None
            else tuple(
                str(commit) for commit in commits if path in commit.paths or old in commit.paths
            )
        )
        conflicts.append(Conflict(old, lines, moved.get(old)))
    return tuple(conflicts)


def _show(made: Forecast, console: Console) -> None:
    if not made.patches:
        console.row("ok", "patches", "none")
    for patch in made.patches:
        console.row(_WORDS[patch.state], patch.state, f"{patch.name}{_why(patch)}")
        for conflict in patch.conflicts:
            console.info(
                f"  {conflict.path}"
                + (f", which moved to {conflict.moved_to}" if conflict.moved_to else "")
            )
            lines = conflict.commits or ()
            for line in lines[:_SHOWN]:
                console.info(f"    {line}")
            if len(lines) > _SHOWN:
                console.info(f"    and {len(lines) - _SHOWN} commits before that")
    for change in made.changes:
        console.row(_word(change), change.topic, text_of(change))
    tag, count = made.candidate.pin.tag, sum(patch.state == "conflicts" for patch in made.patches)
    console.info(
        f"next: ./scripts/inv pin.bump {tag}"
        + (f"   # stops at each of {count} conflicts" if count else "")
    )


def text_of(change: Change) -> str:
    """One change as a line of talk."""
    places = f"  ({', '.join(change.where)})" if change.where and change.topic != "sources" else ""
    remark = f"; {change.remark}" if change.remark else ""
    match change.topic:
        case "unknown":
            return change.remark
        case "sources" | "age":
            said = f"{change.name}: {change.after or 'unknown'}"
        case "variable" | "flag":
            said = f"{change.name} is not known there"
        case "precompiled":
            said = f"{change.name}: none" + (
                f", at present {change.before}" if change.before else ""
            )
        case "moved":
            said = f"{change.name} → {change.after}" if change.after else change.name
        case _:
            said = f"{change.name} {change.before} → {change.after}"
            if change.before is None or change.after is None:
                said = (
                    f"{change.name} {change.after or change.before},"
                    f" {'new' if change.after else 'gone'}"
                )
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28}\b", r"\1", said) + remark + places


def _why(patch: PatchForecast) -> str:
    if patch.state == "upstreamed" and patch.test:
        return f": {_SAID[patch.test]}" + (f", {patch.by}" if patch.by else "")
    if patch.depends_on:
        return f": touches what {patch.depends_on} does, which conflicts"
    if patch.merged and not patch.remark:
        return ", by a three-way merge"
    return f": {patch.remark}" if patch.remark else ""


def _word(change: Change) -> Word:
    return "warn" if change.topic == "age" and change.remark else _TOPICS.get(change.topic, "ok")


def _record(made: Forecast) -> dict[str, object]:
    candidate = made.candidate
    pin = dataclasses.asdict(candidate.pin)
    return {
        "schema": 1,
        "present": made.present,
        "candidate": {
            "pin": pin,
            "base": candidate.base,
            "kind": candidate.kind.value,
            "published": candidate.published.isoformat() if candidate.published else None,
            "prefix": candidate.prefix,
        },
        "patches": [dataclasses.asdict(patch) for patch in made.patches],
        "changes": [dataclasses.asdict(change) for change in made.changes],
        "tree": made.tree,
    }
