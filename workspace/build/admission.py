"""Which waiting compilers may start now: within a number, a budget of memory, and what the machine has left.

It decides and does nothing else: the clock, and what the machine says, are given to it. tickets.py asks it for real compilers, perf/replay.py for those of
a recorded build.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from workspace.build.costs import Cost

# A unit that waits, and beside a compiler that runs: ninja's shell and a launcher. 169 of them held 563 MiB (proportional set size).
LAUNCHER_GIB = 4 / 1024
# Share of the last 10 s in which something stood still for want of memory (PSI, `some avg10`), from which on nothing more is started.
PRESSED_PERCENT = 10.0
# Where others keep the memory for so long, and none of ours runs, compilers are started all the same, one at a time: the build has to end.
PATIENCE_S = 30.0
# Sums of many peaks, added up in another order, differ in the last digit.
_ROUNDING_GIB = 1e-9


@dataclass(frozen=True)
class Bounds:
    """At most so many compilers at once, and so much memory for all of them."""

    jobs: int
    budget_gib: float


@dataclass(frozen=True)
class Live:
    """What the machine says now: GiB that may still be taken without touching what is left for the system, and memory pressure in percent."""

    available_gib: float
    pressed_percent: float = 0.0


@dataclass(frozen=True)
class Ticket:
    """A compiler that waits (`since` it asked) or runs (`since` it was admitted). `held_gib` is what its processes hold, as seen last."""

    number: int
    cost: Cost
    is_light: bool
    since: float
    held_gib: float = 0.0

    @property
    def charged_gib(self) -> float:
        """What it is reckoned with: its expected peak, or what it holds where that is more."""
        return max(self.cost.peak_gib, self.held_gib)

    @property
    def rank(self) -> tuple[bool, float, int]:
        """Largest time x peak first: what is long and large is packed best while there is much beside it to fill up with.

        A preprocessor of a compiler cache comes before: only after it its compiler can be seen, and the best order needs all of them seen.
        """
        return (not self.is_light, -self.cost.seconds * self.cost.peak_gib, self.number)


class Admission:
    """The compilers that wait and run. All times are seconds of one clock, the caller's.

    Who stands first and does not fit gets a reservation for the moment at which, by the times expected, enough will be free; others go
    ahead only where they do not push that moment back (EASY backfilling, Lifka 1995). So all cores are used and nobody waits for ever.
    Who is larger than the budget is started once nothing else runs or fits, alone.
    """

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.why = ""
        self._waiting: dict[int, Ticket] = {}
        self._running: dict[int, Ticket] = {}
        self._hindered_since: float | None = None

    @property
    def waiting(self) -> tuple[Ticket, ...]:
        return tuple(self._waiting.values())

    @property
    def running(self) -> tuple[Ticket, ...]:
        return tuple(self._running.values())

    @property
    def charged_gib(self) -> float:
        """Memory that those who run are reckoned with, and their launchers, and those of the waiting."""
        return sum(ticket.charged_gib for ticket in self._running.values()) + LAUNCHER_GIB * (len(self._running) + len(self._waiting))

    def ask(self, number: int, cost: Cost, now: float, *, is_light: bool = False) -> None:
        """Put a compiler among the waiting."""
        self._waiting[number] = Ticket(number, cost, is_light, now)

    def leave(self, number: int) -> None:
        """Take a compiler back that has ended, or that no longer waits."""
        self._waiting.pop(number, None)
        self._running.pop(number, None)

    def measured(self, number: int, held_gib: float) -> None:
        """Note what the processes of a running compiler hold."""
        if ticket := self._running.get(number):
            self._running[number] = replace(ticket, held_gib=held_gib)

    def admit(self, now: float, live: Live | None = None) -> tuple[int, ...]:
        """Return who may start now, in this order; they count as running from here on. `why` says what keeps the others waiting."""
        started = []
        while (number := self._next(now, live)) is not None:
            self._running[number] = replace(self._waiting.pop(number), since=now)
            started.append(number)
        return tuple(started)

    def _next(self, now: float, live: Live | None) -> int | None:
        self.why = ""
        if not self._waiting:
            return None
        if len(self._running) >= self.bounds.jobs:
            self.why = f"{len(self._running)} run, the most that may"
            return None
        if live and live.pressed_percent >= PRESSED_PERCENT:
            self.why = f"memory is short: something stands still for it {live.pressed_percent:.0f} % of the time"
            return self._alone(now, is_hindered=True)
        waiting = sorted(self._waiting.values(), key=lambda ticket: ticket.rank)
        free_gib = self._free_gib(live)
        if (number := self._fitting(waiting, free_gib, now)) is not None:
            self._hindered_since = None
            return number
        least_gib = min(ticket.cost.peak_gib for ticket in waiting)
        self.why = f"{max(free_gib, 0.0):.1f} GiB are free, {least_gib:.1f} is the least that a waiting compiler needs"
        return self._alone(now, is_hindered=live is not None and live.available_gib < least_gib <= self.bounds.budget_gib)

    def _free_gib(self, live: Live | None) -> float:
        """What the budget and, where that is less, the machine has left once all who run are as large as expected."""
        free_gib = self.bounds.budget_gib - self.charged_gib
        if live:
            growth_gib = sum(ticket.charged_gib - ticket.held_gib for ticket in self._running.values())
            free_gib = min(free_gib, live.available_gib - growth_gib)
        return free_gib + _ROUNDING_GIB

    def _fitting(self, waiting: Sequence[Ticket], free_gib: float, now: float) -> int | None:
        """The first in the order that fits and keeps to the reservation of the one before it, if there is any."""
        reserved: tuple[float, float] | None = None
        for ticket in waiting:
            peak_gib = ticket.cost.peak_gib
            if peak_gib <= free_gib and (reserved is None or now + ticket.cost.seconds <= reserved[0] or peak_gib <= reserved[1]):
                return ticket.number
            if reserved is None:
                reserved = self._reservation(peak_gib, free_gib, now)
        return None

    def _reservation(self, peak_gib: float, free_gib: float, now: float) -> tuple[float, float] | None:
        """When, by the times expected, `peak_gib` will be free and how much will be left over then; None where it never will."""
        for ticket in sorted(self._running.values(), key=lambda ticket: ticket.since + ticket.cost.seconds):
            free_gib += ticket.charged_gib
            if free_gib >= peak_gib:
                return max(now, ticket.since + ticket.cost.seconds), free_gib - peak_gib
        return None

    def _alone(self, now: float, *, is_hindered: bool) -> int | None:
        """The smallest, with nothing beside it, so that every build comes to its end; at once unless it is others who take the memory."""
        if not is_hindered:
            self._hindered_since = None
        elif self._hindered_since is None:
            self._hindered_since = now
        if self._running or (self._hindered_since is not None and now - self._hindered_since < PATIENCE_S):
            return None
        return min(self._waiting.values(), key=lambda ticket: (ticket.cost.peak_gib, ticket.number)).number
