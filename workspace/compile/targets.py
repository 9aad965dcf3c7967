"""Which targets a change reaches, why, and which of their units a compiler then sees.

Where a unit was compiled and nothing of it changed since, what its compiler has read decides; else
the include lines do (includes.py), which err toward compiling. CMake files are judged by what CMake
makes of them: unit by unit against the project of the pin's own tree.
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
from workspace.core import process
from workspace.core.errors import SettingsError, ToolchainError
from workspace.repo.git import Git
from workspace.repo.git.repository import differing

ANSWER_S = 60.0
# What a command line holds many times over; the objects of a whole build are some hundreds.
_ASKED_AT_ONCE = 500
_CACHED = re.compile(r"^(CMAKE_MAKE_PROGRAM|CMAKE_HOME_DIRECTORY):[A-Z]+=(.+)$", re.MULTILINE)
_HEAD = re.compile(r"^(.+): #deps \d+, deps mtime \d+ \((VALID|STALE)\)$")


@dataclass(frozen=True)
class Built:
    """`due`: objects that ninja would make. `taken_in`: by object, of all others, the files of the
    tree that were read, relative to it.
    """

    due: frozenset[str]
    taken_in: Mapping[str, frozenset[str]]


def ask_ninja(build: Path, tree: Path, targets: Collection[Target]) -> Built | None:
    """Ask ninja about these targets. None where it cannot tell: it is not there, the directory is
    damaged, or CMake would have to run first.
    """
    compiled = {
        target.name: {unit.object for unit in target.units} for target in targets if target.units
    }
    objects = {one for group in compiled.values() for one in group}
    if not (build / ".ninja_deps").is_file() or not objects:
        return Built(frozenset(objects), {})
    try:
        cached = dict(
            _CACHED.findall(
                (build / "CMakeCache.txt").read_text(encoding="utf-8", errors="replace")
            )
        )
        due = _due(cached["CMAKE_MAKE_PROGRAM"], build, compiled)
        if due is None:
            return None
        wanted, taken_in = sorted(objects - due), dict[str, frozenset[str]]()
        tops = tuple(
            dict.fromkeys(
                f"{top}/"
                for top in (
                    cached["CMAKE_HOME_DIRECTORY"],
                    str(tree.absolute()),
                    paths.realpath(tree),
                )
            )
        )
        for start in range(0, len(wanted), _ASKED_AT_ONCE):
            said = _ninja(
                cached["CMAKE_MAKE_PROGRAM"],
                build,
                "-t",
                "deps",
                *wanted[start : start + _ASKED_AT_ONCE],
            )
            if said is None:
                return None
            taken_in |= _taken_in(said, build, tops)
    except (OSError, KeyError, ToolchainError):
        return None
    # Of what ninja holds for whole and has no dependencies of, nothing is known.
    return Built(frozenset(due | {one for one in wanted if one not in taken_in}), taken_in)


def _due(program: str, build: Path, compiled: Mapping[str, Collection[str]]) -> set[str] | None:
    """The objects that ninja would make for these targets; all of a target of which it cannot
    say.
    """
    objects = {one for group in compiled.values() for one in group}
    said = _ninja(program, build, *compiled)
    if said is None and len(compiled) > 1:
        # A source that is gone stops ninja before it says anything, of other targets too.
        alone = [_due(program, build, {name: group}) for name, group in compiled.items()]
        return None if None in alone else {one for group in alone if group for one in group}
    if said is None:
        return objects
    # What it means to do first is to let CMake make the build anew.
    if any(line.startswith("Re-running CMake") for line in said):
        return None
    # It names the object last, behind what CMake calls the step.
    return objects.intersection(line.rsplit(" ", 1)[-1] for line in said) | {
        one for one in objects if " " in one
    }


def _ninja(program: str, build: Path, *words: str) -> list[str] | None:
    done = process.capture(
        [program, "-n", *words],
        env={"PATH": os.defpath, "NINJA_STATUS": ""},
        cwd=build,
        timeout_s=ANSWER_S,
    )
    return done.stdout.splitlines() if done.returncode == 0 else None


def _taken_in(
    said: Collection[str], build: Path, tops: tuple[str, ...]
) -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    real: dict[str, tuple[str, ...]] = {}
    reading: set[str] | None = None
    for line in said:
        if not line.startswith("    "):
            if (head := _HEAD.match(line)) and head[2] == "VALID":
                reading = set()
                found[head[1]] = frozenset()
                name = head[1]
            elif line:
                reading = None
            elif reading is not None:
                found[name] = frozenset(reading)
            continue
        if reading is not None:
            path = line[4:]
            if path not in real:
                real[path] = _below(path, build, tops)
            reading.update(real[path])
    return found


def _below(path: str, build: Path, tops: tuple[str, ...]) -> tuple[str, ...]:
    """The file relative to the tree, as it was spelled and as it is called without links; nothing
    where it lies elsewhere.
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
_SOURCES = frozenset((".c", ".cc", ".cpp", ".cxx", ".cu"))
_SUFFIXES = _SOURCES | {".cuh", ".h", ".hh", ".hpp", ".hxx", ".inc", ".inl", ".ipp", ".tpp"}
_GENERATED = re.compile(rb"[A-Za-z0-9_./-]+\.(?:cuh?|cpp|cc|hpp|h|inl)\b")
_IMPORTED = re.compile(rb"^\s*(?:from|import)\s+([A-Za-z0-9_.]+)", re.MULTILINE)


