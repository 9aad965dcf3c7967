"""What the machine has: cores, memory, disk, GPUs.

It only looks. A container's limits count where they are tighter than the machine's.
"""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from workspace.core import process
from workspace.core.errors import ToolchainError
from workspace.core.settings import Settings

GIB = 1 << 30
# nvidia-smi of a driver in trouble never answers; asking costs 5 s at most, the kill included.
GPU_QUERY_S = 3.0
GPU_KILL_S = 0.5
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Gpu:
    """One GPU; what the driver does not say is None."""

    name: str
    capability: str | None
    driver: str | None


@dataclass(frozen=True)
class Machine:
    """`cores` are those that this process may run on; `memory_gib` is the control group's limit where that is tighter."""

    architecture: str
    cores: int
    memory_gib: float
    available_gib: float
    gpus: tuple[Gpu, ...]


def observe(settings: Settings) -> Machine:
    """Look at the machine. A driver that is broken, hangs or is missing means no GPU; it costs at most 5 s."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = float(memory.total), float(memory.available)
    for limit, used in memory_limits():
        total = min(total, limit)
        available = min(available, max(0.0, limit - used))
    return Machine(platform.machine(), len(os.sched_getaffinity(0)), total / GIB, available / GIB, _gpus(settings))


def free_gib(path: Path) -> float:
    """Return the GiB that this user may still write on the file system of `path`, or of its nearest parent that is there."""
    state = os.statvfs(existing(path))
    return state.f_bavail * state.f_frsize / GIB


def existing(path: Path) -> Path:
    """Return the path itself, or the nearest parent that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def _gpus(settings: Settings) -> tuple[Gpu, ...]:
    environment = settings.child_environment("plain")
    program = shutil.which("nvidia-smi", path=environment.get("PATH", ""))
    if program is None:
        return ()
    # Drivers before 510 know no compute_cap and refuse the whole query. Memory is not asked for: on unified memory it is N/A.
    for fields in (("name", "compute_cap", "driver_version"), ("name", "driver_version")):
        query = ["timeout", "-k", f"{GPU_KILL_S:g}", f"{GPU_QUERY_S:g}", program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        try:
            done = process.capture(query, env=environment, timeout_s=GPU_QUERY_S + GPU_KILL_S + 0.5)
        except ToolchainError:
            return ()
        if done.returncode == 0:
            return tuple(_gpu(dict(zip(fields, (word.strip() for word in line.split(",")), strict=False))) for line in done.stdout.splitlines() if line.strip())
        if "not a valid field" not in done.stdout + done.stderr:
            return ()
    return ()


def _gpu(said: dict[str, str]) -> Gpu:
    known = {field: text for field, text in said.items() if text and text.strip("[]").lower() not in ("n/a", "not supported", "unknown error")}
    return Gpu(known.get("name", "GPU"), known.get("compute_cap"), known.get("driver_version"))


def memory_limits() -> Iterator[tuple[float, float]]:
    """Yield limit and use, in bytes, of each control group around this process (cgroups(7), versions 1 and 2)."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    versions = {"": (_CGROUPS, "memory.max", "memory.current"), "memory": (_CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")}
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers in versions:
            root, *names = versions[controllers]
            group = root / place.strip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(root):
                    yield from _limit(folder, *names)


def _limit(folder: Path, limit_name: str, used_name: str) -> Iterator[tuple[float, float]]:
    try:
        limit, used, stat = ((folder / name).read_text(encoding="ascii").strip() for name in (limit_name, used_name, "memory.stat"))
    except OSError:
        return
    if limit.isdigit():
        # What the page cache holds of files nobody uses is given back when memory is asked for.
        cached = next((line.split()[1] for line in stat.splitlines() if line.startswith(("inactive_file ", "total_inactive_file "))), "0")
        yield float(limit), max(0.0, float(used) - float(cached))
