"""The run of `nox -s ab`: which trees, both arms measured, and what is said of them in the end."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from workspace.bench import compare, workload
from workspace.bench.ab import effects, trees
from workspace.bench.ab.duel import Asked, Session, fight
from workspace.bench.ab.trees import Tree
from workspace.bench.compare import Row
from workspace.bench.record import Record
from workspace.bench.verdict import FACTOR, MIN_STARTS
from workspace.build import annex, plan
from workspace.core import lock
from workspace.core.console import Console
from workspace.core.errors import BuildError, PatchConflict, PatchDrift, Regression
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.environment import check
from workspace.source import pins
from workspace.source.stack import State


@dataclass(frozen=True)
class Verdicts:
    """What a comparison says, a row a metric. With `is_noise` the same tree differed from itself, and no row counts."""

    rows: tuple[Row, ...]
    is_noise: bool


def run(layout: Layout, settings: Settings, asked: Asked, *, console: Console) -> None:
    """Compare the working tree with the base, or with itself less a patch at a time.

    Raises Regression where something is slower, and whatever keeps an arm from being had, built or measured.
    """
    pins.require_settled(layout)
    with lock.hold(layout.lock, verb="nox -s ab") as held, Journal(console, layout.logs, verb="ab", secrets=settings.secrets, held=held) as journal:
        observed = plan.observe(layout, settings)
        settings = annex.as_built(settings, observed)
        check.require(layout, settings, console=console, device=observed.device)
        if asked.is_busy:
            console.warn("whatever else uses this machine is measured too (--busy)")
        session = Session(layout, settings, asked, journal)
        if asked.is_each:
            _each(session, observed)
        else:
            ours = trees.working(layout, observed, arm="ab-b")
            with trees.base(layout, observed, asked.base) as base:
                _one(session, base, ours)


def _one(session: Session, base: Tree, ours: Tree) -> None:
    verdicts = _judged(session, fight(session, (base, ours)))
    if verdicts.is_noise:
        return
    if names := compare.worse(verdicts.rows):
        raise Regression(
            f"{ours.said} is slower than {base.said}: {names}",
            hint=f"./scripts/nox -s ab -- --each-patch    says what each patch costs; factor {session.asked.factor:.3g}",
        )
    _say_next(session, verdicts)


def _judged(session: Session, records: tuple[Record, Record]) -> Verdicts:
    """Print a row a metric, then what the measuring itself shows."""
    a, b, factor, console = *records, session.asked.factor, session.console
    rows = compare.judged(a, b, factor=factor)
    noise = {row.metric: effects.itself(a.values(row.metric), b.values(row.metric), factor=factor) for row in rows}
    noisy = [name for name, of in noise.items() if of.verdict == "fail"]
    if noisy:
        why = "the same tree differs from itself by more than the factor"
        rows = tuple(replace(row, judgement=replace(row.judgement, verdict="inconclusive", needed=None, reason=why)) for row in rows)
    compare.print_rows(rows, console=console)
    for name, of in noise.items():
        between = f" ({compare.percent(of.low)} to {compare.percent(of.high)})" if of.low is not None and of.high is not None else ""
        console.row("FAIL" if of.verdict == "fail" else "ok", "A/A", f" {name}: odd against even starts of one tree {compare.percent(of.ratio)}{between}")
        order = effects.order(a.values(name), b.values(name))
        seen = "; it falls on both arms alike" if order.is_seen else ""
        console.row("warn" if order.is_seen else "ok", "order", f" {name}: {order.sentence}{seen}")
    if noisy:
        console.say(f"inconclusive: {', '.join(noisy)} of the same tree is not the same; measure when the machine is quiet")
    return Verdicts(rows, bool(noisy))


def _say_next(session: Session, verdicts: Verdicts) -> None:
    if needed := compare.most_needed(verdicts.rows):
        session.console.say(f"next: {command(session.asked, repeat=needed)}    what is measured stays")


def command(asked: Asked, *, repeat: int) -> str:
    """The command line that asks for the same with so many starts."""
    words = ["./scripts/nox", "-s", "ab", "--", asked.kind]
    words += ["--each-patch"] if asked.is_each else ["--base", asked.base] if asked.base != trees.PIN else []
    words += ["--model", asked.model] if asked.model != workload.TINY else []
    words += ["--repeat", str(repeat)] if repeat != MIN_STARTS else []
    words += ["--factor", f"{asked.factor * 100:g}"] if asked.factor != FACTOR else []
    words += ["--busy"] if asked.is_busy else []
    return shlex.join([*words, *(["--", *asked.words] if asked.words else [])])


def _each(session: Session, observed: plan.Observation) -> None:
    """Compare the whole series with itself less one patch, for each patch; one that cannot be left out is said and passed over."""
    layout, console = session.layout, session.console
    ours = trees.working(layout, observed, arm="ab-b")
    stack = observed.stack
    assert stack is not None
    if stack.state is not State.APPLIED or stack.dirty or observed.checkout.base is None:
        raise PatchDrift(
            "--each-patch leaves patches out of the series, and vendor/vllm holds something else than the series makes",
            hint="git -C vendor/vllm commit, then ./scripts/inv patch.export; ./scripts/inv patch says what differs",
        )
    names = stack.names
    if not names:
        console.say("the series is empty: there is no patch to leave out")
        return
    found: dict[str, Verdicts] = {}
    for name in names:
        console.say(f"without {name}")
        try:
            with trees.without(layout, observed, name) as tree:
                found[name] = _judged(session, fight(session, (tree, ours)))
        except (PatchConflict, BuildError) as exc:
            console.row("skipped", name, f" cannot be left out: {exc.message}")
    _conclude(session, names, found)


def _conclude(session: Session, names: Sequence[str], found: dict[str, Verdicts]) -> None:
    """One row a patch and metric: what it costs, as full series over the series without it."""
    console = session.console
    console.say("what each patch costs: the whole series against the series without it")
    for name in names:
        if name in found:
            for row in found[name].rows:
                console.row(compare.STATES[row.judgement.verdict], name, f" {row.metric} {compare.sentence(row)}")
        else:
            console.row("skipped", name, " could not be left out, see above")
    for verdicts in found.values():
        _say_next(session, verdicts)
    if slow := {name: names for name, verdicts in found.items() if not verdicts.is_noise and (names := compare.worse(verdicts.rows))}:
        raise Regression("; ".join(f"{name} costs {text}" for name, text in slow.items()), hint=f"the factor is {session.asked.factor:.3g}")
