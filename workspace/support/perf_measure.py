"""Two ways to do one thing, timed against each other: programs, or calls in this process.

Runs alternate (A B, B A, …), so that a machine that gets slower or busier slows both; what is
compared is always the two of a pair. What the process seam itself takes, a Python as guard among
it, is measured beside them and taken off.
"""

import functools
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from workspace.core import process
from workspace.core.errors import BuildError, ToolchainError
from workspace.core.paths import Layout
from workspace.core.settings import KNOWN, Settings

if TYPE_CHECKING:
    from workspace.install.plan import Observation

_NOTHING = ("true",)
_LEAST_S = 0.0001


@dataclass(frozen=True)
class Command:
    """A program to time. `before` runs ahead of each start and is not timed; `statuses` are the
    exit statuses of a run that counts.
    """

    argv: tuple[process.Argument, ...]
    cwd: Path
    env: Mapping[str, str] = field(repr=False)
    before: Callable[[], None] | None = None
    statuses: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Call:
    """Work in this process: what a verb does once its door stands. `before` runs ahead of each and
    is not timed.
    """

    work: Callable[[], object]
    before: Callable[[], None] | None = None


@dataclass(frozen=True)
class Told:
    """Work that says its own seconds, on a clock that is not ours: a build in thought, or in small
    time. Its processor time says nothing.
    """

    seconds: Callable[[], float]


Timed = Command | Call | Told


@dataclass(frozen=True)
class Sample:
    """One run: seconds on the clock, and of all processors, its children's included."""

    wall_s: float
    cpu_s: float

    def less(self, other: "Sample") -> "Sample":
        """The sample without another one in it; never nothing or less, for it is divided by."""
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
    """The two sides of each pair, in the order of the pairs. `seam` is what starting any program
    took, taken off where a side is one.
    """

    measured: tuple[Sample, ...]
    against: tuple[Sample, ...]
    seam: Sample

    @property
    def ratio(self) -> Spread:
        return _spread(
            [
                one.wall_s / other.wall_s
                for one, other in zip(self.measured, self.against, strict=True)
            ]
        )

    @property
    def cpu_ratio(self) -> Spread:
        return _spread(
            [
                one.cpu_s / other.cpu_s
                for one, other in zip(self.measured, self.against, strict=True)
            ]
        )

    @property
    def extra_s(self) -> Spread:
        return _spread(
            [
                one.wall_s - other.wall_s
                for one, other in zip(self.measured, self.against, strict=True)
            ]
        )

    @property
    def measured_s(self) -> Spread:
        return _spread([one.wall_s for one in self.measured])

    @property
    def against_s(self) -> Spread:
        return _spread([one.wall_s for one in self.against])


@dataclass(frozen=True)
class Aim:
    """At most `limit`: times as much (ratio), seconds more (extra), or seconds in all (wall)."""

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
    """Run both `warm_ups` times without counting, then in `pairs` pairs. `on_run` gets the runs so
    far and in all.

    Raises BuildError where a run ends with a status that does not count, ToolchainError where a
    program is not there.
    """
    sides = (measured, against)
    programs = [side for side in sides if isinstance(side, Command)]
    samples: tuple[list[Sample], list[Sample]] = ([], [])
    seams = []
    total = 2 * (warm_ups + pairs)
    for number in range(warm_ups + pairs):
        for program in programs[:1]:
            seams.append(run(Command(_NOTHING, Path(program.cwd.anchor), program.env)))
        for place, side in enumerate((0, 1) if (number - warm_ups) % 2 == 0 else (1, 0), 1):
            sample = run(sides[side])
            if number >= warm_ups:
                samples[side].append(sample)
            on_run(2 * number + place, total)
    seam = (
        Sample(
            statistics.median(one.wall_s for one in seams),
            statistics.median(one.cpu_s for one in seams),
        )
        if seams
        else Sample(0.0, 0.0)
    )
    one, other = (
        tuple(sample.less(seam) if isinstance(side, Command) else sample for sample in taken)
        for side, taken in zip(sides, samples, strict=True)
    )
    return Comparison(one, other, seam)


def run(timed: Timed) -> Sample:
    """Run one side once. Raises BuildError with what a program said where its status does not
    count, and whatever a call raises.
    """
    if isinstance(timed, Told):
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
    """Processor seconds of this process and of all children that have ended and were waited for
    (getrusage(2)); os.times() counts in hundredths.
    """
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _failed(command: Command, done: process.Completed) -> BuildError:
    """Pass on the sentence and the hint of a verb of ours, and the last words of any other
    program.
    """
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    said = {
        word: next((line for line in reversed(lines) if line.startswith(f"{word}: ")), "")
        for word in ("error", "hint")
    }
    sentence = said["error"].removeprefix("error: ") or (
        lines[-1].strip() if lines else "it said nothing"
    )
    # Later words may be an index address with a password in it.
    words = " ".join(
        [Path(word).name for word in command.argv if not str(word).startswith("-")][:2]
    )
    hint = said["hint"].removeprefix("hint: ") or None
    return BuildError(
        f"{words} {process.describe_status(done.returncode)}: {sentence}",
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
    """One run's surroundings. `folder` is empty at first, on the file system of the clone, and
    vanishes afterwards.
    """

    def __init__(self, layout: Layout, settings: Settings, folder: Path) -> None:
        self.layout = layout
        self.settings = settings
        self.folder = folder

    @functools.cached_property
    def environment(self) -> dict[str, str]:
        """What a verb of ours would see in the user's shell, and what the bare tool sees as
        well.
        """
        chosen = {
            name: self.settings.text(name)
            for name in KNOWN
            if self.settings.source(name) in ("shell", "flag")
        }
        return self.settings.child_environment("plain", chosen)

    @functools.cached_property
    def python(self) -> Path:
        """The Python of the tool environment. Raises ToolchainError where that was not made."""
        found = self.layout.tools / "bin" / "python"
        if not found.exists():
            raise ToolchainError(
                f"{self.layout.relative(self.layout.tools)} is not there",
                hint="./scripts/inv --list   # makes it",
            )
        return found

    @functools.cached_property
    def built(self) -> "Observation":
        """What stands in this clone once bootstrap has nothing left to do. Raises BuildError where
        it has.
        """
        from workspace.install import bootstrap, plan

        observed = plan.observe(self.layout, self.settings)
        due = [
            f"{stage.steps[0][0]}: {stage.reason}"
            for stage in bootstrap.stages_of(self.layout, self.settings, observed)
            if stage.is_due
        ]
        if due:
            raise BuildError(
                f"the tree is not built, or not as it should be ({'; '.join(due)})",
                hint="./scripts/inv bootstrap",
            )
        return observed

    def inv(self, *words: str, statuses: tuple[int, ...] = (0,)) -> Command:
        """What scripts/inv ends in."""
        return self.tool("-Es", self.layout.root / "tasks.py", *words, statuses=statuses)

    def tool(self, *words: str | Path, statuses: tuple[int, ...] = (0,)) -> Command:
        return Command((self.python, *words), self.layout.root, self.environment, statuses=statuses)

    def bare(self) -> Command:
        """Invoke itself, from the same environment, on a file with one empty task."""
        folder = self.folder / "bare"
        folder.mkdir(exist_ok=True)
        (folder / "tasks.py").write_text(_BARE, encoding="utf-8")
        return Command((self.python, "-Es", "-m", "invoke", "--list"), folder, self.environment)
