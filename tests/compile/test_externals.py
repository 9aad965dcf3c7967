"""External projects: declarations in the tree's CMake files, and their sources: complete or not at
all, once for all clones.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compile.trees import Site, after_typing, put
from tests.repo.conftest import commit, sh_git
from workspace.compile import externals
from workspace.compile.externals import External
from workspace.core.errors import SettingsError, SourceError

ROOT = Path(__file__).resolve().parents[2]
HOST = "https://github.com"
REAL = {
    "CMakeLists.txt": (
        """\
set(VLLM_TARGET_DEVICE "cuda" CACHE STRING "")
if (DEFINED ENV{TORCH_NIGHTLY} AND "$ENV{TORCH_NIGHTLY}" STREQUAL "1")
endif()
if (NOT VLLM_TARGET_DEVICE STREQUAL "cuda" AND NOT VLLM_TARGET_DEVICE STREQUAL "rocm")
  if (VLLM_TARGET_DEVICE STREQUAL "cpu")
    include(${CMAKE_CURRENT_LIST_DIR}/cmake/cpu_extension.cmake)
  else()
    return()
  endif()
  return()
endif()
if(HIP_FOUND)
  set(VLLM_GPU_LANG "HIP")
endif()
define_extension_target(cumem_allocator SOURCES csrc/cumem_allocator.cpp)
if(VLLM_GPU_LANG STREQUAL "CUDA" OR VLLM_GPU_LANG STREQUAL "HIP")
  set(CUTLASS_REVISION "v4.7.1")
  if (DEFINED ENV{VLLM_CUTLASS_SRC_DIR})
    set(VLLM_CUTLASS_SRC_DIR $ENV{VLLM_CUTLASS_SRC_DIR})
  endif()
  if(VLLM_CUTLASS_SRC_DIR)
    FetchContent_Declare(cutlass SOURCE_DIR ${VLLM_CUTLASS_SRC_DIR})
  else()
    FetchContent_Declare(cutlass
      GIT_REPOSITORY https://github.com/nvidia/cutlass.git  # a remark with ) in it
      GIT_TAG ${CUTLASS_REVISION}
      GIT_SHALLOW TRUE)
  endif()
  define_extension_target(_C SOURCES a.cu INCLUDE_DIRECTORIES ${CUTLASS_INCLUDE_DIR})
endif()
if(VLLM_GPU_LANG STREQUAL "CUDA")
  include(cmake/external_projects/qutlass.cmake)
  include(cmake/external_projects/attn.cmake)
endif()
"""
    ),
    "cmake/cpu_extension.cmake": (
        """\