@dataclass(frozen=True)
class Reached:
    """A target that has to be this tree's own. `units` are those that will be compiled; `is_whole`
    where these are all it has.
    """

    target: str
    reason: str
    units: tuple[Unit, ...]
    is_complete: bool


@dataclass(frozen=True)
class Reach:
    """What changes reach, in the project's order, and a sentence for each that reaches nothing."""

    targets: tuple[Reached, ...]
    idle: tuple[str, ...]


def changed_files(git: Git, base: str) -> tuple[str, ...]:
    """Paths of what is compiled, or steers it, that differ from the commit `base`: own commits,
    edits, new and deleted files.
    """
    return differing(git, base, new_below=COMPILED_BELOW, is_wanted=is_compiled_input)


def is_compiled_input(path: str) -> bool:
    """Whether a file of the tree is a source, a header, a generator of them, or CMake's."""
    place = PurePosixPath(path)
    return place.parts[0] in COMPILED_BELOW or place.suffix in _SUFFIXES or is_cmake(path)


def reached(
    tree: Path, changed: Collection[str], project: Project, *, build: Path, pinned: Project | None
) -> tuple[Reached, ...]:
    """Return the targets that `follow` finds, without what it says of the other changes."""
    return follow(tree, changed, project, build=build, pinned=pinned).targets


def follow(
    tree: Path, changed: Collection[str], project: Project, *, build: Path, pinned: Project | None
) -> Reach:
    """Find the targets that changed files, relative to `tree`, reach.

    `project` is what is configured in `build`, `pinned` the same for the pin's own tree. Without
    the latter a changed CMake file reaches every target.
    """
    finals = final_targets(project)
    # What is put into the tree by itself is built before a target that waits for it, and is no part
    # of that one.
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
    state = ask_ninja(build, tree, tuple(everything.values())) if changed else None
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
    arrived = {path for found in hits.values() for path in found}
    return Reach(
        targets,
        tuple(
            _idle(path, tree) for path in sorted(set(changed) - arrived) if _is_of_interest(path)
        ),
    )


