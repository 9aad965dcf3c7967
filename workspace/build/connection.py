"""A launcher's connection to the build, and what is known of a unit while it waits, while it runs and once it has ended.

The socket and the two kinds of message belong here: a command whole, its length first; and how a compiler ended. What is done about them is tickets.py's.
"""

import contextlib
import os
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path

from workspace.build import launcher
from workspace.build.costs import LIGHT, Cost, Unit

_LONGEST_REQUEST = 1 << 22
_KIB_PER_GIB = 1 << 20


@dataclass(frozen=True)
class Finished:
    """A unit that has ended. `peak_gib` is the larger of two figures: the largest process of the unit at its largest, and all of them at one look a second.

    `status` is its exit code, negative for a signal, or None where the launcher itself was killed; `is_killed`: as the kernel does when memory runs out.
    `started` is on the clock of time.monotonic.
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
    """What a progress bar shows: units that run, how many wait and why, memory reckoned with and memory held, and the budget, halved where memory ran out."""

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
class Caller:
    """A connection: the launcher at its other end, and what it has asked for. `kills` is the kernel's count when its compiler began."""

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
        """Take in what has come. Return whether it was the end of the connection, or more than any command is long."""
        try:
            heard = self.connection.recv(1 << 16)
        except BlockingIOError:
            return False
        except OSError:
            heard = b""
        self._received += heard
        return not heard or len(self._received) > _LONGEST_REQUEST

    def understand(self) -> "list[str] | End | None":
        """Return what was received as soon as it is whole: the command first, then each of its ends. Raises ValueError where it is neither."""
        line, newline, words = bytes(self._received).partition(b"\n")
        if not newline or (not self.has_asked and len(words) < int(line)):
            return None
        self._received.clear()
        if not self.has_asked:
            self.has_asked = True
            return [os.fsdecode(word) for word in words.split(b"\0")]
        status, seconds, largest_kib = (float(word) for word in line.split())
        return End(int(status), seconds, largest_kib / _KIB_PER_GIB)

    def say(self, answer: str) -> None:
        """Answer the launcher. Who is gone by now is heard of by the end of its connection."""
        with contextlib.suppress(OSError):
            self.connection.send(f"{answer}\n".encode())

    def start(self, now: float, kills: int) -> None:
        self.started, self.kills, self.peak_gib = now, kills, 0.0
        self.say(launcher.GO)


def listen(folder: Path) -> socket.socket:
    """Return the socket of a build, bound in `folder`; one that a killed build left there is replaced."""
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


def accept(listener: socket.socket, number: int) -> Caller | None:
    """Return the next one that has called, None where there is none."""
    try:
        connection, _ = listener.accept()
    except BlockingIOError:
        return None
    connection.setblocking(False)
    pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    group = 0
    with contextlib.suppress(OSError):
        group = os.getpgid(pid)
    return Caller(connection, number, pid, group)
