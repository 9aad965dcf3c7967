"""Compare the times of two ways to do one thing: programs, or calls in this process.

Runs alternate (A B, B A, …), so that a machine that becomes slower slows both; each comparison is
within a pair. The time of the process seam itself, with its guard in Python, is measured too and
subtracted. A recorded build is replayed through the real admission: simulated, with a clock that
jumps from the end of a unit to the next, and time-scaled through real ninja, with real launchers
and compilers that only sleep.
"""

import contextlib
import functools
import heapq
import resource
import shlex
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from workspace.compile import job_server, jobs, scheduler
from workspace.compile.costs import Cost, Costs, Entry, read_table
from workspace.compile.scheduler import Admission, Bounds, Replayed
from workspace.core import hints, process
from workspace.core.errors import BuildError, ToolchainError
from workspace.core.known_settings import KNOWN
from workspace.core.paths import Layout
from workspace.core.settings import Settings

if TYPE_CHECKING:
    from workspace.install.plan import Observation

_NOTHING = ("true",)
_LEAST_S = 0.0001


@dataclass(frozen=True)
class Command:
    """A program to time; `before` runs untimed before each start.

    Only runs with an exit status in `statuses` count.
    """

    argv: tuple[process.Argument, ...]
    cwd: Path
    env: Mapping[str, str] = field(repr=False)
    before: Callable[[], None] | None = None
    statuses: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Call:
    """Work in this process, without the start of the command line; `before` runs untimed."""

    work: Callable[[], object]
    before: Callable[[], None] | None = None


@dataclass(frozen=True)
class SelfTimed:
    """Work that returns its own seconds, without processor time: a simulated or scaled build."""

    seconds: Callable[[], float]


Timed = Command | Call | SelfTimed


@dataclass(frozen=True)
class Sample:
    """One run: wall-clock seconds, and processor seconds with those of its children."""

    wall_s: float
    cpu_s: float

    def minus(self, other: "Sample") -> "Sample":
        """Return the difference of two samples, always positive because ratios divide by it."""
        return Sample(
            max(self.wall_s - other.wall_s, _LEAST_S), max(self.cpu_s - other.cpu_s, _LEAST_S)
        )


@dataclass(frozen=True)
class Spread:
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """The samples of both sides, in the order of the pairs.

    `seam` is the time to start any program; it is subtracted from programs.
    """

    measured: tuple[Sample, ...]
    against: tuple[Sample, ...]
    seam: Sample

    @property
    def ratio(self) -> Spread:
        return self._per_pair(lambda measured, against: measured.wall_s / against.wall_s)

    @property
    def cpu_ratio(self) -> Spread:
        return self._per_pair(lambda measured, against: measured.cpu_s / against.cpu_s)

    @property
    def extra_s(self) -> Spread:
        return self._per_pair(lambda measured, against: measured.wall_s - against.wall_s)

    @property
    def measured_s(self) -> Spread:
        return _spread([sample.wall_s for sample in self.measured])

    @property
    def against_s(self) -> Spread:
        return _spread([sample.wall_s for sample in self.against])

    def _per_pair(self, figure: Callable[[Sample, Sample], float]) -> Spread:
        return _spread([figure(*pair) for pair in zip(self.measured, self.against, strict=True)])


