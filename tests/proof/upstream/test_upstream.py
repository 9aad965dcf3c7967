"""`nox -s upstream` on a small clone: a real pytest in the built environment over small tests."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.small.index import Fault
from tests.small.world import Ended, World
from workspace.checks import upstream_trial

RECORD = "upstream.json"
# Long enough for a test to be found running, and for no test to wait for.
HANGS = (
    "import time\n\ndef answer():\n    open({flag!r}, 'w').close()\n    time.sleep(300)\n    return"
    " 42\n"
)
WAIT_S = 60.0


def start(world: World, *args: str | Path, **env: str) -> "subprocess.Popen[str]":
    argv = [
        sys.executable,
        "-Es",
        "-B",
        "-m",
        "workspace.cli.sessions",
        "upstream",
        *(("--json", "-") if "--json" not in args else ()),
        *map(str, args),
    ]
    child = subprocess.Popen(
        argv,
        cwd=world.root,
        env=world.env | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    world.started.append(child)
    return child


def finish(child: "subprocess.Popen[str]") -> Ended:
    out, err = child.communicate(timeout=120)
    return Ended(child.returncode, out, err)


def upstream(world: World, *args: str | Path, **env: str) -> Ended:
    return finish(start(world, *args, **env))


def edit(world: World, text: str, path: str = "vllm/alpha.py") -> None:
    (world.layout.vllm / path).write_text(text)


def checks(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in record["checks"]}


def until(is_so: Any) -> None:
    end = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def processes(world: World) -> list[str]:
    """Return the command lines of processes in the clone or in its environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line, cwd = (
                (path / "cmdline").read_bytes().decode(errors="replace"),
                os.readlink(path / "cwd"),
            )
        except OSError:
            continue
        if str(world.root) in line or cwd.startswith(str(world.root)):
            found.append(line.replace("\0", " "))
    return found


@pytest.fixture
def hanging(built: World, tmp_path: Path) -> "subprocess.Popen[str]":
    """A run whose first test hangs and has begun."""
    edit(built, HANGS.format(flag=str(tmp_path / "flag")))
    child = start(built)
    until(lambda: (tmp_path / "flag").exists() or child.poll() is not None)
    assert child.poll() is None, finish(child).output
    return child


def test_edit_that_breaks_a_test_fails_and_what_fails_on_the_pin_too_does_not_count(
    built: World, tmp_path: Path
) -> None:
    edit(built, "def answer():\n    return 41\n")
    ended = upstream(built, "--json", tmp_path / "deep" / "er" / "record.json")
    message = "error: 1 of 3 of upstream's tests failed; on the pin they pass or do not exist"
    assert ended.error(8) == message
    assert "test_alpha.py::test_answer: assert 41 == 42" in ended.err
    assert "test_old_wound" not in ended.err.partition("error: ")[2]
    assert ended.out == ""
    record = json.loads((tmp_path / "deep" / "er" / "record.json").read_bytes())
    assert record == json.loads((built.layout.state / RECORD).read_bytes())
    assert (record["verdict"], record["level"]) == ("fail", "upstream")
    assert record["tests"] == {"passed": 1, "failed": 1, "skipped": 0, "hub": 0, "pin": 1}
    assert "vllm/alpha.py" in record["changed"]
    assert len(record["dirty"]) == 64
    assert "1 fail on the pin too" in checks(record)["tests/test_alpha.py"]["evidence"]
    assert not (upstream_trial.needs_folder(built.layout) / "pin").exists()


def test_edit_that_breaks_nothing_passes_and_the_second_run_asks_no_index(built: World) -> None:
    edit(built, "def answer():\n    return 6 * 7\n")
    for is_requested in (True, False):
        built.index.requests.clear()
        ended = upstream(built)
        assert ended.code == 0, ended.output
        assert "upstream's tests: 2 passed, 1 fail on the pin too" in ended.err
        assert bool(built.index.requests) is is_requested
    assert checks(json.loads(ended.out))["tests/test_alpha.py"]["verdict"] == "pass"


def test_environment_gets_none_of_what_the_tests_need(built: World) -> None:
    before = sorted(
        path.name for path in built.layout.environment.glob("lib/python*/site-packages/*")
    )
    edit(built, "def answer():\n    return 6 * 7\n")
    assert upstream(built).code == 0
    assert (
        sorted(path.name for path in built.layout.environment.glob("lib/python*/site-packages/*"))
        == before
    )
    (site,) = upstream_trial.needs_folder(built.layout).glob("site-*")
    assert (site / "pytest_timeout.py").is_file()
    # What .vllm has is barred.
    assert not (site / "packaging").exists()


