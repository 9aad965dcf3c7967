"""Files on disk and from the network: written whole or not at all, proven by hash."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from workspace.core.errors import SourceError, ToolchainError

CHUNK_BYTES = 1 << 20


def write_atomic(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `content` so that a reader, or a power cut, sees the old or the new file
    and never a half.

    Raises OSError where the folder cannot be written; the old file is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    descriptor, name = _locked_beside(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    _sync_folder(path.parent)


def _locked_beside(path: Path) -> tuple[int, str]:
    """Make an empty file beside `path`, locked as long as its writer lives: who finds it unlocked
    knows that it was left behind.
    """
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, name
        # Another writer took it for abandoned before it was locked.
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    """Remove what a writer of `path` that was killed has left. mkstemp draws eight letters."""
    for old in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        with contextlib.suppress(OSError), old.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            old.unlink()


def _sync_folder(folder: Path) -> None:
    """A rename is durable only once its folder is synced (fsync(2))."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_regular(path: Path) -> bytes:
    """Return what a regular file holds. Raises OSError, also for a pipe or a device, which could
    keep the reader for ever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content as 64 lower-case hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(
    url: str,
    destination: Path,
    *,
    expected_sha256: str | None,
    timeout_s: float,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> None:
    """Fetch `url` to `destination`, which appears only when whole and right.

    A transfer that broke off leaves `NAME.part` and is resumed by the next call (RFC 9110 range
    request). `on_progress` gets bytes so far and bytes in all, the latter None where the server
    does not say. Raises SourceError on a network failure, a status other than 200 or 206, or a
    wrong hash (the part is then deleted). Without a hash that anybody has published, None, only the
    length that the server says is held against what came.
    """
    import requests

    destination.parent.mkdir(parents=True, exist_ok=True)
    part = destination.with_name(destination.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    # A transfer coding would make the byte counts, and so the resume, wrong.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with requests.get(url, headers=headers, stream=True, timeout=timeout_s) as reply:
            complete = have and reply.status_code == requests.codes.requested_range_not_satisfiable
            if not complete:
                reply.raise_for_status()
                if reply.status_code != requests.codes.partial_content:
                    have = 0
                length = reply.headers.get("Content-Length")
                total = have + int(length) if length else None
                with part.open("ab" if have else "wb") as file:
                    for chunk in reply.iter_content(CHUNK_BYTES):
                        file.write(chunk)
                        have += len(chunk)
                        if on_progress:
                            on_progress(have, total)
                    file.flush()
                    os.fsync(file.fileno())
                if total is not None and have < total:
                    raise requests.ConnectionError(
                        f"the transfer ended after {have} of {total} bytes"
                    )
    except requests.RequestException as exc:
        raise SourceError(
            f"{destination.name} could not be fetched: {_reason(exc)}",
            hint="check the network and run the same command again; it goes on where it stopped",
        ) from exc
    found = sha256(part)
    if expected_sha256 is not None and found != expected_sha256:
        part.unlink()
        raise SourceError(
            f"{destination.name} has sha256 {found}, pinned is {expected_sha256}: it was not used",
            hint=(
                "run the command again; if the hash stays wrong, the index or mirror serves another"
                " file than was pinned"
            ),
        )
    os.replace(part, destination)
    _sync_folder(destination.parent)


def _reason(exc: BaseException) -> str:
    """The innermost cause in its own words: requests wraps a name that does not resolve four times.

    A status goes without requests' sentence, which holds the address and with it any password
    there.
    """
    import requests

    if isinstance(exc, requests.HTTPError) and exc.response is not None:
        return f"the server answers {exc.response.status_code} {exc.response.reason}"
    while exc.__context__ is not None:
        exc = exc.__context__
    return str(exc) or type(exc).__name__


def differences(recorded: Mapping[str, str], current: Mapping[str, str]) -> tuple[str, ...]:
    """Say each input that changed: `torch 2.13.0 → 2.14.0`. Digests are told apart by name only."""
    return tuple(
        _difference(name, recorded.get(name, "nothing"), text)
        for name, text in current.items()
        if recorded.get(name) != text
    )


def _difference(name: str, old: str, new: str) -> str:
    if len(new) == 64 and len(old) in (64, len("nothing")):
        return f"{name} changed"
    return f"{name} {old or 'none'} → {new or 'none'}"


# ioctl_ficlone(2).
_FICLONE = 0x40049409


def copy_files(source: Path, target: Path, paths: Sequence[str]) -> None:
    """Copy files with their times. One that is there appears whole or not at all."""
    target.mkdir(parents=True, exist_ok=True)
    for path in paths:
        made = target / path
        made.parent.mkdir(parents=True, exist_ok=True)
        scratch = made.with_name(f".{made.name}.copying")
        if (source / path).is_symlink():
            scratch.unlink(missing_ok=True)
            scratch.symlink_to(os.readlink(source / path))
        else:
            _copy(source / path, scratch)
        os.replace(scratch, made)


def files_below(folder: Path) -> tuple[str, ...]:
    """The paths of all files and links below a folder."""
    return tuple(
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    )


def _copy(source: Path, target: Path) -> None:
    try:
        with source.open("rb") as old, target.open("wb") as new:
            fcntl.ioctl(new, _FICLONE, old.fileno())
    except OSError:
        shutil.copyfile(source, target)
    shutil.copystat(source, target)


@contextlib.contextmanager
def folder_beside(destination: Path) -> Iterator[Path]:
    """Make an empty folder on the file system of `destination`, whose parent is made where it is
    missing.

    Raises ToolchainError where that, or anything that the block writes, fails for want of rights or
    space.
    """
    prefix = _prefix(destination)
    lock: int | None = None
    folder: Path | None = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        sweep_beside(destination)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=destination.parent))
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        # The kernel drops the lock when its holder dies, whatever it dies of.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    except OSError as exc:
        where = exc.filename or destination.parent
        raise ToolchainError(
            f"{where} cannot be written: {exc.strerror}",
            hint=f"df -h {destination.parent}; ls -ld {destination.parent}",
        ) from exc
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def sweep_beside(destination: Path) -> None:
    """Remove the folders beside `destination` that killed runs have left."""
    for old in destination.parent.glob(f"{_prefix(destination)}*"):
        _remove_abandoned_folder(old)


def _prefix(destination: Path) -> str:
    return f".{destination.name}.making-"


def put_in_place(made: Path, destination: Path) -> None:
    """Rename a finished folder to where it belongs: nothing, or an empty folder. Raises
    ToolchainError where something has come to lie there.

    What it holds is on the disk before: a power cut must not leave the name with empty files under
    it.
    """
    os.sync()
    try:
        os.rename(made, destination)
    except OSError as exc:
        raise ToolchainError(
            f"{destination} cannot be put in place: {exc.strerror}", hint=f"ls -la {destination}"
        ) from exc


def _remove_abandoned_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
