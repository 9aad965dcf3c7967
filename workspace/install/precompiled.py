"""Compiled libraries from a wheel: the pinned precompiled wheel or a wheel of the user's.

The wheel provides only its libraries; every Python file is the tree's own. This module fetches the
wheel, decides whether its libraries fit, and compares them after the tree's setup.py took them
(VLLM_USE_PRECOMPILED).
"""

import json
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from workspace.core.errors import BuildError, SettingsError, SourceError
from workspace.core.files import write_atomic
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import stamp
from workspace.machine.arch import parse
from workspace.repo import index, pins
from workspace.repo.pins import Pin

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.version import Version

_BINARIES = ("vllm/vllm-rs",)
SCHEMA = 1
RECORD = "workspace.json"
# Bytes of workspace.json: for a release with DeepGEMM for each Python, 20 libraries take 4 KB.
_LONGEST = 1 << 20
# A damaged archive raises various errors: zlib.error, RuntimeError where it claims encryption,
# NotImplementedError for an unknown compression method.
_DAMAGED = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Kernels:
    """The origin of compiled libraries: the pinned precompiled wheel, a wheel file, or a compiler.

    `hybrid` is the precompiled wheel, with a compiler for what differs from the pin.
    """

    kind: Literal["precompiled", "hybrid", "wheel", "native"]
    origin: str
    wheel: Path | None = None


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
    libraries: tuple[stamp.Library, ...]
    cubins: Mapping[str, tuple[str, ...]]


def fetch_wheel(
    kernels: Kernels,
    pin: Pin,
    device: str,
    settings: Settings,
    *,
    on_progress: Callable[[int, int | None], None],
) -> Path:
    """Return the path of the wheel, verified by its pinned hash.

    Raises SourceError where the pin has no precompiled wheel for this machine.
    """
    if kernels.kind == "wheel":
        if kernels.wheel is None or not kernels.wheel.is_file():
            raise SourceError(
                f"the wheel of the installed kernels does not exist any more: {kernels.wheel}",
                hint="./scripts/inv bootstrap --kernels precompiled",
            )
        return kernels.wheel
    precompiled_wheel = pin.precompiled_for(device)
    if precompiled_wheel is None:
        raise SourceError(
            f"vendor/pins.toml names no precompiled wheel for {pins.precompiled_key(device)}:"
            f" it has {', '.join(sorted(pin.precompiled)) or 'none'}",
            hint="./scripts/inv bootstrap --kernels native",
        )
    return index.fetch(
        precompiled_wheel.project,
        precompiled_wheel.filename,
        precompiled_wheel.sha256,
        settings=settings,
        on_progress=on_progress,
    )


def read_packed(path: Path) -> Packed | None:
    """Return the record of a wheel of `inv wheel`, None for any other wheel.

    Raises SourceError for a damaged wheel.
    """
    try:
        return _decode_packed(path)
    except (*_DAMAGED, KeyError, TypeError, AttributeError) as exc:
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
    if record.pop("schema") != SCHEMA:
        raise SourceError(
            f"{path.name} was packed by another version of the workspace",
            hint="pack it again: ./scripts/inv wheel",
        )
    libraries = tuple(stamp.Library(**library) for library in record.pop("libraries"))
    cubins = {str(name): tuple(map(str, archs)) for name, archs in record.pop("cubins").items()}
    inputs = {str(name): str(text) for name, text in record.pop("inputs").items()}
    return Packed(
        **{name: str(text) for name, text in record.items()},
        inputs=inputs,
        libraries=libraries,
        cubins=cubins,
    )


