"""What the tree's CMake files say, read without CMake: their commands, and which of them a
configure for a device would come to.

Conditions that only a configure can decide count as met and as not met at once: too much is read
rather than too little.
"""

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
from workspace.core.paths import Layout
from workspace.core.settings import Settings, is_secret
from workspace.machine import interpreter, toolchain
from workspace.machine.torch import TorchBuild
from workspace.repo.pins import Pin

# cmake-language(7): comments, bracket arguments, quoted arguments, brackets, unquoted arguments.
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
_BINARY = frozenset(
    {
        "STREQUAL",
        "MATCHES",
        "EQUAL",
        "LESS",
        "GREATER",
        "IN_LIST",
        "IS_NEWER_THAN",
        "PATH_EQUAL",
        "STRLESS",
        "STRGREATER",
    }
)
_FALSE = frozenset({"", "0", "OFF", "NO", "FALSE", "N", "IGNORE", "NOTFOUND"})
_INCLUDED_AT_MOST = 100


@dataclass(frozen=True)
class Command:
    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """A command that a configure would come to, its words with the variables known by then, and the
    file it stands in.
    """

    file: str
    command: Command
    values: Mapping[str, str]

    def resolved(self, word: str) -> str:
        return resolve(word, self.values)


def resolve(word: str, values: Mapping[str, str]) -> str:
    """Put in the variables that are known; others stay as they are spelled."""
    return _REFERENCE.sub(lambda found: values.get(found[1], found[0]), word)


def commands(text: str) -> Iterator[Command]:
    """Every command in order, its name in lower case, nested brackets as words. What is no CMake
    ends it.
    """
    name, depth, words = "", 0, []
    for token in _TOKEN.finditer(text):
        bracket, quoted, paren, plain = token[3], token[4], token[5], token[6]
        word = next((text for text in (bracket, quoted, plain) if text is not None), None)
        if paren == "(":
            depth += 1
            if depth > 1:
                words.append(paren)
        elif paren == ")":
            depth -= 1
            if depth == 0:
                yield Command(name.lower(), tuple(words))
                name, words = "", []
            elif depth < 0:
                return
            else:
                words.append(paren)
        elif word is not None and depth:
            words.append(word)
        elif word is not None:
            name = word


def walk(tree: Path, device: str, *, machine: str | None = None) -> Iterator[Step]:
    """The commands that a configure of `tree` for a device would come to, includes followed,
    functions left out.
    """
    here = machine or platform.machine()
    values = {
        "VLLM_TARGET_DEVICE": device,
        "VLLM_GPU_LANG": "CUDA" if device == "cuda" else "",
        "CMAKE_SYSTEM_NAME": "Linux",
    }
    values |= {
        "ASIMD_FOUND": "ON" if here in ("aarch64", "arm64") else "",
        "CMAKE_SYSTEM_PROCESSOR": here,
    }
    values |= dict.fromkeys(
        (
            "APPLE_SILICON_FOUND",
            "MACOSX_FOUND",
            "S390_FOUND",
            "POWER9_FOUND",
            "POWER10_FOUND",
            "POWER11_FOUND",
        ),
        "",
    )
    yield from _Walk(tree, values).through("CMakeLists.txt")


class _Walk:
    def __init__(self, tree: Path, values: Mapping[str, str]) -> None:
        self._tree = tree
        self._values = dict(values)
        # What the machine and the device decide no branch that a configure would not come to may
        # say otherwise.
        self._decided = frozenset(values)
        self._files = 0

    def through(self, path: str) -> Iterator[Step]:
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
                # What a condition asks for tells something as well.
                if all(branch.is_open for branch in branches):
                    yield Step(path, command, self._values)
                _turn(branches, command, self._values)
            elif all(branch.is_open for branch in branches):
                if command.name == "return" and all(branch.is_certain for branch in branches):
                    return
                self._set(command)
                yield Step(path, command, self._values)
                if command.name == "include" and command.words and self._files < _INCLUDED_AT_MOST:
                    named = re.sub(
                        r"^\$\{CMAKE_(CURRENT_)?(SOURCE|LIST)_DIR\}/", "", command.words[0]
                    )
                    if (self._tree / named).is_file():
                        yield from self.through(named)

    def _set(self, command: Command) -> None:
        words = command.words
        is_kept = words[:1] and (
            words[0] in self._decided or ("CACHE" in words and words[0] in self._values)
        )
        if command.name == "set" and len(words) > 1 and not is_kept:
            # A new mapping each time: a step keeps what was known when it was come to.
            self._values = {**self._values, words[0]: resolve(words[1], self._values)}


@dataclass
class _Branch:
    """An `if` and where in it the walk stands: whether a branch before was surely taken, this one
    is walked, and surely so.
    """

    was_taken: bool = False
    is_open: bool = False
    is_certain: bool = False


def _turn(branches: list[_Branch], command: Command, values: Mapping[str, str]) -> None:
    if command.name == "if":
        branches.append(_Branch())
    if not branches:
        return
    if command.name == "endif":
        branches.pop()
        return
    branch = branches[-1]
    said = True if command.name == "else" else _Condition(command.words, values).value()
    branch.is_open = not branch.was_taken and said is not False
    branch.is_certain = said is True
    branch.was_taken = branch.was_taken or said is True


