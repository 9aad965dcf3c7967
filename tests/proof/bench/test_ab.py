"""`nox -s ab` on a small clone, with a stand-in for vLLM whose speed depends on its arm's tree."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.small.materials import Materials
from tests.small.world import Ended, World, make_world

# It maps a library of its arm, and runs until the mapping can be observed.
PROGRAM = """#!@PYTHON@ -Es
import ctypes, json, os, random, sys, time
flags = dict(flag.partition("=")[::2] for flag in sys.argv[1:])
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
with open(flags["--output-json"], "w") as file:
    json.dump({"latencies": [mean, mean * 1.1, mean * 0.9]}, file)
"""
SLOW = "SLOW = 1\n"


def ab(world: World, *args: str, **env: str) -> Ended:
    model = ["--model", str(world.folder / "model"), "--allow-busy"]
    call = [sys.executable, "-Es", "-B", "-m", "workspace.cli.sessions", "ab", *args, *model]
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
def _compared(materials: Materials, tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(materials, tmp_path_factory.mktemp("compared"))
    world.bootstrap()
    (world.folder / "model").mkdir()
    # Both arms are built, but there is no vllm to measure yet.
    ended = ab(world)
    assert "bin/vllm is missing" in ended.error(6), ended.output
    for name in ("ab-a", "ab-b"):
        program = world.layout.sandboxes / name / ".vllm" / "bin" / "vllm"
        program.write_text(PROGRAM.replace("@PYTHON@", sys.executable))
        program.chmod(0o755)
    world.save()
    return world


@pytest.fixture
def compared(_compared: World) -> Iterator[World]:
    """Yield a clone whose two arms are built: the bare pin, and its one patch."""
    _compared.restore()
    (_compared.folder / "model").mkdir(exist_ok=True)
    yield _compared
    _compared.end()


def records(world: World) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in world.layout.results.glob("*/*-ab-*.json")]
    return {document["label"].split("-")[2]: document for document in found}


def slow_edit(world: World) -> None:
    version = world.layout.vllm / "vllm" / "version.py"
    version.write_text(version.read_text() + SLOW)


def test_uncommitted_slow_edit_is_a_regression_in_a_resumed_run_too(
    compared: World,
) -> None:
    slow_edit(compared)
    status = compared.git("status", "--porcelain")
    ended = ab(compared, FAKE_END="4")
    assert "the engine died" in ended.error(1)
    assert "the working tree, uncommitted edits included" in ended.err
    assert "2 and 2 of 6 starts are kept" in ended.err
    assert {name: len(found["starts"]) for name, found in records(compared).items()} == {
        "a": 2,
        "b": 2,
    }
    ended = ab(compared)
    assert "is slower than v0.31.0 without patches: latency +" in ended.error(9)
    titles = re.findall(r"^\w+ +([AB] (?:\d/6|warm-up))", ended.err, re.MULTILINE)
    assert titles == [
        "A warm-up",
        "B warm-up",
        *(
            f"{arm} {number}/6"
            for number, arms in enumerate(("AB", "BA", "AB", "BA"), 3)
            for arm in arms
        ),
    ]
    found = records(compared)
    assert [len(found[name]["starts"]) for name in "ab"] == [6, 6]
    assert found["a"]["source"]["patches"] == []
    assert found["b"]["source"]["patches"] == [compared.materials.patch.name]
    assert list(found["b"]["source"]["libraries"]) == ["vllm/_C.abi3.so"]
    assert "odd against even starts of one tree" in ended.err
    # Nothing is left to measure, so the verdict is the same.
    again = ab(compared)
    assert again.code == 9
    assert "have their 6 starts" in again.err
    assert again.out == ended.out
    assert compared.git("status", "--porcelain") == status


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"FAKE_BARE": "1"}, "has loaded no compiled library of its own tree"),
        ({"FAKE_TREE": "@CLONE@/vendor/vllm"}, "which belongs to another tree"),
    ],
)
def test_arm_that_does_not_run_its_own_libraries_is_refused(
    compared: World, env: dict[str, str], says: str
) -> None:
    assert says in ab(
        compared,
        **{name: text.replace("@CLONE@", str(compared.root)) for name, text in env.items()},
    ).error(7)
    assert records(compared) == {}


def test_arm_that_the_hint_deletes_is_built_anew(compared: World) -> None:
    ended = ab(compared, FAKE_TREE=str(compared.root / "vendor" / "vllm"))
    hint = ended.err.splitlines()[-1].removeprefix("hint: ").partition("    ")[0]
    (folder,) = re.findall(r"^rm -rf (\S+)$", hint)
    arm = compared.root / folder
    assert (arm / ".vllm" / "bin" / "calls").exists()
    subprocess.run(["/bin/sh", "-c", hint], cwd=compared.root, check=True)
    assert not arm.exists()
    # The stand-in has left with the arm; its tree and its libraries are there again.
    assert "bin/vllm is missing" in ab(compared).error(6)
    assert (arm / "vendor" / "vllm" / "vllm" / "_C.abi3.so").exists()


def test_two_arms_of_one_tree_pass_and_are_reported_as_such(compared: World) -> None:
    ended = ab(compared, "--base", "HEAD")
    assert ended.code == 0, ended.output
    assert "both arms are of one tree" in ended.err
    assert re.search(r"^(ok|warn) +latency +\S*.*[-+]\d", ended.err, re.MULTILINE)
