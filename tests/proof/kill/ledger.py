"""What is to be killed and what was: which calls this run takes, when it ends, a line of JSON for
each kill, and the table.

A record that has lines already is continued: what it lists as completed rightly is not done
again, and counts in the table.
"""

import collections
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """The verdict on one kill; no complaints means that all is as if nothing had happened. `number`
    is its position in what was planned.
    """

    case: str
    kind: str
    place: str
    complaints: tuple[str, ...]
    seconds: float
    was_seen: bool = False
    leftovers: int = 0
    number: int = -1


@dataclass
class Ledger:
    """Every `every`-th call, of these the `part[0]`-th of `part[1]` shares; nothing is begun after
    `until` (time.monotonic).
    """

    every: int = 1
    part: tuple[int, int] = (1, 1)
    until: float = float("inf")
    record: Path | None = None
    info: Callable[[str], None] = print
    results: list[Result] = field(default_factory=list)
    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    _done: set[tuple[str, str, int]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def load(self) -> None:
        """Take over what an earlier run wrote down, and what others that write there at the same
        time have until now.
        """
        if self.record is None or not self.record.exists():
            return
        for line in self.record.read_text().splitlines():
            found = json.loads(line)
            if "calls" in found:
                self._count(found["case"], found["kind"], found["calls"])
            else:
                self.results.append(Result(**found | {"complaints": tuple(found["complaints"])}))
        self._done = {
            (result.case, result.kind, result.number)
            for result in self.results
            if not result.complaints
        }

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.until

    def plan(self, case: str, kinds: Sequence[str], *, offset: int = 0) -> list[int]:
        """Of the places where a case can be killed, each given by its kind, the positions that this
        run takes.
        """
        for kind, calls in collections.Counter(kinds).items():
            self._count(case, kind, calls)
            self._write({"case": case, "kind": kind, "calls": calls})
        return [
            number
            for number in self._taken(len(kinds), offset)
            if (case, kinds[number], number) not in self._done
        ]

    def has_all(self, case: str, *kinds: str, offset: int = 0) -> bool:
        """Whether the record has every kill of these kinds that this run would take."""
        calls = sum(self.calls.get((kind, case), 0) for kind in kinds)
        return calls > 0 and all(
            any((case, kind, number) in self._done for kind in kinds)
            for number in self._taken(calls, offset)
        )

    def _taken(self, calls: int, offset: int) -> range:
        share, shares = self.part
        return range(offset % self.every, calls, self.every)[share - 1 :: shares]

    def _count(self, case: str, kind: str, calls: int) -> None:
        self.calls[kind, case] = max(calls, self.calls.get((kind, case), 0))

    def take(self, result: Result) -> None:
        """Keep a verdict, on the disk at once: whoever ends this run by force loses those in flight
        only.
        """
        with self._lock:
            self.results.append(result)
        self._write(asdict(result))

    def _write(self, line: dict[str, object]) -> None:
        if self.record is not None:
            # One write to the end of the file, so that several runs may share it.
            descriptor = os.open(self.record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, (json.dumps(line) + "\n").encode())
            finally:
                os.close(descriptor)

    def take_rest(self, results: Iterable[Result]) -> None:
        """Keep the verdicts that came about one by one, and not as numbers of a plan."""
        for result in results:
            if result.number < 0:
                self.take(result)

    def table(self) -> Iterable[str]:
        """A row for each kind and case. `killed at` counts different calls; of a call that was
        killed at again the last verdict counts.
        """
        rows: dict[tuple[str, str], list[Result]] = {key: [] for key in self.calls}
        for result in self.results:
            rows.setdefault((result.kind, result.case), []).append(result)
        last = {
            key: (
                [result for result in results if result.number < 0]
                + list({r.number: r for r in results if r.number >= 0}.values())
            )
            for key, results in rows.items()
        }
        yield (
            f"{'how':32}{'what':48}{'calls':>6}{'killed at':>10}{'states':>8}{'failed':>8}"
            f"{'seconds':>9}{'left in TMPDIR':>16}"
        )
        for (kind, case), results in last.items():
            calls = self.calls.get((kind, case), "")
            states = sum(not result.was_seen for result in results)
            seconds = sum(result.seconds for result in results)
            left = sum(result.leftovers for result in results)
            yield (
                f"{kind:32}{case:48}{calls:>6}{len(results):10}{states:8}{failed(results):8}"
                f"{seconds:9.0f}{left:16}"
            )
        every = [result for results in last.values() for result in results]
        at = sum(len(last[key]) for key in self.calls)
        yield (
            f"{len(every)} kills, {failed(every)} not completed rightly by the next run; {at} of"
            f" {sum(self.calls.values())} calls that were counted"
        )


def failed(results: Iterable[Result]) -> int:
    return sum(bool(result.complaints) for result in results)
