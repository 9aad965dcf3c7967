"""The predicate of a bisect: the smoke, one of its checks, a benchmark's metric, or a command.

Its outcome is good, bad or skip. A tree that hangs or does not answer is skipped: a commit must not
be blamed for a fault that nobody observed.
"""

import functools
import io
import re
import shlex
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.bench import compare, measure, results, subject
from workspace.bench.bisect_log import Verdict
from workspace.bench.compare import MIN_STARTS
from workspace.bench.results import Kind
from workspace.bench.subject import Benchmark, WorkloadOptions
from workspace.checks.registry import REGISTRY
from workspace.checks.smoke import last_record
from workspace.core import hints, process
from workspace.core.console import Console, RunLog, Step
from workspace.core.errors import SettingsError, SmokeError, ToolchainError, WorkspaceError
from workspace.core.settings import Settings, nearest, shortened
from workspace.install.sandbox import Sandbox
from workspace.machine import failures
from workspace.machine.machine import Machine
from workspace.server.command import built_environment

SMOKE = "smoke"
# The good end is the reference for all other commits, so it gets twice as many starts as another
# commit gets at first. No commit gets more than MOST_STARTS.
REFERENCE_STARTS, MOST_STARTS = 2 * MIN_STARTS, 4 * MIN_STARTS
# A probe has a shorter timeout of its own (PROBE_SHARE in checks/probe_runs.py). When it or its
# caller gives up, this text is in the evidence of every check that the probe was to answer.
OWN_WATCH, NO_ANSWER = 0.8, "gave no answer in"
# Exit codes of a command, as in git-bisect(1).
SKIP_CODE, LAST_BAD_CODE = 125, 127
_KIND_OF_METRIC: Mapping[str, Kind] = {
    "latency": "latency",
    "requests_per_second": "throughput",
    "tokens_per_second": "throughput",
    "cold_startup": "startup",
    "cold_compilation": "startup",
    "warm_startup": "startup",
    "warm_compilation": "startup",
}
_LAST_LINES = 3


@dataclass(frozen=True)
class Predicate:
    """The test of each tree; `name` is a check, a metric, or the command as it was typed.

    `argv` is the command's, with absolute paths.
    """

    kind: Literal["smoke", "check", "bench", "command"]
    name: str
    argv: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The result of the predicate for one tree; `values` are a benchmark's, one for each start."""

    verdict: Verdict
    evidence: str
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Bounds:
    """The timeout of a predicate (of the smoke: of each probe), and the allowed slow-down.

    `factor` is the share by which a metric may get worse.
    """

    timeout_s: float
    factor: float


@dataclass(frozen=True)
class Trial:
    """A built sandbox with the settings, bounds and log under which its tree is tested."""

    sandbox: Sandbox
    settings: Settings
    bounds: Bounds
    run_log: RunLog

    @functools.cached_property
    def machine(self) -> Machine:
        """The machine, with the environment of the sandbox."""
        return Machine(self.sandbox.layout, self.settings)


def parse(text: str, *, folder: Path) -> Predicate:
    """Parse the argument of --run; relative files of a command are in `folder`.

    Raises SettingsError, with the nearest name for a typo.
    """
    if text.startswith("bench:"):
        return _parse_metric(text.removeprefix("bench:"))
    checks = [name for name in REGISTRY if name != "parity.model"]
    if text == SMOKE or text in checks:
        return Predicate("smoke" if text == SMOKE else "check", text)
    try:
        argv = shlex.split(text)
    except ValueError as exc:
        raise SettingsError(
            f"--run: {shortened(text)!r} is not a command line: {exc}",
            hint=hints.text("bench.quote_command"),
        ) from exc
    alike = nearest(text, [SMOKE, *checks])
    is_name = re.fullmatch(r"[a-z]+\.\w+", text) and not (folder / text).is_file()
    if not argv or alike or is_name:
        hint = (
            hints.text("core.did_you_mean", alike=alike)
            if alike
            else hints.text("bench.predicates", checks=", ".join(checks))
        )
        raise SettingsError(f"--run: {shortened(text)!r} is not a check of the smoke", hint=hint)
    # The command runs in an empty folder for each tree, so its files need absolute paths.
    return Predicate(
        "command",
        text,
        tuple(
            str((folder / argument).resolve()) if (folder / argument).is_file() else argument
            for argument in argv
        ),
    )


