"""Long paths of a bump: from git, with upstreamed patches, with lost environments, with kills."""

import datetime
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bump.conftest import ROWS, judge_at_once, smoke, user_files
from tests.proof.hints.following import User
from tests.small.index import Fault
from tests.small.materials import Materials, git
from tests.small.releases import CLEAN, CONFLICT, RED, UPSTREAMED, Releases
from tests.small.world import World, make_world
from workspace.bump import known_good
from workspace.repo import pins

CONFLICTS = re.compile(
    r"<<<<<<< .*?\n(.*?)(?:\|\|\|\|\|\|\|.*?)?=======\n(.*?)>>>>>>> [^\n]*\n", re.DOTALL
)


def assert_is_on(world: World, version: str) -> None:
    assert pins.load(world.layout.pins).vllm.tag == f"v{version}"
    assert {name: state for name, state in world.status().items() if name in ROWS} == dict.fromkeys(
        ROWS, "ok"
    )
    assert world.python("import vllm; print(vllm.__version__)") == f"{version}+cpu"
    assert world.git("status", "--porcelain") == ""


def test_concurrent_bump_is_refused_with_the_lock_holder_and_a_killed_bump_is_finished(
    clone: World,
) -> None:
    before = user_files(clone)
    gate = clone.index.gate("xgrammar")
    clone.env["UV_NO_CACHE"] = "1"
    child = clone.start("pin.bump", f"v{CLEAN}")
    gate.wait()
    assert "inv pin.bump" in clone.run("pin.bump", f"v{CLEAN}").error(12)
    assert "inv pin.bump" in clone.run("patch.continue", "--abort").error(12)
    clone.kill(child)
    gate.opened.set()
    clone.index.faults.clear()
    assert user_files(clone) == before
    ended = clone.run("pin.bump", f"v{CLEAN}")
    assert ended.code == 0, ended.output
    assert_is_on(clone, CLEAN)


def test_bump_rollback_bump_and_a_pin_by_upstreams_commit_once_it_can_be_reached(
    clone: World, releases: Releases
) -> None:
    layout = clone.layout
    for args in (("pin.bump", f"v{CLEAN}"), ("pin.rollback",)):
        ended = clone.run(*args)
        assert ended.code == 0, ended.output
    name = next(
        row["facts"]["name"]
        for row in shown(clone)
        if row["name"] == "good" and not row["facts"]["current"]
    )
    ended = clone.run("pin.rollback", "--good", name)
    assert ended.code == 0, ended.output
    assert clone.python("import vllm; print(vllm.RELEASE)") == CLEAN
    assert clone.status()["smoke"] == "ok"

    # Once upstream's git can be reached, the same release is pinned by its own commit without a
    # build.
    clone.env["VLLM_MIRROR"] = releases.upstream.as_uri()
    head = clone.git("rev-parse", "HEAD")
    ended = clone.run("pin.bump", f"v{CLEAN}")
    assert "pinned by upstream's own commit now" in ended.err, ended.output
    assert (
        git(clone.root, "ls-files", "-s", "vendor/vllm").split()[1]
        == releases.commit(CLEAN)
        == pins.load(layout.pins).vllm.commit
    )
    type_hint(clone, ended.err.splitlines()[-1])
    changed = git(clone.root, "status", "--porcelain", "--untracked-files=no")
    assert changed == ""
    assert git(clone.root, "show", "--format=%s", "--name-only", "HEAD").splitlines()[0] == "Moved"
    assert (
        clone.git("rev-parse", "HEAD"),
        clone.status()["patches"],
        clone.status()["install"],
    ) == (head, "ok", "ok")


def type_hint(world: World, line: str) -> None:
    """Type the command of a hint; the editor of git writes one line."""
    user = User(world)
    editor = world.folder / "subject-editor"
    editor.write_text('#!/bin/sh\necho Moved > "$1"\n')
    editor.chmod(0o755)
    ended = user.type(line.removeprefix("hint: ").partition("    ")[0], GIT_EDITOR=str(editor))
    assert ended.code == 0, ended.output


def shown(world: World) -> list[dict]:
    ended = world.run("pin.show", "--json", "--offline")
    assert ended.code == 0, ended.output
    return json.loads(ended.out)["rows"]


