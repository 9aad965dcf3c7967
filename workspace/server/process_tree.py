"""The processes of one server and their shared memory, read from /proc, and the supervisor above
them.

vLLM's front starts an engine, the engine starts workers, and workers start compilers. They are
found by their supervisor, by its session, and, if the supervisor was killed, by what they inherited
from it: a tag among their variables, a working folder, a log.

Run as `python -I -S process_tree.py LIFELINE LOCK GRACE_S ENDED FOLDER RESTARTS PROGRAM ARG…`, this
file is the supervisor: the parent of all processes of a server, in a session of its own. LIFELINE
is the read end of a pipe: when it closes, the process that started the server is dead and the
supervisor ends the server; one byte in it lets the server live on alone. LOCK is kept open, and so
locked. RESTARTS is whether a server that died is started again. Standard library only.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass

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
    """Return the files in /dev/shm that processes have mapped; a killed process leaves them.

    Device and inode identify a file: sem_open(3) makes a semaphore under a name of its own and
    links it, so that /proc/PID/maps (proc_pid_maps(5)) lists it as deleted.
    """
    mapped: set[tuple[str, str]] = set()
    for pid in pids:
        with (
            contextlib.suppress(OSError),
            open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file,
        ):
            for line in file:
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith(f"{SHARED}/"):
                    mapped.add((fields[3], fields[4]))
    return {path for path, file in _identified().items() if file in mapped} if mapped else set()


def _identified() -> dict[str, tuple[str, str]]:
    """Return device and inode of each file in /dev/shm, as /proc/PID/maps writes them."""
    found: dict[str, tuple[str, str]] = {}
    for name in shared_files():
        with contextlib.suppress(OSError):
            status = os.lstat(f"{SHARED}/{name}")
            device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
            found[f"{SHARED}/{name}"] = (device, str(status.st_ino))
    return found


def remove_shared(names: Iterable[str]) -> None:
    """Remove files of /dev/shm that no running process has mapped."""
    wanted = {
        name
        for name in names
        if name.startswith(f"{SHARED}/")
        and "/" not in name.removeprefix(f"{SHARED}/")
        and os.path.exists(name)
    }
    for name in wanted - shared_by(living()) if wanted else wanted:
        with contextlib.suppress(OSError):
            os.unlink(name)


def record_shared(ended: str, names: Iterable[str]) -> None:
    """Add files in /dev/shm that the server has mapped to their record, beside the file `ended`.

    Once its processes are gone, only this record names them. The supervisor and whoever waits for
    the server both look. An error (a full disk) is dropped: the server still ends.
    """
    recorded = recorded_shared(ended)
    if not recorded.issuperset(names):
        record(f"{ended}.shared", "\n".join(sorted(recorded.union(names))))


def recorded_shared(ended: str) -> set[str]:
    """Return what `record_shared` has recorded, empty if there is no record."""
    with (
        contextlib.suppress(OSError),
        open(f"{ended}.shared", encoding="utf-8", errors="replace") as file,
    ):
        return set(file.read().splitlines())
    return set()


def forget_shared(ended: str) -> None:
    """Remove the record of `record_shared`: the files are removed, or another process has them."""
    for name in (f"{ended}.shared", f"{ended}.shared.new"):
        with contextlib.suppress(OSError):
            os.unlink(name)


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


# prctl(2): orphaned descendants become children of this process, which can then find them and wait
# for them.
PR_SET_CHILD_SUBREAPER = 36
KILL_GRACE_S = 10.0
NOT_STARTED = 127
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Pauses between two looks at the shared memory: short at first, when the server creates it.
FIRST_LOOK_S, RAREST_LOOK_S = 1.0, 60.0
# Pauses before a restart: the first, and the longest, to which they double.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0
# Pause between two looks at the memory, once a restart is due.
MEMORY_LOOK_S = 1.0
GIB = 2**30
# Processes that the kernel has killed because memory ran out, also that of a control group.
KILLS = ("/proc/vmstat", "\noom_kill ")


@dataclass(frozen=True)
class Restarts:
    """Whether a server that was ready and died is started again: at most `most` times, each time
    after a pause and once `needs_gib` are available while tasks wait for memory less than
    `pressure_percent` of the time (PSI, `some avg10`).
    """

    most: int = 0
    needs_gib: float = 0.0
    pressure_percent: float = 100.0
    first_pause_s: float = FIRST_PAUSE_S

    @property
    def argument(self) -> str:
        return ",".join(map(str, astuple(self)))

    @classmethod
    def parse(cls, argument: str) -> "Restarts":
        most, *others = argument.split(",")
        return cls(int(most), *map(float, others))

    def pause_s(self, deaths: int) -> float:
        """Return the pause after this many deaths."""
        return min(LONGEST_PAUSE_S, self.first_pause_s * 2.0 ** (deaths - 1))

    def shortage(self) -> str:
        """Return why no server may be started now, empty if one may."""
        available = _number("/proc/meminfo", "MemAvailable:") * 1024 / GIB
        if available < self.needs_gib:
            return f"{available:.1f} GiB of memory are available, and it takes {self.needs_gib:.1f}"
        pressure = _number("/proc/pressure/memory", "some avg10=")
        if pressure >= self.pressure_percent:
            return f"memory is short: tasks wait for it {pressure:.0f}% of the time"
        return ""


def _number(path: str, key: str) -> float:
    """Return the number behind a key of one of the kernel's files, 0 if it has none."""
    with contextlib.suppress(OSError, IndexError), open(path, encoding="ascii") as file:
        return float(file.read().partition(key)[2].split()[0])
    return 0.0


