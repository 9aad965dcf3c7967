"""Fake assemblers of Triton that support as much as the real ones: 12.8 of Triton 3.5.1 stops at
sm_121a.
"""

import pytest

from tests.machine.programs import NEW, OLD, PTXAS
from workspace.core.console import Row
from workspace.machine import doctor
from workspace.machine.machine import Case


def triton(house, version, *, first=OLD, second=None) -> None:
    packages = house.package("triton", version, {"triton/__init__.py": ""})
    folder = packages / "triton" / "backends" / "nvidia" / "bin"
    house.program("ptxas", PTXAS.format(release="12.8", known=first), folder=folder)
    if second is not None:
        house.program("ptxas-blackwell", PTXAS.format(release="13.1", known=second), folder=folder)


def rows(house, *, device="cuda", **shell) -> dict[str, Row]:
    found = tuple(doctor.ptxas(Case(house.machine(**shell), device=device, is_native=False)))
    assert all(row.hint for row in found if row.state == "FAIL"), "every failure has its hint"
    return {row.name: row for row in found}


def test_triton_3_5_fails_to_assemble_and_the_hint_is_the_assembler_of_the_toolkit(house, tmp_path):
    triton(house, "3.5.1")
    house.program(
        "ptxas", PTXAS.format(release="13.0", known=NEW), folder=tmp_path / "cuda" / "bin"
    )
    house.program(
        "nvcc",
        '[ "$1" = --version ] && echo "release 13.0, V13.0.1"',
        folder=tmp_path / "cuda" / "bin",
    )
    row = rows(house, CUDA_HOME=str(tmp_path / "cuda"))["ptxas"]
    assert row.state == "FAIL"
    assert "'sm_121a' is not defined" in row.text
    assert row.hint == f"echo TRITON_PTXAS_PATH={tmp_path / 'cuda' / 'bin' / 'ptxas'} >> .env"
    assert (
        rows(house, TRITON_PTXAS_PATH=str(tmp_path / "cuda" / "bin" / "ptxas"))["ptxas"].state
        == "ok"
    )


def test_toolkit_whose_assembler_fails_too_is_not_in_the_hint(house, tmp_path):
    triton(house, "3.5.1")
    house.program(
        "ptxas", PTXAS.format(release="12.8", known=OLD), folder=tmp_path / "cuda" / "bin"
    )
    house.program(
        "nvcc",
        '[ "$1" = --version ] && echo "release 12.8, V12.8.1"',
        folder=tmp_path / "cuda" / "bin",
    )
    assert str(tmp_path) not in rows(house, CUDA_HOME=str(tmp_path / "cuda"))["ptxas"].hint


def test_first_assembler_may_fail_where_the_second_is_used(house):
    triton(house, "3.7.1", second=NEW)
    found = rows(house)
    assert {name: row.state for name, row in found.items()} == {"ptxas": "ok", "ptxas-bw": "ok"}
    assert "uses the other assembler" in found["ptxas"].text


def test_second_assembler_that_fails_is_not_fixed_by_the_variable_of_the_first(house, tmp_path):
    triton(house, "3.6.0", second=OLD)
    good = house.program("ptxas", PTXAS.format(release="13.0", known=NEW), folder=tmp_path)
    found = rows(house, TRITON_PTXAS_PATH=str(good))["ptxas-bw"]
    assert found.state == "FAIL"
    assert "TRITON_PTXAS_BLACKWELL_PATH" in found.hint


def test_first_assembler_is_the_one_used_for_a_hopper_until_triton_3_9(house):
    house.program("nvidia-smi", "echo 'NVIDIA H100, 9.0, 580.1'")
    triton(house, "3.8.0", second="")
    assert {name: row.state for name, row in rows(house).items()} == {
        "ptxas": "ok",
        "ptxas-bw": "ok",
    }
    assert not doctor.ptxas_of_triton(
        house.layout.environment / "lib/python3.11/site-packages/triton/backends/nvidia/bin",
        "3.9.0",
        "9.0",
    )[0].is_used


def test_missing_path_is_a_warning_since_triton_skips_it_without_a_message(house):
    triton(house, "3.7.1", second=NEW)
    row = rows(house, TRITON_PTXAS_BLACKWELL_PATH="/nonexistent/ptxas")["ptxas-bw"]
    assert (row.state, row.hint) == ("warn", "unset TRITON_PTXAS_BLACKWELL_PATH")


def test_path_to_a_folder_fails_since_triton_stops_there(house, tmp_path):
    triton(house, "3.7.1", second=NEW)
    house.layout.dotenv.write_text(f"TRITON_PTXAS_BLACKWELL_PATH={tmp_path}\n")
    row = rows(house)["ptxas-bw"]
    assert (row.state, row.hint) == ("FAIL", "sed -i 's/^TRITON_PTXAS_BLACKWELL_PATH=/# &/' .env")


@pytest.mark.parametrize(
    "script",
    ["exit 127", "echo garbage", 'case "$1" in --version) echo "release 13.1, V13.1.1";; esac'],
)
def test_assembler_that_makes_no_cubin_fails_whatever_its_version(house, script):
    triton(house, "3.7.1", second=NEW)
    house.program(
        "ptxas-blackwell",
        script,
        folder=house.layout.environment / "lib/python3.11/site-packages/triton/backends/nvidia/bin",
    )
    assert rows(house)["ptxas-bw"].state == "FAIL"


def test_row_is_ok_for_the_cpu_and_without_triton(house):
    assert rows(house)["ptxas"].state == "ok"
    triton(house, "3.5.1")
    row = rows(house, device="cpu")["ptxas"]
    assert (row.state, "cpu" in row.text) == ("skipped", True)
