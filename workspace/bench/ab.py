"""The run of `nox -s ab`: which trees, both arms measured, and what is said of them in the end."""

import contextlib
import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from workspace.bench import ab_trees, compare, conditions, measure, results, subject
from workspace.bench.ab_trees import Tree
from workspace.bench.compare import FACTOR, MIN_STARTS, Row
from workspace.bench.results import Kind, Record
from workspace.bench.subject import Workload
from workspace.core import lock
from workspace.core.console import Console
from workspace.core.errors import BuildError, PatchConflict, PatchDrift, Regression, SettingsError
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import plan, sandbox
from workspace.install import sandbox as sandboxes
from workspace.install.sandbox import Sandbox
from workspace.machine import check, interpreter
from workspace.repo import pins
from workspace.repo.git import Git
from workspace.repo.series import State
from workspace.server.command import built_environment

SIDES = ("a", "b")
ID_DIGITS = 8
SHOWN_PACKAGES = 5


@dataclass(frozen=True)
class AbOptions:
    """What the command line said. `words` are for vLLM, `factor` is a share."""

    kind: Kind = "latency"
    base: str = "pin"
    model: str = subject.TINY
    repeat: int = MIN_STARTS
    factor: float = FACTOR
    is_each: bool = False
    is_busy: bool = False
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Side:
    """One arm, built, and what a process of it is given."""

    name: str
    tree: Tree
    arm: Sandbox
    settings: Settings
    work: Workload
    environment: Mapping[str, str]
    stamped: Mapping[str, str]
    fresh: Record


@dataclass
class Session:
    """What the duels of one command share."""

    layout: Layout
    settings: Settings
    options: AbOptions
    run_log: RunLog
    hashes: dict[tuple[str, int, int, int], str] = field(default_factory=dict)

    @property
    def console(self) -> Console:
        return self.run_log.console


def fight(session: Session, trees: tuple[Tree, Tree]) -> tuple[Record, Record]:
    """Build both arms, measure what is still due, and return both records, whole.

    Raises BuildError where an arm cannot be built or does not run what it should, SettingsError
    where the arms are not comparable, WorkspaceError where something else uses the machine or vLLM
    fails.
    """
    a, b = (_side(session, name, tree) for name, tree in zip(SIDES, trees, strict=True))
    _require_comparable(session, a, b)
    name = _name(a.fresh, b.fresh)
    sides, paths = [], []
    for side in (a, b):
        label = f"ab-{session.options.kind}-{side.name}-{name}"
        sides.append(replace(side, fresh=replace(side.fresh, label=label)))
        paths.append(results.record_path(session.layout, sides[-1].fresh))
    records = [
        _so_far(session.layout, path, side.fresh) for path, side in zip(paths, sides, strict=True)
    ]
    if all(one.is_complete for one in records):
        session.console.info(
            f"both arms have their {session.options.repeat} starts; --repeat with more adds to them"
        )
    else:
        with _kept(session, records):
            _measure(session, sides, records, paths)
    count = min(len(one.starts) for one in records)
    first, second = (replace(one, starts=one.starts[:count]) for one in records)
    for path in paths:
        session.console.data(str(path))
    return first, second


def _side(session: Session, name: str, tree: Tree) -> Side:
    layout, options, run_log = session.layout, session.options, session.run_log
    run_log.console.info(f"arm {name.upper()}: {tree.description}, {tree.tip[:12]}")
    with run_log.console.step(f"arm {name.upper()}") as view:
        run_log.phase(f"arm {name}", view)
        arm = sandboxes.make(
            layout,
            f"ab-{name}",
            pin=tree.pin,
            patches=tree.patches,
            tip=tree.tip,
            settings=session.settings,
            run_log=run_log,
        )
        view.reason = arm.shown
    run_log.step = None
    observed = sandboxes.build_sandbox(arm, session.settings, console=run_log.console)
    run_log.phase("model")
    work = subject.prepare(
        arm.layout,
        session.settings,
        options.kind,
        options.model,
        options.words,
        has_sweep=False,
        run_log=run_log,
    )
    environment = built_environment(
        arm.layout, session.settings, recipe=work.recipe, more=work.more
    )
    ab_trees.require_own(arm, environment)
    fresh = subject.describe(
        arm.layout,
        session.settings,
        observed,
        work,
        label=f"ab-{name}",
        repeat=options.repeat,
        environment=environment,
        outer=layout,
    )
    if tree.workspace:
        fresh = replace(fresh, workspace=tree.workspace)
    return Side(name, tree, arm, session.settings, work, environment, _stamped(observed), fresh)


