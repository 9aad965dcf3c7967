"""`serve.status`, `serve.logs`, `serve.stop`: the server that `inv serve` started from this clone,
in this terminal or in another.
"""

import json
import time

from workspace.core.console import Console, State
from workspace.core.errors import ServeError, SettingsError
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine.hardware import GIB
from workspace.server import lifecycle, observation, process_tree, start
from workspace.server.command import tree_oid
from workspace.server.observation import Server, find, is_alive

_STOP = "./scripts/inv serve.stop"
LONGEST_TAIL = 1_000_000


def status(layout: Layout, settings: Settings, *, console: Console, as_json: bool = False) -> None:
    """Print one row: is there a server, does it answer, was it started from what is built now."""
    there = find(layout.server)
    if there is None:
        record: dict[str, object] = {"schema": 1, "state": "none"}
        _print(
            console,
            "missing",
            "no server runs; ./scripts/inv serve.list    names the recipes",
            record,
            as_json=as_json,
        )
        return
    members = there.members()
    word, state, text = _judged(settings, there, members)
    changed = _changed(layout, there) if members else None
    record = {
        "schema": 1,
        "state": word,
        "name": there.name,
        "url": f"{there.address.url}/v1",
        "process": there.family.keeper,
        "since": there.since,
        "memory_gib": round(process_tree.resident_bytes(members) / GIB, 2),
        "log": str(there.log),
        "changed": changed,
    }
    _print(console, state, text, record, as_json=as_json)
    if changed and not as_json:
        console.row(
            "stale",
            "server",
            f"{changed} since it was started; it serves on what it loaded: {_STOP} &&"
            f" {there.facts.get('typed', '')}",
        )


def logs(
    layout: Layout, settings: Settings, *, console: Console, lines: str = "", follow: bool = False
) -> None:
    """Print the log of the server that is there, or was last, secrets masked; with `follow` until
    it ends. Raises ServeError where there is none.
    """
    if lines and not (lines.isdigit() and 0 < int(lines) <= LONGEST_TAIL):
        raise SettingsError(
            f"--lines: {lines!r} is no whole number from 1 to {LONGEST_TAIL}",
            hint="inv serve.logs --lines 100",
        )
    there = find(layout.server)
    kept = sorted((layout.server / "logs").glob("*.log"))
    log = there.log if there else kept[-1] if kept else None
    if log is None or not log.is_file():
        raise ServeError(
            "there is no log: no server was started here",
            hint="./scripts/inv serve.list    names the recipes",
        )
    written = lifecycle.follow(log)
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
        elif there is None or not is_alive(there):
            return
        else:
            time.sleep(start.FOLLOW_S)


def stop(layout: Layout, *, console: Console) -> None:
    """Stop the server with all that it started, and wait until port and memory are free. Nothing to
    do is well, too.
    """
    there = find(layout.server)
    if there is None:
        console.info("no server runs")
    else:
        start.end(there, console=console)


def _judged(settings: Settings, there: Server, members: set[int]) -> tuple[str, State, str]:
    """The state in a word for programs, in one for people, and why."""
    if not members:
        return (
            "ended",
            "FAIL",
            (
                f"{settings.masked(lifecycle.failure(there).message)}; ./scripts/inv serve.logs,"
                f" then {_STOP}"
            ),
        )
    at = (
        f"{there.name} at {there.address.url}/v1, process {there.family.keeper}, since"
        f" {there.since}"
    )
    if not is_alive(there):
        return (
            "remains",
            "FAIL",
            f"{at}: its keeper was killed, {len(members)} processes are left: {_STOP}",
        )
    held = f"{process_tree.resident_bytes(members) / GIB:.1f} GiB in {len(members)} processes"
    if not there.is_ready:
        return (
            "starting",
            "warn",
            f"{at}: it is starting, {held}; ./scripts/inv serve.logs --follow",
        )
    if not observation.is_healthy(there.address):
        return (
            "unhealthy",
            "FAIL",
            f"{at}: /health does not answer, {held}; ./scripts/inv serve.logs",
        )
    names = (
        ", ".join(
            observation.served_models(there.address, key=settings.text("VLLM_API_KEY") or None)
        )
        or "no model that it names without its key"
    )
    return "ready", "ok", f"{at}: serves {names}; {held}"


def _changed(layout: Layout, there: Server) -> str | None:
    if there.facts.get("built") != start.built(layout):
        return "kernels or environment were made anew"
    return (
        "vendor/vllm stands on another tree"
        if there.facts.get("tree") != tree_oid(layout)
        else None
    )


def _print(
    console: Console, state: State, text: str, record: dict[str, object], *, as_json: bool
) -> None:
    if as_json:
        console.data(json.dumps(record, indent=1))
    else:
        console.row(state, "server", text)