def compiled_members(wheel: Path) -> dict[str, tuple[int, int]]:
    """Map each compiled file of the wheel to its bytes and CRC-32.

    Raises SourceError for a file that is not a wheel of vLLM.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = {
                item.filename: (item.file_size, item.CRC)
                for item in archive.infolist()
                if item.filename.startswith("vllm/")
            }
    except (zipfile.BadZipFile, OSError) as exc:
        raise SourceError(
            f"{wheel.name} cannot be read as a wheel: {exc}",
            hint="./scripts/inv bootstrap --kernels precompiled",
        ) from exc
    compiled = {
        name: fact for name, fact in members.items() if name.endswith(".so") or name in _BINARIES
    }
    if not compiled:
        raise SourceError(
            f"{wheel.name} holds no compiled library of vLLM",
            hint="./scripts/inv bootstrap --kernels precompiled",
        )
    return compiled


def complete(wheel: Path, tree: Path) -> None:
    """Extract the compiled files that the tree's setup.py left in the wheel.

    The setup.py of a release without the fix in patches/vllm leaves some.
    """
    left = [
        name
        for name, (size, crc) in compiled_members(wheel).items()
        if not _has_content(tree / name, size, crc)
    ]
    with zipfile.ZipFile(wheel) as archive:
        for name in left:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(tree / name, archive.read(name), mode=0o755)


def check_taken(wheel: Path, tree: Path) -> None:
    """Compare every library in the tree with the wheel, by size and CRC-32.

    Raises BuildError with the names of the libraries that differ or are missing.
    """
    wrong = [
        name
        for name, (size, crc) in compiled_members(wheel).items()
        if not _has_content(tree / name, size, crc)
    ]
    if wrong:
        raise BuildError(
            f"the tree's setup.py did not take {', '.join(wrong)} out of {wheel.name}",
            hint=(
                "its list of precompiled members lacks them: see patches/vllm for the patch that"
                " fixes 0.31.0, and `./scripts/inv status`"
            ),
        )


def _has_content(path: Path, size: int, crc: int) -> bool:
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


# METADATA of vLLM has 12 kB; a longer file is not METADATA.
_LONGEST_HEADER = 1 << 20
# The targets of define_extension_target link only against the C shim of this torch version, and so
# fit every later version (CMakeLists.txt).
_STABLE = re.compile(
    r"target_compile_definitions\(\s*(\w+)\b[^)]*?\bTORCH_TARGET_VERSION=0x([0-9A-Fa-f]{16})"
)
# These include no header of torch and import none of its symbols.
_WITHOUT_TORCH = frozenset(("cumem_allocator", "fs_io_C", "spinloop", "_rust_tool_parser"))
# A library that Python loads: _C.abi3.so, _C.cpython-312-aarch64-linux-gnu.so.
_LIBRARY = re.compile(r"([^/.]+)\.[^/]*\bso$")
_SHOWN = 3


@dataclass(frozen=True)
class _WheelFacts:
    """The facts in a wheel: its version, its torch, its CUDA major version and its libraries.

    `libraries` is empty where only METADATA exists.
    """

    version: "Version"
    torch: "Version"
    cuda: str | None
    libraries: tuple[str, ...]


class _Unreadable(Exception):
    """The reason why a wheel gives no reliable facts."""


def why_not_hybrid(
    layout: Layout, settings: Settings, wheel: Path, *, device: str, torch: str, archs: str
) -> str | None:
    """Return why libraries of the precompiled wheel and local ones must not be mixed, or None.

    `wheel` is the path of the wheel or of its METADATA, `torch` the installed version, `archs` a
    list as in TORCH_CUDA_ARCH_LIST.
    """
    from packaging.version import InvalidVersion, Version

    try:
        precompiled_wheel = _read(wheel)
        installed = Version(torch)
        pinned = pins.load(layout.pins).vllm
    except _Unreadable as exc:
        return f"the precompiled wheel {wheel.name} {settings.presentable(str(exc))}"
    except InvalidVersion:
        return f"the version of the installed torch is not valid: {settings.presentable(torch)}"
    except SettingsError as exc:
        return exc.message
    if precompiled_wheel.version.public != Version(pinned.version).public:
        return (
            f"the precompiled wheel is vLLM {precompiled_wheel.version.public}, pinned is"
            f" {pinned.version}"
        )
    return (
        _other_torch(precompiled_wheel, installed, layout.vllm)
        or (_other_cuda(precompiled_wheel, installed) if device == "cuda" else None)
        or (_other_family(layout.vllm, archs) if device == "cuda" else None)
    )


def _read(wheel: Path) -> _WheelFacts:
    from packaging.requirements import Requirement
    from packaging.version import Version

    text, libraries = _metadata(wheel)
    metadata = HeaderParser().parsestr(text)
    try:
        version = Version(metadata.get("Version", ""))
        wanted = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
        torch = _pinned_torch(wanted)
    except ValueError as exc:
        raise _Unreadable(f"has METADATA that is not of a wheel: {exc}") from exc
    local = re.match(r"cu(\d\d)\d", version.local or "")
    majors = {
        extra[2:]
        for requirement in wanted
        if not requirement.marker
        for extra in requirement.extras
        if re.fullmatch(r"cu\d\d", extra)
    }
    return _WheelFacts(
        version, torch, local[1] if local else majors.pop() if len(majors) == 1 else None, libraries
    )


def _pinned_torch(wanted: "Sequence[Requirement]") -> "Version":
    from packaging.version import Version

    for requirement in wanted:
        if requirement.name.lower() == "torch" and (
            requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ):
            exact = [clause for clause in requirement.specifier if clause.operator == "=="]
            if exact and not exact[0].version.endswith("*"):
                return Version(exact[0].version)
    raise _Unreadable("names no torch that it was built for (no torch==… in its METADATA)")


def _metadata(wheel: Path) -> tuple[str, tuple[str, ...]]:
    """Return METADATA and the names of the wheel's libraries, none where the file is METADATA."""
    try:
        if not zipfile.is_zipfile(wheel):
            with wheel.open("rb") as file:
                content = file.read(_LONGEST_HEADER + 1)
            if not content.startswith(b"Metadata-Version:"):
                raise _Unreadable("is truncated or is not a wheel")
            return _decoded(content), ()
        with zipfile.ZipFile(wheel) as archive:
            members = archive.infolist()
            found = [
                item
                for item in members
                if re.fullmatch(r"[^/]+\.dist-info/METADATA", item.filename)
            ]
            if len(found) != 1 or found[0].file_size > _LONGEST_HEADER:
                raise _Unreadable(
                    "holds no METADATA" if not found else "holds METADATA that is not of a wheel"
                )
            libraries = tuple(
                match[1]
                for item in members
                if (match := _LIBRARY.fullmatch(PurePosixPath(item.filename).name))
            )
            return _decoded(archive.read(found[0])), libraries
    except _DAMAGED as exc:
        raise _Unreadable(f"cannot be read: {exc}") from exc


