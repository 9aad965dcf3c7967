"""patches/*/series and the patches in any state: an order of mails that are there, or a sentence
that names the line.
"""

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz import places
from tests.fuzz.strategies import damaged, fuzz
from workspace.core.errors import PatchDrift, SettingsError
from workspace.repo import series

BASE = "db9527a46873454610df6dbedf79a36d6bf1a7f6"
NAMES = ("Take-the-kernels.patch", "b.patch", "1.patch")
ORIGINAL = f"# Patches on vLLM, applied from top to bottom.\n# base: {BASE}\n" + "".join(
    f"{name}\n" for name in NAMES
)
MAIL = f"""From {"0" * 40} Mon Sep 17 00:00:00 2001
From: Ada <ada@invalid>
Date: Thu, 1 Jan 2026 00:00:00 +0000
Subject: Take the kernels

Why.
---
 setup.py | 1 +

diff --git a/setup.py b/setup.py
index {"1" * 40}..{"2" * 40} 100644
--- a/setup.py
+++ b/setup.py
@@ -1,1 +1,2 @@
 line
+more
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "vllm"
    made.mkdir()
    for name in NAMES:
        (made / name).write_text(MAIL)
    return made


def read(folder: Path, content: bytes) -> series.Series | None:
    (folder / series.SERIES_FILE).write_bytes(content)
    try:
        return series.read_series(folder, pin=BASE)
    except (SettingsError, PatchDrift) as exc:
        assert exc.message.startswith("patches/vllm/")
        assert exc.hint
        assert len(exc.message) < 1000
        return None


@fuzz(fast=80, deep=10_000)
@given(damaged(ORIGINAL))
@example(ORIGINAL.encode())
@example(ORIGINAL.replace("b.patch", "a" * 5000 + ".patch").encode())
@example(ORIGINAL.replace("b.patch", "b.patch\u2028c.patch").encode())
@example(f"# a remark\x0c# base: {BASE}\n".encode())
@example(b"\xff\xfe")
def test_any_series_is_an_order_of_patches_that_are_there_or_is_refused(
    folder: Path, content: bytes
) -> None:
    found = read(folder, content)
    assert read(folder, content) == found
    if found is None:
        return
    assert found.base == BASE
    assert len(set(found.names)) == len(found.names)
    assert set(found.names) <= set(NAMES)
    lines = [line.split("#")[0].strip() for line in content.decode().split("\n")]
    assert [line for line in lines if line] == list(found.names), (
        "what an editor shows as a line is a line"
    )
    assert read(folder, _written(found)) == found


def _written(found: series.Series) -> bytes:
    return "\n".join((f"# base: {found.base}", *found.names, "")).encode()


@fuzz(fast=50, deep=5000)
@given(damaged(MAIL) | st.just((MAIL + MAIL).encode()))
def test_any_patch_is_one_mail_or_is_refused(folder: Path, content: bytes) -> None:
    (folder / "b.patch").write_bytes(content)
    found = read(folder, ORIGINAL.encode())
    if found is not None:
        assert content.startswith(b"From ")
        assert (
            len(re.findall(rb"^From [0-9a-f]{40} Mon Sep 17 00:00:00 2001$", content, re.MULTILINE))
            == 1
        )
    (folder / "b.patch").write_text(MAIL)


@pytest.mark.parametrize("name", [series.SERIES_FILE, "b.patch"])
@pytest.mark.parametrize("thing", places.NO_FILE)
def test_whatever_lies_in_the_place_of_a_file_of_the_series_is_a_sentence(
    folder: Path, name: str, thing: str
) -> None:
    (folder / series.SERIES_FILE).write_text(ORIGINAL)
    places.put(folder / name, thing)
    with places.ends_soon(), pytest.raises((SettingsError, PatchDrift)) as caught:
        series.read_series(folder, pin=BASE)
    assert caught.value.hint
