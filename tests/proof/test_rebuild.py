"""inv rebuild on the small upstream, the slow cases.

A change is reverted, a build damaged or failing, everything compiled, or packed as a wheel.
"""

from pathlib import Path

import pytest

from tests.install.test_rebuild import ANSWER, answer, edit, library, observed, patched, rebuild
from tests.small.world import World
from workspace.install import stamp

__all__ = ["patched"]


def test_change_taken_back_brings_the_precompiled_library_back(patched: World) -> None:
    precompiled = library(patched, "_C")
    rebuild(patched)
    assert library(patched, "_C") != precompiled
    patched.git("checkout", "--", str(ANSWER))
    rebuild(patched)
    assert library(patched, "_C") == precompiled
    assert observed(patched).kernels.state == "ok"


def test_error_of_the_compiler_is_shown_and_the_tree_stays_as_it_was(patched: World) -> None:
    before = library(patched, "_C")
    edit(patched, ANSWER, "43", "fortythree")
    ended = patched.run("rebuild")
    assert "fortythree" in ended.error(7) + ended.err
    assert library(patched, "_C") == before
    edit(patched, ANSWER, "fortythree", "43")
    rebuild(patched)
    assert answer(patched) == "43"


def test_native_compiles_everything_and_stays_until_another_kind_is_requested(
    built: World,
) -> None:
    precompiled = library(built, "spinloop")
    rebuild(built, "--kernels", "native", "--jobs", "2")
    assert library(built, "spinloop") != precompiled
    assert answer(built) == "42"
    assert "nothing to do" in rebuild(built)
    rebuild(built, "--kernels", "auto")
    assert library(built, "spinloop") == precompiled


def test_changed_cmake_file_reaches_only_what_it_changes(built: World) -> None:
    (built.layout.vllm / "csrc" / "more.c").write_text("int vllm_small_more(void) { return 1; }\n")
    edit(built, Path("CMakeLists.txt"), "csrc/spinloop.c", "csrc/spinloop.c csrc/more.c")
    precompiled = library(built, "_C")
    rebuild(built)
    recorded = stamp.read(built.layout.stamp("vllm"))
    assert recorded is not None
    assert recorded.outcome["compiled here"] == "spinloop"
    assert library(built, "_C") == precompiled


@pytest.mark.parametrize(
    "damage", ["ninja log", "cache", "build file", "api", "record", "everything"]
)
def test_damaged_build_directory_is_made_again(patched: World, damage: str) -> None:
    rebuild(patched)
    (build,) = [
        folder for folder in patched.layout.builds.iterdir() if (folder / "build.ninja").exists()
    ]
    files = {
        "ninja log": [build / ".ninja_log", build / ".ninja_deps"],
        "cache": [build / "CMakeCache.txt"],
        "build file": [build / "build.ninja"],
        "api": list((build / ".cmake").rglob("*.json")),
        "record": list(build.glob("*.json")),
        "everything": [file for file in build.rglob("*") if file.is_file()],
    }[damage]
    for file in files:
        file.write_bytes(b"\0garbage\n")
    edit(patched, ANSWER, "43", "45")
    rebuild(patched)
    assert answer(patched) == "45"


def test_wheel_of_a_patched_build_gives_its_kernels_to_the_same_sources_and_to_no_other(
    patched: World, tmp_path: Path
) -> None:
    rebuild(patched)
    compiled = library(patched, "_C")
    output = patched.run("wheel")
    assert output.code == 0, output.output
    wheel = patched.root / output.out.split()[1]
    patched.git("stash")
    rebuild(patched)
    assert library(patched, "_C") != compiled
    refused = patched.run("rebuild", "--kernels", str(wheel))
    assert "compiled from other sources" in refused.error(11)
    patched.git("stash", "pop")
    rebuild(patched, "--kernels", str(wheel))
    assert library(patched, "_C") == compiled
    assert observed(patched).kernels.state == "ok"
    edit(patched, ANSWER, "43", "44")
    assert observed(patched).kernels.state == "stale"
