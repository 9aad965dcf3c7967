"""Moves of the checkout that were killed or had no disk space.

Some are finished by the next run; other files are the user's.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repo.conftest import LINES, PATCHED, Snapshot, Workspace, commit, sh_git, write
from tests.repo.states import everything
from workspace.core.errors import CheckoutError, ToolchainError
from workspace.repo.git import Git, worktree
from workspace.repo.patches import State

ROOT = Path(__file__).resolve().parents[2]


def files(workspace: Workspace, snapshot: Snapshot) -> dict[str, tuple[int, int]]:
    return {
        name: entry
        for name, entry in snapshot(workspace.vllm).items()
        if "/.git" not in name and Path(name).is_file()
    }


def test_move_writes_no_file_that_both_commits_have(release: Workspace, snapshot: Snapshot) -> None:
    before = files(release, snapshot)
    release.apply()
    after = files(release, snapshot)
    assert {Path(name).name for name in before | after if before.get(name) != after.get(name)} == {
        "lines.py",
        "dos.h",
        "new.py",
    }


def test_unapply_that_was_killed_is_finished(release: Workspace) -> None:
    before = everything(release)
    head = release.apply().head
    # As read-tree leaves it when it is killed: the first files written, one begun, one gone, HEAD
    # and index as they were.
    release.begin_move(release.observe().base or "")
    write(release.vllm, {"vllm/lines.py": LINES, "csrc/dos.h": b"dos\r\nli"})
    (release.vllm / "vllm" / "new.py").unlink()
    write(release.vllm, {".git/index.lock": ""})
    assert release.unapply().state is State.UNAPPLIED
    assert everything(release) | {"refs": ""} == before | {"refs": ""}
    assert sh_git(release.vllm, "rev-parse", "refs/patches/tip") == head


def test_apply_that_was_killed_after_its_new_files_is_finished(release: Workspace) -> None:
    tip = release.apply().head or ""
    release.unapply()
    release.begin_move(tip)
    # The file is nobody's edit: HEAD does not have it yet.
    (release.vllm / "vllm" / "new.py").write_text("new\n")
    assert release.apply().head == tip
    assert sh_git(release.vllm, "status", "--porcelain") == ""


def test_edits_that_look_like_a_killed_move_are_the_users_where_none_was_begun(
    applied: Workspace,
) -> None:
    applied.unapply()
    (applied.vllm / "README").unlink()
    (applied.vllm / "vllm" / "lines.py").write_text("line 1\n")
    with pytest.raises(CheckoutError, match="has edits"):
        applied.apply()
    assert not (applied.vllm / "README").exists()
    assert (applied.vllm / "vllm" / "lines.py").read_text() == "line 1\n"


def test_edit_of_a_file_that_a_killed_move_does_not_touch_stays(release: Workspace) -> None:
    tip = release.apply().head or ""
    release.unapply()
    release.begin_move(tip)
    (release.vllm / "vllm" / "lines.py").write_text("line 1\n")
    (release.vllm / "README").unlink()
    assert release.apply().head == tip
    assert sh_git(release.vllm, "status", "--porcelain") == " D README"
    assert (release.vllm / "vllm" / "lines.py").read_text() == PATCHED


def test_new_file_of_the_users_that_git_ignores_is_not_taken_for_one_of_a_killed_apply(
    release: Workspace,
) -> None:
    tip = release.apply().head or ""
    release.unapply()
    release.begin_move(tip)
    write(release.vllm, {".git/info/exclude": "new.py\n", "vllm/new.py": "mine\n"})
    with pytest.raises(CheckoutError, match="new.py in .* is in the way") as caught:
        release.apply()
    assert (release.vllm / "vllm" / "new.py").read_text() == "mine\n"
    environ = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"}
    stash = (caught.value.hint or "").split("    ")[0]
    subprocess.run(stash, shell=True, check=True, env=environ)
    assert release.apply().state is State.APPLIED
    assert sh_git(release.vllm, "show", "stash@{0}^3:vllm/new.py") == "mine"


def test_lock_that_a_killed_git_left_does_not_make_touched_files_look_edited(
    release: Workspace,
) -> None:
    os.utime(release.vllm / "vllm" / "lines.py", ns=(1, 1))
    write(release.vllm, {".git/index.lock": ""})
    assert release.apply().state is State.APPLIED


FULL = """
mount -t tmpfs -o size=$2k none "$1/objects" && cp -a "$1/objects.kept/." "$1/objects/" &&
head -c 100m /dev/zero >"$1/objects/filler" 2>/dev/null
shift 2; exec "$@"
"""
VERB = """
import sys
from pathlib import Path
from workspace.core.console import Console
from workspace.core.errors import WorkspaceError
from workspace.core.console import RunLog
from workspace.core.paths import Layout
from workspace.repo import checkout, patches
from workspace.repo.pins import Archive, Pin
layout, base = Layout(Path(sys.argv[1])), sys.argv[2]
pin = Pin("vllm", "v1.0.0", "1.0.0", sys.argv[3], "u", Archive("f", "0", base, "0"), {})
with RunLog(Console(), layout.logs, verb="test") as run_log:
    try:
        found = checkout.observe(layout, pin)
        patches.apply(layout, "vllm", pin, found, run_log=run_log, stop_at_conflict=True)
    except WorkspaceError as exc:
        run_log.console.error(exc)
        sys.exit(exc.exit_code)
