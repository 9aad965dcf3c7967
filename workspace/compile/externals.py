"""What the tree's CMake files name: the commands that a configure would reach, parsed without
CMake, and the external projects, which the tree takes from elsewhere, with tag and targets.

A condition that only CMake can decide counts as true and as false at once: the walk visits too much
rather than too little.
"""

import contextlib
import os
import platform
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Tokens of cmake-language(7): comments, bracket arguments, quoted arguments, brackets, unquoted
# arguments.
_TOKEN = re.compile(
    r'#\[(=*)\[.*?\]\1\]|#[^\n]*|\[(=*)\[(.*?)\]\2\]|"((?:[^"\\]|\\.)*)"|([()])|([^\s()#"]+)',
    re.DOTALL,
)
_REFERENCE = re.compile(r"\$\{(\w[\w-]*)\}")
_OVERRIDES = re.compile(r"\w+_(SRC|ROOT)_DIR|FETCHCONTENT_SOURCE_DIR_\w+")
_UNARY = frozenset(
    {
        "EXISTS",
        "IS_DIRECTORY",
        "IS_ABSOLUTE",
        "IS_SYMLINK",
        "COMMAND",
        "POLICY",
        "TARGET",
        "TEST",
        "DEFINED",
    }
)
_JOINING = frozenset({"AND", "OR", ")"})
_FALSE = frozenset({"", "0", "OFF", "NO", "FALSE", "N", "IGNORE", "NOTFOUND"})
# The values that a condition may have where only a configure can decide.
_UNKNOWN = frozenset({True, False})
_CERTAIN = frozenset({True})
_INCLUDED_AT_MOST = 100


@dataclass(frozen=True)
class Command:
    """A command of a CMake file."""

    name: str
    args: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """A command that a configure would reach, the variables known by then, and its file."""

    file: str
    command: Command
    values: Mapping[str, str]

    def resolved(self, argument: str) -> str:
        """Return an argument with the known variables replaced."""
        return resolve(argument, self.values)


def resolve(argument: str, values: Mapping[str, str]) -> str:
    """Replace the references to known variables; leave the others."""
    return _REFERENCE.sub(lambda found: values.get(found[1], found[0]), argument)


def without_top(path: str) -> str:
    """Return a path of a CMake file without its leading variable for the tree."""
    return re.sub(r"^\$\{CMAKE_(CURRENT_)?(SOURCE|LIST)_DIR\}/", "", path)


def commands(text: str) -> Iterator[Command]:
    """Yield every command in order, its name in lower case, nested brackets as arguments. Stop at
    invalid CMake.
    """
    name, depth, args = "", 0, []
    for token in _TOKEN.finditer(text):
        bracket, quoted, paren, plain = token[3], token[4], token[5], token[6]
        argument = next((text for text in (bracket, quoted, plain) if text is not None), None)
        if paren == "(":
            depth += 1
            if depth > 1:
                args.append(paren)
        elif paren == ")":
            depth -= 1
            if depth == 0:
                yield Command(name.lower(), tuple(args))
                name, args = "", []
            elif depth < 0:
                return
            else:
                args.append(paren)
        elif argument is not None and depth:
            args.append(argument)
        elif argument is not None:
            name = argument


def walk(tree: Path, device: str, *, machine: str | None = None) -> Iterator[Step]:
    """Yield the commands that a configure of `tree` for a device would reach; includes are
    followed, functions are not.
    """
    here = machine or platform.machine()
    values = {
        "VLLM_TARGET_DEVICE": device,
        "VLLM_GPU_LANG": "CUDA" if device == "cuda" else "",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": here,
        "ASIMD_FOUND": "ON" if here in ("aarch64", "arm64") else "",
    }
    others = ("APPLE_SILICON", "MACOSX", "S390", "POWER9", "POWER10", "POWER11")
    values |= {f"{other}_FOUND": "" for other in others}
    yield from _Walk(tree, values).through("CMakeLists.txt")


