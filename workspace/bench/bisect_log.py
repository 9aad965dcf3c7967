"""The range and the log of a bisect: its ends, its patches, and every try with its evidence.

The log is written after each try. The search is `git bisect`, which takes the same way again with
the same verdicts, so that the same command resumes a bisect that was killed at any point.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from workspace.bench import ab_trees
from workspace.core import hints, records
from workspace.core.errors import (
    CheckoutError,
    PatchDrift,
    SettingsError,
    WorkspaceError,
    counted,
)
from workspace.core.paths import Layout
from workspace.core.records import Document
from workspace.core.settings import shortened
from workspace.repo.git import Git, history, worktree

GOOD_REFS = "refs/good"

Verdict = Literal["good", "bad", "skip"]


@dataclass(frozen=True)
class BisectOptions:
    """The options of `nox -s bisect`; `factor` is as it was typed, a missing end is None."""

    run: str
    good: str | None = None
    bad: str | None = None
    is_patches: bool = False
    timeout_s: float = 600.0
    factor: str = "5"


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
    """A bisect so far; `context` is a digest of the patches and their base commit."""

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
    def seconds(self) -> float:
        return sum(attempt.seconds for attempt in self.tries)

    def of(self, commit: str) -> Try | None:
        """Return the try of a commit, None if it was not tried."""
        return next((attempt for attempt in self.tries if attempt.commit == commit), None)

    def after(self, attempt: Try) -> "BisectLog":
        return replace(self, tries=(*self.tries, attempt))

    @property
    def summary(self) -> str:
        return f"{counted(len(self.tries), 'step')}, {self.seconds / 60:.1f} min"

    def is_of(self, other: "BisectLog") -> bool:
        """Return whether both are the same search, whatever was tried."""
        return replace(self, tries=()) == replace(other, tries=())


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
class Range:
    """The commits of `good..bad` to search.

    `base` is the pin's commit, `patches` are those of the series, `names` the patches of which the
    commits of a series are made.
    """

    git: Git
    base: str
    good: str
    bad: str
    patches: tuple[Path, ...]
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def carried(self) -> tuple[Path, ...]:
        """The patches to apply to each commit, which the commits of a series have already."""
        return () if self.names else self.patches

    def title(self, commit: str) -> str:
        """Return the patch of a commit, or its short OID and subject."""
        if self.names and commit == self.good:
            return "the pin without patches"
        return self.names.get(commit) or f"{commit[:12]} {history.subject(self.git, commit)}"


def fresh_log(searched: Range, options: BisectOptions) -> BisectLog:
    """Return a log without tries. Its context is a SHA-256 of the base commit and the patches."""
    digest = hashlib.sha256(searched.base.encode())
    for patch in searched.patches:
        content = patch.read_bytes()
        digest.update(f"{patch.name} {len(content)}\n".encode() + content)
    return BisectLog(options, searched.good, searched.bad, digest.hexdigest())


def open_range(
    layout: Layout, base: str, patches: tuple[Path, ...], options: BisectOptions
) -> Range:
    """Return the range to search: by default from the last known-good state to the pin.

    With --patches from the pin to the last commit of the series. Raises SettingsError for an end
    that does not exist, CheckoutError for ends without common history, and PatchConflict or
    PatchDrift for a series that does not apply.
    """
    git = Git(layout.vllm)
    if options.is_patches:
        tip, names = _series(layout, git, base, patches)
        return Range(git, base, base, tip, patches, names)
    bad = _resolved(git, "--bad", options.bad) if options.bad else base
    good = (
        _resolved(git, "--good", options.good)
        if options.good
        else _last_good(git, bad, run=options.run)
    )
    _require_order(git, good, bad, options)
    return Range(git, base, good, bad, patches)


def _require_order(git: Git, good: str, bad: str, options: BisectOptions) -> None:
    """Raise where the ends have no common history, or no commit is between them."""
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


def _resolved(git: Git, flag: str, ref: str) -> str:
    for name in (ref, f"v{ref}"):
        if found := git.resolve(name):
            return found
    tag = ref if ref.startswith("v") else "v0.30.0"
    raise SettingsError(
        f"{flag}: vendor/vllm has no {shortened(ref)!r}",
        hint=hints.text("bench.fetch_tag", tag=tag),
    )


def _series(
    layout: Layout, git: Git, base: str, patches: Sequence[Path]
) -> tuple[str, dict[str, str]]:
    """Apply the series to the pin: return its last commit, and the patch of each commit.

    The commits are the same each time.
    """
    if not patches:
        raise SettingsError(
            "patches/vllm/series lists no patch, so there is nothing to search",
            hint=hints.text("bench.bisect_smoke"),
        )
    tip = ab_trees.apply_series(layout, base, patches, description="patches/vllm")
    commits = git.look("rev-list", "--reverse", f"{base}..{tip}").out.split()
    if len(commits) != len(patches):
        raise PatchDrift(
            "a patch of patches/vllm changes nothing on the pin",
            hint=hints.text("bench.drop_series_line"),
        )
    return tip, {commit: patch.name for commit, patch in zip(commits, patches, strict=True)}
