"""`inv bench.compare`: whether two records may be compared, and a verdict on each metric that both
have.
"""

import functools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from workspace.bench import metrics, results
from workspace.bench.metrics import Better
from workspace.bench.results import Record
from workspace.core.console import Console, State
from workspace.core.errors import Regression, SettingsError
from workspace.core.paths import Layout

Verdict = Literal["pass", "fail", "inconclusive"]
FACTOR = 0.05
# Below five an arm no interval of 95 % exists at all; six is what the statistics of this workspace
# ask for.
MIN_STARTS = 6
CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE
# Starts that are said to be needed are enough nine times of ten.
POWER = 0.9
# More than so many starts is no advice.
MOST_STARTS = 500
# Up to so many pairs the distribution of U is counted, beyond it is normal.
COUNTED_PAIRS = 2500


@dataclass(frozen=True)
class Judgement:
    """`ratio` is the second arm over the first, between `low` and `high` with 95 % confidence
    (None: too few starts to say).

    `p` is the chance that arms which do not differ look so different. `needed` starts an arm would
    settle what is inconclusive, None where none would.
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
    """Compare two arms, one positive value a start. `factor` 0.05: a change up to 5 % does not
    count.

    fail: the interval lies beyond the factor on the worse side, and the arms differ. pass: it lies
    before it. Else inconclusive.
    """
    differences = sorted(math.log(b) - math.log(a) for a in first for b in second)
    middle = statistics.median(differences)
    bounds = _interval(differences, len(first), len(second))
    p = _mann_whitney(first, second)
    ratio = math.exp(middle)
    if bounds is None or min(len(first), len(second)) < MIN_STARTS:
        reason = (
            f"an arm has at least {MIN_STARTS} starts, there are {len(first)} and {len(second)}"
        )
        low, high = (math.exp(bound) for bound in bounds) if bounds else (None, None)
        return Judgement("inconclusive", ratio, low, high, p, MIN_STARTS, reason)
    # Upwards is worse from here on.
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
        f"{needed} starts an arm would settle it"
        if needed
        else f"it lies at the factor of {factor:.3g} itself, more starts will hardly settle it"
    )
    return Judgement("inconclusive", ratio, low, high, p, needed, reason)


def _interval(differences: Sequence[float], first: int, second: int) -> tuple[float, float] | None:
    """The bounds that U leaves: as many of the ordered differences are cut off at each end as
    chance alone would put there.
    """
    cut = _cut(first, second)
    return (differences[cut - 1], differences[-cut]) if cut > 0 else None


@functools.cache
def _cut(first: int, second: int) -> int:
    """The largest k with P(U < k) of at most half of ALPHA for arms that do not differ; 0 where
    there is none.
    """
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
    """How many orders of the arms give U = 0, 1, 2 …: the coefficients of Gauss's binomial."""
    counts = [1] + [0] * (first * second)
    for step in range(1, first + 1):
        for place in range(len(counts) - 1, second + step - 1, -1):
            counts[place] -= counts[place - second - step]
        for place in range(step, len(counts)):
            counts[place] += counts[place - step]
    return counts


def _mann_whitney(first: Sequence[float], second: Sequence[float]) -> float:
    """The two-sided p of scipy.stats.mannwhitneyu; 1 where it says nothing, as of arms that are all
    one number.
    """
    from scipy.stats import mannwhitneyu  # type: ignore[import-untyped]

    p = float(mannwhitneyu(second, first, alternative="two-sided").pvalue)
    return p if math.isfinite(p) else 1.0


def _needed(first: int, second: int, *, half: float, distance: float) -> int | None:
    """Starts an arm after which the interval, which shrinks with their root, no longer reaches over
    the limit.
    """
    if distance <= 0:
        return None
    normal = statistics.NormalDist()
    margin = 1 + normal.inv_cdf(POWER) / normal.inv_cdf(1 - ALPHA / 2)
    starts = 2 * first * second / (first + second) * (half / distance * margin) ** 2
    return max(math.ceil(starts), first + 1, second + 1) if starts <= MOST_STARTS else None


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
    """Print a row a metric. Raises Regression where one got worse, SettingsError where the records
    are not comparable.
    """
    allowed = parsed_factor(factor)
    a, b = (found.record for found in (results.find(layout, first), results.find(layout, second)))
    assert a is not None
    assert b is not None
    require_comparable(a, b, across=across)
    rows = judged(a, b, factor=allowed)
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
        print_rows(rows, console=console)
    if names := worse(rows):
        raise Regression(
            f"{b.stem} is slower than {a.stem}: {names}",
            hint=f"./scripts/inv bench.report    draws both; factor {allowed:.3g}",
        )
    if needed := most_needed(rows):
        console.info(
            f"next: ./scripts/nox -s bench -- {b.kind} --label {b.label} --repeat {needed}    on"
            " both trees; what is measured stays"
        )


