"""Recipes: flags, environment and memory of a model that is served here, a TOML file each in
recipes/. A file with an error is refused as a whole.

[recipes/README.md](../../recipes/README.md) describes the keys.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

from workspace.core import hints, records, settings
from workspace.core.errors import ServeError, SettingsError
from workspace.core.files import read_regular
from workspace.core.known_settings import has_login, is_relative, is_secret
from workspace.core.paths import Layout, typed
from workspace.server import flags as engine_flags

Origin = Literal["hub", "built-in"]
# Value of a flag in a recipe: a switch, one value, several values, or a table that becomes JSON.
FlagValue = bool | int | float | str | tuple[str | int | float, ...] | Mapping[str, object]
BUILT_IN = ("tiny", "smollm2")
DEFAULT_UTILIZATION = 0.92
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FLAG = re.compile(r"[a-z0-9][a-z0-9-]*(\.[A-Za-z0-9_-]+)*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# The model has its own key in a recipe, and a secret does not belong into a shared file.
NOT_AS_FLAG = {
    "model": "write it as `model`",
    "api-key": "put VLLM_API_KEY into .env",
    "hf-token": "put HF_TOKEN into .env",
    "config": "write its settings here",
}


@dataclass(frozen=True)
class Memory:
    """Memory of a model: `weights_gib`, `overhead_gib` for activations, graphs and the runtime, and
    `kv_kib_per_token` of one sequence.
    """

    weights_gib: float
    overhead_gib: float
    kv_kib_per_token: float


@dataclass(frozen=True)
class Figure:
    """A published figure with its source."""

    what: str
    value: str
    source: str


@dataclass(frozen=True)
class Alternative:
    """Changes to a recipe for the vLLM releases in `vllm`, such as `<0.31`; `without` are flags not
    given to these releases.
    """

    vllm: str
    why: str
    flags: Mapping[str, FlagValue] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """One model and how it is served. `flags` have names without dashes in front; `fetch_gib` is
    the size of the files that `serve.fetch` fetches, `ignored` are patterns of files it skips.
    `revision` is that of the user's flags, None for the newest. `nodes` is how many nodes it takes.
    """

    name: str
    model: str
    origin: Origin
    summary: str
    memory: Memory
    fetch_gib: float = 0.0
    ignored: tuple[str, ...] = ()
    harmony: bool = False
    flags: Mapping[str, FlagValue] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    revision: str | None = None
    nodes: int = 1

    @property
    def args(self) -> tuple[str, ...]:
        """Return the flags as arguments of a command line."""
        return tuple(
            arg
            for name, value in self.flags.items()
            for arg in engine_flags.args_of(
                name, list(value) if isinstance(value, tuple) else value
            )
        )

    @property
    def asks_for_remote_code(self) -> bool:
        """Return whether the recipe sets trust-remote-code."""
        return bool(self.flags.get("trust-remote-code"))


def names(layout: Layout) -> tuple[str, ...]:
    """Return the names of all recipes, sorted."""
    return tuple(sorted(path.stem for path in folder(layout).glob("*.toml")))


def load(layout: Layout, name: str, *, version: str | None = None) -> Recipe:
    """Read a recipe; with a version of vLLM such as 0.31.0 also resolve its alternatives.

    Raises SettingsError for a name without a recipe and for a recipe with an error.
    """
    path = folder(layout) / f"{name}.toml"
    if not _NAME.fullmatch(name) or name not in names(layout):
        alike = settings.nearest(name, names(layout))
        hint = (
            hints.text("server.recipe_alike", alike=alike)
            if alike
            else hints.text("inv.serve_list")
        )
        raise SettingsError(f"there is no recipe {settings.shortened(name)!r}", hint=hint)
    place = layout.relative(path)
    table = read_table(path, place=place)
    recipe = _with_paths(_recipe(name, _Table(place, "", table)), layout.root)
    return resolved(recipe, version) if version else recipe


def _with_paths(recipe: Recipe, root: Path) -> Recipe:
    """Return a recipe with absolute paths: relative ones count from the root of the clone."""

    def flags(given: Mapping[str, FlagValue]) -> Mapping[str, FlagValue]:
        return {
            name: cast("FlagValue", engine_flags.typed_value(name, value, root))
            for name, value in given.items()
        }

    def environment(given: Mapping[str, str]) -> Mapping[str, str]:
        return {
            name: str(typed(text, root)) if is_relative(text) else text
            for name, text in given.items()
        }

    alternatives = tuple(
        replace(other, flags=flags(other.flags), environment=environment(other.environment))
        for other in recipe.alternatives
    )
    return replace(
        recipe,
        flags=flags(recipe.flags),
        environment=environment(recipe.environment),
        alternatives=alternatives,
    )


def resolved(recipe: Recipe, version: str) -> Recipe:
    """Return the recipe for one version of vLLM: the matching alternatives, in order, over it."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    for other in recipe.alternatives:
        if Version(version) in SpecifierSet(other.vllm, prereleases=True):
            kept = {
                name: value for name, value in recipe.flags.items() if name not in other.without
            }
            notes = (*recipe.notes, *([other.why] if other.why else []))
            recipe = replace(
                recipe,
                flags=kept | dict(other.flags),
                environment=dict(recipe.environment) | dict(other.environment),
                notes=notes,
            )
    return replace(recipe, alternatives=())


