"""One run of pytest over upstream's test files, its verdicts, and the same run on the pin's tree.

It runs with the built interpreter. Failures that also occur on the pin do not count against the
change. What the tests need beside the built environment is installed into a folder of its own.
"""

import contextlib
import hashlib
import os
import re
import shutil
import signal
import tempfile
import xml.etree.ElementTree as xml
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from workspace.checks.registry import Check, Verdict
from workspace.checks.upstream_selection import Decision, Reached, Rules
from workspace.core import hints, process
from workspace.core.child_variables import with_given
from workspace.core.console import RunLog
from workspace.core.errors import SmokeError
from workspace.core.files import write_atomic
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install.plan import COMPILED_SOURCES
from workspace.machine import failures, interpreter
from workspace.repo.git import Git, remotes, worktree

# Seconds for one test: upstream's slowest takes one minute on two CPU cores. Arguments after -- may
# change it.
TEST_TIMEOUT_S = 300
# A separate folder: the tests can import everything in it.
INSIDE = Path(__file__).with_name("inside")
_PLUGIN = "vllm_workspace_observer"
_FAILED_ITSELF, _NOTHING_TO_RUN = (
    re.compile(r"\S+ exited with 3\b"),
    re.compile(r"\S+ exited with 5\b"),
)
State = Literal["passed", "failed", "skipped"]
NOT_RUN = "not run: "
_SHOWN = 160


@dataclass(frozen=True)
class Place:
    """A tree to test: its Python, its variables, and the path for the list of files."""

    tree: Path
    python: Path
    variables: Mapping[str, str]
    listed: Path


@dataclass(frozen=True)
class Outcome:
    """The outcome of one test, or of a file that could not be collected.

    `file` is relative to the tree; `message` is the failure, or why it was skipped. `asks_hub`: it
    failed because a model, a tokenizer or a data set is not on this disk.
    """

    node: str
    file: str
    state: State
    message: str
    seconds: float
    asks_hub: bool = False


class _OutOfTime(Exception):
    pass


