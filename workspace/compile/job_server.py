"""Job server for compilers: a socket in the process of the task, from which each launcher
(launcher.py) requests a job token before it starts its compiler.

scheduler.py decides which compiler starts. An open connection is a token, so the kernel returns
what a killed compiler held, and if the task is killed, all waiting launchers end. When the server
ends, it refuses waiting launchers and ends running ones: ninja alone may have been killed. A
compiler that was killed because memory ran out runs again with half the budget, twice at most.
"""

import contextlib
import os
import selectors
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from workspace.compile import launcher, scheduler
from workspace.compile.costs import KILLED_HELD, Costs, History, unit_of
from workspace.compile.scheduler import (
    Admission,
    Client,
    End,
    Finished,
    MemoryStatus,
    Running,
    State,
)
from workspace.core.errors import BuildError
from workspace.core.files import write_atomic
from workspace.machine import hardware

# Interval of measurements. A peak between two of them may be missed; the peak of the largest
# process of a unit is known exactly.
LOOK_S = 1.0
# The first compilers wait until all units have requested a token, or none has for QUIET_S, and for
# LONGEST_QUIET_S at most: the order is best when all units are known.
QUIET_S, LONGEST_QUIET_S = 0.3, 2.0
SAVE_S = 30.0
TERMINATE_GRACE_S, KILL_GRACE_S = 3.0, 2.0
# For launchers that ninja had started when it was killed.
LATECOMERS_S = 0.3
# After so many out-of-memory kills in one build, give up.
KILLS = 3
_OTHER_FAILED = "another unit failed"
# Folder of a job server below a build directory, and the launcher in it. The names stay: ninja
# compares commands, so a new path would compile every unit again.
FOLDER, LAUNCHER = "tickets", "ticket"


def install(folder: Path) -> Path:
    """Write the compiler launcher into `folder`, and return its path. Keep one that is up to date:
    ninja compares the commands.

    A path without arguments works for CMake (CMAKE_<LANG>_COMPILER_LAUNCHER), ccache
    (prefix_command) and cargo (RUSTC_WRAPPER).
    """
    argv = (sys.executable, "-I", "-S", launcher.__file__, str(folder))
    content = f'#!/bin/sh\nexec {shlex.join(argv)} "$@"\n'.encode()
    program = folder / LAUNCHER
    if not program.is_file() or program.read_bytes() != content:
        write_atomic(program, content, mode=0o755)
    return program


@dataclass(frozen=True)
class MemoryWatch:
    """Functions that read the memory status of the machine and the kernel's out-of-memory kills."""

    status: Callable[[], MemoryStatus]
    kills: Callable[[], int]


