"""What a power cut leaves of a world whose processes have all just died: only what was synced is
sure to be there.

A file whose content is newer than the last sync comes back empty, cut short, whole or not at all;
one that is older and was only linked or renamed since comes back or does not. One that was only
given another time or mode stays, and so does what is older than the run.
"""

import filecmp
import os
import random
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.proof.kill.preload import Preload

# Times of files are taken from a clock that ticks every 4 ms or 10 ms.
TICK_NS = 10_000_000


def standing(parts: Sequence[str], folder: Path) -> dict[int, int]:
    """Every file that there is, by its inode, with the time of its content in ns."""
    return {
        found.st_ino: found.st_mtime_ns
        for path in _files(parts, folder)
        if stat.S_ISREG((found := path.lstat()).st_mode)
    }


def cut(
    parts: Sequence[str],
    folder: Path,
    before: Path,
    shim: Preload,
    *,
    stood: Mapping[int, int],
    began_ns: int,
    draw: random.Random,
) -> list[str]:
    """Damage what was written since `began_ns` below the parts of `folder` and not synced; return a
    line for each such file.

    `before` holds the parts as they were: a file whose content is still that of then was at most
    touched, and so was one that nobody has opened or named since the sync: git touches an object
    that it need not write. What `stood` then may lie under another name now, moved or linked: that
    name may be lost, not the content.
    """
    syncs, named, opened = shim.syncs(), shim.last("rename", "link"), shim.last("open")
    whole_ns = max((sync.at_ns for sync in syncs if sync.inode is None), default=began_ns)
    synced: dict[int, int] = {}
    for sync in syncs:
        if sync.inode is not None:
            synced[sync.inode] = max(sync.at_ns, synced.get(sync.inode, 0))
    output = []
    for path in _files(parts, folder):
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_ctime_ns <= whole_ns + TICK_NS:
            continue
        if found.st_mtime_ns <= synced.get(found.st_ino, 0) + TICK_NS:
            continue
        if _is_same(path, before / path.relative_to(folder)):
            continue
        was_opened, was_named = (calls.get(path.name, 0) > whole_ns for calls in (opened, named))
        # Calls are known by the name alone, and many a file is called __init__.py.
        is_new = was_opened or (was_named and found.st_mtime_ns > max(whole_ns, began_ns) + TICK_NS)
        is_new = is_new and stood.get(found.st_ino) != found.st_mtime_ns
        if not is_new and not was_named:
            continue
        if verdict := _damage(path, is_new=is_new, draw=draw):
            output.append(f"{verdict} {path}")
    return output


def _files(parts: Sequence[str], folder: Path) -> Iterator[Path]:
    for part in parts:
        for place, _, names in os.walk(folder / part):
            yield from (Path(place, name) for name in sorted(names))


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
