"""Files of a real `cmake --install` in a real tree: complete files, no file of the user's
overwritten, and completed after a kill.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.small.materials import ROOT, git
from workspace.compile.project import Target, install_targets
from workspace.core.console import Console, RunLog
from workspace.core.errors import BuildError, ToolchainError
from workspace.core.paths import Layout
from workspace.core.settings import load

ENV = {"PATH": "/usr/bin:/bin"}
# Components as in vLLM's CMake: plain ones, the nested prefix and the link of flash-attention, one
# without files.
PROJECT = """
cmake_minimum_required(VERSION 3.20)
project(small LANGUAGES NONE)
install(CODE "set(CMAKE_INSTALL_LOCAL_ONLY TRUE)" ALL_COMPONENTS)
foreach(T _C spinloop)
  install(FILES ${CMAKE_BINARY_DIR}/${T}.abi3.so DESTINATION vllm COMPONENT ${T})
endforeach()
install(CODE "set(OLD \\"\\${CMAKE_INSTALL_PREFIX}\\")" ALL_COMPONENTS)
install(CODE "set(CMAKE_INSTALL_PREFIX \\"\\${CMAKE_INSTALL_PREFIX}/vllm/\\")" ALL_COMPONENTS)
install(FILES ${CMAKE_BINARY_DIR}/_vllm_fa2_C.abi3.so
  DESTINATION vllm_flash_attn COMPONENT _vllm_fa2_C)
install(CODE "set(CMAKE_INSTALL_PREFIX \\"\\${OLD}\\")" ALL_COMPONENTS)
foreach(T _vllm_fa2_C _vllm_fa3_C)
  install(DIRECTORY ${CMAKE_BINARY_DIR}/fa/ DESTINATION vllm/vllm_flash_attn COMPONENT ${T}
    FILES_MATCHING PATTERN "*.py")
endforeach()
install(CODE "
    set(LINK_NAME \\"\\${CMAKE_INSTALL_PREFIX}/vllm/vllm_flash_attn/cute\\")
    file(MAKE_DIRECTORY \\"\\${CMAKE_INSTALL_PREFIX}/vllm/vllm_flash_attn\\")
    file(REMOVE_RECURSE \\"\\${LINK_NAME}\\")
    file(CREATE_LINK \\"${CMAKE_BINARY_DIR}/cache/flash_attn/cute\\" \\"\\${LINK_NAME}\\" SYMBOLIC)
  " COMPONENT _vllm_fa4_cutedsl_C)
install(DIRECTORY ${CMAKE_BINARY_DIR}/many/ DESTINATION vllm/third_party/deep_gemm COMPONENT many)
"""
FIRST = {
    "_C.abi3.so": "C 1",
    "spinloop.abi3.so": "S 1",
    "_vllm_fa2_C.abi3.so": "FA2 1",
    "fa/layers/rotary.py": "r = 1\n",
    "fa/__init__.py": "brought = 1\n",
}
CUTE = {
    "cache/flash_attn/cute/__init__.py": "",
    "cache/flash_attn/cute/interface.py": "from flash_attn.cute.utils import x\n",
}
TRACKED = {
    "vllm/__init__.py": "",
    "vllm/vllm_flash_attn/__init__.py": "own = 1\n",
    ".gitignore": (
        "*.so\nvllm/vllm_flash_attn/*\n!vllm/vllm_flash_attn/__init__.py\n"
        "vllm/third_party/deep_gemm/\n"
    ),
}


def write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def named(*names: str) -> tuple[Target, ...]:
    return tuple(
        Target(
            name,
            "MODULE_LIBRARY",
            (),
            (f"{name}.abi3.so",) if name == "spinloop" else (),
            (),
            (),
            "",
            (),
        )
        for name in names
    )


class Bench:
    """A tree under git and a configured build directory, in the places of a clone."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.build, self.folder = (
            folder / "vendor" / "vllm",
            folder / "builds" / "cpu-abc",
            folder,
        )

    def put(self, *names: str, env: Mapping[str, str] | None = None) -> tuple[str, ...]:
        with RunLog(Console(), self.folder / "logs", verb="test") as run_log:
            return install_targets(
                self.build,
                self.tree,
                named(*names),
                run_log=run_log,
                env=ENV | dict(env or {}),
            )

    def text(self, name: str) -> str:
        return (self.tree / "vllm" / name).read_text()

    def left(self) -> list[str]:
        """Return the names beside the tree that should not exist."""
        return sorted(path.name for path in self.tree.parent.iterdir() if path != self.tree)


