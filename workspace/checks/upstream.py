"""The door of upstream's tests: `python -m workspace.upstream`, run by `nox -s upstream` with the
tool environment's Python.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.checks import registry, upstream_pinned, upstream_selection, upstream_trial
from workspace.checks.upstream_selection import Decision, Reach, Reached, Rules
from workspace.checks.upstream_trial import FileCheck, Sorted
from workspace.core import lock
from workspace.core.console import Console, State
from workspace.core.errors import CheckoutError, SettingsError, SmokeError
from workspace.core.files import write_atomic
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import plan
from workspace.machine.hardware import Machine
from workspace.repo.git import Git, repository
from workspace.server.command import built_environment

# Where new files are looked for (differing.changed).
SOURCES = ("vllm", "tests", "csrc", "cmake")
# As upstream's own job for CPUs sets them (.buildkite/scripts/hardware_ci/run-cpu-test.sh), with
# little memory.
ENVIRONMENT: Mapping[str, str] = {
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
OFFLINE: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
# Seconds for a whole run of pytest: the folder that a change reaches most of, vllm/v1/core, takes
# minutes on two cores.
TIMEOUT_S = 7200.0
NAME_WIDTH = 44
_STATES: Mapping[str, State] = {"pass": "ok", "fail": "FAIL", "skipped": "skipped"}


@dataclass(frozen=True)
class UpstreamOptions:
    """What the user wants. `all_of` are paths taken as if they had changed; `words` go to pytest;
    `timeout_s` bounds each of its runs.

    `try_all` also runs what upstream runs on GPUs only, `is_online` lets tests ask the hub.
    """

    all_of: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    timeout_s: float = TIMEOUT_S
    try_all: bool = False
    is_online: bool = False


@dataclass(frozen=True)
class Selection:
    """What is to be run: what differs from the pin `base`, what was chosen by it or by the user,
    and how each test file is run here.
    """

    base: str
    changed: tuple[str, ...]
    chosen: tuple[str, ...]
    reach: Reach
    decisions: Mapping[str, Decision]

    def files(self, how: upstream_selection.How) -> tuple[str, ...]:
        return tuple(test.path for test in self.reach.tests if self.decisions[test.path].how == how)


@dataclass(frozen=True)
class Result:
    """What came of it: a check for each test file, the outcomes that they are made of, and a word
    on the comparison with the pin.
    """

    checks: tuple[FileCheck, ...]
    found: Sorted
    compared: str

    @property
    def count(self) -> int:
        """How many tests came to an end of their own."""
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
    """Look what differs from the pin and decide. Raises CheckoutError without a checkout,
    SettingsError for a path that is not there.
    """
    base = observed.checkout.base
    if base is None:
        raise CheckoutError(
            f"vendor/vllm is {observed.checkout.detail}", hint="./scripts/inv bootstrap"
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
    lists = upstream_selection.cpu_lists(layout.vllm)
    decisions = {
        test.path: upstream_selection.decide_runnable(
            layout.vllm, test.path, lists, known, device=observed.device, try_all=options.try_all
        )
        for test in found.tests
    }
    return Selection(base, changed, chosen, found, decisions)


def _named(layout: Layout, words: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sources and the test files that the user named, by a path in the tree or in the clone; of
    a folder all that lies below.
    """
    sources: dict[str, None] = {}
    tests: dict[str, None] = {}
    for word in words:
        path = Path(word.removeprefix("vendor/vllm/")).as_posix()
        place = layout.vllm / path
        if Path(path).is_absolute() or ".." in Path(path).parts or not place.exists():
            raise SettingsError(
                f"--all-of {word}: there is no such path in vendor/vllm",
                hint="paths are those of the tree: --all-of vllm/sampling_params.py",
            )
        files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
        for file in (str(file.relative_to(layout.vllm)) for file in files):
            (
                tests
                if file.startswith("tests/") and Path(file).name.startswith("test_")
                else sources
            )[file] = None
    return tuple(name for name in sources if not name.startswith("tests/") or name in words), tuple(
        tests
    )


def show(selection: Selection, console: Console) -> None:
    """Print a line for each test file and for each changed file that reaches none, for `--list`."""
    for test in selection.reach.tests:
        decision = selection.decisions[test.path]
        console.data(
            f"{'skip' if decision.how == 'not' else 'run':<6}{test.path}  {test.why};"
            f" {decision.why}"
        )
    for one in selection.reach.unreached:
        console.data(f"{'none':<6}{one.path}  {one.why}")


