"""The sandbox of a bump, `.workspace/bump`: a small clone in which the pin moves first.

It has its own pins, patches, tree and environment; it shares objects, library, downloads and logs
with the clone. The module also moves the working state to a known-good state: a rollback does, and
so does a promotion, to the state of the sandbox.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from workspace.bump import known_good
from workspace.bump.known_good import KnownGood
from workspace.core import files, hints, records
from workspace.core.console import Console, RunLog, State
from workspace.core.errors import (
    BuildError,
    CheckoutError,
    PatchConflict,
    ToolchainError,
    WorkspaceError,
)
from workspace.core.files import copy_files, files_below, read_regular, write_atomic
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import plan, sandbox, stages, stamp, verify
from workspace.repo import checkout, pins, series
from workspace.repo.git import Applied, Git, worktree
from workspace.repo.pins import Pin
from workspace.repo.series import BASE_REF, TIP_REF

RECORD = "begun.json"
SKIPPED = "skipped"
# Set in the sandbox's tree when the whole series is on the new base; git's own `am` state is gone
# by then.
APPLIED_REF = f"{worktree.OWN_REFS}/applied"
_BASE = re.compile(rb"^(\s*# base: )([0-9a-f]{40})\s*$", re.MULTILINE)


@dataclass(frozen=True)
class BumpStart:
    """The start of a bump: the requested ref, the stack at that time, and the new base."""

    ref: str
    tag: str
    base: str
    tip: str
    patches: str
    new_base: str


@dataclass(frozen=True)
class BumpSandbox:
    """A bump that is under way.

    `layout` is the sandbox's, `outer` the clone's, `pin` the new pin.
    """

    outer: Layout
    layout: Layout
    start: BumpStart
    pin: Pin

    @property
    def shown(self) -> str:
        return self.outer.relative(self.layout.vllm)

    @property
    def applying(self) -> Path:
        """Marker of the first `am`; without it, an `am` waits for the user."""
        return self.layout.root / "applying.json"

    @property
    def skipped(self) -> tuple[str, ...]:
        """The patches that `inv patch.continue --skip` left out."""
        path = self.layout.root / SKIPPED
        return tuple(path.read_text(encoding="utf-8").split()) if path.exists() else ()


def exists(layout: Layout) -> bool:
    """Return whether a bump is under way."""
    return (layout.bump_sandbox / RECORD).exists()


def find(layout: Layout) -> BumpSandbox | None:
    """Return the bump that is under way, None without one. Raises WorkspaceError if damaged."""
    try:
        start = records.load(layout.bump_sandbox / RECORD, BumpStart)
    except records.DecodeError as exc:
        raise WorkspaceError(
            f"{layout.relative(layout.bump_sandbox)} cannot be read: {exc}",
            hint=hints.text("inv.patch_abort"),
        ) from exc
    if start is None:
        return None
    own = Layout(layout.bump_sandbox)
    return BumpSandbox(layout, own, start, pins.load(own.pins).vllm)


def make(layout: Layout, start: BumpStart, pin: Pin) -> BumpSandbox:
    """Make the sandbox without its tree, completely or not at all; this starts the bump."""
    with files.folder_beside(layout.bump_sandbox) as folder:
        made = Layout(folder / "bump")
        sandbox.furnish(layout, made, pin)
        shutil.copytree(layout.patches("vllm").parent, made.patches("vllm").parent)
        write_series_base(made.patches("vllm"), pin.commit)
        records.write(made.root / RECORD, start)
        files.put_in_place(made.root, layout.bump_sandbox)
    return BumpSandbox(layout, Layout(layout.bump_sandbox), start, pin)


def open_tree(bump_sandbox: BumpSandbox, settings: Settings, *, run_log: RunLog) -> Git:
    """Return the sandbox's tree; check out the new base if there is no tree yet.

    Raises CheckoutError if something else is at its path.
    """
    hint = hints.text("inv.patch_abort")
    return sandbox.open_tree(
        bump_sandbox.outer,
        bump_sandbox.layout,
        bump_sandbox.start.new_base,
        settings,
        run_log=run_log,
        hint=hint,
    )


def remove(layout: Layout) -> str | None:
    """Remove the sandbox; return the reference in vendor/vllm that keeps its commits and edits."""
    own = Layout(layout.bump_sandbox)
    why = "The state of a bump's sandbox when it was given up"
    kept = sandbox.keep_work(layout, own, why, prefix="refs/pins/left-") if exists(layout) else None
    sandbox.remove_tree(layout, own)
    return kept


def digest_of(folder: Path, *, pin: str) -> str:
    """Return one SHA-256 over a series and its patches."""
    names = series.read_series(folder, pin=pin).names
    parts = [(folder / name).read_bytes() for name in (series.SERIES_FILE, *names)]
    return hashlib.sha256(b"".join(b"%d\n%s" % (len(part), part) for part in parts)).hexdigest()


def write_series_base(folder: Path, commit: str, *, only: str | None = None) -> None:
    """Change the base that the series names, if it is `only` or `only` is None."""
    path = folder / series.SERIES_FILE
    try:
        before = read_regular(path)
    except FileNotFoundError:
        return
    found = _BASE.search(before)
    if found is None or only not in (None, found[2].decode()):
        return
    after = before[: found.start(2)] + commit.encode() + before[found.end(2) :]
    if after != before:
        write_atomic(path, after)


def move_tree(layout: Layout, old: str, new: str, run_log: RunLog) -> None:
    """Move vendor/vllm from one commit to another; finish an interrupted move first.

    Raises CheckoutError if HEAD is at neither commit, or if there are edits of the user.
    """
    git, shown = Git(layout.vllm), layout.relative(layout.vllm)
    if worktree.is_move_begun(layout, "vllm"):
        worktree.finish_move(layout, "vllm", git, run_log=run_log)
    head = git.head()
    if head == new:
        return
    if head != old:
        raise CheckoutError(
            f"{shown} is at {(head or 'no commit')[:12]}, expected {old[:12]}",
            hint=hints.text("bump.checkout_former", shown=shown, commit=old[:12]),
        )
    if edited := git.edits():
        hint = hints.text("bump.stash_then_again", shown=shown)
        raise CheckoutError(
            f"{shown} has edits ({', '.join(edited[:3])}), which stay unchanged", hint=hint
        )
    worktree.move(layout, "vllm", git, new, run_log=run_log)


def require_one_disk(layout: Layout) -> None:
    """Raise ToolchainError if the paths that a move renames are on several disks."""
    places = (layout.root, layout.state, layout.vllm, layout.environment)
    if len({path.stat().st_dev for path in places if path.exists()}) > 1:
        sentence = (
            "the clone, .workspace, vendor/vllm and .vllm are on several disks; a bump renames"
            " files between them and needs one disk"
        )
        raise ToolchainError(sentence, hint=hints.text("bump.disk_of_all"))


def _rename(environment: Path, scratch: Path) -> None:
    """Rename an environment to the path where it is kept; replace an older one there."""
    if os.path.lexists(environment):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(environment, scratch)
        except OSError as exc:
            # A mount point cannot be renamed, even if both paths are on the same disk.
            hint = hints.text("bump.unmount", folder=environment)
            raise ToolchainError(
                f"{environment} cannot be renamed: {exc.strerror}", hint=hint
            ) from exc


@dataclass(frozen=True)
class RedoLog:
    """A move that was begun: it is never taken back, and the next run does all of it again.

    `facts` were true when it began. They are on disk, so their names stay.
    """

    facts: Mapping[str, str]


def find_redo_log(path: Path) -> RedoLog | None:
    """Return the redo log at `path`, None without one. Raises WorkspaceError if it is damaged."""
    try:
        return records.load(path, RedoLog)
    except records.DecodeError as exc:
        raise WorkspaceError(
            f"the redo log {path} cannot be read: {exc}",
            hint=hints.text("bump.read_state", path=path),
        ) from exc


def begin_move(
    path: Path, layout: Layout, wanted: KnownGood, *, present: str, left: str, back: str = ""
) -> RedoLog:
    """Write the redo log of a move to a known-good state: what is true before it.

    `present` names the known-good state that is in use, if there is one; `left` what is kept of the
    present state, and `back` is the command that brings it back.
    """
    build = stamp.read(layout.stamp("vllm"))
    facts = {
        "good": wanted.name,
        "present": present,
        "tip": Git(layout.vllm).head() or "",
        "left": left,
        "back": back,
        "names": sandbox.names_of(layout.patches("vllm")),
        # All build products, and the compiled libraries that the stamp names, one path a line.
        "products": "\n".join(stages.build_products(layout.vllm)),
        "libraries": "\n".join(library.path for library in build.libraries) if build else "",
        "environment": "kept" if os.path.lexists(_environment(path, layout, wanted)) else "",
    }
    redo_log = RedoLog(facts)
    records.write(path, redo_log)
    return redo_log


def finish_move(
    path: Path, layout: Layout, settings: Settings, redo_log: RedoLog, run_log: RunLog
) -> KnownGood:
    """Bring a state here and return it; the caller removes the redo log.

    What an interrupted run did already is left as it is.
    """
    title = "promote" if path == layout.promoting else "back"
    shown = layout.relative(path)
    # A promotion that the first edition began has other facts.
    wanted = (
        known_good.read(layout, redo_log.facts["good"]) if "present" in redo_log.facts else None
    )
    if wanted is None:
        raise CheckoutError(
            f"the move in {shown} cannot resume: its known-good state is missing",
            hint=hints.text("bump.give_rollback_up", path=shown),
        )
    # To make room, delete only what this workspace made.
    discarded = layout.state / ".back.gone"
    environment = _environment(path, layout, wanted)
    git, source = Git(layout.vllm), known_good.pinned_files(layout, wanted.name)
    with stages.step(run_log, title) as view:
        facts = redo_log.facts
        _keep_environment(layout, facts, environment, discarded)
        move_tree(layout, facts["tip"], wanted.head, run_log)
        git.set_refs({TIP_REF: wanted.head, BASE_REF: wanted.base})
        if os.path.lexists(environment):
            os.rename(environment, layout.environment)
        _exchange_products(layout, facts, known_good.kernels(layout, wanted.name))
        _write_patches(layout, source, facts)
        pins.save(layout.pins, pins.load(source.pins).vllm)
        set_gitlink(layout, wanted.gitlink, run_log=run_log)
        os.sync()
        kept = facts["present"] or f"refs/left/{facts['left']}"
        view.reason = f"{wanted.name}; the former state is kept as {kept}"
    _install_here(layout, settings, run_log)
    shutil.rmtree(discarded, ignore_errors=True)
    return wanted


def _environment(path: Path, layout: Layout, wanted: KnownGood) -> Path:
    """Return where the environment of a state waits for the move whose redo log is at `path`."""
    if path == layout.promoting:
        return Layout(layout.bump_sandbox).environment
    return known_good.environment(layout, wanted.name)


def _keep_environment(
    layout: Layout, facts: Mapping[str, str], following: Path, discarded: Path
) -> None:
    """Move the present environment to its known-good state, unless `following` is in place already.

    Without such a state it is discarded, if the environment `following` takes its place.
    """
    if facts.get("environment") and not os.path.lexists(following):
        return
    if facts["present"]:
        _rename(layout.environment, known_good.environment(layout, facts["present"]))
    elif os.path.lexists(following):
        _rename(layout.environment, discarded)


def _write_patches(layout: Layout, source: Layout, facts: Mapping[str, str]) -> None:
    target, pin = layout.patches("vllm"), pins.load(source.pins).vllm
    sandbox.write_patches(source.patches("vllm"), target, pin=pin.commit, former=facts["names"])


def _install_here(layout: Layout, settings: Settings, run_log: RunLog) -> None:
    """Install vLLM from vendor/vllm if its environment was made in a sandbox, and stamp both.

    The kernels are there. Bootstrap builds again what does not verify.
    """
    build, environment = (stamp.read(layout.stamp(name)) for name in ("vllm", "environment"))
    place = str(layout.environment)
    if (
        build is None
        or build.kernels is None
        or environment is None
        or environment.inputs.get("place") == place
    ):
        return
    observed = plan.observe(layout, settings)
    with stages.step(run_log, "install") as view:
        try:
            stages.install_built(observed, run_log=run_log)
            verdict = verify.verify(observed)
            stages.write_stamp(
                stages.Run(run_log, observed, dict(build.outcome)), verdict, build.kernels
            )
            view.reason = f"{verdict.version} from vendor/vllm, {verdict.summary}"
        except BuildError as exc:
            stamp.withdraw(layout.stamp("vllm"))
            view.state, view.reason = State.WARN, f"{exc.message}: bootstrap installs it again"
        inputs = {**environment.inputs, "place": place}
        stamp.write(layout.stamp("environment"), replace(environment, inputs=inputs))


def _exchange_products(layout: Layout, facts: Mapping[str, str], kernels: Path) -> None:
    """Replace the former pin's products in vendor/vllm by copies of those in `kernels`.

    Those that the former known-good state does not hold move to the leftovers folder.
    """
    listed, ours = (
        tuple(filter(None, facts[name].split("\n"))) for name in ("products", "libraries")
    )
    stages.take_products_away(
        layout,
        # An interrupted run may have copied some.
        [path for path in listed if not stages.is_same(layout.vllm / path, kernels / path)],
        ours=ours,
        kept=known_good.kernels(layout, facts["present"]) if facts["present"] else None,
        left=known_good.leftovers(layout, facts["left"]) / "products",
    )
    copy_files(kernels, layout.vllm, files_below(kernels))


def report_leftovers(layout: Layout, facts: Mapping[str, str], *, console: Console) -> None:
    """Print where files are that a build left and that no known-good state holds."""
    leftovers = known_good.leftovers(layout, facts["left"])
    if leftovers.exists():
        console.info(
            "build products of vendor/vllm that no known-good state holds are in"
            f" {layout.relative(leftovers)}"
        )


def set_gitlink(layout: Layout, commit: str | None, *, run_log: RunLog) -> None:
    """Set the commit in the superproject's index unless it is None; protect the submodule."""
    outer = checkout.superproject(layout)
    path = layout.relative(layout.vllm)
    link = outer.gitlink(path) if outer else None
    if outer and link and commit and link.commit != commit:
        worktree.set_gitlink(outer, path, commit, run_log=run_log)
    checkout.protect(layout, run_log=run_log)


