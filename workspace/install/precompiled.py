"""The source of compiled libraries: the pinned precompiled wheel, a wheel file, or a compiler.

A wheel provides only its libraries; every Python file is the tree's own. This module alone chooses
the source, writes it as text, fetches the wheel, and decides whether its libraries fit.
"""

import contextlib
import platform
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from email.parser import HeaderParser
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from workspace.core import hints, records
from workspace.core.errors import SettingsError, SourceError
from workspace.core.files import sha256
from workspace.core.paths import Layout, typed
from workspace.core.settings import Settings, Value
from workspace.machine.arch import parse
from workspace.repo import index, pins
from workspace.repo.pins import SHA256, Pin, PrecompiledWheel

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.version import Version

Kind = Literal["precompiled", "hybrid", "wheel", "native"]

# The first edition's name for the precompiled wheel, in stamps and as a value of KERNELS.
_FORMER_NAME = "donor"
_FORMER_TEXT = re.compile(
    rf"native|(?P<hybrid>hybrid )?(?P<kind>precompiled|{_FORMER_NAME}|wheel)"
    r" (?P<wheel>.+) (?P<sha256>[0-9a-f]{64})"
)
# A damaged archive raises various errors: zlib.error, RuntimeError where it claims encryption,
# NotImplementedError for an unknown compression method.
DAMAGED = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class KernelSource:
    """The source of compiled libraries: the pinned precompiled wheel, a wheel file, or a compiler.

    `hybrid` is the precompiled wheel, with a compiler for what differs from the pin. `wheel` is a
    file name; it is None for `native`, and where the pin names no wheel.
    """

    kind: Kind
    wheel: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for what only a damaged state file can hold."""
        if (
            self.kind not in get_args(Kind)
            or not (self.wheel is None or str.isprintable(self.wheel))
            or not (self.sha256 is None or SHA256.fullmatch(self.sha256))
        ):
            raise ValueError(f"not a source of kernels: {self}")

    @property
    def text(self) -> str:
        """The source as users see it, without the hash."""
        kind = "hybrid precompiled" if self.kind == "hybrid" else self.kind
        return kind if self.kind == "native" else f"{kind} {self.wheel or 'none'}"

    @property
    def is_native(self) -> bool:
        """Whether every library is compiled here."""
        return self.kind == "native"

    @property
    def is_hybrid(self) -> bool:
        """Whether a compiler replaces some libraries of the precompiled wheel."""
        return self.kind == "hybrid"

    @property
    def is_compiled(self) -> bool:
        """Whether a compiler makes at least one library."""
        return self.is_native or self.is_hybrid

    @property
    def is_wheel_file(self) -> bool:
        """Whether the libraries come from a wheel of the user's."""
        return self.kind == "wheel"

    def without_compiler(self) -> "KernelSource":
        """Return the source of what bootstrap installs: only inv rebuild makes kernels hybrid."""
        return replace(self, kind="precompiled") if self.is_hybrid else self

    def differences(self, recorded: "KernelSource | None") -> tuple[str, ...]:
        """Return why kernels of the `recorded` source are stale where this source is wanted."""
        old, new = text_of(recorded), self.text
        if self == recorded:
            return ()
        return (f"origin {old} → {new}" if old != new else f"origin {new}, with other content",)


NATIVE = KernelSource("native")


def text_of(source: KernelSource | None) -> str:
    """Return the source as users see it, `none` where nothing is recorded."""
    return source.text if source else "none"


def upgraded(document: dict[str, object]) -> dict[str, object]:
    """Return a state file with its source as an object; until 2026-11 it was a text in `inputs`.

    A text of another form stays a text, which no reader accepts.
    """
    inputs = document.get("inputs")
    if not isinstance(inputs, dict) or "origin" not in inputs:
        return document
    others = {name: text for name, text in inputs.items() if name != "origin"}
    source = inputs["origin"]
    if isinstance(source, str) and (found := _FORMER_TEXT.fullmatch(source)):
        kind = "hybrid" if found["hybrid"] else found["kind"] or "native"
        kind = "precompiled" if kind == _FORMER_NAME else kind
        source = {"kind": kind, "wheel": found["wheel"], "sha256": found["sha256"]}
    return {**document, "inputs": others, "kernels": source}


