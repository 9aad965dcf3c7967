"""nox -s perf: the rows, their measurement, the table and the JSON record.

It runs with the Python of the tool environment. Both sides of a row run in turn (A B, B A, …), so
that a machine that becomes slower slows both; each ratio is one within a pair. A recorded build is
replayed through the real admission, with a clock that jumps from the end of a unit to the next.
perf_pairs.py prepares the sides.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from workspace.compile import scheduler
from workspace.compile.costs import Cost, Entry, read_table
from workspace.compile.scheduler import Bounds, Replayed
from workspace.core import records
from workspace.core.console import Console
from workspace.core.errors import BuildError, WorkspaceError, counted
from workspace.core.files import folder_beside, write_atomic
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.support import perf_pairs
from workspace.support.perf_pairs import Context, Side, Sides

# The cores of a GB10.
CORES = 20
SCHEMA = 3
RECORD = "perf.json"
_HEAD = ("", "row", "ratio", "from..to", "measured", "against", "aim", "")


@dataclass(frozen=True)
class Spread:
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """The seconds of both sides, in the order of the pairs."""

    measured: tuple[float, ...]
    against: tuple[float, ...]

    @property
    def ratio(self) -> Spread:
        """The ratios within a pair."""
        pairs = zip(self.measured, self.against, strict=True)
        ratios = [one / other for one, other in pairs]
        return Spread(statistics.median(ratios), min(ratios), max(ratios))


def compare(
    measured: Side,
    against: Side,
    *,
    pairs: int,
    warm_ups: int,
    on_run: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Run both sides `warm_ups` times without counting, then in `pairs` pairs.

    `on_run` gets the number of finished runs and of all runs. Raises the errors of a side.
    """
    samples: tuple[list[float], list[float]] = ([], [])
    for index in range(-warm_ups, pairs):
        for place, at in enumerate((0, 1) if index % 2 == 0 else (1, 0), 1):
            seconds = (measured, against)[at]()
            if index >= 0:
                samples[at].append(seconds)
            on_run(2 * (index + warm_ups) + place, 2 * (warm_ups + pairs))
    return Comparison(tuple(samples[0]), tuple(samples[1]))


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
        )
    return replayed.seconds


def _replayed(budget_gib: float) -> Callable[[Context], Sides]:
    """Prepare a row: the shipped trace, through the admission, against its lower bound."""

    def prepare(_: Context) -> Sides:
        entries, bounds = read_table(), Bounds(CORES, budget_gib)
        return (
            lambda: checked(simulate(entries, bounds), bounds),
            lambda: lower_bound(entries, bounds),
        )

    return prepare


@dataclass(frozen=True)
class Aim:
    """An upper limit: a ratio, or seconds in all (wall)."""

    kind: Literal["ratio", "wall"]
    limit: float

    def is_met(self, runs: Comparison) -> bool:
        found = runs.ratio.median if self.kind == "ratio" else statistics.median(runs.measured)
        return found <= self.limit

    def __str__(self) -> str:
        return f"{self.limit:g}{'x' if self.kind == 'ratio' else ' s'}"


@dataclass(frozen=True)
class PerfPair:
    """One comparison; `prepare` returns the two sides, the measured side first."""

    name: str
    measured: str
    against: str
    aim: Aim | None
    prepare: Callable[[Context], Sides]
    pairs: int = 10
    warm_ups: int = 1


def _verb(*args: str, statuses: tuple[int, ...] = (0,)) -> Callable[[Context], Sides]:
    """Prepare a row: a verb in the built tree, against invoke itself."""

    def prepare(context: Context) -> Sides:
        # An unbuilt tree would take less time.
        _ = context.built
        return context.inv(*args, statuses=statuses), context.bare()

    return prepare


def _replays() -> Iterator[PerfPair]:
    for gib in (24.0, 48.0, 96.0):
        yield PerfPair(
            f"replay-{gib:g}",
            f"the recorded build on {CORES} cores in {gib:g} GiB, by admission",
            "the lower bound of any order",
            Aim("ratio", 1.1),
            _replayed(gib),
            pairs=1,
            warm_ups=0,
        )


