"""The short verbs beside `inv serve`: `serve.status`, `serve.logs`, `serve.stop`, the servers of
this clone; `serve.unit`: one for systemd; `serve.list`: the recipes that could run; `inv run`, `inv
shell` and `inv env.export`: the environment of a running vLLM, for a command, for a shell, and as
lines that a shell evaluates.
"""

import datetime
import math
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from workspace.core import hints, process
from workspace.core.child_variables import EXPORTED, exported, with_given
from workspace.core.console import Console, Row, State
from workspace.core.errors import (
    ERRORS,
    ServeError,
    SettingsError,
    ToolchainError,
    WorkspaceError,
    counted,
    printable,
)
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import check, run_environment
from workspace.machine.hardware import GIB
from workspace.machine.machine import Case, Machine
from workspace.server import (
    fit,
    flags,
    lifecycle,
    models,
    observation,
    process_tree,
    public_recipes,
    start,
)
from workspace.server.command import LISTS, built_environment, lines, secret_names, tree_oid
from workspace.server.observation import Server, find, is_alive
from workspace.server.recipes import Recipe

LONGEST_TAIL = 1_000_000
USUAL_SHELL = "/bin/sh"
# Start-up files that read the user's own and then change the prompt.
_START_UP = Path(__file__).with_name("shell")
_FISH_PROMPT = (
    "functions --copy fish_prompt _inv_own_prompt;"
    " function fish_prompt; echo -n '(vllm) '; _inv_own_prompt; end"
)
_STATES: dict[fit.Verdict, State] = {
    "yes": State.OK,
    "after drop-caches": State.WARN,
    "no": State.WARN,
}
_DEVICES = {"cuda": "on the GPU", "cpu": "on the processor"}


def status(layout: Layout, settings: Settings, *, console: Console, as_json: bool = False) -> None:
    """Print for each server: does it run, does it answer, was it started from the present build."""
    found = observation.servers(layout)
    if not found:
        row = Row(State.MISSING, "server", "no server runs", hint=hints.text("server.recipes"))
        record = {"schema": 1, "state": "none", "servers": []}
        _print(console, [row], record, as_json=as_json)
        return
    observed = [_observed(layout, settings, server) for server in found]
    # The keys of the first server stand at the top, too: once there was one server alone.
    record = {"schema": 1, **observed[0][1], "servers": [each for _, each in observed]}
    _print(console, [row for rows, _ in observed for row in rows], record, as_json=as_json)


def _observed(
    layout: Layout, settings: Settings, server: Server
) -> tuple[list[Row], dict[str, object]]:
    """Return the rows of a server, and its record."""
    members = server.members()
    condition, row = _judged(settings, server, members)
    changed = _changed(layout, server) if members else None
    deaths = observation.deaths(server)
    reported = [(death, *lifecycle.cause_of(server, death)) for death in deaths.deaths]
    record: dict[str, object] = {
        "server": server.label,
        "state": condition,
        "name": server.name,
        "url": f"{server.address.url}/v1",
        "process": server.processes.supervisor_pid,
        "since": server.since,
        "memory_gib": round(process_tree.resident_bytes(members) / GIB, 2),
        "log": str(server.log),
        "changed": changed,
        "deaths": [
            {"at": round(death.at), "cause": settings.masked(cause), "hint": hint}
            for death, cause, hint in reported
        ],
        "waits": deaths.waits if members else "",
    }
    rows = [row]
    for death, cause, hint in reported[: len(reported) if members else -1]:
        at = datetime.datetime.fromtimestamp(death.at, datetime.UTC).isoformat(timespec="seconds")
        text = settings.masked(f"it died at {at}: it {cause}")
        rows.append(Row(State.WARN, server.label, text, hint=hint))
    if changed:
        text = f"{changed} since its start; it still runs what it loaded"
        command = server.facts.get("typed")
        hint = (
            hints.text("server.stop_then", command=command)
            if server.label == observation.DEFAULT
            else hints.text("server.stop_of_then", name=server.label, command=command)
        )
        rows.append(Row(State.STALE, server.label, text, hint=hint))
    return rows, record


