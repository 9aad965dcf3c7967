"""Stamps: the inputs and the outcome of a layer of the built environment.

A stamp lies inside `.vllm`. It is deleted before the layer is changed and written after the layer
was verified. A layer is stale where the recorded inputs differ from today's.
"""

import contextlib
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from workspace.core import hints, records
from workspace.core.errors import SourceError
from workspace.core.records import DecodeError, Document
from workspace.install import precompiled
from workspace.install.precompiled import DAMAGED, KernelSource
from workspace.repo.pins import SHA256

# The record in a wheel of `inv wheel`.
RECORD = "workspace.json"
# Bytes of workspace.json: for a release with DeepGEMM for each Python, 20 libraries take 4 KB.
_LONGEST = 1 << 20
# In the outcome of an environment for the CPU: no driver answered when it was made.
DRIVER, AWAY = "driver", "away"


@dataclass(frozen=True)
class Library:
    """A compiled library of the tree: path below the tree, bytes, SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Stamp(records.Record, schema=1):
    """The record of one layer: its `inputs` and its `outcome`, whose values are text.

    `kernels` is the source of compiled libraries, another input.
    `files` has `mode oid` by path for each input that is a digest over files. It explains what
    changed and decides nothing.
    """

    inputs: Mapping[str, str]
    outcome: Mapping[str, str] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)
    libraries: tuple[Library, ...] = ()
    kernels: KernelSource | None = None
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @classmethod
    def upgrade(cls, document: Document) -> Document:
        # Stamps of the first edition have no files.
        if missing := {"outcome", "packages", "libraries"} - document.keys():
            raise DecodeError(f"it lacks {' and '.join(sorted(missing))}")
        return precompiled.upgraded(document)

    def validate(self) -> None:
        mappings = (self.inputs, self.outcome, self.packages, *self.files.values())
        texts = (text for mapping in mappings for pair in mapping.items() for text in pair)
        if not all(map(_is_text, texts)) or not all(map(_is_library, self.libraries)):
            raise DecodeError("it has a text or a library that no stamp has")


@dataclass(frozen=True)
class Packed(records.Record, schema=1):
    """The record workspace.json in a wheel of `inv wheel`.

    `python` is its only Python version, empty for any; `dirty` is a digest of the edits.
    """

    version: str
    tag: str
    commit: str
    tree: str
    dirty: str
    device: str
    machine: str
    python: str
    torch: str
    digest: str
    inputs: Mapping[str, str]
    libraries: tuple[Library, ...]
    cubins: Mapping[str, tuple[str, ...]]


def read(path: Path) -> Stamp | None:
    """Return the stamp, or None where no valid stamp exists: a damaged stamp proves nothing."""
    return records.read(path, Stamp)


def _is_text(value: str) -> bool:
    """Return whether the value is text without NUL and without half a surrogate pair.

    JSON can contain such a half; file systems and terminals refuse it.
    """
    return not re.search("[\0\ud800-\udfff]", value)


def _is_library(library: Library) -> bool:
    place = PurePosixPath(library.path) if _is_text(library.path) else PurePosixPath("/")
    is_below = not place.is_absolute() and ".." not in place.parts and len(place.parts) > 0
    return is_below and library.size >= 0 and bool(SHA256.fullmatch(library.sha256))


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


def read_packed(path: Path) -> Packed | None:
    """Return the record of a wheel of `inv wheel`, None for any other wheel.

    Raises SourceError for a damaged wheel.
    """
    try:
        return _decode_packed(path)
    except DAMAGED as exc:
        raise SourceError(
            f"{path.name} is not a complete wheel: {exc}",
            hint=hints.text("install.copy_or_pack"),
        ) from exc


def _decode_packed(path: Path) -> Packed | None:
    with zipfile.ZipFile(path) as archive:
        found = [
            item for item in archive.infolist() if item.filename.endswith(f".dist-info/{RECORD}")
        ]
        if not found:
            return None
        if found[0].file_size > _LONGEST:
            raise ValueError(f"{found[0].filename} has {found[0].file_size} bytes")
        content = archive.read(found[0])
    try:
        return records.decode(content, Packed)
    except records.NewerSchema as exc:
        raise SourceError(
            f"{path.name} was packed by another version of the workspace",
            hint=hints.text("install.pack_again"),
        ) from exc
