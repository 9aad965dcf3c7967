"""`nox -s upstream` without a test run: what it prints, lists and refuses (runs: tests/proof)."""

import io
from pathlib import Path

import pytest

from tests.small.world import Ended, World
from workspace.checks import upstream as upstream_module
from workspace.checks.upstream_selection import Decision, Reach, Reached
from workspace.core import settings
from workspace.core.console import Console, RunLog
from workspace.machine.machine import Machine


def upstream(world: World, *args: str) -> Ended:
    return world.session("upstream", *args)


def test_nothing_built_is_an_error_that_names_the_command_and_leaves_nothing(world: World) -> None:
    before = world.listing()
    ended = upstream(world)
    assert "hint: ./scripts/inv bootstrap" in ended.err
    assert "environment missing" in ended.error(8)
    assert "vendor/vllm is" in upstream(world, "--list").error(3)
    assert world.listing() == before


def test_unchanged_tree_is_reported_with_the_command_for_chosen_tests(built: World) -> None:
    built.git("reset", "--hard", "--quiet", "HEAD~1")
    ended = upstream(built, "--list")
    assert ended.code == 0, ended.output
    assert "vendor/vllm is the same as v0.31.0" in ended.err
    assert "--all-of" in ended.err
    assert ended.out == ""


def test_list_gives_each_file_a_decision_with_its_reason_and_writes_nothing(built: World) -> None:
    tests = built.layout.vllm / "tests"
    tests.mkdir()
    (tests / "test_version.py").write_text("import pytest\npytestmark = pytest.mark.cpu_test\n")
    (tests / "test_envs.py").write_text("")
    before = built.listing()
    ended = upstream(built, "--list")
    assert ended.code == 0, ended.output
    lines = [line.split(maxsplit=2) for line in ended.out.splitlines()]
    assert [
        "run",
        "tests/test_version.py",
        "was changed itself; the tests that upstream marks cpu_test",
    ] in lines
    assert [
        "skip",
        "tests/test_envs.py",
        "was changed itself; it has no cpu_test and no rule in reach.toml; --try-all runs it",
    ] in lines
    assert ["none", "setup.py"] in [line[:2] for line in lines]
    named = upstream(
        built, "--list", "--all-of", "vllm/envs.py", "vendor/vllm/tests/test_version.py"
    ).out.splitlines()
    assert {line.split()[1] for line in named} == {"tests/test_envs.py", "tests/test_version.py"}
    assert built.listing() == before


def test_change_that_reaches_no_test_is_no_failure_and_is_named(built: World) -> None:
    ended = upstream(built)
    assert ended.code == 0, ended.output
    assert "reaches no test: the install's stamp covers it" in ended.err
    assert "reaches none of upstream's tests" in ended.err


@pytest.mark.parametrize("path", ["vllm/no_such.py", "../../README.md"])
def test_path_that_is_not_in_the_tree_is_refused(built: World, path: str) -> None:
    assert f"--all-of {path}: there is no such path in vendor/vllm" in upstream(
        built, "--list", "--all-of", path
    ).error(2)


def test_bad_flag_is_a_usage_error(built: World) -> None:
    for args in (("--timeout-s", "nan"), ("--jsn", "x"), ("-k", "x"), ("--all-of",)):
        ended = upstream(built, *args)
        assert ended.code == 2
        assert "Traceback" not in ended.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_run_of_pytest_shows_the_seconds_of_the_last_one_and_keeps_its_own(built: World) -> None:
    layout = built.layout
    (layout.state / upstream_module.RECORD).write_text('{"steps": {"tests (whole)": 41.4}}')
    (layout.vllm / "tests").mkdir(exist_ok=True)
    (layout.vllm / "tests" / "test_mine.py").write_text("def test_mine():\n    pass\n")
    # The tool environment has no pytest-timeout: this plugin accepts its option.
    plain = "def pytest_addoption(parser):\n    parser.addoption('--timeout')\n"
    (layout.vllm / "tests" / "conftest.py").write_text(plain)
    machine = Machine(layout, settings.load(layout, environ=built.env))
    console = Console(out=io.StringIO(), err=Terminal())
    site = Path(pytest.__file__).parents[1]
    reached = Reach((Reached("tests/test_mine.py", "changed"),), ())
    decisions = {"tests/test_mine.py": Decision("whole", "it is new")}
    selection = upstream_module.Selection("", (), (), reached, decisions)
    with RunLog(console, layout.logs, verb="upstream") as run_log:
        result = upstream_module.run_tests(
            machine, selection, upstream_module.UpstreamOptions(), site, run_log=run_log
        )
    assert "last time 41 s" in console._err.getvalue()  # type: ignore[attr-defined]
    assert result.count == 1
    assert 0 < result.steps["tests (whole)"] < 60