def _stamped(observed: plan.Observation) -> dict[str, str]:
    recorded = observed.kernels.recorded
    return {library.path: library.sha256 for library in recorded.libraries} if recorded else {}


def _require_comparable(session: Session, a: Side, b: Side) -> None:
    """Raise SettingsError for a difference that is not the trees'; say one that may be."""
    differing = compare.differences(a.fresh, b.fresh)
    # Which code computes is the tree's own choice, and in the log only.
    differing.pop("backends", None)
    if differing:
        raise SettingsError(
            f"the arms are not comparable; what differs: {', '.join(differing)}",
            hint="--base a commit with the same torch and device",
            details=tuple(f"{name}: {text}" for name, text in differing.items()),
        )
    first, second = (
        {
            name: text
            for name, text in interpreter.installed(side.arm.layout).items()
            if name != "vllm"
        }
        for side in (a, b)
    )
    others = [
        f"{name} {first.get(name, 'none')} → {second.get(name, 'none')}"
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name)
    ]
    if others:
        more = f" and {len(others) - SHOWN_PACKAGES} more" if len(others) > SHOWN_PACKAGES else ""
        session.console.warn(
            "the arms' environments differ, and with them perhaps the speed:"
            f" {', '.join(others[:SHOWN_PACKAGES])}{more}"
        )
    if a.fresh.source.tree == b.fresh.source.tree:
        session.console.info("both arms are of one tree: what differs is noise")


def _name(a: Record, b: Record) -> str:
    """What tells this comparison from any other one, in short."""
    facts = [
        [
            {name: text for name, text in compare.fields(one).items() if name != "backends"},
            one.source.tree,
            dict(one.source.libraries),
        ]
        for one in (a, b)
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:ID_DIGITS]


def _so_far(layout: Layout, path: Path, fresh: Record) -> Record:
    """The record to go on from. Raises SettingsError for one that is damaged: nothing is written
    over it.
    """
    return (
        replace(results.read(path, place=layout.relative(path)), repeat=fresh.repeat)
        if path.exists()
        else fresh
    )


@contextlib.contextmanager
def _kept(session: Session, records: list[Record]) -> Iterator[None]:
    """Say, however the run ends, what is there to go on from."""
    try:
        yield
    except BaseException:
        counts = " and ".join(str(len(one.starts)) for one in records)
        session.console.info(
            f"kept are {counts} of {session.options.repeat} starts; the same command goes on from"
            " there"
        )
        raise


def _measure(session: Session, sides: list[Side], records: list[Record], paths: list[Path]) -> None:
    """Measure until both records are whole; the first start of each arm in this run fills caches
    and does not count.
    """
    proofs = [_start(session, side, f"{side.name.upper()} warm-up")[1] for side in sides]
    _require_different(session, sides, proofs)
    took: list[float] = []
    while not all(one.is_complete for one in records):
        which = _next(records)
        side, so_far = sides[which], records[which]
        left = sum(one.repeat - len(one.starts) for one in records)
        title = f"{side.name.upper()} {len(so_far.starts) + 1}/{so_far.repeat}"
        one, libraries = _start(
            session, side, title, left=left * sum(took) / len(took) if took else None
        )
        if libraries != proofs[which]:
            raise BuildError(
                f"{side.arm.shown} has loaded other libraries than in its start before",
                hint="the same command again begins with a look at both",
            )
        took.append(one.starts[0].seconds)
        source = replace(so_far.source, libraries=libraries)
        records[which] = replace(
            so_far,
            source=source,
            starts=(*so_far.starts, *one.starts),
            backends=tuple(sorted({*so_far.backends, *one.backends})),
        )
        results.write(paths[which], records[which])


def _next(records: list[Record]) -> int:
    """Which arm is to be started: the second of a pair that was begun, else the first of the next
    pair.
    """
    there = [len(one.starts) for one in records]
    return compare.is_first(there[0]) if there[0] == there[1] else there.index(min(there))


