"""Tickets with real launchers, compilers, ninja and kills: bounds kept, nothing stuck, nothing left behind."""

import ast
import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from workspace.build import launcher, pressure, processes, tickets
from workspace.build.admission import Admission, Bounds, Live
from workspace.build.costs import Costs, Entry, History, Unit
from workspace.core.errors import BuildError

ROOT = Path(__file__).resolve().parents[2]
PLAIN = {"PATH": os.environ["PATH"]}
NINJA = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


class Site:
    """A build folder: sources that are named, a compiler that tells when it begins and ends, and what has run so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tickets = folder / "tickets"
        (folder / "CMakeFiles" / "t.dir").mkdir(parents=True)
        self.compiler("echo compiled")
        self.started: list[subprocess.Popen[str]] = []

    def compiler(self, script: str) -> None:
        """What the compiler does. $5 is the output; `gate` holds it until the test opens it."""
        text = f'#!/bin/sh\ngate() {{ read -r word < gate || :; }}\necho "+ $5 $$" >> log\n{script}\nstatus=$?\necho "- $5 $$" >> log\n: > "$5"\nexit $status\n'
        (self.folder / "compiler").write_text(text)
        (self.folder / "compiler").chmod(0o755)
        if not (self.folder / "gate").exists():
            os.mkfifo(self.folder / "gate")

    def launch(self, name: str, *, argv: list[str] | None = None) -> "subprocess.Popen[str]":
        """Start one launcher, in a group of its own as ninja does."""
        words = [str(self.tickets / "ticket"), *(argv or ["./compiler", "-c", f"{name}.cu", f"{name}.o", "-o", f"CMakeFiles/t.dir/{name}.cu.o"])]
        child = subprocess.Popen(words, cwd=self.folder, env=PLAIN, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0)
        self.started.append(child)
        return child

    def write_build(self, names: list[str]) -> None:
        lines = ["rule compile", f"  command = {shlex.quote(str(self.tickets / 'ticket'))} ./compiler -c $in $out -o $out"]
        for name in names:
            (self.folder / f"{name}.cu").touch()
            lines.append(f"build CMakeFiles/t.dir/{name}.cu.o: compile {name}.cu")
        (self.folder / "build.ninja").write_text("\n".join(lines) + "\n")

    def ninja(self, names: list[str], *words: str) -> "subprocess.Popen[str]":
        self.write_build(names)
        assert NINJA is not None
        argv = [NINJA, "-j100", *words]
        child = subprocess.Popen(argv, cwd=self.folder, env=PLAIN, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0)
        self.started.append(child)
        return child

    @property
    def log(self) -> list[str]:
        return (self.folder / "log").read_text().splitlines() if (self.folder / "log").exists() else []

    def running(self) -> list[int]:
        """Numbers of the compilers that have begun and still live."""
        pids = [int(line.split()[2]) for line in self.log if line.startswith("+")]
        return [pid for pid in pids if pid in processes.living()]

    def most(self) -> int:
        """The most that ran at any time, by their own account."""
        now = most = 0
        for line in self.log:
            now += 1 if line.startswith("+") else -1
            most = max(most, now)
        return most

    def open_gate(self) -> None:
        """Let one compiler on that stands at the gate, or wait until one does."""
        with (self.folder / "gate").open("w") as gate:
            gate.write("\n")

    def end(self) -> None:
        for child in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path / "build")
    yield made
    made.end()


def broker(site: Site, *, jobs: int = 4, budget_gib: float = 1000.0, units: int = 1, **more) -> tickets.Broker:
    return tickets.Broker(site.tickets, Admission(Bounds(jobs, budget_gib)), Costs([]), units=units, **more)


def until(what: Callable[[], object], *, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return next((os.fsdecode(word) for word in words if b"/" in word and b"tickets" in word), "")


def test_a_compiler_behind_the_launcher_is_called_as_without_it(site: Site) -> None:
    odd = ["a b", "new\nline", "", "$HOME", "\udcff", "ünï"]
    show = [sys.executable, "-c", "import sys; print(sys.argv[1:]); print('talk', file=sys.stderr); sys.exit(3)", *odd, "-o", "x"]
    with broker(site):
        child = site.launch("", argv=show)
        said, _ = child.communicate(timeout=10)
    assert child.returncode == 3
    assert sorted(said.splitlines()) == sorted([repr([*odd, "-o", "x"]), "talk"])


def test_what_a_unit_took_is_measured_with_all_that_it_started_and_kept(site: Site, tmp_path: Path) -> None:
    hungry = f"{shlex.quote(sys.executable)} -c 'held = bytearray(300 << 20); print(len(held))'"
    site.compiler(f"sh -c {shlex.quote(hungry)}")
    history = History(tmp_path / "history.json", setup="s")
    with broker(site, history=history) as tickets_:
        site.launch("a").communicate(timeout=10)
    (done,) = tickets_.finished
    assert (done.unit, done.status, done.is_killed) == (Unit("t", "a.cu"), 0, False)
    assert 0.29 < done.peak_gib < 0.6
    assert done.seconds > 0
    (entry,) = History(tmp_path / "history.json", setup="s").entries
    assert (entry.target, entry.source, entry.peak_gib) == ("t", "a.cu", pytest.approx(done.peak_gib, abs=0.001))


def test_processes_side_by_side_are_added_up_which_the_largest_alone_would_not_show(site: Site) -> None:
    hungry = f"{shlex.quote(sys.executable)} -c 'import time; held = bytearray(150 << 20); time.sleep(100)' &"
    site.compiler(f"{hungry}\nfirst=$!\n{hungry}\nsecond=$!\ngate\nkill $first $second\ntrue")
    with broker(site) as tickets_:
        child = site.launch("a")
        until(lambda: tickets_.state.held_gib > 0.29)
        site.open_gate()
        child.communicate(timeout=10)
    assert 0.29 < tickets_.finished[0].peak_gib < 0.5


def test_a_failed_unit_teaches_nothing(site: Site, tmp_path: Path) -> None:
    site.compiler("false")
    history = History(tmp_path / "history.json", setup="s")
    with broker(site, history=history) as tickets_:
        site.launch("a").communicate(timeout=10)
    assert [done.status for done in tickets_.finished] == [1]
    assert history.entries == ()


def test_compilers_are_nicer_and_the_first_to_be_ended_and_their_launchers_are_not(site: Site) -> None:
    site.compiler("cat /proc/self/oom_score_adj; nice; ulimit -c; cat /proc/$PPID/oom_score_adj")
    with broker(site):
        said, _ = site.launch("a").communicate(timeout=10)
    words = said.split()
    assert (words[0], int(words[1]) >= launcher.NICE, words[3]) == ("1000", True, Path("/proc/self/oom_score_adj").read_text().strip())


def test_a_pipe_that_nobody_reads_ends_a_compiler_as_ever(site: Site) -> None:
    site.compiler("yes | head -1")
    with broker(site):
        said, _ = site.launch("a").communicate(timeout=10)
    assert said == "y\n"


def test_the_bound_holds_with_ninja_letting_all_units_go_at_once(site: Site) -> None:
    names = [f"u{number}" for number in range(30)]
    site.compiler("sleep 0.05")
    with broker(site, jobs=3, units=30) as tickets_:
        child = site.ninja(names)
        said, _ = child.communicate(timeout=30)
    assert child.returncode == 0, said
    assert len(tickets_.finished) == 30
    assert site.most() == 3


def test_one_that_is_larger_than_the_budget_is_built_alone(site: Site) -> None:
    site.compiler("sleep 0.05")
    costs = Costs([Entry("t", "big.cu", 1.0, 50.0), *[Entry("t", f"u{number}.cu", 0.1, 1.0) for number in range(8)]])
    with tickets.Broker(site.tickets, Admission(Bounds(8, 4.5)), costs, units=9) as tickets_:
        child = site.ninja(["big", *[f"u{number}" for number in range(8)]])
        child.communicate(timeout=20)
    assert (child.returncode, len(tickets_.finished)) == (0, 9)
    names = [line.split()[1] for line in site.log]
    at = names.index("CMakeFiles/t.dir/big.cu.o")
    assert names[at] == names[at + 1]
    assert site.most() <= 4


def test_after_a_failure_ninja_is_not_kept_until_all_that_waits_was_compiled(site: Site) -> None:
    site.compiler('case "$5" in *bad*) echo "error: bad"; exit 5;; esac')
    costs = Costs([Entry("t", "bad.cu", 9.0, 9.0), *[Entry("t", f"u{number}.cu", 0.1, 1.0) for number in range(19)]])
    with tickets.Broker(site.tickets, Admission(Bounds(1, 100.0)), costs, units=20) as tickets_:
        child = site.ninja(["bad", *[f"u{number}" for number in range(19)]])
        said, _ = child.communicate(timeout=20)
    assert child.returncode != 0
    # On a busy machine one or two may have asked, and run, before the bad one did.
    assert len(tickets_.finished) < 10
    assert tickets_.finished[-1].status == 5
    assert "error: bad" in said
    assert "not compiled: another unit failed" in said


def test_told_to_keep_going_all_that_can_be_compiled_is(site: Site) -> None:
    site.compiler('case "$5" in *bad*) exit 5;; esac')
    with broker(site, jobs=1, units=6, keep_going=True) as tickets_:
        child = site.ninja(["bad", *[f"u{number}" for number in range(5)]], "-k0")
        child.communicate(timeout=20)
    assert sorted(done.status or 0 for done in tickets_.finished) == [0, 0, 0, 0, 0, 5]


def test_a_compiler_inside_another_ones_ticket_waits_for_none(site: Site) -> None:
    inner = shlex.join([str(site.tickets / "ticket"), "echo", "inner", "-o", "inner.o"])
    site.compiler(f"env -i sh -c {shlex.quote(inner)}")
    with broker(site, jobs=1) as tickets_:
        said, _ = site.launch("a").communicate(timeout=10)
    assert said == "inner -o inner.o\n"
    assert [done.unit.source for done in tickets_.finished] == ["a.cu"]


def test_a_question_for_the_version_needs_no_ticket(site: Site) -> None:
    site.compiler("gate")
    with broker(site, jobs=1):
        first = site.launch("a")
        until(site.running)
        said, _ = site.launch("", argv=["expr", "7"]).communicate(timeout=10)
        assert said == "7\n"
        site.open_gate()
        first.communicate(timeout=10)


def test_a_killed_holder_gives_its_ticket_back_at_once(site: Site) -> None:
    site.compiler("gate")
    with broker(site, jobs=1, keep_going=True) as tickets_:
        holder = site.launch("a")
        until(site.running)
        waiter = site.launch("b")
        until(lambda: tickets_.state.waiting)
        os.killpg(holder.pid, signal.SIGKILL)
        until(lambda: len(site.log) == 2)
        site.open_gate()
        waiter.communicate(timeout=10)
    assert waiter.returncode == 0
    assert [done.status for done in tickets_.finished] == [None, 0]


def test_a_killed_launcher_keeps_its_ticket_as_long_as_its_compiler_lives(site: Site) -> None:
    site.compiler("gate")
    with broker(site, jobs=1, keep_going=True) as tickets_:
        holder = site.launch("a")
        until(site.running)
        waiter = site.launch("b")
        until(lambda: tickets_.state.waiting)
        holder.kill()
        holder.wait()
        # The bound is on compilers, and that one still runs.
        until(lambda: processes.living().get(holder.pid) is None)
        assert tickets_.state.waiting == 1
        assert len(site.log) == 1
        site.open_gate()
        until(lambda: len(site.log) == 3)
        site.open_gate()
        waiter.communicate(timeout=10)
    assert site.most() == 1


def test_a_compiler_whose_launcher_was_killed_ends_with_the_build_too(site: Site) -> None:
    site.compiler("exec sleep 100")
    with broker(site):
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
    with tickets.Broker(site.tickets, admission, Costs([]), units=1, history=history) as tickets_:
        child = site.launch("a")
        said, _ = child.communicate(timeout=10)
    assert child.returncode == 0
    assert "killed by SIGKILL" in said
    assert [(done.status, done.is_killed) for done in tickets_.finished] == [(-9, True), (0, False)]
    assert admission.bounds.budget_gib == 32.0
    assert tickets_.trouble is None


def test_an_nvcc_that_exits_137_was_killed_for_memory_and_the_third_time_is_told_with_all_numbers(site: Site) -> None:
    site.compiler("exit 137")
    with broker(site, budget_gib=64.0) as tickets_:
        child = site.launch("a")
        said, _ = child.communicate(timeout=10)
    assert child.returncode == 137
    assert len(tickets_.finished) == 3
    assert tickets_.trouble is not None
    assert "3 times, with budgets of 64.0, 32.0, 16.0 GiB; the last to be killed was a.cu of t: 8.0 GiB expected" in tickets_.trouble
    assert tickets_.trouble in said


def test_compilers_that_fall_to_one_shortage_halve_the_budget_once(site: Site) -> None:
    site.compiler("test -e again && exit 0; gate; kill -9 $$")
    admission = Admission(Bounds(4, 64.0))
    with tickets.Broker(site.tickets, admission, Costs([]), units=3) as tickets_:
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
    with broker(site, jobs=2, units=8) as tickets_:
        child = site.ninja([f"u{number}" for number in range(8)])
        until(lambda: len(site.running()) == 2)
        until(lambda: tickets_.state.waiting == 6)
        child.kill()
        child.wait()
    assert site.running() == []
    assert len(site.log) == 2
    assert not [pid for pid in processes.living() if _command(pid).startswith(str(site.folder))]


def test_after_an_interruption_nothing_is_left_and_the_next_build_goes_on(site: Site) -> None:
    # A shell that starts a child while the signal comes loses it: let there be none.
    site.compiler("test -e calm || exec sleep 100")
    names = [f"u{number}" for number in range(6)]
    with broker(site, jobs=2, units=6):
        child = site.ninja(names)
        until(lambda: [Path(f"/proc/{pid}/comm").read_text() for pid in site.running()] == ["sleep\n"] * 2)
        child.send_signal(signal.SIGINT)
        said, _ = child.communicate(timeout=10)
    assert child.returncode != 0
    assert "Traceback" not in said
    assert site.running() == []
    (site.folder / "calm").touch()
    with broker(site, jobs=2, units=6) as tickets_:
        again = site.ninja(names)
        again.communicate(timeout=20)
    assert (again.returncode, len(tickets_.finished)) == (0, 6)


VERB = """
import sys
import time
from pathlib import Path
from workspace.build import tickets
from workspace.build.admission import Admission, Bounds
from workspace.build.costs import Costs
with tickets.Broker(Path(sys.argv[1]), Admission(Bounds(1, 100.0)), Costs([]), units=1) as broker:
    print("ready", flush=True)
    while broker.state.waiting < 3:
        time.sleep(0.01)
    print("3 wait", flush=True)
    sys.stdin.read()