def print_rows(rows: Sequence[Row], *, console: Console) -> None:
    for row in rows:
        console.row(STATES[row.judgement.verdict], row.metric, f" {sentence(row)}")


def worse(rows: Sequence[Row]) -> str:
    """Name the metrics that got worse, and by how much; nothing where none did."""
    return ", ".join(
        f"{row.metric} {percent(row.judgement.ratio)}"
        for row in rows
        if row.judgement.verdict == "fail"
    )


def most_needed(rows: Sequence[Row]) -> int:
    """How many starts an arm would settle what is inconclusive, 0 where nothing is, or none
    would.
    """
    return max(
        (row.judgement.needed or 0 for row in rows if row.judgement.verdict == "inconclusive"),
        default=0,
    )


def parsed_factor(text: str) -> float:
    """The share above which a change counts, from `5` or `5%`. Raises SettingsError."""
    try:
        factor = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        factor = math.nan
    if not LEAST_FACTOR <= factor <= MOST_FACTOR:
        raise SettingsError(
            f"--factor: {text[:40]!r} is not a percentage from {LEAST_FACTOR:.2%} to"
            f" {MOST_FACTOR:.0%}",
            hint=f"--factor {FACTOR * 100:g}    is the default",
        )
    return factor


def judged(first: Record, second: Record, *, factor: float) -> tuple[Row, ...]:
    """Judge each metric that both records have. Raises SettingsError where there is none."""
    shared = [name for name in first.metrics if name in second.metrics]
    if not shared:
        raise SettingsError(
            f"{first.stem} and {second.stem} have no metric in common",
            hint=(
                f"measured are {', '.join(first.metrics) or 'none'} and"
                f" {', '.join(second.metrics) or 'none'}"
            ),
        )
    rows = []
    for name in shared:
        a, b = first.values(name), second.values(name)
        judgement = judge_samples(a, b, better=metrics.known(name).better, factor=factor)
        rows.append(Row(name, metrics.median(a), metrics.median(b), judgement))
    return tuple(rows)


def sentence(row: Row) -> str:
    """The evidence of a verdict, in a line."""
    of = row.judgement
    between = (
        f" ({percent(of.low)} to {percent(of.high)})"
        if of.low is not None and of.high is not None
        else ""
    )
    chance = f"p = {of.p:.2g}, " if of.low is not None else ""
    return (
        f"{of.verdict}: {percent(of.ratio)}{between}, {chance}{row.first:.4g} → {row.second:.4g}"
        f" {metrics.known(row.metric).unit}; {of.reason}"
    )


def percent(ratio: float) -> str:
    """A ratio as the change that it is."""
    return f"{ratio - 1:+.1%}" if ratio < MOST_FACTOR else f"×{ratio:.3g}"


def require_comparable(first: Record, second: Record, *, across: Sequence[str] = ()) -> None:
    """Raise SettingsError naming each field that differs and is not in `across`."""
    names = fields(first).keys()
    unknown = [name for name in across if name not in names]
    if unknown:
        raise SettingsError(
            f"--across: {unknown[0][:40]!r} is no field of a record",
            hint=f"there are {', '.join(names)}",
        )
    differing = {
        name: text for name, text in differences(first, second).items() if name not in across
    }
    if differing:
        flags = " ".join(f"--across {name}" for name in differing)
        raise SettingsError(
            f"{first.stem} and {second.stem} are not comparable; what differs:"
            f" {', '.join(differing)}",
            hint=(
                f"./scripts/inv bench.compare {first.stem} {second.stem} {flags}    where that is"
                " what you compare"
            ),
            details=tuple(f"{name}: {text}" for name, text in differing.items()),
        )


