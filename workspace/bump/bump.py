"""`inv pin.bump`: move the pin in a workshop beside the working tree, and promote it when its smoke
is green.

Every part looks first what is there already, so that the same command, or `inv patch.continue`,
goes on after a conflict, a red smoke or a kill.
"""

import contextlib
import datetime
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from workspace.bump import known_good, promote, staging
from workspace.bump.staging import Begun, BumpSandbox, Marker
from workspace.core import lock
from workspace.core.console import Console
from workspace.core.errors import (
    CheckoutError,
    PatchConflict,
    PatchDrift,
    SettingsError,
    SmokeError,
    ToolchainError,
    WorkspaceError,
)
from workspace.core.files import write_atomic
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import plan, sandbox
from workspace.repo import checkout, moves, pins, series
from workspace.repo.checkout import Kind
from workspace.repo.git import Applied, Git, worktree
from workspace.repo.series import Attempt, Stack, State

How = Literal["continue", "skip", "abort"]
CONTINUE = "./scripts/inv patch.continue"


def is_under_way(layout: Layout) -> bool:
    return staging.is_there(layout)


def run(
    layout: Layout,
    settings: Settings,
    ref: str,
    *,
    console: Console,
    allow_recent: bool = False,
    wait: bool = False,
) -> None:
    """Move the pin to `ref`, or go on with the bump to it that is under way; `triton` moves
    Triton's pin to its main.

    Raises PatchConflict at a conflict, SmokeError where the new pin does not compute rightly, and
    the error of whatever else stops it; nothing outside the workshop is changed before the
    promotion.
    """
    if ref == "triton":
        from workspace.bump import triton

        triton.move(layout, settings, console=console, wait=wait)
        return
    with _opened(layout, settings, "inv pin.bump", console, wait=wait) as run_log:
        bump_sandbox = staging.find(layout)
        if bump_sandbox and not promote.is_begun(bump_sandbox) and not _is_meant(bump_sandbox, ref):
            raise CheckoutError(
                f"a bump to {bump_sandbox.pin.tag} is under way, asked for is {ref}",
                hint=f"{CONTINUE}    goes on with it; {CONTINUE} --abort gives it up",
            )
        if bump_sandbox is None and not staging.is_there(layout):
            staging.tidy(layout)
        bump_sandbox = bump_sandbox or _begin(
            layout, settings, ref, run_log, allow_recent=allow_recent
        )
        is_promoted = bump_sandbox is not None and _advance(bump_sandbox, settings, run_log)
    if is_promoted:
        _prove(layout, settings, console)


def go_on(
    layout: Layout, settings: Settings, how: How, *, console: Console, wait: bool = False
) -> None:
    """Go on with the bump that is under way, leaving out the patch that conflicts, or give the bump
    up. Raises what `run` raises.
    """
    with _opened(layout, settings, "inv patch.continue", console, wait=wait) as run_log:
        if how == "abort":
            _abort(layout, console)
            return
        bump_sandbox = staging.find(layout)
        if bump_sandbox is None:
            raise CheckoutError("no bump is under way", hint="./scripts/inv pin")
        if not promote.is_begun(bump_sandbox):
            promote.require_unmoved(bump_sandbox)
            _resume(bump_sandbox, settings, how, run_log)
        is_promoted = _advance(bump_sandbox, settings, run_log)
    if is_promoted:
        _prove(layout, settings, console)


@contextlib.contextmanager
def _opened(
    layout: Layout, settings: Settings, verb: str, console: Console, *, wait: bool
) -> Iterator[RunLog]:
    with (
        lock.hold(layout.lock, verb=verb, wait=wait, on_wait=console.info) as held,
        RunLog(
            console, layout.logs, verb=verb.split()[1], secrets=settings.secrets, held=held
        ) as run_log,
    ):
        yield run_log


def _is_meant(bump_sandbox: BumpSandbox, ref: str) -> bool:
    return ref in (
        bump_sandbox.begun.ref,
        bump_sandbox.pin.tag,
        bump_sandbox.pin.version,
        bump_sandbox.pin.commit,
    )