def test_abort_changes_nothing_and_keeps_the_work_of_the_sandbox(clone: World) -> None:
    before = user_files(clone)
    ended = clone.run("pin.bump", f"v{CONFLICT}")
    assert "patch 1 of 1, patches/vllm/" in ended.error(4)
    assert "conflict in setup.py" in ended.err
    ((clone.layout.bump_sandbox / "vendor" / "vllm") / "mine.py").write_text("MINE = 1\n")
    ended = clone.run("patch.continue", "--abort")
    assert ended.code == 0, ended.output
    assert user_files(clone) == before
    assert not clone.layout.bump_sandbox.exists()
    left = clone.git("for-each-ref", "--format=%(refname)", "refs/pins/left-*").strip()
    assert left in ended.err
    assert clone.git("show", f"{left}:mine.py") == "MINE = 1"
    assert len(clone.git("worktree", "list").splitlines()) == 1


def test_bump_that_waits_is_shown_and_a_commit_that_came_meanwhile_is_not_lost(
    clone: World,
) -> None:
    clone.run("pin.bump", f"v{CONFLICT}").error(4)
    bump = next(row for row in shown(clone) if row["name"] == "bump")
    assert "patch 1 of 1 conflicts in setup.py" in bump["text"]
    clone.git("commit", "--quiet", "--allow-empty", "-m", "Meanwhile")
    assert "is no longer at" in clone.run("patch.continue").error(3)
    clone.git("reset", "--quiet", "--soft", "HEAD~1")
    ended = clone.run("patch.continue", "--abort")
    assert ended.code == 0, ended.output
    assert "bump" not in {row["name"] for row in shown(clone)}


def test_impossible_target_is_refused_and_no_sandbox_is_made(
    clone: World, releases: Releases
) -> None:
    day = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=2)
    releases.publish(clone, CLEAN, when=day.strftime("%Y-%m-%dT%H:%M:%S.000000Z"))
    assert "was published 2.0 days ago; PIN_MIN_AGE_DAYS requires 7" in clone.run(
        "pin.bump", f"v{CLEAN}"
    ).error(2)
    edited = clone.layout.vllm / "vllm" / "envs.py"
    edited.write_text(edited.read_text() + "# mine\n")
    clone.git("commit", "--quiet", "--all", "-m", "Mine")
    assert "patch.export" in clone.run("pin.bump", f"v{CLEAN}").err
    clone.git("reset", "--quiet", "--hard", "HEAD~1")
    assert "0.99.0" in clone.run("pin.bump", "v0.99.0").error(11)
    ended = clone.run("pin.bump", "v0.31.0")
    assert ended.code == 0, ended.output
    assert "nothing to do: v0.31.0 is pinned already" in ended.err
    clone.index.faults["vllm"] = Fault(status=503)
    clone.run("pin.bump", f"v{CONFLICT}").error(11)
    assert "newer         unknown: " in clone.run("pin.show").out
    assert not clone.layout.bump_sandbox.exists()


def test_patch_that_upstream_has_is_dropped_and_reported(clone: World) -> None:
    ended = clone.run("pin.bump", UPSTREAMED)
    assert ended.code == 0, ended.output
    assert "0 of 1 on v0.34.0; upstream has" in ended.err
    assert not (clone.layout.patches("vllm") / clone.materials.patch.name).exists()
    assert (
        f"Dropped {clone.materials.patch.name}: upstream has it"
        in (clone.layout.state / "bump-message.txt").read_text()
    )
    assert_is_on(clone, UPSTREAMED)
    ended = clone.run("pin.rollback")
    assert ended.code == 0, ended.output
    assert_is_on(clone, "0.31.0")
    assert (clone.layout.patches("vllm") / clone.materials.patch.name).exists()


