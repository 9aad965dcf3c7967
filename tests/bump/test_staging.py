"""The bump sandbox's own tree, and what git records about it."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small.materials import git
from workspace.bump import staging
from workspace.bump.staging import BumpSandbox, BumpStart
from workspace.core import settings as settings_module
from workspace.core.console import Console, RunLog
from workspace.core.paths import Layout
from workspace.install import sandbox
from workspace.repo.git import Git, remotes, worktree
from workspace.repo.pins import Pin


@pytest.fixture
def submodule(tmp_path: Path) -> Path:
    """A superproject with a submodule of two commits; neither has the first one checked out."""
    upstream, outer = tmp_path / "upstream", tmp_path / "super"
    for folder in (upstream, outer):
        folder.mkdir()
        git(folder, "init", "--quiet")
    for text in ("one\n", "two\n"):
        (upstream / "file").write_text(text)
        git(upstream, "add", "file")
        git(upstream, "commit", "--quiet", "-m", text.strip())
    git(outer, "submodule", "--quiet", "add", str(upstream), "vendor/vllm")
    git(outer, "commit", "--quiet", "-m", "The workspace")
    return outer / "vendor" / "vllm"


@pytest.fixture
def run_log(tmp_path: Path) -> Iterator[RunLog]:
    with RunLog(
        Console(out=io.StringIO(), err=io.StringIO()), tmp_path / "logs", verb="test"
    ) as made:
        yield made


def test_linked_tree_of_a_submodule_is_not_led_astray_by_its_core_worktree(
    submodule: Path, tmp_path: Path, run_log: RunLog
) -> None:
    assert Git(submodule).setting("core.worktree")
    path = tmp_path / "linked"
    tree = worktree.add(
        Git(submodule), path, git(submodule, "rev-parse", "HEAD~1"), run_log=run_log
    )
    tree.write("reset", "--quiet", "--hard")
    place = tree.place()
    assert place is not None
    assert place.top == path
    assert (path / "file").read_text() == "one\n"
    assert (submodule / "file").read_text() == "two\n"
    tree.set_ref("refs/worktree/applied", tree.head() or "")
    assert Git(submodule).resolve("refs/worktree/applied") is None


def test_forgetting_one_worktree_keeps_others_that_cannot_be_reached(
    submodule: Path, tmp_path: Path, run_log: RunLog
) -> None:
    mine, ours = tmp_path / "mine", tmp_path / "ours"
    for path in (mine, ours):
        worktree.add(Git(submodule), path, "HEAD", run_log=run_log)
        path.rename(tmp_path / f"{path.name}-elsewhere")
    worktree.forget(Git(submodule), ours)
    listed = git(submodule, "worktree", "list")
    assert "mine" in listed
    assert "ours" not in listed
    # A half-made worktree at the same path is no obstacle.
    worktree.add(Git(submodule), mine, "HEAD", run_log=run_log)


def test_snapshot_holds_edits_new_files_and_conflicts_and_moves_nothing(submodule: Path) -> None:
    tree = Git(submodule)
    assert worktree.snapshot(tree, "nothing") == tree.head()
    git(submodule, "checkout", "--quiet", "-b", "other", "HEAD~1")
    (submodule / "file").write_text("three\n")
    git(submodule, "commit", "--quiet", "--all", "-m", "three")
    with pytest.raises(RuntimeError, match="CONFLICT|merge"):
        git(submodule, "merge", "main" if "main" in git(submodule, "branch", "--all") else "master")
    (submodule / "new").write_text("new\n")
    before = (git(submodule, "status", "--porcelain"), git(submodule, "rev-parse", "HEAD"))
    made = worktree.snapshot(tree, "all")
    assert "<<<<<<<" in git(submodule, "show", f"{made}:file")
    assert git(submodule, "show", f"{made}:new") == "new"
    assert (git(submodule, "status", "--porcelain"), git(submodule, "rev-parse", "HEAD")) == before


def test_build_products_are_separated_from_files_that_the_user_ignores(submodule: Path) -> None:
    (submodule / ".gitignore").write_text("*.so\n/out/\n")
    (submodule / "vllm" / "deep").mkdir(parents=True)
    for name in ("vllm/_C.so", "vllm/deep/x.so", "vllm/note.txt", "vllm/x.pyc"):
        (submodule / name).write_text("")
    assert worktree.products(Git(submodule), "vllm") == ("vllm/_C.so", "vllm/deep/x.so")


def test_commit_of_which_a_killed_fetch_has_left_no_more_than_itself_is_fetched_whole(
    submodule: Path, tmp_path: Path, run_log: RunLog
) -> None:
    made, other = tmp_path / "store", tmp_path / "other"
    git(tmp_path, "clone", "--quiet", "--bare", str(submodule), str(made))
    git(tmp_path, "clone", "--quiet", str(made), str(other))
    (other / "file").write_text("three\n")
    git(other, "commit", "--quiet", "--all", "-m", "three")
    git(other, "push", "--quiet", "origin", "HEAD")
    new = git(other, "rev-parse", "HEAD")
    objects = Path(git(submodule, "rev-parse", "--absolute-git-dir")) / "objects" / new[:2]
    objects.mkdir(exist_ok=True)
    (objects / new[2:]).write_bytes((other / ".git" / "objects" / new[:2] / new[2:]).read_bytes())
    assert new in Git(submodule).present((new,))
    worktree.bring(Git(submodule), made, new, "refs/pins/new", run_log=run_log)
    assert git(submodule, "show", "refs/pins/new:file") == "three"


def test_store_that_a_power_cut_damaged_is_made_again_inside_another_repository(
    submodule: Path,
) -> None:
    place = submodule.parent.parent / "store.git"
    remotes.open_store(place, submodule)
    (place / "HEAD").write_text("")
    head = git(submodule, "rev-parse", "HEAD")
    remotes.open_store(place, submodule).set_ref("refs/tags/made", head)
    assert git(place, "rev-parse", "refs/tags/made") == head
    assert not git(submodule.parent.parent, "for-each-ref", "refs/tags")


def test_sandbox_whose_files_a_power_cut_emptied_is_written_again(
    submodule: Path, tmp_path: Path, run_log: RunLog
) -> None:
    layout, base = Layout(submodule.parent.parent), git(submodule, "rev-parse", "HEAD")
    settings = settings_module.load(layout, environ={})
    own = Layout(layout.bump_sandbox)
    bump_sandbox = BumpSandbox(
        layout,
        own,
        BumpStart("v2", "v1", base, base, "", base),
        Pin("vllm", "v2", "2", base, "", None, {}),
    )
    tree = staging.open_tree(bump_sandbox, settings, run_log=run_log)
    (own.vllm / "file").write_text("mine\n")
    assert staging.open_tree(bump_sandbox, settings, run_log=run_log).edits() == ("file",), (
        "a user's edit stays"
    )
    tree.write("update-ref", "-d", sandbox.MADE_REF)
    (own.vllm / "file").write_text("")
    assert staging.open_tree(bump_sandbox, settings, run_log=run_log).edits() == ()
    # Or only `.git` exists, cut short so that it leads to the clone's own repository.
    (own.vllm / "file").unlink()
    (own.vllm / ".git").write_text(f"gitdir: {git(submodule, 'rev-parse', '--absolute-git-dir')}\n")
    git(submodule, "checkout", "--quiet", "HEAD~1")
    assert staging.open_tree(bump_sandbox, settings, run_log=run_log).edits() == ()
    assert (own.vllm / "file").read_text() == "two\n"
    assert git(submodule, "rev-parse", "HEAD") == git(submodule, "rev-parse", f"{base}~1"), (
        "the clone's own HEAD was moved"
    )


def test_leftovers_of_a_killed_sandbox_removal_are_cleared_and_a_users_tree_stays(
    submodule: Path, tmp_path: Path, run_log: RunLog
) -> None:
    layout = Layout(submodule.parents[1])
    mine, ours = tmp_path / "mine", Layout(layout.bump_sandbox).vllm
    for path in (mine, ours):
        worktree.add(Git(submodule), path, "HEAD", run_log=run_log)
    # One kill after the rename that ends the bump, before git knew; one right after the sandbox was
    # made.
    layout.bump_sandbox.rename(tmp_path / "gone")
    started = layout.state / ".bump.making-k7a3ox9q"
    started.mkdir()
    sandbox.clear_leftovers(layout, Layout(layout.bump_sandbox))
    listed = git(submodule, "worktree", "list")
    assert str(mine) in listed
    assert str(ours) not in listed
    assert not started.exists()


def test_empty_worktrees_folder_of_git_is_removed_with_the_leftovers(
    submodule: Path,
) -> None:
    books = Git(submodule).path_of("worktrees")
    books.mkdir()
    layout = Layout(submodule.parents[1])
    sandbox.clear_leftovers(layout, Layout(layout.bump_sandbox))
    assert not books.exists()