def _begin(
    layout: Layout, settings: Settings, ref: str, run_log: RunLog, *, allow_recent: bool
) -> BumpSandbox | None:
    """Work out whereto, say what will be done, and make the workshop; None where the pin is there
    already.
    """
    from workspace.repo import upstream

    _finish_new_name(layout)
    observed = plan.observe(layout, settings)
    pin, there, stack = observed.pin, observed.checkout, _ready(layout, observed)
    assert there.base
    assert stack.head
    if ref in (pin.tag, pin.version, pin.commit) and not promote.is_archives(pin):
        run_log.console.info(f"nothing to do: {pin.tag} is pinned already")
        return None
    with run_log.console.step("upstream") as view:
        run_log.phase("upstream", view)
        candidate = upstream.find(layout, pin, ref, settings, there, run_log=run_log, step=view)
        view.reason = (
            f"{candidate.pin.tag} {candidate.pin.commit[:12]} from {_words(candidate.kind)}"
        )
    run_log.step = None
    if candidate.base == there.base:
        _rename(layout, pin, candidate.pin, run_log)
        return None
    if not allow_recent:
        _require_age(candidate.pin.tag, candidate.published, settings)
    staging.require_one_disk(layout)
    count = f"{len(stack.names)} {'patch' if len(stack.names) == 1 else 'patches'}"
    run_log.console.info(
        f"{pin.tag} → {candidate.pin.tag}, {count}: tree, patches, environment and smoke in"
        f" {layout.relative(layout.bump_sandbox)}; until all is green nothing else is changed"
    )
    _bring(
        layout, candidate.pin, candidate.base, candidate.kind, candidate.store, settings, run_log
    )
    digest = staging.digest_of(layout.patches("vllm"), pin=pin.commit)
    return staging.make(
        layout, Begun(ref, pin.tag, there.base, stack.head, digest, candidate.base), candidate.pin
    )


def _ready(layout: Layout, observed: plan.Observation) -> Stack:
    """The stack, where it is applied, exported and clean. Raises CheckoutError or PatchDrift with
    the way to that.
    """
    stack, shown = observed.stack, layout.relative(layout.vllm)
    if stack is None:
        raise CheckoutError(
            f"{shown} is {observed.checkout.detail}, so there is nothing to move",
            hint="./scripts/inv bootstrap",
        )
    if verb := Git(layout.vllm).under_way():
        raise CheckoutError(
            f"{shown} is in the middle of a git {verb}", hint=f"{CONTINUE}    or --abort"
        )
    if stack.dirty:
        edited = ", ".join(stack.dirty[:3]) + (
            f" and {len(stack.dirty) - 3} more" if len(stack.dirty) > 3 else ""
        )
        raise CheckoutError(
            f"{shown} has edits ({edited}) that no patch holds",
            hint=(
                f"git -C {shown} commit    then ./scripts/inv patch.export; or git -C {shown} stash"
            ),
        )
    if stack.state is State.UNEXPORTED:
        raise PatchDrift(
            f"{shown} has commits that patches/vllm does not; a bump would leave them behind",
            hint="./scripts/inv patch.export",
        )
    if stack.state is not State.APPLIED:
        raise CheckoutError(
            f"the stack is {stack.state.value}; a bump needs it applied", hint="./scripts/inv patch"
        )
    return stack


def _require_age(tag: str, published: datetime.datetime | None, settings: Settings) -> None:
    """A release that is withdrawn or found to be harmful is so within days."""
    least = settings.count("PIN_MIN_AGE_DAYS") or 0
    hint = "wait, or take it all the same with --allow-recent"
    if published is None:
        raise SettingsError(
            f"when {tag} was published is not known, and PIN_MIN_AGE_DAYS asks for {least} days",
            hint=hint,
        )
    age = (datetime.datetime.now(datetime.UTC) - published).total_seconds() / 86400
    if age < least:
        raise SettingsError(
            f"{tag} was published {age:.1f} days ago, PIN_MIN_AGE_DAYS asks for {least}", hint=hint
        )


