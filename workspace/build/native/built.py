"""What a build directory has built: the objects that ninja would make anew, and what the compilers of all others have read.

ninja is asked with -n throughout: so it writes nothing, not even its own logs.
"""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from os import path as paths
from pathlib import Path

from workspace.build.native.project import Target
from workspace.core import process
from workspace.core.errors import ToolchainError

ANSWER_S = 60.0
# What a command line holds many times over; the objects of a whole build are some hundreds.
_ASKED_AT_ONCE = 500
_CACHED = re.compile(r"^(CMAKE_MAKE_PROGRAM|CMAKE_HOME_DIRECTORY):[A-Z]+=(.+)$", re.MULTILINE)
_HEAD = re.compile(r"^(.+): #deps \d+, deps mtime \d+ \((VALID|STALE)\)$")


@dataclass(frozen=True)
class Built:
    """`due`: objects that ninja would make. `taken_in`: by object, of all others, the files of the tree that were read, relative to it."""

    due: frozenset[str]
    taken_in: Mapping[str, frozenset[str]]


def ask(build: Path, tree: Path, targets: Collection[Target]) -> Built | None:
    """Ask ninja about these targets. None where it cannot tell: it is not there, the directory is damaged, or CMake would have to run first."""
    compiled = {target.name: {unit.object for unit in target.units} for target in targets if target.units}
    objects = {one for group in compiled.values() for one in group}
    if not (build / ".ninja_deps").is_file() or not objects:
        return Built(frozenset(objects), {})
    try:
        cached = dict(_CACHED.findall((build / "CMakeCache.txt").read_text(encoding="utf-8", errors="replace")))
        due = _due(cached["CMAKE_MAKE_PROGRAM"], build, compiled)
        if due is None:
            return None
        wanted, taken_in = sorted(objects - due), dict[str, frozenset[str]]()
        tops = tuple(dict.fromkeys(f"{top}/" for top in (cached["CMAKE_HOME_DIRECTORY"], str(tree.absolute()), paths.realpath(tree))))
        for start in range(0, len(wanted), _ASKED_AT_ONCE):
            said = _ninja(cached["CMAKE_MAKE_PROGRAM"], build, "-t", "deps", *wanted[start : start + _ASKED_AT_ONCE])
            if said is None:
                return None
            taken_in |= _taken_in(said, build, tops)
    except (OSError, KeyError, ToolchainError):
        return None
    # Of what ninja holds for whole and has no dependencies of, nothing is known.
    return Built(frozenset(due | {one for one in wanted if one not in taken_in}), taken_in)


def _due(program: str, build: Path, compiled: Mapping[str, Collection[str]]) -> set[str] | None:
    """The objects that ninja would make for these targets; all of a target of which it cannot say."""
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
    return objects.intersection(line.rsplit(" ", 1)[-1] for line in said) | {one for one in objects if " " in one}


def _ninja(program: str, build: Path, *words: str) -> list[str] | None:
    done = process.capture([program, "-n", *words], env={"PATH": os.defpath, "NINJA_STATUS": ""}, cwd=build, timeout_s=ANSWER_S)
    return done.stdout.splitlines() if done.returncode == 0 else None


def _taken_in(said: Collection[str], build: Path, tops: tuple[str, ...]) -> dict[str, frozenset[str]]:
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
    """The file relative to the tree, as it was spelled and as it is called without links; nothing where it lies elsewhere."""
    if not path.startswith("/"):
        path = paths.normpath(paths.join(build, path))
    if not path.startswith(tops):
        return ()
    spelled = (path, paths.realpath(path))
    return tuple({name.removeprefix(top) for name in spelled for top in tops if name.startswith(top)})
