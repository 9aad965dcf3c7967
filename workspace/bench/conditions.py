"""How busy and how warm the machine is at one moment: load, clocks, and why a GPU's driver holds
them back. It only looks; what is not said is None.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Sequence
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
# A bit field; drivers before 535 know it by its former name only.
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# Why clocks are held back (nvml.h, nvmlClocksEventReason*). An idle GPU and clocks that the user
# set are nobody's fault.
_BITS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software heat limit",
    0x40: "hardware heat limit",
    0x80: "power brake",
}


def observe(settings: Settings, *, has_gpu: bool) -> Conditions:
    """Look once; asking a driver costs up to a second, one in trouble 7 s."""
    return Conditions(
        round(os.getloadavg()[0], 2), _processor_mhz(_CPUS), _clocks(settings) if has_gpu else ()
    )


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
        query = [
            "timeout",
            "-k",
            f"{GPU_KILL_S:g}",
            f"{GPU_QUERY_S:g}",
            str(program),
            f"--query-gpu={','.join((*_MEASURES, reason))}",
        ]
        try:
            done = process.capture(
                [*query, "--format=csv,noheader,nounits"],
                env=environment,
                timeout_s=GPU_QUERY_S + GPU_KILL_S + 0.5,
            )
        except ToolchainError:
            return ()
        if done.returncode == 0:
            return tuple(read(line.split(",")) for line in done.stdout.splitlines() if line.strip())
    return ()


def read(words: Sequence[str]) -> Clocks:
    """Read one row of the driver's answer. On unified memory some of it is `[N/A]`."""
    numbers = [_number(word) for word in [*words[:4], *[""] * 4][:4]]
    return Clocks(
        numbers[0],
        numbers[1],
        numbers[2],
        numbers[3],
        _reasons(words[4].strip()) if len(words) > 4 else None,
    )


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


LOOK_S = 1.0
# What a build or the start before leaves behind is gone by then.
WAIT_S = 30.0
# Cores' worth of work by others that a measurement bears: of two cores 0.2, of a Spark's twenty
# one.
LEAST_CORES, MOST_SHARE = 0.2, 0.05
SHOWN = 3
_TICKS = os.sysconf("SC_CLK_TCK")
_OVERRIDE = (
    "--allow-busy    measures all the same, and takes longer to tell a difference from noise"
)


@dataclass(frozen=True)
class _Times:
    """Clock ticks so far: of each of our cores what was busy, and of each process what it used."""

    busy: int
    processes: dict[int, int]


def require_idle(
    settings: Settings, *, has_gpu: bool, is_busy: bool, console: Console, wait_s: float = WAIT_S
) -> None:
    """Wait a while for the machine to be quiet. Raises WorkspaceError naming what uses it, unless
    `is_busy` says that this is known.
    """
    if is_busy:
        return
    deadline, is_told = time.monotonic() + wait_s, False
    while others := observe_others(settings, has_gpu=has_gpu):
        if time.monotonic() >= deadline:
            raise WorkspaceError(
                f"something else uses this machine: {'; '.join(others)}", hint=_OVERRIDE
            )
        if not is_told:
            console.info(
                f"waiting up to {wait_s:.0f} s for the machine to be quiet: {'; '.join(others)}"
            )
            is_told = True


def observe_others(settings: Settings, *, has_gpu: bool, look_s: float = LOOK_S) -> tuple[str, ...]:
    """Say what else uses the machine, a phrase each; nothing where it is quiet. Takes `look_s`
    seconds.
    """
    known = process_tree.living()
    ours = process_tree.below({os.getpid()}, known) | {os.getpid()}
    before = _times()
    time.sleep(look_s)
    after = _times()
    used = {
        number: (ticks - before.processes.get(number, ticks)) / _TICKS / look_s
        for number, ticks in after.processes.items()
        if number not in ours
    }
    own = sum(after.processes.get(number, 0) - before.processes.get(number, 0) for number in ours)
    cores = len(os.sched_getaffinity(0))
    busy = (after.busy - before.busy - own) / _TICKS / look_s
    found = []
    if busy > max(LEAST_CORES, cores * MOST_SHARE):
        top = sorted(
            (number for number in used if used[number] >= LEAST_CORES / 2),
            key=lambda number: -used[number],
        )[:SHOWN]
        names = ", ".join(f"{_name(number)} ({number}) {used[number]:.1f}" for number in top)
        found.append(
            f"{busy:.1f} of {cores} cores are busy"
            + (f": {names}" if names else " with what this user may not see")
        )
    found += [
        f"a vLLM runs, process {number}"
        for number in sorted(known.keys() - ours)
        if _is_vllm(number)
    ][:SHOWN]
    return (*found, *(_on_gpus(settings, ours) if has_gpu else ()))


def _times() -> _Times:
    """One look at proc_stat(5) and proc_pid_stat(5)."""
    cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    busy = 0
    for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
        name, *numbers = line.split()
        if name in cores:
            user, nice, system, _, _, irq, softirq = map(int, numbers[:7])
            busy += user + nice + system + irq + softirq
    processes = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = Path(f"/proc/{entry}/stat").read_bytes().rpartition(b")")[2].split()
                processes[int(entry)] = int(fields[11]) + int(fields[12])
    return _Times(busy, processes)


def _name(number: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{number}/comm").read_text(encoding="utf-8", errors="replace").strip()
    return "a process"


def _is_vllm(number: int) -> bool:
    """Whether a process is a server of vLLM, a benchmark, or an engine (by the title that it gives
    itself).
    """
    with contextlib.suppress(OSError):
        words = [
            word.decode(errors="replace")
            for word in Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
        ]
        if words[0].startswith("VLLM::"):
            return True
        at = next(
            (place for place, word in enumerate(words[:3]) if word.rpartition("/")[2] == "vllm"),
            None,
        )
        return "vllm.entrypoints.openai.api_server" in words or (
            at is not None and words[at + 1 : at + 2] in (["serve"], ["bench"])
        )
    return False


def _on_gpus(settings: Settings, ours: set[int]) -> tuple[str, ...]:
    """What computes on a GPU, by the driver's word."""
    environment = settings.child_environment("plain")
    program = shutil.which("nvidia-smi", path=environment.get("PATH", ""))
    if program is None:
        return ()
    query = [
        "timeout",
        "-k",
        f"{GPU_KILL_S:g}",
        f"{GPU_QUERY_S:g}",
        program,
        "--query-compute-apps=pid,process_name",
        "--format=csv,noheader",
    ]
    try:
        done = process.capture(query, env=environment, timeout_s=GPU_QUERY_S + GPU_KILL_S + 0.5)
    except ToolchainError:
        return ()
    rows = (
        [line.partition(",") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    )
    found = [
        (int(number), name.strip().rpartition("/")[2])
        for number, _, name in rows
        if number.strip().isdigit()
    ]
    return tuple(
        f"{name or 'a process'} ({number}) holds a GPU"
        for number, name in found
        if number not in ours
    )[:SHOWN]