def apply_series(bump_sandbox: BumpSandbox, tree: Git, run_log: RunLog) -> None:
    """Put the series on the new base. Raises PatchConflict and leaves git's `am` in the sandbox."""
    from workspace.repo.git import am

    recover(bump_sandbox, tree, run_log)
    if am.position(tree):
        raise conflict(bump_sandbox, tree)
    if tree.resolve(APPLIED_REF):
        return
    base, names = bump_sandbox.start.new_base, series_names(bump_sandbox)
    if tree.head() == base and names:
        with stages.step(run_log, "patches") as view:
            _run_am(bump_sandbox, tree, names, run_log)
            made = series.stems_of(tree, base, "HEAD")
            gone = [name for name in names if name.removesuffix(".patch") not in made]
            view.reason = f"{len(made)} of {len(names)} on {bump_sandbox.pin.tag}" + (
                f"; upstream has {', '.join(gone)}" if gone else ""
            )
    tree.set_ref(APPLIED_REF, tree.head() or base)


def _run_am(bump_sandbox: BumpSandbox, tree: Git, names: Sequence[str], run_log: RunLog) -> None:
    """Make the commits aside and move to them; at a conflict run `am` in the sandbox's tree."""
    from workspace.repo.git import am

    own, base = bump_sandbox.layout, bump_sandbox.start.new_base
    files = [bump_sandbox.outer.patches("vllm") / name for name in names]
    done = am.applied(tree, base, files, place=own.state / "am")
    if done.tip:
        worktree.move(own, "vllm", tree, done.tip, run_log=run_log)
        return
    # It stays if the verb or its git is killed, or if the disk is full.
    write_atomic(bump_sandbox.applying, b"{}")
    try:
        done = am.start(tree, files, run_log=run_log)
    except CheckoutError:
        bump_sandbox.applying.unlink()
        raise
    bump_sandbox.applying.unlink()
    if done.tip is None:
        raise conflict(bump_sandbox, tree, done)


