"""How many compilers and how much memory a build gets, the forecast of its cost, and its progress:
a bar on a terminal, a line now and then elsewhere.

Limits come from flags, settings and the machine. The forecast counts units, minutes and memory
before a rebuild starts; percent and remaining time come from expected costs, too, not from counts.
"""

import contextlib
import math
import re
import textwrap
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from workspace.compile import scheduler, targets
from workspace.compile.costs import LINK, Cost, Costs, Unit, unit_at
from workspace.compile.job_server import JobServer
from workspace.compile.project import Project
from workspace.compile.scheduler import Bounds, Finished, State
from workspace.compile.targets import Reached
from workspace.core import hints
from workspace.core.console import Console, Step
from workspace.core.errors import SettingsError, counted
from workspace.core.known_settings import LARGEST_COUNT
from workspace.core.settings import Settings
from workspace.machine.hardware import Host

AUTO = "auto"
# Memory reserved for the system: a share of all memory, and at least the second value. On a Spark
# the GPU and the CPU share memory, and without a reserve the machine freezes before the kernel
# kills a process (flashinfer-ai/flashinfer#3634).
RESERVED_SHARE, LEAST_RESERVED_GIB = 0.1, 2.0
# With less memory most compilers fail.
LEAST_BUDGET_GIB = 1.0


@dataclass(frozen=True)
class Jobs:
    """Number of compilers at once, of `nvcc_threads` threads each; `sentence` explains where it
    comes from.
    """

    count: int
    nvcc_threads: int
    sentence: str


@dataclass(frozen=True)
class Memory:
    """Memory budget of all compilers together, and the reserve for the system, explained."""

    budget_gib: float
    reserve_gib: float
    sentence: str


def count(
    settings: Settings,
    *,
    cores: int,
    flag: str | None = None,
    command: str = "./scripts/inv rebuild",
) -> Jobs:
    """Return how many compilers run at once. `flag` is the value of --jobs, `auto` or a number; it
    outranks MAX_JOBS. `command` is the verb that was typed.

    Raises SettingsError for anything else than `auto` or a whole number of at least 1.
    """
    if (
        flag is not None
        and flag != AUTO
        and not (re.fullmatch(r"[0-9]{1,9}", flag) and 0 < int(flag) <= LARGEST_COUNT)
    ):
        shown = settings.presentable(flag)
        raise SettingsError(
            f"--jobs: {shown!r} is neither auto nor a whole number of at least 1 and at most"
            f" {LARGEST_COUNT}",
            hint=hints.text("compile.jobs_auto", command=command),
        )
    threads = settings.count("NVCC_THREADS") or 1
    wanted = settings.count("MAX_JOBS") if flag is None else None if flag == AUTO else int(flag)
    if wanted is None:
        bound, origin = cores, f"auto: {counted(cores, 'core')}"
    elif flag is not None or settings.source("MAX_JOBS") == "flag":
        bound, origin = wanted, f"--jobs {wanted}"
    else:
        bound, origin = (
            wanted,
            (
                f"MAX_JOBS={wanted} in"
                f" {'the shell' if settings.source('MAX_JOBS') == 'shell' else '.env'}"
            ),
        )
    return _divided(bound, min(threads, bound), threads, origin)


def _divided(bound: int, threads: int, requested: int, origin: str) -> Jobs:
    """Divide the bound by the threads of nvcc: an nvcc of several threads counts as several
    compilers, as in vLLM's setup.py (vllm-project/vllm#20079).
    """
    count = bound // threads
    nouns = "compiler" if count == 1 else "compilers"
    if threads > 1:
        nouns, origin = f"{nouns} of {threads} threads", f"{origin} / NVCC_THREADS {threads}"
    else:
        origin = f"{origin}; NVCC_THREADS 1"
    return Jobs(
        count,
        threads,
        f"{count} {nouns} at once ({origin}"
        + (f", not the requested {requested})" if threads < requested else ")"),
    )


