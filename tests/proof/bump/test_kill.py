"""Single kills of verbs that write patches and pins, each at a call at which one was once not made good."""

from tests.pin.test_back import pretend_good
from tests.pin.test_kill import kill
from tests.small.world import World


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
