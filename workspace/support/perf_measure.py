"""Compare the times of two ways to do one thing: programs, or calls in this process.

Runs alternate (A B, B A, …), so that a machine that becomes slower slows both; each comparison is
within a pair. The time of the process seam itself, with its guard in Python, is measured too and
subtracted. A recorded build is replayed through the real admission, with a clock that jumps from
the end of a unit to the next.
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from workspace.compile import scheduler
from workspace.compile.costs import Cost, Entry, read_table
from workspace.compile.scheduler import Bounds, Replayed
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
    """Work that returns its own seconds: a simulated build."""

    seconds: Callable[[], float]


Timed = Command | Call | SelfTimed
Sides = tuple[Timed, Timed]


@dataclass(frozen=True)
class Spread:
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """The seconds of both sides, in the order of the pairs.

    `seam_s` is the time to start any program; it is subtracted from programs.
    """

    measured: tuple[float, ...]
    against: tuple[float, ...]
    seam_s: float

    @property
    def ratio(self) -> Spread:
        """The ratios within a pair."""
        return _spread([one / other for one, other in self._pairs()])

    @property
    def extra_s(self) -> Spread:
        """The differences within a pair."""
        return _spread([one - other for one, other in self._pairs()])

    @property
    def measured_s(self) -> Spread:
        return _spread(self.measured)

    @property
    def against_s(self) -> Spread:
        return _spread(self.against)

    def _pairs(self) -> Iterator[tuple[float, float]]:
        return zip(self.measured, self.against, strict=True)


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
    program = next((side for side in sides if isinstance(side, Command)), None)
    samples: tuple[list[float], list[float]] = ([], [])
    seams = [0.0] if program is None else []
    total = 2 * (warm_ups + pairs)
    for index in range(warm_ups + pairs):
        if program:
            seams.append(run(Command(_NOTHING, Path(program.cwd.anchor), program.env)))
        for place, side in enumerate((0, 1) if (index - warm_ups) % 2 == 0 else (1, 0), 1):
            seconds = run(sides[side])
            if index >= warm_ups:
                samples[side].append(seconds)
            on_run(2 * index + place, total)
    seam = statistics.median(seams)
    measured_s, against_s = (
        # Positive, because ratios divide by it.
        tuple(max(one - seam, _LEAST_S) if isinstance(side, Command) else one for one in taken)
        for side, taken in zip(sides, samples, strict=True)
    )
    return Comparison(measured_s, against_s, seam)


def run(timed: Timed) -> float:
    """Run one side once, and return its seconds.

    Raises BuildError with a program's message where its status does not count, and the errors of a
    call.
    """
    if isinstance(timed, SelfTimed):
        return max(timed.seconds(), _LEAST_S)
    if timed.before:
        timed.before()
    started = time.perf_counter()
    done = (
        timed.work()
        if isinstance(timed, Call)
        else process.capture(timed.argv, env=timed.env, cwd=timed.cwd)
    )
    seconds = time.perf_counter() - started
    if (
        isinstance(timed, Command)
        and isinstance(done, process.Completed)
        and done.returncode not in timed.statuses
    ):
        raise _failed(timed, done)
    return seconds


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


def checked(replayed: Replayed, bounds: Bounds) -> float:
    """Return the seconds. Raises BuildError where the replay exceeded its bounds."""
    if replayed.most_jobs > bounds.jobs or replayed.most_gib > bounds.budget_gib:
        raise BuildError(
            f"{replayed.most_jobs} compilers and {replayed.most_gib:.1f} GiB at once; the"
            f" bounds are {bounds.jobs} and {bounds.budget_gib:g} GiB",
            hint=hints.text("support.scheduler_defect"),
        )
    return replayed.seconds


def simulated(budget_gib: float) -> Callable[[Context], AbstractContextManager[Sides]]:
    """Prepare a row: the shipped trace, through the admission, against its lower bound."""

    @contextlib.contextmanager
    def prepare(_: Context) -> Iterator[Sides]:
        entries, bounds = _trace(), Bounds(CORES, budget_gib)
        yield (
            SelfTimed(lambda: checked(simulate(entries, bounds), bounds)),
            SelfTimed(lambda: lower_bound(entries, bounds)),
        )

    return prepare


def _trace() -> tuple[Entry, ...]:
    entries, trouble = read_table()
    if trouble:
        raise BuildError(trouble[0])
    return entries
