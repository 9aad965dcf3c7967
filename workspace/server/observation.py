"""State of a started server: its record on disk, its HTTP answers, and its exit status.

A pid counts only together with the tick at which its process was started and with the boot of the
machine, so that no other program is ever ended.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from workspace.core import hints, records
from workspace.core.errors import ServeError, SettingsError
from workspace.core.files import read_regular
from workspace.core.paths import Layout
from workspace.core.records import Document
from workspace.machine import hardware
from workspace.server import process_tree

if TYPE_CHECKING:
    from http.client import HTTPConnection

# A first completion may compile kernels.
COMPLETION_TIMEOUT_S = 600.0
ASK_TIMEOUT_S = 5.0
# Port and memory are free soon after the last process has ended; a driver may need longer.
RETURN_TIMEOUT_S = 10.0
SETTLED_GIB = 0.02
# The server without a name of its own, in layout.server.
DEFAULT = "server"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


@dataclass(frozen=True)
class Address:
    """Address that a server was started with; `is_encrypted` if it has a certificate."""

    host: str
    port: int
    is_encrypted: bool = False

    @property
    def near(self) -> str:
        """Return the host under which this machine reaches the server."""
        return _EVERYWHERE.get(self.host, self.host)

    @property
    def url(self) -> str:
        near = f"[{self.near}]" if ":" in self.near else self.near
        return f"{'https' if self.is_encrypted else 'http'}://{near}:{self.port}"


@dataclass(frozen=True)
class Answer:
    """Answer to one request: the HTTP status, None if there was no answer; the JSON document; and
    the text as it came, or the error.
    """

    status: int | None
    document: object
    detail: str


def ask(
    address: Address,
    path: str,
    *,
    key: str | None = None,
    body: object = None,
    timeout_s: float = ASK_TIMEOUT_S,
) -> Answer:
    """Send one request. `key` is the server's VLLM_API_KEY. Return an error as an Answer, too."""
    from http.client import HTTPException

    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )
    try:
        connection = _connection(address, timeout_s)
        try:
            connection.request(
                "GET" if body is None else "POST",
                path,
                body=None if body is None else json.dumps(body),
                headers=headers,
            )
            response = connection.getresponse()
            text = response.read().decode("utf-8", errors="replace")
        finally:
            connection.close()
    except (OSError, HTTPException) as exc:
        return Answer(None, None, str(exc) or type(exc).__name__)
    try:
        return Answer(response.status, records.parse(text), text)
    except records.DecodeError:
        return Answer(response.status, None, text)


def require_free(address: Address) -> None:
    """Raise ServeError if a program listens at the address or it is not one of this machine's."""
    try:
        bind(address)
    except OSError as exc:
        raise ServeError(
            f"port {address.port} of {address.host or 'this machine'} cannot be used:"
            f" {exc.strerror or exc}",
            hint=_other_port(address.port),
        ) from exc


def _other_port(port: int) -> str:
    other = port + 1 if port < 65535 else 8000
    return hints.text("server.other_port", port=port, other=other)


def bind(address: Address) -> None:
    """Listen at the address as the server will, then close (vllm/entrypoints/launchers/launcher.py,
    create_server_socket).
    """
    kind = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address.host, address.port))
        probe.listen(1)


def is_healthy(address: Address) -> bool:
    """Return whether /health answers with 200."""
    return ask(address, "/health").status == HTTPStatus.OK


def served_models(address: Address, *, key: str | None) -> tuple[str, ...]:
    """Return the names under which the server takes requests; none if it does not answer."""
    document = ask(address, "/v1/models", key=key).document
    rows = document.get("data") if isinstance(document, dict) else None
    return (
        tuple(str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row)
        if isinstance(rows, list)
        else ()
    )


