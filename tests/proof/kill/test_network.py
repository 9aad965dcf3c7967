"""The network fails in the middle of each page and each file: a sentence, a hint, exit 11; then the
next run resumes from there.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.proof.kill import judge
from tests.proof.kill.conftest import Grounds
from tests.proof.kill.harness import Place, Result, complete, each, failed_rightly
from tests.proof.kill.verbs import VERBS
from tests.small.index import Fault

SOURCE_ERROR = 11
# Less than the smallest file, a wheel's metadata.
CUT_AFTER = 40
# uv's own patience, shortened; the workspace's is a constant of 30 s.
PATIENCE = {"UV_HTTP_TIMEOUT": "3"}


@dataclass(frozen=True)
class Break:
    """A way for a transfer to go wrong; `is_fatal` where the verb cannot continue."""

    fault: Fault
    is_fatal: bool = True


BREAKS = {
    "answers 503": Break(Fault(status=503)),
    "is cut off": Break(Fault(cut_after=CUT_AFTER)),
    "is slow": Break(Fault(delay_s=1.5), is_fatal=False),
    "falls silent": Break(Fault(delay_s=45.0)),
}


@pytest.mark.parametrize("how", BREAKS)
def test_network_fails_in_each_page_and_file(
    how: str, grounds: Grounds, judge_all: Callable[[list[Result]], None]
) -> None:
    places = grounds(VERBS[0])
    requests = requested(places[0])

    def fail(place: Place, number: int) -> Result:
        return broken(place, requests[number], how)

    judge_all(each(places, fail, range(len(requests))))


def requested(place: Place) -> list[str]:
    """The pages and files that a first bootstrap asks for, uv's cache being empty."""
    begin(place)
    assert place.world.run(*place.case.argv).code == 0
    names = [
        path.rsplit("/", 1)[-1] or path.rsplit("/", 2)[-2] for path in place.world.index.requests
    ]
    return list(dict.fromkeys(names))


def begin(place: Place) -> None:
    place.restore()
    shutil.rmtree(place.world.folder / "uv-cache")
    (place.world.folder / "uv-cache").mkdir()


def broken(place: Place, name: str, how: str) -> Result:
    """One fault for the whole of a run, then a run without."""
    started = time.monotonic()
    begin(place)
    planned = BREAKS[how]
    world = place.world
    world.index.faults[name] = planned.fault
    ended = world.run(*place.case.argv, env=PATIENCE)
    # Metadata that breaks off uv may take from the wheel itself; whatever else is missing ends the
    # run.
    goes_on = not planned.is_fatal or (
        planned.fault.cut_after is not None and name.endswith(".metadata")
    )
    complaints = failed_rightly(
        ended, (*((0,) if goes_on else ()), *((SOURCE_ERROR,) if planned.is_fatal else ()))
    )
    world.index.faults.clear()
    complaints += complete(place)
    _, living = judge.await_no_stray(place.mark)
    return Result(
        place.case.name,
        f"network: {how}",
        name,
        tuple(complaints + living),
        time.monotonic() - started,
    )