_BARE = "a bare invoke with one empty task"
_HALF_A_SECOND = Aim("wall", 0.5)
ROWS: tuple[PerfPair, ...] = (
    PerfPair("list", "inv --list", _BARE, Aim("ratio", 1.2), perf_pairs.listed),
    PerfPair("status", "inv status", _BARE, None, _verb("status")),
    PerfPair("rebuild", "inv rebuild with nothing to do", _BARE, _HALF_A_SECOND, _verb("rebuild")),
    PerfPair(
        "no-op", "inv bootstrap with nothing to do", _BARE, _HALF_A_SECOND, _verb("bootstrap")
    ),
    PerfPair(
        "doctor",
        "inv doctor --offline",
        _BARE,
        Aim("wall", 3.0),
        # 6: the machine lacks a part; the doctor takes the same time.
        _verb("doctor", "--offline", statuses=(0, 6)),
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


@dataclass(frozen=True)
class Result:
    """A row with its comparison, or with the error that prevented it."""

    row: PerfPair
    runs: Comparison | None
    error: WorkspaceError | None = None

    @property
    def verdict(self) -> str:
        if self.runs is None:
            return "not measured"
        if self.row.aim is None:
            return "no aim"
        return "met" if self.row.aim.is_met(self.runs) else "missed"

    @property
    def cells(self) -> tuple[str, ...]:
        """The verdict, the figures (medians of the pairs), and both sides."""
        sides = f"{self.row.measured}, against {self.row.against}"
        if self.runs is None:
            return (self.verdict, self.row.name, *[""] * (len(_HEAD) - 3), sides)
        ratio = self.runs.ratio
        medians = map(statistics.median, (self.runs.measured, self.runs.against))
        return (
            self.verdict,
            self.row.name,
            f"{ratio.median:.2f}x",
            f"{ratio.low:.2f}..{ratio.high:.2f}",
            *(f"{seconds * 1000:.0f} ms" for seconds in medians),
            str(self.row.aim or ""),
            sides,
        )

    def record(self) -> dict[str, object]:
        """Return the row of the JSON record, with all samples in seconds."""
        row, runs = self.row, self.runs
        head: dict[str, object] = {
            "name": row.name,
            "measured": row.measured,
            "against": row.against,
            "aim": str(row.aim or ""),
            "verdict": self.verdict,
        }
        if runs is None:
            return head | {"error": self.error.message if self.error else None}
        return head | {"ratio": asdict(runs.ratio), "samples_s": asdict(runs)}


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
    from workspace.machine.machine import Machine

    with folder_beside(layout.state / "perf") as folder:
        context = Context(layout, settings, folder)
        results = [_measure(row, context, pairs or row.pairs, console) for row in rows]
    console.table([_HEAD, *(result.cells for result in results)], right=range(2, 7))
    record = {
        "schema": SCHEMA,
        "time": records.utc_now(),
        "machine": Machine(layout, settings).record(),
        "rows": [result.record() for result in results],
    }
    text = json.dumps(record, indent=1, allow_nan=False)
    write_atomic(layout.state / RECORD, f"{text}\n".encode())
    console.record(text, json_file)
    missed = [result.row.name for result in results if result.verdict == "missed"]
    errors = {result.row.name: result.error for result in results if result.error}
    console.sentence(
        f"{len(results) - len(errors)} of {len(results)} rows measured;"
        f" aims missed: {', '.join(missed) or 'none'}"
    )
    if errors:
        raise _not_measured(errors, len(results))


def _not_measured(errors: Mapping[str, WorkspaceError], count: int) -> BuildError:
    first = next(iter(errors.values()))
    return BuildError(
        f"{len(errors)} of {count} rows could not be measured: {', '.join(errors)}:"
        f" {first.message}",
        hint=first.hint,
        details=tuple(
            line for name, error in errors.items() for line in (*error.details, f"{name}: {error}")
        ),
    )


def _measure(row: PerfPair, context: Context, pairs: int, console: Console) -> Result:
    try:
        with console.step(row.name) as view:
            view.reason = counted(pairs, "pair")
            runs = compare(
                *row.prepare(context),
                pairs=pairs,
                warm_ups=row.warm_ups,
                on_run=lambda done, total: view.progress(done, total, f"{done} of {total} runs"),
            )
    except WorkspaceError as exc:
        return Result(row, None, exc)
    return Result(row, runs)
