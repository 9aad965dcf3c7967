"""`inv serve`: everything that can be found wrong before a load is, then one server is started,
watched until it can generate, and followed or left alone.
"""

import hashlib
import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from workspace.core import lock
from workspace.core.console import Console
from workspace.core.errors import ServeError, SmokeError, WorkspaceError
from workspace.core.files import read_regular
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install.status import require_built
from workspace.machine import check
from workspace.machine.case import Case
from workspace.machine.hardware import GIB
from workspace.server import command, fit, flags, lifecycle, models, observation, recipes
from workspace.server.command import Command
from workspace.server.observation import Server, find, how_ended, is_alive
from workspace.server.recipes import Recipe

# What every server is told unless the user says otherwise; with the model on this machine also that
# no hub is asked.
USUAL = {"VLLM_NO_USAGE_STATS": "1"}
# Of one that has at least one of these a tokenizer can be made.
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "*.tiktoken",
)
FOLLOW_S = 0.3


@dataclass(frozen=True)
class ServeOptions:
    """What was typed. `knows`: the user knows that a server is open to others, or that memory may
    not suffice.
    """

    name: str
    extra: tuple[str, ...] = ()
    dry_run: bool = False
    detach: bool = False
    force: bool = False


def run(layout: Layout, settings: Settings, options: ServeOptions, *, console: Console) -> None:
    """Serve a recipe, a model on the hub or a folder; with `dry_run` print the command and start
    nothing.

    Raises SettingsError for what cannot be meant, ServeError for what cannot be served, SmokeError
    where what is built is missing or stale; and whatever fetching the model raises.
    """
    recipe = _recipe(layout, options.name)
    key = settings.text("VLLM_API_KEY") or None
    line = command.compose(
        recipe, options.extra, flags.known(layout), has_key=bool(key), force=options.force
    )
    check.require(layout, settings, console=console, recipe=recipe.environment)
    device = _device(layout, settings, console, dry_run=options.dry_run)
    for sentence in (*line.dropped, *line.notes):
        console.warn(sentence)
    for note in recipe.notes:
        console.info(f"note: {note}")
    if not options.dry_run:
        _require_room(layout, line)
    free = fit.observe(settings, device=device)
    environment = command.built_environment(
        layout, settings, recipe=USUAL | dict(recipe.environment), for_what="show"
    )
    _judge_memory(
        fit.judge(recipe, free, device=device, environment=environment, words=line.words),
        console,
        is_bound=not (options.dry_run or options.force),
    )
    there = models.found_weights(layout, settings, recipe)
    if there is None and options.dry_run:
        console.info(
            f"{recipe.model} is not on this machine; "
            + (
                "its folder is made at the first start"
                if recipe.origin == "built-in"
                else "inv serve fetches it"
            )
        )
    elif there is None:
        models.fetch_weights(layout, settings, recipe, console=console)
        there = models.found_weights(layout, settings, recipe)
    model = (
        str(there)
        if there and (recipe.origin == "built-in" or recipe.model.startswith("/"))
        else recipe.model
    )
    if there:
        _require_usable(there, line)
    more = USUAL | ({"HF_HUB_OFFLINE": "1"} if there else {}) | dict(recipe.environment)
    environment = command.built_environment(
        layout, settings, recipe=more, for_what="show" if options.dry_run else "start"
    )
    argv = line.argv(layout, model)
    for text in command.shown(layout, settings, argv, environment):
        (console.data if options.dry_run else console.info)(text)
    if not options.dry_run:
        facts = {
            "typed": command.typed(options.name, line.extra),
            "built": built(layout),
            "tree": command.tree_oid(layout),
            "device": device,
        }
        launch = lifecycle.Launch(
            options.name, argv, environment, line.address, facts, grace_s=_drain(line)
        )
        _serve(
            layout, settings, options, recipe, line, launch, key=key, console=console, there=there
        )


def built(layout: Layout) -> str:
    """One digest of the stamps of what stands in `.vllm`: with another one a server that runs was
    started from something else.
    """
    digest = hashlib.sha256()
    for name in ("environment", "vllm"):
        try:
            digest.update(read_regular(layout.stamp(name)))
        except OSError:
            digest.update(b"none")
    return digest.hexdigest()


def _serve(
    layout: Layout,
    settings: Settings,
    options: ServeOptions,
    recipe: Recipe,
    line: Command,
    launch: lifecycle.Launch,
    *,
    key: str | None,
    console: Console,
    there: Path | None,
) -> None:
    if options.detach:
        # As nohup does: the terminal may go while the model loads.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    one: Server | None = None
    is_left = False
    try:
        # What is loaded must not change meanwhile; afterwards nothing is held.
        with lock.hold(layout.lock, verb="inv serve"):
            one = lifecycle.start(layout.server, launch, is_detached=options.detach)
            console.info(f"log: {layout.relative(one.log)}")
            with console.step("start") as view:
                hear = lambda text: view.line(settings.masked(observation.plainly(text)))  # noqa: E731
                try:
                    one, ready = lifecycle.wait_until_ready(one, key=key, on_line=hear)
                except ServeError as exc:
                    raise _explained(settings, options, recipe, line, one, exc, there) from exc
                view.reason = f"{', '.join(ready.models)} completes"
        console.info(f"ready: {one.address.url}/v1 serves {', '.join(ready.models)}")
        if options.detach:
            is_left = True
            console.info("it runs on by itself: ./scripts/inv serve.status, serve.logs, serve.stop")
        else:
            console.info("^C stops it")
            _follow(settings, one, console)
    except OSError:
        # A terminal that went away is no reason to end what was to outlive it.
        is_left = options.detach
        raise
    finally:
        if one is not None and not is_left:
            end(one, console=console)


