"""Conditions of a measurement: load, clocks, why a GPU's driver limits them, and the idle check.

It only observes; a value that the system does not report is None.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.bench.results import Clocks, Conditions
from workspace.core import process
from workspace.core.console import Console
from workspace.core.errors import ToolchainError, WorkspaceError
from workspace.core.settings import Settings
from workspace.machine.hardware import GPU_KILL_S, GPU_QUERY_S
from workspace.server import process_tree

_CPUS = Path("/sys/devices/system/cpu")
_MEASURES = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
# A bit field; drivers before 535 have only the former name.
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# The reasons why the driver limits the clocks (nvml.h, nvmlClocksEventReason*). An idle GPU and
# clocks that the user set are left out: they are no fault.
_BITS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software heat limit",
    0x40: "hardware heat limit",
    0x80: "power brake",
}
LOOK_S = 1.0
# After this time the processes of a build or of the last start are gone.
WAIT_S = 30.0
# The load of other programs, in cores, that a measurement tolerates: 0.2 of two cores, one of the
# twenty cores of a Spark.
LEAST_CORES, MOST_SHARE = 0.2, 0.05
SHOWN = 3
_TICKS = os.sysconf("SC_CLK_TCK")
_OVERRIDE = (
    "--allow-busy    measures anyway, and needs more starts to separate a difference from noise"
)


def observe(settings: Settings, *, has_gpu: bool) -> Conditions:
    """Observe load and clocks once; a driver takes up to 1 s, a driver with a fault 7 s."""
    return Conditions(
        round(os.getloadavg()[0], 2), _processor_mhz(_CPUS), _clocks(settings) if has_gpu else ()
    )


def _processor_mhz(folder: Path) -> float | None:
    """Return the mean clock of the cores (cpufreq, kHz)."""
    found = []
    for path in folder.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"):
        try:
            found.append(int(path.read_text(encoding="ascii")) / 1000)
        except (OSError, ValueError):
            continue
    return round(sum(found) / len(found), 1) if found else None


def _clocks(settings: Settings) -> tuple[Clocks, ...]:
    for reason in _REASONS:
        done = _query_driver(
            settings,
            f"--query-gpu={','.join((*_MEASURES, reason))}",
            "--format=csv,noheader,nounits",
        )
        if done is None:
            return ()
        if done.returncode == 0:
            return tuple(
                read_clocks(line.split(",")) for line in done.stdout.splitlines() if line.strip()
            )
    return ()


def _query_driver(settings: Settings, *flags: str) -> process.Completed | None:
    """Run nvidia-smi; return None where there is none, or it does not end in time."""
    environment = settings.child_environment("plain")
    program = shutil.which("nvidia-smi", path=environment.get("PATH", ""))
    if program is None:
        return None
    try:
        return process.capture(
            ["timeout", "-k", f"{GPU_KILL_S:g}", f"{GPU_QUERY_S:g}", program, *flags],
            env=environment,
            timeout_s=GPU_QUERY_S + GPU_KILL_S + 0.5,
        )
    except ToolchainError:
        return None


def read_clocks(fields: Sequence[str]) -> Clocks:
    """Parse one row of the driver's output. On unified memory some fields are `[N/A]`."""
    numbers = [_number(field) for field in [*fields[:4], *[""] * 4][:4]]
    return Clocks(
        numbers[0],
        numbers[1],
        numbers[2],
        numbers[3],
        _reasons(fields[4].strip()) if len(fields) > 4 else None,
    )


def _reasons(field: str) -> str | None:
    try:
        bits = int(field, 16)
    except ValueError:
        return None
    return ", ".join(name for bit, name in _BITS.items() if bits & bit) or "nothing"


def _number(field: str) -> float | None:
    try:
        return float(field)
    except ValueError:
        return None


@dataclass(frozen=True)
class _Times:
    """Processor seconds so far: `used` of all our cores together, `processes` by process."""

    used: float
    processes: Mapping[int, float]


