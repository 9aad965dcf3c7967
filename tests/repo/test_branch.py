"""A patch as a branch on upstream's main: its content, and nothing left after a failure."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.repo.conftest import LINES, PATCHED, Upstream, Workspace, commit, sh_git
from workspace.core.errors import (
    CheckoutError,
    PatchConflict,
    PatchDrift,
    SettingsError,
    SourceError,
)
from workspace.repo import patching


def run(workspace: Workspace, name: str, patch: str, **settings: str) -> Path:
    return patching.put_on_upstream(workspace.session(**settings), name, patch)


@pytest.fixture
def user(hostile: Path) -> None:
    sh_git(hostile.parent, "config", "--file", str(hostile), "user.name", "Mé Myself")
    sh_git(hostile.parent, "config", "--file", str(hostile), "user.email", "me@example.invalid")


@pytest.fixture(scope="session")
def moved(tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> Path:
    """Return an upstream whose `main` has one more commit than the pin."""
    root = tmp_path_factory.mktemp("moved")
    sh_git(root, "clone", "--quiet", str(upstream.work), "work")
    commit(root / "work", "later", {"README": "three\n"})
    sh_git(root, "clone", "--quiet", "--bare", "work", "bare")
    sh_git(root / "bare", "config", "uploadpack.allowFilter", "true")
    return root / "bare"


def left(workspace: Workspace) -> tuple[str, str, list[Path]]:
    folder = workspace.layout.state / "branches"
    return (
        sh_git(workspace.vllm, "worktree", "list"),
        sh_git(workspace.vllm, "for-each-ref", "refs/heads"),
        [*folder.rglob("*")] if folder.exists() else [],
    )


@pytest.mark.usefixtures("user")
def test_branch_has_one_signed_commit_on_main_without_the_status(
    either_applied: Workspace, upstream: Upstream, moved: Path
) -> None:
    head = sh_git(either_applied.vllm, "rev-parse", "HEAD")
    path = run(
        either_applied, "fix/twenty", next(iter(upstream.patches)), VLLM_MIRROR=moved.as_uri()
    )
    assert path == either_applied.layout.state / "branches" / "fix" / "twenty"
    main = sh_git(moved, "rev-parse", "main")
    assert sh_git(path, "rev-parse", "--abbrev-ref", "HEAD") == "fix/twenty"
    assert sh_git(path, "rev-list", "HEAD", "--not", main) == sh_git(path, "rev-parse", "HEAD")
    assert (
        sh_git(path, "log", "-1", "--format=%B")
        == "[Bugfix] Größer: twenty in words\n\nWhy, in Füße.\n\nSigned-off-by: Mé Myself"
        " <me@example.invalid>"
    )
    assert (
        sh_git(path, "log", "-1", "--format=%an %cn %ad", "--date=raw")
        == "Ünal Mé Myself 1767323045 +0000"
    )
    assert (path / "vllm/lines.py").read_text() == PATCHED
    assert (path / "README").read_text() == "three\n"
    assert sh_git(path, "status", "--porcelain") == ""
    assert (
        "git -C .workspace/branches/fix/twenty push git@github.com:YOUR-NAME/vllm.git fix/twenty"
        in either_applied.err.getvalue()
    )
    assert (sh_git(either_applied.vllm, "rev-parse", "HEAD"), either_applied.stack().dirty) == (
        head,
        (),
    )
    before = left(either_applied)
    first = next(iter(upstream.patches))
    with pytest.raises(CheckoutError, match="has a branch fix/twenty already") as failure:
        run(either_applied, "fix/twenty", first)
    assert left(either_applied) == before
    hint = f"./scripts/inv patch.export --branch fix/twenty-2 --patch {first}"
    assert failure.value.hint == hint
    run(either_applied, "fix/twenty-2", first)


@pytest.mark.usefixtures("user")
def test_conflict_with_main_leaves_nothing_behind(
    applied: Workspace, upstream: Upstream, moved: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    sh_git(tmp_path, "clone", "--quiet", str(moved), str(other))
    commit(other, "twenty otherwise", {"vllm/lines.py": LINES.replace("line 20\n", "line XX\n")})
    before = left(applied)
    first = next(iter(upstream.patches))
    with pytest.raises(
        PatchConflict, match=r"conflicts \(vllm/lines.py\) on upstream's main"
    ) as failure:
        run(applied, "fix", first, VLLM_MIRROR=str(other))
    assert failure.value.hint
    assert left(applied) == before
    commit(other, "taken", {"vllm/lines.py": PATCHED})
    with pytest.raises(PatchDrift, match="is in upstream already"):
        run(applied, "fix", f"patches/vllm/{first}", VLLM_MIRROR=str(other))
    assert left(applied) == before


@pytest.mark.usefixtures("user")
def test_offline_the_last_fetched_main_is_used_and_reported(
    applied: Workspace, upstream: Upstream
) -> None:
    nowhere = (applied.layout.root / "nowhere").as_uri()
    before = left(applied)
    with pytest.raises(SourceError):
        run(applied, "fix", next(iter(upstream.patches)), VLLM_MIRROR=nowhere)
    assert left(applied) == before
    sh_git(applied.vllm, "fetch", "--quiet", str(upstream.bare), "+main:refs/remotes/origin/main")
    run(applied, "fix", next(iter(upstream.patches)), VLLM_MIRROR=nowhere)
    assert "using refs/remotes/origin/main as it was fetched last" in applied.err.getvalue()


@pytest.mark.usefixtures("user")
def test_invalid_branch_patch_or_checkout_is_refused(
    release: Workspace, upstream: Upstream
) -> None:
    first = next(iter(upstream.patches))
    for name in ("..", "a b", "-x", "a..b", "/x", "x.lock", "@{-1}", ""):
        with pytest.raises(SettingsError, match="is not a valid branch name"):
            run(release, name, first)
    with pytest.raises(SettingsError, match="patches/vllm/nothing.patch does not exist") as failure:
        run(release, "fix", "nothing")
    assert first in (failure.value.hint or "")
    (release.layout.state / "branches" / "mine").mkdir(parents=True)
    with pytest.raises(CheckoutError, match="branches/mine exists already"):
        run(release, "mine", first)
    release.pin = replace(release.pin, commit="1" * 40, archive=None)
    with pytest.raises(CheckoutError, match="a repository without"):
        run(release, "fix", first)


def test_without_a_name_nothing_can_be_signed(release: Workspace, upstream: Upstream) -> None:
    with pytest.raises(SettingsError, match="user.name and user.email are not set") as failure:
        run(release, "fix", next(iter(upstream.patches)))
    assert "user.email" in (failure.value.hint or "")
