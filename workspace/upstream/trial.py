"""One run of pytest over files of upstream's tests, with the built interpreter, and what became of each test.

pytest-xdist runs them in a process that may die, pytest-timeout ends the one that hangs; what happened is read from pytest's own JUnit file, in which a
plugin (inside/) has marked what asked the hub.
"""

import contextlib
import re
import signal
import tempfile
import xml.etree.ElementTree as xml
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from workspace.core import process
from workspace.core.errors import SmokeError
from workspace.core.files import write_atomic
from workspace.core.journal import Journal

# Seconds for one test: upstream's slowest on a CPU take one minute on two cores. Words after -- may say otherwise.
TEST_TIMEOUT_S = 300
# A folder of its own: all that lies in it can be imported by the tests.
INSIDE = Path(__file__).with_name("inside")
_PLUGIN = "vllm_workspace_observer"
_FAILED_ITSELF, _NOTHING_TO_RUN = re.compile(r"\S+ exited with 3\b"), re.compile(r"\S+ exited with 5\b")
State = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Place:
    """A tree whose tests are run: by which Python, with which variables, and where the list of files is written."""

    tree: Path
    python: Path
    variables: Mapping[str, str]
    listed: Path


@dataclass(frozen=True)
class Outcome:
    """What became of one test, or of a file that could not be collected. `file` is relative to the tree, `message` what failed, or why it was skipped.

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


def run(place: Place, files: Sequence[str], words: Sequence[str], *, timeout_s: float, journal: Journal) -> tuple[Outcome, ...]:
    """Run the tests of these files, relative to the tree; `words` go to pytest as they are.

    Raises SmokeError where pytest itself fails, whatever it has reported until then, and where it has not ended after `timeout_s` seconds: nothing of it
    is left then.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as folder:
        report = Path(folder) / "junit.xml"
        # As a file, for the sake of who reads the command. Upstream runs them from tests/ as well, where some look for files.
        write_atomic(place.listed, "".join(f"{file.removeprefix('tests/')}\n" for file in files).encode())
        ours = ["-p", "no:cacheprovider", "-n", "1", "-q", "--continue-on-collection-errors", f"--timeout={TEST_TIMEOUT_S}", f"--basetemp={folder}/t"]
        # Else a tree whose pyproject.toml says nothing of pytest would be taken for a part of this clone.
        form = [f"--rootdir={place.tree}", "-p", _PLUGIN, "-o", "junit_family=xunit1", f"--junit-xml={report}"]
        # -P: what lies in tests/ is not to be imported as if it were a library.
        argv: list[process.Argument] = [place.python, "-P", "-m", "pytest", *ours, *form, *words, f"@{place.listed}"]
        path = ":".join(filter(None, (place.variables.get("PYTHONPATH"), str(INSIDE))))
        variables = {**place.variables, "PYTHONPATH": path}
        trouble: SmokeError | None = None
        try:
            with _limited(timeout_s):
                process.run(argv, env=variables, cwd=place.tree / "tests", journal=journal, failure=SmokeError, hint="the words after -- go to pytest")
        except _OutOfTime:
            raise SmokeError(
                f"upstream's tests had not ended after {timeout_s:g} s and were ended",
                hint="--timeout-s says how long they may take; -- -k WORD runs fewer of them",
                details=(f"log: {journal.path}",),
            ) from None
        except SmokeError as exc:
            # A status other than 0 is also what failed tests give, or none that were collected.
            trouble = exc
        if not report.is_file():
            raise trouble or SmokeError("pytest wrote no report", hint=f"less {journal.path}")
        outcomes = read(report.read_bytes(), place.tree)
    is_explained = any(one.state == "failed" for one in outcomes) or (not outcomes and _NOTHING_TO_RUN.match(str(trouble)))
    if trouble and (_FAILED_ITSELF.match(str(trouble)) or not is_explained):
        raise trouble
    return outcomes


def read(report: bytes, tree: Path) -> tuple[Outcome, ...]:
    """Read a JUnit file of pytest. A test that failed and could not be cleared up after is one that failed."""
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
            state, message, asks_hub = former.state, former.message, former.asks_hub and (asks_hub or state != "failed")
        outcomes[node] = Outcome(node, file, state, message, seconds, asks_hub)
    return tuple(outcomes.values())


def _named(classname: str, name: str, tree: Path) -> tuple[str, str]:
    """The file and the node of a test. What could not be collected has a dotted file for its name, and no class."""
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
            # Of what could not be collected the message says only that; the last line of the text is the exception.
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
