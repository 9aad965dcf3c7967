"""`inv serve`: check before the load all that can be wrong, start one server, watch it until it can
generate, then follow its log or leave it alone.
"""

import hashlib
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

from workspace.core import hints, lock, process, records
from workspace.core.console import Console
from workspace.core.errors import ServeError, SourceError, WorkspaceError
from workspace.core.files import read_regular
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install.status import require_built
from workspace.machine import check, failures, run_environment
from workspace.machine.machine import Case, Machine
from workspace.server import command, fit, flags, lifecycle, models, observation, recipes
from workspace.server.command import Command
from workspace.server.observation import Server, find, how_ended, is_alive
from workspace.server.recipes import Recipe

FOLLOW_S = 0.3
_GGUF = "vllm-gguf-plugin"


@dataclass(frozen=True)
class ServeOptions:
    """Options of `inv serve`. `force`: serve although the server is open to others without a key,
    or memory may not suffice.
    """

    name: str
    extra: tuple[str, ...] = ()
    dry_run: bool = False
    detach: bool = False
    force: bool = False


@dataclass(frozen=True)
class _Session:
    """One call of `inv serve`: its options, and the recipe, command line and device for them."""

    machine: Machine
    console: Console
    options: ServeOptions
    recipe: Recipe
    command: Command
    device: str


def run(layout: Layout, settings: Settings, options: ServeOptions, *, console: Console) -> None:
    """Serve a recipe, a model on the hub or a folder; with `dry_run` only print the command.

    Raises SettingsError for options that contradict each other, ServeError for a model that cannot
    be served, SmokeError if the build is missing or stale, and the errors of models.fetch_weights.
    """
    machine = Machine(layout, settings)
    recipe = _recipe(machine, options.name)
    if command.folder_of(options.name):
        # Hints are typed in the root of the clone, wherever this command was typed.
        options = replace(options, name=recipe.model)
    line = command.compose(
        recipe,
        options.extra,
        flags.known(layout),
        has_key=bool(settings.text("VLLM_API_KEY")),
        force=options.force,
    )
    recipe = replace(recipe, revision=flags.last(line.args, "--revision"))
    command.require_files(layout, settings, line.args)
    check.require(machine, console=console, recipe=recipe.environment)
    device = _device(machine, console, dry_run=options.dry_run)
    session = _Session(machine, console, options, recipe, line, device)
    _check(session)
    folder = _find_model(session)
    is_a_folder = recipe.origin == "built-in" or recipe.model.startswith("/")
    model = str(folder) if folder and is_a_folder else recipe.model
    if folder:
        _require_usable(folder, line)
    environment = _environment(session, folder)
    argv = line.argv(layout, model)
    *variables, typed = command.shown(layout, settings, argv, environment)
    for text in [*(variables if options.dry_run or console.is_verbose else ()), typed]:
        (console.data if options.dry_run else console.info)(text)
    if not options.dry_run:
        facts = {
            "typed": command.typed(options.name, line.extra, detach=options.detach),
            "built": built(layout),
            "tree": command.tree_oid(layout),
            "device": device,
        }
        launch = lifecycle.Launch(
            options.name, argv, environment, line.address, facts, grace_s=_drain_s(line)
        )
        _serve(session, launch, folder)


def built(layout: Layout) -> str:
    """Return one digest of the stamps in `.vllm`, which changes with every new build."""
    digest = hashlib.sha256()
    for name in ("environment", "vllm"):
        try:
            digest.update(read_regular(layout.stamp(name)))
        except OSError:
            digest.update(b"none")
    return digest.hexdigest()


def _check(session: _Session) -> None:
    """Print warnings and notes; raise ServeError if there is no room for the server."""
    options, recipe, line = session.options, session.recipe, session.command
    for sentence in (*line.dropped, *line.notes):
        session.console.warn(sentence)
    for note in recipe.notes:
        session.console.sentence(f"note: {note}")
    if not options.dry_run:
        _require_room(session.machine.layout, line)
    # The folders of compiled kernels, which `_environment` adds, decide nothing here.
    machine = session.machine
    environment = run_environment.built_environment(
        machine.layout, machine.settings, "serve", stack=None, recipe=recipe.environment
    )
    device, args = session.device, line.args
    names = {gpu.name for gpu in machine.gpus} if device == "cuda" else set()
    if len(names) > 1 and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        session.console.warn(
            f"{' and '.join(sorted(names))} differ, and CUDA numbers the fastest first; the fit is"
            " judged in the driver's order",
            hint=hints.text("server.gpu_order"),
        )
    frees = fit.observe(machine, device=device, environment=environment, args=args)
    _require_memory(
        fit.judge(_sized(session), frees, device=device, environment=environment, args=args),
        session.console,
        is_required=not (options.dry_run or options.force),
    )


