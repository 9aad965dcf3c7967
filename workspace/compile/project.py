"""Project as CMake would build it: targets, units, and the places of their results; and the install
of targets into the tree. Read from CMake's file API, never from its text output.

And the names of the extensions in the tree's setup.py: importing it would import torch and search
for a compiler.

CMake installs into a folder beside the tree, from where each file is renamed: after a kill it is
old or new, and the next run installs all of them again. Files that git tracks are never
overwritten, and no file is removed.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workspace.core import hints, process, records
from workspace.core.console import RunLog
from workspace.core.errors import BuildError
from workspace.core.files import folder_beside, sha256
from workspace.core.paths import Layout
from workspace.repo.git import Git

Device = Literal["cpu", "cuda"]

# cmake-file-api(7). These shared, stateless queries are empty files: only their names count.
QUERIES = ("codemodel-v2", "cmakeFiles-v1")
# Record of a configure, written by compile/cmake.py.
RECORD = "configured.json"
DATABASE = "compile_commands.json"
_API = Path(".cmake") / "api" / "v1"
_OBJECT_OF = re.compile(r"(?:^|/)CMakeFiles/([^/]+)\.dir/")
_EXTENSION = re.compile(r'\bCMakeExtension\(\s*(?:name\s*=\s*)?"([\w.]+)"')


@dataclass(frozen=True)
class Unit:
    """A source that a compiler turns into an object. `source` is relative to the tree if it is in
    it, `object` to the build directory.
    """

    source: str
    object: str
    language: str


@dataclass(frozen=True)
class Target:
    """A target. `kind` is the file API's type; `recipe` is equal in two build directories that
    compile its units in the same way.
    """

    name: str
    kind: str
    units: tuple[Unit, ...]
    # Relative to the build directory.
    artifacts: tuple[str, ...]
    # Folders below the install prefix: vllm, vllm/vllm_flash_attn.
    installs: tuple[str, ...]
    # Relative to the tree if they are in it.
    includes: tuple[str, ...]
    recipe: str
    depends: tuple[str, ...]


@dataclass(frozen=True)
class Project:
    """All targets, by name, and CMake's messages `Not building …`."""

    targets: tuple[Target, ...]
    not_built: tuple[str, ...] = ()


def write_query(build: Path) -> None:
    """Request the reply that `read` and `files` need from the next configure in `build`."""
    folder = build / _API / "query"
    folder.mkdir(parents=True, exist_ok=True)
    for query in QUERIES:
        (folder / query).touch()


def read(build: Path, tree: Path) -> Project | None:
    """Return the project that was configured in `build`, None if CMake's reply is missing or
    incomplete.
    """
    try:
        record = records.load(build / RECORD, dict[str, Any])
        reader = _Reader(build, tree, record["sources"]) if record else None
        return Project(reader.targets(), tuple(record["not_built"])) if record and reader else None
    except _OTHER_FORM:
        return None


def link_database(layout: Layout, build: Path) -> bool:
    """Link the compilation database of a build directory where clangd finds it.

    Without a database the link is removed. Return False where a file of the user has its place.
    """
    link, target = layout.compile_commands, build / DATABASE
    leads_to = link.parent / os.readlink(link) if link.is_symlink() else None
    is_ours = leads_to is not None and leads_to.resolve().is_relative_to(layout.builds.resolve())
    if not is_ours and os.path.lexists(link):
        return False
    if not target.is_file():
        link.unlink(missing_ok=True)
    elif leads_to is None or leads_to.resolve() != target.resolve():
        made = link.with_name(f".{link.name}.making-{os.getpid()}")
        made.unlink(missing_ok=True)
        made.symlink_to(os.path.relpath(target, link.parent))
        made.replace(link)
    return True


def files(build: Path) -> tuple[Path, ...]:
    """Return the CMake files that the configure in `build` has read, without CMake's own and
    generated ones; empty if there is no reply.
    """
    try:
        reply = _reply(build, "cmakeFiles-v1")
        top = Path(reply["paths"]["source"])
        read_by = [
            entry
            for entry in reply["inputs"]
            if not entry.get("isCMake") and not entry.get("isGenerated")
        ]
        return tuple(top / str(entry["path"]) for entry in read_by)
    except _OTHER_FORM:
        return ()


