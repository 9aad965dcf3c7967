"""What prevents a rollback, and the state that it reads."""

import json
from pathlib import Path

import pytest

from tests.small.world import World
from workspace.bump import known_good
from workspace.core import settings
from workspace.core.paths import Layout
from workspace.install import precompiled

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
    assert "there is no known-good state to return to" in clone.run("pin.rollback").error(2)
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


@pytest.mark.parametrize(("former", "choice"), [("native", "native"), ("donor a.whl ", "auto")])
def test_state_of_the_first_edition_repeats_its_kernels(
    tmp_path: Path, former: str, choice: str
) -> None:
    layout, name = Layout(tmp_path), "v0.31.0-dd9d6f745a87"
    record = dict.fromkeys(("tag", "head", "base", "tree", "recorded", "smoke"), "x")
    inputs = {"origin": former + ("a" * 64 if former.endswith(" ") else ""), "device": "cpu"}
    known_good.folder(layout, name).mkdir(parents=True)
    (known_good.folder(layout, name) / "good.json").write_text(
        json.dumps({"schema": 1, "name": name, "gitlink": None, "inputs": inputs, **record})
    )
    state = known_good.read(layout, name)
    assert state
    assert dict(state.inputs) == {"device": "cpu"}
    repeated = precompiled.repeated(settings.load(layout, environ={}), state.kernels)
    assert repeated.text("KERNELS") == choice
