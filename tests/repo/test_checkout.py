"""Making checkouts from real remotes and archives, under a hostile git configuration."""

import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.repo.conftest import (
    LINES,
    URL,
    Snapshot,
    Upstream,
    Workspace,
    add_member,
    commit,
    sh_git,
    write,
)
from workspace.core.errors import CheckoutError, SourceError, ToolchainError
from workspace.core.files import sha256
from workspace.core.settings import without_user
from workspace.repo import checkout
from workspace.repo.checkout import Kind

ROOT = Path(__file__).resolve().parents[2]


def leftovers(workspace: Workspace) -> list[Path]:
    return [*workspace.layout.root.rglob("*.making-*")]


def missing_objects(repository: Path) -> int:
    return sh_git(repository, "rev-list", "--objects", "--all", "HEAD", "--missing=print").count(
        "?"
    )


def test_git_checkout_is_a_real_submodule_that_update_leaves_alone(
    workspace: Workspace, snapshot: Snapshot
) -> None:
    found = workspace.ensure("git")
    assert (found.kind, found.base, found.head) == (
        Kind.GIT,
        workspace.pin.commit,
        workspace.pin.commit,
    )
    root = workspace.layout.root
    assert (root / ".git" / "modules" / "vendor" / "vllm" / "HEAD").is_file()
    assert sh_git(root, "submodule", "status") == f" {workspace.pin.commit} vendor/vllm (v1.0.0)"
    before = snapshot(workspace.vllm)
    sh_git(root, "submodule", "update", env={"GIT_ALLOW_PROTOCOL": "none"})
    assert snapshot(workspace.vllm) == before
    assert sh_git(root, "status", "--porcelain", "--", "vendor") == ""
    assert sh_git(workspace.vllm, "status", "--porcelain") == ""
    assert (
        sh_git(workspace.vllm, "describe", "--tags", "--long", "--match", "v[0-9]*")
        == f"v1.0.0-0-g{workspace.pin.commit[:7]}"
    )
    assert leftovers(workspace) == []


def test_git_checkout_is_partial_and_has_the_history(workspace: Workspace) -> None:
    workspace.ensure("git")
    assert sh_git(workspace.vllm, "rev-list", "--count", "HEAD") == "2"
    # The first version of README and old.txt are in the history, not on disk.
    assert missing_objects(workspace.vllm) == 2
    assert (
        sh_git(
            workspace.vllm,
            "show",
            "HEAD~1:old.txt",
            env={"GIT_CONFIG_GLOBAL": os.environ["GIT_CONFIG_GLOBAL"]},
        )
        == "gone later"
    )


def test_files_are_the_commits_bytes_whatever_the_user_configured(checked_out: Workspace) -> None:
    assert (checked_out.vllm / "csrc" / "dos.h").read_bytes() == b"dos\r\nlines\r\n"
    assert (checked_out.vllm / "vllm" / "lines.py").read_bytes() == LINES.encode()
    assert os.access(checked_out.vllm / "run.sh", os.X_OK)
    assert (checked_out.vllm / "link").readlink() == Path("vllm/lines.py")
    assert not [*checked_out.layout.root.rglob("hook-ran")]
    assert sh_git(checked_out.vllm, "ls-files", "ignored.txt") == "ignored.txt"


def test_server_without_filters_gives_a_whole_clone(
    workspace: Workspace, upstream: Upstream, tmp_path: Path
) -> None:
    mirror = tmp_path / "mirror.git"
    sh_git(tmp_path, "clone", "--quiet", "--bare", str(upstream.bare), str(mirror))
    assert workspace.ensure("git", VLLM_MIRROR=str(mirror)).kind is Kind.GIT
    assert missing_objects(workspace.vllm) == 0


def test_server_that_filters_but_refuses_single_objects_gives_a_whole_clone(
    workspace: Workspace, hostile: Path
) -> None:
    sh_git(hostile.parent, "config", "--file", str(hostile), "protocol.version", "0")
    assert workspace.ensure("git").kind is Kind.GIT
    assert missing_objects(workspace.vllm) == 0
    assert leftovers(workspace) == []


