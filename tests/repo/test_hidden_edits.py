"""Edits that git may miss, because of equal times and sizes or a bit in the index.

None is overlooked, and none is overwritten.
"""

import os
from pathlib import Path

import pytest

from tests.repo.conftest import LINES, Workspace, sh_git, write
from workspace.core.errors import CheckoutError
from workspace.repo.git import Git, worktree
from workspace.repo.patches import State

MINE = LINES.replace("line 20\n", "line YY\n")


def replaced(file: Path, text: str) -> None:
    """Replace a file by another of the same size and time, as `cp -p` and `mv` do."""
    assert len(text) == file.stat().st_size
    beside = file.with_name("beside")
    beside.write_text(text)
    os.utime(beside, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    beside.rename(file)


def aged(workspace: Workspace) -> Path:
    """Give a file an old time, in the index too."""
    file = workspace.vllm / "vllm" / "lines.py"
    os.utime(file, ns=(10**18, 10**18))
    sh_git(workspace.vllm, "update-index", "--refresh")
    return file


@pytest.mark.parametrize(
    "settings",
    [{}, {"core.checkStat": "minimal", "core.trustctime": "false"}],
    ids=["by-default", "by-time-and-size-only"],
)
def test_file_replaced_by_a_file_of_equal_size_and_time_is_an_edit(
    release: Workspace, settings: dict[str, str]
) -> None:
    for key, value in settings.items():
        sh_git(release.vllm, "config", key, value)
    file, git = aged(release), Git(release.vllm)
    before = git.digest(())
    replaced(file, MINE)
    assert git.edits() == ("vllm/lines.py",)
    assert git.digest(()) != before
    assert git.changed_files("HEAD") == ("vllm/lines.py",)
    kept = worktree.snapshot(git, "what lay there")
    assert sh_git(release.vllm, "show", f"{kept}:vllm/lines.py") == MINE.rstrip("\n")
    with pytest.raises(CheckoutError, match=r"has edits \(vllm/lines\.py\)"):
        release.apply()
    assert file.read_text() == MINE


def test_files_that_a_verb_writes_do_not_count_as_unchanged_from_then_on(
    release: Workspace,
) -> None:
    sh_git(release.vllm, "config", "core.ignoreStat", "true")
    release.apply()
    (release.vllm / "vllm" / "lines.py").write_text(MINE)
    assert Git(release.vllm).edits() == ("vllm/lines.py",)
    with pytest.raises(CheckoutError, match=r"has edits \(vllm/lines\.py\)"):
        release.unapply()


@pytest.mark.parametrize("bit", ["--assume-unchanged", "--skip-worktree"])
def test_edit_marked_as_unchanged_is_not_overwritten_by_a_second_try(
    release: Workspace, bit: str
) -> None:
    write(release.vllm, {"vllm/lines.py": MINE})
    sh_git(release.vllm, "update-index", bit, "vllm/lines.py")
    for _ in range(2):
        with pytest.raises(CheckoutError):
            release.apply()
        assert (release.vllm / "vllm" / "lines.py").read_text() == MINE
        assert not worktree.is_move_begun(release.layout, "vllm")
    assert release.stack().head == release.stack().base


def test_snapshot_has_an_edit_marked_as_unchanged(release: Workspace) -> None:
    sh_git(release.vllm, "update-index", "--assume-unchanged", "vllm/lines.py")
    write(release.vllm, {"vllm/lines.py": MINE})
    kept = worktree.snapshot(Git(release.vllm), "what lay there")
    assert sh_git(release.vllm, "show", f"{kept}:vllm/lines.py") == MINE.rstrip("\n")


@pytest.mark.parametrize("verb", ["apply", "unapply"])
def test_edit_in_the_second_in_which_a_move_ended_is_seen(applied: Workspace, verb: str) -> None:
    applied.unapply()
    if verb == "apply":
        applied.apply()
    file = applied.vllm / "vllm" / "lines.py"
    text = file.read_text().replace("line 30\n", "line XX\n")
    file.write_text(text)
    assert Git(applied.vllm).edits() == ("vllm/lines.py",)
    with pytest.raises(CheckoutError, match=r"has edits \(vllm/lines\.py\)"):
        applied.unapply() if verb == "apply" else applied.apply()
    assert file.read_text() == text


def test_move_that_was_finished_leaves_no_file_to_be_read_again(release: Workspace) -> None:
    tip = release.apply().head or ""
    release.unapply()
    release.begin_move(tip)
    (release.vllm / "vllm" / "new.py").write_text("new\n")
    assert release.apply().state is State.APPLIED
    # What has no time in the index is read at every look.
    assert "mtime: 0:0" not in sh_git(release.vllm, "ls-files", "--debug")
