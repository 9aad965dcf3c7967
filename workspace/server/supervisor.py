"""Stands above one vLLM server for as long as it lives, in a session of its own: whatever ends the
front, nothing that it started outlives it.

Run as `python -I -S keeper.py LIFELINE LOCK GRACE_S ENDED FOLDER PROGRAM ARG…`. LIFELINE is the
read end of a pipe: when it closes, the one who started the server is dead, and so is the server;
one byte lets it live on alone. LOCK is kept open, and with it locked.
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

# prctl(2): orphaned descendants become children of this process, and so can be found and waited
# for.
PR_SET_CHILD_SUBREAPER = 36
KILL_GRACE_S = 10.0
NOT_STARTED = 127
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# How often it is looked at what memory the server shares: soon at first, when it makes it.
FIRST_LOOK_S, RAREST_LOOK_S = 1.0, 60.0


def main(
    lifeline: int, lock: int, grace_s: float, ended: str, folder: str, argv: list[str]
) -> None:
    """Run the server to its end, end what is left of it, note how it ended."""
    from workspace.server import process_tree

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    woken, wakes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wakes)
    for number in ENDING:
        signal.signal(number, lambda number, _: None)
    child = start(argv, folder, (lifeline, lock))
    shared: set[str] = set()

    def mine() -> set[int]:
        reap(statuses)
        return process_tree.below({os.getpid()}, process_tree.living())

    statuses: dict[int, int] = {}
    is_told = watch(
        child, lifeline, woken, lambda: shared.update(process_tree.shared_by(mine())), statuses
    )
    shared |= process_tree.shared_by(mine())
    with contextlib.suppress(TimeoutError):
        process_tree.end(mine, grace_s=grace_s, kill_grace_s=KILL_GRACE_S)
    reap(statuses)
    process_tree.remove_shared(shared)
    shutil.rmtree(folder, ignore_errors=True)
    status = statuses.get(child, signal.SIGKILL)
    note(ended, {"status": os.waitstatus_to_exitcode(status), "told": is_told, "at": time.time()})


def start(argv: list[str], folder: str, kept: tuple[int, ...]) -> int:
    """Start the program in `folder`, without what is kept from it. A signal that met the keeper's
    handlers in the child would be lost: they are held.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    child = os.fork()
    if child == 0:
        for descriptor in kept:
            os.close(descriptor)
        signal.set_wakeup_fd(-1)
        for number in ENDING:
            signal.signal(number, signal.SIG_DFL)
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
    """Wait until the program has ended by itself, or is to be ended, which is returned."""
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
    """Wait for every child that has ended: orphans of the server are children of this process."""
    with contextlib.suppress(ChildProcessError):
        while True:
            number, status = os.waitpid(-1, os.WNOHANG)
            if number == 0:
                return
            statuses[number] = status


def note(path: str, record: dict[str, object]) -> None:
    """Write how it ended, whole or not at all; nobody may be there any more to read it."""
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
