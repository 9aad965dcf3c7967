"""Exports that are refused or killed: no commit, no patch and no edit is lost."""

import io
import os
import shlex
import subprocess

import pytest

from tests.repo.conftest import Snapshot, Upstream, Workspace, commit, sh_git, write
from tests.repo.exporting import STATUS, files, order, refused, run, series
from workspace.core.console import Console
from workspace.core.errors import CheckoutError
from workspace.repo import export, patching
from workspace.repo.git import Git


def test_dropping_all_commits_does_not_remove_all_patches(
    applied: Workspace, snapshot: Snapshot
) -> None:
    sh_git(applied.vllm, "checkout", "--quiet", "--detach", "HEAD~2")
    failure = refused(applied, "vendor/vllm has no commit of it", snapshot)
    assert "./scripts/inv patch.apply" in (failure.hint or "")


def test_patch_that_came_with_a_pull_is_not_dropped_without_a_commit(
    release: Workspace, upstream: Upstream, snapshot: Snapshot
) -> None:
    first, second = upstream.patches
    release.series({first: upstream.patches[first]})
    release.apply()
    release.series(dict(upstream.patches))
    commit(release.vllm, "mine" + STATUS, {"vllm/mine.py": "mine\n"})
    failure = refused(release, second, snapshot)
    assert failure.hint
    commands = failure.hint.split("    ")[0].split(" && ")
    for command in commands:
        if command.endswith("patch.apply"):
            release.apply()
        else:
            subprocess.run(
                command,
                shell=True,
                cwd=release.layout.root,
                check=True,
                env={"PATH": "/usr/bin:/bin", "EMAIL": "a@b"},
            )
    run(release)
    assert order(release) == [first, second, "mine.patch"]


def test_patch_that_was_changed_after_it_was_applied_is_not_written_over(
    applied: Workspace, upstream: Upstream, snapshot: Snapshot
) -> None:
    first, _ = upstream.patches
    file = applied.layout.patches("vllm") / first
    file.write_bytes(
        file.read_bytes().replace(
            b"Upstream-Status: Pending", b"Upstream-Status: Submitted [https://example.invalid/1]"
        )
    )
    commit(applied.vllm, "mine" + STATUS, {"vllm/mine.py": "mine\n"})
    failure = refused(applied, f"{first} was changed since it was applied", snapshot)
    assert "./scripts/inv patch.apply && git -C vendor/vllm cherry-pick " in (failure.hint or "")
    # Taken into the commit, it is no difference any more.
    sh_git(applied.vllm, "reset", "--quiet", "--keep", "HEAD~1")
    applied.unapply()
    applied.apply()
    assert run(applied).written == ()
    assert "Submitted" in sh_git(applied.vllm, "log", "-1", "--format=%B", "HEAD~1")


READ_BACK = "git would not read its message back from a mail"
# Which of the two it is depends on the line.
UNREAD = "git (am of its mail|would not read its message back)"
UNFIT = (
    ("x\n\nbefore\n---\nafter" + STATUS, READ_BACK),
    ("x\n\n--- a/file" + STATUS, UNREAD),
    ("x\n\ndiff --git a/x b/x" + STATUS, UNREAD),
    ("x\n\nIndex: 7" + STATUS, UNREAD),
    ("x\n\nFrom: me\nhello" + STATUS, "git am of its mail: empty ident"),
    ("x\n\n[PATCH] me" + STATUS, READ_BACK),
    ("x\n\na\nFrom me Mon Sep 17 00:00:00 2001\nb" + STATUS, UNREAD),
    ("Re: x" + STATUS, READ_BACK),
    ("[PATCH 1/2] x" + STATUS, READ_BACK),
    ("[Bugfix] re: x" + STATUS, READ_BACK),
    ("x\n\nno trailer", "lacks the line `Upstream-Status: Pending`"),
    ("x\n\nUpstream-Status: Perhaps", "is none of: Pending"),
    ("x\n\nUpstream-Status: Submitted", "is none of: Pending"),
)


def test_messages_that_no_mail_can_carry_are_refused(
    applied: Workspace, snapshot: Snapshot
) -> None:
    commit(applied.vllm, "mine", {"vllm/mine.py": "mine\n"})
    for message, why in UNFIT:
        sh_git(
            applied.vllm, "commit", "--quiet", "--amend", "--cleanup=verbatim", "--message", message
        )
        failure = refused(applied, why, snapshot)
        is_enough = "lacks the line" in why
        way = "commit --amend --only" if is_enough else "rebase -i refs/patches/base"
        assert f"git -C vendor/vllm {way}" in (failure.hint or "")


