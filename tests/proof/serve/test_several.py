"""Several real servers at once, and one that is killed more often than it may come back.

MODEL (tiny) is the model of all servers; each takes about 3 GiB.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from workspace.core.paths import Layout
from workspace.server import lifecycle, observation, process_tree

MODEL = os.environ.get("MODEL", "tiny")
NAMES = ("proof-a", "proof-b", "proof-c")
START_S = 900


@pytest.fixture
def inv(layout: Layout) -> Iterator[Callable[..., "subprocess.CompletedProcess[str]"]]:
    def run(*args: str) -> "subprocess.CompletedProcess[str]":
        argv = [sys.executable, "-Es", str(layout.root / "tasks.py"), *args]
        return subprocess.run(argv, capture_output=True, text=True, timeout=START_S, check=False)

    yield run
    for name in NAMES:
        run("serve.stop", "--name", name)


def until(is_true: Callable[[], object]) -> None:
    deadline = time.monotonic() + START_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def start(inv: Callable[..., "subprocess.CompletedProcess[str]"], name: str, *more: str) -> int:
    port = lifecycle.free_port()
    line = ("serve", MODEL, "--name", name, "--port", str(port), "--memory", "3")
    done = inv(*line, "--detach", *more)
    assert done.returncode == 0, done.stderr
    return port


def front(there: observation.Server) -> int | None:
    known = process_tree.living()
    supervisor = there.processes.supervisor_pid
    return next((pid for pid in known if known[pid].parent == supervisor), None)


def test_three_servers_answer_and_none_is_left_after_stop(layout: Layout, inv) -> None:
    ports = [start(inv, name) for name in NAMES]
    again = inv("serve", MODEL, "--name", NAMES[0], "--port", str(lifecycle.free_port()))
    assert (again.returncode, "runs already" in again.stderr) == (10, True), again.stderr
    again = inv("serve", MODEL, "--name", "proof-d", "--port", str(ports[1]))
    assert (again.returncode, "belongs to" in again.stderr) == (10, True), again.stderr
    rows = json.loads(inv("serve.status", "--json").stdout)["servers"]
    assert {row["server"]: row["state"] for row in rows}.items() >= {
        (name, "ready") for name in NAMES
    }
    found = [observation.find(observation.place_of(layout, name)) for name in NAMES]
    shared = {path for there in found for path in process_tree.shared_by(there.members())}
    os.kill(front(found[0]), signal.SIGKILL)
    for name in NAMES:
        stopped = inv("serve.stop", name)
        assert stopped.returncode == 0, stopped.stderr
    assert [there.members() for there in found] == [set()] * 3
    assert [path for path in shared if os.path.exists(path)] == []
    for there in found:
        observation.require_free(there.address)


def test_server_killed_five_times_comes_back_three_times(layout: Layout, inv) -> None:
    start(inv, NAMES[0], "--restart", "3")
    there = observation.find(observation.place_of(layout, NAMES[0]))
    kills = 0
    while kills < 5:
        until(lambda: not observation.is_alive(there) or observation.is_healthy(there.address))
        if not observation.is_alive(there):
            break
        pid = front(there)
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: process_tree.started_at(pid) is None)
        kills += 1
    assert kills == 4
    row = json.loads(inv("serve.status", "--json").stdout)["servers"]
    row = next(row for row in row if row["server"] == NAMES[0])
    assert (row["state"], len(row["deaths"])) == ("ended", 4)
    assert all("memory ran out" in death["cause"] for death in row["deaths"])
    assert "it was started again 3 times, the limit" in inv("serve.status").stdout
