"""How many compilers at once, and how much memory for all of them: the arithmetic, and the
sentences that say it.

Everything here is decided from what it is given; the numbers then bind in admission.py.
"""

import contextlib
import math
import os
import re
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from workspace.compile.scheduler import Live
from workspace.core.errors import SettingsError
from workspace.core.settings import LARGEST_COUNT, Settings
from workspace.machine import hardware
from workspace.machine.hardware import Machine

AUTO = "auto"
HINT = "./scripts/inv rebuild --jobs auto   # as many as cores and memory allow"
MEMORY_HINT = (
    "./scripts/inv rebuild --memory auto   # what is available, less what is left for the system"
)
# What is left for the system, a share of all memory and never less than the other: on a Spark GPU
# and processor share it, and without any the machine freezes before the kernel kills
# (flashinfer-ai/flashinfer#3634).
RESERVED_SHARE, LEAST_RESERVED_GIB = 0.1, 2.0
# With less than this no compiler gets far.
LEAST_BUDGET_GIB = 1.0
# ninja, its children and the broker have some 1,000 files each (RLIMIT_NOFILE); a waiting unit is
# one of them.
MOST_VISIBLE = 900


@dataclass(frozen=True)
class Jobs:
    """`count` compilers at once, of `nvcc_threads` threads each; `sentence` says how that came
    about.
    """

    count: int
    nvcc_threads: int
    sentence: str


@dataclass(frozen=True)
class Memory:
    """GiB for all compilers together, GiB left for the system, and how that came about."""

    budget_gib: float
    reserve_gib: float
    sentence: str


def count(settings: Settings, *, cores: int, flag: str | None = None) -> Jobs:
    """Decide how many compilers run at once. `flag` is what followed --jobs; it outranks MAX_JOBS,
    be it `auto` or a number.

    Raises SettingsError for what is neither `auto` nor a whole number of at least 1.
    """
    if (
        flag is not None
        and flag != AUTO
        and not (re.fullmatch(r"[0-9]{1,9}", flag) and 0 < int(flag) <= LARGEST_COUNT)
    ):
        shown = settings.presentable(flag)
        raise SettingsError(
            f"--jobs: {shown!r} is neither auto nor a whole number of at least 1 and at most"
            f" {LARGEST_COUNT}",
            hint=HINT,
        )
    threads = settings.count("NVCC_THREADS") or 1
    wanted = settings.count("MAX_JOBS") if flag is None else None if flag == AUTO else int(flag)
    if wanted is None:
        bound, said = cores, f"auto: {cores} {'core' if cores == 1 else 'cores'}"
    elif flag is not None or settings.source("MAX_JOBS") == "flag":
        bound, said = wanted, f"--jobs {wanted}"
    else:
        bound, said = (
            wanted,
            (
                f"MAX_JOBS={wanted} in"
                f" {'the shell' if settings.source('MAX_JOBS') == 'shell' else '.env'}"
            ),
        )
    return _divided(bound, min(threads, bound), threads, said)


def _divided(bound: int, threads: int, asked: int, said: str) -> Jobs:
    """An nvcc of several threads is several compilers at once: what is asked for is divided by
    them, as vLLM's setup.py does (vllm-project/vllm#20079).
    """
    number = bound // threads
    nouns = "compiler" if number == 1 else "compilers"
    if threads > 1:
        nouns, said = f"{nouns} of {threads} threads", f"{said} / NVCC_THREADS {threads}"
    else:
        said = f"{said}; NVCC_THREADS 1"
    return Jobs(
        number,
        threads,
        f"{number} {nouns} at once: {said}"
        + (f", not the {asked} asked for" if threads < asked else ""),
    )


def memory(machine: Machine, *, flag: str | None = None) -> Memory:
    """Decide how much memory all compilers together may take. `flag` is what followed --memory:
    GiB, or `auto` as without it.

    Raises SettingsError for what is no number of GiB, and for more than the machine, or its control
    group, has.
    """
    total, available = machine.memory_gib, machine.available_gib
    reserve = min(max(LEAST_RESERVED_GIB, total * RESERVED_SHARE), total / 2)
    if flag is None or flag == AUTO:
        budget = max(LEAST_BUDGET_GIB, available - reserve)
        said = (
            f"{budget:.1f} GiB for compilers: {available:.1f} of {total:.1f} are available,"
            f" {reserve:.1f} are left for the system"
        )
        if budget > available - reserve:
            said += (
                f"; that leaves too little: {LEAST_BUDGET_GIB:.1f} is the least, and one compiler"
                " at a time"
            )
        return Memory(budget, reserve, said)
    wanted = float(flag) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", flag) else math.nan
    if not wanted >= LEAST_BUDGET_GIB:
        raise SettingsError(
            f"--memory: {flag[:40]!r} is neither auto nor a number of GiB of at least"
            f" {LEAST_BUDGET_GIB:g}",
            hint=MEMORY_HINT,
        )
    if wanted > total:
        raise SettingsError(
            f"--memory {flag}: there are {total:.1f} GiB in this machine, or in its control group",
            hint=MEMORY_HINT,
        )
    said = f"{wanted:g} GiB for compilers: --memory {flag}"
    if wanted > (free := max(0.0, available - reserve)):
        said += (
            f"; only {free:.1f} are to be had now ({available:.1f} available, {reserve:.1f} left"
            " for the system): compilers wait for the rest"
        )
    return Memory(wanted, reserve, said)