def requested(
    names: Sequence[str], reason: str, tree: Path, project: Project, *, build: Path
) -> tuple[Reached, ...]:
    """Return the named targets as reached for `reason`, such as `--target` or an input that
    changed; without names all of them.

    Raises SettingsError for a name that the project has not.
    """
    finals = final_targets(project)
    if unknown := [name for name in names if name not in {target.name for target in finals}]:
        raise SettingsError(
            f"--target {unknown[0]}: CMake builds no such target here; it has"
            f" {', '.join(target.name for target in finals) or 'none'}",
            hint="./scripts/inv rebuild --plan   # says what each target is reached by",
        )
    wanted = tuple(target for target in finals if not names or target.name in names)
    state = ask_ninja(
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
    """Return the targets whose outcome is put into the tree; libraries that are linked into them
    are none.
    """
    return tuple(
        target for target in project.targets if target.installs or target.kind == "MODULE_LIBRARY"
    )


def with_dependencies(target: Target, project: Project) -> tuple[Target, ...]:
    """Return the target and all that is built before it."""
    known = {one.name: one for one in project.targets}
    found, waiting = {target.name: target}, [target]
    while waiting:
        for name in waiting.pop().depends:
            if name in known and name not in found:
                found[name] = known[name]
                waiting.append(known[name])
    return tuple(found.values())


def _reached(target: Target, reason: str, project: Project, state: Built | None) -> Reached:
    units = tuple(unit for part in with_dependencies(target, project) for unit in part.units)
    due = tuple(unit for unit in units if state is None or unit.object in state.due)
    return Reached(target.name, reason, due, is_complete=len(due) == len(units))


def _by_sources(
    tree: Path, changed: Collection[str], parts: Sequence[Target], state: Built | None
) -> dict[str, dict[str, str]]:
    """Map each target to the changed files that its units take in, and how."""
    followed = {path: path for path in changed if not is_cmake(path)}
    writers = _generators(tree, changed)
    # What a generator may write is followed in its place.
    followed |= {
        written: script for script in writers for written in _written(tree, script)
    } | followed
    scan = Scan(tree, followed)
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for part in parts:
        known = state.taken_in if state else {}
        unclear = [unit.source for unit in part.units if unit.object not in known]
        scanned = scan.taken_in(unclear, part.includes) if unclear and followed else {}
        for unit in part.units:
            taken = (
                known[unit.object].intersection(followed)
                if unit.object in known
                else scanned.get(unit.source, ())
            )
            for path in sorted(taken):
                found[part.name].setdefault(
                    followed[path], _sentence(tree, followed[path], path, unit.source)
                )
            for script in (script for script in writers if _lies_below(unit.source, script)):
                found[part.name].setdefault(
                    script, f"{_said(tree, script)}, which writes {unit.source}"
                )
    return found


def _sentence(tree: Path, path: str, followed: str, source: str) -> str:
    said = _said(tree, path)
    if followed != path:
        return f"{said}, which writes {followed}"
    return said if path == source else f"{said}, included by {source}"


def _said(tree: Path, path: str) -> str:
    return f"{path} {'changed' if (tree / path).exists() else 'deleted'}"


def _generators(tree: Path, changed: Collection[str]) -> tuple[str, ...]:
    """The scripts in csrc that changed, and those that import one that did."""
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


def _written(tree: Path, script: str) -> tuple[str, ...]:
    """Files that a script names, as if they lay beside it."""
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
    """CMake's own, and what lies beside it and is used by it: patches of headers, scripts."""
    return path.endswith((".cmake", "CMakeLists.txt")) or path.startswith("cmake/")


def _by_cmake(
    tree: Path, changed: Collection[str], project: Project, pinned: Project | None
) -> dict[str, dict[str, str]]:
    """Map each target to the changed CMake files that it is, or may be, compiled otherwise for."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    before = {target.name: target for target in pinned.targets} if pinned else {}
    for path in sorted(path for path in changed if is_cmake(path)):
        is_read_by_cmake = path.endswith((".cmake", "CMakeLists.txt"))
        words = (
            set(re.findall(r"[A-Za-z0-9_]+", _content(tree / path).decode(errors="replace")))
            if path.startswith("cmake/external_projects/")
            else set()
        )
        for target in project.targets:
            if pinned is None or not is_read_by_cmake:
                found[target.name][path] = (
                    f"{_said(tree, path)}; what the pin's own would build is not known"
                    if is_read_by_cmake
                    else _said(tree, path)
                )
            elif target.name not in before or _recipe(target) != _recipe(before[target.name]):
                found[target.name][path] = (
                    f"{_said(tree, path)}:"
                    f" {'new' if target.name not in before else 'compiled or put together otherwise'}"
                )
            elif target.name in words:
                # The sources of another project can change without a word of the recipe.
                found[target.name][path] = _said(tree, path)
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
    return reasons[0] + (f" (and {more} more {'file' if more == 1 else 'files'})" if more else "")


def _is_of_interest(path: str) -> bool:
    return PurePosixPath(path).suffix in _SUFFIXES or path.endswith(".py") or is_cmake(path)


def _idle(path: str, tree: Path) -> str:
    suffix = PurePosixPath(path).suffix
    if is_cmake(path):
        return f"{path} changes nothing that is compiled here"
    if suffix == ".py":
        return f"{path} writes nothing that is compiled here"
    verb = "compiled" if suffix in _SOURCES else "included"
    return (
        f"{path} is {verb} by nothing here"
        if (tree / path).exists()
        else f"{path} is gone, and was {verb} by nothing that is left here"
    )


def merged(groups: Sequence[Sequence[Reached]]) -> tuple[Reached, ...]:
    """Put together what several reasons reach, each target once with the first of its reasons."""
    found: Mapping[str, Reached] = {one.target: one for group in reversed(groups) for one in group}
    return tuple(found.values())
