"""Effects of the measuring itself: they are seen where they exist, and elsewhere no more often than
by chance.
"""

import pytest

from tests.bench.materials import arm
from workspace.bench import compare


def seen(kind: str, *, size: float, starts: int = 12, seed: int = 0) -> compare.OrderEffect:
    """Test two arms in the order A B B A, with an effect `size` of place in a pair, or of time."""
    values = [arm(2 * seed, starts, slow=0.1), arm(2 * seed + 1, starts)]
    for pair in range(starts):
        later = 1 - compare.first_arm(pair)
        if kind == "second":
            values[later][pair] *= 1 + size
        elif kind == "drift":
            for which, place in ((1 - later, 2 * pair), (later, 2 * pair + 1)):
                values[which][pair] *= 1 + size * place / (2 * starts)
    return compare.order_effect(*values)


@pytest.mark.parametrize("kind", ["second", "drift"])
def test_effect_of_the_order_is_seen_and_falls_on_both_arms_alike(kind: str) -> None:
    order = seen(kind, size=0.2)
    assert order.is_seen
    assert "p = " in order.sentence
    # The balance of A B B A: what the order does falls on both arms.
    first, second = [0, 1, 1, 0], [compare.first_arm(pair) for pair in range(2)]
    assert [second[0], 1 - second[0], second[1], 1 - second[1]] == first


def test_absent_effect_is_seldom_seen() -> None:
    assert sum(seen("none", size=0.0, seed=seed).is_seen for seed in range(100)) <= 6


def test_same_tree_is_slower_than_itself_only_where_every_other_start_is_slower() -> None:
    drawn = [
        compare.judge_noise(arm(seed, 6), arm(seed + 1000, 6, slow=0.08), factor=0.05).verdict
        for seed in range(100)
    ]
    assert drawn.count("fail") <= 1
    every_other = [value * (1.2 if index % 2 else 1.0) for index, value in enumerate(arm(1, 6))]
    for halves in (every_other, every_other[1:] + every_other[:1]):
        assert compare.judge_noise(halves, halves, factor=0.05).verdict == "fail"


def test_equal_starts_have_no_effect_and_no_nan() -> None:
    order = compare.order_effect([1.0] * 6, [1.0] * 6)
    assert (order.p_pair, order.p_trend, order.tau, order.ratio) == (1.0, 1.0, 0.0, 1.0)
    assert compare.judge_noise([1.0] * 6, [1.0] * 6, factor=0.05).verdict == "pass"
