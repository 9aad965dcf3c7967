"""The replay of the recorded build: near the lower bound of any order, never over the budget."""

import pytest

from workspace.compile.costs import read_table
from workspace.compile.scheduler import Bounds
from workspace.core.errors import BuildError
from workspace.support import perf

TRACE = read_table()


@pytest.mark.parametrize("budget_gib", [24.0, 48.0, 96.0])
def test_the_recorded_build_is_within_a_tenth_of_what_no_order_can_beat(budget_gib: float) -> None:
    bounds = Bounds(perf.CORES, budget_gib)
    found = perf.simulate(TRACE, bounds)
    assert found.most_gib <= budget_gib
    assert found.most_jobs <= perf.CORES
    assert found.seconds <= 1.10 * perf.lower_bound(TRACE, bounds)


def test_with_jobs_as_the_tighter_bound_all_of_them_are_used_all_the_time() -> None:
    bounds = Bounds(4, 96.0)
    found = perf.simulate(TRACE, bounds)
    assert found.most_jobs == 4
    assert found.seconds <= 1.02 * perf.lower_bound(TRACE, bounds)


@pytest.mark.parametrize("budget_gib", [2.0, 5.0, 9.0])
def test_a_budget_below_the_largest_unit_builds_all_and_gives_that_one_the_machine_alone(
    budget_gib: float,
) -> None:
    found = perf.simulate(TRACE, Bounds(perf.CORES, budget_gib))
    assert found.most_gib == max(entry.peak_gib for entry in TRACE)


@pytest.mark.parametrize("found", [perf.Replayed(1.0, 24.1, 3), perf.Replayed(1.0, 3.0, 5)])
def test_bounds_that_were_not_kept_fail_the_row_however_quick_it_was(
    found: perf.Replayed,
) -> None:
    with pytest.raises(BuildError, match="at once; the bounds are 4 and 24 GiB"):
        perf.checked(found, Bounds(4, 24.0))