def memory(host: Host, *, flag: str | None = None) -> Memory:
    """Return the memory budget of all compilers together. `flag` is the value of --memory: GiB, or
    `auto`, the default.

    Raises SettingsError for an invalid number, and for more memory than the machine, or its control
    group, has.
    """
    total, available = host.memory_gib, host.available_gib
    reserve = min(max(LEAST_RESERVED_GIB, total * RESERVED_SHARE), total / 2)
    if flag is None or flag == AUTO:
        budget = max(LEAST_BUDGET_GIB, available - reserve)
        sentence = (
            f"{budget:.1f} GiB for compilers: {available:.1f} of {total:.1f} are available,"
            f" {reserve:.1f} are reserved for the system"
        )
        if budget > available - reserve:
            sentence += (
                f"; that leaves too little: the minimum is {LEAST_BUDGET_GIB:.1f}, with one"
                " compiler at a time"
            )
        return Memory(budget, reserve, sentence)
    wanted = float(flag) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", flag) else math.nan
    if not wanted >= LEAST_BUDGET_GIB:
        raise SettingsError(
            f"--memory: {flag[:40]!r} is neither auto nor a number of GiB of at least"
            f" {LEAST_BUDGET_GIB:g}",
            hint=hints.text("compile.memory_auto"),
        )
    if wanted > total:
        raise SettingsError(
            f"--memory {flag}: this machine, or its control group, has {total:.1f} GiB",
            hint=hints.text("compile.memory_auto"),
        )
    sentence = f"{wanted:g} GiB for compilers: --memory {flag}"
    if wanted > (free := max(0.0, available - reserve)):
        sentence += (
            f"; only {free:.1f} are free now ({available:.1f} available, {reserve:.1f} reserved"
            " for the system): compilers wait for the rest"
        )
    return Memory(wanted, reserve, sentence)


_MINUTE_S = 60.0
_HEAD = ("target", "units", "minutes", "peak GiB", "reason")
_FIGURES = (1, 2, 3)


@dataclass(frozen=True)
class TargetCost:
    """A target: `minutes` of compiler time with the link, `peak_gib` of its largest unit."""

    target: str
    reason: str
    units: int
    minutes: float
    peak_gib: float
    is_complete: bool


@dataclass(frozen=True)
class RebuildPlan:
    """Plan of a rebuild: `minutes` and `peak_gib` by simulating the scheduler with all units.
    `guessed` units were never measured.
    """

    rows: tuple[TargetCost, ...]
    from_precompiled: tuple[str, ...]
    why_not_hybrid: str | None
    units: int
    guessed: int
    compiler_minutes: float
    minutes: float
    peak_gib: float
    bounds: Bounds


def work_out(
    reached: Sequence[Reached],
    project: Project,
    costs: Costs,
    bounds: Bounds,
    *,
    why_not_hybrid: str | None = None,
) -> RebuildPlan:
    """Return the plan, from the expected cost of each unit and of each target's link."""
    rows, everything, compiled = [], dict[str, Cost](), set[str]()
    for one in reached:
        expected = {
            unit.object: costs.expected(unit_at(unit.object) or Unit(one.target, unit.source))
            for unit in one.units
        }
        compiled |= expected.keys()
        link = {f"{one.target} link": costs.expected(Unit(one.target, LINK))} if one.units else {}
        everything |= expected | link
        rows.append(_target_cost(one, (expected | link).values()))
    replayed = scheduler.simulate(tuple(everything.values()), bounds)
    names = {one.target for one in reached}
    return RebuildPlan(
        rows=tuple(rows),
        from_precompiled=(
            ()
            if why_not_hybrid
            else tuple(
                target.name for target in targets.final_targets(project) if target.name not in names
            )
        ),
        why_not_hybrid=why_not_hybrid,
        units=len(compiled),
        guessed=sum(everything[name].origin == "guess" for name in compiled),
        compiler_minutes=sum(cost.seconds for cost in everything.values()) / _MINUTE_S,
        minutes=replayed.seconds / _MINUTE_S,
        peak_gib=replayed.most_gib,
        bounds=bounds,
    )


