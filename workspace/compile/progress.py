"""How far a build is: a bar on a terminal, a line now and then elsewhere. Percent and time left
come from known costs, not from counts.
"""

import contextlib
import heapq
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.compile.costs import LINK, Cost, Costs, Entry, Unit
from workspace.compile.job_server import JobServer
from workspace.compile.scheduler import Bounds, Finished, State
from workspace.core.console import Console, Step
from workspace.core.files import write_atomic

SUFFIX = ".trace.json"
SHOWN = 3
# What the same unit takes differs from build to build by what runs beside it; less than this is no
# news.
NEWS_SHARE, NEWS_S = 0.1, 1.0
_PROCESS = 1


@dataclass(frozen=True)
class Sample:
    """One look at a build, at a time of time.monotonic: GiB held and reckoned with, compilers that
    run and wait.
    """

    at: float
    held_gib: float
    charged_gib: float
    running: int
    waiting: int


def lanes(finished: Sequence[Finished]) -> tuple[int, ...]:
    """Return a lane for each unit, from 0: those that ran at the same time lie in different ones,
    and no more lanes are used than ran at once.
    """
    found, free, busy = [0] * len(finished), list[int](), list[tuple[float, int]]()
    for number in sorted(range(len(finished)), key=lambda number: finished[number].started):
        done = finished[number]
        while busy and busy[0][0] <= done.started:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane = heapq.heappop(free) if free else len(busy)
        found[number] = lane
        heapq.heappush(busy, (done.started + done.seconds, lane))
    return tuple(found)


def trace(
    finished: Sequence[Finished], samples: Iterable[Sample], *, began: float
) -> Mapping[str, object]:
    """Return the build as a trace: a lane for each compiler at a time, and counters. `began` is
    when time 0 was, on the clock of time.monotonic.

    The form is Chrome's Trace Event Format, JSON Object Format: complete events (X), counters (C)
    and names (M); times are in microseconds.
    """
    events: list[Mapping[str, object]] = [_named("process_name", 0, "compilers")]
    found = lanes(finished)
    events += [
        _named("thread_name", lane + 1, f"compiler {lane + 1}")
        for lane in range(max(found, default=-1) + 1)
    ]
    for done, lane in zip(finished, found, strict=True):
        events.append(
            {
                "name": (
                    f"link of {done.unit.target}"
                    if done.unit.source == LINK
                    else Path(done.unit.source).name or "?"
                ),
                "cat": (
                    "preprocess"
                    if done.unit.is_light
                    else "killed"
                    if done.is_killed
                    else "compile"
                    if done.status == 0
                    else "failed"
                ),
                "ph": "X",
                "ts": _us(done.started - began),
                "dur": _us(done.seconds),
                "pid": _PROCESS,
                "tid": lane + 1,
                "args": {
                    "source": done.unit.source,
                    "target": done.unit.target,
                    "status": done.status,
                    "peak GiB": round(done.peak_gib, 3),
                    "expected GiB": round(done.expected.peak_gib, 3),
                    "expected s": round(done.expected.seconds, 1),
                    "expected from": done.expected.origin,
                },
            }
        )
    for sample in samples:
        at = _us(sample.at - began)
        # A viewer puts the values of a counter on top of each other: together they are what the
        # budget is held against.
        expected_gib = max(0.0, sample.charged_gib - sample.held_gib)
        events.append(
            _counted(
                "memory GiB",
                at,
                {"held": round(sample.held_gib, 3), "expected beyond": round(expected_gib, 3)},
            )
        )
        events.append(_counted("units", at, {"running": sample.running, "waiting": sample.waiting}))
    return {"displayTimeUnit": "ms", "traceEvents": events}


def write_timeline(
    log: Path, finished: Sequence[Finished], samples: Iterable[Sample], *, began: float
) -> Path:
    """Write the trace beside the log, and remove those whose logs are gone. Raises OSError where it
    cannot.
    """
    for old in log.parent.glob(f"*{SUFFIX}"):
        if not old.with_name(old.name.removesuffix(SUFFIX) + log.suffix).exists():
            old.unlink(missing_ok=True)
    path = log.with_suffix(SUFFIX)
    write_atomic(path, json.dumps(trace(finished, samples, began=began)).encode() + b"\n")
    return path