@pytest.fixture(scope="session")
def _configured(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("put"))
    write(bench.folder / "source", {"CMakeLists.txt": PROJECT})
    write(bench.build, FIRST | CUTE)
    subprocess.run(
        ["cmake", "-S", bench.folder / "source", "-B", bench.build], check=True, capture_output=True
    )
    write(bench.tree, TRACKED)
    git(bench.tree, "init", "--quiet")
    git(bench.tree, "add", "--all")
    git(bench.tree, "commit", "--quiet", "-m", "The tree")
    return bench


@pytest.fixture
def bench(_configured: Bench) -> Bench:
    """The bench as configured, at the path that CMake has written into it."""
    made = _configured
    for part in ("fa", "cache", "many"):
        shutil.rmtree(made.build / part, ignore_errors=True)
    write(made.build, FIRST | CUTE)
    git(made.tree, "clean", "-qffdx")
    git(made.tree, "checkout", "--quiet", "--force", "HEAD", "--", ".")
    return made


def test_component_replaces_what_was_there_and_nothing_else(bench: Bench) -> None:
    write(
        bench.tree,
        {
            "vllm/_C.abi3.so": "of a precompiled wheel",
            "vllm/spinloop.abi3.so": "of a precompiled wheel",
            "vllm/notes.txt": "the user's",
        },
    )
    assert bench.put("_C") == ("vllm/_C.abi3.so",)
    assert (bench.text("_C.abi3.so"), bench.text("spinloop.abi3.so"), bench.text("notes.txt")) == (
        "C 1",
        "of a precompiled wheel",
        "the user's",
    )
    assert bench.left() == []


def test_nested_prefix_and_python_files_land_in_the_package(bench: Bench) -> None:
    assert bench.put("_vllm_fa2_C", "_vllm_fa3_C") == (
        "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so",
        "vllm/vllm_flash_attn/layers/rotary.py",
    )
    assert bench.text("vllm_flash_attn/_vllm_fa2_C.abi3.so") == "FA2 1"


def test_tracked_file_is_never_written_over(bench: Bench) -> None:
    (bench.tree / "vllm/vllm_flash_attn/__init__.py").write_text("own = 2  # an edit\n")
    bench.put("_vllm_fa2_C")
    assert bench.text("vllm_flash_attn/__init__.py") == "own = 2  # an edit\n"
    assert git(bench.tree, "status", "--porcelain") == "M vllm/vllm_flash_attn/__init__.py"


def test_same_files_again_are_not_touched(bench: Bench) -> None:
    bench.put("_C", "_vllm_fa2_C", "_vllm_fa4_cutedsl_C")
    before = {path: path.lstat() for path in (bench.tree / "vllm").rglob("*") if not path.is_dir()}
    bench.put("_C", "_vllm_fa2_C", "_vllm_fa4_cutedsl_C")
    assert {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in before} == {
        path: (was.st_ino, was.st_mtime_ns) for path, was in before.items()
    }


def test_link_to_the_users_own_sources_stays_a_link(bench: Bench) -> None:
    bench.put("_vllm_fa4_cutedsl_C")
    assert (
        bench.tree / "vllm/vllm_flash_attn/cute"
    ).resolve() == bench.build / "cache/flash_attn/cute"


