"""The workshop of a bump, `.workspace/bump`: a clone in small, in which the pin is moved before anything of the real one is.

It has pins, patches, tree and environment of its own, and shares objects, library, downloads and logs with the clone.
"""

import hashlib
import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from workspace.build import annex
from workspace.core.errors import WorkspaceError
from workspace.core.files import read_regular, write_atomic
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.pin import good
from workspace.source import pins, scratch, series
from workspace.source.git import Git, worktree
from workspace.source.pins import Pin

RECORD = "begun.json"
SKIPPED = "skipped"
# Set in the workshop's tree when the whole series is on the new base; git itself knows no longer by then.
APPLIED_REF = f"{worktree.OWN_REFS}/applied"
_BASE = re.compile(rb"^(\s*# base: )([0-9a-f]{40})\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Begun:
    """What a bump began with: what was asked for, the stack as it stood, and the commit that the patches go on."""

    ref: str
    tag: str
    base: str
    tip: str
    patches: str
    new_base: str


@dataclass(frozen=True)
class Workshop:
    """A bump that is under way. `layout` is the workshop's own, `outer` the clone's, `pin` the new pin."""

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
        """There while an `am` runs: one that was killed is told from one that waits for the user."""
        return self.layout.root / "applying.json"

    @property
    def skipped(self) -> tuple[str, ...]:
        """The patches that were left out by `inv patch.continue --skip`."""
        path = self.layout.root / SKIPPED
        return tuple(path.read_text(encoding="utf-8").split()) if path.exists() else ()


def is_there(layout: Layout) -> bool:
    return (layout.workshop / RECORD).exists()


def find(layout: Layout) -> Workshop | None:
    """Return the bump that is under way, None where none is. Raises WorkspaceError for one that is damaged."""
    try:
        record = json.loads(read_regular(layout.workshop / RECORD))
        begun = Begun(**record)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as exc:
        raise WorkspaceError(f"{layout.relative(layout.workshop)} cannot be read: {exc}", hint="./scripts/inv patch.continue --abort") from exc
    own = Layout(layout.workshop)
    return Workshop(layout, own, begun, pins.load(own.pins).vllm)


def make(layout: Layout, begun: Begun, pin: Pin) -> Workshop:
    """Make the workshop without its tree, whole or not at all: from then on a bump is under way."""
    shutil.rmtree(good.gone(layout), ignore_errors=True)
    with scratch.beside(layout.workshop) as folder:
        made = Layout(folder / "bump")
        annex.furnish(layout, made, pin)
        shutil.copytree(layout.patches("vllm").parent, made.patches("vllm").parent)
        write_series_base(made.patches("vllm"), pin.commit)
        write_atomic(made.root / RECORD, json.dumps(asdict(begun), indent=1).encode())
        scratch.put_in_place(made.root, layout.workshop)
    return Workshop(layout, Layout(layout.workshop), begun, pin)


def open_tree(workshop: Workshop, settings: Settings, *, journal: Journal) -> Git:
    """Return the workshop's tree, which is made where it is not there yet: the new base, checked out.

    Raises CheckoutError where something else lies there.
    """
    hint = "./scripts/inv patch.continue --abort"
    return annex.open_tree(workshop.outer, workshop.layout, workshop.begun.new_base, settings, journal=journal, hint=hint)


def tidy(layout: Layout) -> None:
    """Finish what a verb left that was killed while it made a workshop or took one away; there is none."""
    scratch.sweep(layout.workshop)
    good.clear(layout)


def remove(layout: Layout) -> str | None:
    """Take the workshop away. What was committed or edited there stays under the reference of vendor/vllm that is returned."""
    own = Layout(layout.workshop)
    why = "What was in the workshop of a bump when it was given up"
    kept = annex.keep_work(layout, own, why, prefix="refs/pins/left-") if is_there(layout) else None
    annex.remove_tree(layout, own, good.gone(layout))
    return kept


def digest_of(folder: Path, *, pin: str) -> str:
    """One SHA-256 over a series and its patches."""
    names = series.read(folder, pin=pin).names
    parts = [(folder / name).read_bytes() for name in (series.FILE, *names)]
    return hashlib.sha256(b"".join(b"%d\n%s" % (len(part), part) for part in parts)).hexdigest()


def write_series_base(folder: Path, commit: str, *, only: str | None = None) -> None:
    """Let the series name another base, where it names `only` if given; all else in it stays."""
    path = folder / series.FILE
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
