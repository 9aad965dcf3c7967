"""Device code of the compiled libraries: the architectures in each library, and whether they serve
the GPU.

It is read from the libraries' own headers: cuobjdump takes 3 s for 79 MB and omits the letter f.
"""

import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from workspace.core.paths import Layout
from workspace.machine.arch import Entry, key, parse, runs_on

_SECTIONS = (b".nv_fatbin", b"__nv_relfatbin")
_MAGIC = 0xBA55ED50
_CONTAINER = struct.Struct("<IHHQ")
# Kind, version, bytes of this header, bytes of the payload after it.
_ENTRY = struct.Struct("<HHIQ")
_PTX, _CUBIN = 1, 2
_ARCH_AT, _FLAGS_AT = 28, 40
# Flags of the letter after an architecture: for exactly this GPU, or for its family.
_EXACT, _FAMILY = 0x100000, 0x200000
_LETTERS = {0: "", _EXACT: "a", _FAMILY: "f"}


class UnknownForm(ValueError):
    """The file has a form that this module cannot read; the message names the difference."""


def units(library: Path) -> tuple[tuple[str, ...], ...]:
    """Return the architectures in each fat binary of the library, as `sm_90a`, `ptx 8.0`, sorted by
    number: nvcc writes one for each source, and the driver loads each at the first use of it.

    Raises UnknownForm, also for a truncated file, and OSError.
    """
    with library.open("rb") as file:
        try:
            view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except ValueError as exc:
            raise UnknownForm("is empty") from exc
        with view:
            try:
                found = [
                    _names(unit)
                    for start, size in _fat_sections(view)
                    for unit in _fat_binaries(view, start, start + size)
                ]
            except (struct.error, IndexError) as exc:
                raise UnknownForm("is shorter than its headers announce") from exc
    return tuple(unit for unit in found if unit)


def architectures(library: Path) -> tuple[str, ...]:
    """Return the architectures in all fat binaries of the library; empty without device code."""
    return _union(units(library))


def _union(found: Sequence[Sequence[str]]) -> tuple[str, ...]:
    entries = {_entry(one) for unit in found for one in unit}
    ordered = sorted(entries, key=lambda one: (one.has_ptx, key(one.number), one.suffix))
    return tuple(entry.text for entry in ordered)


def _names(found: Iterable[tuple[bool, int, str]]) -> tuple[str, ...]:
    return tuple(
        name(is_ptx=is_ptx, number=number, suffix=suffix)
        for is_ptx, number, suffix in sorted({*found})
    )


