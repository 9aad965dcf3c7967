"""The course of a bisect: what was asked for, between which commits, and every try so far. One
file, written anew after each try.

What follows from the tries is worked out from them each time, so that a bisect which was killed
anywhere is gone on with by the same command.
"""

import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from workspace.core.errors import (
    CheckoutError,
    PatchConflict,
    PatchDrift,
    SettingsError,
    WorkspaceError,
)
from workspace.core.files import read_regular, write_atomic
from workspace.core.paths import Layout
from workspace.core.settings import nearest, shortened
from workspace.install import plan
from workspace.repo.git import Git, am, history, worktree

Verdict = Literal["good", "bad", "skip"]
Role = Literal["good", "fork", "bad", "suspect"]


@dataclass(frozen=True)
class Suspects:
    """Every commit of `good..bad` with its parents, parents first: the last is `bad`. `forks` are
    where the two parted, none where good is an ancestor.
    """

    good: str
    parents: Mapping[str, tuple[str, ...]]
    forks: tuple[str, ...] = ()

    @property
    def bad(self) -> str:
        *_, last = self.parents
        return last


@dataclass(frozen=True)
class Standing:
    """How the search stands: who is left, oldest first, the last of them known to be bad, and whom
    to try next, as what; None where nothing is left to try.

    `contradiction` is an end, or a fork, that is not what it has to be.
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
        """About how many more tries it takes."""
        return math.ceil(math.log2(len(self.left)))


def search_state(suspects: Suspects, tries: Mapping[str, Verdict]) -> Standing:
    """Work out from the tries, in their order, what is known. First the ends are to be tried, and
    the forks, which have to be good too.
    """
    every = tuple(suspects.parents)
    ends: list[tuple[str, Role]] = [
        (suspects.good, "good"),
        *((fork, "fork") for fork in suspects.forks),
        (suspects.bad, "bad"),
    ]
    for commit, role in ends:
        said = tries.get(commit)
        if said is None:
            return Standing(every, commit, role)
        wrong = "good" if role == "bad" else "bad"
        # A fork that cannot be tried is taken for good, as git does: what is between it and good
        # would else be searched for a commit that mends.
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
    """Whoever every bad one leads to and no good one does. Not empty: only what lies before the
    last bad one is ever tried.
    """
    mask = (1 << len(reach)) - 1
    for commit, said in tries.items():
        if said == "bad":
            mask &= reach[commit]
        elif said == "good":
            mask &= ~reach[commit]
    return mask


def _following(
    left: Sequence[str], reach: Mapping[str, int], mask: int, tries: Mapping[str, Verdict]
) -> str | None:
    """Whoever has half of all; but those next to one that cannot be tried rarely can, so that half
    as far from each such counts too.
    """
    untried = [number for number, commit in enumerate(left) if tries.get(commit) == "skip"]

    def worth(number: int) -> int:
        weight = (reach[left[number]] & mask).bit_count()
        return min(weight, len(left) - weight, *(2 * abs(number - other) for other in untried))

    best = max(
        (number for number in range(len(left) - 1) if number not in untried),
        key=worth,
        default=None,
    )
    return None if best is None else left[best]


SCHEMA = 1
ABORT = "./scripts/nox -s bisect -- --abort"


@dataclass(frozen=True)
class BisectOptions:
    """What the command line says. `factor` is as it was typed, `good` and `bad` are None where
    nothing was.
    """

    run: str
    good: str | None = None
    bad: str | None = None
    is_patches: bool = False
    timeout_s: float = 600.0
    factor: str = "5"

    @property
    def command(self) -> str:
        """The command line that asks for this."""
        ends = [
            word
            for name, ref in (("--good", self.good), ("--bad", self.bad))
            if ref
            for word in (name, ref)
        ]
        usual = BisectOptions(self.run)
        more = [
            *(["--timeout-s", f"{self.timeout_s:g}"] if self.timeout_s != usual.timeout_s else [])
        ]
        more += ["--factor", self.factor] if self.factor != usual.factor else []
        return shlex.join(
            [
                "./scripts/nox",
                "-s",
                "bisect",
                "--",
                *(["--patches"] if self.is_patches else ends),
                "--run",
                self.run,
                *more,
            ]
        )


@dataclass(frozen=True)
class Try:
    """One commit, and what was found; `values` are what a benchmark measured, one a start."""

    commit: str
    verdict: Verdict
    evidence: str
    seconds: float
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class BisectLog:
    """`ground` is a digest of what the patches are on, and of the patches: tries on another ground
    say nothing of this one.
    """

    options: BisectOptions
    good: str
    bad: str
    ground: str
    tries: tuple[Try, ...] = ()

    @property
    def verdicts(self) -> dict[str, Verdict]:
        return {one.commit: one.verdict for one in self.tries}

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.tries)

    def of(self, commit: str) -> Try | None:
        """What is known of a commit."""
        return next((one for one in self.tries if one.commit == commit), None)

    def after(self, one: Try) -> "BisectLog":
        return replace(self, tries=(*self.tries, one))

    def inheriting(self, former: "BisectLog") -> "BisectLog":
        """Take over what another course has found out, where it asked the same of the same; a
        benchmark is judged against its own good end.
        """
        same = [
            (one.options.run, one.options.timeout_s, one.options.is_patches, one.ground)
            for one in (self, former)
        ]
        return (
            replace(self, tries=former.tries)
            if same[0] == same[1] and not any(one.values for one in former.tries)
            else self
        )


def context_digest(base: str, patches: Sequence[Path]) -> str:
    """One SHA-256 over the commit that patches are on, their names and their content."""
    digest = hashlib.sha256(base.encode())
    for patch in patches:
        content = patch.read_bytes()
        digest.update(f"{patch.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def log_path(layout: Layout) -> Path:
    return layout.state / "bisect.json"


def write_log(layout: Layout, course: BisectLog) -> None:
    write_atomic(
        log_path(layout),
        json.dumps({"schema": SCHEMA, **asdict(course)}, indent=1, allow_nan=False).encode(),
    )


def read_log(layout: Layout) -> BisectLog | None:
    """Return the bisect that is under way, None where there is none. Raises WorkspaceError for one
    that cannot be read.
    """
    path = log_path(layout)
    try:
        return _course(json.loads(read_regular(path)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise WorkspaceError(
            f"{layout.relative(path)} is no bisect that can be gone on with: {exc}", hint=ABORT
        ) from exc


def _course(document: Mapping[str, object]) -> BisectLog:
    if document["schema"] != SCHEMA:
        raise ValueError(f"it has schema {document['schema']}, this workspace reads {SCHEMA}")
    # The first edition named the options otherwise.
    options, tries = document.get("options", document.get("asked")), document["tries"]
    assert isinstance(options, dict)
    assert isinstance(tries, list)
    found = tuple(Try(**{**one, "values": tuple(one["values"])}) for one in tries)
    if any(one.verdict not in get_args(Verdict) for one in found):
        raise ValueError("it has a verdict that is none")
    return BisectLog(
        BisectOptions(**options),
        str(document["good"]),
        str(document["bad"]),
        str(document["ground"]),
        found,
    )


GOOD_REFS = "refs/good"


@dataclass(frozen=True)
class Ground:
    """What every tree is made from: the pin's commit, and the series that is on it."""

    base: str
    patches: tuple[Path, ...]


