"""How many compilers at once, and how much memory for all of them: the arithmetic, and the sentences that say it.

Everything here is decided from what it is given; the numbers then bind in admission.py.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from workspace.core.errors import SettingsError
from workspace.core.settings import LARGEST_COUNT, Settings
from workspace.environment.machine import Machine

AUTO = "auto"
HINT = "./scripts/inv rebuild --jobs auto   # as many as cores and memory allow"
MEMORY_HINT = "./scripts/inv rebuild --memory auto   # what is available, less what is left for the system"
# What is left for the system, a share of all memory and never less than the other: on a Spark GPU and processor share it, and without any the
# machine freezes before the kernel kills (flashinfer-ai/flashinfer#3634).
RESERVED_SHARE, LEAST_RESERVED_GIB = 0.1, 2.0
# With less than this no compiler gets far.
LEAST_BUDGET_GIB = 1.0
# ninja, its children and the broker have some 1,000 files each (RLIMIT_NOFILE); a waiting unit is one of them.
MOST_VISIBLE = 900


@dataclass(frozen=True)
class Jobs:
    """`count` compilers at once, of `nvcc_threads` threads each; `sentence` says how that came about."""

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
    """Decide how many compilers run at once. `flag` is what followed --jobs; it outranks MAX_JOBS, be it `auto` or a number.

    Raises SettingsError for what is neither `auto` nor a whole number of at least 1.
    """
    if flag is not None and flag != AUTO and not (re.fullmatch(r"[0-9]{1,9}", flag) and 0 < int(flag) <= LARGEST_COUNT):
        shown = settings.presentable(flag)
        raise SettingsError(f"--jobs: {shown!r} is neither auto nor a whole number of at least 1 and at most {LARGEST_COUNT}", hint=HINT)
    threads = settings.count("NVCC_THREADS") or 1
    wanted = settings.count("MAX_JOBS") if flag is None else None if flag == AUTO else int(flag)
    if wanted is None:
        bound, said = cores, f"auto: {cores} {'core' if cores == 1 else 'cores'}"
    elif flag is not None or settings.source("MAX_JOBS") == "flag":
        bound, said = wanted, f"--jobs {wanted}"
    else:
        bound, said = wanted, f"MAX_JOBS={wanted} in {'the shell' if settings.source('MAX_JOBS') == 'shell' else '.env'}"
    return _divided(bound, min(threads, bound), threads, said)


def _divided(bound: int, threads: int, asked: int, said: str) -> Jobs:
    """An nvcc of several threads is several compilers at once: what is asked for is divided by them, as vLLM's setup.py does (vllm-project/vllm#20079)."""
    number = bound // threads
    nouns = "compiler" if number == 1 else "compilers"
    if threads > 1:
        nouns, said = f"{nouns} of {threads} threads", f"{said} / NVCC_THREADS {threads}"
    else:
        said = f"{said}; NVCC_THREADS 1"
    return Jobs(number, threads, f"{number} {nouns} at once: {said}" + (f", not the {asked} asked for" if threads < asked else ""))


def memory(machine: Machine, *, flag: str | None = None) -> Memory:
    """Decide how much memory all compilers together may take. `flag` is what followed --memory: GiB, or `auto` as without it.

    Raises SettingsError for what is no number of GiB, and for more than the machine, or its control group, has.
    """
    total, available = machine.memory_gib, machine.available_gib
    reserve = min(max(LEAST_RESERVED_GIB, total * RESERVED_SHARE), total / 2)
    if flag is None or flag == AUTO:
        budget = max(LEAST_BUDGET_GIB, available - reserve)
        said = f"{budget:.1f} GiB for compilers: {available:.1f} of {total:.1f} are available, {reserve:.1f} are left for the system"
        if budget > available - reserve:
            said += f"; that leaves too little: {LEAST_BUDGET_GIB:.1f} is the least, and one compiler at a time"
        return Memory(budget, reserve, said)
    wanted = float(flag) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", flag) else math.nan
    if not wanted >= LEAST_BUDGET_GIB:
        raise SettingsError(f"--memory: {flag[:40]!r} is neither auto nor a number of GiB of at least {LEAST_BUDGET_GIB:g}", hint=MEMORY_HINT)
    if wanted > total:
        raise SettingsError(f"--memory {flag}: there are {total:.1f} GiB in this machine, or in its control group", hint=MEMORY_HINT)
    said = f"{wanted:g} GiB for compilers: --memory {flag}"
    if wanted > (free := max(0.0, available - reserve)):
        said += f"; only {free:.1f} are to be had now ({available:.1f} available, {reserve:.1f} left for the system): compilers wait for the rest"
    return Memory(wanted, reserve, said)


def environment(jobs: Jobs, *, ticket: str) -> Mapping[str, str]:
    """What a build's children are told, so that what starts compilers by itself keeps to the number too.

    `ticket` is the launcher (tickets.install). Nested CMake, torch's own builder, cargo and make: each has its own name for the same thing.
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
    """What ninja is given as -j: all units, for only those that have asked for a ticket can be put into the best order. The tickets keep to `jobs`."""
    return max(jobs.count, min(units, MOST_VISIBLE))
