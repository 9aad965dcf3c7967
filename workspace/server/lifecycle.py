"""One vLLM server: start it, wait until it can generate, find it again, stop all of it. A server
has a folder of its own (`place`) with state, log and lock.

It lives below a keeper (keeper.py) in a session of its own, in a private folder that is its TMPDIR;
the state file says by which numbers it is known again. The workspace's lock is no business of it.
"""

import contextlib
import datetime
import fcntl
import os
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

from workspace.core import process
from workspace.core.errors import ServeError
from workspace.machine import hardware
from workspace.server import observation, process_tree, supervisor
from workspace.server.observation import (
    Address,
    Server,
    boot,
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
# A socket's path, with a number of 36 digits below this folder, has 107 characters at most
# (unix(7)).
LONGEST_FOLDER = 60
KEPT_LOGS = 10
POLL_S = 0.25
# Looking at what is mapped costs some milliseconds a process.
LOOK_S = 2.0
# Ports and memory come back within a moment of the last process; a driver may take its time.
RETURN_TIMEOUT_S = 10.0
SETTLED_GIB = 0.02
_STATUS, _STOP = "./scripts/inv serve.status", "./scripts/inv serve.stop"


@dataclass(frozen=True)
class Launch:
    """What is to be started. `argv` listens at `address`; `name` is what people call it; `facts`
    are kept with the state, for whoever looks later.

    `grace_s` is how long it may take to end by itself, on top of GRACE_S.
    """

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    address: Address
    facts: Mapping[str, str] = field(default_factory=dict)
    grace_s: float = 0.0


@dataclass(frozen=True)
class Ready:
    """`models` are the names under which it takes requests."""

    models: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Stopped:
    """`was_killed`: it did not end when it was asked to. `returned_gib` is how much more memory is
    available than before.
    """

    seconds: float
    was_killed: bool
    returned_gib: float


def start(place: Path, launch: Launch, *, is_detached: bool = False) -> Server:
    """Start a server and write down how it is found again. It ends with this process, unless
    `is_detached`.

    Raises ServeError where another one lives in `place` or something listens at the port,
    ToolchainError where the program cannot be started.
    """
    place.mkdir(parents=True, exist_ok=True)
    with _locked(place) as lock:
        former = find(place)
        if former and former.members():
            raise ServeError(f"{former.called} is there already", hint=f"{_STATUS}, or {_STOP}")
        if former:
            stop(former)
        require_free(launch.address)
        return _start(place, launch, lock, is_detached=is_detached)


def wait_until_ready(
    server: Server,
    *,
    key: str | None = None,
    timeout_s: float = START_TIMEOUT_S,
    on_line: Callable[[str], None] | None = None,
) -> tuple[Server, Ready]:
    """Wait until the server answers /health, names its models and completes one token. `key` is
    what it was given as VLLM_API_KEY.

    `on_line` gets each line of the log. Raises ServeError, with the first real error of the log,
    where it ends before or takes longer than `timeout_s`; whatever then still runs is the caller's
    to stop.
    """
    started = time.monotonic()
    lines = follow(server.log)
    said, looked_at, known = "no answer", 0.0, frozenset[str]()
    while time.monotonic() - started < timeout_s:
        for line in lines:
            if line is None:
                break
            if on_line:
                on_line(line)
        if (there := process_tree.shared_files()) != known or time.monotonic() - looked_at > LOOK_S:
            server, looked_at, known = _with_shared(server), time.monotonic(), there
        if not is_alive(server):
            raise failure(server)
        if observation.is_healthy(server.address) and (
            names := observation.served_models(server.address, key=key)
        ):
            problem = observation.complete_once(server.address, names[0], key=key)
            if problem is None and is_alive(server):
                server = replace(_with_shared(server), is_ready=True)
                write(server)
                return server, Ready(names, time.monotonic() - started)
            said = f"it is healthy and cannot complete one token: {problem}"
            if is_alive(server):
                raise ServeError(
                    f"{server.called} answers and does not work: {said}",
                    hint=f"less {server.log}",
                    details=observation.read_failure(server.log, status=None).tail,
                )
        time.sleep(POLL_S)
    raise ServeError(
        f"{server.called} was not ready after {timeout_s:g} s: {said}",
        hint=f"less {server.log}",
        details=observation.read_failure(server.log, status=None).tail,
    )


def stop(server: Server, *, at_once: bool = False) -> Stopped:
    """End everything of a server, and wait until its port, its shared memory and its memory are
    free again. Twice is as good as once.

    `at_once` kills without asking. Raises ServeError where something outlives SIGKILL or the port
    stays taken.
    """
    started = time.monotonic()
    before = _available_gib()
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
        if not at_once and _asked(
            server, find_members, timeout_s=grace_s + supervisor.KILL_GRACE_S
        ):
            was_killed = False
        else:
            was_killed = not process_tree.end(
                find_members, grace_s=grace_s, kill_grace_s=supervisor.KILL_GRACE_S
            )
    except TimeoutError as exc:
        raise ServeError(
            f"{server.called}: processes {exc} do not end, not even by SIGKILL",
            hint=f"ps -o pid,stat,wchan:30,args -p {str(exc).replace(' ', '')}",
        ) from exc
    process_tree.remove_shared(shared)
    shutil.rmtree(server.family.folder, ignore_errors=True)
    _wait_for_port(server.address)
    returned = _settled(before)
    if server.lifeline is not None:
        with contextlib.suppress(OSError):
            os.close(server.lifeline)
    with contextlib.suppress(FileNotFoundError):
        if (now := find(server.place)) is None or now.family == server.family:
            state(server.place).unlink()
    return Stopped(time.monotonic() - started, was_killed, returned)


@contextlib.contextmanager
def running(
    place: Path,
    launch: Launch,
    *,
    key: str | None = None,
    timeout_s: float = START_TIMEOUT_S,
    on_line: Callable[[str], None] | None = None,
) -> Iterator[tuple[Server, Ready]]:
    """Run a server for the duration of the block, ready when it begins and gone when it ends.
    Raises as `start`, `wait_until_ready` and `stop` do.
    """
    server = start(place, launch)
    try:
        server, ready = wait_until_ready(server, key=key, timeout_s=timeout_s, on_line=on_line)
        yield server, ready
    finally:
        stop(server)


def failure(server: Server) -> ServeError:
    """Say why a server has ended that was not asked to."""
    ended = how_ended(server)
    if ended and ended.was_told:
        return ServeError(f"{server.called} was ended by somebody else", hint=_STATUS)
    reading = observation.read_failure(server.log, status=ended.status if ended else None)
    how = process.describe_status(ended.status) if ended else "was killed, with the keeper above it"
    why = f": {reading.first}" if reading.first else ""
    return ServeError(
        f"{server.called} {how}{why}",
        hint=f"less {server.log}",
        details=(*reading.tail, f"log: {server.log}"),
    )


def follow(log: Path) -> Iterator[str | None]:
    """Yield the lines of a log as they are written, None each time when there is no more for
    now.
    """
    rest = ""
    with log.open("rb") as file:
        while True:
            rest += file.read(1 << 16).decode("utf-8", errors="replace")
            *lines, rest = rest.split("\n")
            yield from (line.rstrip("\r") for line in lines)
            if not lines:
                yield None


def require_free(address: Address) -> None:
    """Raise ServeError where something listens at an address, or it is none of this machine's."""
    try:
        _bind(address)
    except OSError as exc:
        hint = (
            f"ss -ltnp 'sport = :{address.port}'    shows who; or choose another one: -- --port"
            f" {address.port + 1 if address.port < 65535 else 8000}"
        )
        raise ServeError(
            f"port {address.port} of {address.host or 'this machine'} cannot be used:"
            f" {exc.strerror or exc}",
            hint=hint,
        ) from exc


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens at now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _start(place: Path, launch: Launch, lock: int, *, is_detached: bool) -> Server:
    mark = secrets.token_hex(6)
    base = launch.environment.get("TMPDIR") or tempfile.gettempdir()
    folder = tempfile.mkdtemp(
        prefix="vllm-server-",
        dir=base if len(base) < LONGEST_FOLDER and os.path.isdir(base) else "/tmp",
    )
    logs = place / "logs"
    logs.mkdir(exist_ok=True)
    for old in sorted(logs.iterdir())[: -KEPT_LOGS + 1]:
        old.unlink(missing_ok=True)
    for old in place.glob("ended-*"):
        old.unlink(missing_ok=True)
    log = logs / f"{datetime.datetime.now().strftime('%Y%m%d-%H%M%S-%f')}.log"
    inherited, lifeline = os.pipe()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    grace_s = GRACE_S + launch.grace_s
    words = [
        sys.executable,
        "-I",
        "-S",
        supervisor.__file__,
        str(inherited),
        str(lock),
        str(grace_s),
        str(ending(place, mark)),
        folder,
        *launch.argv,
    ]
    environment = {**launch.environment, "TMPDIR": folder, process_tree.MARK: mark}
    try:
        number = process.apart(words, env=environment, output=output, inherited=(inherited, lock))
    except BaseException:
        os.close(lifeline)
        os.rmdir(folder)
        raise
    finally:
        os.close(inherited)
        os.close(output)
    family = process_tree.ProcessTree(
        number, process_tree.started_at(number) or 0, mark, folder, str(log)
    )
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    server = Server(
        place,
        launch.name,
        launch.address,
        family,
        boot(),
        since,
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


def _asked(server: Server, find_members: Callable[[], set[int]], *, timeout_s: float) -> bool:
    """Let the keeper end the server: it asks each process once, kills what stays, and tidies.
    Return whether all has ended.
    """
    if not is_alive(server):
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(server.family.keeper, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while find_members():
        if time.monotonic() > deadline or not is_alive(server):
            return False
        time.sleep(process_tree.POLL_S)
    return True


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[int]:
    """Hold the place; the keeper goes on holding it, for as long as it lives."""
    descriptor = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            there = find(place)
            who = (
                f"{there.called} is there already"
                if there
                else "another server is being started or stopped"
            )
            raise ServeError(who, hint=f"{_STATUS}, or {_STOP}") from None
        yield descriptor
    finally:
        os.close(descriptor)


def _with_shared(server: Server) -> Server:
    """Keep in the state what memory is shared: should everything be killed at once, nobody else
    could tell.
    """
    shared = tuple(sorted({*server.shared, *process_tree.shared_by(server.members())}))
    if shared == server.shared:
        return server
    server = replace(server, shared=shared)
    write(server)
    return server


def _bind(address: Address) -> None:
    """Do what the server will do, and let go (vllm/entrypoints/launchers/launcher.py,
    create_server_socket).
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address.host, address.port))
        probe.listen(1)


def _wait_for_port(address: Address) -> None:
    deadline = time.monotonic() + RETURN_TIMEOUT_S
    while True:
        try:
            return _bind(address)
        except OSError as exc:
            if time.monotonic() > deadline:
                raise ServeError(
                    f"everything of the server has ended, but port {address.port} is taken:"
                    f" {exc.strerror}",
                    hint=f"ss -ltnp 'sport = :{address.port}'",
                ) from exc
        time.sleep(process_tree.POLL_S)


def _settled(before: float) -> float:
    """Wait until memory does not come back any more, and return the GiB that came."""
    deadline = time.monotonic() + RETURN_TIMEOUT_S
    now = _available_gib()
    while time.monotonic() < deadline:
        time.sleep(0.1)
        former, now = now, _available_gib()
        if now - former < SETTLED_GIB:
            break
    return max(0.0, now - before)


def _available_gib() -> float:
    return hardware.read_meminfo().get("MemAvailable", 0) * 1024 / hardware.GIB_