@dataclass(frozen=True)
class Field:
    """`carried` are the patches that go on each commit; `names` are those that the commits of a
    series are made of.
    """

    suspects: Suspects
    subjects: Mapping[str, str]
    carried: tuple[Path, ...]
    names: Mapping[str, str]

    def called(self, commit: str) -> str:
        """A commit as a person knows it."""
        if commit in self.names:
            return self.names[commit]
        return (
            "the pin without patches"
            if self.names and commit == self.suspects.good
            else f"{commit[:12]} {self.subjects.get(commit, '')}".rstrip()
        )


def bisect_context(layout: Layout, observed: plan.Observation) -> Ground:
    """Raises CheckoutError where there is no checkout to search in."""
    stack = observed.stack
    if stack is None or observed.checkout.base is None:
        raise CheckoutError(
            f"{layout.relative(layout.vllm)} is {observed.checkout.detail}, so there is nothing to"
            " search in",
            hint="./scripts/inv bootstrap",
        )
    return Ground(
        observed.checkout.base, tuple(layout.patches("vllm") / name for name in stack.names)
    )


def range_ends(layout: Layout, ground: Ground, options: BisectOptions) -> tuple[str, str]:
    """The commits that the search goes between: what is asked for, else the last good state's or
    the pin, and the pin.

    Raises SettingsError for an end that is none, CheckoutError where they have nothing to do with
    each other, and for a series what it does not apply.
    """
    git = Git(layout.vllm)
    if options.is_patches:
        return ground.base, _tip(layout, git, ground)
    bad = _resolved(git, "--bad", options.bad) if options.bad else ground.base
    if options.good:
        good = _resolved(git, "--good", options.good)
    else:
        states = worktree.references(git, GOOD_REFS).values()
        found = history.last_in_common(git, states, bad)
        if found is None:
            raise SettingsError(
                f"no good state is known from before {bad[:12]}, so there is nothing to search"
                " from",
                hint="--good v0.30.0    for example",
            )
        good = found
    forks = history.forks(git, good, bad)
    if not forks:
        hint = (
            "./scripts/inv status    says what the checkout was made from: a release archive has no"
            " history"
        )
        raise CheckoutError(
            f"{options.good or good[:12]} and {options.bad or bad[:12]} have no history in common",
            hint=hint,
        )
    if bad in forks:
        raise SettingsError(
            f"{options.bad or bad[:12]} is no later than {options.good or good[:12]}: there is no"
            " commit between them",
            hint="--good OLDER --bad NEWER",
        )
    return good, bad


