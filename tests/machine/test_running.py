"""The environment of a running vLLM: the order of its sources, and the names that are removed."""

from pathlib import Path

import pytest

from tests.machine.conftest import House
from workspace.core import child_variables
from workspace.machine import jit_caches, run_environment

STACK = jit_caches.Stack("tree", "2.13.0", "none", "none", "none")
ON_GPU = jit_caches.Stack("tree", "2.13.0 CUDA 13.0", "3.7.1", "0.7.0", "12.1")
# The children of a built vLLM, which compile at run time.
COMPILING = [
    phase
    for phase in child_variables.PHASES
    if any(row.has("TRITON_CACHE_DIR") and phase in row.phases for row in child_variables.VARIABLES)
    and phase not in ("run", "triton")
]


def variables(
    house: House,
    dotenv: str = "",
    *,
    recipe: dict[str, str] | None = None,
    given: dict[str, str] | None = None,
    **shell: str,
) -> dict[str, str]:
    house.layout.dotenv.write_text(dotenv)
    return run_environment.built_environment(
        house.layout, house.settings(**shell), "bench", stack=STACK, recipe=recipe, given=given
    )


def test_bytecode_is_kept_in_the_environment_whatever_the_shell_chose(house: House) -> None:
    found = variables(house, PYTHONDONTWRITEBYTECODE="1")
    assert "PYTHONDONTWRITEBYTECODE" not in found
    assert found["PYTHONPYCACHEPREFIX"] == str(house.layout.environment / ".workspace/bytecode")
    assert variables(house, PYTHONPYCACHEPREFIX="/own")["PYTHONPYCACHEPREFIX"] == "/own"


def test_caller_goes_before_shell_before_dotenv_before_recipe(
    house: House,
) -> None:
    recipe = {
        "VLLM_A": "recipe",
        "VLLM_B": "recipe",
        "VLLM_C": "recipe",
        "MAX_JOBS": "77",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCHDYNAMO_DISABLE": "recipe",
    }
    found = variables(
        house,
        "VLLM_A=dotenv\nVLLM_B=dotenv\nVLLM_CPU_KVCACHE_SPACE=5\n",
        recipe=recipe,
        given={"TORCHDYNAMO_DISABLE": "caller"},
        VLLM_A="shell",
    )
    names = ("VLLM_A", "VLLM_B", "VLLM_C", "TORCHDYNAMO_DISABLE")
    assert [found[name] for name in names] == ["shell", "dotenv", "recipe", "caller"]
    assert (found["MAX_JOBS"], found["VLLM_CPU_KVCACHE_SPACE"]) == ("77", "5")


def test_settings_of_builds_are_removed_and_max_jobs_is_always_set(house: House) -> None:
    found = variables(
        house,
        "CMAKE_ARGS=-DX\nTORCH_CUDA_ARCH_LIST=12.1a\n"
        "VLLM_CUTLASS_SRC_DIR=/x\nVLLM_USE_PRECOMPILED=1\n",
        VLLM_VERSION_OVERRIDE="1",
        FLASH_MLA_SRC_DIR="/y",
    )
    assert (
        not {
            "CMAKE_ARGS",
            "TORCH_CUDA_ARCH_LIST",
            "VLLM_CUTLASS_SRC_DIR",
            "VLLM_USE_PRECOMPILED",
            "VLLM_VERSION_OVERRIDE",
            "FLASH_MLA_SRC_DIR",
        }
        & found.keys()
    )
    assert int(found["MAX_JOBS"]) >= 1
    build = house.settings().child_environment("build")
    assert build["VLLM_CUTLASS_SRC_DIR"] == "/x"
    house.layout.dotenv.write_text("VLLM_LOGGING_LEVEL=DEBUG\nHF_HOME=/h\n")
    assert (
        not {"VLLM_LOGGING_LEVEL", "HF_HOME"} & house.settings().child_environment("build").keys()
    )


def test_names_of_former_releases_are_removed_where_the_tree_does_not_read_them(
    house: House,
) -> None:
    envs = house.layout.vllm / "vllm" / "envs.py"
    envs.parent.mkdir(parents=True)
    envs.write_text("environment_variables = {'VLLM_USE_V1': 1}\n")
    found = variables(house, "VLLM_USE_FLASHINFER_MXFP4_MOE=1\nVLLM_USE_V1=1\n")
    assert "VLLM_USE_FLASHINFER_MXFP4_MOE" not in found
    assert found["VLLM_USE_V1"] == "1"


def test_vocabularies_are_exported_only_where_all_exist(house: House, tmp_path: Path) -> None:
    assert run_environment.ENCODINGS not in variables(house, TIKTOKEN_ENCODINGS_BASE=str(tmp_path))
    for name in run_environment.VOCABULARIES:
        (tmp_path / name).touch()
    assert variables(house, TIKTOKEN_ENCODINGS_BASE=str(tmp_path))[
        run_environment.ENCODINGS
    ] == str(tmp_path)


def test_kernels_are_kept_by_stack_unless_the_user_sets_a_folder_and_ninja_is_found(
    house: House,
) -> None:
    found = variables(house, TRITON_CACHE_DIR="/mine", VIRTUAL_ENV="/other", PYTHONPATH="/other")
    assert found["TRITON_CACHE_DIR"] == "/mine"
    assert Path(found["VLLM_CACHE_ROOT"]).is_relative_to(house.layout.jit)
    assert found["PATH"].split(":")[0] == str(house.layout.environment / "bin")
    assert found["VIRTUAL_ENV"] == str(house.layout.environment)
    assert "PYTHONPATH" not in found


@pytest.mark.parametrize("phase", COMPILING)
def test_every_folder_of_a_gpu_reaches_every_child_that_compiles(
    house, phase: child_variables.Phase
):
    assert {"first-token", "serve", "smoke", "bench", "shell"} <= set(COMPILING)
    folders = jit_caches.variables(house.layout, house.settings(), ON_GPU)
    assert "CUDA_CACHE_MAXSIZE" in folders
    found = run_environment.built_environment(house.layout, house.settings(), phase, stack=ON_GPU)
    assert folders.items() <= found.items()
