"""A run of pytest over a small tree, started as upstream_trial.py starts it."""

import io
import sys
import sysconfig
from pathlib import Path

from workspace.checks import upstream_trial
from workspace.checks.upstream_trial import Outcome
from workspace.core.console import Console, RunLog


def place(folder: Path, tests: dict[str, str], config: str = "") -> upstream_trial.Place:
    for name, text in tests.items():
        path = folder / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (path.parent / "__init__.py").touch()
    (folder / "pyproject.toml").write_text(config)
    variables = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "PYTHONPATH": sysconfig.get_path("purelib"),
    }
    return upstream_trial.Place(folder, Path(sys.executable), variables, folder / "chosen.txt")


def run(
    folder: Path,
    tests: dict[str, str],
    *pytest_args: str,
    timeout_s: float = 60.0,
    config: str = "[tool.pytest.ini_options]\n",
) -> dict[str, Outcome]:
    with RunLog(
        Console(out=io.StringIO(), err=io.StringIO()), folder / "logs", verb="upstream"
    ) as run_log:
        files = [f"tests/{name}" for name in tests if name.rpartition("/")[2].startswith("test_")]
        # The tool environment has no pytest-timeout: this plugin accepts its option.
        plain = "def pytest_addoption(parser):\n    parser.addoption('--timeout')\n"
        tests = {**tests, "conftest.py": plain + tests.get("conftest.py", "")}
        return {
            outcome.node: outcome
            for outcome in upstream_trial.run(
                place(folder, tests, config),
                files,
                pytest_args,
                timeout_s=timeout_s,
                run_log=run_log,
            )
        }