if(ASIMD_FOUND)
  if(DEFINED ENV{ACL_ROOT_DIR} AND IS_DIRECTORY "$ENV{ACL_ROOT_DIR}")
    message(STATUS "Using ACL")
  else()
    FetchContent_Populate(arm_compute SUBBUILD_DIR "${FETCHCONTENT_BASE_DIR}/x"
      GIT_REPOSITORY https://github.com/ARM-software/ComputeLibrary.git GIT_TAG v52.6.0)
  endif()
endif()
set(FETCHCONTENT_SOURCE_DIR_ONEDNN "$ENV{FETCHCONTENT_SOURCE_DIR_ONEDNN}" CACHE PATH "")
if(FETCHCONTENT_SOURCE_DIR_ONEDNN)
  FetchContent_Declare(oneDNN SOURCE_DIR ${FETCHCONTENT_SOURCE_DIR_ONEDNN})
elseif(ASIMD_FOUND AND NOT APPLE_SILICON_FOUND)
  FetchContent_Declare(oneDNN GIT_REPOSITORY https://github.com/oneapi-src/oneDNN.git
    GIT_TAG 9c5be1cc59e368aebf0909e6cf20f981ea61462a)
else()
  FetchContent_Declare(oneDNN GIT_REPOSITORY https://github.com/oneapi-src/oneDNN.git GIT_TAG v3.13)
endif()
define_extension_target(_C SOURCES a.cpp)
"""
    ),
    "cmake/external_projects/qutlass.cmake": (
        """\
if(DEFINED ENV{QUTLASS_SRC_DIR})
  set(QUTLASS_SRC_DIR $ENV{QUTLASS_SRC_DIR})
endif()
if(QUTLASS_SRC_DIR)
  set(qutlass_SOURCE_DIR "${QUTLASS_SRC_DIR}")
else()
  set(_TAG "830d2c4537c7396e14a02a46fbddd18b5d107c65")
  if(EXISTS "${_src}/qutlass/csrc/bindings.cpp")
    set(qutlass_SOURCE_DIR "${_src}")
  else()
    FetchContent_Populate(qutlass SOURCE_DIR "${_src}"
      GIT_REPOSITORY https://github.com/IST-DASLab/qutlass.git
      GIT_TAG "${_TAG}" GIT_SUBMODULES "third-party/a" "b")
  endif()
endif()
if(EXISTS "${CUTLASS_INCLUDE_DIR}/cutlass/cutlass.h")
  define_extension_target(_qutlass_C SOURCES ${qutlass_SOURCE_DIR}/qutlass/csrc/gemm.cu)
else()
  add_custom_target(_qutlass_C)
endif()
"""
    ),
    "cmake/external_projects/attn.cmake": (
        """\
if (DEFINED ENV{VLLM_FLASH_ATTN_SRC_DIR})
  set(VLLM_FLASH_ATTN_SRC_DIR $ENV{VLLM_FLASH_ATTN_SRC_DIR})
endif()
if(VLLM_FLASH_ATTN_SRC_DIR)
else()
  FetchContent_Declare(vllm-flash-attn
    GIT_REPOSITORY https://github.com/vllm-project/flash-attention.git
    GIT_TAG abc GIT_SUBMODULES "")
endif()
foreach(_FA_COMPONENT _vllm_fa2_C _vllm_fa3_C)
  install(DIRECTORY ${vllm-flash-attn_SOURCE_DIR}/x/ DESTINATION vllm COMPONENT ${_FA_COMPONENT})
endforeach()
add_custom_target(_vllm_fa4_cutedsl_C)
"""
    ),
}


def declared(tree: Path, device: str, machine: str = "x86_64") -> dict[str, External]:
    return {
        external.name: external for external in externals.declared(tree, device, machine=machine)
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    put(folder, REAL)
    return folder


def test_what_is_declared_follows_the_device_and_the_machine(tree: Path) -> None:
    assert {name: external.tag[:6] for name, external in declared(tree, "cuda").items()} == {
        "cutlass": "v4.7.1",
        "qutlass": "830d2c",
        "vllm-flash-attn": "abc",
    }
    assert {name: external.tag[:6] for name, external in declared(tree, "cpu").items()} == {
        "oneDNN": "v3.13"
    }
    assert {
        name: external.tag[:6] for name, external in declared(tree, "cpu", "aarch64").items()
    } == {"arm_compute": "v52.6.", "oneDNN": "9c5be1"}


def test_override_and_variable_of_each_project_are_read(tree: Path) -> None:
    found = declared(tree, "cuda") | declared(tree, "cpu", "aarch64")
    assert {name: (external.override, external.variable) for name, external in found.items()} == {
        "cutlass": ("VLLM_CUTLASS_SRC_DIR", "FETCHCONTENT_SOURCE_DIR_CUTLASS"),
        "qutlass": ("QUTLASS_SRC_DIR", "QUTLASS_SRC_DIR"),
        "vllm-flash-attn": ("VLLM_FLASH_ATTN_SRC_DIR", "FETCHCONTENT_SOURCE_DIR_VLLM-FLASH-ATTN"),
        "arm_compute": ("ACL_ROOT_DIR", "ACL_ROOT_DIR"),
        "oneDNN": ("FETCHCONTENT_SOURCE_DIR_ONEDNN", "FETCHCONTENT_SOURCE_DIR_ONEDNN"),
    }
    assert {
        name: external.submodules
        for name, external in found.items()
        if external.submodules is not None
    } == {
        "qutlass": ("third-party/a", "b"),
        "vllm-flash-attn": (),
    }


def test_targets_that_need_a_project(tree: Path) -> None:
    found = declared(tree, "cuda")
    assert found["cutlass"].targets == ("_C", "_qutlass_C"), "cumem_allocator needs none"
    assert found["qutlass"].targets == ("_qutlass_C",)
    assert set(found["vllm-flash-attn"].targets) == {
        "_vllm_fa2_C",
        "_vllm_fa3_C",
        "_vllm_fa4_cutedsl_C",
    }
    assert found["vllm-flash-attn"].defines == ("_vllm_fa2_C", "_vllm_fa3_C")
    assert found["qutlass"].files == ("qutlass/csrc/gemm.cu",)
    assert found["cutlass"].files == ("include/cutlass/cutlass.h",)


@pytest.mark.parametrize(
    "text",
    [
        "if(",
        "if(A\nset(x",
        ")",
        '"',
        "include(CMakeLists.txt)",
        "endif()\nelse()",
        "[[",
        "if(NOT)\nendif()",
        "if(AND OR ( STREQUAL)\nendif()",
        "\0\xff",
    ],
)
def test_file_that_is_no_cmake_declares_no_project(tmp_path: Path, text: str) -> None:
    (tmp_path / "CMakeLists.txt").write_bytes(text.encode("latin-1"))
    assert externals.declared(tmp_path, "cuda") == ()
    assert list(externals.pinned(text)) == []
    assert externals.declared(tmp_path / "nowhere", "cuda") == ()


@pytest.mark.parametrize(
    ("condition", "branches"),
    [
        ('VLLM_TARGET_DEVICE STREQUAL "cuda"', "yes"),
        ('NOT (VLLM_TARGET_DEVICE STREQUAL "cpu" OR APPLE_SILICON_FOUND)', "yes"),
        ("DEFINED ENV{X_SRC_DIR} AND EXISTS y", "no"),
        ("HIP_FOUND", "yes no"),
        ("HIP_FOUND AND MACOSX_FOUND", "no"),
        ("HIP_FOUND OR NOT MACOSX_FOUND", "yes"),
        ('CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|amd64" OR ENABLE_X86_ISA', "yes"),
        ('CMAKE_SYSTEM_PROCESSOR MATCHES "("', "yes no"),
        ("${CUDA} VERSION_GREATER_EQUAL 13.0", "yes no"),
    ],
)
def test_unknown_condition_is_followed_both_ways(
    tmp_path: Path, condition: str, branches: str
) -> None:
    put(
        tmp_path,
        {"CMakeLists.txt": f"if({condition})\n  walked(yes)\nelse()\n  walked(no)\nendif()\n"},
    )
    steps = externals.walk(tmp_path, "cuda", machine="x86_64")
    assert (
        " ".join(step.command.args[0] for step in steps if step.command.name == "walked")
        == branches
    )


# Fetching


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that replaces GitHub: flashy, with cutlass as a submodule by its public address."""
    folder = tmp_path_factory.mktemp("mirror")
    cutlass = folder / "NVIDIA" / "cutlass"
    cutlass.mkdir(parents=True)
    sh_git(cutlass, "init", "--quiet")
    commit(cutlass, "old", {"cutlass.h": "old\n"})
    inner = commit(cutlass, "new", {"cutlass.h": "new\n"})
    commit(cutlass, "newer", {"cutlass.h": "newer\n"})
    flashy = folder / "vllm-project" / "flashy"
    flashy.mkdir(parents=True)
    sh_git(flashy, "init", "--quiet")
    sh_git(flashy, "update-index", "--add", "--cacheinfo", f"160000,{inner},csrc/cutlass")
    put(
        flashy,
        {
            ".gitmodules": (
                f'[submodule "cutlass"]\n\tpath = csrc/cutlass\n\turl = {HOST}/NVIDIA/cutlass.git\n'
            ),
            "flashy.py": "1\n",
            ".gitignore": "*.so\n",
        },
    )
    sh_git(flashy, "add", ".gitmodules", "flashy.py")
    sh_git(flashy, "commit", "--quiet", "--message", "wanted")
    sh_git(flashy, "tag", "--annotate", "--message", "v1", "v1.0")
    (flashy / "csrc" / "cutlass").mkdir(parents=True)
    commit(flashy, "later", {"flashy.py": "2\n"})
    for path in (cutlass, flashy):
        shutil.move(path / ".git", path.with_suffix(".git"))
        shutil.rmtree(path)
        sh_git(path.with_suffix(".git"), "config", "core.bare", "true")
    return folder


def flashy(
    mirror: Path, *, tag: str | None = None, submodules: tuple[str, ...] | None = None
) -> External:
    wanted = tag or sh_git(mirror / "vllm-project" / "flashy.git", "rev-parse", "v1.0^{commit}")
    return External(
        "flashy",
        f"{HOST}/vllm-project/flashy.git",
        wanted,
        "FLASHY_SRC_DIR",
        "FETCHCONTENT_SOURCE_DIR_FLASHY",
        (),
        submodules,
        (),
        (),
    )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site.make(tmp_path)


@pytest.mark.parametrize("address", ["{}", "file://{}/"])
@pytest.mark.parametrize("tag", [None, "v1.0"])
def test_project_is_fetched_completely_from_a_mirror_and_then_kept(
    site: Site, mirror: Path, address: str, tag: str | None
) -> None:
    external = flashy(mirror, tag=tag)
    given = site.provide((external,), (), EXTERNALS_MIRROR=address.format(mirror))
    folder = Path(given["FETCHCONTENT_SOURCE_DIR_FLASHY"])
    assert folder == site.settings().cache / "externals" / "flashy" / external.tag
    assert (folder / "flashy.py").read_text() == "1\n"
    assert (folder / "csrc" / "cutlass" / "cutlass.h").read_text() == "new\n"
    assert sh_git(folder, "status", "--porcelain") == ""
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    assert site.provide((external,), (), EXTERNALS_MIRROR="/nowhere") == given
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before
    # Another clone of the same user.
    other = Site.make(site.root / "other")
    assert (
        other.provide(
            (external,),
            (),
            EXTERNALS_MIRROR="/nowhere",
            WORKSPACE_CACHE_DIR=site.shell["WORKSPACE_CACHE_DIR"],
        )
        == given
    )


def test_only_requested_submodules_are_fetched(site: Site, mirror: Path) -> None:
    given = site.provide((flashy(mirror, submodules=()),), (), EXTERNALS_MIRROR=str(mirror))
    assert not any((Path(given["FETCHCONTENT_SOURCE_DIR_FLASHY"]) / "csrc" / "cutlass").iterdir())


@pytest.mark.parametrize("tag", ["0" * 40, "v9"])
def test_missing_commit_is_reported_and_leaves_no_folder(
    site: Site, mirror: Path, tag: str
) -> None:
    with pytest.raises(SourceError, match=f"flashy {tag[:12]} could not be fetched from") as caught:
        site.provide((flashy(mirror, tag=tag),), (), EXTERNALS_MIRROR=str(mirror))
    assert "EXTERNALS_MIRROR" in (caught.value.hint or "")
    assert "FLASHY_SRC_DIR" in (caught.value.hint or "")
    left = [
        path for path in (site.settings().cache / "externals" / "flashy").iterdir() if path.is_dir()
    ]
    assert left == []


def test_password_of_the_mirror_is_never_shown(
    site: Site, mirror: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SourceError) as caught:
        site.provide(
            (flashy(mirror),), (), EXTERNALS_MIRROR="http://me:hunter2@127.0.0.1:9", no_proxy="*"
        )
    shown = "".join(
        (
            caught.value.message,
            *caught.value.details,
            *capfd.readouterr(),
            *(log.read_text() for log in site.layout.logs.glob("*.log")),
        )
    )
    assert "hunter2" not in shown
    assert not [
        path
        for path in (site.root / "cache").rglob("*")
        if path.is_file() and b"hunter2" in path.read_bytes()
    ]


def running(site: Site, mirror: str, external: External) -> "subprocess.Popen[str]":
    script = (
        "import sys; from pathlib import Path; from tests.compile.trees import Site; from"
        " workspace.compile.externals import External\nroot, mirror, repository, tag ="
        " sys.argv[1:]\nexternal = External('flashy', repository, tag, 'FLASHY_SRC_DIR',"
        " 'FETCHCONTENT_SOURCE_DIR_FLASHY', (), None, (),"
        " ())\nprint(Site.again(Path(root)).provide((external,), (), EXTERNALS_MIRROR=mirror,"
        " no_proxy='*'))"
    )
    argv = [
        sys.executable,
        "-c",
        script,
        str(site.root),
        mirror,
        external.repository,
        external.tag,
    ]
    return subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@contextlib.contextmanager
def silent_server() -> Iterator[tuple[str, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        yield f"http://127.0.0.1:{server.getsockname()[1]}", server


def test_killed_fetch_leaves_no_project_and_the_next_fetch_cleans_up(
    site: Site, mirror: Path
) -> None:
    external = flashy(mirror)
    place = site.settings().cache / "externals" / "flashy" / external.tag
    with silent_server() as (address, server):
        task = running(site, address, external)
        connection, _ = server.accept()
        task.kill()
        task.communicate()
        connection.close()
    assert not place.exists()
    assert [path.name for path in place.parent.iterdir() if path.is_dir()] != [], (
        "the fetch was killed after its start"
    )
    # The lock of the killed task does not block the next one.
    site.provide((external,), (), EXTERNALS_MIRROR=str(mirror))
    assert [path.name for path in place.parent.iterdir() if path.is_dir()] == [external.tag]


def test_two_clones_at_once_fetch_once_and_both_succeed(
    site: Site, mirror: Path, tmp_path: Path
) -> None:
    external = flashy(mirror)
    other = Site.make(tmp_path / "other")
    (tmp_path / "other" / "cache").symlink_to(site.root / "cache")
    (site.root / "cache").mkdir(exist_ok=True)
    tasks = [running(each, str(mirror), external) for each in (site, other)]
    output = [task.communicate(timeout=60) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], output
    logs = [log for each in (site, other) for log in each.layout.logs.glob("*.log")]
    assert sum(log.read_text().count(" fetch ") for log in logs) == 1
    assert [
        path.name
        for path in (site.root / "cache" / "externals" / "flashy").iterdir()
        if path.is_dir()
    ] == [external.tag]


def test_moved_checkout_is_refused(site: Site, mirror: Path) -> None:
    external = flashy(mirror)
    folder = Path(
        site.provide((external,), (), EXTERNALS_MIRROR=str(mirror))[
            "FETCHCONTENT_SOURCE_DIR_FLASHY"
        ]
    )
    (folder / ".git" / "HEAD").write_text("0" * 40 + "\n")
    with pytest.raises(SourceError, match="is at 000000000000, not at") as caught:
        site.provide((external,), (), EXTERNALS_MIRROR=str(mirror))
    assert "FLASHY_SRC_DIR" not in after_typing(caught.value.hint)
    assert not folder.exists()
    site.provide((external,), (), EXTERNALS_MIRROR=str(mirror))
    assert (folder / "flashy.py").read_text() == "1\n"


# Overrides


@pytest.mark.parametrize("how", ["shell", ".env", "CMAKE_ARGS", "relative"])
def test_users_own_sources_win_over_a_fetch(site: Site, mirror: Path, how: str) -> None:
    mine = site.root / "mine"
    mine.mkdir()
    text = os.path.relpath(mine) if how == "relative" else str(mine)
    if how == ".env":
        site.layout.dotenv.write_text(f"FLASHY_SRC_DIR={text}\n")
    more = (
        {"CMAKE_ARGS": f"-DA=1 -DFETCHCONTENT_SOURCE_DIR_FLASHY:PATH={text}"}
        if how == "CMAKE_ARGS"
        else {}
        if how == ".env"
        else {"FLASHY_SRC_DIR": text}
    )
    given = site.provide((flashy(mirror),), (), EXTERNALS_MIRROR="/nowhere", **more)
    assert list(given) == [
        "FETCHCONTENT_SOURCE_DIR_FLASHY" if how == "CMAKE_ARGS" else "FLASHY_SRC_DIR"
    ]
    assert Path(next(iter(given.values()))).resolve() == mine


def test_override_to_a_missing_folder_is_reported(site: Site, mirror: Path) -> None:
    with pytest.raises(
        SettingsError, match="FLASHY_SRC_DIR=/not/there: the folder does not exist"
    ) as caught:
        site.provide((flashy(mirror),), (), FLASHY_SRC_DIR="/not/there")
    left = after_typing(caught.value.hint, FLASHY_SRC_DIR="/not/there")
    assert left == {}
    assert site.provide((flashy(mirror),), (), EXTERNALS_MIRROR=str(mirror), **left)


def test_hint_of_a_project_that_cannot_be_fetched_names_a_variable_for_a_copy(
    site: Site, mirror: Path, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match="could not be fetched") as caught:
        site.provide((flashy(mirror),), (), EXTERNALS_MIRROR="/nowhere")
    assert caught.value.hint
    copy = tmp_path / "copy"
    copy.mkdir()
    export = caught.value.hint.rpartition(", or ")[2].replace("/your/copy", str(copy))
    variables = after_typing(export)
    assert variables == {"FLASHY_SRC_DIR": str(copy)}
    assert site.provide((flashy(mirror),), (), EXTERNALS_MIRROR="/nowhere", **variables)
