"""What is killed: a verb, from a state in which it has something to do. Here bootstrap's; those of
patches and pins are in moves.py.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass

from tests.small.materials import git
from tests.small.world import World


@dataclass(frozen=True)
class KillCase:
    """A verb to kill. `prepare` brings a fresh world into the state to start from, `check` raises
    where something of the user's is gone.

    `again` does what a user does after the kill, by the command that the workspace names as next,
    until nothing is due; None where the same command line is all of it. It ends with `code` where
    nothing disturbs it. The disk is filled once stderr has `full_from`, or before the verb starts
    where that is empty.
    """

    name: str
    prepare: Callable[[World], None]
    argv: tuple[str, ...]
    check: Callable[[World], None]
    again: Callable[[World], None] | None = None
    full_from: str = "done *preflight"
    code: int = 0

    def go_on(self, world: World) -> None:
        """Bring what a kill, or nothing, has left to the end. Raises AssertionError with what a
        command printed that does not end as it should.
        """
        if self.again is None:
            ended = world.run(*self.argv)
            assert ended.code == 0, f"the next run: {ended.output}"
        else:
            self.again(world)


def plant(world: World) -> None:
    """What a user may have in a clone before anything is built."""
    git(world.root, "branch", "side")
    (world.root / "notes.txt").write_text("mine\n")
    (world.root / "requirements" / "tools.in").write_text("# mine\n")
    (world.folder / "cache" / "mine.txt").write_text("mine\n")


def check_planted(world: World) -> None:
    assert git(world.root, "rev-parse", "side") == git(world.root, "rev-parse", "HEAD")
    assert (world.root / "notes.txt").read_text() == "mine\n"
    assert (world.root / "requirements" / "tools.in").read_text() == "# mine\n"
    assert (world.folder / "cache" / "mine.txt").read_text() == "mine\n"


def write_dotenv(world: World) -> None:
    world.layout.dotenv.write_text("# mine\nMAX_JOBS=3\nVLLM_API_KEY=hush\n")


def check_dotenv(world: World) -> None:
    assert world.layout.dotenv.read_text() == "# mine\nMAX_JOBS=3\nVLLM_API_KEY=hush\n"


def commit_and_edit(world: World) -> None:
    """A commit, a branch with another one, an edit and a new file in vendor/vllm."""
    mine = world.layout.vllm / "vllm" / "mine.py"
    mine.write_text("MINE = 1\n")
    world.git("add", "--all")
    world.git("commit", "-m", "Mine")
    world.git("branch", "topic")
    mine.write_text("MINE = 2\n")
    (world.layout.vllm / "vllm" / "new.py").write_text("NEW = 3\n")


def check_commit(world: World) -> None:
    assert world.git("show", "HEAD:vllm/mine.py") == "MINE = 1"
    assert world.git("show", "topic:vllm/mine.py") == "MINE = 1"


def check_edit(world: World) -> None:
    check_commit(world)
    assert (world.layout.vllm / "vllm" / "mine.py").read_text() == "MINE = 2\n"
    assert (world.layout.vllm / "vllm" / "new.py").read_text() == "NEW = 3\n"


def fresh_release(world: World) -> None:
    plant(world)


def fresh_git(world: World) -> None:
    plant(world)
    world.env["SOURCE"] = "git"


def environment_gone(world: World) -> None:
    """The user works in the tree, and .vllm is not there any more."""
    plant(world)
    write_dotenv(world)
    world.bootstrap()
    commit_and_edit(world)
    shutil.rmtree(world.layout.environment)


def check_environment_gone(world: World) -> None:
    check_planted(world)
    check_dotenv(world)
    check_edit(world)


def requirements_grew(world: World) -> None:
    """Everything is installed, and an edit of the requirements makes environment and install
    stale.
    """
    environment_gone(world)
    world.bootstrap()
    common = world.layout.vllm / "requirements" / "common.txt"
    common.write_text(common.read_text() + "triton\n")
    xgrammar = [path for path in common.parent.glob("*.txt") if "xgrammar" in path.read_text()]
    assert xgrammar
    world.uv("install", "numba==0.65.0", "--reinstall")
    world.uv("uninstall", "tokenizers")


def check_requirements_grew(world: World) -> None:
    check_environment_gone(world)
    assert (world.layout.vllm / "requirements" / "common.txt").read_text().endswith("triton\n")


def submodule_emptied(world: World) -> None:
    """`git submodule deinit` took the files away; the commits are in the superproject's git
    directory.
    """
    plant(world)
    write_dotenv(world)
    world.env["SOURCE"] = "git"
    world.bootstrap()
    commit_and_edit(world)
    world.git("checkout", "--force", "HEAD")
    (world.layout.vllm / "vllm" / "new.py").unlink()
    for entry in world.layout.vllm.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def check_submodule_emptied(world: World) -> None:
    check_planted(world)
    check_dotenv(world)
    check_commit(world)


def patches_off(world: World) -> None:
    """The user went back to the base: the series is to be applied, and everything that was built of
    it is stale.
    """
    plant(world)
    write_dotenv(world)
    world.bootstrap()
    world.git("branch", "topic")
    (world.layout.vllm / "new.txt").write_text("mine\n")
    world.git("checkout", "--quiet", "--detach", world.materials.archive_commit)


def check_patches_off(world: World) -> None:
    check_planted(world)
    check_dotenv(world)
    assert world.git("rev-parse", "topic^") == world.materials.archive_commit
    assert (world.layout.vllm / "new.txt").read_text() == "mine\n"


BOOTSTRAP: tuple[KillCase, ...] = (
    KillCase("bootstrap from the release archive", fresh_release, ("bootstrap",), check_planted),
    KillCase("bootstrap from git", fresh_git, ("bootstrap",), check_planted),
    KillCase(
        "bootstrap without .vllm, work in the tree",
        environment_gone,
        ("bootstrap",),
        check_environment_gone,
    ),
    KillCase(
        "bootstrap after an edit of the requirements",
        requirements_grew,
        ("bootstrap",),
        check_requirements_grew,
    ),
    KillCase(
        "bootstrap of an emptied submodule",
        submodule_emptied,
        ("bootstrap",),
        check_submodule_emptied,
    ),
    KillCase(
        "bootstrap with the patches taken off", patches_off, ("bootstrap",), check_patches_off
    ),
)
