"""How far a build is: a bar on a terminal, a line now and then elsewhere. Percent and time left come from known costs, not from counts."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.build.admission import Bounds
from workspace.build.connection import Finished, State
from workspace.build.costs import LINK, Cost, Costs, Unit
from workspace.build.native.timeline import Sample
from workspace.build.tickets import Broker
from workspace.core.console import Console, Step

LOOK_S = 0.5
LINE_S = 10.0
# What stands beside a step's text in its row: spinner, bar, time and what lies between them (core/console.py).
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


def estimate(planned: Mapping[Unit, Cost], finished: Sequence[Finished], state: State, *, jobs: int, now: float) -> Estimate:
    """Work out how far it is. What is left takes at least its share of the cores, of the memory-time and its longest unit; the build keeps near that.

    Machines differ: what the units that are done took, against what was expected, is what the others are expected to take.
    """
    done = {one.unit: one for one in finished if one.status == 0 and _is_reckoned(one.unit)}
    running = {one.unit: one for one in state.running if _is_reckoned(one.unit)}
    costs = {unit: one.expected for unit, one in done.items()} | {unit: one.expected for unit, one in running.items()} | dict(planned)
    elapsed = {unit: one.seconds for unit, one in done.items()}
    elapsed |= {unit: now - one.started for unit, one in running.items() if now - one.started > costs[unit].seconds}
    # Few units say little: as much as a tenth of the build speaks for the expected times.
    prior = _PRIOR_SHARE * sum(cost.seconds for cost in costs.values()) or 1.0
    pace = (sum(elapsed.values()) + prior) / (sum(costs[unit].seconds for unit in elapsed) + prior)
    over = {unit: costs[unit].seconds for unit in done}
    over |= {unit: min((now - one.started) / pace, costs[unit].seconds * _NEARLY) for unit, one in running.items() if unit not in done}
    left = {unit: cost.seconds - over.get(unit, 0.0) for unit, cost in costs.items() if unit not in done}
    memory = sum(seconds * costs[unit].peak_gib for unit, seconds in left.items()) / state.budget_gib if state.budget_gib else 0.0
    left_s = max(sum(left.values()) / jobs, memory, *left.values(), 0.0) * pace
    return Estimate(len(done), len(costs), sum(over.values()) / (sum(cost.seconds for cost in costs.values()) or 1.0), left_s)


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
    """Return the names of the units that run, those that have run longest first; where none does, why the others wait."""
    if state.waiting and not state.running:
        return (state.why,)
    return tuple(
        Path(one.unit.source).name if one.unit.source != LINK else f"link of {one.unit.target}"
        for one in sorted(state.running, key=lambda one: one.started)
        if not one.unit.is_light
    )


def filled(parts: Sequence[str], width: int, *, lines: int) -> tuple[str, ...]:
    """Set parts into at most so many lines of a width, commas between them; what has no room is counted."""
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
    """Shows how a build goes while the block is entered, from a thread. `samples` are what it saw."""

    def __init__(self, broker: Broker, planned: Sequence[Unit], costs: Costs, *, bounds: Bounds, console: Console, step: Step) -> None:
        self.samples: list[Sample] = []
        self._broker, self._jobs, self._console, self._step = broker, bounds.jobs, console, step
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
        self._keep(Sample(now, state.held_gib, state.charged_gib, len(state.running), state.waiting))
        self._warn(state, finished)
        found = estimate(self._planned, finished, state, jobs=self._jobs, now=now)
        if self._console.is_terminal:
            width = max(_NARROWEST, _columns() - _BESIDE - len(self._step.title))
            rows = (*filled(figures(found, state), width, lines=3), *filled(units(state), width, lines=2))
            self._step.progress(found.share, 1.0, "\n".join(rows))
        elif now - self._last_line >= LINE_S:
            self._last_line = now
            line = ", ".join(figures(found, state)) + ": " + ", ".join(units(state)[:3])
            if line != self._said:
                self._console.say(line)
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
            self._console.warn(f"memory ran out while {name} was compiled: it goes on, with {state.budget_gib:.1f} GiB instead of {self._budget_gib:.1f}")
        self._budget_gib = state.budget_gib or self._budget_gib


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 80
