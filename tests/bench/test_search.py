"""The search on real histories: halving, skipped ranges, and the ends and merge bases first."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench.histories import Made, make
from tests.small.materials import git
from workspace.bench import bisect_log
from workspace.bench.bisect_log import Context, Range, Verdict
from workspace.core.paths import Layout


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path)
    layout.vllm.mkdir(parents=True)
    git(layout.vllm, "init", "--quiet")
    return layout


def opened(layout: Layout, commits: list[Made], good: str, bad: str) -> tuple[Range, dict]:
    made = make(layout.vllm, commits)
    context = Context(made[good], ())
    opened = bisect_log.open_range(layout, context, made[good], made[bad], is_patches=False)
    return opened, made


def line(count: int) -> list[Made]:
    return [Made(f"c{number}", {"number": str(number)}) for number in range(count)]


def search(searched: Range, judge: Callable[[int], Verdict]) -> tuple[list[str], list[int]]:
    """Return the subjects that are left, and the numbers that were tried, without the ends."""
    tries: dict[str, Verdict] = {}
    numbers = []
    while (state := searched.state(tries)).following:
        assert state.following not in tries
        numbers.append(int(searched.subjects[state.following].removeprefix("c")))
        tries[state.following] = judge(numbers[-1])
    assert state.contradiction is None
    assert (state.culprit is None) == (len(state.left) > 1)
    return [searched.subjects[commit] for commit in state.left], numbers[2:]


@pytest.mark.parametrize("count", [1, 2, 9, 32, 33])
def test_line_of_commits_takes_no_more_steps_than_halving(layout: Layout, count: int) -> None:
    searched, _ = opened(layout, line(count + 1), "c0", f"c{count}")
    for culprit in {1, (count + 1) // 2, count} - {0}:
        left, tried = search(searched, lambda number, at=culprit: "bad" if number >= at else "good")
        assert left == [f"c{culprit}"]
        assert len(tried) <= math.ceil(math.log2(count))


def test_range_that_cannot_be_tried_is_skipped_in_large_steps(layout: Layout) -> None:
    searched, _ = opened(layout, line(100), "c0", "c99")
    broken = range(40, 70)
    left, tried = search(
        searched,
        lambda number: "skip" if number in broken else "bad" if number >= 80 else "good",
    )
    assert left == ["c80"]
    assert sum(number in broken for number in tried) <= 3


def test_ends_and_merge_bases_are_tried_first_and_may_contradict(layout: Layout) -> None:
    commits = [
        Made("fork", {"text": "1"}),
        Made("good", {"text": "2"}),
        Made("a", {"text": "3"}, ("fork",)),
        Made("b", {"text": "4"}),
    ]
    searched, made = opened(layout, commits, "good", "b")
    order: list[tuple[str, str]] = []
    tries: dict[str, Verdict] = {}
    for verdict in ("good", "good", "bad"):
        state = searched.state(tries)
        assert state.following
        order.append((searched.subjects[state.following], state.role))
        tries[state.following] = verdict
    assert order == [("good", "good"), ("fork", "fork"), ("b", "bad")]

    def state(**verdicts: Verdict) -> bisect_log.SearchState:
        return searched.state({made[name]: verdict for name, verdict in verdicts.items()})

    assert state(good="bad").contradiction == made["good"]
    assert state(good="good", fork="bad").contradiction == made["fork"]
    assert state(good="good", fork="good", b="good").contradiction == made["b"]
    assert state(good="good", fork="skip", b="bad").following == made["a"]


def test_oldest_of_several_bad_commits_bounds_the_search(layout: Layout) -> None:
    searched, made = opened(layout, line(9), "c0", "c8")
    state = searched.state({made["c3"]: "bad", made["c0"]: "good", made["c8"]: "bad"})
    assert [searched.subjects[commit] for commit in state.left] == ["c1", "c2", "c3"]