def test_export_names_the_commit_of_its_patches_in_a_repository(applied: Workspace) -> None:
    commit(applied.vllm, "mine" + STATUS, {"vllm/mine.py": "mine\n"})
    done, err = run(applied), io.StringIO()
    patching._show_commit(applied.layout, done, Console(err=err))
    root = applied.layout.root
    add, commits = err.getvalue().removeprefix("hint: ").rstrip("\n").split(" && ")
    sh_git(root, *shlex.split(add)[1:])
    sh_git(root, *shlex.split(commits)[1:], "--message", "patches: mine")
    assert "patches/vllm/mine.patch" in sh_git(root, "show", "--name-only", "--format=", "HEAD")
    # Nothing was written, so nothing is to be committed.
    patching._show_commit(applied.layout, run(applied), Console(err=err))
    assert err.getvalue().count("hint: ") == 1


def test_hint_for_a_missing_trailer_is_enough_and_takes_no_staged_edit(
    applied: Workspace, snapshot: Snapshot
) -> None:
    commit(applied.vllm, "mine", {"vllm/mine.py": "mine\n"})
    write(applied.vllm, {"vllm/mine.py": "more\n"})
    sh_git(applied.vllm, "add", "--all")
    hint = refused(applied, "lacks the line", snapshot).hint or ""
    amend, _, export = hint.partition(" && ")
    argv = shlex.split(amend)
    assert (argv[:3], export) == (["git", "-C", "vendor/vllm"], "./scripts/inv patch.export")
    sh_git(applied.vllm, *argv[3:])
    assert run(applied).written == ("mine.patch",)
    assert sh_git(applied.vllm, "diff", "--cached", "--name-only") == "vllm/mine.py"


def test_author_that_git_reads_differently_is_refused(
    applied: Workspace, snapshot: Snapshot
) -> None:
    write(applied.vllm, {"vllm/mine.py": "mine\n"})
    sh_git(applied.vllm, "add", "--all")
    sh_git(applied.vllm, "commit", "--quiet", "--author", "a@b <a@b.c>", "--message", "x" + STATUS)
    refused(applied, "git would not read its author back", snapshot)


def test_empty_commit_and_merge_are_refused(applied: Workspace, snapshot: Snapshot) -> None:
    sh_git(applied.vllm, "commit", "--quiet", "--allow-empty", "--message", "nothing" + STATUS)
    refused(applied, "nothing.*it changes no file", snapshot)
    sh_git(applied.vllm, "reset", "--quiet", "--keep", "HEAD~1")
    commit(applied.vllm, "same" + STATUS, {"vllm/mine.py": "mine\n"})
    same = sh_git(applied.vllm, "rev-parse", "HEAD")
    sh_git(applied.vllm, "checkout", "--quiet", "-b", "side", "HEAD~1")
    commit(applied.vllm, "side" + STATUS, {"vllm/side.py": "side\n"})
    sh_git(applied.vllm, "merge", "--quiet", "--message", "merge" + STATUS, same)
    failure = refused(applied, "it is a merge", snapshot)
    subprocess.run(
        (failure.hint or "").split(" && ")[0],
        shell=True,
        cwd=applied.layout.root,
        check=True,
        env={"PATH": "/usr/bin:/bin", "EMAIL": "a@b"},
    )
    assert set(run(applied).written) == {"same.patch", "side.patch"}


def test_export_that_was_killed_is_finished_by_the_next(
    applied: Workspace, upstream: Upstream
) -> None:
    first, second = upstream.patches
    sh_git(applied.vllm, "commit", "--quiet", "--amend", "--message", "Another name" + STATUS)
    sh_git(
        applied.vllm,
        "rebase",
        "--quiet",
        "HEAD~2",
        "--exec",
        "git commit --quiet --amend --no-edit --date=2026-02-02T02:02:02",
    )
    whole = export.series_of(Git(applied.vllm), applied.observe().base or "", "HEAD")
    # As after the first of the files.
    (applied.layout.patches("vllm") / whole[0][0]).write_bytes(whole[0][1])
    assert run(applied).removed == (second,)
    assert order(applied) == [first, "Another-name.patch"]


def test_export_that_was_killed_at_its_last_file_leaves_nothing_behind(
    applied: Workspace, upstream: Upstream
) -> None:
    first, second = upstream.patches
    sh_git(applied.vllm, "reset", "--quiet", "--keep", "HEAD~1")
    folder = applied.layout.patches("vllm")
    # All of it was put in place, and the folder that it was made in is still there; or only the
    # removal was done.
    (folder.parent / ".vllm.making-abcdefgh").mkdir()
    (folder / second).unlink()
    assert run(applied).names == (first,)
    assert sorted(path.name for path in folder.parent.rglob("*")) == sorted(
        ["vllm", "series", first]
    )


