"""What a build took, told afterwards: a timeline for a trace viewer, and its slowest and hungriest units beside the last build's."""

import heapq
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.build.connection import Finished
from workspace.build.costs import LINK, Entry
from workspace.core.files import write_atomic

SUFFIX = ".trace.json"
SHOWN = 3
# What the same unit takes differs from build to build by what runs beside it; less than this is no news.
NEWS_SHARE, NEWS_S = 0.1, 1.0
_PROCESS = 1


@dataclass(frozen=True)
class Sample:
    """One look at a build, at a time of time.monotonic: GiB held and reckoned with, compilers that run and wait."""

    at: float
    held_gib: float
    charged_gib: float
    running: int
    waiting: int


def lanes(finished: Sequence[Finished]) -> tuple[int, ...]:
    """Return a lane for each unit, from 0: those that ran at the same time lie in different ones, and no more lanes are used than ran at once."""
    found, free, busy = [0] * len(finished), list[int](), list[tuple[float, int]]()
    for number in sorted(range(len(finished)), key=lambda number: finished[number].started):
        done = finished[number]
        while busy and busy[0][0] <= done.started:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane = heapq.heappop(free) if free else len(busy)
        found[number] = lane
        heapq.heappush(busy, (done.started + done.seconds, lane))
    return tuple(found)


def trace(finished: Sequence[Finished], samples: Iterable[Sample], *, began: float) -> Mapping[str, object]:
    """Return the build as a trace: a lane for each compiler at a time, and counters. `began` is when time 0 was, on the clock of time.monotonic.

    The form is Chrome's Trace Event Format, JSON Object Format: complete events (X), counters (C) and names (M); times are in microseconds.
    """
    events: list[Mapping[str, object]] = [_named("process_name", 0, "compilers")]
    found = lanes(finished)
    events += [_named("thread_name", lane + 1, f"compiler {lane + 1}") for lane in range(max(found, default=-1) + 1)]
    for done, lane in zip(finished, found, strict=True):
        events.append(
            {
                "name": f"link of {done.unit.target}" if done.unit.source == LINK else Path(done.unit.source).name or "?",
                "cat": "preprocess" if done.unit.is_light else "killed" if done.is_killed else "compile" if done.status == 0 else "failed",
                "ph": "X",
                "ts": _us(done.started - began),
                "dur": _us(done.seconds),
                "pid": _PROCESS,
                "tid": lane + 1,
                "args": {
                    "source": done.unit.source,
                    "target": done.unit.target,
                    "status": done.status,
                    "peak GiB": round(done.peak_gib, 3),
                    "expected GiB": round(done.expected.peak_gib, 3),
                    "expected s": round(done.expected.seconds, 1),
                    "expected from": done.expected.origin,
                },
            }
        )
    for sample in samples:
        at = _us(sample.at - began)
        # A viewer puts the values of a counter on top of each other: together they are what the budget is held against.
        expected_gib = max(0.0, sample.charged_gib - sample.held_gib)
        events.append(_counted("memory GiB", at, {"held": round(sample.held_gib, 3), "expected beyond": round(expected_gib, 3)}))
        events.append(_counted("units", at, {"running": sample.running, "waiting": sample.waiting}))
    return {"displayTimeUnit": "ms", "traceEvents": events}


def write(log: Path, finished: Sequence[Finished], samples: Iterable[Sample], *, began: float) -> Path:
    """Write the trace beside the log, and remove those whose logs are gone. Raises OSError where it cannot."""
    for old in log.parent.glob(f"*{SUFFIX}"):
        if not old.with_name(old.name.removesuffix(SUFFIX) + log.suffix).exists():
            old.unlink(missing_ok=True)
    path = log.with_suffix(SUFFIX)
    write_atomic(path, json.dumps(trace(finished, samples, began=began)).encode() + b"\n")
    return path


def summary(finished: Sequence[Finished], before: Iterable[Entry]) -> tuple[str, ...]:
    """Return a line for each of the slowest and the hungriest units, beside what the last build of the same setup needed for it."""
    known = {(entry.target, entry.source): entry for entry in before}
    done = [one for one in finished if one.status == 0 and not one.unit.is_light]
    slowest = sorted(done, key=lambda one: -one.seconds)[:SHOWN]
    hungriest = sorted(done, key=lambda one: -one.peak_gib)[:SHOWN]
    return tuple(_line(word, one, known) for word, ones in (("slowest", slowest), ("hungriest", hungriest)) for one in ones)


def _line(word: str, done: Finished, known: Mapping[tuple[str, str], Entry]) -> str:
    said = f"{word:<11}{done.seconds:7.1f} s {done.peak_gib:6.2f} GiB  {done.unit.source if done.unit.source != LINK else f'link of {done.unit.target}'}"
    entry = known.get((done.unit.target, done.unit.source))
    if entry is None:
        return said
    if word == "hungriest":
        return f"{said}  (last build {entry.peak_gib:.2f} GiB)"
    difference = done.seconds - entry.seconds
    if abs(difference) < max(NEWS_S, entry.seconds * NEWS_SHARE):
        return f"{said}  (as in the last build)"
    return f"{said}  (last build {entry.seconds:.1f} s: {abs(difference):.1f} s {'slower' if difference > 0 else 'faster'})"


def _named(kind: str, lane: int, name: str) -> Mapping[str, object]:
    return {"name": kind, "ph": "M", "ts": 0, "pid": _PROCESS, "tid": lane, "args": {"name": name}}


def _counted(name: str, at: int, values: Mapping[str, float]) -> Mapping[str, object]:
    return {"name": name, "ph": "C", "ts": at, "pid": _PROCESS, "args": values}


def _us(seconds: float) -> int:
    return max(0, round(seconds * 1e6))
