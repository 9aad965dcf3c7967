"""The sequence of `nox -s upstream`: what changed, what it reaches, what of that runs here, the run itself, and the pin's word on what failed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.build import plan
from workspace.core.console import Console, State
from workspace.core.errors import CheckoutError, SettingsError, SmokeError
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.engine import surroundings
from workspace.source.git import Git, differing
from workspace.upstream import needs, pinned, reach, runnable, trial, verdict
from workspace.upstream.reach import Reach, Reached, Rules
from workspace.upstream.runnable import Decision
from workspace.upstream.verdict import FileCheck, Sorted

# Where new files are looked for (differing.changed).
SOURCES = ("vllm", "tests", "csrc", "cmake")
# As upstream's own job for CPUs sets them (.buildkite/scripts/hardware_ci/run-cpu-test.sh), with little memory.
ENVIRONMENT: Mapping[str, str] = {"VLLM_CPU_CI_ENV": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
OFFLINE: Mapping[str, str] = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
# Seconds for a whole run of pytest: the folder that a change reaches most of, vllm/v1/core, takes minutes on two cores.
TIMEOUT_S = 7200.0
NAME_WIDTH = 44
_STATES: Mapping[str, State] = {"pass": "ok", "fail": "FAIL", "skipped": "skipped"}


@dataclass(frozen=True)
class Asked:
    """What the user wants. `all_of` are paths taken as if they had changed; `words` go to pytest; `timeout_s` bounds each of its runs.

    `try_all` also runs what upstream runs on GPUs only, `is_online` lets tests ask the hub.
    """

    all_of: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    timeout_s: float = TIMEOUT_S
    try_all: bool = False
    is_online: bool = False


@dataclass(frozen=True)
class Selection:
    """What is to be run: what differs from the pin `base`, what was chosen by it or by the user, and how each test file is run here."""

    base: str
    changed: tuple[str, ...]
    chosen: tuple[str, ...]
    reach: Reach
    decisions: Mapping[str, Decision]

    def files(self, how: runnable.How) -> tuple[str, ...]:
        return tuple(test.path for test in self.reach.tests if self.decisions[test.path].how == how)


@dataclass(frozen=True)
class Result:
    """What came of it: a check for each test file, the outcomes that they are made of, and a word on the comparison with the pin."""

    checks: tuple[FileCheck, ...]
    found: Sorted
    compared: str

    @property
    def count(self) -> int:
        """How many tests came to an end of their own."""
        return sum(map(len, (self.found.passed, self.found.pin, self.found.own)))

    @property
    def said(self) -> str:
        kinds = {"passed": self.found.passed, "skipped": self.found.skipped, "need the hub": self.found.hub, "fail on the pin too": self.found.pin}
        files = sum(check.evidence.startswith(verdict.NOT_RUN) for check in self.checks)
        counted = [f"{len(found)} {kind}" for kind, found in kinds.items() if found or kind == "passed"]
        return "upstream's tests: " + ", ".join([*counted, *([f"{files} of {len(self.checks)} files not run here"] if files else [])])


def select(layout: Layout, observed: plan.Observation, asked: Asked, known: Rules) -> Selection:
    """Look what differs from the pin and decide. Raises CheckoutError without a checkout, SettingsError for a path that is not there."""
    base = observed.checkout.base
    if base is None:
        raise CheckoutError(f"vendor/vllm is {observed.checkout.detail}", hint="./scripts/inv bootstrap")
    changed = differing.changed(Git(layout.vllm), base, new_below=SOURCES, is_wanted=lambda path: not path.endswith(".pyc"))
    if asked.all_of:
        chosen, named = _named(layout, asked.all_of)
        found = reach.find(layout.vllm, chosen, known)
        tests = dict.fromkeys(named, "named on the command line") | {test.path: test.why for test in found.tests if test.path not in named}
        found = Reach(tuple(Reached(path, why) for path, why in tests.items()), found.unreached)
    else:
        chosen, found = changed, reach.find(layout.vllm, changed, known)
    lists = runnable.cpu_lists(layout.vllm)
    decisions = {test.path: runnable.decide(layout.vllm, test.path, lists, known, device=observed.device, try_all=asked.try_all) for test in found.tests}
    return Selection(base, changed, chosen, found, decisions)


def _named(layout: Layout, words: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sources and the test files that the user named, by a path in the tree or in the clone; of a folder all that lies below."""
    sources: dict[str, None] = {}
    tests: dict[str, None] = {}
    for word in words:
        path = Path(word.removeprefix("vendor/vllm/")).as_posix()
        place = layout.vllm / path
        if Path(path).is_absolute() or ".." in Path(path).parts or not place.exists():
            raise SettingsError(f"--all-of {word}: there is no such path in vendor/vllm", hint="paths are those of the tree: --all-of vllm/sampling_params.py")
        files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
        for file in (str(file.relative_to(layout.vllm)) for file in files):
            (tests if file.startswith("tests/") and Path(file).name.startswith("test_") else sources)[file] = None
    return tuple(name for name in sources if not name.startswith("tests/") or name in words), tuple(tests)


