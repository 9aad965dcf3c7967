"""Driver, toolkit and architectures, with a fake nvidia-smi and a fake nvcc."""

import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.machine.programs import SMI
from workspace.core.console import Row
from workspace.machine import doctor_toolchain
from workspace.machine.machine import Case


def smi(house, *, gpu="NVIDIA GB10, 12.1, 580.95.05", cuda="13.0", apps="true", xml=None) -> None:
    house.program(
        "nvidia-smi",
        SMI.format(
            gpu=gpu,
            apps=apps,
            xml=xml
            or f"echo '<nvidia_smi_log><cuda_version>{cuda}</cuda_version></nvidia_smi_log>'",
        ),
    )


def nvcc(house, version="13.0", archs="75 90 100 120 121"):
    home = house.layout.root.parent / "cuda"
    lines = "; ".join(f"echo compute_{arch}" for arch in archs.split())
    house.program(
        "nvcc",
        f'case "$1" in --version) echo "release {version}, V{version}.1";; --list-gpu-arch)'
        f" {lines or 'exit 1'};; esac",
        folder=home / "bin",
    )
    return str(home)


def case(house, *, device="cuda", is_native=True, **shell) -> Case:
    return Case(house.machine(**shell), device=device, is_native=is_native)


def rows(check, *args, **options) -> dict[str, Row]:
    found = tuple(check(case(*args, **options)))
    assert all(row.hint for row in found if row.state == "FAIL"), "every failure has its hint"
    return {row.name: row for row in found}


def torch(house, cuda="13.0") -> None:
    text = f"__version__ = '2.13.0'\ncuda: str = '{cuda}'\n"
    house.package("torch", "2.13.0", {"torch/version.py": text})


def test_gpu_and_driver_are_shown_with_the_cuda_that_the_driver_serves(house):
    smi(house)
    found = rows(doctor_toolchain.driver, house)
    assert found["driver"].text == "580.95.05, supports CUDA 13.0"
    assert (found["gpu"].state, found["gpu"].text) == ("ok", "NVIDIA GB10, capability 12.1")


@pytest.mark.parametrize(
    "gpu", ["NVIDIA GB10, [N/A], 580.95.05", "NVIDIA GB10, soon, [N/A]", "garbage", ", , ,"]
)
def test_driver_with_unknown_output_gives_rows_and_no_traceback(house, gpu):
    smi(house, gpu=gpu, xml="head -c 300 /dev/urandom", apps="echo 'N/A, x'; echo; echo '1,2,3,4'")
    assert {row.state for row in rows(doctor_toolchain.driver, house).values()} <= {"ok", "warn"}
    assert rows(doctor_toolchain.agreement, house)["cuda fit"].state == "warn"
    assert rows(doctor_toolchain.running_programs, house)["running"].state in ("ok", "warn")
    assert rows(doctor_toolchain.archs, house)["arch list"].state == "FAIL"


def test_driver_that_hangs_on_a_query_costs_seconds_only(house):
    smi(house, xml="trap '' TERM; sleep 60", apps="true")
    started = time.monotonic()
    found = rows(doctor_toolchain.agreement, house)["cuda fit"]
    assert time.monotonic() - started < 6
    assert found.state == "warn"


def test_gpu_older_than_vllms_kernels_fails(house):
    smi(house, gpu="Tesla P100, 6.0, 535.1")
    assert rows(doctor_toolchain.driver, house)["gpu"].state == "FAIL"


@pytest.mark.parametrize(
    ("supported", "of_torch", "of_toolkit", "state"),
    [
        ("13.0", "13.0", "13.0", "ok"),
        ("13.0", "12.9", "12.8", "ok"),
        ("13.0", "13.0", "13.1", "warn"),
        ("12.8", "13.0", "12.8", "FAIL"),
    ],
)
def test_driver_supports_older_cuda_and_newer_of_its_own_major_version(
    house, supported, of_torch, of_toolkit, state
):
    smi(house, cuda=supported)
    torch(house, of_torch)
    assert (
        rows(doctor_toolchain.agreement, house, CUDA_HOME=nvcc(house, of_toolkit))["cuda fit"].state
        == state
    )


