"""The stack unapplied and applied again: no trace stays, and nothing is lost."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.repo.conftest import Snapshot, Workspace, commit, export, sh_git, write
from tests.repo.states import everything
from workspace.core.errors import CheckoutError, PatchDrift
from workspace.repo.patches import State


def test_unapply_returns_to_the_base_and_keeps_the_commits_under_refs(
    checked_out: Workspace,
) -> None:
    before = everything(checked_out)
    applied = checked_out.apply()
    after = checked_out.unapply()
    assert (after.state, after.head) == (State.UNAPPLIED, applied.base)
    assert sh_git(
        checked_out.vllm, "rev-parse", "refs/patches/base", "refs/patches/tip"
    ).split() == [applied.base, applied.head]
    assert everything(checked_out) | {"refs": ""} == before | {"refs": ""}
    assert checked_out.apply().head == applied.head


def test_unapply_with_nothing_applied_touches_nothing(
    release: Workspace, snapshot: Snapshot
) -> None:
    release.stack()
    before = snapshot(release.layout.root)
    assert release.unapply().state is State.UNAPPLIED
    write(release.vllm, {"README": "edited\n"})
    assert release.unapply().state is State.DIRTY
    assert (release.vllm / "README").read_text() == "edited\n"
    sh_git(release.vllm, "checkout", "--quiet", "README")
    readme = str(release.vllm / "README")
    index = str(release.vllm / ".git" / "index")
    after = snapshot(release.layout.root)
    assert {name for name in after if after[name] != before.get(name)} <= {
        readme,
        index,
        str(release.vllm),
        str(release.vllm / ".git"),
    }


@pytest.mark.parametrize(
    ("trouble", "error", "says", "hint"),
    [
        (
            "edit",
            CheckoutError,
            r"has edits \(csrc/a\.cu\)",
            (
                "git -C vendor/vllm stash && ./scripts/inv patch.unapply && git -C vendor/vllm"
                " stash pop"
            ),
        ),
        (
            "commit",
            PatchDrift,
            "commits on .* that differ from the series",
            "./scripts/inv patch.export    ",
        ),
        ("foreign", CheckoutError, "which is not on", "git -C vendor/vllm branch mine-"),
        (
            "merge",
            CheckoutError,
            "in the middle of a git merge",
            "./scripts/inv patch.continue --abort && ./scripts/inv patch.unapply",
        ),
        ("missing", CheckoutError, "does not exist", "./scripts/inv bootstrap"),
    ],
)
def test_unapply_refuses_what_it_could_lose(
    applied: Workspace, trouble: str, error: type[Exception], says: str, hint: str
) -> None:
    vllm = applied.vllm
    if trouble in ("edit", "merge"):
        write(vllm, {"csrc/a.cu": "mine\n"})
    if trouble in ("commit", "merge"):
        commit(vllm, "mine", {"csrc/a.cu": "mine\n"})
    if trouble == "merge":
        mine = sh_git(vllm, "rev-parse", "HEAD")
        sh_git(vllm, "checkout", "--quiet", "HEAD~1")
        commit(vllm, "theirs", {"csrc/a.cu": "theirs\n"})
        sh_git(vllm, "merge", mine, check=False)
    if trouble == "foreign":
        sh_git(vllm, "checkout", "--quiet", "--orphan", "other")
        commit(vllm, "other", {"a": "a\n"})
    if trouble == "missing":
        vllm.rename(vllm.with_name("elsewhere"))
        with pytest.raises(error, match=says) as failure:
            applied.unapply()
    else:
        before = everything(applied)
        with pytest.raises(error, match=says) as failure:
            applied.unapply()
        assert everything(applied) == before
    assert hint in (failure.value.hint or "")


def test_unexported_commits_are_off_and_safe_after_the_hint_of_unapply(applied: Workspace) -> None:
    mine = commit(applied.vllm, "mine", {"vllm/mine.py": "mine\n"})
    with pytest.raises(PatchDrift) as failure:
        applied.unapply()
    commands = (failure.value.hint or "").split(": ", 1)[1]
    subprocess.run(
        commands,
        shell=True,
        cwd=applied.layout.root,
        check=True,
        capture_output=True,
        env={**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"},
    )
    assert (applied.stack().state, sh_git(applied.vllm, "rev-parse", f"mine-{mine[:12]}")) == (
        State.UNAPPLIED,
        mine,
    )


def made_on_the_release(
    workspace: Workspace, tmp_path: Path, message: str, change: str
) -> tuple[str, bytes, str]:
    """Return a patch that a shell script `change` makes on the base: its name, content and tree."""
    work = tmp_path / "made"
    sh_git(tmp_path, "clone", "--quiet", str(workspace.vllm), str(work))
    subprocess.run(["bash", "-ec", change], cwd=work, check=True)
    commit(work, f"{message}\n\nUpstream-Status: Pending", {})
    return (
        f"{sh_git(work, 'log', '-1', '--format=%f')}.patch",
        export(work, "HEAD"),
        sh_git(work, "rev-parse", "HEAD^{tree}"),
    )


@pytest.mark.parametrize(
    "change",
    [
        "printf 'dos\\r\\nother\\r\\n' > csrc/dos.h",
        "head -c 70000 /dev/urandom > binary.bin",
        "chmod 755 README; chmod 644 run.sh",
        "mv vllm/lines.py vllm/moved.py; echo more >> vllm/moved.py",
        "ln -sf README link; ln -s nowhere dangling",
        "printf '\\351t\\351\\n' > latin.txt; printf 'x' > $'n\\351\\n\"'",
        "rm README; mkdir README; echo now a folder > README/file",
        "printf 'no newline at the end' > README; printf '' > empty",
    ],
    ids=[
        "crlf",
        "binary",
        "modes",
        "rename",
        "symlinks",
        "not-utf-8",
        "file-to-folder",
        "no-newline-and-empty",
    ],
)
def test_patch_of_any_content_is_applied_and_unapplied_without_a_trace(
    release: Workspace, tmp_path: Path, change: str
) -> None:
    name, content, tree = made_on_the_release(release, tmp_path, "Change it", change)
    release.series({name: content})
    before = everything(release)
    assert (release.apply().state, release.stack().tree, release.stack().dirty) == (
        State.APPLIED,
        tree,
        (),
    )
    assert release.unapply().state is State.UNAPPLIED
    assert everything(release) | {"refs": ""} == before | {"refs": ""}


def test_own_commits_that_apply_makes_again_stay_in_a_reference(release: Workspace) -> None:
    git = release.vllm
    base = release.apply().base or ""
    # As if they had been committed by hand before they were exported.
    sh_git(git, "rebase", "--quiet", "--force-rebase", base)
    own = sh_git(git, "rev-parse", "HEAD")
    for _ in range(2):
        release.unapply()
        release.apply()
    assert sh_git(git, "rev-parse", "HEAD") != own
    assert (
        sh_git(git, "for-each-ref", "--format=%(refname)", "--contains", own)
        == f"refs/patches/kept/{own[:12]}"
    )
    # Commits that am makes of patches are made again whenever they are wanted, and need no
    # reference.
    assert len(sh_git(git, "for-each-ref", "--format=%(refname)", "refs/patches/kept").split()) == 1


def test_commits_that_another_program_left_get_a_reference_before_apply(
    release: Workspace,
) -> None:
    base = release.apply().base or ""
    commit(release.vllm, "Mine\n\nUpstream-Status: Pending", {"vllm/mine.py": "mine\n"})
    mine = sh_git(release.vllm, "rev-parse", "HEAD")
    sh_git(release.vllm, "checkout", "--quiet", "--detach", base)
    release.apply()
    assert (
        sh_git(release.vllm, "for-each-ref", "--format=%(refname)", "--contains", mine)
        == f"refs/patches/kept/{mine[:12]}"
    )
