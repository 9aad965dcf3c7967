"""The two trees of an A/B: the requested base, the working tree, and the libraries that each maps.

Commits are made among the objects of vendor/vllm; files, index and HEAD of the clone stay as they
are.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from workspace.core import hints
from workspace.core.console import Console
from workspace.core.errors import BuildError, CheckoutError, PatchConflict, SettingsError, counted
from workspace.core.files import sha256
from workspace.core.paths import Layout
from workspace.core.settings import without_user
from workspace.install import plan
from workspace.install import sandbox as sandboxes
from workspace.install.sandbox import Sandbox
from workspace.machine import hardware
from workspace.machine.machine import Machine
from workspace.repo import checkout, pins, series
from workspace.repo.git import Git, am, worktree
from workspace.repo.pins import Pin
from workspace.repo.series import State
from workspace.server import process_tree

PIN = "pin"
LOOK_EVERY_S = 0.5
_PINS, _SERIES = "vendor/pins.toml", "patches/vllm"
_PREFIX = "vllm-workspace-"

# The SHA-256 of a file by its path, inode, size and modification time.
Hashes = dict[tuple[str, int, int, int], str]


@dataclass(frozen=True)
class Tree:
    """A commit of vendor/vllm with the pin and patches that it is made of.

    `workspace` is the superproject's commit that defines it, if there is such a commit.
    """

    description: str
    pin: Pin
    patches: Path | None
    tip: str
    workspace: str | None = None


def working_tree(layout: Layout, observed: plan.Observation, *, sandbox_name: str) -> Tree:
    """Return vendor/vllm as it is, with uncommitted edits and new files.

    Raises CheckoutError where there is no checkout, or git has an operation in progress.
    """
    git, shown, stack = Git(layout.vllm), layout.relative(layout.vllm), observed.stack
    if stack is None or stack.head is None:
        raise CheckoutError(
            f"there is nothing to compare: {shown} is {observed.checkout.detail}",
            hint=hints.text("inv.bootstrap"),
        )
    if stack.state is State.IN_PROGRESS:
        raise CheckoutError(
            f"{shown} is in the middle of {stack.operation}",
            hint=hints.text("inv.patch_continue_or_abort"),
        )
    tip = worktree.snapshot(git, "The working tree, as nox -s ab measures it")
    existing = sandboxes.find(layout, sandbox_name)
    if existing and git.present((existing.tip,)) and git.tree(existing.tip) == git.tree(tip):
        # Each snapshot has its own time. The former commit of equal content lets a run resume.
        tip = existing.tip
    edits = "" if tip == stack.head else ", uncommitted edits included"
    patches = layout.patches("vllm") if stack.has_patches else None
    return Tree(f"the working tree{edits}", observed.pin, patches, tip)


@contextlib.contextmanager
def base_tree(layout: Layout, observed: plan.Observation, name: str) -> Iterator[Tree]:
    """Yield the tree of --base: the bare pin, or pins and patches of a commit of the workspace.

    Raises SettingsError for a name that is neither, PatchConflict where the patches do not apply.
    """
    if name == PIN:
        if observed.checkout.base is None:
            raise CheckoutError(
                f"there is no pin to compare with: vendor/vllm is {observed.checkout.detail}",
                hint=hints.text("inv.bootstrap"),
            )
        yield Tree(
            f"{observed.pin.tag} without patches", observed.pin, None, observed.checkout.base
        )
        return
    outer = checkout.superproject(layout)
    commit = outer.resolve(name) if outer else None
    if outer is None or commit is None:
        raise SettingsError(
            f"--base: {name[:60]!r} is no commit of the workspace",
            hint=hints.text("bench.base"),
        )
    with TemporaryDirectory(prefix=_PREFIX) as folder:
        yield _tree_of_commit(observed.machine, outer, commit, name, Path(folder) / "vllm")


def _tree_of_commit(machine: Machine, outer: Git, commit: str, name: str, folder: Path) -> Tree:
    """Read pins and patches from a commit of the superproject, and apply the patches."""
    entries = outer.entries((_PINS, _SERIES), commit)
    if _PINS not in entries or f"{_SERIES}/{series.SERIES_FILE}" not in entries:
        raise SettingsError(
            f"commit {commit[:12]} has no {_PINS if _PINS not in entries else _SERIES}",
            hint=hints.text("bench.base"),
        )
    pin = pins.parse(outer.blob(entries[_PINS].split()[1])).vllm
    folder.mkdir(parents=True)
    for path, entry in entries.items():
        is_direct = "/" not in path.removeprefix(f"{_SERIES}/")
        if path != _PINS and entry.startswith("100") and is_direct:
            (folder / Path(path).name).write_bytes(outer.blob(entry.split()[1]))
    names = series.read_series(folder, pin=pin.commit).names
    start = _base_of(machine, pin)
    files = [folder / patch for patch in names]
    tip = apply_series(machine.layout, start, files, description=f"the series of {commit[:12]}")
    count = counted(len(names), "patch", "patches")
    return Tree(f"{name} ({commit[:12]}): {pin.tag} with {count}", pin, folder, tip, commit)


def _base_of(machine: Machine, pin: Pin) -> str:
    """Return the pin's commit, or its archive's, as far as vendor/vllm has it.

    Raises SettingsError where it has neither.
    """
    known = [pin.commit, *([pin.archive.commit] if pin.archive else [])]
    present = Git(machine.layout.vllm).present(known)
    found = next((commit for commit in known if commit in present), None)
    if found is None:
        url = without_user(checkout.url_of(machine.layout, pin, machine.settings))
        raise SettingsError(
            f"vendor/vllm does not have {pin.tag} ({pin.commit[:12]}), which that commit pins",
            hint=hints.text("bench.fetch_pin", url=url, commit=pin.commit),
        )
    return found


def apply_series(layout: Layout, start: str, files: Sequence[Path], *, description: str) -> str:
    """Apply patches to the commit `start`, and return the last commit.

    Raises PatchConflict naming the patch that does not apply, and the files.
    """
    if not files:
        return start
    done = am.applied(Git(layout.vllm), start, files, place=layout.state / "vllm-stack")
    if done.tip is None:
        raise PatchConflict(
            f"{description}: {files[done.position - 1].name} does not apply:"
            f" {', '.join(done.paths)}",
            hint=hints.text("inv.patch"),
            details=done.details,
        )
    return done.tip


class LibraryWatch:
    """Watch for the libraries that a measured process and its children map (proc_pid_maps(5)).

    Call it at each line of the process's log. Each start has a watch of its own.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self._tree = os.path.realpath(sandbox.layout.vllm)
        self._others = tuple(
            f"{os.path.realpath(place)}/" for place in (sandbox.outer.vllm, sandbox.outer.sandboxes)
        )
        self._sandbox = sandbox
        self._mapped: dict[str, int] = {}
        self._foreign: set[str] = set()
        self._next = 0.0

    def __call__(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOOK_EVERY_S
        for pid in process_tree.below({os.getpid()}, process_tree.living()):
            for path, inode in hardware.mapped_files(pid):
                self._take(path, inode)

    def _take(self, path: str, inode: int) -> None:
        if ".so" not in path:
            return
        if path.startswith(f"{self._tree}/"):
            self._mapped[path] = inode
        elif path.startswith(self._others) and not path.startswith(
            f"{os.path.realpath(self._sandbox.layout.root)}/"
        ):
            self._foreign.add(path)

    def libraries(self, stamped: Mapping[str, str], hashes: Hashes) -> dict[str, str]:
        """Return the SHA-256 of each mapped library of the sandbox's tree, by path in the tree.

        Adds to `hashes`, for the next start. Raises BuildError where no library was mapped, where a
        library differs from the build's stamp, and where a library of another tree was mapped.
        """
        name = self._sandbox.shown
        hint = hints.text("bench.delete_tree", folder=name)
        if self._foreign:
            raise BuildError(
                f"a process of {name} has loaded {sorted(self._foreign)[0]}, which belongs to"
                " another tree",
                hint=hint,
            )
        if not self._mapped:
            raise BuildError(
                f"a process of {name} has loaded no compiled library of its own tree, so nothing"
                " proves what was measured",
                hint=hint,
            )
        found = {}
        for path, inode in self._mapped.items():
            inside = os.path.relpath(path.removesuffix(" (deleted)"), self._tree)
            digest = _digest(Path(path), inode, hashes)
            if digest is None or digest != stamped.get(inside, digest):
                raise BuildError(
                    f"{inside} of {name} is not the library that was built: it was replaced before"
                    " or during the measurement",
                    hint=hint,
                )
            found[inside] = digest
        return dict(sorted(found.items()))


def _digest(path: Path, inode: int, hashes: Hashes) -> str | None:
    """Return the digest of a mapped file; None if another file has taken its name."""
    try:
        status = path.stat()
        if status.st_ino != inode:
            return None
        key = (str(path), status.st_ino, status.st_size, status.st_mtime_ns)
        if key not in hashes:
            hashes[key] = sha256(path)
        return hashes[key]
    except OSError:
        return None


def require_different_libraries(
    layout: Layout,
    tips: tuple[str, str],
    mapped: tuple[Mapping[str, str], Mapping[str, str]],
    *,
    console: Console,
) -> None:
    """Warn where compiled sources of two commits differ and their mapped libraries do not.

    Raises BuildError if the commits differ in nothing else.
    """
    git = Git(layout.vllm)
    digests = [git.digest(plan.COMPILED_SOURCES, commit=tip) for tip in tips]
    if digests[0] == digests[1] or mapped[0] != mapped[1]:
        return
    before, after = (git.entries((), tip) for tip in tips)
    others = [
        path
        for path in before.keys() | after.keys()
        if before.get(path) != after.get(path) and path.split("/")[0] not in plan.COMPILED_SOURCES
    ]
    sentence = (
        "the trees differ in compiled sources, but both load the same libraries: this machine does"
        " not compile or does not use the changed code"
    )
    if not others:
        raise BuildError(sentence, hint=hints.text("bench.same_code"))
    console.warn(f"{sentence}; only the other changes are compared")
