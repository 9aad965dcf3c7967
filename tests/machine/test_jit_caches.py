"""The folders in which a stack keeps its compiled kernels, and what a run has compiled."""

import json
import os
from pathlib import Path

import pytest

from workspace.machine import jit_caches
from workspace.machine.jit_caches import Stack

OURS = Stack("tree", "2.13.0 CUDA 13.0", "3.7.1", "0.7.0", "12.1")


def installed(house, name="torch", version="2.13.0") -> Path:
    return house.package(name, version, {f"{name}-{version}.dist-info/RECORD": ""})


def test_folder_that_the_user_sets_gets_no_key(house, tmp_path):
    house.layout.dotenv.write_text(f"TRITON_CACHE_DIR={tmp_path / 'own'}\n")
    assert "TRITON_CACHE_DIR" not in jit_caches.variables(house.layout, house.settings(), OURS)
    assert "TRITON_CACHE_DIR" not in jit_caches.variables(
        house.layout, house.settings(TRITON_HOME=str(tmp_path)), OURS
    )


@pytest.mark.parametrize(
    ("part", "is_shared"),
    [
        ("tree", True),
        ("triton", True),
        ("torch", False),
        ("flashinfer", False),
        ("architecture", False),
    ],
)
def test_every_part_of_a_stack_has_own_folders_and_a_commit_keeps_those_of_flashinfer(
    house, part, is_shared
):
    other = Stack(**{**OURS.__dict__, part: "another"})
    mine, theirs = (
        jit_caches.variables(house.layout, house.settings(), stack) for stack in (OURS, other)
    )
    assert (mine["FLASHINFER_WORKSPACE_BASE"] == theirs["FLASHINFER_WORKSPACE_BASE"]) is is_shared
    assert (mine["TRITON_CACHE_DIR"] == theirs["TRITON_CACHE_DIR"]) is (part == "flashinfer")


def test_driver_keeps_what_it_compiled_in_one_folder_of_the_clone_and_holds_the_most(house):
    mine, theirs = (
        jit_caches.variables(house.layout, house.settings(), stack)
        for stack in (OURS, Stack(**{**OURS.__dict__, "tree": "another", "torch": "another"}))
    )
    assert mine["CUDA_CACHE_PATH"] == str(house.layout.jit / "driver") == theirs["CUDA_CACHE_PATH"]
    assert mine["CUDA_CACHE_MAXSIZE"] == str(4 * 2**30)


def test_driver_cache_of_the_user_stays_and_a_cpu_build_has_none(house):
    own = jit_caches.variables(house.layout, house.settings(CUDA_CACHE_PATH="/mine"), OURS)
    assert "CUDA_CACHE_PATH" not in own
    without = Stack(**{**OURS.__dict__, "architecture": jit_caches.NONE})
    assert not [
        name
        for name in jit_caches.variables(house.layout, house.settings(), without)
        if name.startswith("CUDA_")
    ]


def test_what_a_run_has_compiled_is_named_by_its_compiler_and_older_kernels_are_not(tmp_path):
    start = 1_000_000_000.0
    files = {
        "triton/AB/_attention.json": start + 5,
        "triton/AB/__grp___attention.json": start + 5,
        "triton/OLD/_attention.json": start - 5,
        "flashinfer/.cache/flashinfer/0.7.0/121a/cached_ops/sampling/build.ninja": start + 5,
        "flashinfer/.cache/flashinfer/0.7.0/121a/cached_ops/old/build.ninja": start - 5,
        "driver/a/b/0123": start + 5,
        "driver/index": start + 5,
    }
    for name, written in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 1_500_000)
        os.utime(tmp_path / name, (written, written))
    environment = {
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "FLASHINFER_WORKSPACE_BASE": str(tmp_path / "flashinfer"),
        "CUDA_CACHE_PATH": str(tmp_path / "driver"),
    }
    found = jit_caches.written_since(environment, start)
    assert found == "Triton 1 kernel, FlashInfer sampling, the driver 1.5 MB"
    assert jit_caches.written_since(environment, start + 60) == ""
    assert jit_caches.written_since({}, start) == ""


def test_stack_has_the_versions_in_the_environment(house):
    packages = installed(house, "triton", "3.7.1")
    (packages / "torch").mkdir()
    installed_torch = packages / "torch-2.13.0.dist-info"
    installed_torch.mkdir()
    (installed_torch / "METADATA").touch()
    (packages / "torch" / "version.py").write_text(
        "__version__ = '2.13.0+cu130'\ncuda: str = '13.0'\n"
    )
    house.program("nvidia-smi", "echo 'NVIDIA GB10, 12.1, 580'")
    stack = jit_caches.observe(house.machine(), tree="abc")
    assert stack == Stack("abc", "2.13.0+cu130 CUDA 13.0", "3.7.1", "none", "12.1")
    jit_caches.record(house.layout, stack)
    assert (
        json.loads((house.layout.jit / stack.key / "stack.json").read_text())["triton"] == "3.7.1"
    )
