"""The run of `nox -s ab`: build two trees, measure them in an interleaved run, and judge.

An arm is the A or the B of the comparison: a tree that is built in a sandbox of its own.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from workspace.bench import ab_trees, compare, measure, results, subject
from workspace.bench.ab_trees import Hashes, Tree
from workspace.bench.compare import FACTOR, MIN_STARTS, MetricDifference
from workspace.bench.results import Kind, Record
from workspace.bench.subject import Benchmark, WorkloadOptions
from workspace.core import hints, records
from workspace.core.console import Console, RunLog, State
from workspace.core.errors import BuildError, Regression, SettingsError
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import plan, stages
from workspace.install import sandbox as sandboxes
from workspace.install.sandbox import Sandbox
from workspace.machine import check, interpreter
from workspace.machine.machine import Machine
from workspace.repo import pins

ID_DIGITS = 8
SHOWN_PACKAGES = 5


@dataclass(frozen=True)
class AbOptions:
    """The options of `nox -s ab`; `vllm_args` go to vLLM unchanged, `factor` is a share."""

    kind: Kind = "latency"
    base: str = "pin"
    model: str = subject.TINY
    repeat: int = MIN_STARTS
    factor: float = FACTOR
    allow_busy: bool = False
    vllm_args: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arm:
    """The A or the B: its sandbox, its benchmark, the libraries that its build stamped.

    `fresh` is its record without starts.
    """

    name: str
    tree: Tree
    sandbox: Sandbox
    benchmark: Benchmark
    stamped: Mapping[str, str]
    fresh: Record


@dataclass
class Session:
    """The state that the interleaved runs of one command share."""

    layout: Layout
    settings: Settings
    options: AbOptions
    run_log: RunLog
    hashes: Hashes = field(default_factory=dict)

    @property
    def console(self) -> Console:
        return self.run_log.console


def run(layout: Layout, settings: Settings, options: AbOptions, *, console: Console) -> None:
    """Compare the working tree with the base.

    Raises Regression where something is slower, and the error of an arm that cannot be made, built
    or measured.
    """
    pins.require_settled(layout)
    with stages.locked(layout, settings, "nox -s ab", console=console) as run_log:
        observed = plan.observe(layout, settings)
        settings = sandboxes.as_built(settings, observed)
        check.require(observed.machine, console=console, device=observed.device)
        if options.allow_busy:
            console.warn("the load of other programs is measured too (--allow-busy)")
        session = Session(layout, settings, options, run_log)
        ours = ab_trees.working_tree(layout, observed, sandbox_name="ab-b")
        with ab_trees.base_tree(layout, observed, options.base) as base:
            rows = _judge(session, run_interleaved(session, (base, ours)))
        if names := compare.worse(rows):
            raise Regression(
                f"{ours.description} is slower than {base.description}: {names}",
                hint=hints.text("bench.report_plots", percent=options.factor * 100),
            )
        if needed := compare.most_needed(rows):
            console.hint(hints.text("bench.ab_again", needed=needed))


def run_interleaved(session: Session, trees: tuple[Tree, Tree]) -> tuple[Record, Record]:
    """Build both arms, measure the starts that are missing, and return both complete records.

    Raises BuildError where an arm cannot be built or loads other libraries than its own,
    SettingsError where the arms are not comparable, WorkspaceError where another program uses the
    machine or vLLM fails.
    """
    a, b = _build_arm(session, "a", trees[0]), _build_arm(session, "b", trees[1])
    _require_comparable(session, a, b)
    comparison = _comparison_id(a.fresh, b.fresh)
    arms, paths = [], []
    for arm in (a, b):
        label = f"ab-{session.options.kind}-{arm.name}-{comparison}"
        arms.append(replace(arm, fresh=replace(arm.fresh, label=label)))
        paths.append(results.record_path(session.layout, arms[-1].fresh))
    measured = [
        _record_to_resume(session.layout, path, arm.fresh)
        for path, arm in zip(paths, arms, strict=True)
    ]
    if all(record.is_complete for record in measured):
        session.console.info(
            f"both arms have their {session.options.repeat} starts; a larger --repeat adds starts"
        )
    else:
        with measure.kept_reported(session.console, lambda: _kept(session, measured)):
            _measure(session, arms, measured, paths)
    count = min(len(record.starts) for record in measured)
    first, second = (replace(record, starts=record.starts[:count]) for record in measured)
    for path in paths:
        session.console.data(str(path))
    return first, second


def _build_arm(session: Session, name: str, tree: Tree) -> Arm:
    layout, options, run_log = session.layout, session.options, session.run_log
    run_log.console.info(f"arm {name.upper()}: {tree.description}, {tree.tip[:12]}")
    with stages.step(run_log, f"arm {name.upper()}") as view:
        sandbox = sandboxes.make(
            layout,
            f"ab-{name}",
            pin=tree.pin,
            patches=tree.patches,
            tip=tree.tip,
            settings=session.settings,
            run_log=run_log,
        )
        view.reason = sandbox.shown
    observed = sandboxes.build_sandbox(sandbox, session.settings, console=run_log.console)
    run_log.phase("model")
    wanted = WorkloadOptions(options.kind, options.model, options.vllm_args)
    # Measured with the settings of the session, not with those that the sandbox was built with.
    machine = Machine(sandbox.layout, session.settings)
    benchmark = subject.prepare(machine, wanted, run_log=run_log)
    fresh = subject.describe(
        benchmark, observed, label=f"ab-{name}", repeat=options.repeat, outer=layout
    )
    if tree.workspace:
        fresh = replace(fresh, workspace=tree.workspace)
    recorded = observed.kernels.recorded
    stamped = {library.path: library.sha256 for library in recorded.libraries} if recorded else {}
    return Arm(name, tree, sandbox, benchmark, stamped, fresh)


def _require_comparable(session: Session, a: Arm, b: Arm) -> None:
    """Raise SettingsError for a difference that is not the trees'; warn of other packages."""
    differing = compare.differences(a.fresh, b.fresh)
    # The tree itself chooses its backends.
    differing.pop("backends", None)
    if differing:
        raise SettingsError(
            f"the arms are not comparable; they differ in {', '.join(differing)}",
            hint=hints.text("bench.same_torch"),
            details=tuple(f"{name}: {text}" for name, text in differing.items()),
        )
    first, second = (interpreter.installed(arm.sandbox.layout) for arm in (a, b))
    others = [
        f"{name} {first.get(name, 'none')} → {second.get(name, 'none')}"
        for name in sorted((first.keys() | second.keys()) - {"vllm"})
        if first.get(name) != second.get(name)
    ]
    if others:
        more = f" and {len(others) - SHOWN_PACKAGES} more" if len(others) > SHOWN_PACKAGES else ""
        session.console.warn(
            "the arms' environments differ, which may change the speed:"
            f" {', '.join(others[:SHOWN_PACKAGES])}{more}"
        )
    if a.fresh.source.tree == b.fresh.source.tree:
        session.console.info("both arms are of one tree: any difference is noise")


