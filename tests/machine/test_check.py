"""`inv env`: a setting that cannot work is found before anything is loaded."""

import io
import json
import subprocess
from pathlib import Path

import pytest

from tests.machine.conftest import House
from workspace.core.console import Console
from workspace.core.errors import SettingsError
from workspace.machine import check, run_environment
from workspace.machine.check import SettingRow
from workspace.machine.machine import Case, Machine

ENVS = """import os
def choice():
    if os.getenv("VLLM_CHOICE") not in ("a", "b"):
        raise ValueError(f"Invalid value {os.getenv('VLLM_CHOICE')!r} in VLLM_CHOICE")
def heavy():
    import torch_that_is_not_here
environment_variables = {
    "VLLM_LOGGING_LEVEL": lambda: os.getenv("VLLM_LOGGING_LEVEL", "INFO"),
    "VLLM_NUMBER": lambda: int(os.getenv("VLLM_NUMBER", "0")),
    "VLLM_SWITCH": lambda: os.getenv("VLLM_SWITCH", "0") == "1",
    "VLLM_CHOICE": choice,
    "VLLM_HEAVY": heavy,
    "VLLM_LOGGING_CONFIG_PATH": lambda: os.getenv("VLLM_LOGGING_CONFIG_PATH"),
    "VLLM_CPU_KVCACHE_SPACE": lambda: int(os.getenv("VLLM_CPU_KVCACHE_SPACE", "0")),
    "VLLM_API_KEY": lambda: os.getenv("VLLM_API_KEY"),
    "VLLM_USE_MODELSCOPE": lambda: os.getenv("VLLM_USE_MODELSCOPE", "False").lower()
    in ("1", "true"),
}
"""


def judged(
    house: House,
    dotenv: str = "",
    *,
    device: str = "cpu",
    recipe: dict[str, str] | None = None,
    **shell: str,
) -> dict[str, SettingRow]:
    (house.layout.vllm / "vllm").mkdir(parents=True, exist_ok=True)
    (house.layout.vllm / "vllm" / "envs.py").write_text(ENVS)
    house.layout.dotenv.write_text(dotenv)
    settings = house.settings(**shell)
    return {
        row.name: row
        for row in check.judge(
            Case(Machine(house.layout, settings), device=device, is_native=False),
            recipe=recipe,
        )
    }


def test_every_setting_has_its_value_and_source_and_nothing_else_is_wrong(house: House) -> None:
    rows = judged(house, "MAX_JOBS=3\nVLLM_LOGGING_LEVEL=DEBUG\n", SOURCE="git")
    assert [
        (rows[name].value, rows[name].source)
        for name in ("MAX_JOBS", "SOURCE", "KERNELS", "VLLM_LOGGING_LEVEL")
    ] == [
        ("3", ".env"),
        ("git", "shell"),
        ("auto", "default"),
        ("DEBUG", ".env"),
    ]
    assert {row.state for row in rows.values()} == {"ok"}


def test_variables_of_old_guides_are_warnings_with_a_replacement(
    house: House, tmp_path: Path
) -> None:
    guide = {
        "VLLM_USE_FLASHINFER_MXFP4_MOE": "1",
        "TIKTOKEN_ENCODINGS_BASE": str(tmp_path),
        "TRITON_PTXAS_PATH": "/usr/local/cuda-of-the-guide/bin/ptxas",
    }
    (tmp_path / "o200k_base.tiktoken").touch()
    rows = judged(house, "", **guide)
    assert {rows[name].state for name in guide} == {"warn"}
    assert rows["VLLM_USE_FLASHINFER_MXFP4_MOE"].text.startswith(
        "is read by no release of vLLM (vllm-project/vllm#43148); instead: --moe-backend"
    )
    assert rows["VLLM_USE_FLASHINFER_MXFP4_MOE"].hint == "unset VLLM_USE_FLASHINFER_MXFP4_MOE"
    assert rows["TIKTOKEN_ENCODINGS_BASE"].text.startswith(
        "cl100k_base.tiktoken is missing, so gpt-oss would fail"
    )
    assert "Triton skips it" in rows["TRITON_PTXAS_PATH"].text


def test_ptxas_of_the_guide_is_not_the_one_that_triton_uses_on_a_spark(house: House) -> None:
    house.program(
        "nvidia-smi",
        'case "$*" in *name,compute_cap*) echo "NVIDIA GB10, 12.1, 580.95";; *) exit 1;; esac',
    )
    house.package("triton", "3.7.1")
    ptxas = house.program("ptxas", "exit 0")
    row = judged(house, device="cuda", TRITON_PTXAS_PATH=str(ptxas))["TRITON_PTXAS_PATH"]
    assert (
        row.state,
        "Triton 3.7.1 assembles for this GPU with TRITON_PTXAS_BLACKWELL_PATH" in row.text,
    ) == ("warn", True), row
    assert (
        judged(house, device="cuda", TRITON_PTXAS_BLACKWELL_PATH=str(ptxas))[
            "TRITON_PTXAS_BLACKWELL_PATH"
        ].state
        == "ok"
    )


