"""Tickets for compilers: a socket in the verb's own process, at which each launcher (launcher.py)
asks before it starts its compiler.

Who may start is decided in admission.py. An open connection is a ticket, so the kernel gives back
what a killed compiler held, and a killed verb ends all that wait. A broker's end refuses who waits
and ends who runs: ninja may have been killed alone. A compiler that the kernel killed for want of
memory runs again on half the budget, twice.
"""

import contextlib
import os
import selectors
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from workspace.compile import jobs, launcher, scheduler
from workspace.compile.costs import KILLED_HELD, Costs, History, unit_of
from workspace.compile.scheduler import Admission, Client, End, Finished, Live, Running, State
from workspace.core.errors import BuildError
from workspace.core.files import write_atomic

# How often processes are looked at. Between two looks a peak may be missed; what the largest
# process of a unit held at the most is known exactly.
LOOK_S = 1.0
# The first compilers wait until all have asked, or nobody has for so long, and no longer than the
# other: the order is worth most when all units are seen.
QUIET_S, LONGEST_QUIET_S = 0.3, 2.0
SAVE_S = 30.0
TERMINATE_GRACE_S, KILL_GRACE_S = 3.0, 2.0
# For launchers that ninja had started when it was killed.
LATECOMERS_S = 0.3
# So many times memory may run out in one build.
KILLS = 3
# These compile in a server, which a launcher has not started and cannot measure.
_ELSEWHERE = ("sccache", "distcc", "icecc")
_HAS_ENDED = "the build that this unit belongs to has ended"
_OTHER_FAILED = "another unit failed"
# Below the folder of the tickets.
STAND_INS = "compilers"


def install(folder: Path, *, python: str = sys.executable) -> Path:
    """Make `folder` hold the program to name as compiler launcher, and return it. One that is right
    is not touched: ninja compares the command.

    One word without arguments serves CMake (CMAKE_<LANG>_COMPILER_LAUNCHER), ccache
    (prefix_command), cargo (RUSTC_WRAPPER) and torch (PYTORCH_NVCC).
    """
    # What a compiler with a ticket starts needs none: the stand-ins are for those that have no
    # launcher.
    without = f'_stand_ins={shlex.quote(str(folder / STAND_INS))}; PATH="${{PATH#"$_stand_ins":}}"'
    return _write_program(
        folder / "ticket",
        f"{without}; exec {shlex.join([python, '-I', '-S', launcher.__file__, str(folder)])}",
    )


def stand_in(folder: Path, compilers: Mapping[str, Sequence[str]]) -> Path:
    """Make a folder to be put first on PATH, so that also a command which calls a compiler by its
    name takes a ticket, and return it.

    `compilers` gives the words that each name stands for.
    """
    place = folder / STAND_INS
    for name, words in compilers.items():
        _write_program(place / name, f"exec {shlex.join([str(install(folder)), *words])}")
    for old in set(os.listdir(place)) - set(compilers) if place.is_dir() else ():
        (place / old).unlink()
    return place


def _write_program(program: Path, command: str) -> Path:
    content = f'#!/bin/sh\n{command} "$@"\n'.encode()
    if not program.is_file() or program.read_bytes() != content:
        write_atomic(program, content, mode=0o755)
    return program


