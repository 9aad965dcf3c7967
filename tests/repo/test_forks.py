"""A pin may be any commit: of a fork by its URL, or of upstream, with the release it stands on."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.repo import two_releases as ladders
from tests.repo.shell import commit, sh_git, write
from tests.repo.test_upstream import clone, find
from tests.repo.two_releases import Index, TwoReleases
from tests.repo.workspaces import Workspace
from workspace.core.errors import SettingsError, SourceError
from workspace.repo import checkout, pins
from workspace.repo.checkout import Kind
from workspace.repo.pins import Base, Wanted

__all__ = ["clone"]


@pytest.fixture
def fork(tmp_path: Path, two_releases: TwoReleases) -> Path:
    """A fork without tags: two commits on v1.0.0, the second in a compiled source."""
    path = tmp_path / "fork"
    sh_git(tmp_path, "clone", "--quiet", "--no-tags", str(two_releases.bare), str(path))
    sh_git(path, "switch", "--quiet", "--create", "mine/feature", two_releases.commits["1.0.0"])
    commit(path, "One of mine", {"vllm/mine.py": "1\n"})
    commit(path, "Two of mine", {"csrc/größe.cu": "mine\n"})
    sh_git(path, "config", "uploadpack.allowFilter", "true")
    return path


def head(repository: Path, name: str = "HEAD") -> str:
    return sh_git(repository, "rev-parse", name)


@pytest.mark.parametrize("kind", ["git", "release"])
def test_branch_of_a_fork_without_tags_takes_the_wheel_of_the_release_that_it_stands_on(
    clone: Workspace, fork: Path, two_releases: TwoReleases, kind: str
) -> None:
    clone.ensure(kind)  # type: ignore[arg-type]
    found = find(clone, f"file://{fork}@mine/feature")
    pin, base = found.pin, two_releases.commits["1.0.0"]
    assert (pin.ref, pin.tag, pin.commit) == ("refs/heads/mine/feature", "mine/feature", head(fork))
    assert (pin.url, pin.upstream) == (f"file://{fork}", two_releases.pin.url)
    assert (pin.base, pin.version) == (Base("v1.0.0", "1.0.0", base), "1.0.1.dev2")
    assert (pin.precompiled, pin.archive, found.kind) == (clone.pin.precompiled, None, Kind.GIT)
    assert found.argv == (f"file://{fork}@mine/feature",)


def test_commit_or_folder_of_a_fork_and_a_base_that_is_said(
    clone: Workspace, fork: Path, two_releases: TwoReleases
) -> None:
    clone.ensure("git")
    found = find(clone, f"{fork}@{head(fork, 'HEAD~1')}", base="1.1.0")
    assert found.pin.base == Base("v1.1.0", "1.1.0", two_releases.commits["1.1.0"])
    assert (found.pin.ref, found.pin.tag) == (head(fork, "HEAD~1"), head(fork, "HEAD~1")[:12])
    assert set(found.pin.precompiled) == {"cuda-x86_64", "cuda-aarch64"}
    assert found.not_precompiled.keys() == {"cpu-x86_64", "cpu-aarch64"}
    with pytest.raises(SourceError, match=r"--base v1\.0\.5 is no release .* nearest: v1\.0\.0"):
        find(clone, f"{fork}@mine/feature", base="v1.0.5")


def test_the_nearest_of_several_releases_is_the_base_and_no_candidate_of_one_is(
    clone: Workspace, fork: Path, two_releases: TwoReleases
) -> None:
    clone.ensure("git")
    mirror = fork.parent / "mirror.git"
    sh_git(fork.parent, "clone", "--quiet", "--bare", str(two_releases.bare), str(mirror))
    sh_git(fork, "push", "--quiet", str(mirror), "HEAD~1:refs/tags/v1.0.1")
    sh_git(fork, "push", "--quiet", str(mirror), "HEAD:refs/tags/v1.0.2rc1")
    # A tag of the fork has the name of a release, and other sources than its wheel.
    sh_git(fork, "tag", "v1.0.0", "HEAD")
    sh_git(fork, "tag", "v1.0.3", "HEAD")
    found = find(clone, f"file://{fork}@mine/feature", VLLM_MIRROR=f"file://{mirror}")
    assert found.pin.base == Base("v1.0.1", "1.0.1", head(fork, "HEAD~1"))
    # The index has no such release: the base stays, and every kernel is compiled.
    assert (dict(found.pin.precompiled), found.pin.version) == ({}, "1.0.2.dev1")
    assert any("precompiled wheels are unknown" in sentence for sentence in found.lacking)


def test_release_takes_no_base_and_without_upstream_only_the_pinned_release_is_one(
    clone: Workspace, fork: Path
) -> None:
    clone.ensure("git")
    with pytest.raises(SettingsError, match="--base is for a branch or commit"):
        find(clone, "v1.1.0", base="v1.0.0")
    alone = {"VLLM_MIRROR": "file:///nowhere"}
    found = find(clone, f"file://{fork}@mine/feature", **alone)
    assert found.pin.base
    assert found.pin.base.tag == "v1.0.0"
    assert any("only the pinned release can be the base" in text for text in found.lacking)
    with pytest.raises(SourceError, match=r"--base v1\.1\.0 is no release"):
        find(clone, f"file://{fork}@mine/feature", base="v1.1.0", **alone)


def test_upstreams_main_has_no_release_below_it_and_takes_the_one_that_is_said(
    clone: Workspace, two_releases: TwoReleases
) -> None:
    clone.ensure("git")
    found = find(clone, "main", base="v1.0.0")
    assert (found.pin.ref, found.pin.upstream) == ("refs/heads/main", None)
    assert found.pin.base == Base("v1.0.0", "1.0.0", two_releases.commits["1.0.0"])
    assert find(clone, "main").pin.base is None


def test_pin_of_a_fork_survives_the_file_and_leads_back_to_a_release(
    clone: Workspace, fork: Path
) -> None:
    clone.ensure("git")
    found = find(clone, f"file://{fork}@mine/feature").pin
    before = clone.layout.pins.read_bytes()
    pins.save(clone.layout.pins, found)
    assert pins.load(clone.layout.pins).vllm == found
    sh_git(clone.vllm, "fetch", "--quiet", str(fork), "mine/feature")
    clone.pin = found
    # A name without a URL is upstream's, also from the pin of a fork.
    back = find(clone, "v1.1.0").pin
    assert (back.tag, back.ref, back.upstream, back.base) == ("v1.1.0", None, None, None)
    assert back.archive is not None
    pins.save(clone.layout.pins, pins.parse(before).vllm)
    assert pins.load(clone.layout.pins) == pins.parse(before)


def test_fresh_clone_takes_the_pinned_commit_of_a_branch_that_moved_or_vanished(
    clone: Workspace, fork: Path, tmp_path: Path, index: Index, two_releases: TwoReleases
) -> None:
    clone.ensure("git")
    pin = find(clone, f"file://{fork}@mine/feature").pin
    commit(fork, "Three of mine", {"vllm/mine.py": "3\n"})
    with ladders.cloned(tmp_path / "other", two_releases, index) as fresh:
        fresh.pin = replace(pin, upstream=f"file://{two_releases.bare}")
        made = fresh.ensure("git")
        assert (made.head, made.kind) == (pin.commit, Kind.GIT)
        assert f"moved to {head(fork)[:12]}; the pinned commit is taken" in fresh.err.getvalue()
        assert head(fresh.vllm, "v1.0.0") == two_releases.commits["1.0.0"]
    sh_git(fork, "checkout", "--quiet", "--detach")
    sh_git(fork, "branch", "--quiet", "-D", "mine/feature")
    assert checkout.commit_now(clone.layout, pin, clone.settings()) is None
    with pytest.raises(SourceError, match="has no tag or branch mine/feature") as failure:
        find(clone, f"file://{fork}@mine/feature")
    assert f"git ls-remote --heads file://{fork}" in (failure.value.hint or "")


def test_base_that_the_fork_lacks_is_fetched_from_upstream_into_a_fresh_clone(
    clone: Workspace, fork: Path, tmp_path: Path, index: Index, two_releases: TwoReleases
) -> None:
    clone.ensure("git")
    pin = find(clone, f"file://{fork}@mine/feature", base="v1.1.0").pin
    with ladders.cloned(tmp_path / "other", two_releases, index) as fresh:
        fresh.pin = pin
        fresh.ensure("git")
        assert head(fresh.vllm, "v1.1.0") == two_releases.commits["1.1.0"]
        assert sh_git(fresh.vllm, "show", "v1.1.0:CMakeLists.txt")


def test_base_that_a_checkout_lacks_is_fetched_by_the_next_bootstrap(
    clone: Workspace, fork: Path, two_releases: TwoReleases
) -> None:
    clone.ensure("git")
    clone.pin = find(clone, f"file://{fork}@mine/feature", base="v1.1.0").pin
    # What the hint of a checkout behind its pin does: only the commit comes along.
    sh_git(clone.vllm, "fetch", "--quiet", f"file://{fork}", clone.pin.commit)
    sh_git(clone.vllm, "checkout", "--quiet", "--detach", "FETCH_HEAD")
    clone.ensure("git")
    assert head(clone.vllm, "v1.1.0") == two_releases.commits["1.1.0"]


def test_tag_and_branch_of_one_name_need_the_whole_name(clone: Workspace, fork: Path) -> None:
    clone.ensure("git")
    sh_git(fork, "tag", "mine/feature", "HEAD~1")
    url = f"file://{fork}"
    with pytest.raises(SourceError, match="has a tag and a branch mine/feature") as failure:
        find(clone, f"{url}@mine/feature")
    assert f"pin.forecast {url}@refs/heads/mine/feature " in (failure.value.hint or "")
    assert find(clone, f"{url}@refs/heads/mine/feature").base == head(fork)
    tag = find(clone, f"{url}@refs/tags/mine/feature").pin
    assert (tag.ref, tag.tag, tag.commit) == (
        "refs/tags/mine/feature",
        "mine/feature",
        head(fork, "HEAD~1"),
    )
    sh_git(fork, "tag", "--force", "mine/feature", "HEAD")
    assert find(clone, f"{url}@mine/feature").base == head(fork)


def test_commit_of_another_project_is_no_pin(clone: Workspace, tmp_path: Path) -> None:
    clone.ensure("git")
    other = tmp_path / "other-project"
    other.mkdir()
    sh_git(other, "init", "--quiet", "--initial-branch=main")
    write(other, {"README": "something else\n"})
    made = commit(other, "not vllm", {"src/x.py": "1\n"})
    for name in ("main", made):
        with pytest.raises(SourceError, match=f"{name} at .* is no commit of vllm"):
            find(clone, f"{other}@{name}")


def test_commit_of_a_fork_needs_all_digits_and_must_be_there(
    clone: Workspace, fork: Path, two_releases: TwoReleases
) -> None:
    clone.ensure("git")
    with pytest.raises(SourceError, match="has no tag or branch") as failure:
        find(clone, f"{fork}@{head(fork)[:12]}")
    assert (failure.value.hint or "").endswith("    a commit needs all of its 40 digits")
    with pytest.raises(SourceError):
        find(clone, f"{fork}@{'0123456789' * 4}")
    # Upstream's commit is here, but who gets the pin would look for it at the fork.
    lonely = fork.parent / "lonely"
    sh_git(fork.parent, "clone", "--quiet", "--depth=1", f"file://{fork}", str(lonely))
    with pytest.raises(SourceError):
        find(clone, f"file://{lonely}@{two_releases.commits['main']}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("https://me:secret@host.invalid/vllm.git@main", "with a user or password"),
        ("https://me:secret@host.invalid/vllm.git", "with a user or password"),
        ("ssh://me:secret@host.invalid/vllm.git@main", "with a user or password"),
        ("https://token@host.invalid/vllm.git@main", "with a user or password"),
        ("git@host.invalid:me/vllm.git", "is not the name"),
        ("https://host.invalid/vllm.git@", "is not the name"),
        ("--upload-pack=x@main", None),
        ("a b://@main", "is not an address"),
    ],
)
def test_address_that_is_none_or_holds_a_password_is_refused(
    text: str, problem: str | None
) -> None:
    if problem is None:
        # A folder of this name, and no option of git.
        assert (Wanted.read(text).url or "").startswith("/")
        return
    with pytest.raises(SettingsError, match=problem) as failure:
        Wanted.read(text)
    assert "secret" not in str(failure.value.message)


def test_remote_that_wants_a_password_ends_at_once(
    clone: Workspace, monkeypatch: pytest.MonkeyPatch, index: Index
) -> None:
    """The index answers 404 to git; the environment of git forbids a prompt on the terminal."""
    clone.ensure("git")
    with pytest.raises(SourceError, match="cannot be read"):
        find(clone, f"{index.address.removesuffix('/simple')}/vllm.git@main")
