"""Sources that the tree's CMake files take from elsewhere: which, at what tag, for which targets;
fetched once for all clones, or stood in for.

A fetched one lies in the cache as name/tag, whole or not at all. No `.deps` of the tree is ever
used: upstream's own files take one for theirs if a single file of it exists, whatever its tag
(vllm-project/vllm#51112).
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.compile import cmake_inputs
from workspace.core import files, lock
from workspace.core.console import Step
from workspace.core.errors import SettingsError, SourceError
from workspace.core.files import write_atomic
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.repo.git import remotes

PLACEHOLDERS = "placeholders"
# Stands in every file of a placeholder, and in what a configure makes of one.
MARK = "stands in for a file of an external project that was not fetched"
# Libraries that a project brings along with no target of the tree bearing their name.
_LIBRARIES = {"onednn": ("dnnl",)}
_ABSENT = (
    re.compile(r"Cannot find source file:\s+(?P<path>/\S+)"),
    re.compile(r"failed to open for reading \([^)]*\):\s+(?P<path>/\S+)"),
    re.compile(
        r"(?:given source|source directory|include path)\s+\"?(?P<path>/[^\s\"]+)\"? (?:which is"
        r" not an existing|which does not exist)"
    ),
)


def make_placeholder(
    folder: Path, name: str, tag: str, *, files: Sequence[str], defines: Sequence[str]
) -> None:
    """Make what is missing in the placeholder at `folder`; what is right is not touched."""
    _write(folder / "CMakeLists.txt", _listfile(name, tag, defines))
    for file in files:
        _write(folder / file, _refusal(folder / file, f"{name} {tag}"))


def complete_placeholder(root: Path, said: str) -> tuple[Path, ...]:
    """Make the files below `root`, the folder of all placeholders, that a configure says are
    missing, and return those that were not there.
    """
    named = (
        Path(found["path"].rstrip(".")) for pattern in _ABSENT for found in pattern.finditer(said)
    )
    absent = tuple(
        dict.fromkeys(
            path
            for path in named
            if path.is_relative_to(root) and ".." not in path.parts and not path.exists()
        )
    )
    for path in absent:
        _write(path, _refusal(path, "/".join(path.relative_to(root).parts[:2])))
    return absent


def placeholder_named(folder: str | None) -> str:
    """A folder of sources as it is said to a person."""
    return (
        "nothing"
        if not folder
        else "a placeholder"
        if PLACEHOLDERS in Path(folder).parts
        else folder
    )


def _listfile(name: str, tag: str, defines: Sequence[str]) -> str:
    prefix = name.upper()
    here = "${CMAKE_CURRENT_SOURCE_DIR}"
    places = {
        "DIR": here,
        "INCLUDE_DIR": f"{here}/include",
        "TOOLS_UTIL_INCLUDE_DIR": f"{here}/tools/util/include",
    }
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
        lines.append(
            f'add_custom_target({target} COMMAND "${{CMAKE_COMMAND}}" -E echo "{said}" COMMAND'
            ' "${CMAKE_COMMAND}" -E false VERBATIM)'
        )
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


_DECLARING = ("fetchcontent_declare", "fetchcontent_populate", "externalproject_add")
_KEY = re.compile(r"[A-Z][A-Z_]{3,}")
_TOP = "CMakeLists.txt"
_VALUES = frozenset({"TRUE", "FALSE"})
_COMMIT = re.compile(r"[0-9a-f]{40}")
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
    """A project that a configure fetches. `submodules`: their paths, None for all of them."""

    name: str
    repository: str
    tag: str
    # The user's own variable, and the one in which a copy of ours is handed over.
    override: str
    variable: str
    targets: tuple[str, ...]
    submodules: tuple[str, ...] | None
    # What a placeholder has to have: files below it, and targets that only the project itself
    # defines.
    files: tuple[str, ...]
    defines: tuple[str, ...]


def pinned(text: str) -> Iterator[tuple[str, str]]:
    """The projects that one CMake file fetches, with their GIT_TAG; a variable stands for every
    value that the file gives it.
    """
    values: dict[str, list[str]] = {}
    found = tuple(cmake_inputs.commands(text))
    for command in found:
        if command.name == "set" and len(command.words) > 1:
            values.setdefault(command.words[0], []).append(command.words[1])
    for command in found:
        if command.name in _DECLARING and command.words:
            for tag in _options(command.words).get("GIT_TAG", [])[:1]:
                variable = re.fullmatch(r"\$\{(\w+)\}", tag)
                for value in values.get(variable[1], [tag]) if variable else [tag]:
                    yield command.words[0].lower(), value


def declared(tree: Path, device: str, *, machine: str | None = None) -> tuple[External, ...]:
    """Return what a configure of `tree` for a device fetches on this machine, in its order."""
    steps = tuple(cmake_inputs.walk(tree, device, machine=machine))
    defined = {
        step.resolved(step.command.words[0])
        for step in steps
        if step.command.name in _DEFINING and step.command.words
    }
    found: dict[str, External] = {}
    override = file = ""
    for step in steps:
        if step.file != file:
            override, file = "", step.file
        for word in step.command.words:
            if "ENV{" in word and (named := _OVERRIDE.search(word)):
                override = named[1]
        if step.command.name in _DECLARING and step.command.words:
            options = _options([step.resolved(word) for word in step.command.words])
            if options.get("GIT_REPOSITORY") and options.get("GIT_TAG"):
                name = step.command.words[0]
                found[name.lower()] = _external(step, options, override, steps, defined)
    return tuple(found.values())


def provide(
    layout: Layout,
    settings: Settings,
    wanted: Collection[External],
    others: Collection[External],
    *,
    run_log: RunLog,
    step: Step,
) -> Mapping[str, str]:
    """Have the sources at hand and return, for configure, variable and folder: the user's own, else
    fetched if `wanted`, else a placeholder.

    Raises SettingsError for an override that leads nowhere, SourceError where something cannot be
    fetched; the cache then has no half of it.
    """
    given: dict[str, str] = {}
    for external in (*wanted, *others):
        own = _own(layout, settings, external)
        if own:
            given |= own
        elif external in wanted:
            given[external.variable] = str(_fetched(settings, external, run_log=run_log, step=step))
        else:
            given[external.variable] = str(_stand_in(layout, external))
    return given


def is_placeholder(layout: Layout, folder: str) -> bool:
    return Path(folder).is_relative_to(_placeholders(layout))


def leftover(tree: Path) -> tuple[str, ...]:
    """Say which sources a former build of another pin has left in `.deps` of the tree. They are not
    used.
    """
    folders = sorted((tree / ".deps").glob("*-src"))
    tags = (
        {
            external.name.lower(): external.tag
            for device in ("cuda", "cpu")
            for external in declared(tree, device)
        }
        if folders
        else {}
    )
    found = []
    for folder in folders:
        name, there = folder.name.removesuffix("-src"), _checked_out(folder)
        tag = tags.get(name)
        if tag is None:
            found.append(f".deps/{folder.name}: this pin fetches no {name}; it is not used")
        elif there != (tag if _COMMIT.fullmatch(tag) else _tagged(folder, tag)):
            found.append(
                f".deps/{folder.name} is {(there or 'no git checkout')[:12]}, this pin asks for"
                f" {tag[:12]}; it is not used"
            )
    return tuple(found)


def _options(words: Sequence[str]) -> Mapping[str, list[str]]:
    """What stands after each keyword of a declaration."""
    options: dict[str, list[str]] = {}
    values: list[str] = []
    for word in words[1:]:
        if _KEY.fullmatch(word) and word not in _VALUES:
            values = options.setdefault(word, [])
        else:
            values.append(word)
    return options


def _external(
    step: cmake_inputs.Step,
    options: Mapping[str, list[str]],
    override: str,
    steps: Sequence[cmake_inputs.Step],
    defined: Collection[str],
) -> External:
    name = step.command.words[0]
    generic = f"FETCHCONTENT_SOURCE_DIR_{name.upper()}"
    # FETCHCONTENT_SOURCE_DIR does as a download would, where a SRC_DIR may install links in place
    # of copies (vllm_flash_attn.cmake). But a FetchContent_Populate with its options in place knows
    # none (FetchContent(3cmake)).
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


def _targets(name: str, file: str, steps: Sequence[cmake_inputs.Step]) -> tuple[str, ...]:
    """Targets that need the project: all of a file of its own, and of every other one that names
    its variables; of the top one those that name them.
    """
    mention = f"${{{name}_".lower()
    naming: dict[str, None] = {}
    for path in dict.fromkeys(step.file for step in steps):
        of_file = [step for step in steps if step.file == path]
        by_name = [
            step
            for step in of_file
            if any(mention in word.lower() for word in step.command.words if "$" in word)
        ]
        if path == file == _TOP:
            naming |= dict.fromkeys(_defined(by_name, of_file))
        elif path == file or (by_name and path != _TOP):
            naming |= dict.fromkeys(_defined(of_file, of_file))
    return tuple(naming)


def _defined(
    steps: Sequence[cmake_inputs.Step], of_file: Sequence[cmake_inputs.Step]
) -> Iterator[str]:
    """Names of the targets that these steps define or install, those of a loop's variable too."""
    loops = {
        step.command.words[0]: step.command.words[1:]
        for step in of_file
        if step.command.name == "foreach" and step.command.words
    }
    for step in steps:
        words = step.command.words
        if (
            step.command.name
            in (
                "add_custom_target",
                "define_extension_target",
                "define_gpu_extension_target",
            )
            and words
        ):
            yield step.resolved(words[0])
        if step.command.name == "install" and "COMPONENT" in words[:-1]:
            component = words[words.index("COMPONENT") + 1]
            looped = re.fullmatch(r"\$\{(\w+)\}", component)
            yield from loops.get(looped[1], ()) if looped else (component,)