class JobServer:
    """Gives out tickets while the block is entered, from a thread.

    `look` says what the machine has left; without it only the bounds count. `kills` counts how
    often the kernel has killed for want of memory. `units` is how many will ask, where that is
    known: the first then need not wait to see whether another comes. Once a unit has failed those
    that wait are refused, unless told to `keep_going`: for ninja they run already, and it would
    wait for them all. `trouble` is a sentence once memory has run out too often.
    """

    def __init__(
        self,
        folder: Path,
        admission: Admission,
        costs: Costs,
        *,
        look: Callable[[], Live] | None = None,
        kills: Callable[[], int] | None = None,
        history: History | None = None,
        units: int = 0,
        keep_going: bool = False,
    ) -> None:
        self.state = State()
        self.trouble: str | None = None
        self._units, self._keep_going, self._kills = units, keep_going, kills
        self._folder, self._admission, self._costs, self._look, self._history = (
            folder,
            admission,
            costs,
            look,
            history,
        )
        self._callers: dict[int, Client] = {}
        self._finished: list[Finished] = []
        self._failure: BaseException | None = None
        self._selector = selectors.DefaultSelector()
        self._last_number = self._asked = 0
        self._budgets: list[float] = []
        self._last_kill = -1.0
        self._has_failed = False
        self._quiet_until = self._longest_quiet_until = 0.0
        self._looked = self._saved = time.monotonic()
        self._is_ending = False

    @property
    def finished(self) -> tuple[Finished, ...]:
        """The units that have ended so far."""
        return tuple(self._finished)

    def __enter__(self) -> "JobServer":
        install(self._folder)
        self._listener = scheduler.listen(self._folder)
        self._woken, self._waker = os.pipe()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="tickets", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End what still waits or runs. Raises BuildError where the thread had failed: launchers
        were then refused.
        """
        self._is_ending = True
        os.close(self._waker)
        self._thread.join()
        if self._failure is not None:
            hint = "a fault of the workspace: run the same command again"
            raise BuildError(
                f"the tickets for compilers failed: {self._failure!r}", hint=hint
            ) from self._failure

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
            for client in self._callers.values():
                client.connection.close()
            self._selector.close()

    def _turn(self) -> None:
        now = time.monotonic()
        pause_s = LOOK_S if self._callers else None
        if (settled := min(self._quiet_until, self._longest_quiet_until)) > now:
            pause_s = settled - now
        for key, _ in self._selector.select(pause_s):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fd in self._callers:
                self._hear(self._callers[key.fd])
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
            callers = {client.number: client for client in self._callers.values()}
            for number in admission.admit(now, self._look() if self._look else None):
                self._start(callers[number], now)
        running = tuple(
            Running(client.unit, client.expected, client.started or now)
            for client in self._callers.values()
            if client.is_counted
        )
        held_gib = sum(ticket.held_gib for ticket in admission.running)
        self.state = State(
            running,
            len(admission.waiting),
            admission.why,
            admission.charged_gib,
            held_gib,
            admission.bounds.budget_gib,
        )

    def _start(self, client: Client, now: float) -> None:
        client.start(now, self._kills() if self._kills else 0)

    def _accept(self) -> None:
        while client := scheduler.accept_client(self._listener, self._last_number + 1):
            self._last_number += 1
            self._callers[client.connection.fileno()] = client
            self._selector.register(client.connection, selectors.EVENT_READ)

    def _hear(self, client: Client) -> None:
        is_over = client.hear()
        try:
            said = client.understand()
        except ValueError:
            said, is_over = None, True
        if isinstance(said, End):
            self._heard_end(client, said)
        elif said is not None:
            self._ask(client, said)
        if is_over and client.connection.fileno() in self._callers:
            self._drop(client)
            self._finish(client, None)

    def _ask(self, client: Client, argv: list[str]) -> None:
        client.unit = unit_of(argv)
        client.is_elsewhere = Path(argv[0]).name in _ELSEWHERE
        client.expected = self._costs.expected(client.unit)
        if self._is_inside_another(client.pid):
            # It is part of what that one was admitted for. To wait for a second ticket with the
            # first in hand may be to wait for ever.
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
        self._asked += 1
        self._quiet_until = now if 0 < self._units <= self._asked else now + QUIET_S
        self._admission.ask(client.number, client.expected, now, is_light=client.unit.is_light)

    def _is_inside_another(self, pid: int) -> bool:
        """Whether a launcher that has a ticket is among the parents of this one."""
        holders = {client.pid for client in self._callers.values() if client.started is not None}
        return bool(holders) and any(parent in holders for parent in jobs.parents(pid))

    def _heard_end(self, client: Client, end: End) -> None:
        began, status = client.started or 0.0, os.waitstatus_to_exitcode(end.status)
        is_killed = not self._is_ending and (
            launcher.is_killed(end.status) or (status > 0 and self._has_been_killed(client))
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
        """Whether the kernel has killed for want of memory since this compiler began: g++ exits
        with 1 when its own child is the one.
        """
        return self._kills is not None and self._kills() > client.kills

    def _make_room(self, done: Finished, began: float) -> None:
        """Halve the budget. What had begun before it was halved last fell to the same shortage."""
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
                f" to be killed was {done.unit.source} of {done.unit.target or 'no target'}:"
                f" {done.expected.peak_gib:.1f} GiB expected, at least {done.peak_gib:.1f} held"
            )

    def _finish(
        self, client: Client, status: int | None, seconds: float = 0.0, *, is_killed: bool = False
    ) -> Finished | None:
        """Keep what a unit took; None for one that had not begun, or is part of another."""
        if client.started is None or client.is_nested:
            return None
        done = Finished(
            client.unit,
            client.expected,
            client.started,
            seconds,
            client.peak_gib,
            status,
            is_killed,
        )
        self._finished.append(done)
        if (
            self._history
            and not done.unit.is_light
            and not client.is_elsewhere
            and (status == 0 or is_killed)
        ):
            self._history.add(
                done.unit, seconds=seconds, peak_gib=done.peak_gib, is_killed=is_killed
            )
        if status != 0 and not is_killed and not self._keep_going:
            self._fail()
        return done

    def _fail(self) -> None:
        self._has_failed = True
        for client in [
            client
            for client in self._callers.values()
            if client.has_asked and client.started is None
        ]:
            self._refuse(client, _OTHER_FAILED)

    def _drop(self, client: Client) -> None:
        """Take the ticket back: the compiler has ended, or all that had the connection in their
        hands are gone.
        """
        self._selector.unregister(client.connection)
        del self._callers[client.connection.fileno()]
        client.connection.close()
        self._admission.leave(client.number)

    def _measure(self) -> None:
        running = [client for client in self._callers.values() if client.is_counted]
        if not running:
            return
        living = jobs.living()
        trees = jobs.below(frozenset(client.pid for client in running), living)
        for client in running:
            held_gib = sum(living[number].held_gib for number in trees[client.pid])
            client.peak_gib = max(client.peak_gib, held_gib)
            self._admission.measured(client.number, held_gib)

    def _save(self) -> None:
        """A history that cannot be written costs the next build its best figures, and this one
        nothing.
        """
        with contextlib.suppress(OSError):
            if self._history:
                self._history.save()

    def _end(self) -> None:
        """Refuse who waits, end who runs, and do not go before they have."""
        was_busy = bool(self._callers)
        for client in [client for client in self._callers.values() if client.started is None]:
            self._refuse(client, _HAS_ENDED)
        for number, grace_s in (
            (signal.SIGTERM, TERMINATE_GRACE_S),
            (signal.SIGKILL, KILL_GRACE_S),
        ):
            deadline = time.monotonic() + grace_s
            while self._callers and time.monotonic() < deadline:
                # Below its launcher, and in the launcher's group, which ninja makes for each
                # command: a launcher may have been killed.
                holders = [
                    client for client in self._callers.values() if client.started is not None
                ]
                jobs.signal_process(
                    frozenset(client.pid for client in holders),
                    frozenset(client.group for client in holders),
                    number,
                )
                self._refuse_latecomers(0.1)
        if was_busy:
            self._refuse_latecomers(LATECOMERS_S)

    def _refuse_latecomers(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(left_s):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fd in self._callers:
                    client = self._callers[key.fd]
                    (
                        self._hear(client)
                        if client.started is not None
                        else self._refuse(client, _HAS_ENDED)
                    )
                else:
                    self._selector.unregister(self._woken)

    def _refuse(self, client: Client, why: str) -> None:
        client.info(why)
        self._drop(client)