def fields(one: Record) -> dict[str, str]:
    """What has to be equal for a difference to be the tree's."""
    return {
        "kind": one.kind,
        "machine": one.machine.name,
        "cores": str(one.machine.cores),
        "gpus": (
            "; ".join(f"{gpu.name} {gpu.capability or ''}".strip() for gpu in one.machine.gpus)
            or "none"
        ),
        "driver": (
            ", ".join(sorted({gpu.driver or "unknown" for gpu in one.machine.gpus})) or "none"
        ),
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
    """The fields that differ, each with both values; of flags and environment only the words that
    do.
    """
    a, b = fields(first), fields(second)
    found = {
        name: f"{_shortened(a[name])} against {_shortened(b[name])}"
        for name in a
        if a[name] != b[name]
    }
    if "flags" in found:
        found["flags"] = " against ".join(
            " ".join(word for word in one.flags if word not in others.flags) or "nothing"
            for one, others in ((first, second), (second, first))
        )
    if "environment" in found:
        names = sorted({*first.environment, *second.environment})
        told = [
            (name, first.environment.get(name, "unset"), second.environment.get(name, "unset"))
            for name in names
        ]
        found["environment"] = _shortened(
            "; ".join(f"{name} {old} against {new}" for name, old, new in told if old != new)
        )
    return found


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_VALUE else f"{text[:SHOWN_VALUE]}…"


# Two tests a metric: below this one of them is an effect, not luck.
EFFECT_ALPHA = 0.01


@dataclass(frozen=True)
class Order:
    """`p_pair` is of Wilcoxon's signed ranks on first against second of a pair, `p_trend` of
    Kendall's tau over time; the ratio is second over first.
    """

    p_pair: float
    ratio: float
    p_trend: float
    tau: float

    @property
    def is_seen(self) -> bool:
        return min(self.p_pair, self.p_trend) < EFFECT_ALPHA

    @property
    def sentence(self) -> str:
        return (
            f"the second of a pair is {self.ratio - 1:+.1%} to the first, p = {self.p_pair:.2g}"
            f" (Wilcoxon); over time tau = {self.tau:+.2f}, p = {self.p_trend:.2g} (Kendall)"
        )


def is_first(pair: int) -> int:
    """Which arm, 0 or 1, goes first in a pair, counted from 0."""
    return pair % 2


def itself(first: Sequence[float], second: Sequence[float], *, factor: float) -> Judgement:
    """Judge odd against even starts of both arms, each divided by its arm's median, by the judge of
    the arms: what differs here is noise.

    A verdict of fail: the same tree looks slower than itself, whichever half is the slower one.
    """
    halves: tuple[list[float], list[float]] = ([], [])
    for values in (first, second):
        middle = statistics.median(values)
        for number, one in enumerate(values):
            halves[number % 2].append(one / middle)
    forth = judge_samples(halves[0], halves[1], better="lower", factor=factor)
    back = judge_samples(halves[1], halves[0], better="lower", factor=factor)
    return back if back.verdict == "fail" else forth


def order(first: Sequence[float], second: Sequence[float]) -> Order:
    """Test for effects of the order on what is left when each arm's median is taken off. Both arms
    have as many starts.
    """
    from scipy.stats import kendalltau, wilcoxon

    rests = [
        [math.log(one / statistics.median(values)) for one in values] for values in (first, second)
    ]
    earlier = [rests[is_first(pair)][pair] for pair in range(len(first))]
    later = [rests[1 - is_first(pair)][pair] for pair in range(len(first))]
    gaps = [b - a for a, b in zip(earlier, later, strict=True)]
    in_time = [one for pair in zip(earlier, later, strict=True) for one in pair]
    p_pair = float(wilcoxon(gaps).pvalue) if any(gaps) else 1.0
    trend = kendalltau(range(len(in_time)), in_time)
    return Order(
        _chance(p_pair),
        math.exp(statistics.median(gaps)),
        _chance(float(trend.pvalue)),
        float(trend.statistic) if math.isfinite(trend.statistic) else 0.0,
    )


def _chance(p: float) -> float:
    """1 where a test says nothing, as of values that are all one number."""
    return p if math.isfinite(p) else 1.0