def test_removed_name_is_reported_with_release_replacement_and_reference(house: House) -> None:
    row = judged(house, "VLLM_ATTENTION_BACKEND=FLASHINFER\n")["VLLM_ATTENTION_BACKEND"]
    assert (row.state, row.hint) == ("warn", "sed -i 's/^VLLM_ATTENTION_BACKEND=/# &/' .env")
    assert (
        row.text
        == "is gone since vLLM 0.16.0 (vllm-project/vllm#32812); instead: --attention-backend;"
        " the workspace does not pass it on"
    )


def test_unknown_name_is_an_error_in_dotenv_and_a_warning_in_the_shell(
    house: House,
) -> None:
    row = judged(house, "VLLM_LOGING_LEVEL=DEBUG\n")["VLLM_LOGING_LEVEL"]
    assert row.state == "FAIL"
    assert "did you mean VLLM_LOGGING_LEVEL?" in row.text
    assert judged(house, VLLM_LOGING_LEVEL="DEBUG")["VLLM_LOGING_LEVEL"].state == "warn"
    assert judged(house, recipe={"VLLM_LOGING_LEVEL": "DEBUG"})["VLLM_LOGING_LEVEL"].state == "FAIL"


def test_row_of_a_librarys_variable_names_its_phase_and_a_typing_error_is_a_warning(
    house: House,
) -> None:
    rows = judged(house, "TRITON_CACHE_DIR=/c\nCUDA_HOM=/usr\n")
    assert (rows["TRITON_CACHE_DIR"].state, rows["TRITON_CACHE_DIR"].text) == (
        "ok",
        "for running vLLM",
    )
    assert rows["CUDA_HOM"].state == "warn"
    assert "did you mean CUDA_HOME?" in rows["CUDA_HOM"].text


def test_without_a_tree_no_name_is_judged(house: House) -> None:
    house.layout.dotenv.write_text("VLLM_LOGING_LEVEL=DEBUG\n")
    rows = check.judge(Case(house.machine(), device="cpu", is_native=False))
    assert {row.state for row in rows if row.name == "VLLM_LOGING_LEVEL"} == {"warn"}


@pytest.mark.parametrize(
    ("name", "text", "state", "message"),
    [
        ("VLLM_NUMBER", "many", "FAIL", "vLLM stops at this value: invalid literal for int()"),
        ("VLLM_NUMBER", "7", "ok", ""),
        ("VLLM_CHOICE", "c", "FAIL", "Invalid value 'c' in VLLM_CHOICE"),
        ("VLLM_SWITCH", "yes", "warn", "vLLM takes this value for off; write 1"),
        ("VLLM_SWITCH", "perhaps", "warn", "it is a switch, and off with this value"),
        ("VLLM_SWITCH", "1", "ok", ""),
        ("VLLM_HEAVY", "anything", "ok", ""),
        ("VLLM_LOGGING_CONFIG_PATH", "/nowhere/logging.json", "warn", "no such file"),
        ("VLLM_CUTLASS_SRC_DIR", "/anywhere", "ok", "for builds"),
        ("VLLM_TARGET_DEVICE", "tpu", "warn", "the workspace sets this itself"),
    ],
)
def test_values_are_judged_by_the_functions_of_the_tree(
    house: House, name: str, text: str, state: str, message: str
) -> None:
    row = judged(house, f"{name}={text}\n")[name]
    assert (row.state, message in row.text) == (state, True), row


