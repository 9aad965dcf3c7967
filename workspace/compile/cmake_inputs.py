"""Inputs of a configure: the commands of the tree's CMake files that it would reach, parsed without
CMake; and the settings, compilers and versions that a build directory depends on.

A condition that only CMake can decide counts as true and as false at once: the walk visits too much
rather than too little.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.compile import ninja
from workspace.compile.project import Device
from workspace.core import files
from workspace.core.known_settings import is_secret
from workspace.core.paths import Layout
from workspace.machine import interpreter
from workspace.machine.machine import Machine
from workspace.machine.torch import TorchBuild
from workspace.repo.pins import Pin

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


# The default of setup.py's cmake_build_ext.configure.
BUILD_TYPE = "RelWithDebInfo"
KEY_DIGITS = 12
_KEYED = ("device", "place", "pin", "archs", "torch", "cuda", "compiler")
# Compilers read these variables, and no command contains them, so ninja cannot compare them.
_READ_BY_COMPILERS = (
    "CPATH",
    "C_INCLUDE_PATH",
    "CPLUS_INCLUDE_PATH",
    "LIBRARY_PATH",
    "NVCC_PREPEND_FLAGS",
    "NVCC_APPEND_FLAGS",
    "CUDAHOSTCXX",
    "NVCC_CCBIN",
)
# cmake-env-variables(7): they become variables of the first configure.
_READ_BY_CMAKE = (
    "CC",
    "CXX",
    "CUDACXX",
    "CFLAGS",
    "CXXFLAGS",
    "CUDAFLAGS",
    "CUDAARCHS",
    "LDFLAGS",
    "CMAKE_PREFIX_PATH",
    "VERBOSE",
    "DEEPGEMM_PYTHON_INTERPRETERS",
)
_READ_BY_TREE = re.compile(r"\$?ENV\{(\w+)\}")
# The tree's files only extend these for a helper that they run; overrides of external projects are
# part of the sources.
_NOT_INPUTS = re.compile(
    r"PATH|HOME|PYTHONPATH|LD_LIBRARY_PATH|\w+_(SRC|ROOT)_DIR|FETCHCONTENT_\w+"
)


@dataclass(frozen=True)
class Inputs:
    """Inputs of a configure. `place` is the checkout; `archs` and `cuda` are empty for the CPU. The
    key does not include `configure`.
    """

    device: Device
    place: str
    pin: str
    archs: str
    torch: str
    cuda: str
    compiler: str
    build_type: str
    configure: Mapping[str, str]

    @property
    def key(self) -> str:
        values = [getattr(self, name) for name in (*_KEYED, "build_type")]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:KEY_DIGITS]

    @property
    def named(self) -> Mapping[str, str]:
        """All inputs by name, as a record keeps them."""
        own = {name: str(getattr(self, name)) for name in _KEYED}
        return {**own, "build type": self.build_type, **self.configure}

    def differences(self, recorded: Mapping[str, str]) -> tuple[str, ...]:
        """Return the differences to inputs recorded by `named`: `torch 2.13.0 → 2.14.0`."""
        return files.differences(recorded, {**dict.fromkeys(recorded, ""), **self.named})


def observe(machine: Machine, *, device: Device, pin: Pin, torch: TorchBuild) -> Inputs:
    """Return the inputs of a build for `device`. Starts the compilers, but no Python."""
    layout, settings = machine.layout, machine.settings
    environment = settings.child_environment("build")
    toolkit = machine.toolkit() if device == "cuda" else None
    unseen = [f"{name}={environment[name]}" for name in _READ_BY_COMPILERS if environment.get(name)]
    compiler = f"{_compiler(environment)} {machine.compiler_version() or 'none'}"
    of_cuda = {
        "NVCC_THREADS": settings.text("NVCC_THREADS") or "1",
        "CUDA_HOME": str(toolkit.home) if toolkit else "",
    }
    return Inputs(
        device=device,
        place=str(layout.vllm),
        pin=f"{pin.tag} {pin.commit[:12]}",
        archs=settings.text("TORCH_CUDA_ARCH_LIST") if device == "cuda" else "",
        torch=torch.version,
        cuda=(toolkit.version if toolkit else "none") if device == "cuda" else "",
        compiler=" ".join([compiler, *unseen]),
        build_type=settings.text("CMAKE_BUILD_TYPE") or BUILD_TYPE,
        configure=_configure_inputs(machine, environment, of_cuda if device == "cuda" else {}),
    )


def _configure_inputs(
    machine: Machine, environment: Mapping[str, str], of_cuda: Mapping[str, str]
) -> dict[str, str]:
    """Return the inputs that only a configure depends on, by name."""
    layout, settings, installed = machine.layout, machine.settings, machine.packages()
    # The folder of the launcher is in the build directory, and so no input.
    launchers = ninja.launchers(settings, Path("ticket"))
    variables = {
        *_READ_BY_CMAKE,
        *(name for name in _environment_variables(layout.vllm) if not _NOT_INPUTS.fullmatch(name)),
    }
    return {
        "CMAKE_ARGS": settings.text("CMAKE_ARGS"),
        "CMake": installed.get("cmake", "on PATH"),
        "ninja": installed.get("ninja", "on PATH"),
        "Python": " ".join(str(folder) for folder in interpreter.site_packages(layout)),
        "launchers": " ".join(f"{name}={command}" for name, command in launchers.items()),
        **of_cuda,
        **{
            name: environment[name]
            for name in sorted(variables)
            if environment.get(name) and not is_secret(name)
        },
    }


def folder(layout: Layout, inputs: Inputs) -> Path:
    """Return the build directory for these inputs; see Layout.builds."""
    return layout.builds / f"{inputs.device}-{inputs.key}"


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


def _compiler(environment: Mapping[str, str]) -> str:
    try:
        return Path(shlex.split(environment.get("CXX") or "g++")[0]).name
    except (ValueError, IndexError):
        return environment["CXX"]


def _environment_variables(tree: Path) -> frozenset[str]:
    """Return the environment variables that the tree's CMake files read."""
    texts = (
        path.read_text(encoding="utf-8", errors="replace")
        for path in cmake_files(tree)
        if path.name == "CMakeLists.txt" or path.suffix == ".cmake"
    )
    return frozenset(name for text in texts for name in _READ_BY_TREE.findall(text))