def _comparison_id(a: Record, b: Record) -> str:
    """Return a short digest that identifies this comparison among all others."""
    facts = [
        [
            {name: text for name, text in compare.fields(record).items() if name != "backends"},
            record.source.tree,
            dict(record.source.libraries),
        ]
        for record in (a, b)
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:ID_DIGITS]


def _record_to_resume(layout: Layout, path: Path, fresh: Record) -> Record:
    """Return the record on disk, or the fresh one.

    Raises SettingsError for a damaged record, which is not overwritten.
    """
    return (
        replace(results.read(path, place=layout.relative(path)), repeat=fresh.repeat)
        if path.exists()
        else fresh
    )


def _kept(session: Session, measured: list[Record]) -> str:
    counts = " and ".join(str(len(record.starts)) for record in measured)
    return f"{counts} of {session.options.repeat} starts are kept"


def _measure(session: Session, arms: list[Arm], measured: list[Record], paths: list[Path]) -> None:
    """Measure until both records are complete.

    In each run the first start of each arm fills caches, and does not count.
    """
    warm_ups = [_start(session, arm, f"{arm.name.upper()} warm-up")[1] for arm in arms]
    for arm, libraries in zip(arms, warm_ups, strict=True):
        digest = hashlib.sha256(json.dumps(libraries, sort_keys=True).encode()).hexdigest()[:12]
        session.console.info(
            f"arm {arm.name.upper()} has loaded {len(libraries)} of its own libraries, sha256 of"
            f" all {digest}: {', '.join(libraries)}"
        )
    ab_trees.require_different_libraries(
        session.layout,
        (arms[0].tree.tip, arms[1].tree.tip),
        (warm_ups[0], warm_ups[1]),
        console=session.console,
    )
    took: list[float] = []
    while not all(record.is_complete for record in measured):
        index = _next_arm(measured)
        arm, so_far = arms[index], measured[index]
        left = sum(record.repeat - len(record.starts) for record in measured)
        title = f"{arm.name.upper()} {len(so_far.starts) + 1}/{so_far.repeat}"
        single, libraries = _start(
            session, arm, title, left_s=left * sum(took) / len(took) if took else None
        )
        if libraries != warm_ups[index]:
            raise BuildError(
                f"{arm.sandbox.shown} has loaded other libraries than in its previous start",
                hint=hints.text("bench.inspect_both"),
            )
        took.append(single.starts[0].seconds)
        measured[index] = replace(
            so_far,
            source=replace(so_far.source, libraries=libraries),
            starts=(*so_far.starts, *single.starts),
            backends=tuple(sorted({*so_far.backends, *single.backends})),
        )
        records.write(paths[index], measured[index])


