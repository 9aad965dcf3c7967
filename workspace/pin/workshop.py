"""The workshop of a bump, `.workspace/bump`: a clone in small, in which the pin is moved before anything of the real one is.

It has pins, patches, tree and environment of its own, and shares objects, library, downloads and logs with the clone.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from workspace.build import stamp
from workspace.core.errors import CheckoutError, WorkspaceError
from workspace.core.files import read_regular, write_atomic
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.pin import good
from workspace.source import leftover, pins, scratch, series
from workspace.source.git import Git, worktree
from workspace.source.pins import Pin

RECORD = "begun.json"
SKIPPED = "skipped"
# Set in the workshop's tree when the whole series is on the new base; git itself knows no longer by then.
APPLIED_REF = f"{worktree.OWN_REFS}/applied"
# Set when all files of the new base are written and on the disk: before, nobody has worked there.
MADE_REF = f"{worktree.OWN_REFS}/made"
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
    for shared in (layout.logs, layout.models):
        shared.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(good.gone(layout), ignore_errors=True)
    with scratch.beside(layout.workshop) as folder:
        made = Layout(folder / "bump")
        made.pins.parent.mkdir(parents=True)
        made.pins.write_bytes(pins.dump(read_regular(layout.pins), pin))
        shutil.copytree(layout.patches("vllm").parent, made.patches("vllm").parent)
        write_series_base(made.patches("vllm"), pin.commit)
        made.state.mkdir()
        links = {made.probes.parent: layout.probes.parent, made.tools: layout.tools, made.logs: layout.logs, made.models: layout.models}
        if layout.dotenv.exists():
            links[made.dotenv] = layout.dotenv
        for link, target in links.items():
            link.symlink_to(target.absolute())
        write_atomic(made.root / RECORD, json.dumps(asdict(begun), indent=1).encode())
        scratch.put_in_place(made.root, layout.workshop)
    return Workshop(layout, Layout(layout.workshop), begun, pin)


def open_tree(workshop: Workshop, settings: Settings, *, journal: Journal) -> Git:
    """Return the workshop's tree, which is made where it is not there yet: the new base, checked out.

    Raises CheckoutError where something else lies there.
    """
    git, path, base = Git(workshop.outer.vllm), workshop.layout.vllm, workshop.begun.new_base
    tree = Git(path)
    if path.is_dir() and os.listdir(path) == [".git"] and not _is_linked(tree):
        # A power cut between the first file and the rest of what git writes for a working tree.
        (path / ".git").unlink()
    if not os.path.lexists(path / ".git"):
        if path.exists() and any(path.iterdir()):
            raise CheckoutError(f"{workshop.shown} has files and is no working tree", hint="./scripts/inv patch.continue --abort")
        tree = worktree.add(git, path, base, journal=journal)
    if not _is_linked(tree):
        raise CheckoutError(f"{workshop.shown} is no working tree of vendor/vllm", hint="./scripts/inv patch.continue --abort")
    if tree.resolve(MADE_REF) is None:
        leftover.remove_at_top(tree.path_of("index").parent, path)
        tree.check_out(base, settings=settings, journal=journal, on_line=lambda line: None)
        os.sync()
        tree.set_ref(MADE_REF, base)
    return tree


def borrow_environment(workshop: Workshop, *, journal: Journal) -> None:
    """Copy the clone's environment into the workshop, where there is none yet: a torch of the user's own may be had nowhere else.

    Without stamps, so that everything but torch is due. Raises ToolchainError for want of rights or space.
    """
    source, target = workshop.outer.environment, workshop.layout.environment
    if os.path.lexists(target) or not source.is_dir():
        return
    with journal.console.step("environment") as view, scratch.beside(target) as aside:
        journal.phase("environment", view)
        made = Layout(aside)
        good.copy_files(source, made.environment, good.files_below(source))
        for name in ("environment", "vllm"):
            stamp.withdraw(made.stamp(name))
        _make_relocatable(made.environment / "pyvenv.cfg")
        scratch.put_in_place(made.environment, target)
        view.reason = f"a copy of {workshop.outer.relative(source)}, for its torch stays (USE_EXISTING_TORCH=1)"
    journal.step = None


def _make_relocatable(config: Path) -> None:
    """Let uv write scripts that bear the promotion's rename, as `uv venv --relocatable` does; an environment of the user's making may lack the line."""
    text = read_regular(config).decode()
    if not re.search(r"^relocatable\s*=\s*true", text, re.MULTILINE | re.IGNORECASE):
        write_atomic(config, (text.rstrip("\n") + "\nrelocatable = true\n").encode())


def _is_linked(tree: Git) -> bool:
    """Whether git takes the folder for a working tree of its own. One whose .git was cut short may lead to the clone's very HEAD."""
    place = tree.place()
    return place is not None and place.top.resolve() == tree.path.resolve() and place.git_dir.parent.name == "worktrees"


def tidy(layout: Layout) -> None:
    """Finish what a verb left that was killed while it made a workshop or took one away; there is none."""
    scratch.sweep(layout.workshop)
    good.clear(layout)


def remove(layout: Layout) -> str | None:
    """Take the workshop away. What was committed or edited there stays under the reference of vendor/vllm that is returned."""
    kept = _keep_work(layout) if is_there(layout) else None
    if os.path.lexists(layout.workshop):
        shutil.rmtree(good.gone(layout), ignore_errors=True)
        # The rename ends the bump at once; what is slow comes after it.
        os.rename(layout.workshop, good.gone(layout))
    worktree.forget(Git(layout.vllm), Layout(layout.workshop).vllm)
    shutil.rmtree(good.gone(layout), ignore_errors=True)
    scratch.sweep(layout.workshop)
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


def _keep_work(layout: Layout) -> str | None:
    """Let a reference name what is in the workshop's tree and nowhere else."""
    path = Layout(layout.workshop).vllm
    if not (path / ".git").exists():
        return None
    tree = Git(path)
    head = tree.head()
    work = worktree.snapshot(tree, "What was in the workshop of a bump when it was given up")
    # In an `am` the working content is that of a patch not yet committed; the index of the new base is no work of anybody's.
    if head is None or worktree.is_kept(Git(layout.vllm), work):
        return None
    ref = f"refs/pins/left-{work[:12]}"
    Git(layout.vllm).set_ref(ref, work)
    return ref
