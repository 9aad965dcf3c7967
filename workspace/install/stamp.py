"""Stamps: the inputs and the outcome of a layer of the built environment.

A stamp lies inside `.vllm`. It is deleted before the layer is changed and written after the layer
was verified. A layer is stale where the recorded inputs differ from today's.
"""

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from workspace.core.files import read_regular, write_atomic

SCHEMA = 1
_SHA256 = re.compile("[0-9a-f]{64}")
# The first edition's name for the precompiled wheel.
_FORMER_NAME = "donor"
_FORMER_ORIGIN = re.compile(f"(hybrid )?{_FORMER_NAME} (.+)", re.DOTALL)


@dataclass(frozen=True)
class Library:
    """A compiled library of the tree: path below the tree, bytes, SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Stamp:
    """The record of one layer: its `inputs` and its `outcome`; all values are text.

    `files` has `mode oid` by path for each input that is a digest over files. It explains what
    changed and decides nothing.
    """

    inputs: Mapping[str, str]
    outcome: Mapping[str, str] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)
    libraries: tuple[Library, ...] = ()
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def read(path: Path) -> Stamp | None:
    """Return the stamp, or None where no valid stamp exists: a damaged stamp proves nothing."""
    try:
        record = json.loads(read_regular(path))
        if (
            type(record["schema"]) is not int
            or record["schema"] != SCHEMA
            or not isinstance(record["libraries"], list)
        ):
            return None
        mappings = {name: record[name] for name in ("inputs", "outcome", "packages")}
        # Stamps of the first edition have no files.
        files = record.get("files", {})
        if not all(
            _is_text(text)
            for mapping in (*mappings.values(), *files.values())
            for pair in mapping.items()
            for text in pair
        ):
            return None
        libraries = tuple(Library(**item) for item in record["libraries"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if origin := _FORMER_ORIGIN.match(mappings["inputs"].get("origin", "")):
        mappings["inputs"]["origin"] = f"{origin[1] or ''}precompiled {origin[2]}"
    return (
        Stamp(libraries=libraries, files=files, **mappings)
        if all(_is_library(library) for library in libraries)
        else None
    )


def _is_text(value: object) -> bool:
    """Return whether the value is text without NUL and without half a surrogate pair.

    JSON can contain such a half; file systems and terminals refuse it.
    """
    return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)


def _is_library(library: Library) -> bool:
    place = PurePosixPath(library.path) if _is_text(library.path) else PurePosixPath("/")
    is_below = not place.is_absolute() and ".." not in place.parts and len(place.parts) > 0
    return (
        is_below
        and type(library.size) is int
        and library.size >= 0
        and _is_text(library.sha256)
        and bool(_SHA256.fullmatch(library.sha256))
    )


def write(path: Path, stamp: Stamp) -> None:
    """Write the stamp of a layer that the caller has verified.

    A stamp must not survive a power cut that its layer does not survive. uv, git and compilers do
    not sync, so everything is synced first.
    """
    os.sync()
    record = {"schema": SCHEMA, **asdict(stamp)}
    write_atomic(path, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


def withdraw(path: Path) -> None:
    """Delete a stamp before its layer is changed; a missing environment has no stamp."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.unlink()
