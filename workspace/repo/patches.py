"""The stack of local patches on a pin: its state, read from git alone, and its application."""

import contextlib
import hashlib
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from workspace.core import hints, records
from workspace.core.console import RunLog
from workspace.core.errors import PatchDrift, SettingsError, counted
from workspace.core.paths import Layout, typed
from workspace.core.settings import Settings
from workspace.repo import checkout as checkouts
from workspace.repo import series
from workspace.repo.checkout import Checkout, Kind
from workspace.repo.git import Git, am, history, repository, worktree
from workspace.repo.pins import Pin
from workspace.repo.series import BASE_REF as BASE_REF
from workspace.repo.series import KEPT_REFS
from workspace.repo.series import TIP_REF as TIP_REF
from workspace.repo.series import Stack as Stack
from workspace.repo.series import State as State

APPLY, UNAPPLY = "./scripts/inv patch.apply", "./scripts/inv patch.unapply"


@dataclass(frozen=True)
class Session:
    """A stack that a verb may change, under the workspace's lock."""

    layout: Layout
    settings: Settings
    project: str
    pin: Pin
    checkout: Checkout
    run_log: RunLog


@dataclass(frozen=True)
class ImportOptions:
    """What `inv patch.import` takes.

    `stops` leaves a conflict in the checkout, `squash` takes the net change as one patch, `subject`
    is the subject of one patch, `without_tests` leaves out all changes below tests/.
    """

    source: str
    stops: bool = False
    squash: bool = False
    subject: str = ""
    without_tests: bool = False

    def command(self, project: str) -> str:
        """Return the command line of this import."""
        is_path = not re.match(r"#?\d+$|https?://", self.source)
        argv = [
            "./scripts/inv",
            "patch.import",
            str(typed(self.source)) if is_path else self.source,
        ]
        argv += ["--squash"] if self.squash else []
        argv += ["--subject", self.subject] if self.subject else []
        argv += ["--without-tests"] if self.without_tests else []
        argv += ["--merge"] if self.stops else []
        return shlex.join([*argv, *([] if project == "vllm" else ["--project", project])])


@dataclass(frozen=True)
class Origin:
    """Mails to import: their bytes, their name in messages, and their public URL if any.

    `net` gives the net change of a pull request as a diff, or None where only its mails are known.
    `has_merges`: the request merged main, which is in no mail. `note` is a sentence for the user.
    """

    raw: bytes
    name: str
    url: str | None
    net: Callable[[], bytes | None] = lambda: None
    has_merges: bool = False
    note: str = ""


def next_command(layout: Layout, pin: Pin, stack: Stack, lacking: Sequence[str] = ()) -> str:
    """Return the command line to type next; the commits `lacking` have no Upstream-Status."""
    path = checkouts.folder_of(layout, pin)
    if stack.untracked and stack.has_patches:
        return series.taking_hint(layout.relative(path), stack.untracked)
    if stack.state is State.APPLIED:
        return hints.text("repo.export_later", path=layout.relative(path))
    if stack.state is State.UNAPPLIED:
        return hints.text("inv.patch_apply")
    if stack.state is State.UNEXPORTED:
        return _exporting(layout.relative(path), stack, lacking)
    if stack.head is None and stack.state is State.FOREIGN:
        return checkouts.keeping_command(layout.relative(path))
    return series.refusal(layout.relative(path), Git(path), stack, verb=APPLY).hint or APPLY


def _exporting(shown: str, stack: Stack, lacking: Sequence[str]) -> str:
    """Return the command that exports the commits, some of which lack an Upstream-Status."""
    if not lacking or stack.head is None or stack.base is None:
        return hints.text("inv.patch_export")
    if list(lacking) == [stack.head[:12]]:
        return hints.text("repo.add_trailer", shown=shown)
    return hints.text("repo.rebase_interactive", shown=shown, start=stack.base[:12])