def test_environment_that_was_not_kept_is_built_again_with_its_versions(clone: World) -> None:
    clone.uv("install", "xgrammar==0.2.7", "numba==0.65.0")
    # The smoke refuses a stale environment: bootstrap first accepts the packages installed by hand.
    (clone.layout.environment / ".workspace" / "environment.json").unlink()
    clone.bootstrap()
    assert smoke(clone).code == 0
    assert (
        "numba==0.65.0"
        in (
            known_good.folder(clone.layout, known_good.states(clone.layout)[0].name) / "freeze.txt"
        ).read_text()
    )
    ended = clone.run("pin.bump", f"v{CLEAN}")
    assert ended.code == 0, ended.output
    kept = list(clone.layout.known_good_states.glob("*/environment"))
    assert len(kept) == 1
    kept[0].rename(clone.folder / "lost")
    ended = clone.run("pin.rollback")
    assert ended.code == 0, ended.output
    assert_is_on(clone, "0.31.0")
    assert "numba" in clone.uv("list")


def test_conflict_waits_in_the_sandbox_until_it_is_resolved_and_the_bump_resumes(
    clone: World,
) -> None:
    before = user_files(clone)
    ended = clone.run("pin.bump", f"v{CONFLICT}")
    assert "patch 1 of 1, patches/vllm/" in ended.error(4)
    assert "conflict in setup.py" in ended.err
    for args in (
        "git -C .workspace/bump/vendor/vllm add setup.py",
        "patch.continue",
        "--skip",
        "--abort",
    ):
        assert args in ended.err
    assert user_files(clone) == before
    # Run other verbs, then the bump to another release, and the same bump again.
    assert "a bump to v0.33.0 is under way" in clone.run("pin.bump", f"v{CLEAN}").error(3)
    assert "patch 1 of 1" in clone.run("pin.bump", f"v{CONFLICT}").error(4)
    assert "is under way" in clone.run("pin.rollback").error(3)
    setup = (clone.layout.bump_sandbox / "vendor" / "vllm") / "setup.py"
    text = setup.read_text()
    start, end = text.index("<<<<<<<"), text.index("\n", text.index(">>>>>>>")) + 1
    line = '                        "vllm/_C.abi3.so",\n'
    setup.write_text(
        text[:start]
        + line
        + line.replace("_C", "_C_AVX2")
        + line.replace("_C", "_C_AVX512")
        + text[end:]
    )
    git((clone.layout.bump_sandbox / "vendor" / "vllm"), "add", "setup.py")
    assert user_files(clone) == before
    ended = clone.run("patch.continue")
    assert ended.code == 0, ended.output
    assert_is_on(clone, CONFLICT)
    assert "_C_AVX2" in (clone.layout.patches("vllm") / clone.materials.patch.name).read_text()
    assert clone.python("import vllm; print(vllm.RELEASE)") == CONFLICT


def test_red_smoke_changes_nothing_and_a_fix_that_is_committed_there_goes_with_the_bump(
    clone: World,
) -> None:
    before = user_files(clone)
    ended = clone.run("pin.bump", RED)
    assert "checks failed: parity.llama" in ended.error(8)
    assert "the working tree is untouched" in ended.err
    assert "a fix is committed in .workspace/bump/vendor/vllm" in ended.err
    assert user_files(clone) == before
    package = (clone.layout.bump_sandbox / "vendor" / "vllm") / "vllm" / "__init__.py"
    package.write_text(package.read_text().replace("BROKEN = True\n", ""))
    assert "has edits (vllm/__init__.py) that are not committed" in clone.run(
        "patch.continue"
    ).error(3)
    git(
        (clone.layout.bump_sandbox / "vendor" / "vllm"),
        "commit",
        "--quiet",
        "--all",
        "-m",
        "Mend what is broken\n\nUpstream-Status: Pending",
    )
    ended = clone.run("pin.bump", RED)
    assert ended.code == 0, ended.output
    series = (clone.layout.patches("vllm") / "series").read_text().split()
    assert series[-2:] == [clone.materials.patch.name, "Mend-what-is-broken.patch"]
    assert clone.status()["patches"] == "ok"


@pytest.fixture
def from_git(materials: Materials, releases: Releases, tmp_path) -> Iterator[World]:
    made = make_world(materials, tmp_path)
    judge_at_once(made.layout.probes)
    git(made.root, "commit", "--quiet", "--all", "-m", "A smoke for the small world")
    made.env |= {"VLLM_MIRROR": releases.upstream.as_uri(), "SOURCE": "git"}
    made.bootstrap()
    assert smoke(made).code == 0
    releases.publish(made, *releases.files)
    yield made
    made.end()


