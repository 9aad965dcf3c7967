"""`inv pin.rollback` returns to a known-good state; `inv pin` shows pins and states.

A rollback restores source, patches, pins, environment and compiled files, and keeps the present
state under references first. The next `inv pin.rollback` finishes an interrupted one.
"""

import datetime
from dataclasses import dataclass, field

from workspace.bump import changes, known_good, staging, triton
from workspace.bump.known_good import KnownGood
from workspace.bump.staging import RedoLog
from workspace.checks import smoke as smoke_record
from workspace.core import errors, hints, lock
from workspace.core.console import Console, Row, RunLog, State
from workspace.core.errors import (
    CheckoutError,
    SettingsError,
    SmokeError,
    SourceError,
    WorkspaceError,
)
from workspace.core.files import read_regular
from workspace.core.paths import Layout
from workspace.core.settings import Settings, without_user
from workspace.install import plan, precompiled, sandbox, stages, stamp, status
from workspace.machine import interpreter
from workspace.repo import checkout, git, patches, pins
from workspace.repo.git import Git, history, remotes, worktree
from workspace.repo.pins import Pin

VERB = "inv pin.rollback"
SHOWN_RELEASES = 3
SHOWN_KEPT = 3


def run(
    layout: Layout,
    settings: Settings,
    name: str | None,
    *,
    console: Console,
    force: bool = False,
    wait: bool = False,
) -> None:
    """Return to the newest other known-good state, or to `name`, and verify it by the smoke.

    `force` leaves commits, patches and edits that no known-good state holds; they are kept. Raises
    SettingsError without such a state, CheckoutError if that work or an `am` prevents it, and
    SmokeError if the smoke fails.
    """
    with stages.locked(layout, settings, VERB, console=console, wait=wait) as run_log:
        redo_log = staging.find_redo_log(layout.returning) or _begin(
            layout, name, run_log, force=force
        )
        wanted = staging.finish_move(layout.returning, layout, settings, redo_log, run_log)
        layout.returning.unlink()
    staging.report_leftovers(layout, redo_log.facts, console=console)
    settle(layout, settings, wanted, console=console)
    # Last, where a person sees it. An older redo log has no note of it.
    if back := redo_log.facts.get("back"):
        console.info("what was left is kept; this brings it back:")
        console.hint(back)


def settle(
    layout: Layout,
    settings: Settings,
    wanted: KnownGood,
    *,
    console: Console,
    is_bump: bool = False,
) -> None:
    """Make environment and build of the state fit again, run the smoke, and record the state.

    Raises SmokeError, after a bump with the way back.
    """
    if not layout.environment.exists():
        console.info(
            "its environment was not kept: bootstrap builds it again with the recorded versions"
        )
        settings = precompiled.repeated(settings, wanted.kernels)
    sandbox.build_in(layout, settings, console=console)
    _restore_versions(layout, settings, wanted, console)
    try:
        known_good.run_smoke(layout, settings, console)
    except SmokeError as exc:
        exc.hint = (
            hints.text("bump.rollback_or", then=exc.hint)
            if is_bump
            else hints.text("bump.doctor_or", then=exc.hint)
        )
        raise
    known_good.record(plan.observe(layout, settings), console=console)


def _begin(layout: Layout, name: str | None, run_log: RunLog, *, force: bool) -> RedoLog:
    """Choose the state, check that nothing prevents a rollback, and write the redo log."""
    console = run_log.console
    if staging.exists(layout):
        raise CheckoutError(
            "a bump is under way",
            hint=hints.text("bump.finish_promotion"),
        )
    wanted, present = _choose(layout, name), known_good.present_name(layout)
    _require_movable(layout, wanted)
    edited = Git(layout.vllm).edits()
    lost = (*known_good.held_by_none(layout, wanted), *(f"edits of {path}" for path in edited))
    if lost and not force:
        raise known_good.would_lose(layout, wanted, lost, edited)
    kept = present if present and known_good.read(layout, present) else ""
    console.info(f"{present or 'the present state'} → {wanted.name}")
    if not kept:
        console.info("the present state never passed the smoke, so its environment is not kept")
    left = known_good.timestamp()
    known_good.keep_present(layout, f"Before the return to {wanted.name}", name=left)
    back = known_good.way_back(layout, f"refs/left/{left}") if lost else ""
    if edited:
        _stash(layout, left, run_log)
        stashed = hints.text("bump.pop_edits", shown=layout.relative(layout.vllm))
        back = stashed if len(lost) == len(edited) else f"{back} && {stashed}"
    return staging.begin_move(layout.returning, layout, wanted, present=kept, left=left, back=back)


