"""Folders in which something is made before it is put in place with one rename.

They lie beside what they become, and are gone when the block ends; those of a run that was killed are removed by the next one.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from workspace.core.errors import ToolchainError


@contextlib.contextmanager
def beside(destination: Path) -> Iterator[Path]:
    """Make an empty folder on the file system of `destination`, whose parent is made where it is missing.

    Raises ToolchainError where that, or anything that the block writes, fails for want of rights or space.
    """
    prefix = _prefix(destination)
    lock: int | None = None
    folder: Path | None = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        sweep(destination)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=destination.parent))
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        # The kernel drops the lock when its holder dies, whatever it dies of.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    except OSError as exc:
        where = exc.filename or destination.parent
        raise ToolchainError(f"{where} cannot be written: {exc.strerror}", hint=f"df -h {destination.parent}; ls -ld {destination.parent}") from exc
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def sweep(destination: Path) -> None:
    """Remove the folders beside `destination` that killed runs have left."""
    for old in destination.parent.glob(f"{_prefix(destination)}*"):
        _remove_abandoned(old)


def _prefix(destination: Path) -> str:
    return f".{destination.name}.making-"


def put_in_place(made: Path, destination: Path) -> None:
    """Rename a finished folder to where it belongs: nothing, or an empty folder. Raises ToolchainError where something has come to lie there.

    What it holds is on the disk before: a power cut must not leave the name with empty files under it.
    """
    os.sync()
    try:
        os.rename(made, destination)
    except OSError as exc:
        raise ToolchainError(f"{destination} cannot be put in place: {exc.strerror}", hint=f"ls -la {destination}") from exc


def _remove_abandoned(folder: Path) -> None:
    with contextlib.suppress(OSError):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
