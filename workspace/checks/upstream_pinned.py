"""The pin's own tree beside the working one, for the tests that fail: those that fail there too say
nothing of the change.

It has the pin's Python and tests and the working tree's compiled libraries; where compiled sources
differ, that is no pin, and nothing is compared. Which of its tests ask the hub is kept: there are
hundreds of them, and seconds pass in each until it gives up.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from workspace.checks.upstream_selection import Rules
from workspace.checks.upstream_trial import Outcome
from workspace.core.files import write_atomic
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install.plan import COMPILED_SOURCES
from workspace.machine import interpreter
from workspace.repo.git import Git, remotes, worktree

_PINNED = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+$", re.MULTILINE)
_NEVER = 'sys_platform == "never"'


def needs_folder(layout: Layout) -> Path:
    """Where all that belongs to upstream's tests lies, but for their record."""
    return layout.state / "upstream-tests"


def install_needs(
    layout: Layout, settings: Settings, known: Rules, *, device: str, run_log: RunLog
) -> tuple[Path, str]:
    """Return the folder for PYTHONPATH, and a word on it. Where it is there nothing is installed,
    and no index is asked.

    Raises SourceError where the index cannot be reached or lacks a version, and BuildError.
    """
    there = interpreter.installed(layout)
    wanted = [name for name in known.requirements if name not in there]
    pinned = _pinned(layout.vllm, device)
    said = "\n".join(
        [
            *wanted,
            "",
            *pinned,
            "",
            *(f"{name}=={version}" for name, version in there.items()),
            str(interpreter.site_packages(layout)),
        ]
    )
    folder = needs_folder(layout) / f"site-{hashlib.sha256(said.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder, f"{len(wanted)} test requirements are there"
    # Without an index, the former ones are what a tree that goes back still needs.
    former = [found for found in needs_folder(layout).glob("site-*") if found.suffix != ".new"]
    new = folder.with_name(f"{folder.name}.new")
    for half_made in needs_folder(layout).glob("site-*.new"):
        shutil.rmtree(half_made)
    new.mkdir(parents=True)
    barred = tuple(f"{name} ; {_NEVER}" for name in there)
    if wanted:
        interpreter.install(
            layout,
            settings,
            ["--target", str(new), *wanted],
            run_log=run_log,
            constraints=pinned,
            overrides=barred,
        )
    # uv syncs nothing; after a power cut the name would stand over empty files.
    os.sync()
    new.rename(folder)
    for old in former:
        shutil.rmtree(old)
    return folder, f"{', '.join(wanted)} in {layout.relative(folder)}"


def _pinned(tree: Path, device: str) -> tuple[str, ...]:
    """The exact versions that the tree tests with on this device, or on a GPU where it has no list
    for it (0.24).
    """
    for name in (device, "cuda"):
        file = tree / "requirements" / "test" / f"{name}.txt"
        if file.is_file():
            return tuple(_PINNED.findall(file.read_text(encoding="utf-8")))
    return ()


# Beyond this the whole files are run: pytest nests an expression once for each word of it.
_MOST_NAMES = 200
_HUB_TESTS = "hub.json"


def is_comparable(changed: Sequence[str]) -> bool:
    """Whether the compiled libraries are what the pin would have."""
    return not any(
        path == source or path.startswith(f"{source}/")
        for path in changed
        for source in COMPILED_SOURCES
    )


@contextlib.contextmanager
def tree(layout: Layout, base: str) -> Iterator[Path]:
    """Write the tree of the commit `base` out, with what a build left in the working tree; it is
    gone with the block.
    """
    folder = needs_folder(layout) / "pin"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        git = Git(layout.vllm)
        remotes.write_tree(git, base, folder)
        for path in worktree.products(git, "vllm"):
            target = folder / path
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(os.path.realpath(layout.vllm / path))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def hub_tests(layout: Layout, base: str) -> frozenset[str]:
    """The tests that were seen to ask the hub on the pin `base`; none where nothing, or something
    unreadable, was kept.
    """
    try:
        kept = json.loads((needs_folder(layout) / _HUB_TESTS).read_bytes())
        return frozenset(kept["tests"]) if kept["pin"] == base else frozenset()
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


def keep_hub_tests(layout: Layout, base: str, on_the_pin: Sequence[Outcome]) -> None:
    """Add to the tests that are known to ask the hub on the pin `base`; those of another are
    forgotten.
    """
    former = hub_tests(layout, base)
    if more := {one.node for one in on_the_pin if one.asks_hub} - former:
        write_atomic(
            needs_folder(layout) / _HUB_TESTS,
            f"{json.dumps({'pin': base, 'tests': sorted(former | more)}, indent=1)}\n".encode(),
        )


def again(failed: Sequence[Outcome], folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which files to run again, and pytest's words that choose the tests in them. By name, as a
    node that is not there would end the run.
    """
    files = tuple(dict.fromkeys(one.file for one in failed if (folder / one.file).is_file()))
    names = tuple(dict.fromkeys(_function(one) for one in failed))
    is_by_name = len(names) <= _MOST_NAMES and all(name.isidentifier() for name in names)
    return files, ("-k", " or ".join(names)) if is_by_name else ()


def _function(outcome: Outcome) -> str:
    """The name of a test's function, nothing for a file that could not be collected."""
    return outcome.node.removeprefix(outcome.file).partition("[")[0].rpartition("::")[2]
