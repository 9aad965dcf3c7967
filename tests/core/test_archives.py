"""Archives and wheels of others: no member leaves its folder, whatever its name, kind and mode."""

import io
import os
import stat
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.strategies import fuzz
from workspace.core.console import Step
from workspace.core.errors import WorkspaceError
from workspace.install import verify
from workspace.repo import pins

PARTS = ("a", "vllm", "..", ".", "", "b.so", ".git", ".GIT", ".git ", ".g\u200cit", "git~1", "x\0y")
KINDS = (
    tarfile.REGTYPE,
    tarfile.DIRTYPE,
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
)
names = st.builds(
    lambda begin, parts: begin + "/".join(parts),
    st.sampled_from(("", "/", "//", "vllm/", "vllm/../", "C:\\", "vllm\\..\\")),
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=4),
)
members = st.tuples(names, st.sampled_from(KINDS), names, st.sampled_from((0o644, 0o6755, 0o777)))
archives = st.lists(members, min_size=1, max_size=5)
Member = tuple[str, bytes, str, int]


def as_tar(path: Path, found: list[Member]) -> Path:
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, target, mode in found:
            item = tarfile.TarInfo(name)
            item.type, item.linkname, item.mode, item.devmajor, item.devminor = (
                kind,
                target,
                mode,
                1,
                3,
            )
            item.size = 1 if kind == tarfile.REGTYPE else 0
            # Only this header keeps a name with a zero byte.
            item.pax_headers = {"path": name, "linkpath": target}
            tar.addfile(item, io.BytesIO(b"x"))
    return path


def as_zip(path: Path, found: list[Member]) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for name, kind, target, mode in found:
            item = zipfile.ZipInfo(name)
            item.filename = name
            form = {tarfile.SYMTYPE: stat.S_IFLNK, tarfile.CHRTYPE: stat.S_IFCHR}.get(kind, 0)
            item.external_attr = (form | mode) << 16
            archive.writestr(item, target)
    return path


def release(folder: Path, found: list[Member]) -> Path:
    pin = pins.Pin("vllm", "v1", "1", "0" * 40, "https://invalid/x.git", None, {})
    in_folder = [(f"vllm-1/{name}", kind, target, mode) for name, kind, target, mode in found]
    pins._unpack(
        as_tar(folder / "a.tar.gz", in_folder),
        _made(folder / "tree"),
        pin,
        Step("source"),
    )
    return folder / "tree"


def wheel(folder: Path, found: list[Member]) -> Path:
    tree = _made(folder / "tree")
    # A link of the tree itself, such as a patch may add.
    (tree / "vllm").mkdir()
    (tree / "vllm" / "a").symlink_to(folder)
    named = [(f"{name}.so", kind, target, mode) for name, kind, target, mode in found]
    verify.complete(as_zip(folder / "w.whl", named), tree)
    return tree


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


WAYS: dict[str, Callable[[Path, list[Member]], Path]] = {
    "release archive": release,
    "wheel": wheel,
}


def outside(root: Path) -> set[str]:
    return {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if "tree" not in path.relative_to(root).parts[:1]
        and path.suffix not in (".gz", ".zip", ".whl")
    }


@pytest.mark.parametrize("way", WAYS)
@fuzz(fast=150, deep=10_000)
@given(found=archives)
@example(found=[("vllm/_C.abi3", tarfile.REGTYPE, "", 0o644), ("vllm/../../../O", b"0", "", 0o644)])
@example(found=[("a", tarfile.SYMTYPE, "..", 0o777), ("a/b.so", tarfile.REGTYPE, "", 0o644)])
@example(found=[("a", tarfile.CHRTYPE, "", 0o777)])
@example(found=[("vllm/a/b", tarfile.REGTYPE, "", 0o644)])
@example(found=[("a", tarfile.REGTYPE, "", 0o644), ("a/b.so", tarfile.REGTYPE, "", 0o644)])
def test_archive_stays_in_its_folder_or_is_refused(way: str, found: list[Member]) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "deep" / "er"
        root.mkdir(parents=True)
        try:
            made = WAYS[way](root, found)
        except WorkspaceError as exc:
            assert exc.hint
            made = root / "tree"
        assert outside(root) == set()
        assert sorted(os.listdir(name)) == ["deep"]
        assert sorted(os.listdir(root.parent)) == ["er"]
        for path in made.rglob("*"):
            mode = path.lstat().st_mode
            assert stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)
            assert stat.S_ISLNK(mode) or not mode & 0o7000
            is_trees_own = way == "wheel" and path == made / "vllm" / "a"
            assert is_trees_own or path.resolve().is_relative_to(made.resolve())
            assert not is_git(path.name)


def is_git(name: str) -> bool:
    return name.replace("\u200c", "").casefold().strip() in (".git", "git~1")
