"""What is recorded as good, and what not."""

from tests.pin.conftest import RECORD, run, smoke
from tests.small.materials import git
from tests.small.world import World
from workspace.pin import good


def names(world: World) -> list[str]:
    return [found.name for found in good.every(world.layout)]


def test_only_a_clean_exported_tree_whose_smoke_passed_is_good_and_the_newest_three_stay(clone: World) -> None:
    layout, tree = clone.layout, clone.git("rev-parse", "HEAD^{tree}")
    first = f"v0.31.0-{tree[:12]}"
    assert names(clone) == [first]

    # Its references: the superproject's commit holds pins, patches and gitlink as they are, vendor/vllm's the commit.
    assert git(clone.root, "rev-parse", f"refs/good/{first}") == git(clone.root, "rev-parse", "HEAD")
    assert clone.git("rev-parse", f"refs/good/{first}") == clone.git("rev-parse", "HEAD")
    assert {path.name for path in good.kernels(layout, first).rglob("*.so")} == {path.name for path in (layout.vllm / "vllm").glob("*.so")}
    assert "torch==2.13.0+cpu" in (good.folder(layout, first) / "freeze.txt").read_text().split()

    # Edits, and a smoke of another tree, are no ground.
    package = layout.vllm / "vllm" / "envs.py"
    text = package.read_text()
    package.write_text(text + "# mine\n")
    assert "not recorded as good: vendor/vllm has edits" in run(clone, *RECORD).err
    clone.git("commit", "--quiet", "--all", "-m", "Mine\n\nUpstream-Status: Pending")
    assert "not recorded as good: vendor/vllm holds something else" in run(clone, *RECORD).err
    ended = clone.run("patch.export")
    assert ended.code == 0, ended.said
    assert "not recorded as good: the smoke has not passed on this tree" in run(clone, *RECORD).err
    assert names(clone) == [first]

    # With patches that are not committed the reference is a commit of its own, and no branch moved.
    (clone.root / "README.md").write_text("staged, and no business of a good state\n")
    git(clone.root, "add", "README.md")
    head = git(clone.root, "rev-parse", "HEAD")
    assert smoke(clone).code == 0
    second = names(clone)[0]
    assert second != first
    kept = git(clone.root, "rev-parse", f"refs/good/{second}")
    assert git(clone.root, "rev-parse", f"{kept}^", "HEAD").split() == [head, head]
    assert set(git(clone.root, "diff", "--name-only", head, kept).split()) == {"patches/vllm/Mine.patch", "patches/vllm/series"}
    assert git(clone.root, "ls-tree", kept, "vendor/vllm").split()[2] == clone.materials.commit
    assert git(clone.root, "diff", "--cached", "--name-only") == "README.md"

    # The oldest goes, with its references; never the one in use.
    for number in (3, 4):
        record = (good.folder(layout, second) / "good.json").read_text()
        other = f"v0.0.{number}-{'0' * 12}"
        (layout.goods / other).mkdir()
        (layout.goods / other / "good.json").write_text(record.replace(second, other))
        clone.git("update-ref", f"refs/good/{other}", "HEAD")
    assert run(clone, *RECORD).code == 0
    assert len(names(clone)) == good.KEPT
    assert names(clone)[0] == second
    assert first not in names(clone)
    assert not good.folder(layout, first).exists()
    assert clone.git("for-each-ref", f"refs/good/{first}") == ""
    assert git(clone.root, "for-each-ref", f"refs/good/{first}") == ""
