"""The doctor's checks of the machine: processor, memory and what guards it, disk. They look and change nothing."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from workspace.core.settings import LARGEST_COMPILER_GIB, fitting_jobs
from workspace.environment import machine
from workspace.environment.doctor_case import Case, Place, Row, State

# What PyTorch and the donors are released for.
RELEASED_FOR = ("aarch64", "x86_64")
# What a bootstrap and a smoke leave comfortably free.
COMFORT_GIB = {"cpu": 4.0, "cuda": 16.0}
BRAKES = ("earlyoom", "systemd-oomd", "nohang")
INITS = ("systemd", "init")
LARGEST_PROGRAMS = "ps -eo pid,rss,args --sort=-rss | head"


def architecture(case: Case) -> Iterator[Row]:
    """Check that torch and the donors are released for the processor."""
    seen, why = case.host().architecture, f"torch and vLLM are released for {' and '.join(RELEASED_FOR)}"
    is_served = seen in RELEASED_FOR
    yield Row("ok" if is_served else "warn", "architecture", seen, why, None if is_served else "./scripts/inv bootstrap --device cpu --kernels native")


def cores(case: Case) -> Iterator[Row]:
    """Check MAX_JOBS against cores and memory."""
    host, jobs = case.host(), case.settings.count("MAX_JOBS")
    fitting = fitting_jobs(host.cores, host.memory_gib)
    seen = f"{host.cores}, MAX_JOBS {jobs or f'not set: {fitting} at run time, a build is bounded by memory'}"
    why = "compilers at once, FlashInfer's at run time too: up to 9.5 GiB each (flashinfer-ai/flashinfer#3634)"
    if case.device == "cuda" and jobs and jobs > fitting:
        yield Row("warn", "cores", seen, f"at run time {jobs} nvcc may take {jobs * LARGEST_COMPILER_GIB:.0f} GiB", "sed -i '/^MAX_JOBS=/d' .env")
    else:
        yield Row("ok", "cores", seen, why)


def memory(case: Case) -> Iterator[Row]:
    """Check what is available, within the control group's limit where that is tighter."""
    import psutil

    host, whole_gib = case.host(), psutil.virtual_memory().total / machine.GIB
    seen = f"{host.memory_gib:.1f} GiB, {host.available_gib:.1f} GiB available"
    if host.memory_gib < whole_gib - 0.1:
        seen += f"; the control group's limit, the machine has {whole_gib:.1f} GiB"
    if case.is_native and case.device == "cuda" and host.available_gib < LARGEST_COMPILER_GIB:
        yield Row("FAIL", "memory", seen, f"one nvcc of this tree takes up to {LARGEST_COMPILER_GIB} GiB", LARGEST_PROGRAMS)
    elif host.available_gib < COMFORT_GIB[case.device]:
        yield Row("warn", "memory", seen, f"less than {COMFORT_GIB[case.device]:.0f} GiB is tight for a bootstrap and a smoke", LARGEST_PROGRAMS)
    else:
        yield Row("ok", "memory", seen, "torch, compilers and models share it; on a Spark the GPU too")


def swap(case: Case) -> Iterator[Row]:
    """Check how much of the swap is in use."""
    import psutil

    state = psutil.swap_memory()
    seen = f"{state.used / machine.GIB:.1f} of {state.total / machine.GIB:.1f} GiB in use" if state.total else "none"
    if state.total and state.used > state.total / 2:
        yield Row("warn", "swap", seen, "memory is short already; a build on top of that crawls", LARGEST_PROGRAMS)
    else:
        yield Row("ok", "swap", seen, "it only delays the end: a machine that swaps compilers does not answer")


def brake(case: Case) -> Iterator[Row]:
    """Check that something ends a program before memory runs out: a Spark freezes instead, the kernel's own killer comes too late."""
    import psutil

    programs, why = case.programs(), "ends the largest program before memory runs out; without it a machine with unified memory freezes"
    found = next((name for name in BRAKES for program in programs if program.name == name[:15]), None)
    first = next((program.name for program in programs if program.number == 1), "")
    is_limited = case.host().memory_gib < psutil.virtual_memory().total / machine.GIB - 0.1
    if found:
        yield Row("ok", "brake", found, why)
    elif first not in INITS and is_limited:
        yield Row("ok", "brake", "the control group's limit", "it ends what is inside before the machine runs out of memory")
    elif first not in INITS:
        yield Row("warn", "brake", "no earlyoom or systemd-oomd in this container", why, "sudo apt install earlyoom  # on the host")
    else:
        yield Row("warn", "brake", "neither earlyoom nor systemd-oomd runs", why, "sudo apt install earlyoom && sudo systemctl enable --now earlyoom")


def disk(case: Case) -> Iterator[Row]:
    """Check the room: one row for each file system, since folders on the same one share what is free."""
    systems: dict[int, list[Place]] = {}
    for place in case.places:
        systems.setdefault(machine.existing(place.path).stat().st_dev, []).append(place)
    for places in systems.values():
        free, need = machine.free_gib(places[0].path), sum(place.need_gib for place in places)
        seen = f"{free:.1f} GiB free for {', '.join(_named(place) for place in places)}"
        if free >= need:
            yield Row("ok", "disk", seen, f"{need:.1f} GiB are needed there")
            continue
        state: State = "FAIL" if any(place.is_vital for place in places) else "warn"
        yield Row(state, "disk", seen, f"{need:.1f} GiB are needed there", f"df -h {machine.existing(places[0].path)}; {case.uv} cache prune")


def folders(case: Case) -> Iterator[Row]:
    """Check that every folder that will grow can be written; silent where all can."""
    for place in case.places:
        nearest = machine.existing(place.path)
        if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
            state: State = "FAIL" if place.is_vital else "warn"
            yield Row(state, "folder", f"{nearest} cannot be written", f"{place.path} is made or changed there", f'sudo chown -R "$USER" {nearest}')


def _named(place: Place) -> str:
    return f"{place.label} {place.path}" if place.label else str(place.path)


def preflight_places(need_gib: Mapping[Path, float]) -> tuple[Place, ...]:
    """Return the folders that a caller names, all of them vital."""
    return tuple(Place("", path, need) for path, need in need_gib.items())
