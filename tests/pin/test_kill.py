"""A few of the kills of tests/proof/kill: verbs on patches and the return to a good state, ended at calls of their own."""

from pathlib import Path

from tests.pin.test_back import pretend_good
from tests.proof.kill import judge, launcher
from tests.small.world import World


def kill(world: World, call: int, *words: str) -> None:
    """End a verb before its call of that number."""
    launch = [*world.argv()[:3], str(Path(launcher.__file__)), str(world.folder / "calls"), str(call), "before"]
    ended = world.run(*words, through=launch)
    assert ended.code == -9, (world.folder / "calls").read_text() + ended.said
    _, living = judge.await_no_stray(f"HOME={world.folder / 'home'}")
    assert not living


def test_killed_apply_is_finished_by_the_next(clone: World) -> None:
    tip = clone.git("rev-parse", "HEAD")
    clone.git("checkout", "--quiet", "--detach", "HEAD~1")
    (clone.layout.vllm / "new.txt").write_text("mine\n")
    kill(clone, 45, "patch.apply")
    ended = clone.run("patch.apply")
    assert ended.code == 0, ended.said
    assert clone.git("rev-parse", "HEAD", "refs/patches/tip").split() == [tip, tip]
    assert clone.git("status", "--porcelain") == "?? new.txt"


def test_killed_export_is_finished_by_the_next(clone: World) -> None:
    clone.git("checkout", "--quiet", "--detach", "HEAD~1")
    (clone.layout.vllm / "vllm" / "mine.py").write_text("MINE = 1\n")
    clone.git("add", "vllm/mine.py")
    clone.git("commit", "--quiet", "-m", "Mine\n\nUpstream-Status: Pending")
    kill(clone, 14, "patch.export")
    ended = clone.run("patch.export")
    assert ended.code == 0, ended.said
    patches = clone.layout.patches("vllm")
    assert sorted(path.name for path in patches.iterdir()) == ["Mine.patch", "series"]
    assert not list(patches.parent.glob(".*"))
    assert clone.status()["patches"] == "ok"


def test_killed_return_is_finished_by_the_next(clone: World) -> None:
    wanted, tip = pretend_good(clone, "v0.31.0"), clone.git("rev-parse", "HEAD")
    kill(clone, 46, "pin.back", "--good", wanted)
    assert (clone.layout.state / "back.json").exists()
    assert "./scripts/inv pin.back" in clone.status()["next"]
    ended = clone.run("pin.back")
    assert ended.code == 0, ended.said
    assert not (clone.layout.state / "back.json").exists()
    # The series of that state is this one's, and bootstrap, a part of the return, has put it on.
    assert tip in clone.git("rev-list", "--all", "HEAD").split()
    assert clone.status()["install"] == "ok"
