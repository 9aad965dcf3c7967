"""Which waiting compilers may start now: within a number, a budget of memory, and what the machine
has left.

It decides and does nothing else: the clock, and what the machine says, are given to it. tickets.py
asks it for real compilers, perf/replay.py for those of a recorded build.
"""

import contextlib
import heapq
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from workspace.compile import launcher
from workspace.compile.costs import LIGHT, Cost, Unit

# A unit that waits, and beside a compiler that runs: ninja's shell and a launcher. 169 of them held
# 563 MiB (proportional set size).
LAUNCHER_GIB = 4 / 1024
# Share of the last 10 s in which something stood still for want of memory (PSI, `some avg10`), from
# which on nothing more is started.
PRESSED_PERCENT = 10.0
# Where others keep the memory for so long, and none of ours runs, compilers are started all the
# same, one at a time: the build has to end.
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
    """What the machine says now: GiB that may still be taken without touching what is left for the
    system, and memory pressure in percent.
    """

    available_gib: float
    pressed_percent: float = 0.0


@dataclass(frozen=True)
class Ticket:
    """A compiler that waits (`since` it asked) or runs (`since` it was admitted). `held_gib` is
    what its processes hold, as seen last.
    """

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
        """Largest time x peak first: what is long and large is packed best while there is much
        beside it to fill up with.

        A preprocessor of a compiler cache comes before: only after it its compiler can be seen, and
        the best order needs all of them seen.
        """
        return (not self.is_light, -self.cost.seconds * self.cost.peak_gib, self.number)


class Admission:
    """The compilers that wait and run. All times are seconds of one clock, the caller's.

    Who stands first and does not fit gets a reservation for the moment at which, by the times
    expected, enough will be free; others go ahead only where they do not push that moment back
    (EASY backfilling, Lifka 1995). So all cores are used and nobody waits for ever. Who is larger
    than the budget is started once nothing else runs or fits, alone.
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
        """Memory that those who run are reckoned with, and their launchers, and those of the
        waiting.
        """
        return sum(ticket.charged_gib for ticket in self._running.values()) + LAUNCHER_GIB * (
            len(self._running) + len(self._waiting)
        )

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
        """Return who may start now, in this order; they count as running from here on. `why` says
        what keeps the others waiting.
        """
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
            self.why = (
                f"memory is short: something stands still for it {live.pressed_percent:.0f} % of"
                " the time"
            )
            return self._alone(now, is_hindered=True)
        waiting = sorted(self._waiting.values(), key=lambda ticket: ticket.rank)
        free_gib = self._free_gib(live)
        if (number := self._fitting(waiting, free_gib, now)) is not None:
            self._hindered_since = None
            return number
        least_gib = min(ticket.cost.peak_gib for ticket in waiting)
        self.why = (
            f"{max(free_gib, 0.0):.1f} GiB are free, {least_gib:.1f} is the least that a waiting"
            " compiler needs"
        )
        return self._alone(
            now,
            is_hindered=live is not None
            and live.available_gib < least_gib <= self.bounds.budget_gib,
        )

    def _free_gib(self, live: Live | None) -> float:
        """What the budget and, where that is less, the machine has left once all who run are as
        large as expected.
        """
        free_gib = self.bounds.budget_gib - self.charged_gib
        if live:
            growth_gib = sum(
                ticket.charged_gib - ticket.held_gib for ticket in self._running.values()
            )
            free_gib = min(free_gib, live.available_gib - growth_gib)
        return free_gib + _ROUNDING_GIB

    def _fitting(self, waiting: Sequence[Ticket], free_gib: float, now: float) -> int | None:
        """The first in the order that fits and keeps to the reservation of the one before it, if
        there is any.
        """
        reserved: tuple[float, float] | None = None
        for ticket in waiting:
            peak_gib = ticket.cost.peak_gib
            if peak_gib <= free_gib and (
                reserved is None
                or now + ticket.cost.seconds <= reserved[0]
                or peak_gib <= reserved[1]
            ):
                return ticket.number
            if reserved is None:
                reserved = self._reservation(peak_gib, free_gib, now)
        return None

    def _reservation(
        self, peak_gib: float, free_gib: float, now: float
    ) -> tuple[float, float] | None:
        """When, by the times expected, `peak_gib` will be free and how much will be left over then;
        None where it never will.
        """
        for ticket in sorted(
            self._running.values(), key=lambda ticket: ticket.since + ticket.cost.seconds
        ):
            free_gib += ticket.charged_gib
            if free_gib >= peak_gib:
                return max(now, ticket.since + ticket.cost.seconds), free_gib - peak_gib
        return None

    def _alone(self, now: float, *, is_hindered: bool) -> int | None:
        """The smallest, with nothing beside it, so that every build comes to its end; at once
        unless it is others who take the memory.
        """
        if not is_hindered:
            self._hindered_since = None
        elif self._hindered_since is None:
            self._hindered_since = now
        if self._running or (
            self._hindered_since is not None and now - self._hindered_since < PATIENCE_S
        ):
            return None
        return min(
            self._waiting.values(), key=lambda ticket: (ticket.cost.peak_gib, ticket.number)
        ).number


@dataclass(frozen=True)
class Replayed:
    """What came of it: seconds from the first start to the last end, and the most memory (sum of
    the peaks of those that ran) and compilers at any time.
    """

    seconds: float
    most_gib: float
    most_jobs: int


def simulate(costs: Sequence[Cost], bounds: Bounds) -> Replayed:
    """Let all units ask at once, and take from each of them what is expected of it."""
    admission = Admission(bounds)
    for number, cost in enumerate(costs):
        admission.ask(number, cost, 0.0)
    now, most_gib, most_jobs = 0.0, 0.0, 0
    running: list[tuple[float, int]] = []
    while admission.waiting or running:
        for number in admission.admit(now):
            heapq.heappush(running, (now + costs[number].seconds, number))
        most_gib = max(most_gib, sum(costs[number].peak_gib for _, number in running))
        most_jobs = max(most_jobs, len(running))
        now, ended = heapq.heappop(running)
        admission.leave(ended)
    return Replayed(now, most_gib, most_jobs)


_LONGEST_REQUEST = 1 << 22
_KIB_PER_GIB = 1 << 20


@dataclass(frozen=True)
class Finished:
    """A unit that has ended. `peak_gib` is the larger of two figures: the largest process of the
    unit at its largest, and all of them at one look a second.

    `status` is its exit code, negative for a signal, or None where the launcher itself was killed;
    `is_killed`: as the kernel does when memory runs out. `started` is on the clock of
    time.monotonic.
    """

    unit: Unit
    expected: Cost
    started: float
    seconds: float
    peak_gib: float
    status: int | None
    is_killed: bool = False


@dataclass(frozen=True)
class Running:
    """A unit whose compiler runs, since `started` on the clock of time.monotonic."""

    unit: Unit
    expected: Cost
    started: float


@dataclass(frozen=True)
class State:
    """What a progress bar shows: units that run, how many wait and why, memory reckoned with and
    memory held, and the budget, halved where memory ran out.
    """

    running: tuple[Running, ...] = ()
    waiting: int = 0
    why: str = ""
    charged_gib: float = 0.0
    held_gib: float = 0.0
    budget_gib: float = 0.0


@dataclass(frozen=True)
class End:
    """How a compiler ended, in its launcher's words: `status` as waitpid(2) has it."""

    status: int
    seconds: float
    largest_gib: float


