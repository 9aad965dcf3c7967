"""`inv serve`: check before the load all that can be wrong, start one server, watch it until it can
generate, then follow its log or leave it alone.
"""

import math
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from workspace.core import hints, lock, records
from workspace.core.console import Console
from workspace.core.errors import ServeError, SourceError, WorkspaceError
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install.status import require_built
from workspace.machine import check, failures, hardware, run_environment
from workspace.machine.machine import Case, Machine
from workspace.server import (
    command,
    fit,
    flags,
    lifecycle,
    models,
    node_link,
    observation,
    process_tree,
    public_recipes,
    recipes,
)
from workspace.server.command import Command
from workspace.server.flags import ServeOptions
from workspace.server.observation import Server, how_ended
from workspace.server.recipes import Recipe

_GGUF = "vllm-gguf-plugin"


@dataclass(frozen=True)
class Session:
    """One call of `inv serve`: its options, and the recipe, command line and device for them."""

    machine: Machine
    console: Console
    options: ServeOptions
    recipe: Recipe
    command: Command
    device: str
    given: Mapping[str, str] = field(default_factory=dict)

    @property
    def place(self) -> Path:
        return observation.place_of(self.machine.layout, self.options.server)


def run(layout: Layout, settings: Settings, options: ServeOptions, *, console: Console) -> None:
    """Serve a recipe, a model on the hub or a folder; with `dry_run` only print the command.

    Raises SettingsError for options that contradict each other, ServeError for a model that cannot
    be served, SmokeError if the build is missing or stale, and the errors of models.fetch_weights.
    """
    session, judged = prepare(layout, settings, options, console=console)
    serve(session, judged)


def serve(session: Session, judged: fit.Fit, *, under: Sequence[str] = ()) -> None:
    """Start what `prepare` has checked and wait for it; `under` is the command line of a program
    that runs the server below it, as that of several nodes does.
    """
    layout, console, options = session.machine.layout, session.console, session.options
    line = session.command
    argv, environment, folder = invocation(session)
    *variables, typed = command.shown(layout, session.machine.settings, argv, environment)
    for text in [*(variables if options.dry_run or console.is_verbose else ()), typed]:
        (console.data if options.dry_run else console.info)(text)
    if not options.dry_run:
        # Memory of a GPU's own is not the machine's, which the supervisor watches.
        is_seen = session.device == "cpu" or judged.free.is_unified
        restarts = process_tree.Restarts(
            int(options.restart or 0), judged.takes_gib * is_seen, hardware.PRESSURE_PERCENT
        )
        launch = lifecycle.Launch(
            options.name,
            (*under, *argv),
            environment,
            line.address,
            facts(session, judged),
            flags.drain_s(line.args) + bool(under) * node_link.END_S,
            restarts,
        )
        _serve(session, launch, folder)


def invocation(session: Session) -> tuple[tuple[str, ...], dict[str, str], Path | None]:
    """Return the command line, its environment and the folder of the model, which is fetched."""
    recipe, line = session.recipe, session.command
    folder = _find_model(session)
    is_a_folder = recipe.origin == "built-in" or recipe.model.startswith("/")
    model = str(folder) if folder and is_a_folder else recipe.model
    if folder:
        _require_usable(folder, line)
    environment = _environment(session, folder)
    return line.argv(session.machine.layout, model), environment, folder


def facts(session: Session, judged: fit.Fit) -> dict[str, str]:
    """Return what the state file keeps of a start."""
    layout, options = session.machine.layout, session.options
    extra = session.command.extra
    return {
        "typed": command.typed(options.name, extra, detach=options.detach, own=options.own),
        "built": observation.built(layout),
        "tree": command.tree_oid(layout),
        "device": session.device,
        "takes_gib": f"{judged.takes_gib:.2f}",
    }


