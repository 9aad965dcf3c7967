"""A program that CMake puts before each compiler: it asks for a ticket, waits, runs the compiler,
and says what that took.

It is started once a unit, hundreds of them at once: any Python 3.8 or later, built-in modules,
nothing of ours. Its arguments are the folder of the tickets (see tickets.py) and the command. The
open connection is the ticket: the compiler and what it starts inherit it, and the kernel closes it
with the last of them, so that whatever is killed gives its ticket back.
"""

# What `signal` and `socket` are made of; those take longer to import than all the rest.
import _signal  # type: ignore[import-not-found]
import _socket
import os
import sys
from time import monotonic

NICE = 10
# The first to be ended when memory runs out, before a shell or a server
# (proc_pid_oom_score_adj(5)).
OOM_SCORE_ADJ = b"1000"
REFUSED, KILLED, NOT_STARTED = 1, 128 + 9, 127
# The answer that lets a compiler start.
GO = "go"
INTERRUPTING = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP)
# Without one of these a compiler is only asked something, such as its version.
WORKING = ("-c", "-E", "-o", "--out-dir")


def main(folder: str, argv: "list[str]") -> int:
    """Return the wait status of the compiler, or end this program where it may not start.

    One that fails may have been killed for want of memory, which only the build can tell: it is run
    again where the build says so, once there is room.
    """
    # Hundreds of tracebacks are no help to anybody who types ^C.
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    if not any(word in argv for word in WORKING):
        become(argv)
    ticket = connect(folder)
    if ticket is None:
        return run(argv, turn(folder))[0]
    words = b"\0".join(map(os.fsencode, argv))
    said = tell(ticket, b"%d\n" % len(words) + words)
    if said != GO:
        refuse(said or "the build that this unit belongs to has ended")
    while True:
        started = monotonic()
        status, largest_kib = run(argv, ticket.fileno())
        end = b"%d %.3f %d\n" % (status, monotonic() - started, largest_kib)
        if status == 0:
            # Where nobody wants to know any more, the object file is there all the same.
            tell(ticket, end, is_last=True)
            return status
        if is_killed(status):
            os.write(2, b"killed by SIGKILL, as the kernel does when memory runs out\n")
        said = tell(ticket, end)
        if said != GO:
            if said:
                os.write(2, f"not compiled: {said}\n".encode())
            return status


def connect(folder: str) -> "_socket.socket | None":
    """Connect to the build's socket, or return None where no build listens. The path may be longer
    than an address can be (unix(7)).
    """
    ticket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        ticket.connect(f"/proc/self/fd/{place}/socket")
        os.close(place)
    except OSError:
        return None
    return ticket


def tell(ticket: "_socket.socket", message: bytes, is_last: bool = False) -> str:
    """Send a command, its length first, or how it ended, and return the answer: `go`, or why not.
    It is empty where nobody listens any more.
    """
    answer = b""
    try:
        ticket.sendall(message)
        while not is_last and not answer.endswith(b"\n"):
            piece = ticket.recv(4096)
            if not piece:
                return ""
            answer += piece
    except OSError:
        return ""
    return answer.decode().strip()


def turn(folder: str) -> int:
    """Wait until no other compiler runs, where ninja was typed by hand: one at a time is slow, and
    cannot take the machine down.
    """
    import fcntl

    try:
        descriptor = os.open(f"{folder}/alone", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as exc:
        refuse(f"{folder}: {exc.strerror}; ./scripts/inv rebuild makes it again")
    return descriptor


def run(argv: "list[str]", ticket: int) -> "tuple[int, int]":
    """Run the compiler with the ticket in its hands. Return its wait status, and the KiB of the
    largest process that it was or waited for.
    """
    os.set_inheritable(ticket, True)
    child = os.fork()
    if child == 0:
        step_back()
        become(argv)
    # ^C reaches the compiler as well, and ninja must not take the unit for ended before it has.
    former = [(number, _signal.signal(number, _signal.SIG_IGN)) for number in INTERRUPTING]
    _, status, used = os.wait4(child, 0)
    for number, action in former:
        _signal.signal(number, action)
    return status, used.ru_maxrss


def is_killed(status: int) -> bool:
    """Whether it ended as the kernel ends a process when memory runs out; nvcc exits with 137 when
    that happens to what it started.
    """
    return (
        os.WTERMSIG(status) == _signal.SIGKILL
        if os.WIFSIGNALED(status)
        else os.WEXITSTATUS(status) == KILLED
    )


def step_back() -> None:
    """Let everything else go first. The priority of reading and writing follows that of the
    processor (ioprio_set(2)).
    """
    os.nice(max(0, NICE - os.nice(0)))
    try:
        score = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
        os.write(score, OOM_SCORE_ADJ)
        os.close(score)
    except OSError:
        return


def become(argv: "list[str]") -> None:
    """Become the compiler. Python ignores two signals by which a program expects to be ended."""
    _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)
    _signal.signal(_signal.SIGXFSZ, _signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)
    except OSError as exc:
        os.write(2, f"error: {argv[0]}: {exc.strerror}\n".encode())
        os._exit(NOT_STARTED)


def refuse(why: str) -> None:
    os.write(2, f"not compiled: {why}\n".encode())
    os._exit(REFUSED)


def leave(status: int) -> None:
    """End as the compiler did: with its code, by the signal of an interruption, or with 128 more
    than any other signal, as a shell does.
    """
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number in INTERRUPTING:
        _signal.signal(number, _signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(128 + number if number else os.WEXITSTATUS(status))


if __name__ == "__main__":
    leave(main(sys.argv[1], sys.argv[2:]))
