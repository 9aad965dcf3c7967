"""A clone in small beside the clone: pins, patches, tree and environment of its own; objects, library, tools, downloads and logs are the clone's.

What the workshop of a bump and the arms of a comparison have in common.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from workspace.build import bootstrap, plan, stamp
from workspace.core.console import Console
from workspace.core.copying import copy_files, files_below
from workspace.core.errors import CheckoutError
from workspace.core.files import read_regular, write_atomic
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.core.settings import Settings, Value
from workspace.source import leftover, pins, scratch, series
from workspace.source.git import Git, worktree
from workspace.source.pins import Pin

# Set when all files of the tree are written and on the disk: before, nobody has worked there.
MADE_REF = f"{worktree.OWN_REFS}/made"


def furnish(outer: Layout, made: Layout, pin: Pin) -> None:
    """Write the pins into a folder that becomes a clone in small, and link what it shares. Patches, tree and environment are not its business."""
    for shared in (outer.logs, outer.models):
        shared.mkdir(parents=True, exist_ok=True)
    made.pins.parent.mkdir(parents=True)
    made.pins.write_bytes(pins.dump(read_regular(outer.pins), pin))
    made.state.mkdir()
    links = {made.probes.parent: outer.probes.parent, made.tools: outer.tools, made.logs: outer.logs, made.models: outer.models}
    if outer.dotenv.exists():
        links[made.dotenv] = outer.dotenv
    for link, target in links.items():
        link.symlink_to(target.absolute())


def open_tree(outer: Layout, own: Layout, commit: str, settings: Settings, *, journal: Journal, hint: str) -> Git:
    """Return the tree of a clone in small, which is made where it is not there yet: `commit`, checked out.

    Raises CheckoutError, with `hint` as the way on, where something else lies there.
    """
    git, path, shown = Git(outer.vllm), own.vllm, outer.relative(own.vllm)
    tree = Git(path)
    if path.is_dir() and os.listdir(path) == [".git"] and not _is_linked(tree):
        # A power cut between the first file and the rest of what git writes for a working tree.
        (path / ".git").unlink()
    if not os.path.lexists(path / ".git"):
        if path.exists() and any(path.iterdir()):
            raise CheckoutError(f"{shown} has files and is no working tree", hint=hint)
        tree = worktree.add(git, path, commit, journal=journal)
    if not _is_linked(tree):
        raise CheckoutError(f"{shown} is no working tree of vendor/vllm", hint=hint)
    if tree.resolve(MADE_REF) is None:
        leftover.remove_at_top(tree.path_of("index").parent, path)
        tree.check_out(commit, settings=settings, journal=journal, on_line=lambda line: None)
        os.sync()
        tree.set_ref(MADE_REF, commit)
    return tree


def _is_linked(tree: Git) -> bool:
    """Whether git takes the folder for a working tree of its own. One whose .git was cut short may lead to the clone's very HEAD."""
    place = tree.place()
    return place is not None and place.top.resolve() == tree.path.resolve() and place.git_dir.parent.name == "worktrees"


def keep_work(outer: Layout, own: Layout, what: str, *, prefix: str, ours: Collection[str] = (), work: str | None = None) -> str | None:
    """Let a reference that begins with `prefix` name what is in a clone in small and nowhere else, and return it; None where there is nothing such.

    The commits `ours` are of the workspace's making; `work` is a snapshot, where the caller has made one.
    """
    if not (own.vllm / ".git").exists():
        return None
    tree = Git(own.vllm)
    head = tree.head()
    work = work or worktree.snapshot(tree, what)
    # In an `am` the working content is that of a patch not yet committed; the index of the new base is no work of anybody's.
    if head is None or work in ours or worktree.is_kept(Git(outer.vllm), work):
        return None
    ref = f"{prefix}{work[:12]}"
    Git(outer.vllm).set_ref(ref, work)
    return ref


