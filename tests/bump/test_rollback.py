"""What prevents a rollback."""

import pytest

from tests.small.world import World
from workspace.bump import known_good

pytestmark = pytest.mark.xdist_group("good")


def pretend_good(world: World, tag: str) -> str:
    """Make another known-good state at the base, from the present state's files.

    Bootstrap applies its series and so restores the present state.
    """
    layout, base = world.layout, world.git("rev-parse", "HEAD~1")
    before = known_good.states(layout)[0]
    tree = world.git("rev-parse", f"{base}^{{tree}}")
    name = known_good.name_of(tag, tree)
    folder = known_good.folder(layout, name)
    kept = known_good.folder(layout, before.name)
    folder.mkdir()
    for part in ("freeze.txt", "kernels", "files"):
        (folder / part).symlink_to(kept / part)
    record = (
        (kept / "good.json")
        .read_text()
        .replace(before.name, name)
        .replace(before.head, base)
        .replace(before.tree, tree)
    )
    (folder / "good.json").write_text(record)
    return name


def test_missing_states_and_unknown_names_are_sentences(clone: World) -> None:
    assert "there is no good state to return to" in clone.run("pin.rollback").error(2)
    name = pretend_good(clone, "v0.31.0")
    assert f"there are {name}" in clone.run("pin.rollback", "--good", "v0.1.0-000000000000").error(
        2
    )


def test_edits_and_an_am_under_way_are_left_as_they_are(clone: World) -> None:
    pretend_good(clone, "v0.31.0")
    edited = clone.layout.vllm / "vllm" / "envs.py"
    text = edited.read_text()
    edited.write_text(text + "# mine\n")
    ended = clone.run("pin.rollback")
    assert "has edits (vllm/envs.py)" in ended.error(3)
    assert "git -C vendor/vllm stash" in ended.err
    assert edited.read_text() == text + "# mine\n"
    clone.git("checkout", "--quiet", "--", "vllm/envs.py")
    folder = clone.layout.vllm / ".git" / "rebase-apply"
    folder.mkdir()
    (folder / "applying").touch()
    assert "in the middle of a git am" in clone.run("pin.rollback").error(3)
