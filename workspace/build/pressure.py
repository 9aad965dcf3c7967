"""What the machine says while compilers run: memory left, memory pressure, and kills for want of memory. It only looks."""

import contextlib
import re
from pathlib import Path

from workspace.build.admission import Live
from workspace.environment import machine

_PSI = Path("/proc/pressure/memory")
_CGROUPS = Path("/sys/fs/cgroup")


def look(reserve_gib: float) -> Live:
    """Return what may still be taken without touching `reserve_gib`: of the machine's memory, or of the control group's limit where that is less."""
    import psutil

    available = float(psutil.virtual_memory().available)
    for limit, used in machine.memory_limits():
        available = min(available, max(0.0, limit - used))
    return Live(available / machine.GIB - reserve_gib, _pressed_percent())


def _pressed_percent() -> float:
    """Share of the last 10 s in which at least one task stood still for want of memory; 0 where the kernel does not count it."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^some avg10=([0-9.]+)", _PSI.read_text(encoding="ascii"), re.MULTILINE):
            return float(found[1])
    return 0.0


def kills() -> int:
    """Return how often the kernel has killed for want of memory: in this control group where that is counted, else on this machine."""
    for file in (*_group_counters(), Path("/proc/vmstat")):
        with contextlib.suppress(OSError):
            if found := re.search(r"^oom_kill (\d+)$", file.read_text(encoding="ascii"), re.MULTILINE):
                return int(found[1])
    return 0


def _group_counters() -> tuple[Path, ...]:
    """Where version 2, then 1, of control groups counts kills (cgroups(7))."""
    with contextlib.suppress(OSError):
        places = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines())
        version_2 = [_CGROUPS / places[""].strip("/") / "memory.events"] if "" in places else []
        version_1 = [_CGROUPS / "memory" / places["memory"].strip("/") / "memory.oom_control"] if "memory" in places else []
        return (*version_2, *version_1)
    return ()