def require_idle(
    settings: Settings, *, has_gpu: bool, allow_busy: bool, console: Console, wait_s: float = WAIT_S
) -> None:
    """Wait up to `wait_s` until the machine is idle.

    Raises WorkspaceError naming the programs that use the machine, unless `allow_busy`.
    """
    if allow_busy:
        return
    deadline, is_reported = time.monotonic() + wait_s, False
    while others := observe_others(settings, has_gpu=has_gpu):
        if time.monotonic() >= deadline:
            raise WorkspaceError(
                f"something else uses this machine: {'; '.join(others)}", hint=_OVERRIDE
            )
        if not is_reported:
            console.info(
                f"waiting up to {wait_s:.0f} s for the machine to be idle: {'; '.join(others)}"
            )
            is_reported = True


def observe_others(settings: Settings, *, has_gpu: bool, look_s: float = LOOK_S) -> tuple[str, ...]:
    """Return a phrase for each other use of the machine, none if it is idle; takes `look_s`."""
    known = process_tree.living()
    ours = process_tree.below({os.getpid()}, known) | {os.getpid()}
    load = _load_of_others(ours, look_s)
    servers = [
        f"a vLLM runs, process {pid}" for pid in sorted(known.keys() - ours) if _is_vllm(pid)
    ][:SHOWN]
    return (*load, *servers, *(_on_gpus(settings, ours) if has_gpu else ()))


def _load_of_others(ours: Collection[int], look_s: float) -> list[str]:
    """Compare two samples of processor seconds: describe other load than ours, if it matters."""
    before = _times()
    time.sleep(look_s)
    after = _times()
    used = {
        pid: (seconds - before.processes.get(pid, seconds)) / look_s
        for pid, seconds in after.processes.items()
        if pid not in ours
    }
    own = sum(after.processes.get(pid, 0) - before.processes.get(pid, 0) for pid in ours)
    cores = len(os.sched_getaffinity(0))
    load = (after.used - before.used - own) / look_s
    if load <= max(LEAST_CORES, cores * MOST_SHARE):
        return []
    top = sorted((pid for pid in used if used[pid] >= LEAST_CORES / 2), key=lambda pid: -used[pid])[
        :SHOWN
    ]
    names = ", ".join(f"{_name(pid)} ({pid}) {used[pid]:.1f}" for pid in top)
    return [
        f"{load:.1f} of {cores} cores are busy"
        + (f": {names}" if names else " with processes that this user may not see")
    ]


def _times() -> _Times:
    """Read the seconds of our cores (proc_stat(5)) and of each process once."""
    import psutil

    cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    used = 0.0
    for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
        name, *numbers = line.split()
        if name in cores:
            user, nice, system, _, _, irq, softirq = map(int, numbers[:7])
            used += (user + nice + system + irq + softirq) / _TICKS
    processes = {
        running.pid: times.user + times.system
        for running in psutil.process_iter(["cpu_times"])
        if (times := running.info["cpu_times"])
    }
    return _Times(used, processes)


def _name(pid: int) -> str:
    import psutil

    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).name()
    return "a process"


def _is_vllm(pid: int) -> bool:
    """Return whether a process is a vLLM server, a benchmark, or an engine (by its own title)."""
    import psutil

    with contextlib.suppress(psutil.Error):
        argv = psutil.Process(pid).cmdline() or [""]
        if argv[0].startswith("VLLM::"):
            return True
        at = next(
            (
                place
                for place, argument in enumerate(argv[:3])
                if argument.rpartition("/")[2] == "vllm"
            ),
            None,
        )
        return "vllm.entrypoints.openai.api_server" in argv or (
            at is not None and argv[at + 1 : at + 2] in (["serve"], ["bench"])
        )
    return False


def _on_gpus(settings: Settings, ours: Collection[int]) -> tuple[str, ...]:
    """Return a phrase for each other process that the driver lists on a GPU."""
    done = _query_driver(settings, "--query-compute-apps=pid,process_name", "--format=csv,noheader")
    if done is None or done.returncode != 0:
        return ()
    rows = [line.partition(",") for line in done.stdout.splitlines()]
    found = [
        (int(pid), name.strip().rpartition("/")[2])
        for pid, _, name in rows
        if pid.strip().isdigit()
    ]
    return tuple(
        f"{name or 'a process'} ({pid}) holds a GPU" for pid, name in found if pid not in ours
    )[:SHOWN]
