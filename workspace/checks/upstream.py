"""Upstream's own tests as a verb: select those that a change reaches, run and judge them.

Selection, one run of pytest, and the pin's tree have modules of their own.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from workspace.checks import smoke, upstream_selection, upstream_trial
from workspace.checks.upstream_selection import Decision, Reach, Reached, Rules
from workspace.checks.upstream_trial import FileCheck, Sorted
from workspace.core import hints, records
from workspace.core.console import Console, RunLog, State
from workspace.core.errors import CheckoutError, SettingsError, SmokeError
from workspace.core.paths import Layout, typed
from workspace.core.settings import Settings
from workspace.install import plan, stages
from workspace.machine.machine import Machine
from workspace.repo.git import Git, repository
from workspace.server.command import built_environment

# Where new files count as changes (repository.differing).
SOURCES = ("vllm", "tests", "csrc", "cmake")
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
# Seconds for one run of pytest: vllm/v1/core, the folder with the most tests for one change, takes
# minutes on two CPU cores.
TIMEOUT_S = 7200.0
NAME_WIDTH = 44
RECORD = "upstream.json"
_CHOOSE = (
    "./scripts/nox -s upstream -- --all-of vllm/sampling_params.py    runs the tests that a file"
    " or folder reaches; --all-of tests/config runs those tests"
)


@dataclass(frozen=True)
class UpstreamOptions:
    """Options of the user. `all_of` are paths that count as changed; `timeout_s` limits each run.

    `pytest_args` go to pytest, `try_all` also runs what upstream runs on GPUs only, `is_online`
    lets tests use the hub.
    """

    all_of: tuple[str, ...] = ()
    pytest_args: tuple[str, ...] = ()
    timeout_s: float = TIMEOUT_S
    try_all: bool = False
    is_online: bool = False


@dataclass(frozen=True)
class Selection:
    """What to run: the changes against the pin `base`, the chosen paths, and how each file runs."""

    base: str
    changed: tuple[str, ...]
    chosen: tuple[str, ...]
    reach: Reach
    decisions: Mapping[str, Decision]

    def files(self, how: upstream_selection.How) -> tuple[str, ...]:
        return tuple(test.path for test in self.reach.tests if self.decisions[test.path].how == how)


@dataclass(frozen=True)
class Result:
    """A check for each test file, the outcomes behind them, a note on the comparison, and the
    seconds of each run of pytest.
    """

    checks: tuple[FileCheck, ...]
    found: Sorted
    compared: str
    steps: Mapping[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of tests that ended by themselves."""
        return sum(map(len, (self.found.passed, self.found.pin, self.found.own)))

    @property
    def summary(self) -> str:
        kinds = {
            "passed": self.found.passed,
            "skipped": self.found.skipped,
            "need the hub": self.found.hub,
            "fail on the pin too": self.found.pin,
        }
        files = sum(check.evidence.startswith(upstream_trial.NOT_RUN) for check in self.checks)
        counted = [
            f"{len(found)} {kind}" for kind, found in kinds.items() if found or kind == "passed"
        ]
        return "upstream's tests: " + ", ".join(
            [*counted, *([f"{files} of {len(self.checks)} files not run here"] if files else [])]
        )


def select(
    layout: Layout, observed: plan.Observation, options: UpstreamOptions, known: Rules
) -> Selection:
    """Find the changes against the pin and decide what to run.

    Raises CheckoutError without a checkout, SettingsError for a path that does not exist.
    """
    base = observed.checkout.base
    if base is None:
        raise CheckoutError(
            f"vendor/vllm is {observed.checkout.detail}", hint=hints.text("inv.bootstrap")
        )
    changed = repository.differing(
        Git(layout.vllm), base, new_below=SOURCES, is_wanted=lambda path: not path.endswith(".pyc")
    )
    if options.all_of:
        chosen, named = _named(layout, options.all_of)
        found = upstream_selection.find(layout.vllm, chosen, known)
        tests = dict.fromkeys(named, "named on the command line") | {
            test.path: test.why for test in found.tests if test.path not in named
        }
        found = Reach(tuple(Reached(path, why) for path, why in tests.items()), found.unreached)
    else:
        chosen, found = changed, upstream_selection.find(layout.vllm, changed, known)
    decisions = {
        test.path: upstream_selection.decide_runnable(
            layout.vllm, test.path, known, device=observed.device, try_all=options.try_all
        )
        for test in found.tests
    }
    return Selection(base, changed, chosen, found, decisions)