def test_edited_patch_that_no_commit_holds_is_copied(
    release: Workspace, upstream: Upstream
) -> None:
    sh_git(release.layout.root, "add", "patches")
    sh_git(release.layout.root, "commit", "--quiet", "--message", "patches")
    release.apply()
    _, second = upstream.patches
    file = release.layout.patches("vllm") / second
    file.write_bytes(file.read_bytes().replace(b"Add a file", b"Now add a file"))
    edited = file.read_bytes()
    sh_git(release.vllm, "reset", "--quiet", "--keep", "HEAD~1")
    done = run(release)
    assert done.removed == (second,)
    assert [path.read_bytes() for path in done.kept_copies] == [edited]
    export.show(done, console=release.run_log.console)
    assert str(done.kept_copies[0]) in release.err.getvalue()


def test_file_that_was_never_in_the_series_is_kept_and_reported(applied: Workspace) -> None:
    write(applied.layout.patches("vllm"), {"mine.patch": "mine", "remarked.patch": "out"})
    series(applied).write_text(series(applied).read_text() + "# remarked.patch: later\n")
    done = run(applied)
    assert done.unlisted == ("mine.patch",)
    export.show(done, console=applied.run_log.console)
    assert "patches/vllm/mine.patch is not in the series" in applied.err.getvalue()


def test_uncommitted_edits_are_reported_as_in_no_patch(applied: Workspace) -> None:
    write(applied.vllm, {"README": "edited\n"})
    done = run(applied)
    assert done.edits == ("README",)
    export.show(done, console=applied.run_log.console)
    assert "uncommitted edits are in no patch: README" in applied.err.getvalue()
    assert (applied.vllm / "README").read_text() == "edited\n"


def test_operation_under_way_or_foreign_head_is_not_exported(
    applied: Workspace, upstream: Upstream
) -> None:
    before = files(applied)
    sh_git(applied.vllm, "fetch", "--quiet", str(upstream.bare), "drift")
    head = sh_git(applied.vllm, "rev-parse", "HEAD")
    sh_git(applied.vllm, "cherry-pick", "FETCH_HEAD", check=False)
    with pytest.raises(CheckoutError, match="in the middle of a git cherry-pick") as failure:
        run(applied)
    assert "patch.continue" in (failure.value.hint or "")
    sh_git(applied.vllm, "cherry-pick", "--abort")
    foreign = sh_git(applied.vllm, "commit-tree", "-m", "another root", "HEAD^{tree}")
    sh_git(applied.vllm, "checkout", "--quiet", "--detach", foreign)
    with pytest.raises(CheckoutError, match="which is not on") as failure:
        run(applied)
    commands = (failure.value.hint or "").split("    ")[0]
    subprocess.run(
        commands,
        shell=True,
        cwd=applied.layout.root,
        check=True,
        env={"PATH": "/usr/bin:/bin", "EMAIL": "a@b"},
    )
    assert sh_git(applied.vllm, "rev-parse", "HEAD") == head
    assert run(applied).written == ()
    assert files(applied) == before


def test_missing_checkout_has_a_hint(workspace: Workspace) -> None:
    with pytest.raises(CheckoutError, match="does not exist") as failure:
        run(workspace)
    assert failure.value.hint == "./scripts/inv bootstrap"


@pytest.mark.parametrize("is_committed", [True, False])
def test_broken_patch_file_is_kept_in_a_stash_by_the_hint(
    applied: Workspace, upstream: Upstream, snapshot: Snapshot, is_committed: bool
) -> None:
    first = next(iter(upstream.patches))
    file = applied.layout.patches("vllm") / first
    root = applied.layout.root
    if is_committed:
        sh_git(root, "add", "--force", "patches")
        sh_git(root, "commit", "--quiet", "--message", "patches")
    broken = file.read_bytes()[:-40]
    file.write_bytes(broken)
    failure = refused(applied, f"{first} is no longer a patch that git can read", snapshot)
    stash, following = (failure.hint or "").split("    ")[0].split(" && ")
    assert following == "./scripts/inv patch.export"
    environ = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"}
    subprocess.run(stash, shell=True, cwd=root, check=True, env=environ)
    run(applied)
    assert file.read_bytes() == upstream.patches[first]
    held = "stash@{0}" if is_committed else "stash@{0}^3"
    assert sh_git(root, "show", f"{held}:patches/vllm/{first}").encode() == broken.rstrip(b"\n")
