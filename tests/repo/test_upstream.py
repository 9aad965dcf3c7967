"""Another release, tag, branch or commit, found in git and in release archives, and proven."""

import datetime
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.repo import two_releases as ladders
from tests.repo.shell import sh_git, write
from tests.repo.two_releases import Index, TwoReleases
from tests.repo.workspaces import Workspace
from workspace.core.console import Step
from workspace.core.errors import SourceError
from workspace.core.files import sha256
from workspace.repo import pins, upstream
from workspace.repo.checkout import Kind
from workspace.repo.pins import Wanted
from workspace.repo.upstream import Candidate


@pytest.fixture
def clone(tmp_path: Path, two_releases: TwoReleases, index: Index) -> Iterator[Workspace]:
    with ladders.cloned(tmp_path, two_releases, index) as opened:
        yield opened


@pytest.fixture
def mirror(tmp_path: Path, two_releases: TwoReleases) -> Path:
    """Return a copy of the upstream that a test may change."""
    sh_git(tmp_path, "clone", "--quiet", "--bare", str(two_releases.bare), "mirror.git")
    return tmp_path / "mirror.git"


def find(clone: Workspace, ref: str = "v1.1.0", base: str = "", **more: str) -> Candidate:
    return upstream.find(
        clone.layout,
        clone.pin,
        Wanted.read(ref, base),
        clone.settings(**more),
        clone.observe(),
        run_log=clone.run_log,
        step=Step("upstream"),
    )


def test_git_gives_the_whole_new_pin(clone: Workspace, two_releases: TwoReleases) -> None:
    clone.ensure("git")
    found = find(clone)
    assert (found.pin.tag, found.pin.version, found.pin.commit, found.base) == (
        "v1.1.0",
        "1.1.0",
        two_releases.commits["1.1.0"],
        two_releases.commits["1.1.0"],
    )
    assert (found.kind, found.prefix, found.lacking) == (Kind.GIT, None, ())
    assert found.published == datetime.datetime(2026, 2, 3, 4, 5, 6, tzinfo=datetime.UTC)
    assert set(found.pin.precompiled) == {"cuda-x86_64", "cuda-aarch64"}
    assert set(found.not_precompiled) == {"cpu-x86_64", "cpu-aarch64"}
    assert found.pin.archive
    assert found.pin.archive.sha256 == sha256(two_releases.sdists["1.1.0"])


def test_archive_in_the_pin_is_what_a_checkout_from_it_will_be(
    clone: Workspace, two_releases: TwoReleases, tmp_path: Path
) -> None:
    clone.ensure("git")
    found = find(clone)
    pins.make_from_archive(two_releases.sdists["1.1.0"], tmp_path / "tree", found.pin)
    assert found.pin.archive
    assert sh_git(tmp_path / "tree", "rev-parse", "HEAD") == found.pin.archive.commit


def test_archive_has_the_remotes_commit_where_it_can_be_reached(
    clone: Workspace, two_releases: TwoReleases
) -> None:
    clone.ensure("release")
    found = find(clone)
    assert found.pin.archive
    assert (found.pin.commit, found.base, found.prefix) == (
        two_releases.commits["1.1.0"],
        found.pin.archive.commit,
        None,
    )
    assert found.kind is Kind.RELEASE


def test_archive_alone_proves_no_commit_and_this_is_reported(
    clone: Workspace, two_releases: TwoReleases
) -> None:
    clone.ensure("release")
    found = find(clone, VLLM_MIRROR="file:///nowhere")
    assert found.pin.archive
    assert found.pin.commit == found.pin.archive.commit == found.base
    assert found.prefix == two_releases.commits["1.1.0"][:9]
    assert any(
        "is not proven" in sentence and found.prefix in sentence for sentence in found.lacking
    )


@pytest.mark.parametrize("kind", ["git", "release"])
def test_tag_that_is_not_what_the_archive_was_made_from_is_refused(
    clone: Workspace, mirror: Path, kind: str
) -> None:
    clone.ensure(kind)  # type: ignore[arg-type]
    sh_git(mirror, "tag", "--force", "v1.1.0", "main")
    with pytest.raises(
        SourceError,
        match=(
            r"tag v1\.1\.0 .* is commit [0-9a-f]{40}, but the release archive was made from"
            r" [0-9a-f]{9}…"
        ),
    ):
        find(clone, VLLM_MIRROR=f"file://{mirror}")


@pytest.mark.parametrize("kind", ["git", "release"])
def test_both_bases_are_in_the_store_with_all_that_is_read(
    clone: Workspace, two_releases: TwoReleases, kind: str
) -> None:
    old = clone.ensure(kind).base  # type: ignore[arg-type]
    found = find(clone)
    offline = {"GIT_ALLOW_PROTOCOL": "none"}
    for revision in (old, found.base):
        assert sh_git(found.store, "cat-file", "-t", f"{revision}:vllm", env=offline) == "tree"
        assert sh_git(found.store, "show", f"{revision}:requirements/common.txt", env=offline)
        assert sh_git(found.store, "show", f"{revision}:vllm/conflict.py", env=offline)
    assert sh_git(found.store, "rev-parse", "v1.0.0^{commit}", "v1.1.0^{commit}").split() == [
        old,
        found.base,
    ]


