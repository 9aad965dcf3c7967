"""`inv hook`: what it installs in real repositories, and what --remove restores."""

from pathlib import Path

import pytest

from tests.small.materials import git
from tests.small.world import World
from workspace.checks.smoke import HOOK, KEPT

MINE = '#!/bin/sh\nread words; echo "mine: $1 $words" >&2\n'


@pytest.fixture(autouse=True)
def own_hooks(clone: World) -> None:
    """The user's configuration names one folder for all repositories; these have their own."""
    for folder in (clone.root, clone.layout.vllm):
        git(
            folder,
            "config",
            "core.hooksPath",
            git(folder, "rev-parse", "--absolute-git-dir").strip() + "/hooks",
        )


@pytest.fixture
def hooks(clone: World) -> Path:
    return clone.root / ".git" / "hooks"


def test_gate_is_in_both_repositories_and_a_second_call_changes_nothing(
    clone: World, hooks: Path
) -> None:
    assert clone.run("hook").code == 0
    inner = Path(git(clone.layout.vllm, "rev-parse", "--absolute-git-dir").strip()) / "hooks" / HOOK
    times = [path.stat().st_mtime_ns for path in (hooks / HOOK, inner)]
    again = clone.run("hook")
    assert [line.split()[0] for line in again.err.splitlines()] == ["ok", "ok"]
    assert [path.stat().st_mtime_ns for path in (hooks / HOOK, inner)] == times
    assert clone.run("hook", "--remove").code == 0
    assert not (hooks / HOOK).exists()
    assert not inner.exists()


def test_shared_folder_of_hooks_is_not_changed(clone: World, tmp_path: Path) -> None:
    git(clone.root, "config", "core.hooksPath", str(tmp_path / "everybodys"))
    ended = clone.run("hook")
    assert "core.hooksPath" in ended.error(2)
    assert not (tmp_path / "everybodys").exists()


def test_hook_of_the_users_is_kept_and_comes_back(clone: World, hooks: Path) -> None:
    hooks.mkdir(exist_ok=True)
    (hooks / HOOK).symlink_to("theirs")
    (hooks / "theirs").write_text(MINE)
    assert f"yours is {KEPT}" in clone.run("hook").err
    assert (hooks / "theirs").read_text() == MINE
    assert clone.run("hook", "--remove").code == 0
    assert (hooks / HOOK).readlink() == Path("theirs")
    assert not (hooks / KEPT).is_symlink()


def test_gate_names_files_that_git_does_not_track(clone: World) -> None:
    (clone.layout.vllm / "vllm" / "mine.cfg").write_text("mine\n")
    ended = clone.run("hook", "--run")
    assert "files that git does not track are in no patch: vllm/mine.cfg" in ended.err
    assert "git -C vendor/vllm add --force -- vllm/mine.cfg && git -C" in ended.err