class Requests:
    """Requests to end the server: a signal, or a lifeline that closes."""

    def __init__(self, lifeline: int) -> None:
        self._woken, wakes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wakes)
        for ending in ENDING:
            signal.signal(ending, lambda *_: None)
        self._lifeline = lifeline
        self._poll = select.poll()
        self._poll.register(lifeline, select.POLLIN | select.POLLHUP)
        self._poll.register(self._woken, select.POLLIN)
        self.has_one = False

    def wait(self, timeout_s: float, child: int | None = None) -> bool:
        """Wait for a request, or for the end of a child, whose pidfd is `child`. Return whether one
        of them came.
        """
        if child is not None:
            self._poll.register(child, select.POLLIN)
        events = {descriptor for descriptor, _ in self._poll.poll(timeout_s * 1000)}
        if child is not None:
            self._poll.unregister(child)
        if self._lifeline in events and self._woken not in events and os.read(self._lifeline, 1):
            self._poll.unregister(self._lifeline)
            events.remove(self._lifeline)
        self.has_one |= bool(events & {self._woken, self._lifeline})
        return bool(events)


def main(
    kept: tuple[int, int],
    grace_s: float,
    ended: str,
    folder: str,
    restarts: Restarts,
    argv: list[str],
) -> None:
    """Run the server until it ends, again if it may be restarted, and record how it ended.

    `kept` are the descriptors of the lifeline and of the lock.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    requests = Requests(kept[0])
    deaths: list[dict[str, float]] = []
    while True:
        begin = os.fstat(1).st_size
        child = start(argv, folder, kept)
        how = run(child, requests, grace_s, ended)
        death = {"at": time.time(), "begin": begin, "end": os.fstat(1).st_size, **how}
        # The process that waits for the server marks it as ready.
        if requests.has_one or not os.path.exists(ready(ended)) or restarts.most == 0:
            break
        deaths.append(death)
        if len(deaths) > restarts.most:
            note(f"it died {len(deaths)} times and is not started again (--restart)")
            record(restarted(ended), {"deaths": deaths, "waits": ""})
            break
        if not await_restart(restarts, deaths, requests, ended):
            break
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder, 0o700, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    record(ended, {"told": requests.has_one, "at": time.time(), **how})


def run(child: int, requests: Requests, grace_s: float, ended: str) -> dict[str, float]:
    """Wait until the server ends or is to be ended, and end its remaining processes. Return its
    exit status, negative for a signal, and the kernel's kills in its last minute or two.
    """
    shared: set[str] = set()
    statuses: dict[int, int] = {}

    def find_descendants() -> set[int]:
        reap(statuses)
        return below({os.getpid()}, living())

    def look() -> None:
        shared.update(shared_by(find_descendants()))
        record_shared(ended, shared)

    pause_s = FIRST_LOOK_S
    pidfd = os.pidfd_open(child)
    # A front outlives a killed engine a while, so that the last look may be after the kill.
    before = known = _number(*KILLS)
    while not requests.wait(pause_s, pidfd):
        before, known = known, _number(*KILLS)
        look()
        pause_s = min(RAREST_LOOK_S, pause_s * 1.5)
    os.close(pidfd)
    kills = _number(*KILLS) - before
    look()
    with contextlib.suppress(TimeoutError):
        end(find_descendants, grace_s=grace_s, kill_grace_s=KILL_GRACE_S)
    reap(statuses)
    # Below the link between nodes, the server may have ended seconds before this process looked.
    remove_shared(shared | recorded_shared(ended))
    forget_shared(ended)
    status = os.waitstatus_to_exitcode(statuses.get(child, signal.SIGKILL))
    return {"status": status, "kills": int(kills)}


def await_restart(
    restarts: Restarts, deaths: list[dict[str, float]], requests: Requests, ended: str
) -> bool:
    """Wait until the server may be started again. Return False if it is to be ended instead."""
    pause_s = restarts.pause_s(len(deaths))
    due = time.monotonic() + pause_s
    why = f"it is started again in {pause_s:g} s ({len(deaths)} of {restarts.most})"
    former = ""
    while why:
        if why != former:
            note(why)
            record(restarted(ended), {"deaths": deaths, "waits": why})
        if requests.wait(max(MEMORY_LOOK_S / 10, min(MEMORY_LOOK_S, due - time.monotonic()))):
            return False
        former, why = why, why if time.monotonic() < due else restarts.shortage()
    note(f"it is started again now ({len(deaths)} of {restarts.most})")
    record(restarted(ended), {"deaths": deaths, "waits": ""})
    return True


def ready(ended: str) -> str:
    """Return the path of the mark of a server that was ready, beside the record of its end."""
    return f"{ended}.ready"


def restarted(ended: str) -> str:
    """Return the path of the file with the deaths of a server, beside the record of its end."""
    return f"{ended}.restarts"


def note(text: str) -> None:
    """Write a line into the log of the server."""
    with contextlib.suppress(OSError):
        os.write(1, f"inv serve: {text}\n".encode())


def start(argv: list[str], folder: str, kept: Iterable[int]) -> int:
    """Start the program in `folder`, without the descriptors `kept`. Return its pid.

    Signals are blocked meanwhile: the child would lose one that reaches the supervisor's handlers.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    child = os.fork()
    if child == 0:
        for descriptor in kept:
            os.close(descriptor)
        signal.set_wakeup_fd(-1)
        for ending in ENDING:
            signal.signal(ending, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        try:
            os.chdir(folder)
            os.execvp(argv[0], argv)
        except OSError as exc:
            os.write(2, f"{argv[0]}: {exc.strerror}\n".encode())
            os._exit(NOT_STARTED)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    return child


def reap(statuses: dict[int, int]) -> None:
    """Collect the status of every child that has ended, orphans of the server included."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            statuses[pid] = status


def record(path: str, content: object) -> None:
    """Write a text, or a document as JSON, atomically; an error has no reader and is dropped."""
    with contextlib.suppress(OSError):
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            file.write(content if isinstance(content, str) else json.dumps(content))
        os.replace(f"{path}.new", path)


if __name__ == "__main__":
    main(
        (int(sys.argv[1]), int(sys.argv[2])),
        float(sys.argv[3]),
        sys.argv[4],
        sys.argv[5],
        Restarts.parse(sys.argv[6]),
        sys.argv[7:],
    )
