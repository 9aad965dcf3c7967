"""The workshop of a bump, `.workspace/bump`: a clone in small, in which the pin is moved before
anything of the real one is.

It has pins, patches, tree and environment of its own, and shares objects, library, downloads and
logs with the clone.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from workspace.bump import known_good
from workspace.core import files
from workspace.core.console import Console
from workspace.core.errors import CheckoutError, ToolchainError, WorkspaceError
from workspace.core.files import read_regular, write_atomic
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import editable, sandbox, stamp
from workspace.repo import checkout, moves, pins, series
from workspace.repo.git import Git, worktree
from workspace.repo.pins import Pin

RECORD = "begun.json"
SKIPPED = "skipped"
# Set in the workshop's tree when the whole series is on the new base; git itself knows no longer by
# then.
APPLIED_REF = f"{worktree.OWN_REFS}/applied"
_BASE = re.compile(rb"^(\s*# base: )([0-9a-f]{40})\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Begun:
    """What a bump began with: what was asked for, the stack as it stood, and the commit that the
    patches go on.
    """

    ref: str
    tag: str
    base: str
    tip: str
    patches: str
    new_base: str


@dataclass(frozen=True)
class BumpSandbox:
    """A bump that is under way. `layout` is the workshop's own, `outer` the clone's, `pin` the new
    pin.
    """

    outer: Layout
    layout: Layout
    begun: Begun
    pin: Pin

    @property
    def shown(self) -> str:
        return self.outer.relative(self.layout.vllm)

    @property
    def promoting(self) -> Path:
        return self.outer.promoting

    @property
    def applying(self) -> Path:
        """There while an `am` runs: one that was killed is told from one that waits for the
        user.
        """
        return self.layout.root / "applying.json"

    @property
    def skipped(self) -> tuple[str, ...]:
        """The patches that were left out by `inv patch.continue --skip`."""
        path = self.layout.root / SKIPPED
        return tuple(path.read_text(encoding="utf-8").split()) if path.exists() else ()


def is_there(layout: Layout) -> bool:
    return (layout.bump_sandbox / RECORD).exists()


def find(layout: Layout) -> BumpSandbox | None:
    """Return the bump that is under way, None where none is. Raises WorkspaceError for one that is
    damaged.
    """
    try:
        record = json.loads(read_regular(layout.bump_sandbox / RECORD))
        begun = Begun(**record)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as exc:
        raise WorkspaceError(
            f"{layout.relative(layout.bump_sandbox)} cannot be read: {exc}",
            hint="./scripts/inv patch.continue --abort",
        ) from exc
    own = Layout(layout.bump_sandbox)
    return BumpSandbox(layout, own, begun, pins.load(own.pins).vllm)


def make(layout: Layout, begun: Begun, pin: Pin) -> BumpSandbox:
    """Make the workshop without its tree, whole or not at all: from then on a bump is under way."""
    shutil.rmtree(known_good.gone(layout), ignore_errors=True)
    with files.folder_beside(layout.bump_sandbox) as folder:
        made = Layout(folder / "bump")
        sandbox.furnish(layout, made, pin)
        shutil.copytree(layout.patches("vllm").parent, made.patches("vllm").parent)
        write_series_base(made.patches("vllm"), pin.commit)
        write_atomic(made.root / RECORD, json.dumps(asdict(begun), indent=1).encode())
        files.put_in_place(made.root, layout.bump_sandbox)
    return BumpSandbox(layout, Layout(layout.bump_sandbox), begun, pin)


def open_tree(bump_sandbox: BumpSandbox, settings: Settings, *, run_log: RunLog) -> Git:
    """Return the workshop's tree, which is made where it is not there yet: the new base, checked
    out.

    Raises CheckoutError where something else lies there.
    """
    hint = "./scripts/inv patch.continue --abort"
    return sandbox.open_tree(
        bump_sandbox.outer,
        bump_sandbox.layout,
        bump_sandbox.begun.new_base,
        settings,
        run_log=run_log,
        hint=hint,
    )


def tidy(layout: Layout) -> None:
    """Finish what a verb left that was killed while it made a workshop or took one away; there is
    none.
    """
    files.sweep_beside(layout.bump_sandbox)
    known_good.clear(layout)


def remove(layout: Layout) -> str | None:
    """Take the workshop away. What was committed or edited there stays under the reference of
    vendor/vllm that is returned.
    """
    own = Layout(layout.bump_sandbox)
    why = "What was in the workshop of a bump when it was given up"
    kept = (
        sandbox.keep_work(layout, own, why, prefix="refs/pins/left-") if is_there(layout) else None
    )
    sandbox.remove_tree(layout, own, known_good.gone(layout))
    return kept


def digest_of(folder: Path, *, pin: str) -> str:
    """One SHA-256 over a series and its patches."""
    names = series.read_series(folder, pin=pin).names
    parts = [(folder / name).read_bytes() for name in (series.SERIES_FILE, *names)]
    return hashlib.sha256(b"".join(b"%d\n%s" % (len(part), part) for part in parts)).hexdigest()


def write_series_base(folder: Path, commit: str, *, only: str | None = None) -> None:
    """Let the series name another base, where it names `only` if given; all else in it stays."""
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


def move_tree(layout: Layout, *, old: str, new: str, run_log: RunLog) -> None:
    """Move vendor/vllm from one commit to another; a move that was ended in the middle is finished.

    Raises CheckoutError where HEAD is at neither, or where an edit may be the user's.
    """
    git, shown = Git(layout.vllm), layout.relative(layout.vllm)
    if moves.is_begun(layout, "vllm"):
        moves.finish(layout, "vllm", git, run_log=run_log)
    head = git.head()
    if head == new:
        return
    if head != old:
        raise CheckoutError(
            f"{shown} is at {(head or 'no commit')[:12]}, expected was {old[:12]}",
            hint=f"git -C {shown} checkout --detach {old[:12]}",
        )
    if edited := git.edits():
        hint = f"git -C {shown} stash    and the same command again"
        raise CheckoutError(
            f"{shown} has edits ({', '.join(edited[:3])}), which were left as they are", hint=hint
        )
    moves.move(layout, "vllm", git, new, run_log=run_log)


def require_one_disk(layout: Layout) -> None:
    """Raise ToolchainError where what a move renames lies on several disks."""
    places = (layout.root, layout.state, layout.vllm, layout.environment)
    if len({path.stat().st_dev for path in places if path.exists()}) > 1:
        sentence = (
            "the clone, .workspace, vendor/vllm and .vllm lie on several disks, so nothing can be"
            " renamed between them"
        )
        raise ToolchainError(sentence, hint="df . .workspace vendor/vllm .vllm")


def put_aside(environment: Path, scratch: Path) -> None:
    """Rename an environment to where it waits; where another one is left from earlier, that one is
    out of date.
    """
    if os.path.lexists(environment):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(environment, scratch)
        except OSError as exc:
            # Where something is mounted, be it of the same disk.
            hint = f"findmnt {environment}    unmount it; the same command again goes on"
            raise ToolchainError(
                f"{environment} cannot be renamed: {exc.strerror}", hint=hint
            ) from exc


def products_of(layout: Layout) -> dict[str, str]:
    """What a marker says of the products in vendor/vllm: their paths, and the compiled libraries
    that the stamp names, a line each.
    """
    build = stamp.read(layout.stamp("vllm"))
    return {
        "products": "\n".join(editable.build_products(layout.vllm)),
        "libraries": "\n".join(library.path for library in build.libraries) if build else "",
    }


def take_products_away(layout: Layout, facts: Mapping[str, str], *, good_state: str) -> None:
    """Take the products of the pin that is left out of vendor/vllm; those that the good state has
    not are kept aside.
    """
    listed, ours = (
        tuple(filter(None, facts[name].split("\n"))) for name in ("products", "libraries")
    )
    kept = known_good.kernels(layout, good_state) if good_state else None
    editable.take_products_away(
        layout,
        listed,
        ours=ours,
        kept=kept,
        left=known_good.left(layout, facts["left"]) / "products",
    )


def report_left(layout: Layout, facts: Mapping[str, str], *, console: Console) -> None:
    left = known_good.left(layout, facts["left"])
    if left.exists():
        console.info(
            "what a build had left in vendor/vllm and no good state holds is in"
            f" {layout.relative(left)}"
        )


def set_gitlink(layout: Layout, commit: str | None, *, run_log: RunLog) -> None:
    """Let the superproject's index name this commit, unless it is None, and keep git's hands off
    the submodule as before.
    """
    outer = checkout.superproject(layout)
    path = layout.relative(layout.vllm)
    link = outer.gitlink(path) if outer else None
    if outer and link and commit and link.commit != commit:
        worktree.set_gitlink(outer, path, commit, run_log=run_log)
    checkout.protect(layout, run_log=run_log)


Act = Callable[[Mapping[str, str]], None]


@dataclass(frozen=True)
class Marker:
    """The file of one change: the `facts` that were true when it began, and the names of the
    finished steps.
    """

    path: Path
    facts: Mapping[str, str]
    done: tuple[str, ...] = ()

    def write(self) -> "Marker":
        write_atomic(
            self.path, json.dumps({"facts": dict(self.facts), "done": self.done}, indent=1).encode()
        )
        return self


def find_marker(path: Path) -> Marker | None:
    """Return what is under way, None where nothing is. Raises WorkspaceError for a marker that is
    damaged.
    """
    try:
        record = json.loads(read_regular(path))
        return Marker(
            path,
            {str(name): str(text) for name, text in record["facts"].items()},
            tuple(map(str, record["done"])),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise WorkspaceError(
            f"{path} says what is under way and cannot be read: {exc}",
            hint=f"cat {path}; git log --all --oneline -9",
        ) from exc


def finish_marker(marker: Marker, steps: Sequence[tuple[str, Act]]) -> None:
    """Do the steps that are not done yet, in order. The marker stays: whoever is content removes
    it.
    """
    for name, act in steps:
        if name not in marker.done:
            act(marker.facts)
            # The marker is: after a power cut it must not speak of files that are not.
            os.sync()
            marker = Marker(marker.path, marker.facts, (*marker.done, name)).write()
