"""Stamps are read back as they were written, and a damaged stamp proves nothing."""

import json
from pathlib import Path

import pytest

from workspace.core.files import differences
from workspace.install.stamp import Library, Stamp, read, write

WHOLE = Stamp(
    inputs={"origin": "precompiled x", "torch": "2.13.0+cpu CUDA none"},
    outcome={"version": "0.31.0+cpu"},
    packages={"numpy": "2.4.0"},
    libraries=(Library("vllm/_C.abi3.so", 15104, "a" * 64),),
    files={"metadata": {"setup.py": "100644 " + "b" * 40}},
)


def test_stamp_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "new" / "vllm.json", WHOLE)
    assert read(tmp_path / "new" / "vllm.json") == WHOLE


def test_missing_stamp_is_none(tmp_path: Path) -> None:
    assert read(tmp_path / "vllm.json") is None


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record | {"schema": 0},
        lambda record: record | {"inputs": None},
        lambda record: record | {"inputs": {"origin": 7}},
        lambda record: record | {"libraries": [{"path": "x"}]},
        lambda record: record | {"libraries": "none"},
        lambda record: record | {"files": []},
        lambda record: record | {"files": {"metadata": {"setup.py": None}}},
        lambda record: {name: value for name, value in record.items() if name != "packages"},
        lambda record: [record],
        lambda record: None,
    ],
)
def test_stamp_of_another_form_is_none(tmp_path: Path, change: object) -> None:
    path = tmp_path / "vllm.json"
    write(path, WHOLE)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))  # type: ignore[operator]
    assert read(path) is None


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_damaged_stamp_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "vllm.json"
    path.write_bytes(content)
    assert read(path) is None


def test_stamp_cut_at_any_byte_is_none(tmp_path: Path) -> None:
    path = tmp_path / "vllm.json"
    write(path, WHOLE)
    whole = path.read_bytes()
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        assert read(path) is None, length


@pytest.mark.parametrize(
    ("former", "today"),
    [
        ("donor x.whl abc", "precompiled x.whl abc"),
        ("hybrid donor x.whl abc", "hybrid precompiled x.whl abc"),
        ("native", "native"),
        ("wheel donor", "wheel donor"),
    ],
)
def test_origin_of_the_first_edition_is_read_as_todays(
    tmp_path: Path, former: str, today: str
) -> None:
    path = tmp_path / "vllm.json"
    write(path, Stamp(inputs={**WHOLE.inputs, "origin": former}))
    found = read(path)
    assert found is not None
    assert found.inputs["origin"] == today


def test_equal_inputs_have_no_differences() -> None:
    assert differences({"a": "1", "b": ""}, {"a": "1", "b": ""}) == ()


def test_differences_name_old_and_new_and_spare_digests() -> None:
    recorded = {"torch": "2.13.0", "requirements": "a" * 64, "arch": "", "gone": "x"}
    current = {
        "torch": "2.14.0",
        "requirements": "b" * 64,
        "arch": "12.1a",
        "new": "y",
        "sources": "c" * 64,
    }
    assert differences(recorded, current) == (
        "torch 2.13.0 → 2.14.0",
        "requirements changed",
        "arch none → 12.1a",
        "new nothing → y",
        "sources changed",
    )
