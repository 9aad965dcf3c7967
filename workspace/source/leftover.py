"""What a git that was killed has left behind: lock files, which git itself never removes, and which let it refuse to write; and begun packs.

One counts as abandoned when no git runs in its repository, no process has it open, and it is still there a second later.
"""

import contextlib
import os
import re
import time
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
    return _remove(path, folder)


def remove_at_top(git_dir: Path, folder: Path) -> None:
    """Remove abandoned locks of the git directory `git_dir`, whose files lie in `folder`."""
    for name in _AT_TOP:
        if (git_dir / name).exists():
            _remove(git_dir / name, folder)


def remove_packs(packs: Path, folder: Path) -> None:
    """Remove from the folder `packs` what fetches that were killed have begun there. Git does it too, once it is two weeks old and a gc is due (git-gc(1))."""
    for path in packs.glob("tmp_*"):
        _remove(path, folder)


def _remove(path: Path, folder: Path) -> bool:
    deadline = time.monotonic() + WAIT_S
    quiet_since = time.monotonic()
    while time.monotonic() < deadline:
        if not path.exists():
            return True
        if _is_held(path, folder):
            quiet_since = time.monotonic()
        elif time.monotonic() - quiet_since >= QUIET_S:
            path.unlink(missing_ok=True)
            return True
        time.sleep(POLL_S)
    return False


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