def _decoded(content: bytes) -> str:
    if len(content) > _LONGEST_HEADER:
        raise _Unreadable("holds METADATA that is not of a wheel")
    return content.decode("utf-8", errors="replace")


def _other_torch(precompiled_wheel: _WheelFacts, installed: "Version", tree: Path) -> str | None:
    """Return why the wheel's libraries do not fit the installed torch, or None.

    The C++ ABI of torch is stable within a released minor version. Before the release, and across
    minor versions, only libraries that link against the C shim fit.
    """
    if (
        installed.release[:2] == precompiled_wheel.torch.release[:2]
        and installed.is_prerelease == precompiled_wheel.torch.is_prerelease
    ):
        return None
    built = (
        f"the precompiled wheel was built for torch {precompiled_wheel.torch.public} and"
        f" {installed} is installed"
    )
    if not precompiled_wheel.libraries:
        return f"{built}: METADATA does not show which of its libraries use torch's stable ABI"
    stable = _stable(tree)
    unfit = [
        name
        for name in dict.fromkeys(precompiled_wheel.libraries)
        if name not in _WITHOUT_TORCH
        and (name not in stable or stable[name] > installed.release[:2])
    ]
    if not unfit:
        return None
    names = ", ".join(unfit[:_SHOWN]) + (
        f" and {len(unfit) - _SHOWN} more" if len(unfit) > _SHOWN else ""
    )
    fit = set(precompiled_wheel.libraries) & stable.keys() - set(unfit)
    others = (
        f"; {len(fit)} {'other does' if len(fit) == 1 else 'others do'} (TORCH_TARGET_VERSION)"
        if fit
        else ""
    )
    verb = "does" if len(unfit) == 1 else "do"
    return f"{built}: {names} {verb} not use torch's stable ABI{others}"


def _stable(tree: Path) -> dict[str, tuple[int, ...]]:
    """Map the targets that use torch's stable ABI to the oldest torch (major, minor) that they fit.

    The version is TORCH_TARGET_VERSION: its first byte is major, its second minor.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path in (tree / "CMakeLists.txt", *sorted((tree / "cmake").rglob("*.cmake"))):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        found |= {
            target: (int(digits[:2], 16), int(digits[2:4], 16))
            for target, digits in _STABLE.findall(text)
        }
    return found


def _other_cuda(precompiled_wheel: _WheelFacts, installed: "Version") -> str | None:
    own = re.match(r"cu(\d\d)\d", installed.local or "")
    if own is None or precompiled_wheel.cuda is None or own[1] == precompiled_wheel.cuda:
        return None
    return (
        f"the precompiled wheel is linked against CUDA {precompiled_wheel.cuda}, the installed"
        f" torch {installed} against CUDA {own[1]}"
    )


def _other_family(tree: Path, archs: str) -> str | None:
    """Return why the release lacks kernels for an architecture's family, None also if unknown."""
    try:
        record = json.loads((tree / "docker" / "versions.json").read_bytes())
        released = parse(str(record["variable"]["TORCH_CUDA_ARCH_LIST"]["default"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    families = {entry.number.split(".")[0] for entry in released}
    other = [entry.text for entry in parse(archs) if entry.number.split(".")[0] not in families]
    if not other or not released:
        return None
    return (
        f"releases have kernels for {', '.join(entry.text for entry in released)}, none for the"
        f" family of {' and '.join(other)} (TORCH_CUDA_ARCH_LIST)"
    )
