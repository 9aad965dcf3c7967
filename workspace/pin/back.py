"""`inv pin.back`: return to a state that passed the smoke, with its source, patches, pins, environment and compiled files.

What is there now is kept under references first. Done in steps; whatever ends them, the next `inv pin.back` finishes them.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from workspace.build import annex, plan, stamp
from workspace.core import lock
from workspace.core.console import Console
from workspace.core.copying import copy_files, files_below
from workspace.core.errors import CheckoutError, SettingsError, SmokeError
from workspace.core.files import read_regular
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.core.settings import Settings, Value
from workspace.environment import interpreter
from workspace.pin import bump, forward, good, moving, workshop
from workspace.pin.forward import Marker
from workspace.pin.good import Good
from workspace.source import pins
from workspace.source.git import Git, worktree
from workspace.source.stack import BASE_REF, TIP_REF


def run(layout: Layout, settings: Settings, name: str | None, *, console: Console, wait: bool = False) -> None:
    """Return to the newest good state that is not the present one, or to the one of this name; the smoke proves it.

    Raises SettingsError where there is no such state, CheckoutError where edits or an `am` stand in the way, SmokeError where it fails.
    """
    with (
        lock.hold(layout.lock, verb="inv pin.back", wait=wait, on_wait=console.say) as held,
        Journal(console, layout.logs, verb="pin.back", secrets=settings.secrets, held=held) as journal,
    ):
        marker = forward.find(layout.returning) or _begin(layout, name, console)
        wanted = good.read(layout, marker.facts["good"])
        if wanted is None:
            hint = f"rm {layout.relative(layout.returning)}    gives the return up; then ./scripts/inv status"
            raise CheckoutError(f"{marker.facts['good']} is not there any more, and a return to it was begun", hint=hint)
        _finish(layout, marker, wanted, journal)
    moving.say_left(layout, marker.facts, console=console)
    if not layout.environment.exists():
        console.say("its environment was not kept: it is made anew and brought to the versions that it had")
        settings = _as_it_was(settings, wanted)
    annex.build(layout, settings, console=console)
    _hold_to_freeze(layout, settings, wanted, console)
    try:
        bump.run_smoke(layout, settings, console)
    except SmokeError as exc:
        exc.hint = f"./scripts/inv doctor    looks at the machine; {exc.hint or ''}"
        raise
    good.record(layout, settings, plan.observe(layout, settings), console=console)


def _as_it_was(settings: Settings, wanted: Good) -> Settings:
    """The settings that make the good state's kernels again: those that were compiled here are no donor's."""
    is_native = wanted.inputs.get("origin") == "native" and settings.text("KERNELS") == "auto"
    return replace(settings, values={**settings.values, "KERNELS": Value("native", "flag")}) if is_native else settings


def is_under_way(layout: Layout) -> bool:
    return layout.returning.exists()


def _begin(layout: Layout, name: str | None, console: Console) -> Marker:
    """Choose, look whether anything stands in the way, and write down what is to be done."""
    if workshop.is_there(layout):
        raise CheckoutError("a bump is under way", hint="./scripts/inv patch.continue    finishes it; with --abort it is given up")
    wanted, present = _choose(layout, name), good.current(layout)
    git, shown = Git(layout.vllm), layout.relative(layout.vllm)
    if verb := git.under_way():
        raise CheckoutError(f"{shown} is in the middle of a git {verb}", hint="./scripts/inv patch.continue    or --abort")
    if edited := git.edits():
        more = f" and {len(edited) - 3} more" if len(edited) > 3 else ""
        raise CheckoutError(f"{shown} has edits ({', '.join(edited[:3])}{more})", hint=f"git -C {shown} stash && ./scripts/inv pin.back")
    if wanted.head not in git.present((wanted.head,)):
        raise CheckoutError(f"{shown} no longer holds commit {wanted.head[:12]} of {wanted.name}", hint="./scripts/inv pin    names the others")
    worktree.require_way(git, wanted.head)
    moving.require_one_disk(layout)
    kept = present if present and good.read(layout, present) else ""
    console.say(f"{present or 'the present state'} → {wanted.name}")
    if not kept:
        console.say("what is there now never passed the smoke, so its environment is not kept")
    left = good.now()
    good.keep_aside(layout, f"Before the return to {wanted.name}", name=left)
    facts = {
        "good": wanted.name,
        "present": kept,
        "tip": git.head() or "",
        "left": left,
        "names": annex.names_of(layout.patches("vllm")),
        **moving.products_of(layout),
    }
    return Marker(layout.returning, facts).write()


def _choose(layout: Layout, name: str | None) -> Good:
    present = good.current(layout)
    others = [found for found in good.every(layout) if found.name != present]
    if name is None and others:
        return others[0]
    if found := next((found for found in others if found.name == name), None):
        return found
    there = ", ".join(found.name for found in others)
    what = f"there is no good state {name} beside the present one" if name else "there is no good state to return to"
    raise SettingsError(what + (f"; there are {there}" if there else ""), hint="a state is recorded as good when ./scripts/nox -s smoke has passed on it")


def _finish(layout: Layout, marker: Marker, wanted: Good, journal: Journal) -> None:
    # Only what this workspace made may go to make room.
    discarded = layout.state / ".back.gone"
    with journal.console.step("back") as view:
        journal.phase("back", view)
        forward.finish(
            marker,
            (
                ("environment aside", lambda facts: _put_aside(layout, wanted, facts, discarded)),
                ("source", lambda facts: moving.move_tree(layout, old=facts["tip"], new=wanted.head, journal=journal)),
                ("references", lambda facts: _set_refs(layout, wanted)),
                ("environment", lambda facts: _bring_environment(layout, wanted)),
                ("products aside", lambda facts: moving.take_products_away(layout, facts, good_state=facts["present"])),
                ("products", lambda facts: _bring_products(layout, wanted)),
                ("patches", lambda facts: _write_patches(layout, wanted, facts)),
                ("pins", lambda facts: pins.save(layout.pins, pins.load(good.kept(layout, wanted.name).pins).vllm)),
                ("gitlink", lambda facts: moving.set_gitlink(layout, wanted.gitlink, journal=journal)),
            ),
        )
        view.reason = f"{wanted.name}; what was there is kept as refs/left/{marker.facts['left']}"
    journal.step = None
    marker.path.unlink()
    shutil.rmtree(discarded, ignore_errors=True)


def _put_aside(layout: Layout, wanted: Good, facts: Mapping[str, str], discarded: Path) -> None:
    """The present environment waits with the good state that it belongs to. One of no good state makes room where another one was kept."""
    if facts["present"]:
        moving.put_aside(layout.environment, good.environment(layout, facts["present"]))
    elif os.path.lexists(good.environment(layout, wanted.name)):
        moving.put_aside(layout.environment, discarded)


def _set_refs(layout: Layout, wanted: Good) -> None:
    git = Git(layout.vllm)
    git.set_ref(TIP_REF, wanted.head)
    git.set_ref(BASE_REF, wanted.base)


def _bring_environment(layout: Layout, wanted: Good) -> None:
    kept = good.environment(layout, wanted.name)
    if os.path.lexists(kept) and not os.path.lexists(layout.environment):
        os.rename(kept, layout.environment)


def _bring_products(layout: Layout, wanted: Good) -> None:
    """Compiled files as they were; the good state keeps its own."""
    folder = good.kernels(layout, wanted.name)
    copy_files(folder, layout.vllm, files_below(folder))


def _write_patches(layout: Layout, wanted: Good, facts: Mapping[str, str]) -> None:
    files = good.kept(layout, wanted.name)
    annex.write_patches(files.patches("vllm"), layout.patches("vllm"), pin=pins.load(files.pins).vllm.commit, former=facts["names"])


def _hold_to_freeze(layout: Layout, settings: Settings, wanted: Good, console: Console) -> None:
    """Install exactly the versions that the good state had, where the environment had to be made anew; the index may have newer ones by now."""
    lines = read_regular(good.folder(layout, wanted.name) / "freeze.txt").decode().split()
    there = interpreter.installed(layout)
    differing = [line for line in lines if there.get(line.partition("==")[0]) != line.partition("==")[2]]
    if not differing:
        return
    with (
        lock.hold(layout.lock, verb="inv pin.back", wait=True, on_wait=console.say) as held,
        Journal(console, layout.logs, verb="pin.back", secrets=settings.secrets, held=held) as journal,
        console.step("freeze") as view,
    ):
        journal.phase("freeze", view)
        before = stamp.read(layout.stamp("environment"))
        stamp.withdraw(layout.stamp("environment"))
        interpreter.install(layout, settings, ["--no-deps", *differing], journal=journal)
        if before:
            packages = {name: version for name, version in interpreter.installed(layout).items() if name != "vllm"}
            stamp.write(layout.stamp("environment"), stamp.Stamp(inputs=before.inputs, packages=packages))
        view.reason = f"{len(differing)} packages at the versions of {wanted.name}"
