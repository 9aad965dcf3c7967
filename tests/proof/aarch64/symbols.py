"""Whether the loader of a Spark would find every symbol of a library: read from ELF files of
aarch64, of which this machine runs none.
"""

import re
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.proof.aarch64 import packages
from workspace.compile import device_code
from workspace.compile.device_code import Cubins
from workspace.install import verify

# The packages of the distribution with the libraries that the wheels take from the system.
SYSTEM = ("libc6", "libgcc-s1", "libstdc++6", "libnuma1")
_NAME = re.compile(r".+\.so(\.\d+)*")
# e_machine (elf(5)).
_AARCH64 = 183


@dataclass(frozen=True)
class Library:
    """A shared library: its name for the loader, the libraries that it names, the symbols that it
    needs (weak ones apart) and has, and its device code.
    """

    path: str
    name: str
    named: frozenset[str]
    needs: frozenset[str]
    has: frozenset[str]
    code: Cubins


def read(file: Path, path: str) -> Library:
    """Read a library of aarch64. Raises ValueError for a file of another kind."""
    links = verify.linkage(file)
    if links.machine != _AARCH64:
        raise ValueError(f"{path} is no library of aarch64")
    code = Cubins(path, device_code.architectures(file), units=device_code.units(file))
    return Library(path, links.name or file.name, links.named, links.needs, links.has, code)


def in_wheel(wheel: Path) -> Iterator[Library]:
    """Yield the libraries of a wheel, unpacked one at a time: torch's have 1 GB."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        for member in archive.namelist():
            if _NAME.fullmatch(Path(member).name):
                file = Path(archive.extract(member, folder))
                yield read(file, member)
                file.unlink()


def of_system(folder: Path) -> Iterator[Library]:
    """Yield the libraries of the distribution for aarch64, fetched into a folder."""
    root = folder / "root"
    packages.unpack(SYSTEM, folder, root, with_dependencies=False)
    for file in sorted(root.rglob("*.so*")):
        if _NAME.fullmatch(file.name) and not file.is_symlink():
            yield read(file, file.name)


def missing(library: Library, others: list[Library]) -> set[str]:
    """Return the symbols of a library that none of the others has. The interpreter's own symbols,
    which no library brings, do not count.
    """
    there = frozenset[str]().union(*(other.has for other in others))
    return {
        name for name in library.needs - there - library.has if not name.startswith(("Py", "_Py"))
    }
