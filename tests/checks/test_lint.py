"""`inv hook --lint` with a stand-in for pre-commit that passes, fails, corrects, or is broken."""

import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.small.materials import git
from tests.small.world import Ended, World
from workspace.checks.smoke import HOOK, LINT_CONFIG

# Exit codes as those of pre-commit (pre_commit/error_handler.py, commands/run.py).
PROGRAM = """#!@PYTHON@ -Es
import os, pathlib, sys
manner, (command, *rest) = os.environ.get("SKIP", ""), sys.argv[1:]
if command == "validate-config":
    sys.exit(1 if manner == "invalid" else 0)
pathlib.Path(os.environ["HOME"], "linted").write_text("\\n".join(rest))
if manner == "no network":
    print("An unexpected error has occurred: CalledProcessError: git fetch")
    sys.exit(3)
if manner == "fails":
    print("ruff check....Failed\\n- hook id: ruff-check\\ntypos....Passed")
    sys.exit(1)
if manner == "corrects":
    pathlib.Path("vllm/new.py").write_text("corrected = 1\\n")
print("ruff check....Passed")
"""
NEW = "vllm/new.py"


@pytest.fixture
def changed(built: World) -> World:
    """A clone whose change against the pin is a patch, and one new file beside it."""
    for folder in (built.root, built.layout.vllm):
        place = git(folder, "rev-parse", "--absolute-git-dir").strip() + "/hooks"
        git(folder, "config", "core.hooksPath", place)
    (built.layout.vllm / LINT_CONFIG).write_text("repos: []\n")
    (built.layout.vllm / NEW).write_text("made = 1\n")
    return built


def install(world: World) -> None:
    program = world.layout.environment / "bin" / "pre-commit"
    program.write_text(PROGRAM.replace("@PYTHON@", sys.executable))
    program.chmod(0o755)


def lint(world: World, manner: str = "", **env: str) -> Ended:
    """Run the gate; the smoke, which comes last, has nothing to run in the small world."""
    (Path(world.env["HOME"]) / "linted").unlink(missing_ok=True)
    return world.run("hook", "--run", "--lint", env={"SKIP": manner, **env})


def linted(world: World) -> list[str]:
    return (Path(world.env["HOME"]) / "linted").read_text().splitlines()


def test_changed_files_are_checked_and_those_of_the_pin_are_not(changed: World) -> None:
    install(changed)
    ended = lint(changed)
    assert re.search(r"^done +pre-commit +\d+ files? of the change", ended.err, re.MULTILINE)
    options, files = linted(changed)[:2], linted(changed)[2:]
    assert options == ["--color=never", "--files"]
    assert NEW in files
    assert "vllm/__init__.py" not in files
    # Without the flag nothing of it runs.
    assert not re.search(r"^\w+ +pre-commit ", changed.run("hook", "--run").err, re.MULTILINE)


def test_absent_pre_commit_is_a_row_and_its_hint_installs_one(
    changed: World, tmp_path: Path
) -> None:
    ended = lint(changed)
    assert "warn     pre-commit    it is not installed" in ended.err
    command = re.search(r"\$ (uv tool install pre-commit)", ended.err)
    assert command
    wheel = tmp_path / "pre_commit-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("standin.py", "def main():\n    print('stand-in')\n")
        info = "pre_commit-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: pre-commit\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(
            f"{info}/entry_points.txt", "[console_scripts]\npre-commit = standin:main\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    own = {
        "UV_TOOL_DIR": str(tmp_path / "tools"),
        "UV_TOOL_BIN_DIR": str(tmp_path / "bin"),
        "UV_FIND_LINKS": str(tmp_path),
        "UV_NO_INDEX": "1",
        "UV_PYTHON": sys.executable,
    }
    subprocess.run(shlex.split(command[1]), env=os.environ | changed.env | own, check=True)
    path = f"{tmp_path / 'bin'}:{changed.env['PATH']}"
    assert "not installed" not in lint(changed, PATH=path).err


def test_failing_check_stops_the_push_and_the_same_gate_passes_afterwards(changed: World) -> None:
    install(changed)
    ended = lint(changed, "fails")
    assert "vLLM's pre-commit fails on" in ended.error(1)
    assert "ruff check....Failed" in ended.err
    assert "typos....Passed" not in ended.err
    hint = re.search(r"hint: \./scripts/inv (hook --run --lint)", ended.err)
    assert hint
    assert "pre-commit fails" not in changed.run(*hint[1].split()).err


def test_new_file_that_a_check_corrected_is_named_though_pre_commit_passed(
    changed: World,
) -> None:
    install(changed)
    assert lint(changed, "corrects").error(1).endswith(f"of the change; it changed {NEW}")


@pytest.mark.parametrize("manner", ["no network", "invalid"])
def test_broken_pre_commit_is_not_taken_for_a_fault_of_the_change(
    changed: World, manner: str
) -> None:
    install(changed)
    ended = lint(changed, manner)
    assert "vLLM's pre-commit cannot run: " in ended.error(6)
    hint = re.search(r"hint: \./scripts/inv (hook) ", ended.err)
    assert hint
    assert changed.run(hint[1]).code == 0
    script = changed.root / ".git" / "hooks" / HOOK
    assert "--lint" not in script.read_text()


def test_gate_that_is_installed_with_the_flag_has_it(changed: World) -> None:
    ended = changed.run("hook", "--lint")
    assert ended.code == 0, ended.output
    assert "warn     pre-commit    it is not installed" in ended.err
    script = changed.root / ".git" / "hooks" / HOOK
    assert "exec ./scripts/inv hook --run --lint </dev/null" in script.read_text()
    again = changed.run("hook", "--lint")
    assert [line.split()[0] for line in again.err.splitlines()[:2]] == ["ok", "ok"]
