"""The pin moves beside the working tree and is promoted when its smoke is green."""

import signal
import sys
from pathlib import Path

from tests.bump.conftest import ROWS, user_files
from tests.small.materials import git
from tests.small.releases import CLEAN
from tests.small.world import World
from workspace.bump import known_good
from workspace.repo import pins


def test_there_and_back(clone: World) -> None:
    """One story, because each part needs what the former part made."""
    layout, remarks = (
        clone.layout,
        [line for line in clone.layout.pins.read_text().splitlines() if line.startswith("#")],
    )
    before, old_head, old_pins = (
        user_files(clone),
        clone.git("rev-parse", "HEAD"),
        layout.pins.read_text(),
    )
    link = git(clone.root, "ls-files", "-s", "vendor/vllm")
    ended = clone.run("pin.bump", f"v{CLEAN}")
    assert ended.code == 0, ended.output

    # The new state is complete and in its place; nothing of the sandbox is left or named.
    assert {name: state for name, state in clone.status().items() if name in ROWS} == dict.fromkeys(
        ROWS, "ok"
    )
    assert clone.python(
        "import vllm; print(vllm.__version__, vllm.RELEASE, vllm.__file__)"
    ).split() == [
        f"{CLEAN}+cpu",
        CLEAN,
        str(layout.vllm / "vllm" / "__init__.py"),
    ]
    assert not layout.bump_sandbox.exists()
    assert len(clone.git("worktree", "list").splitlines()) == 1
    named = [
        path
        for path in layout.environment.rglob("*")
        if path.is_file() and not path.is_symlink() and b".workspace/bump" in path.read_bytes()
    ]
    assert [path for path in named if path.suffix != ".pyc"] == []
    assert clone.git("status", "--porcelain") == ""
    assert clone.git("diff", "--name-only", "HEAD~1", "HEAD") == "setup.py"

    # Pins, series and message; the gitlink stays, because nobody could fetch a commit that is made
    # from an archive.
    pin = pins.load(layout.pins).vllm
    assert (pin.tag, pin.version, pin.archive is not None and pin.archive.commit) == (
        f"v{CLEAN}",
        CLEAN,
        clone.git("rev-parse", "HEAD~1"),
    )
    assert pin.precompiled["cpu-x86_64"].version == CLEAN
    assert [
        line for line in layout.pins.read_text().splitlines() if line.startswith("#")
    ] == remarks
    assert f"# base: {pin.commit}" in (layout.patches("vllm") / "series").read_text()
    assert git(clone.root, "ls-files", "-s", "vendor/vllm") == link
    message = (layout.state / "bump-message.txt").read_text()
    assert message.startswith(f"pin: move vLLM from v0.31.0 to v{CLEAN}\n\n")
    assert "1:  " in message
    git(clone.root, "add", "vendor/pins.toml", "patches/vllm")
    git(clone.root, "commit", "--quiet", "-F", ".workspace/bump-message.txt")
    assert set(git(clone.root, "show", "--name-only", "--format=", "HEAD").split()) == {
        "vendor/pins.toml",
        "patches/vllm/series",
    }

    # The rollback needs no network and restores the same environment.
    clone.index.hide(*clone.index.files)
    ended = clone.run("pin.rollback")
    assert ended.code == 0, ended.output
    assert clone.git("rev-parse", "HEAD") == old_head
    assert layout.pins.read_text() == old_pins
    after = user_files(clone)
    moved = {
        path
        for path in before.keys() | after.keys()
        if path not in after or path not in before or before[path][:2] != after[path][:2]
    }
    assert {
        path
        for path in moved
        if not path.startswith((".vllm", "patches")) and "__pycache__" not in path
    } <= changed_by_a_move(moved)
    assert all(
        before[path][2] == after[path][2]
        for path in before
        if path.startswith(".vllm/lib") and "__pycache__" not in path
    ), "another environment"
    assert clone.python("import vllm; print(vllm.__version__)") == "0.31.0+cpu"
    assert {name: state for name, state in clone.status().items() if name in ROWS} == dict.fromkeys(
        ROWS, "ok"
    )


# Run `inv` and kill it where it is to write the redo log of a promotion.
KILLED = """import os, runpy, signal, sys
sys.argv = sys.argv[sys.argv.index("-B") + 1 :]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
from workspace.bump import staging
staging.begin_move = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_release_that_was_never_promoted_is_not_good_after_the_bump_is_given_up(
    clone: World,
) -> None:
    def names() -> list[str]:
        return [state.name for state in known_good.states(clone.layout)]

    before, refs = names(), clone.git("for-each-ref", "refs/good")
    killed = clone.run("pin.bump", f"v{CLEAN}", through=[sys.executable, "-Es", "-c", KILLED])
    assert killed.code == -signal.SIGKILL, killed.output
    assert len(names()) == len(before) + 1
    ended = clone.run("patch.continue", "--abort")
    assert ended.code == 0, ended.output
    # The rollback goes to the newest other state: it would have gone to the new release.
    assert names() == before
    assert clone.git("for-each-ref", "refs/good") == refs
    assert not clone.layout.bump_sandbox.exists()


def test_release_that_was_promoted_before_keeps_its_place_after_the_bump_is_given_up(
    clone: World,
) -> None:
    assert clone.run("pin.bump", f"v{CLEAN}").code == 0
    assert clone.run("pin.rollback").code == 0
    times = {state.name: state.recorded for state in known_good.states(clone.layout)}
    killed = clone.run("pin.bump", f"v{CLEAN}", through=[sys.executable, "-Es", "-c", KILLED])
    assert killed.code == -signal.SIGKILL, killed.output
    ended = clone.run("patch.continue", "--abort")
    assert ended.code == 0, ended.output
    after = {state.name: state.recorded for state in known_good.states(clone.layout)}
    (bumped,) = (name for name in times if name.startswith(f"v{CLEAN}"))
    assert after[bumped] == times[bumped]


def changed_by_a_move(paths: set[str]) -> set[str]:
    """Return the files in which the two releases differ, and all folders."""
    names = (
        "vendor/vllm/setup.py",
        "vendor/vllm/vllm/__init__.py",
        "vendor/pins.toml",
        "vendor/vllm/vllm/_version.py",
    )
    return {path for path in paths if path in names or not Path(path).suffix or "egg-info" in path}


def test_tree_with_edits_is_refused_and_no_sandbox_is_made(clone: World) -> None:
    edited = clone.layout.vllm / "vllm" / "envs.py"
    text = edited.read_text()
    edited.write_text(text + "# mine\n")
    assert "has edits (vllm/envs.py)" in clone.run("pin.bump", f"v{CLEAN}").error(3)
    assert not clone.layout.bump_sandbox.exists()