@pytest.mark.parametrize("kind", ["git", "release"])
def test_nothing_but_the_store_and_the_cache_is_written(
    clone: Workspace, kind: str, tmp_path: Path
) -> None:
    clone.ensure(kind)  # type: ignore[arg-type]

    def taken() -> dict[str, tuple[int, int]]:
        return {
            str(path): (path.lstat().st_mtime_ns, path.lstat().st_ino)
            for path in clone.layout.root.rglob("*")
            if ".workspace" not in path.parts
        }

    before = taken()
    find(clone)
    assert taken() == before
    assert [*clone.layout.upstream("vllm").parent.glob(".*making*")] == []


def test_branch_is_followed_from_git_and_has_no_release(
    clone: Workspace, two_releases: TwoReleases
) -> None:
    clone.ensure("git")
    found = find(clone, "main")
    assert (found.pin.tag, found.pin.commit, found.pin.archive) == (
        "main",
        two_releases.commits["main"],
        None,
    )
    # No tag is on main: each release has a branch of its own.
    assert found.pin.version == "1.0.0.post0.dev0"
    assert dict(found.pin.precompiled) == {}
    assert "no release is an ancestor of main" in found.not_precompiled["cpu-x86_64"]


def test_commit_is_found_by_all_its_digits_and_the_version_counts_from_a_tag(
    clone: Workspace, two_releases: TwoReleases
) -> None:
    clone.ensure("git")
    assert find(clone, two_releases.commits["main"]).base == two_releases.commits["main"]
    with pytest.raises(SourceError, match="has no tag or branch") as failure:
        find(clone, "deadbeef12")
    assert (failure.value.hint or "").endswith("    a commit needs all of its 40 digits")


def test_release_checkout_can_move_to_a_branch_where_the_remote_can_be_reached(
    clone: Workspace, two_releases: TwoReleases
) -> None:
    clone.ensure("release")
    found = find(clone, "main")
    assert (found.kind, found.base, found.pin.ref) == (
        Kind.GIT,
        two_releases.commits["main"],
        "refs/heads/main",
    )
    with pytest.raises(SourceError, match="cannot be read"):
        find(clone, "main", VLLM_MIRROR="file:///nowhere")


@pytest.mark.parametrize("kind", ["git", "release"])
def test_unknown_tag_names_the_nearest(clone: Workspace, kind: str) -> None:
    clone.ensure(kind)  # type: ignore[arg-type]
    with pytest.raises(SourceError, match=r"nearest.* v?1\.0\.0, v?1\.1\.0"):
        find(clone, "v1.0.9")


def test_git_without_an_index_still_has_the_commit(
    clone: Workspace, two_releases: TwoReleases
) -> None:
    clone.ensure("git")
    found = find(clone, UV_DEFAULT_INDEX="http://127.0.0.1:1/simple")
    assert (found.pin.commit, found.pin.archive, dict(found.pin.precompiled)) == (
        two_releases.commits["1.1.0"],
        None,
        {},
    )
    assert any("precompiled wheels are unknown" in sentence for sentence in found.lacking)


def test_unreachable_remote_stops_only_what_is_missing(clone: Workspace) -> None:
    clone.ensure("git")
    with pytest.raises(SourceError):
        find(clone, VLLM_MIRROR="file:///nowhere")
    first = find(clone)
    again = find(clone, VLLM_MIRROR="file:///nowhere")
    assert again.pin == first.pin
    assert any("of the checkout" in sentence for sentence in again.lacking)


def test_server_that_refuses_filters_and_single_objects_gives_all(
    clone: Workspace, mirror: Path, tmp_path: Path
) -> None:
    clone.ensure("git")
    sh_git(mirror, "config", "uploadpack.allowFilter", "false")
    sh_git(tmp_path, "config", "--file", "gitconfig", "protocol.version", "0")
    found = find(
        clone, VLLM_MIRROR=f"file://{mirror}", GIT_CONFIG_GLOBAL=str(tmp_path / "gitconfig")
    )
    assert "?" not in sh_git(
        found.store,
        "rev-list",
        "--objects",
        "--missing=print",
        "--no-walk",
        f"{found.base}^{{tree}}",
    )


def test_server_that_filters_but_refuses_single_objects_gives_all(
    clone: Workspace, tmp_path: Path
) -> None:
    clone.ensure("git")
    sh_git(tmp_path, "config", "--file", "gitconfig", "protocol.version", "0")
    found = find(clone, GIT_CONFIG_GLOBAL=str(tmp_path / "gitconfig"))
    assert "?" not in sh_git(
        found.store,
        "rev-list",
        "--objects",
        "--missing=print",
        "--no-walk",
        f"{found.base}^{{tree}}",
    )


def test_incomplete_store_or_store_of_another_clone_is_repaired(clone: Workspace) -> None:
    clone.ensure("git")
    place = clone.layout.upstream("vllm")
    write(place, {"objects/info/alternates": "/nowhere/objects\n", "config": ""})
    first = find(clone)
    shutil.move(clone.layout.root, clone.layout.root.with_name("moved"))
    moved = replace(clone.layout, root=clone.layout.root.with_name("moved"))
    clone.layout = moved
    assert find(clone).pin == first.pin


def test_damaged_archive_has_a_message(clone: Workspace, index: Index, tmp_path: Path) -> None:
    clone.ensure("release")
    write(tmp_path, {"broken.tar.gz": b"\x1f\x8b\x08\x00broken"})
    for row in index.rows["vllm"]:
        if row["filename"] == "vllm-1.1.0.tar.gz":
            row["hashes"] = {"sha256": sha256(tmp_path / "broken.tar.gz")}
    index.paths["vllm-1.1.0.tar.gz"] = tmp_path / "broken.tar.gz"
    with pytest.raises(SourceError, match="is damaged"):
        find(clone)
