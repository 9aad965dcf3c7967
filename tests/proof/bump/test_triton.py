"""Triton's checkout moves with its pin only if it has no edits or commits of the user."""

from pathlib import Path

from tests.bump.test_triton import triton
from tests.small.materials import git
from tests.small.world import World

__all__ = ["triton"]


def test_clean_checkout_moves_along_and_one_with_edits_or_commits_stays(
    world: World, triton: Path
) -> None:
    tree, first, new = (
        world.layout.triton,
        git(triton, "rev-parse", "main~1"),
        git(triton, "rev-parse", "main"),
    )
    git(triton, "clone", "--quiet", triton.as_uri(), str(tree))
    git(tree, "checkout", "--quiet", "--detach", first)
    (tree / "file").write_text("mine\n")
    before = world.layout.pins.read_bytes()
    assert "vendor/triton has edits (file)" in world.run("pin.bump", "triton").error(3)
    git(tree, "commit", "--quiet", "--all", "-m", "Mine")
    assert "is not what pin and patches make" in world.run("pin.bump", "triton").error(3)
    assert world.layout.pins.read_bytes() == before
    git(tree, "branch", "mine")
    git(tree, "checkout", "--quiet", "--detach", first)
    assert "1 commit ahead" in world.run("pin.show").out
    ended = world.run("pin.bump", "triton")
    assert ended.code == 0, ended.output
    assert (git(tree, "rev-parse", "HEAD"), (tree / "file").read_text()) == (new, "two\n")
    assert git(tree, "rev-parse", "mine~1") == first
    assert "nothing to do" in world.run("pin.bump", "triton").err
