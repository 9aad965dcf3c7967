"""A git operation in the checkout that a kill or a power cut ends.

It is undone, and a second run gives the same result.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.repo.conftest import (
    LINES,
    RESOLVED,
    Upstream,
    Workspace,
    commit,
    copied,
    resolve,
    sh_git,
    write,
)
from workspace.core.errors import CheckoutError, PatchConflict, ToolchainError
from workspace.repo import moves, overview, patches
from workspace.repo.git import Git
from workspace.repo.patches import State
from workspace.repo.series import Attempt

TRIED = Attempt("git am --continue", "./scripts/inv patch.continue")


@contextlib.contextmanager
def ended(workspace: Workspace) -> Iterator[Path]:
    """Run the block as all that a verb does before it is interrupted; yield the git directory."""
    with (
        contextlib.suppress(KeyboardInterrupt),
        moves.attempt(
            workspace.layout, "vllm", Git(workspace.vllm), TRIED, run_log=workspace.run_log
        ),
    ):
        yield workspace.vllm / ".git"
        raise KeyboardInterrupt


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory,
    upstream: Upstream,
    made: Path,
    conflicting: dict[str, bytes],
) -> str:
    """Return the last commit of the resolved series without an interruption."""
    for workspace in copied(
        tmp_path_factory.mktemp("undisturbed"), upstream, made / "stopped", series=conflicting
    ):
        resolve(workspace)
        return workspace.resume("continue").head or ""
    raise AssertionError


def finish(workspace: Workspace) -> bool:
    return moves.finish(workspace.layout, "vllm", Git(workspace.vllm), run_log=workspace.run_log)


def lying(workspace: Workspace) -> dict[str, bytes | str]:
    """Return the parts of a resolution: files, index, HEAD, branches, and git's notes."""
    vllm = workspace.vllm
    files = {
        str(path): path.read_bytes()
        for path in vllm.rglob("*")
        if path.is_file() and ".git" not in path.relative_to(vllm).parts
    }
    notes = {
        str(path): path.read_bytes()
        for name in ("rebase-apply", "rebase-merge")
        for path in (vllm / ".git" / name).glob("*")
    }
    notes |= {
        name: (vllm / ".git" / name).read_bytes()
        for name in ("MERGE_HEAD", "CHERRY_PICK_HEAD", "REVERT_HEAD")
        if (vllm / ".git" / name).exists()
    }
    refs = (
        sh_git(vllm, "for-each-ref", "refs/heads"),
        sh_git(vllm, "symbolic-ref", "HEAD", check=False),
    )
    return (
        files
        | notes
        | {
            "index": sh_git(vllm, "ls-files", "--stage"),
            "HEAD": sh_git(vllm, "rev-parse", "HEAD"),
            "refs": "".join(refs),
        }
    )


def cut_short(git_dir: Path) -> None:
    (git_dir.parent / "vllm" / "lines.py").write_text("line 1\n")
    (git_dir.parent / "csrc" / "a.cu").unlink()
    (git_dir / "rebase-apply" / "next").write_text("")


def notes_gone(git_dir: Path) -> None:
    shutil.rmtree(git_dir / "rebase-apply")


def all_done(git_dir: Path) -> None:
    Git(git_dir.parent).write("am", "--3way", "--committer-date-is-author-date", "--continue")


def done_and_damaged(git_dir: Path) -> None:
    all_done(git_dir)
    (git_dir.parent / "csrc" / "a.cu").write_text("")
    (git_dir / "logs" / "HEAD").write_text("")
    (git_dir / "index.lock").write_text("")
    (git_dir / "REBASE_HEAD.lock").write_text("")


def new_file_of_a_patch(git_dir: Path) -> None:
    (git_dir.parent / "vllm" / "begun.py").write_text("beg")


