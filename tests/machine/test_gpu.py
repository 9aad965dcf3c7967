"""The driver: NVML with a small library in its place, nvidia-smi without one, and how often each
is asked.
"""

import subprocess
import time
from pathlib import Path

import pytest

from tests.machine.conftest import House
from workspace.core.process import Absent, Broken, Slow, There
from workspace.machine import doctor, gpu, hardware
from workspace.machine.gpu import Gpu, Memory, Resident, Sensors
from workspace.machine.machine import Machine

# The part of nvml.h that an H100 with one process needs.
NVML = r"""
#include <string.h>
#include <unistd.h>
typedef struct { unsigned long long total, free, used; } memory;
typedef struct { unsigned pid; unsigned long long used; unsigned gi, ci; } process;
int nvmlInitWithFlags(unsigned flags) { INIT; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strcpy(text, "580.95.05"); return 0; }
int nvmlSystemGetCudaDriverVersion(int *version) { *version = 13000; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = COUNT; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = 0; return 0; }
int nvmlDeviceGetName(void *gpu, char *text, unsigned size) {
    strcpy(text, "NVIDIA H100"); return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *gpu, int *major, int *minor) {
    *major = 9; *minor = 0; return 0;
}
int nvmlDeviceGetMemoryInfo(void *gpu, memory *found) {
    found->total = 80ULL << 30; found->free = 70ULL << 30; return MEMORY;
}
int nvmlDeviceGetClockInfo(void *gpu, int kind, unsigned *mhz) { *mhz = 1980 - kind; return 0; }
int nvmlDeviceGetTemperature(void *gpu, int kind, unsigned *celsius) { *celsius = 41; return 0; }
int nvmlDeviceGetPowerUsage(void *gpu, unsigned *milliwatts) { *milliwatts = 70500; return 0; }
int nvmlDeviceGetCurrentClocksEventReasons(void *gpu, unsigned long long *bits) {
    *bits = 4; return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *gpu, unsigned *count, process *found) {
    if (!found) { *count = 1; return 7; }
    *count = 1; found[0].pid = 4711; found[0].used = 10ULL << 30; return 0;
}
int nvmlSystemGetProcessName(unsigned pid, char *text, unsigned size) {
    strcpy(text, "/usr/bin/python3"); return 0;
}
const char *nvmlErrorString(int code) { return "Driver/library version mismatch"; }
"""
H100 = Gpu("NVIDIA H100", "9.0", "580.95.05")


def nvml(house: House, *, init: str = "return 0", count: int = 1, memory: int = 0) -> Machine:
    """A machine with NVML's library: `init` is the body of its first call, 3 is `not supported`."""
    folder = house.layout.root.parent / "nvml"
    folder.mkdir(exist_ok=True)
    values = [f"-DINIT={init}", f"-DCOUNT={count}", f"-DMEMORY={memory}"]
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", folder / gpu.LIBRARY, *values],
        input=NVML,
        text=True,
        check=True,
    )
    return house.machine(LD_LIBRARY_PATH=str(folder))


def recorded(house: House, script: str) -> Path:
    """Put a fake nvidia-smi on PATH; return the file in which it records its calls."""
    log = house.layout.root.parent / "nvidia-smi.log"
    house.program("nvidia-smi", f'echo "$*" >> "{log}"\n{script}')
    return log


def test_nvml_answers_all_in_one_call_and_the_program_is_not_started(house: House) -> None:
    log = recorded(house, "exit 9")
    driver = nvml(house).driver
    assert driver.gpus() == There((H100,))
    assert driver.cuda() == "13.0"
    assert driver.memories() == (Memory(80.0, 70.0),)
    assert driver.residents() == (Resident(4711, "/usr/bin/python3", 10.0),)
    assert driver.sensors() == (Sensors(1979, 1978, 41, 70.5, 4),)
    assert not log.exists()


def test_process_is_listed_with_each_gpu_that_it_holds(house: House) -> None:
    residents = nvml(house, count=2).driver.residents()
    assert [(resident.pid, resident.gpu) for resident in residents] == [(4711, 0), (4711, 1)]


def test_fact_that_nvml_does_not_report_is_none(house: House) -> None:
    driver = nvml(house, memory=3).driver
    assert driver.gpus() == There((H100,))
    assert driver.memories() == (None,)


def test_nvml_that_fails_is_broken_with_its_message_and_the_program_is_not_asked(
    house: House,
) -> None:
    log = recorded(house, "echo 'NVIDIA GB10, 12.1, 580'")
    driver = nvml(house, init="return 18").driver
    answer = driver.gpus()
    assert isinstance(answer, Broken)
    assert "mismatch" in answer.message
    assert (driver.cuda(), driver.memories(), driver.residents()) == (None, (), ())
    assert nvml(house, count=0).driver.gpus() == Broken("the driver shows no GPU")
    assert not log.exists()


