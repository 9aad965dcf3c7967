"""The link between the nodes of one server, with real processes: an executable stands in for ssh
and runs the rank of the other node here. Whatever ends first, nothing is left on either side.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.server.test_server import STANDIN, is_clean, until
from workspace.core.errors import ServeError
from workspace.server import lifecycle, node_link, observation, process_tree
from workspace.server.lifecycle import Launch
from workspace.server.observation import Address, Server

# Patient enough for a busy machine, and short enough for a test.
PATIENCE = "from workspace.server import node_link as link; link.SILENCE_S = 4; link.BEAT_S = 0.2;"
HEAD = f"import sys; {PATIENCE} sys.exit(link.main(sys.argv[1], link.orders(sys.argv[2:])))"
# As the verb of a rank: it says what it does, and ends its process at the end of its lease.
RANK = f"""
import os, subprocess, sys, time
{PATIENCE}
lease = link.Lease(lambda: print("marked as ready", flush=True))
print("loading", flush=True)
open(sys.argv[1], "w").write(str(os.getpid()))
lease.report_start()
time.sleep(60)
"""


def python(code: str, *args: str) -> list[str]:
    root = str(STANDIN.parents[2])
    return [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {root!r})\n{code}", *args]


class Pair:
    """A server of which this machine is the head, and whose other rank runs below a false ssh."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.place = folder, folder / "server"
        self.ssh = folder / "ssh"
        # What runs on another node has none of the signals that ssh ignores here.
        self.ssh.write_text('#!/bin/sh\nshift\nexec env --default-signal=TERM,INT,HUP "$@"\n')
        self.ssh.chmod(0o755)

    def start(self, manner: str = "", rank: list[str] | None = None) -> Server:
        port = lifecycle.free_port()
        far = [str(self.ssh), "b", *(rank or python(RANK, str(self.folder / "rank")))]
        own = [sys.executable, "-S", str(STANDIN), str(port), manner]
        argv = python(HEAD, str(self.place), "b", str(len(far)), *far, "a", "0", *own)
        launch = Launch("pair", tuple(argv), {"PATH": "/usr/bin:/bin"}, Address("127.0.0.1", port))
        return lifecycle.start(self.place, launch)

    @property
    def rank(self) -> int:
        """The pid of the other rank."""
        path = self.folder / "rank"
        until(lambda: path.exists() and path.read_text())
        return int(path.read_text())

    def child(self, server: Server) -> int:
        """The pid of the program that ties the nodes together."""
        pids = process_tree.living()
        (found,) = (
            pid for pid, each in pids.items() if each.parent == server.processes.supervisor_pid
        )
        return found


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    there = observation.find(made.place)
    if there:
        lifecycle.stop(there, at_once=True)


def has_ended(pid: int) -> Callable[[], bool]:
    return lambda: process_tree.started_at(pid) is None


def test_both_ranks_are_in_one_log_and_one_stop_ends_both(pair: Pair) -> None:
    server = pair.start()
    server, ready = lifecycle.wait_until_ready(server, timeout_s=30)
    assert ready.models == ("standin",)
    until(lambda: "[node b] marked as ready\n" in server.log.read_text())
    text = server.log.read_text()
    assert text.index("[node b] loading\n") < text.index("[node a] engine started\n")
    # Neither beats nor marks are lines of the log.
    assert all(line.strip() and "\x06" not in line for line in text.splitlines())
    lifecycle.stop(server)
    assert process_tree.started_at(pair.rank) is None
    is_clean(server)


def test_rank_that_fails_ends_its_head_and_is_the_error_that_is_shown(pair: Pair) -> None:
    fails = "print('(Worker_TP1 pid=9) ERROR 11-23 20:01:02 [w.py:1] ValueError: no head')"
    started = f"import sys; {PATIENCE} link.Lease(print).report_start()"
    rank = python(f"{started}; {fails}; sys.exit(10)")
    server = pair.start("slow", rank)
    with pytest.raises(ServeError) as caught:
        lifecycle.wait_until_ready(server, timeout_s=30)
    assert "node b: ValueError: no head" in caught.value.message
    assert any("node b ended its rank, with exit status 10" in t for t in caught.value.details)
    lifecycle.stop(server)
    is_clean(server)


def test_node_that_ssh_does_not_reach_is_named_before_rank_0_is_started(pair: Pair) -> None:
    pair.ssh.write_text("#!/bin/sh\necho 'ssh: connect to host b: No route to host'\nexit 255\n")
    server = pair.start()
    with pytest.raises(ServeError, match="the connection to node b ended"):
        lifecycle.wait_until_ready(server, timeout_s=30)
    assert "node a" not in server.log.read_text()
    lifecycle.stop(server)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_dead_or_silent_node_ends_its_head(pair: Pair, number: signal.Signals) -> None:
    server, _ = lifecycle.wait_until_ready(pair.start(), timeout_s=30)
    os.kill(pair.rank, number)
    until(lambda: not server.members())
    reason = "no sign of life from node b" if number is signal.SIGSTOP else "node b ended its rank"
    assert reason in lifecycle.failure(server).message
    lifecycle.stop(server)
    is_clean(server)
    assert process_tree.started_at(pair.rank) is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_rank_ends_when_its_head_is_dead_or_silent(pair: Pair, number: signal.Signals) -> None:
    server, _ = lifecycle.wait_until_ready(pair.start(), timeout_s=30)
    os.kill(pair.child(server), number)
    until(has_ended(pair.rank))
    lifecycle.stop(server, at_once=number is signal.SIGSTOP)
    is_clean(server)


def test_rank_ends_although_nobody_reads_its_output(tmp_path: Path) -> None:
    """A cut cable: the pipe to ssh is full, and no end of the input ever comes."""
    impatience = PATIENCE.replace("SILENCE_S = 4", "SILENCE_S = 1")
    code = f"import sys\n{impatience}\nlink.Lease(print)\nwhile True: print('x' * 4000)"
    began = time.monotonic()
    with subprocess.Popen(
        python(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.wait(20) == -signal.SIGTERM
    assert time.monotonic() - began > 0.9


def test_command_line_of_the_link_is_read_as_it_was_written() -> None:
    line = ["b", "2", "ssh", "b", "c", "1", "ssh", "a", "0", "vllm", "serve"]
    assert node_link.orders(line) == [
        ("b", ["ssh", "b"]),
        ("c", ["ssh"]),
        ("a", ["vllm", "serve"]),
    ]