def complete_once(
    address: Address, model: str, *, key: str | None, timeout_s: float = COMPLETION_TIMEOUT_S
) -> str | None:
    """Complete one token. Return None on success, else the status and message of the answer.

    A server without completions (404), such as one of embeddings, counts as a success.
    """
    body = {"model": model, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
    answer = ask(address, "/v1/completions", key=key, body=body, timeout_s=timeout_s)
    if answer.status == HTTPStatus.NOT_FOUND:
        return None
    choices = answer.document.get("choices") if isinstance(answer.document, dict) else None
    if answer.status == HTTPStatus.OK and isinstance(choices, list) and choices:
        return None
    return f"{answer.status or 'no answer'}: {_message(answer)}"


def _connection(address: Address, timeout_s: float) -> "HTTPConnection":
    from http.client import HTTPConnection, HTTPSConnection

    if not address.is_encrypted:
        return HTTPConnection(address.near, address.port, timeout=timeout_s)
    import ssl

    # The certificate may name another host or be self-signed; the request goes to this machine.
    context = ssl._create_unverified_context()
    return HTTPSConnection(address.near, address.port, timeout=timeout_s, context=context)


def _message(answer: Answer) -> str:
    error = answer.document.get("error") if isinstance(answer.document, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return " ".join(str(message or answer.detail).split())[:300]


@dataclass(frozen=True)
class Server(records.Record):
    """A started server with everything by which a later process finds it again."""

    place: Path
    name: str
    address: Address
    processes: process_tree.ProcessTree
    boot: str
    since: str
    grace_s: float
    is_ready: bool = False
    # Only in state files of an older workspace; see process_tree.record_shared.
    shared: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    # Only the process that started the server holds it; when it closes, the server ends. None in
    # every other process, and for a detached server.
    lifeline: int | None = field(default=None, compare=False)

    @classmethod
    def upgrade(cls, document: Document) -> Document:
        # The file has the address among its own keys, and no place. State files written by an
        # older workspace have `keeper` and `mark`.
        tree = document.get("family")
        if isinstance(tree, dict) and "keeper" in tree:
            tree = {**tree, "supervisor_pid": tree["keeper"], "tag": tree.get("mark")}
        return {**document, "place": Path(), "address": document, "processes": tree}

    @property
    def log(self) -> Path:
        return Path(self.processes.log)

    @property
    def called(self) -> str:
        """Return the name of the server in messages."""
        pid, port = self.processes.supervisor_pid, self.address.port
        label = "" if self.label in (DEFAULT, self.name) else f"{self.label}: "
        return f"the server {label}{self.name} (process {pid}, port {port})"

    @property
    def label(self) -> str:
        """Return the name of the server among those of this clone."""
        return self.place.name

    def members(self) -> set[int]:
        """Return the pids of its running processes, the supervisor included."""
        return self.processes.members() if self.boot == hardware.boot_id() else set()


@dataclass(frozen=True)
class Ended(records.Record):
    """End of a server: the front's status as subprocess counts it, negative for a signal;
    `was_requested` if it was stopped from outside; `kills` of the kernel shortly before, because
    memory ran out.
    """

    status: int
    was_requested: bool
    kills: int = 0

    @classmethod
    def upgrade(cls, document: Document) -> Document:
        # The supervisor writes the key of the first edition.
        return {**document, "was_requested": document.get("told")}


@dataclass(frozen=True)
class Death:
    """Death of a server that may be started again: when, with which status, `kills` as in Ended,
    and the part of the log that its run wrote, in bytes.
    """

    at: float
    status: int
    begin: int
    end: int
    kills: int = 0


@dataclass(frozen=True)
class Deaths(records.Record):
    """Deaths of a server so far. `waits` is why it is not started again yet, empty where it is."""

    deaths: tuple[Death, ...] = ()
    waits: str = ""


def place_of(layout: Layout, name: str) -> Path:
    """Return the folder of a server. Raises SettingsError for what cannot be a name."""
    if name in ("", DEFAULT):
        return layout.server
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"{name!r} cannot be the name of a server: at most 31 lower-case letters, digits and -",
            hint=hints.text("server.name"),
        )
    return layout.servers / name


def servers(layout: Layout) -> tuple[Server, ...]:
    """Return the servers of this clone that were started and not stopped, as `find` does."""
    places = (layout.server, *sorted(layout.servers.glob("*")))
    return tuple(server for place in places if (server := find(place)))


def find(place: Path) -> Server | None:
    """Return the server of a place, None if none was started or it was stopped.

    The server may have ended: see `is_alive`. Raises ServeError if its state file is damaged.
    """
    path = state(place)
    try:
        server = records.load(path, Server)
    except records.DecodeError as exc:
        hint = hints.text("server.damaged_state", path=path)
        raise ServeError(f"{path} is damaged: the running server is not known", hint=hint) from exc
    return replace(server, place=place) if server else None


def is_alive(server: Server) -> bool:
    """Return whether the server's supervisor runs.

    Processes that a killed supervisor left do not count; `stop` ends them.
    """
    reap(server)
    return (
        server.boot == hardware.boot_id()
        and process_tree.started_at(server.processes.supervisor_pid) == server.processes.started
    )


def how_ended(server: Server) -> Ended | None:
    """Return how a server ended, None if it runs or if its supervisor was killed."""
    return records.read(ending(server.place, server.processes.tag), Ended)


def deaths(server: Server) -> Deaths:
    """Return the deaths after which the server was started again, and the last one."""
    path = Path(process_tree.restarted(str(ending(server.place, server.processes.tag))))
    return records.read(path, Deaths) or Deaths()


def is_loading(server: Server) -> bool:
    """Return whether a running server has not taken all of its memory yet, or starts again."""
    return not server.is_ready or bool(deaths(server).deaths and not is_healthy(server.address))


def promised_gib(server: Server) -> float:
    """Return the memory that a server will still take: of its planned share what its processes do
    not hold. On a GPU a server holds all of it once it is ready, and no process of ours sees it.
    """
    members = server.members()
    is_complete = server.facts.get("device") == "cuda" and not is_loading(server)
    if not members or is_complete:
        return 0.0
    planned = float(server.facts.get("takes_gib") or 0)
    return max(0.0, planned - process_tree.resident_bytes(members) / hardware.GIB)


def require_room(layout: Layout, place: Path, address: Address) -> None:
    """Raise ServeError if a server runs in this place, or a program or a server of this clone has
    the port; a server that waits for its restart has it, too.
    """
    for server in servers(layout):
        if server.members() and server.place == place:
            raise ServeError(
                f"{server.called} runs already", hint=hints.text("server.status_or_stop")
            )
        if server.members() and server.address.port == address.port:
            raise ServeError(
                f"port {address.port} belongs to {server.called}", hint=_other_port(address.port)
            )
    require_free(address)


def write(server: Server) -> None:
    """Write the state file of a server, atomically."""
    record = {
        **{
            name: getattr(server, name)
            for name in ("name", "boot", "since", "grace_s", "is_ready", "shared")
        },
        **asdict(server.address),
        "family": asdict(server.processes),
        "facts": dict(server.facts),
    }
    records.write(state(server.place), record, mode=0o600)


def state(place: Path) -> Path:
    """Return the path of the state file of a server."""
    return place / "server.json"


def ending(place: Path, tag: str) -> Path:
    """Return the path of the file in which the supervisor records how the server ended."""
    return place / f"ended-{tag}.json"


def reap(server: Server) -> None:
    """Collect the supervisor's status if it is a child of this process and has ended."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(server.processes.supervisor_pid, os.WNOHANG)


def follow(log: Path) -> Iterator[str | None]:
    """Yield the lines of a log as they are written, None each time when there is no new line.

    Of a progress bar, which returns to the begin of its line, the last state is the line.
    """
    rest = ""
    with log.open("rb") as file:
        while True:
            rest += file.read(1 << 16).decode("utf-8", errors="replace")
            *lines, rest = rest.split("\n")
            yield from (line.rstrip("\r").rpartition("\r")[2] for line in lines)
            if not lines:
                yield None


def wait_for_port(address: Address) -> None:
    """Wait until an address is free. Raises ServeError if it stays taken."""
    deadline = time.monotonic() + RETURN_TIMEOUT_S
    while True:
        try:
            return bind(address)
        except OSError as exc:
            if time.monotonic() > deadline:
                raise ServeError(
                    f"all processes of the server have ended, but port {address.port} is taken:"
                    f" {exc.strerror}",
                    hint=hints.text("server.who_listens", port=address.port),
                ) from exc
        time.sleep(process_tree.POLL_S)


def settled(before: float) -> float:
    """Wait until no more memory is freed. Return the freed memory in GiB."""
    deadline = time.monotonic() + RETURN_TIMEOUT_S
    now = available_gib()
    while time.monotonic() < deadline:
        time.sleep(0.1)
        former, now = now, available_gib()
        if now - former < SETTLED_GIB:
            break
    return max(0.0, now - before)


def available_gib() -> float:
    """Return the memory that is available on this machine."""
    return hardware.read_meminfo().get("MemAvailable", 0) * 1024 / hardware.GIB


def built(layout: Layout) -> str:
    """Return one digest of the stamps in `.vllm`, which changes with every new build."""
    digest = hashlib.sha256()
    for name in ("environment", "vllm"):
        try:
            digest.update(read_regular(layout.stamp(name)))
        except OSError:
            digest.update(b"none")
    return digest.hexdigest()
