"""The pin's own tree beside the working tree: tests that fail there too are not the change's fault.

It has the pin's Python files and tests, and the working tree's compiled libraries. If compiled
sources differ, no comparison is possible. The module remembers which of the pin's tests ask the
hub: there are hundreds, and each takes seconds until it gives up. It also installs the test
requirements.
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
# With more names whole files run: pytest nests an expression once for each name.
_MOST_NAMES = 200
_HUB_TESTS = "hub.json"


def needs_folder(layout: Layout) -> Path:
    """Return the folder for all files of upstream's tests except their record."""
    return layout.state / "upstream-tests"


def install_needs(
    layout: Layout, settings: Settings, known: Rules, *, device: str, run_log: RunLog
) -> tuple[Path, str]:
    """Return the folder of test requirements for PYTHONPATH, and a note about it.

    An existing folder is used without asking an index. Raises SourceError if the index cannot be
    reached or lacks a version, and BuildError.
    """
    installed = interpreter.installed(layout)
    wanted = [name for name in known.requirements if name not in installed]
    pinned = _pinned(layout.vllm, device)
    versions = [f"{name}=={version}" for name, version in installed.items()]
    lines = [*wanted, "", *pinned, "", *versions, str(interpreter.site_packages(layout))]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    folder = needs_folder(layout) / f"site-{digest[:12]}"
    if folder.is_dir():
        return folder, f"{len(wanted)} test requirements are installed"
    # Delete old folders last: without an index, a tree that goes back still needs its own.
    former = [found for found in needs_folder(layout).glob("site-*") if found.suffix != ".new"]
    new = folder.with_name(f"{folder.name}.new")
    for half_made in needs_folder(layout).glob("site-*.new"):
        shutil.rmtree(half_made)
    new.mkdir(parents=True)
    if wanted:
        interpreter.install(
            layout,
            settings,
            ["--target", str(new), *wanted],
            run_log=run_log,
            constraints=pinned,
            overrides=tuple(f"{name} ; {_NEVER}" for name in installed),
        )
    # uv does not sync: after a power cut, empty files would have their final name.
    os.sync()
    new.rename(folder)
    for old in former:
        shutil.rmtree(old)
    return folder, f"{', '.join(wanted)} in {layout.relative(folder)}"


def _pinned(tree: Path, device: str) -> tuple[str, ...]:
    """Return the exact versions that the tree tests with on this device.

    Without a list for it (vLLM 0.24), those for a GPU.
    """
    for name in (device, "cuda"):
        file = tree / "requirements" / "test" / f"{name}.txt"
        if file.is_file():
            return tuple(_PINNED.findall(file.read_text(encoding="utf-8")))
    return ()


def is_comparable(changed: Sequence[str]) -> bool:
    """Return whether the pin would have the same compiled libraries."""
    return not any(
        path == source or path.startswith(f"{source}/")
        for path in changed
        for source in COMPILED_SOURCES
    )


@contextlib.contextmanager
def tree(layout: Layout, base: str) -> Iterator[Path]:
    """Write out the tree of the commit `base`, with links to the working tree's build products.

    It is deleted at the end of the block.
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
    """Return the tests that asked the hub on the pin `base`; empty if unknown or unreadable."""
    try:
        kept = json.loads((needs_folder(layout) / _HUB_TESTS).read_bytes())
        return frozenset(kept["tests"]) if kept["pin"] == base else frozenset()
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


def keep_hub_tests(layout: Layout, base: str, on_the_pin: Sequence[Outcome]) -> None:
    """Add to the known tests that ask the hub on the pin `base`; forget those of another pin."""
    former = hub_tests(layout, base)
    if more := {outcome.node for outcome in on_the_pin if outcome.asks_hub} - former:
        write_atomic(
            needs_folder(layout) / _HUB_TESTS,
            f"{json.dumps({'pin': base, 'tests': sorted(former | more)}, indent=1)}\n".encode(),
        )


def again(failed: Sequence[Outcome], folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the files to run again, and pytest's arguments that select the tests in them.

    Tests are selected by name, because a node that does not exist would end the run.
    """
    files = tuple(
        dict.fromkeys(outcome.file for outcome in failed if (folder / outcome.file).is_file())
    )
    names = tuple(dict.fromkeys(_function(outcome) for outcome in failed))
    is_by_name = len(names) <= _MOST_NAMES and all(name.isidentifier() for name in names)
    return files, ("-k", " or ".join(names)) if is_by_name else ()


def _function(outcome: Outcome) -> str:
    """Return the name of a test's function, empty for a file that could not be collected."""
    return outcome.node.removeprefix(outcome.file).partition("[")[0].rpartition("::")[2]
