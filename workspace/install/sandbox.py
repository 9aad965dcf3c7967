"""Sandboxes: small clones inside the clone, for a bump or for one side of a comparison.

A sandbox has its own pins, patches, tree and environment; git objects, library, tools, downloads
and logs are those of the clone.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from workspace.core import files, hints, lock, records
from workspace.core.console import Console, RunLog
from workspace.core.errors import BuildError, CheckoutError, ToolchainError
from workspace.core.files import copy_files, files_below, read_regular, write_atomic
from workspace.core.paths import Layout
from workspace.core.settings import Settings, Value
from workspace.install import bootstrap, plan, precompiled, stages, stamp
from workspace.machine import jit_caches
from workspace.repo import pins, series
from workspace.repo.git import Git, worktree
from workspace.repo.pins import COMMIT, Pin

# Set when all files of the tree are written and synced: before, the tree holds no user's work.
MADE_REF = f"{worktree.OWN_REFS}/made"


def furnish(outer: Layout, target: Layout, pin: Pin) -> None:
    """Write the pins into the folder of a new sandbox, and link what it shares with the clone.

    Patches, tree and environment are added by the caller.
    """
    driver_caches = [layout.jit / jit_caches.DRIVER_CACHE for layout in (outer, target)]
    for shared in (outer.logs, outer.models, driver_caches[0]):
        shared.mkdir(parents=True, exist_ok=True)
    target.pins.parent.mkdir(parents=True)
    target.pins.write_bytes(pins.dump(read_regular(outer.pins), pin))
    target.jit.mkdir(parents=True)
    links = {
        driver_caches[1]: driver_caches[0],
        target.probes.parent: outer.probes.parent,
        target.tools: outer.tools,
        target.logs: outer.logs,
        target.models: outer.models,
    }
    if outer.dotenv.exists():
        links[target.dotenv] = outer.dotenv
    for link, shared in links.items():
        link.symlink_to(shared.absolute())


def open_tree(
    outer: Layout, own: Layout, commit: str, settings: Settings, *, run_log: RunLog, hint: str
) -> Git:
    """Return the tree of a sandbox; a missing tree is created with `commit` checked out.

    Raises CheckoutError with `hint` where other files are in its place.
    """
    git, path, shown = Git(outer.vllm), own.vllm, outer.relative(own.vllm)
    tree = Git(path)
    if path.is_dir() and os.listdir(path) == [".git"] and not _is_linked(tree):
        # A power cut came after the first of the files that git writes for a working tree.
        (path / ".git").unlink()
    if not os.path.lexists(path / ".git"):
        if path.exists() and any(path.iterdir()):
            raise CheckoutError(f"{shown} has files and is not a working tree", hint=hint)
        tree = worktree.add(git, path, commit, run_log=run_log)
    if not _is_linked(tree):
        raise CheckoutError(f"{shown} is not a working tree of vendor/vllm", hint=hint)
    if tree.resolve(MADE_REF) is None:
        lock.remove_at_top(tree.path_of("index").parent, path)
        tree.check_out(commit, settings=settings, run_log=run_log, on_line=lambda line: None)
        os.sync()
        tree.set_ref(MADE_REF, commit)
    return tree


def _is_linked(tree: Git) -> bool:
    """Return whether the folder is a linked working tree.

    A damaged .git file may lead git to the HEAD of the clone itself.
    """
    place = tree.place()
    return (
        place is not None
        and place.top.resolve() == tree.path.resolve()
        and place.git_dir.parent.name == "worktrees"
    )


def keep_work(
    outer: Layout,
    own: Layout,
    what: str,
    *,
    prefix: str,
    ours: Collection[str] = (),
    work: str | None = None,
) -> str | None:
    """Keep the user's work in a sandbox under a reference of the clone that begins with `prefix`.

    Returns the reference, None without such work. The workspace made the commits `ours`; `what` is
    the message of the snapshot, `work` a snapshot that the caller has made already.
    """
    if not (own.vllm / ".git").exists():
        return None
    tree = Git(own.vllm)
    head = tree.head()
    work = work or worktree.snapshot(tree, what)
    # During an `am` the working files are those of a patch that is not committed yet; the index of
    # the new base holds no work of the user.
    if head is None or work in ours or worktree.is_kept(Git(outer.vllm), work):
        return None
    ref = f"{prefix}{work[:12]}"
    Git(outer.vllm).set_ref(ref, work)
    return ref


def write_patches(source: Path, target: Path, *, pin: str, former: str) -> None:
    """Copy a series and its patches into another folder; delete there only the `former` names.

    `former` holds one name per line.
    """
    names = series.read_series(source, pin=pin).names
    for name in (*names, series.SERIES_FILE):
        content = read_regular(source / name)
        if not (target / name).exists() or read_regular(target / name) != content:
            write_atomic(target / name, content)
    for name in former.split("\n"):
        if name and name not in names:
            (target / name).unlink(missing_ok=True)


def names_of(folder: Path) -> str:
    """Return the patch names of a series, one per line; the base is not checked."""
    with contextlib.suppress(OSError):
        lines = read_regular(folder / series.SERIES_FILE).decode(errors="replace").split("\n")
        return "\n".join(
            name
            for line in lines
            if (name := line.split("#", 1)[0].strip()).endswith(".patch") and "/" not in name
        )
    return ""


def borrow_environment(outer: Layout, own: Layout, *, run_log: RunLog) -> None:
    """Copy the clone's environment into a sandbox without one: its torch may be the only copy.

    The copy has no stamps, so that everything except torch is due. Raises ToolchainError where
    rights or disk space are missing.
    """
    source, target = outer.environment, own.environment
    if os.path.lexists(target) or not source.is_dir():
        return
    with stages.step(run_log, "environment") as view, files.folder_beside(target) as scratch:
        copy = Layout(scratch)
        copy_files(source, copy.environment, files_below(source))
        for name in ("environment", "vllm"):
            stamp.withdraw(copy.stamp(name))
        _make_relocatable(copy.environment / "pyvenv.cfg")
        files.put_in_place(copy.environment, target)
        view.reason = (
            f"a copy of {outer.relative(source)}, to keep its torch (USE_EXISTING_TORCH=1)"
        )


def _make_relocatable(config: Path) -> None:
    """Make uv write scripts that survive the promotion's rename (`uv venv --relocatable`).

    An environment that the user made may lack the line.
    """
    text = read_regular(config).decode()
    if not re.search(r"^relocatable\s*=\s*true", text, re.MULTILINE | re.IGNORECASE):
        write_atomic(config, (text.rstrip("\n") + "\nrelocatable = true\n").encode())


def as_built(settings: Settings, observed: plan.Observation) -> Settings:
    """Return settings that repeat the build of the working tree unless a setting overrides it.

    The device, native kernels and the number of jobs are repeated.
    """
    repeated = precompiled.repeated(settings, observed.kernels_wanted.source)
    values = dict(repeated.values)
    if settings.text("DEVICE") == "auto":
        values["DEVICE"] = Value(observed.device, "flag")
    if repeated != settings:
        jobs = observed.kernels.recorded.outcome.get("jobs") if observed.kernels.recorded else None
        if jobs and not settings.text("MAX_JOBS"):
            values["MAX_JOBS"] = Value(jobs, "flag")
    return replace(settings, values=values)


def build_in(
    layout: Layout, settings: Settings, *, console: Console, is_sandbox: bool = False
) -> plan.Observation:
    """Bootstrap a layout, and rebuild where its tree changes compiled sources. Return its state.

    Raises the errors of bootstrap and rebuild.
    """
    observed = bootstrap.run(
        layout, settings, console=console, wait=True, end="part", is_sandbox=is_sandbox
    )
    if observed.needs_compilation:
        from workspace.install import rebuild

        observed = rebuild.run(
            layout,
            settings,
            plan.RebuildOptions(),
            console=console,
            wait=True,
            is_sandbox=is_sandbox,
        )
    return observed


def discarded(own: Layout) -> Path:
    """Return the path to which a sandbox is renamed before it is deleted."""
    return own.root.with_name(f".{own.root.name}.gone")


def remove_tree(outer: Layout, own: Layout) -> None:
    """Remove a sandbox and git's record of its working tree.

    The next run finishes a removal that was killed.
    """
    gone = discarded(own)
    if os.path.lexists(own.root):
        shutil.rmtree(gone, ignore_errors=True)
        # The rename removes the sandbox at once; the slow deletion follows.
        os.rename(own.root, gone)
    worktree.forget(Git(outer.vllm), own.vllm)
    shutil.rmtree(gone, ignore_errors=True)
    files.sweep_beside(own.root)


def clear_leftovers(outer: Layout, own: Layout) -> None:
    """Finish what a killed verb left of a sandbox; a sandbox that exists stays."""
    if not os.path.lexists(own.root) and (outer.vllm / ".git").exists():
        remove_tree(outer, own)


RECORD = "sandbox.json"
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,40}")
# The commit of each sandbox, protected from git gc; and the user's work from removed sandboxes.
REFS, LEFT_REFS = "refs/sandboxes", "refs/left/sandboxes"
# Where these files differ, the build products belong to the other commit, or git no longer ignores
# them.
_DECIDE_PRODUCTS = (*plan.COMPILED_SOURCES, ".gitignore")


@dataclass(frozen=True)
class Sandbox:
    """A sandbox: the clone's layout, its own, and the commit that its tree is on."""

    name: str
    outer: Layout
    layout: Layout
    tip: str

    @property
    def shown(self) -> str:
        return self.outer.relative(self.layout.root)


