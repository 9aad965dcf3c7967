"""The trace of a build, and the summary of the slowest and the largest units."""

import itertools
import json
import random
from pathlib import Path

import pytest

from workspace.compile import progress
from workspace.compile.costs import Cost, Entry, Unit
from workspace.compile.progress import Sample
from workspace.compile.scheduler import Finished


def done(
    source: str,
    started: float,
    seconds: float,
    *,
    peak_gib: float = 1.0,
    status: int | None = 0,
    is_light: bool = False,
    is_killed: bool = False,
) -> Finished:
    return Finished(
        Unit("t", source, is_light),
        Cost(10.0, 2.0, "table"),
        started,
        seconds,
        peak_gib,
        status,
        is_killed,
    )


FINISHED = (
    done("a.cu", 100.0, 10.0),
    done("b.cu", 100.5, 3.0),
    done("d.cu", 110.0, 1.0),
    done("c.cu", 104.0, 6.5),
    done("e.cu", 104.0, 0.0, status=None),
)


def test_parallel_units_are_in_different_lanes_and_no_lane_is_superfluous() -> None:
    assert progress.lanes(FINISHED) == (0, 1, 0, 1, 2)
    assert progress.lanes(()) == ()


def test_no_two_units_of_a_lane_overlap_however_a_build_went() -> None:
    dice = random.Random(1)
    finished = tuple(
        done(f"{number}.cu", dice.uniform(0, 100), dice.uniform(0, 20)) for number in range(300)
    )
    by_lane: dict[int, list[Finished]] = {}
    for one, lane in zip(finished, progress.lanes(finished), strict=True):
        by_lane.setdefault(lane, []).append(one)
    for ones in by_lane.values():
        ones.sort(key=lambda one: one.started)
        assert all(
            one.started + one.seconds <= after.started for one, after in itertools.pairwise(ones)
        )


def test_trace_follows_the_trace_event_format() -> None:
    samples = [Sample(101.0, 1.5, 4.0, 2, 7), Sample(99.0, 0.0, 0.0, 0, 0)]
    document = json.loads(
        json.dumps(
            progress.trace((*FINISHED, done("f", 120.0, 2.0, is_light=True)), samples, began=100.0),
            allow_nan=False,
        )
    )
    assert document["displayTimeUnit"] in ("ms", "ns")
    for event in document["traceEvents"]:
        kinds = {"ts": int, "pid": int, "name": str, "args": dict} | {
            "X": {"tid": int, "dur": int, "cat": str},
            "M": {"tid": int},
            "C": {},
        }[event["ph"]]
        assert {name: type(event[name]) for name in kinds} == kinds
        assert min(event["ts"], event.get("dur", 0)) >= 0
        if event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
    named = {
        event["tid"]: event["args"]["name"]
        for event in document["traceEvents"]
        if event["name"] == "thread_name"
    }
    complete = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert {event["tid"] for event in complete} == set(named)
    (first,) = [event for event in complete if event["name"] == "b.cu"]
    memory = [event["args"] for event in document["traceEvents"] if event["name"] == "memory GiB"]
    assert memory[0] == {"held": 1.5, "expected beyond": 2.5}
    assert (first["ts"], first["dur"], first["args"]["target"], first["args"]["peak GiB"]) == (
        500_000,
        3_000_000,
        "t",
        1.0,
    )


def test_trace_is_removed_with_its_log(tmp_path: Path) -> None:
    for name in ("old", "kept"):
        (tmp_path / f"{name}{progress.SUFFIX}").write_text("{}")
    for name in ("kept", "new"):
        (tmp_path / f"{name}.log").touch()
    written = progress.write_timeline(tmp_path / "new.log", FINISHED, (), began=100.0)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [
        "kept.trace.json",
        "new.trace.json",
    ]
    assert len(json.loads(written.read_text())["traceEvents"]) == 9


def test_slowest_and_largest_units_are_compared_with_the_last_build() -> None:
    finished = [
        done("slow.cu", 0, 300.0, peak_gib=1.0),
        done("fast.cu", 0, 200.0, peak_gib=2.0),
        done("same.cu", 0, 100.0, peak_gib=9.5),
        done("small.cu", 0, 1.0, peak_gib=0.1),
        done("bad.cu", 0, 900.0, peak_gib=90.0, status=1),
    ]
    before = [
        Entry("t", "slow.cu", 200.0, 1.0),
        Entry("t", "fast.cu", 250.0, 1.9),
        Entry("t", "same.cu", 104.0, 9.4),
        Entry("u", "small.cu", 9.0, 9.0),
    ]
    output = progress.build_summary(finished, before)
    assert output == (
        ("slowest", "300.0 s", "1.00 GiB", "slow.cu  (last build 200.0 s: 100.0 s slower)"),
        ("slowest", "200.0 s", "2.00 GiB", "fast.cu  (last build 250.0 s: 50.0 s faster)"),
        ("slowest", "100.0 s", "9.50 GiB", "same.cu  (as in the last build)"),
        ("largest", "100.0 s", "9.50 GiB", "same.cu  (last build 9.40 GiB)"),
        ("largest", "200.0 s", "2.00 GiB", "fast.cu  (last build 1.90 GiB)"),
        ("largest", "300.0 s", "1.00 GiB", "slow.cu  (last build 1.00 GiB)"),
    )


@pytest.mark.parametrize(
    "finished", [(), (done("a", 0, 1.0, status=1),), (done("a", 0, 1.0, is_light=True),)]
)
def test_summary_is_empty_if_no_unit_was_compiled(finished: tuple[Finished, ...]) -> None:
    assert progress.build_summary(finished, ()) == ()
