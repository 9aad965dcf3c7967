"""Caches as Triton, FlashInfer and torch compile write them; their notes and their times show which
stack wrote them.
"""

import json
import os
from pathlib import Path

import pytest

from workspace.core.errors import ToolchainError
from workspace.machine import jit_caches
from workspace.machine.jit_caches import Stack

OURS = Stack("tree", "2.13.0 CUDA 13.0", "3.7.1", "0.7.0", "12.1")
INSTALLED_AT = 1_700_000_000.0


def installed(house, name="torch", version="2.13.0") -> Path:
    """A package as uv leaves it: old files, a RECORD of now."""
    record = f"{name}-{version}.dist-info/RECORD"
    packages = house.package(name, version, {record: ""})
    os.utime(packages / record, (INSTALLED_AT, INSTALLED_AT))
    return packages


def kernel(place: Path, *, version="3.7.1", arch=121, name="probe") -> Path:
    path = place / f"KEY-{version}-{arch}" / f"{name}.json"
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps(
            {
                "triton_version": version,
                "target": {"backend": "cuda", "arch": arch, "warp_size": 32},
            }
        )
    )
    return path


def library(place: Path, include: Path, *, name="sampling") -> Path:
    path = place / "121a" / "cached_ops" / name / "build.ninja"
    path.parent.mkdir(parents=True)
    path.write_text(
        f"common_cflags = -isystem {include}/torch/include -isystem /usr/local/cuda/include\n"
    )
    return path


def home(house) -> Path:
    return house.layout.root.parent / "home"


def foreign(house, stack=OURS, **shell):
    shell.setdefault("TMPDIR", str(house.layout.root.parent))
    return jit_caches.foreign(house.machine(**shell), stack)


def test_kernels_of_another_triton_are_found_and_kernels_of_this_triton_are_not(
    house,
):
    kernel(home(house) / ".triton" / "cache")
    assert foreign(house) == ()
    kernel(home(house) / ".triton" / "cache", version="3.5.1")
    (found,) = foreign(house)
    assert (found.cache.kind, found.wrote) == (
        "triton",
        "written by triton 3.5.1, and 3.7.1 is installed",
    )


def test_kernels_for_another_gpu_are_foreign_only_where_a_gpu_is_known(house):
    kernel(home(house) / ".triton" / "cache", arch=90)
    assert "sm_90" in foreign(house)[0].wrote
    assert foreign(house, Stack("tree", "2.13.0", "3.7.1", "none", "none")) == ()


def test_commit_in_the_version_of_a_triton_from_source_does_not_count(house):
    kernel(home(house) / ".triton" / "cache", version="3.9.0")
    assert foreign(house, Stack("tree", "2.13.0", "3.9.0+git3f6e4113", "none", "12.1")) == ()


def test_library_of_another_torch_is_found_and_of_another_flashinfer_not(house, tmp_path):
    packages = installed(house)
    place = home(house) / ".cache" / "flashinfer"
    library(place / "0.6.0", tmp_path / "elsewhere")
    library(place / "0.7.0", packages, name="own")
    assert foreign(house) == ()
    library(place / "0.7.0", tmp_path / "elsewhere")
    assert foreign(house)[0].wrote == f"compiled against the torch in {tmp_path / 'elsewhere'}"


def test_file_older_than_torch_is_foreign_at_the_usual_places_only(house):
    packages = installed(house)
    graph = home(house) / ".cache" / "vllm" / "torch_compile_cache" / "ab12" / "graph.py"
    own = Path(
        jit_caches.variables(house.layout, house.settings(), OURS)["FLASHINFER_WORKSPACE_BASE"]
    )
    made = [
        graph,
        library(home(house) / ".cache" / "flashinfer" / "0.7.0", packages),
        library(own / ".cache" / "flashinfer" / "0.7.0", packages),
    ]
    graph.parent.mkdir(parents=True)
    graph.touch()
    for path in made:
        os.utime(path, (INSTALLED_AT - 60, INSTALLED_AT - 60))
    assert {(one.cache.kind, one.cache.is_own) for one in foreign(house)} == {
        ("vllm", False),
        ("flashinfer", False),
    }


def test_foreign_kernel_in_a_folder_of_this_stack_is_found_too(house):
    own = Path(jit_caches.variables(house.layout, house.settings(), OURS)["TRITON_CACHE_DIR"])
    kernel(own, version="3.5.1")
    (found,) = foreign(house)
    assert found.cache.is_own


def test_cache_is_renamed_with_its_date_and_never_over_another(house):
    place = home(house) / ".triton" / "cache"
    for _ in range(2):
        path = kernel(place, version="3.5.1")
        os.utime(path, (INSTALLED_AT, INSTALLED_AT))
        jit_caches.rename_foreign(foreign(house)[0])
    assert sorted(path.name for path in place.parent.iterdir()) == [
        "cache.of-20231114-221320",
        "cache.of-20231114-221320-2",
    ]
    assert foreign(house) == ()


def test_folder_that_the_user_sets_is_read_and_gets_no_key(house, tmp_path):
    house.layout.dotenv.write_text(f"TRITON_CACHE_DIR={tmp_path / 'own'}\n")
    kernel(tmp_path / "own", version="3.5.1")
    assert "TRITON_CACHE_DIR" not in jit_caches.variables(house.layout, house.settings(), OURS)
    assert "TRITON_CACHE_DIR" not in jit_caches.variables(
        house.layout, house.settings(TRITON_HOME=str(tmp_path)), OURS
    )
    assert foreign(house)[0].cache.place == tmp_path / "own"


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


def test_unreadable_caches_are_no_finding(house):
    place = home(house) / ".triton" / "cache" / "KEY"
    place.mkdir(parents=True)
    for number, text in enumerate(
        ["", "[]", '{"triton_version": 3}', "{", '{"triton_version": "3.5.1"}']
    ):
        (place / f"{number}.json").write_text(text)
    (place / "link.json").symlink_to("/nonexistent")
    os.mkfifo(place / "pipe.json")
    assert foreign(house) == ()


def test_cache_that_cannot_be_renamed_is_an_error_with_a_sentence(house):
    found = jit_caches.Foreign(
        jit_caches.Cache("triton", Path("/proc"), False),
        "",
        jit_caches._last_written(house.layout.root),
    )
    with pytest.raises(ToolchainError, match="/proc cannot be renamed"):
        jit_caches.rename_foreign(found)


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