def recover(bump_sandbox: BumpSandbox, tree: Git, run_log: RunLog) -> None:
    """Finish a move that was killed, and take an `am` back that was killed before its conflict."""
    if worktree.is_move_begun(bump_sandbox.layout, "vllm"):
        worktree.finish_move(bump_sandbox.layout, "vllm", tree, run_log=run_log)
    if bump_sandbox.applying.exists():
        folder = bump_sandbox.outer.patches("vllm")
        files = [folder / name for name in series_names(bump_sandbox)]
        paths = [path for file in files for path in tree.patch_paths(file)]
        worktree.start_over(tree, bump_sandbox.start.new_base, paths)
        bump_sandbox.applying.unlink()


def conflict(bump_sandbox: BumpSandbox, tree: Git, done: Applied | None = None) -> PatchConflict:
    """Return the error for the patch at which `am` stopped."""
    from workspace.repo.git import am

    names, position = series_names(bump_sandbox), am.position(tree)
    done = done or am.stopped_at(tree, position.number if position else 1)
    return series.sentence(
        tree,
        done,
        count=position.last if position else len(names),
        patch=f"patches/vllm/{names[done.position - 1]}",
        shown=bump_sandbox.shown,
        base=bump_sandbox.start.new_base,
        old=bump_sandbox.start.base,
    )


def series_names(bump_sandbox: BumpSandbox) -> tuple[str, ...]:
    """Return the patches of the clone, in the order in which they apply to the new base."""
    return series.read_series(
        bump_sandbox.outer.patches("vllm"), pin=pins.load(bump_sandbox.outer.pins).vllm.commit
    ).names


def dropped(bump_sandbox: BumpSandbox, facts: Mapping[str, str]) -> dict[str, str]:
    """Return the patches that are no longer on the new base, each with the reason."""
    names = series.read_series(
        bump_sandbox.layout.patches("vllm"), pin=bump_sandbox.pin.commit
    ).names
    gone = [name for name in facts["names"].split("\n") if name and name not in names]
    return {
        name: (
            "left out with --skip"
            if name in bump_sandbox.skipped
            else "upstream has it, or its subject changed"
        )
        for name in gone
    }