"""


def test_a_killed_verb_ends_who_waits_and_the_next_one_works(site: Site) -> None:
    site.compiler("gate")
    verb = subprocess.Popen([sys.executable, "-c", VERB, str(site.tickets)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert verb.stdout is not None
    assert verb.stdout.readline() == "ready\n"
    holder = site.launch("a")
    until(site.running)
    waiters = [site.launch(name) for name in "bcd"]
    assert verb.stdout.readline() == "3 wait\n"
    verb.kill()
    verb.communicate()
    for waiter in waiters:
        said, _ = waiter.communicate(timeout=10)
        assert (waiter.returncode, said) == (1, "not compiled: the build that this unit belongs to has ended\n")
    site.open_gate()
    holder.communicate(timeout=10)
    assert holder.returncode == 0
    site.compiler("echo compiled")
    with broker(site):
        assert site.launch("b").communicate(timeout=10)[0] == "compiled\n"


BUILD = """
import sys
from pathlib import Path
from workspace import door
from workspace.build import tickets
from workspace.build.admission import Admission, Bounds
from workspace.build.costs import Costs
from workspace.core import process
from workspace.core.journal import Journal

def work():
    folder = Path(sys.argv[1])
    with Journal(door.console(), folder / "logs", verb="test") as journal:
        with tickets.Broker(folder / "tickets", Admission(Bounds(2, 100.0)), Costs([]), units=8):
            process.run([sys.argv[2], "-C", folder, "-j100"], env={"PATH": sys.argv[3]}, journal=journal)

