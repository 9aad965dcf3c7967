"""What CMake says that it will build: targets, units, where their outcome goes. Read from its file
API, never from its text for people.

And what the tree's setup.py asks for, read from its lines: importing it would import torch and look
for a compiler.
"""

import ast
import contextlib
import hashlib
import json
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Device = Literal["cpu", "cuda"]

# cmake-file-api(7). Shared, stateless queries: their names are all that they say.
QUERIES = ("codemodel-v2", "cmakeFiles-v1")
# What a configure was made from, and what it said; written by native/cmake.py.
RECORD = "configured.json"
_API = Path(".cmake") / "api" / "v1"
_OBJECT_OF = re.compile(r"(?:^|/)CMakeFiles/([^/]+)\.dir/")
_CLASS = "CMakeExtension"


@dataclass(frozen=True)
class Unit:
    """One source that a compiler turns into one object. `source` is relative to the tree where it
    lies below it, `object` to the build directory.
    """

    source: str
    object: str
    language: str


@dataclass(frozen=True)
class Target:
    """One target. `kind` is the file API's type; `recipe` tells alike two build directories that
    compile its units alike.
    """

    name: str
    kind: str
    units: tuple[Unit, ...]
    # Relative to the build directory.
    artifacts: tuple[str, ...]
    # Folders below the install prefix: vllm, vllm/vllm_flash_attn.
    installs: tuple[str, ...]
    # Relative to the tree where they lie below it.
    includes: tuple[str, ...]
    recipe: str
    depends: tuple[str, ...]


@dataclass(frozen=True)
class Project:
    """All targets, by name, and configure's own sentences `Not building …`."""

    targets: tuple[Target, ...]
    not_built: tuple[str, ...] = ()


@dataclass(frozen=True)
class Extension:
    """What the tree's setup.py would build: a CMake target, and whether a build without it is
    whole.
    """

    target: str
    is_optional: bool


def ask(build: Path) -> None:
    """Let the next configure in `build` answer what `read` and `files` read."""
    folder = build / _API / "query"
    folder.mkdir(parents=True, exist_ok=True)
    for query in QUERIES:
        (folder / query).touch()


