"""Inputs of a build directory's key, and the other inputs of a configure, read from a clone and its
environment.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.compile.trees import Site, put
from workspace.compile import cmake_inputs
from workspace.compile.cmake_inputs import Inputs
from workspace.machine.machine import Machine
from workspace.machine.torch import TorchBuild
from workspace.repo.pins import Pin

PIN = Pin("vllm", "v0.31.0", "0.31.0", "d" * 40, "https://x.invalid/vllm", None, {})
TORCH = TorchBuild("2.13.0+cu130", "13.0")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site.make(tmp_path)
    packages = made.layout.environment / "lib" / "python3.12" / "site-packages"
    put(packages, {f"{name}.dist-info/METADATA": "" for name in ("cmake-3.31.10", "ninja-1.13.2")})
    put(
        made.root / "cuda",
        {"bin/nvcc": '#!/bin/sh\necho "Cuda compilation tools, release 13.0, V13.0.88"\n'},
    )
    put(made.root / "bin", {"g++": "#!/bin/sh\necho 13.3.0\n"})
    for program in (made.root / "cuda" / "bin" / "nvcc", made.root / "bin" / "g++"):
        program.chmod(0o755)
    made.shell |= {
        "CUDA_HOME": str(made.root / "cuda"),
        "TORCH_CUDA_ARCH_LIST": "12.1a",
        "PATH": f"{made.root / 'bin'}{os.pathsep}{made.shell['PATH']}",
    }
    return made


def observe(
    site: Site, device: cmake_inputs.Device = "cuda", torch: TorchBuild = TORCH, **more: str
) -> Inputs:
    machine = Machine(site.layout, site.settings(**more))
    return cmake_inputs.observe(machine, device=device, pin=PIN, torch=torch)


def test_key_changes_with_every_input_of_objects(site: Site) -> None:
    plain = observe(site)
    assert (
        plain.named.items()
        >= {
            "archs": "12.1a",
            "torch": "2.13.0+cu130",
            "cuda": "13.0",
            "compiler": "g++ 13.3.0",
            "build type": "RelWithDebInfo",
        }.items()
    )
    others = [
        observe(site, "cpu"),
        observe(site, TORCH_CUDA_ARCH_LIST="12.0"),
        observe(site, CMAKE_BUILD_TYPE="Debug"),
        observe(site, torch=TorchBuild("2.14.0+cu130", "13.0")),
        observe(site, NVCC_APPEND_FLAGS="-G"),
        observe(site, CPATH="/mine"),
    ]
    assert len({each.key for each in [plain, *others]}) == 7
    assert cmake_inputs.folder(site.layout, plain) == site.layout.builds / f"cuda-{plain.key}"


def test_inputs_of_configure_alone_are_not_in_the_key(site: Site) -> None:
    put(
        site.tree,
        {
            "cmake/x.cmake": (
                "if(DEFINED ENV{VLLM_KERNEL_SYMBOL_MAP})\nset(X $ENV{SOME_TOKEN} $ENV{HOME}"
                " $ENV{FLASHY_SRC_DIR})\nendif()\n"
            )
        },
    )
    plain = observe(site)
    for name, text in {
        "CMAKE_ARGS": "-DX=1",
        "NVCC_THREADS": "4",
        "VLLM_KERNEL_SYMBOL_MAP": "1",
        "CXXFLAGS": "-g",
    }.items():
        other = observe(site, **{name: text})
        assert other.key == plain.key
        before = plain.named.get(name, "nothing") or "none"
        assert other.differences(plain.named) == (f"{name} {before} → {text}",)
        assert plain.differences(other.named) == (
            f"{name} {text} → {plain.named.get(name) or 'none'}",
        )
    for name in ("SOME_TOKEN", "HOME", "FLASHY_SRC_DIR", "EDITOR"):
        assert observe(site, **{name: str(site.root)}) == plain


def test_cpu_build_has_no_input_of_cuda(site: Site) -> None:
    named = observe(site, "cpu", TorchBuild("2.13.0+cpu", None)).named
    assert (named["archs"], named["cuda"]) == ("", "")
    assert not named.keys() & {"CUDA_HOME", "NVCC_THREADS"}


def test_machine_without_compilers_is_observed(site: Site) -> None:
    named = observe(site, CUDA_HOME=str(site.root), CXX="no-such'compiler").named
    assert named["cuda"] == "none"
    assert named["compiler"].endswith(" none")


# Parts that a small toolkit lacks


def arguments(site: Site) -> dict[str, str]:
    with site.run_log() as run_log:
        machine = Machine(site.layout, site.settings())
        output = cmake_inputs.toolkit_arguments(machine, site.root / "build", run_log=run_log)
    return dict(argument.removeprefix("-D").split("=", 1) for argument in output)


def test_full_toolkit_needs_no_arguments(site: Site) -> None:
    put(
        site.root / "cuda",
        {"include/cublas_v2.h": "", "lib64/libnvrtc.so": "", "lib64/stubs/libcuda.so": ""},
    )
    assert arguments(site) == {}
    assert not (site.root / "build").exists()


def test_missing_parts_of_a_small_toolkit_come_from_torchs_wheels(site: Site) -> None:
    wheel = site.layout.environment / "lib" / "python3.12" / "site-packages" / "nvidia" / "cu13"
    put(
        wheel,
        {"include/cublas_v2.h": "", "lib/libnvrtc.so.13": "", "lib/libnvrtc-builtins.so.13.0": ""},
    )
    put(site.root / "cuda", {"lib64/stubs/libcuda.so": ""})
    assert arguments(site) == {
        "CMAKE_CXX_STANDARD_INCLUDE_DIRECTORIES": str(wheel / "include"),
        "CMAKE_CUDA_STANDARD_INCLUDE_DIRECTORIES": str(wheel / "include"),
        "CUDA_nvrtc_LIBRARY": str(wheel / "lib" / "libnvrtc.so.13"),
    }


def test_stub_of_the_drivers_library_is_made_once_if_there_is_no_driver(
    site: Site,
) -> None:
    renamed = (
        "#define cuMemFree cuMemFree_v2\nCUresult cuMemFree(int);\nCUresult cuMemAddressFree(int,"
        " long);\n"
    )
    put(
        site.root / "cuda",
        {
            "include/cublas_v2.h": "",
            "lib64/libnvrtc.so": "",
            "include/cuda.h": f"typedef int CUresult;\n{renamed}",
        },
    )
    has_driver = any(
        path
        for place in ("/usr/lib", "/usr/lib64", "/usr/local/lib")
        for path in Path(place).glob("**/libcuda.so")
    )
    stub = site.root / "build" / "stub" / "libcuda.so"
    assert arguments(site) == ({} if has_driver else {"CUDA_cuda_driver_LIBRARY": str(stub)})
    if not has_driver:
        # A library linked against the stub needs the driver's own name when it is loaded, even with
        # a linker that keeps only what is used.
        made = site.root / "made.so"
        source = (
            "int cuMemAddressFree(int, long); int cuMemFree_v2(int); int f(void) { return"
            " cuMemAddressFree(0, 0) + cuMemFree_v2(0); }"
        )
        argv = [
            "cc",
            "-shared",
            "-fPIC",
            "-x",
            "c",
            "-",
            "-o",
            str(made),
            "-Wl,-z,defs",
            "-Wl,--as-needed",
            f"-L{stub.parent}",
            "-lcuda",
        ]
        subprocess.run(argv, input=source, text=True, check=True)
        assert b"libcuda.so.1\0" in made.read_bytes()
        before = stub.stat().st_mtime_ns
        arguments(site)
        assert stub.stat().st_mtime_ns == before
