"""Reading a working tree through git: digests, changes, and no side effects."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.repo.conftest import Snapshot, Workspace, commit, sh_git, write
from workspace.core.errors import BuildError, CheckoutError, SourceError, ToolchainError
from workspace.core.process import NoAnswer
from workspace.repo.git import Git, command, worktree
from workspace.repo.git.command import first_line, refusal_of_disk
from workspace.repo.git.history import Standing, standing

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(release: Workspace) -> Git:
    return Git(release.vllm)


def test_digest_of_a_clean_tree_is_that_of_its_commit(tree: Git) -> None:
    assert tree.digest([]) == tree.digest([], commit="HEAD")
    assert tree.digest(["csrc", "run.sh"]) == tree.digest(["csrc", "run.sh"], commit="HEAD")
    assert tree.digest(["csrc"]) != tree.digest(["vllm"])


def edit(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"edited\r\n")


CHANGES = {
    "edit": lambda root: edit(root / "csrc" / "a.cu"),
    "edit with DOS line ends": lambda root: edit(root / "csrc" / "dos.h"),
    "edit of a name beyond ASCII": lambda root: edit(root / "csrc" / "größe.cu"),
    "delete": lambda root: (root / "csrc" / "a.cu").unlink(),
    "new file": lambda root: write(root, {"csrc/new\n file.cu": "n\n"}),
    "new folder": lambda root: write(root, {"csrc/deep/er/new.cu": "n\n"}),
    "mode": lambda root: (root / "csrc" / "a.cu").chmod(0o755),
    "file to link": lambda root: [
        (root / "csrc" / "a.cu").unlink(),
        (root / "csrc" / "a.cu").symlink_to("dos.h"),
    ],
    "link to nowhere": lambda root: (root / "csrc" / "l").symlink_to("nowhere"),
    "file to folder": lambda root: [
        (root / "csrc" / "a.cu").unlink(),
        write(root, {"csrc/a.cu/x": "x\n"}),
    ],
    "rename": lambda root: (root / "csrc" / "a.cu").rename(root / "csrc" / "b.cu"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_digest_of_an_edit_is_that_of_its_later_commit(tree: Git, name: str) -> None:
    before = tree.digest(["csrc"])
    CHANGES[name](tree.path)
    edited = tree.digest(["csrc"])
    assert edited != before
    assert tree.digest(["vllm"]) == tree.digest(["vllm"], commit="HEAD")
    sh_git(tree.path, "add", "--all")
    assert tree.digest(["csrc"]) == edited
    commit(tree.path, "edit", {})
    assert tree.digest(["csrc"], commit="HEAD") == edited == tree.digest(["csrc"])


def test_ignored_files_and_touched_files_change_no_digest(tree: Git) -> None:
    before = tree.digest([])
    write(tree.path, {"vllm/_C.abi3.so": "library", "build/x": "x"})
    os.utime(tree.path / "csrc" / "a.cu", (1, 1))
    assert tree.digest([]) == before
    assert tree.changed_files("HEAD") == ()
    assert tree.edits() == ()


def test_digest_takes_no_pattern_for_a_path(tree: Git) -> None:
    assert tree.digest(["*.cu"]) == tree.digest(["nowhere"])


def test_repository_inside_the_tree_is_not_looked_into(tree: Git) -> None:
    inner = tree.path / "csrc" / "inner"
    inner.mkdir()
    sh_git(inner, "init", "--quiet")
    commit(inner, "x", {"x": "x"})
    assert tree.digest(["csrc"]) == tree.digest(["csrc"], commit="HEAD")


def test_changed_files_are_committed_staged_edited_deleted_and_new_ones(tree: Git) -> None:
    base = tree.head()
    assert base
    commit(tree.path, "one", {"vllm/one.py": "1"})
    write(tree.path, {"staged.txt": "2", "README": "edited\n"})
    sh_git(tree.path, "add", "staged.txt")
    (tree.path / "csrc" / "größe.cu").unlink()
    write(tree.path, {"new\tfile": "3", "ignored.so": "4"})
    assert tree.changed_files(base) == (
        "README",
        "csrc/größe.cu",
        "new\tfile",
        "staged.txt",
        "vllm/one.py",
    )


def test_looking_rewrites_no_index_and_makes_no_file(tree: Git, snapshot: Snapshot) -> None:
    # A file touched without a change makes plain `git status` refresh the index.
    os.utime(tree.path / "README", (1, 1))
    before = snapshot(tree.path)
    tree.digest([])
    tree.edits()
    tree.changed_files("HEAD")
    tree.under_way()
    assert snapshot(tree.path) == before


def test_place_has_the_commits_that_are_there_also_before_the_first_one(
    tree: Git, tmp_path: Path
) -> None:
    base, missing = tree.head() or "", "1" * 40
    commit(tree.path, "one", {"README": "1"})
    place = tree.place(missing, base)
    assert place
    assert (place.head, place.present) == (tree.head(), {base})
    sh_git(tmp_path, "init", "--quiet", "empty")
    unborn = Git(tmp_path / "empty").place(missing)
    assert unborn
    assert (unborn.top, unborn.head, unborn.present) == (tmp_path / "empty", None, set())
    assert Git(tmp_path).place(base) is None


def test_setting_is_written_once_however_its_name_is_spelled(tree: Git) -> None:
    wanted = {"fetch.recurseSubmodules": "false", "submodule.vendor/A.b.url": "file:///x\ny"}
    tree.set_settings(wanted)
    file = tree.path / ".git" / "config"
    os.utime(file, (1, 1))
    before = file.stat()
    tree.set_settings(wanted)
    assert (file.stat().st_ino, file.stat().st_mtime) == (before.st_ino, 1)
    tree.set_settings(wanted | {"fetch.recursesubmodules": "true"})
    assert [tree.setting(key) for key in wanted] == ["true", "file:///x\ny"]


def test_revisions_are_resolved_together_and_references_keep_what_they_name(tree: Git) -> None:
    base = tree.head() or ""
    commit(tree.path, "one", {"README": "1"})
    assert tree.resolve_all("HEAD", "refs/none", "HEAD~1", "HEAD:README") == (
        *(tree.head(), None, base, None),
    )
    tree.set_refs({"refs/patches/tip": base, "refs/patches/base": base})
    tree.set_refs({"refs/patches/tip": tree.head() or "", "refs/patches/base": base})
    assert tree.resolve_all("refs/patches/tip", "refs/patches/base") == (tree.head(), base)


def test_standing_is_on_the_base_or_beside_it_during_an_operation(tree: Git) -> None:
    base = tree.head() or ""
    commit(tree.path, "one", {"README": "1"})
    tip = tree.head() or ""
    assert standing(tree, base, base) == Standing(None, tree.tree(base), is_on_base=True)
    assert standing(tree, tip, base) == Standing(None, tree.tree(tip), is_on_base=True)
    (tree.path / ".git" / "MERGE_HEAD").touch()
    assert standing(tree, base, tip) == Standing("merge", tree.tree(base), is_on_base=False)
    other = sh_git(tree.path, "commit-tree", "-m", "unrelated", f"{base}^{{tree}}").strip()
    assert not standing(tree, other, base).is_on_base


def test_failure_has_the_type_of_the_caller_and_gits_own_message(tmp_path: Path) -> None:
    with pytest.raises(CheckoutError, match=r"git rev-parse in .*: not a git repository"):
        Git(tmp_path).tree("HEAD")
    with pytest.raises(BuildError, match="cannot change to"):
        Git(tmp_path / "nowhere", failure=BuildError).tree("HEAD")


def test_lock_that_a_killed_git_left_does_not_stand_in_the_way(tree: Git) -> None:
    locks = [tree.path / ".git" / name for name in ("index.lock", "config.lock")]
    for lock in locks:
        lock.touch()
    tree.hide("README")
    tree.set_setting("user.name", "Ada")
    assert not any(lock.exists() for lock in locks)


def test_lock_that_a_living_git_holds_is_named(tree: Git) -> None:
    lock = tree.path / ".git" / "index.lock"
    with lock.open("w") as file, subprocess.Popen(["sleep", "60"], stdout=file) as holder:
        try:
            with pytest.raises(CheckoutError, match="index.lock") as failure:
                tree.hide("README")
        finally:
            holder.kill()
    assert lock.exists()
    assert failure.value.hint
    assert f"rm {lock}" in failure.value.hint


def test_revision_that_looks_like_a_flag_is_none(tree: Git) -> None:
    assert tree.resolve("--all") is None
    assert tree.resolve("nowhere") is None
    assert tree.resolve("v1.0.0") == tree.head()


def test_machine_without_git_has_an_install_hint(tmp_path: Path) -> None:
    script = """
