"""Tickets with real launchers, compilers and ninja: bounds kept, figures kept, nothing stuck."""

import shlex
import socket
import sys
from pathlib import Path

import pytest

from tests.compile.launching import Site, job_server_, until
from workspace.compile import job_server, jobs
from workspace.compile.costs import Costs, Entry, History, Unit
from workspace.compile.scheduler import Admission, Bounds, Live
from workspace.core.errors import BuildError


def test_what_a_unit_took_is_measured_with_all_that_it_started_and_kept(
    site: Site, tmp_path: Path
) -> None:
    hungry = f"{shlex.quote(sys.executable)} -c 'held = bytearray(300 << 20); print(len(held))'"
    site.compiler(f"sh -c {shlex.quote(hungry)}")
    history = History(tmp_path / "history.json", setup="s")
    with job_server_(site, history=history) as tickets_:
        site.launch("a").communicate(timeout=10)
    (done,) = tickets_.finished
    assert (done.unit, done.status, done.is_killed) == (Unit("t", "a.cu"), 0, False)
    assert 0.29 < done.peak_gib < 0.6
    assert done.seconds > 0
    (entry,) = History(tmp_path / "history.json", setup="s").entries
    assert (entry.target, entry.source, entry.peak_gib) == (
        "t",
        "a.cu",
        pytest.approx(done.peak_gib, abs=0.001),
    )


def test_processes_side_by_side_are_added_up_which_the_largest_alone_would_not_show(
    site: Site,
) -> None:
    hungry = (
        f"{shlex.quote(sys.executable)} -c 'import time; held = bytearray(150 << 20);"
        " time.sleep(100)' &"
    )
    site.compiler(f"{hungry}\nfirst=$!\n{hungry}\nsecond=$!\ngate\nkill $first $second\ntrue")
    with job_server_(site) as tickets_:
        child = site.launch("a")
        until(lambda: tickets_.state.held_gib > 0.29)
        site.open_gate()
        child.communicate(timeout=10)
    assert 0.29 < tickets_.finished[0].peak_gib < 0.5


def test_a_failed_unit_teaches_nothing(site: Site, tmp_path: Path) -> None:
    site.compiler("false")
    history = History(tmp_path / "history.json", setup="s")
    with job_server_(site, history=history) as tickets_:
        site.launch("a").communicate(timeout=10)
    assert [done.status for done in tickets_.finished] == [1]
    assert history.entries == ()


def test_the_bound_holds_with_ninja_letting_all_units_go_at_once(site: Site) -> None:
    names = [f"u{number}" for number in range(30)]
    site.compiler("sleep 0.05")
    with job_server_(site, jobs=3, units=30) as tickets_:
        child = site.ninja(names)
        output, _ = child.communicate(timeout=30)
    assert child.returncode == 0, output
    assert len(tickets_.finished) == 30
    assert site.most() == 3


def test_one_that_is_larger_than_the_budget_is_built_alone(site: Site) -> None:
    site.compiler("sleep 0.05")
    costs = Costs(
        [
            Entry("t", "big.cu", 1.0, 50.0),
            *[Entry("t", f"u{number}.cu", 0.1, 1.0) for number in range(8)],
        ]
    )
    with job_server.JobServer(site.tickets, Admission(Bounds(8, 4.5)), costs, units=9) as tickets_:
        child = site.ninja(["big", *[f"u{number}" for number in range(8)]])
        child.communicate(timeout=20)
    assert (child.returncode, len(tickets_.finished)) == (0, 9)
    names = [line.split()[1] for line in site.log]
    at = names.index("CMakeFiles/t.dir/big.cu.o")
    assert names[at] == names[at + 1]
    assert site.most() <= 4


def test_after_a_failure_ninja_is_not_kept_until_all_that_waits_was_compiled(site: Site) -> None:
    site.compiler('case "$5" in *bad*) echo "error: bad"; exit 5;; esac')
    costs = Costs(
        [
            Entry("t", "bad.cu", 9.0, 9.0),
            *[Entry("t", f"u{number}.cu", 0.1, 1.0) for number in range(19)],
        ]
    )
    with job_server.JobServer(
        site.tickets, Admission(Bounds(1, 100.0)), costs, units=20
    ) as tickets_:
        child = site.ninja(["bad", *[f"u{number}" for number in range(19)]])
        output, _ = child.communicate(timeout=20)
    assert child.returncode != 0
    # On a busy machine one or two may have asked, and run, before the bad one did.
    assert len(tickets_.finished) < 10
    assert tickets_.finished[-1].status == 5
    assert "error: bad" in output
    assert "not compiled: another unit failed" in output


def test_told_to_keep_going_all_that_can_be_compiled_is(site: Site) -> None:
    site.compiler('case "$5" in *bad*) exit 5;; esac')
    with job_server_(site, jobs=1, units=6, keep_going=True) as tickets_:
        child = site.ninja(["bad", *[f"u{number}" for number in range(5)]], "-k0")
        child.communicate(timeout=20)
    assert sorted(done.status or 0 for done in tickets_.finished) == [0, 0, 0, 0, 0, 5]


def test_a_compiler_inside_another_ones_ticket_waits_for_none(site: Site) -> None:
    inner = shlex.join([str(site.tickets / "ticket"), "echo", "inner", "-o", "inner.o"])
    site.compiler(f"env -i sh -c {shlex.quote(inner)}")
    with job_server_(site, jobs=1) as tickets_:
        output, _ = site.launch("a").communicate(timeout=10)
    assert output == "inner -o inner.o\n"
    assert [done.unit.source for done in tickets_.finished] == ["a.cu"]


def test_strangers_at_the_socket_do_no_harm(site: Site) -> None:
    with job_server_(site, jobs=1, keep_going=True) as tickets_:
        for words in (
            b"",
            b"hello\n",
            b"-5\n",
            b"\xff\xff\n",
            b"99\nshort",
            b"3\n\0\0\0",
            b"2\n-c",
            b"x" * 70_000,
        ):
            stranger = socket.socket(socket.AF_UNIX)
            stranger.connect(str(site.tickets / "socket"))
            stranger.sendall(words)
            stranger.close()
        assert site.launch("a").communicate(timeout=10)[0] == "compiled\n"
    assert tickets_.finished[-1].status == 0


def test_a_fault_of_the_broker_is_told_and_keeps_no_launcher_waiting(site: Site) -> None:
    def broken() -> Live:
        raise RuntimeError("no such machine")

    with pytest.raises(BuildError, match="no such machine"), job_server_(site, look=broken):
        child = site.launch("a")
        child.communicate(timeout=10)
        assert child.returncode == 1


def test_the_machine_is_looked_at_for_real() -> None:
    live = jobs.memory_status(0.0)
    assert 0 < live.available_gib < 100_000
    assert jobs.memory_status(2.0).available_gib == pytest.approx(live.available_gib - 2.0, abs=1.0)
    assert 0 <= live.pressed_percent <= 100
    assert jobs.kills() >= 0


def test_a_family_is_all_that_lives_below_and_nothing_else() -> None:
    known = {
        number: jobs.Process(parent, 0, 1.0)
        for number, parent in {1: 0, 10: 1, 11: 10, 12: 11, 20: 1, 21: 20, 30: 31, 31: 30}.items()
    }
    assert jobs.below(frozenset({10, 11, 20, 99}), known) == {
        10: {11, 12},
        11: {12},
        20: {21},
        99: set(),
    }
