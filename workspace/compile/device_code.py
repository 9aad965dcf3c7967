"""Whether the compiled libraries hold kernels for the GPU that they are for: listed library by
library, and judged.

Read from the libraries' own headers; where those have a form that is not known, cuobjdump is asked:
the toolkit's, else the one in Triton's wheel.
"""

import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from workspace.core import process
from workspace.core.errors import ToolchainError
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import interpreter, toolchain
from workspace.machine.case import key
from workspace.machine.doctor_toolchain import Entry, parse, runs_on

_SECTIONS = (b".nv_fatbin", b"__nv_relfatbin")
_MAGIC = 0xBA55ED50
_CONTAINER = struct.Struct("<IHHQ")
# kind, version, bytes of this header, bytes of what follows it.
_ENTRY = struct.Struct("<HHIQ")
_PTX, _CUBIN = 1, 2
_ARCH_AT, _FLAGS_AT = 28, 40
# The letter behind the number of an architecture: for exactly this GPU, or for its family.
_EXACT, _FAMILY = 0x100000, 0x200000
_LETTERS = {0: "", _EXACT: "a", _FAMILY: "f"}


class UnknownForm(ValueError):
    """The file is not what this module can read; the message says where it differs."""


def architectures(library: Path) -> tuple[str, ...]:
    """Return what the library holds, as `sm_90a`, `sm_120f`, `ptx 8.0`, sorted by number; nothing
    where it has no device code.

    Raises UnknownForm, also for a file that was cut, and OSError.
    """
    with library.open("rb") as file:
        try:
            view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except ValueError as exc:
            raise UnknownForm("is empty") from exc
        with view:
            try:
                found = {
                    entry
                    for start, size in _fat_sections(view)
                    for entry in _entries(view, start, start + size)
                }
            except (struct.error, IndexError) as exc:
                raise UnknownForm("ends before what its headers announce") from exc
    return tuple(
        name(is_ptx=is_ptx, number=number, suffix=suffix)
        for is_ptx, number, suffix in sorted(found)
    )


