"""A clone in small beside the clone: pins, patches, tree and environment of its own; objects,
library, tools, downloads and logs are the clone's.

What the workshop of a bump and the arms of a comparison have in common.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from workspace.core import files
from workspace.core.console import Console
from workspace.core.errors import BuildError, CheckoutError, ToolchainError
from workspace.core.files import copy_files, files_below, read_regular, write_atomic
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings, Value
from workspace.install import bootstrap, editable, plan, stamp
from workspace.repo import moves, pins, series
from workspace.repo.git import Git, command, worktree
from workspace.repo.pins import COMMIT, Pin

# Set when all files of the tree are written and on the disk: before, nobody has worked there.
MADE_REF = f"{worktree.OWN_REFS}/made"


def furnish(outer: Layout, made: Layout, pin: Pin) -> None:
    """Write the pins into a folder that becomes a clone in small, and link what it shares. Patches,
    tree and environment are not its business.
    """
    for shared in (outer.logs, outer.models):
        shared.mkdir(parents=True, exist_ok=True)
    made.pins.parent.mkdir(parents=True)
    made.pins.write_bytes(pins.dump(read_regular(outer.pins), pin))
    made.state.mkdir()
    links = {
        made.probes.parent: outer.probes.parent,
        made.tools: outer.tools,
        made.logs: outer.logs,
        made.models: outer.models,
    }
    if outer.dotenv.exists():
        links[made.dotenv] = outer.dotenv
    for link, target in links.items():
        link.symlink_to(target.absolute())


def open_tree(
    outer: Layout, own: Layout, commit: str, settings: Settings, *, run_log: RunLog, hint: str
) -> Git:
    """Return the tree of a clone in small, which is made where it is not there yet: `commit`,
    checked out.

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
        tree = worktree.add(git, path, commit, run_log=run_log)
    if not _is_linked(tree):
        raise CheckoutError(f"{shown} is no working tree of vendor/vllm", hint=hint)
    if tree.resolve(MADE_REF) is None:
        command.remove_at_top(tree.path_of("index").parent, path)
        tree.check_out(commit, settings=settings, run_log=run_log, on_line=lambda line: None)
        os.sync()
        tree.set_ref(MADE_REF, commit)
    return tree


def _is_linked(tree: Git) -> bool:
    """Whether git takes the folder for a working tree of its own. One whose .git was cut short may
    lead to the clone's very HEAD.
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
    """Let a reference that begins with `prefix` name what is in a clone in small and nowhere else,
    and return it; None where there is nothing such.

    The commits `ours` are of the workspace's making; `work` is a snapshot, where the caller has
    made one.
    """
    if not (own.vllm / ".git").exists():
        return None
    tree = Git(own.vllm)
    head = tree.head()
    work = work or worktree.snapshot(tree, what)
    # In an `am` the working content is that of a patch not yet committed; the index of the new base
    # is no work of anybody's.
    if head is None or work in ours or worktree.is_kept(Git(outer.vllm), work):
        return None
    ref = f"{prefix}{work[:12]}"
    Git(outer.vllm).set_ref(ref, work)
    return ref


def write_patches(source: Path, target: Path, *, pin: str, former: str) -> None:
    """Put a series and its patches into another folder; of what lies there only the `former` names
    (a line each) are taken out.
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
    """The patches that a series names, a line each, whatever its base."""
    with contextlib.suppress(OSError):
        lines = read_regular(folder / series.SERIES_FILE).decode(errors="replace").split("\n")
        return "\n".join(
            name
            for line in lines
            if (name := line.split("#", 1)[0].strip()).endswith(".patch") and "/" not in name
        )
    return ""


def borrow_environment(outer: Layout, own: Layout, *, run_log: RunLog) -> None:
    """Copy the clone's environment, where there is none yet: a torch of the user's own may be had
    nowhere else.

    Without stamps, so that everything but torch is due. Raises ToolchainError for want of rights or
    space.
    """
    source, target = outer.environment, own.environment
    if os.path.lexists(target) or not source.is_dir():
        return
    with run_log.console.step("environment") as view, files.folder_beside(target) as scratch:
        run_log.phase("environment", view)
        made = Layout(scratch)
        copy_files(source, made.environment, files_below(source))
        for name in ("environment", "vllm"):
            stamp.withdraw(made.stamp(name))
        _make_relocatable(made.environment / "pyvenv.cfg")
        files.put_in_place(made.environment, target)
        view.reason = (
            f"a copy of {outer.relative(source)}, for its torch stays (USE_EXISTING_TORCH=1)"
        )
    run_log.step = None


def _make_relocatable(config: Path) -> None:
    """Let uv write scripts that bear the promotion's rename, as `uv venv --relocatable` does; an
    environment of the user's making may lack the line.
    """
    text = read_regular(config).decode()
    if not re.search(r"^relocatable\s*=\s*true", text, re.MULTILINE | re.IGNORECASE):
        write_atomic(config, (text.rstrip("\n") + "\nrelocatable = true\n").encode())


