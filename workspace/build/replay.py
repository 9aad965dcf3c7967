"""A build in thought: units through the real admission, the clock set forward from the end of one to that of the next."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from workspace.build.admission import Admission, Bounds
from workspace.build.costs import Cost


@dataclass(frozen=True)
class Replayed:
    """What came of it: seconds from the first start to the last end, and the most memory (sum of the peaks of those that ran) and compilers at any time."""

    seconds: float
    most_gib: float
    most_jobs: int


def simulate(costs: Sequence[Cost], bounds: Bounds) -> Replayed:
    """Let all units ask at once, and take from each of them what is expected of it."""
    admission = Admission(bounds)
    for number, cost in enumerate(costs):
        admission.ask(number, cost, 0.0)
    now, most_gib, most_jobs = 0.0, 0.0, 0
    running: list[tuple[float, int]] = []
    while admission.waiting or running:
        for number in admission.admit(now):
            heapq.heappush(running, (now + costs[number].seconds, number))
        most_gib = max(most_gib, sum(costs[number].peak_gib for _, number in running))
        most_jobs = max(most_jobs, len(running))
        now, ended = heapq.heappop(running)
        admission.leave(ended)
    return Replayed(now, most_gib, most_jobs)