def make(
    layout: Layout,
    name: str,
    *,
    pin: Pin,
    patches: Path | None,
    tip: str,
    settings: Settings,
    run_log: RunLog,
) -> Sandbox:
    """Return the sandbox of that name with its tree on `tip`; create or update it.

    `pin` names the precompiled wheel of its kernels and its sources. `patches` is the folder of a
    series that `tip` contains already; it is copied for the record, and None is an empty series.
    Raises PatchDrift for a series that is not on the pin, CheckoutError where the tree cannot be
    created.
    """
    assert NAME.fullmatch(name), name
    if patches is not None:
        series.read_series(patches, pin=pin.commit)
    found = find(layout, name)
    if found is None:
        found = _begin(layout, name, pin, patches, tip)
    else:
        pins.save(found.layout.pins, pin)
        _write_patches(found.layout, pin, patches)
    return move(found, tip, settings=settings, run_log=run_log)


def find(layout: Layout, name: str) -> Sandbox | None:
    """Return the sandbox of that name, None where it is missing or its record cannot be read."""
    own = Layout(layout.sandboxes / name)
    tip = (records.read(own.root / RECORD, dict[str, str]) or {}).get("tip", "")
    return Sandbox(name, layout, own, tip) if COMMIT.fullmatch(tip) else None


