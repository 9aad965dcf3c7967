"""Public recipes: the YAML files that Spark owners share, as sparkrun and spark-vllm-docker read
them, for `inv serve FILE.yaml`.

A file has a model, a container, a command with placeholders, and their defaults. The command is
read here and never given to a shell; what belongs to a container is named and has no effect.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from workspace.core import hints
from workspace.core.errors import SettingsError
from workspace.core.files import read_regular
from workspace.core.paths import Layout, typed
from workspace.core.settings import is_set_by_the_workspace, shortened
from workspace.machine import hardware
from workspace.repo import pins
from workspace.server import flags, recipes
from workspace.server.flags import Flags
from workspace.server.recipes import FlagValue, Recipe

SUFFIXES = (".yaml", ".yml")
MOST_BYTES = 64 * 1024
# Nested aliases multiply what they stand for, and PyYAML needs seconds for thousands of levels; a
# real recipe has no aliases and four levels.
MOST_ALIASES, MOST_LEVELS = 20, 20
_READ = ("model", "model_revision", "runtime", "command", "defaults", "env")
_ABOUT = ("name", "description", "metadata", "recipe_version")
# `${NAME}` is a variable of a shell.
_PLACEHOLDER = re.compile(r"(?<!\$)\{([A-Za-z_][\w.]*)\}")
# The form of Python's str.format, in which a brace of JSON is written twice.
_FORMAT = re.compile(r"\{\{|\}\}|" + _PLACEHOLDER.pattern)
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_SERVERS = (
    ("vllm", "serve"),
    *((name, "-m", "vllm.entrypoints.openai.api_server") for name in ("python3", "python")),
)
# Programs and libraries of a container, which this machine has elsewhere.
_OF_CONTAINER = re.compile(r"PATH|HOME|LD_\w+|PYTHON\w*")
_EVERYWHERE = ("0.0.0.0", "::")


@dataclass(frozen=True)
class _File:
    """The content of a file, which messages call `place`."""

    path: Path
    place: str
    content: Mapping[str, object]

    def refuse(self, problem: str) -> NoReturn:
        raise SettingsError(f"{self.place}: {problem}", hint=_edit(self.path))

    def table(self, key: str) -> Mapping[str, object]:
        found = self.content.get(key)
        if found is None:
            return {}
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            self.refuse(f"{key} is not a table of names and values")
        return found

    def text(self, key: str) -> str:
        found = self.content.get(key)
        if found is not None and not isinstance(found, str | int | float):
            self.refuse(f"{key} is not a text")
        return "" if found is None else str(found).strip()


@dataclass(frozen=True)
class _Command:
    """The command of a file: variables before the program, the model and the other arguments."""

    variables: Mapping[str, str]
    model: str
    args: tuple[str, ...]


def is_file(name: str | Path) -> bool:
    """Return whether a name on the command line means a public recipe."""
    return str(name).endswith(SUFFIXES)


def load(layout: Layout, path: Path) -> Recipe:
    """Read a public recipe for the pinned tree; its relative paths count from its folder.

    Raises SettingsError for a file that is not of this form, is of another engine, or has a flag
    that no release of vLLM knows; ToolchainError if the tree has no flags.
    """
    file = _File(path, str(path), _parsed(path))
    command = _read_command(file)
    known = flags.known(layout)
    given, notes = _flags(file, command.args, known)
    if revision := file.text("model_revision"):
        given.setdefault("revision", revision)
    environment, own_notes = _environment(file, command.variables)
    return replace(
        _base(layout, file, command.model),
        name=str(path),
        summary=shortened(_description(file)),
        flags=given,
        environment=environment,
        notes=(*_ignored(file), *notes, *own_notes),
    )


def names(layout: Layout) -> tuple[str, ...]:
    """Return the names of all recipes of this clone, sorted: ours, and files put beside them."""
    return tuple(sorted({*recipes.names(layout), *_beside(layout)}))


def _beside(layout: Layout) -> Mapping[str, Path]:
    """Return the public recipes in the folder of recipes, by name; a recipe of ours goes first."""
    ours, paths = recipes.names(layout), sorted(recipes.folder(layout).glob("*.y*ml"))
    return {path.stem: path for path in paths if is_file(path) and path.stem not in ours}


def named(layout: Layout, name: str) -> Recipe:
    """Return the recipe of this name or in this file, or a recipe without a name for a model on the
    hub.

    Raises SettingsError for any other name.
    """
    if is_file(name):
        return load(layout, typed(name))
    if "/" in name:
        return recipes.unnamed(name)
    if path := _beside(layout).get(name):
        return replace(load(layout, path), name=name)
    return recipes.load(layout, name, version=pins.load(layout.pins).vllm.version)


def _edit(path: Path) -> str:
    return hints.text("server.edit_recipe", path=path)


def _parsed(path: Path) -> Mapping[str, object]:
    """Parse YAML of a limited size and depth. Raises SettingsError."""
    import yaml

    def wrong(problem: str) -> SettingsError:
        return SettingsError(f"{path} {problem}", hint=_edit(path))

    try:
        text = read_regular(path)
        if (excess := _excess(text)) is not None:
            raise wrong(f"is no recipe: it has more than {excess}")
        found = yaml.safe_load(text)
    except OSError as exc:
        raise SettingsError(
            f"{path} cannot be read: {exc.strerror}",
            hint=hints.text("core.list_folder", folder=hardware.existing(path)),
        ) from exc
    except (yaml.YAMLError, ValueError) as exc:
        problem = str(exc).partition("\n")[0]
        mark = getattr(exc, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark else ""
        raise wrong(f"is not YAML{at}: {shortened(problem)}") from exc
    if not isinstance(found, dict):
        raise wrong("is no recipe: it has no keys such as model and command")
    return {str(name): value for name, value in found.items()}


def _excess(text: bytes) -> str | None:
    """Return what a YAML text has too much of, None if it is safe to load. Raises YAMLError."""
    import yaml

    if len(text) > MOST_BYTES:
        return f"{MOST_BYTES // 1024} KiB"
    levels = aliases = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        levels += isinstance(event, yaml.CollectionStartEvent)
        levels -= isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        if levels > MOST_LEVELS:
            return f"{MOST_LEVELS} levels"
        if aliases > MOST_ALIASES:
            return f"{MOST_ALIASES} aliases"
    return None


def _read_command(file: _File) -> _Command:
    """Return the command with its placeholders filled. Raises SettingsError."""
    runtime = file.text("runtime")
    if runtime and "vllm" not in runtime.lower():
        file.refuse(f"it is a recipe of {shortened(runtime)}, and only vLLM is served here")
    if not file.text("command"):
        file.refuse("it has no command, and so no flags of vllm serve")
    tokens = _tokens(file, _filled(file, file.text("command"), "command"))
    variables = {}
    while tokens and _ASSIGNMENT.match(tokens[0]):
        name, _, variables[name] = tokens.pop(0).partition("=")
    server = next((each for each in _SERVERS if tuple(tokens[: len(each)]) == each), None)
    if server is None:
        program = shortened(" ".join(tokens[:2])) or "nothing"
        file.refuse(f"its command starts {program}, and only `vllm serve` is started here")
    args = tokens[len(server) :]
    model = file.text("model")
    if args and not args[0].startswith("-"):
        model = args.pop(0)
    for flag in ("--model", "--model-tag"):
        while flag in args[:-1]:
            model = args.pop(args.index(flag) + 1)
            args.remove(flag)
    if not model or not model.isprintable() or is_file(model):
        file.refuse("model is missing, or is not the name of a model")
    return _Command(variables, model, tuple(args))


def _filled(file: _File, text: str, key: str) -> str:
    """Return a text with its placeholders filled from the defaults. Raises SettingsError."""
    values = {**file.table("defaults")}
    for name in ("model", "model_revision"):
        values.setdefault(name, file.content.get(name))

    def value(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0][0]
        name = found[1].removeprefix("config.")
        if values.get(name) is None:
            file.refuse(f"{key} needs a value for {{{found[1]}}}, and defaults has none")
        return _text_of(file, name, values[name])

    return (_FORMAT if "{{" in text else _PLACEHOLDER).sub(value, text)


def _text_of(file: _File, name: str, value: object) -> str:
    """Return a default as the command has it; a table or a list is JSON."""
    if isinstance(value, dict | list):
        try:
            return json.dumps(value)
        except (TypeError, ValueError):
            file.refuse(f"defaults.{name} cannot be written as JSON")
    text = str(value)
    # Such a default names another one, as in revision: "{model_revision}".
    if other := _PLACEHOLDER.fullmatch(text):
        text = file.text(other[1])
    if not text.replace("\n", " ").isprintable():
        file.refuse(f"defaults.{name} is not a text")
    return text


def _tokens(file: _File, command: str) -> list[str]:
    """Split one simple command as sh does. Raises SettingsError for all that needs a shell."""
    text = re.sub(r"(?m)^[ \t]*#.*$", "", command).rstrip(" \t\n\\")
    text = re.sub(r"\\[ \t]*\n", " ", text).strip()
    # A newline between quotes is part of a value.
    if "\n" in re.sub(r"'[^']*'|\"[^\"]*\"", "", text):
        file.refuse("its command has several commands, a line each; only one is read here")
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        tokens = list(lexer)
    except ValueError as exc:
        file.refuse(f"its command cannot be read: {exc}")
    # Between single quotes a shell expands nothing.
    expansion = re.search(r"`|\$[\w({]\w*", re.sub(r"'[^']*'", "", text))
    operator = next((token for token in tokens if token and set(token) <= set("();<>|&")), None)
    if found := operator or (expansion and expansion[0]):
        file.refuse(f"its command needs a shell ({shortened(found)}), and none runs it here")
    return tokens


def _flags(
    file: _File, args: Sequence[str], known: Flags
) -> tuple[dict[str, FlagValue], list[str]]:
    """Return the flags by their long names without dashes, and notes on those that are left out.

    Raises SettingsError for a flag that no release of vLLM knows, and for one that `inv serve`
    does not take from a file.
    """
    try:
        judged = flags.judge(args, known)
    except SettingsError as exc:
        raise SettingsError(f"{file.place}: {exc.message}", hint=exc.hint) from exc
    found: dict[str, FlagValue] = {}
    notes = list(judged.dropped)
    for token, values in _by_flag(file, judged.args):
        name, equals, value = known.long(token).partition("=")
        if not name.startswith("--"):
            file.refuse(f"its command has {name}, which has no long form")
        values = [value, *values] if equals else values
        key = name.removeprefix("--")
        if key in recipes.NOT_AS_FLAG:
            file.refuse(f"{name} cannot be given to inv serve: {recipes.NOT_AS_FLAG[key]}")
        if key == "host" and values and values[0] in _EVERYWHERE:
            notes.append(
                f"--host {values[0]} is left out: a container needs it; -- --host opens the server"
            )
        elif not values and key.startswith("no-"):
            found[key.removeprefix("no-")] = False
        else:
            found[key] = _value(flags.typed_paths([f"--{key}", *values], file.path.parent)[1:])
    return found, notes


def _value(values: Sequence[str]) -> FlagValue:
    return True if not values else values[0] if len(values) == 1 else tuple(values)


def _by_flag(file: _File, args: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return each flag with the arguments behind it."""
    found: list[tuple[str, list[str]]] = []
    for arg in args:
        if flags.is_flag(arg):
            found.append((arg, []))
        elif found:
            found[-1][1].append(arg)
        else:
            file.refuse(f"its command has an argument without a flag, {shortened(arg)!r}")
    return found


