"""State files as the first edition wrote them: every one is read, and none is reported."""

import shutil
from pathlib import Path

import pytest

from workspace.bench import bisect_log
from workspace.bench.bisect_log import BisectLog, BisectOptions, Try
from workspace.bump import known_good, staging
from workspace.bump.known_good import KnownGood
from workspace.bump.staging import BumpStart
from workspace.compile import cmake, costs
from workspace.core import records
from workspace.core.paths import Layout
from workspace.install import stamp
from workspace.repo.git import worktree
from workspace.server import observation
from workspace.server.observation import Address, Ended
from workspace.server.process_tree import ProcessTree

FOLDER = Path(__file__).parent / "first_edition"


@pytest.fixture(autouse=True)
def _reports_nothing(capfd: pytest.CaptureFixture[str]):
    yield
    assert capfd.readouterr().err == ""


def placed(name: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(FOLDER / name, path)


def test_stamp_without_files_and_with_the_former_name_of_the_precompiled_wheel() -> None:
    found = stamp.read(FOLDER / "stamp.json")
    assert found is not None
    assert found.inputs["torch"] == "2.13.0"
    assert found.packages == {"numpy": "2.4.0"}
    assert found.libraries == (stamp.Library("vllm/_C.abi3.so", 15104, "a" * 64),)
    assert found.files == {}


def test_measured_costs() -> None:
    history = costs.History(FOLDER / "costs.json", setup="12.1a cuda 13.0")
    assert history.entries == (costs.Entry("_C", "csrc/a.cu", 12.5, 1.25),)
    assert history.warnings == ()


def test_configure() -> None:
    assert records.read(FOLDER / "configured.json", cmake.Record) == cmake.Record(
        inputs={"arch": "12.1a"},
        sources={"cutlass": "/x/v4"},
        read={"CMakeLists.txt": (1, 2, "f" * 64)},
        written={"vllm/gen.py": (3, 4, "e" * 64)},
        globs={"csrc/*.cu": ["csrc/a.cu"]},
        ninja=(5, 6, "d" * 64),
        not_built=["Not building FA3"],
    )


def test_bump_and_its_redo_log(tmp_path: Path) -> None:
    start = records.read(FOLDER / "begun.json", BumpStart)
    assert start == BumpStart("v0.32.0", "v0.32.0", "a" * 40, "b" * 40, "d" * 64, "c" * 40)
    log = staging.find_redo_log(FOLDER / "promoting.json")
    assert log is not None
    assert log.facts == {"name": "v0.31.0-abc"}


def test_known_good_state(tmp_path: Path) -> None:
    layout, name = Layout(tmp_path), "v0.31.0-abc"
    placed("good.json", known_good.folder(layout, name) / "good.json")
    assert known_good.read(layout, name) == KnownGood(
        name=name,
        tag="v0.31.0",
        head="a" * 40,
        base="b" * 40,
        tree="c" * 40,
        gitlink=None,
        recorded="2026-11-20T10:00:00+00:00",
        smoke="2026-11-20T09:00:00+00:00",
        inputs={"torch": "2.13.0"},
    )


def test_note_of_a_move(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    placed("moving.json", layout.moving("vllm"))
    assert worktree.is_move_begun(layout, "vllm")


def test_bisect_with_the_former_name_of_its_options(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    placed("bisect.json", bisect_log.log_path(layout))
    assert bisect_log.read_log(layout) == BisectLog(
        BisectOptions("smoke", good="v0.30.0", bad="v0.31.0"),
        "a" * 40,
        "b" * 40,
        "e" * 64,
        (
            Try("a" * 40, "good", "passed", 12.0),
            Try("b" * 40, "bad", "latency", 9.0, (1.5, 1.75)),
        ),
    )


def test_server_with_the_former_names_of_its_supervisor_and_tag(tmp_path: Path) -> None:
    placed("server.json", tmp_path / "server.json")
    found = observation.find(tmp_path)
    assert found is not None
    assert found.place == tmp_path
    assert found.address == Address("127.0.0.1", 8000)
    assert found.processes == ProcessTree(4711, 123456, "tag", "/tmp/x", "/tmp/x/log")
    assert (found.grace_s, found.is_ready, found.shared) == (10.0, True, ("psm_1",))
    placed("ended-tag.json", tmp_path / "ended-tag.json")
    assert observation.how_ended(found) == Ended(-15, was_requested=True)
    observation.write(found)
    assert observation.find(tmp_path) == found
