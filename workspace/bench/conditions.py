"""How busy and how warm the machine is at one moment: load, clocks, and why a GPU's driver holds them back. It only looks; what is not said is None."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from workspace.bench.record import Clocks, Conditions
from workspace.core import process
from workspace.core.errors import ToolchainError
from workspace.core.settings import Settings
from workspace.environment.machine import GPU_KILL_S, GPU_QUERY_S

_CPUS = Path("/sys/devices/system/cpu")
_MEASURES = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
# A bit field; drivers before 535 know it by its former name only.
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# Why clocks are held back (nvml.h, nvmlClocksEventReason*). An idle GPU and clocks that the user set are nobody's fault.
_BITS = {0x4: "power cap", 0x8: "hardware slowdown", 0x10: "sync boost", 0x20: "software heat limit", 0x40: "hardware heat limit", 0x80: "power brake"}


def observe(settings: Settings, *, has_gpu: bool) -> Conditions:
    """Look once; asking a driver costs up to a second, one in trouble 7 s."""
    return Conditions(round(os.getloadavg()[0], 2), _processor_mhz(_CPUS), _clocks(settings) if has_gpu else ())


def _processor_mhz(folder: Path) -> float | None:
    """The mean of the cores' clocks (cpufreq, kHz)."""
    found = []
    for path in folder.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"):
        try:
            found.append(int(path.read_text(encoding="ascii")) / 1000)
        except (OSError, ValueError):
            continue
    return round(sum(found) / len(found), 1) if found else None


def _clocks(settings: Settings) -> tuple[Clocks, ...]:
    environment = settings.child_environment("plain")
    program = shutil.which("nvidia-smi", path=environment.get("PATH", ""))
    for reason in _REASONS if program else ():
        query = ["timeout", "-k", f"{GPU_KILL_S:g}", f"{GPU_QUERY_S:g}", str(program), f"--query-gpu={','.join((*_MEASURES, reason))}"]
        try:
            done = process.capture([*query, "--format=csv,noheader,nounits"], env=environment, timeout_s=GPU_QUERY_S + GPU_KILL_S + 0.5)
        except ToolchainError:
            return ()
        if done.returncode == 0:
            return tuple(read(line.split(",")) for line in done.stdout.splitlines() if line.strip())
    return ()


def read(words: Sequence[str]) -> Clocks:
    """Read one row of the driver's answer. On unified memory some of it is `[N/A]`."""
    numbers = [_number(word) for word in [*words[:4], *[""] * 4][:4]]
    return Clocks(numbers[0], numbers[1], numbers[2], numbers[3], _reasons(words[4].strip()) if len(words) > 4 else None)


def _reasons(word: str) -> str | None:
    try:
        bits = int(word, 16)
    except ValueError:
        return None
    return ", ".join(name for bit, name in _BITS.items() if bits & bit) or "nothing"


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
