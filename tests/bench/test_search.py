"""The search alone, on histories of any shape: it finds the culprit, or names the suspects that
are left where commits cannot be tried; its weights are those of git.
"""

import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import hypothesis
import hypothesis.strategies as st

from tests.small.materials import git
from workspace.bench.bisect_log import Suspects, Verdict, search_state
from workspace.repo.git import Git, history

Parents = dict[str, tuple[str, ...]]


@st.composite
def histories(draw: st.DrawFn) -> Parents:
    """Draw commits with up to three parents each, parents first, all ancestors of the last."""
    count = draw(st.integers(1, 40))
    names = [f"c{number}" for number in range(count)]
    parents: Parents = {}
    for number, name in enumerate(names):
        before = (
            draw(st.lists(st.integers(max(0, number - 6), number - 1), max_size=3, unique=True))
            if number
            else []
        )
        parents[name] = tuple(names[other] for other in sorted(before))
    loose = [name for name in names[:-1] if not any(name in above for above in parents.values())]
    # A parent outside the range is good.
    return {
        **parents,
        names[-1]: tuple(dict.fromkeys((*parents[names[-1]], *loose))) or ("outside",),
    }


def leads_to(parents: Parents, commit: str) -> set[str]:
    found, todo = set(), [commit]
    while todo:
        commit = todo.pop()
        if commit not in found:
            found.add(commit)
            todo += [parent for parent in parents[commit] if parent in parents]
    return found


def search(
    suspects: Suspects, judge: Callable[[str], Verdict]
) -> tuple[tuple[str, ...], list[str]]:
    """Return the suspects that are left, and the commits that were tried, without the ends."""
    tries: dict[str, Verdict] = {}
    while (state := search_state(suspects, tries)).following:
        assert state.following not in tries
        tries[state.following] = judge(state.following)
    assert state.contradiction is None
    assert (state.culprit is None) == (len(state.left) > 1)
    return state.left, [
        commit for commit in tries if commit not in (suspects.good, suspects.bad, *suspects.forks)
    ]


@hypothesis.given(parents=histories(), data=st.data())
def test_culprit_is_found_or_is_among_the_suspects_that_cannot_be_separated(
    parents: Parents, data: st.DataObject
) -> None:
    culprit = data.draw(st.sampled_from(sorted(parents)))
    untried = data.draw(st.sets(st.sampled_from(sorted(parents)), max_size=len(parents) // 2))
    suspects = Suspects("good", parents)

    def judge(commit: str) -> Verdict:
        if commit in ("good", suspects.bad):
            return "bad" if commit == suspects.bad else "good"
        return (
            "skip"
            if commit in untried
            else "bad"
            if culprit in leads_to(parents, commit)
            else "good"
        )

    if culprit not in leads_to(parents, suspects.bad):
        return
    left, _ = search(suspects, judge)
    assert culprit in left
    assert all(commit in untried for commit in left[:-1])
    # Each suspect beside the last could be the culprit: no try separates them.
    assert left == (culprit,) or set(left) & untried


@hypothesis.given(count=st.integers(1, 300), data=st.data())
def test_line_of_commits_takes_no_more_steps_than_halving(count: int, data: st.DataObject) -> None:
    names = [f"c{number}" for number in range(count)]
    parents = {
        name: (names[number - 1],) if number else ("good",) for number, name in enumerate(names)
    }
    culprit = data.draw(st.integers(0, count - 1))
    left, tried = search(
        Suspects("good", parents),
        lambda commit: "good" if commit == "good" or int(commit[1:]) < culprit else "bad",
    )
    assert left == (names[culprit],)
    assert len(tried) <= math.ceil(math.log2(count))


def test_range_that_cannot_be_tried_is_skipped_in_large_steps() -> None:
    parents = {f"c{number}": (f"c{number - 1}",) for number in range(100)}
    broken = range(40, 70)

    def judge(commit: str) -> Verdict:
        if commit == "good":
            return "good"
        number = int(commit[1:])
        return "skip" if number in broken else "bad" if number >= 80 else "good"

    left, tried = search(Suspects("good", parents), judge)
    assert left == ("c80",)
    assert sum(int(commit[1:]) in broken for commit in tried) <= 3


def test_ends_and_merge_bases_are_tried_first_and_may_contradict() -> None:
    suspects = Suspects("good", {"a": ("fork",), "b": ("a",)}, ("fork",))
    order: list[tuple[str, str]] = []
    tries: dict[str, Verdict] = {}
    for verdict in ("good", "good", "bad"):
        state = search_state(suspects, tries)
        assert state.following
        order.append((state.following, state.role))
        tries[state.following] = verdict
    assert order == [("good", "good"), ("fork", "fork"), ("b", "bad")]
    assert search_state(suspects, {"good": "bad"}).contradiction == "good"
    assert search_state(suspects, {"good": "good", "fork": "bad"}).contradiction == "fork"
    assert (
        search_state(suspects, {"good": "good", "fork": "good", "b": "good"}).contradiction == "b"
    )
    assert search_state(suspects, {"good": "good", "fork": "skip", "b": "bad"}).following == "a"


def test_weights_are_those_of_git_on_a_history_with_merges(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    stream = ["reset refs/heads/main"]
    # Two lines that are merged at every fifth commit.
    for number in range(1, 61):
        others = (f"merge :{number - 4}",) if number % 5 == 0 else ()
        first = number - 1 if number % 3 or number < 4 else number - 2
        stream += [
            "commit refs/heads/main",
            f"mark :{number}",
            f"committer A <a@invalid> {number} +0000",
            "data 1",
            "x",
        ]
        stream += [*([f"from :{first}"] if number > 1 else []), *others]
    (tmp_path / "stream").write_text("\n".join(stream) + "\n")
    with (tmp_path / "stream").open() as file:
        subprocess.run(["git", "fast-import", "--quiet"], cwd=tmp_path, stdin=file, check=True)
    good, bad = (
        git(tmp_path, "rev-list", "--max-parents=0", "main"),
        git(tmp_path, "rev-parse", "main"),
    )
    commits = history.commits_between(Git(tmp_path), good, bad)
    suspects = Suspects(good, {commit.oid: commit.parents for commit in commits})
    found = re.findall(
        r"^(\w+) .*dist=(\d+)",
        git(tmp_path, "rev-list", "--bisect-all", bad, f"^{good}"),
        re.MULTILINE,
    )
    distances = {commit: int(distance) for commit, distance in found}
    state = search_state(suspects, {good: "good", bad: "bad"})
    assert set(state.left) == set(distances)
    assert state.following
    assert distances[state.following] == max(distances.values())
