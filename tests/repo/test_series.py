"""Series files: the shipped files, and refused files."""

import re
from pathlib import Path

import pytest

from workspace.core.errors import PatchDrift
from workspace.repo import pins, series

ROOT = Path(__file__).resolve().parents[2]
BASE = "0123456789" * 4
MAIL = (
    b"From "
    + b"0" * 40
    + b" Mon Sep 17 00:00:00 2001\nFrom: a <a@b>\nSubject: x\n\nm\n\ndiff --git a/x b/x\n"
)
STATUS = re.compile(
    r"^Upstream-Status: (Pending|Submitted|Backport|Denied|Inappropriate|Inactive-Upstream)\b",
    re.MULTILINE,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "patches" / "vllm"
    made.mkdir(parents=True)
    (made / "a.patch").write_bytes(MAIL)
    return made


def written(folder: Path, text: str) -> series.Series:
    (folder / "series").write_text(text, encoding="utf-8")
    return series.read_series(folder, pin=BASE)


@pytest.mark.parametrize("project", ["vllm", "triton"])
def test_shipped_series_is_for_the_shipped_pin_and_each_patch_has_a_status(
    project: str,
) -> None:
    folder = ROOT / "patches" / project
    read = series.read_series(
        folder, pin=getattr(pins.load(ROOT / "vendor" / "pins.toml"), project).commit
    )
    assert {path.name for path in folder.glob("*.patch")} == set(read.names)
    for name in read.names:
        text = (folder / name).read_text(encoding="utf-8")
        assert STATUS.search(text.split("\ndiff --git ")[0])
        subject = re.search(r"^Subject: (.*)$", text, re.MULTILINE)
        assert subject
        assert re.sub(r"[^A-Za-z0-9._]+", "-", subject[1]).strip("-") == name.removesuffix(".patch")


def test_empty_series_is_a_series(folder: Path) -> None:
    assert written(folder, f"# Patches\n# base: {BASE}\n") == series.Series(BASE, ())


def test_comments_and_blank_lines_are_no_patches(folder: Path) -> None:
    assert written(folder, f"# base: {BASE}\n\n# b.patch\n a.patch  # why\n").names == ("a.patch",)


@pytest.mark.parametrize(
    ("text", "error", "complaint"),
    [
        ("a.patch\n", PatchDrift, "has 0 lines"),
        (f"# base: {BASE}\n# base: {BASE}\n", PatchDrift, "has 2 lines"),
        (f"# base: {BASE[:12]}\n", PatchDrift, "has 0 lines"),
        (f"# base: {'f' * 40}\n", PatchDrift, "not for the pin"),
        (
            f"# base: {BASE}\na.patch\na.patch\n",
            PatchDrift,
            "line 3: a.patch is listed a second time",
        ),
        (f"# base: {BASE}\nb.patch\n", PatchDrift, "b.patch does not exist"),
        (f"# base: {BASE}\n../vllm/a.patch\n", PatchDrift, "line 2"),
        (f"# base: {BASE}\n/etc/a.patch\n", PatchDrift, "line 2"),
        (f"# base: {BASE}\n--directory=x.patch\n", PatchDrift, "line 2"),
        (f"# base: {BASE}\nseries\n", PatchDrift, "line 2"),
        (f"# base: {BASE}\na.patch -p0\n", PatchDrift, "line 2"),
    ],
)
def test_invalid_series_is_refused_with_its_line(
    folder: Path, text: str, error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        written(folder, text)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"diff --git a/x b/x\n",
        MAIL + MAIL,
        MAIL.replace(b"diff --git", b"nothing"),
        b"\n" + MAIL,
    ],
)
def test_patch_that_is_no_single_mail_is_refused(folder: Path, content: bytes) -> None:
    (folder / "a.patch").write_bytes(content)
    with pytest.raises(PatchDrift, match=r"patches/vllm/a\.patch is not a mail"):
        written(folder, f"# base: {BASE}\na.patch\n")
