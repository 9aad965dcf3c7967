"""Forecast of a rebuild: its cost in units, minutes and memory, and the screen that shows it."""

import json
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from workspace.compile import costs, scheduler, targets
from workspace.compile.costs import Cost, Costs
from workspace.compile.project import Project, Unit
from workspace.compile.scheduler import Bounds
from workspace.compile.targets import Reached
from workspace.core.console import Console

_MINUTE_S = 60.0
# The width of the screen without a terminal.
_WIDTH = 120
_COST_COLUMNS = ("units", "minutes", "peak GiB")


@dataclass(frozen=True)
class Row:
    """A target: `minutes` of compiler time with the link, `peak_gib` of its largest unit."""

    target: str
    reason: str
    units: int
    minutes: float
    peak_gib: float
    is_complete: bool


@dataclass(frozen=True)
class RebuildPlan:
    """Plan of a rebuild: `minutes` and `peak_gib` by simulating the scheduler with all units.
    `guessed` units were never measured.
    """

    rows: tuple[Row, ...]
    from_precompiled: tuple[str, ...]
    why_not_hybrid: str | None
    units: int
    guessed: int
    compiler_minutes: float
    minutes: float
    peak_gib: float
    bounds: Bounds


def work_out(
    reached: Sequence[Reached],
    project: Project,
    costs: Costs,
    bounds: Bounds,
    *,
    why_not_hybrid: str | None = None,
) -> RebuildPlan:
    """Return the plan, from the expected cost of each unit and of each target's link."""
    rows, everything, compiled = [], dict[str, Cost](), set[str]()
    for one in reached:
        expected = {unit.object: costs.expected(_named(unit, one.target)) for unit in one.units}
        compiled |= expected.keys()
        link = {f"{one.target} link": costs.expected(_link(one.target))} if one.units else {}
        everything |= expected | link
        of_target = (expected | link).values()
        minutes, peak_gib = (
            sum(cost.seconds for cost in of_target) / _MINUTE_S,
            max((cost.peak_gib for cost in of_target), default=0.0),
        )
        rows.append(Row(one.target, one.reason, len(one.units), minutes, peak_gib, one.is_complete))
    replayed = scheduler.simulate(tuple(everything.values()), bounds)
    names = {one.target for one in reached}
    return RebuildPlan(
        rows=tuple(rows),
        from_precompiled=(
            ()
            if why_not_hybrid
            else tuple(
                target.name for target in targets.final_targets(project) if target.name not in names
            )
        ),
        why_not_hybrid=why_not_hybrid,
        units=len(compiled),
        guessed=sum(everything[name].origin == "guess" for name in compiled),
        compiler_minutes=sum(cost.seconds for cost in everything.values()) / _MINUTE_S,
        minutes=replayed.seconds / _MINUTE_S,
        peak_gib=replayed.most_gib,
        bounds=bounds,
    )


def _named(unit: Unit, target: str) -> costs.Unit:
    return costs.unit_at(unit.object) or costs.Unit(target, unit.source)


def _link(target: str) -> costs.Unit:
    return costs.Unit(target, "link")


def show(plan: RebuildPlan, console: Console, *, as_json: bool = False) -> None:
    """Print a row for each target and a summary; or JSON on stdout."""
    if as_json:
        console.data(json.dumps({"schema": 1, **asdict(plan)}, indent=1))
        return
    width = shutil.get_terminal_size((_WIDTH, 0)).columns if console.is_terminal else None
    for line in (*table(plan.rows, width=width or _WIDTH), *_sentences(plan)):
        # In a file or a pipe each sentence is one line.
        for part in (
            textwrap.wrap(
                line,
                width - 1,
                subsequent_indent="    ",
                break_long_words=False,
                break_on_hyphens=False,
            )
            if width
            else [line]
        ):
            console.info(part)


def table(rows: Sequence[Row], *, width: int) -> list[str]:
    """Return the lines of the screen: reasons are between target and costs if all rows fit into
    `width` columns, else below their targets.
    """
    if not rows:
        return []
    first = max(len("target"), *(len(row.target) for row in rows))
    figures = [(str(row.units), f"{row.minutes:.1f}", f"{row.peak_gib:.1f}") for row in rows]
    columns = [
        max(len(title), *(len(line[at]) for line in figures))
        for at, title in enumerate(_COST_COLUMNS)
    ]
    room = width - first - sum(columns) - 2 * (len(columns) + 1) - 1
    middle = max(len("reason"), *(len(row.reason) for row in rows))
    is_beside = middle <= room

    def line(target: str, reason: str, cells: Sequence[str]) -> str:
        between = f"{reason:<{middle}}  " if is_beside else ""
        right = "  ".join(f"{cell:>{column}}" for cell, column in zip(cells, columns, strict=True))
        return f"{target:<{first}}  {between}{right}"

    lines = [line("target", "reason", _COST_COLUMNS)]
    for row, cells in zip(rows, figures, strict=True):
        lines.append(line(row.target, row.reason, cells))
        if not is_beside:
            lines.append(f"  {row.reason}")
    return lines


def _sentences(plan: RebuildPlan) -> list[str]:
    """Return the summary below the table."""
    lines = []
    if plan.why_not_hybrid:
        lines.append(f"not hybrid: {plan.why_not_hybrid}; every target is compiled here")
    if plan.units:
        known = f"; {plan.guessed} of them are guessed, not measured" if plan.guessed else ""
        lines.append(
            f"{_count(plan.units, 'unit')}, {plan.compiler_minutes:.1f} minutes of compiler time:"
            f" about {plan.minutes:.1f} minutes with at most {plan.bounds.jobs} at once in"
            f" {plan.bounds.budget_gib:.1f} GiB, {plan.peak_gib:.1f} GiB at the most{known}"
        )
    elif plan.rows:
        lines.append("no unit has to be compiled: the reached targets are up to date")
    else:
        lines.append("no unit has to be compiled")
    full = [row.target for row in plan.rows if row.is_complete and row.units]
    if full and not plan.why_not_hybrid:
        lines.append(
            f"{', '.join(full)}: all units are compiled, because a precompiled wheel has libraries"
            " and no objects; the next change compiles only the units that it reaches"
        )
    if plan.from_precompiled:
        lines.append(f"from the precompiled wheel: {', '.join(plan.from_precompiled)}")
    return lines


def _count(count: int, noun: str) -> str:
    return f"{count} {noun if count == 1 else f'{noun}s'}"
