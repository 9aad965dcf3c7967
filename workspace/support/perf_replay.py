"""A recorded build once more, through the real admission: how near it comes to what no order can
beat.

Once in thought, the clock set forward from end to end of a unit; and once in a small time, by real
ninja with real launchers and compilers that only sleep.
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
from workspace.core import process
from workspace.core.errors import BuildError, ToolchainError
from workspace.support.perf_measure import Context

# Those of a GB10.
CORES = 20
# A second of the small time stands for so many of the build.
SCALE = 30.0
# $1 is how long, $3 and $5 are source and output, as a compiler is called. Lines of one file stand
# in the order of what they tell.
_COMPILER = """#!/bin/sh
echo "+ $5" >> log
sleep "$1" || exit
echo "- $5" >> log
: > "$5"
"""
# What is measured, and what it is held against; each says its own seconds.
Sides = tuple[Callable[[], float], Callable[[], float]]


def lower_bound(entries: Sequence[Entry], bounds: Bounds) -> float:
    """Return the seconds that no order can beat: the work on all cores, the memory-time in the
    budget, the longest unit.
    """
    work = sum(entry.seconds for entry in entries) / bounds.jobs
    memory = sum(entry.seconds * entry.peak_gib for entry in entries) / bounds.budget_gib
    return max(work, memory, *(entry.seconds for entry in entries))


def simulate(entries: Sequence[Entry], bounds: Bounds) -> Replayed:
    """Let all entries ask at once, and set the clock forward from the end of a unit to that of the
    next.
    """
    return scheduler.simulate(
        [Cost(entry.seconds, entry.peak_gib, "table") for entry in entries], bounds
    )


def static(entries: Sequence[Entry], bounds: Bounds) -> Replayed:
    """The number of compilers that is safe whichever run: the budget by the largest peak; in the
    order of the recorded build, as ninja does.
    """
    number = max(
        1, min(bounds.jobs, int(bounds.budget_gib / max(entry.peak_gib for entry in entries)))
    )
    ends = [0.0] * number
    for entry in entries:
        heapq.heapreplace(ends, ends[0] + entry.seconds)
    return Replayed(max(ends), number * max(entry.peak_gib for entry in entries), number)


def through_ninja(
    entries: Sequence[Entry],
    bounds: Bounds,
    folder: Path,
    *,
    environment: dict[str, str],
    ninja: Path,
) -> Replayed:
    """Build one target a unit with ninja in `folder`, each behind its launcher; the compilers sleep
    and note when they begin and end.

    Raises BuildError where a unit was not built.
    """
    with contextlib.suppress(FileNotFoundError):
        (folder / "log").unlink()
    _write_build(entries, folder)
    jobs_in_all = jobs.visible(len(entries), jobs.Jobs(bounds.jobs, 1, ""))
    with job_server.JobServer(
        folder / "tickets", Admission(bounds), Costs(entries), units=len(entries)
    ) as job_server_:
        began = time.monotonic()
        done = process.capture([ninja, f"-j{jobs_in_all}"], env=environment, cwd=folder)
        seconds = time.monotonic() - began
    if done.returncode != 0 or len(job_server_.finished) != len(entries):
        last = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise BuildError(
            f"ninja {process.describe_status(done.returncode)} with {len(job_server_.finished)} of"
            f" {len(entries)} units built",
            details=tuple(last),
        )
    return _heard(entries, folder / "log", seconds)


def _write_build(entries: Sequence[Entry], folder: Path) -> None:
    compiler = folder / "compiler"
    compiler.write_text(_COMPILER, encoding="utf-8")
    compiler.chmod(0o755)
    ticket = shlex.quote(str(job_server.install(folder / "tickets"))).replace("$", "$$")
    lines = ["rule compile", f"  command = {ticket} ./compiler $seconds -c $in -o $out"]
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


def _heard(entries: Sequence[Entry], log: Path, seconds: float) -> Replayed:
    peaks = {_output(entry): entry.peak_gib for entry in entries}
    running: set[str] = set()
    most_gib, most_jobs = 0.0, 0
    for line in log.read_text(encoding="utf-8").splitlines():
        sign, _, output = line.partition(" ")
        (running.add if sign == "+" else running.discard)(output)
        most_gib, most_jobs = (
            max(most_gib, sum(peaks[one] for one in running)),
            max(most_jobs, len(running)),
        )
    return Replayed(seconds, most_gib, most_jobs)


def checked(replayed: Replayed, bounds: Bounds) -> float:
    """Return the seconds. Raises BuildError where the bounds were not kept, however quick that
    was.
    """
    if replayed.most_jobs > bounds.jobs or replayed.most_gib > bounds.budget_gib:
        raise BuildError(
            f"{replayed.most_jobs} compilers and {replayed.most_gib:.1f} GiB at once, where"
            f" {bounds.jobs} and {bounds.budget_gib:g} GiB may be",
            hint="a fault of workspace/compile/scheduler.py",
        )
    return replayed.seconds


def in_thought(
    budget_gib: float, *, way: Callable[[Sequence[Entry], Bounds], Replayed] = simulate
) -> Callable[[Context], AbstractContextManager[Sides]]:
    """A row: the shipped trace with `budget_gib`, against the lower bound. `way` is `simulate` or
    `static`.
    """

    @contextlib.contextmanager
    def prepare(_: Context) -> Iterator[Sides]:
        entries, bounds = _trace(), Bounds(CORES, budget_gib)
        yield lambda: checked(way(entries, bounds), bounds), lambda: lower_bound(entries, bounds)

    return prepare


def in_small_time(budget_gib: float) -> Callable[[Context], AbstractContextManager[Sides]]:
    """A row: the shipped trace through ninja and launchers, SCALE times as fast, against its lower
    bound.
    """

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
    """The tool environment's ninja, else the system's. Raises ToolchainError where there is
    none.
    """
    own = context.layout.tools / "bin" / "ninja"
    found = (
        str(own)
        if own.exists()
        else shutil.which("ninja", path=context.environment.get("PATH", ""))
    )
    if not found:
        raise ToolchainError(
            "there is no ninja to replay a build with", hint="sudo apt-get install ninja-build"
        )
    return Path(found)


def _trace() -> tuple[Entry, ...]:
    entries, trouble = read_table()
    if trouble:
        raise BuildError(trouble[0])
    return entries
