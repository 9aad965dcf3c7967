"""What a rebuild will cost, before it begins: in units, minutes and memory, and the screen that
says so.
"""

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
# Where no terminal says how wide it is.
_WIDTH = 120
_NUMBERS = ("units", "minutes", "peak GiB")


@dataclass(frozen=True)
class Row:
    """One target: `minutes` of compiler time with the link, `peak_gib` of the hungriest of its
    units or its link.
    """

    target: str
    reason: str
    units: int
    minutes: float
    peak_gib: float
    is_complete: bool


@dataclass(frozen=True)
class RebuildPlan:
    """`minutes` on the clock and `peak_gib` at once, by letting all units through the admission in
    thought. `guessed` units were never measured.
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
    """Reckon with what is known of each unit, and with a link for each target of which anything is
    compiled.
    """
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
    """Print one row a target and a sentence on the whole; as JSON on stdout where a program
    asks.
    """
    if as_json:
        console.data(json.dumps({"schema": 1, **asdict(plan)}, indent=1))
        return
    width = shutil.get_terminal_size((_WIDTH, 0)).columns if console.is_terminal else None
    for line in (*table(plan.rows, width=width or _WIDTH), *_sentences(plan)):
        # A file and a pipe get each sentence as one line.
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
    """Return the lines of the screen: the reason stands between target and numbers where all fit
    into `width` columns, else below its target.
    """
    if not rows:
        return []
    first = max(len("target"), *(len(row.target) for row in rows))
    numbers = [(str(row.units), f"{row.minutes:.1f}", f"{row.peak_gib:.1f}") for row in rows]
    columns = [
        max(len(word), *(len(line[at]) for line in numbers)) for at, word in enumerate(_NUMBERS)
    ]
    room = width - first - sum(columns) - 2 * (len(columns) + 1) - 1
    middle = max(len("reason"), *(len(row.reason) for row in rows))
    is_beside = middle <= room

    def line(target: str, reason: str, words: Sequence[str]) -> str:
        between = f"{reason:<{middle}}  " if is_beside else ""
        return (
            f"{target:<{first}} "
            f" {between}{'  '.join(f'{word:>{column}}' for word, column in zip(words, columns, strict=True))}"
        )

    lines = [line("target", "reason", _NUMBERS)]
    for row, words in zip(rows, numbers, strict=True):
        lines.append(line(row.target, row.reason, words))
        if not is_beside:
            lines.append(f"  {row.reason}")
    return lines


def _sentences(plan: RebuildPlan) -> list[str]:
    said = []
    if plan.why_not_hybrid:
        said.append(f"not hybrid: {plan.why_not_hybrid}; every target is compiled here")
    if plan.units:
        known = f"; {plan.guessed} of them never measured, so guessed" if plan.guessed else ""
        said.append(
            f"{_count(plan.units, 'unit')}, {plan.compiler_minutes:.1f} minutes of compiler time:"
            f" about {plan.minutes:.1f} minutes with at most {plan.bounds.jobs} at once in"
            f" {plan.bounds.budget_gib:.1f} GiB, {plan.peak_gib:.1f} GiB at the most{known}"
        )
    else:
        said.append(
            "nothing is to be compiled"
            if not plan.rows
            else "nothing is to be compiled: what is reached was compiled before"
        )
    if not plan.why_not_hybrid and (
        whole := [row.target for row in plan.rows if row.is_complete and row.units]
    ):
        said.append(
            f"{', '.join(whole)}: compiled whole, for a precompiled wheel brings libraries and no"
            " objects; the next change compiles what it reaches"
        )
    if plan.from_precompiled:
        said.append(f"from the precompiled wheel: {', '.join(plan.from_precompiled)}")
    return said


def _count(number: int, noun: str) -> str:
    return f"{number} {noun if number == 1 else f'{noun}s'}"
