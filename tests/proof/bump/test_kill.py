"""Kills of verbs that write patches and pins, at calls that once failed."""

import shutil
from pathlib import Path

import pytest

from tests.bump.test_kill import kill
from tests.bump.test_rollback import pretend_good
from tests.proof.bump.test_bump import CONFLICTS, assert_is_on
from tests.small.materials import git
from tests.small.releases import CONFLICT
from tests.small.world import World

# This program is before git on PATH. A command line with both arguments runs, then the power fails:
# the verb dies, and a part of what git wrote is lost.
CUT = """#!/bin/sh
case " $* " in
*" @FIRST@ "*"@SECOND@ "*)
  rm -- "$0"
  @GIT@ "$@"
  cd "$(@GIT@ -C "$2" rev-parse --absolute-git-dir)"
  @DAMAGE@
  kill -9 @VICTIM@
  exit 9;;
esac
exec @GIT@ "$@"
"""


def cut_power(
    world: World,
    git_args: tuple[str, str],
    damage: str,
    *verb: str,
    victim: str = "$PPID",
    code: int = -9,
) -> None:
    """Run a verb whose machine stops as the git with these arguments ends.

    `damage` are shell commands that run in that git's directory.
    """
    folder = world.folder / "programs"
    folder.mkdir(exist_ok=True)
    text = (
        CUT.replace("@FIRST@", git_args[0])
        .replace("@SECOND@", git_args[1])
        .replace("@DAMAGE@", damage)
        .replace("@GIT@", shutil.which("git") or "")
        .replace("@VICTIM@", victim)
    )
    (folder / "git").write_text(text)
    (folder / "git").chmod(0o755)
    ended = world.run(*verb, env={"PATH": f"{folder}:{world.env['PATH']}"})
    assert ended.code == code, ended.output
    assert not (folder / "git").exists()


@pytest.fixture
def three_patches(clone: World) -> Path:
    """Make three patches, of which the second conflicts in 0.33.0; return the sandbox's tree.

    The first patch adds a file.
    """
    tip, setup, status = (
        clone.git("rev-parse", "HEAD"),
        clone.layout.vllm / "setup.py",
        "\n\nUpstream-Status: Pending",
    )
    clone.git("checkout", "--quiet", "--detach", clone.materials.archive_commit)
    (clone.layout.vllm / "vllm" / "amx.py").write_text("AMX = 1\n")
    clone.git("add", "vllm/amx.py")
    clone.git("commit", "--quiet", "-m", "Add AMX" + status)
    clone.git("cherry-pick", tip)
    line = '                        "vllm/_C_AVX512.abi3.so",\n'
    setup.write_text(setup.read_text().replace(line, line + line.replace("AVX512", "AMX")))
    clone.git("commit", "--quiet", "--all", "-m", "Take one more" + status)
    ended = clone.run("patch.export")
    assert ended.code == 0, ended.output
    return clone.layout.bump_sandbox / "vendor" / "vllm"


def resolve(tree: Path) -> None:
    here = tree / "setup.py"
    here.write_text(CONFLICTS.sub(lambda found: found[2], here.read_text()))
    git(tree, "add", "setup.py")


DAMAGE = {
    "notes": "test ! -d rebase-apply || : > rebase-apply/next",
    "index": ": > index",
    "files": ': > "$(dirname "$(cat gitdir)")/setup.py"',
    "nothing": "true",
}


def test_resolved_conflict_of_a_bump_survives_a_kill_while_git_continues(
    clone: World, three_patches: Path
) -> None:
    assert "patch 2 of 3" in clone.run("pin.bump", CONFLICT).error(4)
    resolve(three_patches)
    (three_patches / "setup.py").write_text(
        (three_patches / "setup.py").read_text() + "# by hand\n"
    )
    git(three_patches, "add", "setup.py")
    cut_power(clone, ("am", "--continue"), "true", "patch.continue")
    ended = clone.run("patch.continue")
    if ended.code == 4:
        assert "Take-one-more.patch" in ended.error(4)
        resolve(three_patches)
        ended = clone.run("patch.continue")
    assert ended.code == 0, ended.output
    assert clone.git("show", "HEAD~1:setup.py").endswith("# by hand")
    assert clone.git("log", "--format=%s", "-1") == "Take one more"
    assert_is_on(clone, CONFLICT)


@pytest.mark.parametrize("damage", DAMAGE)
def test_power_cut_while_a_bumps_patches_are_put_on_costs_no_more_than_their_conflict(
    clone: World, three_patches: Path, damage: str
) -> None:
    cut_power(clone, (str(three_patches), "am"), DAMAGE[damage], "pin.bump", CONFLICT)
    ended = clone.run("pin.bump", CONFLICT)
    assert "patch 2 of 3" in ended.error(4)
    assert "conflict in setup.py" in ended.err
    assert git(three_patches, "status", "--porcelain") == "UU setup.py"


def test_git_alone_that_is_killed_while_a_bumps_patches_are_put_on_is_no_conflict(
    clone: World, three_patches: Path
) -> None:
    cut_power(
        clone,
        (str(three_patches), "am"),
        "rm rebase-apply/patch; echo 1 > rebase-apply/next",
        "pin.bump",
        CONFLICT,
        victim="$$",
        code=6,
    )
    assert "conflict in setup.py" in clone.run("pin.bump", CONFLICT).err
    assert git(three_patches, "status", "--porcelain") == "UU setup.py"


def test_killed_export_is_finished_by_the_next(clone: World) -> None:
    clone.git("checkout", "--quiet", "--detach", "HEAD~1")
    (clone.layout.vllm / "vllm" / "mine.py").write_text("MINE = 1\n")
    clone.git("add", "vllm/mine.py")
    clone.git("commit", "--quiet", "-m", "Mine\n\nUpstream-Status: Pending")
    kill(clone, 14, "patch.export")
    ended = clone.run("patch.export")
    assert ended.code == 0, ended.output
    patches = clone.layout.patches("vllm")
    assert sorted(path.name for path in patches.iterdir()) == ["Mine.patch", "series"]
    assert not list(patches.parent.glob(".*"))
    assert clone.status()["patches"] == "ok"


def test_killed_rollback_is_finished_by_the_next(clone: World) -> None:
    wanted, tip = pretend_good(clone, "v0.31.0"), clone.git("rev-parse", "HEAD")
    kill(clone, 57, "pin.rollback", "--good", wanted)
    assert (clone.layout.state / "back.json").exists()
    assert "./scripts/inv pin.rollback" in clone.status()["next"]
    ended = clone.run("pin.rollback")
    assert ended.code == 0, ended.output
    assert not (clone.layout.state / "back.json").exists()
    # That state has the present series, and bootstrap, a part of the rollback, applied it.
    assert tip in clone.git("rev-list", "--all", "HEAD").split()
    assert clone.status()["install"] == "ok"
