"""A bisect of a real tree: among 64 commits one changes the answers and one is slow, and among
eight patches one changes the answers.

BISECT_PROOF_CLONE names a bootstrapped clone that may be changed; without it the proof makes a
clone. The output of each bisect is appended to bisect.tsv there.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.bench.histories import Made, make
from tests.small.materials import git
from workspace.core.paths import Layout, here

COMMITS, BROKEN, SLOW, BROKEN_PATCH = 64, 23, 46, 5
LLAMA, SCHEDULER = "vllm/model_executor/models/llama.py", "vllm/v1/core/sched/scheduler.py"
SCALE = "self.scaling = self.head_dim**-0.5"
# Every step of the engine calls this function, whichever way it queues its batches.
SCHEDULE = "    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:\n"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    if named := os.environ.get("BISECT_PROOF_CLONE"):
        return Layout(Path(named))
    folder = tmp_path_factory.mktemp("proof") / "clone"
    subprocess.run(["git", "clone", "--quiet", here().root, folder], check=True)
    # The tests run without bytecode, but a build must write it.
    environment = {
        name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }
    subprocess.run(["./scripts/inv", "bootstrap"], cwd=folder, env=environment, check=True)
    return Layout(folder)


@pytest.fixture(scope="module")
def history(built: Layout) -> Mapping[str, str]:
    """Make commits c1 to c64 on the pin's base: comments in Python files, except in two commits."""
    base = git(built.vllm, "merge-base", "HEAD", "refs/patches/base")
    # The files of the shipped patch, and those that an installation is made from, stay unchanged.
    files = [
        path
        for path in git(built.vllm, "ls-files", "vllm/*.py").splitlines()
        if path not in (LLAMA, SCHEDULER)
    ][5::30][:COMMITS]
    commits = [
        Made(
            f"c{number}", {path: git(built.vllm, "show", f"{base}:{path}") + f"\n# edit {number}\n"}
        )
        for number, path in enumerate(files, 1)
    ]
    assert len(commits) == COMMITS
    for number, path, old, new in (
        (BROKEN, LLAMA, SCALE, f"{SCALE} * 1.05"),
        (SLOW, SCHEDULER, SCHEDULE, f"{SCHEDULE}        time.sleep(0.02)\n"),
    ):
        text = git(built.vllm, "show", f"{base}:{path}") + "\n"
        assert old in text, f"{old} is no longer there"
        commits[number - 1] = Made(f"c{number}", {path: text.replace(old, new, 1)})
    return {"base": base, **make(built.vllm, commits, onto=base)}


def bisect(layout: Layout, *args: str) -> dict[str, Any]:
    """Run a bisect to its end and return its document."""
    found = layout.state / "found.json"
    argv = [layout.root / "scripts" / "nox", "-s", "bisect", "--", *args, "--json", found]
    done = subprocess.run(
        argv, cwd=layout.root, capture_output=True, text=True, timeout=7200, check=False
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(found.read_text())
    with (layout.state / "bisect.tsv").open("a") as file:
        file.write(
            f"{' '.join(args)}\t{done.stdout.strip()}\t{document['steps']}"
            f" steps\t{document['minutes']} min\n{done.stderr}\n"
        )
    assert not (layout.state / "bisect.json").exists()
    assert not (layout.sandboxes / "bisect").exists()
    return document


def state_of(layout: Layout) -> tuple[str, ...]:
    """Return the state of vendor/vllm that belongs to the user."""
    return tuple(
        git(layout.vllm, *args)
        for args in (
            ("rev-parse", "HEAD"),
            ("status", "--porcelain"),
            ("for-each-ref",),
            ("ls-files", "-s"),
        )
    )


def test_broken_commit_among_64_is_found_by_a_check_of_the_smoke(
    built: Layout, history: Mapping[str, str]
) -> None:
    before = state_of(built)
    found = bisect(
        built, "--good", history["base"], "--bad", history[f"c{COMMITS}"], "--run", "parity.llama"
    )
    assert found["culprit"]["oid"] == history[f"c{BROKEN}"]
    assert found["steps"] <= 8
    assert state_of(built) == before


def test_slow_commit_among_64_is_found_by_a_benchmark(
    built: Layout, history: Mapping[str, str]
) -> None:
    found = bisect(
        built, "--good", history["base"], "--bad", history[f"c{COMMITS}"], "--run", "bench:latency"
    )
    assert found["culprit"]["oid"] == history[f"c{SLOW}"]
    assert found["steps"] <= 8


def test_broken_patch_among_eight_is_found(built: Layout) -> None:
    folder, tip = built.vllm, git(built.vllm, "rev-parse", "HEAD")
    there = len((built.patches("vllm") / "series").read_text().split(".patch")) - 1
    for number in range(there + 1, 9):
        path = folder / (LLAMA if number == BROKEN_PATCH else f"vllm/remark_{number}.py")
        path.write_text(
            path.read_text().replace(SCALE, f"{SCALE} * 1.05")
            if number == BROKEN_PATCH
            else f"# {number}\n"
        )
        git(folder, "add", "--all", str(path))
        git(folder, "commit", "--quiet", "-m", f"Patch number {number}\n\nUpstream-Status: Pending")
    subprocess.run([built.root / "scripts" / "inv", "patch.export"], check=True)
    try:
        found = bisect(built, "--patches", "--run", "parity.llama")
        assert found["culprit"]["patch"] == f"Patch-number-{BROKEN_PATCH}.patch"
        assert found["steps"] <= 5
    finally:
        git(folder, "reset", "--quiet", "--hard", tip)
        git(built.root, "checkout", "--", "patches")
        git(built.root, "clean", "--quiet", "--force", "patches")
