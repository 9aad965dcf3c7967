"""The process seam: what a child sees, how it fails, and that none outlives its verb."""

import io
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from workspace.cli import main
from workspace.core import process
from workspace.core.console import Console, RunLog
from workspace.core.errors import SourceError, ToolchainError
from workspace.core.paths import Layout
from workspace.core.process import Completed, NoAnswer, Slow, There
from workspace.core.settings import load

ROOT = Path(__file__).resolve().parents[2]
PLAIN = {"PATH": "/usr/bin:/bin"}
# A verb that runs a shell; what the shell prints, the verb passes on.
VERB = """
import os, sys
from pathlib import Path
from workspace.cli import main
from workspace.core import process
from workspace.core.console import RunLog

def work():
    with RunLog(main.console(), Path(sys.argv[1]), verb="test") as run_log:
        show = lambda line: print(line, flush=True)
        path = {"PATH": "/usr/bin:/bin"}
        process.run(["/bin/sh", "-c", sys.argv[2]], env=path, run_log=run_log, on_line=show)

sys.exit(main.run(work))
"""
# The shell and a grandchild tell their numbers and wait for ever.
FAMILY = "sh -c 'echo $PPID $$; exec sleep 1000'; :"


@pytest.fixture
def run_log(tmp_path: Path) -> RunLog:
    return RunLog(Console(out=io.StringIO(), err=io.StringIO()), tmp_path / "logs", verb="test")


def verb(tmp_path: Path, script: str) -> "subprocess.Popen[str]":
    argv = [sys.executable, "-c", VERB, str(tmp_path / "logs"), script]
    return subprocess.Popen(
        argv,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def is_alive(number: int) -> bool:
    """Whether a process runs; one that ended and was not waited for by its parent does not
    count.
    """
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (signal.SIGINT, 130, "interrupted\n"),
        (signal.SIGTERM, 143, "interrupted by SIGTERM\n"),
        (signal.SIGHUP, 129, "interrupted by SIGHUP\n"),
    ],
)
def test_no_grandchild_outlives_an_ended_verb(
    tmp_path: Path, number: signal.Signals, code: int, says: str
) -> None:
    with verb(tmp_path, FAMILY) as started:
        assert started.stdout is not None
        family = [int(arg) for arg in started.stdout.readline().split()]
        assert all(map(is_alive, family))
        started.send_signal(number)
        _, talk = started.communicate(timeout=9)
    assert started.returncode == code
    assert talk.endswith(says)
    assert "Traceback" not in talk
    assert not any(map(is_alive, family))


def test_second_interrupt_does_not_orphan_a_child_that_is_deaf_to_the_first(tmp_path: Path) -> None:
    output = tmp_path / "heard"
    os.mkfifo(output)
    # The grandchild dies of the first ^C, the shell only says that it heard it.
    with verb(
        tmp_path, f"trap 'echo x > {output}' INT; echo $$; while :; do sleep 0.1; done"
    ) as started:
        assert started.stdout is not None
        deaf = int(started.stdout.readline())
        started.send_signal(signal.SIGINT)
        descriptor = os.open(output, os.O_RDONLY | os.O_NONBLOCK)
        assert select.select([descriptor], [], [], 9)[0]
        os.close(descriptor)
        started.send_signal(signal.SIGINT)
        started.communicate(timeout=9)
    assert started.returncode == 130
    assert not is_alive(deaf)


