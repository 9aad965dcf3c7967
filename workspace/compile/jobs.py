"""How many compilers and how much memory a build gets, and the forecast of its cost.

Limits come from flags, settings and the machine; the memory status is read while compilers run. The
forecast counts units, minutes and memory before a rebuild starts.
"""

import contextlib
import math
import os
import re
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from workspace.compile import costs, scheduler, targets
from workspace.compile.costs import Cost, Costs
from workspace.compile.project import Project, Unit
from workspace.compile.scheduler import Bounds, MemoryStatus
from workspace.compile.targets import Reached
from workspace.core import hints
from workspace.core.console import Console
from workspace.core.errors import SettingsError, counted
from workspace.core.known_settings import LARGEST_COUNT
from workspace.core.settings import Settings
from workspace.machine import hardware
from workspace.machine.hardware import Host

AUTO = "auto"
# Memory reserved for the system: a share of all memory, and at least the second value. On a Spark
# the GPU and the CPU share memory, and without a reserve the machine freezes before the kernel
# kills a process (flashinfer-ai/flashinfer#3634).
RESERVED_SHARE, LEAST_RESERVED_GIB = 0.1, 2.0
# With less memory most compilers fail.
LEAST_BUDGET_GIB = 1.0
# ninja, its children and the job server may open about 1,000 files each (RLIMIT_NOFILE); each
# waiting unit takes one.
MOST_VISIBLE = 900


@dataclass(frozen=True)
class Jobs:
    """Number of compilers at once, of `nvcc_threads` threads each; `sentence` explains where it
    comes from.
    """

    count: int
    nvcc_threads: int
    sentence: str


@dataclass(frozen=True)
class Memory:
    """Memory budget of all compilers together, and the reserve for the system, explained."""

    budget_gib: float
    reserve_gib: float
    sentence: str


