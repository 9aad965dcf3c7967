"""What lies between two releases, in a complete repository and in a partial clone."""

from pathlib import Path

import pytest

from tests.repo.conftest import commit, sh_git, write
from tests.repo.two_releases import TwoReleases
from workspace.core.errors import WorkspaceError
from workspace.repo.git import Git, history, worktree

OLD, NEW = "v1.0.0", "v1.1.0"


@pytest.fixture
def git(two_releases: TwoReleases) -> Git:
    return Git(two_releases.bare)


@pytest.fixture(scope="module")
def files(two_releases: TwoReleases) -> list[Path]:
    folder = two_releases.root / "patches"
    write(folder, two_releases.series)
    return [folder / name for name in two_releases.series]


def test_commits_that_touched_a_file_are_named_newest_first_under_any_configuration(
    git: Git, two_releases: TwoReleases
) -> None:
    paths = ["vllm/cherry.py", "vllm/new.py", "csrc/größe.cu"]
    found = history.touching(history.log(git, OLD, NEW, paths), paths)
    assert [line[13:] for line in found["vllm/cherry.py"]] == [
        "Once more (#8)",
        "[Misc] Upstream's cherry (#5)",
    ]
    assert found["vllm/new.py"] == ()
    assert found["csrc/größe.cu"] == (f"{two_releases.commits['1.1.0'][:12]} Release 1.1.0",)
    assert history.log(git, OLD, NEW, []) == ()


def test_path_is_no_pattern(git: Git) -> None:
    assert history.log(git, OLD, NEW, ["vllm/*.py", ":(glob)**"]) == ()


def test_renames_are_found_by_content_and_by_similarity(git: Git) -> None:
    differing = history.changed(git, OLD, NEW)
    gone = [path for path, (_, after) in differing.items() if after is None]
    found = history.renames(git, (OLD, NEW), gone, differing)
    assert found["vllm/mover.py"] == "vllm/moved.py"
    assert history.renames(git, (OLD, NEW), ["vllm/clean.py", "nowhere"], differing) == {}


def test_blobs_of_any_bytes_come_in_one_call(tmp_path: Path) -> None:
    sh_git(tmp_path, "init", "--quiet")
    contents = {"a": b"", "b": b"\n\n", "c": b"\x00\xff\r\n" * 99, "d": b"blob 3\n"}
    write(tmp_path, contents)
    commit(tmp_path, "bytes", {})
    git = Git(tmp_path)
    oids = {name: entry.split()[1] for name, entry in git.entries((), "HEAD").items()}
    found = history.blobs(git, [*oids.values(), "0" * 39 + "1", *oids.values()])
    assert {name: found[oid] for name, oid in oids.items() if name in contents} == contents
    assert history.blobs(git, []) == {}


def test_distance_name_and_date(git: Git, two_releases: TwoReleases) -> None:
    assert history.ahead(git, NEW, "main") == 1
    assert history.described(git, "main") is None
    assert history.described(git, NEW) == (NEW, 0)
    assert history.date_of(git, NEW).isoformat() == "2026-01-02T03:04:05+00:00"


def test_history_of_a_partial_clone_is_read_without_fetching(
    two_releases: TwoReleases, tmp_path: Path
) -> None:
    sh_git(
        tmp_path,
        "clone",
        "--quiet",
        "--bare",
        "--filter=blob:none",
        f"file://{two_releases.bare}",
        "part.git",
    )
    part = Git(tmp_path / "part.git")
    oids = [
        sh_git(two_releases.bare, "rev-parse", f"{NEW}:{path}")
        for path in ("README", "vllm/taken.py")
    ]
    assert history.touching(history.log(part, OLD, NEW, ["README"]), ["README"])["README"]
    with pytest.raises(WorkspaceError):
        history.blobs(part, oids)


def test_paths_are_returned_for_each_patch_from_one_call(git: Git, files: list[Path]) -> None:
    assert worktree.paths_of(git, files)[:3] == (
        frozenset({"vllm/clean.py"}),
        frozenset({"vllm/taken.py"}),
        frozenset({"vllm/conflict.py"}),
    )
    assert worktree.paths_of(git, []) == ()


def listing(repository: Path) -> dict[Path, tuple[int, int]]:
    """Return every file with inode and time.

    git gives an object that is written again a new time, to keep it from gc (git-prune(1)).
    """
    found = {path: path.lstat() for path in repository.rglob("*")}
    return {
        path: (status.st_ino, 0 if "objects" in path.parts else status.st_mtime_ns)
        for path, status in found.items()
    }


def test_trial_leaves_the_repository_as_it_is(
    git: Git, files: list[Path], two_releases: TwoReleases
) -> None:
    before = listing(two_releases.bare)
    with worktree.try_on(git, OLD) as tried:
        assert tried.apply(files)
        assert tried.tree() == sh_git(two_releases.work, "rev-parse", "local^{tree}")
        assert tried.holds(files[0])
        tried.take(NEW)
        assert not tried.apply(files[:3])
        assert tried.tree() == sh_git(two_releases.work, "rev-parse", f"{NEW}^{{tree}}")
    assert listing(two_releases.bare) == before
