"""Job tokens with real launchers, compilers and ninja: the bounds hold, costs are recorded, and no
process waits forever.
"""

import shlex
import socket
import sys
from pathlib import Path

import pytest

from tests.compile.launching import Site, start_job_server, until
from workspace.compile import job_server, ninja
from workspace.compile.costs import Costs, Entry, History, Unit
from workspace.compile.scheduler import Admission, Bounds, MemoryStatus
from workspace.core.errors import BuildError
from workspace.machine import hardware


def test_time_and_memory_of_a_unit_include_its_children_and_are_recorded(
    site: Site, tmp_path: Path
) -> None:
    hungry = f"{shlex.quote(sys.executable)} -c 'held = bytearray(300 << 20); print(len(held))'"
    site.compiler(f"sh -c {shlex.quote(hungry)}")
    history = History(tmp_path / "history.json", setup="s")
    with start_job_server(site, history=history) as server:
        site.launch("a").communicate(timeout=10)
    (done,) = server.finished
    assert (done.unit, done.status, done.is_killed) == (Unit("t", "a.cu"), 0, False)
    assert 0.29 < done.peak_gib < 0.6
    assert done.seconds > 0
    (entry,) = History(tmp_path / "history.json", setup="s").entries
    assert (entry.target, entry.source, entry.peak_gib) == (
        "t",
        "a.cu",
        pytest.approx(done.peak_gib, abs=0.001),
    )


def test_memory_of_parallel_processes_of_a_unit_is_added_up(
    site: Site,
) -> None:
    hungry = (
        f"{shlex.quote(sys.executable)} -c 'import time; held = bytearray(150 << 20);"
        " time.sleep(100)' &"
    )
    site.compiler(f"{hungry}\nfirst=$!\n{hungry}\nsecond=$!\ngate\nkill $first $second\ntrue")
    with start_job_server(site) as server:
        child = site.launch("a")
        until(lambda: server.state.held_gib > 0.29)
        site.open_gate()
        child.communicate(timeout=10)
    assert 0.29 < server.finished[0].peak_gib < 0.5


def test_failed_unit_is_not_recorded_in_the_history(site: Site, tmp_path: Path) -> None:
    site.compiler("false")
    history = History(tmp_path / "history.json", setup="s")
    with start_job_server(site, history=history) as server:
        site.launch("a").communicate(timeout=10)
    assert [done.status for done in server.finished] == [1]
    assert history.entries == ()


def test_unit_larger_than_the_budget_is_compiled_alone(site: Site) -> None:
    site.compiler("sleep 0.05")
    costs = Costs(
        [
            Entry("t", "big.cu", 1.0, 50.0),
            *[Entry("t", f"u{number}.cu", 0.1, 1.0) for number in range(8)],
        ]
    )
    with job_server.JobServer(
        site.server_folder, Admission(Bounds(8, 4.5)), costs, units=9
    ) as server:
        child = site.ninja(["big", *[f"u{number}" for number in range(8)]])
        child.communicate(timeout=20)
    assert (child.returncode, len(server.finished)) == (0, 9)
    names = [line.split()[1] for line in site.log]
    at = names.index("CMakeFiles/t.dir/big.cu.o")
    assert names[at] == names[at + 1]
    assert site.most() <= 4


def test_compiler_started_by_a_compiler_with_a_token_needs_no_token(site: Site) -> None:
    inner = shlex.join(
        [str(site.server_folder / job_server.LAUNCHER), "echo", "inner", "-o", "inner.o"]
    )
    site.compiler(f"env -i sh -c {shlex.quote(inner)}")
    with start_job_server(site, jobs=1) as server:
        output, _ = site.launch("a").communicate(timeout=10)
    assert output == "inner -o inner.o\n"
    assert [done.unit.source for done in server.finished] == ["a.cu"]


def test_invalid_messages_at_the_socket_do_no_harm(site: Site) -> None:
    with start_job_server(site, jobs=1) as server:
        for message in (
            b"",
            b"hello\n",
            b"\xff\xff\n",
            b"99\nshort",
            b"x" * 70_000,
        ):
            stranger = socket.socket(socket.AF_UNIX)
            stranger.connect(str(site.server_folder / "socket"))
            stranger.sendall(message)
            stranger.close()
        assert site.launch("a").communicate(timeout=10)[0] == "compiled\n"
    assert server.finished[-1].status == 0


def test_failure_of_the_job_server_is_reported_and_ends_waiting_launchers(site: Site) -> None:
    def broken() -> MemoryStatus:
        raise RuntimeError("no such machine")

    with (
        pytest.raises(BuildError, match="no such machine"),
        start_job_server(site, memory=job_server.MemoryWatch(broken, hardware.kills)),
    ):
        child = site.launch("a")
        child.communicate(timeout=10)
        assert child.returncode == 1


def test_memory_status_of_this_machine_is_plausible() -> None:
    status = ninja.memory_status(0.0)
    assert 0 < status.available_gib < 100_000
    assert ninja.memory_status(2.0).available_gib == pytest.approx(
        status.available_gib - 2.0, abs=1.0
    )
    assert 0 <= status.pressure_percent <= 100
    assert hardware.kills() >= 0


def test_processes_below_a_root_are_its_descendants_only() -> None:
    known = {
        pid: job_server.Process(parent, 0, 1.0)
        for pid, parent in {1: 0, 10: 1, 11: 10, 12: 11, 20: 1, 21: 20, 30: 31, 31: 30}.items()
    }
    assert job_server.below(frozenset({10, 11, 20, 99}), known) == {
        10: {11, 12},
        11: {12},
        20: {21},
        99: set(),
    }
