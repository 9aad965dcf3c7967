"""Compiler launcher, a program that CMake puts before each compiler: it requests a job token,
waits, runs the compiler and reports the time and memory that the compiler used.

Each unit starts it once, hundreds at the same time: so it runs in any Python 3.8 or later and
imports built-in modules only. Its arguments are the folder of the job server (see job_server.py)
and the command. The open connection is the job token: the compiler and its children inherit it, and
the kernel closes it with the last of them, so a killed process returns its token.
"""

# The C modules below `signal` and `socket`: importing those two takes longer than all the rest.
import _signal  # type: ignore[import-not-found]
import _socket
import os
import sys
from time import monotonic

NICE = 10
# Let the kernel kill a compiler first when memory runs out, before a shell or a server
# (proc_pid_oom_score_adj(5)).
OOM_SCORE_ADJ = b"1000"
REFUSED, NOT_STARTED = 1, 127
REFUSAL, HAS_ENDED = "not compiled: ", "the build of this unit has ended"
# The answer that lets a compiler start.
GO = "go"
INTERRUPTING = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP)
# The signals that end a compiler when memory runs out, and why.
SHORTAGE = {
    int(_signal.SIGKILL): b"killed by SIGKILL: the kernel does so when memory runs out\n",
    int(_signal.SIGTERM): b"ended by SIGTERM: earlyoom does so when memory runs out\n",
}
# What gcc, nvcc and clang write when one of them ended a program that they had started.
REPORTS = (
    (_signal.SIGKILL, b"Killed signal terminated program"),
    (_signal.SIGKILL, b"died due to signal 9 "),
    (_signal.SIGKILL, b"unable to execute command: Killed"),
    (_signal.SIGTERM, b"Terminated signal terminated program"),
    (_signal.SIGTERM, b"died due to signal 15 "),
    (_signal.SIGTERM, b"unable to execute command: Terminated"),
)
# Without one of these arguments a compiler only answers a query, such as for its version.
WORKING = ("-c", "-E", "-o", "--out-dir")


def main(folder: str, argv: "list[str]") -> int:
    """Return the wait status of the compiler, or end this program if the compiler may not start.

    A compiler that fails may have been killed because memory ran out: report SIGKILL if it or a
    child of it was; the job server also knows the kernel's own count. If the server answers so, run
    the compiler again once there is room.
    """
    # On ^C, do not print hundreds of tracebacks.
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    if not any(argument in argv for argument in WORKING):
        become(argv)
    token = connect(folder)
    if token is None:
        return run(argv, wait_for_turn(folder))[0]
    command = b"\0".join(map(os.fsencode, argv))
    answer = send(token, b"%d\n" % len(command) + command)
    if answer != GO:
        refuse(answer or HAS_ENDED)
    while True:
        started = monotonic()
        status, largest_kib, shortage = run(argv, token.fileno())
        reported = _signal.SIGKILL if shortage else status
        end = b"%d %.3f %d\n" % (reported, monotonic() - started, largest_kib)
        if status == 0:
            # The server may be gone, but the object file exists.
            send(token, end, is_last=True)
            return status
        answer = send(token, end)
        if not answer:
            # An ordinary failure, or the build has ended, which may have sent the signal itself.
            return status
        if shortage:
            os.write(2, SHORTAGE[shortage])
        if answer != GO:
            os.write(2, f"{REFUSAL}{answer}\n".encode())
            # ninja would take the signal for an interruption by the user.
            return (128 + shortage) << 8 if shortage else status


def connect(folder: str) -> "_socket.socket | None":
    """Return a connection to the build's job server, or None if no build listens. It goes through
    /proc/self/fd, because the path may be longer than a socket address (unix(7)).
    """
    token = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        token.connect(f"/proc/self/fd/{place}/socket")
        os.close(place)
    except OSError:
        return None
    return token


