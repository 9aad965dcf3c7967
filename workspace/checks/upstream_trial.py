"""One run of pytest over files of upstream's tests, with the built interpreter, and what became of
each test.

pytest-xdist runs them in a process that may die, pytest-timeout ends the one that hangs; what
happened is read from pytest's own JUnit file, in which a plugin (inside/) has marked what asked the
hub.
"""

import contextlib
import re
import signal
import tempfile
import xml.etree.ElementTree as xml
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from workspace.checks.registry import Check
from workspace.checks.upstream_selection import Decision, Reached
from workspace.core import process
from workspace.core.errors import SmokeError
from workspace.core.files import write_atomic
from workspace.core.log import RunLog

# Seconds for one test: upstream's slowest on a CPU take one minute on two cores. Words after -- may
# say otherwise.
TEST_TIMEOUT_S = 300
# A folder of its own: all that lies in it can be imported by the tests.
INSIDE = Path(__file__).with_name("inside")
_PLUGIN = "vllm_workspace_observer"
_FAILED_ITSELF, _NOTHING_TO_RUN = (
    re.compile(r"\S+ exited with 3\b"),
    re.compile(r"\S+ exited with 5\b"),
)
State = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Place:
    """A tree whose tests are run: by which Python, with which variables, and where the list of
    files is written.
    """

    tree: Path
    python: Path
    variables: Mapping[str, str]
    listed: Path


@dataclass(frozen=True)
class Outcome:
    """What became of one test, or of a file that could not be collected. `file` is relative to the
    tree, `message` what failed, or why it was skipped.

    `asks_hub` says of a failure that a model, a tokenizer or a data set is not on this disk.
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
    place: Place, files: Sequence[str], words: Sequence[str], *, timeout_s: float, run_log: RunLog
) -> tuple[Outcome, ...]:
    """Run the tests of these files, relative to the tree; `words` go to pytest as they are.

    Raises SmokeError where pytest itself fails, whatever it has reported until then, and where it
    has not ended after `timeout_s` seconds: nothing of it is left then.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as folder:
        report = Path(folder) / "junit.xml"
        # As a file, for the sake of who reads the command. Upstream runs them from tests/ as well,
        # where some look for files.
        write_atomic(
            place.listed, "".join(f"{file.removeprefix('tests/')}\n" for file in files).encode()
        )
        ours = [
            "-p",
            "no:cacheprovider",
            "-n",
            "1",
            "-q",
            "--continue-on-collection-errors",
            f"--timeout={TEST_TIMEOUT_S}",
            f"--basetemp={folder}/t",
        ]
        # Else a tree whose pyproject.toml says nothing of pytest would be taken for a part of this
        # clone.
        form = [
            f"--rootdir={place.tree}",
            "-p",
            _PLUGIN,
            "-o",
            "junit_family=xunit1",
            f"--junit-xml={report}",
        ]
        # -P: what lies in tests/ is not to be imported as if it were a library.
        argv: list[process.Argument] = [
            place.python,
            "-P",
            "-m",
            "pytest",
            *ours,
            *form,
            *words,
            f"@{place.listed}",
        ]
        path = ":".join(filter(None, (place.variables.get("PYTHONPATH"), str(INSIDE))))
        variables = {**place.variables, "PYTHONPATH": path}
        trouble: SmokeError | None = None
        try:
            with _limited(timeout_s):
                process.run(
                    argv,
                    env=variables,
                    cwd=place.tree / "tests",
                    run_log=run_log,
                    failure=SmokeError,
                    hint="the words after -- go to pytest",
                )
        except _OutOfTime:
            raise SmokeError(
                f"upstream's tests had not ended after {timeout_s:g} s and were ended",
                hint="--timeout-s says how long they may take; -- -k WORD runs fewer of them",
                details=(f"log: {run_log.path}",),
            ) from None
        except SmokeError as exc:
            # A status other than 0 is also what failed tests give, or none that were collected.
            trouble = exc
        if not report.is_file():
            raise trouble or SmokeError("pytest wrote no report", hint=f"less {run_log.path}")
        outcomes = read(report.read_bytes(), place.tree)
    is_explained = any(one.state == "failed" for one in outcomes) or (
        not outcomes and _NOTHING_TO_RUN.match(str(trouble))
    )
    if trouble and (_FAILED_ITSELF.match(str(trouble)) or not is_explained):
        raise trouble
    return outcomes


def read(report: bytes, tree: Path) -> tuple[Outcome, ...]:
    """Read a JUnit file of pytest. A test that failed and could not be cleared up after is one that
    failed.
    """
    outcomes: dict[str, Outcome] = {}
    for case in xml.fromstring(report).iter("testcase"):
        if not case.get("name"):
            # What an interrupted test leaves.
            continue
        file, node = _named(case.get("classname", ""), case.get("name", ""), tree)
        state, message = _state(case)
        former = outcomes.get(node)
        seconds = float(case.get("time") or 0.0) + (former.seconds if former else 0.0)
        asks_hub = state == "failed" and case.get("url") == "hub"
        if former and former.state == "failed":
            # Only what failed for nothing else lacks nothing but the hub.
            state, message, asks_hub = (
                former.state,
                former.message,
                former.asks_hub and (asks_hub or state != "failed"),
            )
        outcomes[node] = Outcome(node, file, state, message, seconds, asks_hub)
    return tuple(outcomes.values())


