"""The trees of `nox -s ab`: a commit of the workspace, the working tree; and refused misuse."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.small.materials import git
from tests.small.world import World
from workspace.bench import ab_trees
from workspace.core import settings
from workspace.core.errors import CheckoutError, PatchConflict, SettingsError
from workspace.install import plan
from workspace.repo.pins import load, save


def observed(world: World) -> plan.Observation:
    return plan.observe(world.layout, settings.load(world.layout, environ=world.env))


def test_base_may_be_a_commit_of_the_workspace_with_its_patches(built: World) -> None:
    series = built.layout.patches("vllm") / "series"
    text = series.read_text()
    series.write_text(text.replace(built.materials.patch.name, ""))
    git(built.root, "commit", "--quiet", "--all", "-m", "No patch")
    with ab_trees.base_tree(built.layout, observed(built), "HEAD~1") as base:
        assert base.tip == built.git("rev-parse", "HEAD"), "am makes the same commits each time"
        assert base.patches
        assert (base.patches / built.materials.patch.name).exists()
        assert base.workspace == git(built.root, "rev-parse", "HEAD~1")
    with ab_trees.base_tree(built.layout, observed(built), "HEAD") as bare:
        assert bare.tip != base.tip
    git(built.root, "rm", "--quiet", "-r", "--cached", "patches")
    git(built.root, "commit", "--quiet", "-m", "No series at all")
    with (
        pytest.raises(SettingsError, match="has no patches/vllm"),
        ab_trees.base_tree(built.layout, observed(built), "HEAD"),
    ):
        pass


def test_base_with_an_unknown_pin_or_with_patches_that_do_not_apply_is_refused(
    built: World,
) -> None:
    pins = built.layout.pins
    text, series = pins.read_text(), built.layout.patches("vllm") / "series"
    lines, commit = series.read_text(), built.materials.commit
    for path in (pins, series):
        path.write_text(
            path.read_text()
            .replace(commit, "1" * 40)
            .replace(built.materials.archive_commit, "2" * 40)
        )
    git(built.root, "commit", "--quiet", "--all", "-m", "Another pin")
    pins.write_text(text)
    series.write_text(lines)
    # The checkout may have been cloned from a fork that is pinned no longer.
    git(built.layout.vllm, "config", "remote.origin.url", "file:///fork/vllm.git")
    with (
        pytest.raises(SettingsError, match="does not have v0.31.0") as unknown,
        ab_trees.base_tree(built.layout, observed(built), "HEAD"),
    ):
        pass
    fetch = f"git -C vendor/vllm fetch {built.materials.upstream.as_uri()} {'1' * 40}"
    assert str(unknown.value.hint).startswith(fetch)
    patch = built.layout.patches("vllm") / built.materials.patch.name
    # Without the blob of the index line there is nothing to merge from.
    patch.write_text(
        re.sub(
            r"index [0-9a-f]{40}",
            f"index {'3' * 40}",
            patch.read_text().replace("_C.abi3.so", "_D.abi3.so"),
        )
    )
    git(built.root, "commit", "--quiet", "--all", "-m", "A patch on nothing")
    with (
        pytest.raises(PatchConflict, match="does not apply"),
        ab_trees.base_tree(built.layout, observed(built), "HEAD"),
    ):
        pass


def test_commit_of_a_fork_is_fetched_from_the_fork(built: World) -> None:
    path, url = built.layout.pins, "https://host.invalid/me/vllm.git"
    before, pin = path.read_bytes(), load(path).vllm
    fork = replace(pin, tag="mine", ref="refs/heads/mine", url=url, upstream=pin.url)
    save(path, replace(fork, commit="1" * 40, archive=None))
    series = built.layout.patches("vllm") / "series"
    lines = series.read_text()
    series.write_text(lines.replace(built.materials.commit, "1" * 40))
    git(built.root, "commit", "--quiet", "--all", "-m", "The pin of a fork")
    path.write_bytes(before)
    series.write_text(lines)
    with (
        pytest.raises(SettingsError, match="does not have mine") as unknown,
        ab_trees.base_tree(built.layout, observed(built), "HEAD"),
    ):
        pass
    assert str(unknown.value.hint).startswith(f"git -C vendor/vllm fetch {url} {'1' * 40}")


def test_working_tree_has_edits_and_new_files_and_equal_content_is_the_same_commit(
    built: World,
) -> None:
    (built.layout.vllm / "vllm" / "new.py").write_text("NEW = 1\n")
    before = built.git("status", "--porcelain")
    tree = ab_trees.working_tree(built.layout, observed(built), sandbox_name="ab-b")
    assert tree.description == "the working tree, uncommitted edits included"
    assert built.git("show", f"{tree.tip}:vllm/new.py") == "NEW = 1"
    folder = built.layout.sandboxes / "ab-b"
    folder.mkdir(parents=True)
    (folder / "sandbox.json").write_text(json.dumps({"tip": tree.tip}))
    assert ab_trees.working_tree(built.layout, observed(built), sandbox_name="ab-b").tip == tree.tip
    assert built.git("status", "--porcelain") == before


@pytest.mark.parametrize(
    "args",
    [
        ("--repeat", "5"),
        ("--factor", "0"),
        ("speed",),
        ("--base", "nowhere"),
        ("--repeat=x",),
    ],
)
def test_misuse_is_refused_before_any_sandbox_is_made(built: World, args: tuple[str, ...]) -> None:
    ended = built.session("ab", *args)
    assert ended.code == 2, ended.output
    assert "Traceback" not in ended.err
    assert not built.layout.sandboxes.exists()


def test_tree_with_a_git_operation_in_progress_is_refused(built: World) -> None:
    (Path(built.git("rev-parse", "--absolute-git-dir")) / "MERGE_HEAD").write_text("")
    with pytest.raises(CheckoutError, match="in the middle of git "):
        ab_trees.working_tree(built.layout, observed(built), sandbox_name="ab-b")
