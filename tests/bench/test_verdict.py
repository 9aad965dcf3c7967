"""The verdict: changes that are never a regression, changes that nearly always are, and changes
that do not matter to it.
"""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from tests.bench.materials import arm
from workspace.bench import compare
from workspace.bench.compare import MIN_STARTS, judge_noise, judge_samples
from workspace.bench.results import Better

STARTS = 30
values = st.floats(1e-6, 1e6)
arms = st.lists(values, min_size=1, max_size=9)
similar = st.tuples(st.integers(0, 10**6), st.integers(MIN_STARTS, 12), st.floats(-0.3, 0.3)).map(
    lambda drawn: arm(drawn[0], drawn[1], slow=drawn[2])
)


@pytest.mark.parametrize("better", ["lower", "higher"])
@pytest.mark.parametrize("slow", [0.0, 0.02])
@pytest.mark.parametrize("starts", [MIN_STARTS, STARTS])
def test_slow_down_of_at_most_two_per_cent_is_never_a_regression(
    slow: float, starts: int, better: Better
) -> None:
    for seed in range(100):
        a, b = (
            arm(seed, starts),
            arm(seed + 5000, starts, slow=slow if better == "lower" else 1 / (1 + slow) - 1),
        )
        assert judge_samples(a, b, better=better).verdict != "fail", seed


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_slow_down_of_eight_per_cent_is_a_regression_in_at_least_19_of_20(
    better: Better,
) -> None:
    for round_ in range(5):
        seeds = range(round_ * 20, round_ * 20 + 20)
        slow = 0.08 if better == "lower" else 1 / 1.08 - 1
        found = [
            judge_samples(
                arm(seed, STARTS), arm(seed + 5000, STARTS, slow=slow), better=better
            ).verdict
            for seed in seeds
        ]
        assert found.count("fail") >= 19, found


def test_equal_arms_pass_with_thirty_starts() -> None:
    assert [
        judge_samples(arm(seed, STARTS), arm(seed + 5000, STARTS), better="lower").verdict
        for seed in range(20)
    ] == ["pass"] * 20


@settings(deadline=None, max_examples=60)
@given(similar, similar)
def test_swapped_arms_get_the_opposite_judgement(a: list[float], b: list[float]) -> None:
    first, second = judge_samples(a, b, better="lower"), judge_samples(b, a, better="higher")
    assert first.verdict == second.verdict
    assert math.isclose(first.ratio * second.ratio, 1, rel_tol=1e-9)
    assert first.low is not None
    assert second.high is not None
    assert math.isclose(first.low * second.high, 1, rel_tol=1e-9)
    assert (first.p, first.needed) == (pytest.approx(second.p), second.needed)


@settings(deadline=None, max_examples=60)
@given(similar, similar, st.sampled_from((1e-3, 2.0, 60.0, 1e3)))
def test_another_unit_changes_nothing(a: list[float], b: list[float], scale: float) -> None:
    first, second = (
        judge_samples([value * by for value in a], [value * by for value in b], better="lower")
        for by in (1.0, scale)
    )
    assert (first.verdict, first.ratio) == (second.verdict, pytest.approx(second.ratio))


@settings(deadline=None, max_examples=60)
@given(similar, similar)
def test_verdict_never_improves_when_the_second_arm_gets_slower(
    a: list[float], b: list[float]
) -> None:
    ranks = ("pass", "inconclusive", "fail")
    slowed = [value * 1.05 for value in b]
    assert ranks.index(judge_samples(a, b, better="lower").verdict) <= ranks.index(
        judge_samples(a, slowed, better="lower").verdict
    )


@settings(deadline=None, max_examples=100)
@given(arms, arms, st.sampled_from(("lower", "higher")), st.floats(0.0025, 10))
def test_arms_of_any_values_give_no_nan(
    a: list[float], b: list[float], better: Better, factor: float
) -> None:
    judgement = judge_samples(a, b, better=better, factor=factor)
    assert all(
        math.isfinite(number)
        for number in (judgement.ratio, judgement.p, judgement.low, judgement.high)
        if number is not None
    )
    assert (
        judgement.low is None
        or judgement.high is None
        or judgement.low <= judgement.ratio <= judgement.high
    )
    assert 0 <= judgement.p <= 1
    assert judgement.verdict == "inconclusive" or min(len(a), len(b)) >= MIN_STARTS


@settings(deadline=None, max_examples=40)
@given(similar, similar)
def test_interval_excludes_the_ratios_that_scipys_exact_test_rejects(
    a: list[float], b: list[float]
) -> None:
    judgement = judge_samples(a, b, better="lower")
    assert judgement.low is not None
    for ratio, is_out in ((judgement.low * 0.9999, True), (judgement.low * 1.0001, False)):
        p = mannwhitneyu(
            b, [value * ratio for value in a], alternative="two-sided", method="exact"
        ).pvalue
        assert (p < compare.ALPHA) == is_out


def test_fewer_than_six_starts_are_inconclusive_however_far_apart() -> None:
    judgement = judge_samples([1.0] * 5, [9.0] * 30, better="lower")
    assert (judgement.verdict, judgement.needed) == ("inconclusive", 6)
    assert "these have 5 and 30" in judgement.reason


def test_arms_of_equal_values_are_judged_too() -> None:
    assert judge_samples([1.0] * 6, [1.0] * 6, better="lower").verdict == "pass"
    assert judge_samples([1.0] * 6, [1.2] * 6, better="lower").verdict == "fail"
    assert judge_samples([1.0] * 6, [1.2] * 6, better="higher").reason == "faster"


def test_single_outlier_is_no_regression() -> None:
    assert judge_samples(arm(1, 8), [*arm(2, 7), 5.0], better="lower").verdict != "fail"


def test_recommended_starts_settle_the_verdict() -> None:
    few = [
        judge_samples(
            arm(seed, 8, variation=0.06), arm(seed + 900, 8, variation=0.06), better="lower"
        )
        for seed in range(20)
    ]
    needed = sorted(judgement.needed for judgement in few if judgement.needed)
    assert len(needed) >= 5
    starts = needed[len(needed) // 2]
    settled = [
        judge_samples(
            arm(seed, starts, variation=0.06),
            arm(seed + 900, starts, variation=0.06),
            better="lower",
        ).verdict
        for seed in range(20)
    ]
    assert settled.count("inconclusive") <= 3, (starts, settled)


def test_change_equal_to_the_factor_is_not_worth_more_starts() -> None:
    a = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0]
    judgement = judge_samples(a, [value * 1.05 for value in a], better="lower")
    assert (judgement.verdict, judgement.needed) == ("inconclusive", None)
    assert "will hardly settle it" in judgement.reason


def test_same_tree_is_slower_than_itself_only_where_every_other_start_is_slower() -> None:
    drawn = [
        judge_noise(arm(seed, 6), arm(seed + 1000, 6, slow=0.08), factor=0.05).verdict
        for seed in range(100)
    ]
    assert drawn.count("fail") <= 1
    every_other = [value * (1.2 if index % 2 else 1.0) for index, value in enumerate(arm(1, 6))]
    for halves in (every_other, every_other[1:] + every_other[:1]):
        assert judge_noise(halves, halves, factor=0.05).verdict == "fail"


def test_equal_starts_have_no_noise_and_no_nan() -> None:
    assert judge_noise([1.0] * 6, [1.0] * 6, factor=0.05).verdict == "pass"
