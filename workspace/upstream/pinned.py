"""The pin's own tree beside the working one, for the tests that fail: those that fail there too say nothing of the change.

It has the pin's Python and tests and the working tree's compiled libraries; where compiled sources differ, that is no pin, and nothing is compared.
Which of its tests ask the hub is kept: there are hundreds of them, and seconds pass in each until it gives up.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from workspace.build.plan import COMPILED_SOURCES
from workspace.core.files import write_atomic
from workspace.core.layout import Layout
from workspace.source.git import Git, copy, worktree
from workspace.upstream.needs import place
from workspace.upstream.trial import Outcome

# Beyond this the whole files are run: pytest nests an expression once for each word of it.
_MOST_NAMES = 200
_HUB_TESTS = "hub.json"


def is_comparable(changed: Sequence[str]) -> bool:
    """Whether the compiled libraries are what the pin would have."""
    return not any(path == source or path.startswith(f"{source}/") for path in changed for source in COMPILED_SOURCES)


@contextlib.contextmanager
def tree(layout: Layout, base: str) -> Iterator[Path]:
    """Write the tree of the commit `base` out, with what a build left in the working tree; it is gone with the block."""
    folder = place(layout) / "pin"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        git = Git(layout.vllm)
        copy.write(git, base, folder)
        for path in worktree.products(git, "vllm"):
            target = folder / path
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(os.path.realpath(layout.vllm / path))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def hub_tests(layout: Layout, base: str) -> frozenset[str]:
    """The tests that were seen to ask the hub on the pin `base`; none where nothing, or something unreadable, was kept."""
    try:
        kept = json.loads((place(layout) / _HUB_TESTS).read_bytes())
        return frozenset(kept["tests"]) if kept["pin"] == base else frozenset()
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


def keep_hub_tests(layout: Layout, base: str, on_the_pin: Sequence[Outcome]) -> None:
    """Add to the tests that are known to ask the hub on the pin `base`; those of another are forgotten."""
    former = hub_tests(layout, base)
    if more := {one.node for one in on_the_pin if one.asks_hub} - former:
        write_atomic(place(layout) / _HUB_TESTS, f"{json.dumps({'pin': base, 'tests': sorted(former | more)}, indent=1)}\n".encode())


def again(failed: Sequence[Outcome], folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which files to run again, and pytest's words that choose the tests in them. By name, as a node that is not there would end the run."""
    files = tuple(dict.fromkeys(one.file for one in failed if (folder / one.file).is_file()))
    names = tuple(dict.fromkeys(_function(one) for one in failed))
    is_by_name = len(names) <= _MOST_NAMES and all(name.isidentifier() for name in names)
    return files, ("-k", " or ".join(names)) if is_by_name else ()


def _function(outcome: Outcome) -> str:
    """The name of a test's function, nothing for a file that could not be collected."""
    return outcome.node.removeprefix(outcome.file).partition("[")[0].rpartition("::")[2]
