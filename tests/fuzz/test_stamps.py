"""Stamps in any state: a damaged stamp counts as none, an intact one holds what was written."""

import contextlib
import json
import re
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz import places
from tests.fuzz.strategies import DEEP, args, damaged_document, fuzz
from workspace.core import files
from workspace.install import stamp
from workspace.install.precompiled import KernelSource

WHOLE = stamp.Stamp(
    inputs={
        "device": "cpu",
        "torch": "2.13.0+cpu CUDA none",
        "place": "/home/someone/vllm",
    },
    kernels=KernelSource("precompiled", "vllm.whl", "a" * 64),
    outcome={"version": "0.31.0+cpu", "tree": "b" * 40},
    packages={"torch": "2.13.0+cpu"},
    libraries=(
        stamp.Library("vllm/_C.abi3.so", 4096, "c" * 64),
        stamp.Library("vllm/vllm-rs", 8, "d" * 64),
    ),
)
DOCUMENT = {"schema": stamp.Stamp.SCHEMA, **asdict(WHOLE)}
# A stamp until 2026-11.
FORMER = {name: value for name, value in DOCUMENT.items() if name != "kernels"} | {
    "inputs": {**WHOLE.inputs, "origin": "hybrid donor vllm.whl " + "a" * 64}
}


def with_library(**parts: object) -> bytes:
    return json.dumps({**DOCUMENT, "libraries": [{**asdict(WHOLE.libraries[0]), **parts}]}).encode()


@fuzz(fast=80, deep=10_000)
@given(damaged_document(DOCUMENT) | damaged_document(FORMER))
@example(json.dumps(DOCUMENT).encode())
@example(with_library(size=float("inf")))
@example(with_library(size="4096"))
@example(with_library(size=True))
@example(with_library(path="a\0b"))
@example(with_library(path="\ud800"))
@example(with_library(path="../../etc/passwd"))
@example(with_library(path="/etc/passwd"))
@example(with_library(path="a" * 5000))
@example(with_library(sha256=None))
@example(json.dumps(FORMER).encode())
@example(json.dumps({**DOCUMENT, "kernels": {"kind": "wheel", "wheel": "\ud800"}}).encode())
@example(json.dumps({**DOCUMENT, "schema": True}).encode())
@example(json.dumps({**DOCUMENT, "libraries": {}}).encode())
@example(json.dumps({**DOCUMENT, "libraries": ""}).encode())
@example(json.dumps({**DOCUMENT, "inputs": {"device": "\ud800"}}).encode())
@example(DEEP[0].encode())
def test_any_stamp_is_of_its_form_or_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "vllm.json"
    path.write_bytes(content)
    found = stamp.read(path)
    assert stamp.read(path) == found
    if found is None:
        return
    for mapping in (found.inputs, found.outcome, found.packages):
        assert all(
            isinstance(text, str) and text.encode() is not None
            for pair in mapping.items()
            for text in pair
        )
    for library in found.libraries:
        assert type(library.size) is int
        assert library.size >= 0
        assert re.fullmatch("[0-9a-f]{64}", library.sha256)
        assert not PurePosixPath(library.path).is_absolute()
        assert ".." not in PurePosixPath(library.path).parts
        # Any length goes as far as the kernel, which refuses it as a sentence; a zero byte would
        # not get there.
        with contextlib.suppress(OSError):
            (tmp_path / library.path).stat()
    if found.kernels:
        assert found.kernels.text.encode()
    record = json.loads(content)
    record["inputs"].pop("origin", None)
    assert (dict(found.inputs), dict(found.outcome), dict(found.packages)) == (
        record["inputs"],
        record["outcome"],
        record["packages"],
    )
    stamp.write(path, found)
    assert stamp.read(path) == found


@fuzz(fast=40, deep=2000)
@given(st.integers(min_value=0), st.booleans())
def test_a_stamp_cut_anywhere_or_full_of_zeros_from_there_is_none(
    tmp_path: Path, place: int, is_zeroed: bool
) -> None:
    content = json.dumps(DOCUMENT, indent=1).encode()
    at = place % len(content)
    (tmp_path / "vllm.json").write_bytes(content[:at] + bytes(len(content) - at) * is_zeroed)
    assert stamp.read(tmp_path / "vllm.json") is None


@fuzz(fast=40, deep=2000)
@given(st.sampled_from(sorted(WHOLE.inputs)), args)
def test_changed_input_is_reported(name: str, text: str) -> None:
    changed = replace(WHOLE, inputs={**WHOLE.inputs, name: text})
    gone = {key: value for key, value in WHOLE.inputs.items() if key != name}
    assert bool(files.differences(changed.inputs, WHOLE.inputs)) == (text != WHOLE.inputs[name])
    assert len(files.differences(gone, WHOLE.inputs)) == 1


@pytest.mark.parametrize("thing", places.NO_FILE)
def test_whatever_lies_in_the_place_of_a_stamp_proves_nothing(tmp_path: Path, thing: str) -> None:
    places.put(tmp_path / "vllm.json", thing)
    with places.ends_soon():
        assert stamp.read(tmp_path / "vllm.json") is None
