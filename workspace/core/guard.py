"""Guard between a verb and a program: nothing of the program outlives the verb, however it ends.

Run as `python -I -S guard.py FD[,FD] PROGRAM ARG…`. The first FD is the read end of a pipe that
only the verb holds open. When the verb dies, the pipe closes, and the guard ends every descendant,
also those in process groups of their own, such as ninja's compilers. Another FD, the workspace's
lock, stays open until then; the program does not get it.
"""

# Not signal and contextlib, whose own imports would take a quarter of the guard's time.
import _signal  # type: ignore[import-not-found]
import ctypes
import os
import resource
import select
import sys
import time

# prctl(2): orphaned descendants become children of this process, which finds and waits for them.
PR_SET_CHILD_SUBREAPER = 36
TERMINATE_GRACE_S = 5.0
KILL_GRACE_S = 5.0
NOT_STARTED = 127
ENDING = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP)


def main(lifeline: int, kept: list[int], argv: list[str]) -> int:
    """Run the program and return its wait status; end it and all below it when the pipe closes."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    end_requests: list[int] = []
    # The verb signals the whole group; the guard records the signal and keeps waiting.
    for number in ENDING:
        _signal.signal(number, lambda number, _: end_requests.append(number))
    # Blocked over the fork: in the child, before exec, the guard's handlers would lose a signal.
    _signal.pthread_sigmask(_signal.SIG_BLOCK, ENDING)
    child = os.fork()
    if child == 0:
        for descriptor in (lifeline, *kept):
            os.close(descriptor)
        for number in ENDING:
            _signal.signal(number, _signal.SIG_DFL)
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, ENDING)
        try:
            os.execvp(argv[0], argv)
        except OSError as exc:
            os.write(2, f"{argv[0]}: {exc.strerror}\n".encode())
            os._exit(NOT_STARTED)
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, ENDING)
    poll = select.poll()
    poll.register(lifeline, select.POLLHUP)
    poll.register(os.pidfd_open(child), select.POLLIN)
    if any(descriptor == lifeline for descriptor, _ in poll.poll()):
        end_descendants()
    while True:
        pid, status = os.wait()
        if pid == child:
            # Processes that a program leaves on purpose, such as the server of a compiler cache,
            # stay; those of an interrupted program do not.
            if end_requests:
                end_descendants()
            return status


def end_descendants() -> None:
    """Terminate, then kill, all processes below this one."""
    for number, grace_s in ((_signal.SIGTERM, TERMINATE_GRACE_S), (_signal.SIGKILL, KILL_GRACE_S)):
        deadline = time.monotonic() + grace_s
        signalled: set[int] = set()
        while (living := descendants()) and time.monotonic() < deadline:
            # A signalled process may still start another one: look again.
            for pid in living - signalled:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
            signalled |= living
            time.sleep(0.02)


def descendants() -> set[int]:
    """Return the running processes below this one (proc_pid_stat(5))."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    state, parent = file.read().rpartition(b")")[2].split()[:2]
            except OSError:
                continue
            if state not in (b"Z", b"X"):
                parents[int(entry)] = int(parent)
    below: set[int] = set()
    generation = {os.getpid()}
    while generation := {pid for pid, parent in parents.items() if parent in generation}:
        below |= generation
    return below


def leave(status: int) -> None:
    """Exit as the program did: with its code, or by its signal, without a second core."""
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        number = os.WTERMSIG(status)
        try:  # noqa: SIM105
            _signal.signal(number, _signal.SIG_DFL)
        except OSError:
            pass
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1)


if __name__ == "__main__":
    lifeline, *kept = map(int, sys.argv[1].split(","))
    leave(main(lifeline, kept, sys.argv[2:]))