def _bring(
    layout: Layout,
    pin: pins.Pin,
    base: str,
    kind: Kind,
    store: Path,
    settings: Settings,
    run_log: RunLog,
) -> None:
    """Have the new base among the objects of vendor/vllm, under a reference."""
    git, ref = Git(layout.vllm), f"refs/pins/{pin.tag}"
    with run_log.console.step("fetch") as view:
        run_log.phase("fetch", view)
        if kind is Kind.GIT and not worktree.is_kept(git, base):
            # The store looks only, and has not the content of all files.
            url, whole = (
                checkout.url_of(layout, pin, settings),
                git.setting("remote.origin.promisor") != "true",
            )
            git.fetch(
                url,
                (f"+{base}:{ref}",),
                whole=whole,
                settings=settings,
                run_log=run_log,
                on_line=checkout.shown(view),
            )
        worktree.bring(git, store, base, ref, run_log=run_log)
        if git.resolve(f"refs/tags/{pin.tag}") is None:
            git.set_ref(f"refs/tags/{pin.tag}", base)
        view.reason = f"{base[:12]} as {ref}"
    run_log.step = None


def _words(kind: Kind) -> str:
    return "git" if kind is Kind.GIT else "the release archive"


def _rename(layout: Layout, pin: pins.Pin, new: pins.Pin, run_log: RunLog) -> None:
    """The same source under its commit of upstream's, where the pin had only that of the archive;
    else nothing.
    """
    if pin.commit == new.commit or not promote.is_archives(pin):
        run_log.console.info(f"nothing to do: {pin.tag} is pinned already")
        return
    pins.save(layout.pins, new)
    _finish_new_name(layout)
    staging.set_gitlink(layout, new.commit, run_log=run_log)
    run_log.console.info(
        f"{pin.tag} is pinned by upstream's own commit now, {new.commit[:12]}; to commit: git add"
        " vendor/pins.toml patches/vllm && git commit"
    )


def _finish_new_name(layout: Layout) -> None:
    """Let the series follow a pin that got its commit of upstream's; done here too, for a run may
    have ended between the two files.
    """
    pin = pins.load(layout.pins).vllm
    if pin.archive:
        staging.write_series_base(layout.patches("vllm"), pin.commit, only=pin.archive.commit)


def _resume(bump_sandbox: BumpSandbox, settings: Settings, how: How, run_log: RunLog) -> None:
    """Continue the `am` in the workshop's tree, or skip its patch. Raises PatchConflict where the
    next one conflicts.
    """
    from workspace.repo import overview
    from workspace.repo.git import am

    tree = staging.open_tree(bump_sandbox, settings, run_log=run_log)
    _recover(bump_sandbox, tree, run_log)
    there = am.position(tree)
    if there is None:
        if how == "skip":
            raise CheckoutError("no patch of the bump waits to be skipped", hint=CONTINUE)
        return
    names = _names(bump_sandbox)[-there.last :]
    if how == "skip":
        skipped = dict.fromkeys((*bump_sandbox.skipped, names[there.number - 1]))
        write_atomic(
            bump_sandbox.layout.root / staging.SKIPPED,
            "".join(f"{name}\n" for name in skipped).encode(),
        )
    try:
        with moves.attempt(
            bump_sandbox.layout, "vllm", tree, Attempt(f"git am --{how}", CONTINUE), run_log=run_log
        ):
            shown = [f"patches/vllm/{name}" for name in names]
            overview.resume_in(
                tree,
                base=bump_sandbox.begun.new_base,
                how=how,
                run_log=run_log,
                names=shown,
                shown=bump_sandbox.shown,
            )
    except PatchConflict as exc:
        # Another one than before: what upstream did to its paths is said too.
        raise (exc if am.position(tree) == there else _conflict(bump_sandbox, tree)) from exc


def _abort(layout: Layout, console: Console) -> None:
    # A workshop whose record is damaged can be given up too, so it is not read.
    if promote.is_begun_in(layout):
        raise CheckoutError(
            "this bump is being promoted and goes forward only",
            hint=f"{CONTINUE}    then ./scripts/inv pin.rollback",
        )
    kept = staging.remove(layout)
    console.info(
        "the bump is given up; nothing else was changed"
        + (f"; what was done there is kept in vendor/vllm as {kept}" if kept else "")
    )


