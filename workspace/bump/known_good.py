"""What `inv pin.rollback` returns to: states whose smoke has passed, each with its references,
patches, kernels and list of packages.

One folder a state in `.workspace/good`; its good.json is written last, and without it the folder is
nothing.
"""

import contextlib
import datetime
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from workspace.checks import registry as smoke_record
from workspace.core import files, lock
from workspace.core.console import Console
from workspace.core.files import copy_files, read_regular, write_atomic
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import editable, plan, stamp
from workspace.machine import interpreter
from workspace.repo import checkout, pins
from workspace.repo.git import Git, worktree
from workspace.repo.series import State

KEPT = 3
SCHEMA = 1


@dataclass(frozen=True)
class Good:
    """A state that passed the smoke. `head`, `base` and `tree` are vendor/vllm's, `gitlink` what
    the superproject named.
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


def folder(layout: Layout, name: str) -> Path:
    return layout.known_good_states / name


def environment(layout: Layout, name: str) -> Path:
    """Where the environment of a good state waits while another one is in use."""
    return folder(layout, name) / "environment"


def kernels(layout: Layout, name: str) -> Path:
    return folder(layout, name) / "kernels"


def kept(layout: Layout, name: str) -> Layout:
    """The pins and patches of a good state, as a layout."""
    return Layout(folder(layout, name) / "files")


def name_of(tag: str, tree: str) -> str:
    return f"{tag.replace('/', '-')}-{tree[:12]}"


def every(layout: Layout) -> tuple[Good, ...]:
    """The good states, newest first; a folder whose record cannot be read is none."""
    found = (
        read(layout, path.parent.name) for path in layout.known_good_states.glob("*/good.json")
    )
    return tuple(
        sorted((good for good in found if good), key=lambda good: good.recorded, reverse=True)
    )


def read(layout: Layout, name: str) -> Good | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        record = json.loads(read_regular(folder(layout, name) / "good.json"))
        if record.pop("schema") == SCHEMA and record["name"] == name:
            return Good(**record)
    return None


def record(
    layout: Layout, settings: Settings, observed: plan.Observation, *, console: Console
) -> Good | None:
    """Record the present state as good where the smoke passed on exactly this, else say why not.
    Takes the workspace's lock.
    """
    with (
        lock.hold(layout.lock, verb="inv pin", wait=True, on_wait=console.info) as held,
        RunLog(console, layout.logs, verb="good", secrets=settings.secrets, held=held) as run_log,
    ):
        clear(layout)
        why = refusal(layout, observed)
        if why:
            console.info(f"not recorded as good: {why}")
            return None
        made = keep(layout, observed, run_log=run_log)
        console.info(f"recorded as good: {made.name}; ./scripts/inv pin.rollback returns to it")
        return made


def refusal(layout: Layout, observed: plan.Observation) -> str | None:
    """Why the present state is not one to return to, None where it is."""
    stack = observed.stack
    if stack is None or stack.head is None:
        return "there is no checkout"
    if stack.dirty:
        return f"vendor/vllm has edits ({', '.join(stack.dirty[:3])})"
    if stack.state is not State.APPLIED:
        return (
            "vendor/vllm holds something else than the series makes; ./scripts/inv patch says what"
        )
    if any(
        layer.state != "ok" for layer in (observed.environment, observed.kernels, observed.install)
    ):
        return "the build is stale; ./scripts/inv status says what"
    return None if has_passed(layout, stack.tree) else "the smoke has not passed on this tree"


def keep(layout: Layout, observed: plan.Observation, *, run_log: RunLog) -> Good:
    """Keep everything of the present state, which the caller knows to be good; what is kept of it
    already stays.
    """
    stack, build = observed.stack, observed.kernels.recorded
    assert build is not None
    assert stack is not None
    assert stack.head
    assert stack.base
    assert stack.tree
    name = name_of(observed.pin.tag, stack.tree)
    git, outer = Git(layout.vllm), checkout.superproject(layout)
    link = outer.gitlink(layout.relative(layout.vllm)) if outer else None
    git.set_ref(f"refs/good/{name}", stack.head)
    if outer and outer.head():
        gitlinks = {layout.relative(layout.vllm): link.commit} if link else {}
        commit = worktree.snapshot(
            outer, f"Good: {name}", paths=("vendor/pins.toml", "patches"), gitlinks=gitlinks
        )
        # One that differs by its date alone would leave the former to the reflog.
        if not worktree.are_alike(outer, commit, f"refs/good/{name}"):
            outer.set_ref(f"refs/good/{name}", commit)
    path = folder(layout, name)
    before = read(layout, name)
    stamp.withdraw(path / "good.json")
    libraries = {f"library {library.path}": library.sha256 for library in build.libraries}
    inputs = {**(observed.environment.inputs or {}), **build.inputs, **libraries}
    if before is None or dict(before.inputs) != inputs or not kernels(layout, name).is_dir():
        shutil.rmtree(kernels(layout, name), ignore_errors=True)
        with files.folder_beside(kernels(layout, name)) as scratch:
            copy_files(layout.vllm, scratch / "kernels", editable.build_products(layout.vllm))
            files.put_in_place(scratch / "kernels", kernels(layout, name))
    _keep_files(layout, name)
    packages = {
        package: version
        for package, version in interpreter.installed(layout).items()
        if package != "vllm"
    }
    write_atomic(
        path / "freeze.txt",
        "".join(
            f"{package}=={version}\n" for package, version in sorted(packages.items())
        ).encode(),
    )
    recorded = datetime.datetime.now(datetime.UTC).isoformat()
    smoke = str(smoke_record.last_record(layout).get("time"))
    made = Good(
        name,
        observed.pin.tag,
        stack.head,
        stack.base,
        stack.tree,
        link.commit if link else None,
        recorded,
        smoke,
        inputs,
    )
    os.sync()
    write_atomic(
        path / "good.json", json.dumps({"schema": SCHEMA, **asdict(made)}, indent=1).encode()
    )
    _prune(layout, using=name, run_log=run_log)
    return made


def now() -> str:
    """The name under which what a move leaves behind is kept."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")