def _environment(session: _Session, folder: Path | None) -> dict[str, str]:
    """Return the server's environment. Only a start that needs nothing of the hub is kept from
    asking it.
    """
    is_offline = not _missing(session) and folder is not None
    return command.built_environment(
        session.machine,
        "serve",
        recipe=({"HF_HUB_OFFLINE": "1"} if is_offline else {}) | dict(session.recipe.environment),
        is_shown=session.options.dry_run,
    )


def _missing(session: _Session) -> bool:
    """Return whether a flag names something that is not on this machine, and name each.

    Raises SettingsError if HF_HUB_OFFLINE is set, under which vLLM cannot fetch it.
    """
    settings = session.machine.settings
    missing = [
        reference
        for reference in flags.references(session.command.args, session.recipe.model)
        if "://" not in reference.name and not is_here(settings, reference)
    ]
    for reference in missing:
        at = f" at {reference.revision}" if reference.revision else ""
        name = f"{reference.name}{at}, which {reference.flag} names,"
        if settings.switch("HF_HUB_OFFLINE"):
            raise models.offline(settings, name)
        session.console.info(f"{name} is not on this machine: vLLM fetches it during the start")
    return bool(missing)


def _folder(settings: Settings, reference: flags.Reference) -> Path | None:
    path, cache = Path(reference.name), models.hub_cache(settings)
    return path if path.is_absolute() else models.cached(cache, reference.name, reference.revision)


def is_here(settings: Settings, reference: flags.Reference) -> bool:
    """Return whether what a flag names is on this machine, so that vLLM needs no hub for it."""
    folder = _folder(settings, reference)
    if folder is None:
        return False
    return models.holds(folder, reference.needs) if reference.needs else models.is_complete(folder)


def _sized(session: _Session) -> Recipe:
    """Return the recipe with the weights of what is on this machine: the model's, if the recipe has
    none, and those of drafters and adapters.
    """
    settings, recipe = session.machine.settings, session.recipe
    folders = [
        _folder(settings, reference)
        for reference in flags.references(session.command.args, recipe.model)
        if reference.needs in ((), (flags.ADAPTER,))
    ]
    if not recipe.memory.weights_gib:
        folders.append(models.found_weights(session.machine, recipe))
    weights = sum(fit.weights_gib(folder) for folder in folders if folder)
    memory = replace(recipe.memory, weights_gib=recipe.memory.weights_gib + weights)
    return replace(recipe, memory=memory)


def _find_model(session: _Session) -> Path | None:
    """Return the folder of the model's files, which are fetched if they are missing.

    None on a dry run with missing files.
    """
    settings, recipe = session.machine.settings, session.recipe
    if ":" in recipe.model and not recipe.model.startswith("/"):
        session.console.info(f"{recipe.model}: the plugin for GGUF fetches it during the start")
        return None
    folder = models.found_weights(session.machine, recipe)
    if folder is None:
        _require_no_adapter_of_hub(settings, recipe)
    if folder is None and session.options.dry_run:
        at = f" at {recipe.revision}" if recipe.revision else ""
        session.console.info(
            f"{recipe.model}{at} is not on this machine; "
            + (
                "its folder is made at the first start"
                if recipe.origin == "built-in"
                else "./scripts/inv serve fetches it"
            )
        )
    elif folder is None:
        try:
            models.fetch_weights(session.machine, recipe, console=session.console)
        except SourceError:
            _require_no_adapter_of_hub(settings, recipe)
            raise
        folder = models.found_weights(session.machine, recipe)
    return folder


