"""The processes of one server and the shared memory that they leave, read from /proc. Standard
library only.

vLLM's front starts an engine, the engine starts workers, and workers start compilers. They are
found by their supervisor, by its session, and, if the supervisor was killed, by what they inherited
from it: a tag among their variables, a working folder, a log.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

SHARED = "/dev/shm"
POLL_S = 0.02
# The environment variable that holds the tag of a server.
TAG = "WORKSPACE_SERVER"


@dataclass(frozen=True)
class Process:
    """A running process. `started` counts clock ticks since boot (proc_pid_stat(5)): pid and start
    together identify a process, although the kernel reuses pids.
    """

    parent: int
    session: int
    started: int


@dataclass(frozen=True)
class ProcessTree:
    """Traits that the processes of one server share: pid and start of their supervisor (the common
    ancestor and session leader), a tag, a folder and a log.
    """

    supervisor_pid: int
    started: int
    tag: str
    folder: str
    log: str

    def members(self) -> set[int]:
        """Return the pids of all running processes of the tree, the supervisor included."""
        known = living()
        is_supervised = (
            self.supervisor_pid in known and known[self.supervisor_pid].started == self.started
        )
        # The kernel does not reuse a pid while a session still has it as its id
        # (pid_namespaces(7)), but the present session may be a later one.
        found = {
            pid
            for pid, process in known.items()
            if process.session == self.supervisor_pid
            and process.started >= self.started
            and (is_supervised or self._inherited(pid))
        }
        found |= {
            pid
            for pid, process in known.items()
            if process.started >= self.started and pid not in found and _is_tagged(pid, self.tag)
        }
        if is_supervised:
            found.add(self.supervisor_pid)
        return found | below(found, known)

    def _inherited(self, pid: int) -> bool:
        """Return whether a process has the server's folder, log or tag.

        The tag alone is not enough: a process that sets its title overwrites /proc/PID/environ.
        """
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/cwd").removesuffix(" (deleted)") == self.folder:
                return True
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{descriptor}")
                if target.removesuffix(" (deleted)") == self.log:
                    return True
        return _is_tagged(pid, self.tag)


def living() -> dict[int, Process]:
    """Return every running process of this machine by its pid, without zombies."""
    found = ((int(entry), _process(int(entry))) for entry in os.listdir("/proc") if entry.isdigit())
    return {pid: process for pid, process in found if process}


def started_at(pid: int) -> int | None:
    """Return the clock tick at which a process was started, None if it does not run."""
    found = _process(pid)
    return found.started if found else None


def below(roots: set[int], known: dict[int, Process]) -> set[int]:
    """Return the pids of all descendants of `roots`."""
    found: set[int] = set()
    generation = set(roots)
    while (
        generation := {pid for pid, process in known.items() if process.parent in generation}
        - found
    ):
        found |= generation
    return found


def end(find: Callable[[], set[int]], *, grace_s: float, kill_grace_s: float) -> bool:
    """Terminate the processes that `find` finds, then kill them, those started meanwhile included.

    Return whether nothing had to be killed. Raises TimeoutError if a process outlives even SIGKILL,
    as one that hangs in a driver does.
    """
    for signal_, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, kill_grace_s)):
        deadline = time.monotonic() + patience_s
        signalled: set[int] = set()
        while running := find():
            for pid in running - signalled:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal_)
            signalled |= running
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        else:
            return signal_ is signal.SIGTERM
    raise TimeoutError(", ".join(map(str, sorted(running))))


def shared_files() -> frozenset[str]:
    """Return the names in /dev/shm now: a new name shows at less cost than `shared_by` has."""
    try:
        return frozenset(os.listdir(SHARED))
    except OSError:
        return frozenset()


def shared_by(pids: Iterable[int]) -> set[str]:
    """Return the files in /dev/shm that processes have mapped; a killed process leaves them."""
    found: set[str] = set()
    for pid in pids:
        with (
            contextlib.suppress(OSError),
            open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file,
        ):
            for line in file:
                path = line.rstrip("\n").partition("/")
                if f"/{path[2]}".startswith(f"{SHARED}/") and not line.endswith("(deleted)\n"):
                    found.add(f"/{path[2]}")
    return found


def remove_shared(names: Iterable[str]) -> tuple[str, ...]:
    """Remove files of /dev/shm that no running process has mapped. Return the removed files."""
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


def resident_bytes(pids: Iterable[int]) -> int:
    """Return the memory that processes hold, shared pages counted with each (proc_pid_statm(5))."""
    pages = 0
    for pid in pids:
        with (
            contextlib.suppress(OSError, ValueError, IndexError),
            open(f"/proc/{pid}/statm", encoding="ascii") as file,
        ):
            pages += int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _process(pid: int) -> Process | None:
    with (
        contextlib.suppress(OSError, ValueError, IndexError),
        open(f"/proc/{pid}/stat", "rb") as file,
    ):
        fields = file.read().rpartition(b")")[2].split()
        if fields[0] not in (b"Z", b"X"):
            return Process(int(fields[1]), int(fields[3]), int(fields[19]))
    return None


def _is_tagged(pid: int, tag: str) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        return f"{TAG}={tag}".encode() in file.read().split(b"\0")
    return False
