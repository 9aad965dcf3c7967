"""Progress of a build: a bar on a terminal, a line now and then elsewhere; and its summary. Percent
and remaining time come from expected costs, not from counts.
"""

import contextlib
import textwrap
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.compile.costs import LINK, Cost, Costs, Unit
from workspace.compile.job_server import JobServer
from workspace.compile.scheduler import Finished, State
from workspace.core.console import Console, Step

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
