"""Differences between two trees, and those that matter to this user on this machine."""

import datetime
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.repo.conftest import commit, sh_git, write
from workspace.bump import changes, forecast
from workspace.bump.changes import Change, Comparison
from workspace.core import settings as settings_module
from workspace.core.paths import Layout
from workspace.machine import run_environment
from workspace.repo.checkout import Kind
from workspace.repo.git import Git, history
from workspace.repo.pins import Pin
from workspace.repo.upstream import Candidate
from workspace.server import flags

PIN = Pin("vllm", "v1.0.0", "1.0.0", "0" * 40, "https://a.invalid", None, {})
NOW = datetime.datetime.now(datetime.UTC)


class Trees:
    """Two trees in a repository, and a user's files beside them."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root / "clone")
        self.layout.root.mkdir()
        self.work = root / "work"
        self.work.mkdir()
        sh_git(self.work, "init", "--quiet")
        self.shell: dict[str, str] = {}
        self.candidate = Candidate(PIN, "", Kind.GIT, NOW - datetime.timedelta(days=30), self.work)

    def between(
        self, old: dict[str, str], new: dict[str, str], *, touched: tuple[str, ...] = ()
    ) -> list[Change]:
        before = commit(self.work, "old", {"keep": "", **old})
        for name in old:
            (self.work / name).unlink()
        after = commit(self.work, "new", {"other": "", **new})
        git = Git(self.work)
        differing = history.changed(git, before, after)
        moved = history.renames(
            git, (before, after), [path for path in touched if path in differing], differing
        )
        settings = settings_module.load(
            self.layout, environ={"PATH": os.environ["PATH"], **self.shell}
        )
        compared = Comparison(PIN, self.candidate, differing, moved, touched)
        return list(changes.work_out(git, self.layout, settings, compared))

    def texts(self, topic: str, old: dict[str, str], new: dict[str, str]) -> list[str]:
        return [
            forecast.text_of(change) for change in self.between(old, new) if change.topic == topic
        ]


@pytest.fixture
def trees(tmp_path: Path) -> Trees:
    return Trees(tmp_path)


def both(path: str, old: str, new: str) -> tuple[dict[str, str], dict[str, str]]:
    return {path: old}, {path: new}


def test_requirements_added_removed_and_changed_are_named_with_their_files(trees: Trees) -> None:
    old = {
        "requirements/common.txt": "a\nb==1 # why\nsame>=1\n",
        "requirements/cuda.txt": "-r common.txt\ntorch==2.13.0\n",
    }
    new = {
        "requirements/common.txt": "b == 2\nsame >= 1 # else\nC_c[x]>=1,<2\n",
        "requirements/cuda.txt": "-r common.txt\ntorch==2.14.0\n",
    }
    assert trees.texts("requirement", old, new) == [
        "torch ==2.13.0 → ==2.14.0  (requirements/cuda.txt)",
        "a any version, gone  (requirements/common.txt)",
        "b ==1 → ==2  (requirements/common.txt)",
        "c-c [x]<2,>=1, new  (requirements/common.txt)",
    ]


def test_same_change_in_several_files_is_one_line(trees: Trees) -> None:
    old = {
        "requirements/build/cuda.txt": "torch==1\n",
        "pyproject.toml": '[build-system]\nrequires = ["torch == 1"]\n',
    }
    new = {
        "requirements/build/cuda.txt": "torch==2\n",
        "pyproject.toml": '[build-system]\nrequires = ["torch == 2"]\n',
    }
    assert trees.texts("requirement", old, new) == [
        "torch ==1 → ==2  (pyproject.toml, requirements/build/cuda.txt)"
    ]


def test_parameters_that_no_check_of_the_smoke_covers_are_named(trees: Trees) -> None:
    old, new = both(
        "vllm/sampling_params.py",
        "class SamplingParams:\n    n: int = 1\n    top_k: int = 0\n    skip_clone: bool = False\n",
        "class SamplingParams:\n    n: int = 1\n    mirostat: float = 0.0\n    _own: int = 0\n",
    )
    new["vllm/config/cache.py"] = (
        "class CacheConfig:\n    enable_prefix_caching: bool = True\n    evict_early: bool = True\n"
        "    off: bool = False\n    chosen: bool | None = None\n    depth: int = True\n"
    )
    unlisted = "checks/coverage.toml does not list it"
    assert trees.texts("smoke", old, new) == [
        f"SamplingParams.mirostat vllm/sampling_params.py, new; {unlisted}",
        "SamplingParams.skip_clone vllm/sampling_params.py, gone",
        "SamplingParams.top_k vllm/sampling_params.py, gone; judged by sampling.filters",
        f"CacheConfig.chosen vllm/config/cache.py, new; {unlisted}",
        (
            "CacheConfig.enable_prefix_caching vllm/config/cache.py, new; judged by cache.blocks,"
            " cache.keys, consistency.prefix"
        ),
        f"CacheConfig.evict_early vllm/config/cache.py, new; {unlisted}",
    ]


@pytest.mark.parametrize("moved", ["", "class Other: pass\n", "class SamplingParams(:\n"])
def test_class_of_parameters_that_is_gone_is_one_line(trees: Trees, moved: str) -> None:
    known = "class SamplingParams:\n    n: int = 1\n    top_k: int = 0\n"
    old, new = both("vllm/sampling_params.py", known, moved)
    assert trees.texts("smoke", old, new) == [
        "SamplingParams vllm/sampling_params.py, gone; checks/coverage.toml still lists it"
    ]


def test_requirements_of_other_machines_pythons_and_devices_do_not_count(trees: Trees) -> None:
    old, new = both(
        "requirements/common.txt",
        "a==1; sys_platform == 'win32'\nb==1; python_version < '3.5'\n",
        "b==2; python_version < '3.5'\n",
    )
    assert (
        trees.texts(
            "requirement",
            old | {"requirements/rocm.txt": "torch==1\n"},
            new | {"requirements/rocm.txt": "torch==2\n"},
        )
        == []
    )
    # The built environment's Python decides, not the one that runs this.
    assert [
        *changes.requirements_of(
            "requirements/common.txt", "b==1; python_version < '3.5'\n", python="3.4"
        )
    ] == [("b", "==1")]


def test_options_addresses_and_what_is_no_requirement_are_compared_as_they_stand(
    trees: Trees,
) -> None:
    old, new = both(
        "requirements/cpu.txt",
        "--extra-index-url https://a.invalid\n!!\n",
        "--extra-index-url https://b.invalid\nx @ https://c.invalid/x.whl\n",
    )
    assert trees.texts("requirement", old, new) == [
        "!! , gone  (requirements/cpu.txt)",
        "--extra-index-url https://a.invalid → https://b.invalid  (requirements/cpu.txt)",
        "x https://c.invalid/x.whl, new  (requirements/cpu.txt)",
    ]


@pytest.mark.parametrize(
    "broken",
    [
        "[build-system\n",
        "[build-system]\nrequires = 3\n",
        "build-system = 1\n",
        "\x00",
        "a = " + "[" * 9000,
    ],
)
def test_pyproject_that_is_none_has_no_requirements(trees: Trees, broken: str) -> None:
    old, new = both("pyproject.toml", broken, '[build-system]\nrequires = ["a"]\n')
    assert trees.texts("requirement", old, new) == ["a any version, new  (pyproject.toml)"]


def test_least_versions_of_tools(trees: Trees) -> None:
    text = (
        "cmake_minimum_required(VERSION {})\n# cmake_minimum_required(VERSION"
        ' 1)\nif(CMAKE_CXX_COMPILER_VERSION VERSION_LESS "{}")\n'
    )
    old = {
        "CMakeLists.txt": text.format("3.26", "11.3"),
        "pyproject.toml": '[project]\nrequires-python = ">=3.10"\n',
    }
    new = {
        "CMakeLists.txt": text.format("3.26", "13"),
        "pyproject.toml": '[project]\nrequires-python = ">=3.11"\n',
    }
    assert trees.texts("minimum", old, new) == [
        "C++ compiler 11.3 → 13  (CMakeLists.txt)",
        "Python >=3.10 → >=3.11  (pyproject.toml)",
    ]


def test_external_projects_are_named_by_tag_through_variables(trees: Trees) -> None:
    text = 'if(R)\n  set(TAG "{}")\nelse()\n  set(TAG "v3.5.1")\nendif()\n'
    text += (
        "FetchContent_Declare(\n  Kernels\n  GIT_REPOSITORY https://x\n  GIT_TAG ${{TAG}} # GIT_TAG"
        " no\n)\n"
    )
    old, new = both("cmake/external_projects/a.cmake", text.format("1" * 40), text.format("2" * 40))
    populate = (
        "FetchContent_Populate(acl\n  GIT_TAG        {}\n)\nFetchContent_Declare(local SOURCE_DIR"
        " x)\n"
    )
    old, new = (
        old | {"cmake/cpu_extension.cmake": populate.format("v1")},
        new | {"cmake/cpu_extension.cmake": populate.format("v2")},
    )
    assert trees.texts("external", old, new) == [
        "acl v1 → v2  (cmake/cpu_extension.cmake)",
        f"kernels {'1' * 12}; v3.5.1 → {'2' * 12}; v3.5.1  (cmake/external_projects/a.cmake)",
    ]


@pytest.mark.parametrize(
    ("path", "output"),
    [
        ("csrc/a.cu", "1 file differs"),
        ("CMakeLists.txt", "1 file differs"),
        ("vllm/a.py", "none differ"),
    ],
)
def test_compiled_sources_that_differ_outdate_the_kernels(
    trees: Trees, path: str, output: str
) -> None:
    assert output in trees.texts("sources", *both(path, "a\n", "b\n"))[0]


ENVS = "environment_variables: dict[str, int] = {{\n    '{}': 1,\n    **more,\n}}\n"


@pytest.mark.parametrize("place", [".env", "shell", "recipes/big.toml"])
def test_variable_that_the_new_tree_no_longer_knows_is_named_with_its_place_and_the_nearest(
    trees: Trees, place: str
) -> None:
    if place == "shell":
        trees.shell["VLLM_MXFP4_BACKEND"] = "hunter2"
    else:
        line = (
            "VLLM_MXFP4_BACKEND=hunter2\n"
            if place == ".env"
            else '[environment]\nVLLM_MXFP4_BACKEND = "hunter2"\n'
        )
        write(trees.layout.root, {place: line})
    old, new = both(
        "vllm/envs.py", ENVS.format("VLLM_MXFP4_BACKEND"), ENVS.format("VLLM_MXFP8_BACKEND")
    )
    assert trees.texts("variable", old, new) == [
        f"VLLM_MXFP4_BACKEND is not known there; did you mean VLLM_MXFP8_BACKEND?  ({place})"
    ]


def test_variables_that_are_ours_or_that_neither_tree_knows_are_no_news(trees: Trees) -> None:
    trees.shell |= {"VLLM_MIRROR": "x", "VLLM_NEVER": "1"}
    assert (
        trees.texts("variable", *both("vllm/envs.py", ENVS.format("VLLM_MIRROR"), ENVS.format("A")))
        == []
    )


def test_flags_in_use_that_are_gone_are_named_however_they_are_spelled(trees: Trees) -> None:
    recipe = (
        'command = "vllm serve x --swap_space=4 --kept"\n[flags]\nlora-modules = 1\nmax_model_len ='
        ' 2\n[other]\nlist = ["--no-gone.deep", "3"]\n'
    )
    write(
        trees.layout.root,
        {"recipes/a.toml": recipe, ".env": "EXTRA=--swap-space 4\n", "recipes/broken.toml": "["},
    )
    cli = "class FrontendArgs:\n    lora_modules: str = ''\n    _own: int = 0\n"
    engine = (
        "class EngineArgs:\n    max_model_len: int = 1\nclass Else:\n    kept:"
        " int\np.add_argument('--swap-space', '-s')\np.add_argument('--kept')\n"
    )
    old = {
        "vllm/entrypoints/openai/cli_args.py": cli,
        "vllm/engine/arg_utils.py": engine + "p.add_argument('--gone')\n",
    }
    # A file that moves takes its flags along.
    new = {
        "vllm/entrypoints/common/cli_args.py": cli,
        "vllm/engine/arg_utils.py": engine.replace("--swap-space", "--swap-spaces"),
    }
    assert trees.texts("flag", old, new) == [
        "--no-gone is not known there; no similar name exists there  (recipes/a.toml)",
        "--swap-space is not known there; did you mean --swap-spaces?  (.env, recipes/a.toml)",
    ]


@pytest.mark.parametrize(
    "source",
    [
        b"def",
        b"\x00",
        b"environment_variables = 3\n",
        b"environment_variables = {**a, 3: 4}\n",
        b"(" * 999,
    ],
)
def test_source_that_is_no_registry_has_no_names(source: bytes) -> None:
    assert run_environment.variables_of(source) == flags.flags_of(source) == frozenset()


def test_file_of_a_patch_that_moved_or_vanished_is_named(trees: Trees) -> None:
    text = "".join(f"line {number}\n" for number in range(30))
    old = {"a/moved.py": text, "a/gone.py": "short and gone\n", "a/untouched.py": "x\n"}
    found = trees.between(old, {"b/there.py": text + "more\n"}, touched=("a/moved.py", "a/gone.py"))
    moved = [forecast.text_of(change) for change in found if change.topic == "moved"]
    assert moved == ["a/gone.py; is gone, and no new file resembles it", "a/moved.py → b/there.py"]


def test_age_is_held_against_what_a_bump_asks_for(trees: Trees) -> None:
    old, new = both("a", "1", "2")
    assert trees.texts("age", old, new) == ["v1.0.0: 30.0 days"]
    trees.candidate = replace(trees.candidate, published=NOW - datetime.timedelta(days=2))
    assert "younger than the 7 days" in trees.texts("age", *both("b", "1", "2"))[0]
    trees.shell["PIN_MIN_AGE_DAYS"] = "1"
    assert trees.texts("age", *both("c", "1", "2")) == ["v1.0.0: 2.0 days"]
    trees.candidate = replace(trees.candidate, published=None)
    assert "publication date unknown" in trees.texts("age", *both("d", "1", "2"))[0]


def test_precompiled_wheel_is_missed_on_this_machine_only(trees: Trees) -> None:
    trees.candidate = replace(
        trees.candidate,
        not_precompiled={f"cpu-{os.uname().machine}": "no wheel", "cpu-other": "no wheel"},
    )
    found = [
        change for change in trees.between(*both("a", "1", "2")) if change.topic == "precompiled"
    ]
    assert [change.name for change in found] == [f"cpu-{os.uname().machine}"]