def _files(name: str, steps: Sequence[cmake_inputs.Step]) -> tuple[str, ...]:
    """Files of the project that the tree's CMake files name. What they only install is left out:
    then an install fails, as it should.
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
                for word in step.command.words
                if "$" in word
                for match in _SUFFIXED.findall(word)
            ):
                if variable.lower() in prefixes and ".." not in path:
                    found[prefixes[variable.lower()] + path] = None
    return tuple(sorted(found))


def _own(layout: Layout, settings: Settings, external: External) -> Mapping[str, str]:
    """The user's own sources, by the environment, .env, or -D in CMAKE_ARGS."""
    environment = settings.child_environment("build")
    for name in dict.fromkeys((external.override, external.variable)):
        argument = re.findall(rf"-D{re.escape(name)}(?::\w+)?=(\S+)", settings.text("CMAKE_ARGS"))
        text = argument[-1] if argument else environment.get(name, "")
        if text:
            folder = layout.vllm / Path(text).expanduser()
            if not folder.is_dir():
                raise SettingsError(
                    f"{name}={settings.presentable(text)}: there is no such folder",
                    hint=f"unset {name}    and {external.name} is fetched",
                )
            return {name: str(folder)}
    return {}


def _fetched(settings: Settings, external: External, *, run_log: RunLog, step: Step) -> Path:
    place = settings.cache / "externals" / external.name.lower() / external.tag.replace("/", "_")
    if _is_there(place, external):
        return place
    # Two clones that ask at once: one fetches, the other waits.
    with lock.hold(
        place.with_name(f".{place.name}.lock"),
        verb=f"fetching {external.name}",
        wait=True,
        on_wait=step.line,
    ):
        if place.exists() and not _is_there(place, external):
            said = (
                f"{place} is at {(_checked_out(place) or 'no commit')[:12]}, not at"
                f" {external.tag[:12]}: it was not used"
            )
            raise SourceError(said, hint=f"rm -rf {place}    and the same command fetches it again")
        if not place.exists():
            with files.folder_beside(place) as made:
                commit = _clone(made, settings, external, run_log=run_log, step=step)
                if _COMMIT.fullmatch(external.tag) and commit != external.tag:
                    raise SourceError(
                        f"{external.name}: {external.repository} served {commit[:12]}, asked for"
                        f" was {external.tag[:12]}"
                    )
                files.put_in_place(made, place)
    return place


