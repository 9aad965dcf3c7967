"""The message of a conflict: its place, upstream's commits there, and commands that work."""

from pathlib import Path

import pytest

from tests.repo.conftest import LINES, commit, export, sh_git, write
from workspace.core.console import Console, RunLog
from workspace.core.errors import CheckoutError
from workspace.repo import series
from workspace.repo.git import Git, am


@pytest.fixture
def moved(tmp_path: Path) -> tuple[Git, str, str, Path]:
    """Return a repository, an old and a new base seven commits apart, and a patch for the old."""
    work = tmp_path / "work"
    work.mkdir()
    sh_git(work, "init", "--quiet", "--initial-branch=main")
    old = commit(work, "old base", {"odd name.py": LINES, "b.py": "b\n", "c.py": "c\n"})
    commit(
        work,
        "ours",
        {"odd name.py": LINES.replace("line 20\n", "ours\n"), "b.py": "ours\n", "c.py": "ours\n"},
    )
    write(tmp_path, {"ours.patch": export(work, "HEAD")})
    sh_git(work, "checkout", "--quiet", "--detach", old)
    for number in range(6):
        commit(
            work,
            f"Change {number}",
            {"odd name.py": LINES.replace("line 20\n", f"theirs {number}\n")},
        )
    new = commit(work, "Change b", {"b.py": "theirs\n"})
    return Git(work), old, new, tmp_path / "ours.patch"


def stop(git: Git, patch: Path, tmp_path: Path) -> am.Applied:
    with RunLog(Console(), tmp_path / "logs", verb="test") as run_log:
        return am.start(git, [patch], run_log=run_log)


def test_each_path_has_the_upstream_commits_since_the_old_base(
    moved: tuple[Git, str, str, Path], tmp_path: Path
) -> None:
    git, old, new, patch = moved
    applied = stop(git, patch, tmp_path)
    assert (applied.tip, applied.position, applied.conflicted) == (None, 1, ("b.py", "odd name.py"))
    output = series.sentence(
        git,
        applied,
        count=1,
        patch="patches/vllm/ours.patch",
        shown="vendor/vllm",
        base=new,
        old=old,
    )
    assert (
        output.message
        == f"patch 1 of 1, patches/vllm/ours.patch, does not apply to {new[:12]}; vendor/vllm waits"
        " at the conflict"
    )
    newest = [
        f"  since changed by {line}"
        for line in sh_git(
            git.path, "log", "--format=%H %s", f"{old}..{new}", "--", "odd name.py"
        ).splitlines()
    ]
    newest = [line[:31] + line[59:] for line in newest]
    assert output.details[:2] == ("conflict in b.py", f"  since changed by {new[:12]} Change b")
    assert output.details[2:] == (
        "conflict in odd name.py",
        *newest[:5],
        "  and by 1 earlier commit",
    )
    assert "git -C vendor/vllm add b.py 'odd name.py' && ./scripts/inv patch.continue    " in (
        output.hint or ""
    )


def test_base_without_history_has_paths_only(
    moved: tuple[Git, str, str, Path], tmp_path: Path
) -> None:
    git, _, new, patch = moved
    alone = sh_git(git.path, "commit-tree", "-m", "archive", f"{new}^{{tree}}")
    output = series.sentence(
        git,
        stop(git, patch, tmp_path),
        count=1,
        patch="ours.patch",
        shown="vendor/vllm",
        base=new,
        old=alone,
    )
    assert output.details == ("conflict in b.py", "conflict in odd name.py")


def test_position_of_an_am_is_read_in_a_submodule_too(
    moved: tuple[Git, str, str, Path], tmp_path: Path
) -> None:
    git, _, _, patch = moved
    outer = tmp_path / "outer"
    outer.mkdir()
    sh_git(outer, "init", "--quiet")
    sh_git(
        outer,
        "-c",
        "protocol.file.allow=always",
        "submodule",
        "--quiet",
        "add",
        str(git.path),
        "inner",
    )
    inner = Git(outer / "inner")
    assert am.position(inner) is None
    stop(inner, patch, tmp_path)
    assert am.position(inner) == am.Position(1, 1, "ours", is_begun=True)
    assert (outer / ".git" / "modules" / "inner" / "rebase-apply" / "next").exists()


def test_am_that_git_refuses_to_begin_is_no_conflict(
    moved: tuple[Git, str, str, Path], tmp_path: Path
) -> None:
    git, _, _, patch = moved
    write(git.path, {"b.py": "staged\n"})
    sh_git(git.path, "add", "b.py")
    with pytest.raises(
        CheckoutError, match=r"git am in .*: Dirty index: cannot apply patches \(dirty: b\.py\)"
    ):
        stop(git, patch, tmp_path)
    assert git.under_way() is None
    assert sh_git(git.path, "diff", "--cached", "--name-only") == "b.py"
