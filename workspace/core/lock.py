"""One lock for everything that writes, and the abandoned lock files of a killed git.

The kernel releases a flock when its holder dies, so a dead holder never blocks a verb. It is
fcntl's and not filelock's: a guard inherits the descriptor and holds the lock until the programs of
a killed verb have ended. filelock unlocks when it releases, which frees the lock for the guard too.
"""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from workspace.core import hints, records
from workspace.core.errors import LockError, ToolchainError

POLL_S = 0.2


@dataclass(frozen=True)
class Held:
    """The held lock. A process that inherits `descriptor` keeps it held; `note` records the
    step.
    """

    descriptor: int
    note: Callable[[str], None]


@contextlib.contextmanager
def hold(
    path: Path,
    *,
    verb: str,
    wait: bool = False,
    on_wait: Callable[[str], None] | None = None,
    is_shared: bool = False,
) -> Iterator[Held]:
    """Hold the workspace's lock while the block runs. `verb` is the typed command: `inv bootstrap`.
    Those that only read may share it.

    Raises LockError, which names the holder, its start and its step, unless `wait` is set;
    `on_wait` then gets that sentence once. Raises ToolchainError where `path` is not a regular
    file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise ToolchainError(
            f"{path} is not a regular file, so it cannot be the lock",
            hint=hints.text("core.what_it_is", path=path),
        )
    # Python opens files close-on-exec: only a guard inherits the lock and keeps it until it has
    # ended the programs of a killed verb.
    with path.open("a+", encoding="utf-8") as file:
        is_reported = False
        while True:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                sentence = _holder(file.name)
                if not wait:
                    # Only a verb with `on_wait` has a flag --wait.
                    raise LockError(
                        sentence,
                        hint=hints.text("core.wait_flag") if on_wait else hints.text("core.wait"),
                    ) from None
                if on_wait and not is_reported:
                    on_wait(f"waiting: {sentence}")
                    is_reported = True
                time.sleep(POLL_S)
        held = Held(file.fileno(), _recorder(file, verb))
        held.note("")
        try:
            yield held
        finally:
            file.truncate(0)


def _recorder(file: TextIO, verb: str) -> Callable[[str], None]:
    """Return a function that writes holder and step into the lock file."""
    since = records.utc_now()
    holder = _Holder(str(os.getpid()), verb, since)

    def note(doing: str) -> None:
        # One write: a reader sees the old record, the new one or none, never a mixture.
        text = records.encode(replace(holder, doing=doing), indent=None).decode()
        file.truncate(0)
        file.write(text)
        file.flush()

    return note


@dataclass(frozen=True)
class _Holder:
    """Content of the lock file."""

    pid: str
    verb: str
    since: str
    doing: str = ""


def _holder(name: str) -> str:
    try:
        holder = records.decode(Path(name).read_bytes(), _Holder)
    except (OSError, records.DecodeError):
        return "another process is changing this workspace"
    doing = f"; its present step is {holder.doing}" if holder.doing else ""
    return (
        f"{holder.verb} (process {holder.pid}) has been changing this workspace since"
        f" {holder.since}{doing}"
    )


# How long a lock of git is watched, and unused when it counts as abandoned.
WAIT_S = 3.0
QUIET_S = 1.0
_NAMED = re.compile(
    r"Unable to create '([^']+\.lock)': File exists|could not lock config file (.+?): File exists"
)
# Lock files at the top of the git directory. Locks of references are found by git's message.
_AT_TOP = (
    "index.lock",
    "HEAD.lock",
    "ORIG_HEAD.lock",
    "REBASE_HEAD.lock",
    "CHERRY_PICK_HEAD.lock",
    "config.lock",
    "shallow.lock",
    "packed-refs.lock",
)


def remove_named(message: str, folder: Path) -> bool:
    """Remove the abandoned lock that a message of git in `folder` names.

    Return False where the message names no lock, or a process holds it.
    """
    found = _NAMED.search(message)
    if found is None:
        return False
    path = folder / (found[1] or f"{found[2]}.lock")
    return _remove_abandoned([path], folder)


def remove_at_top(git_dir: Path, folder: Path) -> None:
    """Remove abandoned locks of the git directory `git_dir`, whose files are in `folder`."""
    _remove_abandoned([git_dir / name for name in _AT_TOP], folder)


def remove_packs(packs: Path, folder: Path) -> None:
    """Remove unfinished packs of killed fetches from the folder `packs`.

    Git does it too, after two weeks and when a gc is due (git-gc(1)).
    """
    _remove_abandoned(list(packs.glob("tmp_*")), folder)


def _remove_abandoned(paths: Sequence[Path], folder: Path) -> bool:
    """Watch the locks in parallel and remove the abandoned; return False if any lock stays."""
    began = time.monotonic()
    quiet_since = dict.fromkeys(paths, began)
    while left := [path for path in paths if path.exists()]:
        now = time.monotonic()
        if now - began >= WAIT_S:
            return False
        for path in left:
            if _is_held(path, folder):
                quiet_since[path] = now
            elif now - quiet_since[path] >= QUIET_S:
                path.unlink(missing_ok=True)
        time.sleep(QUIET_S / 10)
    return True


def _is_held(path: Path, folder: Path) -> bool:
    """Return whether a visible process has the lock open, or is a git in this repository.

    A process of another user is not visible.
    """
    import psutil

    place, git_dir = os.path.realpath(folder), os.path.realpath(path.parent)
    lock = os.path.join(git_dir, path.name)
    for running in psutil.process_iter():
        if running.pid == os.getpid():
            continue
        with contextlib.suppress(psutil.Error, OSError):
            if running.name().startswith("git"):
                cwd = running.cwd()
                if any(cwd == top or cwd.startswith(f"{top}/") for top in (place, git_dir)):
                    return True
            if any(file.path == lock for file in running.open_files()):
                return True
    return False
