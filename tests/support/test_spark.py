"""nox -s spark in a small clone: its plan, its parts, its record and page, and what stops it."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.bump.conftest import judge_at_once
from tests.small.materials import Materials, git
from tests.small.world import Ended, World, make_world
from tests.support.test_perf import tools
from workspace.bench import results
from workspace.compile import costs
from workspace.core import settings
from workspace.core.errors import ToolchainError
from workspace.core.paths import Layout
from workspace.machine.machine import Machine
from workspace.support import spark, spark_parts
from workspace.support.spark_parts import NAMES, PARTS, Figures, Need, Part, Trial, Watch

SECONDS = 120.0


@pytest.fixture
def clone(materials: Materials, tmp_path: Path) -> Iterator[World]:
    """A clone that its user has not built, with a smoke that gives verdicts at once."""
    made = make_world(materials, tmp_path / "spark")
    judge_at_once(made.layout.probes)
    git(made.root, "commit", "--quiet", "--all", "-m", "A smoke for the small world")
    tools(made)
    yield made
    made.end()


def started(world: World, *args: str) -> "subprocess.Popen[str]":
    argv = [tools(world), "-m", "workspace.cli.sessions", "spark", *args]
    child = subprocess.Popen(
        argv,
        env=world.env,
        cwd=world.root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    world.started.append(child)
    return child


def session(world: World, *args: str) -> Ended:
    child = started(world, *args)
    out, err = child.communicate(timeout=SECONDS)
    return Ended(child.returncode, out, err)


def followed(world: World, ended: Ended, *more: str) -> Ended:
    """Run the command of the last hint, with `more` arguments that keep it short."""
    hint = [line for line in ended.err.splitlines() if line.startswith("hint: ")][-1]
    argv = shlex.split(hint.removeprefix("hint: ").partition("    ")[0])
    assert argv[:3] == ["./scripts/nox", "-s", "spark"]
    return session(world, *argv[4:], *more)


def folder(world: World) -> Path:
    """The one folder of records."""
    (found,) = (world.layout.results / "spark").glob("*-cores-??????")
    return found


def record(world: World) -> dict[str, dict[str, dict[str, object]]]:
    return json.loads((folder(world) / "record.json").read_text())


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def in_clone(world: World) -> list[psutil.Process]:
    """The processes that run in the clone of the acceptance."""
    found = []
    for one in psutil.process_iter():
        try:
            if Path(one.cwd()).is_relative_to(world.layout.state / "spark"):
                found.append(one)
        except (psutil.Error, OSError):
            continue
    return found


def test_plan_has_a_row_for_each_part_and_changes_nothing(clone: World) -> None:
    before = clone.listing()
    ended = session(clone, "--plan", "--without", "bench", "--memory", "1")
    assert ended.code == 0, ended.output
    rows = {line.split()[1]: line for line in ended.out.splitlines()}
    assert tuple(rows) == NAMES
    assert rows["doctor"].startswith("missing")
    assert "about 20 s, 0.2 GiB of disk, 1 GiB of memory" in rows["doctor"]
    assert rows["bench"].startswith("skipped")
    assert "left out" in rows["bench"]
    assert "needs 8 GiB of memory, 1.0 may be taken" in rows["full"]
    after = clone.listing()
    assert {path for path in before.keys() ^ after.keys() if "__pycache__" not in path} == set()


def test_nothing_is_started_without_a_yes_and_the_hint_leads_on(clone: World) -> None:
    ended = session(clone, "--only", "doctor")
    assert "nothing was started" in ended.error(2)
    assert "1 part: about 20 s" in ended.err
    assert not clone.layout.results.exists()
    assert not (clone.layout.state / "spark").exists()
    assert followed(clone, ended, "--only", "doctor").code == 0
    assert record(clone)["parts"]["doctor"]["result"] == "passed"


def test_misuse_is_refused_with_the_parts(clone: World) -> None:
    ended = session(clone, "--only", "doctr")
    assert ended.code == 2
    assert "doctor" in ended.err


def test_parts_pass_in_a_clone_of_their_own_and_page_and_archive_are_masked(clone: World) -> None:
    before = {path: fact for path, fact in clone.listing().items() if path.startswith("vendor")}
    user = "quentinxavier"
    clone.env["USER"] = user
    parts = ("doctor", "bootstrap", "quick", "kernel", "rollback")
    others = [f"--without={name}" for name in NAMES if name not in parts]
    ended = session(clone, "--yes", *others)
    assert ended.code == 0, ended.output
    found = record(clone)["parts"]
    assert {name: one["result"] for name, one in found.items()} == dict.fromkeys(parts, "passed")
    page = (folder(clone) / "page.md").read_text()
    first = page.splitlines()[0]
    assert first.startswith("# Acceptance on a machine that is not a GB10: ")
    assert "no GPU" in first
    for name in parts:
        assert f"| {name}: " in page
        assert f"## {name}\n" in page
    assert "| bench: the default model | not run |" in page
    assert "57.5, 107.9, 218.5 and 318.7 tok/s | kubis.ai, March 2026 | not measured |" in page
    assert str(clone.root) not in page
    with tarfile.open(ended.out.strip()) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        members = [archive.extractfile(name) for name in archive.getnames()]
        text = "".join(one.read().decode() for one in members if one)
    assert {"spark/page.md", "spark/record.json", "spark/output.log", "status.json"} <= names
    assert str(clone.root) not in text
    assert user not in text
    # The clone is gone, and nothing of the user's has changed.
    assert not (clone.layout.state / "spark" / "clone").exists()
    assert not clone.layout.environment.exists()
    after = {path: fact for path, fact in clone.listing().items() if path.startswith("vendor")}
    assert after == before
    require_cost_table(clone)


def require_cost_table(clone: World) -> None:
    """Require a table that a rebuild reads in its place; that of another kind is refused."""
    table = folder(clone) / costs.own_table().name
    entries = {(one.target, Path(one.source).name) for one in costs.read_table(table)}
    assert ("_C", "answer.c") in entries
    assert f"Put it at `workspace/compile/{table.name}`" in (folder(clone) / "page.md").read_text()
    shutil.copy(table, clone.root / "workspace" / "compile")
    assert clone.bootstrap().code == 0
    with (clone.layout.vllm / "csrc" / "cpu" / "answer.c").open("a") as file:
        file.write("// an edit\n")
    assert clone.run("rebuild", "--plan").code == 0
    # The table of another kind of machine, put in as that of this one.
    other = clone.root / "workspace" / "compile" / table.name
    other.write_text(other.read_text().replace(costs.machine_kind(), "riscv64-3-cores"))
    child = clone.start("rebuild")
    out, err = child.communicate(timeout=SECONDS)
    sentence = Ended(child.returncode, out, err).error(7)
    assert "was measured on another machine: riscv64-3-cores" in sentence


def test_interrupt_leaves_no_process_and_names_what_is_kept(clone: World) -> None:
    child = started(clone, "--yes", "--only", "bootstrap")
    own = Layout(clone.layout.state / "spark" / "clone")
    wait_for((own.environment / "pyvenv.cfg").exists)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=SECONDS)
    assert child.returncode == 130
    assert "Traceback" not in err
    assert in_clone(clone) == []
    assert not clone.layout.environment.exists()
    assert record(clone)["parts"] == {}
    ended = followed(clone, Ended(130, "", err), "--yes", "--only", "doctor")
    assert ended.code == 0, ended.output


@pytest.mark.parametrize("field", ["machine", "pin"])
def test_record_of_another_machine_or_pin_is_refused_and_kept(clone: World, field: str) -> None:
    assert session(clone, "--yes", "--only", "doctor").code == 0
    place = folder(clone) / "record.json"
    document = json.loads(place.read_text())
    if field == "machine":
        document["machine"]["name"] = "nvidia-gb10-0abcde"
    else:
        document["pin"] = "v0.1.0"
    place.write_text(json.dumps(document))
    ended = session(clone, "--yes", "--only", "doctor")
    named = {"machine": "another machine: nvidia-gb10-0abcde", "pin": "another pin: v0.1.0"}
    assert named[field] in ended.error(2)
    assert json.loads(place.read_text()) == document
    assert followed(clone, ended, "--yes", "--only", "doctor").code == 0
    kept = [path for path in (clone.layout.results / "spark").iterdir() if path != place.parent]
    assert [json.loads((path / "record.json").read_text()) for path in kept] == [document]


def test_parts_without_memory_are_refused_before_anything_runs(clone: World) -> None:
    ended = session(clone, "--yes", "--only", "quick", "--memory", "1")
    assert "no part fits into the memory: bootstrap needs 4 GiB of memory" in ended.error(6)
    assert followed(clone, ended, "--memory", "1").code == 0
    assert not (clone.layout.state / "spark").exists()
    # With room for some, the others are lacking, and said to be.
    ended = session(clone, "--yes", "--only", "doctor", "--only", "bootstrap", "--memory", "1")
    assert ended.code == 0, ended.output
    assert record(clone)["parts"]["bootstrap"]["result"] == "lacking"
    assert "not on this machine: needs 4 GiB of memory" in (folder(clone) / "page.md").read_text()


def acceptance(world: World) -> spark.Acceptance:
    loaded = settings.load(world.layout)
    return spark._begin(Machine(world.layout, loaded), spark.SparkOptions())


def test_part_whose_command_exits_with_6_is_lacking_on_this_machine(clone: World) -> None:
    def work(trial: Trial) -> Figures:
        return {"of a clone without a build": trial.inv("serve", "tiny", "--dry-run").out}

    own, need = acceptance(clone), Need(1, 0, 0)
    own.trial.folder.mkdir(parents=True)
    with Watch(own.trial) as watch:
        found = spark._judged(own, Part("serve", "a server", need, need, work), watch)
    sentence = (
        "inv serve tiny --dry-run exited with 6: no command line can be read from vendor/vllm"
    )
    assert found == ("lacking", sentence, "./scripts/inv bootstrap", {})


def test_disk_that_is_too_small_is_refused_with_figures(
    clone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spark.hardware, "free_gib", lambda path: 3.5)
    with pytest.raises(ToolchainError, match=r"of disk, and 2\.5 may be taken") as raised:
        spark._require_room(acceptance(clone), PARTS)
    assert raised.value.hint
    assert raised.value.hint.startswith("df -h ")


def test_first_line_of_a_gb10_names_it_and_that_of_another_gpu_what_it_is(clone: World) -> None:
    own = acceptance(clone)
    titles = []
    for name in ("NVIDIA GB10", "NVIDIA H200"):
        gpus = (results.Gpu(name, "12.1", "580.95"),)
        machine = replace(own.record.machine, gpus=gpus, architecture="aarch64")
        page = spark._page(replace(own, record=replace(own.record, machine=machine)))
        titles.append(page.splitlines()[0])
    assert titles == [
        "# Acceptance on NVIDIA GB10 (12.1), driver 580.95",
        "# Acceptance on a machine that is not a GB10: aarch64, NVIDIA H200 (12.1), driver 580.95",
    ]


def test_without_a_network_the_build_fails_with_its_cause_and_nothing_else_runs(
    clone: World,
) -> None:
    away = "http://127.0.0.1:9/simple"
    clone.env |= {"UV_DEFAULT_INDEX": away, "PIP_INDEX_URL": away, "TORCH_INDEX_URL": away}
    ended = session(clone, "--yes", "--only", "bootstrap", "--only", "quick")
    assert "1 part failed: bootstrap: inv bootstrap --no-first-token exited" in ended.error(7)
    assert set(record(clone)["parts"]) == {"bootstrap"}
    assert "| quick: the smoke, twice | not run |" in (folder(clone) / "page.md").read_text()


# A program of its own, because a part's bound counts, and ends, all children of its process.
WATCHED = """
import sys
from pathlib import Path

