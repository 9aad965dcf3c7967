"""Percent and time left by cost, the text that fits into a terminal, and the summary."""

import pytest

from workspace.compile import progress
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


def test_few_small_units_do_not_shorten_the_estimate() -> None:
    state = State(running=(running("long.cu", 0.0),), budget_gib=100.0)
    assert (
        progress.estimate(
            PLANNED, [finished("a.cu", 0.1), finished("b.cu", 0.1)], state, jobs=4, now=1.0
        ).left_s
        > 40
    )
    # A unit over its expected time proves more.
    assert progress.estimate(PLANNED, [], state, jobs=4, now=180.0).left_s > 8


def test_percent_follows_cost_and_not_the_count_of_units() -> None:
    found = progress.estimate(
        PLANNED,
        [finished("a.cu", 5.0), finished("b.cu", 5.0)],
        State(budget_gib=100.0),
        jobs=4,
        now=10.0,
    )
    assert (found.done, found.units, found.share) == (2, 3, 0.1)
    assert found.left_s == pytest.approx(90.0)


def test_estimate_scales_with_the_measured_speed_of_the_machine() -> None:
    found = progress.estimate(
        PLANNED,
        [finished("a.cu", 15.0)],
        State(running=(running("long.cu", 0.0),), budget_gib=100.0),
        jobs=4,
        now=30.0,
    )
    # 15 s instead of 5, and a tenth of all at the expected time: 25 for 15.
    assert found.share == pytest.approx((5 + 18) / 100)
    assert found.left_s == pytest.approx(72 * 25 / 15)


@pytest.mark.parametrize(
    ("jobs", "budget_gib", "left_s"),
    [(1, 100.0, 100.0), (20, 100.0, 90.0), (20, 4.0, (90 * 8 + 10) / 4)],
)
def test_time_left_is_bound_by_cores_memory_and_the_longest_unit(
    jobs: int, budget_gib: float, left_s: float
) -> None:
    assert progress.estimate(
        PLANNED, [], State(budget_gib=budget_gib), jobs=jobs, now=0.0
    ).left_s == pytest.approx(left_s)


def test_unit_slower_than_expected_never_counts_as_done() -> None:
    found = progress.estimate(
        PLANNED, [], State(running=(running("long.cu", 0.0),), budget_gib=100.0), jobs=4, now=5000.0
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
    found = progress.estimate(PLANNED, again, State(), jobs=4, now=0.0)
    assert (found.done, found.units) == (2, 4)


def test_links_do_not_count_as_work_left() -> None:
    link = Unit("_C", "link")
    state = State(running=(Running(link, Cost(20.0, 2.0, "guess"), 9.0),), budget_gib=100.0)
    found = progress.estimate(
        {},
        [
            finished("a.cu", 500.0),
            Finished(Unit("_D", "link"), Cost(20.0, 2.0, "guess"), 1.0, 1.0, 0),
        ],
        state,
        jobs=4,
        now=10.0,
    )
    assert (found.done, found.units, found.share, found.left_s) == (1, 1, 1.0, 0.0)
    assert progress.units(state) == ("link of _C",)


def test_estimate_of_an_empty_build_is_zero() -> None:
    assert progress.estimate({}, [], State(), jobs=1, now=0.0) == progress.Estimate(0, 0, 0.0, 0.0)


def test_figures_show_percent_units_time_memory_and_waiting_units() -> None:
    state = State(waiting=7, held_gib=9.23, budget_gib=24.0)
    assert progress.figures(progress.Estimate(12, 31, 0.634, 245.0), state) == (
        "63%",
        "12 of 31 units",
        "4 min left",
        "9.2 of 24.0 GiB",
        "7 wait",
    )


def test_reason_is_shown_if_no_unit_runs() -> None:
    assert progress.units(State(waiting=3, why="memory is short")) == ("memory is short",)
    both = State(
        running=(
            running("b.cu", 5.0),
            running("long.cu", 1.0),
            Running(Unit("", "p", True), PLANNED[Unit("t", "a.cu")], 0.0),
        )
    )
    assert progress.units(both) == ("long.cu", "b.cu")


@pytest.mark.parametrize(
    ("width", "lines", "rows"),
    [
        (80, 3, ("63%, 12 of 31 units, 4 min left, 9.2 of 24.0 GiB, 7 wait",)),
        # A terminal of 80 columns has 31 left.
        (31, 3, ("63%, 12 of 31 units, 4 min left", "9.2 of 24.0 GiB, 7 wait")),
        (22, 2, ("63%, 12 of 31 units", "4 min left, +2")),
        (22, 1, ("63%, +4",)),
        (6, 2, ("63%", "12, +3")),
    ],
)
def test_parts_fill_the_lines_and_the_rest_is_counted(
    width: int, lines: int, rows: tuple[str, ...]
) -> None:
    assert (
        progress.filled(
            ["63%", "12 of 31 units", "4 min left", "9.2 of 24.0 GiB", "7 wait"], width, lines=lines
        )
        == rows
    )


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
    assert progress.duration(seconds) == output


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
    assert progress.build_summary([*done, light]) == (
        ("slowest", "300.0 s", "1.00 GiB", "slow.cu"),
        ("slowest", "200.0 s", "2.00 GiB", "link of t"),
        ("slowest", "100.0 s", "9.50 GiB", "large.cu"),
        ("largest", "100.0 s", "9.50 GiB", "large.cu"),
        ("largest", "200.0 s", "2.00 GiB", "link of t"),
        ("largest", "300.0 s", "1.00 GiB", "slow.cu"),
    )
    assert progress.build_summary([light]) == ()
