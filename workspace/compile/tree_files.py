"""Files of the tree that a build reads and writes: what a configure reads, what it generates, and
the compiled files, which CMake installs into a folder beside the tree before they are renamed one
by one.

After a kill each file of the tree is old or new, and the next run installs all of them again. Files
that git tracks are never overwritten, and no file is removed.
"""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path

from workspace.compile import cmake_inputs
from workspace.compile.externals import MARK
from workspace.compile.project import Target
from workspace.core import files, hints, process
from workspace.core.console import RunLog
from workspace.core.errors import BuildError
from workspace.core.files import LARGEST_FILE, read_regular, sha256, write_atomic
from workspace.repo.git import Git

PACKAGE = "vllm"


def install_targets(
    build: Path,
    tree: Path,
    targets: Sequence[Target],
    *,
    run_log: RunLog,
    env: Mapping[str, str],
) -> tuple[str, ...]:
    """Install the components of `targets` into the tree, and return the paths of their files,
    relative to it.

    A link to a folder of the user's own sources stays a link, as in upstream. Raises BuildError if
    a target has not been built or a tracked file is in the way, ToolchainError if the tree cannot
    be written.
    """
    tracked = Git(tree).entries((PACKAGE,), "HEAD")
    installed = set[str]()
    with files.folder_beside(tree) as staging:
        staged = {
            target.name: _stage(build, staging / target.name, target, run_log=run_log, env=env)
            for target in targets
        }
        for target_name, names in staged.items():
            for name in sorted(names & tracked.keys()):
                run_log.line(f"{name} is tracked by git and stays: {target_name} has one too")
            for name in sorted(names - tracked.keys()):
                _rename(staging / target_name / name, tree, name, tracked)
            installed |= names - tracked.keys()
    return tuple(sorted(installed))


def _stage(
    build: Path,
    prefix: Path,
    target: Target,
    *,
    run_log: RunLog,
    env: Mapping[str, str],
) -> set[str]:
    """Install the component of a target into `prefix`, and return the names of its files."""
    if missing := [name for name in target.artifacts if not (build / name).exists()]:
        raise BuildError(
            f"{target.name} has not been built: {missing[0]} is not in {build}",
            hint=hints.text("compile.rebuild_target", target=target.name),
        )
    prefix.mkdir()
    process.run(
        ["cmake", "--install", build, "--prefix", prefix, "--component", target.name],
        env=env,
        run_log=run_log,
        failure=BuildError,
        hint=hints.text("compile.rebuild_clean"),
    )
    return {
        str(entry.relative_to(prefix))
        for entry in (prefix / PACKAGE).rglob("*")
        if entry.is_symlink() or not entry.is_dir()
    }


def _content_digest(path: Path) -> str:
    """Return an identifier of the content of a file or a link; empty if neither exists."""
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    return sha256(path) if path.is_file() else ""


def _rename(made: Path, tree: Path, name: str, tracked: Mapping[str, str]) -> None:
    """Move a staged file into the tree, unless an identical one is there."""
    place = tree / name
    for folder in reversed(place.relative_to(tree).parents):
        # A file behind a link is outside the tree: the user may work in that folder.
        if (tree / folder).is_symlink():
            _require_free(str(folder), tracked)
            (tree / folder).unlink()
    if _content_digest(place) == _content_digest(made):
        return
    if place.is_dir() and not place.is_symlink():
        _require_free(name, tracked)
        place.rename(made.with_name(f"{made.name}.former"))
    place.parent.mkdir(parents=True, exist_ok=True)
    made.replace(place)


def _require_free(name: str, tracked: Mapping[str, str]) -> None:
    """Raise BuildError if git tracks files at or below `name`."""
    if inside := next(
        (path for path in tracked if path == name or path.startswith(f"{name}/")), None
    ):
        raise BuildError(
            f"{inside} of the tree is in the way of a built file: {name}",
            hint=hints.text("core.git_status", folder="vendor/vllm"),
        )


# Size, time of the last change in ns, SHA-256.
State = tuple[int, int, str]
_IN_PACKAGE = re.compile(r"\$\{CMAKE_(?:CURRENT_)?SOURCE_DIR\}/(vllm/[\w./-]+)")
_HEADERS = (".h", ".hh", ".hpp", ".cuh", ".inc", ".c", ".cc", ".cpp", ".cu")


def configure_files(tree: Path) -> Iterator[str]:
    """Yield the files of the tree that a configure reads: CMake files, patches and generators. A
    generator may import others, so every Python file beside sources counts.
    """
    yield from (str(path.relative_to(tree)) for path in cmake_inputs.cmake_files(tree))
    yield from sorted(
        path
        for path in sources(tree)
        if path.endswith((".py", ".cmake", ".in", ".jinja", ".j2", "/CMakeLists.txt"))
    )