def as_built(settings: Settings, observed: plan.Observation) -> Settings:
    """The settings under which the working tree was built, where nothing else is asked for now: its
    device, and whether it compiles.
    """
    values = dict(settings.values)
    if settings.text("DEVICE") == "auto":
        values["DEVICE"] = Value(observed.device, "flag")
    if settings.text("KERNELS") == "auto" and observed.kernels_wanted.kind == "native":
        values["KERNELS"] = Value("native", "flag")
        jobs = observed.kernels.recorded.outcome.get("jobs") if observed.kernels.recorded else None
        if jobs and not settings.text("MAX_JOBS"):
            values["MAX_JOBS"] = Value(jobs, "flag")
    return replace(settings, values=values)


def build_in(
    layout: Layout, settings: Settings, *, console: Console, is_sandbox: bool = False
) -> None:
    """Bring a layout to a stamped vLLM, what its tree changes of compiled sources compiled too.
    Raises what bootstrap and rebuild raise.
    """
    bootstrap.run(layout, settings, console=console, wait=True, is_part=True, is_sandbox=is_sandbox)
    if plan.observe(layout, settings).for_compiler:
        from workspace.install import rebuild

        rebuild.run(
            layout,
            settings,
            rebuild.RebuildOptions(),
            console=console,
            wait=True,
            is_sandbox=is_sandbox,
        )


def remove_tree(outer: Layout, own: Layout, gone: Path) -> None:
    """Take a clone in small away, and out of git's books. `gone` lies beside it; a run that was
    killed is finished by the next one.
    """
    if os.path.lexists(own.root):
        shutil.rmtree(gone, ignore_errors=True)
        # The rename ends it at once; what is slow comes after it.
        os.rename(own.root, gone)
    worktree.forget(Git(outer.vllm), own.vllm)
    shutil.rmtree(gone, ignore_errors=True)
    files.sweep_beside(own.root)


RECORD = "sandbox.json"
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,40}")
# What an arm stands on, safe from git's own tidying; and what somebody did in one.
REFS, LEFT_REFS = "refs/sandboxes", "refs/left/sandboxes"
# Where these differ, what a build left in the tree is of the other commit, or git would no longer
# know it for what a build left.
_OF_PRODUCTS = (*plan.COMPILED_SOURCES, ".gitignore")


@dataclass(frozen=True)
class Sandbox:
    """`outer` is the clone's layout, `layout` the arm's own; its tree stands on the commit
    `tip`.
    """

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
    """Return the arm of that name with its tree on `tip`: the one that is there, brought to what is
    asked for, or a new one.

    `pin` names the precompiled wheel of its kernels and what they were compiled from; `patches` is
    the folder of a series on it that `tip` holds already, for the record; None is an empty one.
    Raises PatchDrift for a series that is not on the pin, CheckoutError where the tree cannot be
    had.
    """
    assert NAME.fullmatch(name), name
    if patches is not None:
        series.read_series(patches, pin=pin.commit)
    there = find(layout, name)
    if there is None:
        there = _begin(layout, name, pin, patches, tip)
    else:
        pins.save(there.layout.pins, pin)
        _write_patches(there.layout, pin, patches)
    return move(there, tip, settings=settings, run_log=run_log)