def observe(layout: Layout, project: str, pin: Pin, checkout: Checkout) -> Stack:
    """Return the stack; nothing in the checkout is written.

    The expected tree is None where the series does not apply to the base. Raises SettingsError and
    PatchDrift as series.read_series does.
    """
    wanted = series.read_series(layout.patches(project), pin=pin.commit)
    if checkout.base is None or checkout.head is None:
        state = State.MISSING if checkout.kind is Kind.MISSING else State.FOREIGN
        return Stack(state, checkout.base, checkout.head, None, None, wanted.names, ())
    git = Git(checkouts.folder_of(layout, pin))
    standing = history.standing(git, checkout.head, checkout.base)
    operation, tree = standing.operation, standing.tree
    expected = _expected_tree(layout, project, git, checkout.base, wanted.names)
    dirty = git.edits()
    is_at_base = checkout.head == checkout.base
    if operation:
        state = State.IN_PROGRESS
    elif is_at_base:
        # Patches that undo each other give the tree of the base: they count as applied only if
        # their commits exist.
        state = (
            State.APPLIED
            if tree == expected and not wanted.names
            else State.DIRTY
            if dirty
            else State.UNAPPLIED
        )
    elif standing.is_on_base:
        state = State.APPLIED if tree == expected else State.UNEXPORTED
    else:
        state = State.FOREIGN
        # Elsewhere a bisect is no obstacle: each of its steps may be built.
        operation = "bisect" if git.path_of("BISECT_LOG").exists() else None
    return Stack(
        state,
        checkout.base,
        checkout.head,
        tree,
        expected,
        wanted.names,
        dirty,
        repository.untracked(git),
        f"git {operation}" if operation else "",
    )


def apply(
    layout: Layout,
    project: str,
    pin: Pin,
    checkout: Checkout,
    *,
    run_log: RunLog,
    stop_at_conflict: bool = False,
) -> Stack:
    """Apply the whole series to its base, or nothing of it. An applied stack is left untouched.

    With `stop_at_conflict` an `am` is left in the checkout where a patch does not apply, for
    overview.resume. Raises CheckoutError where the checkout is missing, dirty, foreign or in the
    middle of an operation; PatchDrift where it holds commits that are no patches yet, or a patch
    changes nothing; PatchConflict, with the patch and its paths, where a patch does not apply.
    """
    path = checkouts.folder_of(layout, pin)
    git, checkout = Git(path), _finished(layout, project, pin, checkout, run_log)
    stack = observe(layout, project, pin, checkout)
    if stack.state is State.APPLIED:
        return stack
    if stack.state is not State.UNAPPLIED or stack.base is None:
        raise series.refusal(
            layout.relative(path),
            git,
            stack,
            verb=APPLY if stop_at_conflict else "./scripts/inv bootstrap",
        )
    _keep_lost(git)
    files = [layout.patches(project) / name for name in stack.names]
    if stop_at_conflict and stack.expected_tree is None:
        _apply_in_checkout(layout, project, git, stack, files, run_log)
    else:
        applied = am.applied(git, stack.base, files, place=layout.state / f"{project}-stack")
        if applied.tip is None:
            raise series.refused(project, stack.names[applied.position - 1], stack, applied)
        _check(project, git, stack, stack.base, applied.tip)
        _keep(git, stack.base, applied.tip)
        worktree.move(layout, project, git, applied.tip, run_log=run_log)
    return observe(layout, project, pin, replace(checkout, head=git.head()))


def unapply(
    layout: Layout, project: str, pin: Pin, checkout: Checkout, *, run_log: RunLog
) -> Stack:
    """Return to the base; the commits of the stack stay under refs/patches.

    Where HEAD is the base nothing is touched. Raises CheckoutError where the checkout is missing,
    dirty, foreign or in the middle of an operation, and PatchDrift where it holds commits that are
    no patches yet.
    """
    stack = observe(layout, project, pin, _finished(layout, project, pin, checkout, run_log))
    if stack.base and stack.head == stack.base and stack.state is not State.IN_PROGRESS:
        return stack
    path = checkouts.folder_of(layout, pin)
    git = Git(path)
    if stack.state is not State.APPLIED or stack.base is None or stack.head is None or stack.dirty:
        raise series.refusal(layout.relative(path), git, stack, verb=UNAPPLY)
    _keep(git, stack.base, stack.head)
    worktree.move(layout, project, git, stack.base, run_log=run_log)
    return observe(layout, project, pin, checkouts.observe(layout, pin))


