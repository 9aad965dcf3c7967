"""nox -s perf: the rows, their measurement, the table and the JSON record.

It runs with the Python of the tool environment. Both sides of a row run in turn (A B, B A, …), so
that a machine that becomes slower slows both; each comparison is within a pair. The time of the
process seam itself, with its guard in Python, is measured too and subtracted. A recorded build is
replayed through the real admission, with a clock that jumps from the end of a unit to the next.
perf_pairs.py prepares the sides.
"""

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from workspace.compile import scheduler
from workspace.compile.costs import Cost, Entry, read_table
from workspace.compile.scheduler import Bounds, Replayed
from workspace.core import hints, process, records
from workspace.core.console import Console
from workspace.core.errors import BuildError, WorkspaceError, counted
from workspace.core.files import write_atomic
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.support import perf_pairs
from workspace.support.perf_pairs import Call, Command, Context

_NOTHING = ("true",)
_LEAST_S = 0.0001


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
        return _spread_of([one / other for one, other in self._pairs()])

    @property
    def extra_s(self) -> Spread:
        """The differences within a pair."""
        return _spread_of([one - other for one, other in self._pairs()])

    @property
    def measured_s(self) -> Spread:
        return _spread_of(self.measured)

    @property
    def against_s(self) -> Spread:
        return _spread_of(self.against)

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
            seams.append(time_once(Command(_NOTHING, Path(program.cwd.anchor), program.env)))
        for place, side in enumerate((0, 1) if (index - warm_ups) % 2 == 0 else (1, 0), 1):
            seconds = time_once(sides[side])
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


def time_once(timed: Timed) -> float:
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


def _spread_of(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


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
        entries, bounds = read_table(), Bounds(CORES, budget_gib)
        yield (
            SelfTimed(lambda: checked(simulate(entries, bounds), bounds)),
            SelfTimed(lambda: lower_bound(entries, bounds)),
        )

    return prepare


@dataclass(frozen=True)
class Aim:
    """An upper limit: a ratio, or seconds in all (wall)."""

    kind: Literal["ratio", "wall"]
    limit: float

    def is_met(self, comparison: Comparison) -> bool:
        found = comparison.ratio if self.kind == "ratio" else comparison.measured_s
        return found.median <= self.limit

    def __str__(self) -> str:
        return f"{self.limit:g}{'x' if self.kind == 'ratio' else ' s'}"


@dataclass(frozen=True)
class PerfPair:
    """One comparison; `prepare` yields the two sides, the measured side first."""

    name: str
    measured: str
    against: str
    aim: Aim | None
    prepare: Callable[[Context], AbstractContextManager[Sides]]
    pairs: int = 10
    warm_ups: int = 1


@contextlib.contextmanager
def _list(context: Context) -> Iterator[Sides]:
    yield context.inv("--list"), context.bare()


@contextlib.contextmanager
def _status(context: Context) -> Iterator[Sides]:
    # Only a built tree counts: the status of an unbuilt tree takes less time.
    _ = context.built
    yield context.inv("status"), context.bare()


@contextlib.contextmanager
def _rebuild(context: Context) -> Iterator[Sides]:
    _ = context.built
    yield context.inv("rebuild"), context.bare()


@contextlib.contextmanager
def _doctor(context: Context) -> Iterator[Sides]:
    # 6: the machine lacks a part; the doctor takes the same time.
    yield context.inv("doctor", "--offline", statuses=(0, 6)), context.bare()


def _replays() -> Iterator[PerfPair]:
    for gib in (24.0, 48.0, 96.0):
        yield PerfPair(
            f"replay-{gib:g}",
            f"the recorded build on {CORES} cores in {gib:g} GiB, by admission",
            "the lower bound of any order",
            Aim("ratio", 1.1),
            simulated(gib),
            pairs=1,
            warm_ups=0,
        )


_BARE = "a bare invoke with one empty task"
ROWS: tuple[PerfPair, ...] = (
    PerfPair("list", "inv --list", _BARE, Aim("ratio", 1.2), _list),
    PerfPair("status", "inv status", _BARE, None, _status),
    PerfPair("rebuild", "inv rebuild with nothing to do", _BARE, Aim("wall", 0.5), _rebuild),
    PerfPair("doctor", "inv doctor --offline", _BARE, Aim("wall", 3.0), _doctor),
    PerfPair(
        "no-op",
        "inv bootstrap with nothing to do",
        "a repeated uv pip install --no-build-isolation --no-deps -e",
        Aim("ratio", 0.1),
        perf_pairs.installed_again,
        pairs=3,
    ),
    PerfPair(
        "warm",
        "inv bootstrap in a fresh clone, caches warm",
        "the same commands typed by hand (by_hand.sh)",
        Aim("ratio", 1.1),
        perf_pairs.from_warm_caches,
        pairs=1,
        warm_ups=0,
    ),
    PerfPair(
        "apply",
        "inv patch.apply of a hundred patches, in this process",
        "git am of the same patches",
        Aim("ratio", 1.15),
        perf_pairs.applied,
        pairs=5,
    ),
    PerfPair(
        "export",
        "inv patch.export with its proof, in this process",
        "git format-patch, and one git apply --cached of all files",
        Aim("ratio", 1.5),
        perf_pairs.exported,
        pairs=5,
    ),
    PerfPair(
        "forecast",
        "inv pin.forecast of a hundred patches, in this process",
        "git apply --cached one by one",
        Aim("ratio", 1.5),
        perf_pairs.forecast,
        pairs=5,
    ),
    *_replays(),
)

SCHEMA = 2
_HEAD = ("", "row", "ratio", "from..to", "measured", "against", "more", "aim", "")


@dataclass(frozen=True)
class Result:
    """A row with its comparison, or with the error that prevented it."""

    row: PerfPair
    comparison: Comparison | None
    error: WorkspaceError | None = None

    @property
    def verdict(self) -> str:
        if self.comparison is None:
            return "not measured"
        if self.row.aim is None:
            return "no aim"
        return "met" if self.row.aim.is_met(self.comparison) else "missed"


def encode(results: Sequence[Result], machine: Mapping[str, object]) -> str:
    """Return the JSON record: times in UTC, durations in ms, ratios and differences of pairs."""
    record = {
        "schema": SCHEMA,
        "time": records.utc_now(),
        "machine": machine,
        "rows": [_row(result) for result in results],
    }
    return json.dumps(record, indent=1, allow_nan=False)


def _cells(result: Result) -> tuple[str, ...]:
    """Return the verdict, the figures (medians of the pairs), and both sides."""
    sides = f"{result.row.measured}, against {result.row.against}"
    if (runs := result.comparison) is None:
        return (result.verdict, result.row.name, *[""] * (len(_HEAD) - 3), sides)
    ratio = runs.ratio
    return (
        result.verdict,
        result.row.name,
        f"{ratio.median:.2f}x",
        f"{ratio.low:.2f}..{ratio.high:.2f}",
        *(
            f"{seconds * 1000:.0f} ms"
            for seconds in (runs.measured_s.median, runs.against_s.median, runs.extra_s.median)
        ),
        str(result.row.aim or ""),
        sides,
    )


def _row(result: Result) -> dict[str, object]:
    row, runs = result.row, result.comparison
    aim = {"kind": row.aim.kind, "limit": row.aim.limit} if row.aim else None
    head: dict[str, object] = {
        "name": row.name,
        "measured": row.measured,
        "against": row.against,
        "aim": aim,
        "verdict": result.verdict,
    }
    if runs is None:
        return head | {"error": result.error.message if result.error else None}
    return head | {
        "pairs": len(runs.measured),
        "ratio": _spread(runs.ratio),
        "extra_ms": _spread(runs.extra_s, scale=1000),
        "seam_ms": _ms(runs.seam_s),
        "samples_ms": {
            "measured": [_ms(seconds) for seconds in runs.measured],
            "against": [_ms(seconds) for seconds in runs.against],
        },
    }


def _spread(spread: Spread, *, scale: float = 1) -> dict[str, float]:
    return {name: round(value * scale, 4) for name, value in asdict(spread).items()}


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)


