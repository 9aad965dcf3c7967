"""`inv pin.rollback`: return to a state that passed the smoke, with its source, patches, pins,
environment and compiled files.

What is there now is kept under references first. Done in steps; whatever ends them, the next `inv
pin.rollback` finishes them.
"""

import datetime
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from workspace.bump import bump, known_good, promote, staging, triton
from workspace.bump.known_good import Good
from workspace.bump.staging import Marker
from workspace.checks import registry as smoke_record
from workspace.core import lock
from workspace.core.console import Console, State
from workspace.core.errors import CheckoutError, SettingsError, SmokeError, WorkspaceError
from workspace.core.files import copy_files, files_below, read_regular
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings, Value
from workspace.install import plan, sandbox, stamp
from workspace.machine import interpreter
from workspace.repo import checkout, patches, pins
from workspace.repo.git import Git, worktree
from workspace.repo.pins import Pin
from workspace.repo.series import BASE_REF, TIP_REF


def run(
    layout: Layout, settings: Settings, name: str | None, *, console: Console, wait: bool = False
) -> None:
    """Return to the newest good state that is not the present one, or to the one of this name; the
    smoke proves it.

    Raises SettingsError where there is no such state, CheckoutError where edits or an `am` stand in
    the way, SmokeError where it fails.
    """
    with (
        lock.hold(layout.lock, verb="inv pin.rollback", wait=wait, on_wait=console.info) as held,
        RunLog(
            console, layout.logs, verb="pin.rollback", secrets=settings.secrets, held=held
        ) as run_log,
    ):
        marker = staging.find_marker(layout.returning) or _begin(layout, name, console)
        wanted = known_good.read(layout, marker.facts["good"])
        if wanted is None:
            hint = (
                f"rm {layout.relative(layout.returning)}    gives the return up; then ./scripts/inv"
                " status"
            )
            raise CheckoutError(
                f"{marker.facts['good']} is not there any more, and a return to it was begun",
                hint=hint,
            )
        _finish(layout, marker, wanted, run_log)
    staging.report_left(layout, marker.facts, console=console)
    if not layout.environment.exists():
        console.info(
            "its environment was not kept: it is made anew and brought to the versions that it had"
        )
        settings = _as_it_was(settings, wanted)
    sandbox.build_in(layout, settings, console=console)
    _hold_to_freeze(layout, settings, wanted, console)
    try:
        bump.run_smoke(layout, settings, console)
    except SmokeError as exc:
        exc.hint = f"./scripts/inv doctor    looks at the machine; {exc.hint or ''}"
        raise
    known_good.record(layout, settings, plan.observe(layout, settings), console=console)


def _as_it_was(settings: Settings, wanted: Good) -> Settings:
    """The settings that make the good state's kernels again: those that were compiled here are no
    precompiled wheel's.
    """
    is_native = wanted.inputs.get("origin") == "native" and settings.text("KERNELS") == "auto"
    return (
        replace(settings, values={**settings.values, "KERNELS": Value("native", "flag")})
        if is_native
        else settings
    )


def is_under_way(layout: Layout) -> bool:
    return layout.returning.exists()


def _begin(layout: Layout, name: str | None, console: Console) -> Marker:
    """Choose, look whether anything stands in the way, and write down what is to be done."""
    if staging.is_there(layout):
        raise CheckoutError(
            "a bump is under way",
            hint="./scripts/inv patch.continue    finishes it; with --abort it is given up",
        )
    wanted, present = _choose(layout, name), known_good.current(layout)
    git, shown = Git(layout.vllm), layout.relative(layout.vllm)
    if verb := git.under_way():
        raise CheckoutError(
            f"{shown} is in the middle of a git {verb}",
            hint="./scripts/inv patch.continue    or --abort",
        )
    if edited := git.edits():
        more = f" and {len(edited) - 3} more" if len(edited) > 3 else ""
        raise CheckoutError(
            f"{shown} has edits ({', '.join(edited[:3])}{more})",
            hint=f"git -C {shown} stash && ./scripts/inv pin.rollback",
        )
    if wanted.head not in git.present((wanted.head,)):
        raise CheckoutError(
            f"{shown} no longer holds commit {wanted.head[:12]} of {wanted.name}",
            hint="./scripts/inv pin    names the others",
        )
    worktree.require_way(git, wanted.head)
    staging.require_one_disk(layout)
    kept = present if present and known_good.read(layout, present) else ""
    console.info(f"{present or 'the present state'} → {wanted.name}")
    if not kept:
        console.info("what is there now never passed the smoke, so its environment is not kept")
    left = known_good.now()
    known_good.keep_aside(layout, f"Before the return to {wanted.name}", name=left)
    facts = {
        "good": wanted.name,
        "present": kept,
        "tip": git.head() or "",
        "left": left,
        "names": sandbox.names_of(layout.patches("vllm")),
        **staging.products_of(layout),
    }
    return Marker(layout.returning, facts).write()


