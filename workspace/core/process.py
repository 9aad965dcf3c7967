"""The process seam: the single entrance through which the workspace starts programs.

Commands are argv lists, never a shell line. stdin is closed. Each child runs behind a guard in its
own process group, which ends with the verb. The caller composes the environment, see
Settings.child_environment.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Generic, NoReturn, TypeVar

from workspace.core import child_variables, guard, hints
from workspace.core.console import RunLog
from workspace.core.errors import BuildError, ToolchainError, WorkspaceError

INTERRUPT_GRACE_S = 10.0
TERMINATE_GRACE_S = 5.0
SHOWN_TAIL_LINES = 15
JUDGED_LINES = 50_000  # at the end of an output, in which the cause of a failure is searched
# What `ask` waits after a first signal: a program may trap it.
KILL_S = 0.5
# Exit statuses of timeout(1): it ended the program, or had to kill it.
TIMED_OUT = (124, 128 + signal.SIGKILL, -signal.SIGKILL)
_KILLED = (*TIMED_OUT[1:], 128 + signal.SIGTERM, -signal.SIGTERM)
# How uv, pip, CMake, ninja, gcc, nvcc, cargo and Python begin the line with the cause.
_ERROR_LINE = re.compile(
    r"(?:^|\s)(?:error|fatal error|fatal|CMake Error|FAILED|ptxas"
    r" fatal|[A-Za-z.]*Error|[A-Za-z.]*Exception|×)(?:\[E\d+\])?\b\s?[:: ]",
    re.IGNORECASE,
)

# -I -S: neither the user's settings nor site-packages cost the guard time.
_GUARD = (sys.executable, "-I", "-S", guard.__file__)

Argument = str | os.PathLike[str]
# Returns how a failed program ended, from its lines and its exit status, as the end of a sentence
# that begins with its name; and the next command, None where it knows none.
Judge = Callable[[Sequence[str], int], tuple[str, str | None]]
Value = TypeVar("Value", covariant=True)


@dataclass(frozen=True)
class There(Generic[Value]):
    """The answer of a program or a driver that is there and works."""

    value: Value


@dataclass(frozen=True)
class Absent:
    """The answer for a program or a driver that is not on this machine."""


@dataclass(frozen=True)
class Broken:
    """The answer of a program or a driver that is there and fails, with a line of its message.

    `is_killed`: another program ended it, as earlyoom does; that proves nothing about the program.
    """

    message: str
    is_killed: bool = False


@dataclass(frozen=True)
class Slow:
    """No answer in `limit_s` seconds: the machine is busy, or the driver hangs."""

    limit_s: float


Answer = There[Value] | Absent | Broken | Slow


class NoAnswer(ToolchainError):
    """A program ran longer than its limit, or was killed: nothing is known about it."""


@dataclass(frozen=True)
class Completed:
    """Result of a captured program; a negative exit status is a signal, as in subprocess."""

    returncode: int
    stdout: str
    stderr: str


def capture(
    argv: Sequence[Argument],
    *,
    env: Mapping[str, str],
    cwd: Path | None = None,
    timeout_s: float | None = None,
    on_start: Callable[[int], object] | None = None,
) -> Completed:
    """Run a program that changes nothing, and return its output. The caller judges the status.

    `on_start` gets the pid of the guard, below which the program runs. Raises ToolchainError where
    the program is missing or runs longer than `timeout_s` seconds, times the factor in `env`.
    """
    if timeout_s is not None:
        timeout_s *= child_variables.time_limit_factor(env)
    with _started(argv, env=env, cwd=cwd, stderr=subprocess.PIPE) as child:
        if on_start:
            on_start(child.pid)
        try:
            out, err = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise NoAnswer(
                f"{shlex.join([os.fspath(argument) for argument in argv])} gave no answer in"
                f" {timeout_s:g} s"
            ) from None
    return Completed(child.returncode, out, err)


def ask(
    argv: Sequence[Argument],
    *,
    env: Mapping[str, str],
    limit_s: float,
    cwd: Path | None = None,
) -> Answer[Completed]:
    """Run a program that only reads and may hang. The caller judges the status.

    timeout(1) kills the program soon after `limit_s` seconds, times the factor in `env`, whatever
    signals it traps.
    """
    limit_s *= (factor := child_variables.time_limit_factor(env))
    path, program = env.get("PATH", os.defpath), os.fspath(argv[0])
    if shutil.which(program, path=path) is None:
        is_there = "/" in program and os.path.lexists(program)
        return Broken(f"{program} cannot be executed") if is_there else Absent()
    timeout = shutil.which("timeout", path=path)
    bound = [timeout, "-k", f"{KILL_S:g}", f"{limit_s:g}"] if timeout else []
    began = time.monotonic()
    try:
        done = capture([*bound, *argv], env=env, cwd=cwd, timeout_s=limit_s / factor + 2 * KILL_S)
    except NoAnswer:
        return Slow(limit_s)
    except ToolchainError as exc:
        return Broken(exc.message)
    if done.returncode in TIMED_OUT and time.monotonic() - began >= limit_s:
        return Slow(limit_s)
    return There(done)


def output_of(answer: Answer[Completed]) -> Answer[str]:
    """Return the standard output of a program that succeeded; a failed one is broken."""
    if not isinstance(answer, There):
        return answer
    done = answer.value
    if done.returncode == 0:
        return There(done.stdout)
    status = describe_status(done.returncode)
    if done.returncode in _KILLED:
        return Broken(status, is_killed=True)
    lines = [line.strip() for line in [*done.stdout.splitlines(), *done.stderr.splitlines()]]
    return Broken(next((line for line in lines if line), status))


def require_not_killed(done: Completed, what: str) -> None:
    """Raise NoAnswer where another program ended this one: its status then proves nothing."""
    if done.returncode in _KILLED:
        raise NoAnswer(f"{what} {describe_status(done.returncode)}")


def certain(answer: Answer[Value], program: Argument) -> Value | None:
    """Return the value of an answer that decides something; None where there is no such program,
    or a broken one.

    Raises NoAnswer where the program was slow, or was killed: neither shows that it is missing.
    """
    if isinstance(answer, Slow):
        raise NoAnswer(f"{os.fspath(program)} gave no answer in {answer.limit_s:g} s")
    if isinstance(answer, Broken) and answer.is_killed:
        raise NoAnswer(f"{os.fspath(program)} {answer.message}")
    return answer.value if isinstance(answer, There) else None


def run(
    argv: Sequence[Argument],
    *,
    env: Mapping[str, str],
    run_log: RunLog,
    cwd: Path | None = None,
    on_line: Callable[[str], None] | None = None,
    failure: type[WorkspaceError] = BuildError,
    hint: str | None = None,
    judge: Judge | None = None,
) -> None:
    """Run a program that changes something: logged line by line, ended on ^C with its group.

    Raises `failure` with the sentence of `judge`, the command, the last lines and the path of the
    log on any status but 0; `hint`, or a look at the log, counts where `judge` has no next
    command. Without a judge the sentence has the first error line.
    """
    command = [os.fspath(argument) for argument in argv]
    echo = shlex.join(command)
    echo = echo if cwd is None else f"cd {shlex.quote(str(cwd))} && {echo}"
    run_log.command(echo)
    lines: deque[str] = deque(maxlen=JUDGED_LINES)
    with _started(
        command,
        env=env,
        cwd=cwd,
        stderr=subprocess.STDOUT,
        held=run_log.held.descriptor if run_log.held else None,
    ) as child:
        assert child.stdout is not None
        for raw in child.stdout:
            line = raw.rstrip()
            lines.append(line)
            run_log.line(line)
            if on_line:
                on_line(line)
        child.wait()
    if child.returncode != 0:
        how, next_command = (judge or _first_error)([*lines], child.returncode)
        look = hints.text("core.read_log", path=run_log.path) if judge else None
        tail = map(run_log.redact, (f"+ {echo}", *[*lines][-SHOWN_TAIL_LINES:]))
        raise failure(
            run_log.redact(f"{_name(command)} {how}"),
            hint=next_command or hint or look,
            details=(*tail, f"log: {run_log.path}"),
        )


def _first_error(lines: Sequence[str], status: int) -> tuple[str, None]:
    error = next((line.strip() for line in lines if _ERROR_LINE.search(line)), "")
    return f"{describe_status(status)}: {error}" if error else describe_status(status), None


def become(argv: Sequence[Argument], *, env: Mapping[str, str]) -> NoReturn:
    """Replace this process by a program, in the same folder and terminal.

    Signals then reach the program itself, and its exit code is the exit code of the verb. Raises
    ToolchainError where the program is missing or cannot be started.
    """
    program = _program(argv, env, "commands are searched in .vllm/bin, then on PATH")
    sys.stdout.flush()
    sys.stderr.flush()
    # Signals that Python ignores stay ignored over exec (signal(7)); `… | head` would not end.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execve(program, [os.fspath(argument) for argument in argv], dict(env))
    except OSError as exc:
        raise ToolchainError(
            f"{os.fspath(argv[0])} cannot be started: {exc.strerror}",
            hint=hints.text("core.list_file", path=program),
        ) from exc


def apart(
    argv: Sequence[Argument], *, env: Mapping[str, str], output: int, inherited: Sequence[int]
) -> int:
    """Start a program in a session of its own, which outlives the terminal; return its process ID.

    The program writes to the descriptor `output` and inherits the descriptors `inherited` under the
    same numbers. Raises ToolchainError where it cannot be started.
    """
    silence = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    for descriptor in inherited:
        os.set_inheritable(descriptor, True)
    actions = [
        (os.POSIX_SPAWN_DUP2, silence, 0),
        (os.POSIX_SPAWN_DUP2, output, 1),
        (os.POSIX_SPAWN_DUP2, output, 2),
    ]
    usual = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    try:
        return os.posix_spawn(
            argv[0],
            [os.fspath(argument) for argument in argv],
            dict(env),
            file_actions=actions,
            setsid=True,
            setsigdef=usual,
        )
    except OSError as exc:
        raise ToolchainError(f"{os.fspath(argv[0])} cannot be started: {exc.strerror}") from exc
    finally:
        os.close(silence)
        for descriptor in inherited:
            os.set_inheritable(descriptor, False)


def describe_status(returncode: int) -> str:
    """Return an exit status as text; 137 and -9 also as the kernel's end for missing memory."""
    if returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "was killed by SIGKILL (the kernel sends it when memory runs out)"
    if returncode < 0:
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"exited with {returncode}"


