"""The lock: held by the living only."""

import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from workspace.core import lock
from workspace.core.console import Console, RunLog
from workspace.core.errors import LockError

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys
from pathlib import Path
from workspace.core import lock
with lock.hold(Path(sys.argv[1]), verb="inv bootstrap") as held:
    held.note("torch")
    print("held", flush=True)
    sys.stdin.read()
"""


VERB = """
import sys
from pathlib import Path
from workspace.core import lock, process
from workspace.core.console import Console
from workspace.core.console import RunLog
script = "trap 'sleep 0.5; exit' TERM; trap : HUP INT; echo $$; while :; do sleep 0.1; done"
show = lambda line: print(line, flush=True)
path = {"PATH": "/usr/bin:/bin"}
with lock.hold(Path(sys.argv[1]), verb="test") as held:
    with RunLog(Console(), Path(sys.argv[2]), verb="test", held=held) as run_log:
        process.run(["/bin/sh", "-c", script], env=path, run_log=run_log, on_line=show)
"""


def holder(path: Path) -> "subprocess.Popen[str]":
    """Start a process that holds the lock until its stdin closes."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def test_step_of_a_nested_run_is_the_step_of_both_locks(tmp_path: Path) -> None:
    console, paths = Console(err=io.StringIO()), [tmp_path / name for name in ("outer", "inner")]

    def steps() -> list[str]:
        return [json.loads(path.read_text())["doing"] for path in paths]

    with contextlib.ExitStack() as runs:
        for path in paths:
            held = runs.enter_context(lock.hold(path, verb="inv test"))
            runs.enter_context(RunLog(console, tmp_path / "logs", verb="test", held=held))
        with console.step("torch"):
            assert steps() == ["torch", "torch"]
        with console.step("smoke"):
            assert steps() == ["smoke", "smoke"]
    with console.step("afterwards"):
        assert [path.read_text() for path in paths] == ["", ""]


def test_second_verb_stops_and_says_who_holds_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "state" / "lock"
    with holder(path) as child:
        with (
            pytest.raises(
                LockError,
                match=(
                    rf"^inv bootstrap \(process {child.pid}\) has been changing this workspace"
                    r" since 20.*; its present step is torch$"
                ),
            ),
            lock.hold(path, verb="status"),
        ):
            pass
        # Only a verb with somebody to tell that it waits has --wait.
        hints = []
        for on_wait in (None, print):
            with (
                pytest.raises(LockError) as caught,
                lock.hold(path, verb="status", on_wait=on_wait),
            ):
                pass
            hints.append(caught.value.hint)
        assert hints == ["wait for it", "wait for it, or run the command with --wait"]
        child.communicate()
    with lock.hold(path, verb="status"):
        pass


def test_lock_of_a_killed_holder_is_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as child:
        child.send_signal(signal.SIGKILL)
        child.wait()
    with lock.hold(path, verb="status"):
        assert str(os.getpid()) in path.read_text(encoding="utf-8")


def test_waiting_says_so_once_and_then_gets_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    output: list[str] = []
    with holder(path) as child:
        ending = threading.Thread(target=child.communicate)

        def release(sentence: str) -> None:
            output.append(sentence)
            ending.start()

        with lock.hold(path, verb="status", wait=True, on_wait=release):
            assert len(output) == 1
            assert output[0].startswith("waiting: inv bootstrap")
        # On a slow machine the thread still reads when `with holder` closes its pipe.
        ending.join()


def test_damaged_record_of_the_holder_is_still_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as child:
        path.write_text("{", encoding="utf-8")
        with (
            pytest.raises(LockError, match="^another process is changing this workspace"),
            lock.hold(path, verb="status"),
        ):
            pass
        child.communicate()


def test_lock_of_a_killed_verb_is_held_until_what_it_started_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    # The program takes its time to end after the guard has told it to.
    with subprocess.Popen(
        [sys.executable, "-c", VERB, str(path), str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as verb:
        assert verb.stdout is not None
        program = os.pidfd_open(int(verb.stdout.readline()))
        verb.kill()
        verb.wait()
    with pytest.raises(LockError, match="^test "), lock.hold(path, verb="next"):
        pass
    with lock.hold(path, verb="next", wait=True):
        assert select.select([program], [], [], 0)[0]
    os.close(program)