def _named(layout: Layout, path_args: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the sources and the test files that the user named; of a folder all files below."""
    sources: dict[str, None] = {}
    tests: dict[str, None] = {}
    paths = [_in_tree(layout, path_arg) for path_arg in path_args]
    for path_arg, path in zip(path_args, paths, strict=True):
        place = layout.vllm / path
        if Path(path).is_absolute() or ".." in Path(path).parts or not place.exists():
            raise SettingsError(
                f"--all-of {path_arg}: there is no such path in vendor/vllm",
                hint=hints.text("checks.relative_paths"),
            )
        for found in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            file = str(found.relative_to(layout.vllm))
            is_test = file.startswith("tests/") and found.name.startswith("test_")
            (tests if is_test else sources)[file] = None
    # What tests share counts only if it is named itself, not as a part of a folder.
    kept = (name for name in sources if not name.startswith("tests/") or name in paths)
    return tuple(kept), tuple(tests)


def _in_tree(layout: Layout, path_arg: str) -> str:
    """Return a path relative to vendor/vllm; it may also be typed relative to the user's folder."""
    own, top = typed(path_arg).resolve(), layout.vllm.resolve()
    if own.exists() and own.is_relative_to(top):
        return own.relative_to(top).as_posix()
    return Path(path_arg.removeprefix("vendor/vllm/")).as_posix()


def show(selection: Selection, console: Console) -> None:
    """Print a line for each test file, and for each changed file that reaches none."""
    for test in selection.reach.tests:
        decision = selection.decisions[test.path]
        console.data(
            f"{'skip' if decision.how == 'not' else 'run':<6}{test.path}  {test.why};"
            f" {decision.why}"
        )
    for file in selection.reach.unreached:
        console.data(f"{'none':<6}{file.path}  {file.why}")


def run_tests(
    machine: Machine,
    selection: Selection,
    options: UpstreamOptions,
    site: Path,
    *,
    run_log: RunLog,
) -> Result:
    """Run the selected tests and judge each test file; print each verdict.

    `site` has the test requirements.
    """
    runner = _Runner(machine, site, options, run_log)
    outcomes = runner.all_of(selection)
    failed = tuple(outcome for outcome in outcomes if outcome.state == "failed")
    on_the_pin: tuple[upstream_trial.Outcome, ...] | None = None
    compared = ""
    if failed and upstream_trial.is_comparable(selection.changed):
        on_the_pin = runner.on_the_pin(failed, selection)
        compared = "; on the pin they pass or do not exist"
    elif failed:
        compared = "; not compared with the pin, because your compiled sources differ from it"
    found = upstream_trial.sort(outcomes, on_the_pin, is_online=options.is_online)
    checks = upstream_trial.checks(selection.reach.tests, selection.decisions, found)
    for check in checks:
        text = f"{check.evidence}  {check.seconds:.1f} s"
        run_log.console.row(check.row.state, check.identifier, text, least=NAME_WIDTH)
    return Result(checks, found, compared, runner.steps)


@dataclass(frozen=True)
class _LastRun:
    """What is read here of the record of the last run."""

    steps: dict[str, float] = field(default_factory=dict)


class _Runner:
    """The settings that all runs of pytest share."""

    def __init__(
        self,
        machine: Machine,
        site: Path,
        options: UpstreamOptions,
        run_log: RunLog,
    ) -> None:
        self._machine, self._layout, self._site = machine, machine.layout, site
        self._options, self._run_log = options, run_log
        last = records.read(self._layout.state / RECORD, _LastRun) or _LastRun()
        self._last = last.steps
        # Seconds of each run of pytest, for the next time.
        self.steps: dict[str, float] = {}

    def all_of(self, selection: Selection) -> tuple[upstream_trial.Outcome, ...]:
        outcomes: tuple[upstream_trial.Outcome, ...] = ()
        for how, marks in (("whole", ()), ("marked", ("-m", upstream_selection.MARKER))):
            if files := selection.files(how):  # type: ignore[arg-type]
                outcomes += self._run(f"tests ({how})", self._layout.vllm, files, marks)
        return outcomes

    def on_the_pin(
        self, failed: tuple[upstream_trial.Outcome, ...], selection: Selection
    ) -> tuple[upstream_trial.Outcome, ...]:
        """Return the pin's outcomes of the tests that failed."""
        if not selection.changed:
            return failed
        with upstream_trial.tree(self._layout, selection.base) as folder:
            files, args = upstream_trial.again(failed, folder)
            # The user's -x would leave tests out, and they would count as passed on the pin.
            args = ("--maxfail=0", *args)
            return self._run("the same on the pin", folder, files, args) if files else ()

    def _run(
        self, title: str, tree: Path, files: Sequence[str], pytest_args: tuple[str, ...]
    ) -> tuple[upstream_trial.Outcome, ...]:
        given = {} if self._options.is_online else dict.fromkeys(OFFLINE, "1")
        # The pin's tree must come before the editable install.
        given["PYTHONPATH"] = ":".join(
            str(path)
            for path in ((self._site,) if tree == self._layout.vllm else (tree, self._site))
        )
        variables = built_environment(self._machine, "upstream", given=given)
        place = upstream_trial.Place(
            tree,
            self._layout.environment_python,
            variables,
            upstream_trial.needs_folder(self._layout) / "chosen.txt",
        )
        with self._run_log.console.step(title, least=NAME_WIDTH) as view:
            self._run_log.phase(title, view)
            view.last = f"last time {self._last[title]:.0f} s  " if title in self._last else ""
            view.line("")
            began = time.monotonic()
            # On the pin our arguments come last and win, else the user's.
            ordered = (
                (*pytest_args, *self._options.pytest_args)
                if tree == self._layout.vllm
                else (*self._options.pytest_args, *pytest_args)
            )
            outcomes = upstream_trial.run(
                place, files, ordered, timeout_s=self._options.timeout_s, run_log=self._run_log
            )
            self.steps[title] = round(time.monotonic() - began, 2)
            view.reason = f"{len(files)} files, {len(outcomes)} tests"
        self._run_log.step = None
        return outcomes


def judge(result: Result, *, log: str | None) -> None:
    """Raise SmokeError with one line for each test that fails here and not on the pin."""
    lines = tuple(problem for check in result.checks for problem in check.problems)
    if lines:
        raise SmokeError(
            f"{len(lines)} of {result.count} of upstream's tests failed{result.compared}",
            hint=hints.text("checks.only_named"),
            details=(*lines, *((f"log: {log}",) if log else ())),
        )


def compose_record(
    result: Result,
    selection: Selection,
    observed: plan.Observation,
    *,
    tree: smoke.Tree,
    seconds: float,
) -> dict[str, object]:
    """Return the record; if no test ended by itself, as without a GPU, it is `skipped`."""
    built, torch = observed.kernels.recorded, observed.torch
    versions = {
        "vllm": {"version": built.outcome.get("version") if built else None},
        "torch": {"version": torch.version, "cuda": torch.cuda} if torch else None,
        "python": observed.python.version if observed.python else None,
    }
    document = smoke.compose(
        result.checks,
        level="upstream",
        tree=tree,
        machine=observed.machine.record(),
        parity=versions,
        seconds=seconds,
    )
    if all(check.verdict == "skipped" for check in result.checks):
        document["verdict"] = "skipped"
    found = result.found
    return document | {
        "changed": list(selection.chosen),
        "steps": dict(result.steps),
        "unreached": {file.path: file.why for file in selection.reach.unreached},
        "tests": {
            "passed": len(found.passed),
            "failed": len(found.own),
            "skipped": len(found.skipped),
            "hub": len(found.hub),
            "pin": len(found.pin),
        },
    }


def run(
    layout: Layout,
    settings: Settings,
    options: UpstreamOptions,
    *,
    console: Console,
    json_file: Path | None,
    is_list: bool,
) -> None:
    """Run vLLM's own tests that the change reaches; print and keep the record.

    Raises SmokeError if a test fails or nothing is built.
    """
    from workspace.install.status import require_built
    from workspace.machine import check

    started, known = time.monotonic(), upstream_selection.rules()
    machine = Machine(layout, settings)
    observed = plan.observe_on(machine) if is_list else require_built(machine)
    if not is_list:
        check.require(observed.machine, console=console, device=observed.device)
    selection = select(layout, observed, options, known)
    if not _report_selection(selection, observed.pin.tag, console, is_list=is_list):
        return
    # The tree must not change while the tests run.
    with stages.locked(layout, settings, "nox -s upstream", console=console) as run_log:
        tree = smoke.tree_of(layout, observed)
        site = _install_needs(layout, settings, known, device=observed.device, run_log=run_log)
        result = run_tests(observed.machine, selection, options, site, run_log=run_log)
        if smoke.tree_of(layout, plan.observe(layout, settings)) != tree:
            raise SmokeError(
                "vendor/vllm changed while the tests ran", hint=hints.text("nox.upstream")
            )
        document = compose_record(
            result,
            selection,
            observed,
            tree=tree,
            seconds=time.monotonic() - started,
        )
        smoke.write_record(layout.state / RECORD, document, console=console, json_file=json_file)
        judge(result, log=layout.relative(run_log.path) if run_log.path else None)
    console.info(f"{result.summary} in {time.monotonic() - started:.1f} s")


def _report_selection(selection: Selection, tag: str, console: Console, *, is_list: bool) -> bool:
    """Print what the change does not reach, or the list; return whether tests must run."""
    if not selection.chosen and not selection.reach.tests:
        console.info(f"vendor/vllm is the same as {tag}: no change can reach a test\n{_CHOOSE}")
        return False
    if is_list:
        show(selection, console)
        return False
    for file in selection.reach.unreached:
        console.row(State.SKIPPED, file.path, f"reaches no test: {file.why}", least=NAME_WIDTH)
    if not selection.reach.tests:
        console.info(
            "the change reaches none of upstream's tests; ./scripts/nox -s smoke judges what"
            f" they do not cover\n{_CHOOSE}"
        )
    return bool(selection.reach.tests)


def _install_needs(
    layout: Layout, settings: Settings, known: Rules, *, device: str, run_log: RunLog
) -> Path:
    with run_log.console.step("test requirements", least=NAME_WIDTH) as view:
        run_log.phase("test requirements", view)
        site, view.reason = upstream_trial.install_needs(
            layout, settings, known, device=device, run_log=run_log
        )
    return site
