"""`inv pin.forecast`: try each patch on the new base and list what else differs.

The workspace stays unchanged. What has to be fetched goes to a separate store; see
repo/upstream.py.
"""

import dataclasses
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from workspace.bump import changes
from workspace.bump.changes import Change, Comparison, Topic
from workspace.core import hints
from workspace.core.console import Console, Row, RunLog
from workspace.core.console import State as RowState
from workspace.core.errors import PatchConflict, SettingsError, counted
from workspace.core.paths import Layout
from workspace.core.process import Absent, There
from workspace.core.settings import Settings
from workspace.install import precompiled, stages
from workspace.machine import doctor
from workspace.machine.arch import key
from workspace.machine.doctor_toolchain import compiler_hint
from workspace.machine.hardware import GIB
from workspace.machine.machine import GROWTH_GIB, NATIVE_GIB, Case, Machine
from workspace.repo import checkout, mail, patches, pins, upstream
from workspace.repo.checkout import Checkout, Kind
from workspace.repo.git import Git, history, worktree
from workspace.repo.git.history import Commit
from workspace.repo.git.worktree import Trial
from workspace.repo.mail import Mail
from workspace.repo.patches import Stack
from workspace.repo.pins import Pin, Wanted
from workspace.repo.upstream import Candidate

State = Literal["clean", "conflicts", "upstreamed"]
_PATCH_STATES: Mapping[State, RowState] = {
    "clean": RowState.OK,
    "conflicts": RowState.FAIL,
    "upstreamed": RowState.DONE,
}
_CHANGE_STATES: Mapping[Topic, RowState] = {
    "variable": RowState.WARN,
    "flag": RowState.WARN,
    "sources": RowState.WARN,
    "moved": RowState.WARN,
    "precompiled": RowState.MISSING,
    "smoke": RowState.WARN,
    "unknown": RowState.WARN,
}
_SHOWN = 5
_REQUEST = re.compile(r"^(?:Submitted|Backport) \[(https?://[^\s\]]+)")


@dataclass(frozen=True)
class Conflict:
    """A file to which a patch does not apply.

    `commits` are the upstream commits that touched it, `12hex subject`, newest first; None without
    history.
    """

    path: str
    commits: tuple[str, ...] | None
    moved_to: str | None = None


@dataclass(frozen=True)
class PatchForecast:
    """What becomes of one patch.

    `merged`: only a three-way merge applies it; `upstreamed`: it changes nothing on the new base,
    or, with `by_request`, all patches of its pull request together change nothing.
    """

    name: str
    subject: str
    status: str | None
    state: State
    merged: bool = False
    conflicts: tuple[Conflict, ...] = ()
    depends_on: str | None = None
    by_request: bool = False


@dataclass(frozen=True)
class Forecast:
    """The result. `tree` is the new base with all patches still needed, None at a conflict."""

    candidate: Candidate
    present: str
    patches: tuple[PatchForecast, ...]
    changes: tuple[Change, ...]
    tree: str | None


@dataclass
class _Tried:
    """The result of one patch on the new base, from its text alone."""

    state: State = "clean"
    merged: bool = False
    conflicted: tuple[str, ...] = ()
    by_request: bool = False


