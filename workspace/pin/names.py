"""Names that a user relies on: environment variables and serve flags, and what uses them here.

What a vLLM tree knows of them is read by environment/registry.py and engine/flags.py.
"""

import contextlib
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from workspace.core.files import read_regular
from workspace.core.layout import Layout
from workspace.core.settings import KNOWN, Settings
from workspace.environment.registry import VARIABLE

_FLAG = re.compile(r"--[a-z][a-z0-9_-]*")

Uses = Mapping[str, tuple[str, ...]]


def used(layout: Layout, settings: Settings) -> tuple[Uses, Uses]:
    """The variables and the flags in use here, each with where: .env, shell, a recipe. No value is ever part of the answer."""
    variables: dict[str, list[str]] = {}
    flags: dict[str, list[str]] = {}
    for name, value in (*settings.values.items(), *settings.passed.items()):
        # What this workspace keeps to itself is no business of vLLM's.
        if VARIABLE.fullmatch(name) and value.text and value.source != "default" and (name not in KNOWN or KNOWN[name].phase != "workspace"):
            variables.setdefault(name, []).append(value.source)
        if value.source == ".env":
            for flag in _flags_in(value.text):
                flags.setdefault(flag, []).append(".env")
    for name in settings.shell:
        if VARIABLE.fullmatch(name) and name not in KNOWN and name not in settings.passed:
            variables.setdefault(name, []).append("shell")
    for recipe in sorted((layout.root / "recipes").glob("*.toml")):
        place = layout.relative(recipe)
        for word in _words(recipe):
            if VARIABLE.fullmatch(word):
                variables.setdefault(word, []).append(place)
            for flag in _flags_in(word):
                flags.setdefault(flag, []).append(place)
    return tuple({name: tuple(dict.fromkeys(places)) for name, places in found.items()} for found in (variables, flags))  # type: ignore[return-value]


def _flags_in(text: str) -> Iterator[str]:
    """The flags in a command line, spelled with dashes; what follows a dot or an equals sign is their value."""
    for word in text.split():
        if found := _FLAG.match(word):
            yield found[0].replace("_", "-")


def _words(recipe: Path) -> Iterator[str]:
    """Every key and every text of a recipe; keys of tables that hold flags or arguments also as `--key`."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        yield from _walk(tomllib.loads(read_regular(recipe).decode()), "")


def _walk(value: object, name: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            if name in ("flags", "args", "arguments", "serve"):
                yield f"--{key}"
            yield from _walk(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner, name)
    elif isinstance(value, str):
        yield value