from pathlib import Path
from workspace.core.errors import ToolchainError
from workspace.repo.git import Git, worktree
try:
    Git(Path(".")).head()
except ToolchainError as error:
    print(error.hint)
"""
    environ = {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for more in ({}, {"GIT_PYTHON_REFRESH": "quiet"}):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environ | more,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "sudo apt install git\n"


@pytest.mark.parametrize(
    ("script", "sentence", "hint"),
    [
        (
            "echo 'git: error while loading shared libraries: libpcre2-8.so.0' >&2; exit 127",
            "exited with 127: git: error while loading shared libraries: libpcre2-8.so.0",
            "ls -l ",
        ),
        ("exit 1", "exited with 1", "ls -l "),
        ("kill -9 $$", "was killed by SIGKILL", "free -h"),
    ],
)
def test_git_that_is_there_and_fails_is_not_missing(
    tmp_path: Path, script: str, sentence: str, hint: str
) -> None:
    program = tmp_path / "git"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    look = """
from pathlib import Path
from workspace.core.errors import ToolchainError
from workspace.repo.git import Git
try:
    Git(Path(".")).head()
except ToolchainError as error:
    print(error.message, error.hint, sep="\\n")
"""
    environ = {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", look], env=environ, capture_output=True, text=True, check=True
    )
    message, shown = done.stdout.splitlines()
    assert message.startswith(f"{program} {sentence}")
    assert "missing" not in message
    assert shown.startswith(hint)


def test_first_line_names_the_reason() -> None:
    assert first_line("warning: x\nhint: y\nfatal: it broke\nmore\n") == "it broke"
    assert first_line("only this\n") == "only this"
    assert first_line("") == ""


LOST = "fatal: Could not read from remote repository.\n\nPlease make sure you have the correct"


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("git@github.com: Permission denied (publickey).", None),
        ("Warning: Permanently added 'x' to the list of known hosts.\nx: denied", "x: denied"),
        ("@ WARNING: HAS CHANGED @\nHost verification failed.", "Host verification failed."),
        ("ssh: Could not resolve hostname git.invalid: Name or service not known", None),
        ("bash: line 1: git-upload-pack: command not found", None),
        ("", "Could not read from remote repository."),
    ],
)  # fmt: skip
def test_reason_of_the_program_that_git_started_is_passed_on(
    before: str, reason: str | None
) -> None:
    assert first_line(f"{before}\n{LOST}\n") == (reason or before)


def test_transfer_that_stopped_is_reported_by_its_cause() -> None:
    output = "error: RPC failed; curl 56 recv failure\nfatal: early EOF\nfatal: index-pack failed"
    assert first_line(output) == "RPC failed; curl 56 recv failure"
    assert first_line("fatal: early EOF\nfatal: write error: No space left on device") == (
        "write error: No space left on device"
    )


def test_refusal_of_ssh_is_in_the_sentence_of_a_fetch(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(
        "#!/bin/sh\necho 'git@x.invalid: Permission denied (publickey).' >&2; exit 255\n"
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("GIT_SSH_COMMAND", str(ssh))
    url = "ssh://git@x.invalid/vllm.git"
    with pytest.raises(SourceError, match=r"cannot be read: git@x.invalid: Permission denied"):
        workspace.ensure("git", VLLM_MIRROR=url)
    workspace.ensure("git")
    git = Git(workspace.vllm, failure=SourceError)
    with pytest.raises(SourceError, match=r"git fetch in .*: git@x.invalid: Permission denied"):
        git.talk(("fetch", url), workspace.settings(), workspace.run_log, lambda _: None)


def test_full_disk_of_a_fetch_is_not_the_networks(workspace: Workspace, tmp_path: Path) -> None:
    workspace.ensure("git")
    git = Git(workspace.vllm, failure=SourceError)
    alias = "!echo 'fatal: write error: No space left on device' >&2; exit 128"
    with pytest.raises(ToolchainError, match="No space left on device") as failure:
        git.talk(
            ("-c", f"alias.fill={alias}", "fill"),
            workspace.settings(),
            workspace.run_log,
            lambda _: None,
        )
    assert (failure.value.hint or "").startswith("df -h ")


def test_full_disk_is_distinguished_from_a_patch_that_does_not_apply() -> None:
    assert refusal_of_disk(
        "error: unable to write file setup.py\nfatal: sha1 file 'index.lock' write error. Out of"
        " diskspace\n"
    )
    assert refusal_of_disk(
        "error: unable to create temporary file: Read-only file system\nerror: patch does not"
        " apply\n"
    )
    assert (
        refusal_of_disk("error: patch failed: setup.py:1\nerror: setup.py: patch does not apply\n")
        is None
    )


def test_snapshot_has_an_edit_of_the_same_size_and_the_same_tick(tree: Git) -> None:
    # Git tells such an edit from the index being no newer than the file, which a copy of the index
    # must not lose.
    sh_git(tree.path, "config", "core.trustctime", "false")
    file, index, tick = (
        tree.path / "vllm" / "lines.py",
        tree.path_of("index"),
        (1_700_000_000 * 10**9,) * 2,
    )
    text = file.read_text()
    os.utime(file, ns=tick)
    sh_git(tree.path, "update-index", "--refresh")
    file.write_text(text.replace("line 20\n", "line YY\n"))
    os.utime(file, ns=tick)
    os.utime(index, ns=tick)
    kept = worktree.snapshot(tree, "what lay there")
    assert sh_git(tree.path, "show", f"{kept}:vllm/lines.py").splitlines()[19] == "line YY"


def test_git_that_was_killed_has_refused_nothing(tree: Git) -> None:
    for check in (True, False):
        with pytest.raises(ToolchainError, match="git die in .* was killed by SIGKILL"):
            tree.write("-c", "alias.die=!kill -9 $PPID", "die", check=check)


def wrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a wrapper of git first on PATH."""
    write(tmp_path, {"wrapped/git": f"#!/bin/sh\n{script}\n"})
    wrapper = tmp_path / "wrapped" / "git"
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")


