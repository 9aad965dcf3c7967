"""Life cycle of one vLLM server: start it, wait until it can generate, stop all of its processes.

A server has a folder (`place`) with state, log and lock. It runs below a supervisor
(process_tree.py) in a session and a private TMPDIR of its own. This module does not take the
workspace's lock.
"""

import contextlib
import datetime
import fcntl
import os
import resource
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from workspace.core import hints, process, records
from workspace.core.child_variables import with_given
from workspace.core.console import Console
from workspace.core.errors import ServeError, counted
from workspace.core.settings import Settings
from workspace.machine import failures, hardware
from workspace.server import command, observation, process_tree
from workspace.server.observation import (
    Address,
    Server,
    ending,
    find,
    how_ended,
    is_alive,
    reap,
    state,
    write,
)

START_TIMEOUT_S = 3600.0
GRACE_S = 10.0
# A socket below this folder, whose name has 36 digits, has a path of at most 107 characters
# (unix(7)).
LONGEST_FOLDER = 60
KEPT_LOGS = 10
POLL_S = 0.25
FOLLOW_S = 0.3
# Reading the mapped files costs some milliseconds a process.
LOOK_S = 2.0
# Seconds that one process may take to write its stacks.
DUMP_S = 5.0


@dataclass(frozen=True)
class Launch:
    """Order to start a server. `argv` listens at `address`; `name` appears in messages; `facts` are
    kept in the state file.

    `grace_s` is the time in which it may end by itself, on top of GRACE_S. `restarts` are those of
    a server that was ready.
    """

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    address: Address
    facts: Mapping[str, str] = field(default_factory=dict)
    grace_s: float = 0.0
    restarts: process_tree.Restarts = field(default_factory=process_tree.Restarts)


@dataclass(frozen=True)
class Ready:
    """Server that is ready. `models` are the names under which it takes requests."""

    models: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Stopped:
    """Server that was stopped. `was_killed`: it did not end on SIGTERM. `returned_gib` is how much
    more memory is available than before.
    """

    seconds: float
    was_killed: bool
    returned_gib: float


def start(place: Path, launch: Launch, *, is_detached: bool = False) -> Server:
    """Start a server and write its state file. It ends with this process, unless `is_detached`.

    Raises ServeError if another server runs in `place` or a program listens at the port,
    ToolchainError if the program cannot be started.
    """
    place.mkdir(parents=True, exist_ok=True)
    with _locked(place) as lock:
        former = find(place)
        if former and former.members():
            raise ServeError(
                f"{former.called} runs already", hint=hints.text("server.status_or_stop")
            )
        if former:
            stop(former)
        observation.require_free(launch.address)
        return _start(place, launch, lock, is_detached=is_detached)


def wait_until_ready(
    server: Server,
    *,
    key: str | None = None,
    timeout_s: float = START_TIMEOUT_S,
    on_line: Callable[[str], None] | None = None,
) -> tuple[Server, Ready]:
    """Wait until the server answers /health, lists its models and completes one token.

    `key` is the server's VLLM_API_KEY; `on_line` gets each line of the log. Raises ServeError, with
    the first real error of the log, if the server ends before that or needs longer than
    `timeout_s`; the caller stops what then still runs. A server that hangs is ended with its
    stacks in the log.
    """
    started = time.monotonic()
    lines = observation.follow(server.log)
    problem, looked_at, known = "no answer", 0.0, frozenset[str]()
    while time.monotonic() - started < timeout_s:
        for line in lines:
            if line is None:
                break
            if on_line:
                on_line(line)
        files = process_tree.shared_files()
        if files != known or time.monotonic() - looked_at > LOOK_S:
            looked_at, known = time.monotonic(), files
            _record_shared(server)
        if not is_alive(server):
            raise failure(server)
        if observation.is_healthy(server.address) and (
            names := observation.served_models(server.address, key=key)
        ):
            left_s = max(1.0, started + timeout_s - time.monotonic())
            message = observation.complete_once(
                server.address,
                names[0],
                key=key,
                timeout_s=min(left_s, observation.COMPLETION_TIMEOUT_S),
            )
            if message is None and is_alive(server):
                return mark_ready(server), Ready(names, time.monotonic() - started)
            problem = f"it is healthy but cannot complete one token: {message}"
            if is_alive(server):
                hangs = bool(message and message.startswith("no answer"))
                raise _not_ready(server, f"answers but does not work: {problem}", hangs=hangs)
        time.sleep(POLL_S)
    raise _not_ready(server, f"was not ready after {timeout_s:g} s: {problem}", hangs=True)


def mark_ready(server: Server) -> Server:
    """Record that the server was ready, for others and for its supervisor."""
    _record_shared(server)
    server = replace(server, is_ready=True)
    write(server)
    Path(process_tree.ready(str(ending(server.place, server.processes.tag)))).touch()
    return server


