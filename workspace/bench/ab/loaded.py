"""Which libraries a measured process has really loaded, and whose vLLM it imports: what is mapped counts, not what lies in the tree."""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from workspace.build.arm import Arm
from workspace.core import process
from workspace.core.errors import BuildError
from workspace.core.files import sha256
from workspace.engine import kin

LOOK_EVERY_S = 0.5
_ASK_TIMEOUT_S = 60.0


class Watch:
    """Looks, at each line of a measured process's log, at what it and what it starts have mapped (proc_pid_maps(5)). One for each start."""

    def __init__(self, arm: Arm) -> None:
        self._tree = os.path.realpath(arm.layout.vllm)
        self._others = tuple(f"{os.path.realpath(place)}/" for place in (arm.outer.vllm, arm.outer.arms))
        self._arm = arm
        self._mapped: dict[str, int] = {}
        self._strange: set[str] = set()
        self._next = 0.0

    def __call__(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOOK_EVERY_S
        for number in kin.below({os.getpid()}, kin.living()):
            with contextlib.suppress(OSError), open(f"/proc/{number}/maps", encoding="utf-8", errors="replace") as file:
                for line in file:
                    self._take(line.rstrip("\n"))

    def _take(self, line: str) -> None:
        fields = line.split(None, 5)
        path = fields[5] if len(fields) == 6 else ""
        if ".so" not in path:
            return
        if path.startswith(f"{self._tree}/"):
            self._mapped[path] = int(fields[4])
        elif path.startswith(self._others) and not path.startswith(f"{os.path.realpath(self._arm.layout.root)}/"):
            self._strange.add(path)

    def libraries(self, stamped: Mapping[str, str], hashes: dict[tuple[str, int, int, int], str]) -> dict[str, str]:
        """Return the SHA-256 of each compiled file of the arm's tree that was loaded, by its path in the tree. `hashes` are kept for the next start.

        Raises BuildError where none was, where one is not what the build stamped, and where one of another tree was loaded.
        """
        name, hint = self._arm.shown, f"rm -rf {self._arm.shown}    and the same command again builds it anew"
        if self._strange:
            raise BuildError(f"a process of {name} has loaded {sorted(self._strange)[0]}, which is another tree's", hint=hint)
        if not self._mapped:
            raise BuildError(f"a process of {name} has loaded no compiled library of its own tree, so nothing proves what was measured", hint=hint)
        found = {}
        for path, inode in self._mapped.items():
            inside = os.path.relpath(path.removesuffix(" (deleted)"), self._tree)
            found[inside] = _digest(Path(path), inode, hashes)
            if found[inside] is None or found[inside] != stamped.get(inside, found[inside]):
                raise BuildError(f"{inside} of {name} is not what was built: it was replaced while it was measured, or before", hint=hint)
        return {path: digest for path, digest in sorted(found.items()) if digest}


def _digest(path: Path, inode: int, hashes: dict[tuple[str, int, int, int], str]) -> str | None:
    """The digest of a file that is mapped; None where another file has its name by now."""
    try:
        there = path.stat()
        if there.st_ino != inode:
            return None
        key = (str(path), there.st_ino, there.st_size, there.st_mtime_ns)
        if key not in hashes:
            hashes[key] = sha256(path)
        return hashes[key]
    except OSError:
        return None


def require_own(arm: Arm, environment: Mapping[str, str]) -> Path:
    """Return the file of the vLLM that a process of the arm imports. Raises BuildError where that is not in its tree."""
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as neutral:
        done = process.capture([arm.layout.environment_python, arm.layout.probes / "origin.py"], env=environment, cwd=Path(neutral), timeout_s=_ASK_TIMEOUT_S)
    try:
        origin = json.loads(done.stdout)["vllm"]
    except (ValueError, KeyError, TypeError):
        origin = None
    if not isinstance(origin, str) or not Path(origin).resolve().is_relative_to(arm.layout.vllm.resolve()):
        raise BuildError(
            f"{arm.shown} imports vllm from {origin or 'nowhere'}, not from its own tree", hint=f"rm -rf {arm.shown}    and the same command again"
        )
    return Path(origin)