def test_change_that_makes_a_test_ask_the_hub_fails_but_a_test_that_always_did_passes(
    built: World,
) -> None:
    assert upstream(built, "--all-of", "tests/test_hub.py").code == 0
    asks = (
        "def ask():\n    from huggingface_hub.errors import OfflineModeIsEnabled\n    raise"
        " OfflineModeIsEnabled('x')\n"
    )
    edit(built, asks, "vllm/hub.py")
    ended = upstream(built)
    assert ended.error(8).startswith("error: 1 of 1 of upstream's tests failed")
    assert "test_hub.py::test_tokenizer" in ended.err
    assert json.loads(ended.out)["tests"] == {
        "passed": 0,
        "failed": 1,
        "skipped": 0,
        "hub": 1,
        "pin": 0,
    }


def test_change_whose_import_kills_the_process_is_no_run_without_tests(built: World) -> None:
    edit(built, "import os\nos._exit(3)\n")
    assert "the process died while tests/test_alpha.py was collected" in upstream(built).error(8)
    assert not (built.layout.state / RECORD).exists()


def test_test_of_a_gpu_is_skipped_with_the_reason_until_it_is_tried(built: World) -> None:
    edit(built, "X = 1\n", "vllm/beta.py")
    ended = upstream(built)
    assert ended.code == 0, ended.output
    assert "1 of 1 files not run here" in ended.err
    assert json.loads(ended.out)["verdict"] == "skipped"
    tried = upstream(built, "--try-all")
    assert tried.code == 0, tried.output
    assert json.loads(tried.out)["tests"] == {
        "passed": 0,
        "failed": 0,
        "skipped": 0,
        "hub": 0,
        "pin": 1,
    }


@pytest.mark.parametrize(
    ("args", "passed"),
    [(("-k", "whole"), 1), (("-k", "no_such_test"), 0), (("-x", "-k", "answer or whole"), 2)],
)
def test_arguments_after_the_second_dashes_go_to_pytest(
    built: World, args: Sequence[str], passed: int
) -> None:
    edit(built, "def answer():\n    return 6 * 7\n")
    ended = upstream(built, "--", *args)
    assert ended.code == 0, ended.output
    assert json.loads(ended.out)["tests"]["passed"] == passed


def test_argument_that_pytest_rejects_is_a_sentence(built: World) -> None:
    edit(built, "def answer():\n    return 6 * 7\n")
    assert "exited with 4" in upstream(built, "--", "--nonsense").error(8)


def test_run_that_takes_too_long_is_ended_with_all_its_processes(
    built: World, tmp_path: Path
) -> None:
    edit(built, HANGS.format(flag=str(tmp_path / "flag")))
    ended = upstream(built, "--timeout-s", "4")
    assert "had not ended after 4 s and were ended" in ended.error(8)
    assert processes(built) == []
    assert not (built.layout.state / RECORD).exists()


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_leaves_no_process_and_no_record(
    built: World, hanging: "subprocess.Popen[str]", signal_number: int, code: int
) -> None:
    status = built.git("status", "--porcelain")
    os.kill(hanging.pid, signal_number)
    ended = finish(hanging)
    assert ended.code == code, ended.output
    assert "interrupted" in ended.err
    assert processes(built) == []
    assert built.git("status", "--porcelain") == status
    assert not (built.layout.state / RECORD).exists()
    edit(built, "def answer():\n    return 6 * 7\n")
    assert upstream(built).code == 0


def test_second_run_beside_the_first_is_refused_by_the_lock(
    built: World, hanging: "subprocess.Popen[str]"
) -> None:
    ended = upstream(built)
    assert "nox -s upstream" in ended.error(12)
    assert hanging.poll() is None
    os.kill(hanging.pid, signal.SIGINT)
    assert finish(hanging).code == 130


def test_tree_that_is_changed_meanwhile_gets_no_verdict(built: World, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    edit(
        built,
        HANGS.format(flag=str(flag)).replace(
            "time.sleep(300)",
            f"\n    while __import__('os').path.exists({str(flag)!r}): time.sleep(0.05)",
        ),
    )
    child = start(built, "--", "-k", "test_answer")
    until(flag.exists)
    edit(built, "X = 2\n", "vllm/beta.py")
    flag.unlink()
    assert "vendor/vllm changed while the tests ran" in finish(child).error(8)
    assert not (built.layout.state / RECORD).exists()


def test_index_out_of_reach_is_a_sentence_and_leftovers_of_a_killed_install_are_removed(
    built: World,
) -> None:
    edit(built, "def answer():\n    return 6 * 7\n")
    former = upstream_trial.needs_folder(built.layout) / "site-0123456789ab"
    for folder in (former, former.with_name("site-ba9876543210.new")):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    shutil.rmtree(built.materials.folder / "uv-cache")
    built.index.faults["pytest"] = Fault(status=500)
    assert "the package index could not be reached" in upstream(built).error(11)
    # A tree that goes back to these requirements needs no index.
    assert former.is_dir()
    built.index.faults.clear()
    assert upstream(built).code == 0
    (site,) = upstream_trial.needs_folder(built.layout).glob("site-*")
    assert site != former
    assert (site / "pytest" / "__init__.py").is_file()
