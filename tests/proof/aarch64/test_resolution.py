"""Rung 1: every list that a Spark installs has wheels for it, and the precompiled wheels are there:
for the pin, and for the release to which a bump would move it.

Needs vendor/vllm and a package index; downloads metadata, and once the archive of that release
(43 MB); installs nothing. TARGET=0.33.0 names another release.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.proof.aarch64 import spark
from tests.proof.aarch64.spark import Package, Unresolvable
from workspace.repo import index
from workspace.repo.index import Release

# Fewer packages than this are not the whole list. Measured with vLLM 0.31.0: 73, 206 and 169.
LEAST = {"cuda": 150, "cpu": 120}


@pytest.fixture(autouse=True)
def _tree() -> None:
    if not (spark.LAYOUT.vllm / "pyproject.toml").is_file():
        pytest.fail("vendor/vllm is empty; ./scripts/inv bootstrap fills it", pytrace=False)


def without_wheel(packages: tuple[Package, ...]) -> Iterator[str]:
    """Yield the packages of which no wheel fits a Spark."""
    for package in packages:
        if not any(wheel.fits for wheel in package.wheels):
            yield f"{package.name} {package.version}"


def locked() -> dict[str, set[str]]:
    """Return the hashes that the lock of the tools has for each package."""
    blocks = re.split(r"^(?=\w)", spark.LOCK.read_text(), flags=re.MULTILINE)
    return {
        block.partition("==")[0]: set(re.findall(r"--hash=sha256:([0-9a-f]{64})", block))
        for block in blocks
        if "==" in block
    }


@pytest.mark.parametrize("python", spark.PYTHONS)
def test_lock_of_the_tools_has_a_wheel_with_a_locked_hash(python: str, tmp_path: Path) -> None:
    packages = spark.resolve(spark.LOCK.read_text(), python=python, folder=tmp_path)
    hashes = locked()
    unlocked = [
        f"{package.name} {package.version}"
        for package in packages
        if not any(wheel.fits and wheel.sha256 in hashes[package.name] for wheel in package.wheels)
    ]
    print(f"tools, Python {python}: {len(packages)} packages")
    assert not unlocked, "the lock has no hash of a wheel for a Spark"
    assert {"uv", "invoke", "nox", "msgspec"} <= {package.name for package in packages}


@pytest.mark.parametrize("python", spark.PYTHONS)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_closure_of_the_pinned_tree_has_wheels_only(
    device: str, python: str, tmp_path: Path
) -> None:
    packages = spark.closure(device, python=python, folder=tmp_path)
    print(f"{device}, Python {python}: {len(packages)} packages")
    assert len(packages) >= LEAST[device]
    assert not list(without_wheel(packages))
    assert "torch" in {package.name for package in packages}


def test_precompiled_wheels_are_on_the_index_with_the_pinned_hash() -> None:
    wheels = spark.precompiled_wheels()
    assert set(wheels) == {"cuda", "cpu"}
    for wheel in wheels.values():
        page = index.project_page(wheel.project, spark.own_settings())
        digests = {package.filename: package.digests for package in page.packages}
        assert digests[wheel.filename]["sha256"] == wheel.sha256
        assert spark.MACHINE in wheel.filename


@pytest.fixture(scope="module")
def target() -> Release:
    return spark.target_of_bump()


@pytest.fixture(scope="module")
def next_tree(target: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spark.unpack_requirements(target, tmp_path_factory.mktemp("target"))


@pytest.mark.parametrize("python", spark.PYTHONS)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_closure_of_the_target_of_a_bump_has_wheels_only(
    device: str, python: str, target: Release, next_tree: Path, tmp_path: Path
) -> None:
    packages = spark.closure(device, python=python, folder=tmp_path, tree=next_tree)
    print(f"vLLM {target.version}, {device}, Python {python}: {len(packages)} packages")
    assert len(packages) >= LEAST[device]
    assert not list(without_wheel(packages))


def test_target_of_a_bump_has_both_precompiled_wheels(target: Release) -> None:
    for device in ("cuda", "cpu"):
        key = f"{device}-{spark.MACHINE}"
        assert key in target.precompiled, target.not_precompiled[key]
        wheel = target.precompiled[key]
        print(f"vLLM {target.version}, {device}: {wheel.filename} {wheel.sha256}")
        assert spark.MACHINE in wheel.filename


def test_package_that_has_no_wheel_for_arm_is_named(tmp_path: Path) -> None:
    # The CPU list of x86-64 has it; its wheels are for that architecture alone.
    with pytest.raises(Unresolvable, match=r"intel-openmp==2024\.2\.1 has no wheels"):
        spark.resolve("intel-openmp==2024.2.1\n", python="3.12", folder=tmp_path)


def test_wheel_of_another_architecture_does_not_fit() -> None:
    names = ("a-1-py3-none-any.whl", "a-1-cp312-cp312-manylinux_2_28_aarch64.whl")
    assert all(spark.Wheel(name, "", 0).fits for name in names)
    assert not spark.Wheel("a-1-cp38-abi3-manylinux_2_28_x86_64.whl", "", 0).fits