def _fat_sections(view: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Offset and size of each section with fat binaries (elf(5), 64 bit, little endian: x86-64 and
    Arm).
    """
    if view[:6] != b"\x7fELF\x02\x01":
        raise UnknownForm("is no ELF file of 64 bit, little endian")
    (table,) = struct.unpack_from("<Q", view, 40)
    size, count, names = struct.unpack_from("<HHH", view, 58)
    if not table or not count:
        raise UnknownForm("has no table of sections")
    headers = [
        struct.unpack_from("<IIQQQQIIQQ", view, table + number * size) for number in range(count)
    ]
    for header in headers:
        start = headers[names][4] + header[0]
        if view[start : view.find(b"\0", start)] in _SECTIONS:
            yield header[4], header[5]


def _entries(view: mmap.mmap, at: int, end: int) -> Iterator[tuple[bool, int, str]]:
    """Kind, architecture and letter of every entry of a section, which containers and zeros between
    them must fill to the last byte.
    """
    while at < end:
        if view[at : at + 8] == bytes(min(8, end - at)):
            at += 8
            continue
        magic, version, header, size = _CONTAINER.unpack_from(view, at)
        inner, last = at + header, at + header + size
        if magic != _MAGIC or version != 1 or header < _CONTAINER.size or last > end:
            raise UnknownForm(f"has no fat binary of a known form at byte {at}")
        while inner < last:
            kind, _, length, payload = _ENTRY.unpack_from(view, inner)
            if length < _FLAGS_AT + 8 or inner + length + payload > last:
                raise UnknownForm(f"has an entry of no known form at byte {inner}")
            if kind in (_PTX, _CUBIN):
                (number,), (flags,) = (
                    struct.unpack_from("<I", view, inner + _ARCH_AT),
                    struct.unpack_from("<Q", view, inner + _FLAGS_AT),
                )
                letter = _LETTERS.get(flags & (_EXACT | _FAMILY))
                if letter is None or not 50 <= number <= 999:
                    raise UnknownForm(f"has an entry for an unknown architecture at byte {inner}")
                yield kind == _PTX, number, letter
            inner += length + payload
        at = last


def name(*, is_ptx: bool, number: int, suffix: str) -> str:
    """How the workspace spells what a library holds: machine code as `sm_120f`, PTX as `ptx
    12.0f`.
    """
    return f"ptx {number // 10}.{number % 10}{suffix}" if is_ptx else f"sm_{number}{suffix}"


_SM9X_UP = "9.0a;10.0f;10.7f;11.0f;12.0f"
_SM10X = "10.0f;10.7f;11.0f"


@dataclass(frozen=True)
class Gate:
    """Architectures that upstream compiles a library for, none where it has no device code of its
    own, and where that stands.
    """

    archs: str
    rule: str
    # A build for several families holds one of them.
    takes_one: bool = False

    def serves(self, capability: str) -> bool:
        return serves(self.archs, capability)


HOST = Gate("", "compiled by the host's compiler alone (CMakeLists.txt, LANGUAGE CXX)")
# By the name of the file before its first dot, the folder before it where two have the same.
LIBRARIES = {
    "spinloop": HOST,
    "fs_io_C": HOST,
    "cumem_allocator": HOST,
    "vllm-rs": Gate("", "Rust"),
    "_rust_tool_parser": Gate("", "Rust"),
    "deep_gemm/_C": Gate("", "compiles its kernels at run time (deepgemm.cmake)"),
    "_C_stable_libtorch": Gate("7.5+PTX", "CUDA_ARCHS"),
    "_moe_C_stable_libtorch": Gate("7.5+PTX", "CUDA_ARCHS"),
    "_vllm_fa2_C": Gate("8.0+PTX", "_is_fa2_supported"),
    "_vllm_fa3_C": Gate("9.0a", "_is_fa3_supported"),
    "_flashmla_C": Gate("9.0a;10.0f;10.7f", "flashmla.cmake, SUPPORT_ARCHS"),
    "_flashmla_extension_C": Gate("9.0a;10.0f;10.7f", "flashmla.cmake, SUPPORT_ARCHS"),
    "_deepselect_C": Gate("10.0f", "deepselect.cmake, DEEPSELECT_SUPPORT_ARCHS"),
    "_flashkda_C": Gate("9.0a;10.0f;12.0f", "flashkda.cmake, FLASH_KDA_SUPPORT_ARCHS"),
    "_qutlass_C": Gate(
        "10.0f;10.7f;12.0f",
        "qutlass.cmake, QUTLASS_ARCHS: 10.0 where both are asked for, as in the release wheels",
        takes_one=True,
    ),
}


@dataclass(frozen=True)
class Rule:
    """A sentence of configure, and the architectures of each block that may print it: it is in its
    place where a block serves none that is asked for.
    """

    pattern: str
    blocks: tuple[str, ...]
    rule: str


# `as CUDA Compiler version is not >= 12.8` is printed only where an architecture that is asked for
# would have had the kernels.
_TOO_OLD = re.compile(r"as CUDA Compiler version is|CUDA [0-9.]+ or newer is required")
RULES = (
    Rule(r"Not building Machete kernels as no", ("9.0a",), "MACHETE_ARCHS"),
    Rule(r"Not building Marlin kernels as no", ("7.5;8.0+PTX",), "MARLIN_OTHER_ARCHS"),
    Rule(r"Not building Marlin MOE kernels as no", ("7.5;8.0+PTX",), "MARLIN_MOE_OTHER_ARCHS"),
    Rule(r"Not building AllSpark kernels as no", ("8.0;8.6;8.7;8.9",), "ALLSPARK_ARCHS"),
    Rule(r"Not building dsv3_fused_a_gemm as no", (_SM9X_UP,), "DSV3_FUSED_A_GEMM_ARCHS"),
    Rule(
        r"Not building (fp32_router_gemm|DSV3 router GEMM kernels) as no",
        (_SM9X_UP,),
        "cuda_archs_sm90plus",
    ),
    Rule(r"Not building scaled_mm_c3x_(sm)?90 as no", ("9.0a",), "SCALED_MM_ARCHS"),
    Rule(r"Not building scaled_mm_c3x_(sm)?100 as no", (_SM10X,), "SCALED_MM_ARCHS"),
    Rule(r"Not building scaled_mm_c3x_(sm)?120 as no", ("12.0f",), "SCALED_MM_ARCHS"),
    Rule(r"Not building scaled_mm_c2x as all archs are already built", ("",), "SCALED_MM_3X_ARCHS"),
    Rule(r"Not building scaled_mm_c2x as no", ("7.5;8.0;8.7;8.9+PTX",), "SCALED_MM_2X_ARCHS"),
    # Two blocks print the same words.
    Rule(
        r"Not building grouped_mm_c3x as no",
        ("9.0a", _SM10X),
        "SCALED_MM_ARCHS of CUTLASS MoE, SM90 and SM100",
    ),
    Rule(r"Not building moe_data as no", (_SM9X_UP,), "CUTLASS_MOE_DATA_ARCHS"),
    Rule(r"Not building SM12x NVFP4 as no", ("12.0f",), "FP4_SM120_ARCHS"),
    Rule(r"Not building SM10x/11x NVFP4/MXFP4 as no", (_SM10X,), "FP4_SM100_ARCHS"),
    Rule(r"Not building W4A8 kernels as no", ("9.0a",), "W4A8_ARCHS"),
    Rule(r"Not building CUTLASS MLA as no", (_SM10X,), "MLA_ARCHS"),
    Rule(
        r"FlashMLA will not compile",
        (LIBRARIES["_flashmla_C"].archs,),
        LIBRARIES["_flashmla_C"].rule,
    ),
    Rule(
        r"DeepSelect will not compile",
        (LIBRARIES["_deepselect_C"].archs,),
        LIBRARIES["_deepselect_C"].rule,
    ),
    Rule(
        r"FlashKDA will not compile",
        (LIBRARIES["_flashkda_C"].archs,),
        LIBRARIES["_flashkda_C"].rule,
    ),
    Rule(
        r"DeepGEMM will not compile",
        ("9.0a;10.0f;10.7f;12.0f",),
        "deepgemm.cmake, DEEPGEMM_SUPPORT_ARCHS",
    ),
    Rule(
        r"\[QUTLASS\] Skipping build: no supported arch",
        (LIBRARIES["_qutlass_C"].archs,),
        "qutlass.cmake, QUTLASS_ARCHS",
    ),
)


@dataclass(frozen=True)
class NotBuilt:
    """What configure leaves out: rightly, wrongly, or for a reason that is not known here. Each is
    a sentence that quotes configure's.
    """

    expected: tuple[str, ...]
    failures: tuple[str, ...]
    unknown: tuple[str, ...]


def serves(archs: str, capability: str) -> bool:
    return any(runs_on(entry, capability) for entry in parse(archs))


def judge_not_built(sentences: Sequence[str], archs: str) -> NotBuilt:
    """Judge configure's sentences on kernels that it leaves out, by the architecture list it was
    given. Of an empty list nothing is known.
    """
    wanted = tuple(entry.number for entry in parse(archs))
    expected, failures, unknown = [], [], []
    for sentence, count in Counter(
        sentence.strip().removeprefix("-- ") for sentence in sentences
    ).items():
        rule = next((rule for rule in RULES if re.match(rule.pattern, sentence)), None)
        if _TOO_OLD.search(sentence):
            failures.append(f"{sentence}: the toolkit is too old for {archs}")
        elif rule is None or not wanted:
            unknown.append(
                f"{sentence}: not known here, so it may be right or wrong for"
                f" {archs or 'no architecture list'}"
            )
        else:
            serving = [
                block
                for block in rule.blocks
                if any(serves(block, capability) for capability in wanted)
            ]
            if count <= len(rule.blocks) - len(serving):
                expected.append(
                    f"{sentence}:"
                    f" {' or '.join(block for block in rule.blocks if block not in serving) or 'covered'}"
                    f" ({rule.rule})"
                )
            else:
                failures.append(
                    f"{sentence}: upstream has them for {' and '.join(serving)}, which {archs} asks"
                    f" for ({rule.rule})"
                )
    return NotBuilt(tuple(expected), tuple(failures), tuple(unknown))


__all__ = ["Cubins", "Judgement", "NotBuilt", "judge", "judge_not_built", "list_cubins"]

# 3 s for a library of 79 MB on two cores; one for every architecture has 800 MB.
_ASKED_S = 300.0
_LISTED = re.compile(r"^(ELF|PTX) file +\d+: .*\.sm_(\d+)([af]?)\.(?:cubin|ptx)$", re.MULTILINE)
_NAME = re.compile(r"(?P<ptx>ptx |sm_)(?P<major>\d+?)\.?(?P<minor>\d)(?P<suffix>[af]?)")


@dataclass(frozen=True)
class Cubins:
    """What a library, by its path below the tree, holds: `sm_90a`, `sm_120f`, `ptx 8.0`. `trouble`
    says why that is not known.
    """

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


def list_cubins(
    layout: Layout, settings: Settings, libraries: Sequence[Path]
) -> tuple[Cubins, ...]:
    """Return what each library holds. Nothing is kept: reading the headers takes less time than a
    hash of the file would.
    """
    return tuple(_listed(layout, settings, library) for library in libraries)


def judge(
    found: Sequence[Cubins], *, capabilities: Sequence[str], archs: str
) -> tuple[Judgement, ...]:
    """Judge the libraries of a CUDA build against the GPUs, or against an architecture list where
    there is no GPU.
    """
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
        return said(
            "idle",
            f"upstream has none for {' and '.join(wanted)}, but for {gate.archs} ({gate.rule})",
        )
    if not entries:
        return (
            said("wrong", "holds no device code")
            if gate
            else said(
                "idle", "holds no device code, and nothing is known here of any that it should"
            )
        )
    fitting = {
        capability: [entry for entry in entries if runs_on(entry, capability)]
        for capability in served
    }
    for capability, fit in fitting.items():
        if not fit and gate and gate.takes_one:
            return said(
                "idle",
                f"holds {held} ({gate.rule}); for {capability}: ./scripts/inv rebuild --target"
                f" {_stem(found.library)}",
            )
        if not fit:
            return said("wrong", f"holds {held}, of which nothing runs on {capability}")
        if stranded := _stranded(entries, fit, capability):
            return said(
                "wrong",
                f"holds {stranded.text}, which runs on {stranded.number} alone and not on"
                f" {capability}",
            )
    only_ptx = [
        capability for capability, fit in fitting.items() if all(entry.has_ptx for entry in fit)
    ]
    return said(
        "ok",
        f"holds {held}"
        + (f"; the driver compiles PTX for {' and '.join(only_ptx)}" if only_ptx else ""),
    )


def _stranded(entries: Sequence[Entry], fitting: Sequence[Entry], capability: str) -> Entry | None:
    """Machine code for a neighbour alone, where nothing of its kind is there for this GPU: what is
    compiled so has no other form (vllm-project/vllm#43367).
    """
    if any(entry.suffix for entry in fitting):
        return None
    return next(
        (
            entry
            for entry in entries
            if entry.suffix == "a" and key(entry.number)[0] == key(capability)[0]
        ),
        None,
    )


def _gate(library: str) -> Gate | None:
    return LIBRARIES.get(f"{PurePosixPath(library).parent.name}/{_stem(library)}") or LIBRARIES.get(
        _stem(library)
    )


def _stem(library: str) -> str:
    return PurePosixPath(library).name.split(".")[0]


def _entry(name: str) -> Entry:
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name} is no architecture")
    return Entry(
        name, f"{found['major']}.{found['minor']}", found["suffix"], found["ptx"] == "ptx "
    )


def _listed(layout: Layout, settings: Settings, library: Path) -> Cubins:
    name = (
        str(library.relative_to(layout.vllm))
        if library.is_relative_to(layout.vllm)
        else library.name
    )
    try:
        return Cubins(name, architectures(library))
    except OSError as exc:
        return Cubins(name, (), f"cannot be read: {exc.strerror}")
    except UnknownForm as exc:
        return _asked(
            layout, settings, library, Cubins(name, (), f"{exc}; what it holds cannot be known")
        )


def _asked(layout: Layout, settings: Settings, library: Path, unknown: Cubins) -> Cubins:
    """What cuobjdump says. It has no name for a family: its `sm_120` is taken for what runs on all
    of it, which 12.0 does as well.
    """
    program = _cuobjdump(layout, settings)
    if program is None:
        return unknown
    said = ""
    for flag in ("--list-elf", "--list-ptx"):
        try:
            done = process.capture(
                [program, flag, library],
                env=settings.child_environment("plain"),
                timeout_s=_ASKED_S,
            )
        except ToolchainError as exc:
            return Cubins(unknown.library, (), f"{unknown.trouble}: {exc.message}")
        if done.returncode != 0 and "does not contain device code" not in done.stdout + done.stderr:
            return unknown
        said += done.stdout
    pairs = {(kind == "PTX", int(number), suffix) for kind, number, suffix in _LISTED.findall(said)}
    return Cubins(
        unknown.library,
        tuple(
            name(is_ptx=is_ptx, number=number, suffix=suffix)
            for is_ptx, number, suffix in sorted(pairs)
        ),
    )


def _cuobjdump(layout: Layout, settings: Settings) -> Path | None:
    found = toolchain.find_toolkit(settings)
    places = [found.home / "bin"] if found else []
    places += [
        folder / "triton" / "backends" / "nvidia" / "bin"
        for folder in interpreter.site_packages(layout)
    ]
    return next((place / "cuobjdump" for place in places if (place / "cuobjdump").is_file()), None)