def prepare(
    layout: Layout, settings: Settings, options: ServeOptions, *, console: Console
) -> tuple[Session, fit.Fit]:
    """Check all but the model's files, and return what is to be started, and whether it fits.

    Raises as `run` does.
    """
    observation.place_of(layout, options.server)
    options.check()
    machine = Machine(layout, settings)
    recipe = find_recipe(machine, options.name)
    if recipe.nodes > 1 and not options.nodes:
        raise ServeError(
            f"{options.name} takes {recipe.nodes} nodes",
            hint=hints.text("server.two_nodes", model=options.name),
        )
    recipe = replace(
        recipe,
        flags={**recipe.flags, **options.flags},
        environment={**options.environment, **recipe.environment},
    )
    if place := command.folder_of(options.name):
        # Hints are typed in the root of the clone, wherever this command was typed.
        options = replace(options, name=str(place))
    if options.port:
        extra = command.replaced(options.extra, "--port", options.port)
        options = replace(options, extra=extra, port=None)
    if options.memory and Case(machine).device == "cuda":
        options = _with_share(machine, options)
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
    session = Session(machine, console, options, recipe, line, device)
    if options.memory:
        session = replace(session, given=_cache(session))
    return session, _check(session)


def _with_share(machine: Machine, options: ServeOptions) -> ServeOptions:
    """Return the options with `--memory` as vLLM's flag for a share of the GPU's memory."""
    frees = fit.observe(machine, device="cuda", args=options.extra)
    gib, total = float(options.memory or 0), min((free.total_gib for free in frees), default=0.0)
    if gib > total:
        raise ServeError(
            f"--memory {gib:g}: there are {total:.1f} GiB", hint=hints.text("server.recipes_fit")
        )
    # Rounded down: vLLM refuses a share that is not free.
    share = f"{math.floor(gib / total * 10000) / 10000:g}"
    extra = command.replaced(options.extra, fit.SHARE, share)
    return replace(options, memory=None, extra=extra)


def _cache(session: Session) -> dict[str, str]:
    """Return the size of the cache that `--memory` leaves beside weights and overhead: without a
    GPU the share has no other form (vllm/platforms/cpu.py).
    """
    memory = _sized(session).memory
    fixed = memory.weights_gib + memory.overhead_gib
    cache_gib = math.floor(float(session.options.memory or 0) - fixed)
    if cache_gib < 1:
        raise ServeError(
            f"--memory {session.options.memory}: weights and overhead take {fixed:.1f} GiB, and the"
            " cache at least 1",
            hint=hints.text(
                "server.least_memory", model=session.options.name, gib=math.ceil(fixed) + 1
            ),
        )
    return {"VLLM_CPU_KVCACHE_SPACE": str(cache_gib)}


def _check(session: Session) -> fit.Fit:
    """Print warnings and notes; raise ServeError if there is no room for the server."""
    options, recipe, line = session.options, session.recipe, session.command
    for sentence in (*line.dropped, *line.notes):
        session.console.warn(sentence)
    for note in recipe.notes:
        session.console.sentence(f"note: {note}")
    if not options.dry_run:
        observation.require_room(session.machine.layout, session.place, line.address)
    judged = _judge(session)
    is_required = not (options.dry_run or options.force)
    _require_memory(judged, session.console, is_required=is_required)
    return judged


def _judge(session: Session) -> fit.Fit:
    """Decide whether the model fits beside what the other servers will still take."""
    # The folders of compiled kernels, which `_environment` adds, decide nothing here.
    machine, recipe = session.machine, session.recipe
    environment = run_environment.built_environment(
        machine.layout,
        machine.settings,
        "serve",
        stack=None,
        recipe=recipe.environment,
        given=session.given,
    )
    device, args = session.device, session.command.args
    names = {gpu.name for gpu in machine.gpus} if device == "cuda" else set()
    if len(names) > 1 and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        session.console.warn(
            f"{' and '.join(sorted(names))} differ, and CUDA numbers the fastest first; the fit is"
            " judged in the driver's order",
            hint=hints.text("server.gpu_order"),
        )
    frees = fit.observe(machine, device=device, environment=environment, args=args)
    promised = sum(map(observation.promised_gib, observation.servers(machine.layout)))
    frees = tuple(free.without(promised) for free in frees)
    return fit.judge(_sized(session), frees, device=device, environment=environment, args=args)


def _environment(session: Session, folder: Path | None) -> dict[str, str]:
    """Return the server's environment. Only a start that needs nothing of the hub is kept from
    asking it.
    """
    is_offline = not _missing(session) and folder is not None
    return command.built_environment(
        session.machine,
        "serve",
        recipe=({"HF_HUB_OFFLINE": "1"} if is_offline else {}) | dict(session.recipe.environment),
        given=session.given,
        is_shown=session.options.dry_run,
    )


