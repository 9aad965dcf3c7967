"""The C side of the harness: built once, then laid under a verb and everything that it starts. See
shim.c.
"""

import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")
_STATE = struct.Struct("5Q")
EVERYTHING, ONE_CHILD, THE_VERB = 0, 1, 2


@dataclass(frozen=True)
class Sync:
    """A point in time, in ns of the file system's clock, up to which `inode`, or None for
    everything, is on the disk.
    """

    at_ns: int
    inode: int | None


@dataclass(frozen=True)
class Preload:
    """A built shim with its state and log in `folder`."""

    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "calls"

    def environment(self, *, limit: int = 0, mode: int = EVERYTHING) -> dict[str, str]:
        """Reset the count, and return the variables under which a verb is counted, and ended at
        call `limit` where that is not 0.
        """
        (self.folder / "state").write_bytes(_STATE.pack(0, limit, mode, 0, 0))
        self.log.write_bytes(b"")
        return {
            "LD_PRELOAD": str(self.folder / "shim.so"),
            "KILL_STATE": str(self.folder / "state"),
            "KILL_LOG": str(self.log),
        }

    @property
    def count(self) -> int:
        """The changing calls so far."""
        return int(_STATE.unpack((self.folder / "state").read_bytes())[0])

    def call(self, number: int) -> str:
        """What the numbered call was."""
        return next(
            (line.split(" ", 3)[3] for line in self._lines() if line.startswith(f"{number} ")),
            "none",
        )

    def syncs(self) -> list[Sync]:
        found = []
        for line in self._lines():
            number, at_ns, _, what, inode = line.split(" ", 4)
            if number == "0" and what in ("sync", "fsync"):
                found.append(Sync(int(at_ns), int(inode) if what == "fsync" else None))
        return found

    def last(self, *kinds: str) -> dict[str, int]:
        """When a file of each name was last subject to a call of these kinds, in ns; folders are
        left out, for git names paths from where it stands.
        """
        found: dict[str, int] = {}
        for line in self._lines():
            _, at_ns, _, what, path = line.split(" ", 4)
            if what in kinds:
                found[path.rsplit("/", 1)[-1]] = int(at_ns)
        return found

    def _lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()


def build(folder: Path) -> Path | None:
    """Compile the shim into `folder`; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "shim.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", str(SOURCE), "-o", str(made), "-ldl"], check=True
    )
    return made


def lay(shim: Path, folder: Path) -> Preload:
    """A copy of the shim with a state of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy2(shim, folder / "shim.so")
    return Preload(folder)
