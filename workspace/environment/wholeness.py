"""Is every package of `.vllm` whole? uv takes one for installed once its dist-info is there, be it half linked or half removed.

Decided from what each package's RECORD lists. A file that is longer than listed is somebody's edit; one that is missing or shorter
is what a kill or a power cut left, in `.vllm` or, since uv syncs nothing, in the unpacked wheels of uv's cache that it links from.
"""

import csv
import shutil
from collections.abc import Iterable
from pathlib import Path

from workspace.core import process
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.environment import interpreter

_NEEDED = ("METADATA", "RECORD", "INSTALLER")
# How uv calls files that it has not yet renamed.
_UNFINISHED = ".tmp??????"
ANSWER_S = 60.0


def mend(layout: Layout, settings: Settings, *, journal: Journal, names: Iterable[str] = (), with_cache: bool = False) -> tuple[str, ...]:
    """Let uv see half packages as not installed, so that it installs them anew; return their dist-info names.

    Only those of `names`, as they begin, where there are any. `with_cache` also removes damaged wheels that uv has unpacked.
    """
    taken_out = []
    # A torch of the user's own is nothing that this workspace could have left half, nor could put back.
    kept = ("torch-",) if settings.switch("USE_EXISTING_TORCH") else ()
    for folder in interpreter.site_packages(layout):
        for info in sorted(folder.glob("*.dist-info")):
            is_meant = not info.name.startswith(kept) and (not names or info.name.startswith(tuple(f"{name}-" for name in names)))
            if is_meant and not _is_whole(info, _NEEDED):
                shutil.rmtree(info)
                taken_out.append(info.name.removesuffix(".dist-info"))
    for place in (layout.environment, *interpreter.site_packages(layout)):
        for left in place.glob(_UNFINISHED):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    if with_cache:
        taken_out += _mend_cache(layout, settings)
    if taken_out:
        journal.write(f"half there, and to be installed anew: {', '.join(taken_out)}")
    return tuple(taken_out)


def drop_bytecode(layout: Layout, *, since: Path) -> None:
    """Remove bytecode that is newer than the file `since`, all of it where there is none: one that a power cut made short breaks its import."""
    synced_ns = since.stat().st_mtime_ns if since.exists() else 0
    for top in (*interpreter.site_packages(layout), layout.vllm):
        for folder in top.rglob("__pycache__"):
            for path in folder.glob("*.pyc"):
                if path.stat().st_mtime_ns > synced_ns:
                    path.unlink()


def _mend_cache(layout: Layout, settings: Settings) -> list[str]:
    """Remove the unpacked wheels of uv's cache that are not whole; uv unpacks or fetches them again."""
    said = process.capture([interpreter.uv(layout), "cache", "dir"], env=settings.child_environment("plain"), timeout_s=ANSWER_S)
    damaged = []
    for archive in Path(said.stdout.strip() or "/nonexistent").glob("archive-v*/*"):
        infos = list(archive.glob("*.dist-info"))
        if any(not _is_whole(info, ("METADATA", "RECORD")) for info in infos):
            shutil.rmtree(archive, ignore_errors=True)
            damaged += [f"{info.name.removesuffix('.dist-info')} in uv's cache" for info in infos]
    return damaged


def _is_whole(info: Path, needed: Iterable[str]) -> bool:
    try:
        if any((info / name).stat().st_size == 0 for name in needed):
            return False
        with (info / "RECORD").open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
        # A RECORD that was cut off lacks its own row, or the end of another; one that uv has not yet completed lacks the installer's.
        listed = {row[0] for row in rows}
        if any(len(row) != 3 for row in rows) or any(f"{info.name}/{name}" not in listed for name in needed):
            return False
        return all((info.parent / name).stat().st_size >= int(size) for name, _, size in rows if size and not _is_elsewhere(name, needed))
    except (OSError, ValueError, csv.Error):
        return False


def _is_elsewhere(name: str, needed: Iterable[str]) -> bool:
    """An unpacked wheel holds its scripts and data in other places than it lists once installed."""
    return "INSTALLER" not in needed and name.startswith("..")
