"""Whether the compiled libraries hold kernels for the GPU that they are for: listed library by library, and judged.

Read from the libraries' own headers; where those have a form that is not known, cuobjdump is asked: the toolkit's, else the one in Triton's wheel.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from workspace.build.native import fatbin
from workspace.build.native.gates import LIBRARIES, Gate, NotBuilt, judge_not_built
from workspace.core import process
from workspace.core.errors import ToolchainError
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.environment import interpreter, toolchain
from workspace.environment.doctor_case import key
from workspace.environment.doctor_cuda import Entry, parse, runs_on

__all__ = ["Cubins", "Judgement", "NotBuilt", "judge", "judge_not_built", "list_cubins"]

# 3 s for a library of 79 MB on two cores; one for every architecture has 800 MB.
_ASKED_S = 300.0
_LISTED = re.compile(r"^(ELF|PTX) file +\d+: .*\.sm_(\d+)([af]?)\.(?:cubin|ptx)$", re.MULTILINE)
_NAME = re.compile(r"(?P<ptx>ptx |sm_)(?P<major>\d+?)\.?(?P<minor>\d)(?P<suffix>[af]?)")


@dataclass(frozen=True)
class Cubins:
    """What a library, by its path below the tree, holds: `sm_90a`, `sm_120f`, `ptx 8.0`. `trouble` says why that is not known."""

    library: str
    archs: tuple[str, ...]
    trouble: str | None = None


State = Literal["ok", "idle", "wrong"]


@dataclass(frozen=True)
class Judgement:
    """`idle`: nothing of it runs on this GPU, and nothing has to."""

    library: str
    state: State
    sentence: str


def list_cubins(layout: Layout, settings: Settings, libraries: Sequence[Path]) -> tuple[Cubins, ...]:
    """Return what each library holds. Nothing is kept: reading the headers takes less time than a hash of the file would."""
    return tuple(_listed(layout, settings, library) for library in libraries)


def judge(found: Sequence[Cubins], *, capabilities: Sequence[str], archs: str) -> tuple[Judgement, ...]:
    """Judge the libraries of a CUDA build against the GPUs, or against an architecture list where there is no GPU."""
    wanted = tuple(dict.fromkeys(capabilities or (entry.number for entry in parse(archs))))
    return tuple(_judged(one, _gate(one.library), wanted) for one in found)


def _judged(found: Cubins, gate: Gate | None, wanted: Sequence[str]) -> Judgement:
    def said(state: State, sentence: str) -> Judgement:
        return Judgement(found.library, state, sentence)

    held, entries = ", ".join(found.archs), tuple(_entry(name) for name in found.archs)
    served = [capability for capability in wanted if gate is None or gate.serves(capability)]
    if found.trouble:
        return said("wrong", found.trouble)
    if gate and not gate.archs:
        return said("idle", f"needs no device code: {gate.rule}")
    if gate and wanted and not served:
        return said("idle", f"upstream has none for {' and '.join(wanted)}, but for {gate.archs} ({gate.rule})")
    if not entries:
        return said("wrong", "holds no device code") if gate else said("idle", "holds no device code, and nothing is known here of any that it should")
    fitting = {capability: [entry for entry in entries if runs_on(entry, capability)] for capability in served}
    for capability, fit in fitting.items():
        if not fit and gate and gate.takes_one:
            return said("idle", f"holds {held} ({gate.rule}); for {capability}: ./scripts/inv rebuild --target {_stem(found.library)}")
        if not fit:
            return said("wrong", f"holds {held}, of which nothing runs on {capability}")
        if stranded := _stranded(entries, fit, capability):
            return said("wrong", f"holds {stranded.text}, which runs on {stranded.number} alone and not on {capability}")
    only_ptx = [capability for capability, fit in fitting.items() if all(entry.has_ptx for entry in fit)]
    return said("ok", f"holds {held}" + (f"; the driver compiles PTX for {' and '.join(only_ptx)}" if only_ptx else ""))


def _stranded(entries: Sequence[Entry], fitting: Sequence[Entry], capability: str) -> Entry | None:
    """Machine code for a neighbour alone, where nothing of its kind is there for this GPU: what is compiled so has no other form (vllm-project/vllm#43367)."""
    if any(entry.suffix for entry in fitting):
        return None
    return next((entry for entry in entries if entry.suffix == "a" and key(entry.number)[0] == key(capability)[0]), None)


def _gate(library: str) -> Gate | None:
    return LIBRARIES.get(f"{PurePosixPath(library).parent.name}/{_stem(library)}") or LIBRARIES.get(_stem(library))


def _stem(library: str) -> str:
    return PurePosixPath(library).name.split(".")[0]


def _entry(name: str) -> Entry:
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name} is no architecture")
    return Entry(name, f"{found['major']}.{found['minor']}", found["suffix"], found["ptx"] == "ptx ")


def _listed(layout: Layout, settings: Settings, library: Path) -> Cubins:
    name = str(library.relative_to(layout.vllm)) if library.is_relative_to(layout.vllm) else library.name
    try:
        return Cubins(name, fatbin.architectures(library))
    except OSError as exc:
        return Cubins(name, (), f"cannot be read: {exc.strerror}")
    except fatbin.UnknownForm as exc:
        return _asked(layout, settings, library, Cubins(name, (), f"{exc}; what it holds cannot be known"))


def _asked(layout: Layout, settings: Settings, library: Path, unknown: Cubins) -> Cubins:
    """What cuobjdump says. It has no name for a family: its `sm_120` is taken for what runs on all of it, which 12.0 does as well."""
    program = _cuobjdump(layout, settings)
    if program is None:
        return unknown
    said = ""
    for flag in ("--list-elf", "--list-ptx"):
        try:
            done = process.capture([program, flag, library], env=settings.child_environment("plain"), timeout_s=_ASKED_S)
        except ToolchainError as exc:
            return Cubins(unknown.library, (), f"{unknown.trouble}: {exc.message}")
        if done.returncode != 0 and "does not contain device code" not in done.stdout + done.stderr:
            return unknown
        said += done.stdout
    pairs = {(kind == "PTX", int(number), suffix) for kind, number, suffix in _LISTED.findall(said)}
    return Cubins(unknown.library, tuple(fatbin.name(is_ptx=is_ptx, number=number, suffix=suffix) for is_ptx, number, suffix in sorted(pairs)))


def _cuobjdump(layout: Layout, settings: Settings) -> Path | None:
    found = toolchain.find_toolkit(settings)
    places = [found.home / "bin"] if found else []
    places += [folder / "triton" / "backends" / "nvidia" / "bin" for folder in interpreter.site_packages(layout)]
    return next((place / "cuobjdump" for place in places if (place / "cuobjdump").is_file()), None)
