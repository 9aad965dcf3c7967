"""Times follow content: what a move brings back has the time it had, and nothing else is touched."""

import json
import os
from pathlib import Path

import pytest

from tests.source.conftest import LINES, PATCHED, Snapshot, Upstream, Workspace, commit, export, sh_git, write
from workspace.core.errors import ToolchainError
from workspace.source import times
from workspace.source.patches import State

OLD_NS = 1_600_000_000_123_456_789


@pytest.fixture
def aged(release: Workspace) -> Workspace:
    """A checkout whose files were all written long ago."""
    for path in release.vllm.rglob("*"):
        if ".git" not in path.parts and not path.is_symlink():
            os.utime(path, ns=(OLD_NS, OLD_NS))
    sh_git(release.vllm, "update-index", "--refresh")
    return release


def mtime(workspace: Workspace, name: str) -> int:
    return (workspace.vllm / name).stat().st_mtime_ns


def files(workspace: Workspace, snapshot: Snapshot) -> dict[str, tuple[int, int]]:
    return {name: entry for name, entry in snapshot(workspace.vllm).items() if "/.git" not in name and Path(name).is_file()}


def test_apply_and_unapply_bring_both_times_back(aged: Workspace) -> None:
    aged.apply()
    patched = mtime(aged, "vllm/lines.py")
    assert patched > OLD_NS
    aged.unapply()
    assert (mtime(aged, "vllm/lines.py"), (aged.vllm / "vllm/lines.py").read_text()) == (OLD_NS, LINES)
    aged.apply()
    assert (mtime(aged, "vllm/lines.py"), (aged.vllm / "vllm/lines.py").read_text()) == (patched, PATCHED)


def test_file_with_another_content_than_before_gets_a_new_time(aged: Workspace, upstream: Upstream, tmp_path: Path) -> None:
    aged.apply()
    patched = mtime(aged, "vllm/lines.py")
    sh_git(tmp_path, "clone", "--quiet", str(upstream.work), str(tmp_path / "work"))
    sh_git(tmp_path / "work", "checkout", "--quiet", "v1.0.0")
    commit(tmp_path / "work", "Otherwise", {"vllm/lines.py": LINES.replace("line 20\n", "otherwise\n")})
    aged.unapply()
    aged.series({"Otherwise.patch": export(tmp_path / "work", "HEAD")})
    aged.apply()
    assert mtime(aged, "vllm/lines.py") > patched
    assert (mtime(aged, "csrc/dos.h"), mtime(aged, "csrc/a.cu")) == (OLD_NS, OLD_NS)


def test_no_time_comes_back_after_a_compiler_ran(aged: Workspace) -> None:
    aged.apply()
    patched = mtime(aged, "vllm/lines.py")
    times.forget(aged.layout, "vllm")
    times.forget(aged.layout, "vllm")
    aged.unapply()
    # An object that was compiled from the patched file is newer than OLD_NS.
    assert mtime(aged, "vllm/lines.py") > patched


@pytest.mark.parametrize("log", ["build/.ninja_log", "build/cmake.linux/.ninja_log"])
def test_build_by_hand_makes_the_memory_count_as_none(aged: Workspace, log: str) -> None:
    aged.apply()
    patched = mtime(aged, "vllm/lines.py")
    write(aged.vllm, {log: "# ninja log v5\n"})
    later = aged.layout.times("vllm").stat().st_mtime_ns + 1_000_000
    os.utime(aged.vllm / log, ns=(later, later))
    aged.unapply()
    unpatched = mtime(aged, "vllm/lines.py")
    assert unpatched > patched
    # What was written down since then counts again.
    os.utime(aged.vllm / log, ns=(OLD_NS, OLD_NS))
    aged.apply()
    aged.unapply()
    assert mtime(aged, "vllm/lines.py") == unpatched


def test_restored_times_leave_no_file_to_be_read_again(aged: Workspace) -> None:
    aged.apply()
    aged.unapply()
    # Without a refresh, --really-refresh aside, diff-files names what the index knows another time of.
    assert sh_git(aged.vllm, "diff-files", "--name-only") == ""


def test_move_writes_no_file_that_both_commits_have(aged: Workspace, snapshot: Snapshot) -> None:
    before = files(aged, snapshot)
    aged.apply()
    after = files(aged, snapshot)
    assert {Path(name).name for name in before | after if before.get(name) != after.get(name)} == {"lines.py", "dos.h", "new.py"}


@pytest.mark.parametrize(
    "damage", [b"", b"[]", b"3", b"\xff\xfe", b'{"vllm/lines.py": 3}', b'{"vllm/lines.py": [["x"]]}', b'{"csrc/dos.h": [["x", 1e999]]}', b"[" * 100000]
)
def test_damaged_memory_counts_as_none(aged: Workspace, damage: bytes) -> None:
    aged.apply()
    patched = mtime(aged, "vllm/lines.py")
    aged.layout.times("vllm").write_bytes(damage)
    aged.unapply()
    assert mtime(aged, "vllm/lines.py") > patched
    assert json.loads(aged.layout.times("vllm").read_bytes())["vllm/lines.py"][0][1] == patched


def test_memory_that_cannot_be_written_costs_times_and_nothing_else(aged: Workspace) -> None:
    aged.layout.times("vllm").mkdir(parents=True)
    aged.apply()
    assert aged.unapply().state is State.UNAPPLIED
    assert mtime(aged, "vllm/lines.py") > OLD_NS
    with pytest.raises(ToolchainError, match="cannot be removed"):
        times.forget(aged.layout, "vllm")


def test_edited_file_is_remembered_as_what_it_is(aged: Workspace) -> None:
    git = times.Git(aged.vllm)
    write(aged.vllm, {"csrc/a.cu": "edited\n"})
    edited = mtime(aged, "csrc/a.cu")
    times.remember(git, ["csrc/a.cu", "link", "gone"], memory=aged.layout.times("vllm"))
    known = times.read(aged.layout.times("vllm"), aged.vllm)
    assert dict(known) == {"csrc/a.cu": [(sh_git(aged.vllm, "hash-object", "--no-filters", "csrc/a.cu"), edited)]}
    write(aged.vllm, {"csrc/a.cu": "a\n"})
    after = mtime(aged, "csrc/a.cu")
    times.restore(git, known)
    assert mtime(aged, "csrc/a.cu") == after


def test_move_that_git_refuses_leaves_the_times(aged: Workspace, snapshot: Snapshot) -> None:
    write(aged.vllm, {"vllm/new.py": "mine\n"})
    before = files(aged, snapshot)
    with pytest.raises(Exception, match="is in the way"):
        aged.apply()
    assert files(aged, snapshot) == before
