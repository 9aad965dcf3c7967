"""Supervisor of one vLLM server: the parent of all its processes, in a session of its own, so that
whatever ends the front leaves no process behind.

Run as `python -I -S supervisor.py LIFELINE LOCK GRACE_S ENDED FOLDER PROGRAM ARG…`. LIFELINE is the
read end of a pipe: when it closes, the process that started the server is dead and the supervisor
ends the server; one byte in it lets the server live on alone. LOCK is kept open, and so locked.
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
from collections.abc import Callable

# prctl(2): orphaned descendants become children of this process, which can then find them and wait
# for them.
PR_SET_CHILD_SUBREAPER = 36
KILL_GRACE_S = 10.0
NOT_STARTED = 127
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Pauses between two looks at the shared memory: short at first, when the server creates it.
FIRST_LOOK_S, RAREST_LOOK_S = 1.0, 60.0


def main(
    lifeline: int, lock: int, grace_s: float, ended: str, folder: str, argv: list[str]
) -> None:
    """Run the server until it ends, end its remaining processes, record how it ended."""
    from workspace.server import process_tree

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    woken, wakes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wakes)
    for ending in ENDING:
        signal.signal(ending, lambda *_: None)
    child = start(argv, folder, (lifeline, lock))
    shared: set[str] = set()

    def find_descendants() -> set[int]:
        reap(statuses)
        return process_tree.below({os.getpid()}, process_tree.living())

    def look() -> None:
        shared.update(process_tree.shared_by(find_descendants()))

    statuses: dict[int, int] = {}
    is_requested = watch(child, lifeline, woken, look, statuses)
    look()
    with contextlib.suppress(TimeoutError):
        process_tree.end(find_descendants, grace_s=grace_s, kill_grace_s=KILL_GRACE_S)
    reap(statuses)
    process_tree.remove_shared(shared)
    shutil.rmtree(folder, ignore_errors=True)
    status = os.waitstatus_to_exitcode(statuses.get(child, signal.SIGKILL))
    record_end(ended, {"status": status, "told": is_requested, "at": time.time()})


def start(argv: list[str], folder: str, kept: tuple[int, ...]) -> int:
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


def watch(
    child: int, lifeline: int, woken: int, look: Callable[[], None], statuses: dict[int, int]
) -> bool:
    """Wait until the program ends or is to be ended. Return whether its end was requested."""
    poll = select.poll()
    poll.register(lifeline, select.POLLIN | select.POLLHUP)
    poll.register(woken, select.POLLIN)
    poll.register(os.pidfd_open(child), select.POLLIN)
    pause_s = FIRST_LOOK_S
    while True:
        events = [descriptor for descriptor, _ in poll.poll(pause_s * 1000)]
        if woken in events:
            return True
        if lifeline in events:
            if not os.read(lifeline, 1):
                return True
            poll.unregister(lifeline)
        elif events:
            return False
        look()
        if child in statuses:
            return False
        pause_s = min(RAREST_LOOK_S, pause_s * 1.5)


def reap(statuses: dict[int, int]) -> None:
    """Collect the status of every child that has ended, orphans of the server included."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            statuses[pid] = status


def record_end(path: str, record: dict[str, object]) -> None:
    """Write how the server ended, atomically; an error has no reader any more and is dropped."""
    with contextlib.suppress(OSError):
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            json.dump(record, file)
        os.replace(f"{path}.new", path)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    main(
        int(sys.argv[1]),
        int(sys.argv[2]),
        float(sys.argv[3]),
        sys.argv[4],
        sys.argv[5],
        sys.argv[6:],
    )
