"""What was measured, for a person and for a program."""

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from workspace.core.errors import WorkspaceError
from workspace.environment.machine import Machine
from workspace.perf.measure import Comparison, Sample, Spread
from workspace.perf.rows import Row

SCHEMA = 1
_HEAD = ("", "row", "ratio", "from..to", "cpu", "measured", "against", "more", "aim")


@dataclass(frozen=True)
class Result:
    """A row with what was measured, or with why it could not be."""

    row: Row
    comparison: Comparison | None
    error: WorkspaceError | None = None

    @property
    def verdict(self) -> str:
        if self.comparison is None:
            return "not measured"
        if self.row.aim is None:
            return "no aim"
        return "met" if self.row.aim.is_met(self.comparison) else "missed"


def table(results: Sequence[Result]) -> list[str]:
    """The rows as lines for a person: state word first, then the figures (medians of the pairs), then what was held against what."""
    cells = [_HEAD, *(_cells(result) for result in results)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEAD))]
    words = ["", *(f"{result.row.measured}, against {result.row.against}" for result in results)]
    return [_line(row, widths, text) for row, text in zip(cells, words, strict=True)]


def encode(results: Sequence[Result], machine: Machine) -> str:
    """One JSON document. Times are UTC, durations milliseconds, ratios and differences those within a pair."""
    record = {
        "schema": SCHEMA,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": asdict(machine),
        "rows": [_row(result) for result in results],
    }
    return json.dumps(record, indent=1, allow_nan=False)


def _cells(result: Result) -> tuple[str, ...]:
    if (runs := result.comparison) is None:
        return (result.verdict, result.row.name, *[""] * (len(_HEAD) - 2))
    ratio = runs.ratio
    return (
        result.verdict,
        result.row.name,
        f"{ratio.median:.2f}x",
        f"{ratio.low:.2f}..{ratio.high:.2f}",
        f"{runs.cpu_ratio.median:.2f}x",
        *(f"{seconds * 1000:.0f} ms" for seconds in (runs.measured_s.median, runs.against_s.median, runs.extra_s.median)),
        str(result.row.aim or ""),
    )


def _line(cells: Sequence[str], widths: Sequence[int], words: str) -> str:
    aligned = [cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(zip(cells, widths, strict=True))]
    return f"{'  '.join(aligned)}  {words}".rstrip()


def _row(result: Result) -> dict[str, object]:
    row, runs = result.row, result.comparison
    aim = {"kind": row.aim.kind, "limit": row.aim.limit} if row.aim else None
    head: dict[str, object] = {"name": row.name, "measured": row.measured, "against": row.against, "aim": aim, "verdict": result.verdict}
    if runs is None:
        return head | {"error": result.error.message if result.error else None}
    return head | {
        "pairs": len(runs.measured),
        "ratio": _spread(runs.ratio),
        "cpu_ratio": _spread(runs.cpu_ratio),
        "extra_ms": _spread(runs.extra_s, scale=1000),
        "seam": _sample(runs.seam),
        "samples": {"measured": [_sample(sample) for sample in runs.measured], "against": [_sample(sample) for sample in runs.against]},
    }


def _spread(spread: Spread, *, scale: float = 1) -> dict[str, float]:
    return {name: round(value * scale, 4) for name, value in asdict(spread).items()}


def _sample(sample: Sample) -> dict[str, float]:
    return {"wall_ms": round(sample.wall_s * 1000, 2), "cpu_ms": round(sample.cpu_s * 1000, 2)}