from workspace.core import process, settings
from workspace.core.paths import Layout
from workspace.support.perf_pairs import Context
from workspace.support.spark_parts import Trial, Watch

here = Layout(Path(sys.argv[1]))
context = Context(here, settings.load(here), here.root)
own = Layout(here.state / "spark" / "clone")
trial = Trial(context, own, here.root, "cpu", float(sys.argv[2]), is_unified=False, model="tiny")
code = "import time; held = bytearray(600 << 20); time.sleep(float('" + sys.argv[3] + "'))"
with Watch(trial) as watch:
    done = process.capture([sys.executable, "-c", code], env={"PATH": "/usr/bin:/bin"})
print(done.returncode, watch.peak_gib > 0.4, watch.breach)
"""


@pytest.mark.parametrize(
    ("bound", "seconds", "printed"),
    [
        ("0.4", "300", r"-\d+ True it held 0\.\d GiB, more than its 0\.4\n"),
        ("20", "2", "0 True \n"),
    ],
)
def test_part_that_holds_more_than_its_bound_is_ended(
    clone: World, bound: str, seconds: str, printed: str
) -> None:
    argv = [tools(clone), "-c", WATCHED, str(clone.root), bound, seconds]
    done = subprocess.run(
        argv,
        env=clone.env,
        cwd=clone.root,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert re.fullmatch(printed, done.stdout), done.stderr


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_each_part_says_what_it_takes(part: spark_parts.Part) -> None:
    assert NAMES.count(part.name) == 1
    for device in ("cpu", "cuda"):
        need = part.need(device)
        assert need.seconds > 0
        assert need.memory_gib >= 1
    # A page of Markdown has it in a cell.
    assert "|" not in part.title
