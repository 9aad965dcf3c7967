"""Series that do not apply, or only with a merge: the messages, and that nothing changes."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.repo.conftest import LINES, Snapshot, Upstream, Workspace, commit, export, sh_git, write
from tests.repo.states import everything
from workspace.core.errors import PatchConflict, PatchDrift, WorkspaceError
from workspace.repo.patches import State


def on_other_contents(upstream: Upstream, tmp_path: Path) -> bytes:
    """Return a patch for other contents than those of the base."""
    work = tmp_path / "work"
    sh_git(tmp_path, "clone", "--quiet", str(upstream.work), str(work))
    sh_git(work, "checkout", "--quiet", "origin/drift")
    commit(work, "XX to YY", {"vllm/lines.py": LINES.replace("line 20\n", "line YY\n")})
    return export(work, "HEAD")


def test_conflict_names_patch_place_and_paths_and_changes_nothing(
    checked_out: Workspace, upstream: Upstream, snapshot: Snapshot, tmp_path: Path
) -> None:
    first, second = upstream.patches.items()
    checked_out.series(
        {
            second[0]: second[1],
            "XX-to-YY.patch": on_other_contents(upstream, tmp_path),
            first[0]: first[1],
        }
    )
    assert (checked_out.stack().state, checked_out.stack().expected_tree) == (State.UNAPPLIED, None)
    before = snapshot(checked_out.vllm)
    with pytest.raises(
        PatchConflict, match=r"patch 2 of 3, patches/vllm/XX-to-YY\.patch"
    ) as failure:
        checked_out.apply()
    assert failure.value.details == ("git: patch failed: vllm/lines.py:17",), "nothing is unmerged"
    assert checked_out.stack().state is State.UNAPPLIED
    assert {
        name: entry for name, entry in snapshot(checked_out.vllm).items() if "/.git" not in name
    } == {name: entry for name, entry in before.items() if "/.git" not in name}
    assert not [*checked_out.layout.root.rglob("*.making-*")]


def test_conflicts_hint_leads_to_that_conflict(
    release: Workspace, upstream: Upstream, tmp_path: Path
) -> None:
    second = list(upstream.patches.items())[1]
    release.series({second[0]: second[1], "XX-to-YY.patch": on_other_contents(upstream, tmp_path)})
    # With the contents of the other side at hand it is a conflict, without them a refusal.
    sh_git(release.vllm, "fetch", "--quiet", str(upstream.work), "drift")
    with pytest.raises(PatchConflict) as failure:
        release.apply()
    assert (failure.value.hint or "").startswith("./scripts/inv patch.apply    ")
    with pytest.raises(
        PatchConflict,
        match=r"patch 2 of 2, patches/vllm/XX-to-YY\.patch, .* vendor/vllm waits at the conflict",
    ) as stopped:
        release.apply(stop_at_conflict=True)
    assert "git -C vendor/vllm add vllm/lines.py && ./scripts/inv patch.continue    " in (
        stopped.value.hint or ""
    )
    assert "patch.continue --skip" in (stopped.value.hint or "")
    assert "patch.continue --abort" in (stopped.value.hint or "")
    assert stopped.value.details == ("conflict in vllm/lines.py",)
    assert release.stack().state is State.IN_PROGRESS
    assert sh_git(release.vllm, "log", "-1", "--format=%f") == second[0].removesuffix(".patch")
    assert "<<<<<<<" in (release.vllm / "vllm" / "lines.py").read_text()


def test_three_way_merge_of_am_equals_the_expected_tree(
    workspace: Workspace, upstream: Upstream, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    sh_git(tmp_path, "clone", "--quiet", str(upstream.work), str(work))
    sh_git(work, "checkout", "--quiet", "v1.0.0~1")
    old = "".join(f"line {number}\n" for number in range(1, 31) if number != 22)
    commit(work, "older file", {"vllm/other.py": old})
    sh_git(work, "tag", "older")
    commit(work, "twenty", {"vllm/other.py": old.replace("line 20\n", "twenty\n")})
    patch = export(work, "HEAD")
    sh_git(work, "checkout", "--quiet", "older")
    base = commit(
        work,
        "line 22 is back",
        {"vllm/other.py": "".join(f"line {number}\n" for number in range(1, 31))},
    )
    sh_git(work, "tag", "--force", "v1.0.0")
    workspace.pin = replace(workspace.pin, commit=base, url=str(work), archive=None)
    workspace.series({"twenty.patch": patch}, base=base)
    # A whole clone: it has the older contents that the merge needs.
    workspace.ensure("git")
    assert (
        sh_git(
            workspace.vllm,
            "apply",
            "--numstat",
            "--check",
            str(workspace.layout.patches("vllm") / "twenty.patch"),
            check=False,
        )
        == ""
    )
    assert workspace.apply().state is State.APPLIED
    assert "twenty\nline 21\nline 22\n" in (workspace.vllm / "vllm" / "other.py").read_text()


def test_patch_that_the_pin_has_already_is_named(
    release: Workspace, upstream: Upstream, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    sh_git(tmp_path, "clone", "--quiet", str(upstream.work), str(work))
    sh_git(work, "checkout", "--quiet", "v1.0.0")
    commit(work, "backwards", {"csrc/a.cu": "old\n"})
    commit(work, "forwards", {"csrc/a.cu": "a\n"})
    first = next(iter(upstream.patches.items()))
    release.series({"forwards.patch": export(work, "HEAD"), first[0]: first[1]})
    # Without the contents it was made from, it cannot be told from a conflict.
    with pytest.raises(PatchConflict, match=r"forwards\.patch"):
        release.apply()
    sh_git(release.vllm, "fetch", "--quiet", str(work), "HEAD")
    with pytest.raises(PatchDrift, match=r"forwards\.patch changes nothing"):
        release.apply()
    assert release.stack().head == release.stack().base


def test_broken_patch_is_a_conflict_and_no_traceback(
    release: Workspace, upstream: Upstream
) -> None:
    name, content = next(iter(upstream.patches.items()))
    release.series({name: re.sub(rb"@@ -\d+", b"@@ -x", content)})
    with pytest.raises(PatchConflict, match="patch 1 of 1"):
        release.apply()


def test_shallow_clone_without_the_contents_of_a_merge_is_a_conflict(
    release: Workspace, upstream: Upstream, tmp_path: Path
) -> None:
    shutil.rmtree(release.vllm)
    sh_git(
        tmp_path,
        "clone",
        "--quiet",
        "--depth=1",
        "--branch=v1.0.0",
        upstream.bare.as_uri(),
        str(release.vllm),
    )
    release.series({"XX-to-YY.patch": on_other_contents(upstream, tmp_path)})
    before = everything(release)
    with pytest.raises(PatchConflict, match="patch 1 of 1"):
        release.apply()
    assert everything(release) == before
    release.series(upstream.patches)
    assert release.apply().state is State.APPLIED


@pytest.mark.parametrize(
    ("series", "code", "says"),
    [
        ("gone.patch\n", 5, r"gone\.patch does not exist"),
        ("a.patch\na.patch\n", 5, "a second time"),
        ("mbox.patch\n", 5, "is not a mail"),
        ("../a.patch\n", 5, "not the name"),
        ("crlf.patch\n", 4, "patch 1 of 1"),
        ("cut.patch\n", 4, "patch 1 of 1"),
    ],
)
@pytest.mark.parametrize("stop_at_conflict", [False, True])
def test_invalid_series_has_message_and_hint_and_every_file_stays(
    release: Workspace,
    upstream: Upstream,
    series: str,
    code: int,
    says: str,
    stop_at_conflict: bool,
) -> None:
    good = next(iter(upstream.patches.values()))
    release.series(
        {
            "a.patch": good,
            "mbox.patch": b"no mail\n",
            "crlf.patch": good.replace(b" line 19\n", b" line 19\r\n"),
            "cut.patch": good[:-40],
        }
    )
    write(release.layout.patches("vllm"), {"series": f"# base: {release.pin.commit}\n{series}"})
    before = everything(release)
    with pytest.raises(WorkspaceError, match=says) as failure:
        release.apply(stop_at_conflict=stop_at_conflict)
    assert (failure.value.exit_code, bool(failure.value.hint)) == (code, True)
    if code == 4 and stop_at_conflict:
        assert release.resume("abort").state is State.UNAPPLIED
    assert everything(release) | {"refs": ""} == before | {"refs": ""}
