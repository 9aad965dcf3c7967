"""`inv pin.bump`: move the pin in a sandbox beside the working tree, then promote it.

The promotion needs a green smoke. Each step first checks what is done already. So the same command,
or `inv patch.continue`, resumes a bump after a conflict, a failed smoke or a kill. A promotion
fetches and compiles nothing: the sandbox becomes a known-good state, and the move to that is the
same as of a rollback.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Literal

from workspace.bump import changes, forecast, known_good, rollback, staging
from workspace.bump.known_good import KnownGood
from workspace.bump.staging import BumpSandbox, BumpStart
from workspace.core import hints
from workspace.core.console import Console, RunLog
from workspace.core.console import State as RowState
from workspace.core.errors import CheckoutError, PatchConflict, PatchDrift, WorkspaceError, counted
from workspace.core.files import write_atomic
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import plan, sandbox, stages
from workspace.repo import checkout, pins, series
from workspace.repo.checkout import Kind
from workspace.repo.git import Git, worktree
from workspace.repo.pins import Wanted
from workspace.repo.series import Stack, State
from workspace.repo.upstream import Candidate

How = Literal["continue", "skip", "abort"]
SUBJECT_WIDTH = 72
# Most lines of a range-diff in a commit message; a longer one needs a pager.
LONGEST_RANGE_DIFF = 300


def is_under_way(layout: Layout) -> bool:
    """Return whether a bump is under way."""
    return staging.exists(layout)


def run(
    layout: Layout,
    settings: Settings,
    wanted: Wanted,
    *,
    console: Console,
    allow_recent: bool = False,
    wait: bool = False,
) -> None:
    """Move the pin, or resume the bump to what is wanted; `triton` moves Triton's to its main.

    Raises PatchConflict at a conflict, SmokeError if the new pin computes wrong results, and the
    error of any other failure. Nothing outside the sandbox changes before the promotion.
    """
    ref = wanted.text
    if ref == "triton":
        from workspace.bump import triton

        triton.move(layout, settings, console=console, wait=wait)
        return
    with stages.locked(layout, settings, "inv pin.bump", console=console, wait=wait) as run_log:
        bump_sandbox = staging.find(layout)
        if (
            bump_sandbox
            and not bump_sandbox.outer.promoting.exists()
            and not _is_target(bump_sandbox, ref)
        ):
            raise CheckoutError(
                f"a bump to {bump_sandbox.pin.tag} is under way, but {ref} was requested",
                hint=hints.text("bump.resume_or_give_up"),
            )
        if bump_sandbox is None and not staging.exists(layout):
            sandbox.clear_leftovers(layout, Layout(layout.bump_sandbox))
        bump_sandbox = bump_sandbox or _begin(
            layout, settings, wanted, run_log, allow_recent=allow_recent
        )
        promoted = _advance(bump_sandbox, settings, run_log) if bump_sandbox else None
    if promoted:
        rollback.settle(layout, settings, promoted, console=console, is_bump=True)


def go_on(
    layout: Layout, settings: Settings, how: How, *, console: Console, wait: bool = False
) -> None:
    """Resume the bump, skip the patch that conflicts, or abort. Raises what `run` raises."""
    verb = "inv patch.continue"
    with stages.locked(layout, settings, verb, console=console, wait=wait) as run_log:
        if how == "abort":
            _abort(layout, console)
            return
        bump_sandbox = staging.find(layout)
        if bump_sandbox is None:
            raise CheckoutError("no bump is under way", hint=hints.text("inv.pin"))
        if not bump_sandbox.outer.promoting.exists():
            _require_unmoved(bump_sandbox)
            _resume(bump_sandbox, settings, how, run_log)
        promoted = _advance(bump_sandbox, settings, run_log)
    rollback.settle(layout, settings, promoted, console=console, is_bump=True)


def _is_target(bump_sandbox: BumpSandbox, ref: str) -> bool:
    """Return whether `ref` names the release to which the bump moves."""
    return ref in (
        bump_sandbox.start.ref,
        bump_sandbox.pin.tag,
        bump_sandbox.pin.version,
        bump_sandbox.pin.commit,
    )


def _begin(
    layout: Layout, settings: Settings, wanted: Wanted, run_log: RunLog, *, allow_recent: bool
) -> BumpSandbox | None:
    """Find the release or commit, print the plan, make the sandbox; None if it is pinned."""
    _update_series_base(layout)
    observed = plan.observe(layout, settings)
    pin, base, stack = observed.pin, observed.checkout.base, _require_ready(layout, observed)
    assert base
    assert stack.head
    # A branch or tag that is no release is looked up again: it may have moved.
    is_fixed = pin.ref is None and not pin.is_from_archive
    if is_fixed and wanted.text in (pin.tag, pin.version, pin.commit):
        run_log.console.info(f"nothing to do: {pin.tag} is pinned already")
        return None
    candidate = forecast.find_candidate(
        layout, settings, pin, wanted, observed.checkout, run_log=run_log
    )
    if candidate.base == base:
        _repin_same_source(layout, pin, candidate.pin, run_log)
        return None
    if not allow_recent:
        changes.require_min_age(candidate, settings)
    staging.require_one_disk(layout)
    count = counted(len(stack.names), "patch", "patches")
    run_log.console.info(
        f"{pin.tag} → {candidate.pin.tag}, {count}: the new tree is built and tested in"
        f" {layout.relative(layout.bump_sandbox)}; nothing else changes until its smoke passes"
    )
    _fetch_base(layout, candidate, settings, run_log)
    digest = staging.digest_of(layout.patches("vllm"), pin=pin.commit)
    return staging.make(
        layout,
        BumpStart(wanted.text, pin.tag, base, stack.head, digest, candidate.base),
        candidate.pin,
    )


def _require_ready(layout: Layout, observed: plan.Observation) -> Stack:
    """Return the stack if it is applied, exported and clean.

    Raises CheckoutError or PatchDrift with the command that leads there.
    """
    stack, shown = observed.stack, layout.relative(layout.vllm)
    if stack is None:
        raise CheckoutError(
            f"{shown} is {observed.checkout.detail}, so there is nothing to move",
            hint=hints.text("inv.bootstrap"),
        )
    if verb := Git(layout.vllm).under_way():
        raise CheckoutError(
            f"{shown} is in the middle of a git {verb}",
            hint=hints.text("inv.patch_continue_or_abort"),
        )
    if stack.dirty:
        edited = ", ".join(stack.dirty[:3]) + (
            f" and {len(stack.dirty) - 3} more" if len(stack.dirty) > 3 else ""
        )
        raise CheckoutError(
            f"{shown} has edits ({edited}) that are in no patch",
            hint=hints.text("bump.commit_or_stash", shown=shown),
        )
    if stack.state is State.UNEXPORTED:
        raise PatchDrift(
            f"{shown} has commits that are not in patches/vllm; a bump would drop them",
            hint=hints.text("inv.patch_export"),
        )
    if stack.state is not State.APPLIED:
        raise CheckoutError(
            f"the stack is {stack.state.value}; a bump needs it applied",
            hint=hints.text("inv.patch"),
        )
    return stack


def _fetch_base(layout: Layout, candidate: Candidate, settings: Settings, run_log: RunLog) -> None:
    """Fetch the new base into vendor/vllm and keep it under a reference."""
    git, pin, base = Git(layout.vllm), candidate.pin, candidate.base
    # The names of branches are no names for a set of references: one may be a folder of another.
    ref = f"refs/pins/{pin.commit if pin.ref else pin.tag}"
    with stages.step(run_log, "fetch") as view:
        if candidate.kind is Kind.GIT and not worktree.is_kept(git, base):
            # The store is for reading only and lacks the content of some files.
            remote = checkout.remote(layout, pin, settings, run_log, view)
            git.fetch(remote, (f"+{base}:{ref}",), whole=not git.is_partial)
        worktree.bring(git, candidate.store, base, ref, run_log=run_log)
        if pin.base:
            remote = checkout.remote(layout, pin.of_upstream, settings, run_log, view)
            checkout.fetch_base(git, pin, remote)
        elif pin.ref is None and git.resolve(f"refs/tags/{pin.tag}") is None:
            git.set_ref(f"refs/tags/{pin.tag}", base)
        view.reason = f"{base[:12]} as {ref}"


def _repin_same_source(layout: Layout, pin: pins.Pin, new: pins.Pin, run_log: RunLog) -> None:
    """Pin upstream's own commit if the pin had only the archive's commit of the same source.

    Of a commit, write another branch or base into the pin.
    """
    if pin.ref and new.ref and pin != new:
        pins.save(layout.pins, new)
        taken = new.base.tag if new.base else "no release"
        run_log.console.info(f"{new.request} is pinned with the precompiled wheel of {taken} now")
        run_log.console.hint(hints.text("inv.bootstrap"))
        return
    if pin.commit == new.commit or not pin.is_from_archive:
        run_log.console.info(f"nothing to do: {pin.tag} is pinned already")
        return
    pins.save(layout.pins, new)
    _update_series_base(layout)
    staging.set_gitlink(layout, new.commit, run_log=run_log)
    run_log.console.info(f"{pin.tag} is pinned by upstream's own commit now, {new.commit[:12]}")
    run_log.console.hint(hints.text("bump.commit_vllm"))


def _update_series_base(layout: Layout) -> None:
    """Let the series name upstream's commit once the pin does.

    It also runs before a bump, because an earlier run may have ended between the two files.
    """
    pin = pins.load(layout.pins).vllm
    if pin.archive:
        staging.write_series_base(layout.patches("vllm"), pin.commit, only=pin.archive.commit)


def _resume(bump_sandbox: BumpSandbox, settings: Settings, how: How, run_log: RunLog) -> None:
    """Continue the `am` in the sandbox, or skip its patch.

    Raises PatchConflict if the next patch conflicts.
    """
    from workspace.repo import overview
    from workspace.repo.git import am

    tree = staging.open_tree(bump_sandbox, settings, run_log=run_log)
    staging.recover(bump_sandbox, tree, run_log)
    position = am.position(tree)
    if position is None:
        if how == "skip":
            raise CheckoutError(
                "the bump has no conflicting patch to skip", hint=hints.text("inv.patch_continue")
            )
        return
    names = staging.series_names(bump_sandbox)
    if how == "skip":
        skipped = dict.fromkeys((*bump_sandbox.skipped, names[position.number - 1]))
        write_atomic(
            bump_sandbox.layout.root / staging.SKIPPED,
            "".join(f"{name}\n" for name in skipped).encode(),
        )
    try:
        overview.resume_in(
            tree,
            base=bump_sandbox.start.new_base,
            how=how,
            run_log=run_log,
            names=[f"patches/vllm/{name}" for name in names],
            shown=bump_sandbox.shown,
        )
    except PatchConflict as exc:
        if am.position(tree) == position:
            raise
        # The next conflict is a new one: its message lists upstream's commits to its paths, too.
        raise staging.conflict(bump_sandbox, tree) from exc


def _abort(layout: Layout, console: Console) -> None:
    # A sandbox with a damaged record can be given up too, so the record is not read.
    if layout.promoting.exists():
        raise CheckoutError(
            "this bump is being promoted and can only be finished",
            hint=hints.text("bump.continue_then_rollback"),
        )
    known_good.forget_unpromoted(layout, Layout(layout.bump_sandbox))
    kept = staging.remove(layout)
    console.info(
        "the bump is given up; nothing else changed"
        + (f"; its work is kept in vendor/vllm as {kept}" if kept else "")
    )


def _advance(bump_sandbox: BumpSandbox, settings: Settings, run_log: RunLog) -> KnownGood:
    """Do all remaining steps, up to and including the promotion; return the new state."""
    if not bump_sandbox.outer.promoting.exists():
        _require_unmoved(bump_sandbox)
        tree = staging.open_tree(bump_sandbox, settings, run_log=run_log)
        staging.apply_series(bump_sandbox, tree, run_log)
        _export(bump_sandbox, tree)
        tip = tree.head() or ""
        wanted = sandbox.as_built(settings, plan.observe(bump_sandbox.outer, settings))
        with _with_sandbox_hint(bump_sandbox):
            if settings.switch("USE_EXISTING_TORCH"):
                sandbox.borrow_environment(bump_sandbox.outer, bump_sandbox.layout, run_log=run_log)
            sandbox.build_in(bump_sandbox.layout, wanted, console=run_log.console)
        _smoke(bump_sandbox, tree, wanted, run_log.console)
        _begin_promotion(bump_sandbox, settings, tip=tip, run_log=run_log)
    return _finish_promotion(bump_sandbox, settings, run_log=run_log)


def _export(bump_sandbox: BumpSandbox, tree: Git) -> None:
    """Write the commits of the sandbox's tree as its patches.

    Raises CheckoutError for edits that are not committed.
    """
    from workspace.repo import export, mail

    if verb := tree.under_way():
        raise CheckoutError(
            f"{bump_sandbox.shown} is in the middle of a git {verb}",
            hint=hints.text("bump.sandbox_operation", folder=bump_sandbox.shown, verb=verb),
        )
    if edited := tree.edits():
        raise CheckoutError(
            f"{bump_sandbox.shown} has edits ({', '.join(edited[:3])}) that are not committed",
            hint=hints.text("bump.sandbox_commit", folder=bump_sandbox.shown),
        )
    head = tree.head()
    if head is None or not (
        head == bump_sandbox.start.new_base or tree.is_ancestor(bump_sandbox.start.new_base, head)
    ):
        raise CheckoutError(
            f"{bump_sandbox.shown} is at {(head or 'no commit')[:12]}, which does not"
            f" descend from {bump_sandbox.pin.tag}",
            hint=hints.text("bump.sandbox_reflog", folder=bump_sandbox.shown),
        )
    base = bump_sandbox.start.new_base
    try:
        made = export.series_of(tree, base, head) if head != base else ()
    except mail.Unfit as exc:
        # The hint of the export is for the clone's own tree.
        exc.hint = hints.text(
            "bump.reword_then_continue", folder=bump_sandbox.shown, start=base[:12]
        )
        raise
    export.write(bump_sandbox.layout.patches("vllm"), base=bump_sandbox.pin.commit, patches=made)


@contextlib.contextmanager
def _with_sandbox_hint(bump_sandbox: BumpSandbox) -> Iterator[None]:
    """Add to an error where it happened and how to resume the bump."""
    try:
        yield
    except WorkspaceError as exc:
        exc.message = (
            f"in {bump_sandbox.outer.relative(bump_sandbox.layout.root)}, the working tree is"
            f" untouched: {exc.message}"
        )
        exc.hint = hints.text("bump.fix_then_continue", folder=bump_sandbox.shown)
        raise


def _smoke(bump_sandbox: BumpSandbox, tree: Git, settings: Settings, console: Console) -> None:
    if known_good.smoke_passed(bump_sandbox.layout, tree.tree("HEAD")):
        console.row(RowState.SKIPPED, "smoke", "has passed on this tree")
        return
    with _with_sandbox_hint(bump_sandbox):
        known_good.run_smoke(bump_sandbox.layout, settings, console)


def _require_unmoved(bump_sandbox: BumpSandbox) -> None:
    """Raise CheckoutError or PatchDrift if the clone changed after the bump began.

    A promotion would lose that change.
    """
    layout, start = bump_sandbox.outer, bump_sandbox.start
    git, pin = Git(layout.vllm), pins.load(layout.pins).vllm
    again = hints.text("bump.export_then_again", ref=start.ref)
    if verb := git.under_way():
        raise CheckoutError(
            f"vendor/vllm is in the middle of a git {verb}; nothing was promoted",
            hint=hints.text("bump.git_continue", verb=verb),
        )
    if git.head() != start.tip:
        raise CheckoutError(
            f"vendor/vllm is no longer at {start.tip[:12]}, where this bump began; nothing was"
            " promoted",
            hint=again,
        )
    if edited := git.edits():
        raise CheckoutError(
            f"vendor/vllm has edits ({', '.join(edited[:3])}); nothing was promoted",
            hint=hints.text("bump.stash_then_again", shown="vendor/vllm"),
        )
    if staging.digest_of(layout.patches("vllm"), pin=pin.commit) != start.patches:
        raise PatchDrift(
            "patches/vllm changed after this bump began; nothing was promoted", hint=again
        )


def _begin_promotion(
    bump_sandbox: BumpSandbox, settings: Settings, *, tip: str, run_log: RunLog
) -> None:
    """Record the sandbox as a known-good state, and write the redo log of the move to it.

    From here on the promotion can only be finished. `tip` is the commit that was exported and
    tested. Raises what _require_unmoved and require_way raise, and CheckoutError if the sandbox
    changed.
    """
    layout, made = bump_sandbox.outer, Git(bump_sandbox.layout.vllm)
    _require_unmoved(bump_sandbox)
    if made.head() != tip or made.edits():
        raise CheckoutError(
            f"{bump_sandbox.shown} changed while its smoke ran; nothing was promoted",
            hint=hints.text("bump.test_present"),
        )
    worktree.require_way(Git(layout.vllm), tip)
    observed, left = plan.observe(layout, settings), known_good.timestamp()
    if why := known_good.refusal(layout, observed):
        run_log.console.info(f"{observed.pin.tag} is not kept as a known-good state: {why}")
        known_good.keep_present(layout, f"Before the bump to {bump_sandbox.pin.tag}", name=left)
    present = "" if why else known_good.keep(observed, run_log=run_log).name
    # Only a commit of upstream's belongs into the superproject: nobody could fetch a commit that
    # is made from an archive.
    gitlink = None if bump_sandbox.pin.is_from_archive else bump_sandbox.pin.commit
    tested = plan.observe(bump_sandbox.layout, settings)
    known_good.note_unpromoted(layout, tested)
    wanted = known_good.keep(tested, run_log=run_log, outer=layout, gitlink=gitlink)
    staging.begin_move(layout.promoting, layout, wanted, present=present, left=left)


def _finish_promotion(
    bump_sandbox: BumpSandbox, settings: Settings, *, run_log: RunLog
) -> KnownGood:
    """Do the remaining steps of a promotion, then remove the sandbox; return the new state."""
    layout = bump_sandbox.outer
    redo_log = staging.find_redo_log(layout.promoting)
    assert redo_log is not None
    wanted = staging.finish_move(layout.promoting, layout, settings, redo_log, run_log)
    _write_message(bump_sandbox, redo_log.facts, wanted.head)
    staging.remove(layout)
    _report(bump_sandbox, redo_log.facts, run_log)
    return wanted


def _write_message(bump_sandbox: BumpSandbox, facts: Mapping[str, str], tip: str) -> None:
    """Write the commit message of the bump: pins, dropped patches and range-diff."""
    old, new = bump_sandbox.start, bump_sandbox.pin
    kept = series.read_series(bump_sandbox.layout.patches("vllm"), pin=new.commit).names
    compared = worktree.range_diff(
        Git(bump_sandbox.outer.vllm), (old.base, old.tip), (old.new_base, tip)
    ).splitlines()
    more = (
        [f"… {len(compared) - LONGEST_RANGE_DIFF} lines more"]
        if len(compared) > LONGEST_RANGE_DIFF
        else []
    )
    lines = [
        f"pin: move vLLM from {old.tag} to {new.tag}"[:SUBJECT_WIDTH],
        "",
        f"Commit {new.commit}"
        + (", made from the release archive." if new.is_from_archive else "."),
        *([f"It is {new.ref} of {new.url}."] if new.ref else []),
        *([f"Its precompiled wheel is that of {new.base.tag}."] if new.base else []),
        f"{counted(len(kept), 'patch', 'patches')} on it; the smoke has passed.",
        *(f"Dropped {name}: {why}." for name, why in staging.dropped(bump_sandbox, facts).items()),
        *(
            [
                "",
                (f"git range-diff {old.base[:12]}..{old.tip[:12]} {old.new_base[:12]}..{tip[:12]}"),
                "",
            ]
            if compared
            else []
        ),
        *(f"    {line}".rstrip() for line in [*compared[:LONGEST_RANGE_DIFF], *more]),
    ]
    write_atomic(
        bump_sandbox.outer.bump_message, ("\n".join(lines) + "\n").encode(errors="surrogateescape")
    )


def _report(bump_sandbox: BumpSandbox, facts: Mapping[str, str], run_log: RunLog) -> None:
    layout, console = bump_sandbox.outer, run_log.console
    if bump_sandbox.pin.is_from_archive:
        console.info(
            "the gitlink of vendor/vllm is unchanged: this pin is a commit made from the release"
            " archive, which upstream does not have"
        )
    if present := facts["present"]:
        console.info(
            f"{bump_sandbox.start.tag} is kept as {present}; ./scripts/inv pin.rollback returns to"
            " it"
        )
    staging.report_leftovers(layout, facts, console=console)
    # Do not name the submodule's path: the gitlink is staged already, and with the path git may
    # stage the patched commit that is checked out.
    message = layout.relative(layout.bump_message)
    console.hint(hints.text("bump.commit_vllm_with", message=message))