@pytest.mark.parametrize(
    "damage", [cut_short, notes_gone, all_done, done_and_damaged, new_file_of_a_patch]
)
def test_resolution_is_restored_after_any_power_cut_and_gives_the_same_commits(
    stopped: Workspace, damage: Callable[[Path], None], undisturbed: str
) -> None:
    resolve(stopped)
    write(stopped.vllm, {"mine.txt": "not tracked\n", "README": "an edit beside it\n"})
    before = lying(stopped)
    with ended(stopped) as git_dir:
        damage(git_dir)
    found = lying(stopped)
    assert stopped.stack().state is State.IN_PROGRESS
    assert finish(stopped)
    assert lying(stopped) == before
    assert (
        "git am --continue in vendor/vllm was interrupted and is undone" in stopped.err.getvalue()
    )
    if any(
        found.get(name) != content
        for name, content in before.items()
        if "/rebase-apply/" not in name
    ):
        kept = sh_git(
            stopped.vllm, "show", "--name-only", "--format=", "-m", "refs/patches/left"
        ).split()
        assert kept, "what lay there is kept"
    assert not stopped.layout.moving("vllm").exists()
    assert not [*(stopped.vllm / ".git").glob("*.lock")]
    assert stopped.resume("continue").head == undisturbed
    assert (stopped.vllm / "mine.txt").read_text() == "not tracked\n"


def test_index_that_was_cut_short_hides_nothing(stopped: Workspace) -> None:
    resolve(stopped)
    before = lying(stopped)
    with ended(stopped) as git_dir:
        (git_dir / "index").write_bytes((git_dir / "index").read_bytes()[:40])
        write(stopped.vllm, {"vllm/lines.py": "half\n"})
    assert finish(stopped)
    assert lying(stopped) == before
    assert sh_git(stopped.vllm, "show", "refs/patches/left:vllm/lines.py") == "half"


def test_edits_after_a_kill_are_kept_before_the_recovery(
    stopped: Workspace,
) -> None:
    resolve(stopped)
    with ended(stopped):
        pass
    resolve(stopped, "a better resolution\n")
    write(stopped.vllm, {"new.txt": "new\n"})
    assert finish(stopped)
    assert (stopped.vllm / "vllm" / "lines.py").read_text() == RESOLVED
    assert sh_git(stopped.vllm, "show", "refs/patches/left:vllm/lines.py") == "a better resolution"
    assert sh_git(stopped.vllm, "show", "refs/patches/left:new.txt") == "new"
    assert (
        "the content is kept: git -C vendor/vllm show refs/patches/left" in stopped.err.getvalue()
    )


def test_recovery_may_itself_be_killed(stopped: Workspace) -> None:
    resolve(stopped)
    before = lying(stopped)
    with ended(stopped) as git_dir:
        all_done(git_dir)
    note, point = stopped.layout.moving("vllm"), stopped.layout.moving("vllm").with_suffix("")
    text = note.read_bytes()
    shutil.copytree(point, point.with_name("point"))
    assert finish(stopped)
    note.write_bytes(text)
    point.with_name("point").rename(point)
    (git_dir / "rebase-apply" / "next").unlink()
    (stopped.vllm / "vllm" / "lines.py").write_text("")
    assert finish(stopped)
    assert lying(stopped) == before


def test_user_who_continued_by_hand_keeps_the_commits_and_the_resolution(
    stopped: Workspace,
) -> None:
    resolve(stopped)
    with ended(stopped):
        sh_git(stopped.vllm, "am", "--continue")
    mine = commit(stopped.vllm, "mine", {"vllm/mine.py": "mine\n"})
    assert not finish(stopped)
    assert sh_git(stopped.vllm, "rev-parse", "HEAD") == mine
    assert sh_git(stopped.vllm, "show", "refs/patches/left:vllm/lines.py") == RESOLVED.rstrip("\n")
    assert stopped.stack().state is State.UNEXPORTED
    assert "another program has changed the checkout since" in stopped.err.getvalue()


def test_damaged_note_of_an_attempt_touches_nothing(stopped: Workspace) -> None:
    resolve(stopped)
    with ended(stopped):
        pass
    (stopped.layout.moving("vllm").with_suffix("") / "facts.json").write_text("{")
    before = lying(stopped)
    assert not finish(stopped)
    assert lying(stopped) == before
    assert stopped.resume("continue").state is State.UNEXPORTED


