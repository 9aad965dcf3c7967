"""Verification of the changed libraries alone: what it accepts, and what needs the whole."""

import sys
from pathlib import Path

import pytest

from tests.compile.test_device_code import FATBINS, library
from workspace.core import files, settings
from workspace.core.paths import Layout
from workspace.install import verify
from workspace.install.stamp import Library, Stamp
from workspace.machine.machine import Machine

KERNELS, OTHER = "vllm/_moe_C.abi3.so", "vllm/_C.abi3.so"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A clone with two libraries with code for a family of GPUs, and a torch without libraries."""
    made = Layout(tmp_path)
    for path in (KERNELS, OTHER):
        library(made.vllm / path, FATBINS / "sm_120f.fatbin")
    packages = made.environment / "lib" / "python3.11" / "site-packages"
    (packages / "torch").mkdir(parents=True)
    (packages / "torch" / "version.py").write_text("__version__ = '2.13.0'\ncuda = '13.0'\n")
    (packages / "torch-2.13.0.dist-info").mkdir()
    (packages / "torch-2.13.0.dist-info" / "METADATA").write_text("Name: torch\n")
    (made.environment / "bin").mkdir()
    made.environment_python.symlink_to(sys.executable)
    made.probes.parent.mkdir()
    made.probes.symlink_to(Path(verify.__file__).parents[1] / "probes")
    return made


def before(layout: Layout, platform: str = "cuda") -> verify.Before:
    found = (
        Library(path, (layout.vllm / path).stat().st_size, files.sha256(layout.vllm / path))
        for path in (KERNELS, OTHER)
    )
    outcome = {"version": "0.31.0+cu130", "platform": platform}
    return verify.before_install(layout, Stamp({}, outcome, libraries=tuple(found)))


def verified(layout: Layout, was: verify.Before) -> verify.Verdict | None:
    loaded = settings.load(layout, environ={"PATH": "/usr/bin:/bin"})
    return verify.verify_changed(Machine(layout, loaded), was)


def replaced(path: Path, section: Path | None) -> None:
    """Replace a library as an install does: by a new file."""
    new = library(path.with_name("new"), section)
    new.rename(path)


def test_library_with_the_same_code_and_symbols_is_loaded_alone(layout: Layout) -> None:
    was = before(layout)
    replaced(layout.vllm / KERNELS, FATBINS / "sm_120f.fatbin")
    verdict = verified(layout, was)
    assert verdict is not None
    assert verdict.changed == (KERNELS,)
    assert (verdict.version, verdict.platform) == ("0.31.0+cu130", "cuda")
    assert {found.path: found.sha256 for found in verdict.libraries} == {
        path: files.sha256(layout.vllm / path) for path in (KERNELS, OTHER)
    }


@pytest.mark.parametrize("section", ["sm_120", "multi", None])
def test_library_with_other_code_needs_the_whole(layout: Layout, section: str | None) -> None:
    was = before(layout)
    replaced(layout.vllm / KERNELS, FATBINS / f"{section}.fatbin" if section else None)
    assert verified(layout, was) is None


def test_new_missing_unreadable_or_unchanged_library_needs_the_whole(layout: Layout) -> None:
    assert verified(layout, before(layout)) is None, "nothing changed, so nothing would be proven"
    was = before(layout)
    replaced(layout.vllm / KERNELS, FATBINS / "sm_120f.fatbin")
    extra = library(layout.vllm / "vllm" / "_new_C.abi3.so", None)
    assert verified(layout, was) is None
    extra.unlink()
    assert verified(layout, was) is not None
    (layout.vllm / KERNELS).write_bytes(b"\x7fELF\x02\x01 and nothing more")
    assert verified(layout, was) is None
    (layout.vllm / KERNELS).unlink()
    assert verified(layout, was) is None


def test_build_that_was_verified_without_a_gpu_needs_the_whole(layout: Layout) -> None:
    was = before(layout, platform="")
    replaced(layout.vllm / KERNELS, FATBINS / "sm_120f.fatbin")
    assert verified(layout, was) is None


def test_cut_library_needs_the_whole(layout: Layout) -> None:
    was = before(layout)
    replaced(layout.vllm / KERNELS, FATBINS / "sm_120f.fatbin")
    content = (layout.vllm / KERNELS).read_bytes()
    (layout.vllm / KERNELS).write_bytes(content[:-100])
    assert verified(layout, was) is None