def _require_movable(layout: Layout, wanted: KnownGood) -> None:
    """Raise CheckoutError or ToolchainError if vendor/vllm cannot move to the state."""
    git, shown = Git(layout.vllm), layout.relative(layout.vllm)
    if verb := git.under_way():
        raise CheckoutError(
            f"{shown} is in the middle of a git {verb}",
            hint=hints.text("inv.patch_continue_or_abort"),
        )
    if wanted.head not in git.present((wanted.head,)):
        raise CheckoutError(
            f"{shown} no longer has commit {wanted.head[:12]} of {wanted.name}",
            hint=hints.text("bump.other_states"),
        )
    worktree.require_way(git, wanted.head)
    staging.require_one_disk(layout)


def _stash(layout: Layout, left: str, run_log: RunLog) -> None:
    """Put the edits of vendor/vllm into a stash. Raises CheckoutError if some stay."""
    git, shown = Git(layout.vllm), layout.relative(layout.vllm)
    git.write("stash", "push", "--quiet", "--message", f"pin.rollback {left}", run_log=run_log)
    if edited := git.edits():
        raise CheckoutError(
            f"{shown} has edits that git stash does not take ({', '.join(edited[:3])})",
            hint=hints.text("inv.patch"),
        )


def _choose(layout: Layout, name: str | None) -> KnownGood:
    """Return the state of this name, or the newest state that is not the present one."""
    present = known_good.present_name(layout)
    others = [found for found in known_good.states(layout) if found.name != present]
    if name is None and others:
        return others[0]
    if found := next((found for found in others if found.name == name), None):
        return found
    problem = (
        f"there is no known-good state {name} other than the present one"
        if name
        else "there is no known-good state to return to"
    )
    names = ", ".join(found.name for found in others)
    raise SettingsError(
        problem + (f"; there are {names}" if names else ""),
        hint=hints.text("bump.good_when_smoked"),
    )


def _restore_versions(
    layout: Layout, settings: Settings, wanted: KnownGood, console: Console
) -> None:
    """Install the recorded versions after the environment was built again.

    The index may have newer versions by now.
    """
    lines = read_regular(known_good.folder(layout, wanted.name) / "freeze.txt").decode().split()
    actual = interpreter.installed(layout)
    differing = [
        line for line in lines if actual.get(line.partition("==")[0]) != line.partition("==")[2]
    ]
    if not differing:
        return
    with (
        stages.locked(layout, settings, VERB, console=console, wait=True) as run_log,
        stages.step(run_log, "freeze") as view,
    ):
        before = stamp.read(layout.stamp("environment"))
        stamp.withdraw(layout.stamp("environment"))
        interpreter.install(layout, settings, ["--no-deps", *differing], run_log=run_log)
        if before:
            packages = {
                name: version
                for name, version in interpreter.installed(layout).items()
                if name != "vllm"
            }
            stamp.write(
                layout.stamp("environment"),
                stamp.Stamp(inputs=before.inputs, outcome=before.outcome, packages=packages),
            )
        view.reason = f"{len(differing)} packages at the versions of {wanted.name}"


@dataclass(frozen=True)
class PinRow(Row):
    """A pin or a state. `facts` are for a program, `text` for a person."""

    facts: dict[str, object] = field(default_factory=dict)

    def record(self) -> dict[str, object]:
        return super().record() | {"facts": self.facts}


