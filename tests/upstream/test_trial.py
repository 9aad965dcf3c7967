"""A real pytest over a small tree: failures, crashes and hangs are named, and the pin has its word."""

import sys
import sysconfig
import time
from pathlib import Path

import pytest

from workspace.core.console import Console
from workspace.core.errors import SmokeError
from workspace.core.journal import Journal
from workspace.upstream import pinned, trial, verdict
from workspace.upstream.reach import Reached
from workspace.upstream.runnable import Decision
from workspace.upstream.trial import Outcome

TESTS = {
    "test_a.py": "import os, pytest\n"
    "def test_fine(): pass\n"
    "def test_wrong(): assert 1 == 2\n"
    "@pytest.mark.parametrize('x', ['a/b::c'])\n"
    "def test_odd(x): assert x == 'y'\n"
    "class TestIn:\n    def test_skip(self): pytest.skip('no GPU here')\n"
    "def test_hub(): raise OSError('We couldn\\'t connect to the hub')\n",
    "sub/test_broken.py": "import there_is_no_such_module\n",
    "sub/test_dies.py": "import os\ndef test_dies(): os._exit(3)\ndef test_after(): pass\n",
}


def place(folder: Path, tests: dict[str, str]) -> trial.Place:
    for name, text in tests.items():
        path = folder / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (path.parent / "__init__.py").touch()
    (folder / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    variables = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": sysconfig.get_path("purelib")}
    return trial.Place(folder, Path(sys.executable), variables, folder / "chosen.txt")


def run(folder: Path, tests: dict[str, str], *words: str, timeout_s: float = 60.0) -> dict[str, Outcome]:
    with Journal(Console(), folder / "logs", verb="upstream") as journal:
        files = [f"tests/{name}" for name in tests]
        # The tool environment has no pytest-timeout: the option is made known, and does nothing.
        (folder / "tests").mkdir(exist_ok=True)
        (folder / "tests" / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--timeout')\n")
        return {one.node: one for one in trial.run(place(folder, tests), files, words, timeout_s=timeout_s, journal=journal)}


def test_every_test_has_its_outcome_and_one_that_kills_its_process_ends_no_other(tmp_path: Path) -> None:
    found = run(tmp_path, TESTS)
    assert {node: one.state for node, one in found.items()} == {
        "tests/test_a.py::test_fine": "passed",
        "tests/test_a.py::test_wrong": "failed",
        "tests/test_a.py::test_odd[a/b::c]": "failed",
        "tests/test_a.py::TestIn::test_skip": "skipped",
        "tests/test_a.py::test_hub": "failed",
        "tests/sub/test_broken.py": "failed",
        "tests/sub/test_dies.py::test_dies": "failed",
        "tests/sub/test_dies.py::test_after": "passed",
    }
    assert "there_is_no_such_module" in found["tests/sub/test_broken.py"].message
    assert "crashed" in found["tests/sub/test_dies.py::test_dies"].message
    assert verdict.wants_hub(found["tests/test_a.py::test_hub"])
    assert not verdict.wants_hub(found["tests/test_a.py::test_wrong"])


def test_what_hangs_is_ended_with_all_of_its_processes(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(SmokeError, match="had not ended after"):
        run(tmp_path, {"test_hangs.py": "import time\ntime.sleep(600)\n"}, timeout_s=1.5)
    assert time.monotonic() - started < 30
    named = str(tmp_path / "chosen.txt").encode()
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists() and named in path.read_bytes()]


def test_words_that_pytest_does_not_know_are_its_own_sentence(tmp_path: Path) -> None:
    with pytest.raises(SmokeError, match="exited with 4") as failed:
        run(tmp_path, {"test_a.py": ""}, "--nonsense")
    assert any("--nonsense" in line for line in failed.value.details)
    assert failed.value.hint


def outcome(name: str, state: str = "failed", message: str = "assert 1 == 2") -> Outcome:
    return Outcome(f"tests/test_a.py::{name}", "tests/test_a.py", state, message, 1.0)  # type: ignore[arg-type]


def test_failure_counts_only_where_the_pin_does_not_fail_as_well() -> None:
    outcomes = [outcome("test_own"), outcome("test_pin"), outcome("test_hub", message="OfflineModeIsEnabled: x"), outcome("test_fine", "passed", "")]
    there = [outcome("test_pin"), outcome("test_own", "passed", "")]
    found = verdict.sort(outcomes, there, is_online=False)
    (check,) = verdict.checks([Reached("tests/test_a.py", "mirrors vllm/a.py")], {"tests/test_a.py": Decision("whole", "")}, found)
    assert (check.verdict, check.meaning) == ("fail", "mirrors vllm/a.py")
    assert check.problems == ("test_a.py::test_own: assert 1 == 2",)
    assert "1 fail on the pin too" in check.evidence
    assert "1 need the hub" in check.evidence
    assert len(verdict.sort(outcomes, there, is_online=True).own) == 2


def test_file_that_is_not_run_is_skipped_and_says_why() -> None:
    (check,) = verdict.checks([Reached("tests/b.py", "x")], {"tests/b.py": Decision("not", "no GPU")}, verdict.sort([], [], is_online=False))
    assert (check.verdict, check.evidence) == ("skipped", "not run: no GPU")


def test_what_failed_is_asked_of_the_pin_by_name_as_a_node_that_is_not_there_would_end_the_run(tmp_path: Path) -> None:
    place(tmp_path, {"test_a.py": ""})
    new = Outcome("tests/test_new.py::test_x", "tests/test_new.py", "failed", "", 0.0)
    odd = outcome("TestIn::test_odd[a/b::c]")
    assert pinned.again([odd, outcome("test_b"), new], tmp_path) == (("tests/test_a.py",), ("-k", "test_odd or test_b or test_x"))
    uncollected = Outcome("tests/test_a.py", "tests/test_a.py", "failed", "", 0.0)
    assert pinned.again([uncollected, odd], tmp_path) == (("tests/test_a.py",), ())


def test_pin_is_not_asked_where_compiled_sources_differ() -> None:
    assert pinned.is_comparable(["vllm/a.py", "csrc_not.py"])
    assert not pinned.is_comparable(["vllm/a.py", "csrc/a.cu"])
