"""Kills of compilers, launchers, ninja and the task: units killed for memory are compiled again,
and no process is left.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.compile.launching import Site, command_of, start_job_server, until
from workspace.compile import job_server, launcher
from workspace.compile.costs import Costs
from workspace.compile.scheduler import Admission, Bounds, MemoryStatus
from workspace.machine import failures


def watch(kills: Callable[[], int]) -> job_server.MemoryWatch:
    """A machine with memory for every unit, and a counter of out-of-memory kills."""
    return job_server.MemoryWatch(lambda: MemoryStatus(1000.0), kills)


@dataclass(frozen=True)
class Pair:
    server: job_server.JobServer
    holder: "subprocess.Popen[str]"
    waiter: "subprocess.Popen[str]"


@pytest.fixture
def pair(site: Site) -> Iterator[Pair]:
    """A compiler at the gate with the only token, and a second one that waits for it."""
    site.compiler("gate")
    with start_job_server(site, jobs=1) as server:
        holder = site.launch("a")
        until(site.running)
        waiter = site.launch("b")
        until(lambda: server.state.waiting)
        yield Pair(server, holder, waiter)


def test_killed_process_group_ends_the_build_at_once(site: Site, pair: Pair) -> None:
    os.killpg(pair.holder.pid, signal.SIGKILL)
    output, _ = pair.waiter.communicate(timeout=10)
    assert (pair.waiter.returncode, output) == (1, "not compiled: another unit failed\n")
    assert [done.status for done in pair.server.finished] == [None]


def test_killed_launcher_keeps_its_token_while_its_compiler_lives(site: Site, pair: Pair) -> None:
    pair.holder.kill()
    pair.holder.wait()
    # The bound counts compilers, and that one still runs.
    until(lambda: job_server.living().get(pair.holder.pid) is None)
    assert pair.server.state.waiting == 1
    assert len(site.log) == 1
    site.open_gate()
    pair.waiter.communicate(timeout=10)
    assert pair.waiter.returncode == 1
    assert len(site.log) == 2


def test_compiler_without_its_launcher_ends_with_the_build(site: Site) -> None:
    site.compiler("exec sleep 100")
    with start_job_server(site):
        holder = site.launch("a")
        until(site.running)
        holder.kill()
        holder.wait()
        assert site.running()
    assert site.running() == []


@pytest.mark.parametrize(
    "script",
    [
        "kill -KILL $$",
        # earlyoom sends SIGTERM below 10 % of memory, and SIGKILL only below 5 %.
        "kill -TERM $$",
        "exit 143",
        "echo 'g++: fatal error: Terminated signal terminated program cc1plus' >&2; exit 1",
        "echo 'g++: fatal error: Killed signal terminated program cc1plus' >&2; exit 1",
        "echo \"nvcc error   : 'cicc' died due to signal 15 (Terminated)\" >&2; exit 15",
        "echo 'clang: error: unable to execute command: Killed' >&2; exit 254",
    ],
)
def test_compiler_ended_by_another_than_the_build_lacked_memory(site: Site, script: str) -> None:
    site.compiler(f"test -e again || {{ touch again; {script}; }}")
    admission = Admission(Bounds(4, 64.0))
    with job_server.JobServer(site.server_folder, admission, Costs([]), units=1) as server:
        child = site.launch("a")
        output, _ = child.communicate(timeout=10)
    assert child.returncode == 0
    assert "when memory runs out" in output
    assert [done.is_killed for done in server.finished] == [True, False]
    assert admission.bounds.budget_gib == 32.0


def test_compiler_that_always_lacks_memory_fails_and_is_no_interruption(site: Site) -> None:
    site.compiler("kill -TERM $$")
    with start_job_server(site, budget_gib=64.0) as server:
        child = site.launch("a")
        child.communicate(timeout=10)
    # ninja takes the signal itself for ^C of the user.
    assert child.returncode == 128 + signal.SIGTERM
    assert server.trouble


def test_signal_to_the_whole_command_is_no_shortage(site: Site) -> None:
    site.compiler("gate")
    admission = Admission(Bounds(4, 64.0))
    with job_server.JobServer(site.server_folder, admission, Costs([]), units=1) as server:
        child = site.launch("a")
        until(site.running)
        # As ninja does when it is ended.
        os.killpg(child.pid, signal.SIGTERM)
        child.communicate(timeout=10)
    assert child.returncode == -signal.SIGTERM
    assert [(done.status, done.is_killed) for done in server.finished] == [(-15, False)]
    assert admission.bounds.budget_gib == 64.0


def test_reports_of_ended_programs_are_known_symptoms() -> None:
    names = {signal.SIGKILL: "compiler-killed", signal.SIGTERM: "compiler-terminated"}
    for number, report in launcher.REPORTS:
        symptom = failures.match(failures.parse(f"cc: error: {report.decode()}x"))
        assert symptom
        assert symptom.name == names[number]


def test_hidden_kill_of_a_compilers_child_is_detected_by_the_kernels_counter(
    site: Site,
) -> None:
    # g++ does so when cc1plus is killed.
    site.compiler("test -e again || { touch again; exit 1; }")
    admission = Admission(Bounds(4, 64.0))
    count = site.folder / "again"
    with job_server.JobServer(
        site.server_folder, admission, Costs([]), units=1, memory=watch(lambda: int(count.exists()))
    ) as server:
        child = site.launch("a")
        child.communicate(timeout=10)
    assert child.returncode == 0
    assert [(done.status, done.is_killed) for done in server.finished] == [(1, True), (0, False)]
    assert admission.bounds.budget_gib == 32.0


def test_compile_error_is_no_kill_whatever_was_killed_before(site: Site) -> None:
    site.compiler("exit 1")
    with start_job_server(site, memory=watch(lambda: 7)) as server:
        child = site.launch("a")
        child.communicate(timeout=10)
    assert child.returncode == 1
    assert [(done.status, done.is_killed) for done in server.finished] == [(1, False)]


def test_compilers_killed_in_one_shortage_halve_the_budget_once(site: Site) -> None:
    site.compiler("test -e again && exit 0; gate; kill -9 $$")
    admission = Admission(Bounds(4, 64.0))
    with job_server.JobServer(site.server_folder, admission, Costs([]), units=3) as server:
        children = [site.launch(name) for name in "abc"]
        until(lambda: len(site.running()) == 3)
        (site.folder / "again").touch()
        for pid in site.running():
            os.kill(pid, signal.SIGKILL)
        for child in children:
            child.communicate(timeout=10)
    assert [child.returncode for child in children] == [0, 0, 0]
    assert admission.bounds.budget_gib == 32.0
    assert sum(done.is_killed for done in server.finished) == 3


def test_when_only_ninja_is_killed_its_compilers_end_too(site: Site) -> None:
    site.compiler("sh -c 'gate() { read -r word < gate; }; gate; sleep 100'")
    with start_job_server(site, jobs=2, units=8) as server:
        child = site.ninja([f"u{number}" for number in range(8)])
        until(lambda: len(site.running()) == 2)
        until(lambda: server.state.waiting == 6)
        child.kill()
        child.wait()
    assert site.running() == []
    # The shell of a compiler may still log its end.
    assert sum(line.startswith("+") for line in site.log) == 2
    assert not [pid for pid in job_server.living() if command_of(pid).startswith(str(site.folder))]