@dataclass
class Client:
    """A connection: the launcher at its other end, and what it has asked for. `kills` is the
    kernel's count when its compiler began.
    """

    connection: socket.socket
    number: int
    pid: int
    group: int
    has_asked: bool = False
    unit: Unit = field(default_factory=lambda: Unit("", ""))
    expected: Cost = LIGHT
    is_elsewhere: bool = False
    is_nested: bool = False
    started: float | None = None
    peak_gib: float = 0.0
    kills: int = 0
    _received: bytearray = field(default_factory=bytearray)

    @property
    def is_counted(self) -> bool:
        return self.started is not None and not self.is_nested

    def hear(self) -> bool:
        """Take in what has come. Return whether it was the end of the connection, or more than any
        command is long.
        """
        try:
            heard = self.connection.recv(1 << 16)
        except BlockingIOError:
            return False
        except OSError:
            heard = b""
        self._received += heard
        return not heard or len(self._received) > _LONGEST_REQUEST

    def understand(self) -> "list[str] | End | None":
        """Return what was received as soon as it is whole: the command first, then each of its
        ends. Raises ValueError where it is neither.
        """
        line, newline, words = bytes(self._received).partition(b"\n")
        if not newline or (not self.has_asked and len(words) < int(line)):
            return None
        self._received.clear()
        if not self.has_asked:
            self.has_asked = True
            return [os.fsdecode(word) for word in words.split(b"\0")]
        status, seconds, largest_kib = (float(word) for word in line.split())
        return End(int(status), seconds, largest_kib / _KIB_PER_GIB)

    def info(self, answer: str) -> None:
        """Answer the launcher. Who is gone by now is heard of by the end of its connection."""
        with contextlib.suppress(OSError):
            self.connection.send(f"{answer}\n".encode())

    def start(self, now: float, kills: int) -> None:
        self.started, self.kills, self.peak_gib = now, kills, 0.0
        self.info(launcher.GO)


def listen(folder: Path) -> socket.socket:
    """Return the socket of a build, bound in `folder`; one that a killed build left there is
    replaced.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    # An address holds 108 bytes, a path many more (unix(7)).
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        (folder / "socket").unlink(missing_ok=True)
        listener.bind(f"/proc/self/fd/{place}/socket")
    finally:
        os.close(place)
    listener.listen(4096)
    return listener


def accept_client(listener: socket.socket, number: int) -> Client | None:
    """Return the next one that has called, None where there is none."""
    try:
        connection, _ = listener.accept()
    except BlockingIOError:
        return None
    connection.setblocking(False)
    pid, _, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    group = 0
    with contextlib.suppress(OSError):
        group = os.getpgid(pid)
    return Client(connection, number, pid, group)
