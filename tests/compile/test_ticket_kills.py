"""Kills of compilers, launchers, ninja and the verb: what is killed for memory goes on, and nothing
is left behind.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.compile.launching import ROOT, Site, command_of, job_server_, until
from workspace.compile import job_server, jobs
from workspace.compile.costs import Costs, History
from workspace.compile.scheduler import Admission, Bounds


@dataclass(frozen=True)
class Pair:
    tickets: job_server.JobServer
    holder: "subprocess.Popen[str]"
    waiter: "subprocess.Popen[str]"


@pytest.fixture
def pair(site: Site) -> Iterator[Pair]:
    """A compiler that stands at the gate with the only ticket, and a second one that waits for
    it.
    """
    site.compiler("gate")
    with job_server_(site, jobs=1, keep_going=True) as tickets_:
        holder = site.launch("a")
        until(site.running)
        waiter = site.launch("b")
        until(lambda: tickets_.state.waiting)
        yield Pair(tickets_, holder, waiter)


def test_a_killed_holder_gives_its_ticket_back_at_once(site: Site, pair: Pair) -> None:
    os.killpg(pair.holder.pid, signal.SIGKILL)
    until(lambda: len(site.log) == 2)
    site.open_gate()
    pair.waiter.communicate(timeout=10)
    assert pair.waiter.returncode == 0
    until(lambda: [done.status for done in pair.tickets.finished] == [None, 0])


def test_a_killed_launcher_keeps_its_ticket_as_long_as_its_compiler_lives(
    site: Site, pair: Pair
) -> None:
    pair.holder.kill()
    pair.holder.wait()
    # The bound is on compilers, and that one still runs.
    until(lambda: jobs.living().get(pair.holder.pid) is None)
    assert pair.tickets.state.waiting == 1
    assert len(site.log) == 1
    site.open_gate()
    until(lambda: len(site.log) == 3)
    site.open_gate()
    pair.waiter.communicate(timeout=10)
    assert site.most() == 1


def test_a_compiler_whose_launcher_was_killed_ends_with_the_build_too(site: Site) -> None:
    site.compiler("exec sleep 100")
    with job_server_(site):
        holder = site.launch("a")
        until(site.running)
        holder.kill()
        holder.wait()
        assert site.running()
    assert site.running() == []


def test_a_compiler_killed_for_memory_runs_again_with_more_room(site: Site, tmp_path: Path) -> None:
    site.compiler("test -e again || { touch again; kill -9 $$; }")
    history = History(tmp_path / "h", setup="s")
    admission = Admission(Bounds(4, 64.0))
    with job_server.JobServer(
        site.tickets, admission, Costs([]), units=1, history=history
    ) as tickets_:
        child = site.launch("a")
        output, _ = child.communicate(timeout=10)
    assert child.returncode == 0
    assert "killed by SIGKILL" in output
    assert [(done.status, done.is_killed) for done in tickets_.finished] == [(-9, True), (0, False)]
    assert admission.bounds.budget_gib == 32.0
    assert tickets_.trouble is None


def test_an_nvcc_that_exits_137_was_killed_for_memory_and_the_third_time_is_told_with_all_numbers(
    site: Site,
) -> None:
    site.compiler("exit 137")
    with job_server_(site, budget_gib=64.0) as tickets_:
        child = site.launch("a")
        output, _ = child.communicate(timeout=10)
    assert child.returncode == 137
    assert len(tickets_.finished) == 3
    assert tickets_.trouble is not None
    assert (
        "3 times, with budgets of 64.0, 32.0, 16.0 GiB; the last to be killed was a.cu of t: 8.0"
        " GiB expected" in tickets_.trouble
    )
    assert tickets_.trouble in output


def test_a_compiler_that_hides_the_kill_of_its_own_child_is_found_out_by_the_kernels_count(
    site: Site,
) -> None:
    # As g++ does when cc1plus is killed.
    site.compiler("test -e again || { touch again; exit 1; }")
    admission = Admission(Bounds(4, 64.0))
    count = site.folder / "again"
    with job_server.JobServer(
        site.tickets, admission, Costs([]), units=1, kills=lambda: int(count.exists())
    ) as tickets_:
        child = site.launch("a")
        child.communicate(timeout=10)
    assert child.returncode == 0
    assert [(done.status, done.is_killed) for done in tickets_.finished] == [(1, True), (0, False)]
    assert admission.bounds.budget_gib == 32.0


def test_a_mistake_in_a_source_is_no_kill_whatever_was_killed_before(site: Site) -> None:
    site.compiler("exit 1")
    with job_server_(site, kills=lambda: 7) as tickets_:
        child = site.launch("a")
        child.communicate(timeout=10)
    assert child.returncode == 1
    assert [(done.status, done.is_killed) for done in tickets_.finished] == [(1, False)]


def test_compilers_that_fall_to_one_shortage_halve_the_budget_once(site: Site) -> None:
    site.compiler("test -e again && exit 0; gate; kill -9 $$")
    admission = Admission(Bounds(4, 64.0))
    with job_server.JobServer(site.tickets, admission, Costs([]), units=3) as tickets_:
        children = [site.launch(name) for name in "abc"]
        until(lambda: len(site.running()) == 3)
        (site.folder / "again").touch()
        for pid in site.running():
            os.kill(pid, signal.SIGKILL)
        for child in children:
            child.communicate(timeout=10)
    assert [child.returncode for child in children] == [0, 0, 0]
    assert admission.bounds.budget_gib == 32.0
    assert sum(done.is_killed for done in tickets_.finished) == 3


def test_when_ninja_alone_is_killed_nothing_of_it_goes_on(site: Site) -> None:
    site.compiler("sh -c 'gate() { read -r word < gate; }; gate; sleep 100'")
    with job_server_(site, jobs=2, units=8) as tickets_:
        child = site.ninja([f"u{number}" for number in range(8)])
        until(lambda: len(site.running()) == 2)
        until(lambda: tickets_.state.waiting == 6)
        child.kill()
        child.wait()
    assert site.running() == []
    assert len(site.log) == 2
    assert not [pid for pid in jobs.living() if command_of(pid).startswith(str(site.folder))]


def test_after_an_interruption_nothing_is_left_and_the_next_build_goes_on(site: Site) -> None:
    # A shell that starts a child while the signal comes loses it: let there be none.
    site.compiler("test -e calm || exec sleep 100")
    names = [f"u{number}" for number in range(6)]
    with job_server_(site, jobs=2, units=6):
        child = site.ninja(names)
        until(
            lambda: (
                [Path(f"/proc/{pid}/comm").read_text() for pid in site.running()] == ["sleep\n"] * 2
            )
        )
        child.send_signal(signal.SIGINT)
        output, _ = child.communicate(timeout=10)
    assert child.returncode != 0
    assert "Traceback" not in output
    assert site.running() == []
    (site.folder / "calm").touch()
    with job_server_(site, jobs=2, units=6) as tickets_:
        again = site.ninja(names)
        again.communicate(timeout=20)
    assert (again.returncode, len(tickets_.finished)) == (0, 6)


VERB = """
import sys
import time
from pathlib import Path
from workspace.compile import job_server
from workspace.compile.scheduler import Admission, Bounds
from workspace.compile.costs import Costs
with job_server.Broker(Path(sys.argv[1]), Admission(Bounds(1, 100.0)), Costs([]), units=1) as broker:
    print("ready", flush=True)
    while broker.state.waiting < 3:
        time.sleep(0.01)
    print("3 wait", flush=True)
    sys.stdin.read()
"""


def test_a_killed_verb_ends_who_waits_and_the_next_one_works(site: Site) -> None:
    site.compiler("gate")
    verb = subprocess.Popen(
        [sys.executable, "-c", VERB, str(site.tickets)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert verb.stdout is not None
    assert verb.stdout.readline() == "ready\n"
    holder = site.launch("a")
    until(site.running)
    waiters = [site.launch(name) for name in "bcd"]
    assert verb.stdout.readline() == "3 wait\n"
    verb.kill()
    verb.communicate()
    for waiter in waiters:
        output, _ = waiter.communicate(timeout=10)
        assert (waiter.returncode, output) == (
            1,
            "not compiled: the build that this unit belongs to has ended\n",
        )
    site.open_gate()
    holder.communicate(timeout=10)
    assert holder.returncode == 0
    site.compiler("echo compiled")
    with job_server_(site):
        assert site.launch("b").communicate(timeout=10)[0] == "compiled\n"
