"""Conflicts resumed to the end, by any starter, and aborts without loss."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.repo.conftest import (
    LINES,
    PATCHED,
    RESOLVED,
    Upstream,
    Workspace,
    commit,
    resolve,
    sh_git,
    write,
)
from workspace.core.errors import CheckoutError, PatchConflict, WorkspaceError
from workspace.repo import overview
from workspace.repo.export import run as export_run
from workspace.repo.git import Git, worktree
from workspace.repo.patches import State


def test_resolved_conflict_is_resumed_to_the_end_with_dates_and_committer_of_the_workspace(
    stopped: Workspace,
) -> None:
    resolve(stopped)
    stack = stopped.resume("continue")
    vllm = stopped.vllm
    assert (stack.state, stack.dirty) == (State.UNEXPORTED, ())
    assert sh_git(vllm, "log", "--reverse", "--format=%f", f"{stack.base}..HEAD").split()[1:] == [
        "XX-to-YY",
        "Last",
    ]
    assert set(sh_git(vllm, "log", "--format=%cn <%ce>", f"{stack.base}..HEAD").splitlines()) == {
        "vLLM workspace <workspace@invalid>"
    }
    assert all(
        one == other
        for one, other in (
            line.split("|")
            for line in sh_git(vllm, "log", "--format=%ad|%cd", f"{stack.base}..HEAD").splitlines()
        )
    )
    assert (vllm / "vllm" / "lines.py").read_text() == RESOLVED


def test_resolution_is_exported_and_not_taken_for_a_changed_patch(
    stopped: Workspace,
) -> None:
    resolve(stopped)
    head = stopped.resume("continue").head
    done = export_run(
        stopped.layout, "vllm", stopped.pin, stopped.observe(), run_log=stopped.run_log
    )
    assert done.written == ("XX-to-YY.patch",)
    assert stopped.stack().state is State.APPLIED
    assert sh_git(stopped.vllm, "rev-parse", "refs/patches/tip") == head


def test_same_resolution_gives_the_same_commits_again(stopped: Workspace) -> None:
    resolve(stopped)
    head = stopped.resume("continue").head
    sh_git(stopped.vllm, "checkout", "--quiet", "--detach", stopped.observe().base or "")
    with pytest.raises(PatchConflict):
        stopped.apply(stop_at_conflict=True)
    resolve(stopped)
    assert stopped.resume("continue").head == head


def test_unresolved_paths_stop_it_and_are_named(stopped: Workspace) -> None:
    with pytest.raises(
        PatchConflict, match="git am is stopped in vendor/vllm: 1 file still has a conflict"
    ) as failure:
        stopped.resume("continue")
    assert failure.value.details == ("conflict in vllm/lines.py",)
    assert "git -C vendor/vllm add vllm/lines.py && ./scripts/inv patch.continue" in (
        failure.value.hint or ""
    )
    assert stopped.stack().state is State.IN_PROGRESS


def test_resolution_to_no_change_has_a_hint_to_skip(stopped: Workspace) -> None:
    resolve(stopped, LINES)
    with pytest.raises(
        PatchConflict, match=r"patch 2 of 3, patches/vllm/XX-to-YY\.patch, changes nothing"
    ) as failure:
        stopped.resume("continue")
    assert (failure.value.hint or "").startswith("./scripts/inv patch.continue --skip    ")
    stack = stopped.resume("skip")
    assert stack.state is State.UNEXPORTED
    assert sh_git(stopped.vllm, "log", "-2", "--format=%f").split()[0] == "Last"


def test_resolution_that_is_not_staged_is_not_taken_for_no_change(
    mergeable: Workspace, upstream: Upstream, conflicting: dict[str, bytes]
) -> None:
    # Without the contents at hand git changes nothing, and marks nothing.
    name, content = next(
        (name, content) for name, content in conflicting.items() if name.startswith("XX")
    )
    mergeable.series({name: re.sub(rb"index [0-9a-f]{40}", b"index " + b"1" * 40, content)})
    waits = r"waits at this patch \(git: patch failed: vllm/lines\.py:17\)"
    with pytest.raises(PatchConflict, match=waits) as failure:
        mergeable.apply(stop_at_conflict=True)
    reject = (failure.value.hint or "").split("    ")[0]
    environ = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"}
    assert (
        subprocess.run(
            reject, shell=True, cwd=mergeable.layout.root, capture_output=True, env=environ
        ).returncode
        == 1
    )
    rejected = mergeable.vllm / "vllm" / "lines.py.rej"
    assert "+line YY" in rejected.read_text()
    rejected.unlink()
    write(mergeable.vllm, {"vllm/lines.py": RESOLVED})
    with pytest.raises(
        PatchConflict, match=r"has edits \(vllm/lines\.py\) for patch 1 of 1.* not staged"
    ) as unstaged:
        mergeable.resume("continue")
    assert (unstaged.value.hint or "").startswith(
        "git -C vendor/vllm add --update && ./scripts/inv patch.continue"
    )
    resolve(mergeable)
    assert mergeable.resume("continue").state is State.UNEXPORTED


def test_next_conflict_stops_it_again_with_its_own_name(
    mergeable: Workspace, conflicting: dict[str, bytes], upstream: Upstream
) -> None:
    _, second, last = conflicting.items()
    mergeable.series(
        {
            second[0]: second[1],
            "again.patch": second[1].replace(b"XX to YY", b"again"),
            last[0]: last[1],
        }
    )
    with pytest.raises(PatchConflict, match="patch 1 of 3"):
        mergeable.apply(stop_at_conflict=True)
    resolve(mergeable)
    with pytest.raises(
        PatchConflict, match=r"patch 2 of 3, patches/vllm/again\.patch, does not apply"
    ) as failure:
        mergeable.resume("continue")
    assert failure.value.details == ("conflict in vllm/lines.py",)
    assert mergeable.resume("skip").state is State.UNEXPORTED


def test_abort_returns_to_the_base_and_keeps_the_content(stopped: Workspace) -> None:
    resolve(stopped, "half resolved, for hours\n")
    write(stopped.vllm, {"README": "an edit beside it\n"})
    applied = sh_git(stopped.vllm, "rev-parse", "HEAD")
    stack = stopped.resume("abort")
    assert (stack.state, stack.head, stack.dirty) == (State.DIRTY, stack.base, ("README",))
    assert (stopped.vllm / "README").read_text() == "an edit beside it\n"
    assert (stopped.vllm / "vllm" / "lines.py").read_text() == LINES
    assert (
        sh_git(stopped.vllm, "show", "refs/patches/left:vllm/lines.py")
        == "half resolved, for hours"
    )
    assert sh_git(stopped.vllm, "rev-parse", "refs/patches/left~1") == applied
    assert "git -C vendor/vllm show refs/patches/left" in stopped.err.getvalue()


def test_content_kept_at_an_earlier_abort_stays_too(stopped: Workspace) -> None:
    for text in ("first", "second"):
        resolve(stopped, f"{text}\n")
        stopped.resume("abort")
        if text == "first":
            with pytest.raises(PatchConflict):
                stopped.apply(stop_at_conflict=True)
    kept = sh_git(stopped.vllm, "rev-list", "refs/patches/left").split()
    shown = [
        sh_git(stopped.vllm, "show", f"{commit}:vllm/lines.py", check=False) for commit in kept
    ]
    assert {"first", "second"} <= set(shown)


def test_am_from_elsewhere_is_continued_just_the_same(
    mergeable: Workspace, conflicting: dict[str, bytes], tmp_path: Path
) -> None:
    write(
        tmp_path, {"mine.patch": conflicting["XX-to-YY.patch"].replace(b"XX to YY", b"of my own")}
    )
    sh_git(mergeable.vllm, "am", "--3way", str(tmp_path / "mine.patch"), check=False)
    with pytest.raises(PatchConflict, match="1 file still has a conflict"):
        mergeable.resume("continue")
    resolve(mergeable, LINES)
    with pytest.raises(PatchConflict, match="patch 1 of 1, “of my own”, changes nothing"):
        mergeable.resume("continue")
    resolve(mergeable)
    assert mergeable.resume("continue").state is State.UNEXPORTED
    assert sh_git(mergeable.vllm, "log", "-1", "--format=%f") == "of-my-own"


def test_am_that_was_killed_before_a_patch_begins_it(stopped: Workspace) -> None:
    state = stopped.vllm / ".git" / "rebase-apply"
    sh_git(stopped.vllm, "read-tree", "--reset", "-u", "HEAD")
    write(stopped.vllm, {"README": "an edit beside it\n"})
    (state / "final-commit").unlink()
    (state / "author-script").unlink()
    with pytest.raises(PatchConflict, match="patch 2 of 3"):
        stopped.resume("continue")
    assert (stopped.vllm / "README").read_text() == "an edit beside it\n"
    resolve(stopped)
    assert stopped.resume("continue").state is State.UNEXPORTED


def test_am_that_was_killed_after_its_commit_makes_it_once(stopped: Workspace) -> None:
    resolve(stopped)
    state = stopped.vllm / ".git" / "rebase-apply"
    Git(stopped.vllm).write("commit", "--quiet", "--file", str(state / "final-commit"))
    stack = stopped.resume("continue")
    assert sh_git(stopped.vllm, "log", "--reverse", "--format=%f", f"{stack.base}..HEAD").split()[
        1:
    ] == ["XX-to-YY", "Last"]


def test_note_of_the_first_edition_on_an_am_is_dropped(stopped: Workspace) -> None:
    former = Path(__file__).parents[1] / "core" / "first_edition" / "attempt.json"
    write(stopped.layout.root, {".workspace/moving/vllm.json": former.read_text()})
    assert not worktree.finish_move(
        stopped.layout, "vllm", Git(stopped.vllm), run_log=stopped.run_log
    )
    assert not worktree.is_move_begun(stopped.layout, "vllm")
    assert stopped.stack().state is State.IN_PROGRESS


def test_abort_after_a_kill_returns_to_the_base_with_its_files(stopped: Workspace) -> None:
    vllm, git_dir = stopped.vllm, stopped.vllm / ".git"
    # As SIGKILL leaves it: the file of a patch written, not its index entry; a commit made, and not
    # yet written down as the am's own.
    sh_git(vllm, "read-tree", "--reset", "-u", "HEAD")
    write(vllm, {"vllm/lines.py": LINES.replace("line 20\n", "line YY\n"), "README": "edited\n"})
    (git_dir / "rebase-apply" / "abort-safety").write_text(f"{stopped.observe().base}\n")
    stack = stopped.resume("abort")
    assert (stack.head, stack.dirty) == (stack.base, ("README",))
    assert sh_git(vllm, "show", "refs/patches/left:vllm/lines.py").splitlines()[19] == "line YY"
    assert (vllm / "csrc" / "dos.h").read_bytes() == b"dos\r\nlines\r\n"


def test_commit_that_the_user_made_in_the_midst_stays_after_abort(stopped: Workspace) -> None:
    sh_git(stopped.vllm, "read-tree", "--reset", "-u", "HEAD")
    mine = commit(stopped.vllm, "mine", {"vllm/mine.py": "mine\n"})
    assert stopped.resume("abort").head == mine


def test_folder_of_an_am_that_was_killed_at_once_is_taken_away(release: Workspace) -> None:
    write(release.vllm, {".git/rebase-apply/0001": "From", ".git/rebase-apply/last": "1\n"})
    with pytest.raises(CheckoutError, match="in the middle of a git am"):
        release.apply()
    with pytest.raises(CheckoutError, match="Stray") as failure:
        release.resume("continue")
    assert "patch.continue --abort" in (failure.value.hint or "")
    assert release.resume("abort").state is State.UNAPPLIED
    assert release.apply().state is State.APPLIED


def test_unreadable_series_does_not_prevent_the_end_of_an_am(
    stopped: Workspace,
) -> None:
    write(stopped.layout.patches("vllm"), {"series": "nonsense\n"})
    with pytest.raises(WorkspaceError, match="lines `# base"):
        stopped.resume("abort")
    assert Git(stopped.vllm).under_way() is None
    assert stopped.observe().head == stopped.observe().base


@pytest.mark.parametrize("how", ["continue", "skip", "abort"])
def test_no_operation_under_way_is_reported(release: Workspace, how: overview.How) -> None:
    with pytest.raises(CheckoutError, match="is under way in vendor/vllm") as failure:
        release.resume(how)
    assert (failure.value.exit_code, failure.value.hint) == (3, "./scripts/inv patch")


def test_missing_checkout_has_no_operation_under_way(workspace: Workspace) -> None:
    with pytest.raises(CheckoutError, match="no operation is under way"):
        workspace.resume("continue")


@pytest.mark.parametrize("how", ["continue", "skip", "abort"])
@pytest.mark.parametrize("verb", ["rebase", "merge", "cherry-pick", "revert"])
def test_operation_of_the_user_is_ended_by_the_same_verb(
    release: Workspace, verb: str, how: overview.How
) -> None:
    vllm, base = release.vllm, release.observe().base or ""
    mine = commit(vllm, "mine", {"vllm/lines.py": LINES.replace("line 20\n", "mine\n")})
    sh_git(vllm, "checkout", "--quiet", "-b", "side", base)
    other = commit(vllm, "other", {"vllm/lines.py": LINES.replace("line 20\n", "other\n")})
    last = commit(vllm, "last", {"vllm/lines.py": LINES.replace("line 20\n", "last\n")})
    sh_git(vllm, verb, *((other,) if verb == "revert" else (mine,)), check=False)
    stack = release.stack()
    assert (stack.state, stack.operation) == (State.IN_PROGRESS, f"git {verb}")
    with pytest.raises(CheckoutError, match=f"in the middle of a git {verb}") as failure:
        release.apply()
    assert (failure.value.hint or "").startswith("./scripts/inv patch.continue    ")
    with pytest.raises(PatchConflict, match=f"git {verb} is stopped in vendor/vllm"):
        release.resume("continue")
    if how == "continue" or verb == "rebase":
        resolve(release)
    if (verb, how) == ("merge", "skip"):
        with pytest.raises(CheckoutError, match="no step to skip"):
            release.resume(how)
        return
    if verb == "rebase" and how != "abort":
        # The second commit stops it, too.
        with pytest.raises(PatchConflict, match="git rebase is stopped in vendor/vllm"):
            release.resume(how)
        resolve(release, LINES)
    release.resume(how)
    assert Git(vllm).under_way() is None
    if how == "continue" and verb != "rebase":
        assert (vllm / "vllm" / "lines.py").read_text() == RESOLVED
        assert sh_git(vllm, "log", "-1", "--format=%H") != last
    if how == "abort":
        assert sh_git(vllm, "rev-parse", "HEAD", "side").split() == [last, last]
    assert not [*release.layout.root.rglob("hook-ran")]


def test_author_of_a_revert_is_the_user(release: Workspace, hostile: Path) -> None:
    sh_git(hostile.parent, "config", "--file", str(hostile), "user.name", "Ada")
    sh_git(hostile.parent, "config", "--file", str(hostile), "user.email", "ada@example.invalid")
    first = commit(release.vllm, "first", {"vllm/lines.py": PATCHED})
    commit(release.vllm, "second", {"vllm/lines.py": LINES.replace("line 20\n", "other\n")})
    sh_git(release.vllm, "revert", first, check=False)
    resolve(release)
    release.resume("continue")
    assert sh_git(release.vllm, "log", "-1", "--format=%an <%ae>") == "Ada <ada@example.invalid>"


def test_operation_in_any_working_tree_can_be_resumed(stopped: Workspace) -> None:
    git, base = Git(stopped.vllm), stopped.observe().base or ""
    resolve(stopped)
    tip = overview.resume_in(git, base=base, how="continue", run_log=stopped.run_log)
    assert (tip, sh_git(stopped.vllm, "rev-list", "--count", f"{base}..HEAD")) == (git.head(), "3")
    with pytest.raises(CheckoutError, match=f"is under way in {stopped.vllm}"):
        overview.resume_in(git, base=base, how="abort", run_log=stopped.run_log)