def test_nvml_that_never_returns_is_slow_within_five_seconds(house: House) -> None:
    machine = nvml(house, init="for (;;) pause()")
    started = time.monotonic()
    assert machine.driver.gpus() == Slow(gpu.ANSWER_S)
    assert time.monotonic() - started < 5
    assert machine.device == "cuda"


def test_library_that_cannot_be_loaded_leaves_the_answer_to_the_program(house: House) -> None:
    folder = house.layout.root.parent / "nvml"
    folder.mkdir()
    (folder / gpu.LIBRARY).write_text("not a library")
    here = {"LD_LIBRARY_PATH": str(folder), "PATH": str(house.bin)}
    assert house.machine(**here).driver.gpus() == Absent()
    recorded(house, "echo 'NVIDIA H100, 9.0, 580.95.05'")
    assert house.machine(**here).driver.gpus() == There((H100,))


def test_nvml_that_crashes_leaves_the_answer_to_the_program(house: House) -> None:
    recorded(house, "echo 'NVIDIA H100, 9.0, 580.95.05'")
    assert nvml(house, init="__builtin_trap()").driver.gpus() == There((H100,))


def test_each_answer_of_the_program_is_told_from_the_others(house: House) -> None:
    assert house.machine(PATH=str(house.bin)).driver.gpus() == Absent()
    recorded(house, "echo 'Failed to initialize NVML: Unknown Error'; echo 'more'; exit 255")
    assert house.machine().driver.gpus() == Broken("Failed to initialize NVML: Unknown Error")
    recorded(house, "exit 15")
    assert house.machine().driver.gpus() == Broken("exited with 15")
    recorded(house, "echo 'No devices were found'; exit 6")
    assert house.machine().driver.gpus() == Broken("No devices were found")


@pytest.mark.parametrize(
    ("name", "capability", "memory", "has_own"),
    [
        ("NVIDIA H100", "9.0", "81559, 70000", True),
        ("NVIDIA GB10", "12.1", "[N/A], [N/A]", False),
        ("NVIDIA GB10", "12.1", "Not Supported, Not Supported", False),
        ("NVIDIA GB10", "12.1", "0, 0", False),
        # Drivers that report the machine's memory as the GPU's.
        ("NVIDIA GB10", "[N/A]", "124610, 3820", False),
        ("NVIDIA Thor", "11.0", "124610, 3820", False),
        ("Unheard of", "13.0", "{machine}, 3820", False),
        # These have memory of their own beside a large one of the machine.
        ("NVIDIA GH200 480GB", "9.0", "97871, 97000", True),
        ("NVIDIA GB300", "10.3", "284208, 280000", True),
        # As much memory as the machine, by chance.
        ("NVIDIA RTX PRO 6000 Blackwell", "12.0", "{machine}, 90000", True),
        ("NVIDIA H100", "9.0", "{machine}, 70000", True),
        ("NVIDIA Jetson AGX Orin", "[N/A]", "62841, 1000", False),
    ],
)
def test_gpu_that_shares_the_machines_memory_is_known_by_more_than_one_sign(
    house: House, name: str, capability: str, memory: str, *, has_own: bool
) -> None:
    memory = memory.format(machine=round(hardware.whole_memory_gib() * 1024))
    identity = f"{name}, {capability}, 580"
    recorded(house, f'case "$*" in *memory.total*) echo "{memory}";; *) echo "{identity}";; esac')
    assert (house.machine().driver.memories()[0] is not None) == has_own


def test_each_gpu_has_a_decision_of_its_own(house: House) -> None:
    recorded(
        house,
        'case "$*" in *memory.total*) echo "124610, 3820"; echo "24564, 24000";;\n'
        "*uuid*) echo GPU-aa; echo GPU-bb;;\n"
        '*) echo "NVIDIA GB10, 12.1, 580"; echo "NVIDIA GeForce RTX 4090, 8.9, 580";; esac',
    )
    driver = house.machine().driver
    assert driver.memories() == (None, Memory(24564 / 1024, 24000 / 1024))
    assert driver.uuids() == ("GPU-aa", "GPU-bb")


def test_driver_with_fewer_rows_of_memory_than_gpus_says_nothing_of_the_others(
    house: House,
) -> None:
    recorded(
        house,
        'case "$*" in *memory.total*) echo "24564, 24000";;\n'
        '*) echo "NVIDIA L4, 8.9, 580"; echo "NVIDIA L4, 8.9, 580";; esac',
    )
    assert house.machine().driver.memories()[1] is None


def test_doctor_asks_the_driver_each_thing_once(house: House) -> None:
    log = recorded(
        house,
        'case "$*" in *--query-gpu=name*) echo "NVIDIA H100, 9.0, 580.95.05";; *) true;; esac',
    )
    machine = house.machine(DEVICE="cuda")
    checks = [check for check in doctor.CHECKS if "network" not in check.purposes]
    doctor.examine(doctor.Case(machine), checks)
    doctor.examine(doctor.Case(machine, is_native=True), checks)
    calls = log.read_text().splitlines()
    assert sorted(calls) == sorted(set(calls))
    assert len([call for call in calls if "--query-gpu" in call]) == 1