def count(
    settings: Settings,
    *,
    cores: int,
    flag: str | None = None,
    command: str = "./scripts/inv rebuild",
) -> Jobs:
    """Return how many compilers run at once. `flag` is the value of --jobs, `auto` or a number; it
    outranks MAX_JOBS. `command` is the verb that was typed.

    Raises SettingsError for anything else than `auto` or a whole number of at least 1.
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
            hint=hints.text("compile.jobs_auto", command=command),
        )
    threads = settings.count("NVCC_THREADS") or 1
    wanted = settings.count("MAX_JOBS") if flag is None else None if flag == AUTO else int(flag)
    if wanted is None:
        bound, origin = cores, f"auto: {counted(cores, 'core')}"
    elif flag is not None or settings.source("MAX_JOBS") == "flag":
        bound, origin = wanted, f"--jobs {wanted}"
    else:
        bound, origin = (
            wanted,
            (
                f"MAX_JOBS={wanted} in"
                f" {'the shell' if settings.source('MAX_JOBS') == 'shell' else '.env'}"
            ),
        )
    return _divided(bound, min(threads, bound), threads, origin)


def _divided(bound: int, threads: int, requested: int, origin: str) -> Jobs:
    """Divide the bound by the threads of nvcc: an nvcc of several threads counts as several
    compilers, as in vLLM's setup.py (vllm-project/vllm#20079).
    """
    count = bound // threads
    nouns = "compiler" if count == 1 else "compilers"
    if threads > 1:
        nouns, origin = f"{nouns} of {threads} threads", f"{origin} / NVCC_THREADS {threads}"
    else:
        origin = f"{origin}; NVCC_THREADS 1"
    return Jobs(
        count,
        threads,
        f"{count} {nouns} at once ({origin}"
        + (f", not the requested {requested})" if threads < requested else ")"),
    )


def memory(host: Host, *, flag: str | None = None) -> Memory:
    """Return the memory budget of all compilers together. `flag` is the value of --memory: GiB, or
    `auto`, the default.

    Raises SettingsError for an invalid number, and for more memory than the machine, or its control
    group, has.
    """
    total, available = host.memory_gib, host.available_gib
    reserve = min(max(LEAST_RESERVED_GIB, total * RESERVED_SHARE), total / 2)
    if flag is None or flag == AUTO:
        budget = max(LEAST_BUDGET_GIB, available - reserve)
        sentence = (
            f"{budget:.1f} GiB for compilers: {available:.1f} of {total:.1f} are available,"
            f" {reserve:.1f} are reserved for the system"
        )
        if budget > available - reserve:
            sentence += (
                f"; that leaves too little: the minimum is {LEAST_BUDGET_GIB:.1f}, with one"
                " compiler at a time"
            )
        return Memory(budget, reserve, sentence)
    wanted = float(flag) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", flag) else math.nan
    if not wanted >= LEAST_BUDGET_GIB:
        raise SettingsError(
            f"--memory: {flag[:40]!r} is neither auto nor a number of GiB of at least"
            f" {LEAST_BUDGET_GIB:g}",
            hint=hints.text("compile.memory_auto"),
        )
    if wanted > total:
        raise SettingsError(
            f"--memory {flag}: this machine, or its control group, has {total:.1f} GiB",
            hint=hints.text("compile.memory_auto"),
        )
    sentence = f"{wanted:g} GiB for compilers: --memory {flag}"
    if wanted > (free := max(0.0, available - reserve)):
        sentence += (
            f"; only {free:.1f} are free now ({available:.1f} available, {reserve:.1f} reserved"
            " for the system): compilers wait for the rest"
        )
    return Memory(wanted, reserve, sentence)


def environment(jobs: Jobs, *, launcher: str) -> Mapping[str, str]:
    """Return environment variables that keep nested builds to the same number of compilers.

    `launcher` is the compiler launcher (job_server.install). Nested CMake, torch's own builder,
    cargo and make each have their own variable.
    """
    count = str(jobs.count)
    return {
        "MAX_JOBS": count,
        "NVCC_THREADS": str(jobs.nvcc_threads),
        "CARGO_BUILD_JOBS": count,
        "CMAKE_BUILD_PARALLEL_LEVEL": count,
        "RUSTC_WRAPPER": launcher,
        "CMAKE_C_COMPILER_LAUNCHER": launcher,
        "CMAKE_CXX_COMPILER_LAUNCHER": launcher,
        "CMAKE_CUDA_COMPILER_LAUNCHER": launcher,
    }


def visible(units: int, jobs: Jobs) -> int:
    """Return ninja's -j: all units, because the scheduler orders only units that have requested a
    token. The job tokens keep to `jobs`.
    """
    return max(jobs.count, min(units, MOST_VISIBLE))


def memory_status(reserve_gib: float) -> MemoryStatus:
    """Return the memory available beyond `reserve_gib`: of the machine, or of the control group if
    that has less.
    """
    import psutil

    available = float(psutil.virtual_memory().available)
    for limit, used in hardware.memory_limits():
        available = min(available, max(0.0, limit - used))
    return MemoryStatus(available / hardware.GIB - reserve_gib, hardware.pressure_percent())


@dataclass(frozen=True)
class Process:
    """A process: its parent, its group, and the GiB it holds (resident, shared pages included)."""

    parent: int
    group: int
    held_gib: float


def living() -> dict[int, Process]:
    """Return all living processes by pid, in one pass."""
    import psutil

    found = {}
    for running in psutil.process_iter(["ppid", "status", "memory_info"]):
        parent, held = running.info["ppid"], running.info["memory_info"]
        is_over = running.info["status"] in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        # A process may end meanwhile.
        with contextlib.suppress(ProcessLookupError):
            if held and not is_over:
                group = os.getpgid(running.pid)
                found[running.pid] = Process(parent, group, held.rss / hardware.GIB)
    return found


def parents(pid: int) -> Iterator[int]:
    """Yield the parent of a process, its parent, and so on."""
    import psutil

    with contextlib.suppress(psutil.Error):
        while pid > 1:
            pid = psutil.Process(pid).ppid()
            yield pid


def below(roots: frozenset[int], known: Mapping[int, Process]) -> dict[int, set[int]]:
    """Return, for each of `roots`, the processes below it, without itself."""
    found: dict[int, set[int]] = {root: set() for root in roots}
    for pid in known:
        path: list[int] = []
        ancestor = pid
        while ancestor in known and ancestor not in path:
            if ancestor in roots:
                found[ancestor].update(path)
            path.append(ancestor)
            ancestor = known[ancestor].parent
    return found


def signal_process(
    roots: frozenset[int], groups: frozenset[int], signal_number: signal.Signals
) -> None:
    """Send a signal to the processes below `roots` and in `groups`, but not to this process's own
    group.
    """
    known = living()
    receivers = {pid for pids in below(roots, known).values() for pid in pids}
    receivers |= {
        pid for pid, process in known.items() if process.group in groups - {0, os.getpgrp()}
    }
    for pid in receivers:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal_number)


_MINUTE_S = 60.0
_HEAD = ("target", "units", "minutes", "peak GiB", "reason")
_FIGURES = (1, 2, 3)


@dataclass(frozen=True)
class TargetCost:
    """A target: `minutes` of compiler time with the link, `peak_gib` of its largest unit."""

    target: str
    reason: str
    units: int
    minutes: float
    peak_gib: float
    is_complete: bool


@dataclass(frozen=True)
class RebuildPlan:
    """Plan of a rebuild: `minutes` and `peak_gib` by simulating the scheduler with all units.
    `guessed` units were never measured.
    """

    rows: tuple[TargetCost, ...]
    from_precompiled: tuple[str, ...]
    why_not_hybrid: str | None
    units: int
    guessed: int
    compiler_minutes: float
    minutes: float
    peak_gib: float
    bounds: Bounds


def work_out(
    reached: Sequence[Reached],
    project: Project,
    costs: Costs,
    bounds: Bounds,
    *,
    why_not_hybrid: str | None = None,
) -> RebuildPlan:
    """Return the plan, from the expected cost of each unit and of each target's link."""
    rows, everything, compiled = [], dict[str, Cost](), set[str]()
    for one in reached:
        expected = {unit.object: costs.expected(_named(unit, one.target)) for unit in one.units}
        compiled |= expected.keys()
        link = {f"{one.target} link": costs.expected(_link(one.target))} if one.units else {}
        everything |= expected | link
        rows.append(_target_cost(one, (expected | link).values()))
    replayed = scheduler.simulate(tuple(everything.values()), bounds)
    names = {one.target for one in reached}
    return RebuildPlan(
        rows=tuple(rows),
        from_precompiled=(
            ()
            if why_not_hybrid
            else tuple(
                target.name for target in targets.final_targets(project) if target.name not in names
            )
        ),
        why_not_hybrid=why_not_hybrid,
        units=len(compiled),
        guessed=sum(everything[name].origin == "guess" for name in compiled),
        compiler_minutes=sum(cost.seconds for cost in everything.values()) / _MINUTE_S,
        minutes=replayed.seconds / _MINUTE_S,
        peak_gib=replayed.most_gib,
        bounds=bounds,
    )