def environment(jobs: Jobs, *, ticket: str) -> Mapping[str, str]:
    """What a build's children are told, so that what starts compilers by itself keeps to the number
    too.

    `ticket` is the launcher (tickets.install). Nested CMake, torch's own builder, cargo and make:
    each has its own name for the same thing.
    """
    number = str(jobs.count)
    return {
        "MAX_JOBS": number,
        "NVCC_THREADS": str(jobs.nvcc_threads),
        "CARGO_BUILD_JOBS": number,
        "CMAKE_BUILD_PARALLEL_LEVEL": number,
        "RUSTC_WRAPPER": ticket,
        "CMAKE_C_COMPILER_LAUNCHER": ticket,
        "CMAKE_CXX_COMPILER_LAUNCHER": ticket,
        "CMAKE_CUDA_COMPILER_LAUNCHER": ticket,
    }


def visible(units: int, jobs: Jobs) -> int:
    """What ninja is given as -j: all units, for only those that have asked for a ticket can be put
    into the best order. The tickets keep to `jobs`.
    """
    return max(jobs.count, min(units, MOST_VISIBLE))


_PSI = Path("/proc/pressure/memory")
_CGROUPS = Path("/sys/fs/cgroup")


def memory_status(reserve_gib: float) -> Live:
    """Return what may still be taken without touching `reserve_gib`: of the machine's memory, or of
    the control group's limit where that is less.
    """
    import psutil

    available = float(psutil.virtual_memory().available)
    for limit, used in hardware.memory_limits():
        available = min(available, max(0.0, limit - used))
    return Live(available / hardware.GIB - reserve_gib, _pressed_percent())


def _pressed_percent() -> float:
    """Share of the last 10 s in which at least one task stood still for want of memory; 0 where the
    kernel does not count it.
    """
    with contextlib.suppress(OSError):
        if found := re.search(
            r"^some avg10=([0-9.]+)", _PSI.read_text(encoding="ascii"), re.MULTILINE
        ):
            return float(found[1])
    return 0.0


def kills() -> int:
    """Return how often the kernel has killed for want of memory: in this control group where that
    is counted, else on this machine.
    """
    for file in (*_group_counters(), Path("/proc/vmstat")):
        with contextlib.suppress(OSError):
            if found := re.search(
                r"^oom_kill (\d+)$", file.read_text(encoding="ascii"), re.MULTILINE
            ):
                return int(found[1])
    return 0


def _group_counters() -> tuple[Path, ...]:
    """Where version 2, then 1, of control groups counts kills (cgroups(7))."""
    with contextlib.suppress(OSError):
        places = dict(
            line.split(":", 2)[1:]
            for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        )
        version_2 = [_CGROUPS / places[""].strip("/") / "memory.events"] if "" in places else []
        version_1 = (
            [_CGROUPS / "memory" / places["memory"].strip("/") / "memory.oom_control"]
            if "memory" in places
            else []
        )
        return (*version_2, *version_1)
    return ()


_PAGE_GIB = os.sysconf("SC_PAGE_SIZE") / hardware.GIB


@dataclass(frozen=True)
class Process:
    """A process: its parent, its group, and the GiB that it holds (resident, shared pages
    included).
    """

    parent: int
    group: int
    held_gib: float


def living() -> dict[int, Process]:
    """Return all processes that live, in one pass (proc_pid_stat(5))."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            # One that ends meanwhile is none.
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:
                state, parent, group, *rest = file.read().rpartition(b")")[2].split()
                if state not in (b"Z", b"X"):
                    found[int(entry)] = Process(int(parent), int(group), int(rest[18]) * _PAGE_GIB)
    return found


def parents(number: int) -> Iterator[int]:
    """Yield the parent of a process, its parent, and so on."""
    with contextlib.suppress(OSError):
        while number > 1:
            number = int(Path(f"/proc/{number}/stat").read_bytes().rpartition(b")")[2].split()[1])
            yield number


def below(roots: frozenset[int], known: Mapping[int, Process]) -> dict[int, set[int]]:
    """Return, for each of `roots`, the processes below it, without itself."""
    found: dict[int, set[int]] = {root: set() for root in roots}
    for number in known:
        path: list[int] = []
        at = number
        while at in known and at not in path:
            if at in roots:
                found[at].update(path)
            path.append(at)
            at = known[at].parent
    return found


def signal_process(roots: frozenset[int], groups: frozenset[int], number: signal.Signals) -> None:
    """Signal what lives below `roots`, and in `groups`, this process's own group aside."""
    known = living()
    told = {pid for pids in below(roots, known).values() for pid in pids}
    told |= {pid for pid, process in known.items() if process.group in groups - {0, os.getpgrp()}}
    for pid in told:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
