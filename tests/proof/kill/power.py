"""What a power cut leaves of a world whose processes have all just died: only what was synced is sure to be there.

A file whose content is newer than the last sync comes back empty, cut short, whole or not at all; one that is older and was only
linked or renamed since comes back or does not. One that was only given another time or mode stays, and so does what is older than the run.
"""

import filecmp
import os
import random
import stat
from collections.abc import Sequence
from pathlib import Path

from tests.proof.kill.preload import Preload

# Times of files are taken from a clock that ticks every 4 ms or 10 ms.
TICK_NS = 10_000_000


def cut(parts: Sequence[str], folder: Path, before: Path, shim: Preload, *, began_ns: int, draw: random.Random) -> list[str]:
    """Damage what was written since `began_ns` below the parts of `folder` and not synced; return a line for each such file.

    `before` holds the parts as they were: a file whose content is still that of then was at most touched, as git touches an object
    that it need not write.
    """
    syncs, named, opened = shim.syncs(), shim.last("rename", "link"), shim.last("open")
    whole_ns = max((sync.at_ns for sync in syncs if sync.inode is None), default=began_ns)
    synced: dict[int, int] = {}
    for sync in syncs:
        if sync.inode is not None:
            synced[sync.inode] = max(sync.at_ns, synced.get(sync.inode, 0))
    said = []
    for part in parts:
        for place, _, names in os.walk(folder / part):
            for name in sorted(names):
                path = Path(place, name)
                found = path.lstat()
                if not stat.S_ISREG(found.st_mode) or found.st_ctime_ns <= whole_ns + TICK_NS:
                    continue
                if found.st_mtime_ns <= synced.get(found.st_ino, 0) + TICK_NS:
                    continue
                if _is_same(path, before / path.relative_to(folder)):
                    continue
                is_new = max(found.st_mtime_ns, opened.get(name, 0)) > max(whole_ns, began_ns) + TICK_NS
                if not is_new and named.get(name, 0) <= whole_ns:
                    continue
                if verdict := _damage(path, is_new=is_new, draw=draw):
                    said.append(f"{verdict} {path}")
    return said


def _is_same(path: Path, former: Path) -> bool:
    return former.is_file() and filecmp.cmp(path, former, shallow=False)


def _damage(path: Path, *, is_new: bool, draw: random.Random) -> str:
    choice = draw.choice(("kept", "empty", "cut", "gone") if is_new else ("kept", "gone"))
    if choice == "gone":
        path.unlink()
    elif choice in ("empty", "cut"):
        size = path.stat().st_size
        # Written anew under its name: other names of this file are damaged, or not, on their own.
        os.truncate(path, 0 if choice == "empty" or not size else draw.randrange(size))
    return "" if choice == "kept" else choice
