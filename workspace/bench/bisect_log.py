"""Bisect log: the options, the range and every try of a bisect, in one file.

The file is written after each try, and the state of the search is always computed from the tries,
so that the same command resumes a bisect that was killed at any point.
"""

import hashlib
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from workspace.bench import ab_trees
from workspace.core import hints, records
from workspace.core.errors import CheckoutError, PatchDrift, SettingsError, WorkspaceError
from workspace.core.paths import Layout
from workspace.core.records import Document
from workspace.core.settings import nearest, shortened
from workspace.install import plan
from workspace.repo.git import Git, history, worktree

GOOD_REFS = "refs/good"

Verdict = Literal["good", "bad", "skip"]
Role = Literal["good", "fork", "bad", "suspect"]


@dataclass(frozen=True)
class SearchState:
    """The suspects that are left, oldest first, and the commit to try next with its role.

    The last suspect is known to be bad. `following` is None where nothing is left to try.
    `contradiction` is an end or a merge base with a verdict that it must not have.
    """

    left: tuple[str, ...]
    following: str | None
    role: Role
    contradiction: str | None = None

    @property
    def culprit(self) -> str | None:
        return (
            self.left[0]
            if len(self.left) == 1 and self.following is None and self.contradiction is None
            else None
        )

    @property
    def steps(self) -> int:
        """The approximate number of tries that are left."""
        return math.ceil(math.log2(len(self.left)))


@dataclass(frozen=True)
class BisectOptions:
    """The options of `nox -s bisect`; `factor` is as it was typed, a missing end is None."""

    run: str
    good: str | None = None
    bad: str | None = None
    is_patches: bool = False
    timeout_s: float = 600.0
    factor: str = "5"

    @property
    def command(self) -> str:
        """The command line with these options."""
        default = BisectOptions(self.run)
        argv = ["./scripts/nox", "-s", "bisect", "--"]
        if self.is_patches:
            argv += ["--patches"]
        else:
            argv += ["--good", self.good] if self.good else []
            argv += ["--bad", self.bad] if self.bad else []
        argv += ["--run", self.run]
        if self.timeout_s != default.timeout_s:
            argv += ["--timeout-s", f"{self.timeout_s:g}"]
        if self.factor != default.factor:
            argv += ["--factor", self.factor]
        return shlex.join(argv)


@dataclass(frozen=True)
class Try:
    """The outcome of one commit; `values` are a benchmark's, one for each start."""

    commit: str
    verdict: Verdict
    evidence: str
    seconds: float
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class BisectLog(records.Record, schema=1):
    """A bisect so far; `context` is a digest of the patches and their base commit.

    Tries in another context do not count.
    """

    options: BisectOptions
    good: str
    bad: str
    context: str
    tries: tuple[Try, ...] = ()

    @classmethod
    def upgrade(cls, document: Document) -> Document:
        # The first edition wrote them as `asked` and `ground`.
        options = document.get("options", document.get("asked"))
        context = document.get("context", document.get("ground"))
        return {**document, "options": options, "context": context}

    @property
    def verdicts(self) -> dict[str, Verdict]:
        return {attempt.commit: attempt.verdict for attempt in self.tries}

    @property
    def seconds(self) -> float:
        return sum(attempt.seconds for attempt in self.tries)

    def of(self, commit: str) -> Try | None:
        """Return the try of a commit, None if it was not tried."""
        return next((attempt for attempt in self.tries if attempt.commit == commit), None)

    def after(self, attempt: Try) -> "BisectLog":
        return replace(self, tries=(*self.tries, attempt))

    def inheriting(self, former: "BisectLog") -> "BisectLog":
        """Take over the tries of another bisect with the same predicate and context.

        Tries of a benchmark are not taken over: it compares with its own good end.
        """
        same = [
            (log.options.run, log.options.timeout_s, log.options.is_patches, log.context)
            for log in (self, former)
        ]
        return (
            replace(self, tries=former.tries)
            if same[0] == same[1] and not any(attempt.values for attempt in former.tries)
            else self
        )


