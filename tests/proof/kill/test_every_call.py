"""A verb is killed before and after each of its changing calls; the next run completes, and the result is the same."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.proof.kill import preload
from tests.proof.kill.cases import KillCase
from tests.proof.kill.conftest import Grounds
from tests.proof.kill.harness import Place, Result, by_launcher, by_preload, each, judged, power_cut
from tests.proof.kill.verbs import VERBS

BY_CASE = pytest.mark.parametrize("case", VERBS, ids=lambda case: case.name.replace(" ", "-"))
KINDS = {"all die": preload.EVERYTHING, "a child dies": preload.ONE_CHILD, "the verb dies, children run": preload.THE_VERB}
# After a program was started: at once, while it works, and when most have ended.
DELAYS = ("0", "0.02", "0.15")
Judge = Callable[[list[Result]], None]


@BY_CASE
def test_verb_killed_at_each_of_its_own_calls(case: KillCase, grounds: Grounds, every: int, judge_all: Judge) -> None:
    places = grounds(case)
    places[0].restore()
    by_launcher(places[0], 0, "before")
    calls = (places[0].world.folder / "calls").read_text().splitlines()
    planned = [(number, "before") for number in range(1, len(calls) + 1)]
    planned += [(number, DELAYS[number % len(DELAYS)]) for number, call in enumerate(calls, 1) if "subprocess.Popen" in call]
    planned = sorted(planned)[::every]

    def kill(place: Place, index: int) -> Result:
        number, delay = planned[index]
        kind = "the verb, before a call" if delay == "before" else "the verb, a child just started"
        return judged(place, kind, lambda: by_launcher(place, number, delay))

    judge_all(each(places, kill, range(len(planned))))


@BY_CASE
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_each_call_of_all_processes(case: KillCase, kind: str, grounds: Grounds, shim: Path, every: int, judge_all: Judge) -> None:
    places = grounds(case)
    laid = {place.mark: preload.lay(shim, place.world.folder / "shim") for place in places}
    calls = count(places[0], laid[places[0].mark])

    def kill(place: Place, number: int) -> Result:
        return judged(place, kind, lambda: by_preload(place, laid[place.mark], number, KINDS[kind]))

    judge_all(each(places, kill, range(1 + VERBS.index(case) % every, calls + 1, every)))


@BY_CASE
@pytest.mark.parametrize("with_uv_cache", [False, True], ids=["clone", "and-uv-cache"])
def test_power_cut_at_each_call(case: KillCase, with_uv_cache: bool, grounds: Grounds, shim: Path, every: int, seed: int, judge_all: Judge) -> None:
    places = grounds(case)
    laid = {place.mark: preload.lay(shim, place.world.folder / "shim") for place in places}
    calls = count(places[0], laid[places[0].mark])

    def cut(place: Place, number: int) -> Result:
        return power_cut(place, laid[place.mark], number, seed=seed, with_uv_cache=with_uv_cache)

    judge_all(each(places, cut, range(1 + VERBS.index(case) % every, calls + 1, every)))


def count(place: Place, laid: preload.Preload) -> int:
    """How many changing calls an undisturbed run makes."""
    place.restore()
    by_preload(place, laid, 0, preload.EVERYTHING)
    return laid.count