def _clone(
    made: Path, settings: Settings, external: External, *, run_log: RunLog, step: Step
) -> str:
    mirror = settings.text("EXTERNALS_MIRROR")
    try:
        return remotes.clone_shallow(
            made,
            external.repository,
            external.tag,
            submodules=external.submodules,
            mirror=mirror,
            settings=settings,
            run_log=run_log,
            on_line=lambda line: step.line(f"{external.name}: {line}"),
        )
    except SourceError as exc:
        place = f"{external.repository} in EXTERNALS_MIRROR" if mirror else external.repository
        hint = (
            "check the network, set EXTERNALS_MIRROR to a copy of https://github.com/, or export"
            f" {external.override}=/your/copy"
        )
        raise SourceError(
            f"{external.name} {external.tag[:12]} could not be fetched from {place}: {exc.message}",
            hint=hint,
            details=exc.details,
        ) from exc


def _is_there(place: Path, external: External) -> bool:
    """It came to its name whole; a tag that is a commit says by itself what must be checked out."""
    there = _checked_out(place)
    return there is not None and (not _COMMIT.fullmatch(external.tag) or there == external.tag)


def _checked_out(folder: Path) -> str | None:
    """The commit at which HEAD is detached, read without git: this is asked of every external
    project before every build.
    """
    try:
        text = (folder / ".git" / "HEAD").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return text if _COMMIT.fullmatch(text) else None


def _tagged(folder: Path, tag: str) -> str | None:
    """The commit of a tag in a checkout that CMake made, None where it is not known there."""
    for line in _lines(folder / ".git" / "packed-refs"):
        oid, _, name = line.partition(" ")
        if name == f"refs/tags/{tag}":
            return oid
    return next(iter(_lines(folder / ".git" / "refs" / "tags" / tag)), None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _placeholders(layout: Layout) -> Path:
    return layout.builds / PLACEHOLDERS


def _stand_in(layout: Layout, external: External) -> Path:
    place = _placeholders(layout) / external.name.lower() / external.tag.replace("/", "_")
    make_placeholder(
        place, external.name, external.tag, files=external.files, defines=external.defines
    )
    return place
