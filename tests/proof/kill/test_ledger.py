"""The harness itself: shares cover each call once, a record is continued, and no place is so
special that its calls are not counted.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.proof.kill import launcher
from tests.proof.kill.cases import KillCase
from tests.proof.kill.harness import Place, each
from tests.proof.kill.ledger import Ledger, Result
from tests.small.world import World

KINDS = ["before"] * 50 + ["after"] * 33
CHANGES = (
    "import os, sys; os.mkdir(sys.argv[1] + '/a'); open(sys.argv[1] + '/a/b', 'w').close();"
    " os.remove(sys.argv[1] + '/a/b')"
)


def done(number: int, *, complaints: tuple[str, ...] = ()) -> Result:
    return Result("a case", KINDS[number], "a call", complaints, 1.0, number=number)


@pytest.mark.parametrize("every", [1, 7])
def test_shares_are_each_call_once(every: int) -> None:
    ledgers = [Ledger(every=every, part=(number, 4)) for number in range(1, 5)]
    assert sorted(
        number for ledger in ledgers for number in ledger.plan("a case", KINDS, offset=5)
    ) == list(range(5 % every, len(KINDS), every))


def test_record_is_gone_on_with_and_what_failed_is_done_again(tmp_path: Path) -> None:
    record = tmp_path / "record"
    first = Ledger(record=record)
    for number in first.plan("a case", KINDS)[:40]:
        first.take(done(number, complaints=("lost",) if number == 3 else ()))
    second = Ledger(record=record)
    second.load()
    left = second.plan("a case", KINDS)
    assert left == [3, *range(40, len(KINDS))]
    assert not second.has_all("a case", *set(KINDS))
    for number in left:
        second.take(done(number))
    third = Ledger(record=record)
    third.load()
    assert third.has_all("a case", *set(KINDS))
    assert (
        list(third.table())[-1]
        == "83 kills, 0 not completed rightly by the next run; 83 of 83 calls that were counted"
    )


@pytest.mark.parametrize(("seconds", "fails"), [(60.0, False), (-1.0, True)])
def test_time_that_ends_before_all_is_done_is_no_pass(seconds: float, fails: bool) -> None:
    ledger = Ledger(until=time.monotonic() + seconds)
    # A case and a world are for the work alone, and this work needs none.
    case = SimpleNamespace(name="a case")
    places = [Place(cast(KillCase, case), cast(World, None), ledger)]
    if fails:
        with pytest.raises(AssertionError, match="--for was over after 0 of 3"):
            each(places, lambda _, number: done(number), range(3))
    else:
        assert len(each(places, lambda _, number: done(number), range(3))) == 3


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm here")
def test_calls_in_shared_memory_are_counted(tmp_path: Path) -> None:
    script = tmp_path / "tasks.py"
    script.write_text(CHANGES)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        subprocess.run(
            [
                sys.executable,
                "-B",
                launcher.__file__,
                tmp_path / "calls",
                "0",
                "before",
                script,
                folder,
            ],
            check=True,
        )
    assert [line.split()[1] for line in (tmp_path / "calls").read_text().splitlines()] == [
        "os.mkdir",
        "open",
        "os.remove",
    ]