def _not_ready(server: Server, problem: str, *, hangs: bool) -> ServeError:
    if hangs:
        before = server.log.stat().st_size
        end_with_stacks(lambda: server.members() - {server.processes.supervisor_pid})
        written = server.log.read_bytes()[before:]
        problem += "; its stacks are in the log" if b"(most recent call first)" in written else ""
    return ServeError(
        f"{server.called} {problem}",
        hint=hints.text("core.read_log", path=server.log),
        details=failures.read(server.log, status=None).tail,
    )


def stop(server: Server, *, at_once: bool = False) -> Stopped:
    """End all processes of a server and wait until its port and its memory are free. Idempotent.

    `at_once` kills without SIGTERM before. Raises ServeError if a process outlives SIGKILL or the
    port stays taken.
    """
    started = time.monotonic()
    before = observation.available_gib()
    shared = set(server.shared)
    seen: set[int] = set()

    def find_members() -> set[int]:
        reap(server)
        found = server.members()
        shared.update(process_tree.shared_by(found - seen))
        seen.update(found)
        return found

    grace_s = 0.0 if at_once else server.grace_s + GRACE_S
    try:
        if not at_once and _end_by_supervisor(
            server, find_members, timeout_s=grace_s + process_tree.KILL_GRACE_S
        ):
            was_killed = False
        else:
            was_killed = not process_tree.end(
                find_members, grace_s=grace_s, kill_grace_s=process_tree.KILL_GRACE_S
            )
    except TimeoutError as exc:
        raise ServeError(
            f"{server.called}: processes {exc} do not end, even on SIGKILL",
            hint=hints.text("server.ps_stuck", pids=str(exc).replace(" ", "")),
        ) from exc
    ended = str(ending(server.place, server.processes.tag))
    process_tree.remove_shared(shared | process_tree.recorded_shared(ended))
    process_tree.forget_shared(ended)
    shutil.rmtree(server.processes.folder, ignore_errors=True)
    observation.wait_for_port(server.address)
    returned = observation.settled(before)
    _forget(server)
    return Stopped(time.monotonic() - started, was_killed, returned)


def _forget(server: Server) -> None:
    """Close the lifeline of a stopped server, and remove its state unless another runs now."""
    if server.lifeline is not None:
        with contextlib.suppress(OSError):
            os.close(server.lifeline)
    with contextlib.suppress(FileNotFoundError):
        if (now := find(server.place)) is None or now.processes == server.processes:
            state(server.place).unlink()


@contextlib.contextmanager
def running(
    place: Path,
    launch: Launch,
    *,
    key: str | None = None,
    timeout_s: float = START_TIMEOUT_S,
    on_line: Callable[[str], None] | None = None,
) -> Iterator[tuple[Server, Ready]]:
    """Run a server for the duration of the block: ready at its begin, stopped at its end.

    Raises as `start`, `wait_until_ready` and `stop` do.
    """
    server = start(place, launch)
    try:
        server, ready = wait_until_ready(server, key=key, timeout_s=timeout_s, on_line=on_line)
        yield server, ready
    finally:
        stop(server)


def end_with_stacks(find: Callable[[], set[int]]) -> None:
    """Freeze all processes, so that none reacts to another's end; then let each dump and die.

    The process that started last goes first.
    """
    known = process_tree.living()
    pids = sorted(find() & known.keys(), key=lambda pid: (known[pid].started, pid), reverse=True)
    for pid in pids:
        with contextlib.suppress(OSError):
            # Without a core dump, which could have several GiB.
            resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
            os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        deadline = time.monotonic() + DUMP_S
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGABRT)
            os.kill(pid, signal.SIGCONT)
            while process_tree.started_at(pid) == known[pid].started:
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                    break
                time.sleep(process_tree.POLL_S)


def failure(server: Server) -> ServeError:
    """Return the error for a server that has ended without a request of this process."""
    ended = how_ended(server)
    if ended and ended.was_requested:
        return ServeError(
            f"{server.called} was ended by another process", hint=hints.text("inv.serve_status")
        )
    deaths = observation.deaths(server).deaths
    # The log has the lines of the former runs, too.
    begin = 0 if not deaths else deaths[-1].begin if ended else deaths[-1].end
    end = deaths[-1].end if deaths and ended else None
    status, kills = (ended.status, ended.kills) if ended else (None, 0)
    reading = failures.read(server.log, status=status, begin=begin, end=end, kills=kills)
    count = len(deaths) - 1
    again = f"; it was started again {counted(count, 'time')}, the limit" if count > 0 else ""
    return ServeError(
        f"{server.called} {failures.how_ended(status, reading)}{again}",
        hint=_hint(server, reading),
        details=(*reading.tail, f"log: {server.log}"),
    )


def cause_of(server: Server, death: observation.Death) -> tuple[str, str]:
    """Return the cause of a death in words, and the next command."""
    reading = failures.read(
        server.log, status=death.status, begin=death.begin, end=death.end, kills=death.kills
    )
    return failures.how_ended(death.status, reading), _hint(server, reading)


def _hint(server: Server, reading: failures.Reading) -> str:
    """Return the next command for a failure: the symptom's, else one that shows the log."""
    typed = server.facts.get("typed")
    is_fetched = bool(typed) and command.folder_of(server.name) is None
    hint = reading.symptom and reading.symptom.next_command(
        name=server.name if is_fetched else None, typed=typed
    )
    return hint or hints.text("core.read_log", path=server.log)