class _Condition:
    """cmake-language's condition syntax with a third value, None, for what only a configure
    knows.
    """

    def __init__(self, words: Sequence[str], values: Mapping[str, str]) -> None:
        self._words = list(words)
        self._values = values

    def value(self) -> bool | None:
        said = self._either()
        return said if not self._words else None

    def _either(self) -> bool | None:
        said = self._both()
        while self._take("OR"):
            other = self._both()
            said = True if True in (said, other) else None if None in (said, other) else False
        return said

    def _both(self) -> bool | None:
        said = self._one()
        while self._take("AND"):
            other = self._one()
            said = False if False in (said, other) else None if None in (said, other) else True
        return said

    def _one(self) -> bool | None:
        if self._take("NOT"):
            said = self._one()
            return None if said is None else not said
        if self._take("("):
            said = self._either()
            return said if self._take(")") else None
        if not self._words:
            return None
        word = self._words.pop(0)
        if word in _UNARY and self._words:
            named = self._words.pop(0)
            # Overrides are asked for before; here the question is what is fetched without one.
            return (
                False
                if word == "DEFINED"
                and _OVERRIDES.fullmatch(named.removeprefix("ENV{").rstrip("}"))
                else None
            )
        if self._words and (self._words[0] in _BINARY or self._words[0].startswith("VERSION_")):
            operator = self._words.pop(0)
            right = resolve(self._words.pop(0), self._values) if self._words else ""
            left = resolve(self._values.get(word, word), self._values)
            if "$" in left or (word not in self._values and not _REFERENCE.fullmatch(word)):
                return None
            return (
                left == right
                if operator == "STREQUAL"
                else _matches(right, left)
                if operator == "MATCHES"
                else None
            )
        if _OVERRIDES.fullmatch(word) and word not in self._values:
            return False
        said_by_tree = self._values.get(word)
        return (
            None
            if said_by_tree is None or "$" in said_by_tree
            else said_by_tree.upper() not in _FALSE
        )

    def _take(self, word: str) -> bool:
        if self._words and self._words[0] == word:
            self._words.pop(0)
            return True
        return False


def _matches(pattern: str, text: str) -> bool | None:
    try:
        return bool(re.search(pattern, text))
    except re.error:
        return None


# setup.py's cmake_build_ext.configure.
BUILD_TYPE = "RelWithDebInfo"
KEY_DIGITS = 12
# Compilers read them, and nothing of it stands in a command that ninja could compare.
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
# cmake-env-variables(7): what becomes a variable of the first configure.
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
# The tree's files put something before these for a helper that they run; overrides of external
# projects stand among the sources.
_NOT_ASKED = re.compile(r"PATH|HOME|PYTHONPATH|LD_LIBRARY_PATH|\w+_(SRC|ROOT)_DIR|FETCHCONTENT_\w+")


@dataclass(frozen=True)
class Inputs:
    """`place` is the checkout, `archs` and `cuda` are empty for the CPU. `configure` is not part of
    the key.
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
        text = json.dumps(
            [
                self.device,
                self.place,
                self.pin,
                self.archs,
                self.torch,
                self.cuda,
                self.compiler,
                self.build_type,
            ]
        )
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]

    @property
    def named(self) -> Mapping[str, str]:
        """Everything by name, as a record keeps it."""
        own = {
            name: str(getattr(self, name))
            for name in ("device", "place", "pin", "archs", "torch", "cuda", "compiler")
        }
        return {**own, "build type": self.build_type, **self.configure}

    def differences(self, recorded: Mapping[str, str]) -> tuple[str, ...]:
        """Say what is otherwise than it was recorded by `named`: `torch 2.13.0 → 2.14.0`."""
        return files.differences(recorded, {**dict.fromkeys(recorded, ""), **self.named})


def observe(
    layout: Layout, settings: Settings, *, device: Device, pin: Pin, torch: TorchBuild
) -> Inputs:
    """Look at what a build of the tree for `device` would be made with. It starts the compilers,
    and no Python.
    """
    environment = settings.child_environment("build")
    toolkit = toolchain.find_toolkit(settings) if device == "cuda" else None
    installed = interpreter.installed(layout)
    unseen = [f"{name}={environment[name]}" for name in _READ_BY_COMPILERS if environment.get(name)]
    compiler = f"{_compiler(environment)} {toolchain.compiler_version(settings) or 'none'}"
    configure = {
        "CMAKE_ARGS": settings.text("CMAKE_ARGS"),
        "CMake": installed.get("cmake", "on PATH"),
        "ninja": installed.get("ninja", "on PATH"),
        "Python": " ".join(str(folder) for folder in interpreter.site_packages(layout)),
        # The place of the ticket is that of the build directory, and so no input.
        "launchers": " ".join(
            f"{name}={word}" for name, word in ninja.launchers(settings, Path("ticket")).items()
        ),
    }
    if device == "cuda":
        configure |= {
            "NVCC_THREADS": settings.text("NVCC_THREADS") or "1",
            "CUDA_HOME": str(toolkit.home) if toolkit else "",
        }
    named = {
        *_READ_BY_CMAKE,
        *(name for name in _asked_by(layout.vllm) if not _NOT_ASKED.fullmatch(name)),
    }
    configure |= {
        name: environment[name]
        for name in sorted(named)
        if environment.get(name) and not is_secret(name)
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
        configure=configure,
    )


def folder(layout: Layout, inputs: Inputs) -> Path:
    """The build directory for these inputs; see Layout.builds."""
    return layout.builds / f"{inputs.device}-{inputs.key}"


def listfiles(tree: Path) -> tuple[Path, ...]:
    """CMakeLists.txt and everything below cmake/ of a tree: patches and scripts that a configure
    runs lie there too.
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


def _asked_by(tree: Path) -> frozenset[str]:
    """The variables of the environment that the tree's CMake files ask for."""
    texts = (
        path.read_text(encoding="utf-8", errors="replace")
        for path in listfiles(tree)
        if path.name == "CMakeLists.txt" or path.suffix == ".cmake"
    )
    return frozenset(name for text in texts for name in _READ_BY_TREE.findall(text))