@pytest.mark.parametrize(("any_sha", "protocol"), [("true", "0"), ("false", "0"), ("false", "2")])
def test_mirror_without_the_tag_serves_the_commit_and_the_tag_is_made(
    workspace: Workspace,
    upstream: Upstream,
    hostile: Path,
    tmp_path: Path,
    any_sha: str,
    protocol: str,
) -> None:
    mirror = tmp_path / "mirror.git"
    sh_git(tmp_path, "clone", "--quiet", "--bare", str(upstream.bare), str(mirror))
    sh_git(mirror, "tag", "--delete", "v1.0.0")
    # Now no reference names the pinned commit: only its history does.
    sh_git(mirror, "update-ref", "refs/heads/main", sh_git(mirror, "rev-parse", "drift"))
    sh_git(mirror, "config", "uploadpack.allowAnySHA1InWant", any_sha)
    sh_git(hostile.parent, "config", "--file", str(hostile), "protocol.version", protocol)
    assert workspace.ensure("git", VLLM_MIRROR=f"file://{mirror}").head == workspace.pin.commit
    assert sh_git(workspace.vllm, "rev-parse", "v1.0.0^{commit}") == workspace.pin.commit


@pytest.mark.parametrize("choice", ["auto", "git"])
def test_tag_that_points_elsewhere_stops_before_anything_is_fetched(
    workspace: Workspace, upstream: Upstream, tmp_path: Path, choice: checkout.Choice
) -> None:
    mirror = tmp_path / "mirror.git"
    sh_git(tmp_path, "clone", "--quiet", "--bare", str(upstream.bare), str(mirror))
    sh_git(mirror, "tag", "--force", "v1.0.0", "drift")
    with pytest.raises(
        SourceError, match=r"tag v1\.0\.0 at .* is commit [0-9a-f]{40}, not the pinned"
    ):
        workspace.ensure(choice, VLLM_MIRROR=str(mirror))
    assert workspace.observe().kind is Kind.MISSING


