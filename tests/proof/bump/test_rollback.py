"""What a rollback keeps of the state before it."""

from tests.bump.test_rollback import pretend_good
from tests.small.materials import git
from tests.small.world import World
from workspace.repo import pins


def test_uncommitted_pins_and_patches_and_unexported_commits_are_kept_under_references(
    clone: World,
) -> None:
    layout = clone.layout
    wanted = pretend_good(clone, "v0.31.0")
    (layout.patches("vllm") / "mine.patch").write_text("not in the series yet\n")
    layout.pins.write_text(layout.pins.read_text() + "# my remark\n")
    (layout.vllm / "mine.py").write_text("MINE = 1\n")
    clone.git("add", "mine.py")
    clone.git("commit", "--quiet", "-m", "Mine")
    mine, tag = clone.git("rev-parse", "HEAD"), pins.load(layout.pins).vllm.tag
    ended = clone.run("pin.rollback", "--good", wanted, "--force")
    assert ended.code == 0, ended.output
    assert clone.git("rev-parse", "HEAD") == clone.git("rev-parse", f"{mine}~1")
    left = git(clone.root, "for-each-ref", "--format=%(refname)", "refs/left")
    assert clone.git("rev-parse", left) == mine
    assert git(clone.root, "show", f"{left}:patches/vllm/mine.patch") == "not in the series yet"
    assert "# my remark" in git(clone.root, "show", f"{left}:vendor/pins.toml")
    assert (layout.patches("vllm") / "mine.patch").exists(), (
        "a file that no series names is the user's"
    )
    assert pins.load(layout.pins).vllm.tag == tag