@dataclass(frozen=True)
class _Child:
    """A guarded program, and the pipe end of its guard that keeps it alive."""

    popen: "subprocess.Popen[str]"
    lifeline: int


@contextlib.contextmanager
def _started(
    argv: Sequence[Argument],
    *,
    env: Mapping[str, str],
    cwd: Path | None,
    stderr: int,
    held: int | None = None,
) -> Iterator["subprocess.Popen[str]"]:
    child: _Child | None = None
    try:
        with _signals_held():
            child = _spawn(argv, env=env, cwd=cwd, stderr=stderr, held=held)
        yield child.popen
    except BaseException as exc:
        if child is not None:
            first = signal.SIGINT if isinstance(exc, KeyboardInterrupt) else signal.SIGTERM
            _end_group(child.popen, first)
        raise
    finally:
        if child is not None:
            os.close(child.lifeline)
            for stream in (child.popen.stdout, child.popen.stderr):
                if stream:
                    stream.close()


def _spawn(
    argv: Sequence[Argument],
    *,
    env: Mapping[str, str],
    cwd: Path | None,
    stderr: int,
    held: int | None,
) -> _Child:
    hint = hints.text("core.bootstrap_names")
    program = _program(argv, env, hint)
    inherited, lifeline = os.pipe()
    # A guard that cleans up after a killed verb holds the lock, which keeps the next verb out.
    kept = (inherited,) if held is None else (inherited, held)
    try:
        popen = subprocess.Popen(
            [*_GUARD, ",".join(map(str, kept)), program, *argv[1:]],
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            encoding="utf-8",
            errors="replace",
            process_group=0,
            pass_fds=kept,
        )
    except OSError as exc:
        os.close(lifeline)
        raise ToolchainError(f"{os.fspath(argv[0])} cannot be started: {exc.strerror}") from exc
    finally:
        os.close(inherited)
    return _Child(popen, lifeline)


