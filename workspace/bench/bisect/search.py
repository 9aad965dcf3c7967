"""Which commit to try next, and what the tries so far say: a search over a history with merges, of which some commits cannot be tried.

Pure, and without a memory: everything follows from the history and the tries in their order, so a search that was ended goes on by itself.
The weight of a commit is git's own, the number of suspects that it leads to, itself included (git-rev-list(1), --bisect); the next one to
try has half of all. git itself is asked only once, for the history: the same search then serves hours later, and leaves no reference behind.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["good", "bad", "skip"]
Role = Literal["good", "fork", "bad", "suspect"]


@dataclass(frozen=True)
class Suspects:
    """Every commit of `good..bad` with its parents, parents first: the last is `bad`. `forks` are where the two parted, none where good is an ancestor."""

    good: str
    parents: Mapping[str, tuple[str, ...]]
    forks: tuple[str, ...] = ()

    @property
    def bad(self) -> str:
        *_, last = self.parents
        return last


@dataclass(frozen=True)
class Standing:
    """How the search stands: who is left, oldest first, the last of them known to be bad, and whom to try next, as what; None where nothing is left to try.

    `contradiction` is an end, or a fork, that is not what it has to be.
    """

    left: tuple[str, ...]
    following: str | None
    role: Role
    contradiction: str | None = None

    @property
    def culprit(self) -> str | None:
        return self.left[0] if len(self.left) == 1 and self.following is None and self.contradiction is None else None

    @property
    def steps(self) -> int:
        """About how many more tries it takes."""
        return math.ceil(math.log2(len(self.left)))


def stand(suspects: Suspects, tries: Mapping[str, Verdict]) -> Standing:
    """Work out from the tries, in their order, what is known. First the ends are to be tried, and the forks, which have to be good too."""
    every = tuple(suspects.parents)
    ends: list[tuple[str, Role]] = [(suspects.good, "good"), *((fork, "fork") for fork in suspects.forks), (suspects.bad, "bad")]
    for commit, role in ends:
        said = tries.get(commit)
        if said is None:
            return Standing(every, commit, role)
        wrong = "good" if role == "bad" else "bad"
        # A fork that cannot be tried is taken for good, as git does: what is between it and good would else be searched for a commit that mends.
        if said == wrong or (said == "skip" and role != "fork"):
            return Standing(every, None, role, contradiction=commit)
    reach = _reach(suspects.parents)
    mask = _left(reach, {commit: said for commit, said in tries.items() if commit in reach})
    left = tuple(commit for number, commit in enumerate(every) if mask >> number & 1)
    return Standing(left, _following(left, reach, mask, tries), "suspect")


def _reach(parents: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """The commits that each leads to, itself included, as bits."""
    reach: dict[str, int] = {}
    for number, (commit, above) in enumerate(parents.items()):
        bits = 1 << number
        for parent in above:
            bits |= reach.get(parent, 0)
        reach[commit] = bits
    return reach


def _left(reach: Mapping[str, int], tries: Mapping[str, Verdict]) -> int:
    """Whoever every bad one leads to and no good one does. Not empty: only what lies before the last bad one is ever tried."""
    mask = (1 << len(reach)) - 1
    for commit, said in tries.items():
        if said == "bad":
            mask &= reach[commit]
        elif said == "good":
            mask &= ~reach[commit]
    return mask


def _following(left: Sequence[str], reach: Mapping[str, int], mask: int, tries: Mapping[str, Verdict]) -> str | None:
    """Whoever has half of all; but those next to one that cannot be tried rarely can, so that half as far from each such counts too."""
    untried = [number for number, commit in enumerate(left) if tries.get(commit) == "skip"]

    def worth(number: int) -> int:
        weight = (reach[left[number]] & mask).bit_count()
        return min(weight, len(left) - weight, *(2 * abs(number - other) for other in untried))

    best = max((number for number in range(len(left) - 1) if number not in untried), key=worth, default=None)
    return None if best is None else left[best]