def build_summary(finished: Sequence[Finished], before: Iterable[Entry]) -> tuple[str, ...]:
    """Return a line for each of the slowest and the hungriest units, beside what the last build of
    the same setup needed for it.
    """
    known = {(entry.target, entry.source): entry for entry in before}
    done = [one for one in finished if one.status == 0 and not one.unit.is_light]
    slowest = sorted(done, key=lambda one: -one.seconds)[:SHOWN]
    hungriest = sorted(done, key=lambda one: -one.peak_gib)[:SHOWN]
    return tuple(
        _line(word, one, known)
        for word, ones in (("slowest", slowest), ("hungriest", hungriest))
        for one in ones
    )


def _line(word: str, done: Finished, known: Mapping[tuple[str, str], Entry]) -> str:
    said = (
        f"{word:<11}{done.seconds:7.1f} s {done.peak_gib:6.2f} GiB "
        f" {done.unit.source if done.unit.source != LINK else f'link of {done.unit.target}'}"
    )
    entry = known.get((done.unit.target, done.unit.source))
    if entry is None:
        return said
    if word == "hungriest":
        return f"{said}  (last build {entry.peak_gib:.2f} GiB)"
    difference = done.seconds - entry.seconds
    if abs(difference) < max(NEWS_S, entry.seconds * NEWS_SHARE):
        return f"{said}  (as in the last build)"
    return (
        f"{said}  (last build {entry.seconds:.1f} s: {abs(difference):.1f} s"
        f" {'slower' if difference > 0 else 'faster'})"
    )


def _named(kind: str, lane: int, name: str) -> Mapping[str, object]:
    return {"name": kind, "ph": "M", "ts": 0, "pid": _PROCESS, "tid": lane, "args": {"name": name}}


def _counted(name: str, at: int, values: Mapping[str, float]) -> Mapping[str, object]:
    return {"name": name, "ph": "C", "ts": at, "pid": _PROCESS, "args": values}


def _us(seconds: float) -> int:
    return max(0, round(seconds * 1e6))


LOOK_S = 0.5
LINE_S = 10.0
# What stands beside a step's text in its row: spinner, bar, time and what lies between them
# (core/console.py).
_BESIDE = 42
_NARROWEST = 24
# A unit that takes longer than expected is nearly done, and never quite.
_NEARLY = 0.95
_PRIOR_SHARE = 0.1


@dataclass(frozen=True)
class Estimate:
    """Units done and in all, the share of the work that is done, and the seconds that are left."""

    done: int
    units: int
    share: float
    left_s: float


def estimate(
    planned: Mapping[Unit, Cost],
    finished: Sequence[Finished],
    state: State,
    *,
    jobs: int,
    now: float,
) -> Estimate:
    """Work out how far it is. What is left takes at least its share of the cores, of the
    memory-time and its longest unit; the build keeps near that.

    Machines differ: what the units that are done took, against what was expected, is what the
    others are expected to take.
    """
    done = {one.unit: one for one in finished if one.status == 0 and _is_reckoned(one.unit)}
    running = {one.unit: one for one in state.running if _is_reckoned(one.unit)}
    costs = (
        {unit: one.expected for unit, one in done.items()}
        | {unit: one.expected for unit, one in running.items()}
        | dict(planned)
    )
    elapsed = {unit: one.seconds for unit, one in done.items()}
    elapsed |= {
        unit: now - one.started
        for unit, one in running.items()
        if now - one.started > costs[unit].seconds
    }
    # Few units say little: as much as a tenth of the build speaks for the expected times.
    prior = _PRIOR_SHARE * sum(cost.seconds for cost in costs.values()) or 1.0
    pace = (sum(elapsed.values()) + prior) / (sum(costs[unit].seconds for unit in elapsed) + prior)
    over = {unit: costs[unit].seconds for unit in done}
    over |= {
        unit: min((now - one.started) / pace, costs[unit].seconds * _NEARLY)
        for unit, one in running.items()
        if unit not in done
    }
    left = {
        unit: cost.seconds - over.get(unit, 0.0) for unit, cost in costs.items() if unit not in done
    }
    memory = (
        sum(seconds * costs[unit].peak_gib for unit, seconds in left.items()) / state.budget_gib
        if state.budget_gib
        else 0.0
    )
    left_s = max(sum(left.values()) / jobs, memory, *left.values(), 0.0) * pace
    return Estimate(
        len(done),
        len(costs),
        sum(over.values()) / (sum(cost.seconds for cost in costs.values()) or 1.0),
        left_s,
    )


def _is_reckoned(unit: Unit) -> bool:
    """Links come as they come: nobody plans them, and they are short."""
    return not unit.is_light and unit.source != LINK


