"""Names that a user relies on: environment variables and serve flags, what uses them here and what a vLLM tree knows of them.

Trees are read, never run: the names are those that stand in the sources (ast), so a flag that is made at run time is not seen.
"""

import ast
import contextlib
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from workspace.core.files import read_regular
from workspace.core.layout import Layout
from workspace.core.settings import KNOWN, Settings

_VARIABLE = re.compile(r"VLLM_[A-Z0-9_]+")
_FLAG = re.compile(r"--[a-z][a-z0-9_-]*")
# Classes whose fields become flags (vllm/entrypoints/**/cli_args.py, vllm/engine/arg_utils.py).
_FLAG_CLASS = re.compile(r"\w*(FrontendArgs|EngineArgs)")

Uses = Mapping[str, tuple[str, ...]]


def used(layout: Layout, settings: Settings) -> tuple[Uses, Uses]:
    """The variables and the flags in use here, each with where: .env, shell, a recipe. No value is ever part of the answer."""
    variables: dict[str, list[str]] = {}
    flags: dict[str, list[str]] = {}
    for name, value in (*settings.values.items(), *settings.passed.items()):
        # What this workspace keeps to itself is no business of vLLM's.
        if _VARIABLE.fullmatch(name) and value.text and value.source != "default" and (name not in KNOWN or KNOWN[name].phase != "workspace"):
            variables.setdefault(name, []).append(value.source)
        if value.source == ".env":
            for flag in _flags_in(value.text):
                flags.setdefault(flag, []).append(".env")
    for name in settings.shell:
        if _VARIABLE.fullmatch(name) and name not in KNOWN and name not in settings.passed:
            variables.setdefault(name, []).append("shell")
    for recipe in sorted((layout.root / "recipes").glob("*.toml")):
        place = layout.relative(recipe)
        for word in _words(recipe):
            if _VARIABLE.fullmatch(word):
                variables.setdefault(word, []).append(place)
            for flag in _flags_in(word):
                flags.setdefault(flag, []).append(place)
    return tuple({name: tuple(dict.fromkeys(places)) for name, places in found.items()} for found in (variables, flags))  # type: ignore[return-value]


def variables_of(source: bytes) -> frozenset[str]:
    """The names in the registry of vllm/envs.py, the dictionary `environment_variables`; none where there is no such thing."""
    names: set[str] = set()
    for node in ast.walk(_parsed(source)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if any(isinstance(target, ast.Name) and target.id == "environment_variables" for target in targets) and isinstance(node.value, ast.Dict):  # type: ignore[attr-defined]
            names |= {key.value for key in node.value.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}  # type: ignore[attr-defined]
    return frozenset(names)


def flags_of(source: bytes) -> frozenset[str]:
    """The flags that a file of vLLM's command line defines: literals given to add_argument, and fields of its argument classes."""
    names: set[str] = set()
    for node in ast.walk(_parsed(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            names |= {word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str) and word.value.startswith("--")}
        elif isinstance(node, ast.ClassDef) and _FLAG_CLASS.fullmatch(node.name):
            fields = [field.target.id for field in node.body if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)]
            names |= {f"--{field}" for field in fields if not field.startswith("_")}
    return frozenset(name.replace("_", "-") for name in names)


def _parsed(source: bytes) -> ast.Module:
    with contextlib.suppress(SyntaxError, ValueError, RecursionError):
        return ast.parse(source)
    return ast.Module(body=[], type_ignores=[])


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
