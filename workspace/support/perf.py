"""nox -s perf: the rows, their measurement, the table and the JSON record.

It runs with the Python of the tool environment. perf_measure.py times two sides and
replays builds; perf_pairs.py prepares the other sides.
"""

import contextlib
import datetime
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from workspace.core.console import Console
from workspace.core.errors import BuildError, WorkspaceError
from workspace.core.files import write_atomic
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.support import perf_measure, perf_pairs
from workspace.support.perf_measure import (
    Comparison,
    Context,
    Sides,
    Spread,
    compare,
)


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
            f"the recorded build on {perf_measure.CORES} cores in {gib:g} GiB, by admission",
            "the lower bound of any order",
            Aim("ratio", 1.1),
            perf_measure.simulated(gib),
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
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
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
            view.reason = f"{pairs} {'pair' if pairs == 1 else 'pairs'}"
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