def logs(
    layout: Layout,
    settings: Settings,
    *,
    console: Console,
    name: str = "",
    lines: str = "",
    follow: bool = False,
) -> None:
    """Print the log of the present or the last server, secrets masked; with `follow` until it ends.

    Raises SettingsError if several run and none is named, ServeError if there is no log.
    """
    if lines and not (lines.isdigit() and 0 < int(lines) <= LONGEST_TAIL):
        raise SettingsError(
            f"--lines: {lines!r} is not a whole number from 1 to {LONGEST_TAIL}",
            hint=hints.text("server.last_lines"),
        )
    server = _named(layout, name, verb="./scripts/inv serve.logs")
    kept = sorted((observation.place_of(layout, name) / "logs").glob("*.log"))
    log = server.log if server else kept[-1] if kept else None
    if log is None or not log.is_file():
        raise ServeError(
            "there is no log: no server was started here",
            hint=hints.text("server.recipes"),
        )
    written = observation.follow(log)
    first = []
    for line in written:
        if line is None:
            break
        first.append(line)
    for line in first[-int(lines) :] if lines else first:
        console.data(settings.masked(line))
    for line in written if follow else ():
        if line is not None:
            console.data(settings.masked(line))
        elif server is None or not is_alive(server):
            return
        else:
            time.sleep(lifecycle.FOLLOW_S)


def stop(layout: Layout, *, console: Console, name: str = "", is_all: bool = False) -> None:
    """Stop all processes of a server, or of all servers, and wait until port and memory are free.

    No server is no error. Raises SettingsError if several run and none is named.
    """
    server = None if is_all else _named(layout, name, verb="./scripts/inv serve.stop")
    found = observation.servers(layout) if is_all else (server,) if server else ()
    if not found:
        console.info("no server runs")
    failed: list[ServeError] = []
    for each in found:
        try:
            lifecycle.end(each, console=console)
        except ServeError as exc:
            failed.append(exc)
    if failed:
        raise failed[0]


def _named(layout: Layout, name: str, *, verb: str) -> Server | None:
    """Return the server of this name; without a name the only one, None if there is none."""
    found = observation.servers(layout)
    labels = ", ".join(server.label for server in found)
    if name:
        place = observation.place_of(layout, name)
        if not place.exists() and name != observation.DEFAULT:
            raise SettingsError(
                f"there is no server {name}" + (f", only {labels}" if found else ""),
                hint=hints.text("inv.serve_status"),
            )
        return find(place)
    if len(found) > 1:
        raise SettingsError(
            f"{len(found)} servers run here: {labels}; name one",
            hint=hints.text("server.which", verb=verb, name=found[0].label),
        )
    return found[0] if found else None


def print_unit(
    layout: Layout, settings: Settings, options: start.ServeOptions, *, console: Console
) -> None:
    """Print a user unit of systemd that runs the server and starts it again.

    The supervisor restarts a server that died, as without systemd: it knows whether the server was
    ready and reads the pressure. systemd restarts what was killed as a whole, and never an `inv
    serve` that gave up by itself (systemd.service(5), RestartSteps since 254).
    """
    session, judged = start.prepare(
        layout, settings, replace(options, dry_run=True), console=console
    )
    options = session.options
    name = options.server or observation.DEFAULT
    argv = [str(layout.root / "scripts" / "inv"), "serve", options.name, *options.own]
    argv += ["--", *options.extra] if options.extra else []
    steps = math.ceil(math.log2(process_tree.LONGEST_PAUSE_S / process_tree.FIRST_PAUSE_S))
    unit = f"vllm-{name}.service"
    for line in (
        f"# ~/.config/systemd/user/{unit}; then: systemctl --user daemon-reload",
        f"# systemctl --user enable --now {unit}; at boot: loginctl enable-linger",
        "[Unit]",
        f"Description=vLLM: {options.name}",
        "StartLimitIntervalSec=1d",
        f"StartLimitBurst={int(options.restart or 0) + 1}",
        "",
        "[Service]",
        "Type=exec",
        f"WorkingDirectory={_escaped(str(layout.root))}",
        f"ExecStart={' '.join(map(_quoted, argv))}",
        "Restart=on-failure",
        f"RestartPreventExitStatus={' '.join(str(error.exit_code) for error in ERRORS)}",
        f"SuccessExitStatus={128 + signal.SIGINT} {128 + signal.SIGTERM}",
        f"RestartSec={process_tree.FIRST_PAUSE_S:g}",
        f"RestartSteps={steps}",
        f"RestartMaxDelaySec={process_tree.LONGEST_PAUSE_S:g}",
        f"MemoryHigh={math.ceil(judged.takes_gib + fit.MARGIN_GIB)}G",
        "OOMScoreAdjust=500",
        "OOMPolicy=continue",
        "KillMode=mixed",
        f"TimeoutStopSec={math.ceil(2 * lifecycle.GRACE_S + flags.drain_s(options.extra)) + 10}",
        "",
        "[Install]",
        "WantedBy=default.target",
    ):
        console.data(line)


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def _quoted(text: str) -> str:
    """Return an argument as a unit has it (systemd.service(5), "Command lines")."""
    plain = text.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return _escaped(plain if re.fullmatch(r"[\w@%+=:,./$-]+", plain) else f'"{plain}"')


