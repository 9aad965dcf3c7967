"""The question that every tree is asked: the smoke, one check of it, a benchmark's metric or a
command. The answer is good, bad, or neither.

What hangs, or says nothing of what was asked, is neither: a commit is not to blame for what nobody
saw.
"""

import contextlib
import io
import json
import re
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.bench import compare, metrics, subject
from workspace.bench.bisect_log import Verdict
from workspace.bench.compare import MIN_STARTS
from workspace.bench.results import Kind
from workspace.checks.registry import REGISTRY
from workspace.core import process
from workspace.core.console import Console, Step
from workspace.core.errors import SettingsError, SmokeError, ToolchainError, WorkspaceError
from workspace.core.files import read_regular
from workspace.core.log import RunLog
from workspace.core.settings import Settings, nearest, shortened
from workspace.install.sandbox import Sandbox
from workspace.server.command import built_environment

SMOKE = "smoke"
# The good end is what all others are held against: twice as many starts as one of those has at
# first; and the most that one gets.
REFERENCE_STARTS, MOST_STARTS = 2 * MIN_STARTS, 4 * MIN_STARTS
# A probe watches itself too, with less patience (smoke/suite.py); what it or its caller then says
# of it, whatever checks it was to answer.
OWN_WATCH, NO_ANSWER = 0.8, "gave no answer in"
SKIP_CODE, LAST_BAD_CODE = 125, 127
_OF_KIND: Mapping[str, Kind] = {
    **dict.fromkeys(("latency",), "latency"),
    **dict.fromkeys(("requests_per_second", "tokens_per_second"), "throughput"),
    **dict.fromkeys(
        ("cold_startup", "cold_compilation", "warm_startup", "warm_compilation"), "startup"
    ),
}
_LAST_LINES = 3


@dataclass(frozen=True)
class Predicate:
    """`name` is a check of the smoke, a metric, or the command as it was typed; `words` are the
    command's, paths made absolute.
    """

    kind: Literal["smoke", "check", "bench", "command"]
    name: str
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Said:
    """The answer of one tree. `values` are a benchmark's, one a start."""

    verdict: Verdict
    evidence: str
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Bounds:
    """How long one question may take, in seconds (of the smoke: each probe of it), and the share by
    which a metric may get worse.
    """

    timeout_s: float
    factor: float


def parse(text: str, *, folder: Path) -> Predicate:
    """Read the word of --run; the words of a command that name a file are counted from `folder`.
    Raises SettingsError, with the nearest for a typo.
    """
    if text.startswith("bench:"):
        name = text.removeprefix("bench:")
        if name not in metrics.METRICS:
            alike = nearest(name, metrics.METRICS)
            hint = (
                f"did you mean bench:{alike}?"
                if alike
                else f"there are {', '.join(metrics.METRICS)}"
            )
            raise SettingsError(
                f"--run: {shortened(name)!r} is no metric of a benchmark", hint=hint
            )
        return Predicate("bench", name)
    checks = [name for name in REGISTRY if name != "parity.model"]
    if text == SMOKE or text in checks:
        return Predicate("smoke" if text == SMOKE else "check", text)
    try:
        words = shlex.split(text)
    except ValueError as exc:
        raise SettingsError(
            f"--run: {shortened(text)!r} is no command line: {exc}",
            hint="quote it as a whole, and what has blanks in it once more",
        ) from exc
    stems = {name.partition(".")[0] for name in REGISTRY}
    if (
        not words
        or (
            len(words) == 1
            and re.fullmatch(r"[a-z]+\.\w+", text)
            and text.partition(".")[0] in stems
        )
        or nearest(text, [SMOKE, *checks])
    ):
        alike = nearest(text, [SMOKE, *checks])
        hint = (
            f"did you mean {alike}?"
            if alike
            else f"smoke, bench:METRIC, a command line, or one of {', '.join(checks)}"
        )
        raise SettingsError(f"--run: {shortened(text)!r} is no check of the smoke", hint=hint)
    # Each tree is asked in an empty folder of its own.
    return Predicate(
        "command",
        text,
        tuple(
            str((folder / word).resolve()) if (folder / word).is_file() else word for word in words
        ),
    )


