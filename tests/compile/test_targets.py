"""Targets that a change reaches: compared with a compiler's own -M on random include graphs, and
with real ninja, CMake and git.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.compile.trees import Site, put, written
from tests.fuzz.strategies import fuzz
from tests.repo.conftest import commit, sh_git
from workspace.compile import targets
from workspace.compile.cmake_inputs import folder
from workspace.compile.includes import Scan
from workspace.compile.project import Project, Target, Unit
from workspace.core.errors import SettingsError
from workspace.repo.git import Git

NINJA = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
NAMES = ("a.h", "common.h", "d.inl", "sub/e.h", "x y.h")
FOLDERS = ("csrc", "csrc/moe", "csrc/moe/deep", "inc", "../outside")
FORMS = (
    "#include {0}",
    "#include{0}",
    "  #\tinclude /* c */ {0} // rest",
    "%:include {0}",
    "/* of\n lines */ #include {0}",
    "#incl\\\nude \\\n {0}",
    "#include {0}\r",
    "#import {0}",
    "#include_next {0}",
    "#define H {0}\n#include H",
    "#define A(x) <x>\n#include A({1})",
    "#define S(x) #x\n#define T(x) S(x)\n# /* of\n lines */ include T({1})",
    "#if __has_include({0})\n#include {0}\n#endif",
    'const char* s = "/*";\n#include {0}\nconst char* t = "*/";',
)


@dataclass(frozen=True)
class Graph:
    """Files by path with their lines, links, folders for -I, and a folder for CPATH, which no
    project names.
    """

    files: Mapping[str, str]
    links: Mapping[str, str]
    folders: tuple[str, ...]
    hidden: str | None


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    folders = tuple(draw(st.lists(st.sampled_from(FOLDERS), max_size=3, unique=True)))
    hidden = draw(st.none() | st.sampled_from(("csrc", "csrc/moe")))
    places = st.tuples(
        st.sampled_from(FOLDERS[: -1 if hidden else None]), st.sampled_from(NAMES)
    ).map("/".join)
    paths = draw(st.lists(places, min_size=1, max_size=7, unique=True))
    links = {
        path: draw(st.sampled_from(paths[:1])) for path in paths[1:] if draw(st.integers(0, 9)) == 0
    }
    spelled = st.tuples(
        st.sampled_from(paths),
        st.sampled_from((".", *folders, *((hidden,) if hidden else ()))),
        st.sampled_from(FORMS),
        st.booleans(),
    )
    files = {}
    for path in ("csrc/moe/unit.cpp", *(path for path in paths if path not in links)):
        lines = []
        for target, place, form, is_quoted in draw(st.lists(spelled, max_size=3)):
            name = os.path.relpath(target, os.path.dirname(path) if place == "." else place)
            lines.append(form.format(f'"{name}"' if is_quoted else f"<{name}>", name))
        files[path] = "\n".join(("#pragma once", *lines, ""))
    return Graph(files, links, folders, hidden)


def named_by_compiler(tree: Path, graph: Graph) -> set[str]:
    """Return the files of the tree that g++ -M names, links resolved. -MG: ignore missing files."""
    argv = [
        "g++",
        "-M",
        "-MG",
        "-w",
        "-fmax-include-depth=40",
        *(f"-I{tree / place}" for place in graph.folders),
        str(tree / "csrc/moe/unit.cpp"),
    ]
    environment = {"PATH": os.environ["PATH"]} | (
        {"CPATH": str(tree / graph.hidden)} if graph.hidden else {}
    )
    output = subprocess.run(
        argv, env=environment, capture_output=True, text=True, check=True
    ).stdout
    names = [
        name.replace("\\ ", " ")
        for name in re.findall(r"(?:\\.|\S)+", output.replace("\\\n", " ").split(":", 1)[1])
    ]
    return {
        os.path.relpath(real, tree)
        for name in names
        if os.path.isfile(real := os.path.realpath(name)) and real.startswith(f"{tree}/")
    }


@fuzz(fast=25, deep=4000)
@given(graphs())
def test_scan_finds_every_file_that_a_compiler_includes(graph: Graph) -> None:
    with tempfile.TemporaryDirectory() as place:
        tree = Path(os.path.realpath(place)) / "tree"
        put(tree, graph.files)
        for path, target in graph.links.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).symlink_to(os.path.relpath(tree / target, (tree / path).parent))
        for name in named_by_compiler(tree, graph):
            found = Scan(tree, [name]).changed_dependencies(["csrc/moe/unit.cpp"], graph.folders)[
                "csrc/moe/unit.cpp"
            ]
            assert name in found, f"{name} is included, but was not found"


def test_every_spelling_of_an_include_is_found_beside_and_by_folder(tmp_path: Path) -> None:
    spelled = [
        (form, name, place)
        for form in FORMS
        for name in ('"sub/e.h"', "<sub/e.h>")
        for place in ("moe", "other")
        if place == "other" or name[0] == '"'
    ]
    units = {
        f"csrc/{place}/u{number}.cpp": form.format(name, name[1:-1]) + "\n"
        for number, (form, name, place) in enumerate(spelled)
    }
    put(tmp_path, units | {"csrc/moe/sub/e.h": ""})
    argv = [
        "g++",
        "-M",
        "-w",
        f"-I{tmp_path / 'inc'}",
        f"-I{tmp_path / 'csrc/moe'}",
        *(str(tmp_path / unit) for unit in units),
    ]
    output = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert output.count("/csrc/moe/sub/e.h") == len(units)
    found = Scan(tmp_path, ["csrc/moe/sub/e.h"]).changed_dependencies(units, ("inc", "csrc/moe"))
    assert [text for unit, text in units.items() if not found[unit]] == []


def test_link_counts_as_its_target_and_finds_the_files_beside_itself(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "csrc/u.cu": '#include "link/x.h"\n',
            "real/x.h": '#include "y.h"\n',
            "csrc/link/y.h": "",
            "real/y.h": "",
            "csrc/v.cu": '#include "dir/x.h"\n',
        },
    )
    (tmp_path / "csrc/link/x.h").symlink_to("../../real/x.h")
    (tmp_path / "csrc/dir").symlink_to("../real")
    assert scanned(tmp_path, ["real/x.h", "csrc/link/x.h", "csrc/link/y.h"]) == {
        "real/x.h",
        "csrc/link/x.h",
        "csrc/link/y.h",
    }
    assert scanned(tmp_path, ["real/x.h", "real/y.h", "csrc/link/y.h"], "csrc/v.cu") == {
        "real/x.h",
        "real/y.h",
    }


def test_name_in_several_include_folders_may_be_any_of_them(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "csrc/u.cu": "#include <a.h>\n#include_next <b.h>\n",
            "one/a.h": "",
            "two/a.h": "",
            "csrc/b.h": "",
            "two/b.h": "",
        },
    )
    assert scanned(tmp_path, ["one/a.h", "two/a.h", "two/b.h"], folders=("one", "two")) == {
        "one/a.h",
        "two/a.h",
        "two/b.h",
    }


def scanned(
    tree: Path,
    changed: Sequence[str],
    source: str = "csrc/u.cu",
    folders: Sequence[str] = ("csrc",),
) -> frozenset[str]:
    return Scan(tree, changed).changed_dependencies([source], folders)[source]


def test_file_that_no_unit_includes_reaches_no_unit(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "csrc/u.cu": '#include "a.h"\n#include <vector>\n',
            "csrc/a.h": "",
            "csrc/b.h": '#include "a.h"\n',
            "csrc/v/u.cu": "",
        },
    )
    assert scanned(tmp_path, ["csrc/a.h", "csrc/b.h", "csrc/v/u.cu"]) == {"csrc/a.h"}


def test_file_beside_the_source_hides_the_one_in_an_include_folder(tmp_path: Path) -> None:
    put(
        tmp_path,
        {"csrc/moe/u.cu": '#include "common.h"\n', "csrc/moe/common.h": "", "csrc/common.h": ""},
    )
    assert scanned(tmp_path, ["csrc/common.h"], "csrc/moe/u.cu") == frozenset()
    assert scanned(tmp_path, ["csrc/moe/common.h"], "csrc/moe/u.cu") == {"csrc/moe/common.h"}


def test_deleted_header_reaches_sources_that_name_it_or_now_find_another(
    tmp_path: Path,
) -> None:
    put(
        tmp_path,
        {
            "csrc/moe/u.cu": '#include "common.h"\n',
            "csrc/common.h": "",
            "csrc/v.cu": '#include "gone.h"\n',
        },
    )
    assert scanned(tmp_path, ["csrc/moe/common.h"], "csrc/moe/u.cu") == {"csrc/moe/common.h"}
    assert scanned(tmp_path, ["csrc/gone.h"], "csrc/v.cu") == {"csrc/gone.h"}


def test_include_by_a_macro_may_be_any_changed_file_and_comments_are_no_includes(
    tmp_path: Path,
) -> None:
    put(
        tmp_path,
        {
            "csrc/u.cu": "#include WHAT(EVER)\n",
            "csrc/v.cu": "// we include the tail, and\n/* # include\n * nothing, or import it */\n",
            "csrc/x.h": "",
        },
    )
    assert scanned(tmp_path, ["csrc/x.h"]) == {"csrc/x.h"}
    assert scanned(tmp_path, ["csrc/x.h"], "csrc/v.cu") == frozenset()


def test_macro_that_builds_a_name_from_its_argument_is_resolved(
    tmp_path: Path,
) -> None:
    # CUTLASS names the toolkit's C++ headers so, and nearly every unit includes it.
    shared = "#define STD(header) <cuda/std/header>  // of the toolkit\n"
    put(
        tmp_path,
        {
            "csrc/u.cu": '#include "ext/a.h"\n#include "ext/std.h"\n',
            "csrc/ext/std.h": shared,
            "csrc/ext/a.h": "#include STD(cassert)\n",
        },
    )
    put(
        tmp_path,
        {"csrc/x.h": "", "csrc/cuda/std/cassert": '#include "y.h"\n', "csrc/cuda/std/y.h": ""},
    )
    assert scanned(tmp_path, ["csrc/x.h"]) == frozenset()
    assert scanned(tmp_path, ["csrc/x.h", "csrc/cuda/std/y.h"]) == {"csrc/cuda/std/y.h"}
    # If a second definition is no name, the include is unknown.
    for further in ("#define STD(header) NAMED(header)\n", "#define STD(a, b) <a/b>\n"):
        put(tmp_path, {"csrc/ext/std.h": shared + further})
        assert scanned(tmp_path, ["csrc/x.h"]) == {"csrc/x.h"}, further


def test_name_in_an_unknown_folder_is_matched_by_its_last_parts(
    tmp_path: Path,
) -> None:
    put(
        tmp_path,
        {
            "csrc/u.cu": "#include <core/math.hpp>\n",
            "csrc/deep/core/math.hpp": '#include "x.h"\n',
            "csrc/deep/core/x.h": "",
            "csrc/math.hpp": "",
        },
    )
    assert scanned(tmp_path, ["csrc/deep/core/x.h", "csrc/math.hpp"]) == {"csrc/deep/core/x.h"}


def test_unreadable_source_may_include_every_changed_file(tmp_path: Path) -> None:
    put(tmp_path, {"csrc/x.h": ""})
    assert scanned(tmp_path, ["csrc/x.h"], "csrc/generated.cu") == {"csrc/x.h"}


# A project as the reader returns it, without CMake.


def target(name: str, *sources: str, **fields: object) -> Target:
    units = tuple(Unit(source, f"CMakeFiles/{name}.dir/{source}.o", "CXX") for source in sources)
    return replace(
        Target(name, "MODULE_LIBRARY", units, (f"{name}.so",), ("vllm",), ("csrc",), "recipe", ()),
        **fields,
    )


PROJECT = Project(
    (
        target(
            "_C",
            "csrc/a.cu",
            "csrc/marlin/marlin.cu",
            "csrc/marlin/sm80_kernel_1.cu",
            depends=("base",),
        ),
        target("_moe_C", "csrc/moe/m.cu"),
        target("base", "csrc/base.cpp", kind="STATIC_LIBRARY", installs=()),
        target("_deep_C", kind="UTILITY", includes=()),
    )
)
SOURCES = {
    "CMakeLists.txt": "",
    "cmake/utils.cmake": "",
    "cmake/external_projects/deep.cmake": "add_custom_target(_deep_C)\n",
    "csrc/a.cu": '#include "common.h"\n',
    "csrc/base.cpp": "",
    "csrc/common.h": "",
    "csrc/marlin/marlin.cu": '#include "selector.h"\n',
    "csrc/marlin/sm80_kernel_1.cu": "",
    "csrc/marlin/generate.py": 'import helper_of_generators\nopen("selector.h")\n',
    "csrc/python/helper_of_generators.py": "",
    "csrc/moe/m.cu": '#include "../marlin/selector.h"\n',
    "csrc/rocm/attention.cu": "",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    put(tmp_path / "tree", SOURCES)
    return tmp_path / "tree"


def follow(tree: Path, *changed: str, pinned: Project | None = PROJECT) -> dict[str, str]:
    return {
        one.target: one.reason
        for one in targets.follow(
            tree, changed, PROJECT, build=tree.parent / "build", pinned=pinned
        ).targets
    }


def test_reasons_name_the_file_and_the_unit_that_includes_it(tree: Path) -> None:
    assert follow(tree, "csrc/a.cu") == {"_C": "csrc/a.cu changed"}
    assert follow(tree, "csrc/common.h") == {"_C": "csrc/common.h changed, included by csrc/a.cu"}
    assert follow(tree, "csrc/common.h", "csrc/a.cu") == {
        "_C": "csrc/a.cu changed (and 1 more file)"
    }
    (tree / "csrc/moe/m.cu").unlink()
    assert follow(tree, "csrc/moe/m.cu") == {"_moe_C": "csrc/moe/m.cu deleted"}


def test_static_library_reaches_the_targets_that_link_it(tree: Path) -> None:
    (found,) = targets.follow(tree, ["csrc/base.cpp"], PROJECT, build=tree, pinned=PROJECT).targets
    assert (found.target, found.reason, len(found.units), found.is_complete) == (
        "_C",
        "csrc/base.cpp changed",
        4,
        True,
    )


def test_generator_reaches_the_sources_it_writes_and_their_includers(tree: Path) -> None:
    found = follow(tree, "csrc/marlin/generate.py")
    assert found["_C"].startswith("csrc/marlin/generate.py changed, which writes csrc/marlin/")
    assert found["_moe_C"] == "csrc/marlin/generate.py changed, which writes csrc/marlin/selector.h"
    assert set(follow(tree, "csrc/python/helper_of_generators.py")) == {"_C", "_moe_C"}


def test_change_that_reaches_no_target_is_reported(tree: Path) -> None:
    changed = [
        "csrc/rocm/attention.cu",
        "csrc/gone.h",
        "csrc/lonely.cuh",
        "csrc/README.md",
        "CMakeLists.txt",
        "csrc/python/none.py",
    ]
    put(tree, {"csrc/lonely.cuh": ""})
    found = targets.follow(tree, changed, PROJECT, build=tree, pinned=PROJECT)
    assert found == targets.Reach((), tuple(sorted(changed)))


def test_cmake_files_are_judged_by_what_the_pin_would_build(tree: Path) -> None:
    assert set(follow(tree, "CMakeLists.txt", pinned=None)) == {"_C", "_moe_C", "_deep_C"}
    before = Project(
        (
            replace(PROJECT.targets[0], units=PROJECT.targets[0].units[:-1]),
            PROJECT.targets[1],
            PROJECT.targets[2],
            PROJECT.targets[3],
        )
    )
    assert follow(tree, "CMakeLists.txt", pinned=before) == {
        "_C": "CMakeLists.txt changed: the target is compiled or linked differently"
    }
    assert (
        follow(tree, "cmake/utils.cmake", pinned=Project(before.targets[1:]))["_C"]
        == "cmake/utils.cmake changed: the target is new"
    )
    other_base = Project(
        (*PROJECT.targets[:2], replace(PROJECT.targets[2], recipe="other"), PROJECT.targets[3])
    )
    assert set(follow(tree, "CMakeLists.txt", pinned=other_base)) == {"_C"}


def test_file_of_an_external_project_reaches_its_targets_without_a_changed_recipe(
    tree: Path,
) -> None:
    assert follow(tree, "cmake/external_projects/deep.cmake") == {
        "_deep_C": "cmake/external_projects/deep.cmake changed"
    }
    assert set(follow(tree, "cmake/patches/torch.patch")) == {"_C", "_moe_C", "_deep_C"}


def test_requested_target_must_exist(tree: Path) -> None:
    assert [
        one.target
        for one in targets.requested((), "torch 2.13.0 → 2.14.0", tree, PROJECT, build=tree)
    ] == ["_C", "_moe_C", "_deep_C"]
    with pytest.raises(
        SettingsError,
        match="--target base: CMake builds no such target here; it has _C, _moe_C, _deep_C",
    ):
        targets.requested(("_C", "base"), "--target", tree, PROJECT, build=tree)


def test_several_reasons_keep_the_first_of_each_target(tree: Path) -> None:
    found = targets.follow(tree, ["csrc/a.cu"], PROJECT, build=tree, pinned=PROJECT).targets
    more = targets.requested(("_moe_C", "_C"), "--target", tree, PROJECT, build=tree)
    assert {one.target: one.reason for one in targets.merged((found, more))} == {
        "_C": "csrc/a.cu changed",
        "_moe_C": "--target",
    }


# Real ninja, real CMake.


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site.make(tmp_path_factory.mktemp("reach"))


@pytest.fixture(scope="module")
def compiled(site: Site) -> tuple[Path, Project]:
    """The small tree, configured and `spinloop` compiled."""
    made = site.configure()
    build = folder(site.layout, site.inputs())
    assert site.ninja(build, "spinloop").returncode == 0
    return build, made


def test_ninja_state_gives_the_units_of_a_change_and_their_dependencies(
    site: Site, compiled: tuple[Path, Project]
) -> None:
    build, project = compiled

    def output(*changed: str) -> dict[str, tuple[int, bool]]:
        return {
            one.target: (len(one.units), one.is_complete)
            for one in targets.follow(
                site.tree, changed, project, build=build, pinned=project
            ).targets
        }

    # The first change in a target compiles all its units, and what CMake builds before it; a
    # compiled target has no unit to compile until its file changes.
    assert output("csrc/c.c") == {"_C": (5, True)}
    assert output("csrc/include/wide.h") == {"_C": (5, True)}
    assert output("csrc/spinloop.c") == {"spinloop": (0, False)}
    with written(
        site.tree / "csrc/spinloop.c",
        '#include "include/wide.h"\nint spin(void) { return WIDTH; }\n',
    ):
        assert output("csrc/spinloop.c", "csrc/include/wide.h") == {
            "_C": (5, True),
            "spinloop": (1, True),
        }
        assert site.ninja(build, "spinloop").returncode == 0
        assert output("csrc/include/wide.h") == {"_C": (5, True), "spinloop": (0, False)}
    # A branch that the compiler skipped is no include once it has compiled.
    with written(
        site.tree / "csrc/spinloop.c",
        '#if 0\n#include "include/wide.h"\n#endif\nint spin(void) { return 1; }\n',
    ):
        assert output("csrc/include/wide.h") == {"_C": (5, True), "spinloop": (1, True)}
        assert site.ninja(build, "spinloop").returncode == 0
        assert output("csrc/include/wide.h") == {"_C": (5, True)}


def test_reading_the_ninja_state_writes_no_file(site: Site, compiled: tuple[Path, Project]) -> None:
    build, project = compiled
    before = {path: path.stat().st_mtime_ns for path in build.rglob("*")}
    targets.follow(site.tree, ["csrc/spinloop.c"], project, build=build, pinned=project)
    assert {path: path.stat().st_mtime_ns for path in build.rglob("*")} == before


@pytest.fixture
def damaged(compiled: tuple[Path, Project], tmp_path: Path) -> Path:
    shutil.copytree(compiled[0], tmp_path / "build", symlinks=True)
    return tmp_path / "build"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("build.ninja", "rubbish\n"),
        ("CMakeCache.txt", ""),
        ("CMakeCache.txt", "CMAKE_MAKE_PROGRAM:FILEPATH=/nowhere/ninja\n"),
        (".ninja_deps", "# ninjadeps\n"),
    ],
)
def test_damaged_build_directory_costs_all_units_of_a_target_and_no_traceback(
    site: Site, compiled: tuple[Path, Project], damaged: Path, name: str, content: str
) -> None:
    (damaged / name).write_text(content)
    (found,) = targets.follow(
        site.tree, ["csrc/spinloop.c"], compiled[1], build=damaged, pinned=compiled[1]
    ).targets
    assert (found.target, len(found.units), found.is_complete) == ("spinloop", 1, True)


def test_ninja_state_is_unknown_if_cmake_has_to_run_first(
    site: Site, compiled: tuple[Path, Project], damaged: Path
) -> None:
    assert targets.read_ninja_state(damaged, site.tree, compiled[1].targets) is not None
    again = (
        "rule again\n  command = true\n  description = Re-running CMake...\n  generator = 1\nbuild"
        " build.ninja: again never\nbuild never: phony\n"
    )
    (damaged / "build.ninja").write_text((damaged / "build.ninja").read_text() + again)
    assert targets.read_ninja_state(damaged, site.tree, compiled[1].targets) is None


# Real git.


def test_changed_files_are_commits_edits_and_new_files_among_compiled_inputs(
    tmp_path: Path,
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    sh_git(work, "init", "--quiet")
    plain = {
        "csrc/a.cu": "1\n",
        "csrc/b.h": "1\n",
        "csrc/gone.h": "1\n",
        "cmake/x.cmake": "",
        "include/out.h": "1\n",
        "vllm/x.py": "",
        "tests/t.py": "",
    }
    base = commit(work, "base", {**plain, "csrc/same.h": "1\n", ".gitignore": "sm80_*\n"})
    git = Git(work)
    assert targets.changed_files(git, base) == ()
    commit(work, "own", {"csrc/a.cu": "2\n", "vllm/x.py": "2\n"})
    put(
        work,
        {
            "csrc/b.h": "2\n",
            "include/out.h": "2\n",
            "csrc/new.cuh": "",
            "csrc/sm80_1.cu": "",
            "tests/t.py": "2\n",
            "vllm/other.h": "",
            "CMakeLists.txt": "",
        },
    )
    (work / "csrc/gone.h").unlink()
    os.utime(work / "csrc/same.h", ns=(1, 1))
    os.rename(work / "cmake/x.cmake", work / "cmake/y.cmake")
    expected = (
        "cmake/x.cmake",
        "cmake/y.cmake",
        "csrc/a.cu",
        "csrc/b.h",
        "csrc/gone.h",
        "csrc/new.cuh",
        "include/out.h",
    )
    assert targets.changed_files(git, base) == expected