sys.exit(door.run(work))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_whatever_ends_a_verb_that_builds_no_compiler_outlives_it(site: Site, number: signal.Signals) -> None:
    site.compiler("exec sleep 100")
    site.write_build([f"u{number}" for number in range(8)])
    assert NINJA is not None
    argv = [sys.executable, "-c", BUILD, str(site.folder), NINJA, os.environ["PATH"]]
    verb = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until(lambda: [Path(f"/proc/{pid}/comm").read_text() for pid in site.running()] == ["sleep\n"] * 2)
    verb.send_signal(number)
    _, talk = verb.communicate(timeout=20)
    assert "Traceback" not in talk
    until(lambda: site.running() == [] and not [pid for pid in processes.living() if _command(pid).startswith(str(site.folder))])
    assert len(site.log) == 2


def test_ninja_typed_by_hand_compiles_one_at_a_time(site: Site) -> None:
    tickets.install(site.tickets)
    site.compiler("gate")
    children = [site.launch(name) for name in "abc"]
    for number in range(3):
        until(lambda number=number: len(site.log) == 2 * number + 1)
        site.open_gate()
    for child in children:
        child.communicate(timeout=10)
    assert [child.returncode for child in children] == [0, 0, 0]
    assert site.most() == 1


def test_without_the_folder_of_the_tickets_a_launcher_says_so(site: Site) -> None:
    argv = [sys.executable, "-I", "-S", launcher.__file__, str(site.folder / "gone"), "./compiler", "-c", "a"]
    done = subprocess.run(argv, capture_output=True, text=True, env=PLAIN, cwd=site.folder)
    assert done.returncode == 1
    assert done.stderr.startswith("not compiled: ")
    assert "No such file" in done.stderr
    assert site.log == []


