"""Stand-ins for external projects of which nothing is compiled: enough for a configure, and an error for whoever builds from one."""

import re
from collections.abc import Sequence
from pathlib import Path

from workspace.core.files import write_atomic

FOLDER = "placeholders"
# Stands in every file of a placeholder, and in what a configure makes of one.
MARK = "stands in for a file of an external project that was not fetched"
# Libraries that a project brings along with no target of the tree bearing their name.
_LIBRARIES = {"onednn": ("dnnl",)}
_ABSENT = (
    re.compile(r"Cannot find source file:\s+(?P<path>/\S+)"),
    re.compile(r"failed to open for reading \([^)]*\):\s+(?P<path>/\S+)"),
    re.compile(r"(?:given source|source directory|include path)\s+\"?(?P<path>/[^\s\"]+)\"? (?:which is not an existing|which does not exist)"),
)


def make(folder: Path, name: str, tag: str, *, files: Sequence[str], defines: Sequence[str]) -> None:
    """Make what is missing in the placeholder at `folder`; what is right is not touched."""
    _write(folder / "CMakeLists.txt", _listfile(name, tag, defines))
    for file in files:
        _write(folder / file, _refusal(folder / file, f"{name} {tag}"))


def complete(root: Path, said: str) -> tuple[Path, ...]:
    """Make the files below `root`, the folder of all placeholders, that a configure says are missing, and return those that were not there."""
    named = (Path(found["path"].rstrip(".")) for pattern in _ABSENT for found in pattern.finditer(said))
    absent = tuple(dict.fromkeys(path for path in named if path.is_relative_to(root) and ".." not in path.parts and not path.exists()))
    for path in absent:
        _write(path, _refusal(path, "/".join(path.relative_to(root).parts[:2])))
    return absent


def named(folder: str | None) -> str:
    """A folder of sources as it is said to a person."""
    return "nothing" if not folder else "a placeholder" if FOLDER in Path(folder).parts else folder


def _listfile(name: str, tag: str, defines: Sequence[str]) -> str:
    prefix = name.upper()
    here = "${CMAKE_CURRENT_SOURCE_DIR}"
    places = {"DIR": here, "INCLUDE_DIR": f"{here}/include", "TOOLS_UTIL_INCLUDE_DIR": f"{here}/tools/util/include"}
    lines = [
        f"# Stands in for {name} {tag}: nothing that is built here needs it.",
        "cmake_minimum_required(VERSION 3.20)",
        "project(placeholder NONE)",
        "if(PROJECT_IS_TOP_LEVEL)",
        "  return()",
        "endif()",
        # Not into the cache, as the project itself does: it would find them there later.
        *(f'set({prefix}_{suffix} "{place}" PARENT_SCOPE)' for suffix, place in places.items()),
        *(f"add_library({library} INTERFACE)" for library in _LIBRARIES.get(name.lower(), ())),
    ]
    for target in defines:
        said = f"{target} needs {name} {tag}, which was not fetched"
        lines.append(f'add_custom_target({target} COMMAND "${{CMAKE_COMMAND}}" -E echo "{said}" COMMAND "${{CMAKE_COMMAND}}" -E false VERBATIM)')
    return "\n".join(lines) + "\n"


def _refusal(path: Path, of: str) -> str:
    if path.suffix in (".py", ".txt", ".cmake", ".md"):
        return f"# {of}: {MARK}\n"
    return f'#error "{of}: {MARK}"\n'


def _write(path: Path, text: str) -> None:
    try:
        if path.read_text(encoding="utf-8") == text:
            return
    except (OSError, ValueError):
        pass
    write_atomic(path, text.encode())