def _advance(bump_sandbox: BumpSandbox, settings: Settings, run_log: RunLog) -> bool:
    """Do what is still due, up to the promotion and with it. True when it is done."""
    if not promote.is_begun(bump_sandbox):
        promote.require_unmoved(bump_sandbox)
        tree = staging.open_tree(bump_sandbox, settings, run_log=run_log)
        _apply(bump_sandbox, tree, run_log)
        _export(bump_sandbox, tree, run_log)
        tip = tree.head() or ""
        wanted = sandbox.as_built(settings, plan.observe(bump_sandbox.outer, settings))
        with _said_of(bump_sandbox):
            if settings.switch("USE_EXISTING_TORCH"):
                sandbox.borrow_environment(bump_sandbox.outer, bump_sandbox.layout, run_log=run_log)
            sandbox.build_in(bump_sandbox.layout, wanted, console=run_log.console)
        _smoke(bump_sandbox, tree, wanted, run_log.console)
        promote.begin(bump_sandbox, settings, tip=tip, run_log=run_log)
    promote.finish(bump_sandbox, settings, run_log=run_log)
    return True


def _apply(bump_sandbox: BumpSandbox, tree: Git, run_log: RunLog) -> None:
    """Put the series on the new base. Raises PatchConflict, and leaves git's `am` in the workshop's
    tree.
    """
    from workspace.repo.git import am

    _recover(bump_sandbox, tree, run_log)
    if am.position(tree):
        raise _conflict(bump_sandbox, tree)
    if tree.resolve(staging.APPLIED_REF):
        return
    base, names = bump_sandbox.begun.new_base, _names(bump_sandbox)
    if tree.head() == base and names:
        with run_log.console.step("patches") as view:
            run_log.phase("patches", view)
            done = am.applied(
                tree,
                base,
                [bump_sandbox.outer.patches("vllm") / name for name in names],
                place=bump_sandbox.layout.state / "am",
            )
            if done.tip is None:
                _run_am(bump_sandbox, tree, names, base, run_log)
            else:
                with _marked(bump_sandbox, {"from": base, "names": "\n".join(names)}):
                    tree.move_to(done.tip, run_log=run_log)
            made = tree.slugs(base, "HEAD")
            gone = [name for name in names if name.removesuffix(".patch") not in made]
            view.reason = f"{len(made)} of {len(names)} on {bump_sandbox.pin.tag}" + (
                f"; upstream has {', '.join(gone)}" if gone else ""
            )
        run_log.step = None
    tree.set_ref(staging.APPLIED_REF, tree.head() or base)


def _run_am(
    bump_sandbox: BumpSandbox, tree: Git, names: Sequence[str], start: str, run_log: RunLog
) -> None:
    """Put patches on the commit `start` in the workshop's tree itself. Raises PatchConflict where
    one does not apply.
    """
    from workspace.repo.git import am

    with _marked(bump_sandbox, {"from": start, "names": "\n".join(names)}):
        done = am.start(
            tree, [bump_sandbox.outer.patches("vllm") / name for name in names], run_log=run_log
        )
    if done.tip is None:
        raise _conflict(bump_sandbox, tree, done)


@contextlib.contextmanager
def _marked(bump_sandbox: BumpSandbox, facts: Mapping[str, str]) -> Iterator[None]:
    """Leave a marker where the block, or its git, is killed, interrupted or finds no room, and none
    where it ends by itself, well or not.
    """
    marker = Marker(bump_sandbox.applying, facts).write()
    try:
        yield
    except WorkspaceError as exc:
        if not isinstance(exc, ToolchainError):
            marker.path.unlink()
        raise
    marker.path.unlink()


def _recover(bump_sandbox: BumpSandbox, tree: Git, run_log: RunLog) -> None:
    """Run the `am` again that was ended in the middle; one that went on from a conflict is taken
    back to it, with what the user resolved.
    """
    if moves.is_begun(bump_sandbox.layout, "vllm"):
        moves.finish(bump_sandbox.layout, "vllm", tree, run_log=run_log, shown=bump_sandbox.shown)
    if applying := staging.find_marker(bump_sandbox.applying):
        start, names = applying.facts["from"], applying.facts["names"].split("\n")
        worktree.start_over(
            tree,
            start,
            [
                path
                for name in names
                for path in tree.patch_paths(bump_sandbox.outer.patches("vllm") / name)
            ],
        )
        _run_am(bump_sandbox, tree, names, start, run_log)