def _target_cost(one: Reached, expected: Collection[Cost]) -> TargetCost:
    minutes = sum(cost.seconds for cost in expected) / _MINUTE_S
    peak_gib = max((cost.peak_gib for cost in expected), default=0.0)
    return TargetCost(one.target, one.reason, len(one.units), minutes, peak_gib, one.is_complete)


def show(plan: RebuildPlan, console: Console, *, as_json: bool = False) -> None:
    """Print a row for each target and a summary, or JSON."""
    if as_json:
        console.document({"schema": 1, **asdict(plan)})
        return
    if plan.rows:
        lines = [
            (one.target, str(one.units), f"{one.minutes:.1f}", f"{one.peak_gib:.1f}", one.reason)
            for one in plan.rows
        ]
        console.table([_HEAD, *lines], right=_FIGURES)
    for sentence in _sentences(plan):
        console.sentence(sentence)


def _sentences(plan: RebuildPlan) -> list[str]:
    """Return the summary below the table."""
    lines = []
    if plan.why_not_hybrid:
        lines.append(f"not hybrid: {plan.why_not_hybrid}; every target is compiled here")
    if plan.units:
        known = f"; guessed, not measured: {plan.guessed} of them" if plan.guessed else ""
        lines.append(
            f"{counted(plan.units, 'unit')}, {plan.compiler_minutes:.1f} minutes of compiler time:"
            f" about {plan.minutes:.1f} minutes with at most {plan.bounds.jobs} at once in"
            f" {plan.bounds.budget_gib:.1f} GiB, peak {plan.peak_gib:.1f} GiB{known}"
        )
    elif plan.rows:
        lines.append("no unit has to be compiled: the reached targets are up to date")
    else:
        lines.append("no unit has to be compiled")
    full = [row.target for row in plan.rows if row.is_complete and row.units]
    if full and not plan.why_not_hybrid:
        lines.append(
            f"{', '.join(full)}: all units are compiled, because a precompiled wheel has libraries"
            " and no objects; the next change compiles only the units that it reaches"
        )
    if plan.from_precompiled:
        lines.append(f"from the precompiled wheel: {', '.join(plan.from_precompiled)}")
    return lines


SHOWN = 3
Cells = tuple[str, ...]


def build_summary(finished: Sequence[Finished]) -> tuple[Cells, ...]:
    """Return a line of a table for each of the slowest and the largest units."""
    done = [one for one in finished if one.status == 0 and not one.unit.is_light]
    slowest = sorted(done, key=lambda one: -one.seconds)[:SHOWN]
    largest = sorted(done, key=lambda one: -one.peak_gib)[:SHOWN]
    return tuple(
        (heading, f"{one.seconds:.1f} s", f"{one.peak_gib:.2f} GiB", _shown(one.unit))
        for heading, ones in (("slowest", slowest), ("largest", largest))
        for one in ones
    )


def _shown(unit: Unit) -> str:
    return f"link of {unit.target}" if unit.source == LINK else unit.source


LOOK_S = 0.5
LINE_S = 10.0
# Columns beside a step's text in its row: spinner, bar, time and separators (core/console.py).
_BESIDE = 42
_NARROWEST = 24
# A unit that takes longer than expected counts as nearly done, never as done.
_NEARLY = 0.95


@dataclass(frozen=True)
class Estimate:
    """Progress estimate: units done and in all, the share of the work done, seconds left."""

    done: int
    units: int
    share: float
    left_s: float


def estimate(
    planned: Mapping[Unit, Cost],
    finished: Sequence[Finished],
    state: State,
    *,
    began: float,
    now: float,
) -> Estimate:
    """Estimate the progress. The time left is that of the work done so far, scaled to the rest, and
    at least that of the longest unit. `began` and `now` are times of time.monotonic.
    """
    done = {one.unit: one for one in finished if one.status == 0 and _is_counted(one.unit)}
    running = {one.unit: one for one in state.running if _is_counted(one.unit)}
    costs = {unit: one.expected for unit, one in (done | running).items()} | dict(planned)
    over = {
        unit: min(now - one.started, costs[unit].seconds * _NEARLY) for unit, one in running.items()
    }
    over |= {unit: costs[unit].seconds for unit in done}
    longest_s = max((cost.seconds - over.get(unit, 0.0) for unit, cost in costs.items()), default=0)
    share = sum(over.values()) / (sum(cost.seconds for cost in costs.values()) or 1.0)
    scaled_s = (now - began) * (1.0 - share) / share if share else 0.0
    return Estimate(len(done), len(costs), share, max(scaled_s, longest_s))