RECORD = "perf.json"


def run(
    layout: Layout,
    settings: Settings,
    rows: Sequence[PerfPair],
    *,
    console: Console,
    pairs: int | None = None,
    json_file: Path | None = None,
) -> None:
    """Measure the rows, print the table, and write the record, to `json_file` as well.

    A missed aim is not a failure: machines are noisy. Raises BuildError where a row could not be
    measured, after all other rows are done.
    """
    from workspace.core import files
    from workspace.machine.machine import Machine

    with files.folder_beside(layout.state / "perf") as folder:
        context = Context(layout, settings, folder)
        results = [_measure(row, context, pairs or row.pairs, console) for row in rows]
    console.table([_HEAD, *(_cells(result) for result in results)], right=range(2, 8))
    text = encode(results, Machine(layout, settings).record())
    write_atomic(layout.state / RECORD, f"{text}\n".encode())
    console.record(text, json_file)
    missed = [result.row.name for result in results if result.verdict == "missed"]
    failed = [result for result in results if result.error]
    console.sentence(
        f"{len(results) - len(failed)} of {len(results)} rows measured;"
        f" aims missed: {', '.join(missed) or 'none'}"
    )
    if failed and (first := failed[0].error):
        details = tuple(
            line
            for result in failed
            if result.error
            for line in (*result.error.details, f"{result.row.name}: {result.error}")
        )
        names = ", ".join(result.row.name for result in failed)
        raise BuildError(
            f"{len(failed)} of {len(results)} rows could not be measured: {names}: {first.message}",
            hint=first.hint,
            details=details,
        )


def _measure(row: PerfPair, context: Context, pairs: int, console: Console) -> Result:
    try:
        with console.step(row.name) as view, row.prepare(context) as (measured, against):
            view.reason = counted(pairs, "pair")
            runs = compare(
                measured,
                against,
                pairs=pairs,
                warm_ups=row.warm_ups,
                on_run=lambda done, total: view.progress(done, total, f"{done} of {total} runs"),
            )
    except WorkspaceError as exc:
        return Result(row, None, exc)
    return Result(row, runs)