def test_apply_that_was_interrupted_at_a_conflict_is_begun_again(
    mergeable: Workspace, conflicting: dict[str, bytes]
) -> None:
    base = lying(mergeable)
    with pytest.raises(PatchConflict):
        mergeable.apply(stop_at_conflict=True)
    at_conflict = lying(mergeable)
    mergeable.resume("abort")
    with ended(mergeable) as git_dir:
        sh_git(
            mergeable.vllm,
            "am",
            *(str(mergeable.layout.patches("vllm") / name) for name in conflicting),
            check=False,
        )
        (git_dir / "rebase-apply" / "last").unlink()
    with pytest.raises(PatchConflict, match="patch 2 of 3"):
        mergeable.apply(stop_at_conflict=True)
    assert lying(mergeable).keys() == at_conflict.keys()
    mergeable.resume("abort")
    assert lying(mergeable) == base


def test_interrupted_operation_is_reported_with_the_command_that_begins_it_again(
    stopped: Workspace,
) -> None:
    resolve(stopped)
    with ended(stopped) as git_dir:
        notes_gone(git_dir)
    row = overview.entries(stopped.layout, "vllm", stopped.pin, stopped.observe())[0]
    assert (row.state, "git am --continue was interrupted" in row.subject) == (
        "in progress",
        True,
    )
    assert (
        patches.next_command(stopped.layout, stopped.pin, stopped.stack())
        == "./scripts/inv patch.continue    undoes it and begins it again"
    )


@pytest.mark.parametrize("verb", ["rebase", "merge", "cherry-pick", "revert"])
@pytest.mark.parametrize("how", ["continue", "abort"])
def test_interrupted_operation_of_the_user_is_restored_with_its_branch(
    release: Workspace, verb: str, how: str
) -> None:
    vllm, base = release.vllm, release.observe().base or ""
    mine = commit(vllm, "mine", {"vllm/lines.py": LINES.replace("line 20\n", "mine\n")})
    sh_git(vllm, "checkout", "--quiet", "-b", "side", base)
    other = commit(vllm, "other", {"vllm/lines.py": LINES.replace("line 20\n", "other\n")})
    if verb == "revert":
        commit(vllm, "last", {"vllm/lines.py": LINES.replace("line 20\n", "last\n")})
    sh_git(vllm, verb, *((other,) if verb == "revert" else (mine,)), check=False)
    resolve(release)
    before = lying(release)
    with ended(release) as git_dir:
        Git(vllm).write(verb, f"--{how}")
        assert Git(vllm).under_way() is None
        (vllm / "vllm" / "lines.py").write_text("")
        assert git_dir.is_dir()
    assert finish(release)
    assert lying(release) == before
    assert Git(vllm).under_way() == verb


def test_full_disk_in_the_middle_leaves_the_note_and_a_refusal_of_git_none(
    stopped: Workspace,
) -> None:
    for error, is_left in ((ToolchainError("no space"), True), (CheckoutError("no"), False)):
        with (
            pytest.raises(type(error)),
            moves.attempt(
                stopped.layout, "vllm", Git(stopped.vllm), TRIED, run_log=stopped.run_log
            ),
        ):
            raise error
        assert (moves.attempted(stopped.layout, "vllm") == TRIED) is is_left
        moves.finish(stopped.layout, "vllm", Git(stopped.vllm), run_log=stopped.run_log)
    assert not [*(stopped.layout.state / "moving").iterdir()]


def test_file_marked_as_unchanged_is_kept_with_the_rest(
    stopped: Workspace,
) -> None:
    resolve(stopped)
    sh_git(stopped.vllm, "update-index", "--assume-unchanged", "README")
    write(stopped.vllm, {"README": "hidden edit\n"})
    with ended(stopped):
        write(stopped.vllm, {"README": "other\n"})
    assert finish(stopped)
    assert (stopped.vllm / "README").read_text() == "hidden edit\n"
    assert os.path.exists(stopped.vllm / ".git" / "rebase-apply")