def _environment(
    file: _File, variables: Mapping[str, str]
) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """Return the variables, and a note on those of the container. Raises SettingsError."""
    found: dict[str, object] = {**variables}
    for name, value in file.table("env").items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        found[name] = str(value) if is_number else value
        if isinstance(value, str):
            found[name] = _filled(file, value, f"env.{name}")
    foreign = [
        name
        for name in sorted(found)
        if _OF_CONTAINER.fullmatch(name) or is_set_by_the_workspace(name)
    ]
    kept = {name: value for name, value in found.items() if name not in foreign}
    notes = (f"not set, because they are of the container: {', '.join(foreign)}",)
    return recipes.environment_of(file.place, kept), notes if foreign else ()


def _ignored(file: _File) -> tuple[str, ...]:
    """Return notes on keys without effect here, and on the number of machines."""
    keys = [name for name in file.content if name not in (*_READ, *_ABOUT)]
    notes = [f"not used here, where no container is started: {', '.join(keys)}"] if keys else []
    nodes = file.content.get("min_nodes")
    if isinstance(nodes, int) and nodes > 1:
        notes.append(f"the recipe is made for {nodes} machines")
    text = "\n".join(map(str, (file.text("command"), *file.table("env").values())))
    used = {name.removeprefix("config.") for name in _PLACEHOLDER.findall(text)}
    spare = [name for name in file.table("defaults") if name not in used]
    if spare:
        notes.append(f"defaults that the command does not use: {', '.join(spare)}")
    return tuple(notes)


def _description(file: _File) -> str:
    text = file.table("metadata").get("description") or file.text("description")
    return " ".join(str(text).split()) or "a public recipe"


def _base(layout: Layout, file: _File, model: str) -> Recipe:
    """Return the recipe that the flags of the file are added to: what is known of the model."""
    if model in recipes.BUILT_IN:
        return recipes.load(layout, model, version=pins.load(layout.pins).vllm.version)
    if model.startswith((".", "~")):
        model = str(flags.typed_value("model", model, file.path.parent))
    if model.startswith("/") and not Path(model).exists():
        file.refuse(f"its model is the folder {shortened(model)}, which is not on this machine")
    if not model.startswith("/") and not recipes.HUB.fullmatch(model):
        file.refuse(f"{shortened(model)!r} is not the name of a model on the hub, and no folder")
    return recipes.unnamed(model)