@dataclass
class _Attempt:
    """A series on its way to the new base.

    `old` follows it on the present base; a three-way merge needs the trees there. `requests` has
    the address of each patch's pull request, "" without.
    """

    new: Trial
    base: str
    files: Sequence[Path]
    requests: Sequence[str]
    tried: list[_Tried]
    old: Trial | None = None
    taken: int = 0
    trees: dict[int, str] = field(default_factory=dict)

    def run(self, start: int, end: int) -> None:
        """Try patches together, and on failure by halves: each call to git is expensive."""
        if start == end or self.new.apply(self.files[start:end]):
            return
        if end - start > 1:
            if self._is_upstreamed(start, end):
                self.tried[start:end] = [_Tried("upstreamed", by_request=True)] * (end - start)
                return
            middle = self._middle(start, end)
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

    def _middle(self, start: int, end: int) -> int:
        """Return where to halve a range: between two requests, where it has several."""
        half, of = (start + end) // 2, self.requests
        cuts = (cut for cut in range(start + 1, end) if not of[cut] or of[cut - 1] != of[cut])
        return min(cuts, key=lambda cut: abs(cut - half), default=half)

    def _is_upstreamed(self, start: int, end: int) -> bool:
        """Return whether the patches are of one request whose net change the new base has.

        Upstream merges a request as one commit, so the lines of its first commits may not be there.
        """
        if not self.requests[start] or len({*self.requests[start:end]}) > 1:
            return False
        trees = [self._before(count) for count in range(start, end + 1)]
        merged = self.new.merge(trees[0], trees[-1])
        return merged.conflicted is None and merged.tree == self.new.tree()

    def _before(self, count: int) -> str:
        """Return the tree of the present base with the first `count` patches."""
        if self.old is None:
            self.old = self.new.beside(self.base)
        if count not in self.trees:
            between = self.files[self.taken : count]
            if between and not self.old.apply(between):
                for patch in between:
                    if not self.old.apply([patch]) and not self.old.apply([patch], three_way=True):
                        shown = f"{patch.parent.name}/{patch.name}"
                        raise PatchConflict(
                            f"patches/{shown} does not apply even to the present base"
                            f" {self.base[:12]}",
                            hint=hints.text("inv.patch"),
                        )
            self.taken = count
            self.trees[count] = self.old.tree()
        return self.trees[count]


def run(
    layout: Layout, settings: Settings, wanted: Wanted, *, console: Console, as_json: bool = False
) -> Forecast:
    """Forecast the move to what is wanted and print it, as JSON on stdout if requested.

    `triton` stands for Triton's main. Raises what upstream.find raises, PatchDrift for a series
    that does not fit its pin, and PatchConflict for one that does not fit its base.
    """
    known = pins.load(layout.pins)
    pin = known.vllm
    is_triton = wanted.text == "triton"
    if is_triton:
        pin, wanted = known.triton, Wanted.read(known.triton.tag)
    found = checkout.observe(layout, pin)
    stack = patches.observe(layout, pin.name, pin, found)
    with RunLog(console, layout.logs, verb="pin.forecast", secrets=settings.secrets) as run_log:
        candidate = find_candidate(layout, settings, pin, wanted, found, run_log=run_log)
        if is_triton:
            # `inv pin.bump main` would move vLLM.
            candidate = dataclasses.replace(candidate, argv=("triton",))
        with stages.step(run_log, "forecast") as view:
            made = work_out(layout, settings, candidate, found, stack)
            view.reason = f"{pin.tag} → {candidate.pin.tag}"
    if as_json:
        console.document(_record(made))
    else:
        blockers = _blockers(Machine(layout, settings), made)
        _show(made, blockers, console.stdout, is_whole=console.is_verbose)
    return made


def find_candidate(
    layout: Layout,
    settings: Settings,
    pin: Pin,
    wanted: Wanted,
    found: Checkout,
    *,
    run_log: RunLog,
) -> Candidate:
    """Find the release or commit in a console step. Raises what upstream.find raises."""
    with stages.step(run_log, "upstream") as view:
        candidate = upstream.find(layout, pin, wanted, settings, found, run_log=run_log, step=view)
        if candidate.kind is not found.kind and settings.text("SOURCE") == "release":
            raise SettingsError(
                f"{candidate.pin.tag} comes from git, but SOURCE requests release; nothing was"
                " changed",
                hint=hints.text("bump.source_auto", tag=list(candidate.argv)),
            )
        place = "git" if candidate.kind is Kind.GIT else "the release archive"
        view.reason = f"{candidate.pin.tag} {candidate.pin.commit[:12]} from {place}"
    return candidate


