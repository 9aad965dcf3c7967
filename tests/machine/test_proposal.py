"""`inv env.init`: .env is completed, and no line of the user's is lost or changed unasked."""

import io
import resource
import subprocess

import pytest

from tests.machine.conftest import House
from workspace.core.console import Console
from workspace.core.errors import SettingsError, ToolchainError
from workspace.machine import check

NVCC = 'case "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88";; esac'
GPU = 'case "$*" in *name,compute_cap*) echo "NVIDIA GB10, 12.1, 580.95";; *) exit 1;; esac'


def init(house: House, *, replace: bool = False, **shell: str) -> tuple[str, str]:
    """Return what is printed on stdout and on stderr."""
    out, err = io.StringIO(), io.StringIO()
    check.complete(house.machine(**shell), console=Console(out=out, err=err), replace=replace)
    return out.getvalue(), err.getvalue()


def spark(house: House) -> str:
    """Make a machine with a GB10 and a toolkit, and return its CUDA_HOME."""
    house.program("nvidia-smi", GPU)
    home = house.layout.root.parent / "cuda"
    house.program("nvcc", NVCC, folder=home / "bin")
    (house.bin / "nvcc").symlink_to(home / "bin" / "nvcc")
    return str(home)


def test_first_dotenv_is_written_for_the_machine(house: House) -> None:
    _, err = init(house, DEVICE="cpu")
    assert house.layout.dotenv.read_text().splitlines()[-1].startswith("VLLM_CPU_KVCACHE_SPACE=")
    assert house.layout.dotenv.stat().st_mode & 0o777 == 0o600
    assert "done     .env" in err


def test_what_is_missing_is_added_with_the_difference_and_the_rest_stays_byte_for_byte(
    house: House,
) -> None:
    home = spark(house)
    before = "# mine\nHF_TOKEN='hf_secret'\nMY_OWN=\"a\nb\"\n"
    house.layout.dotenv.write_text(before)
    out, err = init(house, DEVICE="cuda", CUDA_HOME=home)
    after = house.layout.dotenv.read_text()
    assert after.startswith(before)
    assert f"CUDA_HOME={home}" in after.replace("'", "")
    assert "TORCH_CUDA_ARCH_LIST=12.1a" in after
    assert "+TORCH_CUDA_ARCH_LIST=12.1a" in out.splitlines()
    assert "hf_secret" not in out + err
    assert "MAX_JOBS" not in after
    assert init(house, DEVICE="cuda", CUDA_HOME=home)[0] == ""
    assert house.layout.dotenv.read_text() == after


def test_line_that_differs_is_shown_and_changed_only_with_replace(house: House) -> None:
    spark(house)
    house.layout.dotenv.write_text(
        "TORCH_CUDA_ARCH_LIST=12.0f  # the guide's\nCUDA_HOME=/opt/cuda\n"
    )
    _, err = init(house, DEVICE="cuda")
    assert (
        house.layout.dotenv.read_text()
        == "TORCH_CUDA_ARCH_LIST=12.0f  # the guide's\nCUDA_HOME=/opt/cuda\n"
    )
    assert "12.0f; this machine suggests 12.1a\n" in err
    assert "$ ./scripts/inv env.init --replace\n" in err
    out, _ = init(house, DEVICE="cuda", replace=True)
    text = house.layout.dotenv.read_text()
    assert "\nTORCH_CUDA_ARCH_LIST=12.1a\n" in text
    assert "# TORCH_CUDA_ARCH_LIST=12.0f  # the guide's\n" in text
    assert "-TORCH_CUDA_ARCH_LIST=12.0f  # the guide's" in out.splitlines()


def test_dotenv_that_cannot_be_written_is_a_sentence(house: House) -> None:
    # A link into a folder where not even root may write.
    house.layout.dotenv.symlink_to("/proc/sys/kernel/core_uses_pid/.env")
    with pytest.raises((ToolchainError, SettingsError), match="cannot be"):
        init(house, DEVICE="cpu")


def test_dotenv_that_has_no_room_is_a_sentence_with_a_look_at_its_folders(house: House) -> None:
    machine, unlimited = house.machine(DEVICE="cpu"), resource.getrlimit(resource.RLIMIT_FSIZE)
    house.layout.dotenv.write_text("MY_OWN=1\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, unlimited[1]))
    try:
        with pytest.raises(ToolchainError, match=r"\.env cannot be written: ") as failure:
            check.complete(machine, console=Console(out=io.StringIO(), err=io.StringIO()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    shown = subprocess.run(failure.value.hint or "", shell=True, check=True, capture_output=True)
    assert str(house.layout.dotenv) in shown.stdout.decode()
    assert house.layout.dotenv.read_text() == "MY_OWN=1\n"
