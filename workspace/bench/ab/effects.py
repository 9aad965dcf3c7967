"""Whether the measuring itself shows in what was measured: the same tree against itself, and the order of the starts. Pure statistics.

Starts run A B B A A B B A …: an effect of first or second, and a drift, fall on both arms alike; that they are there is worth knowing all the same.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from workspace.bench import verdict
from workspace.bench.verdict import Judgement

# Two tests a metric: below this one of them is an effect, not luck.
ALPHA = 0.01


@dataclass(frozen=True)
class Order:
    """`p_pair` is of Wilcoxon's signed ranks on first against second of a pair, `p_trend` of Kendall's tau over time; the ratio is second over first."""

    p_pair: float
    ratio: float
    p_trend: float
    tau: float

    @property
    def is_seen(self) -> bool:
        return min(self.p_pair, self.p_trend) < ALPHA

    @property
    def sentence(self) -> str:
        return (
            f"the second of a pair is {self.ratio - 1:+.1%} to the first, p = {self.p_pair:.2g} (Wilcoxon); over time tau = {self.tau:+.2f}, "
            f"p = {self.p_trend:.2g} (Kendall)"
        )


def is_first(pair: int) -> int:
    """Which arm, 0 or 1, goes first in a pair, counted from 0."""
    return pair % 2


def itself(first: Sequence[float], second: Sequence[float], *, factor: float) -> Judgement:
    """Judge odd against even starts of both arms, each divided by its arm's median, by the judge of the arms: what differs here is noise.

    A verdict of fail: the same tree looks slower than itself, whichever half is the slower one.
    """
    halves: tuple[list[float], list[float]] = ([], [])
    for values in (first, second):
        middle = statistics.median(values)
        for number, one in enumerate(values):
            halves[number % 2].append(one / middle)
    forth = verdict.judge(halves[0], halves[1], better="lower", factor=factor)
    back = verdict.judge(halves[1], halves[0], better="lower", factor=factor)
    return back if back.verdict == "fail" else forth


def order(first: Sequence[float], second: Sequence[float]) -> Order:
    """Test for effects of the order on what is left when each arm's median is taken off. Both arms have as many starts."""
    from scipy.stats import kendalltau, wilcoxon  # type: ignore[import-untyped]

    rests = [[math.log(one / statistics.median(values)) for one in values] for values in (first, second)]
    earlier = [rests[is_first(pair)][pair] for pair in range(len(first))]
    later = [rests[1 - is_first(pair)][pair] for pair in range(len(first))]
    gaps = [b - a for a, b in zip(earlier, later, strict=True)]
    in_time = [one for pair in zip(earlier, later, strict=True) for one in pair]
    p_pair = float(wilcoxon(gaps).pvalue) if any(gaps) else 1.0
    trend = kendalltau(range(len(in_time)), in_time)
    return Order(
        _chance(p_pair), math.exp(statistics.median(gaps)), _chance(float(trend.pvalue)), float(trend.statistic) if math.isfinite(trend.statistic) else 0.0
    )


def _chance(p: float) -> float:
    """1 where a test says nothing, as of values that are all one number."""
    return p if math.isfinite(p) else 1.0
