"""Which states are recorded as known-good."""

from tests.small.materials import git
from tests.small.world import World
from workspace.bump import known_good
from workspace.core import settings
from workspace.install import plan


def names(world: World) -> list[str]:
    return [found.name for found in known_good.states(world.layout)]


def refusal(world: World) -> str:
    observed = plan.observe(world.layout, settings.load(world.layout, environ=world.env))
    return known_good.refusal(world.layout, observed) or ""


def test_only_a_clean_exported_tree_whose_smoke_passed_is_good(clone: World) -> None:
    layout, tree = clone.layout, clone.git("rev-parse", "HEAD^{tree}")
    name = f"v0.31.0-{tree[:12]}"
    assert names(clone) == [name]
    assert refusal(clone) == ""

    # References: the superproject's commit has pins, patches and gitlink; vendor/vllm has its
    # commit.
    assert git(clone.root, "rev-parse", f"refs/good/{name}") == git(clone.root, "rev-parse", "HEAD")
    assert clone.git("rev-parse", f"refs/good/{name}") == clone.git("rev-parse", "HEAD")
    assert {path.name for path in known_good.kernels(layout, name).rglob("*.so")} == {
        path.name for path in (layout.vllm / "vllm").glob("*.so")
    }
    assert (
        "torch==2.13.0+cpu" in (known_good.folder(layout, name) / "freeze.txt").read_text().split()
    )

    # A tree with edits, or with a smoke of another tree, is not known-good.
    package = layout.vllm / "vllm" / "envs.py"
    package.write_text(package.read_text() + "# mine\n")
    assert "vendor/vllm has edits" in refusal(clone)
    clone.git("commit", "--quiet", "--all", "-m", "Mine\n\nUpstream-Status: Pending")
    assert "vendor/vllm differs from what the series makes" in refusal(clone)
    clone.git("checkout", "--quiet", "--", ".")
    clone.git("reset", "--quiet", "--hard", "HEAD~1")
    layout.smoke_record.write_text(layout.smoke_record.read_text().replace(tree, "0" * 40))
    assert "the smoke has not passed on this tree" in refusal(clone)