def _is_counted(unit: Unit) -> bool:
    """Return whether a unit counts: links and preprocessors are short, and not planned."""
    return not unit.is_light and unit.source != LINK


def figures(found: Estimate, state: State) -> tuple[str, ...]:
    """Return the parts of the text beside a progress bar."""
    parts = [f"{found.share:.0%}", f"{found.done} of {found.units} units"]
    if found.done < found.units:
        parts.append(f"{duration(found.left_s)} left")
    parts.append(f"{state.held_gib:.1f} of {state.budget_gib:.1f} GiB")
    return (*parts, f"{state.waiting} wait") if state.waiting else tuple(parts)


def units(state: State) -> tuple[str, ...]:
    """Return the names of the running units, the longest running first; if none runs, why the
    others wait.
    """
    if state.waiting and not state.running:
        return (state.why,)
    return tuple(
        _shown(one.unit).rpartition("/")[2]
        for one in sorted(state.running, key=lambda one: one.started)
        if not one.unit.is_light
    )


def _wrapped(parts: Sequence[str], width: int, *, lines: int) -> list[str]:
    return textwrap.wrap(", ".join(parts), width, max_lines=lines, placeholder=" …")


def duration(seconds: float) -> str:
    """Return a time as text: seconds, minutes, or hours and minutes."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class Meter:
    """Progress meter of a build, shown from a thread while the block is entered."""

    def __init__(
        self,
        server: JobServer,
        planned: Sequence[Unit],
        costs: Costs,
        *,
        console: Console,
        step: Step,
    ) -> None:
        self._server, self._costs = server, costs
        self._console, self._step = console, step
        self.expect(planned)
        self._is_over = threading.Event()
        self._budget_gib = server.state.budget_gib
        self._last_text = ""

    def expect(self, planned: Sequence[Unit]) -> None:
        """Plan these units from now on, for a build that learns its units after the start."""
        self._planned = {unit: self._costs.expected(unit) for unit in planned}

    def __enter__(self) -> "Meter":
        self._began = self._last_line = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="meter", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        # Report what happened after the last sample.
        self._warn(self._server.state, self._server.finished)

    def _watch(self) -> None:
        # If the terminal is gone (SIGHUP), continue sampling.
        while not self._is_over.wait(LOOK_S):
            with contextlib.suppress(OSError):
                self._look(time.monotonic())

    def _look(self, now: float) -> None:
        state, finished = self._server.state, self._server.finished
        self._warn(state, finished)
        found = estimate(self._planned, finished, state, began=self._began, now=now)
        if self._console.width:
            width = max(_NARROWEST, self._console.width - _BESIDE - len(self._step.title))
            rows = (
                *_wrapped(figures(found, state), width, lines=3),
                *_wrapped(units(state), width, lines=2),
            )
            self._step.progress(found.share, 1.0, "\n".join(rows))
        elif now - self._last_line >= LINE_S:
            self._last_line = now
            line = ", ".join(figures(found, state)) + ": " + ", ".join(units(state)[:3])
            if line != self._last_text:
                self._console.info(line)
            self._last_text = line

    def _warn(self, state: State, finished: Sequence[Finished]) -> None:
        killed = next((one for one in reversed(finished) if one.is_killed), None)
        if killed and state.budget_gib < self._budget_gib and not self._server.trouble:
            name = Path(killed.unit.source).name
            self._console.warn(
                f"memory ran out while {name} was compiled: the build continues with"
                f" {state.budget_gib:.1f} GiB instead of {self._budget_gib:.1f}"
            )
        self._budget_gib = state.budget_gib
