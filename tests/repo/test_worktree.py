"""Linked working trees are made again where one was, and removed with their records."""

from pathlib import Path

from tests.repo.conftest import Workspace, sh_git
from workspace.repo.git import Git, worktree


def test_tree_whose_folder_is_gone_is_made_again_and_a_tree_of_a_similar_name_stays(
    release: Workspace, tmp_path: Path
) -> None:
    git, path, mine = Git(release.vllm), tmp_path / "bump" / "vllm", tmp_path / "vllm"
    base = sh_git(release.vllm, "rev-parse", "HEAD")
    sh_git(release.vllm, "worktree", "add", "--quiet", "--detach", str(mine))
    worktree.add(git, path, base, run_log=release.run_log)
    (path / ".git").unlink()
    assert worktree.add(git, path, base, run_log=release.run_log).head() == base
    assert sorted(
        line.split()[1]
        for line in sh_git(release.vllm, "worktree", "list", "--porcelain").splitlines()
        if line.startswith("worktree ")
    ) == sorted(map(str, (release.vllm, mine, path)))


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
