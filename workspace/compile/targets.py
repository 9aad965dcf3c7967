"""Targets that a change reaches, with the reason, and the units of them that will be compiled.

If a unit was compiled and is unchanged since, the dependencies that its compiler read decide; else
the include lines do (includes.py), which reach too much rather than too little. CMake files are
judged by their effect: unit by unit against the project of the pin's own tree.
"""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from os import path as paths
from pathlib import Path, PurePosixPath

from workspace.compile.includes import Scan
from workspace.compile.project import Project, Target, Unit
from workspace.core import hints, process
from workspace.core.errors import SettingsError, ToolchainError, counted
from workspace.repo.git import Git
from workspace.repo.git.repository import differing

ANSWER_S = 60.0
# Far below the limit of a command line; a full build has some hundred objects.
_OBJECTS_PER_QUERY = 500
_CACHED = re.compile(r"^(CMAKE_MAKE_PROGRAM|CMAKE_HOME_DIRECTORY):[A-Z]+=(.+)$", re.MULTILINE)
_HEAD = re.compile(r"^(.+): #deps \d+, deps mtime \d+ \((VALID|STALE)\)$")


@dataclass(frozen=True)
class NinjaState:
    """State of the objects in ninja's records. `due`: objects that ninja would make.
    `dependencies`: by object, for all others, the files of the tree that were read, relative to it.
    """

    due: frozenset[str]
    dependencies: Mapping[str, frozenset[str]]


def read_ninja_state(build: Path, tree: Path, targets: Collection[Target]) -> NinjaState | None:
    """Return the state of these targets. None if ninja cannot report it: it is missing, the
    directory is damaged, or CMake has to run first.
    """
    compiled = {
        target.name: {unit.object for unit in target.units} for target in targets if target.units
    }
    objects = {name for group in compiled.values() for name in group}
    if not (build / ".ninja_deps").is_file() or not objects:
        return NinjaState(frozenset(objects), {})
    try:
        text = (build / "CMakeCache.txt").read_text(encoding="utf-8", errors="replace")
        cached = dict(_CACHED.findall(text))
        program, home = cached["CMAKE_MAKE_PROGRAM"], cached["CMAKE_HOME_DIRECTORY"]
        due = _due(program, build, compiled)
        if due is None:
            return None
        dependencies = _dependencies(program, build, (home, tree), sorted(objects - due))
    except (OSError, KeyError, ToolchainError):
        return None
    if dependencies is None:
        return None
    # An object that ninja considers complete but has no dependencies of counts as due.
    unknown = objects - due - dependencies.keys()
    return NinjaState(frozenset(due | unknown), dependencies)


def _dependencies(
    program: str, build: Path, trees: tuple[str, Path], objects: Sequence[str]
) -> dict[str, frozenset[str]] | None:
    """Return the files of the tree that each object depends on; None if ninja fails."""
    home, tree = trees
    tops = tuple(
        dict.fromkeys(f"{top}/" for top in (home, str(tree.absolute()), paths.realpath(tree)))
    )
    found: dict[str, frozenset[str]] = {}
    for start in range(0, len(objects), _OBJECTS_PER_QUERY):
        query = ["-t", "deps", *objects[start : start + _OBJECTS_PER_QUERY]]
        lines = _ninja(program, build, *query)
        if lines is None:
            return None
        found |= _parse_dependencies(lines, build, tops)
    return found


def _due(program: str, build: Path, compiled: Mapping[str, Collection[str]]) -> set[str] | None:
    """Return the objects that ninja would make for these targets; all of them if a missing source
    stops ninja before it prints its plan.
    """
    objects = {one for group in compiled.values() for one in group}
    lines = _ninja(program, build, *compiled)
    if lines is None:
        return objects
    # ninja would first let CMake configure again.
    if any(line.startswith("Re-running CMake") for line in lines):
        return None
    # ninja prints the object last, after CMake's description of the step.
    return objects.intersection(line.rsplit(" ", 1)[-1] for line in lines) | {
        one for one in objects if " " in one
    }