def test_submodule_is_moved_with_its_gitlink_and_a_patched_commit_is_never_staged(
    from_git: World, releases: Releases
) -> None:
    before = user_files(from_git)
    ended = from_git.run("pin.bump", f"v{CLEAN}")
    assert ended.code == 0, ended.output
    assert before != user_files(from_git)
    assert_is_on(from_git, CLEAN)
    assert git(from_git.root, "ls-files", "-s", "vendor/vllm").split()[1] == releases.commit(CLEAN)
    git(from_git.root, "add", "vendor/pins.toml", "patches/vllm")
    git(from_git.root, "commit", "--quiet", "-F", ".workspace/bump-message.txt")
    assert git(from_git.root, "ls-tree", "HEAD", "vendor/vllm").split()[2] == releases.commit(CLEAN)
    assert git(from_git.root, "status", "--porcelain") == ""
    ended = from_git.run("pin.rollback")
    assert ended.code == 0, ended.output
    assert_is_on(from_git, "0.31.0")
    assert (
        git(from_git.root, "ls-files", "-s", "vendor/vllm").split()[1] == from_git.materials.commit
    )


@pytest.mark.parametrize("tenths", range(2, 42, 4))
def test_bump_that_was_killed_before_its_promotion_changed_nothing_and_resumes(
    clone: World, tenths: int
) -> None:
    before = user_files(clone)
    child = clone.start("pin.bump", f"v{CLEAN}")
    time.sleep(tenths / 10)
    clone.kill(child)
    if (
        pins.load(clone.layout.pins).vllm.tag == "v0.31.0"
        and not (clone.layout.bump_sandbox / "promoting.json").exists()
    ):
        assert user_files(clone) == before
    finish_bump(clone)


def test_promotion_that_cannot_be_given_up_is_finished_and_rolled_back_by_the_hint(
    clone: World,
) -> None:
    before = clone.git("rev-parse", "HEAD")
    promoting = clone.layout.bump_sandbox / "promoting.json"
    kill_after(clone, promoting, 0, "pin.bump", f"v{CLEAN}")
    assert promoting.exists()
    refused = clone.run("patch.continue", "--abort")
    assert "can only be finished" in refused.error(3)
    type_hint(clone, refused.err.splitlines()[-1])
    assert clone.git("rev-parse", "HEAD") == before
    assert clone.status()["patches"] == "ok"


@pytest.mark.parametrize("delay_ms", [*range(0, 480, 80), *range(600, 3600, 500)])
def test_promotion_that_was_killed_is_finished_by_the_next_bump(
    clone: World, delay_ms: int
) -> None:
    kill_after(
        clone, clone.layout.bump_sandbox / "promoting.json", delay_ms, "pin.bump", f"v{CLEAN}"
    )
    if clone.layout.bump_sandbox.exists():
        assert "can only be finished" in clone.run("patch.continue", "--abort").error(3)
    finish_bump(clone)
    assert clone.git("rev-parse", "refs/patches/tip") == clone.git("rev-parse", "HEAD")
    assert len(known_good.states(clone.layout)) >= 1


@pytest.mark.parametrize("delay_ms", range(0, 480, 40))
def test_killed_rollback_is_finished_by_the_next(clone: World, delay_ms: int) -> None:
    ended = clone.run("pin.bump", f"v{CLEAN}")
    assert ended.code == 0, ended.output
    redo_log = clone.layout.state / "back.json"
    kill_after(clone, redo_log, delay_ms, "pin.rollback")
    if redo_log.exists():
        ended = clone.run("pin.rollback")
        assert ended.code == 0, ended.output
    assert_is_on(clone, "0.31.0")
    assert not redo_log.exists()


def kill_after(world: World, path: Path, delay_ms: int, *args: str) -> None:
    """Start a verb, and kill it `delay_ms` after it wrote `path`."""
    child = world.start(*args)
    deadline = time.monotonic() + 120
    while not path.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert path.exists()
    time.sleep(delay_ms / 1000)
    world.kill(child)


def finish_bump(world: World) -> None:
    ended = world.run("pin.bump", f"v{CLEAN}")
    assert ended.code == 0, ended.output
    assert not world.layout.bump_sandbox.exists()
    assert_is_on(world, CLEAN)