def _conflict(bump_sandbox: BumpSandbox, tree: Git, done: Applied | None = None) -> PatchConflict:
    from workspace.repo import series
    from workspace.repo.git import am

    names, there = _names(bump_sandbox), am.position(tree)
    done = done or Applied(None, there.number if there else 1, am.unmerged(tree))
    # The `am` of a run that was recovered has the rest of the series only.
    name = names[-there.last if there else 0 :][done.position - 1]
    return series.sentence(
        tree,
        done,
        count=there.last if there else len(names),
        patch=f"patches/vllm/{name}",
        shown=bump_sandbox.shown,
        base=bump_sandbox.begun.new_base,
        old=bump_sandbox.begun.base,
    )


def _names(bump_sandbox: BumpSandbox) -> tuple[str, ...]:
    """The patches of the clone, in the order in which they go on the new base."""
    return series.read_series(
        bump_sandbox.outer.patches("vllm"), pin=pins.load(bump_sandbox.outer.pins).vllm.commit
    ).names


def _export(bump_sandbox: BumpSandbox, tree: Git, run_log: RunLog) -> None:
    """Write the commits of the workshop's tree as its patches. Raises CheckoutError where there are
    edits that no commit has.
    """
    from workspace.repo import export

    if verb := tree.under_way():
        raise CheckoutError(
            f"{bump_sandbox.shown} is in the middle of a git {verb}",
            hint=f"git -C {bump_sandbox.shown} {verb} --continue    or --abort, then {CONTINUE}",
        )
    if edited := tree.edits():
        raise CheckoutError(
            f"{bump_sandbox.shown} has edits ({', '.join(edited[:3])}) that no commit has",
            hint=f"git -C {bump_sandbox.shown} commit --all    then {CONTINUE}",
        )
    head = tree.head()
    if head is None or not (
        head == bump_sandbox.begun.new_base or tree.is_ancestor(bump_sandbox.begun.new_base, head)
    ):
        raise CheckoutError(
            f"{bump_sandbox.shown} is at {(head or 'no commit')[:12]}, which is not on"
            f" {bump_sandbox.pin.tag}",
            hint=f"git -C {bump_sandbox.shown} reflog",
        )
    made = (
        export.series_of(tree, bump_sandbox.begun.new_base, head)
        if head != bump_sandbox.begun.new_base
        else ()
    )
    export.write(bump_sandbox.layout.patches("vllm"), base=bump_sandbox.pin.commit, patches=made)


@contextlib.contextmanager
def _said_of(bump_sandbox: BumpSandbox) -> Iterator[None]:
    """Say of a failure where it happened, and how the bump goes on."""
    try:
        yield
    except WorkspaceError as exc:
        exc.message = (
            f"in {bump_sandbox.outer.relative(bump_sandbox.layout.root)}, the working tree is"
            f" untouched: {exc.message}"
        )
        exc.hint = (
            f"commit a fix in {bump_sandbox.shown}, or mend what is said above, then {CONTINUE};"
            f" {CONTINUE} --abort gives the bump up"
        )
        raise


def _smoke(bump_sandbox: BumpSandbox, tree: Git, settings: Settings, console: Console) -> None:
    if known_good.has_passed(bump_sandbox.layout, tree.tree("HEAD")):
        console.row("skipped", "smoke", "passed on this tree")
        return
    with _said_of(bump_sandbox):
        run_smoke(bump_sandbox.layout, settings, console)


def run_smoke(layout: Layout, settings: Settings, console: Console) -> None:
    """Judge the tree of a layout. Raises SmokeError where a check fails or nothing is built."""
    from workspace.checks import smoke

    # The record lies in a file; of this verb it is no answer.
    smoke.smoke(
        layout,
        settings,
        console=Console(out=io.StringIO()),
        json_file=None,
        timeout_s=smoke.TIMEOUT_S,
    )


def _prove(layout: Layout, settings: Settings, console: Console) -> None:
    """What was promoted stands in its place: bootstrap finds nothing to do, the smoke passes there,
    and the state is recorded as good.
    """
    observed = plan.observe(layout, settings)
    sandbox.build_in(layout, sandbox.as_built(settings, observed), console=console)
    try:
        run_smoke(layout, settings, console)
    except SmokeError as exc:
        exc.hint = f"./scripts/inv pin.rollback    returns to the last good state; {exc.hint or ''}"
        raise
    known_good.record(layout, settings, plan.observe(layout, settings), console=console)
