"""Files on disk and from the network: complete or absent, verified by hash.

Also folders that appear with one rename, and copies that share blocks.
"""

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

from workspace.core import hints
from workspace.core.errors import SourceError, ToolchainError

CHUNK_BYTES = 1 << 20


def write_atomic(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `content`; a reader or a power cut sees the old or the new file, never
    half.

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
    """Make an empty file beside `path` that is locked as long as its writer lives.

    An unlocked file of this kind was left by a killed writer. The locked file is the one that is
    renamed to `path`, and below a folder itself is locked: filelock can do neither.
    """
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, name
        # Another writer removed the file before it was locked.
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    """Remove the files that killed writers of `path` left; mkstemp draws eight letters."""
    for old in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        with contextlib.suppress(OSError), old.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            old.unlink()


def _sync_folder(folder: Path) -> None:
    """Sync a folder, which makes a rename in it durable (fsync(2))."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises OSError, also for a pipe or a device, which could block the reader for ever.
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
    """Fetch `url` to `destination`, which appears only when it is complete and matches its hash.

    An interrupted transfer leaves `NAME.part`; the next call resumes it (RFC 9110 range request).
    `on_progress` gets the bytes so far and the total bytes, None where the server does not send the
    length. With `expected_sha256` None, for a file without a published hash, only the length is
    checked. Raises SourceError on a network failure, a status other than 200 or 206, or a wrong
    hash, which also deletes the part.
    """
    import requests

    destination.parent.mkdir(parents=True, exist_ok=True)
    part = destination.with_name(destination.name + ".part")
    try:
        _transfer(url, part, timeout_s, on_progress)
    except requests.RequestException as exc:
        raise SourceError(
            f"{destination.name} could not be fetched: {_reason(exc)}",
            hint=hints.text("core.network_resumes"),
        ) from exc
    found = sha256(part)
    if expected_sha256 is not None and found != expected_sha256:
        part.unlink()
        raise SourceError(
            f"{destination.name} has sha256 {found}, pinned is {expected_sha256}: it was not used",
            hint=hints.text("core.wrong_hash"),
        )
    os.replace(part, destination)
    _sync_folder(destination.parent)


def _transfer(
    url: str,
    part: Path,
    timeout_s: float,
    on_progress: Callable[[int, int | None], None] | None,
) -> None:
    """Fetch what `part` lacks of `url`. Raises requests.RequestException."""
    import requests

    have = part.stat().st_size if part.exists() else 0
    # With a transfer coding the byte counts, and so the resume, would be wrong.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=timeout_s) as reply:
        if have and reply.status_code == requests.codes.requested_range_not_satisfiable:
            return
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
            raise requests.ConnectionError(f"the transfer ended after {have} of {total} bytes")


def _reason(exc: BaseException) -> str:
    """Return the innermost cause: requests wraps an unresolved name four times.

    A status comes without the sentence of requests, which holds the address and any password in it.
    """
    import requests

    if isinstance(exc, requests.HTTPError) and exc.response is not None:
        return f"the server answers {exc.response.status_code} {exc.response.reason}"
    while exc.__context__ is not None:
        exc = exc.__context__
    return str(exc) or type(exc).__name__


def differences(
    recorded: Mapping[str, str],
    current: Mapping[str, str],
    changed_files: Callable[[str], Sequence[str]] = lambda name: (),
) -> tuple[str, ...]:
    """Return each changed input as text: `torch 2.13.0 → 2.14.0`.

    For a digest over files it is `sources changed: a.cu`, with the names that `changed_files`
    returns for the input, or `sources changed` without any.
    """
    return tuple(
        _difference(name, recorded.get(name, "nothing"), text, changed_files)
        for name, text in current.items()
        if recorded.get(name) != text
    )


def _difference(
    name: str, old: str, new: str, changed_files: Callable[[str], Sequence[str]]
) -> str:
    if len(new) == 64 and len(old) in (64, len("nothing")):
        names = listed(changed_files(name))
        return f"{name} changed" + (f": {names}" if names else "")
    return f"{name} {old or 'none'} → {new or 'none'}"


def listed(names: Sequence[str], limit: int = 3) -> str:
    """Return `a, b, c and 2 more`."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# ioctl_ficlone(2).
_FICLONE = 0x40049409


def copy_files(source: Path, target: Path, paths: Sequence[str]) -> None:
    """Copy files with their times; each appears complete or not at all."""
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
    """Return the relative paths of all files and links below a folder, sorted."""
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
    """Make an empty folder on the file system of `destination`; missing parents are made.

    The folder is removed after the block. Raises ToolchainError where the folder, or a write of the
    block, fails for missing rights or space.
    """
    prefix = _prefix(destination)
    lock: int | None = None
    folder: Path | None = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        sweep_beside(destination)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=destination.parent))
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        # The kernel releases the lock when its holder dies, for any reason.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    except OSError as exc:
        where = exc.filename or destination.parent
        raise ToolchainError(
            f"{where} cannot be written: {exc.strerror}",
            hint=hints.text("core.disk_and_rights", folder=destination.parent),
        ) from exc
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def sweep_beside(destination: Path) -> None:
    """Remove the folders that killed runs left beside `destination`."""
    for old in destination.parent.glob(f"{_prefix(destination)}*"):
        _remove_abandoned_folder(old)


def _prefix(destination: Path) -> str:
    return f".{destination.name}.making-"


def put_in_place(made: Path, destination: Path) -> None:
    """Rename a finished folder to `destination`, which must be absent or an empty folder.

    The content is synced first: after a power cut the name must not hold empty files. Raises
    ToolchainError where something else lies at `destination`.
    """
    os.sync()
    try:
        os.rename(made, destination)
    except OSError as exc:
        raise ToolchainError(
            f"{destination} cannot be put in place: {exc.strerror}",
            hint=hints.text("core.list_all", path=destination),
        ) from exc


def _remove_abandoned_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