def move(sandbox: Sandbox, tip: str, *, settings: Settings, run_log: RunLog) -> Sandbox:
    """Check another commit out; unchanged files are not written.

    Build products of other compiled sources are removed. Raises CheckoutError where the tree cannot
    be created, SourceError where contents of files cannot be fetched.
    """
    # First: git may prune a commit without a reference.
    Git(sandbox.outer.vllm).set_ref(f"{REFS}/{sandbox.name}", tip)
    tree = _settled(sandbox, tip, settings, run_log)
    if (head := tree.head()) != tip:
        assert head is not None
        if tree.setting("remote.origin.promisor") == "true":
            # The comparison of contents fetches at once what a partial clone lacks; the checkout
            # afterwards runs offline.
            tree.talk(
                ("diff", "--shortstat", "--no-renames", head, tip),
                settings,
                run_log,
                lambda line: None,
            )
        _take_products_away(sandbox, tree, head, tip)
        worktree.move(sandbox.layout, "vllm", tree, tip, run_log=run_log)
    _record(sandbox.layout, tip)
    return replace(sandbox, tip=tip)


def build_sandbox(sandbox: Sandbox, settings: Settings, *, console: Console) -> plan.Observation:
    """Build in the sandbox a verified vLLM of the same kind as the clone's.

    Changed compiled sources are compiled. Raises BuildError where they cannot be, so that kernels
    of a precompiled wheel never count as its own; SourceError where a download fails.
    """
    wanted = as_built(settings, plan.observe(sandbox.outer, settings))
    if (
        worktree.is_move_begun(sandbox.layout, "vllm")
        or Git(sandbox.layout.vllm).head() != sandbox.tip
    ):
        raise CheckoutError(
            f"{sandbox.shown} is not on {sandbox.tip[:12]}",
            hint=hints.text("install.delete_sandbox", folder=sandbox.shown),
        )
    if wanted.switch("USE_EXISTING_TORCH"):
        with RunLog(
            console, sandbox.layout.logs, verb="sandbox", secrets=settings.secrets
        ) as run_log:
            borrow_environment(sandbox.outer, sandbox.layout, run_log=run_log)
    try:
        observed = build_in(sandbox.layout, wanted, console=console, is_sandbox=True)
    except ToolchainError as exc:
        if not plan.observe(sandbox.layout, wanted).needs_compilation:
            raise
        raise BuildError(
            f"{sandbox.shown} needs kernels of its own, and {exc.message}",
            hint=exc.hint,
            details=exc.details,
        ) from exc
    for layer in observed.layers:
        if layer.state != "ok":
            hint = hints.text("install.kernels_auto")
            raise BuildError(
                f"{sandbox.shown} cannot be built as its tree requires: {layer.name}: {layer.why}",
                hint=hint,
            )
    return observed


