"""Several real servers at once, one that is killed more often than it may come back, one that the
kernel kills, and one that waits for the memory of another process.

MODEL (tiny) is the model of all servers; each takes about 3 GiB. The kernel's kill needs root and a
control group for memory.
"""

import contextlib
import http.client
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from workspace.core.paths import Layout
from workspace.machine import hardware
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


def start(
    inv: Callable[..., "subprocess.CompletedProcess[str]"], name: str, *more: str, memory: int = 3
) -> int:
    port = lifecycle.free_port()
    line = ("serve", MODEL, "--name", name, "--port", str(port), "--memory", str(memory))
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
    # Somebody's SIGKILL: the kernel counts no kill.
    assert {death["cause"] for death in row["deaths"]} == {"was killed (SIGKILL)"}
    assert "it was started again 3 times, the limit" in inv("serve.status").stdout


def test_restart_waits_until_another_process_gives_its_memory_back(layout: Layout, inv) -> None:
    """The planned share leaves 5 GiB of what is available, and another process takes 6 of them."""
    planned = math.floor(psutil.virtual_memory().available / hardware.GIB - 5)
    start(inv, NAMES[0], "--restart", "1", memory=planned)
    there = observation.find(observation.place_of(layout, NAMES[0]))
    hog = "import sys; held = bytearray(b'x') * (6 << 30); print(flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", hog]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(argv, **pipes) as other:
        assert other.stdout.readline()
        os.kill(front(there), signal.SIGKILL)
        until(lambda: "of memory are available, and it takes" in observation.deaths(there).waits)
        row = json.loads(inv("serve.status", "--json").stdout)["servers"][0]
        assert row["state"] == "waiting"
        print(row["waits"])
        # It does not start while the memory is held, however often it looks.
        time.sleep(20)
        assert there.members() == {there.processes.supervisor_pid}
        other.stdin.close()
    until(lambda: observation.is_healthy(there.address))
    row = json.loads(inv("serve.status", "--json").stdout)["servers"][0]
    assert (row["state"], len(row["deaths"]), row["waits"]) == ("ready", 1, "")


def test_kill_by_the_kernel_is_reported_as_a_lack_of_memory(layout: Layout, inv) -> None:
    """A control group with little memory, into which the front of a server that runs is moved."""
    start(inv, NAMES[0], "--restart", "1")
    there = observation.find(observation.place_of(layout, NAMES[0]))
    pid = front(there)
    groups = Path("/sys/fs/cgroup")
    old = (groups / "memory").is_dir()
    group = groups / ("memory" if old else "") / "proof-several"
    group.mkdir()
    limit = "memory.limit_in_bytes" if old else "memory.max"
    try:
        (group / limit).write_text(str(1 << 20))
        (group / "cgroup.procs").write_text(str(pid))
        body = json.dumps({"model": "x", "prompt": "x" * (64 << 20)}).encode()
        while process_tree.started_at(pid) is not None:
            with (
                contextlib.closing(
                    http.client.HTTPConnection(there.address.host, there.address.port)
                ) as connection,
                contextlib.suppress(OSError, http.client.HTTPException),
            ):
                connection.request("POST", "/v1/completions", body)
                connection.getresponse().read()
    finally:
        until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()
    until(lambda: observation.deaths(there).deaths)
    death = json.loads(inv("serve.status", "--json").stdout)["servers"][0]["deaths"][0]
    assert death["cause"] == "was killed (SIGKILL): memory ran out"
    assert death["hint"] == "./scripts/inv drop-caches"
