"""Who may start, decided on paper: the order, the bounds, the machine's own word, and that nothing
waits for ever.
"""

import heapq
import random

import pytest

from workspace.compile.costs import Cost
from workspace.compile.scheduler import (
    LAUNCHER_GIB,
    PATIENCE_S,
    PRESSED_PERCENT,
    Admission,
    Bounds,
    Live,
)


def asked(admission: Admission, *costs: tuple[float, float], now: float = 0.0) -> Admission:
    """Let units of (seconds, GiB) ask, numbered from 0."""
    for number, (seconds, peak_gib) in enumerate(costs):
        admission.ask(number, Cost(seconds, peak_gib, "table"), now)
    return admission


def room(budget_gib: float, *, jobs: int = 20) -> Admission:
    return Admission(Bounds(jobs, budget_gib + 0.5))


def test_largest_time_times_peak_starts_first() -> None:
    assert asked(room(10), (10, 1), (5, 4), (100, 0.3), (1, 1)).admit(0.0) == (2, 1, 0, 3)


def test_no_more_than_the_jobs_run_however_much_memory_there_is() -> None:
    admission = asked(room(1000, jobs=4), *[(1.0, 0.1)] * 9)
    assert len(admission.admit(0.0)) == 4
    assert admission.admit(0.0) == ()
    assert admission.why == "4 run, the most that may"
    admission.leave(0)
    assert len(admission.admit(1.0)) == 1


def test_what_does_not_fit_waits_and_is_told_why() -> None:
    admission = asked(room(10), (10, 6), (10, 5))
    assert admission.admit(0.0) == (0,)
    assert admission.why == "4.5 GiB are free, 5.0 is the least that a waiting compiler needs"


def test_a_small_one_goes_ahead_only_where_the_first_in_line_is_not_held_up_by_it() -> None:
    # 6 of 10 GiB are taken until 100; 7 are wanted next, and leave 3.5 then.
    admission = asked(room(10), (100, 6), (80, 7))
    assert admission.admit(0.0) == (0,)
    admission.ask(2, Cost(101, 3.9, "table"), 1.0)
    assert admission.admit(1.0) == ()
    admission.ask(3, Cost(101, 3.0, "table"), 1.0)
    assert admission.admit(1.0) == (3,)
    admission.ask(4, Cost(99, 1.0, "table"), 1.0)
    assert admission.admit(1.0) == (4,)


def test_a_large_one_is_not_starved_by_an_endless_stream_of_small_ones() -> None:
    admission, now, number = room(10, jobs=8), 0.0, 1
    for _ in range(8):
        admission.ask(number, Cost(10, 2.0, "table"), now)
        number += 1
    running = [(now + 10, one) for one in admission.admit(now)]
    admission.ask(0, Cost(30, 9.0, "table"), now)
    while now < 500:
        now, ended = heapq.heappop(running)
        admission.leave(ended)
        admission.ask(number, Cost(10, 2.0, "table"), now)
        number += 1
        for one in admission.admit(now):
            if one == 0:
                return
            heapq.heappush(running, (now + 10, one))
    pytest.fail("the large one never started")


def test_one_that_is_larger_than_the_budget_runs_alone_after_the_others() -> None:
    admission = asked(room(4), (100, 9), (5, 1), (5, 2))
    assert admission.admit(0.0) == (2, 1)
    admission.leave(2)
    assert admission.admit(5.0) == ()
    admission.leave(1)
    assert admission.admit(5.0) == (0,)
    admission.ask(3, Cost(1, 0.1, "table"), 6.0)
    assert admission.admit(6.0) == ()


def test_a_preprocessor_goes_before_compilers_but_within_the_bounds() -> None:
    admission = asked(room(10, jobs=2), (100, 5), (100, 4))
    for number in (7, 8, 9):
        admission.ask(number, Cost(1, 0.25, "guess"), 0.0, is_light=True)
    assert admission.admit(0.0) == (7, 8)


def test_launchers_that_wait_are_charged_to_the_budget() -> None:
    admission = asked(Admission(Bounds(20, 10.0)), *[(1.0, 1.0)] * 200)
    assert len(admission.admit(0.0)) == 9
    assert admission.charged_gib == pytest.approx(9 + 200 * LAUNCHER_GIB)