def _choose(layout: Layout, name: str | None) -> Good:
    present = known_good.current(layout)
    others = [found for found in known_good.every(layout) if found.name != present]
    if name is None and others:
        return others[0]
    if found := next((found for found in others if found.name == name), None):
        return found
    there = ", ".join(found.name for found in others)
    what = (
        f"there is no good state {name} beside the present one"
        if name
        else "there is no good state to return to"
    )
    raise SettingsError(
        what + (f"; there are {there}" if there else ""),
        hint="a state is recorded as good when ./scripts/nox -s smoke has passed on it",
    )


def _finish(layout: Layout, marker: Marker, wanted: Good, run_log: RunLog) -> None:
    # Only what this workspace made may go to make room.
    discarded = layout.state / ".back.gone"
    with run_log.console.step("back") as view:
        run_log.phase("back", view)
        staging.finish_marker(
            marker,
            (
                ("environment aside", lambda facts: _put_aside(layout, wanted, facts, discarded)),
                (
                    "source",
                    lambda facts: staging.move_tree(
                        layout, old=facts["tip"], new=wanted.head, run_log=run_log
                    ),
                ),
                ("references", lambda facts: _set_refs(layout, wanted)),
                ("environment", lambda facts: _bring_environment(layout, wanted)),
                (
                    "products aside",
                    lambda facts: staging.take_products_away(
                        layout, facts, good_state=facts["present"]
                    ),
                ),
                ("products", lambda facts: _bring_products(layout, wanted)),
                ("patches", lambda facts: _write_patches(layout, wanted, facts)),
                (
                    "pins",
                    lambda facts: pins.save(
                        layout.pins, pins.load(known_good.kept(layout, wanted.name).pins).vllm
                    ),
                ),
                (
                    "gitlink",
                    lambda facts: staging.set_gitlink(layout, wanted.gitlink, run_log=run_log),
                ),
            ),
        )
        view.reason = f"{wanted.name}; what was there is kept as refs/left/{marker.facts['left']}"
    run_log.step = None
    marker.path.unlink()
    shutil.rmtree(discarded, ignore_errors=True)


def _put_aside(layout: Layout, wanted: Good, facts: Mapping[str, str], discarded: Path) -> None:
    """The present environment waits with the good state that it belongs to. One of no good state
    makes room where another one was kept.
    """
    if facts["present"]:
        staging.put_aside(layout.environment, known_good.environment(layout, facts["present"]))
    elif os.path.lexists(known_good.environment(layout, wanted.name)):
        staging.put_aside(layout.environment, discarded)


def _set_refs(layout: Layout, wanted: Good) -> None:
    git = Git(layout.vllm)
    git.set_ref(TIP_REF, wanted.head)
    git.set_ref(BASE_REF, wanted.base)


def _bring_environment(layout: Layout, wanted: Good) -> None:
    kept = known_good.environment(layout, wanted.name)
    if os.path.lexists(kept) and not os.path.lexists(layout.environment):
        os.rename(kept, layout.environment)


def _bring_products(layout: Layout, wanted: Good) -> None:
    """Compiled files as they were; the good state keeps its own."""
    folder = known_good.kernels(layout, wanted.name)
    copy_files(folder, layout.vllm, files_below(folder))


def _write_patches(layout: Layout, wanted: Good, facts: Mapping[str, str]) -> None:
    files = known_good.kept(layout, wanted.name)
    sandbox.write_patches(
        files.patches("vllm"),
        layout.patches("vllm"),
        pin=pins.load(files.pins).vllm.commit,
        former=facts["names"],
    )


