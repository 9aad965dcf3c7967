"""What a configure writes beside its build directory, into the tree: times kept where the content is, and files kept that a placeholder would replace."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from workspace.build.native.placeholder import MARK
from workspace.core.files import read_regular, write_atomic

# Size, time of the last change in ns, SHA-256.
State = tuple[int, int, str]
_HEADERS = (".h", ".hh", ".hpp", ".cuh", ".inc", ".c", ".cc", ".cpp", ".cu")


def states(root: Path, paths: Iterable[str]) -> dict[str, State]:
    """The files of these paths below `root`; what is no file is left out."""
    found = {}
    for path in paths:
        if (state := _state(root / path)) is not None:
            found[path] = state
    return found


def is_as(root: Path, path: str, was: State | None) -> bool:
    """Whether a file is as it was, or as absent. One that was only touched is read."""
    try:
        there = (root / path).stat()
    except OSError:
        return was is None
    if was is None or there.st_size != was[0]:
        return False
    return there.st_mtime_ns == was[1] or _digest(root / path) == was[2]


def sources(tree: Path) -> Iterator[str]:
    """Every file below csrc, where a configure writes the sources that it generates."""
    for top, folders, names in os.walk(tree / "csrc"):
        folders[:] = [name for name in folders if name != "__pycache__"]
        yield from (os.path.relpath(os.path.join(top, name), tree) for name in names)


def headers(build: Path) -> Iterator[str]:
    """Headers and sources that a configure writes into the build directory itself."""
    for top, folders, names in os.walk(build):
        folders[:] = [name for name in folders if name not in ("CMakeFiles", ".cmake", "_deps")]
        yield from (os.path.relpath(os.path.join(top, name), build) for name in names if name.endswith(_HEADERS))


def renewed(before: Mapping[str, State], after: Mapping[str, State]) -> dict[str, State]:
    """What was written in between, with the same content or not."""
    return {path: state for path, state in after.items() if before.get(path) != state}


def give_back_times(root: Path, now: Mapping[str, State], former: Sequence[Mapping[str, State]]) -> dict[str, State]:
    """Give what was written with the content of before the time of before, so that nothing that was compiled from it counts as older. Returns the states."""
    result = dict(now)
    for path, state in now.items():
        time_ns = next((known[path][1] for known in former if path in known and known[path][2] == state[2]), state[1])
        if time_ns != state[1]:
            os.utime(root / path, ns=(time_ns, time_ns))
            result[path] = (state[0], time_ns, state[2])
    return result


def keep(tree: Path, folders: Iterable[str], aside: Path) -> None:
    """Copy what lies in these folders of the tree to `aside`, from where `bring_back` takes it, be it in a later run."""
    for folder in folders:
        for path in sorted((tree / folder).rglob("*")):
            if path.is_file() and not path.is_symlink() and MARK.encode() not in read_regular(path):
                write_atomic(aside / path.relative_to(tree), path.read_bytes())
                shutil.copystat(path, aside / path.relative_to(tree))


def bring_back(tree: Path, folders: Iterable[str], aside: Path) -> None:
    """Undo what a configure made of placeholders in these folders of the tree."""
    for folder in folders:
        for path in sorted((tree / folder).rglob("*")):
            if path.is_file() and not path.is_symlink() and MARK.encode() in read_regular(path):
                former = aside / path.relative_to(tree)
                if former.is_file():
                    write_atomic(path, former.read_bytes())
                    shutil.copystat(former, path)
                else:
                    path.unlink()
                    with contextlib.suppress(OSError):
                        path.parent.rmdir()
    shutil.rmtree(aside, ignore_errors=True)


def _state(path: Path) -> State | None:
    try:
        there = path.stat()
        return (there.st_size, there.st_mtime_ns, _digest(path))
    except OSError:
        return None


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(read_regular(path)).hexdigest()
    except OSError:
        return ""