def _named(classname: str, name: str, tree: Path) -> tuple[str, str]:
    """The file and the node of a test. What could not be collected has a dotted file for its name,
    and no class.
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
            # Of what could not be collected the message says only that; the last line of the text
            # is the exception.
            if message == "collection failure":
                message = (found.text or "").strip().rpartition("\n")[2].removeprefix("E").strip()
            return state, message  # type: ignore[return-value]
    return "passed", ""


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise _OutOfTime in the block once it has taken so long."""

    def end(_: int, __: FrameType | None) -> None:
        raise _OutOfTime

    former = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


NOT_RUN = "not run: "
_SHOWN = 160


@dataclass(frozen=True)
class FileCheck(Check):
    """A check of one test file; what it means is why the file was chosen."""

    chosen: str = ""

    @property
    def meaning(self) -> str:
        return self.chosen


@dataclass(frozen=True)
class Sorted:
    """Outcomes by what they say. `own` are the failures that count, `pin` those that fail on the
    pin too, `hub` those that lack the hub.
    """

    passed: tuple[Outcome, ...]
    skipped: tuple[Outcome, ...]
    hub: tuple[Outcome, ...]
    pin: tuple[Outcome, ...]
    own: tuple[Outcome, ...]

    def of(self, file: str) -> "Sorted":
        groups = (self.passed, self.skipped, self.hub, self.pin, self.own)
        return Sorted(*(tuple(one for one in group if one.file == file) for group in groups))


def sort(
    outcomes: Iterable[Outcome], on_the_pin: Iterable[Outcome] | None, *, is_online: bool
) -> Sorted:
    """Sort outcomes. Those on the pin are of the same tests; what is not among them passes there,
    or is not there. None where nothing was compared.

    A change can make a test ask the hub for what was a folder on this disk: also of these the pin
    has the last word, where it has one.
    """
    failed_there = {one.node for one in on_the_pin or () if one.state == "failed"}
    groups: dict[str, list[Outcome]] = {
        "passed": [],
        "skipped": [],
        "hub": [],
        "pin": [],
        "own": [],
    }
    for one in outcomes:
        name = {"passed": "passed", "skipped": "skipped"}.get(one.state, "")
        is_hub = one.asks_hub and not is_online and (on_the_pin is None or one.node in failed_there)
        name = name or ("hub" if is_hub else "pin" if one.node in failed_there else "own")
        groups[name].append(one)
    return Sorted(**{name: tuple(found) for name, found in groups.items()})


def checks(
    tests: Sequence[Reached], decisions: Mapping[str, Decision], found: Sorted
) -> tuple[FileCheck, ...]:
    """Judge each test file that was chosen, and any other that was run; the ones that are not run
    are skipped, with the reason.
    """
    chosen = [(test, decisions[test.path]) for test in tests]
    ran = dict.fromkeys(
        one.file
        for group in (found.own, found.pin, found.hub, found.passed, found.skipped)
        for one in group
    )
    others = [
        (Reached(file, "pytest was told to run it"), Decision("whole", ""))
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
    seconds = sum(one.seconds for one in everything)
    if not everything:
        return FileCheck(
            test.path,
            "skipped",
            f"no test of it was run ({decision.why})",
            seconds,
            chosen=test.why,
        )
    counted = [
        f"{len(found.own)} failed" if found.own else "",
        f"{len(found.passed)} passed" if found.passed else "",
        f"{len(found.skipped)} skipped" if found.skipped else "",
        f"{len(found.hub)} need the hub" if found.hub else "",
        (
            f"{len(found.pin)} fail on the pin too, and so say nothing of the change"
            if found.pin
            else ""
        ),
    ]
    evidence = ", ".join(part for part in counted if part)
    if found.pin:
        evidence += f": {_short(found.pin[0].message)}"
    # Why nothing of a file was run is worth a word where it is one and the same.
    reasons = {one.message for one in found.skipped}
    if len(found.skipped) == len(everything) and len(reasons) == 1:
        evidence += f": {_short(reasons.pop())}"
    problems = tuple(
        f"{one.node.removeprefix('tests/')}: {_short(one.message)}" for one in found.own
    )
    verdict = "fail" if found.own else "pass" if found.passed else "skipped"
    return FileCheck(test.path, verdict, evidence, seconds, problems, test.why)  # type: ignore[arg-type]


def _short(message: str) -> str:
    line = next((line.strip() for line in message.splitlines() if line.strip()), "no word")
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}…"
