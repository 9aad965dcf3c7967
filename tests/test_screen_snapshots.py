"""Snapshots of the screens that everybody sees, as a terminal of 100x30 shows them.

A changed screen fails here first: read the difference, then renew tests/__snapshots__ with
`./scripts/nox -s tests -- -n 0 tests/test_screen_snapshots.py --snapshot-update`. What differs from
run to run or from machine to machine is replaced: seconds, hashes, times, versions of Python.
"""

import os
import re
import sys
from collections.abc import Mapping

import pytest
from syrupy.assertion import SnapshotAssertion

from tests.bench import test_measure
from tests.bench.materials import record
from tests.clone import Clone, make_clone
from tests.screens import COLUMNS, screen
from tests.small.world import World
from workspace.bench import results
from workspace.core import records

# Rows of the doctor on the machine itself.
_OF_THE_MACHINE = re.compile(
    r"^\w+ +(disk|architecture|cores|memory|swap|oom daemon|python|git|uv|headers|cmake|ninja"
    r"|running|token)(?:  .*)?\n(?:    .*\n)*",  # A long path stands below its row.
    re.MULTILINE,
)


def shown(world: World, *args: str, env: Mapping[str, str] | None = None) -> str:
    return screen(world.argv(*args), cwd=world.folder, env={**world.env, **(env or {})})


def test_bootstrap(world: World, snapshot: SnapshotAssertion) -> None:
    assert shown(world, "bootstrap", "--source", "release") == snapshot


def test_status_before_the_bootstrap(world: World, snapshot: SnapshotAssertion) -> None:
    assert shown(world) == snapshot


def test_status_and_patch(built: World, snapshot: SnapshotAssertion) -> None:
    assert shown(built) == snapshot(name="status")
    assert shown(built, "patch") == snapshot(name="patch")


def test_doctor(built: World, snapshot: SnapshotAssertion) -> None:
    programs = built.folder / "programs-of-the-screen"
    programs.mkdir()
    for name, script in (("g++", "echo 9.1.0"), ("apt-cache", "exit 1")):
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    env = {"PATH": f"{programs}{os.pathsep}{built.env['PATH']}", "SHELL": "/bin/sh"}
    seen = shown(built, "doctor", "--offline", env=env)
    assert "\nok       memory  " in seen
    *rows, last = _OF_THE_MACHINE.sub("", seen).splitlines()
    assert [*rows, re.sub(r"\d+", "N", last)] == snapshot


def test_smoke(built: World, snapshot: SnapshotAssertion) -> None:
    argv = [sys.executable, "-Es", "-B", "-m", "workspace.cli.sessions", "smoke"]
    seen = screen(argv, cwd=built.root, env=built.env)
    # What the stand-in of vLLM lacks is worded by Python.
    seen = re.sub(r"^(FAIL +\S+).*", r"\1", seen, flags=re.MULTILINE)
    assert [line for line in seen.splitlines() if line[:4].strip()] == snapshot


def test_bench(built: World, snapshot: SnapshotAssertion) -> None:
    for label, tree, mean in (("before", "a", 1.0), ("after", "b", 1.2)):
        made = record(
            [mean * value for value in (1.0, 1.01, 0.99, 1.02, 0.98, 1.0)],
            label=label,
            tree=tree * 40,
        )
        records.write(results.record_path(built.layout, made), made)
    assert shown(built, "bench") == snapshot(name="records")
    assert shown(built, "bench.compare", "before", "after") == snapshot(name="compare")


@pytest.mark.parametrize("manner", ["steady", "differs"])
def test_end_of_a_bench(built: World, snapshot: SnapshotAssertion, manner: str) -> None:
    test_measure.place_vllm(built)
    model = str(built.folder / "model")
    argv = test_measure.argv(built, "--repeat", "6", "--model", model)
    seen = screen(argv, cwd=built.root, env={**built.env, "FAKE_MANNER": manner})
    _, path, end = seen.partition(".json\n")
    assert path, seen
    # What other programs do is the machine's.
    end = re.sub(r"^warning: other programs (?s:.*?)^(?=hint: )", "", end, flags=re.MULTILINE)
    assert end.replace(model, "MODEL") == snapshot


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    return make_clone(tmp_path_factory.mktemp("bare"))


@pytest.mark.parametrize(
    "args",
    ["inv --list", "inv help", "inv --help rebuild", "inv serve --help", "nox --list"],
)
def test_help(bare: Clone, snapshot: SnapshotAssertion, args: str) -> None:
    entrance, *rest = args.split()
    assert bare.inv("--version").returncode == 0
    argv = [str(bare.root / "scripts" / entrance), *rest]
    wide, narrow = (
        screen(argv, cwd=bare.root, env=bare.environment(), columns=columns).replace(
            str(bare.root), "CLONE"
        )
        for columns in (COLUMNS, 80)
    )
    assert wide == snapshot
    # A terminal breaks a longer line in the middle of a word, and so may a program.
    assert [line for line in narrow.splitlines() if len(line) > 80] == []
    assert set(narrow.split()) <= set(wide.split())
