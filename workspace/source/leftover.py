"""What a git that was killed has left behind: lock files, which git itself never removes, and which let it refuse to write; and begun packs.

One counts as abandoned when no git runs in its repository, no process has it open, and it is still there a second later.
"""

import contextlib
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

WAIT_S = 3.0
QUIET_S = 1.0
POLL_S = 0.1
_NAMED = re.compile(r"Unable to create '([^']+\.lock)': File exists|could not lock config file (.+?): File exists")
# What git locks at the top of its directory; references and their like are found by what git says.
_AT_TOP = ("index.lock", "HEAD.lock", "ORIG_HEAD.lock", "REBASE_HEAD.lock", "CHERRY_PICK_HEAD.lock", "config.lock", "shallow.lock", "packed-refs.lock")


def remove_named(said: str, folder: Path) -> bool:
    """Remove the lock that a git in `folder` complains of, if it is abandoned. False where there is none, or somebody holds it."""
    found = _NAMED.search(said)
    if found is None:
        return False
    path = folder / (found[1] or f"{found[2]}.lock")
    return _remove([path], folder)


def remove_at_top(git_dir: Path, folder: Path) -> None:
    """Remove abandoned locks of the git directory `git_dir`, whose files lie in `folder`."""
    _remove([git_dir / name for name in _AT_TOP], folder)


def remove_packs(packs: Path, folder: Path) -> None:
    """Remove from the folder `packs` what fetches that were killed have begun there. Git does it too, once it is two weeks old and a gc is due (git-gc(1))."""
    _remove(list(packs.glob("tmp_*")), folder)


def _remove(paths: Sequence[Path], folder: Path) -> bool:
    """Remove those that are abandoned, watched side by side. False where one stays."""
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
        time.sleep(POLL_S)
    return True


def _is_held(path: Path, folder: Path) -> bool:
    """Whether a process that may be looked at (proc(5)) has the lock open, or is a git in this repository."""
    place, git_dir = os.path.realpath(folder), os.path.realpath(path.parent)
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if Path(f"/proc/{entry}/comm").read_text().startswith("git"):
                cwd = os.readlink(f"/proc/{entry}/cwd")
                if any(cwd == top or cwd.startswith(f"{top}/") for top in (place, git_dir)):
                    return True
            if any(os.readlink(f"/proc/{entry}/fd/{number}") == os.path.join(git_dir, path.name) for number in os.listdir(f"/proc/{entry}/fd")):
                return True
    return False