@pytest.mark.parametrize("script", ["exec sleep 60", "sleep 60", "trap '' TERM INT; sleep 60"])
@pytest.mark.parametrize("limit", ["LOOK_S", "WRITE_S"])
def test_git_that_hangs_is_slow_and_leaves_no_process(
    tree: Git, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, limit: str
) -> None:
    tree.write("status")
    wrap(tmp_path, monkeypatch, script)
    monkeypatch.setattr(command, limit, 0.3)
    call = tree.look if limit == "LOOK_S" else tree.write
    others = psutil.Process().children(recursive=True)
    with pytest.raises(NoAnswer, match=r"/wrapped/git status gave no answer in 0\.3 s") as failure:
        call("status")
    assert failure.value.hint is None
    assert [one for one in psutil.Process().children(recursive=True) if one not in others] == []


def test_git_whose_version_hangs_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The import of GitPython runs it, so the test needs a Python of its own."""
    wrap(tmp_path, monkeypatch, "sleep 60")
    program = """
from workspace.core.process import NoAnswer
from workspace.repo.git import command
command.VERSION_S = 0.3
try:
    command.executable()
except NoAnswer as exc:
    print(exc)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    answer = f"{tmp_path}/wrapped/git version gave no answer in 0.3 s\n"
    assert (done.stdout, done.stderr) == (answer, "")


def test_wrapper_that_prints_before_git_is_named(
    tree: Git, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = shutil.which("git")
    wrap(tmp_path, monkeypatch, f'echo "loading module git"; exec {git} "$@"')
    with pytest.raises(ToolchainError, match="git prints something else") as failure:
        tree.place()
    assert "loading module git" in str(failure.value)
    subprocess.run(str(failure.value.hint), shell=True, check=True, capture_output=True)