def _missing(session: Session) -> bool:
    """Return whether a flag names something that is not on this machine, and name each.

    Raises SettingsError if HF_HUB_OFFLINE is set, under which vLLM cannot fetch it.
    """
    settings = session.machine.settings
    missing = [
        reference
        for reference in flags.references(session.command.args, session.recipe.model)
        if "://" not in reference.name and not command.is_here(settings, reference)
    ]
    for reference in missing:
        at = f" at {reference.revision}" if reference.revision else ""
        name = f"{reference.name}{at}, which {reference.flag} names,"
        if settings.switch("HF_HUB_OFFLINE"):
            raise models.offline(settings, name)
        session.console.info(f"{name} is not on this machine: vLLM fetches it during the start")
    return bool(missing)


def _sized(session: Session) -> Recipe:
    """Return the recipe with the weights of what is on this machine: the model's, if the recipe has
    none, and those of drafters and adapters.
    """
    settings, recipe = session.machine.settings, session.recipe
    folders = [
        command.reference_folder(settings, reference)
        for reference in flags.references(session.command.args, recipe.model)
        if reference.needs in ((), (flags.ADAPTER,))
    ]
    if not recipe.memory.weights_gib:
        folders.append(models.found_weights(session.machine, recipe))
    weights = sum(fit.weights_gib(folder) for folder in folders if folder)
    memory = replace(recipe.memory, weights_gib=recipe.memory.weights_gib + weights)
    return replace(recipe, memory=memory)


def _find_model(session: Session) -> Path | None:
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


def _serve(session: Session, launch: lifecycle.Launch, folder: Path | None) -> None:
    layout, settings, console = session.machine.layout, session.machine.settings, session.console
    is_detached = session.options.detach
    if is_detached:
        # As nohup does: the terminal may close while the model loads.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    server: Server | None = None
    is_left = False
    try:
        # The build must not change during the load; afterwards the lock is free again.
        with lock.hold(layout.lock, verb="inv serve", is_shared=True):
            # Two starts at once must see each other's share.
            with lock.hold(layout.state / "server-starts", verb="inv serve", wait=True):
                observation.require_room(layout, session.place, launch.address)
                if (judged := _judge(session)).verdict == "no" and not session.options.force:
                    _require_memory(judged, console, is_required=True)
                server = lifecycle.start(session.place, launch, is_detached=is_detached)
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
            lifecycle.watch(settings, server, console)
    except OSError:
        # A terminal that closed is no reason to end a detached server.
        is_left = is_detached
        raise
    finally:
        if server is not None and not is_left:
            lifecycle.end(server, console=console)


def _wait(session: Session, server: Server, folder: Path | None) -> tuple[Server, lifecycle.Ready]:
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


def find_recipe(machine: Machine, name: str) -> Recipe:
    """Return the recipe that a name, a model on the hub, a file or a folder means."""
    folder = command.folder_of(name)
    if folder is None or public_recipes.is_file(name):
        if folder is None and ":" in name:
            _require_gguf(machine, name)
        return public_recipes.named(machine.layout, name)
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
    recipes.require_no_adapter(folder, str(folder))
    recipes.require_config(folder)
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
        recipes.require_no_adapter(folder, recipe.model)


def _require_usable(folder: Path, line: Command) -> None:
    """Check the configuration and the tokenizer, which vLLM reads late. Raises ServeError."""
    if folder.is_file():
        return
    recipes.require_config(folder)
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


def _require_memory(judged: fit.Fit, console: Console, *, is_required: bool) -> None:
    if judged.verdict == "no" and is_required:
        raise ServeError(judged.sentence, hint=hints.text("server.or_force", command=judged.hint))
    if judged.verdict == "yes":
        console.info(judged.sentence)
    else:
        console.warn(judged.sentence, hint=judged.hint)


def _explained(
    session: Session, server: Server, error: ServeError, folder: Path | None
) -> ServeError:
    """Return the failure without secrets; if memory was missing, its hint is the next step."""
    settings, options = session.machine.settings, session.options
    ended = how_ended(server)
    status, kills = (ended.status, ended.kills) if ended and not ended.was_requested else (None, 0)
    reading = failures.read(server.log, status=status, kills=kills)
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
            options.name,
            session.recipe,
            session.command,
            fit.length_of(folder),
            detach=options.detach,
            own=options.own,
        )
        hint = (fit.next_step(attempt, frees[0], lack=reading.lack) if frees else None) or hint
    details = tuple(settings.masked(text) for text in error.details)
    return ServeError(settings.masked(error.message), hint=hint, details=details)
