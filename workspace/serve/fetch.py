"""`inv serve.fetch`: weights and vocabularies, before any load. What is there is not fetched again; what broke off goes on.

huggingface_hub of the built environment does it, the one that will look the model up later; after that no hub is asked any more.
"""

import ast
import json
from pathlib import Path

from workspace.core import process
from workspace.core.console import Console, Step
from workspace.core.errors import ServeError, SettingsError, SourceError, ToolchainError, WorkspaceError
from workspace.core.files import download, read_regular, sha256
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.engine import models
from workspace.environment import check, interpreter, machine, running
from workspace.serve import recipes, weights
from workspace.serve.recipes import Recipe
from workspace.source import pins

BUILT = "./scripts/inv bootstrap"
# A small file that nobody sends within this is not sent at all.
VOCABULARY_TIMEOUT_S = 30.0
# Beside the model's own files, for everything else that is written meanwhile.
MARGIN_GIB = 2.0
_GATE = "ask for access at https://huggingface.co/{model}, then put HF_TOKEN into .env"


def run(layout: Layout, settings: Settings, name: str, *, console: Console) -> None:
    """Fetch what a recipe, or a model on the hub, needs.

    Raises SettingsError where no hub may be asked, ToolchainError for want of disk or of a built environment, SourceError where it cannot be had,
    ServeError where it is gated.
    """
    recipe = named(layout, name)
    if not layout.environment_python.exists():
        raise ToolchainError("there is no built environment, whose huggingface_hub fetches models", hint=BUILT)
    check.require(layout, settings, console=console, recipe=recipe.environment)
    bring(layout, settings, recipe, console=console)
    console.say(f"next: ./scripts/inv serve {name}")


def bring(layout: Layout, settings: Settings, recipe: Recipe, *, console: Console) -> None:
    """Fetch what is missing of a model, or make it. Raises as `run` does."""
    with Journal(console, layout.logs, verb="fetch", secrets=settings.secrets) as journal:
        with console.step("weights") as view:
            journal.phase("weights", view)
            _weights(layout, settings, recipe, journal, view)
        with console.step("vocabularies") as view:
            journal.phase("vocabularies", view)
            _vocabularies(layout, settings, recipe, view)


def named(layout: Layout, name: str) -> Recipe:
    """The recipe of this name, else one without a name for a model on the hub. Raises SettingsError for what is neither."""
    if "/" in name:
        return recipes.unnamed(name)
    return recipes.load(layout, name, version=pins.load(layout.pins).vllm.version)


def _weights(layout: Layout, settings: Settings, recipe: Recipe, journal: Journal, view: Step) -> None:
    if there := weights.found(layout, settings, recipe):
        view.skip(f"on disk: {there}")
        return
    if recipe.origin == "built-in":
        bar = lambda done, total: view.progress(done / 1e6, total / 1e6 if total else None, "MB")  # noqa: E731
        made = (
            models.smollm2(layout, settings, journal=journal, on_progress=bar) if recipe.model == "smollm2" else models.tiny(layout, settings, journal=journal)
        )
        view.reason = str(made)
        return
    if settings.switch("HF_HUB_OFFLINE"):
        source = settings.source("HF_HUB_OFFLINE")
        cure = "unset HF_HUB_OFFLINE" if source == "shell" else "sed -i '/^HF_HUB_OFFLINE=/d' .env"
        raise SettingsError(f"{recipe.model} is not on disk, and HF_HUB_OFFLINE ({source}) says that no hub is asked", hint=cure)
    cache = weights.hub_cache(settings)
    if recipe.fetch_gib and machine.free_gib(cache) < MARGIN_GIB:
        raise ToolchainError(f"{cache} has {machine.free_gib(cache):.1f} GiB free, {recipe.fetch_gib:.1f} are to be fetched", hint=f"df -h {cache}")
    record = _ask_hub(layout, settings, recipe, journal, view)
    there = weights.found(layout, settings, recipe)
    if there is None:
        raise SourceError(f"{recipe.model} came without all of its weights: {record.get('folder')}", hint=f"ls {record.get('folder')}")
    view.reason = f"{_number(record, 'fetched') / 2**30:.1f} GiB fetched of {_number(record, 'bytes') / 2**30:.1f}, {there}"