@pytest.mark.parametrize("pause_s", [0.0, 0.003, 0.01, 0.03])
@pytest.mark.parametrize("others", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_in_quick_succession_end_in_one_sentence(
    tmp_path: Path, pause_s: float, others: signal.Signals
) -> None:
    """As a person who types ^C thrice, or a terminal that closes after ^C."""
    # The program prints without end, so that the verb has its output in hand.
    with verb(tmp_path, "echo $$; while :; do echo x; sleep 0.01; done") as started:
        assert started.stdout is not None
        shell = int(started.stdout.readline())
        for number in (signal.SIGINT, others, others):
            started.send_signal(number)
            time.sleep(pause_s)
        _, talk = started.communicate(timeout=20)
    # Of signals that are pending at once, the kernel delivers the lowest number first.
    sentences = {"interrupted": 130, f"interrupted by {others.name}": 128 + others}
    assert sentences[talk.splitlines()[-1]] == started.returncode
    assert not re.search("Traceback|OSError|ignored", talk)
    assert not is_alive(shell)


CLEANUP = """
import sys, time
from workspace.cli import main

def work():
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        for step in range(int(sys.argv[1])):
            print(step, flush=True)
            time.sleep(0.02)

sys.exit(main.run(work))
"""


def test_cleanup_is_finished_whatever_interrupts_follow() -> None:
    argv = [sys.executable, "-c", CLEANUP, "30"]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        started.stdout.readline()
        for _ in range(main.LAST_RESORT - 1):
            started.send_signal(signal.SIGINT)
            time.sleep(0.03)
        out, _ = started.communicate(timeout=20)
    assert (started.returncode, out.split()[-1]) == (130, "29")


def test_person_who_goes_on_with_interrupts_gets_out() -> None:
    argv = [sys.executable, "-c", CLEANUP, "5000"]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        started.stdout.readline()
        while started.poll() is None:
            started.send_signal(signal.SIGINT)
            # One reads while the other prints: its pipe must not fill up.
            started.stdout.readline()
            time.sleep(0.05)
        out, _ = started.communicate(timeout=20)
    assert started.returncode == 130
    assert "4999" not in out


def test_signal_during_a_start_waits_until_the_child_is_known() -> None:
    steps: list[str] = []
    former = signal.signal(signal.SIGTERM, lambda *_: steps.append("handled"))
    try:
        with process._signals_held():
            os.kill(os.getpid(), signal.SIGTERM)
            steps.append("started")
        steps.append("left")
    finally:
        signal.signal(signal.SIGTERM, former)
    assert steps == ["started", "handled", "left"]


def test_failure_shows_the_first_error_line_the_tail_and_the_log(run_log: RunLog) -> None:
    script = (
        "echo fine; echo 'x.cpp:3: error: no such thing' >&2; echo 'error: later'; for i in $(seq"
        " 30); do echo line $i; done; exit 3"
    )
    with run_log, pytest.raises(SourceError) as caught:
        process.run(
            ["/bin/sh", "-c", script],
            env=PLAIN,
            run_log=run_log,
            failure=SourceError,
            hint="do this",
        )
    assert caught.value.message == "sh exited with 3: x.cpp:3: error: no such thing"
    assert caught.value.details[-2:] == ("line 30", f"log: {run_log.path}")
    assert caught.value.details[0].startswith("+ /bin/sh -c ")
    assert len(caught.value.details) == process.SHOWN_TAIL_LINES + 2
    assert caught.value.hint == "do this"


def test_secret_in_a_failing_child_reaches_neither_message_nor_log(tmp_path: Path) -> None:
    talk = io.StringIO()
    with (
        RunLog(
            Console(out=io.StringIO(), err=talk), tmp_path, verb="test", secrets=("hunter2",)
        ) as run,
        pytest.raises(ToolchainError) as caught,
    ):
        process.run(
            ["/bin/sh", "-c", "echo error: hunter2; exit 1"],
            env=PLAIN,
            run_log=run,
            failure=ToolchainError,
        )
    assert run.path is not None
    for text in (
        caught.value.message,
        *caught.value.details,
        talk.getvalue(),
        run.path.read_text(encoding="utf-8"),
    ):
        assert "hunter2" not in text


def test_child_sees_the_callers_environment_and_no_stdin() -> None:
    found = process.capture(["/bin/sh", "-c", "cat; env"], env={**PLAIN, "ONLY": "this"})
    assert {"ONLY=this", "PATH=/usr/bin:/bin"} <= set(found.stdout.splitlines())
    assert "HOME=" not in found.stdout


def test_capture_keeps_the_streams_apart_and_survives_foreign_bytes() -> None:
    found = process.capture(["/bin/sh", "-c", r"printf 'a\377b'; echo talk >&2; exit 5"], env=PLAIN)
    assert (found.stdout, found.stderr, found.returncode) == ("a\ufffdb", "talk\n", 5)


def test_capture_that_takes_too_long_is_ended_and_named() -> None:
    with pytest.raises(ToolchainError, match=r"^sleep 1000 gave no answer in 0.1 s"):
        process.capture(["sleep", "1000"], env=PLAIN, timeout_s=0.1)


def test_missing_program_is_a_sentence(run_log: RunLog) -> None:
    with run_log, pytest.raises(ToolchainError, match="^no-such-program is missing"):
        process.run(["no-such-program"], env=PLAIN, run_log=run_log)


@pytest.mark.parametrize(
    ("returncode", "args"),
    [
        (1, "exited with 1"),
        (-11, "was killed by SIGSEGV"),
        (-9, "was killed by SIGKILL (the kernel sends it when memory runs out)"),
        (137, "was killed by SIGKILL"),
    ],
)
def test_status_is_named(returncode: int, args: str) -> None:
    assert process.describe_status(returncode).startswith(args)


def test_killed_verb_leaves_nothing_running_not_even_in_sessions_of_its_own(tmp_path: Path) -> None:
    with verb(tmp_path, "setsid sh -c 'echo $PPID $$; exec sleep 1000'; :") as started:
        assert started.stdout is not None
        family = [int(arg) for arg in started.stdout.readline().split()]
        started.kill()
        started.wait()
        watched = [os.pidfd_open(number) for number in family if is_alive(number)]
        for descriptor in watched:
            assert select.select([descriptor], [], [], 9)[0]
            os.close(descriptor)
    assert not any(map(is_alive, family))


def test_daemon_that_a_program_leaves_on_purpose_outlives_it() -> None:
    """A compiler cache starts its server that way."""
    found = process.capture(
        ["/bin/sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo $!"], env=PLAIN
    )
    daemon = int(found.stdout)
    assert is_alive(daemon)
    os.kill(daemon, signal.SIGKILL)


def test_factor_of_a_slow_machine_multiplies_the_time_limit_of_a_program(tmp_path):
    env = load(Layout(tmp_path), environ={"PATH": os.defpath, "TIME_LIMIT_FACTOR": "200"})
    plain, argv = env.child_environment("plain"), ["sh", "-c", "sleep 0.2; echo there"]
    assert process.ask(argv, env=plain, limit_s=0.05) == There(Completed(0, "there\n", ""))
    assert process.capture(argv, env=plain, timeout_s=0.05).stdout == "there\n"
    usual = {**plain, "TIME_LIMIT_FACTOR": ""}
    assert process.ask(argv, env=usual, limit_s=0.05) == Slow(0.05)
    with pytest.raises(NoAnswer, match=r"gave no answer in 0\.05 s"):
        process.capture(argv, env=usual, timeout_s=0.05)