def test_toolkit_newer_than_the_driver_by_a_major_version_only_warns_beside_a_precompiled_wheel(
    house,
):
    smi(house, cuda="12.9")
    home = nvcc(house)
    assert rows(doctor_toolchain.agreement, house, CUDA_HOME=home)["cuda fit"].state == "FAIL"
    assert (
        rows(doctor_toolchain.agreement, house, is_native=False, CUDA_HOME=home)["cuda fit"].state
        == "warn"
    )


@pytest.mark.parametrize(
    ("text", "toolkit", "fault"),
    [
        ("", "13.0", "compute_20"),
        ("12.1a", "13.0", None),
        ("12.1", "13.0", None),
        ("12.0", "13.0", None),
        ("9.0;12.1a", "13.0", None),
        ("12.0f", "13.0", "cpp_extension refuses 12.0f"),
        ("12.0a", "13.0", "do not run on capability 12.1"),
        ("9.0a 10.0a", "13.0", "do not run on capability 12.1"),
        ("9.0+PTX", "13.0", None),
        ("12.1a 10.3a", "13.0", "nvcc 13.0 does not support 10.3a"),
    ],
)
def test_architectures_are_checked_against_gpu_torch_and_nvcc(house, text, toolkit, fault):
    smi(house)
    row = rows(
        doctor_toolchain.archs, house, TORCH_CUDA_ARCH_LIST=text, CUDA_HOME=nvcc(house, toolkit)
    )["arch list"]
    assert row.state == ("FAIL" if fault else "ok")
    assert fault is None or fault in row.why
    assert fault is None or re.search(r"TORCH_CUDA_ARCH_LIST='?12\.1a", row.hint)


def test_nvcc_without_a_list_of_architectures_is_no_fault(house):
    smi(house)
    assert (
        rows(
            doctor_toolchain.archs,
            house,
            TORCH_CUDA_ARCH_LIST="12.1a",
            CUDA_HOME=nvcc(house, archs=""),
        )["arch list"].state
        == "ok"
    )


def test_list_in_dotenv_is_fixed_there_and_in_the_shell_by_an_export(house):
    smi(house)
    house.layout.dotenv.write_text("TORCH_CUDA_ARCH_LIST=12.0a\n")
    assert ">> .env" in rows(doctor_toolchain.archs, house)["arch list"].hint
    assert (
        rows(doctor_toolchain.archs, house, TORCH_CUDA_ARCH_LIST="12.0a")["arch list"].hint
        == "export TORCH_CUDA_ARCH_LIST='12.1a'"
    )


def test_device_cpu_needs_nothing_of_cuda(house):
    for check in (
        doctor_toolchain.driver,
        doctor_toolchain.toolkit,
        doctor_toolchain.archs,
        doctor_toolchain.agreement,
    ):
        assert {row.state for row in rows(check, house, device="cpu").values()} <= {"ok", "skipped"}


def test_program_that_holds_the_gpu_is_named_with_the_command_that_shows_it(house):
    smi(house, apps="echo '4242, /usr/bin/python3, [N/A]'")
    row = rows(doctor_toolchain.running_programs, house)["running"]
    assert row.state == "warn"
    assert "4242 (/usr/bin/python3)" in row.text


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("/x/.vllm/bin/python", "/x/.vllm/bin/vllm", "serve", "m"), True),
        (("VLLM::EngineCore", "", ""), True),
        (("python3.12", "-m", "vllm.entrypoints.openai.api_server"), True),
        (("git", "-C", "vendor/vllm", "status"), False),
        (("/x/inv", "serve.stop"), False),
        ((), False),
    ],
)
def test_vllm_is_distinguished_from_a_git_that_reads_its_source(argv, expected):
    assert doctor_toolchain.is_vllm(argv) is expected


def test_process_that_calls_itself_an_engine_is_found(house):
    with subprocess.Popen(["bash", "-c", "exec -a VLLM::EngineCore sleep 60"]) as engine:
        try:
            # The shell bears its own name until it has become the engine.
            while not Path(f"/proc/{engine.pid}/cmdline").read_bytes().startswith(b"VLLM::"):
                time.sleep(0.01)
            found = rows(doctor_toolchain.running_programs, house)["running"]
        finally:
            engine.kill()
    assert found.state == "warn"
    assert str(engine.pid) in re.findall(r"\d+", found.hint)
