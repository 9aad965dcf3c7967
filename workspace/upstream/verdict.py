"""What the outcomes of upstream's tests say of the change: a check for each test file, in the form of the smoke's.

Pure. A failure counts where the same test passes on the pin, or was not there. That of a test which asks the hub is told apart, so that its number is seen.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from workspace.smoke.checks import Check
from workspace.upstream.reach import Reached
from workspace.upstream.runnable import Decision
from workspace.upstream.trial import Outcome

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
    """Outcomes by what they say. `own` are the failures that count, `pin` those that fail on the pin too, `hub` those that lack the hub."""

    passed: tuple[Outcome, ...]
    skipped: tuple[Outcome, ...]
    hub: tuple[Outcome, ...]
    pin: tuple[Outcome, ...]
    own: tuple[Outcome, ...]

    def of(self, file: str) -> "Sorted":
        groups = (self.passed, self.skipped, self.hub, self.pin, self.own)
        return Sorted(*(tuple(one for one in group if one.file == file) for group in groups))


def sort(outcomes: Iterable[Outcome], on_the_pin: Iterable[Outcome] | None, *, is_online: bool) -> Sorted:
    """Sort outcomes. Those on the pin are of the same tests; what is not among them passes there, or is not there. None where nothing was compared.

    A change can make a test ask the hub for what was a folder on this disk: also of these the pin has the last word, where it has one.
    """
    failed_there = {one.node for one in on_the_pin or () if one.state == "failed"}
    groups: dict[str, list[Outcome]] = {"passed": [], "skipped": [], "hub": [], "pin": [], "own": []}
    for one in outcomes:
        name = {"passed": "passed", "skipped": "skipped"}.get(one.state, "")
        is_hub = one.asks_hub and not is_online and (on_the_pin is None or one.node in failed_there)
        name = name or ("hub" if is_hub else "pin" if one.node in failed_there else "own")
        groups[name].append(one)
    return Sorted(**{name: tuple(found) for name, found in groups.items()})


def checks(tests: Sequence[Reached], decisions: Mapping[str, Decision], found: Sorted) -> tuple[FileCheck, ...]:
    """Judge each test file that was chosen, and any other that was run; the ones that are not run are skipped, with the reason."""
    chosen = [(test, decisions[test.path]) for test in tests]
    ran = dict.fromkeys(one.file for group in (found.own, found.pin, found.hub, found.passed, found.skipped) for one in group)
    others = [(Reached(file, "pytest was told to run it"), Decision("whole", "")) for file in ran if file not in decisions]
    return tuple(_check(test, decision, found.of(test.path)) for test, decision in (*chosen, *others))


def _check(test: Reached, decision: Decision, found: Sorted) -> FileCheck:
    if decision.how == "not":
        return FileCheck(test.path, "skipped", f"{NOT_RUN}{decision.why}", 0.0, chosen=test.why)
    everything = (*found.passed, *found.skipped, *found.hub, *found.pin, *found.own)
    seconds = sum(one.seconds for one in everything)
    if not everything:
        return FileCheck(test.path, "skipped", f"no test of it was run ({decision.why})", seconds, chosen=test.why)
    counted = [
        f"{len(found.own)} failed" if found.own else "",
        f"{len(found.passed)} passed" if found.passed else "",
        f"{len(found.skipped)} skipped" if found.skipped else "",
        f"{len(found.hub)} need the hub" if found.hub else "",
        f"{len(found.pin)} fail on the pin too, and so say nothing of the change" if found.pin else "",
    ]
    evidence = ", ".join(part for part in counted if part)
    if found.pin:
        evidence += f": {_short(found.pin[0].message)}"
    # Why nothing of a file was run is worth a word where it is one and the same.
    reasons = {one.message for one in found.skipped}
    if len(found.skipped) == len(everything) and len(reasons) == 1:
        evidence += f": {_short(reasons.pop())}"
    problems = tuple(f"{one.node.removeprefix('tests/')}: {_short(one.message)}" for one in found.own)
    verdict = "fail" if found.own else "pass" if found.passed else "skipped"
    return FileCheck(test.path, verdict, evidence, seconds, problems, test.why)  # type: ignore[arg-type]


def _short(message: str) -> str:
    line = next((line.strip() for line in message.splitlines() if line.strip()), "no word")
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}…"