class _Walk:
    def __init__(self, tree: Path, values: Mapping[str, str]) -> None:
        self._tree = tree
        self._values = dict(values)
        # A branch that a configure would not reach must not change what the machine and the device
        # decide.
        self._decided = frozenset(values)
        self._files = 0

    def through(self, path: str) -> Iterator[Step]:
        """Yield the commands of a file that a configure would reach."""
        self._files += 1
        try:
            text = (self._tree / path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return
        branches: list[_Branch] = []
        inside = ""
        for command in commands(text):
            if inside:
                inside = "" if command.name == f"end{inside}" else inside
            elif command.name in ("function", "macro"):
                inside = command.name
            elif command.name in ("if", "elseif", "else", "endif"):
                # The variables in a condition count, too.
                if all(branch.is_open for branch in branches):
                    yield Step(path, command, self._values)
                _update_branches(branches, command, self._values)
            elif all(branch.is_open for branch in branches):
                if command.name == "return" and all(branch.is_certain for branch in branches):
                    return
                self._set(command)
                yield Step(path, command, self._values)
                if command.name == "include" and command.args and self._files < _INCLUDED_AT_MOST:
                    included = without_top(command.args[0])
                    if (self._tree / included).is_file():
                        yield from self.through(included)

    def _set(self, command: Command) -> None:
        args = command.args
        is_kept = args[:1] and (
            args[0] in self._decided or ("CACHE" in args and args[0] in self._values)
        )
        if command.name == "set" and len(args) > 1 and not is_kept:
            # A new mapping each time: a step keeps the values of its own time.
            self._values = {**self._values, args[0]: resolve(args[1], self._values)}


@dataclass
class _Branch:
    """State of an `if`: whether an earlier branch was certainly taken, whether the current one is
    walked, and whether it is certainly taken.
    """

    was_taken: bool = False
    is_open: bool = False
    is_certain: bool = False


def _update_branches(branches: list[_Branch], command: Command, values: Mapping[str, str]) -> None:
    """Update the branches for a command of an `if`."""
    if command.name == "if":
        branches.append(_Branch())
    if not branches:
        return
    if command.name == "endif":
        branches.pop()
        return
    branch = branches[-1]
    possible = _CERTAIN if command.name == "else" else _Condition(command.args, values).values()
    branch.is_open = not branch.was_taken and True in possible
    branch.is_certain = possible == _CERTAIN
    branch.was_taken = branch.was_taken or branch.is_certain


class _Condition:
    """Condition of cmake-language, with all values that it may have at a configure."""

    def __init__(self, tokens: Sequence[str], values: Mapping[str, str]) -> None:
        self._tokens = list(tokens)
        self._values = values

    def values(self) -> frozenset[bool]:
        """Return the values that the condition may have."""
        found = self._either()
        return found if not self._tokens else _UNKNOWN

    def _either(self) -> frozenset[bool]:
        found = self._both()
        while self._take("OR"):
            others = self._both()
            found = frozenset(one or other for one in found for other in others)
        return found

    def _both(self) -> frozenset[bool]:
        found = self._one()
        while self._take("AND"):
            others = self._one()
            found = frozenset(one and other for one in found for other in others)
        return found

    def _one(self) -> frozenset[bool]:
        """Evaluate a single term."""
        if self._take("NOT"):
            return frozenset(not one for one in self._one())
        if self._take("("):
            found = self._either()
            return found if self._take(")") else _UNKNOWN
        token = self._pop()
        if token in _UNARY:
            # Overrides are handled elsewhere; here the walk follows what is fetched without one.
            variable = self._pop().removeprefix("ENV{").rstrip("}")
            is_override = token == "DEFINED" and _OVERRIDES.fullmatch(variable)
            return frozenset({False}) if is_override else _UNKNOWN
        if self._tokens and self._tokens[0] not in _JOINING:
            return self._compared(token, self._pop(), self._pop())
        text = self._values.get(token)
        if text is None and _OVERRIDES.fullmatch(token):
            return frozenset({False})
        return _UNKNOWN if text is None or "$" in text else frozenset({text.upper() not in _FALSE})

    def _compared(self, token: str, operator: str, right: str) -> frozenset[bool]:
        """Evaluate a comparison of texts; all others are for a configure."""
        left = resolve(self._values.get(token, token), self._values)
        right = resolve(right, self._values)
        is_known = token in self._values or _REFERENCE.fullmatch(token)
        if is_known and "$" not in left and operator == "STREQUAL":
            return frozenset({left == right})
        if is_known and "$" not in left and operator == "MATCHES":
            with contextlib.suppress(re.error):
                return frozenset({bool(re.search(right, left))})
        return _UNKNOWN

    def _pop(self) -> str:
        return self._tokens.pop(0) if self._tokens else ""

    def _take(self, token: str) -> bool:
        is_next = self._tokens[:1] == [token]
        if is_next:
            self._tokens.pop(0)
        return is_next


def cmake_files(tree: Path) -> tuple[Path, ...]:
    """Return CMakeLists.txt and all files below cmake/: patches and scripts of a configure are
    there too.
    """
    below = (Path(top) / name for top, _, names in os.walk(tree / "cmake") for name in names)
    return tuple(
        sorted(
            path
            for path in (tree / "CMakeLists.txt", *below)
            if path.is_file() and "__pycache__" not in path.parts
        )
    )


_IN_PACKAGE = re.compile(r"\$\{CMAKE_(?:CURRENT_)?SOURCE_DIR\}/(vllm/[\w./-]+)")


def package_folders(tree: Path, device: str) -> tuple[str, ...]:
    """Return the folders of the Python package that the CMake files name: a configure may overwrite
    files of a precompiled wheel there.
    """
    steps = walk(tree, device)
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
    for step in walk(tree, device):
        args = step.command.args
        if step.command.name == "file" and len(args) > 2 and args[0] in ("GLOB", "GLOB_RECURSE"):
            for argument in args[2:]:
                pattern = without_top(step.resolved(argument))
                if "$" not in pattern and not pattern.startswith("/") and "/" in pattern:
                    parent, _, name = pattern.rpartition("/")
                    yield f"{parent}/**/{name}" if args[0] == "GLOB_RECURSE" else pattern


_DECLARING = ("fetchcontent_declare", "fetchcontent_populate", "externalproject_add")
_KEY = re.compile(r"[A-Z][A-Z_]{3,}")
_TOP = "CMakeLists.txt"
_VALUES = frozenset({"TRUE", "FALSE"})
_OVERRIDE = re.compile(r"\$?ENV\{(\w+_(?:SRC|ROOT)_DIR|FETCHCONTENT_SOURCE_DIR_\w+)\}")
_SUFFIXED = re.compile(r"\$\{([\w-]+)\}/([\w./+-]+\.[A-Za-z]\w*)")
_DEFINING = (
    "add_custom_target",
    "define_extension_target",
    "add_library",
    "define_gpu_extension_target",
)


@dataclass(frozen=True)
class External:
    """An external project. `submodules` are their paths, None for all."""

    name: str
    repository: str
    tag: str
    # The user's variable, and the variable by which CMake gets the folder.
    override: str
    variable: str
    targets: tuple[str, ...]
    submodules: tuple[str, ...] | None
    # What a placeholder must have: files, and targets that only the project itself defines.
    files: tuple[str, ...]
    defines: tuple[str, ...]


def pinned(text: str) -> Iterator[tuple[str, str]]:
    """Yield the projects that a CMake file fetches, with their GIT_TAG; for a variable, each of its
    values.
    """
    values: dict[str, list[str]] = {}
    found = tuple(commands(text))
    for command in found:
        if command.name == "set" and len(command.args) > 1:
            values.setdefault(command.args[0], []).append(command.args[1])
    for command in found:
        if command.name in _DECLARING and command.args:
            for tag in _options(command.args).get("GIT_TAG", [])[:1]:
                variable = re.fullmatch(r"\$\{(\w+)\}", tag)
                for value in values.get(variable[1], [tag]) if variable else [tag]:
                    yield command.args[0].lower(), value


def declared(tree: Path, device: str, *, machine: str | None = None) -> tuple[External, ...]:
    """Return the projects that a configure of `tree` for a device fetches on this machine, in
    order.
    """
    steps = tuple(walk(tree, device, machine=machine))
    defined = {
        step.resolved(step.command.args[0])
        for step in steps
        if step.command.name in _DEFINING and step.command.args
    }
    found: dict[str, External] = {}
    override = file = ""
    for step in steps:
        if step.file != file:
            override, file = "", step.file
        for argument in step.command.args:
            if "ENV{" in argument and (named := _OVERRIDE.search(argument)):
                override = named[1]
        if step.command.name in _DECLARING and step.command.args:
            options = _options([step.resolved(argument) for argument in step.command.args])
            if options.get("GIT_REPOSITORY") and options.get("GIT_TAG"):
                name = step.command.args[0]
                found[name.lower()] = _external(step, options, override, steps, defined)
    return tuple(found.values())


def _options(args: Sequence[str]) -> Mapping[str, list[str]]:
    """Return the values after each keyword of a declaration."""
    options: dict[str, list[str]] = {}
    values: list[str] = []
    for argument in args[1:]:
        if _KEY.fullmatch(argument) and argument not in _VALUES:
            values = options.setdefault(argument, [])
        else:
            values.append(argument)
    return options


def _external(
    step: Step,
    options: Mapping[str, list[str]],
    override: str,
    steps: Sequence[Step],
    defined: Collection[str],
) -> External:
    name = step.command.args[0]
    generic = f"FETCHCONTENT_SOURCE_DIR_{name.upper()}"
    # FETCHCONTENT_SOURCE_DIR works as a download does, while a SRC_DIR may install links instead of
    # copies (vllm_flash_attn.cmake). But FetchContent_Populate with options ignores it
    # (FetchContent(3cmake)).
    is_known = step.command.name == "fetchcontent_declare"
    targets = _targets(name, step.file, steps)
    submodules = options.get("GIT_SUBMODULES")
    return External(
        name=name,
        repository=options["GIT_REPOSITORY"][0],
        tag=options["GIT_TAG"][0],
        override=override or generic,
        variable=generic if is_known or not override else override,
        targets=targets,
        submodules=None if submodules is None else tuple(path for path in submodules if path),
        files=_files(name, steps),
        defines=tuple(target for target in targets if target not in defined),
    )


def _targets(name: str, file: str, steps: Sequence[Step]) -> tuple[str, ...]:
    """Return the targets that need the project: all targets of its own file and of every other file
    that names its variables, except for the top file, where only the commands that name them count.
    """
    mention = f"${{{name}_".lower()
    naming: dict[str, None] = {}
    for path in dict.fromkeys(step.file for step in steps):
        of_file = [step for step in steps if step.file == path]
        by_name = [
            step
            for step in of_file
            if any(mention in argument.lower() for argument in step.command.args if "$" in argument)
        ]
        if path == file == _TOP:
            naming |= dict.fromkeys(_defined(by_name, of_file))
        elif path == file or (by_name and path != _TOP):
            naming |= dict.fromkeys(_defined(of_file, of_file))
    return tuple(naming)


def _defined(steps: Sequence[Step], of_file: Sequence[Step]) -> Iterator[str]:
    """Yield the targets that these steps define or install, also by a variable of a loop."""
    loops = {
        step.command.args[0]: step.command.args[1:]
        for step in of_file
        if step.command.name == "foreach" and step.command.args
    }
    for step in steps:
        args = step.command.args
        if (
            step.command.name
            in (
                "add_custom_target",
                "define_extension_target",
                "define_gpu_extension_target",
            )
            and args
        ):
            yield step.resolved(args[0])
        if step.command.name == "install" and "COMPONENT" in args[:-1]:
            component = args[args.index("COMPONENT") + 1]
            looped = re.fullmatch(r"\$\{(\w+)\}", component)
            yield from loops.get(looped[1], ()) if looped else (component,)


def _files(name: str, steps: Sequence[Step]) -> tuple[str, ...]:
    """Return the project's files that the tree's CMake files name. Files that are only installed
    are left out: their install must fail.
    """
    places = {
        "_SOURCE_DIR": "",
        "_DIR": "",
        "_INCLUDE_DIR": "include/",
        "_TOOLS_UTIL_INCLUDE_DIR": "tools/util/include/",
    }
    prefixes = {f"{name}{suffix}".lower(): place for suffix, place in places.items()}
    found: dict[str, None] = {}
    for step in steps:
        if step.command.name != "install":
            for variable, path in (
                match
                for argument in step.command.args
                if "$" in argument
                for match in _SUFFIXED.findall(argument)
            ):
                if variable.lower() in prefixes and ".." not in path:
                    found[prefixes[variable.lower()] + path] = None
    return tuple(sorted(found))
