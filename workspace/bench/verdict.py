"""Whether the second of two arms is slower: pure statistics over starts of the process, never over the samples within one.

The ratio is Hodges and Lehmann's estimate on logarithms, its interval and the test are those of Mann and Whitney's U: no distribution is
assumed, one odd start decides nothing, and to swap the arms or to change the unit changes no verdict.
"""

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from workspace.bench.metrics import Better

Verdict = Literal["pass", "fail", "inconclusive"]
FACTOR = 0.05
# Below five an arm no interval of 95 % exists at all; six is what the statistics of this workspace ask for.
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
    """`ratio` is the second arm over the first, between `low` and `high` with 95 % confidence (None: too few starts to say).

    `p` is the chance that arms which do not differ look so different. `needed` starts an arm would settle what is inconclusive, None where none would.
    """

    verdict: Verdict
    ratio: float
    low: float | None
    high: float | None
    p: float
    needed: int | None
    reason: str


def judge(first: Sequence[float], second: Sequence[float], *, better: Better, factor: float = FACTOR) -> Judgement:
    """Compare two arms, one positive value a start. `factor` 0.05: a change up to 5 % does not count.

    fail: the interval lies beyond the factor on the worse side, and the arms differ. pass: it lies before it. Else inconclusive.
    """
    differences = sorted(math.log(b) - math.log(a) for a in first for b in second)
    middle = statistics.median(differences)
    bounds = _interval(differences, len(first), len(second))
    p = _mann_whitney(first, second)
    ratio = math.exp(middle)
    if bounds is None or min(len(first), len(second)) < MIN_STARTS:
        reason = f"an arm has at least {MIN_STARTS} starts, there are {len(first)} and {len(second)}"
        low, high = (math.exp(bound) for bound in bounds) if bounds else (None, None)
        return Judgement("inconclusive", ratio, low, high, p, MIN_STARTS, reason)
    # Upwards is worse from here on.
    worst, least, centre = (bounds[1], bounds[0], middle) if better == "lower" else (-bounds[0], -bounds[1], -middle)
    limit = math.log1p(factor)
    low, high = math.exp(bounds[0]), math.exp(bounds[1])
    if least > limit and p < ALPHA:
        return Judgement("fail", ratio, low, high, p, None, "slower")
    if worst < limit:
        return Judgement("pass", ratio, low, high, p, None, "faster" if worst < -limit else "no slower")
    needed = _needed(len(first), len(second), half=(worst - least) / 2, distance=abs(limit - centre))
    reason = f"{needed} starts an arm would settle it" if needed else f"it lies at the factor of {factor:.3g} itself, more starts will hardly settle it"
    return Judgement("inconclusive", ratio, low, high, p, needed, reason)


def _interval(differences: Sequence[float], first: int, second: int) -> tuple[float, float] | None:
    """The bounds that U leaves: as many of the ordered differences are cut off at each end as chance alone would put there."""
    cut = _cut(first, second)
    return (differences[cut - 1], differences[-cut]) if cut > 0 else None


@functools.cache
def _cut(first: int, second: int) -> int:
    """The largest k with P(U < k) of at most half of ALPHA for arms that do not differ; 0 where there is none."""
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
    """The two-sided p of scipy.stats.mannwhitneyu; 1 where it says nothing, as of arms that are all one number."""
    from scipy.stats import mannwhitneyu  # type: ignore[import-untyped]

    p = float(mannwhitneyu(second, first, alternative="two-sided").pvalue)
    return p if math.isfinite(p) else 1.0


def _needed(first: int, second: int, *, half: float, distance: float) -> int | None:
    """Starts an arm after which the interval, which shrinks with their root, no longer reaches over the limit."""
    if distance <= 0:
        return None
    normal = statistics.NormalDist()
    margin = 1 + normal.inv_cdf(POWER) / normal.inv_cdf(1 - ALPHA / 2)
    starts = 2 * first * second / (first + second) * (half / distance * margin) ** 2
    return max(math.ceil(starts), first + 1, second + 1) if starts <= MOST_STARTS else None