def read(build: Path, tree: Path) -> Project | None:
    """Return the project that was configured in `build`, None where CMake's answer is not there or
    not whole.
    """
    try:
        record = json.loads((build / RECORD).read_bytes())
        sources = {str(name): str(folder) for name, folder in record["sources"].items()}
        reader = _Reader(build, tree, sources)
        return Project(reader.targets(), tuple(str(sentence) for sentence in record["not_built"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None


def files(build: Path) -> tuple[Path, ...]:
    """Return the CMake files that the configure in `build` has read, without CMake's own and
    generated ones; nothing where it did not say.
    """
    try:
        answer = _answer(build, "cmakeFiles-v1")
        top = Path(answer["paths"]["source"])
        read_by = [
            entry
            for entry in answer["inputs"]
            if not entry.get("isCMake") and not entry.get("isGenerated")
        ]
        return tuple(top / str(entry["path"]) for entry in read_by)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return ()


class _Reader:
    """CMake's answer in `build`. What differs between two build directories of one tree, their own
    places, is told alike.
    """

    def __init__(self, build: Path, tree: Path, sources: Mapping[str, str]) -> None:
        self._build = build
        self._tree = tree
        self._model = _answer(build, "codemodel-v2")
        # The folders of external projects first: placeholders lie below the build directories.
        # Their last part is the tag.
        places = [(folder, f"<{name} {Path(folder).name}>") for name, folder in sources.items()]
        self._places = [
            *sorted(places, key=lambda place: len(place[0]), reverse=True),
            (str(build), "<build>"),
            (str(tree), "<tree>"),
        ]

    def targets(self) -> tuple[Target, ...]:
        configuration = self._model["configurations"][0]
        loaded = [_load(self._build, entry["jsonFile"]) for entry in configuration["targets"]]
        names = {entry["id"]: entry["name"] for entry in loaded}
        objects = self._objects()
        installs = self._installs(configuration)
        found = [
            self._target(
                entry, names, objects.get(entry["name"], {}), installs.get(entry["name"], set())
            )
            for entry in loaded
        ]
        return tuple(sorted(found, key=lambda target: target.name))

    def _objects(self) -> Mapping[str, Mapping[str, str]]:
        """Target to source to object. The file API does not name objects; the compilation database
        does.
        """
        found: dict[str, dict[str, str]] = {}
        # CMake writes none where nothing is compiled.
        with contextlib.suppress(FileNotFoundError):
            for entry in json.loads((self._build / "compile_commands.json").read_bytes()):
                if match := _OBJECT_OF.search(entry["output"]):
                    found.setdefault(match[1], {})[entry["file"]] = entry["output"]
        return found

    def _installs(
        self, configuration: Mapping[str, list[Mapping[str, str]]]
    ) -> Mapping[str, set[str]]:
        found: dict[str, set[str]] = {}
        for directory in configuration["directories"]:
            if "jsonFile" in directory:
                for installer in _load(self._build, directory["jsonFile"])["installers"]:
                    if "destination" in installer:
                        found.setdefault(installer["component"], set()).add(
                            installer["destination"].rstrip("/")
                        )
        return found

    def _target(
        self,
        entry: "_Json",
        names: Mapping[str, str],
        objects: Mapping[str, str],
        installs: set[str],
    ) -> Target:
        top = Path(self._model["paths"]["source"])
        groups = entry.get("compileGroups", [])
        recipes, units, includes = [], [], dict[str, None]()
        for group in groups:
            sources = [
                str(top / entry["sources"][index]["path"]) for index in group["sourceIndexes"]
            ]
            folders = [include["path"] for include in group.get("includes", [])]
            includes |= dict.fromkeys(self._below_tree(folder) for folder in folders)
            units += [
                Unit(self._below_tree(source), objects[source], group["language"])
                for source in sources
                if source in objects
            ]
            fragments = [
                fragment["fragment"] for fragment in group.get("compileCommandFragments", [])
            ]
            defines = sorted(define["define"] for define in group.get("defines", []))
            standard = group.get("languageStandard", {}).get("standard", "")
            recipes.append(
                json.dumps(
                    [
                        group["language"],
                        standard,
                        *map(
                            self._alike,
                            [*fragments, "", *defines, "", *folders, "", *sorted(sources)],
                        ),
                    ]
                )
            )
        # Linked with other words is another library too.
        recipes.append(
            json.dumps(
                [
                    self._alike(part["fragment"])
                    for part in entry.get("link", {}).get("commandFragments", [])
                ]
            )
        )
        return Target(
            name=entry["name"],
            kind=entry["type"],
            units=tuple(sorted(units, key=lambda unit: unit.object)),
            artifacts=tuple(artifact["path"] for artifact in entry.get("artifacts", [])),
            installs=tuple(sorted(installs)),
            includes=tuple(includes),
            recipe=hashlib.sha256("\n".join(sorted(recipes)).encode()).hexdigest(),
            depends=tuple(
                sorted(
                    names[one["id"]] for one in entry.get("dependencies", []) if one["id"] in names
                )
            ),
        )

    def _alike(self, text: str) -> str:
        for place, name in self._places:
            text = text.replace(place, name)
        return text

    def _below_tree(self, path: str) -> str:
        return (
            str(Path(path).relative_to(self._tree))
            if Path(path).is_relative_to(self._tree)
            else path
        )


# JSON of a documented form; what is not of it fails with what `read` takes for no answer.
_Json = Mapping[str, Any]


def _answer(build: Path, query: str) -> _Json:
    # The index with the largest name is the newest.
    index = max((build / _API / "reply").glob("index-*.json"), default=None)
    if index is None:
        raise FileNotFoundError(build)
    reply: _Json = json.loads(index.read_bytes())["reply"][query]
    return _load(build, reply["jsonFile"])


def _load(build: Path, name: str) -> _Json:
    loaded: _Json = json.loads((build / _API / "reply" / name).read_bytes())
    return loaded


def extensions(tree: Path, device: Device) -> tuple[Extension, ...]:
    """Return what setup.py of `tree` lists for the device, in its order; nothing where it cannot be
    read.

    What depends on the version of the compiler counts as asked for: a toolkit that this workspace
    accepts is newer than all of them.
    """
    try:
        body = ast.parse((tree / "setup.py").read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return ()
    found = dict.fromkeys(_listed(body, device))
    return tuple(found)


def _listed(statements: Sequence[ast.stmt], device: Device) -> Iterator[Extension]:
    for statement in statements:
        if isinstance(statement, ast.If):
            # A condition that cannot be told counts as met: too much is listed rather than too
            # little.
            yield from _listed(
                statement.orelse if _is_met(statement.test, device) is False else statement.body,
                device,
            )
        elif isinstance(statement, ast.Expr | ast.Assign):
            for call in ast.walk(statement):
                if (
                    isinstance(call, ast.Call)
                    and isinstance(call.func, ast.Name)
                    and call.func.id == _CLASS
                ):
                    words = {word.arg: word.value for word in call.keywords}
                    name = words.get("name", call.args[0] if call.args else None)
                    if isinstance(name, ast.Constant) and isinstance(name.value, str):
                        optional = words.get("optional")
                        # As setup.py's target_name does: vllm.vllm_flash_attn._vllm_fa2_C is built
                        # by _vllm_fa2_C.
                        yield Extension(
                            name.value.rpartition(".")[2],
                            isinstance(optional, ast.Constant) and optional.value is True,
                        )


def _is_met(test: ast.expr, device: Device) -> bool | None:
    """Whether a condition holds for the device on this machine, None where only setup.py itself
    could tell.
    """
    if isinstance(test, ast.BoolOp):
        said = [_is_met(value, device) for value in test.values]
        decisive = isinstance(test.op, ast.Or)
        return decisive if decisive in said else None if None in said else not decisive
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = _is_met(test.operand, device)
        return None if value is None else not value
    if isinstance(test, ast.Call) and isinstance(test.func, ast.Name):
        on_gpu = device == "cuda"
        elsewhere = dict.fromkeys(("_is_hip", "_is_xpu", "_is_tpu", "_no_device"), False)
        return (
            {"_is_cuda": on_gpu, "_is_cpu": not on_gpu, "_build_custom_ops": on_gpu} | elsewhere
        ).get(test.func.id)
    if (
        isinstance(test, ast.Compare)
        and ast.unparse(test.left) == "platform.machine()"
        and isinstance(test.ops[0], ast.In)
    ):
        with contextlib.suppress(ValueError, TypeError):
            return platform.machine() in ast.literal_eval(test.comparators[0])
    return False if isinstance(test, ast.Name) and test.id.startswith("USE_PRECOMPILED") else None
