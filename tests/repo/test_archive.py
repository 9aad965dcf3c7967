"""Release archives: the same commit for every user, and no member outside of the folder."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.repo.conftest import Upstream, add_member, sh_git
from workspace.core.console import Step
from workspace.core.errors import SourceError
from workspace.repo import pins

Fill = Callable[[tarfile.TarFile], None]


def packed(path: Path, fill: Fill) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        fill(tar)
    return path


def test_commit_holds_the_tracked_files_and_nothing_that_packing_made(
    upstream: Upstream, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    commit, tree = pins.build_archive(upstream.archive, made, upstream.pin)
    assert tree == sh_git(upstream.work, "rev-parse", "main^{tree}")
    assert sh_git(made, "rev-parse", "HEAD", "v1.0.0", "HEAD^{tree}").split() == [
        commit,
        commit,
        tree,
    ]
    assert sh_git(made, "status", "--porcelain", "--ignored") == ""
    assert (
        sh_git(made, "log", "--format=%an %ae %aI %cI")
        == "vLLM workspace workspace@invalid 2000-01-01T00:00:00+00:00 2000-01-01T00:00:00+00:00"
    )


class Shown(Step):
    """A step that keeps what its bar shows."""

    def progress(self, done: float, total: float | None, text: str = "") -> None:
        self.last += f"{text}: {'moves' if total is None else f'{done:g} of {total:g}'}\n"


def test_bar_does_not_stand_still_while_the_unpacked_files_are_committed(
    upstream: Upstream, tmp_path: Path
) -> None:
    step, name = Shown("upstream"), upstream.archive.name
    pins.build_archive(upstream.archive, tmp_path / "made", upstream.pin, step=step)
    *unpacked, committed = step.last.splitlines()
    assert all(line.startswith(f"unpacking {name}: ") for line in unpacked)
    assert unpacked
    assert committed == f"committing the files of {name}: moves"


def test_same_archive_gives_the_same_commit_whatever_umask_and_owner(
    upstream: Upstream, tmp_path: Path
) -> None:
    def refill(tar: tarfile.TarFile) -> None:
        with tarfile.open(upstream.archive) as old:
            for member in old:
                member.uid, member.gid, member.uname, member.mtime = 4711, 4711, "someone", 1
                member.mode |= 0o4066
                tar.addfile(member, old.extractfile(member) if member.isreg() else None)

    other = packed(tmp_path / upstream.archive.name, refill)
    before = os.umask(0o077)
    try:
        built = pins.build_archive(other, tmp_path / "made", upstream.pin)
    finally:
        os.umask(before)
    assert upstream.pin.archive
    assert built == (upstream.pin.archive.commit, upstream.pin.archive.tree)
    assert not (tmp_path / "made" / "run.sh").stat().st_mode & 0o4066


EVIL: dict[str, Fill] = {
    "absolute": lambda tar: add_member(tar, "/etc/evil", b"x"),
    "upwards": lambda tar: add_member(tar, "vllm-1.0.0/../../evil", b"x"),
    "git folder": lambda tar: add_member(tar, "vllm-1.0.0/.git/config", b"x"),
    "git folder in capitals": lambda tar: add_member(tar, "vllm-1.0.0/.GIT/config", b"x"),
    "beside its folder": lambda tar: add_member(tar, "evil", b"x"),
    "link upwards": lambda tar: add_member(
        tar, "vllm-1.0.0/l", type=tarfile.SYMTYPE, linkname="../../evil"
    ),
    "absolute link": lambda tar: add_member(
        tar, "vllm-1.0.0/l", type=tarfile.SYMTYPE, linkname="/etc"
    ),
    "link to the repository": lambda tar: add_member(
        tar, "vllm-1.0.0/l", type=tarfile.SYMTYPE, linkname=".git/hooks"
    ),
    "device": lambda tar: add_member(
        tar, "vllm-1.0.0/d", type=tarfile.CHRTYPE, devmajor=1, devminor=3
    ),
    "pipe": lambda tar: add_member(tar, "vllm-1.0.0/p", type=tarfile.FIFOTYPE),
    "twice": lambda tar: [
        add_member(tar, "vllm-1.0.0/a", b"a"),
        add_member(tar, "vllm-1.0.0/a", b"b"),
    ][0],
    "file and link": lambda tar: [
        add_member(tar, "vllm-1.0.0/a", b"a"),
        add_member(tar, "vllm-1.0.0/a", type=tarfile.SYMTYPE, linkname="b"),
    ][0],
    "links that add up": lambda tar: [
        add_member(tar, "vllm-1.0.0/d/x", type=tarfile.SYMTYPE, linkname="."),
        add_member(tar, "vllm-1.0.0/y", type=tarfile.SYMTYPE, linkname="d/x/../../.."),
    ][0],
}


@pytest.mark.parametrize("name", EVIL)
def test_archive_with_a_member_that_leads_elsewhere_is_refused(
    upstream: Upstream, tmp_path: Path, name: str
) -> None:
    def fill(tar: tarfile.TarFile) -> None:
        add_member(tar, "vllm-1.0.0/good", b"good")
        EVIL[name](tar)

    evil = packed(tmp_path / "vllm-1.0.0.tar.gz", fill)
    with pytest.raises(SourceError, match="the archive was not used"):
        pins.make_from_archive(evil, tmp_path / "vendor" / "vllm", upstream.pin)
    assert not (tmp_path / "evil").exists()
    assert [*(tmp_path / "vendor").iterdir()] == []


def test_file_is_never_written_through_a_link(upstream: Upstream, tmp_path: Path) -> None:
    def fill(tar: tarfile.TarFile) -> None:
        add_member(tar, "vllm-1.0.0/d", type=tarfile.SYMTYPE, linkname="../..")
        add_member(tar, "vllm-1.0.0/d/evil", b"x")

    with pytest.raises(SourceError):
        pins.make_from_archive(
            packed(tmp_path / "vllm-1.0.0.tar.gz", fill), tmp_path / "vendor" / "vllm", upstream.pin
        )
    assert not [*tmp_path.rglob("evil")]


def test_hard_link_is_a_copy(upstream: Upstream, tmp_path: Path) -> None:
    def fill(tar: tarfile.TarFile) -> None:
        add_member(tar, "vllm-1.0.0/a", b"content")
        add_member(tar, "vllm-1.0.0/b", type=tarfile.LNKTYPE, linkname="vllm-1.0.0/a")

    pins.build_archive(packed(tmp_path / "x.tar.gz", fill), tmp_path / "made", upstream.pin)
    assert (tmp_path / "made" / "b").read_bytes() == b"content"
    assert (tmp_path / "made" / "b").stat().st_nlink == 1


@pytest.mark.parametrize("keep", [0, 200])
def test_truncated_archive_is_reported_as_damaged(
    upstream: Upstream, tmp_path: Path, keep: int
) -> None:
    broken = tmp_path / "vllm-1.0.0.tar.gz"
    broken.write_bytes(upstream.archive.read_bytes()[:keep])
    with pytest.raises(SourceError, match="is damaged"):
        pins.make_from_archive(broken, tmp_path / "vendor" / "vllm", upstream.pin)