@pytest.mark.parametrize(
    ("device", "shell", "name", "state", "message"),
    [
        ("cuda", {"CUDA_HOME": "/nowhere/cuda"}, "CUDA_HOME", "FAIL", "no such folder"),
        ("cpu", {"CUDA_HOME": "/nowhere/cuda"}, "CUDA_HOME", "warn", "no such folder"),
        (
            "cuda",
            {"TRITON_PTXAS_BLACKWELL_PATH": "/etc/passwd"},
            "TRITON_PTXAS_BLACKWELL_PATH",
            "FAIL",
            "Triton stops there",
        ),
        (
            "cuda",
            {"VLLM_CPU_KVCACHE_SPACE": "4"},
            "VLLM_CPU_KVCACHE_SPACE",
            "warn",
            "does not read it",
        ),
        (
            "cpu",
            {"VLLM_CPU_KVCACHE_SPACE": "900000"},
            "VLLM_CPU_KVCACHE_SPACE",
            "FAIL",
            "this machine",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_found(
    house: House, device: str, shell: dict[str, str], name: str, state: str, message: str
) -> None:
    row = judged(house, device=device, **shell)[name]
    assert (row.state, message in row.text) == (state, True), row


def test_recipe_with_a_variable_for_builds_is_an_error_and_the_user_goes_before_it(
    house: House,
) -> None:
    rows = judged(
        house,
        "VLLM_NUMBER=2\n",
        recipe={"CMAKE_ARGS": "-DX=1", "VLLM_NUMBER": "many", "VLLM_SWITCH": "1"},
    )
    assert (rows["CMAKE_ARGS"].state, rows["CMAKE_ARGS"].source) == ("FAIL", "recipe")
    assert (rows["VLLM_NUMBER"].state, rows["VLLM_NUMBER"].source) == ("ok", ".env")
    assert (rows["VLLM_SWITCH"].state, rows["VLLM_SWITCH"].source) == ("ok", "recipe")


def test_repeated_name_is_reported_and_the_hint_takes_the_line_without_effect_out(
    house: House,
) -> None:
    found = judged(house, "# mine\nNVCC_THREADS=4\nNVCC_THREADS=2\n")["NVCC_THREADS"]
    assert (found.state, found.hint) == ("warn", "sed -i '2s/^/# /' .env")
    assert found.text == ".env, line 2: NVCC_THREADS is set again in line 3, which counts"
    subprocess.run(["sh", "-c", found.hint], cwd=house.layout.root, check=True)
    assert house.layout.dotenv.read_text() == "# mine\n# NVCC_THREADS=4\nNVCC_THREADS=2\n"


def test_variable_of_the_shell_that_hides_a_line_is_reported_with_both_values(house: House) -> None:
    row = judged(house, "MAX_JOBS=3\n", MAX_JOBS="2")["MAX_JOBS"]
    assert (row.state, row.hint, row.is_sentence) == ("warn", "unset MAX_JOBS", True)
    assert "MAX_JOBS=2 in the shell hides MAX_JOBS=3" in row.text


def test_secrets_are_shown_as_set_or_unset_only(house: House) -> None:
    dotenv = "HF_TOKEN=hf_swordfish\nVLLM_CHOICE=hf_swordfish\nMY_API_KEY=swordfish2\n"
    with pytest.raises(SettingsError) as caught:
        judged(house, dotenv)
        out = io.StringIO()
        check.show(house.machine(), console=Console(out=out, err=out), as_json=True)
    rows = {row["name"]: row for row in json.loads(out.getvalue())["rows"]}
    assert [rows[name]["value"] for name in ("HF_TOKEN", "MY_API_KEY", "VLLM_API_KEY")] == [
        "set",
        "set",
        "unset",
    ]
    assert not any(
        "swordfish" in text
        for text in (out.getvalue(), caught.value.message, *caught.value.details)
    )


def test_json_has_every_row_with_its_six_keys_and_a_verdict(house: House) -> None:
    house.layout.dotenv.write_text("")
    out = io.StringIO()
    check.show(house.machine(), console=Console(out=out, err=out), as_json=True)
    output = json.loads(out.getvalue())
    assert (output["schema"], output["verdict"]) == (1, "pass")
    assert {tuple(sorted(row)) for row in output["rows"]} == {
        ("hint", "name", "source", "state", "text", "value")
    }


def test_warnings_are_printed_once_and_the_error_names_the_first_and_the_rest(house: House) -> None:
    judged(house, "VLLM_NUMBER=many\nVLLM_CHOICE=c\nVLLM_SWITCH=yes\n")
    err = io.StringIO()
    console = Console(out=io.StringIO(), err=err)
    for _ in range(2):
        with pytest.raises(SettingsError, match="VLLM_NUMBER=many") as caught:
            check.require(house.machine(), console=console, device="cpu")
    assert caught.value.exit_code == 2
    assert caught.value.hint == "sed -i 's/^VLLM_NUMBER=/# &/' .env"
    assert any("VLLM_CHOICE=c" in line for line in caught.value.details)
    assert err.getvalue().count("VLLM_SWITCH=yes") == 1


def test_envs_that_cannot_be_loaded_judges_no_value(house: House) -> None:
    judged(house)
    (house.layout.vllm / "vllm" / "envs.py").write_text(
        "raise SystemExit(3)\nenvironment_variables = {'VLLM_NUMBER': 1}\n"
    )
    assert (
        run_environment.misread_values(house.layout, house.settings(), {"VLLM_NUMBER": "many"})
        == ()
    )


def test_every_name_of_the_table_has_a_reference_and_a_possible_order_of_releases() -> None:
    for kind in ("variables", "flags"):
        for former in run_environment.removed_names(kind).values():
            assert former.reference
            assert bool(former.last) == bool(former.gone)
            assert [int(part) for part in former.last.split(".") if part] < [
                int(part) for part in former.gone.split(".") if part
            ] or not former.last
