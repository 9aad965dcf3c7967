"""nox: its sessions end as their child ends, see nothing of the caller's Python, and wait for a
child that clears up.
"""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.clone import HOSTILE, Clone, booby_trap, make_clone


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone with its tool environment for tests that put a smoke check of their own into it."""
    clone = make_clone(tmp_path_factory.mktemp("judged"))
    assert clone.inv("--list").returncode == 0
    return clone


def session(
    clone: Clone, *args: str, body: str = "", **more: str
) -> "subprocess.CompletedProcess[str]":
    """Run nox in the clone with `body` in place of the smoke, and nothing in place of the other
    sessions.
    """
    text = f"import sys\nif sys.argv.pop(1) != 'smoke':\n    sys.exit()\n{body}\n"
    (clone.root / "workspace" / "cli" / "sessions.py").write_text(text)
    return clone.run(clone.root / "scripts" / "nox", *args, **more)


def test_single_session_exits_with_the_code_of_its_child(judged: Clone) -> None:
    result = session(
        judged, "-s", "smoke", "--", "a b", body="import sys; print(sys.argv[1:]); sys.exit(8)"
    )
    assert (result.returncode, result.stdout) == (8, "['a b']\n")
    assert "Traceback" not in result.stderr
    assert (
        session(judged, "-s", "smoke", body="import os; os.kill(os.getpid(), 9)").returncode == 137
    )
    assert session(judged, "-s", "smoke", body="").returncode == 0


def test_session_runs_in_the_folder_in_which_it_was_typed_and_imports_nothing_there(
    judged: Clone, tmp_path: Path
) -> None:
    trap = booby_trap(tmp_path / "trap")
    body = "import json, os, workspace; print([os.getcwd(), workspace.__file__])"
    typed = session(judged, "-s", "smoke", body=body, cwd=trap, PWD="/elsewhere")
    package = judged.root / "workspace" / "__init__.py"
    assert typed.stdout == f"{[str(trap), str(package)]}\n"
    assert session(judged, "-s", "smoke", body=body).returncode == 0


def test_path_for_a_tool_of_nox_means_the_folder_in_which_it_was_typed(
    judged: Clone, tmp_path: Path
) -> None:
    (tmp_path / "test_own.py").touch()
    nox = judged.root / "scripts" / "nox"
    shown = judged.run(nox, "-s", "tests", "--", "test_own.py::test_a", "-q", cwd=tmp_path).stderr
    assert f"pytest {tmp_path}/test_own.py::test_a -q" in shown


def test_help_of_the_smoke_records_no_good_state(judged: Clone) -> None:
    assert "record-good" in session(judged, "-s", "smoke", body="").stderr
    assert "record-good" not in session(judged, "-s", "smoke", "--", "--help", body="").stderr


def test_of_several_sessions_all_are_run_and_nox_exits_1(judged: Clone) -> None:
    result = session(judged, "-s", "smoke", "tests", body="import sys; sys.exit(8)")
    assert result.returncode == 1
    assert "Session smoke failed." in result.stderr
    assert "Running session tests" in result.stderr


def test_session_does_not_see_the_callers_python(judged: Clone, tmp_path: Path) -> None:
    trap = booby_trap(tmp_path / "trap")
    body = (
        "import os; print(sorted(name for name in os.environ if name.startswith(('PYTHON',"
        " 'VIRTUAL'))))"
    )
    assert (
        session(judged, "-s", "smoke", body=body, PYTHONPATH=str(trap), **HOSTILE).stdout == "[]\n"
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ended_nox_waits_for_its_child_to_clear_up(
    judged: Clone, number: signal.Signals, code: int
) -> None:
    # Longer than the 0.3 s after which nox would kill it by default.
    body = (
        "import os, signal, sys, time\ndef end(number, _):\n    time.sleep(0.6)\n    os.write(1,"
        " b'cleared up\\n')\n    sys.exit(128 + number)\nsignal.signal(signal.SIGINT,"
        " end)\nsignal.signal(signal.SIGTERM, end)\nprint('here', flush=True)\nsignal.pause()\n"
    )
    session(judged, "--list", body=body)
    argv = [judged.root / "scripts" / "nox", "-s", "smoke"]
    with subprocess.Popen(
        argv,
        env=judged.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "here\n"
        if number == signal.SIGINT:
            os.killpg(running.pid, number)
        else:
            running.send_signal(number)
        rest, talk = running.communicate(timeout=9)
    assert (rest, running.returncode) == ("cleared up\n", code), talk