def free_port() -> int:
    """Return a port at which no program listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(place: Path, launch: Launch, lock: int, *, is_detached: bool) -> Server:
    tree, lifeline = _spawn(place, launch, lock)
    server = Server(
        place,
        launch.name,
        launch.address,
        tree,
        hardware.boot_id(),
        records.utc_now(),
        launch.grace_s,
        facts=launch.facts,
        lifeline=lifeline,
    )
    write(server)
    if is_detached:
        os.write(lifeline, b".")
        os.close(lifeline)
        server = replace(server, lifeline=None)
    return server


def _spawn(place: Path, launch: Launch, lock: int) -> tuple[process_tree.ProcessTree, int]:
    """Start the supervisor with the server below it. Return its tree and the lifeline to it."""
    tag = secrets.token_hex(6)
    base = launch.environment.get("TMPDIR") or tempfile.gettempdir()
    folder = tempfile.mkdtemp(
        prefix="vllm-server-",
        dir=base if len(base) < LONGEST_FOLDER and os.path.isdir(base) else "/tmp",
    )
    log = _new_log(place)
    inherited, lifeline = os.pipe()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    argv = [
        sys.executable,
        "-I",
        "-S",
        process_tree.__file__,
        str(inherited),
        str(lock),
        str(GRACE_S + launch.grace_s),
        str(ending(place, tag)),
        folder,
        launch.restarts.argument,
        *launch.argv,
    ]
    given = {"TMPDIR": folder, process_tree.TAG: tag}
    environment = with_given(launch.environment, "serve", given)
    try:
        pid = process.apart(argv, env=environment, output=output, inherited=(inherited, lock))
    except BaseException:
        os.close(lifeline)
        os.rmdir(folder)
        raise
    finally:
        os.close(inherited)
        os.close(output)
    started = process_tree.started_at(pid) or 0
    return process_tree.ProcessTree(pid, started, tag, folder, str(log)), lifeline


def _new_log(place: Path) -> Path:
    """Return the path of a new log, and remove the oldest logs and the records of former ends."""
    logs = place / "logs"
    logs.mkdir(exist_ok=True)
    for old in sorted(logs.iterdir())[: -KEPT_LOGS + 1]:
        old.unlink(missing_ok=True)
    for old in place.glob("ended-*"):
        old.unlink(missing_ok=True)
    return logs / f"{datetime.datetime.now().strftime('%Y%m%d-%H%M%S-%f')}.log"


def _end_by_supervisor(
    server: Server, find_members: Callable[[], set[int]], *, timeout_s: float
) -> bool:
    """Have the supervisor end the server: it terminates each process, kills those that stay, and
    cleans up. Return whether all have ended.
    """
    if not is_alive(server):
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(server.processes.supervisor_pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while find_members():
        if time.monotonic() > deadline or not is_alive(server):
            return False
        time.sleep(process_tree.POLL_S)
    return True


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[int]:
    """Lock the place; the supervisor inherits the lock and keeps it as long as it runs.

    filelock unlocks when it releases, for the supervisor too (see core/lock.py).
    """
    descriptor = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = find(place)
            problem = (
                f"{other.called} runs already"
                if other
                else "another server is being started or stopped"
            )
            raise ServeError(problem, hint=hints.text("server.status_or_stop")) from None
        yield descriptor
    finally:
        os.close(descriptor)


def _record_shared(server: Server) -> None:
    ended = str(ending(server.place, server.processes.tag))
    process_tree.record_shared(ended, process_tree.shared_by(server.members()))


def end(server: Server, *, console: Console) -> None:
    """Stop a server and print how much memory is free again; a second ^C kills it."""
    if find(server.place) is None and not server.members():
        return
    console.info(f"stopping {server.called}")
    try:
        with process.interruptible():
            stopped = stop(server)
    except KeyboardInterrupt:
        stopped = stop(server, at_once=True)
    how = "killed, because it did not end on SIGTERM" if stopped.was_killed else "ended"
    console.info(
        f"{how} in {stopped.seconds:.1f} s; port {server.address.port} is free,"
        f" {stopped.returned_gib:.1f} GiB of memory came back"
    )


def watch(settings: Settings, server: Server, console: Console) -> None:
    """Print the log until the server ends. Raises ServeError if it was not stopped on request."""
    lines = observation.follow(server.log)
    # The spinner has shown the lines up to now.
    for line in lines:
        if line is None:
            break
    known = 0
    for line in lines:
        if line is not None:
            console.info(settings.masked(line))
        elif is_alive(server):
            deaths = observation.deaths(server).deaths
            for death in deaths[known:]:
                cause, hint = cause_of(server, death)
                console.warn(settings.masked(f"{server.called} {cause}"), hint=hint)
            known = len(deaths)
            time.sleep(FOLLOW_S)
        else:
            break
    ended = how_ended(server)
    if ended is None or not ended.was_requested:
        raise failure(server)
    console.info(f"{server.called} was stopped")
