"""Run log: no file without a line, no secret anywhere."""

import io
import os
from pathlib import Path

import pytest

from workspace.core.console import KEPT_LOGS, Console, RunLog
from workspace.core.errors import SourceError


def run_log(folder: Path, *secrets: str) -> tuple[RunLog, io.StringIO]:
    talk = io.StringIO()
    return (
        RunLog(Console(out=io.StringIO(), err=talk), folder, verb="bootstrap", secrets=secrets),
        talk,
    )


def test_run_without_a_line_leaves_no_log(tmp_path: Path) -> None:
    with run_log(tmp_path / "logs")[0] as run:
        run.phase("source")
    assert run.path is None
    assert not (tmp_path / "logs").exists()


def test_phase_is_written_before_its_first_line_only(tmp_path: Path) -> None:
    with run_log(tmp_path)[0] as run:
        run.phase("empty")
        run.phase("source")
        run.line("one")
        run.line("two")
        assert run.path is not None
        lines = run.path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("== source · 20")
    assert lines[1:] == ["one", "two"]


def test_secrets_are_masked_on_screen_and_in_the_log(tmp_path: Path) -> None:
    run, talk = run_log(tmp_path, "hunter2", "")
    run.console.is_verbose = True
    with run:
        run.command("git clone https://me:hunter2@host/x")
        run.line("fatal: hunter2 refused")
        assert run.path is not None
        log = run.path.read_text(encoding="utf-8")
    assert log == "+ git clone https://me:****@host/x\nfatal: **** refused\n"
    assert talk.getvalue() == "+ git clone https://me:****@host/x\n"


def test_command_is_on_the_screen_only_if_the_console_is_verbose(tmp_path: Path) -> None:
    run, talk = run_log(tmp_path)
    with run:
        run.command("git fetch")
        assert run.path is not None
        assert run.path.read_text(encoding="utf-8") == "+ git fetch\n"
    assert talk.getvalue() == ""


def test_command_that_failed_is_in_the_error_with_secrets_masked(tmp_path: Path) -> None:
    run, talk = run_log(tmp_path, "hunter2")
    with run, pytest.raises(SourceError) as caught, run.running("git am hunter2"):
        raise SourceError("git am failed", details=("line 1",))
    assert caught.value.details == ("+ git am ****", "line 1")
    assert talk.getvalue() == ""


def test_old_logs_go_and_the_newest_stay(tmp_path: Path) -> None:
    for number in range(KEPT_LOGS + 5):
        (tmp_path / f"2000-{number:03}-bootstrap.log").touch()
    with run_log(tmp_path)[0] as run:
        run.line("new")
    logs = sorted(path.name for path in tmp_path.iterdir())
    assert len(logs) == KEPT_LOGS
    assert logs[0] == "2000-006-bootstrap.log"


def test_full_disk_is_an_error_with_the_name_of_the_log(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, run_log(tmp_path)[0] as run:
        run.line("fits")
        assert run.path is not None
        opened = next(
            int(link.name)
            for link in Path("/proc/self/fd").iterdir()
            if link.is_symlink() and link.resolve() == run.path.resolve()
        )
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, opened)
        os.close(full)
        run.line("does not")
    assert run.path is not None
    assert caught.value.filename == str(run.path)