def _start(
    session: Session, side: Side, title: str, *, left: float | None = None
) -> tuple[Record, dict[str, str]]:
    """Start one process of an arm: a record of this start alone, and the libraries that it has
    loaded.
    """
    has_gpu = bool(side.fresh.machine.gpus)
    conditions.require_idle(
        session.settings, has_gpu=has_gpu, is_busy=session.options.is_busy, console=session.console
    )
    with session.console.step(title) as view:
        session.run_log.phase(title, view)
        watch = ab_trees.Watch(side.arm)
        start, backends = measure.once(
            side.arm.layout,
            side.settings,
            side.work,
            side.environment,
            has_gpu=has_gpu,
            run_log=session.run_log,
            watch=watch,
        )
        libraries = watch.libraries(side.stamped, session.hashes)
        one = replace(side.fresh, starts=(start,), backends=backends)
        view.reason = "  ".join(
            results.measured_text(one, metric) for metric in one.metrics[:1]
        ) + (f"  about {left / 60:.1f} min left" if left else "")
    session.run_log.step = None
    return one, libraries


def _require_different(session: Session, sides: list[Side], proofs: list[dict[str, str]]) -> None:
    """Say which libraries were loaded, and raise BuildError where compiled sources differ and
    nothing that was compiled does.
    """
    for side, proof in zip(sides, proofs, strict=True):
        digest = hashlib.sha256(json.dumps(proof, sort_keys=True).encode()).hexdigest()[:12]
        session.console.info(
            f"arm {side.name.upper()} has loaded {len(proof)} of its own libraries, sha256 of all"
            f" {digest}: {', '.join(proof)}"
        )
    git, tips = Git(session.layout.vllm), [side.tree.tip for side in sides]
    if (
        git.digest(plan.COMPILED_SOURCES, commit=tips[0])
        == git.digest(plan.COMPILED_SOURCES, commit=tips[1])
        or proofs[0] != proofs[1]
    ):
        return
    before, after = (git.entries((), tip) for tip in tips)
    others = [
        path
        for path in before.keys() | after.keys()
        if before.get(path) != after.get(path) and path.split("/")[0] not in plan.COMPILED_SOURCES
    ]
    sentence = (
        "the trees differ in what is compiled, and every library that was loaded is the same: here"
        " nothing of that is compiled or used"
    )
    if not others:
        raise BuildError(
            sentence, hint="compare on a machine, and with a model, that reach what was changed"
        )
    session.console.warn(f"{sentence}; what is compared is the rest")


@dataclass(frozen=True)
class Verdicts:
    """What a comparison says, a row a metric. With `is_noise` the same tree differed from itself,
    and no row counts.
    """

    rows: tuple[Row, ...]
    is_noise: bool


def run(layout: Layout, settings: Settings, options: AbOptions, *, console: Console) -> None:
    """Compare the working tree with the base, or with itself less a patch at a time.

    Raises Regression where something is slower, and whatever keeps an arm from being had, built or
    measured.
    """
    pins.require_settled(layout)
    with (
        lock.hold(layout.lock, verb="nox -s ab") as held,
        RunLog(console, layout.logs, verb="ab", secrets=settings.secrets, held=held) as run_log,
    ):
        observed = plan.observe(layout, settings)
        settings = sandbox.as_built(settings, observed)
        check.require(layout, settings, console=console, device=observed.device)
        if options.is_busy:
            console.warn("whatever else uses this machine is measured too (--allow-busy)")
        session = Session(layout, settings, options, run_log)
        if options.is_each:
            _each(session, observed)
        else:
            ours = ab_trees.working(layout, observed, arm="ab-b")
            with ab_trees.base(layout, observed, options.base) as base:
                _one(session, base, ours)


def _one(session: Session, base: Tree, ours: Tree) -> None:
    verdicts = _judged(session, fight(session, (base, ours)))
    if verdicts.is_noise:
        return
    if names := compare.worse(verdicts.rows):
        raise Regression(
            f"{ours.description} is slower than {base.description}: {names}",
            hint=(
                "./scripts/nox -s ab -- --each-patch    says what each patch costs; factor"
                f" {session.options.factor:.3g}"
            ),
        )
    _report_next(session, verdicts)