def show(
    layout: Layout,
    settings: Settings,
    *,
    console: Console,
    as_json: bool = False,
    offline: bool = False,
) -> None:
    """Print the table of pins and states, as JSON on stdout if requested.

    Raises SettingsError for unreadable pins only.
    """
    pinned = pins.load(layout.pins)
    rows = [
        *_checkout(layout, pinned.vllm),
        *_base(layout, pinned.vllm),
        *([] if offline else _remotes(layout, settings, pinned.vllm, console)),
        *_under_way(layout),
        *_known_good_states(layout),
        *_kept(layout),
    ]
    rows += [
        _releases(settings, pinned.vllm, offline=offline),
        _triton(layout, settings, pinned.triton, offline=offline),
    ]
    console.show(rows, as_json=as_json)


def _checkout(layout: Layout, pin: Pin) -> tuple[PinRow, PinRow]:
    """Return the rows of the pin and of the patches, from one look at vendor/vllm."""
    facts: dict[str, object] = {"tag": pin.tag, "commit": pin.commit}
    try:
        found = checkout.observe(layout, pin)
    except WorkspaceError as exc:
        text = f"{pin.tag} {pin.commit[:12]}; {exc.message}"
        unknown = PinRow(State.FAIL, "patches", exc.message)
        return PinRow(State.FAIL, "pin", text, facts=facts), unknown
    fits, origin = found.kind.is_pinned, f" of {without_user(pin.url)}" if pin.upstream else ""
    is_missing = found.kind is checkout.Kind.MISSING
    state = State.OK if fits else State.MISSING if is_missing else State.FAIL
    row = PinRow(
        state,
        "pin",
        f"{pin.tag} {pin.commit[:12]}{origin}; vendor/vllm: {found.detail}",
        facts=facts | {"kind": found.kind.value},
    )
    return row, _stack(layout, pin, found)


def _base(layout: Layout, pin: Pin) -> list[PinRow]:
    """Return the row of the release that a pinned commit stands on; none for a release."""
    if pin.ref is None:
        return []
    if pin.base is None:
        hint = hints.text("bump.bump", tag=[pin.request, "--base", "TAG"])
        return [PinRow(State.MISSING, "base", "none: every kernel is compiled here", hint=hint)]
    tree, base = Git(layout.vllm), pin.base
    facts: dict[str, object] = {"tag": base.tag, "commit": base.commit}
    there = (layout.vllm / ".git").exists() and tree.present((base.commit, pin.commit))
    if not there or len(there) < len({base.commit, pin.commit}):
        text = f"{base.tag}, which vendor/vllm lacks"
        return [PinRow(State.WARN, "base", text, hint=hints.text("inv.bootstrap"), facts=facts)]
    ahead = history.ahead(tree, base.commit, pin.commit)
    compiled = changes.compiled_since(tree, base.commit, pin.commit)
    files = errors.listed(compiled) if compiled else "none"
    text = (
        f"{base.tag}; the pin is {errors.counted(ahead, 'commit')} ahead; compiled sources that"
        f" differ: {files}"
    )
    facts |= {"ahead": ahead, "compiled": compiled}
    return [PinRow(State.OK, "base", text, facts=facts)]


def _remotes(layout: Layout, settings: Settings, pin: Pin, console: Console) -> list[PinRow]:
    """Return the rows of the branch of a pinned commit and of upstream; none for a release."""
    if pin.ref is None:
        return []
    rows = []
    try:
        now = checkout.commit_now(layout, pin, settings)
        if now != pin.commit:
            hint = hints.text("bump.bump", tag=_again(layout, pin)) if now else None
            text = f"{checkout.moved(pin, now)}; the pin stays at {pin.commit[:12]}"
            rows.append(PinRow(State.WARN, "branch", text, hint=hint, facts={"commit": now}))
    except WorkspaceError as exc:
        rows.append(PinRow(State.WARN, "branch", f"unknown: {exc.message}"))
    try:
        tip, behind = _behind(layout, settings, pin, console)
        text = f"{tip[:12]}; the pin is {errors.counted(behind, 'commit')} behind"
        rows.append(PinRow(State.OK, "upstream", text, facts={"commit": tip, "behind": behind}))
    except WorkspaceError as exc:
        rows.append(PinRow(State.WARN, "upstream", f"unknown: {exc.message}"))
    return rows


