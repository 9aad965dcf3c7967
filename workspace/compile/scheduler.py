"""Scheduler of compilers: which waiting compilers may start now, within a number, a memory budget,
and what the machine has available. And the connection of a launcher to the job server.

The scheduler only decides: its caller passes the time and the memory status. job_server.py runs it
for real compilers, support/perf.py for those of a recorded build.
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
from workspace.machine.hardware import PRESSURE_PERCENT

# Memory of ninja's shell and a launcher, for a unit that waits and beside a compiler that runs. 169
# of them held 563 MiB (proportional set size).
LAUNCHER_GIB = 4 / 1024
# If other processes hold the memory this long and no compiler of ours runs, start compilers anyway,
# one at a time: the build has to end.
PATIENCE_S = 30.0
# Sums of many peaks differ in the last digit, depending on the order.
_ROUNDING_GIB = 1e-9


@dataclass(frozen=True)
class Bounds:
    """Bounds of a build: the most compilers at once, and the memory for all of them."""

    jobs: int
    budget_gib: float


@dataclass(frozen=True)
class MemoryStatus:
    """Memory status of the machine: GiB available beyond what is reserved for the system, and
    memory pressure in percent.
    """

    available_gib: float
    pressure_percent: float = 0.0


@dataclass(frozen=True)
class JobToken:
    """Job token of a compiler that waits (`since` its request) or runs (`since` its start).
    `held_gib` is the memory of its processes at the last measurement.
    """

    number: int
    cost: Cost
    is_light: bool
    since: float
    held_gib: float = 0.0

    @property
    def charged_gib(self) -> float:
        """Memory that is charged for it: its expected peak, or what it holds if that is more."""
        return max(self.cost.peak_gib, self.held_gib)

    @property
    def rank(self) -> tuple[bool, float, int]:
        """Sort key, largest time x peak first: long and large units pack best while many others can
        fill the gaps.

        A compiler cache's preprocessor comes before them: its compiler asks for a token only after
        it, and the best order needs all compilers.
        """
        return (not self.is_light, -self.cost.seconds * self.cost.peak_gib, self.number)


class Admission:
    """Compilers that wait and run. All times are seconds of one clock, the caller's.

    The first in the order that does not fit gets a reservation for the time at which, by expected
    times, enough memory will be free; others start earlier only if they do not delay it (EASY
    backfilling, Lifka 1995). So all cores are used and no unit starves. A unit larger than the
    budget starts alone, once nothing else runs or fits.
    """

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.why = ""
        self._waiting: dict[int, JobToken] = {}
        self._running: dict[int, JobToken] = {}
        self._blocked_since: float | None = None

    @property
    def waiting(self) -> tuple[JobToken, ...]:
        return tuple(self._waiting.values())

    @property
    def running(self) -> tuple[JobToken, ...]:
        return tuple(self._running.values())

    @property
    def charged_gib(self) -> float:
        """Memory charged for the running compilers, their launchers, and the waiting launchers."""
        return sum(token.charged_gib for token in self._running.values()) + LAUNCHER_GIB * (
            len(self._running) + len(self._waiting)
        )

    def request(self, number: int, cost: Cost, now: float, *, is_light: bool = False) -> None:
        """Add a compiler to the waiting ones."""
        self._waiting[number] = JobToken(number, cost, is_light, now)

    def leave(self, number: int) -> None:
        """Remove a compiler that has ended or no longer waits."""
        self._waiting.pop(number, None)
        self._running.pop(number, None)

    def measured(self, number: int, held_gib: float) -> None:
        """Record the memory that the processes of a running compiler hold."""
        if token := self._running.get(number):
            self._running[number] = replace(token, held_gib=held_gib)

    def admit(self, now: float, memory: MemoryStatus | None = None) -> tuple[int, ...]:
        """Return the compilers that may start now, in this order; they count as running from here
        on. Then `why` is the reason why the others wait.
        """
        started = []
        while (number := self._next(now, memory)) is not None:
            self._running[number] = replace(self._waiting.pop(number), since=now)
            started.append(number)
        return tuple(started)

    def _next(self, now: float, memory: MemoryStatus | None) -> int | None:
        self.why = ""
        if not self._waiting:
            return None
        if len(self._running) >= self.bounds.jobs:
            self.why = f"{len(self._running)} running, which is the limit"
            return None
        if memory and memory.pressure_percent >= PRESSURE_PERCENT:
            self.why = (
                f"memory is short: tasks wait for it {memory.pressure_percent:.0f}% of the time"
            )
            return self._alone(now, is_blocked=True)
        waiting = sorted(self._waiting.values(), key=lambda token: token.rank)
        free_gib = self._free_gib(memory)
        if (number := self._fitting(waiting, free_gib, now)) is not None:
            self._blocked_since = None
            return number
        least_gib = min(token.cost.peak_gib for token in waiting)
        self.why = (
            f"{max(free_gib, 0.0):.1f} GiB are free, and a waiting compiler needs at least"
            f" {least_gib:.1f}"
        )
        return self._alone(
            now,
            is_blocked=memory is not None
            and memory.available_gib < least_gib <= self.bounds.budget_gib,
        )

    def _free_gib(self, memory: MemoryStatus | None) -> float:
        """Return what is left of the budget, or of the machine's memory if that is less, once all
        running compilers have grown to their expected peaks.
        """
        free_gib = self.bounds.budget_gib - self.charged_gib
        if memory:
            growth_gib = sum(token.charged_gib - token.held_gib for token in self._running.values())
            free_gib = min(free_gib, memory.available_gib - growth_gib)
        return free_gib + _ROUNDING_GIB

    def _fitting(self, waiting: Sequence[JobToken], free_gib: float, now: float) -> int | None:
        """Return the first unit in the order that fits and does not delay the reservation before
        it.
        """
        reserved: tuple[float, float] | None = None
        for token in waiting:
            peak_gib = token.cost.peak_gib
            if peak_gib <= free_gib and (
                reserved is None
                or now + token.cost.seconds <= reserved[0]
                or peak_gib <= reserved[1]
            ):
                return token.number
            if reserved is None:
                reserved = self._reservation(peak_gib, free_gib, now)
        return None

    def _reservation(
        self, peak_gib: float, free_gib: float, now: float
    ) -> tuple[float, float] | None:
        """Return when, by expected times, `peak_gib` will be free, and how much will be left over
        then; None if never.
        """
        for token in sorted(
            self._running.values(), key=lambda token: token.since + token.cost.seconds
        ):
            free_gib += token.charged_gib
            if free_gib >= peak_gib:
                return max(now, token.since + token.cost.seconds), free_gib - peak_gib
        return None

    def _alone(self, now: float, *, is_blocked: bool) -> int | None:
        """Return the smallest unit if nothing else runs, so that every build ends; wait for
        PATIENCE_S first if other processes hold the memory.
        """
        if not is_blocked:
            self._blocked_since = None
        elif self._blocked_since is None:
            self._blocked_since = now
        if self._running or (
            self._blocked_since is not None and now - self._blocked_since < PATIENCE_S
        ):
            return None
        return min(
            self._waiting.values(), key=lambda token: (token.cost.peak_gib, token.number)
        ).number


@dataclass(frozen=True)
class Replayed:
    """Result of a replay: seconds from the first start to the last end, and the most memory (sum of
    the peaks of the running units) and compilers at any time.
    """

    seconds: float
    most_gib: float
    most_jobs: int


def simulate(costs: Sequence[Cost], bounds: Bounds) -> Replayed:
    """Request tokens for all units at once, and run each for its expected cost on a simulated
    clock.
    """
    admission = Admission(bounds)
    for number, cost in enumerate(costs):
        admission.request(number, cost, 0.0)
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
    """A unit that has ended. `peak_gib` is the larger of two figures: the peak of its largest
    process, and the sum of all its processes, measured once a second.

    `status` is its exit code, negative for a signal, or None if the launcher itself was killed;
    `is_killed`: killed because memory ran out.
    """

    unit: Unit
    expected: Cost
    seconds: float
    peak_gib: float
    status: int | None
    is_killed: bool = False


@dataclass(frozen=True)
class Running:
    """A unit whose compiler runs, since `started`, a time of time.monotonic."""

    unit: Unit
    expected: Cost
    started: float


@dataclass(frozen=True)
class State:
    """State of a build for the progress bar: running units, how many wait and why, memory held, and
    the budget, which is halved each time memory runs out.
    """

    running: tuple[Running, ...] = ()
    waiting: int = 0
    why: str = ""
    held_gib: float = 0.0
    budget_gib: float = 0.0


@dataclass(frozen=True)
class End:
    """End of a compiler as its launcher reports it: `status` as in waitpid(2)."""

    status: int
    seconds: float
    largest_gib: float


@dataclass
class Client:
    """Connection to a launcher, and the unit it requested a token for. `kills` is the kernel's
    count of out-of-memory kills when its compiler started.
    """

    connection: socket.socket
    number: int
    pid: int
    group: int
    has_requested: bool = False
    unit: Unit = field(default_factory=lambda: Unit("", ""))
    expected: Cost = LIGHT
    is_nested: bool = False
    started: float | None = None
    peak_gib: float = 0.0
    kills: int = 0
    _received: bytearray = field(default_factory=bytearray)

    @property
    def is_counted(self) -> bool:
        return self.started is not None and not self.is_nested

    def receive(self) -> bool:
        """Read what has arrived. Return whether the connection has ended, or has sent more than any
        command is long.
        """
        try:
            data = self.connection.recv(1 << 16)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self._received += data
        return not data or len(self._received) > _LONGEST_REQUEST

    def parse(self) -> "list[str] | End | None":
        """Return the received message once it is complete: first the command, then each end of it.
        Raises ValueError for anything else.
        """
        line, newline, command = bytes(self._received).partition(b"\n")
        if not newline or (not self.has_requested and len(command) < int(line)):
            return None
        self._received.clear()
        if not self.has_requested:
            self.has_requested = True
            return [os.fsdecode(argument) for argument in command.split(b"\0")]
        status, seconds, largest_kib = (float(field) for field in line.split())
        return End(int(status), seconds, largest_kib / _KIB_PER_GIB)

    def send(self, answer: str) -> None:
        """Send an answer to the launcher. If it is gone, the end of its connection shows that
        later.
        """
        with contextlib.suppress(OSError):
            self.connection.send(f"{answer}\n".encode())

    def start(self, now: float, kills: int) -> None:
        self.started, self.kills, self.peak_gib = now, kills, 0.0
        self.send(launcher.GO)


def listen(folder: Path) -> socket.socket:
    """Return the listening socket of a build in `folder`; replace one that a killed build left."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    # An address holds 108 bytes, a path many more (unix(7)).
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        (folder / "socket").unlink(missing_ok=True)
        listener.bind(f"/proc/self/fd/{place}/socket")
        (folder / "socket").chmod(0o600)
    finally:
        os.close(place)
    listener.listen(4096)
    return listener


def accept_client(listener: socket.socket, number: int) -> Client | None:
    """Return the next client that has connected, or None."""
    try:
        connection, _ = listener.accept()
    except BlockingIOError:
        return None
    connection.setblocking(False)
    pid, user, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    if user not in (os.geteuid(), 0):
        connection.close()
        return None
    group = 0
    with contextlib.suppress(OSError):
        group = os.getpgid(pid)
    return Client(connection, number, pid, group)
