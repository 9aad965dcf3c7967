"""Runs over small trees that do not end as they should: none of them may count as a success."""

import time
from pathlib import Path

import pytest

from tests.checks.upstream.runs import run
from workspace.core.errors import SmokeError

STUMBLING = (
    "def pytest_sessionfinish(session):\n    if not hasattr(session.config, 'workerinput'): raise"
    " ValueError('a plugin stumbles')\n"
)


def test_what_hangs_is_ended_with_all_of_its_processes(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(SmokeError, match="had not ended after"):
        run(tmp_path, {"test_hangs.py": "import time\ntime.sleep(600)\n"}, timeout_s=1.5)
    assert time.monotonic() - started < 30
    named = str(tmp_path / "chosen.txt").encode()
    assert not [
        path
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.exists() and named in path.read_bytes()
    ]


def test_tests_that_were_lost_with_their_process_are_counted(tmp_path: Path) -> None:
    dies = (
        "import os, pytest\n@pytest.mark.parametrize('x', range(9))\ndef test_dies(x):"
        " os._exit(3)\n"
    )
    with pytest.raises(SmokeError, match="4 of 9 tests were not run"):
        run(tmp_path, {"test_dies.py": dies})


def test_pytest_that_fails_by_itself_is_no_success_of_what_had_passed(tmp_path: Path) -> None:
    with pytest.raises(SmokeError, match="exited with 1: ValueError: a plugin stumbles"):
        run(tmp_path, {"test_a.py": "def test_fine(): pass\n", "conftest.py": STUMBLING})


def test_tree_within_a_tree_that_pytest_knows_has_its_own_names(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    inner = tmp_path / "vendor" / "inner"
    (inner / "tests").mkdir(parents=True)
    found = run(inner, {"test_a.py": "def test_fine(): pass\n"}, config="")
    assert list(found) == ["tests/test_a.py::test_fine"]