def run(
    place: Place,
    files: Sequence[str],
    pytest_args: Sequence[str],
    *,
    timeout_s: float,
    run_log: RunLog,
) -> tuple[Outcome, ...]:
    """Run the tests of these files, relative to the tree, with further arguments for pytest.

    Raises SmokeError if pytest itself fails, even after it reported tests, and if it has not ended
    after `timeout_s` seconds; no process is left then.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as folder:
        report = Path(folder) / "junit.xml"
        # A file keeps the command readable. Upstream also runs from tests/, where some tests look
        # for files.
        write_atomic(
            place.listed, "".join(f"{file.removeprefix('tests/')}\n" for file in files).encode()
        )
        failure = _run_pytest(
            place, _argv(place, report, pytest_args), timeout_s=timeout_s, run_log=run_log
        )
        if not report.is_file():
            raise failure or SmokeError(
                "pytest wrote no report", hint=hints.text("core.read_log", path=run_log.path)
            )
        outcomes = read(report.read_bytes(), place.tree)
    is_explained = any(outcome.state == "failed" for outcome in outcomes) or (
        not outcomes and _NOTHING_TO_RUN.match(str(failure))
    )
    if failure and (_FAILED_ITSELF.match(str(failure)) or not is_explained):
        raise failure
    return outcomes


def _argv(place: Place, report: Path, pytest_args: Sequence[str]) -> list[process.Argument]:
    options = [
        *("-p", "no:cacheprovider"),
        *("-n", "1"),
        "-q",
        "--continue-on-collection-errors",
        f"--timeout={TEST_TIMEOUT_S}",
        f"--basetemp={report.parent}/t",
        # Without it, pytest takes a tree whose pyproject.toml does not mention pytest for a part
        # of this clone.
        f"--rootdir={place.tree}",
        *("-p", _PLUGIN),
        *("-o", "junit_family=xunit1"),
        f"--junit-xml={report}",
    ]
    # -P: files in tests/ must not be imported in place of libraries.
    return [place.python, "-P", "-m", "pytest", *options, *pytest_args, f"@{place.listed}"]


def _run_pytest(
    place: Place, argv: list[process.Argument], *, timeout_s: float, run_log: RunLog
) -> SmokeError | None:
    """Run pytest; return the error of its status. Raises SmokeError at the time limit."""
    path = ":".join(filter(None, (place.variables.get("PYTHONPATH"), str(INSIDE))))
    try:
        with _limited(timeout_s):
            process.run(
                argv,
                env=with_given(place.variables, "upstream", {"PYTHONPATH": path}),
                cwd=place.tree / "tests",
                run_log=run_log,
                failure=SmokeError,
                hint=hints.text("checks.pytest_arguments"),
                judge=failures.ending,
            )
    except _OutOfTime:
        raise SmokeError(
            f"upstream's tests had not ended after {timeout_s:g} s and were ended",
            hint=hints.text("checks.timeout_or_fewer"),
            details=(f"log: {run_log.path}",),
        ) from None
    except SmokeError as exc:
        # pytest also exits with a status other than 0 if tests fail, or if it collects none.
        return exc
    return None


def read(report: bytes, tree: Path) -> tuple[Outcome, ...]:
    """Read pytest's JUnit file; a test that failed stays failed, whatever its teardown did."""
    outcomes: dict[str, Outcome] = {}
    for case in xml.fromstring(report).iter("testcase"):
        if not case.get("name"):
            # An interrupted test leaves an entry without a name.
            continue
        file, node = _named(case.get("classname", ""), case.get("name", ""), tree)
        state, message = _state(case)
        former = outcomes.get(node)
        seconds = float(case.get("time") or 0.0) + (former.seconds if former else 0.0)
        asks_hub = state == "failed" and case.get("url") == "hub"
        if former and former.state == "failed":
            # Every failure of the test must be the hub's.
            state, message, asks_hub = (
                former.state,
                former.message,
                former.asks_hub and (asks_hub or state != "failed"),
            )
        outcomes[node] = Outcome(node, file, state, message, seconds, asks_hub)
    return tuple(outcomes.values())


def _named(classname: str, name: str, tree: Path) -> tuple[str, str]:
    """Return the file and the node of a test.

    A file that could not be collected has its dotted path as its name, and no class.
    """
    parts = (classname or name).split(".")
    for end in range(len(parts), 0, -1):
        file = "/".join(parts[:end]) + ".py"
        if (tree / file).is_file():
            return file, "::".join([file, *parts[end:], *([name] if classname else [])])
    return classname or name, f"{classname}::{name}"