def _next_arm(measured: list[Record]) -> int:
    """Return the arm to start: the second of a pair that is begun, or the first of a new pair."""
    counts = [len(record.starts) for record in measured]
    return counts[0] % 2 if counts[0] == counts[1] else counts.index(min(counts))


def _start(
    session: Session, arm: Arm, title: str, *, left_s: float | None = None
) -> tuple[Record, dict[str, str]]:
    """Start the process of an arm once; return a record of this start and the mapped libraries."""
    has_gpu = bool(arm.fresh.machine.gpus)
    measure.require_idle(
        session.settings,
        has_gpu=has_gpu,
        allow_busy=session.options.allow_busy,
        console=session.console,
    )
    with stages.step(session.run_log, title) as view:
        watch = ab_trees.LibraryWatch(arm.sandbox)
        start, backends = measure.measure_once(
            arm.benchmark, has_gpu=has_gpu, run_log=session.run_log, watch=watch
        )
        libraries = watch.libraries(arm.stamped, session.hashes)
        single = replace(arm.fresh, starts=(start,), backends=backends)
        view.reason = measure.start_summary(single, left_s)
    return single, libraries


def _judge(session: Session, measured: tuple[Record, Record]) -> tuple[MetricDifference, ...]:
    """Print and return a row for each metric, then print the noise: one tree against itself.

    Where the same tree differs from itself, no verdict counts, and no number of starts settles it.
    """
    (a, b), factor = measured, session.options.factor
    rows = compare.judge_records(a, b, factor=factor)
    noise = {
        row.metric: compare.judge_noise(a.values(row.metric), b.values(row.metric), factor=factor)
        for row in rows
    }
    noisy = [name for name, judgement in noise.items() if judgement.verdict == "fail"]
    if noisy:
        reason = "two halves of the starts of one tree differ by more than the factor"
        rows = tuple(
            replace(
                row,
                judgement=replace(
                    row.judgement, verdict="inconclusive", needed=None, reason=reason
                ),
            )
            for row in rows
        )
    compare.print_rows(rows, console=session.console)
    for name, judgement in noise.items():
        session.console.row(
            State.FAIL if judgement.verdict == "fail" else State.OK,
            "A/A",
            f"{name}: odd against even starts of one tree {compare.percent(judgement.ratio)}"
            f"{compare.interval_text(judgement)}",
        )
    if noisy:
        session.console.info(
            f"inconclusive: two halves of the starts of one tree differ in {', '.join(noisy)};"
            " measure again when the machine is idle"
        )
    return rows
