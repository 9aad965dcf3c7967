"""`inv bench.compare`: whether two records are comparable, and a verdict on each shared metric.

An arm is the A or the B of a comparison; its values are one median for each start.
"""

import functools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from workspace.bench import results
from workspace.bench.results import Better, Record, ServeRuns
from workspace.core import hints
from workspace.core.console import Console, Row, State
from workspace.core.errors import Regression, SettingsError, counted
from workspace.core.paths import Layout

Measured = Record | ServeRuns
Verdict = Literal["pass", "fail", "inconclusive"]
FACTOR = 0.05
# With fewer than four values in each arm no 95 % interval exists; this workspace requires six.
MIN_STARTS = 6
CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE
# The recommended number of starts is enough in nine of ten cases.
POWER = 0.9
# A recommendation of more starts than this is useless, so none is given.
MOST_STARTS = 500
# Up to this many pairs the distribution of U is counted; above it is taken as normal.
COUNTED_PAIRS = 2500
STATES: Mapping[str, State] = {"pass": State.OK, "fail": State.FAIL, "inconclusive": State.WARN}
# The smallest factor is 5 % of 5 %.
LEAST_FACTOR, MOST_FACTOR = 0.0025, 10.0
SHOWN_VALUE = 120
# The load of a `vllm bench serve`, which both arms must share.
_LOAD = (
    *("backend", "model_id", "num_prompts", "request_rate", "burstiness", "max_concurrency"),
    "total_input_tokens",
)


@dataclass(frozen=True)
class Judgement:
    """The verdict on two arms, with `ratio`, the second arm over the first.

    The ratio lies between `low` and `high` with 95 % confidence (None: too few starts). `p` is the
    chance that equal arms look so different. `needed` is the number of starts of each arm that
    settles an inconclusive verdict, None if no number does.
    """

    verdict: Verdict
    ratio: float
    low: float | None
    high: float | None
    p: float
    needed: int | None
    reason: str


def judge_samples(
    first: Sequence[float], second: Sequence[float], *, better: Better, factor: float = FACTOR
) -> Judgement:
    """Compare two arms of positive values. With `factor` 0.05 a change up to 5 % does not count.

    fail: the interval is beyond the factor on the worse side, and the arms differ. pass: it is
    below the factor. Otherwise inconclusive.
    """
    differences = sorted(math.log(b) - math.log(a) for a in first for b in second)
    middle = statistics.median(differences)
    bounds = _interval(differences, len(first), len(second))
    p = _mann_whitney(first, second)
    ratio = math.exp(middle)
    if bounds is None or min(len(first), len(second)) < MIN_STARTS:
        reason = (
            f"each arm needs at least {MIN_STARTS} starts; these have {len(first)} and"
            f" {len(second)}"
        )
        low, high = (math.exp(bound) for bound in bounds) if bounds else (None, None)
        return Judgement("inconclusive", ratio, low, high, p, MIN_STARTS, reason)
    # From here on a larger value is worse.
    worst, least, centre = (
        (bounds[1], bounds[0], middle) if better == "lower" else (-bounds[0], -bounds[1], -middle)
    )
    limit = math.log1p(factor)
    low, high = math.exp(bounds[0]), math.exp(bounds[1])
    if least > limit and p < ALPHA:
        return Judgement("fail", ratio, low, high, p, None, "slower")
    if worst < limit:
        return Judgement(
            "pass", ratio, low, high, p, None, "faster" if worst < -limit else "no slower"
        )
    needed = _needed(
        len(first), len(second), half=(worst - least) / 2, distance=abs(limit - centre)
    )
    reason = (
        f"{needed} starts of each arm would settle it"
        if needed
        else f"the change is too near the factor of {factor * 100:.3g}%;"
        " more starts will hardly settle it"
    )
    return Judgement("inconclusive", ratio, low, high, p, needed, reason)


def _interval(differences: Sequence[float], first: int, second: int) -> tuple[float, float] | None:
    """Return the confidence bounds: cut off at each end as many differences as U allows."""
    cut = _cut(first, second)
    return (differences[cut - 1], differences[-cut]) if cut > 0 else None


