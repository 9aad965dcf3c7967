"""The replay of the recorded build: near the lower bound of any order, never over the budget.

A small replay runs through real ninja and launchers.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest

from workspace.compile.costs import Entry, read_table
from workspace.compile.scheduler import Bounds
from workspace.core.errors import BuildError
from workspace.support import perf_measure

TRACE, _ = read_table()
NINJA = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize("budget_gib", [24.0, 48.0, 96.0])
def test_the_recorded_build_is_within_a_tenth_of_what_no_order_can_beat(budget_gib: float) -> None:
    bounds = Bounds(perf_measure.CORES, budget_gib)
    found = perf_measure.simulate(TRACE, bounds)
    assert found.most_gib <= budget_gib
    assert found.most_jobs <= perf_measure.CORES
    assert found.seconds <= 1.10 * perf_measure.lower_bound(TRACE, bounds)
    assert perf_measure.static(TRACE, bounds).seconds > 1.9 * found.seconds


def test_with_jobs_as_the_tighter_bound_all_of_them_are_used_all_the_time() -> None:
    bounds = Bounds(4, 96.0)
    found = perf_measure.simulate(TRACE, bounds)
    assert found.most_jobs == 4
    assert found.seconds <= 1.02 * perf_measure.lower_bound(TRACE, bounds)


@pytest.mark.parametrize("budget_gib", [2.0, 5.0, 9.0])
def test_a_budget_below_the_largest_unit_builds_all_and_gives_that_one_the_machine_alone(
    budget_gib: float,
) -> None:
    found = perf_measure.simulate(TRACE, Bounds(perf_measure.CORES, budget_gib))
    assert found.most_gib == max(entry.peak_gib for entry in TRACE)


def test_static_is_the_budget_by_the_largest_peak_in_the_order_of_the_build() -> None:
    entries = [
        Entry("t", "a.cu", 10.0, 2.0),
        Entry("t", "b.cu", 4.0, 5.0),
        Entry("t", "c.cu", 5.0, 1.0),
    ]
    assert perf_measure.static(entries, Bounds(20, 11.0)) == perf_measure.Replayed(10.0, 10.0, 2)
    assert perf_measure.static(entries, Bounds(20, 1.0)) == perf_measure.Replayed(19.0, 5.0, 1)


@pytest.mark.parametrize(
    "found", [perf_measure.Replayed(1.0, 24.1, 3), perf_measure.Replayed(1.0, 3.0, 5)]
)
def test_bounds_that_were_not_kept_fail_the_row_however_quick_it_was(
    found: perf_measure.Replayed,
) -> None:
    with pytest.raises(BuildError, match="at once; the bounds are 4 and 24 GiB"):
        perf_measure.checked(found, Bounds(4, 24.0))


def test_a_unit_that_fails_fails_the_replay(tmp_path: Path) -> None:
    entries = [Entry("t", "a.cu", 0.01, 1.0), Entry("t", "b.cu", 0.01, 1.0)]
    assert NINJA is not None
    with pytest.raises(BuildError, match="ninja exited with 1"):
        perf_measure.through_ninja(
            entries, Bounds(2, 8.0), tmp_path, environment={"PATH": "/nowhere"}, ninja=Path(NINJA)
        )
