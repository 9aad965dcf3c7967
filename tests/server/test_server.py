"""The life cycle of a server with real processes: a running server is found, a stopped one leaves
nothing, whichever of its processes is killed and whenever.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from workspace.core.errors import ServeError
from workspace.server import command, lifecycle, observation, process_tree
from workspace.server.lifecycle import Launch
from workspace.server.observation import Address

STANDIN = Path(__file__).with_name("standin.py")
ROOT = STANDIN.parents[2]


def launch(manner: str = "", *, port: int | None = None) -> Launch:
    port = port or lifecycle.free_port()
    argv = (sys.executable, "-S", str(STANDIN), str(port), manner)
    return Launch("standin", argv, {"PATH": "/usr/bin:/bin"}, Address("127.0.0.1", port))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "server"
    yield folder
    there = observation.find(folder)
    if there:
        lifecycle.stop(there, at_once=True)


def until(is_true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def shared(port: int) -> set[str]:
    """Return the shared memory of the server at this port, a file and a semaphore; other servers
    run at the same time.
    """
    return {
        name
        for name in os.listdir("/dev/shm")
        if name.removeprefix("sem.").startswith(f"standin-{port}-")
    }


def is_clean(there: observation.Server) -> None:
    assert there.members() == set()
    assert shared(there.address.port) == set()
    assert not Path(there.processes.folder).exists()
    assert observation.find(there.place) is None
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((there.address.host, there.address.port))


@pytest.mark.parametrize("manner", ["", "apart", "deaf"])
def test_server_is_ready_when_it_completes_and_leaves_nothing_when_stopped(
    place: Path, manner: str
) -> None:
    there = lifecycle.start(place, launch(manner))
    there, ready = lifecycle.wait_until_ready(there, timeout_s=20)
    assert ready.models == ("standin",)
    line = command.try_it(there.address.url, *ready.models, has_key=True)
    asked = subprocess.run(
        ["/bin/sh", "-c", line], capture_output=True, text=True, timeout=20, check=False
    )
    assert json.loads(asked.stdout)["choices"] == [{"text": "!"}], asked.stderr
    assert len(there.members()) == 4
    assert len(shared(there.address.port)) == 2
    found = observation.find(place)
    assert found == there
    stopped = lifecycle.stop(found, at_once=manner == "deaf")
    assert stopped.was_killed == (manner == "deaf")
    is_clean(there)


def test_stop_in_the_start_up_where_the_front_loses_the_signal(place: Path) -> None:
    there = lifecycle.start(place, launch("slow"))
    until(lambda: len(shared(there.address.port)) == 2)
    lines = observation.follow(there.log)
    assert next(lines) in ("engine started", None)
    os.kill(there.processes.supervisor_pid, signal.SIGTERM)
    os.kill(there.processes.supervisor_pid, signal.SIGTERM)
    lifecycle.stop(there, at_once=True)
    is_clean(there)


def test_stop_removes_shared_memory_that_no_process_maps_any_more(place: Path) -> None:
    # The supervisor has ended the engine and is killed before it removes the engine's memory.
    there = lifecycle.start(place, launch("slow"))
    until(lambda: len(shared(there.address.port)) == 2)
    record = Path(f"{observation.ending(place, there.processes.tag)}.shared")
    until(record.exists)
    for pid in there.members():
        os.kill(pid, signal.SIGKILL)
    until(lambda: not observation.is_alive(there) and not there.members())
    assert len(shared(there.address.port)) == 2
    lifecycle.stop(there)
    assert not record.exists()
    is_clean(there)


@pytest.mark.parametrize("victim", ["front", "supervisor", "all"])
@pytest.mark.parametrize("manner", ["", "apart"])
def test_stop_leaves_nothing_whichever_process_was_killed(
    place: Path, victim: str, manner: str
) -> None:
    there = lifecycle.start(place, launch(manner))
    there, _ = lifecycle.wait_until_ready(there, timeout_s=20)
    members = there.members()
    assert len(members) == 4
    known = process_tree.living()
    supervisor = there.processes.supervisor_pid
    front = next(pid for pid in members if known[pid].parent == supervisor)
    victims = {"front": [front], "supervisor": [supervisor], "all": sorted(members)}
    for pid in victims[victim]:
        os.kill(pid, signal.SIGKILL)
    if victim == "front":
        # The supervisor ends the other processes by itself.
        until(lambda: not there.members())
        assert observation.how_ended(there) == observation.Ended(
            -signal.SIGKILL, was_requested=False
        )
        assert shared(there.address.port) == set()
    if victim == "supervisor":
        until(lambda: not observation.is_alive(there))
        assert len(there.members()) == 3
    lifecycle.stop(observation.find(place))
    assert not any(pid in process_tree.living() for pid in members)
    is_clean(there)


def test_stop_removes_memory_shared_in_the_start_up_though_all_were_killed(place: Path) -> None:
    there = lifecycle.start(place, launch("slow"))
    with ThreadPoolExecutor(1) as waiting:
        waiter = waiting.submit(lifecycle.wait_until_ready, there, timeout_s=60)
        until(lambda: len(shared(there.address.port)) == 2)
        seen = time.monotonic()
        record = observation.ending(place, there.processes.tag)
        until(lambda: process_tree.recorded_shared(str(record)))
        # A look every LOOK_S alone would come later.
        assert time.monotonic() - seen < 0.75 * lifecycle.LOOK_S
        for pid in there.members():
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(ServeError):
            waiter.result()
    lifecycle.stop(there)
    is_clean(there)


def test_supervisor_removes_memory_that_it_never_saw_mapped(place: Path) -> None:
    """As below the link between nodes, which outlives the server by seconds."""
    there = lifecycle.start(place, launch())
    supervisor = there.processes.supervisor_pid
    until(lambda: len(there.members()) > 1)
    os.kill(supervisor, signal.SIGSTOP)
    there, _ = lifecycle.wait_until_ready(there, timeout_s=20)
    assert len(shared(there.address.port)) == 2
    for pid in there.members() - {supervisor}:
        os.kill(pid, signal.SIGKILL)
    os.kill(supervisor, signal.SIGCONT)
    until(lambda: not there.members())
    assert shared(there.address.port) == set()


def test_semaphore_of_multiprocessing_is_found_by_its_inode_and_removed_after_its_process() -> None:
    code = (
        "import multiprocessing, time\nlock = multiprocessing.get_context('spawn').Lock()\n"
        "print(lock._semlock.name, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as maker:
        path = f"/dev/shm/sem.{maker.stdout.readline().strip().removeprefix('/')}"
        # The resource tracker, which would remove the semaphore, is a child.
        tree = {maker.pid, *process_tree.below({maker.pid}, process_tree.living())}
        assert process_tree.shared_by(tree) == {path}
        process_tree.remove_shared([path])
        assert Path(path).exists()
        for pid in sorted(tree, reverse=True):
            os.kill(pid, signal.SIGKILL)
    process_tree.remove_shared([path])
    assert not os.path.exists(path)


@pytest.mark.parametrize("is_detached", [False, True])
def test_server_ends_with_its_starter_unless_it_is_detached(place: Path, is_detached: bool) -> None:
    port = lifecycle.free_port()
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1])\nfrom"
        " workspace.server import lifecycle; from workspace.server.observation import"
        " Address\nlaunch = lifecycle.Launch('standin', tuple(sys.argv[5:]), {},"
        " Address('127.0.0.1', int(sys.argv[3])))\nthere = lifecycle.start(Path(sys.argv[2]),"
        " launch, is_detached=sys.argv[4] == 'True')\nlifecycle.wait_until_ready(there,"
        " timeout_s=20); print('ready', flush=True); time.sleep(60)"
    )
    argv = [str(ROOT), str(place), str(port), str(is_detached), *launch(port=port).argv]
    with subprocess.Popen(
        [sys.executable, "-c", code, *argv], stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout.readline() == "ready\n"
        there = observation.find(place)
        assert there.is_ready
        starter.kill()
    if is_detached:
        assert len(there.members()) == 4
        assert observation.is_alive(there)
    else:
        until(lambda: not there.members())
        assert shared(there.address.port) == set()
    lifecycle.stop(there)
    is_clean(there)


def test_second_server_is_refused_while_processes_of_the_first_run(place: Path) -> None:
    there, _ = lifecycle.wait_until_ready(lifecycle.start(place, launch()), timeout_s=20)
    with pytest.raises(ServeError, match="runs already"):
        lifecycle.start(place, launch())
    os.kill(there.processes.supervisor_pid, signal.SIGKILL)
    until(lambda: not observation.is_alive(there))
    # The lock is free then, but processes are left.
    with pytest.raises(ServeError, match="runs already"):
        lifecycle.start(place, launch())
    lifecycle.stop(there)


def test_taken_port_is_an_error_and_no_server_is_started(place: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        with pytest.raises(ServeError, match="cannot be used: Address already in use"):
            lifecycle.start(place, launch(port=taken.getsockname()[1]))
    assert observation.find(place) is None


def test_crash_in_the_start_up_is_reported_with_its_cause(place: Path) -> None:
    there = lifecycle.start(place, launch("crash"))
    with pytest.raises(
        ServeError, match=r"exited with 1: the GPU had too little memory: torch\.OutOfMemoryError: "
    ) as caught:
        lifecycle.wait_until_ready(there, timeout_s=20)
    assert caught.value.details[-1] == f"log: {there.log}"
    lifecycle.stop(there)


@pytest.mark.parametrize(
    ("manner", "message", "hint"),
    [
        (
            "killed",
            "exited with 1: the engine was killed (SIGKILL)",
            (
                "journalctl --since=-1h --grep='oom|killed'    shows whether the kernel or earlyoom"
                " did it, because memory ran out"
            ),
        ),
        (
            "old ptxas",
            "ptxas fatal : Value 'sm_121a' is not defined for option 'gpu-name'",
            "./scripts/inv fix-triton",
        ),
        (
            "remote code",
            "contains custom code which must be executed to load it.",
            "./scripts/inv serve x -- --port 1 --trust-remote-code",
        ),
    ],
)
def test_known_symptom_ends_in_its_cause_and_the_command_that_fixes_it(
    place: Path, manner: str, message: str, hint: str
) -> None:
    order = replace(launch(manner), facts={"typed": "./scripts/inv serve x -- --port 1"})
    there = lifecycle.start(place, order)
    with pytest.raises(ServeError) as caught:
        lifecycle.wait_until_ready(there, timeout_s=20)
    assert caught.value.message.endswith(message)
    assert caught.value.hint == hint
    lifecycle.stop(there)


def test_symptom_whose_hint_needs_the_command_shows_the_log_where_it_is_not_known(
    place: Path,
) -> None:
    there = lifecycle.start(place, launch("remote code"))
    with pytest.raises(ServeError) as caught:
        lifecycle.wait_until_ready(there, timeout_s=20)
    assert caught.value.hint == f"less {there.log}"
    lifecycle.stop(there)


def test_healthy_server_that_cannot_complete_is_not_ready(place: Path) -> None:
    there = lifecycle.start(place, launch("numb"))
    with pytest.raises(
        ServeError, match="answers but does not work: .*500: EngineCore encountered an issue"
    ):
        lifecycle.wait_until_ready(there, timeout_s=20)
    lifecycle.stop(there)


def test_process_that_got_a_reused_pid_is_not_ended(place: Path) -> None:
    there = lifecycle.start(place, launch("slow"))
    lifecycle.stop(there)
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as other:
        # State files of a server whose pid now belongs to another program, which leads a session.
        for started, boot in (
            (process_tree.started_at(other.pid) - 1, there.boot),
            (process_tree.started_at(other.pid), "another boot"),
        ):
            processes = process_tree.ProcessTree(
                other.pid, started, there.processes.tag, there.processes.folder, there.processes.log
            )
            observation.write(
                observation.Server(
                    place, "standin", there.address, processes, boot, there.since, 0.0
                )
            )
            found = observation.find(place)
            assert not observation.is_alive(found)
            lifecycle.stop(found)
            assert other.poll() is None
        other.kill()


def test_state_file_of_an_older_workspace_is_read(place: Path) -> None:
    there = lifecycle.start(place, launch("slow"))
    path = observation.state(place)
    record = json.loads(path.read_text())
    tree = record["family"]
    record["family"] = {"keeper": tree.pop("supervisor_pid"), "mark": tree.pop("tag")} | tree
    path.write_text(json.dumps(record))
    assert observation.find(place) == there


def test_damaged_state_is_an_error(place: Path) -> None:
    place.mkdir()
    (place / "server.json").write_text('{"name": 3}')
    with pytest.raises(ServeError, match="is damaged"):
        observation.find(place)
    (place / "server.json").unlink()


def test_context_ends_the_server_when_the_block_fails(place: Path) -> None:
    with (
        contextlib.suppress(ZeroDivisionError),
        lifecycle.running(place, launch(), timeout_s=20) as (there, ready),
    ):
        assert ready.models
        raise ZeroDivisionError
    is_clean(there)