def keep_aside(layout: Layout, why: str, *, name: str) -> None:
    """Let references in both repositories, `refs/left/NAME`, name the present state, edits of pins
    and patches included.
    """
    ref = f"refs/left/{name}"
    git, outer = Git(layout.vllm), checkout.superproject(layout)
    if head := git.head():
        git.set_ref(ref, head)
    if outer and outer.head():
        outer.set_ref(ref, worktree.snapshot(outer, why, paths=("vendor/pins.toml", "patches")))
    else:
        with files.folder_beside(left(layout, name)) as scratch:
            _copy_pins(layout, Layout(scratch / "left"))
            shutil.rmtree(left(layout, name), ignore_errors=True)
            files.put_in_place(scratch / "left", left(layout, name))


def gone(layout: Layout) -> Path:
    """Where a workshop lies that is done with, until it is deleted."""
    return layout.bump_sandbox.with_name(f".{layout.bump_sandbox.name}.gone")


def clear(layout: Layout) -> None:
    """Finish what a run left that was ended while it took a workshop away; of one that is there
    everything stays.
    """
    shutil.rmtree(gone(layout), ignore_errors=True)
    git = Git(layout.vllm)
    if (
        not os.path.lexists(layout.bump_sandbox)
        and git.place()
        and git.path_of("worktrees").is_dir()
    ):
        worktree.forget(git, Layout(layout.bump_sandbox).vllm)


def left(layout: Layout, name: str) -> Path:
    """Where files lie that a move has left behind and that no repository keeps."""
    return layout.state / f"left-{name}"


def _keep_files(layout: Layout, name: str) -> None:
    place = kept(layout, name).root
    with files.folder_beside(place) as scratch:
        _copy_pins(layout, Layout(scratch / "files"))
        shutil.rmtree(place, ignore_errors=True)
        files.put_in_place(scratch / "files", place)


def _copy_pins(layout: Layout, target: Layout) -> None:
    target.pins.parent.mkdir(parents=True)
    target.pins.write_bytes(read_regular(layout.pins))
    shutil.copytree(layout.patches("vllm"), target.patches("vllm"))


def has_passed(layout: Layout, tree: str | None) -> bool:
    """Whether the last smoke passed, on this tree without edits."""
    said = smoke_record.last_record(layout)
    return said.get("verdict") == "pass" and said.get("tree") == tree and said.get("dirty") is None


def current(layout: Layout) -> str | None:
    """The name that the present state has or would have, by pin and tree; None where there is no
    checkout.
    """
    git = Git(layout.vllm)
    head = git.head() if (layout.vllm / ".git").exists() else None
    return name_of(pins.load(layout.pins).vllm.tag, git.tree(head)) if head else None


def _prune(layout: Layout, *, using: str, run_log: RunLog) -> None:
    """Keep the newest states; the one in use counts and is never taken away."""
    others = [good for good in every(layout) if good.name != using]
    outer = checkout.superproject(layout)
    for good in others[KEPT - 1 :]:
        run_log.write(f"no longer kept: {good.name}")
        stamp.withdraw(folder(layout, good.name) / "good.json")
        for git in filter(None, (Git(layout.vllm), outer)):
            worktree.delete_ref(git, f"refs/good/{good.name}")
        shutil.rmtree(folder(layout, good.name), ignore_errors=True)
