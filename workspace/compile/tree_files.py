"""What was compiled, put into the tree: installed by CMake into a folder beside it, then renamed
file by file.

A kill leaves each file of the tree old or new, and the next run puts all of them again. What goes
is only what an earlier build is known to have put there, unchanged since, and git ignores; what git
tracks is never written over.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from workspace.compile.externals import MARK
from workspace.compile.project import Target
from workspace.core import files, process
from workspace.core.errors import BuildError
from workspace.core.files import read_regular, sha256, write_atomic
from workspace.core.log import RunLog
from workspace.repo.git import Git, worktree

PACKAGE = "vllm"
# FA4's Python files: where CMake was told of a folder of sources it makes a link to them
# (vllm_flash_attn.cmake), else a copy with other imports.
LINKED = "vllm/vllm_flash_attn/cute"
_IMPORTS = (b"flash_attn.cute", b"vllm.vllm_flash_attn.cute")
# Of these CMake would install elsewhere, or links to the build directory.
_MISLEADING = ("DESTDIR", "CMAKE_INSTALL_MODE")

# Path below the tree and digest, by target.
_Brought = dict[str, dict[str, str]]


def install_targets(
    build: Path,
    tree: Path,
    targets: Sequence[Target],
    *,
    run_log: RunLog,
    env: Mapping[str, str],
    shared: Path | None = None,
) -> tuple[str, ...]:
    """Install the components of `targets` into the tree and return the paths of their files,
    relative to it.

    A link to sources below `shared`, the cache of all clones, becomes a copy; one to a folder of
    the user's stays what it is, as upstream has it. Raises BuildError where a target has not been
    built or something is in the way, ToolchainError where the tree cannot be written.
    """
    git = Git(tree)
    tracked = git.entries((PACKAGE,), "HEAD")
    record = build.parent / "put.json"
    with files.folder_beside(tree) as staging:
        brought: _Brought = {}
        for target in targets:
            if missing := [name for name in target.artifacts if not (build / name).exists()]:
                raise BuildError(
                    f"{target.name} has not been built: {missing[0]} is not in {build}",
                    hint=f"./scripts/inv rebuild --target {target.name}",
                )
            prefix = staging / target.name
            _install(build, prefix, target.name, run_log=run_log, env=env)
            _copy_linked(prefix / LINKED, shared)
            placed = _files(prefix)
            for name in sorted(placed & tracked.keys()):
                run_log.line(f"{name} is the tree's own and stays: {target.name} brings one, too")
            brought[target.name] = {
                name: _content_digest(prefix / name) for name in sorted(placed - tracked.keys())
            }
        former = _read(record)
        # Before anything is put: what a kill leaves here is known to be of a build, the old files
        # as well as the new ones.
        _write(
            record,
            {name: former.get(name, {}) | brought.get(name, {}) for name in former | brought},
        )
        for target_name, digests in brought.items():
            for name, digest in digests.items():
                _rename(staging / target_name / name, tree, name, digest, tracked)
        _remove(git, _orphans(former, brought))
        _write(record, former | brought)
    return tuple(sorted({name for digests in brought.values() for name in digests}))


def as_package(content: bytes) -> bytes:
    """One of the linked Python files as CMake would have copied it."""
    return content.replace(*_IMPORTS)


def _install(
    build: Path, prefix: Path, component: str, *, run_log: RunLog, env: Mapping[str, str]
) -> None:
    prefix.mkdir()
    process.run(
        ["cmake", "--install", build, "--prefix", prefix, "--component", component],
        env={name: text for name, text in env.items() if name not in _MISLEADING},
        run_log=run_log,
        failure=BuildError,
        hint="./scripts/inv rebuild --clean",
    )


def _copy_linked(link: Path, shared: Path | None) -> None:
    """Make a copy of a link into the cache: an edit behind the link would be one in every clone."""
    if (
        shared is None
        or not link.is_symlink()
        or not link.resolve().is_relative_to(shared.resolve())
    ):
        return
    origin = link.resolve()
    link.unlink()
    for file in sorted(origin.rglob("*.py")):
        copy = link / file.relative_to(origin)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(as_package(file.read_bytes()))


def _files(prefix: Path) -> set[str]:
    """Files and links below the staged package, relative to the prefix."""
    found = set()
    for folder, folders, names in os.walk(prefix / PACKAGE):
        entries = [Path(folder, name) for name in (*names, *folders)]
        found |= {
            str(entry.relative_to(prefix))
            for entry in entries
            if entry.is_symlink() or not entry.is_dir()
        }
    return found


def _content_digest(path: Path) -> str:
    """What tells the content of a file or a link from another; nothing where there is neither."""
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    return sha256(path) if path.is_file() else ""


def _rename(made: Path, tree: Path, name: str, digest: str, tracked: Mapping[str, str]) -> None:
    """Let the tree have the staged file; one that is there already, byte for byte, is not
    touched.
    """
    place = tree / name
    for folder in reversed(place.relative_to(tree).parents):
        # What would be written behind a link is not the tree's: it may be a folder in which the
        # user works.
        if (tree / folder).is_symlink():
            _require_free(str(folder), tracked)
            (tree / folder).unlink()
    if _content_digest(place) == digest:
        return
    if place.is_dir() and not place.is_symlink():
        _require_free(name, tracked)
        place.rename(made.with_name(f"{made.name}.former"))
    place.parent.mkdir(parents=True, exist_ok=True)
    made.replace(place)


def _require_free(name: str, tracked: Mapping[str, str]) -> None:
    if inside := next(
        (path for path in tracked if path == name or path.startswith(f"{name}/")), None
    ):
        raise BuildError(
            f"{inside} of the tree is in the way of what was built: {name}",
            hint="git -C vendor/vllm status",
        )


def _orphans(former: _Brought, brought: _Brought) -> dict[str, str]:
    """What the same targets brought earlier and no target brings any more."""
    now = {name for digests in (former | brought).values() for name in digests}
    return {
        name: digest
        for target in brought
        for name, digest in former.get(target, {}).items()
        if name not in now
    }


def _remove(git: Git, orphans: Mapping[str, str]) -> None:
    if not orphans:
        return
    ignored = set(worktree.products(git, PACKAGE))
    for name, digest in orphans.items():
        if name in ignored and _content_digest(git.path / name) == digest:
            (git.path / name).unlink()


def _read(path: Path) -> _Brought:
    """What earlier builds brought. A damaged record knows of nothing, so nothing is removed for
    it.
    """
    try:
        record = json.loads(read_regular(path))
        known = {
            str(target): {str(name): str(digest) for name, digest in digests.items()}
            for target, digests in record.items()
        }
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return {
        target: {name: digest for name, digest in digests.items() if _is_below(name)}
        for target, digests in known.items()
    }


def _is_below(name: str) -> bool:
    return name.startswith(f"{PACKAGE}/") and ".." not in Path(name).parts


def _write(path: Path, brought: _Brought) -> None:
    write_atomic(path, (json.dumps(brought, indent=1, sort_keys=True) + "\n").encode())


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
        yield from (
            os.path.relpath(os.path.join(top, name), build)
            for name in names
            if name.endswith(_HEADERS)
        )


def renewed(before: Mapping[str, State], after: Mapping[str, State]) -> dict[str, State]:
    """What was written in between, with the same content or not."""
    return {path: state for path, state in after.items() if before.get(path) != state}


def give_back_times(
    root: Path, now: Mapping[str, State], former: Sequence[Mapping[str, State]]
) -> dict[str, State]:
    """Give what was written with the content of before the time of before, so that nothing that was
    compiled from it counts as older. Returns the states.
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
    """Copy what lies in these folders of the tree to `aside`, from where `bring_back` takes it, be
    it in a later run.
    """
    for folder in folders:
        for path in sorted((tree / folder).rglob("*")):
            if path.is_file() and not path.is_symlink() and MARK.encode() not in read_regular(path):
                write_atomic(scratch / path.relative_to(tree), path.read_bytes())
                shutil.copystat(path, scratch / path.relative_to(tree))


def bring_back(tree: Path, folders: Iterable[str], scratch: Path) -> None:
    """Undo what a configure made of placeholders in these folders of the tree."""
    for folder in folders:
        for path in sorted((tree / folder).rglob("*")):
            if path.is_file() and not path.is_symlink() and MARK.encode() in read_regular(path):
                former = scratch / path.relative_to(tree)
                if former.is_file():
                    write_atomic(path, former.read_bytes())
                    shutil.copystat(former, path)
                else:
                    path.unlink()
                    with contextlib.suppress(OSError):
                        path.parent.rmdir()
    shutil.rmtree(scratch, ignore_errors=True)


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