def figures(found: Estimate, state: State) -> tuple[str, ...]:
    """Return the parts of what is shown beside a bar."""
    said = [f"{found.share:.0%}", f"{found.done} of {found.units} units"]
    if found.done < found.units:
        said.append(f"{duration(found.left_s)} left")
    said.append(f"{state.held_gib:.1f} of {state.budget_gib:.1f} GiB")
    return (*said, f"{state.waiting} wait") if state.waiting else tuple(said)


def units(state: State) -> tuple[str, ...]:
    """Return the names of the units that run, those that have run longest first; where none does,
    why the others wait.
    """
    if state.waiting and not state.running:
        return (state.why,)
    return tuple(
        Path(one.unit.source).name if one.unit.source != LINK else f"link of {one.unit.target}"
        for one in sorted(state.running, key=lambda one: one.started)
        if not one.unit.is_light
    )


def filled(parts: Sequence[str], width: int, *, lines: int) -> tuple[str, ...]:
    """Set parts into at most so many lines of a width, commas between them; what has no room is
    counted.
    """
    rows: list[str] = []
    for number, part in enumerate(parts):
        rest = len(parts) - number
        room = width - (len(f", +{rest - 1}") if len(rows) == lines and rest > 1 else 0)
        if rows and len(rows[-1]) + 2 + len(part) <= room:
            rows[-1] += f", {part}"
        elif len(rows) < lines:
            rows.append(part[:width])
        else:
            rows[-1] = f"{rows[-1][: width - len(f', +{rest}')]}, +{rest}"
            break
    return tuple(rows)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class Meter:
    """Shows how a build goes while the block is entered, from a thread. `samples` are what it
    saw.
    """

    def __init__(
        self,
        job_server_: JobServer,
        planned: Sequence[Unit],
        costs: Costs,
        *,
        bounds: Bounds,
        console: Console,
        step: Step,
    ) -> None:
        self.samples: list[Sample] = []
        self._broker, self._jobs, self._console, self._step = (
            job_server_,
            bounds.jobs,
            console,
            step,
        )
        self._costs = costs
        self.expect(planned)
        self._is_over = threading.Event()
        self._budget_gib = bounds.budget_gib
        self._said = ""

    def expect(self, planned: Sequence[Unit]) -> None:
        """Reckon with these units from now on, where they became known only after the start."""
        self._planned = {unit: self._costs.expected(unit) for unit in planned}

    def __enter__(self) -> "Meter":
        self._last_line = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="meter", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        # What came after the last look is said all the same.
        self._warn(self._broker.state, self._broker.finished)

    def _watch(self) -> None:
        # A terminal that is gone (SIGHUP) is no reason to stop looking.
        while not self._is_over.wait(LOOK_S):
            with contextlib.suppress(OSError):
                self._look(time.monotonic())

    def _look(self, now: float) -> None:
        state, finished = self._broker.state, self._broker.finished
        if not state.budget_gib:
            return
        self._keep(
            Sample(now, state.held_gib, state.charged_gib, len(state.running), state.waiting)
        )
        self._warn(state, finished)
        found = estimate(self._planned, finished, state, jobs=self._jobs, now=now)
        if self._console.is_terminal:
            width = max(_NARROWEST, _columns() - _BESIDE - len(self._step.title))
            rows = (
                *filled(figures(found, state), width, lines=3),
                *filled(units(state), width, lines=2),
            )
            self._step.progress(found.share, 1.0, "\n".join(rows))
        elif now - self._last_line >= LINE_S:
            self._last_line = now
            line = ", ".join(figures(found, state)) + ": " + ", ".join(units(state)[:3])
            if line != self._said:
                self._console.info(line)
            self._said = line

    def _keep(self, sample: Sample) -> None:
        last = self.samples[-1] if self.samples else None
        if last is None or (last.held_gib, last.charged_gib, last.running, last.waiting) != (
            sample.held_gib,
            sample.charged_gib,
            sample.running,
            sample.waiting,
        ):
            self.samples.append(sample)

    def _warn(self, state: State, finished: Sequence[Finished]) -> None:
        killed = next((one for one in reversed(finished) if one.is_killed), None)
        if killed and 0 < state.budget_gib < self._budget_gib and not self._broker.trouble:
            name = Path(killed.unit.source).name
            self._console.warn(
                f"memory ran out while {name} was compiled: it goes on, with {state.budget_gib:.1f}"
                f" GiB instead of {self._budget_gib:.1f}"
            )
        self._budget_gib = state.budget_gib or self._budget_gib


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 80