def context_digest(base: str, patches: Sequence[Path]) -> str:
    """Return a SHA-256 of the base commit and of the patches' names and contents."""
    digest = hashlib.sha256(base.encode())
    for patch in patches:
        content = patch.read_bytes()
        digest.update(f"{patch.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def log_path(layout: Layout) -> Path:
    return layout.state / "bisect.json"


def write_log(layout: Layout, log: BisectLog) -> None:
    records.write(log_path(layout), log)


def read_log(layout: Layout) -> BisectLog | None:
    """Return the bisect in progress, None if there is none.

    Raises WorkspaceError for a log that cannot be read.
    """
    path = log_path(layout)
    try:
        return records.load(path, BisectLog)
    except records.DecodeError as exc:
        raise WorkspaceError(
            f"cannot resume the bisect in {layout.relative(path)}: {exc}",
            hint=hints.text("bench.bisect_abort"),
        ) from exc


@dataclass(frozen=True)
class Context:
    """The pin's commit and the series on it, from which every tree is made."""

    base: str
    patches: tuple[Path, ...]


@dataclass(frozen=True)
class Range:
    """The commits of `good..bad` to search, parents first; the last of `suspects` is `bad`.

    `forks` are the merge bases of the two, none where good is an ancestor of bad. `carried` are
    the patches to apply to each commit, `names` the patches of which the commits of a series are
    made.
    """

    git: Git
    good: str
    suspects: tuple[str, ...]
    forks: tuple[str, ...]
    subjects: Mapping[str, str]
    carried: tuple[Path, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    def title(self, commit: str) -> str:
        """Return the patch of a commit, or its short OID and subject."""
        if commit in self.names:
            return self.names[commit]
        return (
            "the pin without patches"
            if self.names and commit == self.good
            else f"{commit[:12]} {self.subjects.get(commit, '')}".rstrip()
        )

    def state(self, tries: Mapping[str, Verdict]) -> SearchState:
        """Return the state of the search after these tries.

        The ends are tried first, and with them the merge bases, which must be good too.
        """
        forks: list[tuple[str, Role]] = [(fork, "fork") for fork in self.forks]
        ends: list[tuple[str, Role]] = [(self.good, "good"), *forks, (self.suspects[-1], "bad")]
        for commit, role in ends:
            verdict = tries.get(commit)
            if verdict is None:
                return SearchState(self.suspects, commit, role)
            wrong = "good" if role == "bad" else "bad"
            # As in git, a merge base that cannot be tried counts as good. Otherwise the search
            # would continue between it and the good end, for a commit that fixes the fault.
            if verdict == wrong or (verdict == "skip" and role != "fork"):
                return SearchState(self.suspects, None, role, contradiction=commit)
        bad = next(commit for commit in self.suspects if tries.get(commit) == "bad")
        good = [commit for commit in self.suspects if tries.get(commit) == "good"]
        distances = _distances(self.git, bad, (self.good, *good))
        left = tuple(commit for commit in self.suspects if commit in distances)
        return SearchState(left, _following(left, distances, tries), "suspect")


def _distances(git: Git, bad: str, good: Iterable[str]) -> dict[str, int]:
    """Return the ancestors of `bad` that no good commit has, with git's weights.

    The weight is the number of commits that either verdict rules out (git-rev-list(1),
    --bisect-all).
    """
    listing = git.look("rev-list", "--bisect-all", bad, *(f"^{commit}" for commit in good), "--")
    return {
        line.split(" ")[0]: int(line.rpartition("dist=")[2].rstrip(")"))
        for line in listing.out.splitlines()
    }


def _following(
    left: Sequence[str], distances: Mapping[str, int], tries: Mapping[str, Verdict]
) -> str | None:
    """Return the commit that divides the suspects best, and is far from skipped commits.

    The neighbours of a commit that cannot be tried can rarely be tried either, so a commit is
    worth at most twice its distance from each such commit.
    """
    skipped = [index for index, commit in enumerate(left) if tries.get(commit) == "skip"]

    def worth(index: int) -> int:
        return min([distances[left[index]], *(2 * abs(index - other) for other in skipped)])

    untried = (index for index in range(len(left) - 1) if index not in skipped)
    best = max(untried, key=worth, default=None)
    return None if best is None else left[best]


def bisect_context(layout: Layout, observed: plan.Observation) -> Context:
    """Return the context of the checkout. Raises CheckoutError where there is no checkout."""
    stack = observed.stack
    if stack is None or observed.checkout.base is None:
        raise CheckoutError(
            f"there is nothing to search: {layout.relative(layout.vllm)} is"
            f" {observed.checkout.detail}",
            hint=hints.text("inv.bootstrap"),
        )
    return Context(
        observed.checkout.base, tuple(layout.patches("vllm") / name for name in stack.names)
    )


def range_ends(layout: Layout, context: Context, options: BisectOptions) -> tuple[str, str]:
    """Return the good and the bad commit: by default the last known-good state, and the pin.

    With --patches they are the pin and the last commit of the series. Raises SettingsError for an
    end that does not exist, CheckoutError for ends without common history, and PatchConflict or
    PatchDrift for a series that does not apply.
    """
    git = Git(layout.vllm)
    if options.is_patches:
        return context.base, _tip(layout, git, context)
    bad = _resolved(git, "--bad", options.bad) if options.bad else context.base
    good = (
        _resolved(git, "--good", options.good)
        if options.good
        else _last_good(git, bad, run=options.run)
    )
    forks = history.forks(git, good, bad)
    good_name, bad_name = options.good or good[:12], options.bad or bad[:12]
    if not forks:
        raise CheckoutError(
            f"{good_name} and {bad_name} have no common history",
            hint=hints.text("bench.no_history"),
        )
    if bad in forks:
        raise SettingsError(
            f"{bad_name} is no later than {good_name}: there is no commit between them",
            hint=hints.text("bench.good_and_bad", run=options.run),
        )
    return good, bad


def _last_good(git: Git, bad: str, *, run: str) -> str:
    """Return the commit at which the last known-good state left the history of `bad`."""
    states = worktree.references(git, GOOD_REFS).values()
    found = history.last_in_common(git, states, bad)
    if found is None:
        raise SettingsError(
            f"there is no known-good state before {bad[:12]} from which to search",
            hint=hints.text("bench.good_example", run=run),
        )
    return found


def open_range(layout: Layout, context: Context, good: str, bad: str, *, is_patches: bool) -> Range:
    """Read the history between the ends. Raises CheckoutError where vendor/vllm lacks an end."""
    git = Git(layout.vllm)
    if missing := {good, bad} - git.present((good, bad)):
        raise CheckoutError(
            f"vendor/vllm no longer has {missing.pop()[:12]}, an end of the bisect",
            hint=hints.text("bench.bisect_abort"),
        )
    commits = history.commits_between(git, good, bad)
    forks = tuple(fork for fork in history.forks(git, good, bad) if fork != good)
    subjects_of_ends = {commit: history.subject(git, commit) for commit in (good, *forks)}
    names = (
        {commit.oid: patch.name for commit, patch in zip(commits, context.patches, strict=True)}
        if is_patches
        else {}
    )
    return Range(
        git,
        good,
        tuple(commit.oid for commit in commits),
        forks,
        {**subjects_of_ends, **{commit.oid: commit.subject for commit in commits}},
        () if is_patches else context.patches,
        names,
    )


def _resolved(git: Git, flag: str, ref: str) -> str:
    for name in (ref, f"v{ref}"):
        if found := git.resolve(name):
            return found
    # A release that was not fetched yet is like a former one.
    alike = None if re.match(r"v?\d", ref) else nearest(ref, history.tags(git))
    hint = (
        hints.text("core.did_you_mean", alike=alike)
        if alike
        else hints.text("bench.fetch_tag", tag=ref if ref.startswith("v") else "v0.30.0")
    )
    raise SettingsError(f"{flag}: vendor/vllm has no {shortened(ref)!r}", hint=hint)


def _tip(layout: Layout, git: Git, context: Context) -> str:
    """Apply the series to the pin, and return its last commit, which is the same each time."""
    if not context.patches:
        raise SettingsError(
            "patches/vllm/series lists no patch, so there is nothing to search",
            hint=hints.text("bench.bisect_smoke"),
        )
    tip = ab_trees.apply_series(layout, context.base, context.patches, description="patches/vllm")
    slugs = git.slugs(context.base, tip)
    if len(slugs) != len(context.patches):
        lost = [patch.name for patch in context.patches if patch.stem not in slugs]
        raise PatchDrift(
            f"{', '.join(lost) or 'a patch'} changes nothing on the pin",
            hint=hints.text("bench.drop_series_line"),
        )
    return tip
