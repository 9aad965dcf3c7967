"""Rung 2: the libraries of the precompiled wheels would load on a Spark, and serve its GPU.

Needs a package index, and apt with arm64 packages for the system's libraries; 1.4 GB, kept in the
user's cache. Nothing of aarch64 runs.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.proof.aarch64 import spark, symbols
from tests.proof.aarch64.symbols import Library
from workspace.compile import device_code
from workspace.repo import index

# A GB10.
CAPABILITY = "12.1"
DRIVER = "libcuda.so.1"
# Its symbols, such as cuMemMap; cudaMalloc and cublasCreate are of libraries in wheels.
OF_DRIVER = re.compile(r"cu[A-Z]")
# Packages whose libraries those of the CUDA wheel name, or take from torch's own dependencies.
BESIDE = ("torch", "nvidia-cuda-runtime", "nvidia-cuda-nvrtc", "nvidia-cublas")
# A release with kernels has at least as many libraries.
LEAST = {"cuda": 10, "cpu": 2}


def fetched(folder: Path) -> dict[str, list[Library]]:
    """Return the libraries of the precompiled wheels by device, and of the packages beside them."""
    settings = spark.own_settings()
    found = {
        device: index.fetch(wheel.project, wheel.filename, wheel.sha256, settings=settings)
        for device, wheel in spark.precompiled_wheels().items()
    }
    for package in spark.closure("cuda", python=spark.PYTHONS[0], folder=folder):
        if package.name in BESIDE:
            wheel = next(wheel for wheel in package.wheels if wheel.fits)
            found[package.name] = index.fetch(
                package.name, wheel.filename, wheel.sha256, settings=settings
            )
    return {name: list(symbols.in_wheel(wheel)) for name, wheel in found.items()}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Library]]:
    folder = tmp_path_factory.mktemp("static")
    system = list(symbols.of_system(folder / "system"))
    return {**fetched(folder), "system": system}


def beside(libraries: Mapping[str, list[Library]]) -> list[Library]:
    return [library for name in ("system", *BESIDE) for library in libraries[name]]


def test_cuda_libraries_lack_no_symbol_but_the_drivers(
    libraries: Mapping[str, list[Library]],
) -> None:
    others, waiting = beside(libraries), 0
    names = {other.name for other in others}
    for library in libraries["cuda"]:
        lacking = symbols.missing(library, others)
        of_driver = {name for name in lacking if OF_DRIVER.match(name)}
        assert lacking == of_driver, library.path
        assert bool(of_driver) <= (DRIVER in library.named), library.path
        assert library.named - names <= {DRIVER}, library.path
        waiting += bool(of_driver)
        print(f"{library.path}: {len(library.needs)} symbols, {len(of_driver)} of the driver")
    print(f"{len(libraries['cuda'])} libraries, {waiting} need the driver")
    assert len(libraries["cuda"]) >= LEAST["cuda"]


def test_cpu_libraries_lack_only_what_the_cpu_build_of_torch_brings(
    libraries: Mapping[str, list[Library]],
) -> None:
    # The index has torch's CUDA build alone; the CPU build of PyTorch's index brings OpenBLAS.
    others, lacking = beside(libraries), set[str]()
    for library in libraries["cpu"]:
        lacking |= symbols.missing(library, others)
        assert library.named <= {other.name for other in others}, library.path
        print(f"{library.path}: {len(library.needs)} symbols")
    assert lacking <= {"sbgemm_"}
    assert len(libraries["cpu"]) >= LEAST["cpu"]


def test_every_cuda_library_has_code_for_a_gb10_or_needs_none(
    libraries: Mapping[str, list[Library]],
) -> None:
    found = [library.code for library in libraries["cuda"]]
    judged = device_code.judge(found, capabilities=(CAPABILITY,), archs="")
    for verdict in judged:
        print(f"{verdict.state}: {verdict.library} {verdict.sentence}")
    assert not [verdict.library for verdict in judged if verdict.state == "wrong"]
    assert "vllm/_C_stable_libtorch.abi3.so" in {
        verdict.library for verdict in judged if verdict.state == "ok"
    }


def test_symbol_that_nothing_brings_is_missing(libraries: Mapping[str, list[Library]]) -> None:
    # Without torch a library of kernels cannot load: the reader finds what is not there.
    library = next(one for one in libraries["cpu"] if one.path == "vllm/_C.abi3.so")
    assert len(symbols.missing(library, libraries["system"])) > 100
    assert "numa_available" in symbols.missing(library, libraries["torch"])