def test_a_compiler_that_is_not_there_is_said_and_fails(site: Site) -> None:
    with broker(site):
        child = site.launch("", argv=["/no/such/nvcc", "-c", "a.cu"])
        said, _ = child.communicate(timeout=10)
    assert (child.returncode, said) == (127, "error: /no/such/nvcc: No such file or directory\n")


def test_a_folder_too_deep_for_the_address_of_a_socket_works_too(tmp_path: Path) -> None:
    site = Site(tmp_path / ("deep" * 30) / "with 'quotes' and blanks")
    with broker(site):
        child = site.launch("a")
        assert child.communicate(timeout=10)[0] == "compiled\n"


def test_strangers_at_the_socket_do_no_harm(site: Site) -> None:
    with broker(site, jobs=1, keep_going=True) as tickets_:
        for words in (b"", b"hello\n", b"-5\n", b"\xff\xff\n", b"99\nshort", b"3\n\0\0\0", b"2\n-c", b"x" * 70_000):
            stranger = socket.socket(socket.AF_UNIX)
            stranger.connect(str(site.tickets / "socket"))
            stranger.sendall(words)
            stranger.close()
        assert site.launch("a").communicate(timeout=10)[0] == "compiled\n"
    assert tickets_.finished[-1].status == 0


def test_a_fault_of_the_broker_is_told_and_keeps_no_launcher_waiting(site: Site) -> None:
    def broken() -> Live:
        raise RuntimeError("no such machine")

    with pytest.raises(BuildError, match="no such machine"), broker(site, look=broken):
        child = site.launch("a")
        child.communicate(timeout=10)
        assert child.returncode == 1