def _finished(
    layout: Layout, project: str, pin: Pin, checkout: Checkout, run_log: RunLog
) -> Checkout:
    """Return the checkout, after a move that a killed run began is finished."""
    if worktree.is_move_begun(layout, project) and worktree.finish_move(
        layout, project, Git(checkouts.folder_of(layout, pin)), run_log=run_log
    ):
        return checkouts.observe(layout, pin)
    return checkout


def _apply_in_checkout(
    layout: Layout, project: str, git: Git, stack: Stack, files: Sequence[Path], run_log: RunLog
) -> None:
    """Apply the series in the checkout; leave an `am` that stops and raise PatchConflict."""
    base = stack.base or ""
    applied = am.start(git, files, run_log=run_log)
    if applied.tip is None:
        raise series.sentence(
            git,
            applied,
            count=len(files),
            patch=f"patches/{project}/{stack.names[applied.position - 1]}",
            shown=layout.relative(git.path),
            base=base,
        )
    _keep(git, base, applied.tip)
    _check(project, git, stack, base, applied.tip)


def _check(project: str, git: Git, stack: Stack, base: str, tip: str) -> None:
    """Prove by count and tree that the commits are those of the series. Raises PatchDrift."""
    made = series.stems_of(git, base, tip)
    if len(made) != len(stack.names):
        lost = [name for name in stack.names if name.removesuffix(".patch") not in made]
        raise PatchDrift(
            f"{', '.join(lost) or 'a patch'} changes nothing on {base[:12]}: only {len(made)}"
            f" of {counted(len(stack.names), 'patch', 'patches')} made a commit",
            hint=hints.text("repo.upstream_has_it", project=project),
        )
    if stack.expected_tree and git.tree(tip) != stack.expected_tree:
        raise PatchDrift(
            f"the series gives tree {git.tree(tip)}, expected {stack.expected_tree}; nothing was"
            " changed",
            hint=hints.text("inv.bootstrap"),
        )


def user(git: Git) -> tuple[str, str]:
    """Return the configured name and address of the user. Raises SettingsError."""
    configured = am.user(git)
    if not configured:
        raise SettingsError(
            "user.name and user.email are not set in git, and a commit of yours needs them",
            hint=hints.text("repo.set_name"),
        )
    return configured["GIT_AUTHOR_NAME"], configured["GIT_AUTHOR_EMAIL"]


def _keep(git: Git, base: str, tip: str) -> None:
    """Make references name the stack before anything so that a kill loses no commit.

    A former stack with the user's own commits, not those that `am` makes of patches, gets its own
    reference.
    """
    former = git.resolve(TIP_REF)
    if (
        former
        and former != tip
        and not git.is_ancestor(former, tip)
        and git.has_own_commits(base, former)
    ):
        git.set_ref(f"{KEPT_REFS}/{former[:12]}", former)
    git.set_refs({TIP_REF: tip, BASE_REF: base})


def _keep_lost(git: Git) -> None:
    """Keep the commits under a reference if another program moved the checkout away from them."""
    move = history.last_move(git)
    if (
        move
        and not move.is_ours
        and move.before in git.present((move.before,))
        and not worktree.is_kept(git, move.before)
    ):
        git.set_ref(f"{KEPT_REFS}/{move.before[:12]}", move.before)


@dataclass(frozen=True)
class _ExpectedTree:
    """The tree of a base with the series of this digest on it."""

    base: str
    series: str
    tree: str


def _expected_tree(
    layout: Layout, project: str, git: Git, base: str, names: Sequence[str]
) -> str | None:
    """Return the tree of the base with all patches, cached by base and content of the series."""
    files = [layout.patches(project) / name for name in names]
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    memory = layout.state / "expected-trees" / f"{project}.json"
    known = records.read(memory, _ExpectedTree)
    if known and (known.base, known.series) == (base, digest.hexdigest()):
        return known.tree
    tree = worktree.tree_after(git, base, files)
    if tree is not None:
        # Only a cache: if it cannot be written, the tree is computed again.
        with contextlib.suppress(OSError):
            records.write(memory, _ExpectedTree(base, digest.hexdigest(), tree))
    return tree
