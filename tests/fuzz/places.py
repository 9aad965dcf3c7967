"""What may lie where a file should: nothing, another kind of thing, a link that leads nowhere or
round and round.
"""

import contextlib
import os
import resource
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

NO_FILE = (
    "nothing",
    "directory",
    "fifo",
    "socket",
    "dangling link",
    "loop",
    "endless device",
    "link to a directory",
)
HANGS_AFTER_S = 10
# More than any test needs, and less than it takes to bring the machine into trouble.
ADDRESS_SPACE_BYTES = 6 << 30


def put(path: Path, thing: str | bytes) -> None:
    """Put a file with this content, or one of NO_FILE, at the path."""
    clear(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(thing, bytes):
        path.write_bytes(thing)
    elif thing == "directory":
        path.mkdir()
    elif thing == "fifo":
        os.mkfifo(path)
    elif thing == "socket":
        _socket(path)
    elif thing != "nothing":
        targets = {
            "dangling link": "nowhere/at/all",
            "loop": path.name,
            "endless device": "/dev/zero",
            "link to a directory": ".",
        }
        path.symlink_to(targets[thing])


def clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def _socket(path: Path) -> None:
    """Bound under a short name: a socket's address holds 108 bytes only (unix(7))."""
    folder = os.open(path.parent, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


@contextlib.contextmanager
def replaced(path: Path, thing: str | bytes) -> Iterator[None]:
    """Have something else at the path during the block."""
    parked = path.with_name(f"{path.name}.aside")
    was_there = os.path.lexists(path)
    if was_there:
        os.rename(path, parked)
    put(path, thing)
    try:
        yield
    finally:
        clear(path)
        if was_there:
            os.rename(parked, path)


@contextlib.contextmanager
def restored(root: Path) -> Iterator[None]:
    """Take away what appeared in the clone during the block, where nothing was to be made."""
    before = set(root.iterdir())
    yield
    for appeared in set(root.iterdir()) - before:
        clear(appeared)


@contextlib.contextmanager
def ends_soon() -> Iterator[None]:
    """Fail where the block hangs, as who opens a fifo does, or takes all memory, as who reads
    /dev/zero does.
    """

    def hang(_: int, __: FrameType | None) -> None:
        raise AssertionError(f"no end within {HANGS_AFTER_S} s")

    former, limits = signal.signal(signal.SIGALRM, hang), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, limits[1]))
    signal.alarm(HANGS_AFTER_S)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