def write_patches(source: Path, target: Path, *, pin: str, former: str) -> None:
    """Put a series and its patches into another folder; of what lies there only the `former` names (a line each) are taken out."""
    names = series.read(source, pin=pin).names
    for name in (*names, series.FILE):
        content = read_regular(source / name)
        if not (target / name).exists() or read_regular(target / name) != content:
            write_atomic(target / name, content)
    for name in former.split("\n"):
        if name and name not in names:
            (target / name).unlink(missing_ok=True)


def names_of(folder: Path) -> str:
    """The patches that a series names, a line each, whatever its base."""
    with contextlib.suppress(OSError):
        lines = read_regular(folder / series.FILE).decode(errors="replace").split("\n")
        return "\n".join(name for line in lines if (name := line.split("#", 1)[0].strip()).endswith(".patch") and "/" not in name)
    return ""


def borrow_environment(outer: Layout, own: Layout, *, journal: Journal) -> None:
    """Copy the clone's environment, where there is none yet: a torch of the user's own may be had nowhere else.

    Without stamps, so that everything but torch is due. Raises ToolchainError for want of rights or space.
    """
    source, target = outer.environment, own.environment
    if os.path.lexists(target) or not source.is_dir():
        return
    with journal.console.step("environment") as view, scratch.beside(target) as aside:
        journal.phase("environment", view)
        made = Layout(aside)
        copy_files(source, made.environment, files_below(source))
        for name in ("environment", "vllm"):
            stamp.withdraw(made.stamp(name))
        _make_relocatable(made.environment / "pyvenv.cfg")
        scratch.put_in_place(made.environment, target)
        view.reason = f"a copy of {outer.relative(source)}, for its torch stays (USE_EXISTING_TORCH=1)"
    journal.step = None


def _make_relocatable(config: Path) -> None:
    """Let uv write scripts that bear the promotion's rename, as `uv venv --relocatable` does; an environment of the user's making may lack the line."""
    text = read_regular(config).decode()
    if not re.search(r"^relocatable\s*=\s*true", text, re.MULTILINE | re.IGNORECASE):
        write_atomic(config, (text.rstrip("\n") + "\nrelocatable = true\n").encode())


def as_built(settings: Settings, observed: plan.Observation) -> Settings:
    """The settings under which the working tree was built, where nothing else is asked for now: its device, and whether it compiles."""
    values = dict(settings.values)
    if settings.text("DEVICE") == "auto":
        values["DEVICE"] = Value(observed.device, "flag")
    if settings.text("KERNELS") == "auto" and observed.kernels_wanted.kind == "native":
        values["KERNELS"] = Value("native", "flag")
        jobs = observed.kernels.recorded.outcome.get("jobs") if observed.kernels.recorded else None
        if jobs and not settings.text("MAX_JOBS"):
            values["MAX_JOBS"] = Value(jobs, "flag")
    return replace(settings, values=values)


def build(layout: Layout, settings: Settings, *, console: Console, is_arm: bool = False) -> None:
    """Bring a layout to a stamped vLLM, what its tree changes of compiled sources compiled too. Raises what bootstrap and rebuild raise."""
    bootstrap.run(layout, settings, console=console, wait=True, is_part=True, is_arm=is_arm)
    if plan.observe(layout, settings).for_compiler:
        from workspace.build import rebuild

        rebuild.run(layout, settings, rebuild.Asked(), console=console, wait=True, is_arm=is_arm)


def remove_tree(outer: Layout, own: Layout, gone: Path) -> None:
    """Take a clone in small away, and out of git's books. `gone` lies beside it; a run that was killed is finished by the next one."""
    if os.path.lexists(own.root):
        shutil.rmtree(gone, ignore_errors=True)
        # The rename ends it at once; what is slow comes after it.
        os.rename(own.root, gone)
    worktree.forget(Git(outer.vllm), own.vllm)
    shutil.rmtree(gone, ignore_errors=True)
    scratch.sweep(own.root)