def _ninja(program: str, build: Path, *args: str) -> list[str] | None:
    done = process.capture(
        [program, "-n", *args],
        env={"PATH": os.defpath, "NINJA_STATUS": ""},
        cwd=build,
        timeout_s=ANSWER_S,
    )
    return done.stdout.splitlines() if done.returncode == 0 else None


def _parse_dependencies(
    lines: Collection[str], build: Path, tops: tuple[str, ...]
) -> dict[str, frozenset[str]]:
    """Parse the output of `ninja -t deps`."""
    found: dict[str, frozenset[str]] = {}
    real: dict[str, tuple[str, ...]] = {}
    dependencies: set[str] | None = None
    for line in lines:
        if not line.startswith("    "):
            if (head := _HEAD.match(line)) and head[2] == "VALID":
                dependencies = set()
                found[head[1]] = frozenset()
                name = head[1]
            elif line:
                dependencies = None
            elif dependencies is not None:
                found[name] = frozenset(dependencies)
            continue
        if dependencies is not None:
            path = line[4:]
            if path not in real:
                real[path] = _below(path, build, tops)
            dependencies.update(real[path])
    return found


def _below(path: str, build: Path, tops: tuple[str, ...]) -> tuple[str, ...]:
    """Return a file relative to the tree, as spelled and with links resolved; empty if it is
    elsewhere.
    """
    if not path.startswith("/"):
        path = paths.normpath(paths.join(build, path))
    if not path.startswith(tops):
        return ()
    spelled = (path, paths.realpath(path))
    return tuple(
        {name.removeprefix(top) for name in spelled for top in tops if name.startswith(top)}
    )


COMPILED_BELOW = ("csrc", "cmake")
_SOURCE_SUFFIXES = (".c", ".cc", ".cpp", ".cxx", ".cu")
_HEADER_SUFFIXES = (".cuh", ".h", ".hh", ".hpp", ".hxx", ".inc", ".inl", ".ipp", ".tpp")
_GENERATED = re.compile(rb"[A-Za-z0-9_./-]+\.(?:cuh?|cpp|cc|hpp|h|inl)\b")
_IMPORTED = re.compile(rb"^\s*(?:from|import)\s+([A-Za-z0-9_.]+)", re.MULTILINE)


@dataclass(frozen=True)
class Reached:
    """A target that must be compiled from this tree. `units` are those that will be compiled;
    `is_complete` if these are all it has.
    """

    target: str
    reason: str
    units: tuple[Unit, ...]
    is_complete: bool


@dataclass(frozen=True)
class Reach:
    """The targets that changes reach, in the project's order, and the files that reach none."""

    targets: tuple[Reached, ...]
    idle: tuple[str, ...]


def changed_files(git: Git, base: str) -> tuple[str, ...]:
    """Return paths of compiled files, or files that control the build, that differ from the commit
    `base`: own commits, edits, new and deleted files.
    """
    return differing(git, base, new_below=COMPILED_BELOW, is_wanted=is_compiled_input)


def is_compiled_input(path: str) -> bool:
    """Return whether a file of the tree is a source, a header, a generator of them, or a CMake
    file.
    """
    return (
        path.startswith(tuple(f"{folder}/" for folder in COMPILED_BELOW))
        or path.endswith(_SOURCE_SUFFIXES + _HEADER_SUFFIXES)
        or is_cmake(path)
    )


