"""Pushes by the developer's own git through the gate of `inv hook`, in both repositories."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.bump.conftest import smoke
from tests.bump.test_forks import BRANCH, fork
from tests.small.materials import git
from tests.small.world import World
from workspace.checks.smoke import HOOK, KEPT

__all__ = ["fork"]

MINE = '#!/bin/sh\nread words; echo "mine: $1 $words" >&2\n'


@pytest.fixture(autouse=True)
def own_hooks(clone: World) -> None:
    """The user's configuration names a folder for all repositories; these have their own."""
    for folder in (clone.root, clone.layout.vllm):
        git(
            folder,
            "config",
            "core.hooksPath",
            git(folder, "rev-parse", "--absolute-git-dir").strip() + "/hooks",
        )
    # This interpreter instead of the clone's own tool environment.
    (clone.root / "scripts" / "inv").write_text(
        f'#!/bin/sh\nexec {shlex.join(clone.argv())} "$@"\n'
    )


@pytest.fixture
def hooks(clone: World) -> Path:
    return clone.root / ".git" / "hooks"


def push(clone: World, folder: Path, remote: Path) -> subprocess.CompletedProcess[str]:
    """The developer's own git, with their PATH."""
    argv = ["git", "push", "--quiet", str(remote), "HEAD:refs/heads/pushed"]
    return subprocess.run(
        argv, cwd=folder, env=clone.env, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet", "--bare", "remote.git")
    return tmp_path / "remote.git"


def test_hook_of_the_users_runs_first_with_gits_input_and_comes_back(
    clone: World, hooks: Path, remote: Path
) -> None:
    hooks.mkdir(exist_ok=True)
    (hooks / HOOK).write_text(MINE)
    (hooks / HOOK).chmod(0o755)
    assert f"yours is {KEPT}" in clone.run("hook").err
    pushed = push(clone, clone.root, remote)
    assert pushed.returncode == 0, pushed.stderr
    assert f"mine: {remote} HEAD" in pushed.stderr
    assert "the smoke has passed on this tree and build" in pushed.stderr
    assert clone.run("hook", "--remove").code == 0
    assert (hooks / HOOK).read_text() == MINE
    assert os.access(hooks / HOOK, os.X_OK)
    assert not (hooks / KEPT).exists()


def test_hook_of_the_users_that_fails_stops_the_push_before_the_gate(
    clone: World, hooks: Path, remote: Path
) -> None:
    hooks.mkdir(exist_ok=True)
    (hooks / HOOK).write_text("#!/bin/sh\nexit 3\n")
    (hooks / HOOK).chmod(0o755)
    clone.run("hook")
    pushed = push(clone, clone.root, remote)
    assert pushed.returncode != 0
    assert "smoke" not in pushed.stderr


def test_commit_that_no_patch_has_stops_a_push_of_the_submodule_and_the_workspace(
    clone: World, remote: Path
) -> None:
    clone.run("hook")
    package = clone.layout.vllm / "vllm" / "__init__.py"
    package.write_text(package.read_text() + "# mine\n")
    git(clone.layout.vllm, "commit", "--quiet", "--all", "-m", "Mine")
    for folder in (clone.layout.vllm, clone.root):
        pushed = push(clone, folder, remote)
        assert pushed.returncode != 0
        assert "hint: " in pushed.stderr
        assert "patch.export" in pushed.stderr
    assert git(remote, "for-each-ref") == ""


def test_gate_judges_commits_on_the_commit_of_a_fork_as_those_on_a_release(
    clone: World, fork: Path, remote: Path
) -> None:
    clone.env["SOURCE"] = "auto"
    ended = clone.run("pin.bump", f"{fork.as_uri()}@{BRANCH}")
    assert ended.code == 0, ended.output
    clone.run("hook")
    pushed = push(clone, clone.layout.vllm, remote)
    assert pushed.returncode == 0, pushed.stderr
    assert "the smoke has passed on this tree and build" in pushed.stderr
    assert git(remote, "rev-parse", "pushed") == clone.git("rev-parse", "HEAD")
    package = clone.layout.vllm / "vllm" / "__init__.py"
    package.write_text(package.read_text() + "OURS = 1\n")
    git(clone.layout.vllm, "commit", "--quiet", "--all", "-m", "Ours\n\nUpstream-Status: Pending")
    pushed = push(clone, clone.layout.vllm, remote)
    assert pushed.returncode != 0
    assert "patch.export" in pushed.stderr
    assert clone.run("patch.export").code == 0
    pushed = push(clone, clone.layout.vllm, remote)
    assert pushed.returncode == 0, pushed.stderr
    assert "no smoke has passed on this tree and build yet" in pushed.stderr


def test_edit_is_judged_again_and_a_broken_one_stops_the_push(clone: World, remote: Path) -> None:
    clone.run("hook")
    package = clone.layout.vllm / "vllm" / "__init__.py"
    former = package.read_text()
    package.write_text(former + "BROKEN = True\n")
    pushed = push(clone, clone.root, remote)
    assert pushed.returncode != 0
    assert re.search(r"parity\.llama +0/2 tokens equal", pushed.stderr)
    package.write_text(former + "# harmless\n")
    assert push(clone, clone.root, remote).returncode == 0
    # A tree that passed is not judged again.
    assert "the smoke has passed on this tree and build" in push(clone, clone.root, remote).stderr


def test_stale_kernels_stop_the_push_with_the_command_to_run(clone: World, remote: Path) -> None:
    clone.run("hook")
    library = next(clone.layout.vllm.glob("vllm/_C*.so"))
    library.write_bytes(library.read_bytes()[:-1])
    pushed = push(clone, clone.root, remote)
    assert pushed.returncode != 0
    assert "kernels stale" in pushed.stderr
    assert "hint: ./scripts/inv" in pushed.stderr


def test_workspace_that_moved_is_reported_at_the_push(
    clone: World, hooks: Path, remote: Path
) -> None:
    clone.run("hook")
    script = (hooks / HOOK).read_text()
    (hooks / HOOK).write_text(script.replace(str(clone.root), f"{clone.root}-elsewhere"))
    pushed = push(clone, clone.root, remote)
    assert "no longer at" in pushed.stderr
    assert pushed.returncode != 0
    assert clone.run("hook").code == 0
    assert push(clone, clone.root, remote).returncode == 0


def test_red_record_is_no_pass(clone: World) -> None:
    package = clone.layout.vllm / "vllm" / "__init__.py"
    package.write_text(package.read_text() + "BROKEN = True\n")
    assert smoke(clone).code == 8
    assert clone.run("hook", "--run").code == 8