def test_mirror_without_the_commit_is_named(workspace: Workspace, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    sh_git(other, "init", "--quiet")
    commit(other, "unrelated", {"a": "a\n"})
    with pytest.raises(SourceError):
        workspace.ensure("git", VLLM_MIRROR=str(other))
    assert workspace.observe().kind is Kind.MISSING
    assert leftovers(workspace) == []


def test_auto_falls_back_to_the_release_in_one_line(workspace: Workspace) -> None:
    workspace.offline()
    assert workspace.ensure("auto").kind is Kind.RELEASE
    output = [line for line in workspace.err.getvalue().splitlines() if "release archive" in line]
    assert len(output) == 1
    assert "no history" in output[0]


def test_requested_git_that_is_unreachable_is_an_error(workspace: Workspace) -> None:
    workspace.offline()
    with pytest.raises(SourceError, match="cannot be read"):
        workspace.ensure("git")
    assert workspace.observe().kind is Kind.MISSING


def test_silent_remote_is_given_up_with_all_its_children(workspace: Workspace) -> None:
    before = psutil.Process().children(recursive=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://user:hunter2@127.0.0.1:{server.getsockname()[1]}/vllm.git"
        started = time.monotonic()
        with pytest.raises(SourceError, match="no answer in 1 s") as failure:
            workspace.ensure("git", VLLM_MIRROR=address, CONNECT_TIMEOUT_S="1", no_proxy="*")
        assert time.monotonic() - started < 4
    assert "hunter2" not in failure.value.message
    assert psutil.Process().children(recursive=True) == before


@pytest.mark.parametrize("choice", ["git", "release"])
def test_second_ensure_touches_nothing_and_needs_no_network(
    workspace: Workspace, snapshot: Snapshot, choice: checkout.Choice
) -> None:
    first = workspace.ensure(choice)
    checkout.protect(workspace.layout)
    workspace.offline()
    before = snapshot(workspace.layout.root)
    assert workspace.ensure("auto") == first
    checkout.protect(workspace.layout)
    workspace.stack()
    assert {
        name: entry
        for name, entry in snapshot(workspace.layout.root).items()
        if "/.workspace" not in name and name != str(workspace.layout.root)
    } == {
        name: entry
        for name, entry in before.items()
        if "/.workspace" not in name and name != str(workspace.layout.root)
    }


@pytest.mark.parametrize(("present", "requested"), [("git", "release"), ("release", "git")])
def test_checkout_of_the_other_kind_is_kept_and_reported(
    workspace: Workspace, present: checkout.Choice, requested: checkout.Choice
) -> None:
    workspace.ensure(present)
    write(workspace.vllm, {"mine.txt": "mine\n"})
    with pytest.raises(CheckoutError, match=f"SOURCE requests {requested}") as failure:
        workspace.ensure(requested)
    assert (workspace.vllm / "mine.txt").read_text() == "mine\n"
    keeping, clone = (failure.value.hint or "").split("    keeps using it; or, in a clone beside")
    assert keeping == "./scripts/inv bootstrap --source auto"
    environ = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"}
    command, bootstrap = clone.split(": ", 1)[1].split(" && ")
    subprocess.run(command, shell=True, cwd=workspace.layout.root, check=True, env=environ)
    assert bootstrap == f"../clone-{requested}/scripts/inv bootstrap --source {requested}"
    assert (workspace.layout.root.parent / f"clone-{requested}" / "vendor" / "pins.toml").is_file()


def test_folder_with_the_users_files_is_left_alone(workspace: Workspace) -> None:
    write(workspace.vllm, {"notes.txt": "mine\n"})
    with pytest.raises(CheckoutError, match="not a git checkout") as failure:
        workspace.ensure("auto")
    assert (failure.value.hint or "").startswith("ls -lA vendor/vllm    shows what is there; once")
    assert (workspace.vllm / "notes.txt").read_text() == "mine\n"


def test_file_in_place_of_the_checkout_is_foreign(workspace: Workspace) -> None:
    workspace.vllm.rmdir()
    workspace.vllm.write_text("a file\n")
    assert workspace.observe().kind is Kind.FOREIGN


@pytest.mark.parametrize("content", [None, "gitdir: /nowhere\n"])
def test_broken_git_folder_does_not_pass_for_the_superproject(
    workspace: Workspace, content: str | None
) -> None:
    if content is None:
        (workspace.vllm / ".git").mkdir()
    else:
        (workspace.vllm / ".git").write_text(content)
    found = workspace.observe()
    assert (found.kind, found.head) == (Kind.FOREIGN, None)


def test_submodule_that_was_moved_is_connected_by_the_hint(workspace: Workspace) -> None:
    workspace.ensure("git")
    mine = commit(workspace.vllm, "mine", {"vllm/mine.py": "mine\n"})
    aside = workspace.layout.root.parent / "aside"
    workspace.vllm.rename(aside)
    assert sh_git(aside, "log", "-1", check=False) == "", "its .git has a relative path"
    aside.rename(workspace.vllm)
    (workspace.vllm / ".git").write_text("gitdir: ../.git/modules/vllm\n")
    with pytest.raises(CheckoutError, match="a folder whose .git is not a repository") as failure:
        workspace.ensure("auto")
    command, following = (failure.value.hint or "").split(" && ")
    subprocess.run(command, shell=True, cwd=workspace.layout.root, check=True)
    assert following == "./scripts/inv patch"
    assert workspace.observe().head == mine


def test_repository_without_the_pin_is_foreign_and_the_hint_gives_it_the_pin(
    workspace: Workspace, upstream: Upstream
) -> None:
    sh_git(workspace.vllm, "init", "--quiet")
    mine = commit(workspace.vllm, "mine", {"a": "a\n"})
    with pytest.raises(CheckoutError, match=r"a repository without v1\.0\.0") as failure:
        workspace.ensure("auto")
    assert failure.value.hint
    command = failure.value.hint.split(" && ")[0]
    subprocess.run(command, shell=True, cwd=workspace.layout.root, check=True, capture_output=True)
    assert workspace.observe().kind is Kind.GIT
    assert workspace.observe().head == mine


def test_release_into_which_upstream_was_fetched_keeps_its_base(
    workspace: Workspace, upstream: Upstream
) -> None:
    first = workspace.ensure("release")
    sh_git(workspace.vllm, "fetch", "--quiet", str(upstream.bare), "main")
    assert workspace.observe() == first
    sh_git(workspace.vllm, "checkout", "--quiet", "--detach", "FETCH_HEAD")
    assert workspace.observe().kind is Kind.GIT


def test_missing_pin_in_a_partial_clone_is_not_fetched_by_looking(
    workspace: Workspace, upstream: Upstream
) -> None:
    workspace.ensure("git")
    # The remote is there and would give it.
    workspace.pin = replace(workspace.pin, commit=sh_git(upstream.bare, "rev-parse", "drift"))
    assert workspace.observe().kind is Kind.FOREIGN
    assert missing_objects(workspace.vllm) == 2


def test_removed_files_come_back_with_the_users_commits_and_without_network(
    workspace: Workspace,
) -> None:
    workspace.ensure("git")
    mine = commit(workspace.vllm, "mine", {"vllm/mine.py": "mine\n"})
    write(workspace.vllm, {"staged.txt": "staged\n"})
    sh_git(workspace.vllm, "add", "staged.txt")
    subprocess.run(["rm", "-rf", str(workspace.vllm)], check=True)
    workspace.offline()
    assert workspace.ensure("auto").head == mine
    assert (workspace.vllm / "vllm" / "mine.py").read_text() == "mine\n"
    assert sh_git(workspace.vllm, "status", "--porcelain") == "A  staged.txt"
    assert sh_git(workspace.layout.root, "submodule", "status").startswith(f"+{mine} vendor/vllm")


def test_git_folder_half_made_by_git_itself_is_completed(workspace: Workspace) -> None:
    modules = workspace.layout.root / ".git" / "modules" / "vendor" / "vllm"
    modules.mkdir(parents=True)
    sh_git(modules, "init", "--quiet", "--bare", ".")
    sh_git(modules, "config", "core.bare", "false")
    sh_git(modules, "config", "core.worktree", "../../../../vendor/vllm")
    assert workspace.ensure("git").head == workspace.pin.commit
    assert sh_git(workspace.vllm, "status", "--porcelain") == ""


_KILLED = """
import os, signal, sys
from pathlib import Path
from workspace.core.console import Console, Step
from workspace.core.console import RunLog
from workspace.core.paths import Layout
from workspace.core import settings
from workspace.repo import checkout
from workspace.repo.pins import Archive, Pin
layout = Layout(Path(sys.argv[1])); commit, *archive = sys.argv[4:]
class Deadly(Step):
    def progress(self, done, total, text=""):
        if text.startswith(sys.argv[3]): os.kill(os.getpid(), signal.SIGKILL)
pin = Pin("vllm", "v1.0.0", "1.0.0", commit, "URL", Archive(*archive), {})
given, step = settings.load(layout), Deadly("source")
with RunLog(Console(), layout.logs, verb="test") as run_log:
    checkout.ensure(layout, pin, given, choice=sys.argv[2], run_log=run_log, step=step)
""".replace("URL", URL)


@pytest.mark.parametrize(("choice", "moment"), [("git", "receiving"), ("release", "unpacking")])
def test_kill_leaves_nothing_half_and_the_next_run_completes(
    workspace: Workspace, choice: checkout.Choice, moment: str
) -> None:
    assert workspace.pin.archive
    given = workspace.pin.archive
    argv = [
        sys.executable,
        "-c",
        _KILLED,
        str(workspace.layout.root),
        choice,
        moment,
        workspace.pin.commit,
    ]
    argv += [given.filename, given.sha256, given.commit, given.tree]
    done = subprocess.run(
        argv,
        env={**os.environ, **workspace.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert leftovers(workspace)
    assert workspace.observe().kind is Kind.MISSING
    assert workspace.ensure(choice).head == workspace.observe().base
    assert leftovers(workspace) == []


def test_tarball_copy_of_the_workspace_gets_a_plain_clone(workspace: Workspace) -> None:
    subprocess.run(["rm", "-rf", str(workspace.layout.root / ".git")], check=True)
    assert workspace.ensure("git").kind is Kind.GIT
    assert (workspace.vllm / ".git").is_dir()
    checkout.protect(workspace.layout)
    assert workspace.apply().state.value == "applied"


def test_tarball_copy_inside_another_repository_leaves_that_one_alone(
    workspace: Workspace, snapshot: Snapshot
) -> None:
    outer = workspace.layout.root.parent
    subprocess.run(["rm", "-rf", str(workspace.layout.root / ".git")], check=True)
    sh_git(outer, "init", "--quiet")
    before = snapshot(outer / ".git")
    workspace.ensure("git")
    checkout.protect(workspace.layout)
    assert snapshot(outer / ".git") == before


def test_linked_worktree_of_the_superproject_has_its_own_checkout(
    workspace: Workspace, tmp_path: Path
) -> None:
    workspace.ensure("git")
    second = tmp_path / "second"
    sh_git(workspace.layout.root, "worktree", "add", "--quiet", str(second))
    first = workspace.layout
    workspace.layout = type(first)(second)
    assert workspace.ensure("git").kind is Kind.GIT
    workspace.series({})
    checkout.protect(workspace.layout)
    assert sh_git(second, "submodule", "status").startswith(f" {workspace.pin.commit}")
    assert sh_git(first.root, "submodule", "status").startswith(f" {workspace.pin.commit}")


def test_protection_keeps_add_all_from_staging_the_checkout(checked_out: Workspace) -> None:
    root = checked_out.layout.root
    checked_out.apply()
    checkout.protect(checked_out.layout)
    sh_git(root, "add", "--all")
    sh_git(root, "commit", "--quiet", "--all", "--allow-empty", "--message", "mine")
    assert sh_git(root, "ls-tree", "HEAD", "vendor/vllm").split()[2] == checked_out.pin.commit
    assert sh_git(root, "config", "--local", "fetch.recurseSubmodules") == "false"
    assert sh_git(root, "config", "--local", "submodule.recurse") == "false"


def test_release_from_another_archive_than_pinned_leaves_nothing(
    workspace: Workspace, tmp_path: Path
) -> None:
    other = tmp_path / "vllm-1.0.0.tar.gz"
    with tarfile.open(other, "w:gz") as tar:
        add_member(tar, "vllm-1.0.0/a", b"a\n")
    assert workspace.pin.archive
    write(tmp_path / "cache", {f"files/{sha256(other)}/{other.name}": other.read_bytes()})
    workspace.pin = replace(
        workspace.pin, archive=replace(workspace.pin.archive, sha256=sha256(other))
    )
    with pytest.raises(SourceError, match="gives commit"):
        workspace.ensure("release")
    assert workspace.observe().kind is Kind.MISSING
    assert leftovers(workspace) == []


def test_checkout_of_another_user_has_a_hint_to_trust_it(
    checked_out: Workspace, hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(CheckoutError, match="belongs to another user") as failure:
        checked_out.observe()
    assert failure.value.hint
    # First what changes no file; for root, who would take the clone from its user, only that.
    assert failure.value.hint.startswith("git config --global --add safe.directory ")
    assert ("chown" in failure.value.hint) == (os.geteuid() != 0)
    sh_git(hostile.parent, "config", "--file", str(hostile), "safe.directory", "*")
    assert checked_out.apply().state.value == "applied"


def test_vendor_that_cannot_be_written_is_named(workspace: Workspace) -> None:
    # Root may write anywhere but below a file.
    subprocess.run(["rm", "-rf", str(workspace.vllm.parent)], check=True)
    workspace.vllm.parent.write_text("")
    with pytest.raises(ToolchainError, match="cannot be written"):
        workspace.ensure("release")


def test_address_is_shown_without_name_and_password() -> None:
    assert without_user("https://me:secret@host/x.git") == "https://host/x.git"
    assert without_user("git@host:x.git") == "git@host:x.git"
