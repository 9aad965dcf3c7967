"""For which GPUs a library holds machine code and PTX, by the headers of its fat binaries: a few pages read, whatever the size of the file.

NVIDIA documents the containers nowhere, so every field that is read here is checked, and a form that is not known is said to be unknown.
Against cuobjdump on each library of the 0.31.0 release wheel: the same counts for every architecture, in 0.1 s instead of 15. That tool
lists `sm_120` for 12.0 and for 12.0f; only `--dump-elf` tells them apart, and it took 218 s for one library of 79 MB.
"""

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

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
    """Return what the library holds, as `sm_90a`, `sm_120f`, `ptx 8.0`, sorted by number; nothing where it has no device code.

    Raises UnknownForm, also for a file that was cut, and OSError.
    """
    with library.open("rb") as file:
        try:
            view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except ValueError as exc:
            raise UnknownForm("is empty") from exc
        with view:
            try:
                found = {entry for start, size in _fat_sections(view) for entry in _entries(view, start, start + size)}
            except (struct.error, IndexError) as exc:
                raise UnknownForm("ends before what its headers announce") from exc
    return tuple(name(is_ptx=is_ptx, number=number, suffix=suffix) for is_ptx, number, suffix in sorted(found))


def _fat_sections(view: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Offset and size of each section with fat binaries (elf(5), 64 bit, little endian: x86-64 and Arm)."""
    if view[:6] != b"\x7fELF\x02\x01":
        raise UnknownForm("is no ELF file of 64 bit, little endian")
    (table,) = struct.unpack_from("<Q", view, 40)
    size, count, names = struct.unpack_from("<HHH", view, 58)
    if not table or not count:
        raise UnknownForm("has no table of sections")
    headers = [struct.unpack_from("<IIQQQQIIQQ", view, table + number * size) for number in range(count)]
    for header in headers:
        start = headers[names][4] + header[0]
        if view[start : view.find(b"\0", start)] in _SECTIONS:
            yield header[4], header[5]


def _entries(view: mmap.mmap, at: int, end: int) -> Iterator[tuple[bool, int, str]]:
    """Kind, architecture and letter of every entry of a section, which containers and zeros between them must fill to the last byte."""
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
                (number,), (flags,) = struct.unpack_from("<I", view, inner + _ARCH_AT), struct.unpack_from("<Q", view, inner + _FLAGS_AT)
                letter = _LETTERS.get(flags & (_EXACT | _FAMILY))
                if letter is None or not 50 <= number <= 999:
                    raise UnknownForm(f"has an entry for an unknown architecture at byte {inner}")
                yield kind == _PTX, number, letter
            inner += length + payload
        at = last


def name(*, is_ptx: bool, number: int, suffix: str) -> str:
    """How the workspace spells what a library holds: machine code as `sm_120f`, PTX as `ptx 12.0f`."""
    return f"ptx {number // 10}.{number % 10}{suffix}" if is_ptx else f"sm_{number}{suffix}"
