"""Scheduler decisions on a simulated clock: the order, the bounds, the memory of the machine, and
that no unit waits forever.
"""

import heapq
import random

import pytest

from workspace.compile.costs import Cost
from workspace.compile.scheduler import (
    LAUNCHER_GIB,
    PATIENCE_S,
    Admission,
    Bounds,
    MemoryStatus,
)
from workspace.machine.hardware import PRESSURE_PERCENT


def with_requests(admission: Admission, *costs: tuple[float, float], now: float = 0.0) -> Admission:
    """Request tokens for units of (seconds, GiB), numbered from 0."""
    for number, (seconds, peak_gib) in enumerate(costs):
        admission.request(number, Cost(seconds, peak_gib, "table"), now)
    return admission


def room(budget_gib: float, *, jobs: int = 20) -> Admission:
    return Admission(Bounds(jobs, budget_gib + 0.5))


def test_largest_time_times_peak_starts_first() -> None:
    assert with_requests(room(10), (10, 1), (5, 4), (100, 0.3), (1, 1)).admit(0.0) == (2, 1, 0, 3)


def test_number_of_jobs_bounds_the_compilers_however_much_memory_is_free() -> None:
    admission = with_requests(room(1000, jobs=4), *[(1.0, 0.1)] * 9)
    assert len(admission.admit(0.0)) == 4
    assert admission.admit(0.0) == ()
    assert admission.why == "4 running, which is the limit"
    admission.leave(0)
    assert len(admission.admit(1.0)) == 1


def test_unit_that_does_not_fit_waits_with_a_reason() -> None:
    admission = with_requests(room(10), (10, 6), (10, 5))
    assert admission.admit(0.0) == (0,)
    assert admission.why == "4.5 GiB are free, and a waiting compiler needs at least 5.0"


def test_small_unit_starts_earlier_only_if_it_does_not_delay_the_first_in_line() -> None:
    # 6 of 10 GiB are taken until 100 s; the next unit needs 7 and leaves 3.5 then.
    admission = with_requests(room(10), (100, 6), (80, 7))
    assert admission.admit(0.0) == (0,)
    admission.request(2, Cost(101, 3.9, "table"), 1.0)
    assert admission.admit(1.0) == ()
    admission.request(3, Cost(101, 3.0, "table"), 1.0)
    assert admission.admit(1.0) == (3,)
    admission.request(4, Cost(99, 1.0, "table"), 1.0)
    assert admission.admit(1.0) == (4,)


def test_large_unit_is_not_starved_by_an_endless_stream_of_small_ones() -> None:
    admission, now, number = room(10, jobs=8), 0.0, 1
    for _ in range(8):
        admission.request(number, Cost(10, 2.0, "table"), now)
        number += 1
    running = [(now + 10, one) for one in admission.admit(now)]
    admission.request(0, Cost(30, 9.0, "table"), now)
    while now < 500:
        now, ended = heapq.heappop(running)
        admission.leave(ended)
        admission.request(number, Cost(10, 2.0, "table"), now)
        number += 1
        for one in admission.admit(now):
            if one == 0:
                return
            heapq.heappush(running, (now + 10, one))
    pytest.fail("the large unit never started")


def test_unit_larger_than_the_budget_runs_alone_after_the_others() -> None:
    admission = with_requests(room(4), (100, 9), (5, 1), (5, 2))
    assert admission.admit(0.0) == (2, 1)
    admission.leave(2)
    assert admission.admit(5.0) == ()
    admission.leave(1)
    assert admission.admit(5.0) == (0,)
    admission.request(3, Cost(1, 0.1, "table"), 6.0)
    assert admission.admit(6.0) == ()


def test_preprocessor_starts_before_compilers_but_within_the_bounds() -> None:
    admission = with_requests(room(10, jobs=2), (100, 5), (100, 4))
    for number in (7, 8, 9):
        admission.request(number, Cost(1, 0.25, "guess"), 0.0, is_light=True)
    assert admission.admit(0.0) == (7, 8)


