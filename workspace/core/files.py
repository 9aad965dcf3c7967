"""Files on disk and from the network: complete or absent, verified by hash.

Also archives of others, folders that appear with one rename, and copies that share blocks.
"""

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import math
import os
import re
import shutil
import stat
import tempfile
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from workspace.core import errors, hints
from workspace.core.errors import SourceError, ToolchainError

if TYPE_CHECKING:
    import zipfile

    import requests

CHUNK_BYTES = 1 << 20
# The bound of every answer: its bytes, and its time beside that of the slowest useful line.
LARGEST_FILE = 16 << 30
LARGEST_PAGE = 64 << 20
ANSWER_S = 30.0
SLOWEST_BYTES_PER_S = 16 << 10


def write_atomic(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `content`; a reader or a power cut sees the old or the new file.

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


def read_regular(path: Path, *, most_bytes: int = LARGEST_PAGE) -> bytes:
    """Return the content of a regular file of at most `most_bytes`.

    Raises OSError, also for a pipe or a device, which could block the reader for ever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if found.st_size > most_bytes:
            raise OSError(errno.EFBIG, f"it is larger than {most_bytes >> 20} MiB", str(path))
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
            f"{destination.name} could not be fetched: {reason_of(exc)}",
            hint=hints.text("core.network_resumes"),
        ) from exc
    found = sha256(part)
    if expected_sha256 is not None and found != expected_sha256:
        part.unlink()
        raise SourceError(
            f"{destination.name} has sha256 {found}, not the pinned {expected_sha256}: it was not"
            " used",
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
    with opened(url, timeout_s=timeout_s, headers=headers) as reply:
        if have and reply.status_code == requests.codes.requested_range_not_satisfiable:
            return
        reply.raise_for_status()
        if reply.status_code != requests.codes.partial_content:
            have = 0
        length = _length(reply)
        total = have + length if length else None
        with part.open("ab" if have else "wb") as file:
            for chunk in received(reply, LARGEST_FILE):
                file.write(chunk)
                have += len(chunk)
                if on_progress:
                    on_progress(have, total)
            file.flush()
            os.fsync(file.fileno())


def own_certificates() -> str | None:
    """Return the file of SSL_CERT_FILE, which uv and git's OpenSSL read and requests does not.

    Where REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE is set, requests prefers those by itself.
    """
    import ssl

    paths = ssl.get_default_verify_paths()
    return paths.cafile if paths.cafile != paths.openssl_cafile else None


@contextlib.contextmanager
def opened(
    url: str,
    *,
    timeout_s: float,
    headers: Mapping[str, str] | None = None,
    session: "requests.Session | None" = None,
    check_redirect: Callable[[str], object] | None = None,
) -> Iterator["requests.Response"]:
    """Request a URL and follow its redirects; `received` then reads the content.

    `timeout_s` bounds a connection and each read. `check_redirect` gets the address of each
    redirect, and raises for one that must not be requested. Raises requests.RequestException.
    """
    import requests

    with contextlib.ExitStack() as stack:
        client = session or stack.enter_context(requests.Session())
        client.verify = own_certificates() or client.verify
        targets: list[str | None] = []

        def take_target(reply: "requests.Response", **_: object) -> None:
            # Session.send would read the content of a redirect, which may be endless.
            targets.append(client.get_redirect_target(reply))
            reply.headers.pop("Location", None)

        get = functools.partial(client.get, headers=headers, timeout=timeout_s, stream=True)
        get = functools.partial(get, allow_redirects=False, hooks={"response": take_target})
        for _ in range(client.max_redirects):
            reply = _in_time(functools.partial(get, url))
            stack.callback(reply.close)
            if not targets[-1]:
                yield reply
                return
            url = requests.compat.urljoin(url, targets[-1])
            if check_redirect:
                check_redirect(url)
        raise requests.TooManyRedirects(f"more than {client.max_redirects} redirects")


def received(
    reply: "requests.Response", largest_bytes: int, *, longest_s: float = math.inf
) -> Iterator[bytes]:
    """Yield the content of an answer as it arrives, within one bound on bytes and time.

    Raises requests.RequestException where there are more bytes, where they come more slowly than
    SLOWEST_BYTES_PER_S after the first ANSWER_S seconds, and where the connection breaks.
    """
    import requests
    from urllib3.exceptions import HTTPError

    expected, began, have = _length(reply), time.monotonic(), 0
    while have <= largest_bytes and expected <= largest_bytes:
        try:
            # iter_content would wait until a whole chunk is there.
            chunk = reply.raw.read1(CHUNK_BYTES, decode_content=True)
        except (HTTPError, OSError) as exc:
            raise requests.ConnectionError(str(exc), request=reply.request) from exc
        if not chunk:
            if have < expected and "Content-Encoding" not in reply.headers:
                raise requests.ConnectionError(f"it ended after {have} of {expected} bytes")
            return
        have += len(chunk)
        spent_s = time.monotonic() - began
        if spent_s > min(longest_s, ANSWER_S + have / SLOWEST_BYTES_PER_S):
            raise requests.Timeout(f"only {have} bytes came in {spent_s:.0f} s")
        yield chunk
    raise requests.ConnectionError(f"it is larger than {largest_bytes >> 20} MiB")


def _length(reply: "requests.Response") -> int:
    """Return the bytes that an answer announces, 0 for none or an absurd number."""
    text = reply.headers.get("Content-Length", "")
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else 0


def _in_time(get: "Callable[[], requests.Response]") -> "requests.Response":
    """Return an answer; a name that is not resolved, or headers that drip, know no limit."""
    import requests

    is_given_up = threading.Event()
    answers: list[requests.Response] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(get())
        except BaseException as exc:
            failures.append(exc)
        if is_given_up.is_set():
            for late in answers:
                late.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if failures:
        raise failures[0]
    if not answers:
        is_given_up.set()
        raise requests.Timeout(f"no answer in {ANSWER_S:g} s")
    return answers[0]


def reason_of(exc: BaseException) -> str:
    """Return why a request failed: the innermost cause, because requests wraps it four times.

    A status comes without the sentence of requests, which holds the address and any password in it.
    A proxy of the environment is named: it may be the cause, and no cause names it.
    """
    import requests

    if isinstance(exc, requests.HTTPError) and exc.response is not None:
        return f"the server answers {exc.response.status_code} {exc.response.reason}"
    request = exc.request if isinstance(exc, requests.RequestException) else None
    while exc.__context__ is not None:
        exc = exc.__context__
    cause = (isinstance(exc, OSError) and exc.strerror) or str(exc) or type(exc).__name__
    url = str(request.url) if request is not None else ""
    proxies = requests.utils.get_environ_proxies(url) if url else {}
    if proxy := requests.utils.select_proxy(url, proxies):
        name = f"{url.partition(':')[0].upper()}_PROXY"
        cause += f" (through the proxy {proxy.rpartition('@')[2]}, {name} or ALL_PROXY)"
    return cause


def inner_path(name: str) -> PurePosixPath:
    """Return where a member of an archive belongs below the folder that it is unpacked into.

    Raises ValueError, with the fault, for a name that leads elsewhere on any file system: absolute,
    upwards, cut by a zero byte, or into a .git, which would configure the repository around it.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
        raise ValueError(f"{name!r} is a path outside of the archive")
    if "\0" in name:
        raise ValueError(f"{name!r} has a zero byte")
    for part in path.parts:
        # Case, marks without width, and blanks and dots at the end do not count everywhere, and a
        # short name of Windows is the same folder (git's verify_path, CVE-2014-9390).
        seen = "".join(letter for letter in part if unicodedata.category(letter) != "Cf")
        if seen.casefold().rstrip(". ").partition(":")[0] in (".git", "git~1"):
            raise ValueError(f"{name!r} is a path into git's own folder")
    return path


def check_zip(archive: "zipfile.ZipFile") -> None:
    """Raise ValueError where a member of a zip file or a wheel leads elsewhere or is no file."""
    for item in archive.infolist():
        inner_path(item.filename)
        if stat.S_IFMT(item.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"{item.filename!r} is neither file nor folder")


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
        names = errors.listed(changed_files(name))
        return f"{name} changed" + (f": {names}" if names else "")
    return f"{name} {old or 'none'} → {new or 'none'}"


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
    lock: int | None = None
    folder: Path | None = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        sweep_beside(destination)
        folder = Path(tempfile.mkdtemp(prefix=_prefix(destination), dir=destination.parent))
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
            hint=hints.text("core.list_names", folder=destination),
        ) from exc


def _remove_abandoned_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