def _hold_to_freeze(layout: Layout, settings: Settings, wanted: Good, console: Console) -> None:
    """Install exactly the versions that the good state had, where the environment had to be made
    anew; the index may have newer ones by now.
    """
    lines = read_regular(known_good.folder(layout, wanted.name) / "freeze.txt").decode().split()
    there = interpreter.installed(layout)
    differing = [
        line for line in lines if there.get(line.partition("==")[0]) != line.partition("==")[2]
    ]
    if not differing:
        return
    with (
        lock.hold(layout.lock, verb="inv pin.rollback", wait=True, on_wait=console.info) as held,
        RunLog(
            console, layout.logs, verb="pin.rollback", secrets=settings.secrets, held=held
        ) as run_log,
        console.step("freeze") as view,
    ):
        run_log.phase("freeze", view)
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
                layout.stamp("environment"), stamp.Stamp(inputs=before.inputs, packages=packages)
            )
        view.reason = f"{len(differing)} packages at the versions of {wanted.name}"


SHOWN_RELEASES = 3


@dataclass(frozen=True)
class Row:
    """One thing. `facts` are for a program, `text` for a person."""

    state: State
    name: str
    text: str
    facts: dict[str, object] = field(default_factory=dict)


def show(
    layout: Layout,
    settings: Settings,
    *,
    console: Console,
    as_json: bool = False,
    offline: bool = False,
) -> None:
    """Print one row a thing; as JSON on stdout where a program asks. Raises SettingsError for
    broken pins only.
    """
    pinned = pins.load(layout.pins)
    rows = [
        _pin(layout, pinned.vllm),
        _stack(layout, pinned.vllm),
        *_under_way(layout),
        *_known_good_states(layout),
    ]
    rows += [
        _releases(settings, pinned.vllm, offline=offline),
        _triton(layout, settings, pinned.triton, offline=offline),
    ]
    if as_json:
        console.data(json.dumps({"schema": 1, "rows": [asdict(row) for row in rows]}, indent=1))
        return
    for row in rows:
        console.row(row.state, row.name, row.text)


def _pin(layout: Layout, pin: Pin) -> Row:
    facts: dict[str, object] = {"tag": pin.tag, "commit": pin.commit}
    try:
        there = checkout.observe(layout, pin)
    except WorkspaceError as exc:
        return Row("FAIL", "pin", f"{pin.tag} {pin.commit[:12]}; {exc.message}", facts)
    fits = there.kind in (checkout.Kind.GIT, checkout.Kind.RELEASE)
    state: State = "ok" if fits else "missing" if there.kind is checkout.Kind.MISSING else "FAIL"
    return Row(
        state,
        "pin",
        f"{pin.tag} {pin.commit[:12]}; vendor/vllm: {there.detail}",
        facts | {"kind": there.kind.value},
    )


def _stack(layout: Layout, pin: Pin) -> Row:
    try:
        stack = patches.observe(layout, "vllm", pin, checkout.observe(layout, pin))
    except WorkspaceError as exc:
        return Row("FAIL", "patches", exc.message)
    text = (
        f"{len(stack.names)} {'patch' if len(stack.names) == 1 else 'patches'}, {stack.state.value}"
    )
    state: State = {"applied": "ok", "missing": "missing"}.get(stack.state.value, "warn")  # type: ignore[assignment]
    return Row(state, "patches", text, {"state": stack.state.value, "names": stack.names})


def _under_way(layout: Layout) -> list[Row]:
    rows = []
    if is_under_way(layout):
        rows.append(
            Row(
                "warn",
                "back",
                "a return to a good state was interrupted; next: ./scripts/inv pin.rollback",
            )
        )
    if not staging.is_there(layout):
        return rows
    try:
        bump_sandbox = staging.find(layout)
        assert bump_sandbox is not None
        what, following = _stage(bump_sandbox)
    except WorkspaceError as exc:
        return [*rows, Row("FAIL", "bump", f"{exc.message}; next: {exc.hint}")]
    return [
        *rows,
        Row(
            "warn",
            "bump",
            f"to {bump_sandbox.pin.tag}: {what}; next: {following}",
            {"tag": bump_sandbox.pin.tag, "commit": bump_sandbox.pin.commit},
        ),
    ]


