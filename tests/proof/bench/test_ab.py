"""`nox -s ab` on a clone in small, with a program in the place of vLLM that is as slow as the tree
of its arm says.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.small.materials import Materials
from tests.small.world import Ended, World, make_world

# It maps a library of its arm, and stays until that can have been seen.
PROGRAM = """#!@PYTHON@ -Es
import ctypes, json, os, random, sys, time
words = dict(word.partition("=")[::2] for word in sys.argv[1:])
place = os.path.dirname(os.path.abspath(__file__))
tree = os.environ.get("FAKE_TREE") or place + "/../../vendor/vllm"
if not os.environ.get("FAKE_BARE"):
    ctypes.CDLL(os.path.realpath(tree + "/vllm/_C.abi3.so"))
with open(place + "/calls", "a") as calls:
    calls.write("x")
count = os.path.getsize(place + "/calls")
print("INFO 11-20 10:00:00 [cpu.py:100] Using Torch SDPA backend.", flush=True)
time.sleep(0.3)
if os.environ.get("FAKE_END") == str(count):
    sys.exit("ValueError: the engine died")
with open(place + "/../../vendor/vllm/vllm/version.py") as file:
    slow = sum(line.startswith("SLOW") for line in file) * float(os.environ.get("FAKE_STEP", "0.3"))
mean = (1 + slow) * random.Random(count).gauss(1, 0.01)
with open(words["--output-json"], "w") as file:
    json.dump({"latencies": [mean, mean * 1.1, mean * 0.9]}, file)
"""
SLOW = "SLOW = 1\n"


def ab(world: World, *words: str, **env: str) -> Ended:
    model = ["--model", str(world.folder / "model"), "--allow-busy"]
    call = [sys.executable, "-Es", "-B", "-m", "workspace.cli.sessions", "ab", *words, *model]
    done = subprocess.run(
        call,
        cwd=world.root,
        env=world.env | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def _duelling(materials: Materials, tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(materials, tmp_path_factory.mktemp("duelling"))
    world.bootstrap()
    (world.folder / "model").mkdir()
    # Both arms are built, and then there is no vllm to measure.
    ended = ab(world)
    assert "bin/vllm is not there" in ended.error(6), ended.output
    for name in ("ab-a", "ab-b"):
        program = world.layout.sandboxes / name / ".vllm" / "bin" / "vllm"
        program.write_text(PROGRAM.replace("@PYTHON@", sys.executable))
        program.chmod(0o755)
    world.save()
    return world


@pytest.fixture
def duelling(_duelling: World) -> Iterator[World]:
    """A clone whose two arms are built: the bare pin, and its one patch."""
    _duelling.restore()
    (_duelling.folder / "model").mkdir(exist_ok=True)
    yield _duelling
    _duelling.end()


def records(world: World) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in world.layout.results.glob("*/*-ab-*.json")]
    return {one["label"].split("-")[2]: one for one in found}


def slow_edit(world: World) -> None:
    version = world.layout.vllm / "vllm" / "version.py"
    version.write_text(version.read_text() + SLOW)


def test_uncommitted_slow_edit_is_a_regression_also_where_the_run_was_ended_in_between(
    duelling: World,
) -> None:
    slow_edit(duelling)
    status = duelling.git("status", "--porcelain")
    ended = ab(duelling, FAKE_END="4")
    assert "the engine died" in ended.error(1)
    assert "the working tree, uncommitted edits included" in ended.err
    assert "kept are 2 and 2 of 6 starts" in ended.err
    assert {name: len(one["starts"]) for name, one in records(duelling).items()} == {"a": 2, "b": 2}
    ended = ab(duelling)
    assert "is slower than v0.31.0 without patches: latency +" in ended.error(9)
    titles = re.findall(r"^\w+ +([AB] (?:\d/6|warm-up))", ended.err, re.MULTILINE)
    assert titles == [
        "A warm-up",
        "B warm-up",
        *(
            f"{arm} {number}/6"
            for number, sandboxes in enumerate(("AB", "BA", "AB", "BA"), 3)
            for arm in sandboxes
        ),
    ]
    found = records(duelling)
    assert [len(found[name]["starts"]) for name in "ab"] == [6, 6]
    assert found["a"]["source"]["patches"] == []
    assert found["b"]["source"]["patches"] == [duelling.materials.patch.name]
    assert list(found["b"]["source"]["libraries"]) == ["vllm/_C.abi3.so"]
    assert "odd against even starts of one tree" in ended.err
    assert "(Wilcoxon)" in ended.err
    # Nothing is left to measure: the same verdict, at once.
    again = ab(duelling)
    assert again.code == 9
    assert "have their 6 starts" in again.err
    assert again.out == ended.out
    assert duelling.git("status", "--porcelain") == status


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"FAKE_BARE": "1"}, "has loaded no compiled library of its own tree"),
        ({"FAKE_TREE": "@CLONE@/vendor/vllm"}, "which is another tree's"),
    ],
)
def test_arm_that_does_not_run_its_own_libraries_is_refused(
    duelling: World, env: dict[str, str], says: str
) -> None:
    assert says in ab(
        duelling,
        **{name: text.replace("@CLONE@", str(duelling.root)) for name, text in env.items()},
    ).error(7)
    assert records(duelling) == {}


def test_each_patch_is_left_out_in_its_turn_and_the_one_that_costs_is_named(
    duelling: World,
) -> None:
    slow_edit(duelling)
    duelling.git("commit", "--quiet", "--all", "-m", "A slow one\n\nUpstream-Status: Pending")
    assert "holds something else than the series makes" in ab(duelling, "--each-patch").error(5)
    assert duelling.run("patch.export").code == 0
    ended = ab(duelling, "--each-patch")
    assert re.search(r"^error: A-slow-one\.patch costs latency \+\d", ended.error(9))
    assert duelling.materials.patch.name not in ended.error(9)
    told = ended.err.partition("what each patch costs")[2]
    assert re.search(rf"{re.escape(duelling.materials.patch.name)} +latency pass: ", told)


def test_two_arms_of_one_tree_pass_and_say_so(duelling: World) -> None:
    ended = ab(duelling, "--base", "HEAD")
    assert ended.code == 0, ended.output
    assert "both arms are of one tree" in ended.err
    assert re.search(r"latency +pass: [-+]\d", ended.err)
