"""Known-good states: a smoke passed on them, and `inv pin.rollback` returns to them.

A state is one folder in `.workspace/good` with patches, kernels and a package list, plus its
references in both repositories. Its good.json is written last; a folder without that file does not
count.
"""

import datetime
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from workspace.checks import smoke as smoke_record
from workspace.core import files, hints, records
from workspace.core.console import Console, RunLog
from workspace.core.errors import CheckoutError
from workspace.core.files import copy_files, read_regular, write_atomic
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import plan, precompiled, sandbox, stages, stamp
from workspace.install.precompiled import KernelSource
from workspace.machine import interpreter
from workspace.repo import checkout, pins, series
from workspace.repo.git import Git, worktree
from workspace.repo.series import State

KEPT = 3
# In the folder of a bump's sandbox: the name of the state that it made, until it is promoted.
UNPROMOTED = "unpromoted"
_MOST_COMMITS = 20


@dataclass(frozen=True)
class KnownGood(records.Record, schema=1):
    """A state on which the smoke passed.

    `head`, `base` and `tree` belong to vendor/vllm; `gitlink` is the commit that the superproject
    named.
    """

    name: str
    tag: str
    head: str
    base: str
    tree: str
    gitlink: str | None
    recorded: str
    smoke: str
    inputs: Mapping[str, str]
    kernels: KernelSource | None = None

    @classmethod
    def upgrade(cls, document: records.Document) -> records.Document:
        """Return a document of an older edition, whose source of kernels was a text."""
        return precompiled.upgraded(document)


def folder(layout: Layout, name: str) -> Path:
    """Return the folder of a known-good state."""
    return layout.known_good_states / name


def environment(layout: Layout, name: str) -> Path:
    """Return the path at which a state's environment waits while another environment is in use."""
    return folder(layout, name) / "environment"


def kernels(layout: Layout, name: str) -> Path:
    """Return the folder with the compiled files of a state."""
    return folder(layout, name) / "kernels"


def pinned_files(layout: Layout, name: str) -> Layout:
    """Return the pins and patches of a known-good state, as a layout."""
    return Layout(folder(layout, name) / "files")


def name_of(tag: str, tree: str) -> str:
    """Return the name of the state with this tag and this git tree."""
    return f"{tag.replace('/', '-')}-{tree[:12]}"


def states(layout: Layout) -> tuple[KnownGood, ...]:
    """Return the known-good states, newest first; skip folders whose record cannot be read."""
    found = (
        read(layout, path.parent.name) for path in layout.known_good_states.glob("*/good.json")
    )
    return tuple(
        sorted((state for state in found if state), key=lambda state: state.recorded, reverse=True)
    )


def read(layout: Layout, name: str) -> KnownGood | None:
    """Return the state of this name, None if its record is missing or unreadable."""
    state = records.read(folder(layout, name) / "good.json", KnownGood)
    return state if state and state.name == name else None


def record(observed: plan.Observation, *, console: Console) -> KnownGood | None:
    """Record the present state as known-good if the smoke passed on it, else print why not.

    Takes the workspace's lock.
    """
    layout, settings = observed.machine.layout, observed.machine.settings
    with stages.locked(layout, settings, "inv pin", console=console, wait=True) as run_log:
        sandbox.clear_leftovers(layout, Layout(layout.bump_sandbox))
        why = refusal(layout, observed)
        if why:
            console.info(f"not recorded as good: {why}")
            return None
        made = keep(observed, run_log=run_log)
        console.info(f"recorded as good: {made.name}; ./scripts/inv pin.rollback returns to it")
        return made


def refusal(layout: Layout, observed: plan.Observation) -> str | None:
    """Return why the present state cannot become known-good, None if it can."""
    stack = observed.stack
    if stack is None or stack.head is None:
        return "there is no checkout"
    if stack.dirty:
        return f"vendor/vllm has edits ({', '.join(stack.dirty[:3])})"
    if stack.state is not State.APPLIED:
        return "vendor/vllm differs from what the series makes; ./scripts/inv patch shows how"
    if any(layer.state != "ok" for layer in observed.layers):
        return "the build is stale; ./scripts/inv status shows which layer"
    return None if smoke_passed(layout, stack.tree) else "the smoke has not passed on this tree"


