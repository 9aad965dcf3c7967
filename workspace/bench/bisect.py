"""The run of `nox -s bisect`: `git bisect` with a sandbox in which each commit is built and tested.

The range, and the log from which the same command resumes, are in bisect_log.py.
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from workspace.bench import bisect_log, bisect_predicate, compare, measure
from workspace.bench.bisect_log import BisectLog, BisectOptions, Range, Try, Verdict
from workspace.bench.bisect_predicate import Bounds, Outcome, Predicate, Trial
from workspace.core import hints, lock
from workspace.core.console import Console, RunLog, State
from workspace.core.errors import BuildError, CheckoutError, SettingsError, WorkspaceError
from workspace.core.files import write_atomic
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import plan, stages
from workspace.install import sandbox as sandboxes
from workspace.repo.git import Git, history
from workspace.repo.pins import Pin

SANDBOX = "bisect"
VERB = "nox -s bisect"
SHOWN = 8
# Exit statuses of git-bisect (enum bisect_error in git's bisect.h).
_ONLY_SKIPPED_LEFT, _MERGE_BASE_IS_BAD = 2, 3
_STATES: Mapping[Verdict, State] = {"good": State.OK, "bad": State.FAIL, "skip": State.WARN}

Attempt = Callable[[str, BisectLog], Outcome]


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
        stack, base = observed.stack, observed.checkout.base
        if stack is None or base is None:
            raise CheckoutError(
                f"there is nothing to search: vendor/vllm is {observed.checkout.detail}",
                hint=hints.text("inv.bootstrap"),
            )
        patches = tuple(layout.patches("vllm") / name for name in stack.names)
        searched = bisect_log.open_range(layout, base, patches, options)
        log = begin(layout, searched, options, console=console)
        wanted = sandboxes.as_built(settings, observed)
        runner = _Runner(layout, wanted, observed.pin, searched, predicate, bounds, run_log)
        with measure.kept_reported(console, lambda: _kept(layout)):
            found = Search(layout, searched, runner.attempt, console, log).run()
        if json_file:
            text = json.dumps(found.document(), indent=1, allow_nan=False) + "\n"
            write_atomic(json_file, text.encode())
        _remove(layout, console)
        conclude(found, console=console)


def abort(layout: Layout, *, console: Console) -> None:
    """Remove log and sandbox of the bisect in progress, in whatever state they are."""
    with lock.hold(layout.lock, verb=VERB):
        exists = bisect_log.log_path(layout).exists() or (layout.sandboxes / SANDBOX).exists()
        if exists:
            _remove(layout, console)
        console.info("the bisect is aborted" if exists else "no bisect is in progress")


def begin(
    layout: Layout, searched: Range, options: BisectOptions, *, console: Console
) -> BisectLog:
    """Return the log of the same search to resume, or a new log.

    Raises SettingsError where another bisect is in progress.
    """
    former, fresh = bisect_log.read_log(layout), bisect_log.fresh_log(searched, options)
    if former is None:
        bisect_log.write_log(layout, fresh)
        return fresh
    if not former.is_of(fresh):
        raise SettingsError(
            f"another bisect is in progress, {former.summary}: --run {former.options.run} from"
            f" {former.good[:12]} to {former.bad[:12]}, or with another pin or other patches",
            hint=hints.text("bench.resume_other"),
        )
    console.info(f"resuming after {former.summary}")
    return former


@dataclass(frozen=True)
class Found:
    """The end of a search: the suspects that are left, of which the last is bad.

    Instead it may be `wrong`: an end, or a merge base of the two, with the verdict that it must not
    have.
    """

    searched: Range
    log: BisectLog
    left: tuple[str, ...]
    wrong: Try | None = None

    @property
    def culprit(self) -> str | None:
        return self.left[0] if len(self.left) == 1 else None

    def document(self) -> dict[str, object]:
        """Return the document of --json: the verdict, the culprit and every try."""
        log, searched = self.log, self.searched
        culprit = self.culprit and {
            "oid": self.culprit,
            "subject": history.subject(searched.git, self.culprit),
            "patch": searched.names.get(self.culprit),
        }
        return {
            "schema": log.SCHEMA,
            "verdict": ("found" if culprit else "contradiction" if self.wrong else "inconclusive"),
            # Programs read this key, so it keeps the name of the first edition.
            "asked": asdict(log.options),
            "good": log.good,
            "bad": log.bad,
            "culprit": culprit,
            "suspects": list(self.left),
            "tries": [asdict(attempt) for attempt in log.tries],
            "steps": len(log.tries),
            "minutes": round(log.seconds / 60, 2),
        }


@dataclass
class Search:
    """A `git bisect` between two ends; the log is written after each try.

    It runs in an empty repository that borrows the commits of vendor/vllm, so that a bisect of the
    user there, HEAD, index and references stay as they are.
    """

    layout: Layout
    searched: Range
    attempt: Attempt
    console: Console
    log: BisectLog

    def run(self) -> Found:
        """Try the ends, then what git asks for, until nothing is left to try.

        Raises WorkspaceError where an end cannot be tried.
        """
        good, bad, left = self.searched.good, self.searched.bad, tuple[str, ...]()
        for commit, verdict in ((good, "good"), (bad, "bad")):
            tried = self._tried(commit, f"the {verdict} end: ")
            if tried.verdict != verdict:
                return Found(self.searched, self.log, (), wrong=tried)
        with self._repository() as git:
            answer, marked = git.write("bisect", "start", "--no-checkout", bad, good), {good}
            while True:
                left = _suspects(git)
                following = git.resolve("BISECT_HEAD")
                if following is None or following in marked:
                    break
                tried = self._tried(following, f"{len(left)} suspects left: ")
                marked.add(following)
                answer = git.write("bisect", tried.verdict, following, check=False)
                if answer.status == _MERGE_BASE_IS_BAD:
                    return Found(self.searched, self.log, (), wrong=tried)
        if answer.status not in (0, _ONLY_SKIPPED_LEFT) and len(left) > 1:
            # With one suspect left, git fails only to show it: a partial clone lacks its files.
            raise CheckoutError(
                f"git bisect failed: {answer.err.strip()}", hint=hints.text("bench.bisect_abort")
            )
        return Found(self.searched, self.log, left)

    @contextlib.contextmanager
    def _repository(self) -> Iterator[Git]:
        """Yield a repository with the commits of vendor/vllm, also of a shallow clone."""
        source = self.searched.git
        with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as folder:
            git = Git(Path(folder))
            git.init()
            alternates = git.path_of("objects/info/alternates")
            alternates.parent.mkdir(exist_ok=True)
            alternates.write_text(f"{source.path_of('objects')}\n")
            if (shallow := source.path_of("shallow")).exists():
                git.path_of("shallow").symlink_to(shallow)
            # git-bisect needs a HEAD.
            git.write("update-ref", "--no-deref", "HEAD", self.searched.good)
            yield git

    def _tried(self, commit: str, place: str) -> Try:
        """Return the try of a commit from the log, or try it and write the log."""
        if (former := self.log.of(commit)) is not None:
            return former
        title = self.searched.title(commit)
        self.console.info(f"{place}{title}; {self.log.seconds / 60:.1f} min so far")
        started = time.monotonic()
        outcome = self.attempt(commit, self.log)
        seconds = round(time.monotonic() - started, 1)
        role = {self.searched.good: "good", self.searched.bad: "bad"}.get(commit)
        if outcome.verdict == "skip" and role:
            raise WorkspaceError(
                f"the {role} end, {title}, cannot be tried: {outcome.evidence}",
                hint=hints.text("bench.fix_patches_first")
                if self.log.options.is_patches
                else hints.text("bench.other_commit", role=role),
            )
        tried = Try(commit, outcome.verdict, outcome.evidence, seconds, outcome.values)
        self.log = self.log.after(tried)
        bisect_log.write_log(self.layout, self.log)
        return tried


def _suspects(git: Git) -> tuple[str, ...]:
    """Return the commits that may be the culprit, parents first."""
    args = ("rev-list", "--topo-order", "--reverse", "refs/bisect/bad")
    return tuple(git.look(*args, "--not", "--glob=refs/bisect/good-*").out.split())


@dataclass(frozen=True)
class _Runner:
    """Tries a commit: checks it out in a sandbox, builds it as far as needed, and tests it."""

    layout: Layout
    settings: Settings
    pin: Pin
    searched: Range
    predicate: Predicate
    bounds: Bounds
    run_log: RunLog

    def attempt(self, commit: str, log: BisectLog) -> Outcome:
        searched, console = self.searched, self.run_log.console
        self.run_log.phase(searched.title(commit))
        history.complete_range(
            searched.git, searched.base, commit, self.settings, run_log=self.run_log
        )
        carried = history.carried(searched.git, commit, searched.carried)
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
        first = log.of(log.good)
        trial = Trial(sandbox, self.settings, self.bounds, self.run_log)
        with stages.step(self.run_log, self.predicate.name) as view:
            outcome = bisect_predicate.evaluate(
                self.predicate, trial, reference=first.values if first else (), view=view
            )
            view.state = _STATES[outcome.verdict]
            view.reason = f"{outcome.verdict}: {outcome.evidence}"
        return outcome

    def _skip(self, evidence: str) -> Outcome:
        self.run_log.console.row(_STATES["skip"], "skip", evidence)
        return Outcome("skip", evidence)


def conclude(found: Found, *, console: Console) -> None:
    """Print the culprit.

    Raises SettingsError where an end has the wrong verdict, WorkspaceError where the search is
    inconclusive.
    """
    searched, log = found.searched, found.log
    if found.wrong:
        raise _contradiction(searched, log, found.wrong)
    if found.culprit is None:
        untried = [
            f"{searched.title(commit)}: {tried.evidence}"
            for commit in found.left[:-1]
            if (tried := log.of(commit))
        ]
        first, last = found.left[0], found.left[-1]
        raise WorkspaceError(
            f"inconclusive after {log.summary}: the culprit is one of {len(found.left)} commits,"
            " of which the last is bad and the others cannot be tried",
            hint=hints.text("bench.log_range", first=first[:12], last=last[:12]),
            details=(*untried, searched.title(last)),
        )
    tried = log.of(found.culprit)
    assert tried is not None
    console.info(f"the first bad commit is {searched.title(found.culprit)}", style="bold")
    # A partial clone may lack the files that git counts the lines of.
    stats = ("show", "--stat", "--no-color", "--diff-merges=first-parent", "--format=%an, %as: %s")
    for line in searched.git.look(*stats, found.culprit, check=False).out.splitlines()[:SHOWN]:
        console.info(f"  {line}")
    console.info(f"  {tried.evidence}")
    console.info(f"{log.summary}; to inspect it: git -C vendor/vllm show {found.culprit[:12]}")
    console.data(searched.names.get(found.culprit, found.culprit))


def _contradiction(searched: Range, log: BisectLog, wrong: Try) -> SettingsError:
    """Return the error for an end, or a merge base, that has the wrong verdict."""
    title, run = searched.title(wrong.commit), log.options.run
    if wrong.commit == log.good and log.options.is_patches:
        return SettingsError(
            f"the good end, {title}, is bad: {wrong.evidence}",
            hint=hints.text("bench.good_example", run=run),
        )
    if wrong.commit in (log.good, log.bad):
        role = "good" if wrong.commit == log.good else "bad"
        return SettingsError(
            f"the {role} end, {title}, is {wrong.verdict}: {wrong.evidence}",
            hint=hints.text("bench.good_and_bad", run=run),
        )
    return SettingsError(
        f"{title}, the merge base of {searched.title(log.good)} and the bad end, is bad:"
        f" {wrong.evidence}; a commit between it and the good end fixes the fault",
        hint=hints.text("bench.log_fix", commit=wrong.commit[:12], good=log.good[:12]),
    )


def _kept(layout: Layout) -> str:
    log = bisect_log.read_log(layout)
    return f"kept: {log.summary}" if log else ""


def _remove(layout: Layout, console: Console) -> None:
    """Remove the sandbox, then the log.

    In this order the next run completes a removal that was killed.
    """
    if kept := sandboxes.remove(layout, SANDBOX):
        console.info(f"your work in the sandbox is kept in vendor/vllm as {kept}")
    bisect_log.log_path(layout).unlink(missing_ok=True)