def test_waiting_launchers_are_charged_to_the_budget() -> None:
    admission = with_requests(Admission(Bounds(20, 10.0)), *[(1.0, 1.0)] * 200)
    assert len(admission.admit(0.0)) == 9
    assert admission.charged_gib == pytest.approx(9 + 200 * LAUNCHER_GIB)


def test_fewer_units_start_if_the_machine_has_less_memory_than_the_budget() -> None:
    admission = with_requests(room(50), (10, 5), (10, 5), (10, 5))
    assert admission.admit(0.0, MemoryStatus(12.0)) == (0, 1)
    # Each holds 3 of its expected 5 GiB: 4 GiB of the available memory are theirs already.
    for number in (0, 1):
        admission.measured(number, 3.0)
    assert admission.admit(1.0, MemoryStatus(8.9)) == ()
    assert admission.admit(1.0, MemoryStatus(9.1)) == (2,)


def test_unit_that_holds_more_than_expected_is_charged_what_it_holds() -> None:
    admission = with_requests(room(10), (10, 3), (9, 3), (8, 3))
    admission.bounds = Bounds(1, 10.5)
    assert admission.admit(0.0) == (0,)
    admission.measured(0, 8.0)
    admission.bounds = Bounds(20, 10.5)
    assert admission.admit(1.0) == ()
    admission.measured(0, 1.0)
    assert admission.admit(1.0) == (1, 2)


def test_memory_pressure_pauses_new_compilers_but_never_stops_the_build() -> None:
    admission = with_requests(room(50), (10, 5), (10, 4))
    pressed = MemoryStatus(100.0, PRESSURE_PERCENT)
    assert admission.admit(0.0, pressed) == ()
    assert "memory is short" in admission.why
    assert admission.admit(PATIENCE_S - 1, pressed) == ()
    # The smallest unit, alone.
    assert admission.admit(PATIENCE_S, pressed) == (1,)
    assert admission.admit(10 * PATIENCE_S, pressed) == ()
    # From then on one after the other, as long as the pressure lasts.
    admission.leave(1)
    assert admission.admit(1001.0, pressed) == (0,)


def test_patience_starts_again_after_memory_pressure_has_gone() -> None:
    admission = with_requests(room(50, jobs=1), (10, 5), (10, 4), (10, 3))
    assert admission.admit(0.0, MemoryStatus(100.0, PRESSURE_PERCENT)) == ()
    assert admission.admit(5.0, MemoryStatus(100.0)) == (0,)
    admission.leave(0)
    assert admission.admit(PATIENCE_S + 1, MemoryStatus(100.0, PRESSURE_PERCENT)) == ()
    assert admission.admit(2 * PATIENCE_S + 1, MemoryStatus(100.0, PRESSURE_PERCENT)) == (2,)


def test_with_too_little_memory_one_unit_starts_alone_after_a_while() -> None:
    admission = with_requests(room(50), (10, 5), (10, 4))
    assert admission.admit(0.0, MemoryStatus(2.0)) == ()
    assert admission.admit(PATIENCE_S, MemoryStatus(2.0)) == (1,)


@pytest.mark.parametrize("seed", range(20))
def test_random_requests_keep_the_bounds_and_all_end(seed: int) -> None:
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
            admission.request(number, Cost(seconds, peak, "guess"), now)
            # Expectations are wrong by up to a factor of three.
            actual[number] = seconds * dice.uniform(0.3, 3)
            number += 1
        for one in admission.admit(now):
            heapq.heappush(running, (now + actual[one], one))
        peaks = [token.cost.peak_gib for token in admission.running]
        assert len(peaks) <= bounds.jobs
        assert sum(peaks) <= bounds.budget_gib or len(peaks) == 1
        assert running or number < 60
        following = [running[0][0]] if running else []
        now = min([*following, *([arrivals[number][0]] if number < 60 else [])])
        while running and running[0][0] <= now:
            admission.leave(heapq.heappop(running)[1])
            done += 1