def _parse_metric(name: str) -> Predicate:
    if name not in results.METRICS:
        alike = nearest(name, results.METRICS)
        hint = (
            hints.text("core.did_you_mean", alike=f"bench:{alike}")
            if alike
            else hints.text("bench.metrics", metrics=", ".join(results.METRICS))
        )
        raise SettingsError(f"--run: {shortened(name)!r} is not a metric of a benchmark", hint=hint)
    return Predicate("bench", name)


def evaluate(
    predicate: Predicate, trial: Trial, *, reference: Sequence[float], view: Step
) -> Outcome:
    """Test the tree of a built sandbox.

    `reference` are the values of the good end, empty where this is the good end. Raises
    WorkspaceError for an exit code without a meaning, and for a fault that makes further trials
    useless, such as a full disk.
    """
    if predicate.kind == "bench":
        return _measure(predicate.name, trial, reference, view)
    if predicate.kind == "command":
        return _run(predicate, trial)
    return judge_smoke(predicate, _smoke(predicate, trial), timeout_s=trial.bounds.timeout_s)


def _smoke(predicate: Predicate, trial: Trial) -> Mapping[str, object] | str:
    """Run the smoke in the sandbox; return its record, or the reason why there is none."""
    from workspace.checks import smoke
    from workspace.checks.smoke_suite import SmokeOptions

    layout = trial.sandbox.layout
    layout.smoke_record.unlink(missing_ok=True)
    options = SmokeOptions(
        REGISTRY[predicate.name].level if predicate.kind == "check" else "quick",
        timeout_s=trial.bounds.timeout_s,
        # One failure decides the whole smoke; a single check must be reached first.
        is_fail_fast=predicate.kind == "smoke",
    )
    try:
        smoke.smoke(
            layout,
            trial.settings,
            options,
            console=Console(out=io.StringIO(), err=io.StringIO()),
        )
    except SmokeError as exc:
        if not layout.smoke_record.exists():
            return exc.message
    return last_record(layout) or "the smoke left no record"


def judge_smoke(
    predicate: Predicate, record: Mapping[str, object] | str, *, timeout_s: float
) -> Outcome:
    """Return the outcome of a smoke's record. A check that fails by a timeout is not bad."""
    if isinstance(record, str):
        return Outcome("skip", record)
    rows = record["checks"]
    assert isinstance(rows, list)
    relevant = [row for row in rows if predicate.kind == "smoke" or row["id"] == predicate.name]
    failed = [row for row in relevant if row["verdict"] == "fail"]
    observed = [
        row
        for row in failed
        if row["seconds"] < OWN_WATCH * timeout_s and NO_ANSWER not in row["evidence"]
    ]
    if observed:
        evidence = "; ".join(f"{row['id']}: {row['evidence']}" for row in observed[:2])
        return Outcome("bad", evidence)
    if failed:
        return Outcome(
            "skip",
            f"{failed[0]['id']} gave no answer in {timeout_s:g} s: {failed[0]['evidence']}",
        )
    passed = [row for row in relevant if row["verdict"] == "pass"]
    if not passed:
        reason = relevant[0]["evidence"] if relevant else "the smoke has no such check"
        return Outcome("skip", f"{predicate.name} is not judged here: {reason}")
    if predicate.kind == "check":
        return Outcome("good", f"{predicate.name}: {passed[0]['evidence']}")
    return Outcome("good", f"{len(passed)} checks pass")


def _measure(name: str, trial: Trial, reference: Sequence[float], view: Step) -> Outcome:
    """Start the benchmark until the verdict is clear, or more starts cannot make it clear."""
    wanted = WorkloadOptions(_KIND_OF_METRIC.get(name, "serve"), subject.TINY)
    benchmark = subject.prepare(trial.machine, wanted, run_log=trial.run_log)
    values: list[float] = []
    count = MIN_STARTS if reference else REFERENCE_STARTS
    while True:
        while len(values) < count:
            view.progress(len(values), count, "starts")
            try:
                samples = _start(benchmark, trial)
            except WorkspaceError as exc:
                if isinstance(exc, ToolchainError):
                    raise
                return Outcome("skip", exc.message)
            if not samples.get(name):
                kind = benchmark.work.kind
                return Outcome("skip", f"vllm bench {kind} does not measure {name} here")
            values.append(statistics.median(samples[name]))
        outcome = _judge_values(name, values, reference, trial.bounds.factor)
        if outcome is not None:
            return outcome
        count = min(MOST_STARTS, len(values) + MIN_STARTS)


