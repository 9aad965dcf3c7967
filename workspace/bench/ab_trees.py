"""Which trees are compared: the base that was asked for, and the working tree as it is.

Commits are made among the objects of vendor/vllm; no file, index or HEAD of the clone is touched.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from workspace.bench import results
from workspace.bench.results import Record
from workspace.core import process
from workspace.core.errors import BuildError, CheckoutError, PatchConflict, SettingsError
from workspace.core.files import read_regular, sha256
from workspace.core.paths import Layout
from workspace.install import plan
from workspace.install import sandbox as sandboxes
from workspace.install.sandbox import Sandbox
from workspace.repo import checkout, pins, series
from workspace.repo.git import Git, am, worktree
from workspace.repo.pins import Pin
from workspace.repo.series import State
from workspace.server import process_tree

PIN = "pin"
_PINS, _SERIES = "vendor/pins.toml", "patches/vllm"
_HINT = "--base pin, a commit of the workspace, or a record of ./scripts/inv bench"


@dataclass(frozen=True)
class Tree:
    """A commit of vendor/vllm and what it is made of; `workspace` is the superproject's commit that
    says so, where one does.
    """

    description: str
    pin: Pin
    patches: Path | None
    tip: str
    workspace: str | None = None


def working(layout: Layout, observed: plan.Observation, *, arm: str) -> Tree:
    """The tree of vendor/vllm as it is, uncommitted edits and new files included. Raises
    CheckoutError where git is in the middle of something.
    """
    git, shown, stack = Git(layout.vllm), layout.relative(layout.vllm), observed.stack
    if stack is None or stack.head is None:
        raise CheckoutError(
            f"{shown} is {observed.checkout.detail}, so there is nothing to compare",
            hint="./scripts/inv bootstrap",
        )
    if stack.state is State.IN_PROGRESS:
        raise CheckoutError(
            f"{shown} is in the middle of something",
            hint="./scripts/inv patch.continue    or --abort",
        )
    tip = worktree.snapshot(git, "The working tree, as nox -s ab measures it")
    there = sandboxes.find(layout, arm)
    if there and git.present((there.tip,)) and git.tree(there.tip) == git.tree(tip):
        # A snapshot has the time of its making: the same content is the same tree.
        tip = there.tip
    edits = "" if tip == stack.head else ", uncommitted edits included"
    patches = layout.patches("vllm") if stack.state in (State.APPLIED, State.UNEXPORTED) else None
    return Tree(f"the working tree{edits}", observed.pin, patches, tip)


@contextlib.contextmanager
def base(layout: Layout, observed: plan.Observation, word: str) -> Iterator[Tree]:
    """The tree that `word` means: the pinned tag without patches, or pins and patches of a commit
    of the superproject, or those of a record.

    Raises SettingsError for a word that means neither, and for a record that cannot be had again;
    PatchConflict where its patches do not apply.
    """
    if word == PIN:
        if observed.checkout.base is None:
            raise CheckoutError(
                f"vendor/vllm is {observed.checkout.detail}, so there is no pin to compare with",
                hint="./scripts/inv bootstrap",
            )
        yield Tree(
            f"{observed.pin.tag} without patches", observed.pin, None, observed.checkout.base
        )
        return
    outer, record = checkout.superproject(layout), None
    # A commit goes first; a record of the same name is meant by its path.
    commit = outer.resolve(word) if outer and not word.endswith(".json") else None
    if commit is None and (record := _record(layout, word)):
        commit = _commit_of(record, outer)
    if outer is None or commit is None:
        raise SettingsError(
            f"--base: {word[:60]!r} is no commit of the workspace and no record", hint=_HINT
        )
    with TemporaryDirectory(prefix="vllm-workspace-") as folder:
        made = _of_commit(layout, outer, commit, word, Path(folder) / "vllm")
        if record is not None and (tree := Git(layout.vllm).tree(made.tip)) != record.source.tree:
            raise SettingsError(
                f"the record {record.stem} is of tree {record.source.tree[:12]}; pins and patches"
                f" of its commit {commit[:12]} make {tree[:12]}",
                hint=(
                    "it was measured with commits that no patch held: export and commit them, and"
                    " measure again"
                ),
            )
        yield made


def _record(layout: Layout, word: str) -> Record | None:
    try:
        return results.find(layout, word).record
    except SettingsError as exc:
        # Several are meant, or it cannot be read.
        if exc.details or word.endswith(".json"):
            raise
        return None


def _commit_of(record: Record, outer: Git | None) -> str:
    """The superproject's commit that a record was measured at. Raises SettingsError where that does
    not say all.
    """
    hint = (
        f"measure again from a commit: git commit, ./scripts/nox -s bench -- {record.kind} --label"
        " another"
    )
    if record.source.dirty:
        raise SettingsError(
            f"{record.stem} was measured with uncommitted edits in vendor/vllm, which nobody can"
            " bring back",
            hint=hint,
        )
    if record.workspace is None:
        raise SettingsError(
            f"{record.stem} does not say which commit of the workspace it was measured at",
            hint=hint,
        )
    if outer is None or record.workspace not in outer.present((record.workspace,)):
        raise SettingsError(
            f"{record.stem} was measured at commit {record.workspace[:12]}, which this clone does"
            " not have",
            hint="git fetch",
        )
    return record.workspace


def _of_commit(layout: Layout, outer: Git, commit: str, word: str, folder: Path) -> Tree:
    """Pins and patches as a commit of the superproject has them, put on their base."""
    entries = outer.entries((_PINS, _SERIES), commit)
    if _PINS not in entries or f"{_SERIES}/{series.SERIES_FILE}" not in entries:
        raise SettingsError(
            f"{commit[:12]} has no {_PINS if _PINS not in entries else _SERIES}", hint=_HINT
        )
    pin = pins.parse(outer.blob(entries[_PINS].split()[1])).vllm
    folder.mkdir(parents=True)
    for path, entry in entries.items():
        if (
            path != _PINS
            and entry.startswith("100")
            and "/" not in path.removeprefix(f"{_SERIES}/")
        ):
            (folder / Path(path).name).write_bytes(outer.blob(entry.split()[1]))
    names = series.read_series(folder, pin=pin.commit).names
    start = _base_of(layout, pin)
    tip = stacked(
        layout, start, [folder / name for name in names], said=f"the series of {commit[:12]}"
    )
    count = f"{len(names)} {'patch' if len(names) == 1 else 'patches'}"
    return Tree(f"{word} ({commit[:12]}): {pin.tag} with {count}", pin, folder, tip, commit)


def _base_of(layout: Layout, pin: Pin) -> str:
    """The commit that patches on a pin go on, as far as vendor/vllm has it. Raises SettingsError
    where it has neither kind.
    """
    known = [pin.commit, *([pin.archive.commit] if pin.archive else [])]
    present = Git(layout.vllm).present(known)
    found = next((commit for commit in known if commit in present), None)
    if found is None:
        raise SettingsError(
            f"vendor/vllm does not have {pin.tag} ({pin.commit[:12]}), which that commit pins",
            hint=f"git -C vendor/vllm fetch {pin.url} {pin.commit}    or compare within one pin",
        )
    return found


@contextlib.contextmanager
def without(layout: Layout, observed: plan.Observation, left_out: str) -> Iterator[Tree]:
    """The series on its base less one patch. Raises PatchConflict where another one needs it."""
    assert observed.stack is not None
    assert observed.checkout.base is not None
    names = [name for name in observed.stack.names if name != left_out]
    with TemporaryDirectory(prefix="vllm-workspace-") as place:
        folder = Path(place) / "vllm"
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(read_regular(layout.patches("vllm") / name))
        (folder / series.SERIES_FILE).write_text(
            "".join(f"{line}\n" for line in (f"# base: {observed.pin.commit}", *names))
        )
        said = f"the series without {left_out}"
        yield Tree(
            said,
            observed.pin,
            folder,
            stacked(layout, observed.checkout.base, [folder / name for name in names], said=said),
        )


def stacked(layout: Layout, start: str, files: Sequence[Path], *, said: str) -> str:
    """The commit that a series makes on `start`. Raises PatchConflict naming the patch that does
    not apply, and where.
    """
    if not files:
        return start
    done = am.applied(Git(layout.vllm), start, files, place=layout.state / "vllm-stack")
    if done.tip is None:
        raise PatchConflict(
            f"{said}: {files[done.position - 1].name} does not apply: {', '.join(done.conflicted)}",
            hint="./scripts/inv patch",
        )
    return done.tip


LOOK_EVERY_S = 0.5
_ASK_TIMEOUT_S = 60.0


class Watch:
    """Looks, at each line of a measured process's log, at what it and what it starts have mapped
    (proc_pid_maps(5)). One for each start.
    """

    def __init__(self, arm: Sandbox) -> None:
        self._tree = os.path.realpath(arm.layout.vllm)
        self._others = tuple(
            f"{os.path.realpath(place)}/" for place in (arm.outer.vllm, arm.outer.sandboxes)
        )
        self._arm = arm
        self._mapped: dict[str, int] = {}
        self._strange: set[str] = set()
        self._next = 0.0

    def __call__(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOOK_EVERY_S
        for number in process_tree.below({os.getpid()}, process_tree.living()):
            with (
                contextlib.suppress(OSError),
                open(f"/proc/{number}/maps", encoding="utf-8", errors="replace") as file,
            ):
                for line in file:
                    self._take(line.rstrip("\n"))

    def _take(self, line: str) -> None:
        fields = line.split(None, 5)
        path = fields[5] if len(fields) == 6 else ""
        if ".so" not in path:
            return
        if path.startswith(f"{self._tree}/"):
            self._mapped[path] = int(fields[4])
        elif path.startswith(self._others) and not path.startswith(
            f"{os.path.realpath(self._arm.layout.root)}/"
        ):
            self._strange.add(path)

    def libraries(
        self, stamped: Mapping[str, str], hashes: dict[tuple[str, int, int, int], str]
    ) -> dict[str, str]:
        """Return the SHA-256 of each compiled file of the arm's tree that was loaded, by its path
        in the tree. `hashes` are kept for the next start.

        Raises BuildError where none was, where one is not what the build stamped, and where one of
        another tree was loaded.
        """
        name, hint = (
            self._arm.shown,
            f"rm -rf {self._arm.shown}    and the same command again builds it anew",
        )
        if self._strange:
            raise BuildError(
                f"a process of {name} has loaded {sorted(self._strange)[0]}, which is another"
                " tree's",
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
            found[inside] = _digest(Path(path), inode, hashes)
            if found[inside] is None or found[inside] != stamped.get(inside, found[inside]):
                raise BuildError(
                    f"{inside} of {name} is not what was built: it was replaced while it was"
                    " measured, or before",
                    hint=hint,
                )
        return {path: digest for path, digest in sorted(found.items()) if digest}


def _digest(path: Path, inode: int, hashes: dict[tuple[str, int, int, int], str]) -> str | None:
    """The digest of a file that is mapped; None where another file has its name by now."""
    try:
        there = path.stat()
        if there.st_ino != inode:
            return None
        key = (str(path), there.st_ino, there.st_size, there.st_mtime_ns)
        if key not in hashes:
            hashes[key] = sha256(path)
        return hashes[key]
    except OSError:
        return None


def require_own(arm: Sandbox, environment: Mapping[str, str]) -> Path:
    """Return the file of the vLLM that a process of the arm imports. Raises BuildError where that
    is not in its tree.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as neutral:
        done = process.capture(
            [arm.layout.environment_python, arm.layout.probes / "imports.py", "origin"],
            env=environment,
            cwd=Path(neutral),
            timeout_s=_ASK_TIMEOUT_S,
        )
    try:
        origin = json.loads(done.stdout)["vllm"]
    except (ValueError, KeyError, TypeError):
        origin = None
    if not isinstance(origin, str) or not Path(origin).resolve().is_relative_to(
        arm.layout.vllm.resolve()
    ):
        raise BuildError(
            f"{arm.shown} imports vllm from {origin or 'nowhere'}, not from its own tree",
            hint=f"rm -rf {arm.shown}    and the same command again",
        )
    return Path(origin)