def _ask_hub(layout: Layout, settings: Settings, recipe: Recipe, journal: Journal, view: Step) -> dict[str, object]:
    """Let the probe fetch, and return its document. Raises what stood in the way."""
    said: list[str] = []

    def hear(line: str) -> None:
        words = line.split()
        if len(words) == 3 and words[0] == "@" and words[1].isdigit() and words[2].isdigit():
            view.progress(int(words[1]) / 2**30, int(words[2]) / 2**30, f"{int(words[1]) / 2**30:.1f} of {int(words[2]) / 2**30:.1f} GiB")
        elif line.startswith("{"):
            said.append(line)

    environment = running.variables(layout, settings, stack=None, recipe=recipe.environment, more={"HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    argv: list[process.Argument] = [layout.environment_python, layout.probes / "fetch_model.py", recipe.model]
    argv += [word for pattern in recipe.ignored for word in ("--ignore", pattern)]
    again = f"./scripts/inv serve.fetch {recipe.name or recipe.model}    goes on where it stopped"
    process.run(argv, env=environment, journal=journal, on_line=hear, failure=SourceError, hint=again)
    try:
        record = json.loads(said[-1])
        error = record["error"]
    except (IndexError, ValueError, KeyError, TypeError) as exc:
        raise SourceError(f"{recipe.model} could not be fetched: the probe printed no document", hint=again) from exc
    if error:
        cache = weights.hub_cache(settings)
        # As `hf auth login` leaves it (huggingface_hub/constants.py).
        has_token = bool(environment.get("HF_TOKEN")) or Path(environment.get("HF_TOKEN_PATH") or cache.parent / "token").is_file()
        raise _refusal(recipe, str(error.get("kind")), journal.redact(str(error.get("said"))), cache, again, has_token)
    return dict(record)


def _refusal(recipe: Recipe, kind: str, said: str, cache: Path, again: str, has_token: bool) -> WorkspaceError:
    if kind == "gated":
        why = "this token has no access to it" if has_token else "there is no token"
        return ServeError(f"{recipe.model} is gated, and {why}: {said}", hint=_GATE.format(model=recipe.model))
    if kind == "absent":
        return SourceError(f"the hub has no model {recipe.model}, or shows it to others only: {said}", hint="./scripts/inv serve.list    names the recipes")
    if kind == "disk":
        return ToolchainError(f"{recipe.model} cannot be kept: {said}", hint=f"df -h {machine.existing(cache)}; HF_HOME in .env names another place")
    return SourceError(f"{recipe.model} could not be fetched: {said}", hint=f"check the network; {again}")


def _vocabularies(layout: Layout, settings: Settings, recipe: Recipe, view: Step) -> None:
    """gpt-oss speaks harmony: since vLLM 0.31 its package has the vocabularies in it, the one before asks for them when a load is over."""
    if not recipe.harmony:
        view.skip("not needed: the model does not speak harmony")
        return
    installed = interpreter.installed(layout)
    if built_in := installed.get("oss-harmony"):
        view.skip(f"not needed: oss-harmony {built_in} in .vllm has them built in")
        return
    known = _published(layout)
    fetched = []
    for name in running.VOCABULARIES:
        destination = layout.encodings / name
        url, digest = known[name]
        if destination.is_file() and sha256(destination) == digest:
            continue
        destination.unlink(missing_ok=True)
        download(url, destination, expected_sha256=digest, timeout_s=VOCABULARY_TIMEOUT_S)
        fetched.append(name)
    if fetched:
        view.reason = f"{' and '.join(fetched)} fetched, sha256 as tiktoken {installed.get('tiktoken', '')} has it; runs are told of {layout.encodings}"
    else:
        view.skip(f"on disk: {layout.encodings}")


def _published(layout: Layout) -> dict[str, tuple[str, str]]:
    """Address and SHA-256 of each vocabulary, as the tiktoken in `.vllm` has them in its source. Raises ToolchainError where it does not say."""
    found: dict[str, tuple[str, str]] = {}
    for folder in interpreter.site_packages(layout):
        try:
            tree = ast.parse(read_regular(folder / "tiktoken_ext" / "openai_public.py"))
        except (OSError, SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                digest = next((word.value.value for word in node.keywords if word.arg == "expected_hash" and isinstance(word.value, ast.Constant)), None)
                name = node.args[0].value.rpartition("/")[2]
                if isinstance(digest, str) and name in running.VOCABULARIES:
                    found[name] = (node.args[0].value, digest)
    if missing := [name for name in running.VOCABULARIES if name not in found]:
        raise ToolchainError(f"the tiktoken in .vllm does not say where {' and '.join(missing)} are, and with which hash", hint=BUILT)
    return found


def _number(record: dict[str, object], name: str) -> float:
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else 0.0