def _judged(session: Session, records: tuple[Record, Record]) -> Verdicts:
    """Print a row a metric, then what the measuring itself shows."""
    a, b, factor, console = *records, session.options.factor, session.console
    rows = compare.judged(a, b, factor=factor)
    noise = {
        row.metric: compare.itself(a.values(row.metric), b.values(row.metric), factor=factor)
        for row in rows
    }
    noisy = [name for name, of in noise.items() if of.verdict == "fail"]
    if noisy:
        why = "the same tree differs from itself by more than the factor"
        rows = tuple(
            replace(
                row,
                judgement=replace(row.judgement, verdict="inconclusive", needed=None, reason=why),
            )
            for row in rows
        )
    compare.print_rows(rows, console=console)
    for name, of in noise.items():
        between = (
            f" ({compare.percent(of.low)} to {compare.percent(of.high)})"
            if of.low is not None and of.high is not None
            else ""
        )
        console.row(
            "FAIL" if of.verdict == "fail" else "ok",
            "A/A",
            f" {name}: odd against even starts of one tree {compare.percent(of.ratio)}{between}",
        )
        order = compare.order(a.values(name), b.values(name))
        seen = "; it falls on both arms alike" if order.is_seen else ""
        console.row("warn" if order.is_seen else "ok", "order", f" {name}: {order.sentence}{seen}")
    if noisy:
        console.info(
            f"inconclusive: {', '.join(noisy)} of the same tree is not the same; measure when the"
            " machine is quiet"
        )
    return Verdicts(rows, bool(noisy))


def _report_next(session: Session, verdicts: Verdicts) -> None:
    if needed := compare.most_needed(verdicts.rows):
        session.console.info(
            f"next: {command(session.options, repeat=needed)}    what is measured stays"
        )


def command(options: AbOptions, *, repeat: int) -> str:
    """The command line that asks for the same with so many starts."""
    words = ["./scripts/nox", "-s", "ab", "--", options.kind]
    words += (
        ["--each-patch"]
        if options.is_each
        else ["--base", options.base]
        if options.base != ab_trees.PIN
        else []
    )
    words += ["--model", options.model] if options.model != subject.TINY else []
    words += ["--repeat", str(repeat)] if repeat != MIN_STARTS else []
    words += ["--factor", f"{options.factor * 100:g}"] if options.factor != FACTOR else []
    words += ["--allow-busy"] if options.is_busy else []
    return shlex.join([*words, *(["--", *options.words] if options.words else [])])


def _each(session: Session, observed: plan.Observation) -> None:
    """Compare the whole series with itself less one patch, for each patch; one that cannot be left
    out is said and passed over.
    """
    layout, console = session.layout, session.console
    ours = ab_trees.working(layout, observed, arm="ab-b")
    stack = observed.stack
    assert stack is not None
    if stack.state is not State.APPLIED or stack.dirty or observed.checkout.base is None:
        raise PatchDrift(
            "--each-patch leaves patches out of the series, and vendor/vllm holds something else"
            " than the series makes",
            hint=(
                "git -C vendor/vllm commit, then ./scripts/inv patch.export; ./scripts/inv patch"
                " says what differs"
            ),
        )
    names = stack.names
    if not names:
        console.info("the series is empty: there is no patch to leave out")
        return
    found: dict[str, Verdicts] = {}
    for name in names:
        console.info(f"without {name}")
        try:
            with ab_trees.without(layout, observed, name) as tree:
                found[name] = _judged(session, fight(session, (tree, ours)))
        except (PatchConflict, BuildError) as exc:
            console.row("skipped", name, f" cannot be left out: {exc.message}")
    _conclude(session, names, found)


def _conclude(session: Session, names: Sequence[str], found: dict[str, Verdicts]) -> None:
    """One row a patch and metric: what it costs, as full series over the series without it."""
    console = session.console
    console.info("what each patch costs: the whole series against the series without it")
    for name in names:
        if name in found:
            for row in found[name].rows:
                console.row(
                    compare.STATES[row.judgement.verdict],
                    name,
                    f" {row.metric} {compare.sentence(row)}",
                )
        else:
            console.row("skipped", name, " could not be left out, see above")
    for verdicts in found.values():
        _report_next(session, verdicts)
    if slow := {
        name: names
        for name, verdicts in found.items()
        if not verdicts.is_noise and (names := compare.worse(verdicts.rows))
    }:
        raise Regression(
            "; ".join(f"{name} costs {text}" for name, text in slow.items()),
            hint=f"the factor is {session.options.factor:.3g}",
        )