def end(one: Server, *, console: Console) -> None:
    """Stop a server and say what came back; one more ^C kills it."""
    if find(one.place) is None and not one.members():
        return
    console.info(f"stopping {one.called}")
    try:
        stopped = lifecycle.stop(one)
    except KeyboardInterrupt:
        stopped = lifecycle.stop(one, at_once=True)
    how = "killed, since it did not end by itself" if stopped.was_killed else "ended"
    console.info(
        f"{how} in {stopped.seconds:.1f} s; port {one.address.port} is free,"
        f" {stopped.returned_gib:.1f} GiB of memory came back"
    )


def _follow(settings: Settings, one: Server, console: Console) -> None:
    """Show the log until the server ends: quietly where it was told to, else with the reason."""
    lines = lifecycle.follow(one.log)
    # What was written until now has been shown beside the spinner.
    for line in lines:
        if line is None:
            break
    for line in lines:
        if line is not None:
            console.info(settings.masked(line))
        elif is_alive(one):
            time.sleep(FOLLOW_S)
        else:
            break
    ended = how_ended(one)
    if ended is None or not ended.was_told:
        raise lifecycle.failure(one)
    console.info(f"{one.called} was stopped")


def _recipe(layout: Layout, name: str) -> Recipe:
    folder = command.folder_of(name)
    if folder is None:
        return models.named(layout, name)
    if not folder.is_dir():
        raise ServeError(
            f"{folder} is no folder with a model in it",
            hint="./scripts/inv serve.list    names the recipes",
        )
    try:
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / GIB
    except OSError as exc:
        raise ServeError(
            f"{folder} cannot be read: {exc.strerror}", hint=f"ls -ld {folder}"
        ) from exc
    _require_config(folder)
    if not models.is_complete(folder):
        raise ServeError(f"{folder} has not all of its weights", hint=f"ls -l {folder}")
    return recipes.unnamed(str(folder), weights_gib=size)


def _require_config(folder: Path) -> None:
    path = folder / "config.json"
    try:
        known = json.loads(read_regular(path))
    except FileNotFoundError:
        raise ServeError(
            f"{folder} has no config.json, so it is no model in Hugging Face's layout",
            hint=f"ls {folder}",
        ) from None
    except (OSError, ValueError, RecursionError) as exc:
        raise ServeError(f"{path} cannot be read: {exc}", hint=f"less {path}") from exc
    if not isinstance(known, dict):
        raise ServeError(f"{path} is no table of settings", hint=f"less {path}")


def _require_usable(folder: Path, line: Command) -> None:
    """Look at what vLLM reads only after minutes: the configuration and the tokenizer."""
    _require_config(folder)
    if any(
        word.split("=")[0]
        in ("--tokenizer", "--skip-tokenizer-init", "--tokenizer-mode", "--load-format")
        for word in line.words
    ):
        return
    if not any(path.is_file() for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        raise ServeError(
            f"{folder} has no tokenizer", hint="-- --tokenizer NAME takes another model's"
        )
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        try:
            json.loads(read_regular(path))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as exc:
            raise ServeError(
                f"{path} cannot be read: {exc}",
                hint=f"less {path}; or -- --tokenizer NAME takes another model's",
            ) from exc


def _device(layout: Layout, settings: Settings, console: Console, *, dry_run: bool) -> str:
    try:
        return str(require_built(layout, settings).device)
    except (SmokeError, WorkspaceError) as exc:
        if not dry_run:
            raise
        console.warn(f"it could not be started now: {exc.message}; {exc.hint}")
    return str(Case(layout, settings, device=None, kernels=settings.text("KERNELS")).device)


def _require_room(layout: Layout, line: Command) -> None:
    """One server a clone, and one program a port: said before anything is fetched."""
    there = find(layout.server)
    if there and there.members():
        raise ServeError(
            f"{there.called} is there already",
            hint="./scripts/inv serve.status, or ./scripts/inv serve.stop",
        )
    lifecycle.require_free(line.address)


def _judge_memory(judged: fit.Fit, console: Console, *, is_bound: bool) -> None:
    if judged.verdict == "no" and is_bound:
        raise ServeError(judged.sentence, hint=f"{judged.hint}; or --force")
    if judged.verdict == "yes":
        console.info(judged.sentence)
    else:
        console.warn(f"{judged.sentence}; {judged.hint}")


def _drain(line: Command) -> float:
    said = flags.last(line.words, "--shutdown-timeout") or ""
    return float(said) if said.isdigit() else 0.0


def _explained(
    settings: Settings,
    options: ServeOptions,
    recipe: Recipe,
    line: Command,
    one: Server,
    error: ServeError,
    there: Path | None,
) -> ServeError:
    """The failure with the next rung in its hint, where it was for want of memory."""
    ended = how_ended(one)
    reading = observation.read_failure(
        one.log, status=ended.status if ended and not ended.was_told else None
    )
    hint = error.hint
    if reading.lack:
        free = fit.observe(settings, device=one.facts["device"])
        hint = (
            fit.next_step(
                options.name,
                recipe,
                line,
                free,
                lack=reading.lack,
                length=_length(there),
                detach=options.detach,
            )
            or hint
        )
    details = tuple(settings.masked(text) for text in error.details)
    return ServeError(settings.masked(error.message), hint=hint, details=details)


def _length(folder: Path | None) -> int | None:
    try:
        known = json.loads(read_regular(folder / "config.json")) if folder else {}
        found = known.get("max_position_embeddings")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, int) else None
