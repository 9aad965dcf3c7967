"""A change in several steps that is only ever finished, never undone: what ended it, the next verb goes on with it.

The marker says what is to be done and which steps are; each step bears being begun again.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.core.errors import WorkspaceError
from workspace.core.files import read_regular, write_atomic

Act = Callable[[Mapping[str, str]], None]


@dataclass(frozen=True)
class Marker:
    """The file of one change: the `facts` that were true when it began, and the names of the finished steps."""

    path: Path
    facts: Mapping[str, str]
    done: tuple[str, ...] = ()

    def write(self) -> "Marker":
        write_atomic(self.path, json.dumps({"facts": dict(self.facts), "done": self.done}, indent=1).encode())
        return self


def find(path: Path) -> Marker | None:
    """Return what is under way, None where nothing is. Raises WorkspaceError for a marker that is damaged."""
    try:
        record = json.loads(read_regular(path))
        return Marker(path, {str(name): str(text) for name, text in record["facts"].items()}, tuple(map(str, record["done"])))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise WorkspaceError(f"{path} says what is under way and cannot be read: {exc}", hint=f"cat {path}; git log --all --oneline -9") from exc


def finish(marker: Marker, steps: Sequence[tuple[str, Act]]) -> None:
    """Do the steps that are not done yet, in order. The marker stays: whoever is content removes it."""
    for name, act in steps:
        if name not in marker.done:
            act(marker.facts)
            # The marker is: after a power cut it must not speak of files that are not.
            os.sync()
            marker = Marker(marker.path, marker.facts, (*marker.done, name)).write()
