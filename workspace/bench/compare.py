"""`inv bench.compare`: whether two records may be compared, and a verdict on each metric that both have."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from workspace.bench import metrics, store, verdict
from workspace.bench.record import Record
from workspace.bench.verdict import FACTOR, Judgement
from workspace.core.console import Console, State
from workspace.core.errors import Regression, SettingsError
from workspace.core.layout import Layout

STATES: Mapping[str, State] = {"pass": "ok", "fail": "FAIL", "inconclusive": "warn"}
# 5 % of 5 %, and a number above which nothing was ever called a little slower.
LEAST_FACTOR, MOST_FACTOR = 0.0025, 10.0
SHOWN_VALUE = 120


@dataclass(frozen=True)
class Row:
    """One metric of both records."""

    metric: str
    first: float
    second: float
    judgement: Judgement


def show(layout: Layout, first: str, second: str, *, factor: str, across: Sequence[str], console: Console, as_json: bool) -> None:
    """Print a row a metric. Raises Regression where one got worse, SettingsError where the records are not comparable."""
    allowed = parsed_factor(factor)
    a, b = (found.record for found in (store.find(layout, first), store.find(layout, second)))
    assert a is not None
    assert b is not None
    require_comparable(a, b, across=across)
    rows = judged(a, b, factor=allowed)
    if as_json:
        document = {"schema": 1, "factor": allowed, "first": a.stem, "second": b.stem, "rows": [asdict(row) for row in rows]}
        console.data(json.dumps(document, indent=1, allow_nan=False))
    else:
        print_rows(rows, console=console)
    if names := worse(rows):
        raise Regression(f"{b.stem} is slower than {a.stem}: {names}", hint=f"./scripts/inv bench.report    draws both; factor {allowed:.3g}")
    if needed := most_needed(rows):
        console.say(f"next: ./scripts/nox -s bench -- {b.kind} --label {b.label} --repeat {needed}    on both trees; what is measured stays")


def print_rows(rows: Sequence[Row], *, console: Console) -> None:
    for row in rows:
        console.row(STATES[row.judgement.verdict], row.metric, f" {sentence(row)}")


def worse(rows: Sequence[Row]) -> str:
    """Name the metrics that got worse, and by how much; nothing where none did."""
    return ", ".join(f"{row.metric} {percent(row.judgement.ratio)}" for row in rows if row.judgement.verdict == "fail")


def most_needed(rows: Sequence[Row]) -> int:
    """How many starts an arm would settle what is inconclusive, 0 where nothing is, or none would."""
    return max((row.judgement.needed or 0 for row in rows if row.judgement.verdict == "inconclusive"), default=0)


def parsed_factor(text: str) -> float:
    """The share above which a change counts, from `5` or `5%`. Raises SettingsError."""
    try:
        factor = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        factor = math.nan
    if not LEAST_FACTOR <= factor <= MOST_FACTOR:
        raise SettingsError(
            f"--factor: {text[:40]!r} is not a percentage from {LEAST_FACTOR:.2%} to {MOST_FACTOR:.0%}", hint=f"--factor {FACTOR * 100:g}    is the default"
        )
    return factor


def judged(first: Record, second: Record, *, factor: float) -> tuple[Row, ...]:
    """Judge each metric that both records have. Raises SettingsError where there is none."""
    shared = [name for name in first.metrics if name in second.metrics]
    if not shared:
        raise SettingsError(
            f"{first.stem} and {second.stem} have no metric in common",
            hint=f"measured are {', '.join(first.metrics) or 'none'} and {', '.join(second.metrics) or 'none'}",
        )
    rows = []
    for name in shared:
        a, b = first.values(name), second.values(name)
        judgement = verdict.judge(a, b, better=metrics.known(name).better, factor=factor)
        rows.append(Row(name, metrics.median(a), metrics.median(b), judgement))
    return tuple(rows)


def sentence(row: Row) -> str:
    """The evidence of a verdict, in a line."""
    of = row.judgement
    between = f" ({percent(of.low)} to {percent(of.high)})" if of.low is not None and of.high is not None else ""
    chance = f"p = {of.p:.2g}, " if of.low is not None else ""
    return f"{of.verdict}: {percent(of.ratio)}{between}, {chance}{row.first:.4g} → {row.second:.4g} {metrics.known(row.metric).unit}; {of.reason}"


def percent(ratio: float) -> str:
    """A ratio as the change that it is."""
    return f"{ratio - 1:+.1%}" if ratio < MOST_FACTOR else f"×{ratio:.3g}"


def require_comparable(first: Record, second: Record, *, across: Sequence[str] = ()) -> None:
    """Raise SettingsError naming each field that differs and is not in `across`."""
    names = fields(first).keys()
    unknown = [name for name in across if name not in names]
    if unknown:
        raise SettingsError(f"--across: {unknown[0][:40]!r} is no field of a record", hint=f"there are {', '.join(names)}")
    differing = {name: text for name, text in differences(first, second).items() if name not in across}
    if differing:
        flags = " ".join(f"--across {name}" for name in differing)
        raise SettingsError(
            f"{first.stem} and {second.stem} are not comparable; what differs: {', '.join(differing)}",
            hint=f"./scripts/inv bench.compare {first.stem} {second.stem} {flags}    where that is what you compare",
            details=tuple(f"{name}: {text}" for name, text in differing.items()),
        )


def fields(one: Record) -> dict[str, str]:
    """What has to be equal for a difference to be the tree's."""
    return {
        "kind": one.kind,
        "machine": one.machine.name,
        "cores": str(one.machine.cores),
        "gpus": "; ".join(f"{gpu.name} {gpu.capability or ''}".strip() for gpu in one.machine.gpus) or "none",
        "driver": ", ".join(sorted({gpu.driver or "unknown" for gpu in one.machine.gpus})) or "none",
        "device": one.device,
        "model": one.model,
        "flags": " ".join(one.flags),
        "environment": " ".join(f"{name}={text}" for name, text in sorted(one.environment.items())),
        "backends": "; ".join(one.backends) or "none",
        "torch": one.software.torch,
        "triton": one.software.triton,
        "cuda": one.software.cuda,
        "python": one.software.python,
    }


def differences(first: Record, second: Record) -> dict[str, str]:
    """The fields that differ, each with both values; of flags and environment only the words that do."""
    a, b = fields(first), fields(second)
    found = {name: f"{_cut(a[name])} against {_cut(b[name])}" for name in a if a[name] != b[name]}
    if "flags" in found:
        found["flags"] = " against ".join(
            " ".join(word for word in one.flags if word not in others.flags) or "nothing" for one, others in ((first, second), (second, first))
        )
    if "environment" in found:
        names = sorted({*first.environment, *second.environment})
        told = [(name, first.environment.get(name, "unset"), second.environment.get(name, "unset")) for name in names]
        found["environment"] = _cut("; ".join(f"{name} {old} against {new}" for name, old, new in told if old != new))
    return found


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_VALUE else f"{text[:SHOWN_VALUE]}…"
