import os
import time
from pathlib import Path

from workspace.machine import hardware
from workspace.machine.gpu import Gpu


def test_gpu_with_unified_memory_is_seen_though_its_memory_is_not_available(house):
    house.program(
        "nvidia-smi",
        'case "$*" in *memory*) echo "[N/A]";; *) echo "NVIDIA GB10, 12.1, 580.95.05";; esac',
    )
    assert house.machine().gpus == (Gpu("NVIDIA GB10", "12.1", "580.95.05"),)


def test_field_that_the_driver_does_not_report_is_none(house):
    house.program("nvidia-smi", 'echo "NVIDIA X, [N/A], [Not Supported]"')
    assert house.machine().gpus == (Gpu("NVIDIA X", None, None),)


def test_failing_driver_is_no_gpu_even_when_it_prints_lines(house):
    house.program(
        "nvidia-smi",
        'echo "NVIDIA-SMI has failed because it couldn\'t communicate with the NVIDIA driver.";'
        " exit 9",
    )
    assert house.machine().gpus == ()


def test_driver_that_hangs_and_ignores_signals_is_no_gpu_within_five_seconds(house):
    house.program("nvidia-smi", "trap '' TERM INT; sleep 60; echo 'late, 1.0, 1'")
    started = time.monotonic()
    assert house.machine().gpus == ()
    assert time.monotonic() - started < 5


def test_machine_has_cores_and_no_more_available_than_all_memory(house):
    host = hardware.observe()
    assert host.cores >= 1
    assert 0 < host.available_gib <= host.memory_gib


def test_free_space_of_a_folder_that_is_not_made_yet_is_that_of_its_parent(tmp_path: Path):
    assert abs(hardware.free_gib(tmp_path / "a" / "b") - hardware.free_gib(tmp_path)) < 1
    assert hardware.existing(tmp_path / "a" / "b") == tmp_path


def test_processor_has_a_name_and_instruction_sets():
    name, sets = hardware.processor()
    assert name.strip()
    assert sets & {"fpu", "fp", "asimd"}


def test_mapped_file_is_named_with_its_inode():
    mapped = dict(hardware.mapped_files(os.getpid()))
    libraries = {path: inode for path, inode in mapped.items() if "libc.so" in path}
    assert libraries
    assert all(Path(path).stat().st_ino == inode for path, inode in libraries.items())
    assert list(hardware.mapped_files(2**22 + 1)) == []


def test_boot_has_the_same_id_until_the_next_one():
    assert len(hardware.boot_id()) == 36
    assert hardware.boot_id() == hardware.boot_id()


def test_arm_processor_is_named_by_all_its_kinds_of_cores_and_not_by_a_number():
    def core(part: str, maker: str = "0x41") -> str:
        number = f"CPU implementer\t: {maker}\nCPU variant\t: 0x0\nCPU part\t: {part}\n"
        return f"Features\t: fp asimd\n{number}\n"

    # The cores of a GB10, as its kernel prints them: five and five, twice.
    gb10 = (core("0xd87") * 5 + core("0xd85") * 5) * 2
    assert hardware.core_names(gb10) == "Cortex-A725, Cortex-X925"
    assert hardware.core_names(core("0xd99")) == "part 0xd99"
    assert hardware.core_names(core("0x004", maker="0x4e")) == "0x4e 0x004"
    assert hardware.core_names("model name\t: Xeon\nmodel name\t: Xeon\nCPU part\t: 1\n") == "Xeon"
    assert hardware.core_names("") == ""
