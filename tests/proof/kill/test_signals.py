"""^C and SIGTERM at random moments: the verb reports it and ends its children; the next run
completes.
"""

import contextlib
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.proof.kill.cases import KillCase
from tests.proof.kill.conftest import Grounds
from tests.proof.kill.harness import Kill, Place, Result, each, judged
from tests.proof.kill.judge import await_no_stray
from tests.proof.kill.verbs import VERBS

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
ENDED_WITHIN_S = 8.0


def by_signal(place: Place, number: signal.Signals, after_s: float) -> Kill:
    child = place.world.start(*place.case.argv)
    time.sleep(after_s)
    begun, stood = time.monotonic(), stands(child.pid)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    ended_s = time.monotonic() - begun
    _, living = await_no_stray(place.mark)
    assert not living, living
    # Before the command line is ready, Python itself ends by the signal.
    assert child.returncode in (0, CODES[number]) or (child.returncode == -number and not stood), (
        child.returncode,
        err,
    )
    assert ended_s < ENDED_WITHIN_S, f"{ended_s:.1f} s"
    assert "Traceback" not in err or not stood, err
    return Kill(f"{number.name} after {after_s:.2f} s", child.returncode, ended_s)


def stands(process: int) -> bool:
    """Return whether the command line handles signals by now (proc(5), SigCgt).

    Before that, SIGINT has Python's own handler.
    """
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{process}/status").read_text()
        caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)
    return False


@pytest.mark.parametrize("case", VERBS, ids=lambda case: case.name.replace(" ", "-"))
@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_signal_at_a_random_moment(
    case: KillCase,
    number: signal.Signals,
    grounds: Grounds,
    seed: int,
    times: int,
    judge_all: Callable[[list[Result]], None],
) -> None:
    places = grounds(case)

    def send(place: Place, turn: int) -> Result:
        after_s = (
            random.Random(f"{seed} {case.name} {number} {turn}").random() * place.undisturbed_s
        )
        return judged(place, number.name, lambda: by_signal(place, number, after_s))

    judge_all(each(places, send, range(times // 2)))
