"""The configure step with the real CMake: once for each change of its inputs, and no needless
compilation afterwards.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.compile.trees import GENERATOR, TAG, TOP, Site, after_typing, put, written
from workspace.compile import cmake, externals, project
from workspace.compile.cmake_inputs import folder
from workspace.core.errors import BuildError

ROOT = Path(__file__).resolve().parents[2]
INTERFACE = "vllm/third_party/flashy/interface.py"
KERNEL = "csrc/generated/kernel_a.c"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    made = Site.make(tmp_path_factory.mktemp("cmake"))
    put(made.tree, {INTERFACE: "from a precompiled wheel\n"})
    made.configure()
    return made


@pytest.fixture
def own(tmp_path: Path) -> Site:
    return Site.make(tmp_path)


def due(site: Site, **changes: object) -> str | None:
    inputs = site.inputs()
    return cmake.due(folder(site.layout, inputs), site.inputs(**changes), site.provide())


def snapshot(*folders: Path) -> dict[Path, tuple[int, int]]:
    return {
        path: (path.lstat().st_mtime_ns, path.lstat().st_ino)
        for top in folders
        for path in top.rglob("*")
    }


def build_of(site: Site) -> Path:
    return folder(site.layout, site.inputs())


def test_unchanged_inputs_touch_no_file_and_give_the_same_project(site: Site) -> None:
    before = snapshot(site.root)
    assert due(site) is None
    assert site.configure() == project.read(build_of(site), site.tree)
    assert snapshot(site.root) == before


@pytest.mark.parametrize(
    ("path", "text", "reason"),
    [
        ("CMakeLists.txt", TOP + "# a word\n", "CMakeLists.txt changed"),
        ("cmake/utils.cmake", None, "cmake/utils.cmake changed"),
        ("cmake/patches/new.patch", "+1\n", "cmake/patches/new.patch is new"),
        ("csrc/generate.py", GENERATOR + "# a word\n", "csrc/generate.py changed"),
        (
            "csrc/generated/kernel_a.c",
            "int mine;\n",
            "csrc/generated/kernel_a.c, which a configure wrote, was changed or deleted",
        ),
        (
            "csrc/generated/kernel_b.c",
            None,
            "csrc/generated/kernel_b.c, which a configure wrote, was changed or deleted and 1 more",
        ),
        ("csrc/generated/kernel_z.c", "int z;\n", "csrc/generated/kernel_*.c matches other files"),
    ],
)
def test_changed_input_of_configure_is_named_until_it_is_reverted(
    site: Site, path: str, text: str | None, reason: str
) -> None:
    (site.tree / path).parent.mkdir(exist_ok=True)
    with written(site.tree / path, text):
        assert due(site) == reason
    # Written again, so with another time.
    assert due(site) is None


@pytest.mark.parametrize("path", ["csrc/c.c", "csrc/include/wide.h", "csrc/new.c", "vllm/new.py"])
def test_changed_source_is_no_reason_to_configure(site: Site, path: str) -> None:
    with written(site.tree / path, "int x;\n"):
        assert due(site) is None


def test_inputs_and_sources_are_reasons(site: Site) -> None:
    assert due(site, configure={"CMAKE_ARGS": "-DX=1"}) == "CMAKE_ARGS none → -DX=1"
    assert due(site, configure={}) is None, "unset and empty are the same"
    assert due(site, configure={"CMAKE_ARGS": "", "CC": "clang"}) == "CC nothing → clang"
    assert due(site, torch="2.14.0") == "torch 2.13.0 → 2.14.0"
    inputs = site.inputs()
    output = cmake.due(build_of(site), inputs, {"FETCHCONTENT_SOURCE_DIR_FLASHY": "/mine"})
    assert output == "FETCHCONTENT_SOURCE_DIR_FLASHY a placeholder → /mine"


@pytest.mark.parametrize("damage", ["", "[]", '{"schema": 1}', "[" * 9000, '{"schema": 99}'])
def test_record_that_cannot_be_read_is_a_reason(site: Site, damage: str) -> None:
    with written(build_of(site) / project.RECORD, damage):
        assert due(site) == "its record cannot be read"


def test_changed_build_file_is_a_reason(site: Site) -> None:
    with written(build_of(site) / "build.ninja", "rule x\n"):
        assert due(site) == "build.ninja was changed after the configure"


def test_configure_again_compiles_nothing_again(own: Site) -> None:
    own.configure()
    build = build_of(own)
    assert own.ninja(build, "_C.abi3.so", "spinloop").returncode == 1, (
        "its external project is a placeholder"
    )
    objects = [
        unit.object
        for target in own.configure().targets
        if target.name in ("_C", "spinloop")
        for unit in target.units
    ]
    assert own.ninja(build, *objects).returncode == 0
    put(own.tree, {"CMakeLists.txt": TOP + "# a word\n"})
    own.configure()
    assert "no work to do" in own.ninja(build, *objects).stdout
    # A damaged directory is configured again, and its objects stay.
    (build / "CMakeCache.txt").write_text("garbage")
    shutil.rmtree(
        build / "CMakeFiles" / next(path.name for path in (build / "CMakeFiles").glob("3.*"))
    )
    (build / "build.ninja").write_text("garbage")
    own.configure()
    assert "no work to do" in own.ninja(build, *objects).stdout
    put(own.tree, {"CMakeLists.txt": TOP.replace("WIDE=1", "WIDE=2")})
    own.configure()
    assert "[3/3]" in own.ninja(build, *objects).stdout, "the three units of _C and not spinloop's"


def test_two_build_directories_share_generated_sources(own: Site) -> None:
    sources, one, other = own.provide(), own.inputs(), own.inputs(archs="x")
    own.configure(one)
    build = folder(own.layout, one)
    object_of_a = next(
        unit.object
        for target in own.configure().targets
        for unit in target.units
        if unit.source == KERNEL
    )
    assert own.ninja(build, object_of_a).returncode == 0
    own.configure(other)
    assert cmake.due(build, one, sources) is None, "the other one has written the same"
    assert "no work to do" in own.ninja(build, object_of_a).stdout
    own.configure(replace(other, configure={"KERNELS_OF": "a c"}), KERNELS_OF="a c")
    assert "kernel_" in (cmake.due(build, one, sources) or "")
    own.configure(one)
    assert cmake.due(build, one, sources) is None
    assert "no work to do" in own.ninja(build, object_of_a).stdout, (
        "it is as it was when it was compiled"
    )


def test_placeholder_replaces_nothing_of_the_package(site: Site, own: Site) -> None:
    assert (site.tree / INTERFACE).read_text() == "from a precompiled wheel\n"
    own.configure()
    assert not (own.tree / INTERFACE).exists(), "what was made of a placeholder is taken away"


def test_killed_configure_loses_no_file_of_the_package(own: Site) -> None:
    put(
        own.tree,
        {
            INTERFACE: "from a precompiled wheel\n",
            "CMakeLists.txt": (
                TOP + f"file(TOUCH {own.root}/reached)\nexecute_process(COMMAND sleep 600)\n"
            ),
        },
    )
    script = (
        "import sys; from pathlib import Path; from tests.compile.trees import Site;"
        " Site.again(Path(sys.argv[1])).configure()"
    )
    task = subprocess.Popen(
        [sys.executable, "-c", script, str(own.root)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while not (own.root / "reached").exists():
        assert task.poll() is None
        time.sleep(0.02)
    task.kill()
    task.wait()
    assert "not fetched" in (own.tree / INTERFACE).read_text()
    # Files that CMake has begun to write, and would never remove.
    put(
        build_of(own),
        {
            "build.ninja.tmpe227e": "half",
            "_deps/a-subbuild/cmake_install.cmake.tmp0c1f9": "half",
            "mine.tmpfiles": "no digits",
        },
    )
    put(own.tree, {"CMakeLists.txt": TOP})
    assert due(own) == "it is not configured yet"
    own.configure()
    assert [path.name for path in build_of(own).rglob("*.tmp?????*")] == ["mine.tmpfiles"]
    assert (own.tree / INTERFACE).read_text() == "from a precompiled wheel\n"


def test_users_own_sources_are_built_and_written_into_the_package(own: Site) -> None:
    mine = own.root / "mine"
    put(
        mine,
        {
            "flashy/interface.py": "mine = 1\n",
            "csrc/api.c": "int api;\n",
            "csrc/hidden.c": "int hidden;\n",
        },
    )
    with pytest.raises(BuildError) as caught:
        own.configure(sources=own.provide(FLASHY_SRC_DIR=str(mine)))
    assert caught.value.message.startswith(
        f"cannot configure with flashy from {mine} (FLASHY_SRC_DIR): ModuleNotFoundError: No module"
        " named 'of_flashy'; Machete generation failed."
    )
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("unset FLASHY_SRC_DIR")
    put(mine, {"python/of_flashy.py": ""})
    sources = own.provide(FLASHY_SRC_DIR=str(mine))
    assert sources == {"FLASHY_SRC_DIR": str(mine)}
    own.configure(sources=sources)
    assert (own.tree / INTERFACE).read_text() == "import vllm\nmine = 1\n"
    assert own.ninja(build_of(own), "_flashy_C", "_C").returncode == 0


def test_placeholders_get_the_missing_files_and_cannot_be_built(own: Site) -> None:
    own.configure()
    stand_in = own.layout.builds / "placeholders" / "flashy" / TAG
    assert {path.name for path in stand_in.rglob("*.c")} == {"api.c", "hidden.c"}
    assert not (stand_in / "flashy" / "only_installed.py").exists(), "an install of it is to fail"
    ended = own.ninja(build_of(own), "_flashy_C")
    assert ended.returncode != 0
    assert "not fetched" in ended.stdout
    ended = own.ninja(build_of(own), "_flashy_fa2_C")
    assert "_flashy_fa2_C needs flashy" in ended.stdout


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            'message(FATAL_ERROR "GCC >= 99 is required\\nto build vLLM")\n',
            r"GCC >= 99 is required to build vLLM \(CMakeLists.txt:\d+\)",
        ),
        ("add_library(x MODULE nowhere.c)\n", "Cannot find source file: nowhere.c"),
    ],
)
def test_failed_configure_is_reported_and_removes_no_object(
    own: Site, text: str, sentence: str
) -> None:
    build = build_of(own)
    kept = build / "CMakeFiles" / "_C.dir" / "csrc" / "c.c.o"
    kept.parent.mkdir(parents=True)
    kept.write_text("an hour's work")
    put(own.tree, {"CMakeLists.txt": TOP + text})
    with pytest.raises(BuildError, match=sentence) as caught:
        own.configure()
    assert caught.value.hint
    assert kept.read_text() == "an hour's work"
    assert due(own) == "it is not configured yet"


@pytest.mark.parametrize(
    ("text", "lacked"),
    [
        ("project(own NONE)\ninclude(${CMAKE_CURRENT_SOURCE_DIR}/CUDA.cmake)\n", "CUDA.cmake"),
        ("project(own NONE)\ninclude(customConfigs.cmake)\n", "customConfigs.cmake"),
        ("", "flashy/interface.py"),
    ],
)
def test_incomplete_folder_of_an_external_project_is_named_with_its_variable_and_what_it_lacks(
    own: Site, text: str, lacked: str
) -> None:
    mine = own.root / "mine"
    put(mine, {"CMakeLists.txt": f"cmake_minimum_required(VERSION 3.26)\n{text}"})
    with pytest.raises(BuildError) as caught:
        own.configure(sources=own.provide(FLASHY_SRC_DIR=str(mine)))
    assert f"cannot configure with flashy from {mine} (FLASHY_SRC_DIR)" in caught.value.message
    assert lacked in caught.value.message
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(f"unset FLASHY_SRC_DIR    fetches flashy {TAG[:12]}")
    # Without the variable nothing of the folder is used.
    assert after_typing(caught.value.hint, FLASHY_SRC_DIR=str(mine)) == {}
    own.configure()
    assert due(own) is None
    assert "doctor" not in caught.value.hint


def test_incomplete_project_in_the_cache_is_named_with_the_command_that_fetches_it_again(
    own: Site,
) -> None:
    place = own.settings().cache / "externals" / "flashy" / TAG
    put(place, {"CMakeLists.txt": "include(${CMAKE_CURRENT_SOURCE_DIR}/CUDA.cmake)\n"})
    (external,) = externals.declared(own.tree, "cpu")
    with pytest.raises(BuildError, match="with flashy from .*CUDA.cmake") as caught:
        own.configure(sources={external.variable: str(place)})
    assert caught.value.hint == f"rm -rf {place}    and the same command fetches it again"


def test_users_cmake_arguments_come_last(own: Site) -> None:
    own.configure(CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Debug -DMINE=a;b")
    cache = (build_of(own) / "CMakeCache.txt").read_text()
    assert (
        "CMAKE_BUILD_TYPE:STRING=Debug" in cache or "CMAKE_BUILD_TYPE:UNINITIALIZED=Debug" in cache
    )
    assert "MINE:UNINITIALIZED=a;b" in cache
    assert "JOB_POOL" not in cache
    record = json.loads((build_of(own) / project.RECORD).read_text())
    assert set(record["read"]) >= {"CMakeLists.txt", "cmake/utils.cmake", "csrc/generate.py"}
    assert not any(os.path.isabs(path) for path in record["written"])