def remove(layout: Layout, name: str) -> str | None:
    """Remove the sandbox of that name, whatever state it is in, or finish its removal.

    Returns the reference of vendor/vllm that keeps the user's work in it.
    """
    sandbox = find(layout, name) or Sandbox(name, layout, Layout(layout.sandboxes / name), "")
    kept = _keep_work(sandbox)
    remove_tree(layout, sandbox.layout)
    worktree.delete_ref(Git(layout.vllm), f"{REFS}/{name}")
    return kept


def _begin(layout: Layout, name: str, pin: Pin, patches: Path | None, tip: str) -> Sandbox:
    """Create the sandbox without its tree, completely or not at all."""
    sandbox = Sandbox(name, layout, Layout(layout.sandboxes / name), tip)
    # A folder without a valid record may be there.
    _keep_work(sandbox)
    remove_tree(layout, sandbox.layout)
    with files.folder_beside(sandbox.layout.root) as folder:
        own = Layout(folder / "sandbox")
        furnish(layout, own, pin)
        _write_patches(own, pin, patches)
        _record(own, tip)
        files.put_in_place(own.root, sandbox.layout.root)
    return sandbox


def _write_patches(own: Layout, pin: Pin, patches: Path | None) -> None:
    folder = own.patches("vllm")
    former = names_of(folder)
    if patches is not None:
        write_patches(patches, folder, pin=pin.commit, former=former)
        return
    write_atomic(folder / series.SERIES_FILE, f"# base: {pin.commit}\n".encode())
    for name in filter(None, former.split("\n")):
        (folder / name).unlink(missing_ok=True)


def _record(own: Layout, tip: str) -> None:
    records.write(own.root / RECORD, {"tip": tip})


def _settled(sandbox: Sandbox, tip: str, settings: Settings, run_log: RunLog) -> Git:
    """Return the sandbox's complete tree, without edits and without a git operation under way.

    The user's work in it is kept under a reference.
    """
    hint = hints.text("install.delete_sandbox", folder=sandbox.shown)

    def open_again() -> Git:
        return open_tree(sandbox.outer, sandbox.layout, tip, settings, run_log=run_log, hint=hint)

    tree = open_again()
    if worktree.is_move_begun(sandbox.layout, "vllm"):
        worktree.finish_move(sandbox.layout, "vllm", tree, run_log=run_log)
    work = worktree.snapshot(tree, _why(sandbox))
    if kept := _keep_work(sandbox, work=work):
        run_log.console.info(f"your work in {sandbox.shown} is kept in vendor/vllm as {kept}")
    if tree.under_way():
        worktree.forget(Git(sandbox.outer.vllm), sandbox.layout.vllm)
        return open_again()
    if work != tree.head():
        # The edits belong to a commit from here on, so that the move removes them like any other
        # difference.
        tree.set_ref("HEAD", work)
        tree.read_index(work)
    return tree


def _keep_work(sandbox: Sandbox, *, work: str | None = None) -> str | None:
    ours = {sandbox.tip, Git(sandbox.outer.vllm).resolve(f"{REFS}/{sandbox.name}") or sandbox.tip}
    return keep_work(
        sandbox.outer, sandbox.layout, _why(sandbox), prefix=f"{LEFT_REFS}/", ours=ours, work=work
    )


def _why(sandbox: Sandbox) -> str:
    return f"Work in the sandbox {sandbox.name} before it was moved or removed"


def _take_products_away(sandbox: Sandbox, tree: Git, head: str, tip: str) -> None:
    """Remove all build products: in a sandbox they belong to the workspace."""
    listed = stages.build_products(tree.path)
    fit_both = tree.digest(_DECIDE_PRODUCTS, commit=head) == tree.digest(
        _DECIDE_PRODUCTS, commit=tip
    )
    if not listed or (fit_both and not tree.entries(listed, tip)):
        return
    stamp.withdraw(sandbox.layout.stamp("vllm"))
    stages.take_products_away(
        sandbox.layout, listed, ours=listed, kept=None, left=sandbox.layout.quarantine
    )
