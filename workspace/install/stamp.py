"""Stamps: the inputs and the outcome of a layer of the built environment.

A stamp lies inside `.vllm`. It is deleted before the layer is changed and written after the layer
was verified. A layer is stale where the recorded inputs differ from today's.
"""

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from workspace.core import records
from workspace.core.records import DecodeError, Document

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
class Stamp(records.Record, schema=1):
    """The record of one layer: its `inputs` and its `outcome`; all values are text.

    `files` has `mode oid` by path for each input that is a digest over files. It explains what
    changed and decides nothing.
    """

    inputs: Mapping[str, str]
    outcome: Mapping[str, str] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)
    libraries: tuple[Library, ...] = ()
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @classmethod
    def upgrade(cls, document: Document) -> Document:
        # Stamps of the first edition have no files.
        if missing := {"outcome", "packages", "libraries"} - document.keys():
            raise DecodeError(f"it lacks {' and '.join(sorted(missing))}")
        return document

    def validate(self) -> None:
        mappings = (self.inputs, self.outcome, self.packages, *self.files.values())
        texts = (text for mapping in mappings for pair in mapping.items() for text in pair)
        if not all(map(_is_text, texts)) or not all(map(_is_library, self.libraries)):
            raise DecodeError("it has a text or a library that no stamp has")


def read(path: Path) -> Stamp | None:
    """Return the stamp, or None where no valid stamp exists: a damaged stamp proves nothing."""
    stamp = records.read(path, Stamp)
    if stamp and (origin := _FORMER_ORIGIN.match(stamp.inputs.get("origin", ""))):
        inputs = {**stamp.inputs, "origin": f"{origin[1] or ''}precompiled {origin[2]}"}
        return replace(stamp, inputs=inputs)
    return stamp


def _is_text(value: str) -> bool:
    """Return whether the value is text without NUL and without half a surrogate pair.

    JSON can contain such a half; file systems and terminals refuse it.
    """
    return not re.search("[\0\ud800-\udfff]", value)


def _is_library(library: Library) -> bool:
    place = PurePosixPath(library.path) if _is_text(library.path) else PurePosixPath("/")
    is_below = not place.is_absolute() and ".." not in place.parts and len(place.parts) > 0
    return is_below and library.size >= 0 and bool(_SHA256.fullmatch(library.sha256))


def write(path: Path, stamp: Stamp) -> None:
    """Write the stamp of a layer that the caller has verified.

    A stamp must not survive a power cut that its layer does not survive. uv, git and compilers do
    not sync, so everything is synced first.
    """
    os.sync()
    records.write(path, stamp)


def withdraw(path: Path) -> None:
    """Delete a stamp before its layer is changed; a missing environment has no stamp."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.unlink()
