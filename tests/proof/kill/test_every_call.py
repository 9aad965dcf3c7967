"""A verb is killed before and after each of its changing calls; the next run completes, and the
result is the same.
"""

from collections.abc import Callable

import pytest

from tests.proof.kill.cases import KillCase
from tests.proof.kill.conftest import Grounds
from tests.proof.kill.harness import Place, Result, by_launcher, each, judged
from tests.proof.kill.ledger import Ledger
from tests.proof.kill.verbs import VERBS

BY_CASE = pytest.mark.parametrize("case", VERBS, ids=lambda case: case.name.replace(" ", "-"))
BEFORE, STARTED = "the verb, before a call", "the verb, a child just started"
# After a program was started: at once, while it works, and when most have ended.
DELAYS = ("0", "0.02", "0.15")
Judge = Callable[[list[Result]], None]


@BY_CASE
def test_verb_killed_at_each_of_its_own_calls(
    case: KillCase, grounds: Grounds, ledger: Ledger, judge_all: Judge
) -> None:
    if ledger.has_all(case.name, BEFORE, STARTED):
        return
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