@functools.cache
def _cut(first: int, second: int) -> int:
    """Return the largest k with P(U < k) <= ALPHA / 2 for equal arms, 0 where there is none."""
    if first * second > COUNTED_PAIRS:
        spread = math.sqrt(first * second * (first + second + 1) / 12)
        return math.floor(first * second / 2 + statistics.NormalDist(0, spread).inv_cdf(ALPHA / 2))
    left = math.comb(first + second, first) * ALPHA / 2
    cut = 0
    for count in _arrangements(first, second):
        left -= count
        if left < 0:
            break
        cut += 1
    return cut


def _arrangements(first: int, second: int) -> list[int]:
    """Count the orders of the values that give U = 0, 1, 2 …: Gauss's binomial coefficients."""
    counts = [1] + [0] * (first * second)
    for step in range(1, first + 1):
        for place in range(len(counts) - 1, second + step - 1, -1):
            counts[place] -= counts[place - second - step]
        for place in range(step, len(counts)):
            counts[place] += counts[place - step]
    return counts


def _mann_whitney(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the two-sided p of scipy.stats.mannwhitneyu; 1 for arms that are all one number."""
    from scipy.stats import mannwhitneyu  # type: ignore[import-untyped]

    p = float(mannwhitneyu(second, first, alternative="two-sided").pvalue)
    return p if math.isfinite(p) else 1.0


def _needed(first: int, second: int, *, half: float, distance: float) -> int | None:
    """Return the starts of each arm after which the interval no longer contains the limit.

    The interval shrinks with the square root of the starts.
    """
    if distance <= 0:
        return None
    normal = statistics.NormalDist()
    margin = 1 + normal.inv_cdf(POWER) / normal.inv_cdf(1 - ALPHA / 2)
    starts = 2 * first * second / (first + second) * (half / distance * margin) ** 2
    return max(math.ceil(starts), first + 1, second + 1) if starts <= MOST_STARTS else None


@dataclass(frozen=True)
class MetricDifference:
    """One metric of two records: both medians and the judgement."""

    metric: str
    first: float
    second: float
    judgement: Judgement


def show(
    layout: Layout,
    first: str,
    second: str,
    *,
    factor: str,
    across: Sequence[str],
    console: Console,
    as_json: bool,
) -> None:
    """Print a row for each metric.

    Raises Regression where a metric got worse, SettingsError where the records are not comparable.
    """
    allowed = parsed_factor(factor)
    a, b = _measured(layout, first), _measured(layout, second)
    require_comparable(a, b, across=across, typed=(first, second))
    rows = judge_records(a, b, factor=allowed)
    if isinstance(a, ServeRuns) and isinstance(b, ServeRuns):
        _print_limits(a, b, console)
    if as_json:
        document = {
            "schema": 1,
            "factor": allowed,
            "first": a.stem,
            "second": b.stem,
            "rows": [asdict(row) for row in rows],
        }
        console.data(json.dumps(document, indent=1, allow_nan=False))
    else:
        print_rows(rows, console=console.stdout)
    if names := worse(rows):
        plots = hints.text("bench.report_plots", percent=allowed * 100)
        raise Regression(
            f"{b.stem} is slower than {a.stem}: {names}",
            hint=plots if isinstance(b, Record) else hints.text("nox.bench"),
        )
    if isinstance(a, Record) and isinstance(b, Record) and (needed := most_needed(rows)):
        # Beside a document stdout has nothing else.
        (console if as_json else console.stdout).hint(_repeat_hint(a, b, needed))


def _repeat_hint(a: Record, b: Record, needed: int) -> str:
    """Return the command that adds starts to a record that has too few, the second one first."""
    from workspace.bench import subject

    short = next((record for record in (b, a) if len(record.starts) < needed), b)
    options = subject.options_of(short)
    is_folder = options.model == subject.FOLDER
    return hints.text(
        "bench.repeat_both",
        kind=short.kind,
        arguments=subject.arguments(options, short.label, needed),
        record=short.stem,
        folder=f"; {subject.FOLDER} is that of {short.model}" if is_folder else "",
    )


def _measured(layout: Layout, name: str) -> Measured:
    """Return the record of a name, or the runs of `vllm bench serve` in its file or folder."""
    if runs := results.serve_runs(name):
        return runs
    record = results.find(layout, name).record
    assert record is not None
    return record


def _print_limits(first: ServeRuns, second: ServeRuns, console: Console) -> None:
    """Print what results of `vllm bench serve` leave open."""
    console.info(
        "results of `vllm bench serve` name no machine, tree or version; a run counts as a start"
        " here, and runs of one server are less independent than that"
    )
    if min(len(first.runs), len(second.runs)) < MIN_STARTS:
        console.info(
            "their std is a spread between requests; that between runs needs several:"
            f" {MIN_STARTS} for each side, in a folder or in one file of --append-result"
        )
    if missing := sorted({*first.metrics} ^ {*second.metrics}):
        console.info(f"not compared, because one side lacks it: {', '.join(missing)}")
    for arm in (first, second):
        if failed := sum(run.num_prompts - run.completed for run in arm.runs):
            console.warn(f"{arm.stem}: {counted(failed, 'request')} failed and count nowhere")


def print_rows(rows: Sequence[MetricDifference], *, console: Console) -> None:
    """Print the verdict of each metric."""
    shown = []
    for one in rows:
        state = STATES[one.judgement.verdict]
        # The state has the verdict, but for an inconclusive one.
        text = sentence(one) if state is State.WARN else _figures(one)
        shown.append(Row(state, one.metric, text))
    console.rows(shown)


def worse(rows: Sequence[MetricDifference]) -> str:
    """Return the metrics that got worse, with their changes; empty if none did."""
    return ", ".join(
        f"{row.metric} {percent(row.judgement.ratio)}"
        for row in rows
        if row.judgement.verdict == "fail"
    )


def most_needed(rows: Sequence[MetricDifference]) -> int:
    """Return the starts of each arm that settle the inconclusive metrics, 0 if there are none."""
    return max(
        (row.judgement.needed or 0 for row in rows if row.judgement.verdict == "inconclusive"),
        default=0,
    )


def parsed_factor(text: str) -> float:
    """Parse `5` or `5%` to the share above which a change counts. Raises SettingsError."""
    try:
        factor = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        factor = math.nan
    if not LEAST_FACTOR <= factor <= MOST_FACTOR:
        raise SettingsError(
            f"--factor: {text[:40]!r} is not a percentage from {LEAST_FACTOR:.2%} to"
            f" {MOST_FACTOR:.0%}",
            hint=hints.text("bench.factor_default", percent=FACTOR * 100),
        )
    return factor


def judge_records(
    first: Measured, second: Measured, *, factor: float
) -> tuple[MetricDifference, ...]:
    """Judge each metric that both records have. Raises SettingsError if they share none."""
    shared = [name for name in first.metrics if name in second.metrics]
    if not shared:
        raise SettingsError(
            f"{first.stem} and {second.stem} have no metric in common",
            hint=hints.text(
                "bench.metrics_of",
                first=", ".join(first.metrics) or "none",
                second=", ".join(second.metrics) or "none",
            ),
        )
    rows = []
    for name in shared:
        a, b = first.values(name), second.values(name)
        judgement = judge_samples(a, b, better=results.known(name).better, factor=factor)
        rows.append(MetricDifference(name, statistics.median(a), statistics.median(b), judgement))
    return tuple(rows)


def sentence(row: MetricDifference) -> str:
    """Return verdict, change, chance and medians of a metric in one line."""
    return f"{row.judgement.verdict}: {_figures(row)}"


def _figures(row: MetricDifference) -> str:
    judgement = row.judgement
    chance = f"p = {judgement.p:.2g}, " if judgement.low is not None else ""
    return (
        f"{percent(judgement.ratio)}{interval_text(judgement)}, {chance}{row.first:.4g} →"
        f" {row.second:.4g} {results.known(row.metric).unit}; {judgement.reason}"
    )


def interval_text(judgement: Judgement) -> str:
    """Return the interval in brackets, empty where there are too few starts."""
    if judgement.low is None or judgement.high is None:
        return ""
    return f" ({percent(judgement.low)} to {percent(judgement.high)})"


def percent(ratio: float) -> str:
    """Return a ratio as a change, such as +5.0%."""
    return f"{ratio - 1:+.1%}" if ratio < MOST_FACTOR else f"×{ratio:.3g}"


def require_comparable(
    first: Measured,
    second: Measured,
    *,
    across: Sequence[str] = (),
    typed: tuple[str, str] | None = None,
) -> None:
    """Raise SettingsError naming each field that differs, except those in `across`.

    `typed` are the names or paths under which the user gave the records.
    """
    if type(first) is not type(second):
        raise SettingsError(
            f"only one of {first.stem} and {second.stem} is a result of `vllm bench serve`: the"
            " other is a record of this workspace, with a machine and a tree",
            hint=hints.text("bench.measure_again"),
        )
    names = fields(first).keys()
    unknown = [name for name in across if name not in names]
    if unknown:
        raise SettingsError(
            f"--across: {unknown[0][:40]!r} is not a field of a record",
            hint=hints.text("bench.fields", names=", ".join(names)),
        )
    differing = {
        name: text for name, text in differences(first, second).items() if name not in across
    }
    if differing:
        flags = " ".join(f"--across {name}" for name in (*across, *differing))
        a, b = typed or (first.stem, second.stem)
        raise SettingsError(
            f"{first.stem} and {second.stem} are not comparable; they differ in"
            f" {', '.join(differing)}",
            hint=hints.text("bench.compare_anyway", first=a, second=b, flags=flags),
            details=tuple(f"{name}: {text}" for name, text in differing.items()),
        )


def fields(record: Measured) -> dict[str, str]:
    """Return the fields that must be equal, so that only the trees can cause a difference."""
    if isinstance(record, ServeRuns):
        return {
            name: " and ".join(sorted({str(vars(run)[name]) for run in record.runs}))
            for name in _LOAD
        }
    machine, software = record.machine, record.software
    gpus = [f"{gpu.name} {gpu.capability or ''}".strip() for gpu in machine.gpus]
    drivers = sorted({gpu.driver or "unknown" for gpu in machine.gpus})
    return {
        "kind": record.kind,
        "machine": machine.name,
        "cores": str(machine.cores),
        "gpus": "; ".join(gpus) or "none",
        "driver": ", ".join(drivers) or "none",
        "device": record.device,
        "model": record.model,
        "flags": " ".join(record.flags),
        "environment": " ".join(
            f"{name}={text}" for name, text in sorted(record.environment.items())
        ),
        "backends": "; ".join(record.backends) or "none",
        "torch": software.torch,
        "triton": software.triton,
        "cuda": software.cuda,
        "python": software.python,
    }


def differences(first: Measured, second: Measured) -> dict[str, str]:
    """Return the fields that differ, with both values.

    Of flags and environment only the flags and variables that differ are shown.
    """
    a, b = fields(first), fields(second)
    found = {
        name: f"{_shortened(a[name])} against {_shortened(b[name])}"
        for name in a
        if a[name] != b[name]
    }
    if isinstance(first, ServeRuns) or isinstance(second, ServeRuns):
        return found
    if "flags" in found:
        found["flags"] = " against ".join(
            " ".join(flag for flag in record.flags if flag not in other.flags) or "nothing"
            for record, other in ((first, second), (second, first))
        )
    if "environment" in found:
        pairs = [
            (name, first.environment.get(name, "unset"), second.environment.get(name, "unset"))
            for name in sorted({*first.environment, *second.environment})
        ]
        found["environment"] = _shortened(
            "; ".join(f"{name} {old} against {new}" for name, old, new in pairs if old != new)
        )
    return found


def newest_like(layout: Layout, record: Record, *, differing: Sequence[str]) -> Record | None:
    """Return the newest other record that differs in no field but those named."""
    return next(
        (
            found
            for found in (entry.record for entry in results.entries(layout))
            if found
            and found.starts
            and found.stem != record.stem
            and differences(found, record).keys() <= set(differing)
        ),
        None,
    )


def shortest_name(layout: Layout, record: Record) -> str:
    """Return the label of a record, or its file name if others have the label too."""
    labelled = layout.results.glob(f"*/*-{record.label}.json")
    is_unique = sum(path.stem.partition("-")[2] == record.label for path in labelled) == 1
    return record.label if is_unique else record.stem


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_VALUE else f"{text[:SHOWN_VALUE]}…"


def judge_noise(first: Sequence[float], second: Sequence[float], *, factor: float) -> Judgement:
    """Judge odd against even starts of both arms, each value divided by its arm's median.

    Any difference is noise. A verdict of fail: the same tree looks slower than itself, whichever
    half is the slower.
    """
    halves: tuple[list[float], list[float]] = ([], [])
    for values in (first, second):
        middle = statistics.median(values)
        for index, value in enumerate(values):
            halves[index % 2].append(value / middle)
    forth = judge_samples(halves[0], halves[1], better="lower", factor=factor)
    back = judge_samples(halves[1], halves[0], better="lower", factor=factor)
    return back if back.verdict == "fail" else forth