def follow(
    tree: Path, changed: Collection[str], project: Project, *, build: Path, pinned: Project | None
) -> Reach:
    """Return the targets that changed files, relative to `tree`, reach.

    `project` is what is configured in `build`, `pinned` the same for the pin's own tree. Without
    `pinned` a changed CMake file reaches every target.
    """
    finals = final_targets(project)
    # A target that is installed by itself is no part of a target that depends on it.
    apart = {target.name for target in finals}
    parts = {
        target.name: [
            part
            for part in with_dependencies(target, project)
            if part is target or part.name not in apart
        ]
        for target in finals
    }
    everything = {part.name: part for group in parts.values() for part in group}
    state = read_ninja_state(build, tree, tuple(everything.values())) if changed else None
    reasons = _by_sources(tree, changed, tuple(everything.values()), state)
    for name, found in _by_cmake(tree, changed, project, pinned).items():
        reasons[name] = found | reasons[name]
    hits = {
        target.name: {
            path: why for part in parts[target.name] for path, why in reasons[part.name].items()
        }
        for target in finals
    }
    targets = tuple(
        _reached(target, _reason(list(hits[target.name].values())), project, state)
        for target in finals
        if hits[target.name]
    )
    reaching = {path for found in hits.values() for path in found}
    return Reach(targets, tuple(sorted(set(changed) - reaching)))


def requested(
    names: Sequence[str], reason: str, tree: Path, project: Project, *, build: Path
) -> tuple[Reached, ...]:
    """Return the named targets, or all, as reached for `reason`, such as `--target` or a changed
    input.

    Raises SettingsError for a name that the project does not have.
    """
    finals = final_targets(project)
    if unknown := [name for name in names if name not in {target.name for target in finals}]:
        raise SettingsError(
            f"--target {unknown[0]}: CMake builds no such target here; it has"
            f" {', '.join(target.name for target in finals) or 'none'}",
            hint=hints.text("compile.plan_targets"),
        )
    wanted = tuple(target for target in finals if not names or target.name in names)
    state = read_ninja_state(
        build,
        tree,
        tuple(
            {
                part.name: part for target in wanted for part in with_dependencies(target, project)
            }.values()
        ),
    )
    return tuple(_reached(target, reason, project, state) for target in wanted)


def final_targets(project: Project) -> tuple[Target, ...]:
    """Return the targets that are installed into the tree, not libraries linked into them."""
    return tuple(
        target for target in project.targets if target.installs or target.kind == "MODULE_LIBRARY"
    )


def with_dependencies(target: Target, project: Project) -> tuple[Target, ...]:
    """Return the target and all targets that are built before it."""
    known = {one.name: one for one in project.targets}
    found, waiting = {target.name: target}, [target]
    while waiting:
        for name in waiting.pop().depends:
            if name in known and name not in found:
                found[name] = known[name]
                waiting.append(known[name])
    return tuple(found.values())


def _reached(target: Target, reason: str, project: Project, state: NinjaState | None) -> Reached:
    units = tuple(unit for part in with_dependencies(target, project) for unit in part.units)
    due = tuple(unit for unit in units if state is None or unit.object in state.due)
    return Reached(target.name, reason, due, is_complete=len(due) == len(units))


def _by_sources(
    tree: Path, changed: Collection[str], parts: Sequence[Target], state: NinjaState | None
) -> dict[str, dict[str, str]]:
    """Return, by target, the changed files that its units include, with the reason."""
    followed = {path: path for path in changed if not is_cmake(path)}
    writers = _generators(tree, changed)
    # Follow the files that a generator may write instead of the generator.
    followed |= {
        written: script for script in writers for written in _generated(tree, script)
    } | followed
    scan = Scan(tree, followed)
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for part in parts:
        dependencies = state.dependencies if state else {}
        unclear = [unit.source for unit in part.units if unit.object not in dependencies]
        scanned = scan.changed_dependencies(unclear, part.includes) if unclear and followed else {}
        for unit in part.units:
            files = (
                dependencies[unit.object].intersection(followed)
                if unit.object in dependencies
                else scanned.get(unit.source, ())
            )
            for path in sorted(files):
                found[part.name].setdefault(
                    followed[path], _reason_of(tree, followed[path], path, unit.source)
                )
            for script in (script for script in writers if _lies_below(unit.source, script)):
                found[part.name].setdefault(
                    script, f"{_change(tree, script)}, which writes {unit.source}"
                )
    return found


