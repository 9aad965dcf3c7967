"""External projects: the sources that the tree's CMake files take from elsewhere, with tag and
targets; fetched once for all clones, or replaced by a placeholder.

A fetched project is in the cache as name/tag, complete or not at all. The tree's `.deps` is never
used: upstream's own files reuse one if a single file of it exists, whatever its tag
(vllm-project/vllm#51112).
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.compile import cmake_inputs
from workspace.core import files, hints, lock
from workspace.core.console import RunLog, Step
from workspace.core.errors import SettingsError, SourceError
from workspace.core.files import write_atomic
from workspace.core.paths import Layout, typed
from workspace.core.settings import Settings
from workspace.repo.git import remotes

PLACEHOLDERS = "placeholders"
# This text is in every file of a placeholder, and in files that a configure makes from one.
MARK = "stands in for a file of an external project that was not fetched"
# Libraries of a project that no target of the tree is named after.
_LIBRARIES = {"onednn": ("dnnl",)}
_ABSENT = (
    re.compile(r"Cannot find source file:\s+(?P<path>/\S+)"),
    re.compile(r"failed to open for reading \([^)]*\):\s+(?P<path>/\S+)"),
    re.compile(
        r"(?:given source|source directory|include path)\s+\"?(?P<path>/[^\s\"]+)\"? (?:which is"
        r" not an existing|which does not exist)"
    ),
)


def complete_placeholder(root: Path, output: str) -> tuple[Path, ...]:
    """Create the files below `root`, the folder of all placeholders, that the output of a configure
    names as missing, and return them.
    """
    missing = (
        Path(found["path"].rstrip(".")) for pattern in _ABSENT for found in pattern.finditer(output)
    )
    absent = tuple(
        dict.fromkeys(
            path
            for path in missing
            if path.is_relative_to(root) and ".." not in path.parts and not path.exists()
        )
    )
    for path in absent:
        _write(path, _refusal(path, "/".join(path.relative_to(root).parts[:2])))
    return absent


def shown_source(folder: str | None) -> str:
    """Return a folder of sources as shown to the user."""
    return (
        "nothing"
        if not folder
        else "a placeholder"
        if PLACEHOLDERS in Path(folder).parts
        else folder
    )


def _placeholder_cmake(external: "External") -> str:
    name, tag, prefix = external.name, external.tag, external.name.upper()
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
        # Not into the cache, as the project itself does: a later configure would find them there.
        *(f'set({prefix}_{suffix} "{place}" PARENT_SCOPE)' for suffix, place in places.items()),
        *(f"add_library({library} INTERFACE)" for library in _LIBRARIES.get(name.lower(), ())),
    ]
    for target in external.defines:
        message = f"{target} needs {name} {tag}, which was not fetched"
        lines.append(
            f'add_custom_target({target} COMMAND "${{CMAKE_COMMAND}}" -E echo "{message}" COMMAND'
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
    found = tuple(cmake_inputs.commands(text))
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
    steps = tuple(cmake_inputs.walk(tree, device, machine=machine))
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


def provide(
    layout: Layout,
    settings: Settings,
    wanted: Collection[External],
    others: Collection[External],
    *,
    run_log: RunLog,
    step: Step,
) -> Mapping[str, str]:
    """Provide the sources of all projects, and return a folder by variable for configure: the
    user's own, else fetched if `wanted`, else a placeholder.

    Raises SettingsError for an override without a folder, SourceError if a fetch fails; the cache
    then has no partial project.
    """
    given: dict[str, str] = {}
    for external in (*wanted, *others):
        own = _own(settings, external)
        if own:
            given |= own
        elif external in wanted:
            given[external.variable] = str(_fetched(settings, external, run_log=run_log, step=step))
        else:
            given[external.variable] = str(_placeholder(layout, external))
    return given


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
    step: cmake_inputs.Step,
    options: Mapping[str, list[str]],
    override: str,
    steps: Sequence[cmake_inputs.Step],
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


def _targets(name: str, file: str, steps: Sequence[cmake_inputs.Step]) -> tuple[str, ...]:
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


def _defined(
    steps: Sequence[cmake_inputs.Step], of_file: Sequence[cmake_inputs.Step]
) -> Iterator[str]:
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


def _files(name: str, steps: Sequence[cmake_inputs.Step]) -> tuple[str, ...]:
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


def _own(settings: Settings, external: External) -> Mapping[str, str]:
    """Return the user's own sources, from the environment, .env, or -D in CMAKE_ARGS."""
    environment = settings.child_environment("build")
    for name in dict.fromkeys((external.override, external.variable)):
        argument = re.findall(rf"-D{re.escape(name)}(?::\w+)?=(\S+)", settings.text("CMAKE_ARGS"))
        text = argument[-1] if argument else environment.get(name, "")
        if text:
            folder = typed(text)
            if not folder.is_dir():
                raise SettingsError(
                    f"{name}={settings.presentable(text)}: the folder does not exist",
                    hint=hints.text("compile.unset_override", variable=name, project=external.name),
                )
            return {name: str(folder)}
    return {}


def _fetched(settings: Settings, external: External, *, run_log: RunLog, step: Step) -> Path:
    place = settings.cache / "externals" / external.name.lower() / external.tag.replace("/", "_")
    if _is_fetched(place, external):
        return place
    # If two clones need it at once, one fetches and the other waits.
    with lock.hold(
        place.with_name(f".{place.name}.lock"),
        verb=f"fetching {external.name}",
        wait=True,
        on_wait=step.line,
    ):
        if place.exists() and not _is_fetched(place, external):
            message = (
                f"{place} is at {(_checked_out(place) or 'no commit')[:12]}, not at"
                f" {external.tag[:12]}: it is not used"
            )
            raise SourceError(message, hint=hints.text("compile.delete_external", folder=place))
        if not place.exists():
            with files.folder_beside(place) as made:
                commit = _clone(made, settings, external, run_log=run_log, step=step)
                if _COMMIT.fullmatch(external.tag) and commit != external.tag:
                    raise SourceError(
                        f"{external.name}: {external.repository} served {commit[:12]} instead of"
                        f" {external.tag[:12]}"
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
        hint = hints.text("compile.network_or_mirror", variable=external.override)
        raise SourceError(
            f"{external.name} {external.tag[:12]} could not be fetched from {place}: {exc.message}",
            hint=hint,
            details=exc.details,
        ) from exc


def _is_fetched(place: Path, external: External) -> bool:
    """Return whether the cache has the project; a tag that is a commit must be its HEAD."""
    there = _checked_out(place)
    return there is not None and (not _COMMIT.fullmatch(external.tag) or there == external.tag)


def _checked_out(folder: Path) -> str | None:
    """Return the commit of a detached HEAD, read without git: every build reads it for every
    project.
    """
    try:
        text = (folder / ".git" / "HEAD").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return text if _COMMIT.fullmatch(text) else None


def _placeholder(layout: Layout, external: External) -> Path:
    """Create the missing files of a placeholder; up-to-date files are not touched."""
    name, tag = external.name, external.tag
    place = layout.builds / PLACEHOLDERS / name.lower() / tag.replace("/", "_")
    _write(place / "CMakeLists.txt", _placeholder_cmake(external))
    for file in external.files:
        _write(place / file, _refusal(place / file, f"{name} {tag}"))
    return place