def run_tests(
    layout: Layout,
    settings: Settings,
    observed: plan.Observation,
    selection: Selection,
    options: UpstreamOptions,
    known: Rules,
    *,
    run_log: RunLog,
) -> Result:
    """Run what runs here and judge each test file, each shown."""
    with run_log.console.step("test requirements".ljust(NAME_WIDTH)) as view:
        run_log.phase("test requirements", view)
        site, view.reason = upstream_pinned.install_needs(
            layout, settings, known, device=observed.device, run_log=run_log
        )
    runner = _Runner(layout, settings, site, options, run_log)
    outcomes = runner.all_of(selection)
    failed = tuple(one for one in outcomes if one.state == "failed")
    there: tuple[upstream_trial.Outcome, ...] | None = None
    compared = ""
    if failed and upstream_pinned.is_comparable(selection.changed):
        there, compared = (
            runner.on_the_pin(failed, selection),
            "; on the pin they pass, or are not there",
        )
    elif failed:
        compared = "; not compared with the pin, from whose compiled sources yours differ"
    found = upstream_trial.sort(outcomes, there, is_online=options.is_online)
    checks = upstream_trial.checks(selection.reach.tests, selection.decisions, found)
    for check in checks:
        run_log.console.row(
            _STATES[check.verdict],
            f"{check.identifier} ".ljust(NAME_WIDTH),
            f"{check.evidence}  {check.seconds:.1f} s",
        )
    return Result(checks, found, compared)


class _Runner:
    """What all runs of pytest share."""

    def __init__(
        self,
        layout: Layout,
        settings: Settings,
        site: Path,
        options: UpstreamOptions,
        run_log: RunLog,
    ) -> None:
        self._layout, self._settings, self._site, self._options, self._run_log = (
            layout,
            settings,
            site,
            options,
            run_log,
        )

    def all_of(self, selection: Selection) -> tuple[upstream_trial.Outcome, ...]:
        outcomes: tuple[upstream_trial.Outcome, ...] = ()
        for how, marks in (("whole", ()), ("marked", ("-m", upstream_selection.MARKER))):
            if files := selection.files(how):  # type: ignore[arg-type]
                outcomes += self._run(f"tests ({how})", self._layout.vllm, files, marks)
        return outcomes

    def on_the_pin(
        self, failed: tuple[upstream_trial.Outcome, ...], selection: Selection
    ) -> tuple[upstream_trial.Outcome, ...]:
        """What becomes on the pin of the tests that failed; those that are known to ask the hub
        there are not asked again.
        """
        there = failed
        if selection.changed:
            known = (
                frozenset()
                if self._options.is_online
                else upstream_pinned.hub_tests(self._layout, selection.base)
            )
            there = tuple(one for one in failed if one.asks_hub and one.node in known)
            with upstream_pinned.tree(self._layout, selection.base) as folder:
                files, words = upstream_pinned.again(
                    [one for one in failed if one not in there], folder
                )
                # The user's -x would leave tests out, and they would count as passed there.
                there += (
                    self._run("the same on the pin", folder, files, ("--maxfail=0", *words))
                    if files
                    else ()
                )
        if not self._options.is_online:
            upstream_pinned.keep_hub_tests(self._layout, selection.base, there)
        return there

    def _run(
        self, title: str, tree: Path, files: Sequence[str], words: tuple[str, ...]
    ) -> tuple[upstream_trial.Outcome, ...]:
        more = {**ENVIRONMENT, **({} if self._options.is_online else OFFLINE)}
        # The pin's tree goes before the editable install.
        more["PYTHONPATH"] = ":".join(
            str(path)
            for path in ((self._site,) if tree == self._layout.vllm else (tree, self._site))
        )
        variables = built_environment(self._layout, self._settings, more=more)
        place = upstream_trial.Place(
            tree,
            self._layout.environment_python,
            variables,
            upstream_pinned.needs_folder(self._layout) / "chosen.txt",
        )
        with self._run_log.console.step(title.ljust(NAME_WIDTH)) as view:
            self._run_log.phase(title, view)
            # On the pin ours come last, and so hold; else the user's do.
            said = (
                (*words, *self._options.words)
                if tree == self._layout.vllm
                else (*self._options.words, *words)
            )
            outcomes = upstream_trial.run(
                place, files, said, timeout_s=self._options.timeout_s, run_log=self._run_log
            )
            view.reason = f"{len(files)} files, {len(outcomes)} tests"
        self._run_log.step = None
        return outcomes