def _reason_of(tree: Path, path: str, followed: str, source: str) -> str:
    change = _change(tree, path)
    if followed != path:
        return f"{change}, which writes {followed}"
    return change if path == source else f"{change}, included by {source}"


def _change(tree: Path, path: str) -> str:
    return f"{path} {'changed' if (tree / path).exists() else 'deleted'}"


def _generators(tree: Path, changed: Collection[str]) -> tuple[str, ...]:
    """Return the changed scripts in csrc, and the scripts that import one of them."""
    scripts = {
        path: PurePosixPath(path).stem
        for path in changed
        if path.startswith("csrc/") and path.endswith(".py")
    }
    if not scripts:
        return ()
    others = {str(file.relative_to(tree)): file for file in (tree / "csrc").rglob("*.py")}
    imported = {
        path: {name.decode().rsplit(".", 1)[-1] for name in _IMPORTED.findall(_content(file))}
        for path, file in others.items()
    }
    while more := {
        path: PurePosixPath(path).stem
        for path, names in imported.items()
        if path not in scripts and names & set(scripts.values())
    }:
        scripts |= more
    return tuple(sorted(scripts))


def _generated(tree: Path, script: str) -> tuple[str, ...]:
    """Return the files that a script names, as if they were beside it."""
    folder = PurePosixPath(script).parent
    return tuple(
        {
            str(folder / name.decode())
            for name in _GENERATED.findall(_content(tree / script))
            if not name.startswith(b"/")
        }
    )


def _lies_below(source: str, script: str) -> bool:
    return PurePosixPath(source).is_relative_to(PurePosixPath(script).parent)


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def is_cmake(path: str) -> bool:
    """Return whether a file is CMake's, or a patch or script beside it that CMake uses."""
    return path.endswith((".cmake", "CMakeLists.txt")) or path.startswith("cmake/")


def _by_cmake(
    tree: Path, changed: Collection[str], project: Project, pinned: Project | None
) -> dict[str, dict[str, str]]:
    """Return, by target, the changed CMake files that change, or may change, how it is compiled."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    before = {target.name: target for target in pinned.targets} if pinned else {}
    for path in sorted(path for path in changed if is_cmake(path)):
        change, is_external = _change(tree, path), path.startswith("cmake/external_projects/")
        is_read_by_cmake = path.endswith((".cmake", "CMakeLists.txt"))
        content = _content(tree / path).decode(errors="replace") if is_external else ""
        names = set(re.findall(r"[A-Za-z0-9_]+", content))
        for target in project.targets:
            if not is_read_by_cmake:
                found[target.name][path] = change
            elif pinned is None:
                found[target.name][path] = f"{change}; the pin's own build is not known"
            elif target.name not in before:
                found[target.name][path] = f"{change}: the target is new"
            elif _recipe(target) != _recipe(before[target.name]):
                found[target.name][path] = f"{change}: the target is compiled or linked differently"
            elif target.name in names:
                # The sources of an external project can change while the recipe stays the same.
                found[target.name][path] = change
    return found


def _recipe(target: Target) -> tuple[object, ...]:
    units = frozenset((unit.source, unit.language) for unit in target.units)
    return (
        target.kind,
        target.recipe,
        units,
        target.installs,
        target.artifacts,
        frozenset(target.depends),
    )


def _reason(reasons: Sequence[str]) -> str:
    more = len(reasons) - 1
    return reasons[0] + (f" (and {counted(more, 'more file')})" if more else "")


def merged(groups: Sequence[Sequence[Reached]]) -> tuple[Reached, ...]:
    """Merge groups of reached targets: each target once, with its first reason."""
    found: Mapping[str, Reached] = {one.target: one for group in reversed(groups) for one in group}
    return tuple(found.values())