def _serve(session: _Session, launch: lifecycle.Launch, folder: Path | None) -> None:
    layout, settings, console = session.machine.layout, session.machine.settings, session.console
    is_detached = session.options.detach
    if is_detached:
        # As nohup does: the terminal may close while the model loads.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    server: Server | None = None
    is_left = False
    try:
        # The build must not change during the load; afterwards the lock is free again.
        with lock.hold(layout.lock, verb="inv serve"):
            server = lifecycle.start(layout.server, launch, is_detached=is_detached)
            console.info(f"log: {layout.relative(server.log)}")
            server, ready = _wait(session, server, folder)
        console.info(f"ready: {server.address.url}/v1 serves {', '.join(ready.models)}")
        has_key = bool(settings.text("VLLM_API_KEY"))
        console.hint(command.try_it(server.address.url, ready.models[0], has_key=has_key))
        if is_detached:
            is_left = True
            console.info("the server runs in the background")
            console.hint(hints.text("server.started"))
        else:
            console.info("^C stops it")
            _follow(settings, server, console)
    except OSError:
        # A terminal that closed is no reason to end a detached server.
        is_left = is_detached
        raise
    finally:
        if server is not None and not is_left:
            end(server, console=console)


def _wait(session: _Session, server: Server, folder: Path | None) -> tuple[Server, lifecycle.Ready]:
    settings = session.machine.settings
    with session.console.step("start") as view:
        try:
            server, ready = lifecycle.wait_until_ready(
                server,
                key=settings.text("VLLM_API_KEY") or None,
                on_line=lambda text: view.line(settings.masked(failures.without_prefix(text))),
            )
        except ServeError as exc:
            raise _explained(session, server, exc, folder) from exc
        view.reason = f"{', '.join(ready.models)} completes"
    return server, ready


def end(server: Server, *, console: Console) -> None:
    """Stop a server and print how much memory is free again; a second ^C kills it."""
    if find(server.place) is None and not server.members():
        return
    console.info(f"stopping {server.called}")
    try:
        with process.interruptible():
            stopped = lifecycle.stop(server)
    except KeyboardInterrupt:
        stopped = lifecycle.stop(server, at_once=True)
    how = "killed, because it did not end on SIGTERM" if stopped.was_killed else "ended"
    console.info(
        f"{how} in {stopped.seconds:.1f} s; port {server.address.port} is free,"
        f" {stopped.returned_gib:.1f} GiB of memory came back"
    )


def _follow(settings: Settings, server: Server, console: Console) -> None:
    """Print the log until the server ends. Raises ServeError if it was not stopped on request."""
    lines = observation.follow(server.log)
    # The spinner has shown the lines up to now.
    for line in lines:
        if line is None:
            break
    for line in lines:
        if line is not None:
            console.info(settings.masked(line))
        elif is_alive(server):
            time.sleep(FOLLOW_S)
        else:
            break
    ended = how_ended(server)
    if ended is None or not ended.was_requested:
        raise lifecycle.failure(server)
    console.info(f"{server.called} was stopped")


def _recipe(machine: Machine, name: str) -> Recipe:
    folder = command.folder_of(name)
    if folder is None:
        if ":" in name:
            _require_gguf(machine, name)
        return models.named(machine.layout, name)
    if folder.suffix == ".gguf" and folder.is_file():
        _require_gguf(machine, folder.name)
        return recipes.unnamed(str(folder), weights_gib=fit.weights_gib(folder))
    if not folder.is_dir():
        what = "a file: name its folder" if folder.is_file() else "not a folder with a model in it"
        raise ServeError(
            f"{folder} is {what}",
            hint=hints.text("server.recipes"),
        )
    if not os.access(folder, os.R_OK | os.X_OK):
        raise ServeError(
            f"{folder} cannot be read: Permission denied",
            hint=hints.text("core.list_folder", folder=folder),
        )
    _require_no_adapter(folder, str(folder))
    _require_config(folder)
    if lack := models.lack_of(folder):
        raise ServeError(f"{folder} lacks {lack}", hint=hints.text("core.list_file", path=folder))
    return recipes.unnamed(str(folder), weights_gib=fit.weights_gib(folder))


def _require_gguf(machine: Machine, name: str) -> None:
    """Raise ServeError if this vLLM cannot read GGUF: since 0.31 a plugin does."""
    loader = machine.layout.vllm / "vllm" / "model_executor" / "model_loader" / "gguf_loader.py"
    if not loader.is_file() and _GGUF not in machine.packages():
        raise ServeError(
            f"{name} is in GGUF, which this vLLM reads with a plugin that .vllm lacks",
            hint=hints.text("server.install_plugin", name=_GGUF),
        )


