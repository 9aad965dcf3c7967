"""Replay a recorded build through the real admission, and compare it with a lower bound.

It is simulated, with a clock that jumps from the end of a unit to the next; and it runs time-scaled
through real ninja, with real launchers and compilers that only sleep.
"""

import contextlib
import heapq
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from workspace.compile import job_server, jobs, scheduler
from workspace.compile.costs import Cost, Costs, Entry, read_table
from workspace.compile.scheduler import Admission, Bounds, Replayed
from workspace.core import hints, process
from workspace.core.errors import BuildError, ToolchainError
from workspace.support.perf_measure import Context

# The cores of a GB10.
CORES = 20
# Seconds of the build per second of the time-scaled replay.
SCALE = 30.0
# $1 is the duration; $3 and $5 are source and output, as in a compiler's command. The lines of the
# log are in the order of the events.
_COMPILER = """#!/bin/sh
echo "+ $5" >> log
sleep "$1" || exit
echo "- $5" >> log
: > "$5"
"""
# The measured side and the side to compare with; each returns its own seconds.
Sides = tuple[Callable[[], float], Callable[[], float]]


def lower_bound(entries: Sequence[Entry], bounds: Bounds) -> float:
    """Return the seconds that every order needs at least.

    The maximum of: all work on all cores, memory times seconds in the budget, the longest unit.
    """
    work = sum(entry.seconds for entry in entries) / bounds.jobs
    memory = sum(entry.seconds * entry.peak_gib for entry in entries) / bounds.budget_gib
    return max(work, memory, *(entry.seconds for entry in entries))


def simulate(entries: Sequence[Entry], bounds: Bounds) -> Replayed:
    """Request all entries at once, and advance the clock from the end of a unit to the next."""
    return scheduler.simulate(
        [Cost(entry.seconds, entry.peak_gib, "table") for entry in entries], bounds
    )


def static(entries: Sequence[Entry], bounds: Bounds) -> Replayed:
    """Replay with a number of compilers that is always safe: the budget by the largest peak.

    The order is that of the recorded build, as with ninja.
    """
    count = max(
        1, min(bounds.jobs, int(bounds.budget_gib / max(entry.peak_gib for entry in entries)))
    )
    ends = [0.0] * count
    for entry in entries:
        heapq.heapreplace(ends, ends[0] + entry.seconds)
    return Replayed(max(ends), count * max(entry.peak_gib for entry in entries), count)


def through_ninja(
    entries: Sequence[Entry],
    bounds: Bounds,
    folder: Path,
    *,
    environment: dict[str, str],
    ninja: Path,
) -> Replayed:
    """Build one target for each unit with ninja in `folder`, each through its launcher.

    The compilers sleep, and log their beginning and end. Raises BuildError where a unit was not
    built.
    """
    with contextlib.suppress(FileNotFoundError):
        (folder / "log").unlink()
    _write_build(entries, folder)
    jobs_in_all = jobs.visible(len(entries), jobs.Jobs(bounds.jobs, 1, ""))
    with job_server.JobServer(
        folder / "tickets", Admission(bounds), Costs(entries), units=len(entries)
    ) as server:
        began = time.monotonic()
        done = process.capture([ninja, f"-j{jobs_in_all}"], env=environment, cwd=folder)
        seconds = time.monotonic() - began
    if done.returncode != 0 or len(server.finished) != len(entries):
        last = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise BuildError(
            f"ninja {process.describe_status(done.returncode)} with {len(server.finished)} of"
            f" {len(entries)} units built",
            details=tuple(last),
        )
    return _read_log(entries, folder / "log", seconds)


def _write_build(entries: Sequence[Entry], folder: Path) -> None:
    compiler = folder / "compiler"
    compiler.write_text(_COMPILER, encoding="utf-8")
    compiler.chmod(0o755)
    launcher = shlex.quote(str(job_server.install(folder / "tickets"))).replace("$", "$$")
    lines = ["rule compile", f"  command = {launcher} ./compiler $seconds -c $in -o $out"]
    for entry in entries:
        source = folder / entry.source
        source.parent.mkdir(parents=True, exist_ok=True)
        source.touch()
        lines += [
            f"build {_output(entry)}: compile {entry.source}",
            f"  seconds = {entry.seconds:.3f}",
        ]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _output(entry: Entry) -> str:
    return f"CMakeFiles/{entry.target}.dir/{entry.source}.o"


def _read_log(entries: Sequence[Entry], log: Path, seconds: float) -> Replayed:
    """Return the most compilers, and the most GiB, that ran at once."""
    peaks = {_output(entry): entry.peak_gib for entry in entries}
    running: set[str] = set()
    most_gib, most_jobs = 0.0, 0
    for line in log.read_text(encoding="utf-8").splitlines():
        sign, _, output = line.partition(" ")
        (running.add if sign == "+" else running.discard)(output)
        most_gib, most_jobs = (
            max(most_gib, sum(peaks[name] for name in running)),
            max(most_jobs, len(running)),
        )
    return Replayed(seconds, most_gib, most_jobs)


def checked(replayed: Replayed, bounds: Bounds) -> float:
    """Return the seconds. Raises BuildError where the replay exceeded its bounds."""
    if replayed.most_jobs > bounds.jobs or replayed.most_gib > bounds.budget_gib:
        raise BuildError(
            f"{replayed.most_jobs} compilers and {replayed.most_gib:.1f} GiB at once; the"
            f" bounds are {bounds.jobs} and {bounds.budget_gib:g} GiB",
            hint=hints.text("support.scheduler_defect"),
        )
    return replayed.seconds


def simulated(
    budget_gib: float, *, way: Callable[[Sequence[Entry], Bounds], Replayed] = simulate
) -> Callable[[Context], AbstractContextManager[Sides]]:
    """Prepare a row: the shipped trace, simulated by `way`, against its lower bound."""

    @contextlib.contextmanager
    def prepare(_: Context) -> Iterator[Sides]:
        entries, bounds = _trace(), Bounds(CORES, budget_gib)
        yield lambda: checked(way(entries, bounds), bounds), lambda: lower_bound(entries, bounds)

    return prepare


def time_scaled(budget_gib: float) -> Callable[[Context], AbstractContextManager[Sides]]:
    """Prepare a row: the shipped trace through ninja, SCALE times as fast, against its bound."""

    @contextlib.contextmanager
    def prepare(context: Context) -> Iterator[Sides]:
        entries, bounds = (
            [replace(entry, seconds=entry.seconds / SCALE) for entry in _trace()],
            Bounds(CORES, budget_gib),
        )
        folder = context.folder / f"replay-{budget_gib:g}"
        folder.mkdir()
        found = find_ninja(context)
        yield (
            lambda: checked(
                through_ninja(
                    entries, bounds, folder, environment=context.environment, ninja=found
                ),
                bounds,
            ),
            lambda: lower_bound(entries, bounds),
        )

    return prepare


def find_ninja(context: Context) -> Path:
    """Return the ninja of the tool environment, else of the system.

    Raises ToolchainError where none is installed.
    """
    own = context.layout.tools / "bin" / "ninja"
    found = (
        str(own)
        if own.exists()
        else shutil.which("ninja", path=context.environment.get("PATH", ""))
    )
    if not found:
        raise ToolchainError(
            "there is no ninja to replay a build with", hint=hints.text("support.apt_ninja")
        )
    return Path(found)


def _trace() -> tuple[Entry, ...]:
    entries, trouble = read_table()
    if trouble:
        raise BuildError(trouble[0])
    return entries