def _state(case: xml.Element) -> tuple[State, str]:
    for kind, state in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(kind)
        if found is not None:
            message = found.get("message") or ""
            # For a collection failure the message is generic; the last line of the text is the
            # exception.
            if message == "collection failure":
                message = (found.text or "").strip().rpartition("\n")[2].removeprefix("E").strip()
            return state, message  # type: ignore[return-value]
    return "passed", ""


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise _OutOfTime in the block after this many seconds."""

    def end(_: int, __: FrameType | None) -> None:
        raise _OutOfTime

    former = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


@dataclass(frozen=True)
class FileCheck(Check):
    """A check of one test file; its meaning is why the file was chosen."""

    chosen: str = ""

    @property
    def meaning(self) -> str:
        return self.chosen


@dataclass(frozen=True)
class Sorted:
    """Outcomes in groups: `own` are the change's failures, `pin` those that fail on the pin too.

    `hub` are the failures for lack of the hub.
    """

    passed: tuple[Outcome, ...]
    skipped: tuple[Outcome, ...]
    hub: tuple[Outcome, ...]
    pin: tuple[Outcome, ...]
    own: tuple[Outcome, ...]

    def of(self, file: str) -> "Sorted":
        """Return the outcomes of one file."""
        groups = (self.passed, self.skipped, self.hub, self.pin, self.own)
        return Sorted(
            *(tuple(outcome for outcome in group if outcome.file == file) for group in groups)
        )


def sort(
    outcomes: Iterable[Outcome], on_the_pin: Iterable[Outcome] | None, *, is_online: bool
) -> Sorted:
    """Sort outcomes into groups.

    `on_the_pin` are outcomes of the same tests on the pin, None if nothing was compared. A test
    that is not among them passes there, or does not exist there.

    A change can make a test ask the hub for what was a folder on this disk. So the pin's outcome
    also decides about hub failures, if there is one.
    """
    failed_there = {outcome.node for outcome in on_the_pin or () if outcome.state == "failed"}
    groups: dict[str, list[Outcome]] = {
        "passed": [],
        "skipped": [],
        "hub": [],
        "pin": [],
        "own": [],
    }
    for outcome in outcomes:
        name = {"passed": "passed", "skipped": "skipped"}.get(outcome.state, "")
        is_hub = (
            outcome.asks_hub
            and not is_online
            and (on_the_pin is None or outcome.node in failed_there)
        )
        name = name or ("hub" if is_hub else "pin" if outcome.node in failed_there else "own")
        groups[name].append(outcome)
    return Sorted(**{name: tuple(found) for name, found in groups.items()})


def checks(
    tests: Sequence[Reached], decisions: Mapping[str, Decision], found: Sorted
) -> tuple[FileCheck, ...]:
    """Judge each chosen test file, and any other file that ran.

    A file that does not run is skipped, with the reason.
    """
    chosen = [(test, decisions[test.path]) for test in tests]
    ran = dict.fromkeys(
        outcome.file
        for group in (found.own, found.pin, found.hub, found.passed, found.skipped)
        for outcome in group
    )
    others = [
        (Reached(file, "named in the arguments for pytest"), Decision("whole", ""))
        for file in ran
        if file not in decisions
    ]
    return tuple(
        _check(test, decision, found.of(test.path)) for test, decision in (*chosen, *others)
    )


def _check(test: Reached, decision: Decision, found: Sorted) -> FileCheck:
    if decision.how == "not":
        return FileCheck(test.path, "skipped", f"{NOT_RUN}{decision.why}", 0.0, chosen=test.why)
    everything = (*found.passed, *found.skipped, *found.hub, *found.pin, *found.own)
    seconds = sum(outcome.seconds for outcome in everything)
    if not everything:
        return FileCheck(
            test.path,
            "skipped",
            f"none of its tests ran ({decision.why})",
            seconds,
            chosen=test.why,
        )
    counted = [
        f"{len(found.own)} failed" if found.own else "",
        f"{len(found.passed)} passed" if found.passed else "",
        f"{len(found.skipped)} skipped" if found.skipped else "",
        f"{len(found.hub)} need the hub" if found.hub else "",
        (
            f"{len(found.pin)} fail on the pin too, so the change is not the cause"
            if found.pin
            else ""
        ),
    ]
    evidence = ", ".join(part for part in counted if part)
    if found.pin:
        evidence += f": {_short(found.pin[0].message)}"
    # If all tests of a file are skipped for one reason, name it.
    reasons = {outcome.message for outcome in found.skipped}
    if len(found.skipped) == len(everything) and len(reasons) == 1:
        evidence += f": {_short(reasons.pop())}"
    problems = tuple(
        f"{outcome.node.removeprefix('tests/')}: {_short(outcome.message)}" for outcome in found.own
    )
    verdict: Verdict = "fail" if found.own else "pass" if found.passed else "skipped"
    return FileCheck(test.path, verdict, evidence, seconds, problems, test.why)


def _short(message: str) -> str:
    line = next((line.strip() for line in message.splitlines() if line.strip()), "no message")
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}…"


_PINNED = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+$", re.MULTILINE)
_NEVER = 'sys_platform == "never"'
# With more names whole files run: pytest nests an expression once for each name.
_MOST_NAMES = 200


def needs_folder(layout: Layout) -> Path:
    """Return the folder for all files of upstream's tests except their record."""
    return layout.state / "upstream-tests"


