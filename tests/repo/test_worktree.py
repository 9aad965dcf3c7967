"""Linked working trees that a power cut left incomplete are made again; other trees stay."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.repo.conftest import Workspace, sh_git
from workspace.repo.git import Git, worktree

DAMAGE: dict[str, Callable[[Path], object]] = {
    "no common directory": lambda books: (books / "commondir").write_text(""),
    "no way to it": lambda books: (books / "gitdir").write_text(""),
    "half a way to it": (
        lambda books: (books / "gitdir").write_text((books / "gitdir").read_text()[:9])
    ),
    "no HEAD": lambda books: (books / "HEAD").write_text(""),
    "nothing": lambda books: [path.unlink() for path in books.iterdir() if path.is_file()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_incomplete_tree_is_made_again_and_a_tree_of_a_similar_name_stays(
    release: Workspace, tmp_path: Path, damage: str
) -> None:
    git, path, mine = Git(release.vllm), tmp_path / "bump" / "vllm", tmp_path / "vllm"
    base = sh_git(release.vllm, "rev-parse", "HEAD")
    sh_git(release.vllm, "worktree", "add", "--quiet", "--detach", str(mine))
    worktree.add(git, path, base, run_log=release.run_log)
    books = Path(sh_git(path, "rev-parse", "--absolute-git-dir"))
    DAMAGE[damage](books)
    (path / ".git").unlink()
    made = worktree.add(git, path, base, run_log=release.run_log)
    assert made.head() == base
    assert sorted(
        line.split()[1]
        for line in sh_git(release.vllm, "worktree", "list", "--porcelain").splitlines()
        if line.startswith("worktree ")
    ) == sorted(map(str, (release.vllm, mine, path)))
    assert sh_git(mine, "rev-parse", "HEAD") == base


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tree_is_given_up_for_good(release: Workspace, tmp_path: Path, damage: str) -> None:
    git, path = Git(release.vllm), tmp_path / "vllm"
    worktree.add(git, path, sh_git(release.vllm, "rev-parse", "HEAD"), run_log=release.run_log)
    DAMAGE[damage](Path(sh_git(path, "rev-parse", "--absolute-git-dir")))
    path.rename(tmp_path / "gone")
    worktree.forget(git, path)
    assert sh_git(release.vllm, "worktree", "list").count("\n") == 0
    assert not [*(release.vllm / ".git").glob("worktrees/*")]


def test_records_of_a_tree_behind_a_link_or_half_removed_are_found(
    release: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    git, path = Git(release.vllm), tmp_path / "link" / "vllm"
    worktree.add(git, path, sh_git(release.vllm, "rev-parse", "HEAD"), run_log=release.run_log)
    books = Path(sh_git(path, "rev-parse", "--absolute-git-dir"))
    for name in ("HEAD", "commondir"):
        (books / name).unlink()
    (books / "index").touch()
    worktree.forget(git, path)
    assert not path.exists()
    assert not books.parent.exists()
    sh_git(release.vllm, "fsck", "--connectivity-only")
