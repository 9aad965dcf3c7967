"""Triton's pin follows its main; vendor/triton moves only if nothing of the user prevents it."""

from pathlib import Path

import pytest

from tests.small.materials import git
from tests.small.world import World
from workspace.repo import pins


@pytest.fixture
def triton(world: World, tmp_path: Path) -> Path:
    """An upstream of Triton with two commits, of which the first is pinned."""
    upstream = tmp_path / "triton"
    upstream.mkdir()
    git(upstream, "init", "--quiet")
    for text in ("one\n", "two\n"):
        (upstream / "file").write_text(text)
        git(upstream, "add", "file")
        git(upstream, "commit", "--quiet", "-m", text.strip())
    for key in ("uploadpack.allowFilter", "uploadpack.allowAnySHA1InWant"):
        git(upstream, "config", key, "true")
    first = git(upstream, "rev-parse", "HEAD~1")
    world.layout.pins.write_text(
        world.layout.pins.read_text()
        .replace("1" * 40, first)
        .replace('"v3.7.1"', '"main"')
        .replace('"3.7.1"', '"main"')
    )
    world.env["TRITON_MIRROR"] = upstream.as_uri()
    return upstream


def test_pin_and_series_follow_main(world: World, triton: Path) -> None:
    new = git(triton, "rev-parse", "main")
    ended = world.run("pin.bump", "triton")
    assert ended.code == 0, ended.output
    assert pins.load(world.layout.pins).triton.commit == new
    assert f"# base: {new}" in (world.layout.patches("triton") / "series").read_text()
    assert (
        (world.layout.state / "bump-message.txt")
        .read_text()
        .startswith(f"pin: move Triton to {new[:12]}\n\n")
    )


def test_forecast_of_triton_names_the_bump_of_triton(world: World, triton: Path) -> None:
    tree, first = world.layout.triton, git(triton, "rev-parse", "main~1")
    git(triton, "clone", "--quiet", triton.as_uri(), str(tree))
    git(tree, "checkout", "--quiet", "--detach", first)
    folder = world.layout.patches("triton")
    folder.mkdir(exist_ok=True)
    (folder / "series").write_text(f"# base: {first}\n")
    forecast = world.run("pin.forecast", "triton")
    assert forecast.code == 0, forecast.output
    assert forecast.out.splitlines()[-1] == "hint: ./scripts/inv pin.bump triton"
    ended = world.run("pin.bump", "triton")
    assert ended.code == 0, ended.output
    assert pins.load(world.layout.pins).triton.commit == git(triton, "rev-parse", "main")
    assert git(tree, "rev-parse", "HEAD") == git(triton, "rev-parse", "main")


@pytest.mark.parametrize("is_partial", [False, True], ids=["whole", "partial"])
def test_patch_that_does_not_apply_stops_the_move_before_any_change(
    world: World, triton: Path, is_partial: bool
) -> None:
    tree, first = world.layout.triton, git(triton, "rev-parse", "main~1")
    # As `inv pin.bump triton` clones: contents of other commits are fetched when they are needed.
    kind = ("--filter=blob:none", "--no-checkout") if is_partial else ()
    git(triton, "clone", "--quiet", *kind, triton.as_uri(), str(tree))
    git(tree, "checkout", "--quiet", "--detach", first)
    (tree / "file").write_text("three\n")
    git(tree, "commit", "--quiet", "--all", "-m", "Three")
    folder = world.layout.patches("triton")
    args = (
        "format-patch",
        "--stdout",
        "--zero-commit",
        "--full-index",
        "--no-signature",
        "--keep-subject",
        "-1",
    )
    (folder / "Three.patch").write_text(git(tree, *args) + "\n")
    (folder / "series").write_text(f"# base: {first}\nThree.patch\n")
    before = world.layout.pins.read_bytes()
    ended = world.run("pin.bump", "triton")
    assert "patch 1 of 1, patches/triton/Three.patch, does not apply" in ended.error(4)
    assert world.layout.pins.read_bytes() == before
    assert (tree / "file").read_text() == "three\n"


def test_remote_that_cannot_be_reached_changes_nothing(world: World, triton: Path) -> None:
    world.env["TRITON_MIRROR"] = (triton.parent / "nowhere").as_uri()
    before = world.layout.pins.read_bytes()
    world.run("pin.bump", "triton").error(11)
    assert world.layout.pins.read_bytes() == before