def _again(layout: Layout, pin: Pin) -> list[str]:
    """Return the arguments of `inv pin.bump` to the pin's branch.

    A base that is no ancestor of the pin was named by --base, and no search would find it again.
    """
    if pin.base is None or Git(layout.vllm).is_ancestor(pin.base.commit, pin.commit):
        return [pin.request]
    return [pin.request, "--base", pin.base.tag]


def _behind(layout: Layout, settings: Settings, pin: Pin, console: Console) -> tuple[str, int]:
    """Fetch the history of upstream's default branch into the store of commits.

    Return its last commit, and the number of commits that the pin lacks. Raises SourceError.
    """
    place = layout.upstream(pin.name)
    with (
        RunLog(console, layout.logs, verb="pin", secrets=settings.secrets) as run_log,
        stages.step(run_log, "upstream") as view,
        lock.hold(place.with_suffix(".lock"), verb="inv pin", wait=True, on_wait=console.info),
    ):
        remote = checkout.remote(layout, pin.of_upstream, settings, run_log, view)
        found = git.advertised(remote.url, ("HEAD",), cwd=layout.root, settings=settings)
        store, tip = remotes.open_store(place, layout.vllm), found.get("HEAD", "")
        if not store.present((tip,)):
            store.set_setting("remote.origin.url", remote.url)
            store.fetch(remote, ("+HEAD:refs/found/HEAD",), whole=False)
        if not history.forks(store, pin.commit, tip):
            raise SourceError(
                f"{without_user(remote.url)} has no commit in common with the pin",
                hint=hints.text("inv.pin_show"),
            )
        view.reason = f"{tip[:12]} of {without_user(remote.url)}"
        return tip, history.ahead(store, pin.commit, tip)


def _stack(layout: Layout, pin: Pin, found: checkout.Checkout) -> PinRow:
    try:
        stack = patches.observe(layout, "vllm", pin, found)
    except WorkspaceError as exc:
        return PinRow(State.FAIL, "patches", exc.message)
    facts: dict[str, object] = {"state": stack.state.value, "names": stack.names}
    row = status.patches_row(stack)
    return PinRow(row.state, row.name, row.text, facts=facts)


def _under_way(layout: Layout) -> list[PinRow]:
    rows = []
    if layout.returning.exists():
        hint = hints.text("inv.pin_rollback")
        rows.append(PinRow(State.WARN, "back", "a rollback was interrupted", hint=hint))
    if not staging.exists(layout):
        return rows
    try:
        bump_sandbox = staging.find(layout)
        assert bump_sandbox is not None
        stage, following = _bump_stage(bump_sandbox)
    except WorkspaceError as exc:
        return [*rows, PinRow(State.FAIL, "bump", exc.message, hint=exc.hint)]
    pin = bump_sandbox.pin
    facts: dict[str, object] = {"tag": pin.tag, "commit": pin.commit}
    text = f"to {pin.tag}: {stage}"
    return [*rows, PinRow(State.WARN, "bump", text, hint=following, facts=facts)]


def _bump_stage(bump_sandbox: staging.BumpSandbox) -> tuple[str, str]:
    """Return what a bump waits for, and the command that resumes it."""
    from workspace.repo.git import am

    if bump_sandbox.outer.promoting.exists():
        return "being promoted", hints.text("inv.patch_continue")
    tree = Git(bump_sandbox.layout.vllm)
    position = am.position(tree) if (bump_sandbox.layout.vllm / ".git").exists() else None
    if position is None:
        is_red = smoke_record.last_record(bump_sandbox.layout).get("verdict") == "fail"
        failed = f"its smoke failed; commit a fix in {bump_sandbox.shown}"
        return failed if is_red else "interrupted", hints.text("inv.patch_continue")
    unmerged = am.unmerged(tree)
    waits = f"patch {position.number} of {position.last} conflicts" + (
        f" in {', '.join(unmerged[:3])}" if unmerged else ""
    )
    return waits, hints.text("bump.edit_then_continue", folder=bump_sandbox.shown)


