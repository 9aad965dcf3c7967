"""Compare the times of two ways to do one thing: programs, or calls in this process.

Runs alternate (A B, B A, …), so that a machine that becomes slower slows both; each comparison is
within a pair. The time of the process seam itself, with its guard in Python, is measured too and
subtracted.
"""

import functools
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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


@dataclass(frozen=True)
class Aim:
    """An upper limit: a ratio, extra seconds, or seconds in all (wall)."""

    kind: Literal["ratio", "extra", "wall"]
    limit: float

    def is_met(self, comparison: Comparison) -> bool:
        found = {
            "ratio": comparison.ratio,
            "extra": comparison.extra_s,
            "wall": comparison.measured_s,
        }[self.kind]
        return found.median <= self.limit

    def __str__(self) -> str:
        return {
            "ratio": f"{self.limit:g}x",
            "extra": f"+{self.limit * 1000:g} ms",
            "wall": f"{self.limit:g} s",
        }[self.kind]


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