@dataclass(frozen=True)
class Kernels:
    """The kernels to install: their source, and the path of a wheel of the user's."""

    source: KernelSource
    file: Path | None = None


def _key(device: str) -> str:
    """Return the key of a device (cpu, cuda) on this machine, such as cpu-aarch64."""
    return f"{device}-{platform.machine()}"


def pinned_wheel(pin: Pin, device: str) -> PrecompiledWheel | None:
    """Return the wheel for a device on this machine, or None if the pin names none."""
    return pin.precompiled.get(_key(device))


def sources_commit(pin: Pin, base: str) -> str:
    """Return the commit whose compiled sources the precompiled wheel has.

    `base` is the pin's commit in the checkout. The wheel of a pin that is no release has those of
    its base release.
    """
    return pin.base.commit if pin.base else base


def choose(
    settings: Settings, pin: Pin, device: str, kept: Kernels | None, *, is_changed: bool
) -> Kernels:
    """Return the kernels that KERNELS requests; with `auto`, `is_changed` sources make hybrid ones.

    `kept` are the recorded kernels: those that an earlier flag requested stay until another flag is
    given. Raises SettingsError where KERNELS is neither a known value nor an existing wheel.
    """
    choice = settings.text("KERNELS")
    choice = "precompiled" if choice == _FORMER_NAME else choice
    is_free = choice == "auto" and settings.source("KERNELS") != "flag"
    if is_free and kept and kept.source.kind in ("native", "wheel"):
        return kept
    pinned = pinned_wheel(pin, device)
    if choice == "native" or (choice == "auto" and pinned is None):
        return Kernels(NATIVE)
    if choice not in ("auto", "precompiled"):
        return _own_wheel(settings, choice)
    kind: Kind = "hybrid" if choice == "auto" and is_changed else "precompiled"
    return Kernels(
        KernelSource(kind, pinned.filename, pinned.sha256) if pinned else KernelSource(kind)
    )


def is_native(settings: Settings) -> bool:
    """Return whether KERNELS requests to compile every library."""
    return settings.text("KERNELS") == "native"


def follows_sources(settings: Settings) -> bool:
    """Return whether KERNELS lets changed sources decide what is compiled."""
    return settings.text("KERNELS") == "auto"


def is_named(settings: Settings, wheel: Path) -> bool:
    """Return whether KERNELS is the path of this wheel."""
    return settings.text("KERNELS") == str(wheel)


def repeated(settings: Settings, source: KernelSource | None) -> Settings:
    """Return settings that compile every library if `source` did and KERNELS does not decide."""
    if source is None or not source.is_native or not follows_sources(settings):
        return settings
    return replace(settings, values={**settings.values, "KERNELS": Value("native", "flag")})


def _own_wheel(settings: Settings, choice: str) -> Kernels:
    wheel = None
    # A name that is too long, or a link in a loop, names no wheel either.
    with contextlib.suppress(OSError, RuntimeError):
        named = typed(choice).resolve()
        wheel = named if _is_wheel(named) else None
    if wheel is None:
        raise SettingsError(
            f"KERNELS={settings.presentable(choice)} is not auto, precompiled, native or an"
            " existing wheel file",
            hint=hints.text("install.rebuild_auto"),
        )
    return Kernels(KernelSource("wheel", wheel.name, sha256(wheel)), wheel)


def _is_wheel(path: Path) -> bool:
    return path.suffix == ".whl" and path.name.isprintable() and path.is_file()


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
    if kernels.source.is_wheel_file:
        if kernels.file is None or not kernels.file.is_file():
            raise SourceError(
                f"the wheel of the installed kernels does not exist any more: {kernels.file}",
                hint=hints.text("install.precompiled"),
            )
        return kernels.file
    precompiled_wheel = pinned_wheel(pin, device)
    if precompiled_wheel is None:
        raise SourceError(
            f"vendor/pins.toml names no precompiled wheel for {_key(device)}:"
            f" it has {', '.join(sorted(pin.precompiled)) or 'none'}",
            hint=hints.text("install.native"),
        )
    return index.fetch(
        precompiled_wheel.project,
        precompiled_wheel.filename,
        precompiled_wheel.sha256,
        settings=settings,
        on_progress=on_progress,
    )


