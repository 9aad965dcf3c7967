"""Weights on this machine: where a model's files are, and whether they are all there. Asks no hub and touches nothing."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from workspace.core.files import read_regular
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.engine import models
from workspace.serve.recipes import Recipe

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.(safetensors|bin)")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def found(layout: Layout, settings: Settings, recipe: Recipe) -> Path | None:
    """Return the folder that vLLM can load the model from without asking anybody, None where something is still to be fetched or made."""
    if recipe.origin == "built-in":
        return models.found(layout, recipe.model)
    own = Path(recipe.model).expanduser()
    if recipe.model.startswith(("/", "./", "../", "~")):
        return own if is_whole(own) else None
    return snapshot(hub_cache(settings), recipe.model)


def hub_cache(settings: Settings) -> Path:
    """Where huggingface_hub keeps models (its constants.py): HF_HUB_CACHE, else hub/ below HF_HOME, else below the user's cache folder."""
    environment = settings.child_environment("run")
    if said := environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE"):
        return Path(said).expanduser()
    home = environment.get("HF_HOME")
    cache = Path(environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "/")) / ".cache")
    return (Path(home).expanduser() if home else cache / "huggingface") / "hub"


def snapshot(cache: Path, model: str) -> Path | None:
    """Return the newest snapshot of a model in Hugging Face's cache, where all its weights are there. A file is linked once it is whole."""
    repository = cache / f"models--{model.replace('/', '--')}"
    try:
        commit = read_regular(repository / "refs" / "main").decode().strip()
    except (OSError, ValueError):
        return None
    folder = repository / "snapshots" / commit
    return folder if commit and commit.isalnum() and is_whole(folder) else None


def is_whole(folder: Path) -> bool:
    """Whether a folder in Hugging Face layout has its configuration and every part of its weights."""
    try:
        if not (folder / "config.json").is_file():
            return False
        weights = [path for pattern in _WEIGHTS for path in folder.glob(pattern)]
        parts = [part for path in weights if (part := _PART.fullmatch(path.name))]
        listed = [name for index in folder.glob("*.index.json") for name in _listed(index)]
    except OSError:
        return False
    counted = {(part["stem"], int(part["count"])) for part in parts}
    whole = all(sum(part["stem"] == stem and int(part["count"]) == count for part in parts) == count for stem, count in counted)
    return bool(weights) and whole and all((folder / name).is_file() for name in listed) and all(path.is_file() for path in weights)


def _listed(index: Path) -> list[str]:
    try:
        document = json.loads(read_regular(index))
    except (OSError, ValueError, RecursionError):
        return [index.name + ".damaged"]
    named = document.get("weight_map") if isinstance(document, dict) else None
    return [str(name) for name in set(named.values())] if isinstance(named, Mapping) else []
