"""Modification times follow content: a move restores them, and touches no other file."""

import json
import os
from pathlib import Path

import pytest

from tests.repo.conftest import (
    LINES,
    OLD_NS,
    PATCHED,
    Snapshot,
    Upstream,
    Workspace,
    commit,
    export,
    sh_git,
    write,
)
from workspace.core.errors import ToolchainError
from workspace.repo import moves
from workspace.repo.patches import State


def mtime(workspace: Workspace, name: str) -> int:
    return (workspace.vllm / name).stat().st_mtime_ns


def files(workspace: Workspace, snapshot: Snapshot) -> dict[str, tuple[int, int]]:
    return {
        name: entry
        for name, entry in snapshot(workspace.vllm).items()
        if "/.git" not in name and Path(name).is_file()
    }


def test_apply_and_unapply_restore_both_times(applied: Workspace) -> None:
    patched = mtime(applied, "vllm/lines.py")
    assert patched > OLD_NS
    applied.unapply()
    assert (mtime(applied, "vllm/lines.py"), (applied.vllm / "vllm/lines.py").read_text()) == (
        OLD_NS,
        LINES,
    )
    applied.apply()
    assert (mtime(applied, "vllm/lines.py"), (applied.vllm / "vllm/lines.py").read_text()) == (
        patched,
        PATCHED,
    )


def test_file_with_another_content_than_before_gets_a_new_time(
    applied: Workspace, upstream: Upstream, tmp_path: Path
) -> None:
    patched = mtime(applied, "vllm/lines.py")
    sh_git(tmp_path, "clone", "--quiet", str(upstream.work), str(tmp_path / "work"))
    sh_git(tmp_path / "work", "checkout", "--quiet", "v1.0.0")
    commit(
        tmp_path / "work", "Otherwise", {"vllm/lines.py": LINES.replace("line 20\n", "otherwise\n")}
    )
    applied.unapply()
    applied.series({"Otherwise.patch": export(tmp_path / "work", "HEAD")})
    applied.apply()
    assert mtime(applied, "vllm/lines.py") > patched
    assert (mtime(applied, "csrc/dos.h"), mtime(applied, "csrc/a.cu")) == (OLD_NS, OLD_NS)


def test_no_time_is_restored_after_a_compiler_ran(applied: Workspace) -> None:
    patched = mtime(applied, "vllm/lines.py")
    moves.forget_times(applied.layout, "vllm")
    moves.forget_times(applied.layout, "vllm")
    applied.unapply()
    # An object that was compiled from the patched file is newer than OLD_NS.
    assert mtime(applied, "vllm/lines.py") > patched


@pytest.mark.parametrize("log", ["build/.ninja_log", "build/cmake.linux/.ninja_log"])
def test_build_by_hand_invalidates_the_recorded_times(applied: Workspace, log: str) -> None:
    patched = mtime(applied, "vllm/lines.py")
    write(applied.vllm, {log: "# ninja log v5\n"})
    later = applied.layout.times("vllm").stat().st_mtime_ns + 1_000_000
    os.utime(applied.vllm / log, ns=(later, later))
    applied.unapply()
    unpatched = mtime(applied, "vllm/lines.py")
    assert unpatched > patched
    # What was written down since then counts again.
    os.utime(applied.vllm / log, ns=(OLD_NS, OLD_NS))
    applied.apply()
    applied.unapply()
    assert mtime(applied, "vllm/lines.py") == unpatched


def test_restored_times_leave_no_file_to_be_read_again(applied: Workspace) -> None:
    applied.unapply()
    # Without a refresh, --really-refresh aside, diff-files names what the index knows another time
    # of.
    assert sh_git(applied.vllm, "diff-files", "--name-only") == ""


def test_move_writes_no_file_that_both_commits_have(release: Workspace, snapshot: Snapshot) -> None:
    before = files(release, snapshot)
    release.apply()
    after = files(release, snapshot)
    assert {Path(name).name for name in before | after if before.get(name) != after.get(name)} == {
        "lines.py",
        "dos.h",
        "new.py",
    }


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b'{"vllm/lines.py": 3}',
        b'{"vllm/lines.py": [["x"]]}',
        b'{"csrc/dos.h": [["x", 1e999]]}',
    ],
)
def test_damaged_record_counts_as_empty(applied: Workspace, damage: bytes) -> None:
    patched = mtime(applied, "vllm/lines.py")
    applied.layout.times("vllm").write_bytes(damage)
    applied.unapply()
    assert mtime(applied, "vllm/lines.py") > patched
    assert json.loads(applied.layout.times("vllm").read_bytes())["vllm/lines.py"][0][1] == patched


def test_record_that_cannot_be_written_costs_only_times(release: Workspace) -> None:
    release.layout.times("vllm").mkdir(parents=True)
    release.apply()
    assert release.unapply().state is State.UNAPPLIED
    assert mtime(release, "vllm/lines.py") > OLD_NS
    with pytest.raises(ToolchainError, match="cannot be removed"):
        moves.forget_times(release.layout, "vllm")


def test_edited_file_is_recorded_with_its_edited_content(release: Workspace) -> None:
    git = moves.Git(release.vllm)
    write(release.vllm, {"csrc/a.cu": "edited\n"})
    edited = mtime(release, "csrc/a.cu")
    moves.remember_times(git, ["csrc/a.cu", "link", "gone"], memory=release.layout.times("vllm"))
    known = moves.read_times(release.layout.times("vllm"), release.vllm)
    assert dict(known) == {
        "csrc/a.cu": [(sh_git(release.vllm, "hash-object", "--no-filters", "csrc/a.cu"), edited)]
    }
    write(release.vllm, {"csrc/a.cu": "a\n"})
    after = mtime(release, "csrc/a.cu")
    moves.restore_times(git, known)
    assert mtime(release, "csrc/a.cu") == after
