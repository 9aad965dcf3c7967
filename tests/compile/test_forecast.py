"""The forecast, from known and guessed costs through the real scheduler, and its screen."""

import io
import json
from collections.abc import Sequence

import pytest

from workspace.compile import jobs
from workspace.compile.costs import Costs, Entry, read_table
from workspace.compile.jobs import RebuildPlan, TargetCost
from workspace.compile.project import Project, Target, Unit
from workspace.compile.scheduler import Bounds
from workspace.compile.targets import Reached
from workspace.core.console import Console

BOUNDS = Bounds(4, 10.0)
TABLE = read_table()
COSTS = Costs(
    [
        Entry("_moe_C", "csrc/a.cu", 120.0, 4.0),
        Entry("_moe_C", "csrc/b.cu", 60.0, 1.0),
        Entry("_moe_C", "link", 6.0, 0.5),
        Entry("_C", "csrc/c.cu", 30.0, 8.0),
        Entry("_C", "link", 6.0, 0.5),
    ]
)


def units(target: str, *sources: str) -> tuple[Unit, ...]:
    return tuple(Unit(source, f"CMakeFiles/{target}.dir/{source}.o", "CUDA") for source in sources)


def project(*names: str) -> Project:
    return Project(
        tuple(Target(name, "MODULE_LIBRARY", (), (), ("vllm",), (), "", ()) for name in names)
    )


def work_out(
    *reached: Reached, why_not_hybrid: str | None = None, bounds: Bounds = BOUNDS
) -> RebuildPlan:
    return jobs.work_out(
        reached, project("_C", "_moe_C", "_fa2_C"), COSTS, bounds, why_not_hybrid=why_not_hybrid
    )


MOE = Reached("_moe_C", "csrc/a.cu changed", units("_moe_C", "csrc/a.cu", "csrc/b.cu"), True)
ONE = Reached("_C", "csrc/c.h changed, included by csrc/c.cu", units("_C", "csrc/c.cu"), False)


def shown(plan: RebuildPlan, *, as_json: bool = False) -> tuple[list[str], str]:
    out, err = io.StringIO(), io.StringIO()
    jobs.show(plan, Console(out=out, err=err).stdout, as_json=as_json)
    assert err.getvalue() == ""
    return ([], out.getvalue()) if as_json else (out.getvalue().splitlines(), "")


def test_row_has_compiler_time_with_the_link_and_the_largest_peak() -> None:
    plan = work_out(MOE, ONE)
    assert plan.rows == (
        TargetCost("_moe_C", MOE.reason, 2, 3.1, 4.0, True),
        TargetCost("_C", ONE.reason, 1, 0.6, 8.0, False),
    )
    assert (plan.units, plan.guessed, plan.from_precompiled) == (3, 0, ("_fa2_C",))
    assert plan.compiler_minutes == pytest.approx(3.7)


def test_minutes_are_simulated_by_the_scheduler_within_the_bounds() -> None:
    # 4 and 8 GiB do not fit into 10 together: 120 s and, after them, 30 s; the others run beside.
    tight = work_out(MOE, ONE)
    assert tight.minutes == pytest.approx(2.5)
    assert tight.peak_gib <= BOUNDS.budget_gib
    assert work_out(MOE, ONE, bounds=Bounds(4, 64.0)).minutes == pytest.approx(2.0)
    assert work_out(MOE, ONE, bounds=Bounds(1, 64.0)).minutes == pytest.approx(
        tight.compiler_minutes
    )


def test_units_that_nobody_measured_are_counted_as_guessed() -> None:
    plan = work_out(
        Reached("_new_C", "--target", units("_new_C", "csrc/n.cu", "csrc/n.cpp"), True), MOE
    )
    assert (plan.units, plan.guessed) == (4, 2)
    assert "4 units, 6.1 minutes of compiler time" in (output := shown(plan)[0])[3]
    assert output[3].endswith("; guessed, not measured: 2 of them")


def test_unit_that_two_targets_are_linked_from_is_compiled_once() -> None:
    both = units("base", "csrc/base.cpp")
    plan = work_out(Reached("_C", "x", both, True), Reached("_moe_C", "x", both, True))
    assert (plan.units, [row.units for row in plan.rows]) == (1, [1, 1])


def test_plan_without_units_is_reported() -> None:
    assert shown(work_out())[0] == [
        "no unit has to be compiled",
        "from the precompiled wheel: _C, _moe_C, _fa2_C",
    ]
    output, _ = shown(work_out(Reached("_C", "csrc/c.cu changed", (), False)))
    assert output[2] == "no unit has to be compiled: the reached targets are up to date"


def test_plan_without_a_precompiled_wheel_has_a_reason() -> None:
    output, _ = shown(
        work_out(MOE, why_not_hybrid="the precompiled wheel is vLLM 0.30.0, not the pinned 0.31.0")
    )
    assert (
        "not hybrid: the precompiled wheel is vLLM 0.30.0, not the pinned 0.31.0; every target is"
        " compiled here" in output
    )
    assert not [
        line
        for line in output
        if line.startswith("from the precompiled wheel") or "a precompiled wheel has" in line
    ]


def test_screen_explains_that_a_first_change_compiles_all_units_of_a_target() -> None:
    output, out = shown(work_out(MOE, ONE))
    assert out == ""
    assert output == [
        "target  units  minutes  peak GiB  reason",
        "_moe_C      2      3.1       4.0  csrc/a.cu changed",
        "_C          1      0.6       8.0  csrc/c.h changed, included by csrc/c.cu",
        (
            "3 units, 3.7 minutes of compiler time: about 2.5 minutes with at most 4 at once in"
            " 10.0 GiB, peak 8.0 GiB"
        ),
        (
            "_moe_C: all units are compiled, because a precompiled wheel has libraries and no"
            " objects; the next change compiles only the units that it reaches"
        ),
        "from the precompiled wheel: _fa2_C",
    ]


def test_json_is_the_whole_plan() -> None:
    output, out = shown(work_out(MOE, ONE), as_json=True)
    record = json.loads(out)
    assert output == []
    assert record["schema"] == 1
    assert [row["target"] for row in record["rows"]] == ["_moe_C", "_C"]
    assert record["bounds"] == {"jobs": 4, "budget_gib": 10.0}
    assert (record["units"], record["why_not_hybrid"], record["from_precompiled"]) == (
        3,
        None,
        ["_fa2_C"],
    )


def test_plan_of_a_full_build_matches_the_recorded_costs(recorded: Sequence[Reached]) -> None:
    plan = jobs.work_out(recorded, project(), Costs(TABLE), Bounds(20, 48.0))
    assert (plan.units, plan.guessed) == (169, 0)
    assert 20 < plan.minutes < 23


@pytest.fixture
def recorded() -> list[Reached]:
    names = list(dict.fromkeys(entry.target for entry in TABLE))
    return [
        Reached(
            name,
            "all",
            units(name, *(entry.source for entry in TABLE if entry.target == name)),
            True,
        )
        for name in names
    ]
