"""What prevents a rollback, and the state that it reads."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.small.materials import git
from tests.small.world import World
from workspace.bump import known_good
from workspace.core import settings
from workspace.core.paths import Layout
from workspace.install import precompiled


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


def mine(world: World) -> str:
    """Commit and export a patch that no known-good state holds; return its commit."""
    (world.layout.vllm / "mine.py").write_text("MINE = 1\n")
    world.git("add", "mine.py")
    world.git("commit", "--quiet", "-m", "Mine\n\nUpstream-Status: Pending")
    assert world.run("patch.export").code == 0
    return world.git("rev-parse", "HEAD")


def type_line(world: World, line: str) -> str:
    """Run the command line of a hint as a person would; return its output."""
    printed = ""
    for part in line.split(" && "):
        if part.startswith("./scripts/inv "):
            ended = world.run(*part.split()[1:])
            assert ended.code == 0, ended.output
            continue
        done = subprocess.run(
            part.split(), cwd=world.root, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    return printed


def left(world: World) -> list[dict]:
    shown = json.loads(world.run("pin", "--offline", "--json").out)
    return [row for row in shown["rows"] if row["name"] == "left"]


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


def test_work_that_no_state_holds_leaves_by_force_only_and_can_be_brought_back(
    clone: World,
) -> None:
    layout, wanted = clone.layout, pretend_good(clone, "v0.31.0")
    tip = mine(clone)
    before = {path.name: path.read_bytes() for path in layout.patches("vllm").iterdir()}

    refused = clone.run("pin.rollback", "--good", wanted)
    assert "no known-good state holds; nothing was changed" in refused.error(3)
    assert f"  commit {tip[:7]}" in refused.err
    assert "  patches/vllm/Mine.patch\n" in refused.err
    force = f"./scripts/inv pin.rollback --good {wanted} --force"
    assert f"./scripts/nox -s smoke    records this state as good, if it passes; or {force} " in (
        refused.err
    )
    assert clone.git("rev-parse", "HEAD") == tip
    assert not git(clone.root, "for-each-ref", "refs/left")

    edited = layout.vllm / "vllm" / "envs.py"
    text = edited.read_text()
    edited.write_text(text + "# edit\n")
    ended = clone.run(*force.split()[1:])
    assert ended.code == 0, ended.output
    assert not (layout.patches("vllm") / "Mine.patch").exists()
    assert edited.read_text() == text
    back = ended.err.splitlines()[-1].removeprefix("hint: ")
    (row,) = left(clone)
    assert (row["state"], row["facts"]["commit"]) == ("kept", tip)
    assert back == f"{row['hint']} && git -C vendor/vllm stash pop"
    type_line(clone, back)
    assert clone.git("rev-parse", "HEAD") == tip
    assert {path.name: path.read_bytes() for path in layout.patches("vllm").iterdir()} == before
    assert edited.read_text() == text + "# edit\n"
    assert clone.status()["patches"] == "ok"


def test_work_comes_back_in_a_folder_without_a_repository(clone: World) -> None:
    layout, wanted = clone.layout, pretend_good(clone, "v0.31.0")
    (clone.root / ".git").rename(clone.folder / "repository")
    tip = mine(clone)
    ended = clone.run("pin.rollback", "--good", wanted, "--force")
    assert ended.code == 0, ended.output
    type_line(clone, ended.err.splitlines()[-1].removeprefix("hint: "))
    assert clone.git("rev-parse", "HEAD") == tip
    assert (layout.patches("vllm") / "Mine.patch").exists()
    assert clone.status()["patches"] == "ok"
    # A bump that was given up keeps commits alone.
    clone.git("update-ref", "refs/pins/left-1", "HEAD~1")
    given_up = left(clone)[0]
    assert given_up["facts"]["ref"] == "refs/pins/left-1"
    assert "refs/pins/left-1" in type_line(clone, given_up["hint"])


def test_state_whose_commit_is_gone_is_refused_with_a_look_at_the_others(clone: World) -> None:
    wanted = pretend_good(clone, "v0.31.0")
    record = known_good.folder(clone.layout, wanted) / "good.json"
    record.write_text(record.read_text().replace(clone.git("rev-parse", "HEAD~1"), "f" * 40))
    refused = clone.run("pin.rollback", "--good", wanted)
    assert f"vendor/vllm no longer has commit ffffffffffff of {wanted}" in refused.error(3)
    hint = refused.err.splitlines()[-1].removeprefix("hint: ")
    ended = clone.run(*hint.partition("    ")[0].split()[1:])
    assert ended.code == 0, ended.output
    others = {state.name for state in known_good.states(clone.layout)} - {wanted}
    assert others
    assert all(name in ended.out for name in others)


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
