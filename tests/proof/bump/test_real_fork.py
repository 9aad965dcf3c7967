"""A fork of the real vLLM: the tree of the pinned release archive with a commit on top.

A bootstrap, two bumps and their smokes on the CPU, with some 6 GB of disk. Needs the package index,
or warm caches. The second bump compiles: without a compiler that the tree accepts, the forecast has
to report that instead.
"""

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.proof.kill.real import Clone, make_clone
from tests.repo.shell import sh_git
from workspace.install import rebuild_job, stamp
from workspace.repo import pins

BRANCH = "mine"
# Compiled on every device, and compiled for CUDA alone.
SOURCES = ("csrc/spinloop.cpp", "csrc/libtorch_stable/moe/topk_softmax_kernels.cu")
LIMIT_S = 3600.0


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Clone]:
    made = make_clone(tmp_path)
    # Nothing but the archive: upstream's git is not there.
    nowhere = (tmp_path / "nowhere").as_uri()
    made = replace(made, env={**made.env, "DEVICE": "cpu", "VLLM_MIRROR": nowhere})
    inv(made, "bootstrap", "--source", "release", "--no-first-token")
    yield made
    shutil.rmtree(tmp_path, ignore_errors=True)


def inv(clone: Clone, *args: str) -> str:
    child = replace(clone, args=args).start()
    assert child.wait(timeout=LIMIT_S) == 0, clone.output[-4000:]
    return clone.output


def make_fork(tree: Path, path: Path) -> str:
    """Make a repository of the archive's commit with one commit on it; return that commit."""
    archive = pins.load(Path(__file__).parents[3] / "vendor" / "pins.toml").vllm.archive
    assert archive
    sh_git(path.parent, "clone", "--quiet", "--no-tags", "--no-checkout", str(tree), str(path))
    sh_git(path, "switch", "--quiet", "--create", BRANCH, archive.commit)
    (path / "vllm" / "mine.py").write_text("MINE = 1\n")
    sh_git(path, "add", "--all")
    sh_git(path, "commit", "--quiet", "--message", "Mine")
    return sh_git(path, "rev-parse", "HEAD")


def test_commit_on_the_real_release_takes_the_wheel_of_the_release(
    clone: Clone, tmp_path: Path
) -> None:
    before = pins.load(clone.layout.pins).vllm
    assert before.archive
    commit = make_fork(clone.layout.vllm, tmp_path / "fork")
    url = f"{(tmp_path / 'fork').as_uri()}@{BRANCH}"
    assert f"pin.bump {url}" in inv(clone, "pin.forecast", url)
    inv(clone, "pin.bump", url, "--base", before.tag, "--allow-recent")
    pin = pins.load(clone.layout.pins).vllm
    assert (pin.commit, pin.base) == (
        commit,
        pins.Base(before.tag, before.version, before.archive.commit),
    )
    assert pin.precompiled == before.precompiled
    built = stamp.read(clone.layout.stamp("vllm"))
    assert built
    assert built.kernels
    assert (built.kernels.kind, built.kernels.sha256) == (
        "precompiled",
        before.precompiled[f"cpu-{platform.machine()}"].sha256,
    )
    python = clone.layout.environment_python
    imported = "import vllm, vllm.mine; print(vllm.__version__, vllm.mine.MINE)"
    assert sh_output(python, imported).split()[-2:] == [f"{pin.version}+cpu", "1"]
    assert "1 commit ahead" in inv(clone, "pin", "--offline")

    # The next commit changes compiled sources: one target is compiled, the rest is the wheel's.
    for source in SOURCES:
        path = tmp_path / "fork" / source
        path.write_text(f"{path.read_text()}\n// mine\n")
    sh_git(tmp_path / "fork", "commit", "--quiet", "--all", "--message", "Mine, compiled")
    foreseen = inv(clone, "pin.forecast", url, "--base", before.tag)
    assert all(source in foreseen for source in SOURCES), foreseen
    if re.search("cannot be built here: .*compiler", foreseen):
        print(f"not compiled, as the forecast reports: {foreseen}")
        return
    planned = inv(clone, "pin.bump", url, "--base", before.tag, "--allow-recent")
    rows = [line for line in planned.splitlines() if line.endswith(f"{SOURCES[0]} changed")]
    assert {row.split()[0] for row in rows} == {"spinloop"}, planned
    built = stamp.read(clone.layout.stamp("vllm"))
    assert rebuild_job.compiled_here(built) == {"spinloop"}
    shown = inv(clone, "pin", "--offline")
    assert all(source in shown for source in SOURCES), shown


def sh_output(python: Path, code: str) -> str:
    return subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True, timeout=LIMIT_S
    ).stdout