# METADATA of vLLM has 12 kB; a longer file is not METADATA.
_LONGEST_HEADER = 1 << 20


@dataclass(frozen=True)
class _WheelFacts:
    """The facts in a wheel: its version, its torch and its CUDA major version."""

    version: "Version"
    torch: "Version"
    cuda: str | None


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
    if precompiled_wheel.version.public != Version(pinned.release).public:
        return (
            f"the precompiled wheel is vLLM {precompiled_wheel.version.public}, not the pinned"
            f" {pinned.release}"
        )
    return (
        _other_torch(precompiled_wheel, installed)
        or (_other_cuda(precompiled_wheel, installed) if device == "cuda" else None)
        or (_other_family(layout.vllm, archs) if device == "cuda" else None)
    )


def _read(wheel: Path) -> _WheelFacts:
    from packaging.requirements import Requirement
    from packaging.version import Version

    metadata = HeaderParser().parsestr(_metadata(wheel))
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
    cuda = local[1] if local else majors.pop() if len(majors) == 1 else None
    return _WheelFacts(version, torch, cuda)


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


def _metadata(wheel: Path) -> str:
    """Return METADATA of a wheel, or the file where it is METADATA."""
    try:
        if not zipfile.is_zipfile(wheel):
            with wheel.open("rb") as file:
                content = file.read(_LONGEST_HEADER + 1)
            if not content.startswith(b"Metadata-Version:"):
                raise _Unreadable("is truncated or is not a wheel")
            return _decoded(content)
        with zipfile.ZipFile(wheel) as archive:
            found = [
                item
                for item in archive.infolist()
                if re.fullmatch(r"[^/]+\.dist-info/METADATA", item.filename)
            ]
            if len(found) != 1 or found[0].file_size > _LONGEST_HEADER:
                raise _Unreadable(
                    "holds no METADATA" if not found else "holds METADATA that is not of a wheel"
                )
            return _decoded(archive.read(found[0]))
    except DAMAGED as exc:
        raise _Unreadable(f"cannot be read: {exc}") from exc


def _decoded(content: bytes) -> str:
    if len(content) > _LONGEST_HEADER:
        raise _Unreadable("holds METADATA that is not of a wheel")
    return content.decode("utf-8", errors="replace")


def _other_torch(precompiled_wheel: _WheelFacts, installed: "Version") -> str | None:
    """Return why the wheel's libraries do not fit the installed torch, or None.

    The C++ ABI of torch is stable within a released minor version.
    """
    if (
        installed.release[:2] == precompiled_wheel.torch.release[:2]
        and installed.is_prerelease == precompiled_wheel.torch.is_prerelease
    ):
        return None
    return (
        f"the precompiled wheel was built for torch {precompiled_wheel.torch.public} and"
        f" {installed} is installed"
    )


def _other_cuda(precompiled_wheel: _WheelFacts, installed: "Version") -> str | None:
    own = re.match(r"cu(\d\d)\d", installed.local or "")
    if own is None or precompiled_wheel.cuda is None or own[1] == precompiled_wheel.cuda:
        return None
    return (
        f"the precompiled wheel is linked against CUDA {precompiled_wheel.cuda}, the installed"
        f" torch {installed} against CUDA {own[1]}"
    )


@dataclass(frozen=True)
class _Bake:
    """What is read here of a release's Docker variables."""

    variable: Mapping[str, Mapping[str, str]]


def _other_family(tree: Path, archs: str) -> str | None:
    """Return why the release lacks kernels for an architecture's family, None also if unknown."""
    try:
        record = records.load(tree / "docker" / "versions.json", _Bake)
        released = parse(record.variable["TORCH_CUDA_ARCH_LIST"]["default"]) if record else ()
    except (LookupError, ValueError):
        return None
    families = {entry.number.split(".")[0] for entry in released}
    other = [entry.text for entry in parse(archs) if entry.number.split(".")[0] not in families]
    if not other or not released:
        return None
    return (
        f"releases have kernels for {', '.join(entry.text for entry in released)}, none for the"
        f" family of {' and '.join(other)} (TORCH_CUDA_ARCH_LIST)"
    )