def work_out(
    layout: Layout, settings: Settings, candidate: Candidate, present: Checkout, stack: Stack
) -> Forecast:
    """Forecast the move to a candidate, without the network.

    Raises PatchConflict for a series that does not fit its own base.
    """
    assert present.base is not None
    pin = getattr(pins.load(layout.pins), candidate.pin.name)
    git = Git(candidate.store)
    files = [layout.patches(pin.name) / name for name in stack.names]
    mails = [mail.read_mail(file) for file in files]
    requests = ["".join(_REQUEST.findall(read.status or "")) for read in mails]
    with worktree.try_on(git, candidate.base) as new:
        attempt = _Attempt(new, present.base, files, requests, [_Tried() for _ in files])
        attempt.run(0, len(files))
        tree = new.tree()
    touched = worktree.paths_of(git, files)
    every = frozenset[str]().union(*touched)
    differing = history.changed(git, present.base, candidate.base)
    gone = [path for path in sorted(every) if path in differing and differing[path][1] is None]
    moved = history.renames(git, (present.base, candidate.base), gone, differing)
    commits = None
    if candidate.kind is present.kind is Kind.GIT:
        commits = history.log(git, present.base, candidate.base, sorted({*every, *moved.values()}))
    series = [
        _Patch(name, read, paths, tried)
        for name, read, paths, tried in zip(stack.names, mails, touched, attempt.tried, strict=True)
    ]
    judged = _judge(series, commits, moved)
    found = changes.work_out(
        git, layout, settings, Comparison(pin, candidate, differing, moved, touched=every)
    )
    has_conflict = any(patch.state == "conflicts" for patch in judged)
    return Forecast(candidate, pin.tag, judged, found, None if has_conflict else tree)


@dataclass(frozen=True)
class _Patch:
    """One patch of the series: its mail, the paths that it touches, and how it applied."""

    name: str
    mail: Mail
    paths: frozenset[str]
    tried: _Tried


def _judge(
    series: Sequence[_Patch], commits: Sequence[Commit] | None, moved: Mapping[str, str]
) -> tuple[PatchForecast, ...]:
    """Return the forecast of each patch, in order."""
    judged: list[PatchForecast] = []
    for patch in series:
        tried = patch.tried
        made = PatchForecast(
            patch.name,
            patch.mail.subject,
            patch.mail.status,
            tried.state,
            tried.merged,
            by_request=tried.by_request,
        )
        if tried.state == "conflicts":
            paths = tried.conflicted or tuple(sorted(patch.paths))
            made = dataclasses.replace(
                made,
                conflicts=_conflicts(paths, commits, moved),
                depends_on=_last_conflict(judged, series, patch.paths),
            )
        judged.append(made)
    return tuple(judged)


def _last_conflict(
    judged: Sequence[PatchForecast], series: Sequence[_Patch], paths: frozenset[str]
) -> str | None:
    """Return the last earlier patch that conflicts and touches one of the paths."""
    earlier = [
        made.name
        for made, patch in zip(judged, series, strict=False)
        if made.state == "conflicts" and patch.paths & paths
    ]
    return earlier[-1] if earlier else None


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


def _blockers(machine: Machine, made: Forecast) -> list[Row]:
    """Return what ends a bump on this machine: no room, or no compiler where one is needed."""
    if made.candidate.pin.name != "vllm":
        return []
    case = Case(machine)
    lacks_wheel = any(
        change.topic == "precompiled" and change.name.startswith("cpu") == (case.device == "cpu")
        for change in made.changes
    )
    is_hybrid = precompiled.follows_sources(machine.settings) and any(
        change.name.startswith(changes.SINCE_BASE) and change.where for change in made.changes
    )
    is_native = precompiled.is_native(machine.settings)
    rows = _room(case, is_compiled=lacks_wheel or is_hybrid or is_native)
    if lacks_wheel or is_hybrid or is_native:
        why = "is compiled" if is_native else "differs from its base in compiled sources"
        rows += _compiler(case, made, "has no precompiled wheel" if lacks_wheel else why)
    return rows


def _room(case: Case, *, is_compiled: bool) -> list[Row]:
    needed_gib = GROWTH_GIB[case.device] + (NATIVE_GIB[case.device] if is_compiled else 0)
    free_gib = shutil.disk_usage(case.layout.root).free / GIB
    if free_gib >= needed_gib:
        return []
    text = f"{free_gib:.1f} GiB are free, and a bump needs about {needed_gib:.0f}"
    hint = hints.text("core.disk_of", folder=case.layout.root)
    return [Row(RowState.FAIL, "disk", text, hint=hint)]


def _compiler(case: Case, made: Forecast, why: str) -> list[Row]:
    """Return the row of a g++ that is missing, or older than the new base accepts."""
    answer = case.machine.compiler()[1]
    after = [change.after or "" for change in made.changes if change.name == "C++ compiler"]
    known = re.findall(r"\d+(?:\.\d+)*", "".join(after))
    required = doctor.required_compiler(case.layout.vllm, device=case.device)
    required = max(known, key=key) if known else required
    tag = made.candidate.pin.tag
    if isinstance(answer, Absent):
        text, hint = f"g++ is missing; {tag} {why}", hints.text("machine.apt_gxx")
    elif isinstance(answer, There) and required and key(answer.value) < key(required):
        text = f"g++ {answer.value}; {tag} {why}, and needs {required} or newer"
        hint = compiler_hint(case, required)
    else:
        return []
    return [Row(RowState.FAIL, "compiler", text, hint=hint)]