"""


def test_full_disk_is_reported_and_nothing_is_lost(release: Workspace) -> None:
    namespace = ("unshare", "--user", "--map-root-user", "--mount")
    if (
        tried := subprocess.run([*namespace, "true"], capture_output=True, text=True)
    ).returncode != 0:
        pytest.skip(f"no user namespaces here, so no full disk was tried: {tried.stderr.strip()}")
    git_dir = release.vllm / ".git"
    shutil.copytree(git_dir / "objects", git_dir / "objects.kept")
    before = everything(release)
    argv = [*namespace, "bash", "-c", FULL, "bash", str(git_dir), "400", sys.executable, "-c", VERB]
    argv += [str(release.layout.root), release.observe().base or "", release.pin.commit]
    done = subprocess.run(
        argv,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        },
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "Traceback" in done.stderr, "hint: df -h" in done.stderr) == (
        6,
        False,
        True,
    ), done.stderr
    assert everything(release) == before
    assert release.apply().state is State.APPLIED


def test_move_whose_git_was_killed_is_finished_and_one_that_git_refused_is_not(
    release: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tip = release.apply().head or ""
    release.unapply()
    git = Git(release.vllm)
    (release.vllm / "vllm" / "new.py").write_text("mine\n")
    with pytest.raises(CheckoutError, match="is in the way"):
        worktree.move(release.layout, "vllm", git, tip, run_log=release.run_log)
    assert not worktree.is_move_begun(release.layout, "vllm")
    (release.vllm / "vllm" / "new.py").unlink()
    git_of_path = (
        '#!/bin/sh\ncase "$*" in *" read-tree -m -u "*) kill -9 $$;; esac\nexec'
        f' {shutil.which("git")} "$@"\n'
    )
    write(tmp_path, {"bin/git": git_of_path})
    (tmp_path / "bin" / "git").chmod(0o755)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ToolchainError, match="git read-tree in .* was killed by SIGKILL"),
    ):
        patch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        worktree.move(release.layout, "vllm", git, tip, run_log=release.run_log)
    assert worktree.is_move_begun(release.layout, "vllm")
    assert worktree.finish_move(release.layout, "vllm", git, run_log=release.run_log)
    assert (git.head(), git.edits()) == (tip, ())


def test_finished_move_leaves_no_folder_that_it_has_emptied_and_no_file_of_the_user_goes_with_one(
    release: Workspace,
) -> None:
    base = release.observe().head or ""
    tip = commit(release.vllm, "folders", {"a/b/c/d": "d\n", "e/f/g": "g\n"})
    release.begin_move(base)
    # As read-tree leaves it: files are removed first, folders at its end.
    (release.vllm / "a" / "b" / "c" / "d").unlink()
    write(release.vllm, {"e/f/mine": "mine\n"})
    assert release.observe().head == tip
    assert worktree.finish_move(release.layout, "vllm", Git(release.vllm), run_log=release.run_log)
    assert sh_git(release.vllm, "rev-parse", "HEAD") == base
    assert not (release.vllm / "a").exists()
    assert (release.vllm / "e" / "f" / "mine").read_text() == "mine\n"
    assert not (release.vllm / "e" / "f" / "g").exists()