def judge(result: Result, *, log: str | None) -> None:
    """Raise SmokeError with one line for each test that failed and does not fail on the pin."""
    lines = tuple(problem for check in result.checks for problem in check.problems)
    if lines:
        raise SmokeError(
            f"{len(lines)} of {result.count} of upstream's tests failed{result.compared}",
            hint=(
                "./scripts/nox -s upstream -- -- -x -l -k NAME    runs tests of that name alone,"
                " and shows their values"
            ),
            details=(*lines, *((f"log: {log}",) if log else ())),
        )


def compose_record(
    result: Result,
    selection: Selection,
    observed: plan.Observation,
    *,
    tree: registry.Tree,
    machine: Machine,
    seconds: float,
) -> dict[str, object]:
    """Put the record together. Where no test came to an end, as without a GPU, its verdict is
    `skipped`.
    """
    built, torch = observed.kernels.recorded, observed.torch
    versions = {
        "vllm": {"version": built.outcome.get("version") if built else None},
        "torch": {"version": torch.version, "cuda": torch.cuda} if torch else None,
        "python": observed.python.version if observed.python else None,
    }
    document = registry.compose(
        result.checks,
        level="upstream",
        tree=tree,
        machine=machine,
        parity=versions,
        seconds=seconds,
    )
    if all(check.verdict == "skipped" for check in result.checks):
        document["verdict"] = "skipped"
    found = result.found
    return document | {
        "changed": list(selection.chosen),
        "unreached": {one.path: one.why for one in selection.reach.unreached},
        "tests": {
            "passed": len(found.passed),
            "failed": len(found.own),
            "skipped": len(found.skipped),
            "hub": len(found.hub),
            "pin": len(found.pin),
        },
    }


RECORD = "upstream.json"
_CHOOSE = (
    "./scripts/nox -s upstream -- --all-of vllm/sampling_params.py    runs what a file, or a"
    " folder, would reach; --all-of tests/config runs these"
)


def run(
    layout: Layout,
    settings: Settings,
    options: UpstreamOptions,
    *,
    console: Console,
    json_file: Path | None,
    is_list: bool,
) -> None:
    """Run vLLM's own tests that the change reaches; print and keep the record. Raises SmokeError
    where one fails, or nothing is built.
    """
    from workspace.checks import registry as smoke_record
    from workspace.checks import upstream_selection
    from workspace.install import plan
    from workspace.install.status import require_built
    from workspace.machine import check, hardware

    started, known = time.monotonic(), upstream_selection.rules()
    observed = plan.observe(layout, settings) if is_list else require_built(layout, settings)
    if not is_list:
        check.require(layout, settings, console=console, device=observed.device)
    selection = select(layout, observed, options, known)
    if not selection.chosen and not selection.reach.tests:
        console.info(
            f"vendor/vllm is as {observed.pin.tag} is: there is no change that a test could"
            f" reach\n{_CHOOSE}"
        )
        return
    if is_list:
        show(selection, console)
        return
    for one in selection.reach.unreached:
        console.row("skipped", one.path.ljust(NAME_WIDTH), f"reaches no test: {one.why}")
    if not selection.reach.tests:
        console.info(
            "what was changed reaches none of upstream's tests; ./scripts/nox -s smoke judges what"
            f" they do not\n{_CHOOSE}"
        )
        return
    # What is judged must not change meanwhile.
    with (
        lock.hold(layout.lock, verb="nox -s upstream") as held,
        RunLog(
            console, layout.logs, verb="upstream", secrets=settings.secrets, held=held
        ) as run_log,
    ):
        tree = smoke_record.tree_of(layout, observed)
        result = run_tests(layout, settings, observed, selection, options, known, run_log=run_log)
        if smoke_record.tree_of(layout, plan.observe(layout, settings)) != tree:
            raise SmokeError(
                "vendor/vllm was changed while it was judged", hint="./scripts/nox -s upstream"
            )
        seconds = time.monotonic() - started
        text = smoke_record.encode(
            compose_record(
                result,
                selection,
                observed,
                tree=tree,
                machine=hardware.observe(settings),
                seconds=seconds,
            )
        )
        write_atomic(layout.state / RECORD, f"{text}\n".encode())
        console.data(text)
        if json_file:
            write_atomic(json_file, f"{text}\n".encode())
        judge(result, log=layout.relative(run_log.path) if run_log.path else None)
    console.info(f"{result.summary} in {time.monotonic() - started:.1f} s")