def install_needs(
    layout: Layout, settings: Settings, known: Rules, *, device: str, run_log: RunLog
) -> tuple[Path, str]:
    """Return the folder of test requirements for PYTHONPATH, and a note about it.

    An existing folder is used without asking an index. Raises SourceError if the index cannot be
    reached or lacks a version, and BuildError.
    """
    installed = interpreter.installed(layout)
    wanted = [name for name in known.requirements if name not in installed]
    pinned = _pinned(layout.vllm, device)
    versions = [f"{name}=={version}" for name, version in installed.items()]
    lines = [*wanted, "", *pinned, "", *versions, str(interpreter.site_packages(layout))]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    folder = needs_folder(layout) / f"site-{digest[:12]}"
    if folder.is_dir():
        return folder, f"{len(wanted)} test requirements are installed"
    # Delete old folders last: without an index, a tree that goes back still needs its own.
    former = [found for found in needs_folder(layout).glob("site-*") if found.suffix != ".new"]
    new = folder.with_name(f"{folder.name}.new")
    for half_made in needs_folder(layout).glob("site-*.new"):
        shutil.rmtree(half_made)
    new.mkdir(parents=True)
    if wanted:
        interpreter.install(
            layout,
            settings,
            ["--target", str(new), *wanted],
            run_log=run_log,
            constraints=pinned,
            overrides=tuple(f"{name} ; {_NEVER}" for name in installed),
        )
    # uv does not sync: after a power cut, empty files would have their final name.
    os.sync()
    new.rename(folder)
    for old in former:
        shutil.rmtree(old)
    return folder, f"{', '.join(wanted)} in {layout.relative(folder)}"


def _pinned(tree: Path, device: str) -> tuple[str, ...]:
    """Return the exact versions that the tree tests with on this device.

    Without a list for it (vLLM 0.24), those for a GPU.
    """
    for name in (device, "cuda"):
        file = tree / "requirements" / "test" / f"{name}.txt"
        if file.is_file():
            return tuple(_PINNED.findall(file.read_text(encoding="utf-8")))
    return ()


def is_comparable(changed: Sequence[str]) -> bool:
    """Return whether the pin would have the same compiled libraries."""
    return not any(
        path == source or path.startswith(f"{source}/")
        for path in changed
        for source in COMPILED_SOURCES
    )


@contextlib.contextmanager
def tree(layout: Layout, base: str) -> Iterator[Path]:
    """Write out the tree of the commit `base`, with links to the working tree's build products.

    It is deleted at the end of the block.
    """
    folder = needs_folder(layout) / "pin"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        git = Git(layout.vllm)
        remotes.write_tree(git, base, folder)
        for path in worktree.products(git, "vllm"):
            target = folder / path
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(os.path.realpath(layout.vllm / path))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def again(failed: Sequence[Outcome], folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the files to run again, and pytest's arguments that select the tests in them.

    Tests are selected by name, because a node that does not exist would end the run.
    """
    files = tuple(
        dict.fromkeys(outcome.file for outcome in failed if (folder / outcome.file).is_file())
    )
    names = tuple(dict.fromkeys(_function(outcome) for outcome in failed))
    is_by_name = len(names) <= _MOST_NAMES and all(name.isidentifier() for name in names)
    return files, ("-k", " or ".join(names)) if is_by_name else ()


def _function(outcome: Outcome) -> str:
    """Return the name of a test's function, empty for a file that could not be collected."""
    return outcome.node.removeprefix(outcome.file).partition("[")[0].rpartition("::")[2]