def _judged(settings: Settings, server: Server, members: set[int]) -> tuple[str, Row]:
    """Return the condition for programs, and the row for people."""
    label, is_named = server.label, server.label != observation.DEFAULT
    of_name = hints.text("server.of_name", name=label) if is_named else None
    if not members:
        message = settings.masked(lifecycle.failure(server).message)
        hint = of_name or hints.text("server.logs_or_stop")
        return "ended", Row(State.FAIL, label, message, hint=hint)
    at = (
        f"{server.name} at {server.address.url}/v1, process {server.processes.supervisor_pid},"
        f" since {server.since}"
    )
    count = counted(len(members), "process", "processes")
    if not is_alive(server):
        text = f"{at}: its supervisor was killed, and it still has {count}"
        return "remains", Row(State.FAIL, label, text, hint=of_name or hints.text("inv.serve_stop"))
    held = f"{process_tree.resident_bytes(members) / GIB:.1f} GiB in {count}"
    deaths = observation.deaths(server)
    if deaths.waits:
        text = f"{at}: it died and waits: {deaths.waits}"
        return "waiting", Row(State.WARN, label, text, hint=of_name or hints.text("server.follow"))
    is_healthy = server.is_ready and observation.is_healthy(server.address)
    if not server.is_ready or (deaths.deaths and not is_healthy):
        text = f"{at}: it is starting{' again' if deaths.deaths else ''}, {held}"
        return "starting", Row(State.WARN, label, text, hint=of_name or hints.text("server.follow"))
    if not is_healthy:
        text = f"{at}: /health does not answer, {held}"
        return "unhealthy", Row(
            State.FAIL, label, text, hint=of_name or hints.text("inv.serve_logs")
        )
    names = observation.served_models(server.address, key=settings.text("VLLM_API_KEY") or None)
    served = f"serves {', '.join(names)}" if names else "lists no model without its key"
    return "ready", Row(State.OK, label, f"{at}: {served}; {held}")


def _changed(layout: Layout, server: Server) -> str | None:
    if server.facts.get("built") != observation.built(layout):
        return "kernels or environment were built anew"
    if server.facts.get("tree") != tree_oid(layout):
        return "vendor/vllm has another tree"
    return None


def _print(
    console: Console, rows: Sequence[Row], record: dict[str, object], *, as_json: bool
) -> None:
    if as_json:
        console.document(record)
    else:
        console.stdout.rows(rows)


def _row(recipe: Recipe, judged: fit.Fit, folder: Path | None, *, device: str) -> Row:
    """Return the row of a recipe; `folder` holds its weights, None if they are not on disk."""
    if folder:
        place = f"on disk: {folder}"
    elif recipe.fetch_gib:
        place = f"{recipe.fetch_gib:.1f} GiB to fetch"
    elif recipe.origin == "hub":
        place = "to fetch; its memory is not known before that"
    else:
        place = "made at its first start"
    if recipe.asks_for_remote_code:
        place += "; runs code of the model's authors (trust-remote-code)"
    return Row(
        _STATES[judged.verdict],
        recipe.name,
        f"fits {_DEVICES[device]}: {judged.verdict}; needs {judged.needs_gib:.1f} GiB,"
        f" {judged.free.available_gib:.1f} GiB are free; {place}",
        hint=judged.hint if judged.hint and "serve.list" not in judged.hint else None,
    )


def _record(recipe: Recipe, judged: fit.Fit, folder: Path | None) -> dict[str, object]:
    return {
        "name": recipe.name,
        "model": recipe.model,
        "summary": recipe.summary,
        "fits": judged.verdict,
        "needs_gib": round(judged.needs_gib, 2),
        "takes_gib": round(judged.takes_gib, 2),
        "on_disk": str(folder) if folder else None,
        "fetch_gib": recipe.fetch_gib,
        "hint": judged.hint,
    }