def ask(
    question: Predicate,
    arm: Sandbox,
    settings: Settings,
    bounds: Bounds,
    *,
    reference: Sequence[float],
    run_log: RunLog,
    view: Step,
) -> Said:
    """Ask the tree of a built arm. `reference` is what the good end measured, nothing where this is
    the good end.

    Raises WorkspaceError where a command ends in a way that has no meaning, and what makes any
    further question pointless, such as a full disk.
    """
    if question.kind == "bench":
        return _measured(question.name, arm, settings, bounds, reference, run_log, view)
    if question.kind == "command":
        return _run(question, arm, settings, bounds, run_log)
    return judged(question, _smoke(question, arm, settings, bounds), timeout_s=bounds.timeout_s)


def _smoke(
    question: Predicate, arm: Sandbox, settings: Settings, bounds: Bounds
) -> Mapping[str, object] | str:
    """The record of a smoke on the arm, or why there is none."""
    from workspace.checks import smoke

    arm.layout.smoke_record.unlink(missing_ok=True)
    level = REGISTRY[question.name].level if question.kind == "check" else "quick"
    with contextlib.suppress(FileNotFoundError):
        try:
            smoke.smoke(
                arm.layout,
                settings,
                console=Console(out=io.StringIO(), err=io.StringIO()),
                json_file=None,
                timeout_s=bounds.timeout_s,
                level=level,
                # Of the smoke as a whole one failure is enough; a check has to be come to.
                is_fail_fast=question.kind == "smoke",
            )
        except SmokeError as exc:
            if not arm.layout.smoke_record.exists():
                return exc.message
        found = json.loads(read_regular(arm.layout.smoke_record))
        assert isinstance(found, dict)
        return found
    return "the smoke left no record"


def judged(question: Predicate, record: Mapping[str, object] | str, *, timeout_s: float) -> Said:
    """Read the verdict out of a smoke's record. A check that fails because a probe was waited for
    in vain is no bad one.
    """
    if isinstance(record, str):
        return Said("skip", record)
    rows = record["checks"]
    assert isinstance(rows, list)
    options = [row for row in rows if question.kind == "smoke" or row["id"] == question.name]
    failed = [row for row in options if row["verdict"] == "fail"]
    seen = [
        row
        for row in failed
        if row["seconds"] < OWN_WATCH * timeout_s and NO_ANSWER not in row["evidence"]
    ]
    if seen:
        return Said("bad", "; ".join(f"{row['id']}: {row['evidence']}" for row in seen[:2]))
    if failed:
        return Said(
            "skip",
            f"{failed[0]['id']} has no answer within {timeout_s:g} s: {failed[0]['evidence']}",
        )
    passed = [row for row in options if row["verdict"] == "pass"]
    if not passed:
        return Said(
            "skip",
            f"{question.name} is not judged here:"
            f" {options[0]['evidence'] if options else 'the smoke does not have it'}",
        )
    return Said(
        "good",
        (
            f"{question.name}: {passed[0]['evidence']}"
            if question.kind == "check"
            else f"{len(passed)} checks pass"
        ),
    )


