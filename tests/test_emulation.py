"""The emulated machine of `nox -s proof -- aarch64` in small: it answers as a GB10 does, and a
failure on it is the emulator's or the product's.
"""

import re
from pathlib import Path

import pytest

from tests.proof.aarch64 import emulation
from tests.proof.aarch64.emulation import Result
from workspace.core import settings
from workspace.core.paths import Layout
from workspace.core.process import There
from workspace.machine import hardware
from workspace.machine.gpu import Driver


def test_machine_has_the_processor_the_memory_and_the_driver_of_a_gb10(tmp_path: Path) -> None:
    assert hardware.core_names("\n".join(emulation.cpuinfo())) == "Cortex-A725, Cortex-X925"
    meminfo = dict(re.findall(r"^(\w+): +(\d+)", (emulation.MACHINE / "meminfo").read_text(), re.M))
    assert 119 < int(meminfo["MemTotal"]) / 2**20 < 120
    # psutil warns of each of these that is missing.
    assert {"MemAvailable", "Active", "Inactive", "Shmem", "Slab", "SwapFree"} <= set(meminfo)
    environ = {"PATH": f"{emulation.MACHINE}:/usr/bin:/bin"}
    driver = Driver(settings.load(Layout(tmp_path), environ=environ))
    answer = driver.gpus()
    assert isinstance(answer, There)
    (gpu,) = answer.value
    assert (gpu.name, gpu.capability, gpu.driver) == ("NVIDIA GB10", "12.1", "580.95.05")
    assert (driver.cuda(), driver.memories(), driver.residents()) == ("13.0", (None,), ())


@pytest.mark.parametrize(
    ("status", "output", "verdict"),
    [
        (139, "x\nqemu: uncaught target signal 11 (Segmentation fault)\n", "the emulator, by its"),
        (7, "error: python gave no answer in 300 s\n", "the emulator, by its line: error: python"),
        (1, "_C.abi3.so did not end within 120 s\n", "the emulator, by its line: _C.abi3.so"),
        (-9, "", "the emulator: the command was killed"),
        (8, "FAIL kernels.activation: off by 167\n", "the product"),
    ],
)
def test_failure_is_the_emulators_by_its_own_line_only(
    status: int, output: str, verdict: str
) -> None:
    result = Result("inv x", status, output, 3.0)
    assert result.blame().startswith(verdict)
    with pytest.raises(AssertionError, match=f"inv x: exit code {status} after 3 s\nat fault is t"):
        result.require()
    assert result.require(0, status) == output