def open_range(layout: Layout, ground: Ground, good: str, bad: str, *, is_patches: bool) -> Field:
    """Read the history between the ends. Raises CheckoutError where it is no longer there."""
    git = Git(layout.vllm)
    if missing := {good, bad} - git.present((good, bad)):
        raise CheckoutError(
            f"vendor/vllm no longer has {missing.pop()[:12]}, where the bisect goes",
            hint="./scripts/nox -s bisect -- --abort",
        )
    commits = history.commits_between(git, good, bad)
    forks = tuple(fork for fork in history.forks(git, good, bad) if fork != good)
    ends_too = {commit: history.subject(git, commit) for commit in (good, *forks)}
    names = (
        {commit.oid: patch.name for commit, patch in zip(commits, ground.patches, strict=True)}
        if is_patches
        else {}
    )
    suspects = Suspects(good, {commit.oid: commit.parents for commit in commits}, forks)
    return Field(
        suspects,
        {**ends_too, **{commit.oid: commit.subject for commit in commits}},
        () if is_patches else ground.patches,
        names,
    )


def _resolved(git: Git, flag: str, ref: str) -> str:
    for name in (ref, f"v{ref}"):
        if found := git.resolve(name):
            return found
    alike = nearest(ref, history.tags(git))
    hint = (
        f"did you mean {alike}?"
        if alike
        else f"git -C vendor/vllm fetch origin tag {ref if ref.startswith('v') else 'v0.30.0'}"
    )
    raise SettingsError(f"{flag}: vendor/vllm has no {shortened(ref)!r}", hint=hint)


def _tip(layout: Layout, git: Git, ground: Ground) -> str:
    """The last commit of the series, which are made anew, the same as ever."""
    if not ground.patches:
        raise SettingsError(
            "patches/vllm/series names no patch, so none can be to blame",
            hint="./scripts/nox -s bisect -- --good v0.30.0 --run smoke",
        )
    made = am.applied(git, ground.base, ground.patches, place=layout.state / "am")
    if made.tip is None:
        name = ground.patches[made.position - 1].name
        raise PatchConflict(
            f"patches/vllm/{name} does not apply: {', '.join(made.conflicted)}",
            hint="./scripts/inv patch.apply",
        )
    slugs = git.slugs(ground.base, made.tip)
    if len(slugs) != len(ground.patches):
        lost = [patch.name for patch in ground.patches if patch.stem not in slugs]
        raise PatchDrift(
            f"{', '.join(lost) or 'a patch'} changes nothing on the pin",
            hint="take its line out of patches/vllm/series",
        )
    return made.tip
