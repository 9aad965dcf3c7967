"""The arms of a comparison or a search: clones in small in `.workspace/arms`, each with its tree on one commit and a build of its own.

Whoever makes, moves or builds one holds the workspace's lock. Nothing of the user's is in an arm; what was edited there all the same is kept.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from workspace.build import annex, plan, products, stamp
from workspace.core.console import Console
from workspace.core.errors import BuildError, CheckoutError, ToolchainError
from workspace.core.files import read_regular, write_atomic
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.source import moves, pins, scratch, series
from workspace.source.git import Git, worktree
from workspace.source.pins import COMMIT, Pin

RECORD = "arm.json"
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,40}")
# What an arm stands on, safe from git's own tidying; and what somebody did in one.
REFS, LEFT_REFS = "refs/arms", "refs/left/arms"
# Where these differ, what a build left in the tree is of the other commit, or git would no longer know it for what a build left.
_OF_PRODUCTS = (*plan.COMPILED_SOURCES, ".gitignore")


@dataclass(frozen=True)
class Arm:
    """`outer` is the clone's layout, `layout` the arm's own; its tree stands on the commit `tip`."""

    name: str
    outer: Layout
    layout: Layout
    tip: str

    @property
    def shown(self) -> str:
        return self.outer.relative(self.layout.root)


def make(layout: Layout, name: str, *, pin: Pin, patches: Path | None, tip: str, settings: Settings, journal: Journal) -> Arm:
    """Return the arm of that name with its tree on `tip`: the one that is there, brought to what is asked for, or a new one.

    `pin` names the donor of its kernels and what they were compiled from; `patches` is the folder of a series on it that `tip` holds already, for the
    record; None is an empty one. Raises PatchDrift for a series that is not on the pin, CheckoutError where the tree cannot be had.
    """
    assert NAME.fullmatch(name), name
    if patches is not None:
        series.read(patches, pin=pin.commit)
    there = find(layout, name)
    if there is None:
        there = _begin(layout, name, pin, patches, tip)
    else:
        pins.save(there.layout.pins, pin)
        _write_patches(there.layout, pin, patches)
    return move(there, tip, settings=settings, journal=journal)


def find(layout: Layout, name: str) -> Arm | None:
    """Return the arm of that name; None where there is none, or one whose record cannot be read."""
    own = Layout(layout.arms / name)
    try:
        tip = json.loads(read_regular(own.root / RECORD))["tip"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Arm(name, layout, own, tip) if isinstance(tip, str) and COMMIT.fullmatch(tip) else None


def find_all(layout: Layout) -> tuple[Arm, ...]:
    """Every arm that is there, by name."""
    names = sorted(path.parent.name for path in layout.arms.glob(f"*/{RECORD}"))
    return tuple(found for name in names if NAME.fullmatch(name) and (found := find(layout, name)))


def move(arm: Arm, tip: str, *, settings: Settings, journal: Journal) -> Arm:
    """Check another commit out, with content-true times. What a build left of other compiled sources goes with them.

    Raises CheckoutError where the tree cannot be had, SourceError where contents of files cannot be fetched.
    """
    # First: git may prune a commit that nothing leads to.
    Git(arm.outer.vllm).set_ref(f"{REFS}/{arm.name}", tip)
    tree = _settled(arm, tip, settings, journal)
    if (head := tree.head()) != tip:
        assert head is not None
        if tree.setting("remote.origin.promisor") == "true":
            # To compare contents fetches, all at once, what a partial clone lacks of them; to write files is not let online.
            tree.talk(("diff", "--shortstat", "--no-renames", head, tip), settings, journal, lambda line: None)
        _take_products_away(arm, tree, head, tip)
        moves.move(arm.layout, "vllm", tree, tip, journal=journal)
    _record(arm.layout, tip)
    return replace(arm, tip=tip)


def build(arm: Arm, settings: Settings, *, console: Console) -> plan.Observation:
    """Bring the arm to a verified vLLM of the kind that the clone has, as far as it is not there: what differs in compiled sources is compiled.

    Raises BuildError where it cannot be built, so that no donor's kernels pass for its own; SourceError where something cannot be fetched.
    """
    wanted = annex.as_built(settings, plan.observe(arm.outer, settings))
    if moves.is_begun(arm.layout, "vllm") or Git(arm.layout.vllm).head() != arm.tip:
        raise CheckoutError(f"{arm.shown} does not stand on {arm.tip[:12]}", hint=f"rm -rf {arm.shown}    and the same command again")
    if wanted.switch("USE_EXISTING_TORCH"):
        with Journal(console, arm.layout.logs, verb="arm", secrets=settings.secrets) as journal:
            annex.borrow_environment(arm.outer, arm.layout, journal=journal)
    try:
        annex.build(arm.layout, wanted, console=console, is_arm=True)
    except ToolchainError as exc:
        if not plan.observe(arm.layout, wanted).for_compiler:
            raise
        raise BuildError(f"{arm.shown} needs kernels of its own, and {exc.message}", hint=exc.hint, details=exc.details) from exc
    observed = plan.observe(arm.layout, wanted)
    for layer in (observed.environment, observed.kernels, observed.install):
        if layer.state != "ok":
            hint = "./scripts/inv env.check    KERNELS=auto compiles what differs from the pin"
            raise BuildError(f"{arm.shown} cannot be built as its tree asks: {layer.name} {layer.why}", hint=hint)
    return observed


def remove(arm: Arm) -> str | None:
    """Take an arm away. What somebody committed or edited there stays under the reference of vendor/vllm that is returned."""
    kept = _keep_work(arm)
    annex.remove_tree(arm.outer, arm.layout, _gone(arm.layout))
    worktree.delete_ref(Git(arm.outer.vllm), f"{REFS}/{arm.name}")
    return kept


def _begin(layout: Layout, name: str, pin: Pin, patches: Path | None, tip: str) -> Arm:
    """Put the arm there, whole or not at all, without its tree."""
    arm = Arm(name, layout, Layout(layout.arms / name), tip)
    # What lies there is none: its record is damaged, say.
    _keep_work(arm)
    annex.remove_tree(layout, arm.layout, _gone(arm.layout))
    with scratch.beside(arm.layout.root) as folder:
        made = Layout(folder / "arm")
        annex.furnish(layout, made, pin)
        _write_patches(made, pin, patches)
        _record(made, tip)
        scratch.put_in_place(made.root, arm.layout.root)
    return arm


def _write_patches(own: Layout, pin: Pin, patches: Path | None) -> None:
    folder = own.patches("vllm")
    former = annex.names_of(folder)
    if patches is not None:
        annex.write_patches(patches, folder, pin=pin.commit, former=former)
        return
    write_atomic(folder / series.FILE, f"# base: {pin.commit}\n".encode())
    for name in filter(None, former.split("\n")):
        (folder / name).unlink(missing_ok=True)


def _record(own: Layout, tip: str) -> None:
    write_atomic(own.root / RECORD, json.dumps({"tip": tip}).encode())


def _settled(arm: Arm, tip: str, settings: Settings, journal: Journal) -> Git:
    """The arm's tree, whole, without edits, and no operation of git's under way; what somebody did there is kept."""
    hint = f"rm -rf {arm.shown}    and the same command again"

    def opened() -> Git:
        return annex.open_tree(arm.outer, arm.layout, tip, settings, journal=journal, hint=hint)

    tree = opened()
    if moves.is_begun(arm.layout, "vllm"):
        moves.finish(arm.layout, "vllm", tree, journal=journal)
    work = worktree.snapshot(tree, _why(arm))
    if kept := _keep_work(arm, work=work):
        journal.console.say(f"what was done in {arm.shown} is kept in vendor/vllm as {kept}")
    if tree.under_way():
        worktree.forget(Git(arm.outer.vllm), arm.layout.vllm)
        return opened()
    if work != tree.head():
        # From here on the edits are a commit's, so that the move takes them away like any other difference.
        tree.set_ref("HEAD", work)
        tree.read_index(work)
    return tree


def _keep_work(arm: Arm, *, work: str | None = None) -> str | None:
    ours = {arm.tip, Git(arm.outer.vllm).resolve(f"{REFS}/{arm.name}") or arm.tip}
    return annex.keep_work(arm.outer, arm.layout, _why(arm), prefix=f"{LEFT_REFS}/", ours=ours, work=work)


def _why(arm: Arm) -> str:
    return f"What was in the arm {arm.name} before it was moved or taken away"


def _gone(own: Layout) -> Path:
    return own.root.with_name(f".{own.root.name}.gone")


def _take_products_away(arm: Arm, tree: Git, head: str, tip: str) -> None:
    """All of what a build left there is the workspace's own."""
    listed = products.found(tree.path)
    is_of_both = tree.digest(_OF_PRODUCTS, commit=head) == tree.digest(_OF_PRODUCTS, commit=tip)
    if not listed or (is_of_both and not tree.entries(listed, tip)):
        return
    stamp.withdraw(arm.layout.stamp("vllm"))
    products.take_away(arm.layout, listed, ours=listed, kept=None, left=arm.layout.aside)