def test_the_machine_is_looked_at_for_real() -> None:
    live = pressure.look(0.0)
    assert 0 < live.available_gib < 100_000
    assert pressure.look(2.0).available_gib == pytest.approx(live.available_gib - 2.0, abs=1.0)
    assert 0 <= live.pressed_percent <= 100
    assert pressure.kills() >= 0


def test_a_family_is_all_that_lives_below_and_nothing_else() -> None:
    known = {number: processes.Process(parent, 0, 1.0) for number, parent in {1: 0, 10: 1, 11: 10, 12: 11, 20: 1, 21: 20, 30: 31, 31: 30}.items()}
    assert processes.below(frozenset({10, 11, 20, 99}), known) == {10: {11, 12}, 11: {12}, 20: {21}, 99: set()}


def test_the_launcher_is_not_written_again_so_that_ninja_sees_no_new_command(tmp_path: Path) -> None:
    program = tickets.install(tmp_path)
    before = program.stat()
    assert tickets.install(tmp_path) == program
    assert program.stat().st_mtime_ns == before.st_mtime_ns
    program.write_text("#!/bin/sh\nexit 9\n")
    tickets.install(tmp_path)
    assert program.stat().st_size == before.st_size


def test_the_launcher_runs_in_old_pythons_and_imports_nothing_heavy() -> None:
    text = Path(launcher.__file__).read_text(encoding="utf-8")
    ast.parse(text, feature_version=(3, 8))
    seen = subprocess.run(
        [sys.executable, "-I", "-S", "-X", "importtime", launcher.__file__, "/nowhere", "true"], capture_output=True, text=True, env=PLAIN
    ).stderr
    names = {line.rpartition("|")[2].strip() for line in seen.splitlines() if "|" in line}
    assert "_socket" in names
    assert not names & {"socket", "signal", "enum", "re", "typing", "subprocess", "contextlib", "json", "site", "fcntl"}
