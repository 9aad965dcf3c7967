"""One of the kills of tests/proof/kill, at one call of the verb itself."""

from pathlib import Path

from tests.proof.kill import judge, launcher
from tests.small.world import World


def kill(world: World, call: int, *args: str) -> None:
    """Kill a verb before its call of this number."""
    launch = [
        *world.argv()[:3],
        str(Path(launcher.__file__)),
        str(world.folder / "calls"),
        str(call),
        "before",
    ]
    ended = world.run(*args, through=launch)
    assert ended.code == -9, (world.folder / "calls").read_text() + ended.output
    _, living = judge.await_no_stray(f"HOME={world.folder / 'home'}")
    assert not living


def test_killed_apply_is_finished_by_the_next(clone: World) -> None:
    tip = clone.git("rev-parse", "HEAD")
    clone.git("checkout", "--quiet", "--detach", "HEAD~1")
    (clone.layout.vllm / "new.txt").write_text("mine\n")
    kill(clone, 45, "patch.apply")
    ended = clone.run("patch.apply")
    assert ended.code == 0, ended.output
    assert clone.git("rev-parse", "HEAD", "refs/patches/tip").split() == [tip, tip]
    assert clone.git("status", "--porcelain") == "?? new.txt"