def test_no_file_is_written_behind_a_link_of_an_earlier_build(bench: Bench) -> None:
    mine = bench.folder / "mine"
    write(mine, {"rotary.py": "mine = 1\n"})
    (bench.tree / "vllm/vllm_flash_attn/layers").symlink_to(mine)
    bench.put("_vllm_fa2_C")
    assert not (bench.tree / "vllm/vllm_flash_attn/layers").is_symlink()
    assert (mine / "rotary.py").read_text() == "mine = 1\n"
    assert bench.text("vllm_flash_attn/layers/rotary.py") == "r = 1\n"
    assert bench.left() == []


def test_link_of_the_users_is_not_removed_with_tracked_files_in_its_place(bench: Bench) -> None:
    write(bench.tree, {"vllm/vllm_flash_attn/cute/own.py": "own = 1\n"})
    git(bench.tree, "add", "--force", "vllm/vllm_flash_attn/cute/own.py")
    git(bench.tree, "commit", "--quiet", "-m", "A file where the build has a link")
    try:
        with pytest.raises(
            BuildError, match="vllm/vllm_flash_attn/cute/own.py of the tree is in the way"
        ):
            bench.put("_vllm_fa4_cutedsl_C")
        assert bench.text("vllm_flash_attn/cute/own.py") == "own = 1\n"
    finally:
        git(bench.tree, "reset", "--quiet", "--hard", "HEAD~1")
    assert bench.left() == []


def test_target_that_was_not_built_is_named_and_the_tree_stays(bench: Bench) -> None:
    write(bench.tree, {"vllm/_C.abi3.so": "of a precompiled wheel"})
    (bench.build / "spinloop.abi3.so").unlink()
    with pytest.raises(BuildError) as caught:
        bench.put("_C", "spinloop")
    assert caught.value.message.startswith(
        "spinloop has not been built: spinloop.abi3.so is not in "
    )
    assert bench.text("_C.abi3.so") == "of a precompiled wheel"
    assert bench.left() == []


def test_destdir_of_the_users_shell_has_no_effect(bench: Bench) -> None:
    shell = {"DESTDIR": str(bench.folder / "package"), "CMAKE_INSTALL_MODE": "ABS_SYMLINK"}
    settings = load(Layout(bench.folder), environ=ENV | shell)
    bench.put("_C", env=settings.child_environment("compile", layout=Layout(bench.folder)))
    assert bench.text("_C.abi3.so") == "C 1"
    assert not (bench.tree / "vllm/_C.abi3.so").is_symlink()


def test_component_without_files_is_no_error(bench: Bench) -> None:
    assert bench.put("_deepselect_C") == ()


def test_missing_cmake_is_reported(bench: Bench) -> None:
    with pytest.raises(ToolchainError, match="cmake is missing"):
        bench.put("_C", env={"PATH": "/nonexistent"})


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.compile.test_tree_files import Bench
Bench(Path(sys.argv[2])).put("many")
"""


def test_kill_leaves_every_file_old_or_new_and_the_next_run_finishes(bench: Bench) -> None:
    names = [f"include/h{number:03}.hpp" for number in range(150)]
    old, new = "old\n" * 5000, "new\n" * 5000
    write(bench.tree / "vllm/third_party/deep_gemm", dict.fromkeys(names, old))
    write(bench.build / "many", dict.fromkeys(names, new))
    last = bench.tree / "vllm/third_party/deep_gemm" / names[0]
    before = last.stat().st_ino
    child = subprocess.Popen(
        [sys.executable, "-B", "-c", KILLED, str(ROOT), str(bench.folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while last.stat().st_ino == before and child.poll() is None:
        time.sleep(0)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    there = {(bench.tree / "vllm/third_party/deep_gemm" / name).read_text() for name in names}
    assert there == {old, new}, "the kill came too late to prove anything"
    bench.put("many")
    assert {(bench.tree / "vllm/third_party/deep_gemm" / name).read_text() for name in names} == {
        new
    }
    assert bench.left() == []