def _require_no_adapter_of_hub(settings: Settings, recipe: Recipe) -> None:
    folder = models.cached(models.hub_cache(settings), recipe.model, recipe.revision)
    if folder:
        _require_no_adapter(folder, recipe.model)


def _require_no_adapter(folder: Path, name: str) -> None:
    """Raise ServeError for a LoRA adapter, which is served with its base model."""
    if (folder / flags.CONFIGURATIONS[0]).is_file() or not (folder / flags.ADAPTER).is_file():
        return
    try:
        known = records.load(folder / flags.ADAPTER, dict[str, object]) or {}
    except records.DecodeError:
        known = {}
    base = known.get("base_model_name_or_path")
    raise ServeError(
        f"{name} is a LoRA adapter: it is served with {base or 'its base model'}",
        hint=hints.text("server.adapter", model=base, adapter=f"{Path(name).name}={name}"),
    )


def _require_config(folder: Path) -> None:
    path = next(
        (folder / name for name in flags.CONFIGURATIONS if (folder / name).is_file()),
        folder / flags.CONFIGURATIONS[0],
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


def _require_usable(folder: Path, line: Command) -> None:
    """Check the configuration and the tokenizer, which vLLM reads late. Raises ServeError."""
    if folder.is_file():
        return
    _require_config(folder)
    if any(
        arg.split("=")[0]
        in ("--tokenizer", "--skip-tokenizer-init", "--tokenizer-mode", "--load-format")
        for arg in line.args
    ):
        return
    if not models.holds(folder, flags.TOKENIZERS):
        raise ServeError(f"{folder} has no tokenizer", hint=hints.text("server.tokenizer"))
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        try:
            records.load(path, object)
        except records.DecodeError as exc:
            raise ServeError(
                f"{path} cannot be read: {exc}",
                hint=hints.text("server.read_or_tokenizer", path=path),
            ) from exc


def _device(machine: Machine, console: Console, *, dry_run: bool) -> str:
    try:
        return str(require_built(machine).device)
    except WorkspaceError as exc:
        if not dry_run:
            raise
        console.warn(f"a start would fail now: {exc.message}", hint=exc.hint)
    return str(Case(machine).device)


def _require_room(layout: Layout, line: Command) -> None:
    """Raise ServeError if this clone has a running server or the port is taken."""
    running = find(layout.server)
    if running and running.members():
        raise ServeError(
            f"{running.called} runs already",
            hint=hints.text("server.status_or_stop"),
        )
    observation.require_free(line.address)


def _require_memory(judged: fit.Fit, console: Console, *, is_required: bool) -> None:
    if judged.verdict == "no" and is_required:
        raise ServeError(judged.sentence, hint=hints.text("server.or_force", command=judged.hint))
    if judged.verdict == "yes":
        console.info(judged.sentence)
    else:
        console.warn(judged.sentence, hint=judged.hint)


def _drain_s(line: Command) -> float:
    text = flags.last(line.args, "--shutdown-timeout") or ""
    return float(text) if text.isdigit() else 0.0


def _explained(
    session: _Session, server: Server, error: ServeError, folder: Path | None
) -> ServeError:
    """Return the failure without secrets; if memory was missing, its hint is the next step."""
    settings, options = session.machine.settings, session.options
    ended = how_ended(server)
    reading = failures.read(
        server.log, status=ended.status if ended and not ended.was_requested else None
    )
    hint = error.hint
    if reading.lack:
        # A new machine: neither its memory nor its GPU's is what it was before the start.
        now = Machine(session.machine.layout, settings)
        frees = fit.observe(
            now,
            device=server.facts["device"],
            environment=settings.child_environment("run"),
            args=session.command.args,
        )
        attempt = fit.Attempt(
            options.name, session.recipe, session.command, _length(folder), detach=options.detach
        )
        hint = (fit.next_step(attempt, frees[0], lack=reading.lack) if frees else None) or hint
    details = tuple(settings.masked(text) for text in error.details)
    return ServeError(settings.masked(error.message), hint=hint, details=details)


def _length(folder: Path | None) -> int | None:
    """Return the longest sequence of a model in tokens, None if its configuration has none."""
    try:
        path = folder / "config.json" if folder and folder.is_dir() else None
        known = records.load(path, dict[str, object]) if path else None
    except records.DecodeError:
        return None
    found = known.get("max_position_embeddings") if known else None
    return found if isinstance(found, int) else None