def compare(
    measured: Timed,
    against: Timed,
    *,
    pairs: int,
    warm_ups: int,
    on_run: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Run both sides `warm_ups` times without counting, then in `pairs` pairs.

    `on_run` gets the number of finished runs and of all runs. Raises BuildError where a run ends
    with a status that does not count, ToolchainError where a program is missing.
    """
    sides = (measured, against)
    programs = [side for side in sides if isinstance(side, Command)]
    samples: tuple[list[Sample], list[Sample]] = ([], [])
    seams = []
    total = 2 * (warm_ups + pairs)
    for index in range(warm_ups + pairs):
        for program in programs[:1]:
            seams.append(run(Command(_NOTHING, Path(program.cwd.anchor), program.env)))
        for place, side in enumerate((0, 1) if (index - warm_ups) % 2 == 0 else (1, 0), 1):
            sample = run(sides[side])
            if index >= warm_ups:
                samples[side].append(sample)
            on_run(2 * index + place, total)
    seam = (
        Sample(
            statistics.median(sample.wall_s for sample in seams),
            statistics.median(sample.cpu_s for sample in seams),
        )
        if seams
        else Sample(0.0, 0.0)
    )
    measured_samples, against_samples = (
        tuple(sample.minus(seam) if isinstance(side, Command) else sample for sample in taken)
        for side, taken in zip(sides, samples, strict=True)
    )
    return Comparison(measured_samples, against_samples, seam)


def run(timed: Timed) -> Sample:
    """Run one side once.

    Raises BuildError with a program's message where its status does not count, and the errors of a
    call.
    """
    if isinstance(timed, SelfTimed):
        return Sample(max(timed.seconds(), _LEAST_S), _LEAST_S)
    if timed.before:
        timed.before()
    cpu_s, started = _cpu_s(), time.perf_counter()
    done = (
        timed.work()
        if isinstance(timed, Call)
        else process.capture(timed.argv, env=timed.env, cwd=timed.cwd)
    )
    sample = Sample(time.perf_counter() - started, _cpu_s() - cpu_s)
    if (
        isinstance(timed, Command)
        and isinstance(done, process.Completed)
        and done.returncode not in timed.statuses
    ):
        raise _failed(timed, done)
    return sample


def _cpu_s() -> float:
    """Return processor seconds of this process and its reaped children (getrusage(2)).

    os.times() has a resolution of only a hundredth of a second.
    """
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _failed(command: Command, done: process.Completed) -> BuildError:
    """Return an error with the message and hint of a verb, or another program's last line."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    labelled = {
        label: next((line for line in reversed(lines) if line.startswith(f"{label}: ")), "")
        for label in ("error", "hint")
    }
    sentence = labelled["error"].removeprefix("error: ") or (
        lines[-1].strip() if lines else "it printed nothing"
    )
    # Later arguments may be an index address with a password in it.
    program = " ".join(
        [Path(argument).name for argument in command.argv if not str(argument).startswith("-")][:2]
    )
    hint = labelled["hint"].removeprefix("hint: ") or None
    return BuildError(
        f"{program} {process.describe_status(done.returncode)}: {sentence}",
        hint=hint,
        details=tuple(lines[-8:]),
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


_BARE = """from invoke import task


@task
def nothing(_):
    \"\"\"Do nothing.\"\"\"
"""


class Context:
    """The context of one run; `folder` is a temporary folder on the file system of the clone."""

    def __init__(self, layout: Layout, settings: Settings, folder: Path) -> None:
        self.layout = layout
        self.settings = settings
        self.folder = folder

    @functools.cached_property
    def environment(self) -> dict[str, str]:
        """The environment of both sides: that of a verb in the user's shell."""
        chosen = {
            name: self.settings.text(name)
            for name in KNOWN
            if self.settings.source(name) in ("shell", "flag")
        }
        return self.settings.child_environment("inv", chosen)

    @functools.cached_property
    def python(self) -> Path:
        """The Python of the tool environment. Raises ToolchainError where it is missing."""
        found = self.layout.tools / "bin" / "python"
        if not found.exists():
            raise ToolchainError(
                f"{self.layout.relative(self.layout.tools)} does not exist",
                hint=hints.text("support.make_tools"),
            )
        return found

    @functools.cached_property
    def built(self) -> "Observation":
        """The state of this clone. Raises BuildError where a stage of bootstrap is due."""
        from workspace.install import bootstrap, plan

        observed = plan.observe(self.layout, self.settings)
        due = [
            f"{stage.steps[0][0]}: {stage.reason}"
            for stage in bootstrap.stages_of(observed)
            if stage.is_due
        ]
        if due:
            raise BuildError(
                f"the tree is not built, or is not up to date ({'; '.join(due)})",
                hint=hints.text("inv.bootstrap"),
            )
        return observed

    def inv(self, *args: str, statuses: tuple[int, ...] = (0,)) -> Command:
        """Return the command that scripts/inv runs in the end."""
        return self.tool("-Es", self.layout.root / "tasks.py", *args, statuses=statuses)

    def tool(self, *args: str | Path, statuses: tuple[int, ...] = (0,)) -> Command:
        return Command((self.python, *args), self.layout.root, self.environment, statuses=statuses)

    def bare(self) -> Command:
        """Return the command of invoke alone on a file with one empty task."""
        folder = self.folder / "bare"
        folder.mkdir(exist_ok=True)
        (folder / "tasks.py").write_text(_BARE, encoding="utf-8")
        return Command((self.python, "-Es", "-m", "invoke", "--list"), folder, self.environment)


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
