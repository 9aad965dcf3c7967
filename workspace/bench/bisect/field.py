"""What is searched: upstream's commits between two ends with the series carried along on each, or the series itself, patch by patch.

Either way it is a range of commits in vendor/vllm. Nothing of the user's there is moved or named anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from workspace.bench.bisect.course import Asked
from workspace.bench.bisect.search import Suspects
from workspace.build import plan
from workspace.core.errors import CheckoutError, PatchConflict, PatchDrift, SettingsError
from workspace.core.layout import Layout
from workspace.core.settings import nearest, shortened
from workspace.source.git import Git, am, bisection, worktree

GOOD_REFS = "refs/good"


@dataclass(frozen=True)
class Ground:
    """What every tree is made from: the pin's commit, and the series that is on it."""

    base: str
    patches: tuple[Path, ...]


@dataclass(frozen=True)
class Field:
    """`carried` are the patches that go on each commit; `names` are those that the commits of a series are made of."""

    suspects: Suspects
    subjects: Mapping[str, str]
    carried: tuple[Path, ...]
    names: Mapping[str, str]

    def called(self, commit: str) -> str:
        """A commit as a person knows it."""
        if commit in self.names:
            return self.names[commit]
        return "the pin without patches" if self.names and commit == self.suspects.good else f"{commit[:12]} {self.subjects.get(commit, '')}".rstrip()


def ground(layout: Layout, observed: plan.Observation) -> Ground:
    """Raises CheckoutError where there is no checkout to search in."""
    stack = observed.stack
    if stack is None or observed.checkout.base is None:
        raise CheckoutError(f"{layout.relative(layout.vllm)} is {observed.checkout.detail}, so there is nothing to search in", hint="./scripts/inv bootstrap")
    return Ground(observed.checkout.base, tuple(layout.patches("vllm") / name for name in stack.names))


def ends(layout: Layout, ground: Ground, asked: Asked) -> tuple[str, str]:
    """The commits that the search goes between: what is asked for, else the last good state's or the pin, and the pin.

    Raises SettingsError for an end that is none, CheckoutError where they have nothing to do with each other, and for a series what it does not apply.
    """
    git = Git(layout.vllm)
    if asked.is_patches:
        return ground.base, _tip(layout, git, ground)
    bad = _resolved(git, "--bad", asked.bad) if asked.bad else ground.base
    if asked.good:
        good = _resolved(git, "--good", asked.good)
    else:
        states = worktree.references(git, GOOD_REFS).values()
        found = bisection.last_in_common(git, states, bad)
        if found is None:
            raise SettingsError(f"no good state is known from before {bad[:12]}, so there is nothing to search from", hint="--good v0.30.0    for example")
        good = found
    forks = bisection.forks(git, good, bad)
    if not forks:
        hint = "./scripts/inv status    says what the checkout was made from: a release archive has no history"
        raise CheckoutError(f"{asked.good or good[:12]} and {asked.bad or bad[:12]} have no history in common", hint=hint)
    if bad in forks:
        raise SettingsError(
            f"{asked.bad or bad[:12]} is no later than {asked.good or good[:12]}: there is no commit between them", hint="--good OLDER --bad NEWER"
        )
    return good, bad


def open_(layout: Layout, ground: Ground, good: str, bad: str, *, is_patches: bool) -> Field:
    """Read the history between the ends. Raises CheckoutError where it is no longer there."""
    git = Git(layout.vllm)
    if missing := {good, bad} - git.present((good, bad)):
        raise CheckoutError(f"vendor/vllm no longer has {missing.pop()[:12]}, where the bisect goes", hint="./scripts/nox -s bisect -- --abort")
    commits = bisection.between(git, good, bad)
    forks = tuple(fork for fork in bisection.forks(git, good, bad) if fork != good)
    ends_too = {commit: bisection.subject(git, commit) for commit in (good, *forks)}
    names = {commit.oid: patch.name for commit, patch in zip(commits, ground.patches, strict=True)} if is_patches else {}
    suspects = Suspects(good, {commit.oid: commit.parents for commit in commits}, forks)
    return Field(suspects, {**ends_too, **{commit.oid: commit.subject for commit in commits}}, () if is_patches else ground.patches, names)


def _resolved(git: Git, flag: str, ref: str) -> str:
    for name in (ref, f"v{ref}"):
        if found := git.resolve(name):
            return found
    alike = nearest(ref, bisection.tags(git))
    hint = f"did you mean {alike}?" if alike else f"git -C vendor/vllm fetch origin tag {ref if ref.startswith('v') else 'v0.30.0'}"
    raise SettingsError(f"{flag}: vendor/vllm has no {shortened(ref)!r}", hint=hint)


def _tip(layout: Layout, git: Git, ground: Ground) -> str:
    """The last commit of the series, which are made anew, the same as ever."""
    if not ground.patches:
        raise SettingsError("patches/vllm/series names no patch, so none can be to blame", hint="./scripts/nox -s bisect -- --good v0.30.0 --run smoke")
    made = am.applied(git, ground.base, ground.patches, place=layout.state / "am")
    if made.tip is None:
        name = ground.patches[made.position - 1].name
        raise PatchConflict(f"patches/vllm/{name} does not apply: {', '.join(made.conflicted)}", hint="./scripts/inv patch.apply")
    slugs = git.slugs(ground.base, made.tip)
    if len(slugs) != len(ground.patches):
        lost = [patch.name for patch in ground.patches if patch.stem not in slugs]
        raise PatchDrift(f"{', '.join(lost) or 'a patch'} changes nothing on the pin", hint="take its line out of patches/vllm/series")
    return made.tip