def _target_cost(one: Reached, expected: Collection[Cost]) -> TargetCost:
    minutes = sum(cost.seconds for cost in expected) / _MINUTE_S
    peak_gib = max((cost.peak_gib for cost in expected), default=0.0)
    return TargetCost(one.target, one.reason, len(one.units), minutes, peak_gib, one.is_complete)


def _named(unit: Unit, target: str) -> costs.Unit:
    return costs.unit_at(unit.object) or costs.Unit(target, unit.source)


def _link(target: str) -> costs.Unit:
    return costs.Unit(target, "link")


def show(plan: RebuildPlan, console: Console, *, as_json: bool = False) -> None:
    """Print a row for each target and a summary, or JSON."""
    if as_json:
        console.document({"schema": 1, **asdict(plan)})
        return
    if plan.rows:
        lines = [
            (one.target, str(one.units), f"{one.minutes:.1f}", f"{one.peak_gib:.1f}", one.reason)
            for one in plan.rows
        ]
        console.table([_HEAD, *lines], right=_FIGURES)
    for sentence in _sentences(plan):
        console.sentence(sentence)


def _sentences(plan: RebuildPlan) -> list[str]:
    """Return the summary below the table."""
    lines = []
    if plan.why_not_hybrid:
        lines.append(f"not hybrid: {plan.why_not_hybrid}; every target is compiled here")
    if plan.units:
        known = f"; guessed, not measured: {plan.guessed} of them" if plan.guessed else ""
        lines.append(
            f"{counted(plan.units, 'unit')}, {plan.compiler_minutes:.1f} minutes of compiler time:"
            f" about {plan.minutes:.1f} minutes with at most {plan.bounds.jobs} at once in"
            f" {plan.bounds.budget_gib:.1f} GiB, peak {plan.peak_gib:.1f} GiB{known}"
        )
    elif plan.rows:
        lines.append("no unit has to be compiled: the reached targets are up to date")
    else:
        lines.append("no unit has to be compiled")
    full = [row.target for row in plan.rows if row.is_complete and row.units]
    if full and not plan.why_not_hybrid:
        lines.append(
            f"{', '.join(full)}: all units are compiled, because a precompiled wheel has libraries"
            " and no objects; the next change compiles only the units that it reaches"
        )
    if plan.from_precompiled:
        lines.append(f"from the precompiled wheel: {', '.join(plan.from_precompiled)}")
    return lines