class JobServer:
    """Job server that gives tokens to compilers while the block is entered, from a thread.

    Without `memory` only the bounds count. `units` is the expected number of requests, if known:
    then the first need not wait for others. Once a unit has failed, waiting ones are refused: ninja
    has started them already and would wait for all of them. `trouble` is a message once memory has
    run out too often.
    """

    def __init__(
        self,
        folder: Path,
        admission: Admission,
        costs: Costs,
        *,
        memory: MemoryWatch | None = None,
        history: History | None = None,
        units: int = 0,
    ) -> None:
        self.state = State(budget_gib=admission.bounds.budget_gib)
        self.trouble: str | None = None
        self._folder, self._admission, self._costs = folder, admission, costs
        self._memory, self._history = memory, history
        self._units = units
        self._clients: dict[int, Client] = {}
        self._finished: list[Finished] = []
        self._failure: BaseException | None = None
        self._selector = selectors.DefaultSelector()
        self._last_number = self._requests = 0
        self._budgets: list[float] = []
        self._last_kill = -1.0
        self._has_failed = False
        self._quiet_until = self._longest_quiet_until = 0.0
        self._looked = self._saved = time.monotonic()
        self._is_ending = False

    @property
    def finished(self) -> tuple[Finished, ...]:
        """Units that have ended so far."""
        return tuple(self._finished)

    def __enter__(self) -> "JobServer":
        install(self._folder)
        self._listener = scheduler.listen(self._folder)
        self._woken, self._waker = os.pipe()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="job server", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End all units that wait or run. Raises BuildError if the thread had failed and refused
        launchers.
        """
        self._is_ending = True
        os.close(self._waker)
        self._thread.join()
        if self._failure is not None:
            raise BuildError(f"the job server failed: {self._failure!r}") from self._failure

    def _serve(self) -> None:
        try:
            while not self._is_ending:
                self._turn()
            self._end()
            self._save()
        except BaseException as exc:
            self._failure = exc
        finally:
            (self._folder / "socket").unlink(missing_ok=True)
            self._listener.close()
            os.close(self._woken)
            for client in self._clients.values():
                client.connection.close()
            self._selector.close()

    def _turn(self) -> None:
        now = time.monotonic()
        pause_s = LOOK_S if self._clients else None
        if (settled := min(self._quiet_until, self._longest_quiet_until)) > now:
            pause_s = settled - now
        for key, _ in self._selector.select(pause_s):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fd in self._clients:
                self._receive(self._clients[key.fd])
        now = time.monotonic()
        if now - self._looked >= LOOK_S:
            self._looked = now
            self._measure()
        if now - self._saved >= SAVE_S:
            self._saved = now
            self._save()
        self._admit(now)

    def _admit(self, now: float) -> None:
        admission = self._admission
        if admission.waiting and now >= min(self._quiet_until, self._longest_quiet_until):
            clients = {client.number: client for client in self._clients.values()}
            for number in admission.admit(now, self._memory.status() if self._memory else None):
                self._start(clients[number], now)
        running = tuple(
            Running(client.unit, client.expected, client.started or now)
            for client in self._clients.values()
            if client.is_counted
        )
        held_gib = sum(token.held_gib for token in admission.running)
        self.state = State(
            running,
            len(admission.waiting),
            admission.why,
            held_gib,
            admission.bounds.budget_gib,
        )

    def _start(self, client: Client, now: float) -> None:
        client.start(now, self._memory.kills() if self._memory else 0)

    def _accept(self) -> None:
        while client := scheduler.accept_client(self._listener, self._last_number + 1):
            self._last_number += 1
            self._clients[client.connection.fileno()] = client
            self._selector.register(client.connection, selectors.EVENT_READ)

    def _receive(self, client: Client) -> None:
        is_over = client.receive()
        try:
            message = client.parse()
        except ValueError:
            message, is_over = None, True
        if isinstance(message, End):
            self._end_run(client, message)
        elif message is not None:
            self._request(client, message)
        if is_over and client.connection.fileno() in self._clients:
            self._drop(client)
            self._finish(client, None)

    def _request(self, client: Client, argv: list[str]) -> None:
        client.unit = unit_of(argv)
        client.expected = self._costs.expected(client.unit)
        if self._is_inside_another(client.pid):
            # It is part of the outer unit. If it waited for a second token while that unit holds
            # the first, both might wait forever.
            client.is_nested = True
            self._start(client, time.monotonic())
        else:
            self._queue(client)

    def _queue(self, client: Client) -> None:
        if self._has_failed:
            self._refuse(client, _OTHER_FAILED)
            return
        now = time.monotonic()
        if not self._admission.waiting and not self._admission.running:
            self._longest_quiet_until = now + LONGEST_QUIET_S
        self._requests += 1
        self._quiet_until = now if 0 < self._units <= self._requests else now + QUIET_S
        self._admission.request(client.number, client.expected, now, is_light=client.unit.is_light)

    def _is_inside_another(self, pid: int) -> bool:
        """Return whether a parent process of this launcher is a launcher with a token."""
        holders = {client.pid for client in self._clients.values() if client.started is not None}
        return bool(holders) and any(parent in holders for parent in parents(pid))

    def _end_run(self, client: Client, end: End) -> None:
        began, status = client.started or 0.0, os.waitstatus_to_exitcode(end.status)
        is_killed = not self._is_ending and (
            status == -signal.SIGKILL or (status > 0 and self._has_been_killed(client))
        )
        client.peak_gib = max(client.peak_gib, end.largest_gib)
        done = self._finish(client, status, end.seconds, is_killed=is_killed)
        if done is None or not is_killed:
            self._refuse(client, "")
            return
        self._admission.leave(client.number)
        self._make_room(done, began)
        client.expected = replace(
            done.expected, peak_gib=max(done.expected.peak_gib, done.peak_gib * KILLED_HELD)
        )
        client.started = None
        if self.trouble:
            self._refuse(client, self.trouble)
            self._fail()
        else:
            self._queue(client)

    def _has_been_killed(self, client: Client) -> bool:
        """Return whether memory has run out since this compiler began: g++ exits with 1 when the
        kernel kills its child.
        """
        return self._memory is not None and self._memory.kills() > client.kills

    def _make_room(self, done: Finished, began: float) -> None:
        """Halve the budget, unless the unit began before the last halving: that is the same
        shortage.
        """
        if began < self._last_kill:
            return
        bounds = self._admission.bounds
        self._last_kill = time.monotonic()
        self._budgets.append(bounds.budget_gib)
        self._admission.bounds = replace(bounds, budget_gib=bounds.budget_gib / 2)
        if len(self._budgets) >= KILLS:
            tried = ", ".join(f"{budget:.1f}" for budget in self._budgets)
            self.trouble = (
                f"memory ran out {len(self._budgets)} times, with budgets of {tried} GiB; the last"
                f" killed unit was {done.unit.source} of {done.unit.target or 'no target'}:"
                f" {done.expected.peak_gib:.1f} GiB expected, at least {done.peak_gib:.1f} held"
            )

    def _finish(
        self, client: Client, status: int | None, seconds: float = 0.0, *, is_killed: bool = False
    ) -> Finished | None:
        """Record what a unit took; return None if it had not begun or is part of another."""
        if client.started is None or client.is_nested:
            return None
        done = Finished(
            client.unit,
            client.expected,
            seconds,
            client.peak_gib,
            status,
            is_killed,
        )
        self._finished.append(done)
        if self._history and not done.unit.is_light and (status == 0 or is_killed):
            self._history.add(
                done.unit, seconds=seconds, peak_gib=done.peak_gib, is_killed=is_killed
            )
        if status != 0 and not is_killed:
            self._fail()
        return done

    def _fail(self) -> None:
        self._has_failed = True
        for client in [
            client
            for client in self._clients.values()
            if client.has_requested and client.started is None
        ]:
            self._refuse(client, _OTHER_FAILED)

    def _drop(self, client: Client) -> None:
        """Take the token back: the compiler has ended, or all processes that held the connection
        are gone.
        """
        self._selector.unregister(client.connection)
        del self._clients[client.connection.fileno()]
        client.connection.close()
        self._admission.leave(client.number)

    def _measure(self) -> None:
        running = [client for client in self._clients.values() if client.is_counted]
        if not running:
            return
        found = living()
        trees = below(frozenset(client.pid for client in running), found)
        for client in running:
            held_gib = sum(found[pid].held_gib for pid in trees[client.pid])
            client.peak_gib = max(client.peak_gib, held_gib)
            self._admission.measured(client.number, held_gib)

    def _save(self) -> None:
        """Save the history. If that fails, only the next build's estimates suffer."""
        with contextlib.suppress(OSError):
            if self._history:
                self._history.save()

    def _end(self) -> None:
        """Refuse waiting launchers, end running ones, and return once they have ended."""
        had_clients = bool(self._clients)
        for client in [client for client in self._clients.values() if client.started is None]:
            self._refuse(client, launcher.HAS_ENDED)
        for signal_number, grace_s in (
            (signal.SIGTERM, TERMINATE_GRACE_S),
            (signal.SIGKILL, KILL_GRACE_S),
        ):
            deadline = time.monotonic() + grace_s
            while self._clients and time.monotonic() < deadline:
                # Signal the processes below each launcher, and its group, which ninja makes for
                # each command: a launcher may have been killed.
                holders = [
                    client for client in self._clients.values() if client.started is not None
                ]
                signal_process(
                    frozenset(client.pid for client in holders),
                    frozenset(client.group for client in holders),
                    signal_number,
                )
                self._refuse_latecomers(0.1)
        if had_clients:
            self._refuse_latecomers(LATECOMERS_S)

    def _refuse_latecomers(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(left_s):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fd in self._clients:
                    client = self._clients[key.fd]
                    (
                        self._receive(client)
                        if client.started is not None
                        else self._refuse(client, launcher.HAS_ENDED)
                    )
                else:
                    self._selector.unregister(self._woken)

    def _refuse(self, client: Client, why: str) -> None:
        client.send(why)
        self._drop(client)


@dataclass(frozen=True)
class Process:
    """A process: its parent, its group, and the GiB it holds (resident, shared pages included)."""

    parent: int
    group: int
    held_gib: float


def living() -> dict[int, Process]:
    """Return all living processes by pid, in one pass."""
    import psutil

    found = {}
    for running in psutil.process_iter(["ppid", "status", "memory_info"]):
        parent, held = running.info["ppid"], running.info["memory_info"]
        is_over = running.info["status"] in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        # A process may end meanwhile.
        with contextlib.suppress(ProcessLookupError):
            if held and not is_over:
                group = os.getpgid(running.pid)
                found[running.pid] = Process(parent, group, held.rss / hardware.GIB)
    return found


def parents(pid: int) -> Iterator[int]:
    """Yield the parent of a process, its parent, and so on."""
    import psutil

    with contextlib.suppress(psutil.Error):
        while pid > 1:
            pid = psutil.Process(pid).ppid()
            yield pid


def below(roots: frozenset[int], known: Mapping[int, Process]) -> dict[int, set[int]]:
    """Return, for each of `roots`, the processes below it, without itself."""
    found: dict[int, set[int]] = {root: set() for root in roots}
    for pid in known:
        path: list[int] = []
        ancestor = pid
        while ancestor in known and ancestor not in path:
            if ancestor in roots:
                found[ancestor].update(path)
            path.append(ancestor)
            ancestor = known[ancestor].parent
    return found


def signal_process(
    roots: frozenset[int], groups: frozenset[int], signal_number: signal.Signals
) -> None:
    """Send a signal to the processes below `roots` and in `groups`, but not to this process's own
    group.
    """
    known = living()
    receivers = {pid for pids in below(roots, known).values() for pid in pids}
    receivers |= {
        pid for pid, process in known.items() if process.group in groups - {0, os.getpgrp()}
    }
    for pid in receivers:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal_number)
