"""The run of `nox -s bisect`: try commit after commit in a sandbox until the culprit is found.

The bisect log keeps each try, so that the same command resumes. What the search knows, and which
commit comes next, is in bisect_log.py.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from workspace.bench import bisect_log, bisect_predicate, compare
from workspace.bench.bisect_log import (
    BisectLog,
    BisectOptions,
    Context,
    Range,
    Role,
    SearchState,
    Try,
    Verdict,
)
from workspace.bench.bisect_predicate import Bounds, Outcome, Predicate, Trial
from workspace.core import hints, lock
from workspace.core.console import Console, RunLog, State
from workspace.core.errors import BuildError, SettingsError, WorkspaceError, counted
from workspace.core.files import write_atomic
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import plan, stages
from workspace.install import sandbox as sandboxes
from workspace.repo.git import Git, history
from workspace.repo.pins import Pin

SANDBOX = "bisect"
VERB = "nox -s bisect"
# After this many skips in a row a person should look at the cause.
MOST_SKIPS = 12
SHOWN = 8
_STATES: Mapping[Verdict, State] = {"good": State.OK, "bad": State.FAIL, "skip": State.WARN}

Attempt = Callable[[str, Role, BisectLog], Outcome]


def run(
    layout: Layout,
    settings: Settings,
    options: BisectOptions,
    *,
    folder: Path,
    json_file: Path | None,
    console: Console,
) -> None:
    """Search until the culprit is found; the same call resumes an interrupted search.

    `folder` is the start of a command's relative paths. Raises SettingsError for misuse, for an end
    with the wrong verdict, and while another bisect is in progress; WorkspaceError for an
    inconclusive search.
    """
    predicate = bisect_predicate.parse(options.run, folder=folder)
    bounds = Bounds(options.timeout_s, compare.parsed_factor(options.factor))
    with (
        lock.hold(layout.lock, verb=VERB) as held,
        RunLog(
            console, layout.logs / SANDBOX, verb=SANDBOX, secrets=settings.secrets, held=held
        ) as run_log,
    ):
        observed = plan.observe(layout, settings)
        context = bisect_log.bisect_context(layout, observed)
        log = begin(layout, context, options, console=console)
        is_patches = options.is_patches
        searched = bisect_log.open_range(layout, context, log.good, log.bad, is_patches=is_patches)
        wanted = sandboxes.as_built(settings, observed)
        pin, base = observed.pin, context.base
        runner = _Runner(layout, wanted, pin, base, searched, predicate, bounds, run_log)
        with _report_kept(layout, console):
            log, state = search(
                searched,
                log,
                attempt=runner.attempt,
                keep=lambda kept: bisect_log.write_log(layout, kept),
                console=console,
            )
        document = describe(layout, searched, log, state)
        if json_file:
            text = json.dumps(document, indent=1, allow_nan=False) + "\n"
            write_atomic(json_file, text.encode())
        with _removed_at_end(layout, state, console):
            conclude(searched, log, state, document, console=console)


@contextlib.contextmanager
def _removed_at_end(layout: Layout, state: SearchState, console: Console) -> Iterator[None]:
    """Remove sandbox and log at the end, unless the next bisect takes the tries over."""
    try:
        yield
    finally:
        if state.contradiction is None:
            _remove(layout, console)


def abort(layout: Layout, *, console: Console) -> None:
    """Remove log and sandbox of the bisect in progress, in whatever state they are."""
    with lock.hold(layout.lock, verb=VERB):
        exists = bisect_log.log_path(layout).exists() or (layout.sandboxes / SANDBOX).exists()
        if exists:
            _remove(layout, console)
        console.info("the bisect is aborted" if exists else "no bisect is in progress")


def begin(
    layout: Layout, context: Context, options: BisectOptions, *, console: Console
) -> BisectLog:
    """Return the log of the same command to resume, or a fresh log. Raises SettingsError as `run`.

    A fresh log takes over the tries of a bisect that ended with a contradiction.
    """
    former = bisect_log.read_log(layout)
    digest = bisect_log.context_digest(context.base, context.patches)
    if former and former.options == options:
        if former.context != digest:
            raise SettingsError(
                "the pin or its patches have changed since this bisect began",
                hint=hints.text("bench.bring_back"),
            )
        console.info(f"resuming after {_tries(former)}")
        return former
    if former and not is_contradicted(layout, context, former):
        raise SettingsError(
            f"another bisect is in progress, {_tries(former)}: {former.options.command}; this"
            f" command is {options.command}",
            hint=hints.text("bench.resume_other"),
        )
    good, bad = bisect_log.range_ends(layout, context, options)
    fresh = BisectLog(options, good, bad, digest)
    fresh = fresh.inheriting(former) if former else fresh
    bisect_log.write_log(layout, fresh)
    return fresh


def is_contradicted(layout: Layout, context: Context, former: BisectLog) -> bool:
    """Return whether a bisect ended because an end has the wrong verdict."""
    with contextlib.suppress(WorkspaceError, ValueError):
        searched = bisect_log.open_range(
            layout, context, former.good, former.bad, is_patches=former.options.is_patches
        )
        return searched.state(former.verdicts).contradiction is not None
    return False


def search(
    searched: Range,
    log: BisectLog,
    *,
    attempt: Attempt,
    keep: Callable[[BisectLog], None],
    console: Console,
) -> tuple[BisectLog, SearchState]:
    """Try commits until no commit is left to try; keep the log after each try.

    Raises WorkspaceError where an end cannot be tried, and after 12 skips in a row.
    """
    skips = 0
    while (state := searched.state(log.verdicts)).following:
        commit, role = state.following, state.role
        console.info(_progress(searched, log, state))
        started = time.monotonic()
        outcome = attempt(commit, role, log)
        seconds = round(time.monotonic() - started, 1)
        if outcome.verdict == "skip" and role in ("good", "bad"):
            raise _untried_end(searched, log, state, outcome)
        log = log.after(Try(commit, outcome.verdict, outcome.evidence, seconds, outcome.values))
        keep(log)
        skips = skips + 1 if outcome.verdict == "skip" else 0
        if skips == MOST_SKIPS:
            raise _too_many_skips(searched, log, outcome)
    return log, state


def _untried_end(
    searched: Range, log: BisectLog, state: SearchState, outcome: Outcome
) -> WorkspaceError:
    hint = (
        hints.text("bench.fix_patches_first")
        if log.options.is_patches
        else hints.text("bench.other_commit", role=state.role)
    )
    title = searched.title(state.following or "")
    return WorkspaceError(
        f"the {state.role} end, {title}, cannot be tried: {outcome.evidence}", hint=hint
    )


def _too_many_skips(searched: Range, log: BisectLog, outcome: Outcome) -> WorkspaceError:
    left = searched.state(log.verdicts).left
    shown = left if len(left) <= SHOWN else (*left[: SHOWN - 1], left[-1])
    return WorkspaceError(
        f"inconclusive so far: {MOST_SKIPS} commits in a row cannot be tried; the last:"
        f" {outcome.evidence}",
        hint=hints.text("bench.bisect_more", count=MOST_SKIPS),
        details=tuple(searched.title(commit) for commit in shown),
    )


@dataclass(frozen=True)
class _Runner:
    """Tries a commit: checks it out in a sandbox, builds it as far as needed, and tests it."""

    layout: Layout
    settings: Settings
    pin: Pin
    base: str
    searched: Range
    predicate: Predicate
    bounds: Bounds
    run_log: RunLog

    def attempt(self, commit: str, role: Role, log: BisectLog) -> Outcome:
        console, git = self.run_log.console, Git(self.layout.vllm)
        self.run_log.phase(self.searched.title(commit))
        history.complete_range(git, self.base, commit, self.settings, run_log=self.run_log)
        carried = history.carried(git, commit, self.searched.carried)
        if carried.tip is None:
            return self._skip(f"patches/vllm/{carried.failing} does not apply there")
        if carried.left_out:
            console.info(f"  left out, because it is there already: {', '.join(carried.left_out)}")
        sandbox = sandboxes.make(
            self.layout,
            SANDBOX,
            pin=self.pin,
            patches=None,
            tip=carried.tip,
            settings=self.settings,
            run_log=self.run_log,
        )
        try:
            sandboxes.build_sandbox(sandbox, self.settings, console=console)
        except BuildError as exc:
            return self._skip(f"it cannot be built: {exc.message}")
        return self._evaluate(sandbox, role, log)

    def _evaluate(self, sandbox: sandboxes.Sandbox, role: Role, log: BisectLog) -> Outcome:
        first = log.of(log.good)
        reference = first.values if first and role != "good" else ()
        trial = Trial(sandbox, self.settings, self.bounds, self.run_log)
        with stages.step(self.run_log, self.predicate.name) as view:
            outcome = bisect_predicate.evaluate(
                self.predicate, trial, reference=reference, view=view
            )
            view.state = _STATES[outcome.verdict]
            view.reason = f"{outcome.verdict}: {outcome.evidence}"
        return outcome

    def _skip(self, evidence: str) -> Outcome:
        self.run_log.console.row(_STATES["skip"], "skip", evidence)
        return Outcome("skip", evidence)


def conclude(
    searched: Range,
    log: BisectLog,
    state: SearchState,
    document: Mapping[str, object],
    *,
    console: Console,
) -> None:
    """Print the culprit.

    Raises SettingsError where an end has the wrong verdict, WorkspaceError where the search is
    inconclusive.
    """
    if state.contradiction:
        raise _contradiction(searched, log, state)
    if state.culprit is None:
        untried = [
            f"{searched.title(commit)}: {found.evidence}"
            for commit in state.left[:-1]
            if (found := log.of(commit))
        ]
        first, last = state.left[0], state.left[-1]
        raise WorkspaceError(
            f"inconclusive after {_tries(log)}: the culprit is one of {len(state.left)} commits,"
            " of which the last is bad and the others cannot be tried",
            hint=hints.text("bench.log_range", first=first[:12], last=last[:12]),
            details=(*untried, searched.title(last)),
        )
    found = log.of(state.culprit)
    assert found is not None
    console.info(f"the first bad commit is {searched.title(state.culprit)}", style="bold")
    for line in _stats_lines(document):
        console.info(f"  {line}")
    console.info(f"  {found.evidence}")
    console.info(f"{_tries(log)}; to inspect it: git -C vendor/vllm show {state.culprit[:12]}")
    console.data(searched.names.get(state.culprit, state.culprit))


def describe(
    layout: Layout, searched: Range, log: BisectLog, state: SearchState
) -> dict[str, object]:
    """Return the document of --json: the verdict, the culprit and every try."""
    culprit: dict[str, object] | None = None
    if state.culprit:
        stats = history.commit_stats(Git(layout.vllm), state.culprit)
        changes = {path: list(counts) for path, counts in stats.changes.items()}
        patch = searched.names.get(state.culprit)
        culprit = {**asdict(stats), "changes": changes, "patch": patch}
    return {
        "schema": log.SCHEMA,
        "verdict": (
            "found" if culprit else "contradiction" if state.contradiction else "inconclusive"
        ),
        # Programs read this key, so it keeps the name of the first edition.
        "asked": asdict(log.options),
        "good": log.good,
        "bad": log.bad,
        "culprit": culprit,
        "suspects": list(state.left),
        "tries": [asdict(attempt) for attempt in log.tries],
        "steps": len(log.tries),
        "minutes": round(log.seconds / 60, 2),
    }


def _stats_lines(document: Mapping[str, object]) -> Iterator[str]:
    culprit = document["culprit"]
    assert isinstance(culprit, dict)
    yield f"{culprit['author']}, {culprit['date']}: {culprit['subject']}"
    changes = culprit["changes"]
    for path, (added, removed) in list(changes.items())[:SHOWN]:
        yield f"{path}  +{added} -{removed}" if added is not None else path
    if len(changes) > SHOWN:
        yield f"and {len(changes) - SHOWN} more files"


def _contradiction(searched: Range, log: BisectLog, state: SearchState) -> SettingsError:
    """Return the error for an end, or a merge base, that has the wrong verdict."""
    found = log.of(state.contradiction or "")
    assert found is not None
    title = searched.title(found.commit)
    if state.role == "good":
        return SettingsError(
            f"the good end, {title}, is bad: {found.evidence}",
            hint=hints.text("bench.search_upstream")
            if log.options.is_patches
            else hints.text("bench.older_good"),
        )
    if state.role == "fork":
        return SettingsError(
            f"{title}, the merge base of {searched.title(log.good)} and the bad end, is bad:"
            f" {found.evidence}; a commit between it and the good end fixes the fault",
            hint=hints.text("bench.log_fix", commit=found.commit[:12], good=log.good[:12]),
        )
    return SettingsError(
        f"the bad end, {title}, is good: {found.evidence}",
        hint=hints.text("bench.other_bad"),
    )


def _progress(searched: Range, log: BisectLog, state: SearchState) -> str:
    title = searched.title(state.following or "")
    minutes = f"{log.seconds / 60:.1f} min so far"
    if state.role != "suspect":
        place = {
            "good": "the good end",
            "bad": "the bad end",
            "fork": "the merge base of good and bad",
        }[state.role]
        return f"{place}: {title}; {len(state.left)} suspects, {minutes}"
    return f"{len(state.left)} suspects left, about {state.steps} steps, {minutes}: {title}"


def _tries(log: BisectLog) -> str:
    return f"{counted(len(log.tries), 'step')}, {log.seconds / 60:.1f} min"


@contextlib.contextmanager
def _report_kept(layout: Layout, console: Console) -> Iterator[None]:
    """Report how many tries are kept if the search ends early."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(WorkspaceError, OSError):
            if log := bisect_log.read_log(layout):
                console.info(f"kept: {_tries(log)}; run the same command again to resume")
        raise


def _remove(layout: Layout, console: Console) -> None:
    """Remove the sandbox, then the log.

    In this order the next run completes a removal that was killed.
    """
    if kept := sandboxes.remove(layout, SANDBOX):
        console.info(f"your work in the sandbox is kept in vendor/vllm as {kept}")
    bisect_log.log_path(layout).unlink(missing_ok=True)