def package_folders(tree: Path, device: str) -> tuple[str, ...]:
    """Return the folders of the Python package that the CMake files name: a configure may overwrite
    files of a precompiled wheel there.
    """
    steps = cmake_inputs.walk(tree, device)
    named = (
        found[1]
        for step in steps
        for argument in step.command.args
        if (found := _IN_PACKAGE.match(argument))
    )
    return tuple(
        dict.fromkeys(path for path in named if ".." not in path and not Path(path).suffix)
    )


def glob_patterns(tree: Path, device: str) -> Iterator[str]:
    """Yield the patterns below the tree by which CMake files find sources; ninja must not evaluate
    them itself.
    """
    for step in cmake_inputs.walk(tree, device):
        args = step.command.args
        if step.command.name == "file" and len(args) > 2 and args[0] in ("GLOB", "GLOB_RECURSE"):
            for argument in args[2:]:
                pattern = cmake_inputs.without_top(step.resolved(argument))
                if "$" not in pattern and not pattern.startswith("/") and "/" in pattern:
                    parent, _, name = pattern.rpartition("/")
                    yield f"{parent}/**/{name}" if args[0] == "GLOB_RECURSE" else pattern


def matches(tree: Path, pattern: str) -> list[str]:
    """Return the files of the tree that match a pattern, sorted."""
    return sorted(glob(pattern, root_dir=tree, recursive=True))


def states(root: Path, paths: Iterable[str]) -> dict[str, State]:
    """Return the states of these paths below `root`; paths that are no files are left out."""
    found = {}
    for path in paths:
        if (state := _state(root / path)) is not None:
            found[path] = state
    return found


def is_unchanged(root: Path, path: str, was: State | None) -> bool:
    """Return whether a file has its recorded state, or is absent as recorded. A touched file is
    hashed.
    """
    try:
        there = (root / path).stat()
    except OSError:
        return was is None
    if was is None or there.st_size != was[0]:
        return False
    return there.st_mtime_ns == was[1] or _digest(root / path) == was[2]


def sources(tree: Path) -> Iterator[str]:
    """Yield every file below csrc, where a configure writes generated sources."""
    for top, folders, names in os.walk(tree / "csrc"):
        folders[:] = [name for name in folders if name != "__pycache__"]
        yield from (os.path.relpath(os.path.join(top, name), tree) for name in names)


def headers(build: Path) -> Iterator[str]:
    """Yield the headers and sources that a configure writes into the build directory."""
    for top, folders, names in os.walk(build):
        folders[:] = [name for name in folders if name not in ("CMakeFiles", ".cmake", "_deps")]
        yield from (
            os.path.relpath(os.path.join(top, name), build)
            for name in names
            if name.endswith(_HEADERS)
        )


def renewed(before: Mapping[str, State], after: Mapping[str, State]) -> dict[str, State]:
    """Return the files that were written in between, with the same content or not."""
    return {path: state for path, state in after.items() if before.get(path) != state}


def give_back_times(
    root: Path, now: Mapping[str, State], former: Sequence[Mapping[str, State]]
) -> dict[str, State]:
    """Restore the former time of each file with its former content, so that objects compiled from
    it stay up to date. Return the new states.
    """
    result = dict(now)
    for path, state in now.items():
        time_ns = next(
            (known[path][1] for known in former if path in known and known[path][2] == state[2]),
            state[1],
        )
        if time_ns != state[1]:
            os.utime(root / path, ns=(time_ns, time_ns))
            result[path] = (state[0], time_ns, state[2])
    return result


def keep(tree: Path, folders: Iterable[str], scratch: Path) -> None:
    """Copy the files in these folders of the tree to `scratch`, from where `bring_back` restores
    them, if need be in a later run.
    """
    for folder in folders:
        for path in sorted((tree / folder).rglob("*")):
            if path.is_file() and not path.is_symlink() and MARK.encode() not in _content(path):
                write_atomic(scratch / path.relative_to(tree), path.read_bytes())
                shutil.copystat(path, scratch / path.relative_to(tree))


def bring_back(tree: Path, folders: Iterable[str], scratch: Path) -> None:
    """Undo what a configure wrote from placeholders into these folders of the tree."""
    for folder in folders:
        for path in sorted((tree / folder).rglob("*")):
            if path.is_file() and not path.is_symlink() and MARK.encode() in _content(path):
                former = scratch / path.relative_to(tree)
                if former.is_file():
                    write_atomic(path, former.read_bytes())
                    shutil.copystat(former, path)
                else:
                    path.unlink()
                    with contextlib.suppress(OSError):
                        path.parent.rmdir()
    shutil.rmtree(scratch, ignore_errors=True)


def _content(path: Path) -> bytes:
    return read_regular(path, most_bytes=LARGEST_FILE)


def _state(path: Path) -> State | None:
    try:
        there = path.stat()
        return (there.st_size, there.st_mtime_ns, _digest(path))
    except OSError:
        return None


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(_content(path)).hexdigest()
    except OSError:
        return ""