def show_recipes(machine: Machine, *, console: Console, as_json: bool = False) -> None:
    """Print the recipes, or their records as JSON. A damaged recipe is a row with its error.

    Public recipes in the same folder count; of their models only files on disk are known.
    """
    layout, settings, device = machine.layout, machine.settings, Case(machine).device
    records: list[dict[str, object]] = []
    rows: list[Row] = []
    for name in public_recipes.names(layout):
        try:
            recipe = public_recipes.named(layout, name)
        except WorkspaceError as exc:
            records.append({"name": name, "error": exc.message})
            rows.append(Row(State.FAIL, name, exc.message))
            continue
        environment = run_environment.built_environment(
            layout, settings, "serve", stack=None, recipe=recipe.environment
        )
        frees = fit.observe(machine, device=device, environment=environment, args=recipe.args)
        folder = models.found_weights(machine, recipe)
        if folder and not recipe.memory.weights_gib:
            known = replace(recipe.memory, weights_gib=fit.weights_gib(folder))
            recipe = replace(recipe, memory=known)
        judged = fit.judge(recipe, frees, device=device, environment=environment)
        rows.append(_row(recipe, judged, folder, device=device))
        records.append(_record(recipe, judged, folder))
    if as_json:
        free = fit.observe(machine, device=device)[0]
        memory = {
            "total_gib": round(free.total_gib, 2),
            "available_gib": round(free.available_gib, 2),
            "droppable_gib": round(free.droppable_gib, 2),
        }
        console.document({"schema": 1, "device": device, "memory": memory, "rows": records})
    else:
        console.stdout.rows(rows)


def run_command(machine: Machine, argv: Sequence[str], *, console: Console) -> None:
    """Replace this process with the command, in the built environment.

    Raises ToolchainError if the program does not exist.
    """
    if not argv:
        raise SettingsError(
            "there is no command to run",
            hint=hints.text("server.run_command"),
        )
    process.become(argv, env=_ready(machine, console))


def open_shell(machine: Machine, *, console: Console) -> None:
    """Replace this process with the user's shell, in the built environment.

    `inv` and `nox` are on PATH, and the prompt of bash, zsh, fish and sh begins with (vllm).
    """
    program = machine.settings.shell.get("SHELL") or USUAL_SHELL
    environment = _ready(machine, console)
    console.sentence(
        f"{program} in the built environment; `exit` leaves it. The shell's own start-up files may"
        " change the environment."
    )
    flags: tuple[str, ...] = ()
    path = os.pathsep.join((str(machine.layout.root / "scripts"), environment["PATH"]))
    given: dict[str, str | None] = {"PATH": path}
    match Path(program).name:
        case "bash":
            flags = ("--rcfile", str(_START_UP / "bashrc"))
        case "zsh":
            given |= {"ZDOTDIR": str(_START_UP)}
            if own := environment.get("ZDOTDIR"):
                given |= {"VLLM_WORKSPACE_ZDOTDIR": own}
        case "fish":
            flags = ("--init-command", _FISH_PROMPT)
        case "sh" | "dash":
            given |= {"PS1": "(vllm) $ "}
    process.become([program, *flags], env=with_given(environment, "shell", given))


def export_variables(machine: Machine, *, console: Console) -> None:
    """Print lines for `eval "$(inv env.export)"` in sh: variables of a running vLLM that this shell
    lacks, and scripts/ on PATH. Secrets are left out.
    """
    shell = machine.settings.shell
    check.require(machine, console=console)
    environment = _marked(machine, built_environment(machine, "shell", is_shown=True))
    for line in lines(machine.layout, environment, shell):
        # A control character is shown escaped, which would be another value.
        if printable(line) == line:
            console.data(line)
    secrets = [name for name in secret_names(environment) if shell.get(name) != environment[name]]
    if secrets:
        console.info(
            f"left out, because they are secret: {', '.join(secrets)}; inv run and inv"
            " shell set them for their programs"
        )


def _ready(machine: Machine, console: Console) -> dict[str, str]:
    if not os.access(machine.layout.environment_python, os.X_OK):
        raise ToolchainError(
            "there is no built environment: .vllm/bin/python is missing",
            hint=hints.text("inv.bootstrap"),
        )
    check.require(machine, console=console)
    return _marked(machine, built_environment(machine, "shell"))


def _marked(machine: Machine, environment: dict[str, str]) -> dict[str, str]:
    """Return the environment with a mark of the values that are not the user's: see EXPORTED."""
    apart = (*LISTS, "VIRTUAL_ENV", *secret_names(environment))
    mark = exported(environment, machine.settings.shell, apart=apart)
    return with_given(environment, "shell", {EXPORTED: mark})