def _verdict(made: Forecast, blockers: Sequence[Row]) -> Row:
    """Return the first row: whether a bump can succeed here, and what it will ask for."""
    tag, count = made.candidate.pin.tag, sum(patch.state == "conflicts" for patch in made.patches)
    warnings = sum(_state_of(change) is not RowState.OK for change in made.changes)
    parts = [f"{count} of {len(made.patches)} patches conflict"] if count else []
    parts += [f"{counted(warnings, 'change')} to look at"] if warnings else []
    if blockers:
        parts.insert(0, f"{tag} cannot be built here: {' and '.join(row.name for row in blockers)}")
        return Row(RowState.FAIL, "verdict", "; ".join(parts))
    text = "; ".join(parts) or f"nothing prevents a move to {tag}"
    return Row(RowState.WARN if parts else RowState.OK, "verdict", text)


def _show(made: Forecast, blockers: Sequence[Row], console: Console, *, is_whole: bool) -> None:
    console.rows([_verdict(made, blockers), *blockers])
    if not made.patches:
        console.row(RowState.OK, "patches", "none")
    for patch in made.patches:
        console.row(_PATCH_STATES[patch.state], patch.state, f"{patch.name}{_why(patch)}")
        for conflict in patch.conflicts:
            moved = f", which moved to {conflict.moved_to}" if conflict.moved_to else ""
            console.info(f"  {conflict.path}{moved}")
            lines = conflict.commits or ()
            for line in lines[:_SHOWN]:
                console.info(f"    {line}")
            if len(lines) > _SHOWN:
                console.info(f"    and {counted(len(lines) - _SHOWN, 'commit')} before that")
    shown = [change for change in made.changes if is_whole or _state_of(change) is not RowState.OK]
    console.rows(Row(_state_of(change), change.topic, text_of(change)) for change in shown)
    if more := len(made.changes) - len(shown):
        console.row(RowState.OK, "others", f"nothing to do for {more} more; --verbose lists them")
    if blockers:
        return
    count = sum(patch.state == "conflicts" for patch in made.patches)
    tag = list(made.candidate.argv)
    console.hint(
        hints.text("bump.bump_with_conflicts", tag=tag, count=count)
        if count
        else hints.text("bump.bump", tag=tag)
    )


def text_of(change: Change) -> str:
    """Return one line of text for a change."""
    places = f"  ({', '.join(change.where)})" if change.where and change.topic != "sources" else ""
    remark = f"; {change.remark}" if change.remark else ""
    match change.topic:
        case "unknown":
            return change.remark
        case "sources" | "age":
            text = f"{change.name}: {change.after or 'unknown'}"
        case "variable" | "flag":
            text = f"{change.name} is not known there"
        case "precompiled":
            text = f"{change.name}: none" + (
                f", at present {change.before}" if change.before else ""
            )
        case "moved":
            text = f"{change.name} → {change.after}" if change.after else change.name
        case _:
            text = f"{change.name} {change.before} → {change.after}"
            if change.before is None or change.after is None:
                text = (
                    f"{change.name} {change.after or change.before},"
                    f" {'new' if change.after else 'gone'}"
                )
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28}\b", r"\1", text) + remark + places


def _why(patch: PatchForecast) -> str:
    if patch.by_request:
        return ": its pull request changes nothing there; skip it where a bump stops at it"
    if patch.state == "upstreamed":
        return ": it changes nothing there"
    if patch.depends_on:
        return f": touches a file of {patch.depends_on}, which conflicts"
    return ", by a three-way merge" if patch.merged else ""


def _state_of(change: Change) -> RowState:
    return (
        RowState.WARN
        if change.topic == "age" and change.remark
        else _CHANGE_STATES.get(change.topic, RowState.OK)
    )


def _record(made: Forecast) -> dict[str, object]:
    candidate = made.candidate
    pin = dataclasses.asdict(candidate.pin)
    return {
        "schema": 2,
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
