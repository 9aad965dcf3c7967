"""Copies of many files that share their blocks with the originals where the file system can."""

import fcntl
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

# ioctl_ficlone(2).
_FICLONE = 0x40049409


def copy_files(source: Path, target: Path, paths: Sequence[str]) -> None:
    """Copy files with their times. One that is there appears whole or not at all."""
    target.mkdir(parents=True, exist_ok=True)
    for path in paths:
        made = target / path
        made.parent.mkdir(parents=True, exist_ok=True)
        aside = made.with_name(f".{made.name}.copying")
        if (source / path).is_symlink():
            aside.unlink(missing_ok=True)
            aside.symlink_to(os.readlink(source / path))
        else:
            _copy(source / path, aside)
        os.replace(aside, made)


def files_below(folder: Path) -> tuple[str, ...]:
    """The paths of all files and links below a folder."""
    return tuple(str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file())


def _copy(source: Path, target: Path) -> None:
    try:
        with source.open("rb") as old, target.open("wb") as new:
            fcntl.ioctl(new, _FICLONE, old.fileno())
    except OSError:
        shutil.copyfile(source, target)
    shutil.copystat(source, target)