def keep(
    observed: plan.Observation,
    *,
    run_log: RunLog,
    outer: Layout | None = None,
    gitlink: str | None = None,
) -> KnownGood:
    """Store a state that the caller knows to be good; reuse what is stored already.

    It is the present state, or that of a bump's sandbox: then `outer` is the clone, and `gitlink`
    the commit that its superproject is to name.
    """
    stack, build, own = observed.stack, observed.kernels.recorded, observed.machine.layout
    layout = outer or own
    assert build is not None
    assert stack is not None
    assert stack.head
    assert stack.base
    assert stack.tree
    name = name_of(observed.pin.tag, stack.tree)
    Git(layout.vllm).set_ref(f"refs/good/{name}", stack.head)
    gitlink = gitlink if outer else _set_reference(layout, name)
    record_file = folder(layout, name) / "good.json"
    before = read(layout, name)
    stamp.withdraw(record_file)
    libraries = {f"library {library.path}": library.sha256 for library in build.libraries}
    inputs = {**(observed.environment.inputs or {}), **build.inputs, **libraries}
    former = (before.inputs, before.kernels) if before else None
    _copy_files(own, layout, name, is_stored=former == (inputs, build.kernels))
    made = KnownGood(
        name=name,
        tag=observed.pin.tag,
        head=stack.head,
        base=stack.base,
        tree=stack.tree,
        gitlink=gitlink,
        recorded=datetime.datetime.now(datetime.UTC).isoformat(),
        smoke=str(smoke_record.last_record(own).get("time")),
        inputs=inputs,
        kernels=build.kernels,
    )
    os.sync()
    records.write(record_file, made)
    _prune(layout, using=name, run_log=run_log)
    return made


def _set_reference(layout: Layout, name: str) -> str | None:
    """Set `refs/good/NAME` in the superproject; return its gitlink of vendor/vllm."""
    outer = checkout.superproject(layout)
    link = outer.gitlink(layout.relative(layout.vllm)) if outer else None
    if outer and outer.head():
        gitlinks = {layout.relative(layout.vllm): link.commit} if link else {}
        commit = worktree.snapshot(
            outer, f"Good: {name}", paths=("vendor/pins.toml", "patches"), gitlinks=gitlinks
        )
        # A commit that differs by its date alone would leave the former one to the reflog.
        if not worktree.are_alike(outer, commit, f"refs/good/{name}"):
            outer.set_ref(f"refs/good/{name}", commit)
    return link.commit if link else None


def _copy_files(own: Layout, layout: Layout, name: str, *, is_stored: bool) -> None:
    """Copy pins, patches, list of packages, and kernels unless they `is_stored` already."""
    target, place = kernels(layout, name), pinned_files(layout, name).root
    if not (is_stored and target.is_dir()):
        shutil.rmtree(target, ignore_errors=True)
        with files.folder_beside(target) as scratch:
            copy_files(own.vllm, scratch / "kernels", stages.build_products(own.vllm))
            files.put_in_place(scratch / "kernels", target)
    with files.folder_beside(place) as scratch:
        _copy_pins(own, Layout(scratch / "files"))
        shutil.rmtree(place, ignore_errors=True)
        files.put_in_place(scratch / "files", place)
    installed = sorted(interpreter.installed(own).items())
    lines = (f"{package}=={version}\n" for package, version in installed if package != "vllm")
    write_atomic(folder(layout, name) / "freeze.txt", "".join(lines).encode())


