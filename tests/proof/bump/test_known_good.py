"""Known-good states with patches that are not committed, and which states are kept."""

import shutil

from tests.bump.conftest import smoke
from tests.bump.test_known_good import names
from tests.small.materials import git
from tests.small.world import World
from workspace.bump import known_good
from workspace.core.paths import Layout
from workspace.install import sandbox


def test_patches_that_are_not_committed_are_kept_too_and_the_newest_three_stay(
    clone: World,
) -> None:
    layout, first = clone.layout, names(clone)[0]
    package = layout.vllm / "vllm" / "envs.py"
    package.write_text(package.read_text() + "# mine\n")
    clone.git("commit", "--quiet", "--all", "-m", "Mine\n\nUpstream-Status: Pending")
    ended = clone.run("patch.export")
    assert ended.code == 0, ended.output
    refused = clone.session("record-good").err
    assert "not recorded as good: the smoke has not passed on this tree" in refused
    assert names(clone) == [first]

    # With uncommitted patches the reference is a separate commit; no branch moves.
    (clone.root / "README.md").write_text("staged, and not a part of a known-good state\n")
    git(clone.root, "add", "README.md")
    head = git(clone.root, "rev-parse", "HEAD")
    # The leftovers of a bump that was killed while it deleted its sandbox.
    gone = sandbox.discarded(Layout(layout.bump_sandbox))
    (gone / "vendor").mkdir(parents=True)
    clone.git(
        "worktree", "add", "--quiet", "--detach", str(layout.bump_sandbox / "vendor" / "vllm")
    )
    shutil.rmtree(layout.bump_sandbox)
    (layout.vllm / ".git" / "worktrees" / "vllm" / "HEAD").write_text(f"{'0' * 40}\n")
    assert smoke(clone).code == 0
    assert not gone.exists()
    assert not (layout.vllm / ".git" / "worktrees").exists()
    second = names(clone)[0]
    assert second != first
    kept = git(clone.root, "rev-parse", f"refs/good/{second}")
    assert git(clone.root, "rev-parse", f"{kept}^", "HEAD").split() == [head, head]
    assert set(git(clone.root, "diff", "--name-only", head, kept).split()) == {
        "patches/vllm/Mine.patch",
        "patches/vllm/series",
    }
    assert git(clone.root, "ls-tree", kept, "vendor/vllm").split()[2] == clone.materials.commit
    assert git(clone.root, "diff", "--cached", "--name-only") == "README.md"

    # The oldest state is deleted with its references; the state in use never is.
    for number in (3, 4):
        record = (known_good.folder(layout, second) / "good.json").read_text()
        other = f"v0.0.{number}-{'0' * 12}"
        (layout.known_good_states / other).mkdir()
        (layout.known_good_states / other / "good.json").write_text(record.replace(second, other))
        clone.git("update-ref", f"refs/good/{other}", "HEAD")
    assert clone.session("record-good").code == 0
    assert git(clone.root, "rev-parse", f"refs/good/{second}") == kept, (
        "recorded again, it is the same commit"
    )
    assert len(names(clone)) == known_good.KEPT
    assert names(clone)[0] == second
    assert first not in names(clone)
    assert not known_good.folder(layout, first).exists()
    assert clone.git("for-each-ref", f"refs/good/{first}") == ""
    assert git(clone.root, "for-each-ref", f"refs/good/{first}") == ""