class _Reader:
    """Reader of CMake's reply in `build`. Names replace the paths that differ between build
    directories of a tree.
    """

    def __init__(self, build: Path, tree: Path, sources: Mapping[str, str]) -> None:
        self._build = build
        self._tree = tree
        self._model = _reply(build, "codemodel-v2")
        # External projects come first, because placeholders are below the build directories. The
        # last part of a folder is the tag.
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
        """Return the object by source by target. The file API does not name objects; the
        compilation database does.
        """
        found: dict[str, dict[str, str]] = {}
        # CMake writes no database if nothing is compiled.
        with contextlib.suppress(FileNotFoundError):
            content = (self._build / DATABASE).read_bytes()
            for entry in records.decode(content, list[dict[str, str]]):
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
        recipes, units, includes = [], [], dict[str, None]()
        for group in entry.get("compileGroups", []):
            sources = self._sources(entry, group)
            folders = [include["path"] for include in group.get("includes", [])]
            includes |= dict.fromkeys(self._below_tree(folder) for folder in folders)
            units += [
                Unit(self._below_tree(source), objects[source], group["language"])
                for source in sources
                if source in objects
            ]
            recipes.append(self._recipe(group, folders, sources))
        # A library that is linked in another way differs, too.
        link = entry.get("link", {}).get("commandFragments", [])
        recipes.append(json.dumps([self._normalized(part["fragment"]) for part in link]))
        dependencies = (one["id"] for one in entry.get("dependencies", []))
        return Target(
            name=entry["name"],
            kind=entry["type"],
            units=tuple(sorted(units, key=lambda unit: unit.object)),
            artifacts=tuple(artifact["path"] for artifact in entry.get("artifacts", [])),
            installs=tuple(sorted(installs)),
            includes=tuple(includes),
            recipe=hashlib.sha256("\n".join(sorted(recipes)).encode()).hexdigest(),
            depends=tuple(sorted(names[one] for one in dependencies if one in names)),
        )

    def _sources(self, entry: "_Json", group: "_Json") -> list[str]:
        top = Path(self._model["paths"]["source"])
        return [str(top / entry["sources"][index]["path"]) for index in group["sourceIndexes"]]

    def _recipe(self, group: "_Json", folders: Sequence[str], sources: Sequence[str]) -> str:
        """Return all that determines how a compile group is compiled, independent of its folder."""
        fragments = [fragment["fragment"] for fragment in group.get("compileCommandFragments", [])]
        defines = [define["define"] for define in group.get("defines", [])]
        # Real paths of the tree and of external projects sort in another order for another tree.
        parts = [
            *map(self._normalized, fragments),
            "",
            *sorted(map(self._normalized, defines)),
            "",
            *map(self._normalized, folders),
            "",
            *sorted(map(self._normalized, sources)),
        ]
        standard = group.get("languageStandard", {}).get("standard", "")
        return json.dumps([group["language"], standard, *parts])

    def _normalized(self, text: str) -> str:
        for place, name in self._places:
            text = text.replace(place, name)
        return text

    def _below_tree(self, path: str) -> str:
        return (
            str(Path(path).relative_to(self._tree))
            if Path(path).is_relative_to(self._tree)
            else path
        )


# JSON of a documented form; any other form raises one of _OTHER_FORM.
_Json = Mapping[str, Any]
_OTHER_FORM = (OSError, ValueError, LookupError, TypeError, AttributeError)


def _reply(build: Path, query: str) -> _Json:
    # The index with the largest name is the newest.
    index = max((build / _API / "reply").glob("index-*.json"), default=None)
    if index is None:
        raise FileNotFoundError(build)
    reply = records.decode(index.read_bytes(), dict[str, Any])["reply"]
    return _load(build, reply[query]["jsonFile"])


def _load(build: Path, name: str) -> _Json:
    return records.decode((build / _API / "reply" / name).read_bytes(), dict[str, Any])


def extensions(tree: Path) -> tuple[str, ...]:
    """Return the targets of all extensions that setup.py of `tree` names, in order; empty if it
    cannot be read. Its conditions are not evaluated: a target that the device or the toolkit does
    not have is in no project.
    """
    try:
        text = (tree / "setup.py").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    # As in setup.py's target_name: vllm.vllm_flash_attn._vllm_fa2_C is built by _vllm_fa2_C.
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in _EXTENSION.findall(text)))


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
    with folder_beside(tree) as staging:
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
        raise BuildError(f"{target.name} has not been built: {missing[0]} is not in {build}")
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
