"""Situations of benchmarks, whose vLLM is a program that measures at once."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from tests.bench.materials import record
from tests.bench.test_measure import PROGRAM
from tests.proof.hints.following import User, printed, runs
from tests.proof.hints.machine_situations import measured
from tests.small import releases
from tests.small.releases import CLEAN
from workspace.bench import results
from workspace.core import records
from workspace.machine import interpreter
from workspace.server import models

BENCH = ("./scripts/nox", "-s", "bench", "--", "latency")
ONCE = (*BENCH, "--repeat", "1")
AB = ("./scripts/nox", "-s", "ab", "--")


def measures(user: User) -> None:
    """Let the built vLLM measure at once, with a tiny model that is there."""
    layout = user.world.layout
    program = layout.environment / "bin" / "vllm"
    program.write_text(PROGRAM.replace("@PYTHON@", sys.executable))
    program.chmod(0o755)
    models._tiny_folder(layout, interpreter.installed(layout), "llama").mkdir(parents=True)


def own_record(user: User) -> Path:
    """Measure once, and return the record's path."""
    done = user.inv(*ONCE)
    assert done.code == 0, done.output
    return Path(done.out.strip())


@runs("nox.bench", "bench.nothing_measured")
def clone_that_measured_nothing(user: User) -> None:
    measures(user)
    user.follow("nox.bench", "bench.report")
    user.world.layout.results.rename(user.world.folder / "results")
    user.follow("bench.nothing_measured", "bench.compare", "latency", "latency", then=False)
    assert len(list(user.world.layout.results.glob("*/*.json"))) == 1


@runs("bench.enforce_eager", "core.read_log")
def benchmark_that_fails(user: User) -> None:
    measures(user)
    model = user.world.folder / "model"
    model.mkdir()
    user.follow(
        "bench.enforce_eager", *BENCH, "--", "--output-json=x", put={"NAME": str(model)}, then=False
    )
    user.look("core.read_log", *ONCE, "--label", "a", shows="model", FAKE_MANNER="no model")
    user.look("core.read_log", *ONCE, "--label", "b", shows="bench", FAKE_MANNER="nothing")


@runs("bench.repeat_or_label", "bench.label_another")
def label_that_is_taken(user: User) -> None:
    measures(user)
    path = own_record(user)
    user.follow("bench.repeat_or_label", *ONCE, then=False)
    assert len(json.loads(path.read_text())["starts"]) > 1
    path.write_text(path.read_text()[:400])
    damaged = path.read_bytes()
    user.follow("bench.label_another", *BENCH, then=False)
    assert path.read_bytes() == damaged
    assert path.with_name(path.name.replace("latency", "another")).exists()


@runs("bench.measure_again", "bench.git_pull")
def record_of_another_program(user: User) -> None:
    measures(user)
    path = user.world.folder / "half.json"
    path.write_text("{}")
    user.follow("bench.measure_again", "bench.compare", str(path), str(path), then=False)
    newer = json.loads(records.encode(record()))
    path.write_text(json.dumps(newer | {"schema": 99}))
    remote(user)
    user.follow("bench.git_pull", "bench.compare", str(path), str(path), then=False)


def remote(user: User) -> None:
    """Let the clone have a branch at a remote, as a clone of a project has."""
    origin = user.root / ".workspace" / "origin.git"
    user.type(f"git init --quiet --bare {origin} && git remote add origin {origin}")
    done = user.type("git push --quiet --set-upstream origin HEAD")
    assert done.code == 0, done.output


@runs("bench.repeat_both", "bench.report_plots")
def records_that_differ(user: User) -> None:
    measures(user)
    path = own_record(user)
    made = records.decode(path.read_bytes(), results.Record)
    two = measured(user, replace(made, label="latency", source=replace(made.source, tree="b" * 40)))
    user.follow("bench.repeat_both", "bench.compare", str(path), two, then=False)
    fast = measured(user, record(label="fast"))
    slow = measured(user, record([2.0, 2.1, 2.2, 2.0, 2.1, 2.2], label="slow", tree="b" * 40))
    done = user.follow("bench.report_plots", "bench.compare", fast, slow, then=False)
    assert Path(done.out.strip()).exists()


@runs("bench.base", "bench.allow_busy")
def machine_that_computes_for_others(user: User) -> None:
    measures(user)
    command = user.meets("bench.base", *AB, "--allow-busy", "--base", "nowhere")
    argv = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(argv) for _ in range(os.cpu_count() or 1)]
    try:
        stopped = user.type(command)
        assert "arm A: v0.31.0 without patches" in stopped.err, stopped.output
        doctor = printed("bench.allow_busy", stopped)
        assert doctor, stopped.output
        assert "cores" in user.type(doctor).out
    finally:
        for other in others:
            other.kill()
            other.wait()
    user.followed |= {"bench.base", "bench.allow_busy"}


@runs("bench.fetch_pin")
def trees_that_cannot_be_compared(user: User) -> None:
    measures(user)
    made = releases.make(user.world.materials)
    user.world.env["VLLM_MIRROR"] = made.upstream.as_uri()
    files = (user.world.layout.pins, user.world.layout.patches("vllm") / "series")
    for path in files:
        text = path.read_text().replace(user.world.materials.commit, made.commit(CLEAN))
        path.write_text(text.replace(user.world.materials.archive_commit, "1" * 40))
    user.git("add", "--all", "vendor/pins.toml", "patches")
    user.git("commit", "--quiet", "-m", "Another pin")
    user.git("checkout", "HEAD~1", "--", "vendor/pins.toml", "patches/vllm/series")
    user.follow("bench.fetch_pin", *AB, "--allow-busy", "--base", "HEAD", then=False)
    assert user.world.git("rev-parse", f"{made.commit(CLEAN)}^{{commit}}")
