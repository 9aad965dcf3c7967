"""Compiled libraries from a wheel: the pinned donor or a wheel of the user's.

The wheel gives its libraries only; every Python file is the tree's own. The tree's setup.py takes them out
(VLLM_USE_PRECOMPILED); here the wheel is fetched, and afterwards each library is held against it.
"""

import json
import platform
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.build import stamp
from workspace.core.errors import BuildError, SourceError
from workspace.core.files import write_atomic
from workspace.core.settings import Settings
from workspace.source import index
from workspace.source.pins import Pin

_BINARIES = ("vllm/vllm-rs",)
SCHEMA = 1
RECORD = "workspace.json"
# Of what a wheel says of itself; a release with DeepGEMM for each Python has 20 libraries and 4 KB.
_LONGEST = 1 << 20


@dataclass(frozen=True)
class Kernels:
    """Where compiled libraries come from: a pinned donor, a wheel file, a compiler, or a donor but for what differs from the pin (hybrid)."""

    kind: Literal["donor", "hybrid", "wheel", "native"]
    origin: str
    wheel: Path | None = None


@dataclass(frozen=True)
class Packed:
    """What a wheel says of itself. `python` is the only version that it is for, empty where it is for each; `dirty` a digest of what was edited."""

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
    libraries: tuple[stamp.Library, ...]
    cubins: Mapping[str, tuple[str, ...]]


def fetch(kernels: Kernels, pin: Pin, device: str, settings: Settings, *, on_progress: Callable[[int, int | None], None]) -> Path:
    """Return the wheel on disk, proven by its pinned hash. Raises SourceError where the pin has no donor for this machine."""
    if kernels.kind == "wheel":
        if kernels.wheel is None or not kernels.wheel.is_file():
            raise SourceError(f"the wheel that the kernels came from is gone: {kernels.wheel}", hint="./scripts/inv bootstrap --kernels donor")
        return kernels.wheel
    key = f"{device}-{platform.machine()}"
    donor = pin.donors.get(key)
    if donor is None:
        raise SourceError(
            f"vendor/pins.toml names no donor for {key}: it has {', '.join(sorted(pin.donors)) or 'none'}",
            hint="./scripts/inv bootstrap --kernels native",
        )
    return index.fetch(donor.project, donor.filename, donor.sha256, settings=settings, on_progress=on_progress)


def read_packed(path: Path) -> Packed | None:
    """Return what a wheel of `pack` says of itself, None for a wheel of somebody else's. Raises SourceError for what is no whole wheel."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = [item for item in archive.infolist() if item.filename.endswith(f".dist-info/{RECORD}")]
            if not found:
                return None
            if found[0].file_size > _LONGEST:
                raise ValueError(f"{found[0].filename} has {found[0].file_size} bytes")
            record = json.loads(archive.read(found[0]))
        if record.pop("schema") != SCHEMA:
            raise SourceError(f"{path.name} was packed by another version of the workspace", hint="pack it again: ./scripts/inv wheel")
        libraries = tuple(stamp.Library(**library) for library in record.pop("libraries"))
        held = {str(name): tuple(map(str, archs)) for name, archs in record.pop("cubins").items()}
        inputs = {str(name): str(text) for name, text in record.pop("inputs").items()}
        return Packed(**{name: str(text) for name, text in record.items()}, inputs=inputs, libraries=libraries, cubins=held)
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise SourceError(f"{path.name} is no whole wheel: {exc}", hint="copy it again, or pack it again where it comes from: ./scripts/inv wheel") from exc


def compiled_members(wheel: Path) -> dict[str, tuple[int, int]]:
    """Map each compiled file of the wheel to its bytes and CRC-32. Raises SourceError for a file that is no wheel of vLLM."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = {item.filename: (item.file_size, item.CRC) for item in archive.infolist() if item.filename.startswith("vllm/")}
    except (zipfile.BadZipFile, OSError) as exc:
        raise SourceError(f"{wheel.name} is not a wheel that can be read: {exc}", hint="./scripts/inv bootstrap --kernels donor") from exc
    compiled = {name: fact for name, fact in members.items() if name.endswith(".so") or name in _BINARIES}
    if not compiled:
        raise SourceError(f"{wheel.name} holds no compiled library of vLLM", hint="./scripts/inv bootstrap --kernels donor")
    return compiled


def complete(wheel: Path, tree: Path) -> None:
    """Take those compiled files out of the wheel that the tree's setup.py has left in it, as a release of before a mend does."""
    left = [name for name, (size, crc) in compiled_members(wheel).items() if not _is(tree / name, size, crc)]
    with zipfile.ZipFile(wheel) as archive:
        for name in left:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(tree / name, archive.read(name), mode=0o755)


def check_taken(wheel: Path, tree: Path) -> None:
    """Hold every library in the tree against the wheel, byte count and CRC-32. Raises BuildError naming what was left behind."""
    wrong = [name for name, (size, crc) in compiled_members(wheel).items() if not _is(tree / name, size, crc)]
    if wrong:
        raise BuildError(
            f"the tree's setup.py did not take {', '.join(wrong)} out of {wheel.name}",
            hint="its list of precompiled members lacks them: see patches/vllm for the patch that mends 0.31.0, and `./scripts/inv status`",
        )


def _is(path: Path, size: int, crc: int) -> bool:
    try:
        if path.stat().st_size != size:
            return False
        found = 0
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                found = zlib.crc32(chunk, found)
    except OSError:
        return False
    return found == crc
