"""Signals at random moments: SIGKILL to the verb or to all of its processes, ^C and SIGTERM, which
the verb reports; nothing is lost, and the next run completes.
"""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.proof.kill.cases import KillCase
from tests.proof.kill.conftest import Grounds
from tests.proof.kill.harness import Kill, Place, Result, each, judged
from tests.proof.kill.judge import await_no_stray, strays
from tests.proof.kill.verbs import VERBS

TO_ALL = "SIGKILL to all"
SIGNALS = {
    "SIGKILL": signal.SIGKILL,
    TO_ALL: signal.SIGKILL,
    "SIGINT": signal.SIGINT,
    "SIGTERM": signal.SIGTERM,
}
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
ENDED_WITHIN_S = 8.0


def by_signal(place: Place, kind: str, after_s: float) -> Kill:
    child, number = place.world.start(*place.case.argv), SIGNALS[kind]
    time.sleep(after_s)
    begun, stood = time.monotonic(), stands(child.pid)
    for stray in strays(place.mark) if kind == TO_ALL else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(stray.split()[0]), number)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    ended_s = time.monotonic() - begun
    _, living = await_no_stray(place.mark)
    assert not living, living
    # Before the command line is ready, Python itself ends by the signal.
    is_plain = number is signal.SIGKILL or not stood
    ended = (place.case.code, -number) if is_plain else (place.case.code, CODES[number])
    assert child.returncode in ended, (child.returncode, err)
    assert ended_s < ENDED_WITHIN_S, f"{ended_s:.1f} s"
    assert "Traceback" not in err or not stood, err
    return Kill(f"{kind} after {after_s:.2f} s", child.returncode, ended_s)


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
@pytest.mark.parametrize("kind", SIGNALS)
def test_signal_at_a_random_moment(
    case: KillCase,
    kind: str,
    grounds: Grounds,
    seed: int,
    times: int,
    judge_all: Callable[[list[Result]], None],
) -> None:
    places = grounds(case)

    def send(place: Place, turn: int) -> Result:
        after_s = random.Random(f"{seed} {case.name} {kind} {turn}").random() * place.undisturbed_s
        return judged(place, kind, lambda: by_signal(place, kind, after_s))

    judge_all(each(places, send, range(times // len(SIGNALS))))