def _measured(
    name: str,
    arm: Sandbox,
    settings: Settings,
    bounds: Bounds,
    reference: Sequence[float],
    run_log: RunLog,
    view: Step,
) -> Said:
    """Start the benchmark until the verdict is clear, or further starts would not make it so."""
    work = subject.prepare(
        arm.layout,
        settings,
        _OF_KIND.get(name, "serve"),
        subject.TINY,
        (),
        has_sweep=False,
        run_log=run_log,
    )
    environment = built_environment(arm.layout, settings, recipe=work.recipe, more=work.more)
    metric, values, wanted = (
        metrics.known(name),
        list[float](),
        MIN_STARTS if reference else REFERENCE_STARTS,
    )
    while True:
        while len(values) < wanted:
            view.progress(len(values), wanted, "starts")
            try:
                samples = _start(arm, work, environment, bounds, run_log)
            except WorkspaceError as exc:
                if isinstance(exc, ToolchainError):
                    raise
                return Said("skip", exc.message)
            if not samples.get(name):
                return Said("skip", f"vllm bench {work.kind} does not measure {name} here")
            values.append(metrics.median(samples[name]))
        if not reference:
            return Said(
                "good",
                f"{name} {metrics.median(values):.4g} {metric.unit} ±"
                f" {metrics.variation(values):.1%}, {len(values)} starts",
                tuple(values),
            )
        found = compare.judge_samples(reference, values, better=metric.better, factor=bounds.factor)
        evidence = compare.sentence(
            compare.Row(name, metrics.median(reference), metrics.median(values), found)
        )
        if found.verdict != "inconclusive":
            return Said("bad" if found.verdict == "fail" else "good", evidence, tuple(values))
        if found.needed is None or len(values) >= MOST_STARTS:
            return Said("skip", evidence, tuple(values))
        wanted = min(MOST_STARTS, len(values) + MIN_STARTS)


def _start(
    arm: Sandbox,
    work: subject.Workload,
    environment: Mapping[str, str],
    bounds: Bounds,
    run_log: RunLog,
) -> Mapping[str, tuple[float, ...]]:
    """Measure one start. Raises WorkspaceError where it measured nothing, or not within the
    time.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as neutral:
        if work.kind == "serve":
            from workspace.bench import measure

            return measure.measure_start(
                arm.layout,
                work,
                environment,
                Path(neutral),
                run_log=run_log,
                look=lambda line: None,
            )
        result = Path(neutral) / "result.json"
        done = _waited_for(
            subject.command(arm.layout, work, result),
            environment,
            Path(neutral),
            bounds.timeout_s,
            run_log,
        )
        if done is None:
            raise WorkspaceError(
                f"vllm bench {work.kind} has no result within {bounds.timeout_s:g} s"
            )
        if done.returncode != 0:
            raise WorkspaceError(
                f"vllm bench {work.kind} {process.describe_status(done.returncode)}: {_last(done)}"
            )
        return measure.taken(work, result)


def _run(
    question: Predicate, arm: Sandbox, settings: Settings, bounds: Bounds, run_log: RunLog
) -> Said:
    environment = built_environment(arm.layout, settings)
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as neutral:
        done = _waited_for(question.words, environment, Path(neutral), bounds.timeout_s, run_log)
    if done is None:
        return Said("skip", f"no end within {bounds.timeout_s:g} s")
    said = f"{process.describe_status(done.returncode)}: {_last(done)}"
    if done.returncode in (0, SKIP_CODE):
        return Said("skip" if done.returncode else "good", said)
    if 0 < done.returncode <= LAST_BAD_CODE:
        return Said("bad", said)
    raise WorkspaceError(
        f"{shortened(question.name)} {said}; the bisect is stopped: that is neither good nor bad",
        hint="the same command goes on; to have it count as bad: --run \"sh -c '… || exit 1'\"",
    )


def _waited_for(
    argv: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    timeout_s: float,
    run_log: RunLog,
) -> process.Completed | None:
    """Run a program to its end, what it says in the log; None where it has not ended in time.
    Raises ToolchainError where it cannot be started.
    """
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


def _last(done: process.Completed) -> str:
    """What a program said last, which mostly is what it has to say."""
    lines = [
        line.strip()
        for line in (*done.stdout.splitlines(), *done.stderr.splitlines())
        if line.strip()
    ]
    return shortened(" / ".join(lines[-_LAST_LINES:])) or "no word"