def unnamed(model: str, *, weights_gib: float = 0.0) -> Recipe:
    """Return a recipe for a model without one, a name on the hub or a folder: of its memory only
    the weights are known.
    """
    return Recipe(
        name="",
        model=model,
        origin="hub",
        summary="no recipe",
        memory=Memory(weights_gib, 0.0, 0.0),
        fetch_gib=weights_gib,
    )


def read_table(path: Path, *, place: str) -> dict[str, object]:
    """Read a TOML file, which messages call `place`. Raises SettingsError if that fails."""
    try:
        return records.parse_toml(read_regular(path))
    except OSError as exc:
        raise SettingsError(
            f"{place} cannot be read: {exc.strerror}", hint=hints.text("core.list_file", path=place)
        ) from exc
    except records.DecodeError as exc:
        raise SettingsError(
            f"{place} is not TOML: {exc}", hint=hints.text("server.edit_recipe", path=place)
        ) from exc


class _Table:
    """One table of a recipe: returns values of the requested type and refuses unread keys."""

    def __init__(self, place: str, name: str, content: Mapping[str, object]) -> None:
        self._place, self._name, self._content = place, name, content
        self._read_keys: list[str] = []

    def wrong(self, key: str, expected: str) -> SettingsError:
        """Return the error for a key that is missing or has another value than expected."""
        path = f"{self._name}.{key}" if self._name else key
        problem = (
            f"{path} is missing; it should be" if key not in self._content else f"{path} is not"
        )
        return SettingsError(
            f"{self._place}: {problem} {expected}",
            hint=hints.text("server.edit_recipe_keys", path=self._place),
        )

    def text(
        self,
        key: str,
        default: str | None = None,
        *,
        form: re.Pattern[str] | None = None,
        expected: str = "a text of one line",
    ) -> str:
        found = self._get(key, default)
        if (
            not isinstance(found, str)
            or not found.isprintable()
            or (form and not form.fullmatch(found))
        ):
            raise self.wrong(key, expected)
        return found

    def number(self, key: str, default: float | None = None) -> float:
        found = self._get(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < 10**6:
            raise self.wrong(key, "a number of at least 0")
        return float(found)

    def switch(self, key: str) -> bool:
        found = self._get(key, False)
        if not isinstance(found, bool):
            raise self.wrong(key, "true or false")
        return found

    def texts(self, key: str) -> tuple[str, ...]:
        found = self._get(key, [])
        if not isinstance(found, list) or not all(
            isinstance(text, str) and text.isprintable() for text in found
        ):
            raise self.wrong(key, "a list of texts")
        return tuple(found)

    def table(self, key: str) -> "_Table":
        found = self._get(key, {})
        if not isinstance(found, dict):
            raise self.wrong(key, "a table")
        return _Table(self._place, f"{self._name}.{key}" if self._name else key, found)

    def tables(self, key: str) -> list["_Table"]:
        found = self._get(key, [])
        if not isinstance(found, list) or not all(isinstance(table, dict) for table in found):
            raise self.wrong(key, f"a list of tables, written [[{key}]]")
        return [
            _Table(self._place, f"{key}[{index}]", table) for index, table in enumerate(found, 1)
        ]

    def items(self) -> Sequence[tuple[str, object]]:
        self._read_keys += self._content
        return list(self._content.items())

    def finish(self) -> None:
        """Raise SettingsError for a key that was not read: it is unknown."""
        for key in self._content:
            if key not in self._read_keys:
                alike = settings.nearest(key, self._read_keys)
                table = f"[{self._name}]" if self._name else "a recipe"
                known = ", ".join(self._read_keys)
                hint = (
                    hints.text("core.did_you_mean", alike=alike)
                    if alike
                    else hints.text("server.keys", path=self._place, table=table, keys=known)
                )
                raise SettingsError(
                    f"{self._place}: {table} has no key {settings.shortened(key)!r}", hint=hint
                )

    def _get(self, key: str, default: object) -> object:
        self._read_keys.append(key)
        return self._content.get(key, default)


def _recipe(name: str, table: _Table) -> Recipe:
    origin = table.text(
        "origin", "hub", form=re.compile("hub|built-in"), expected="hub or built-in"
    )
    built_in = re.compile("|".join(BUILT_IN))
    expected = (
        f"one of {', '.join(BUILT_IN)}"
        if origin == "built-in"
        else "the name of a model on the hub, such as openai/gpt-oss-120b"
    )
    memory, fetch = table.table("memory"), table.table("fetch")
    recipe = Recipe(
        name=name,
        model=table.text(
            "model", form=built_in if origin == "built-in" else HUB, expected=expected
        ),
        origin=cast("Origin", origin),
        summary=table.text("summary"),
        harmony=table.switch("harmony"),
        memory=Memory(
            memory.number("weights_gib"),
            memory.number("overhead_gib"),
            memory.number("kv_kib_per_token"),
        ),
        fetch_gib=fetch.number("gib", 0.0),
        ignored=fetch.texts("ignore"),
        flags=_flags(table.table("flags")),
        environment=_environment(table.table("environment")),
        notes=table.texts("notes"),
        figures=tuple(_figure(figure) for figure in table.tables("figures")),
        alternatives=tuple(_alternative(other) for other in table.tables("alternatives")),
        nodes=max(1, int(table.number("nodes", 1.0))),
    )
    for part in (memory, fetch, table):
        part.finish()
    return recipe


def _figure(table: _Table) -> Figure:
    figure = Figure(table.text("what"), table.text("value"), table.text("source"))
    table.finish()
    return figure


def _alternative(table: _Table) -> Alternative:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    vllm = table.text("vllm", expected="a range of versions of vLLM, such as <0.31")
    try:
        SpecifierSet(vllm)
    except InvalidSpecifier as exc:
        raise table.wrong("vllm", "a range of versions of vLLM, such as <0.31") from exc
    flags, environment = _flags(table.table("flags")), _environment(table.table("environment"))
    other = Alternative(vllm, table.text("why"), flags, environment, table.texts("without"))
    table.finish()
    return other


def _flags(table: _Table) -> Mapping[str, FlagValue]:
    found: dict[str, FlagValue] = {}
    for key, value in table.items():
        name = key.replace("_", "-") if "." not in key else key
        if not _FLAG.fullmatch(name):
            raise table.wrong(key, "the name of a flag, without the dashes in front")
        if name in NOT_AS_FLAG:
            raise table.wrong(key, f"for a recipe: {NOT_AS_FLAG[name]}")
        if (
            isinstance(value, list)
            and value
            and all(
                isinstance(part, str | int | float) and not isinstance(part, bool) for part in value
            )
        ):
            found[name] = tuple(value)
        elif isinstance(value, bool | int | float | dict) or (
            isinstance(value, str) and value.isprintable()
        ):
            found[name] = value
        else:
            raise table.wrong(
                key, "a switch, a number, a text, a table or a list of texts or numbers"
            )
    return found


def environment_of(place: str, content: Mapping[str, object]) -> Mapping[str, str]:
    """Return variables of a file, which messages call `place`. Raises SettingsError for a name that
    is none, a secret, and a value of more than a line.
    """
    return _environment(_Table(place, "env", content))


def _environment(table: _Table) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for key, value in table.items():
        if not _VARIABLE.fullmatch(key):
            raise table.wrong(key, "the name of an environment variable")
        if is_secret(key) or has_login(str(value)):
            raise table.wrong(key, "for a recipe, which is shared: put it into .env")
        if not isinstance(value, str) or not value.isprintable():
            raise table.wrong(key, "a text of one line; quote a number")
        found[key] = value
    return found


def folder(layout: Layout) -> Path:
    """Return the folder of the recipes."""
    return layout.root / "recipes"


def require_config(folder: Path) -> None:
    """Raise ServeError if a folder has no configuration of a model that can be read."""
    path = next(
        (folder / name for name in engine_flags.CONFIGURATIONS if (folder / name).is_file()),
        folder / engine_flags.CONFIGURATIONS[0],
    )
    try:
        known = records.load(path, dict[str, object])
    except records.DecodeError as exc:
        raise ServeError(
            f"{path} cannot be read: {exc}", hint=hints.text("core.read_log", path=path)
        ) from exc
    if known is None:
        raise ServeError(
            f"{folder} has no config.json, which Hugging Face's layout has, and no params.json,"
            " which Mistral's has",
            hint=hints.text("core.list_names", folder=folder),
        )


def require_no_adapter(folder: Path, name: str) -> None:
    """Raise ServeError for a LoRA adapter, which is served with its base model."""
    if (folder / engine_flags.CONFIGURATIONS[0]).is_file() or not (
        folder / engine_flags.ADAPTER
    ).is_file():
        return
    try:
        known = records.load(folder / engine_flags.ADAPTER, dict[str, object]) or {}
    except records.DecodeError:
        known = {}
    base = known.get("base_model_name_or_path")
    raise ServeError(
        f"{name} is a LoRA adapter: it is served with {base or 'its base model'}",
        hint=hints.text("server.adapter", model=base, adapter=f"{Path(name).name}={name}"),
    )
