"""Stamps: the inputs and the outcome of a layer of the built environment.

A stamp lies inside `.vllm`. It is deleted before the layer is changed and written after the layer
was verified. A layer is stale where the recorded inputs differ from today's.
"""

import contextlib
import json
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from workspace.core.errors import SourceError
from workspace.core.files import read_regular, write_atomic
from workspace.install import precompiled
from workspace.install.precompiled import DAMAGED, KernelSource

SCHEMA = 1
# The record in a wheel of `inv wheel`, and the version of its form.
RECORD = "workspace.json"
RECORD_SCHEMA = 1
# Bytes of workspace.json: for a release with DeepGEMM for each Python, 20 libraries take 4 KB.
_LONGEST = 1 << 20
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Library:
    """A compiled library of the tree: path below the tree, bytes, SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Stamp:
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


@dataclass(frozen=True)
class Packed:
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
    try:
        record = json.loads(read_regular(path))
        record.update(precompiled.upgraded(record))
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
        source = record.get("kernels")
        kernels = None if source is None else KernelSource(**source)
        libraries = tuple(Library(**item) for item in record["libraries"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return (
        Stamp(libraries=libraries, kernels=kernels, files=files, **mappings)
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


def read_packed(path: Path) -> Packed | None:
    """Return the record of a wheel of `inv wheel`, None for any other wheel.

    Raises SourceError for a damaged wheel.
    """
    try:
        return _decode_packed(path)
    except (*DAMAGED, KeyError, TypeError, AttributeError) as exc:
        raise SourceError(
            f"{path.name} is not a complete wheel: {exc}",
            hint="copy it again, or pack it again where it comes from: ./scripts/inv wheel",
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
        record = json.loads(archive.read(found[0]))
    if record.pop("schema") != RECORD_SCHEMA:
        raise SourceError(
            f"{path.name} was packed by another version of the workspace",
            hint="pack it again: ./scripts/inv wheel",
        )
    libraries = tuple(Library(**library) for library in record.pop("libraries"))
    cubins = {str(name): tuple(map(str, archs)) for name, archs in record.pop("cubins").items()}
    inputs = {str(name): str(text) for name, text in record.pop("inputs").items()}
    return Packed(
        **{name: str(text) for name, text in record.items()},
        inputs=inputs,
        libraries=libraries,
        cubins=cubins,
    )