def test_less_is_started_where_the_machine_has_less_than_the_budget() -> None:
    admission = asked(room(50), (10, 5), (10, 5), (10, 5))
    assert admission.admit(0.0, Live(12.0)) == (0, 1)
    # They hold 3 of the 5 each that they will: 4 GiB of what is available are theirs already.
    for number in (0, 1):
        admission.measured(number, 3.0)
    assert admission.admit(1.0, Live(8.9)) == ()
    assert admission.admit(1.0, Live(9.1)) == (2,)


def test_one_that_holds_more_than_expected_is_charged_what_it_holds() -> None:
    admission = asked(room(10), (10, 3), (9, 3), (8, 3))
    admission.bounds = Bounds(1, 10.5)
    assert admission.admit(0.0) == (0,)
    admission.measured(0, 8.0)
    admission.bounds = Bounds(20, 10.5)
    assert admission.admit(1.0) == ()
    admission.measured(0, 1.0)
    assert admission.admit(1.0) == (1, 2)


def test_memory_pressure_pauses_everything_but_never_the_whole_build_for_ever() -> None:
    admission = asked(room(50), (10, 5), (10, 4))
    pressed = Live(100.0, PRESSED_PERCENT)
    assert admission.admit(0.0, pressed) == ()
    assert "memory is short" in admission.why
    assert admission.admit(PATIENCE_S - 1, pressed) == ()
    # The smallest, and nothing beside it.
    assert admission.admit(PATIENCE_S, pressed) == (1,)
    assert admission.admit(10 * PATIENCE_S, pressed) == ()
    # One after the other from then on, as long as it lasts.
    admission.leave(1)
    assert admission.admit(1001.0, pressed) == (0,)


def test_after_pressure_has_gone_the_next_one_is_waited_out_anew() -> None:
    admission = asked(room(50, jobs=1), (10, 5), (10, 4), (10, 3))
    assert admission.admit(0.0, Live(100.0, PRESSED_PERCENT)) == ()
    assert admission.admit(5.0, Live(100.0)) == (0,)
    admission.leave(0)
    assert admission.admit(PATIENCE_S + 1, Live(100.0, PRESSED_PERCENT)) == ()
    assert admission.admit(2 * PATIENCE_S + 1, Live(100.0, PRESSED_PERCENT)) == (2,)


def test_with_too_little_available_one_is_started_after_a_while_alone() -> None:
    admission = asked(room(50), (10, 5), (10, 4))
    assert admission.admit(0.0, Live(2.0)) == ()
    assert admission.admit(PATIENCE_S, Live(2.0)) == (1,)


@pytest.mark.parametrize("seed", range(20))
def test_bounds_are_kept_and_all_end_whatever_asks_when(seed: int) -> None:
    dice = random.Random(seed)
    bounds = Bounds(dice.randint(1, 12), dice.uniform(2, 20))
    admission, now, number, running, done = Admission(bounds), 0.0, 0, [], 0
    arrivals = [
        (dice.uniform(0, 50), dice.uniform(0.1, 60), dice.uniform(0.05, 12)) for _ in range(60)
    ]
    arrivals.sort()
    actual = {}
    while done < 60:
        while number < 60 and arrivals[number][0] <= now:
            _, seconds, peak = arrivals[number]
            admission.ask(number, Cost(seconds, peak, "guess"), now)
            # Expectations are wrong by up to a factor of three.
            actual[number] = seconds * dice.uniform(0.3, 3)
            number += 1
        for one in admission.admit(now):
            heapq.heappush(running, (now + actual[one], one))
        peaks = [ticket.cost.peak_gib for ticket in admission.running]
        assert len(peaks) <= bounds.jobs
        assert sum(peaks) <= bounds.budget_gib or len(peaks) == 1
        assert running or number < 60
        following = [running[0][0]] if running else []
        now = min([*following, *([arrivals[number][0]] if number < 60 else [])])
        while running and running[0][0] <= now:
            admission.leave(heapq.heappop(running)[1])
            done += 1
