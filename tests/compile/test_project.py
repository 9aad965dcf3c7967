"""The project from a real configure, and the extensions from the lines of setup.py."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.compile.trees import TOP, Site, put, written
from workspace.compile import project
from workspace.compile.cmake_inputs import folder
from workspace.compile.project import Project

SETUP = """
import torch
ext_modules = []
if _is_cuda() or _is_hip():
    ext_modules.append(CMakeExtension(name="vllm.cumem_allocator"))
    ext_modules.append(
        CMakeExtension(name="vllm.vllm_flash_attn._vllm_fa3_C", optional=True)
    )
ext_modules.append(CMakeExtension("vllm.odd", optional=False))
ext_modules.append(CMakeExtension(name="vllm.cumem_allocator"))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    made = Site.make(tmp_path_factory.mktemp("project"))
    made.configure()
    return made


@pytest.fixture(scope="module")
def found(site: Site) -> Project:
    read = project.read(folder(site.layout, site.inputs()), site.tree)
    assert read is not None
    return read


def target(found: Project, name: str) -> project.Target:
    return next(target for target in found.targets if target.name == name)


def test_targets_have_units_places_and_dependencies(found: Project) -> None:
    made = target(found, "_C")
    assert made.kind == "MODULE_LIBRARY"
    assert [unit.source for unit in made.units] == [
        "csrc/c.c",
        "csrc/generated/kernel_a.c",
        "csrc/generated/kernel_b.c",
    ]
    assert {unit.language for unit in made.units} == {"C"}
    assert made.artifacts == ("_C.abi3.so",)
    assert made.installs == ("vllm",)
    assert "csrc/include" in made.includes
    assert made.depends == ("_flashy_C",)
    assert target(found, "flashy_py").kind == "UTILITY"


def test_objects_are_targets_of_ninja(site: Site, found: Project) -> None:
    unit = target(found, "_C").units[0]
    build = folder(site.layout, site.inputs())
    assert site.ninja(build, unit.object).returncode == 0
    assert (build / unit.object).is_file()


def test_messages_about_kernels_that_are_not_built_are_kept(found: Project) -> None:
    assert found.not_built == (
        "Not building Machete kernels as no compatible archs found in CUDA target architectures",
    )


def test_recipe_depends_on_flags_and_not_on_the_build_directory(site: Site, found: Project) -> None:
    with written(site.tree / "CMakeLists.txt", TOP.replace("WIDE=1", "WIDE=2")):
        there = site.configure(site.inputs(pin="v2"))
    differing = {
        each.name for each in there.targets if each.recipe != target(found, each.name).recipe
    }
    assert differing == {"_C"}


def test_recipe_is_the_same_for_the_pins_tree_whose_path_sorts_before_the_external_sources(
    site: Site,
) -> None:
    mixed = TOP + "target_sources(_flashy_C PRIVATE csrc/c.c csrc/spinloop.c)\n"
    pinned = site.layout.builds / "pinned" / "0123456789ab"
    with written(site.tree / "CMakeLists.txt", mixed):
        shutil.copytree(site.tree, pinned)
        external = next(iter(site.provide().values()))
        assert str(pinned) < external < str(site.tree)
        here = site.configure(site.inputs(pin="v3"))
        there = site.configure(replace(site.inputs(pin="v3"), place=str(pinned)))
    assert len(target(here, "_flashy_C").units) == 4
    assert target(here, "_flashy_C").recipe == target(there, "_flashy_C").recipe


@pytest.mark.parametrize("damage", ["index", "target", "record", "commands", "nothing there"])
def test_incomplete_reply_is_none(site: Site, tmp_path: Path, damage: str) -> None:
    build = tmp_path / "build"
    if damage != "nothing there":
        shutil.copytree(folder(site.layout, site.inputs()), build)
        reply = build / ".cmake" / "api" / "v1" / "reply"
        victim = {
            "index": next(reply.glob("index-*")),
            "target": next(reply.glob("target-_C-*")),
            "record": build / project.RECORD,
        }
        path = victim.get(damage, build / "compile_commands.json")
        path.write_bytes(path.read_bytes()[:40])
    assert project.read(build, site.tree) is None


def test_reply_of_another_form_is_none(site: Site, tmp_path: Path) -> None:
    build = tmp_path / "build"
    shutil.copytree(folder(site.layout, site.inputs()), build)
    record = build / project.RECORD
    for text in ("[]", "7", json.dumps({"sources": [], "not_built": 3}), "[" * 5000):
        record.write_text(text)
        assert project.read(build, site.tree) is None


def test_extensions_are_read_from_setup_without_running_it(tmp_path: Path) -> None:
    put(tmp_path, {"setup.py": SETUP})
    assert project.extensions(tmp_path) == ("cumem_allocator", "_vllm_fa3_C", "odd")


@pytest.mark.parametrize("text", ["", "\0", "ext_modules = f()"])
def test_setup_that_lists_nothing_readable_lists_nothing(tmp_path: Path, text: str) -> None:
    put(tmp_path, {"setup.py": text})
    assert project.extensions(tmp_path) == ()
    assert project.extensions(tmp_path / "nowhere") == ()