def _fat_sections(view: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Yield offset and size of each section with fat binaries (elf(5), 64 bit, little endian:
    x86-64, Arm).
    """
    if view[:6] != b"\x7fELF\x02\x01":
        raise UnknownForm("is not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", view, 40)
    size, count, names = struct.unpack_from("<HHH", view, 58)
    if not table or not count:
        raise UnknownForm("has no section table")
    headers = [
        struct.unpack_from("<IIQQQQIIQQ", view, table + index * size) for index in range(count)
    ]
    for header in headers:
        start = headers[names][4] + header[0]
        if view[start : view.find(b"\0", start)] in _SECTIONS:
            yield header[4], header[5]


def _fat_binaries(view: mmap.mmap, at: int, end: int) -> Iterator[Iterator[tuple[bool, int, str]]]:
    """Yield the entries of each container of a section; containers, and zeros between them, must
    fill it to the last byte.
    """
    while at < end:
        if view[at : at + 8] == bytes(min(8, end - at)):
            at += 8
            continue
        magic, version, header, size = _CONTAINER.unpack_from(view, at)
        inner, last = at + header, at + header + size
        if magic != _MAGIC or version != 1 or header < _CONTAINER.size or last > end:
            raise UnknownForm(f"has a fat binary of an unknown form at byte {at}")
        yield _entries(view, inner, last)
        at = last


def _entries(view: mmap.mmap, at: int, end: int) -> Iterator[tuple[bool, int, str]]:
    """Yield kind, architecture and letter of every entry of a container."""
    while at < end:
        kind, _, length, payload = _ENTRY.unpack_from(view, at)
        if length < _FLAGS_AT + 8 or at + length + payload > end:
            raise UnknownForm(f"has an entry of an unknown form at byte {at}")
        if kind in (_PTX, _CUBIN):
            (number,), (flags,) = (
                struct.unpack_from("<I", view, at + _ARCH_AT),
                struct.unpack_from("<Q", view, at + _FLAGS_AT),
            )
            letter = _LETTERS.get(flags & (_EXACT | _FAMILY))
            if letter is None or not 50 <= number <= 999:
                raise UnknownForm(f"has an entry for an unknown architecture at byte {at}")
            yield kind == _PTX, number, letter
        at += length + payload


def name(*, is_ptx: bool, number: int, suffix: str) -> str:
    """Return the workspace's name of device code: machine code as `sm_120f`, PTX as `ptx 12.0f`."""
    return f"ptx {number // 10}.{number % 10}{suffix}" if is_ptx else f"sm_{number}{suffix}"


_SM9X_UP = "9.0a;10.0f;10.7f;11.0f;12.0f"
_SM10X = "10.0f;10.7f;11.0f"


@dataclass(frozen=True)
class ArchSupport:
    """Architectures for which upstream compiles a library, empty without own device code, and their
    source.
    """

    archs: str
    rule: str
    # A build for several families holds only one of them.
    takes_one: bool = False

    def serves(self, capability: str) -> bool:
        return serves(self.archs, capability)


HOST = ArchSupport("", "only the host's compiler compiles it (CMakeLists.txt, LANGUAGE CXX)")
# Arch support table, by the file name before its first dot; with its folder if two have the same
# name.
LIBRARIES = {
    "spinloop": HOST,
    "fs_io_C": HOST,
    "cumem_allocator": HOST,
    "vllm-rs": ArchSupport("", "Rust"),
    "_rust_tool_parser": ArchSupport("", "Rust"),
    "deep_gemm/_C": ArchSupport("", "compiles its kernels at run time (deepgemm.cmake)"),
    "_C_stable_libtorch": ArchSupport("7.5+PTX", "CUDA_ARCHS"),
    "_moe_C_stable_libtorch": ArchSupport("7.5+PTX", "CUDA_ARCHS"),
    "_vllm_fa2_C": ArchSupport("8.0+PTX", "_is_fa2_supported"),
    "_vllm_fa3_C": ArchSupport("9.0a", "_is_fa3_supported"),
    "_flashmla_C": ArchSupport("9.0a;10.0f;10.7f", "flashmla.cmake, SUPPORT_ARCHS"),
    "_flashmla_extension_C": ArchSupport("9.0a;10.0f;10.7f", "flashmla.cmake, SUPPORT_ARCHS"),
    "_deepselect_C": ArchSupport("10.0f", "deepselect.cmake, DEEPSELECT_SUPPORT_ARCHS"),
    "_flashkda_C": ArchSupport("9.0a;10.0f;12.0f", "flashkda.cmake, FLASH_KDA_SUPPORT_ARCHS"),
    "_qutlass_C": ArchSupport(
        "10.0f;10.7f;12.0f",
        "qutlass.cmake, QUTLASS_ARCHS: 10.0 if both are requested, as in the release wheels",
        takes_one=True,
    ),
}


@dataclass(frozen=True)
class Rule:
    """A message of configure, and the architectures of each block that may print it: it is expected
    if a block serves none of the requested ones.
    """

    pattern: str
    blocks: tuple[str, ...]
    rule: str


# `as CUDA Compiler version is not >= 12.8` is printed only if a requested architecture would have
# had the kernels.
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
    # Two blocks print the same message.
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
    """Messages of configure about kernels it leaves out, quoted: expected, failures, or unknown
    here.
    """

    expected: tuple[str, ...]
    failures: tuple[str, ...]
    unknown: tuple[str, ...]


def serves(archs: str, capability: str) -> bool:
    """Return whether code for one of `archs` runs on a GPU of this capability."""
    return any(runs_on(entry, capability) for entry in parse(archs))


def judge_not_built(sentences: Sequence[str], archs: str) -> NotBuilt:
    """Judge configure's messages about kernels that it leaves out, by its architecture list. With
    an empty list all messages are unknown.
    """
    wanted = tuple(entry.number for entry in parse(archs))
    expected, failures, unknown = [], [], []
    counts = Counter(sentence.strip().removeprefix("-- ") for sentence in sentences)
    for sentence, count in counts.items():
        rule = next((rule for rule in RULES if re.match(rule.pattern, sentence)), None)
        if _TOO_OLD.search(sentence):
            failures.append(f"{sentence}: the toolkit is too old for {archs}")
        elif rule is None or not wanted:
            unknown.append(
                f"{sentence}: not in the table of the workspace, so it may be right or wrong for"
                f" {archs or 'no architecture list'}"
            )
        else:
            serving = [block for block in rule.blocks if any(serves(block, one) for one in wanted)]
            others = " or ".join(block for block in rule.blocks if block not in serving)
            if count <= len(rule.blocks) - len(serving):
                expected.append(f"{sentence}: {others or 'covered'} ({rule.rule})")
            else:
                failures.append(
                    f"{sentence}: upstream has them for {' and '.join(serving)}, which {archs}"
                    f" requests ({rule.rule})"
                )
    return NotBuilt(tuple(expected), tuple(failures), tuple(unknown))


_NAME = re.compile(r"(?P<ptx>ptx |sm_)(?P<major>\d+?)\.?(?P<minor>\d)(?P<suffix>[af]?)")


@dataclass(frozen=True)
class Cubins:
    """Device code of a library, by its path below the tree: `sm_90a`, `ptx 8.0`. `trouble` is why
    it is unknown.
    """

    library: str
    archs: tuple[str, ...]
    trouble: str | None = None
    # The architectures in each of its fat binaries; empty if they are unknown.
    units: tuple[tuple[str, ...], ...] = ()


State = Literal["ok", "idle", "wrong"]


@dataclass(frozen=True)
class Judgement:
    """Verdict on a library. `idle`: no code of it runs on this GPU, and none has to."""

    library: str
    state: State
    sentence: str


def list_cubins(layout: Layout, libraries: Sequence[Path]) -> tuple[Cubins, ...]:
    """Return the device code of each library. Nothing is cached: reading the headers is faster than
    a hash.
    """
    return tuple(_list_one(layout, library) for library in libraries)


def judge(
    found: Sequence[Cubins], *, capabilities: Sequence[str], archs: str
) -> tuple[Judgement, ...]:
    """Judge the libraries of a CUDA build for the GPUs, or for an architecture list if there is no
    GPU.
    """
    wanted = tuple(dict.fromkeys(capabilities or (entry.number for entry in parse(archs))))
    return tuple(
        Judgement(one.library, *_verdict(one, _support_of(one.library), wanted)) for one in found
    )


def _verdict(
    found: Cubins, support: ArchSupport | None, wanted: Sequence[str]
) -> tuple[State, str]:
    """Return state and explanation of a library for the wanted capabilities."""
    served = [capability for capability in wanted if support is None or support.serves(capability)]
    if found.trouble:
        return "wrong", found.trouble
    if support and not support.archs:
        return "idle", f"needs no device code: {support.rule}"
    if support and wanted and not served:
        gpus = " and ".join(wanted)
        return "idle", f"upstream has none for {gpus}, but for {support.archs} ({support.rule})"
    if not found.archs and support:
        return "wrong", "holds no device code"
    if not found.archs:
        return "idle", "holds no device code, and the workspace has no rule that it should"
    return _coverage(found, support, served)


def _coverage(
    found: Cubins, support: ArchSupport | None, served: Sequence[str]
) -> tuple[State, str]:
    """Return whether the code of a library runs on each capability that upstream serves."""
    held, entries = ", ".join(found.archs), tuple(_entry(name) for name in found.archs)
    compiled = []
    for capability in served:
        fitting = [entry for entry in entries if runs_on(entry, capability)]
        if not fitting and support and support.takes_one:
            command = f"./scripts/inv rebuild --target {_stem(found.library)}"
            return "idle", f"holds {held} ({support.rule}); for {capability}: {command}"
        if not fitting:
            return "wrong", f"holds {held}, of which nothing runs on {capability}"
        if stranded := _stranded(entries, fitting, capability):
            limit = f"which runs on {stranded.number} alone and not on {capability}"
            return "wrong", f"holds {stranded.text}, {limit}"
        if count := driver_units(found, capability):
            of_all = f" ({count} of {len(found.units)} units)" if found.units else ""
            compiled.append(f"{capability}{of_all}")
    ptx = f"; the driver compiles PTX for {' and '.join(compiled)}" if compiled else ""
    return "ok", f"holds {held}{ptx}"


def driver_units(found: Cubins, capability: str) -> int:
    """Return how many fat binaries of a library the driver compiles for a GPU: of their entries
    only PTX serves it. Those without any have no kernel for this GPU.
    """
    fitting = (
        [entry for entry in map(_entry, unit) if runs_on(entry, capability)]
        for unit in found.units or (found.archs,)
    )
    return sum(bool(unit) and all(entry.has_ptx for entry in unit) for unit in fitting)


def driver_work(found: Sequence[Cubins], capabilities: Sequence[str]) -> str:
    """Return the libraries that the driver compiles in part for these GPUs, the largest part first,
    such as `_vllm_fa2_C (76 of 76 units for 9.0)`; empty if there are none.
    """
    rows = [(driver_units(one, gpu), one, gpu) for one in found for gpu in capabilities]
    return ", ".join(
        f"{_stem(one.library)} ({count} of {len(one.units) or 1} units for {gpu})"
        for count, one, gpu in sorted(rows, key=lambda row: -row[0])
        if count
    )


def _stranded(entries: Sequence[Entry], fitting: Sequence[Entry], capability: str) -> Entry | None:
    """Return machine code for a similar GPU alone, if this GPU has no such code: kernels compiled
    so have no other form (vllm-project/vllm#43367).
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


def _support_of(library: str) -> ArchSupport | None:
    return LIBRARIES.get(f"{PurePosixPath(library).parent.name}/{_stem(library)}") or LIBRARIES.get(
        _stem(library)
    )


def _stem(library: str) -> str:
    return PurePosixPath(library).name.split(".")[0]


def _entry(name: str) -> Entry:
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name} is not an architecture")
    return Entry(
        name, f"{found['major']}.{found['minor']}", found["suffix"], found["ptx"] == "ptx "
    )


def _list_one(layout: Layout, library: Path) -> Cubins:
    name = (
        str(library.relative_to(layout.vllm))
        if library.is_relative_to(layout.vllm)
        else library.name
    )
    try:
        found = units(library)
        return Cubins(name, _union(found), units=found)
    except OSError as exc:
        return Cubins(name, (), f"cannot be read: {exc.strerror}")
    except UnknownForm as exc:
        return Cubins(name, (), f"{exc}; its device code cannot be read")