def _stage(bump_sandbox: staging.BumpSandbox) -> tuple[str, str]:
    """What a bump waits for, and the command that leads on."""
    from workspace.repo.git import am

    if promote.is_begun(bump_sandbox):
        return "being promoted", bump.CONTINUE
    tree = Git(bump_sandbox.layout.vllm)
    there = am.position(tree) if (bump_sandbox.layout.vllm / ".git").exists() else None
    if there is None:
        is_red = smoke_record.last_record(bump_sandbox.layout).get("verdict") == "fail"
        return (
            "its smoke failed; commit a fix in " + bump_sandbox.shown if is_red else "interrupted"
        ), bump.CONTINUE
    unmerged = am.unmerged(tree)
    waits = f"patch {there.number} of {there.last} conflicts" + (
        f" in {', '.join(unmerged[:3])}" if unmerged else ""
    )
    return waits, f"edit and git add in {bump_sandbox.shown}, then {bump.CONTINUE}"


def _known_good_states(layout: Layout) -> list[Row]:
    found = known_good.every(layout)
    if not found:
        return [
            Row(
                "missing",
                "good",
                "nothing to return to yet; ./scripts/nox -s smoke records what passes",
            )
        ]
    present = known_good.current(layout)
    rows = []
    for state in found:
        is_present = state.name == present
        kept = (
            "in use"
            if is_present
            else (
                "with its environment"
                if known_good.environment(layout, state.name).exists()
                else "its environment would be made anew"
            )
        )
        facts: dict[str, object] = {
            "name": state.name,
            "tag": state.tag,
            "tree": state.tree,
            "smoke": state.smoke,
            "current": is_present,
        }
        rows.append(
            Row(
                "ok" if is_present else "kept",
                "good",
                f"{state.name}, smoke {state.smoke}; {kept}",
                facts,
            )
        )
    return rows


def _releases(settings: Settings, pin: Pin, *, offline: bool) -> Row:
    if offline:
        return Row("skipped", "newer", "not asked (--offline)")
    from workspace.repo import index

    try:
        found = index.newer_releases(pin, settings=settings)
    except WorkspaceError as exc:
        return Row("warn", "newer", f"unknown: {exc.message}")
    now = datetime.datetime.now(datetime.UTC)
    ages = {release.version: release.age_days(now) for release in found}
    said = [
        f"{version} ({'age unknown' if age is None else f'{age:.0f} days'})"
        for version, age in ages.items()
    ]
    more = [f"{len(said) - SHOWN_RELEASES} before them"] if len(said) > SHOWN_RELEASES else []
    text = ", ".join([*reversed(said[-SHOWN_RELEASES:]), *more]) or "none"
    return Row(
        "ok",
        "newer",
        text,
        {
            "versions": {
                version: None if age is None else round(age, 1) for version, age in ages.items()
            }
        },
    )


def _triton(layout: Layout, settings: Settings, pin: Pin, *, offline: bool) -> Row:
    facts: dict[str, object] = {"commit": pin.commit}
    head = Git(layout.triton).head() if (layout.triton / ".git").exists() else None
    text = f"{pin.tag} {pin.commit[:12]}" + (
        f", vendor/triton at {head[:12]}" if head and head != pin.commit else ""
    )
    if offline:
        return Row("ok", "triton", text, facts)
    try:
        found = triton.ahead(layout, settings, pin)
    except WorkspaceError as exc:
        return Row(
            "warn",
            "triton",
            f"{text}; where {triton.branch_of(settings)} is, is unknown: {exc.message}",
            facts,
        )
    facts |= {"upstream": found.commit, "ahead": found.commits}
    if found.commit == pin.commit:
        return Row("ok", "triton", f"{text}, as {found.branch} is", facts)
    count = (
        f"{found.commits} commits ahead"
        if found.commits is not None
        else "not fetched, so how far ahead is unknown"
    )
    return Row(
        "ok",
        "triton",
        f"{text}; {found.branch} is at {found.commit[:12]}, {count}; next: {triton.AGAIN}",
        facts,
    )