def find(layout: Layout, name: str) -> Sandbox | None:
    """Return the arm of that name; None where there is none, or one whose record cannot be read."""
    own = Layout(layout.sandboxes / name)
    try:
        tip = json.loads(read_regular(own.root / RECORD))["tip"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (
        Sandbox(name, layout, own, tip) if isinstance(tip, str) and COMMIT.fullmatch(tip) else None
    )


def find_all(layout: Layout) -> tuple[Sandbox, ...]:
    """Every arm that is there, by name."""
    names = sorted(path.parent.name for path in layout.sandboxes.glob(f"*/{RECORD}"))
    return tuple(found for name in names if NAME.fullmatch(name) and (found := find(layout, name)))


def move(sandbox: Sandbox, tip: str, *, settings: Settings, run_log: RunLog) -> Sandbox:
    """Check another commit out, with content-true times. What a build left of other compiled
    sources goes with them.

    Raises CheckoutError where the tree cannot be had, SourceError where contents of files cannot be
    fetched.
    """
    # First: git may prune a commit that nothing leads to.
    Git(sandbox.outer.vllm).set_ref(f"{REFS}/{sandbox.name}", tip)
    tree = _settled(sandbox, tip, settings, run_log)
    if (head := tree.head()) != tip:
        assert head is not None
        if tree.setting("remote.origin.promisor") == "true":
            # To compare contents fetches, all at once, what a partial clone lacks of them; to write
            # files is not let online.
            tree.talk(
                ("diff", "--shortstat", "--no-renames", head, tip),
                settings,
                run_log,
                lambda line: None,
            )
        _take_products_away(sandbox, tree, head, tip)
        moves.move(sandbox.layout, "vllm", tree, tip, run_log=run_log)
    _record(sandbox.layout, tip)
    return replace(sandbox, tip=tip)


def build_sandbox(sandbox: Sandbox, settings: Settings, *, console: Console) -> plan.Observation:
    """Bring the arm to a verified vLLM of the kind that the clone has, as far as it is not there:
    what differs in compiled sources is compiled.

    Raises BuildError where it cannot be built, so that no precompiled wheel's kernels pass for its
    own; SourceError where something cannot be fetched.
    """
    wanted = as_built(settings, plan.observe(sandbox.outer, settings))
    if moves.is_begun(sandbox.layout, "vllm") or Git(sandbox.layout.vllm).head() != sandbox.tip:
        raise CheckoutError(
            f"{sandbox.shown} does not stand on {sandbox.tip[:12]}",
            hint=f"rm -rf {sandbox.shown}    and the same command again",
        )
    if wanted.switch("USE_EXISTING_TORCH"):
        with RunLog(
            console, sandbox.layout.logs, verb="sandbox", secrets=settings.secrets
        ) as run_log:
            borrow_environment(sandbox.outer, sandbox.layout, run_log=run_log)
    try:
        build_in(sandbox.layout, wanted, console=console, is_sandbox=True)
    except ToolchainError as exc:
        if not plan.observe(sandbox.layout, wanted).for_compiler:
            raise
        raise BuildError(
            f"{sandbox.shown} needs kernels of its own, and {exc.message}",
            hint=exc.hint,
            details=exc.details,
        ) from exc
    observed = plan.observe(sandbox.layout, wanted)
    for layer in (observed.environment, observed.kernels, observed.install):
        if layer.state != "ok":
            hint = "./scripts/inv env.check    KERNELS=auto compiles what differs from the pin"
            raise BuildError(
                f"{sandbox.shown} cannot be built as its tree asks: {layer.name} {layer.why}",
                hint=hint,
            )
    return observed


def remove(sandbox: Sandbox) -> str | None:
    """Take an arm away. What somebody committed or edited there stays under the reference of
    vendor/vllm that is returned.
    """
    kept = _keep_work(sandbox)
    remove_tree(sandbox.outer, sandbox.layout, _gone(sandbox.layout))
    worktree.delete_ref(Git(sandbox.outer.vllm), f"{REFS}/{sandbox.name}")
    return kept


def _begin(layout: Layout, name: str, pin: Pin, patches: Path | None, tip: str) -> Sandbox:
    """Put the arm there, whole or not at all, without its tree."""
    sandbox = Sandbox(name, layout, Layout(layout.sandboxes / name), tip)
    # What lies there is none: its record is damaged, say.
    _keep_work(sandbox)
    remove_tree(layout, sandbox.layout, _gone(sandbox.layout))
    with files.folder_beside(sandbox.layout.root) as folder:
        made = Layout(folder / "sandbox")
        furnish(layout, made, pin)
        _write_patches(made, pin, patches)
        _record(made, tip)
        files.put_in_place(made.root, sandbox.layout.root)
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
    write_atomic(own.root / RECORD, json.dumps({"tip": tip}).encode())


def _settled(sandbox: Sandbox, tip: str, settings: Settings, run_log: RunLog) -> Git:
    """The arm's tree, whole, without edits, and no operation of git's under way; what somebody did
    there is kept.
    """
    hint = f"rm -rf {sandbox.shown}    and the same command again"

    def opened() -> Git:
        return open_tree(sandbox.outer, sandbox.layout, tip, settings, run_log=run_log, hint=hint)

    tree = opened()
    if moves.is_begun(sandbox.layout, "vllm"):
        moves.finish(sandbox.layout, "vllm", tree, run_log=run_log)
    work = worktree.snapshot(tree, _why(sandbox))
    if kept := _keep_work(sandbox, work=work):
        run_log.console.info(f"what was done in {sandbox.shown} is kept in vendor/vllm as {kept}")
    if tree.under_way():
        worktree.forget(Git(sandbox.outer.vllm), sandbox.layout.vllm)
        return opened()
    if work != tree.head():
        # From here on the edits are a commit's, so that the move takes them away like any other
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
    return f"What was in the arm {sandbox.name} before it was moved or taken away"


def _gone(own: Layout) -> Path:
    return own.root.with_name(f".{own.root.name}.gone")


def _take_products_away(sandbox: Sandbox, tree: Git, head: str, tip: str) -> None:
    """All of what a build left there is the workspace's own."""
    listed = editable.build_products(tree.path)
    is_of_both = tree.digest(_OF_PRODUCTS, commit=head) == tree.digest(_OF_PRODUCTS, commit=tip)
    if not listed or (is_of_both and not tree.entries(listed, tip)):
        return
    stamp.withdraw(sandbox.layout.stamp("vllm"))
    editable.take_products_away(
        sandbox.layout, listed, ours=listed, kept=None, left=sandbox.layout.quarantine
    )
