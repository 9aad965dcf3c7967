"""Percent and time left by cost, the text that fits into a terminal, and the summary."""

import pytest

from workspace.compile import jobs
from workspace.compile.costs import Cost, Unit
from workspace.compile.scheduler import Finished, Running, State

PLANNED = {
    Unit("t", name): Cost(seconds, gib, "table")
    for name, seconds, gib in [("long.cu", 90.0, 8.0), ("a.cu", 5.0, 1.0), ("b.cu", 5.0, 1.0)]
}


def finished(name: str, seconds: float, *, status: int = 0) -> Finished:
    return Finished(Unit("t", name), Cost(5.0, 1.0, "table"), seconds, 1.0, status)


def running(name: str, started: float) -> Running:
    return Running(Unit("t", name), PLANNED[Unit("t", name)], started)


def test_percent_follows_cost_and_not_the_count_of_units() -> None:
    found = jobs.estimate(
        PLANNED,
        [finished("a.cu", 5.0), finished("b.cu", 5.0)],
        State(budget_gib=100.0),
        began=0.0,
        now=20.0,
    )
    assert (found.done, found.units, found.share) == (2, 3, 0.1)
    assert found.left_s == pytest.approx(180.0)


def test_time_left_is_at_least_that_of_the_longest_unit() -> None:
    done = [finished("a.cu", 5.0), finished("b.cu", 5.0)]
    state = State(running=(running("long.cu", 0.0),), budget_gib=100.0)
    found = jobs.estimate(PLANNED, done, state, began=0.0, now=30.0)
    assert found.share == pytest.approx(0.4)
    assert found.left_s == pytest.approx(60.0)


def test_unit_slower_than_expected_never_counts_as_done() -> None:
    found = jobs.estimate(
        PLANNED,
        [],
        State(running=(running("long.cu", 0.0),), budget_gib=100.0),
        began=0.0,
        now=5000.0,
    )
    assert found.share < 0.9
    assert found.left_s > 0


def test_unplanned_and_repeated_units_count_once() -> None:
    again = [
        finished("a.cu", 5.0, status=137),
        finished("a.cu", 5.0),
        finished("new.cu", 5.0),
        Finished(Unit("", "x", True), Cost(1, 1, "guess"), 1, 1, 0),
    ]
    found = jobs.estimate(PLANNED, again, State(), began=0.0, now=0.0)
    assert (found.done, found.units) == (2, 4)


def test_links_do_not_count_as_work_left() -> None:
    link = Unit("_C", "link")
    state = State(running=(Running(link, Cost(20.0, 2.0, "guess"), 9.0),), budget_gib=100.0)
    found = jobs.estimate(
        {},
        [
            finished("a.cu", 500.0),
            Finished(Unit("_D", "link"), Cost(20.0, 2.0, "guess"), 1.0, 1.0, 0),
        ],
        state,
        began=0.0,
        now=10.0,
    )
    assert (found.done, found.units, found.share, found.left_s) == (1, 1, 1.0, 0.0)
    assert jobs.units(state) == ("link of _C",)


def test_estimate_of_an_empty_build_is_zero() -> None:
    assert jobs.estimate({}, [], State(), began=0.0, now=0.0) == jobs.Estimate(0, 0, 0.0, 0.0)


def test_figures_show_percent_units_time_memory_and_waiting_units() -> None:
    state = State(waiting=7, held_gib=9.23, budget_gib=24.0)
    assert jobs.figures(jobs.Estimate(12, 31, 0.634, 245.0), state) == (
        "63%",
        "12 of 31 units",
        "4 min left",
        "9.2 of 24.0 GiB",
        "7 wait",
    )


def test_reason_is_shown_if_no_unit_runs() -> None:
    assert jobs.units(State(waiting=3, why="memory is short")) == ("memory is short",)
    both = State(
        running=(
            running("b.cu", 5.0),
            running("long.cu", 1.0),
            Running(Unit("", "p", True), PLANNED[Unit("t", "a.cu")], 0.0),
        )
    )
    assert jobs.units(both) == ("long.cu", "b.cu")


@pytest.mark.parametrize(
    ("seconds", "output"),
    [
        (0.0, "1 s"),
        (89.0, "89 s"),
        (91.0, "2 min"),
        (3600.0, "60 min"),
        (3600 * 2 + 300, "2 h 05 min"),
    ],
)
def test_durations_are_written_in_suitable_units(seconds: float, output: str) -> None:
    assert jobs.duration(seconds) == output


def test_summary_has_the_slowest_and_the_largest_units_that_were_compiled() -> None:
    done = [
        Finished(Unit("t", name), Cost(5.0, 1.0, "table"), seconds, gib, status)
        for name, seconds, gib, status in (
            ("slow.cu", 300.0, 1.0, 0),
            ("link", 200.0, 2.0, 0),
            ("large.cu", 100.0, 9.5, 0),
            ("small.cu", 1.0, 0.1, 0),
            ("bad.cu", 900.0, 90.0, 1),
        )
    ]
    light = Finished(Unit("", "p", True), Cost(1, 1, "guess"), 999.0, 99.0, 0)
    assert jobs.build_summary([*done, light]) == (
        ("slowest", "300.0 s", "1.00 GiB", "slow.cu"),
        ("slowest", "200.0 s", "2.00 GiB", "link of t"),
        ("slowest", "100.0 s", "9.50 GiB", "large.cu"),
        ("largest", "100.0 s", "9.50 GiB", "large.cu"),
        ("largest", "200.0 s", "2.00 GiB", "link of t"),
        ("largest", "300.0 s", "1.00 GiB", "slow.cu"),
    )
    assert jobs.build_summary([light]) == ()