def _known_good_states(layout: Layout) -> list[PinRow]:
    found = known_good.states(layout)
    if not found:
        hint = hints.text("bump.smoke_records")
        return [PinRow(State.MISSING, "good", "no known-good state yet", hint=hint)]
    present = known_good.present_name(layout)
    rows = []
    for state in found:
        is_present = state.name == present
        is_kept = known_good.environment(layout, state.name).exists()
        kept = "with its environment" if is_kept else "without its environment"
        facts: dict[str, object] = {
            "name": state.name,
            "tag": state.tag,
            "tree": state.tree,
            "smoke": state.smoke,
            "current": is_present,
        }
        smoke = f"smoke {state.smoke[:16].replace('T', ' ')} UTC"
        text = f"{state.name}, {smoke}; {'in use' if is_present else kept}"
        rows.append(PinRow(State.OK if is_present else State.KEPT, "good", text, facts=facts))
    return rows


def _kept(layout: Layout) -> list[PinRow]:
    """Return a row for each of the newest states that a move kept, with its way back."""
    found, shown = known_good.kept(layout), layout.relative(layout.vllm)
    all_of = hints.text("bump.list_kept", shown=shown)
    rows = []
    for state in found[:SHOWN_KEPT]:
        facts: dict[str, object] = {"ref": state.ref, "commit": state.head}
        text = f"{state.ref}, {shown} at {state.head[:12]}"
        rows.append(PinRow(State.KEPT, "left", text, hint=state.back or all_of, facts=facts))
    if len(found) > SHOWN_KEPT:
        rows.append(PinRow(State.KEPT, "left", f"{len(found) - SHOWN_KEPT} more", hint=all_of))
    return rows


def _releases(settings: Settings, pin: Pin, *, offline: bool) -> PinRow:
    if offline:
        return PinRow(State.SKIPPED, "newer", "not checked (--offline)")
    from workspace.repo import index

    try:
        found = index.newer_releases(pin, settings=settings)
    except WorkspaceError as exc:
        return PinRow(State.WARN, "newer", f"unknown: {exc.message}")
    now = datetime.datetime.now(datetime.UTC)
    ages = {release.version: release.age_days(now) for release in found}
    releases = [
        f"{version} ({'age unknown' if age is None else f'{age:.0f} days'})"
        for version, age in ages.items()
    ]
    earlier = len(releases) - SHOWN_RELEASES
    more = [f"{earlier} earlier"] if earlier > 0 else []
    text = ", ".join([*reversed(releases[-SHOWN_RELEASES:]), *more]) or "none"
    rounded = {version: None if age is None else round(age, 1) for version, age in ages.items()}
    return PinRow(State.OK, "newer", text, facts={"versions": rounded})


def _triton(layout: Layout, settings: Settings, pin: Pin, *, offline: bool) -> PinRow:
    facts: dict[str, object] = {"commit": pin.commit}
    head = Git(layout.triton).head() if (layout.triton / ".git").exists() else None
    text = f"{pin.tag} {pin.commit[:12]}" + (
        f", vendor/triton at {head[:12]}" if head and head != pin.commit else ""
    )
    if offline:
        return PinRow(State.OK, "triton", text, facts=facts)
    try:
        found = triton.ahead(layout, settings, pin)
    except WorkspaceError as exc:
        text += f"; the commit of {triton.branch_of(settings)} is unknown: {exc.message}"
        return PinRow(State.WARN, "triton", text, facts=facts)
    facts |= {"upstream": found.commit, "ahead": found.commits}
    if found.commit == pin.commit:
        return PinRow(State.OK, "triton", f"{text}, the same as {found.branch}", facts=facts)
    count = (
        f"{errors.counted(found.commits, 'commit')} ahead"
        if found.commits is not None
        else "not fetched, so the distance is unknown"
    )
    return PinRow(
        State.OK,
        "triton",
        f"{text}; {found.branch} is at {found.commit[:12]}, {count}",
        hint=hints.text("bump.triton_again"),
        facts=facts,
    )