def _program(argv: Sequence[Argument], env: Mapping[str, str], hint: str) -> str:
    """Return the path of a program on the child's PATH. Raises ToolchainError with `hint`."""
    program = shutil.which(os.fspath(argv[0]), path=env.get("PATH", os.defpath))
    if program is None:
        raise ToolchainError(f"{os.fspath(argv[0])} is missing", hint=hint)
    return program


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Delay ^C, SIGTERM and SIGHUP until the block ends: during a fork the process ID is unknown.

    Only Python's handlers are delayed. A child would inherit a blocked or ignored signal and could
    then not be ended.
    """
    arrived: list[tuple[int, FrameType | None]] = []
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    held = {number: handler for number, handler in handlers.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        held = {}
    for number in held:
        signal.signal(number, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
    for arrival in arrived:
        held[signal.Signals(arrival[0])](*arrival)


def _end_group(child: "subprocess.Popen[str]", first: signal.Signals) -> None:
    """End the whole process group: interrupt, terminate, kill; no compiler outlives its build.

    One more ^C skips to the next signal.
    """
    drains = [
        threading.Thread(target=_drain, args=(stream,), daemon=True)
        for stream in (child.stdout, child.stderr)
        if stream
    ]
    for thread in drains:
        thread.start()
    with _counted_interrupts() as interrupts:
        for number, grace_s in (
            (first, INTERRUPT_GRACE_S),
            (signal.SIGTERM, TERMINATE_GRACE_S),
            (signal.SIGKILL, TERMINATE_GRACE_S),
        ):
            # Before the signal, to which a person may answer at once.
            deadline, before = time.monotonic() + grace_s, len(interrupts)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            while time.monotonic() < deadline and len(interrupts) == before:
                if child.poll() is not None and not _group_lives(child.pid):
                    return
                time.sleep(0.02)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let ^C raise KeyboardInterrupt in a cleanup, which otherwise ignores it (cli/main.py)."""
    with _interrupts_to(signal.default_int_handler):
        yield


@contextlib.contextmanager
def _counted_interrupts() -> Iterator[list[int]]:
    """Record each ^C instead of raising it anywhere in a cleanup."""
    arrived: list[int] = []
    with _interrupts_to(lambda number, _: arrived.append(number)):
        yield arrived


@contextlib.contextmanager
def _interrupts_to(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        # Python calls handlers in the main thread only.
        yield
        return
    former = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def _drain(stream: object) -> None:
    """Read a stream to its end: a child that ends may write more than a pipe holds."""
    with contextlib.suppress(ValueError, OSError):
        while stream.read(1 << 16):  # type: ignore[attr-defined]
            pass


def _group_lives(group: int) -> bool:
    """Return whether a process of the group still runs.

    Zombies do not count: in a container, init may never wait for them.
    """
    import psutil

    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    over = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    for running in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(running.pid) == group and running.status() not in over:
                return True
    return False


def _name(argv: list[str]) -> str:
    """Return program and verb, enough to recognise the command: `uv pip install`."""
    verbs = [verb for verb in argv[1:3] if re.fullmatch(r"[a-z][a-z-]*", verb)]
    return " ".join([Path(argv[0]).name, *verbs])
