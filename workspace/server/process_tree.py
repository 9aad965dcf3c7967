"""The processes of one server, however they hang together, and the shared memory that they leave:
read from /proc, standard library only.

vLLM's front starts an engine, that workers, those compilers. They are known by the keeper above
them, by its session, and, where the keeper was killed, by what they have inherited: a mark among
their variables, a working folder, a log.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

SHARED = "/dev/shm"
POLL_S = 0.02
MARK = "WORKSPACE_SERVER"


@dataclass(frozen=True)
class Process:
    """A process that lives. `started` counts clock ticks since the machine started
    (proc_pid_stat(5)): with it a number is never taken for another's.
    """

    parent: int
    session: int
    started: int


@dataclass(frozen=True)
class ProcessTree:
    """What the processes of one server have in common. `keeper` is the number above them all, and
    of their session.
    """

    keeper: int
    started: int
    mark: str
    folder: str
    log: str

    def members(self) -> set[int]:
        """Return the numbers of all that live, the keeper included."""
        known = living()
        is_kept = self.keeper in known and known[self.keeper].started == self.started
        # A number is not given away while a session still bears it (pid_namespaces(7)), but the one
        # who bears it may be a later one.
        found = {
            number
            for number, one in known.items()
            if one.session == self.keeper
            and one.started >= self.started
            and (is_kept or self._inherited(number))
        }
        found |= {
            number
            for number, one in known.items()
            if one.started >= self.started and number not in found and _is_marked(number, self.mark)
        }
        if is_kept:
            found.add(self.keeper)
        return found | below(found, known)

    def _inherited(self, number: int) -> bool:
        """Whether a process works in the server's own folder or writes into its log. A title that
        is set overwrites the variables in /proc.
        """
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{number}/cwd").removesuffix(" (deleted)") == self.folder:
                return True
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):
                if (
                    os.readlink(f"/proc/{number}/fd/{descriptor}").removesuffix(" (deleted)")
                    == self.log
                ):
                    return True
        return _is_marked(number, self.mark)


def living() -> dict[int, Process]:
    """Return every process of this machine that runs; the dead whom nobody has waited for do not
    count.
    """
    found = ((int(entry), _process(int(entry))) for entry in os.listdir("/proc") if entry.isdigit())
    return {number: one for number, one in found if one}


def started_at(number: int) -> int | None:
    """The clock tick at which a process was started, None for one that does not run."""
    found = _process(number)
    return found.started if found else None


def below(roots: set[int], known: dict[int, Process]) -> set[int]:
    """What was started by `roots`, by what these started, and so on."""
    found: set[int] = set()
    generation = set(roots)
    while (
        generation := {number for number, one in known.items() if one.parent in generation} - found
    ):
        found |= generation
    return found


def end(find: Callable[[], set[int]], *, grace_s: float, kill_grace_s: float) -> bool:
    """Terminate what `find` finds, then kill it, those started meanwhile too. Return whether
    nothing had to be killed.

    Raises TimeoutError where something outlives even SIGKILL, as one that hangs in a driver does.
    """
    for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, kill_grace_s)):
        deadline = time.monotonic() + patience_s
        told: set[int] = set()
        while living := find():
            for one in living - told:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(one, number)
            told |= living
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        else:
            return number is signal.SIGTERM
    raise TimeoutError(", ".join(map(str, sorted(living))))


def shared_files() -> frozenset[str]:
    """The names in /dev/shm now: to see that there is a new one costs less than to ask whose it
    is.
    """
    try:
        return frozenset(os.listdir(SHARED))
    except OSError:
        return frozenset()


def shared_by(numbers: Iterable[int]) -> set[str]:
    """The files in /dev/shm that processes have mapped: what is left of them when these are killed
    is nobody's.
    """
    found: set[str] = set()
    for number in numbers:
        with (
            contextlib.suppress(OSError),
            open(f"/proc/{number}/maps", encoding="utf-8", errors="replace") as file,
        ):
            for line in file:
                path = line.rstrip("\n").partition("/")
                if f"/{path[2]}".startswith(f"{SHARED}/") and not line.endswith("(deleted)\n"):
                    found.add(f"/{path[2]}")
    return found


def remove_shared(names: Iterable[str]) -> tuple[str, ...]:
    """Remove files of /dev/shm, those aside that a living process has mapped. Return what was
    removed.
    """
    wanted = {
        name
        for name in names
        if name.startswith(f"{SHARED}/")
        and "/" not in name.removeprefix(f"{SHARED}/")
        and os.path.exists(name)
    }
    removed = []
    for name in sorted(wanted - shared_by(living()) if wanted else wanted):
        with contextlib.suppress(OSError):
            os.unlink(name)
            removed.append(name)
    return tuple(removed)


def resident_bytes(numbers: Iterable[int]) -> int:
    """Memory that processes hold, shared pages counted with each (proc_pid_statm(5))."""
    pages = 0
    for number in numbers:
        with (
            contextlib.suppress(OSError, ValueError, IndexError),
            open(f"/proc/{number}/statm", encoding="ascii") as file,
        ):
            pages += int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _process(number: int) -> Process | None:
    with (
        contextlib.suppress(OSError, ValueError, IndexError),
        open(f"/proc/{number}/stat", "rb") as file,
    ):
        fields = file.read().rpartition(b")")[2].split()
        if fields[0] not in (b"Z", b"X"):
            return Process(int(fields[1]), int(fields[3]), int(fields[19]))
    return None


def _is_marked(number: int, mark: str) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{number}/environ", "rb") as file:
        return f"{MARK}={mark}".encode() in file.read().split(b"\0")
    return False
