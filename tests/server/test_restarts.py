"""A server that comes back: deaths with their cause, pauses that double, memory that has to come
back first, and an end of it all.
"""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.server.test_server import is_clean, launch, until
from workspace.core.errors import ServeError
from workspace.machine import hardware
from workspace.server import lifecycle, observation, process_tree
from workspace.server.process_tree import Restarts

SOON = Restarts(most=2, first_pause_s=0.05)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "server"
    yield folder
    if there := observation.find(folder):
        lifecycle.stop(there, at_once=True)


def ready(place: Path, restarts: Restarts) -> observation.Server:
    order = replace(launch(), restarts=restarts)
    return lifecycle.wait_until_ready(lifecycle.start(place, order), timeout_s=20)[0]


def front(there: observation.Server) -> int | None:
    known = process_tree.living()
    supervisor = there.processes.supervisor_pid
    return next((pid for pid in known if known[pid].parent == supervisor), None)


def kill_front(there: observation.Server) -> None:
    """Kill the front of a server that answers, as a stranger may."""
    until(lambda: observation.is_healthy(there.address))
    pid = front(there)
    assert pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: process_tree.started_at(pid) is None)


def test_server_comes_back_as_often_as_allowed_and_then_gives_up(place: Path) -> None:
    there = ready(place, SOON)
    for number in (1, 2):
        kill_front(there)
        until(lambda number=number: len(observation.deaths(there).deaths) == number)
        assert observation.is_alive(there)
    kill_front(there)
    until(lambda: not observation.is_alive(there))
    deaths = observation.deaths(there).deaths
    assert [death.status for death in deaths] == [-signal.SIGKILL] * 3
    for death in deaths:
        cause, step = lifecycle.cause_of(there, death)
        # Nothing shows that the kernel did it.
        assert cause == "was killed (SIGKILL)"
        assert step.startswith("journalctl ")
        cause, step = lifecycle.cause_of(there, replace(death, kills=1))
        assert cause == "was killed (SIGKILL): memory ran out"
        assert step == "./scripts/inv drop-caches"
    with pytest.raises(ServeError, match=r"\(SIGKILL\); it was started again 2 times"):
        raise lifecycle.failure(there)
    log = there.log.read_text()
    assert log.count("engine started") == 3
    assert "it is started again in 0.05 s (1 of 2)" in log
    assert "it is started again in 0.1 s (2 of 2)" in log
    assert log.endswith("it died 3 times and is not started again (--restart)\n")
    lifecycle.stop(there)
    is_clean(there)


def test_server_that_never_became_ready_is_not_started_again(place: Path) -> None:
    there = lifecycle.start(place, replace(launch("crash"), restarts=SOON))
    with pytest.raises(ServeError, match="exited with 1"):
        lifecycle.wait_until_ready(there, timeout_s=20)
    assert observation.deaths(there).deaths == ()
    assert there.log.read_text().count("EngineCore failed to start") == 1
    lifecycle.stop(there)


def test_restart_waits_for_memory_and_a_stop_meanwhile_leaves_nothing(place: Path) -> None:
    there = ready(place, replace(SOON, needs_gib=2 * hardware.whole_memory_gib()))
    kill_front(there)
    until(lambda: "of memory are available, and it takes" in observation.deaths(there).waits)
    assert there.members() == {there.processes.supervisor_pid}
    assert observation.is_loading(there)
    lifecycle.stop(there)
    is_clean(there)


def test_restart_waits_while_tasks_wait_for_memory(place: Path) -> None:
    there = ready(place, replace(SOON, pressure_percent=0.0))
    kill_front(there)
    until(lambda: "tasks wait for it" in observation.deaths(there).waits)
    lifecycle.stop(there)
    is_clean(there)


def test_pauses_double_up_to_the_longest() -> None:
    pauses = [Restarts(9).pause_s(deaths) for deaths in range(1, 9)]
    assert pauses == [5, 10, 20, 40, 80, 160, 300, 300]
    assert Restarts.parse(SOON.argument) == SOON


def test_first_request_that_hangs_ends_the_start_with_stacks(place: Path) -> None:
    order = launch("hung")
    order = replace(order, environment={**order.environment, "PYTHONFAULTHANDLER": "1"})
    there = lifecycle.start(place, replace(order, restarts=SOON))
    began = time.monotonic()
    with pytest.raises(ServeError, match="timed out; its stacks are in the log"):
        lifecycle.wait_until_ready(there, timeout_s=2)
    assert time.monotonic() - began < 20
    assert "in sleep_for_ever" in there.log.read_text()
    until(lambda: not there.members())
    lifecycle.stop(there)
    is_clean(there)