def show(selection: Selection, console: Console) -> None:
    """Print a line for each test file and for each changed file that reaches none, for `--list`."""
    for test in selection.reach.tests:
        decision = selection.decisions[test.path]
        console.data(f"{'skip' if decision.how == 'not' else 'run':<6}{test.path}  {test.why}; {decision.why}")
    for one in selection.reach.unreached:
        console.data(f"{'none':<6}{one.path}  {one.why}")


def run(layout: Layout, settings: Settings, observed: plan.Observation, selection: Selection, asked: Asked, known: Rules, *, journal: Journal) -> Result:
    """Run what runs here and judge each test file, each shown."""
    with journal.console.step("test requirements".ljust(NAME_WIDTH)) as view:
        journal.phase("test requirements", view)
        site, view.reason = needs.put(layout, settings, known, device=observed.device, journal=journal)
    runner = _Runner(layout, settings, site, asked, journal)
    outcomes = runner.all_of(selection)
    failed = tuple(one for one in outcomes if one.state == "failed")
    there: tuple[trial.Outcome, ...] | None = None
    compared = ""
    if failed and pinned.is_comparable(selection.changed):
        there, compared = runner.on_the_pin(failed, selection), "; on the pin they pass, or are not there"
    elif failed:
        compared = "; not compared with the pin, from whose compiled sources yours differ"
    found = verdict.sort(outcomes, there, is_online=asked.is_online)
    checks = verdict.checks(selection.reach.tests, selection.decisions, found)
    for check in checks:
        journal.console.row(_STATES[check.verdict], f"{check.identifier} ".ljust(NAME_WIDTH), f"{check.evidence}  {check.seconds:.1f} s")
    return Result(checks, found, compared)


class _Runner:
    """What all runs of pytest share."""

    def __init__(self, layout: Layout, settings: Settings, site: Path, asked: Asked, journal: Journal) -> None:
        self._layout, self._settings, self._site, self._asked, self._journal = layout, settings, site, asked, journal

    def all_of(self, selection: Selection) -> tuple[trial.Outcome, ...]:
        outcomes: tuple[trial.Outcome, ...] = ()
        for how, marks in (("whole", ()), ("marked", ("-m", runnable.MARKER))):
            if files := selection.files(how):  # type: ignore[arg-type]
                outcomes += self._run(f"tests ({how})", self._layout.vllm, files, marks)
        return outcomes

    def on_the_pin(self, failed: tuple[trial.Outcome, ...], selection: Selection) -> tuple[trial.Outcome, ...]:
        """What becomes on the pin of the tests that failed; those that are known to ask the hub there are not asked again."""
        there = failed
        if selection.changed:
            known = frozenset() if self._asked.is_online else pinned.hub_tests(self._layout, selection.base)
            there = tuple(one for one in failed if one.asks_hub and one.node in known)
            with pinned.tree(self._layout, selection.base) as folder:
                files, words = pinned.again([one for one in failed if one not in there], folder)
                # The user's -x would leave tests out, and they would count as passed there.
                there += self._run("the same on the pin", folder, files, ("--maxfail=0", *words)) if files else ()
        if not self._asked.is_online:
            pinned.keep_hub_tests(self._layout, selection.base, there)
        return there

    def _run(self, title: str, tree: Path, files: Sequence[str], words: tuple[str, ...]) -> tuple[trial.Outcome, ...]:
        more = {**ENVIRONMENT, **({} if self._asked.is_online else OFFLINE)}
        # The pin's tree goes before the editable install.
        more["PYTHONPATH"] = ":".join(str(path) for path in ((self._site,) if tree == self._layout.vllm else (tree, self._site)))
        variables = surroundings.variables(self._layout, self._settings, more=more)
        place = trial.Place(tree, self._layout.environment_python, variables, needs.place(self._layout) / "chosen.txt")
        with self._journal.console.step(title.ljust(NAME_WIDTH)) as view:
            self._journal.phase(title, view)
            # On the pin ours come last, and so hold; else the user's do.
            said = (*words, *self._asked.words) if tree == self._layout.vllm else (*self._asked.words, *words)
            outcomes = trial.run(place, files, said, timeout_s=self._asked.timeout_s, journal=self._journal)
            view.reason = f"{len(files)} files, {len(outcomes)} tests"
        self._journal.step = None
        return outcomes


def judge(result: Result, *, log: str | None) -> None:
    """Raise SmokeError with one line for each test that failed and does not fail on the pin."""
    lines = tuple(problem for check in result.checks for problem in check.problems)
    if lines:
        raise SmokeError(
            f"{len(lines)} of {result.count} of upstream's tests failed{result.compared}",
            hint="./scripts/nox -s upstream -- -- -x -l -k NAME    runs tests of that name alone, and shows their values",
            details=(*lines, *((f"log: {log}",) if log else ())),
        )
