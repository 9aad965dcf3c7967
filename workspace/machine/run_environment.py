"""The environment of a running vLLM: the one that smoke, bench, serve, `inv run` and `inv shell`
all give to what they start.

The user's word (shell, then .env) goes before a recipe's, and that before a default. Nothing is
touched here.
"""

import ast
import contextlib
import functools
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.core import process
from workspace.core.errors import ToolchainError
from workspace.core.files import read_regular
from workspace.core.paths import Layout
from workspace.core.settings import KNOWN, Settings, shortened
from workspace.machine import jit_caches

VARIABLE = re.compile(r"VLLM_[A-Z0-9_]+")
ANSWER_S = 20.0
_REMOVED = Path(__file__).with_name("removed.toml")


@dataclass(frozen=True)
class Removed:
    """A name that was: `last` is the newest release that had it, `gone` the first without it; both
    are empty for one that no release has read.

    `instead` is what to write in its place, empty where nothing takes it; `values` how many words
    followed a flag.
    """

    name: str
    last: str
    gone: str
    instead: str
    reference: str
    values: int = 0

    @property
    def sentence(self) -> str:
        when = f"is gone since vLLM {self.gone}" if self.last else "is read by no release of vLLM"
        return f"{when} ({self.reference}); " + (
            f"instead: {self.instead}" if self.instead else "nothing takes its place, leave it out"
        )


@dataclass(frozen=True)
class Misread:
    """A value that the registry's function refuses (`is_error`), or takes for something else than
    it looks like.
    """

    name: str
    message: str
    is_error: bool


@functools.lru_cache(maxsize=4)
def variables_of(source: bytes) -> frozenset[str]:
    """The names in the registry of vllm/envs.py, the dictionary `environment_variables`; none where
    there is no such thing.
    """
    names: set[str] = set()
    for node in ast.walk(parsed(source)):
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        is_registry = any(
            isinstance(target, ast.Name) and target.id == "environment_variables"
            for target in targets
        )
        if is_registry and isinstance(value := getattr(node, "value", None), ast.Dict):
            names |= {
                key.value
                for key in value.keys
                if isinstance(key, ast.Constant) and isinstance(key.value, str)
            }
    return frozenset(names)


def parsed(source: bytes) -> ast.Module:
    """The syntax tree of a Python source; an empty one for what is none."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError):
        return ast.parse(source)
    return ast.Module(body=[], type_ignores=[])


def known_variables(layout: Layout) -> frozenset[str]:
    """The names in the registry of the tree in vendor/vllm; none where there is no tree."""
    with contextlib.suppress(OSError):
        return variables_of(read_regular(_source(layout)))
    return frozenset()


@functools.cache
def removed_names(kind: Literal["variables", "flags"]) -> Mapping[str, Removed]:
    """What releases of vLLM had and later ones have not, by name (removed.toml says how that was
    established).
    """
    table = tomllib.loads(_REMOVED.read_text(encoding="utf-8"))[kind]
    return {name: Removed(name, **facts) for name, facts in table.items()}


def misread_values(
    layout: Layout, settings: Settings, values: Mapping[str, str]
) -> tuple[Misread, ...]:
    """Ask the tree's own functions what they make of these values of its registry; what cannot be
    asked is no finding.
    """
    if not values:
        return ()
    argv: list[process.Argument] = [
        sys.executable,
        "-I",
        "-S",
        layout.probes / "variables.py",
        _source(layout),
        *sorted(values),
    ]
    environment = {
        "PATH": settings.shell.get("PATH", ""),
        "HOME": settings.shell.get("HOME", "/"),
        **values,
    }
    try:
        found = json.loads(process.capture(argv, env=environment, timeout_s=ANSWER_S).stdout)
        rows = [
            *((row, True) for row in found["refused"]),
            *((row, False) for row in found["ignored"]),
        ]
        return tuple(
            Misread(str(row["name"]), shortened(str(row["said"])), is_error)
            for row, is_error in rows
        )
    except (ToolchainError, ValueError, KeyError, TypeError):
        return ()


def spelled_alike(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """Up to three of the names that are most like this one, best first."""
    import difflib

    return tuple(difflib.get_close_matches(name, list(names), n=3, cutoff=0.75))


def _source(layout: Layout) -> Path:
    return layout.vllm / "vllm" / "envs.py"


VOCABULARIES = ("o200k_base.tiktoken", "cl100k_base.tiktoken")
ENCODINGS = "TIKTOKEN_ENCODINGS_BASE"


def run_variables(
    layout: Layout,
    settings: Settings,
    *,
    stack: jit_caches.Stack | None,
    recipe: Mapping[str, str] | None = None,
    more: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return every variable of a vLLM that is started from here.

    `stack` says which folders compiled kernels are kept in (jit_caches.observe; None leaves them
    where they usually are), `recipe` is a recipe's environment, `more` what the caller insists on,
    over everybody's word.
    """
    environment = settings.child_environment("run")
    environment |= {
        name: text for name, text in (recipe or {}).items() if not is_users(settings, name)
    }
    known = known_variables(layout)
    for name in removed_names("variables"):
        if name not in known and known:
            environment.pop(name, None)
    if stack is not None:
        environment |= jit_caches.variables(layout, settings, stack)
    _put_encodings(layout, environment)
    # FlashInfer's compilations call ninja, which lies there.
    programs = str(layout.environment / "bin")
    environment["PATH"] = os.pathsep.join(
        [
            programs,
            *(
                entry
                for entry in environment.get("PATH", "").split(os.pathsep)
                if entry and entry != programs
            ),
        ]
    )
    environment["VIRTUAL_ENV"] = str(layout.environment)
    return environment | dict(more or {})


def is_users(settings: Settings, name: str) -> bool:
    """Whether the user has said something of a variable, in the shell or in .env."""
    if name in KNOWN:
        return settings.source(name) != "default" and bool(settings.text(name))
    return name in settings.passed or name in settings.shell


def missing_vocabularies(folder: Path) -> tuple[str, ...]:
    """The vocabularies of gpt-oss that a folder lacks."""
    return tuple(name for name in VOCABULARIES if not (folder / name).is_file())


def _put_encodings(layout: Layout, environment: dict[str, str]) -> None:
    """Export the folder of vocabularies only where it holds them: with a file missing gpt-oss fails
    after its load (vllm-project/vllm#22525).
    """
    if ENCODINGS in environment and missing_vocabularies(Path(environment[ENCODINGS])):
        del environment[ENCODINGS]
    if ENCODINGS not in environment and not missing_vocabularies(layout.encodings):
        environment[ENCODINGS] = str(layout.encodings)