def timestamp() -> str:
    """Return the present UTC time as a name for what a move leaves behind."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")


def keep_present(layout: Layout, why: str, *, name: str) -> None:
    """Set `refs/left/NAME` in both repositories to the present state, edits of pins included.

    Without a superproject, copy pins and patches to the leftovers folder.
    """
    ref = f"refs/left/{name}"
    git, outer = Git(layout.vllm), checkout.superproject(layout)
    if head := git.head():
        git.set_ref(ref, head)
    if outer and outer.head():
        link = outer.gitlink(layout.relative(layout.vllm))
        gitlinks = {layout.relative(layout.vllm): link.commit} if link else {}
        paths = ("vendor/pins.toml", "patches")
        outer.set_ref(ref, worktree.snapshot(outer, why, paths=paths, gitlinks=gitlinks))
    else:
        with files.folder_beside(leftovers(layout, name)) as scratch:
            _copy_pins(layout, Layout(scratch / "left"))
            shutil.rmtree(leftovers(layout, name), ignore_errors=True)
            files.put_in_place(scratch / "left", leftovers(layout, name))


def held_by_none(layout: Layout, wanted: KnownGood) -> tuple[str, ...]:
    """Return what a rollback to `wanted` takes away and no known-good state holds, a line each.

    These are commits of vendor/vllm, files of patches/vllm, and the pin.
    """
    found = states(layout)
    lines = [f"commit {line} of vendor/vllm" for line in _commits_of_none(layout, found)]
    folders = [pinned_files(layout, state.name).patches("vllm") for state in found]
    # What write_patches deletes or overwrites; a file that no series names stays.
    names = {*sandbox.names_of(layout.patches("vllm")).split("\n"), series.SERIES_FILE}
    names |= {path.name for path in pinned_files(layout, wanted.name).patches("vllm").iterdir()}
    for name in sorted(names - {""}):
        path = layout.patches("vllm") / name
        if path.is_file() and not any(_is_in(folder, path) for folder in folders):
            lines.append(layout.relative(path))
    pin = pins.load(layout.pins).vllm
    if all(pins.load(pinned_files(layout, state.name).pins).vllm != pin for state in found):
        lines.append(f"the pin of {pin.tag} {pin.commit[:12]} in vendor/pins.toml")
    return tuple(lines)


def would_lose(
    layout: Layout, wanted: KnownGood, lost: Sequence[str], edited: Sequence[str]
) -> CheckoutError:
    """Return the error for work that no known-good state holds; `edited` are its edited files."""
    shown = layout.relative(layout.vllm)
    force = hints.text("bump.rollback_force", good=wanted.name)
    hint = hints.text("bump.smoke_or_force", force=force)
    if len(lost) == len(edited):
        hint = hints.text("bump.stash_or_force", shown=shown, force=force)
    more = f" and {len(edited) - 3} more" if len(edited) > 3 else ""
    edits = f"{shown} has edits ({', '.join(edited[:3])}{more}); " if edited else ""
    return CheckoutError(
        f"{edits}a return to {wanted.name} would take away what is listed above and no known-good"
        " state holds; nothing was changed",
        hint=hint,
        details=tuple(lost),
    )


def _is_in(folder: Path, path: Path) -> bool:
    """Return whether a file of any name in the folder has the content of `path`."""
    content = read_regular(path)
    return any(read_regular(other) == content for other in folder.iterdir() if other.is_file())


def _commits_of_none(layout: Layout, found: Sequence[KnownGood]) -> list[str]:
    """Return SHA and subject of the commits in HEAD of vendor/vllm that no state has."""
    git = Git(layout.vllm)
    head = git.head()
    if head is None or git.tree(head) in {state.tree for state in found}:
        return []
    bases = (git.resolve(series.BASE_REF), pins.load(layout.pins).vllm.commit)
    others = git.present(
        [commit for commit in (*bases, *(state.head for state in found)) if commit]
    )
    log = ("log", f"-n{_MOST_COMMITS}", "--reverse", "--no-show-signature", "--format=%h %s")
    return git.look(*log, head, "--not", *sorted(others), "--").out.splitlines()


@dataclass(frozen=True)
class Kept:
    """What a move kept of the state before it, under `ref` in vendor/vllm.

    `back` is the command that brings it back, None where the superproject has no such reference.
    """

    ref: str
    head: str
    back: str | None


def kept(layout: Layout) -> tuple[Kept, ...]:
    """Return what moves and given-up sandboxes kept, newest first, those without a date last."""
    git, outer = Git(layout.vllm), checkout.superproject(layout)
    if git.place() is None:
        return ()
    own = {**worktree.references(git, "refs/left/"), **worktree.references(git, "refs/pins/")}
    pinned = worktree.references(outer, "refs/left/") if outer else {}
    return tuple(
        Kept(ref, head, way_back(layout, ref) if ref in pinned else None)
        for ref, head in sorted(own.items(), reverse=True)
        if ref.startswith(("refs/left/", "refs/pins/left-"))
    )


def way_back(layout: Layout, ref: str) -> str:
    """Return the command that brings pins, patches and commits of a kept state back."""
    shown, outer = layout.relative(layout.vllm), checkout.superproject(layout)
    if outer is None or not outer.head():
        folder = layout.relative(leftovers(layout, ref.removeprefix("refs/left/")))
        return hints.text("bump.bring_back_copy", folder=folder, shown=shown, ref=ref)
    command = hints.text("repo.detach", shown=shown, commit=ref)
    if outer.gitlink(shown):
        command = hints.text("bump.bring_back_gitlink", shown=shown, ref=ref, command=command)
    return hints.text("bump.bring_back", ref=ref, command=command)


def leftovers(layout: Layout, name: str) -> Path:
    """Return the folder for files that a move leaves behind and that no repository keeps."""
    return layout.state / f"left-{name}"


def _copy_pins(layout: Layout, target: Layout) -> None:
    target.pins.parent.mkdir(parents=True)
    target.pins.write_bytes(read_regular(layout.pins))
    shutil.copytree(layout.patches("vllm"), target.patches("vllm"))


def run_smoke(layout: Layout, settings: Settings, console: Console) -> None:
    """Run the smoke on a layout. Raises SmokeError if a check fails or nothing is built."""
    from workspace.checks.smoke_suite import SmokeOptions

    smoke_record.smoke(layout, settings, SmokeOptions(), console=console)


def smoke_passed(layout: Layout, tree: str | None) -> bool:
    """Return whether the last smoke passed on this git tree without edits."""
    last = smoke_record.last_record(layout)
    return last.get("verdict") == "pass" and last.get("tree") == tree and last.get("dirty") is None


def present_name(layout: Layout) -> str | None:
    """Return the name of the present state by pin and tree, None without a checkout."""
    git = Git(layout.vllm)
    head = git.head() if (layout.vllm / ".git").exists() else None
    return name_of(pins.load(layout.pins).vllm.tag, git.tree(head)) if head else None


def _prune(layout: Layout, *, using: str, run_log: RunLog) -> None:
    """Delete all but the newest KEPT states; the state in use counts and is never deleted."""
    others = [state for state in states(layout) if state.name != using]
    for state in others[KEPT - 1 :]:
        run_log.write(f"no longer kept: {state.name}")
        _forget(layout, state.name)


def note_unpromoted(layout: Layout, tested: plan.Observation) -> None:
    """Note the state of the bump's sandbox before it is stored, for `forget_unpromoted`: its name,
    and in a second line its former time if it was stored before.
    """
    own, stack = tested.machine.layout, tested.stack
    name, note = name_of(tested.pin.tag, (stack and stack.tree) or ""), own.root / UNPROMOTED
    if note.exists() and note.read_text(encoding="utf-8").partition("\n")[0] == name:
        return
    forget_unpromoted(layout, own)
    former = read(layout, name)
    write_atomic(note, f"{name}\n{former.recorded if former else ''}".encode())


def forget_unpromoted(layout: Layout, own: Layout) -> None:
    """Delete the state that the bump's sandbox `own` made and that was never promoted, if any. A
    state that was stored before gets its former time back.
    """
    if not (note := own.root / UNPROMOTED).exists():
        return
    name, _, recorded = note.read_text(encoding="utf-8").partition("\n")
    if not recorded:
        _forget(layout, name)
    elif state := read(layout, name):
        records.write(folder(layout, name) / "good.json", replace(state, recorded=recorded))


def _forget(layout: Layout, name: str) -> None:
    """Delete a state: its record first, then its references and its folder."""
    stamp.withdraw(folder(layout, name) / "good.json")
    for git in filter(None, (Git(layout.vllm), checkout.superproject(layout))):
        worktree.delete_ref(git, f"refs/good/{name}")
    shutil.rmtree(folder(layout, name), ignore_errors=True)
