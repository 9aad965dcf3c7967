"""A verb is killed before and after each of its changing calls; the next run completes, and the
result is the same.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.proof.kill import preload
from tests.proof.kill.cases import KillCase
from tests.proof.kill.conftest import Grounds
from tests.proof.kill.harness import (
    CUT,
    CUT_WITH_CACHE,
    Place,
    Result,
    by_launcher,
    by_preload,
    each,
    judged,
    power_cut,
)
from tests.proof.kill.ledger import Ledger
from tests.proof.kill.verbs import VERBS

BY_CASE = pytest.mark.parametrize("case", VERBS, ids=lambda case: case.name.replace(" ", "-"))
KINDS = {
    "all die": preload.EVERYTHING,
    "a child dies": preload.ONE_CHILD,
    "the verb dies, children run": preload.THE_VERB,
}
BEFORE, STARTED = "the verb, before a call", "the verb, a child just started"
# After a program was started: at once, while it works, and when most have ended.
DELAYS = ("0", "0.02", "0.15")
Judge = Callable[[list[Result]], None]


@BY_CASE
def test_verb_killed_at_each_of_its_own_calls(
    case: KillCase, grounds: Grounds, ledger: Ledger, judge_all: Judge
) -> None:
    skip_recorded(ledger, case, BEFORE, STARTED)
    places = grounds(case)
    places[0].restore()
    by_launcher(places[0], 0, "before")
    calls = (places[0].world.folder / "calls").read_text().splitlines()
    planned = [(number, "before") for number in range(1, len(calls) + 1)]
    planned += [
        (number, DELAYS[number % len(DELAYS)])
        for number, call in enumerate(calls, 1)
        if "subprocess.Popen" in call
    ]
    planned.sort()
    kinds = [BEFORE if delay == "before" else STARTED for _, delay in planned]

    def kill(place: Place, index: int) -> Result:
        number, delay = planned[index]
        return judged(place, kinds[index], lambda: by_launcher(place, number, delay))

    judge_all(each(places, kill, ledger.plan(case.name, kinds)))


@BY_CASE
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_each_call_of_all_processes(
    case: KillCase, kind: str, grounds: Grounds, shim: Path, ledger: Ledger, judge_all: Judge
) -> None:
    offset = VERBS.index(case)
    skip_recorded(ledger, case, kind, offset=offset)
    places = grounds(case)
    laid = {place.mark: preload.lay(shim, place.world.folder / "shim") for place in places}
    calls = count(places[0], laid[places[0].mark])

    def kill(place: Place, index: int) -> Result:
        return judged(
            place, kind, lambda: by_preload(place, laid[place.mark], index + 1, KINDS[kind])
        )

    judge_all(each(places, kill, ledger.plan(case.name, [kind] * calls, offset=offset)))


@BY_CASE
@pytest.mark.parametrize("kind", [CUT, CUT_WITH_CACHE], ids=["clone", "and-uv-cache"])
def test_power_cut_at_each_call(
    case: KillCase,
    kind: str,
    grounds: Grounds,
    shim: Path,
    ledger: Ledger,
    seed: int,
    judge_all: Judge,
) -> None:
    offset = VERBS.index(case)
    skip_recorded(ledger, case, kind, offset=offset)
    places = grounds(case)
    laid = {place.mark: preload.lay(shim, place.world.folder / "shim") for place in places}
    calls = count(places[0], laid[places[0].mark])

    def cut(place: Place, index: int) -> Result:
        return power_cut(
            place, laid[place.mark], index + 1, seed=seed, with_uv_cache=kind == CUT_WITH_CACHE
        )

    judge_all(each(places, cut, ledger.plan(case.name, [kind] * calls, offset=offset)))


def skip_recorded(ledger: Ledger, case: KillCase, *kinds: str, offset: int = 0) -> None:
    if ledger.has_all(case.name, *kinds, offset=offset):
        pytest.skip("the record has all of them")


def count(place: Place, laid: preload.Preload) -> int:
    """How many changing calls an undisturbed run makes."""
    place.restore()
    by_preload(place, laid, 0, preload.EVERYTHING)
    return laid.count