def send(token: "_socket.socket", message: bytes, is_last: bool = False) -> str:
    """Send a command with its length first, or how it ended, and return the answer: `go` or a
    reason. The answer is empty if no server listens any more.
    """
    answer = b""
    try:
        token.sendall(message)
        while not is_last and not answer.endswith(b"\n"):
            piece = token.recv(4096)
            if not piece:
                return ""
            answer += piece
    except OSError:
        return ""
    return answer.decode().strip()


def wait_for_turn(folder: str) -> int:
    """Wait until no other compiler runs. For ninja started by hand: one compiler at a time is slow,
    but cannot exhaust the machine.
    """
    import fcntl

    try:
        descriptor = os.open(f"{folder}/alone", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as exc:
        refuse(f"{folder}: {exc.strerror}; ./scripts/inv rebuild creates it again")
    return descriptor


def run(argv: "list[str]", token: int) -> "tuple[int, int, int]":
    """Run the compiler, which inherits the token. Return its wait status, the KiB of the largest
    process among it and its children, and the signal that ended it or a child for want of memory,
    else 0.

    Its errors appear when it has ended: g++ exits with 1 and only writes that cc1plus was killed.
    """
    os.set_inheritable(token, True)
    errors = os.memfd_create("errors")
    child = os.fork()
    if child == 0:
        os.dup2(errors, 2)
        step_back()
        become(argv)
    # ^C reaches the compiler too; ninja must not consider the unit ended before the compiler ends.
    received: list[int] = []
    former = [
        (signal_number, _signal.signal(signal_number, lambda number, _: received.append(number)))
        for signal_number in INTERRUPTING
    ]
    _, status, used = os.wait4(child, 0)
    for signal_number, action in former:
        _signal.signal(signal_number, action)
    text = pass_on(errors)
    # A signal that the build or the user sends reaches the launcher too: they mean its whole group.
    return status, used.ru_maxrss, 0 if received else find_shortage(status, text)


def pass_on(errors: int) -> bytes:
    """Write the compiler's errors to this program's, and return their end."""
    text = b""
    os.lseek(errors, 0, os.SEEK_SET)
    while True:
        piece = os.read(errors, 1 << 16)
        if not piece:
            os.close(errors)
            return text
        text = (text + piece)[-4096 - len(piece) :]
        try:
            while piece:
                piece = piece[os.write(2, piece) :]
        except OSError:
            # Nobody reads any more; the job server is to learn of the end nevertheless.
            continue


def find_shortage(status: int, errors: bytes) -> int:
    """Return the signal that ended the compiler, or a child that it reports, for want of memory;
    else 0. nvcc exits with 128 plus the number of the signal.
    """
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status) - 128
    if number in SHORTAGE:
        return number
    if status == 0:
        return 0
    return next((int(number) for number, report in REPORTS if report in errors), 0)


def step_back() -> None:
    """Lower the priority of this process below all others. The I/O priority follows the CPU
    priority (ioprio_set(2)).
    """
    os.nice(max(0, NICE - os.nice(0)))
    try:
        score = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
        os.write(score, OOM_SCORE_ADJ)
        os.close(score)
    except OSError:
        return


def become(argv: "list[str]") -> None:
    """Replace this process by the compiler, with the two signals restored that Python ignores."""
    _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)
    _signal.signal(_signal.SIGXFSZ, _signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)
    except OSError as exc:
        os.write(2, f"error: {argv[0]}: {exc.strerror}\n".encode())
        os._exit(NOT_STARTED)


def refuse(why: str) -> None:
    """Report why the compiler may not start, and end this program."""
    os.write(2, f"{REFUSAL}{why}\n".encode())
    os._exit(REFUSED)


def leave(status: int) -> None:
    """Exit as the compiler did: with its code, by the same interrupting signal, or with 128 plus
    the number of another signal, as a shell does.
    """
    signal_number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if signal_number in INTERRUPTING:
        _signal.signal(signal_number, _signal.SIG_DFL)
        os.kill(os.getpid(), signal_number)
    os._exit(128 + signal_number if signal_number else os.WEXITSTATUS(status))


if __name__ == "__main__":
    leave(main(sys.argv[1], sys.argv[2:]))
