"""The environment of a running vLLM: the one that smoke, bench, serve, `inv run` and `inv shell` all give to what they start.

The user's word (shell, then .env) goes before a recipe's, and that before a default. Nothing is touched here.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from workspace.core.layout import Layout
from workspace.core.settings import KNOWN, Settings
from workspace.environment import jit_caches, registry

VOCABULARIES = ("o200k_base.tiktoken", "cl100k_base.tiktoken")
ENCODINGS = "TIKTOKEN_ENCODINGS_BASE"


def variables(
    layout: Layout, settings: Settings, *, stack: jit_caches.Stack | None, recipe: Mapping[str, str] | None = None, more: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return every variable of a vLLM that is started from here.

    `stack` says which folders compiled kernels are kept in (jit_caches.observe; None leaves them where they usually are), `recipe` is a recipe's
    environment, `more` what the caller insists on, over everybody's word.
    """
    environment = settings.child_environment("run")
    environment |= {name: text for name, text in (recipe or {}).items() if not is_users(settings, name)}
    known = registry.known(layout)
    for name in registry.removed("variables"):
        if name not in known and known:
            environment.pop(name, None)
    if stack is not None:
        environment |= jit_caches.variables(layout, settings, stack)
    _put_encodings(layout, environment)
    # FlashInfer's compilations call ninja, which lies there.
    programs = str(layout.environment / "bin")
    environment["PATH"] = os.pathsep.join([programs, *(entry for entry in environment.get("PATH", "").split(os.pathsep) if entry and entry != programs)])
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
    """Export the folder of vocabularies only where it holds them: with a file missing gpt-oss fails after its load (vllm-project/vllm#22525)."""
    if ENCODINGS in environment and missing_vocabularies(Path(environment[ENCODINGS])):
        del environment[ENCODINGS]
    if ENCODINGS not in environment and not missing_vocabularies(layout.encodings):
        environment[ENCODINGS] = str(layout.encodings)