def _judge_values(
    name: str, values: Sequence[float], reference: Sequence[float], factor: float
) -> Outcome | None:
    """Return the outcome of the values so far, None where more starts may decide it."""
    metric = results.known(name)
    if not reference:
        evidence = (
            f"{name} {statistics.median(values):.4g} {metric.unit} ±"
            f" {results.variation(values):.1%}, {len(values)} starts"
        )
        return Outcome("good", evidence, tuple(values))
    judgement = compare.judge_samples(reference, values, better=metric.better, factor=factor)
    middle, now = statistics.median(reference), statistics.median(values)
    evidence = compare.sentence(compare.MetricDifference(name, middle, now, judgement))
    if judgement.verdict != "inconclusive":
        return Outcome("bad" if judgement.verdict == "fail" else "good", evidence, tuple(values))
    if judgement.needed is None or len(values) >= MOST_STARTS:
        return Outcome("skip", evidence, tuple(values))
    return None


def _start(benchmark: Benchmark, trial: Trial) -> Mapping[str, tuple[float, ...]]:
    """Measure one start. Raises WorkspaceError where it fails, hangs, or measures nothing."""
    layout, work, environment = benchmark.layout, benchmark.work, benchmark.environment
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as neutral:
        folder = Path(neutral)
        if work.kind == "serve":
            return measure.measure_server(
                layout, work, environment, folder, run_log=trial.run_log, look=lambda line: None
            )
        result = folder / "result.json"
        done = _run_in_time(subject.command(layout, work, result), environment, folder, trial)
        if done is None:
            raise WorkspaceError(
                f"vllm bench {work.kind} gave no result in {trial.bounds.timeout_s:g} s"
            )
        if done.returncode != 0:
            raise WorkspaceError(f"vllm bench {work.kind} {_how_ended(done)}")
        return measure.read_samples(work, result, log=trial.run_log.path)


def _run(predicate: Predicate, trial: Trial) -> Outcome:
    environment = built_environment(trial.machine, "shell")
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as neutral:
        done = _run_in_time(predicate.argv, environment, Path(neutral), trial)
    if done is None:
        return Outcome("skip", f"it did not end in {trial.bounds.timeout_s:g} s")
    evidence = _how_ended(done)
    if done.returncode in (0, SKIP_CODE):
        return Outcome("skip" if done.returncode else "good", evidence)
    if 0 < done.returncode <= LAST_BAD_CODE:
        return Outcome("bad", evidence)
    raise WorkspaceError(
        f"{shortened(predicate.name)} {evidence}; the bisect stops: this is neither good nor bad",
        hint=hints.text("bench.count_as_bad"),
    )


def _run_in_time(
    argv: Sequence[str], environment: Mapping[str, str], folder: Path, trial: Trial
) -> process.Completed | None:
    """Run a program and log its output; return None where it does not end in time.

    Raises ToolchainError where it cannot be started.
    """
    run_log, timeout_s = trial.run_log, trial.bounds.timeout_s
    run_log.write(f"+ {shlex.join(argv)}")
    started = time.monotonic()
    try:
        done = process.capture(argv, env=environment, cwd=folder, timeout_s=timeout_s)
    except ToolchainError:
        if time.monotonic() - started < timeout_s:
            raise
        return None
    for line in (*done.stdout.splitlines(), *done.stderr.splitlines()):
        run_log.write(line)
    return done


def _how_ended(done: process.Completed) -> str:
    """Return how a program ended, with the cause, or the last lines where its output shows none."""
    output = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    lines = [line.strip() for line in output if line.strip()]
    last = " / ".join(lines[-_LAST_LINES:]) or "no output"
    if done.returncode == 0:
        return f"{process.describe_status(0)}: {shortened(last)}"
    reading = failures.judge(output, status=done.returncode)
    return shortened(failures.how_ended(done.returncode, reading, otherwise=last))
