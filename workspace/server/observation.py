"""What is known of a server that was started, written down whole or not at all: how it is found
again, by whom and whenever, and how it ended.

Numbers of processes count together with the tick at which they were started and the boot of the
machine, so that nobody else's is ever ended.
"""

import contextlib
import http.client
import json
import os
import re
import signal
import ssl
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from workspace.core.errors import ServeError
from workspace.core.files import read_regular, write_atomic
from workspace.server import process_tree

# A first completion may compile kernels.
COMPLETION_TIMEOUT_S = 600.0
ASK_TIMEOUT_S = 5.0
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


@dataclass(frozen=True)
class Address:
    """Where a server listens, as it was told; `is_encrypted` where it has a certificate."""

    host: str
    port: int
    is_encrypted: bool = False

    @property
    def near(self) -> str:
        """The host under which this machine reaches it."""
        return _EVERYWHERE.get(self.host, self.host)

    @property
    def url(self) -> str:
        near = f"[{self.near}]" if ":" in self.near else self.near
        return f"{'https' if self.is_encrypted else 'http'}://{near}:{self.port}"


@dataclass(frozen=True)
class Answer:
    """What came back: an HTTP status, None where nobody answered, the document, and where there is
    none what was said instead.
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
    """Ask once. `key` is what the server was given as VLLM_API_KEY. Raises nothing: no answer is an
    answer.
    """
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
            reply = connection.getresponse()
            said = reply.read().decode("utf-8", errors="replace")
        finally:
            connection.close()
    except (OSError, http.client.HTTPException) as exc:
        return Answer(None, None, str(exc) or type(exc).__name__)
    try:
        return Answer(reply.status, json.loads(said), said)
    except (ValueError, RecursionError):
        return Answer(reply.status, None, said)


def is_healthy(address: Address) -> bool:
    return ask(address, "/health").status == http.client.OK


def served_models(address: Address, *, key: str | None) -> tuple[str, ...]:
    """The names under which the server takes requests; none where it does not say."""
    document = ask(address, "/v1/models", key=key).document
    rows = document.get("data") if isinstance(document, dict) else None
    return (
        tuple(str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row)
        if isinstance(rows, list)
        else ()
    )


def complete_once(address: Address, model: str, *, key: str | None) -> str | None:
    """Have one token completed; return None where that went well, else what was said.

    A server without completions (404), such as one of embeddings, has nothing to complete, which is
    well.
    """
    body = {"model": model, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
    answer = ask(address, "/v1/completions", key=key, body=body, timeout_s=COMPLETION_TIMEOUT_S)
    if answer.status == http.client.NOT_FOUND:
        return None
    choices = answer.document.get("choices") if isinstance(answer.document, dict) else None
    if answer.status == http.client.OK and isinstance(choices, list) and choices:
        return None
    return f"{answer.status or 'no answer'}: {_message(answer)}"


def _connection(address: Address, timeout_s: float) -> http.client.HTTPConnection:
    if not address.is_encrypted:
        return http.client.HTTPConnection(address.near, address.port, timeout=timeout_s)
    # The certificate is the server's own and may name another host; it is this machine that is
    # asked.
    context = ssl._create_unverified_context()
    return http.client.HTTPSConnection(
        address.near, address.port, timeout=timeout_s, context=context
    )


def _message(answer: Answer) -> str:
    error = answer.document.get("error") if isinstance(answer.document, dict) else None
    said = error.get("message") if isinstance(error, dict) else None
    return " ".join(str(said or answer.detail).split())[:300]


@dataclass(frozen=True)
class Server:
    """A server that was started and how it is known again, also by another process on another
    day.
    """

    place: Path
    name: str
    address: Address
    family: process_tree.ProcessTree
    boot: str
    since: str
    grace_s: float
    is_ready: bool = False
    shared: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    # Held by the one who started it; when it closes the server ends. None for everybody else, and
    # for one that was released.
    lifeline: int | None = field(default=None, compare=False)

    @property
    def log(self) -> Path:
        return Path(self.family.log)

    @property
    def called(self) -> str:
        return f"the server {self.name} (process {self.family.keeper}, port {self.address.port})"

    def members(self) -> set[int]:
        """Return the numbers of all of its processes that run, the keeper included."""
        return self.family.members() if self.boot == boot() else set()


@dataclass(frozen=True)
class Ended:
    """How a server ended by itself: the front's status as subprocess counts, negative for a signal;
    `was_told` where somebody ended it.
    """

    status: int
    was_told: bool


def find(place: Path) -> Server | None:
    """Return what is known of the server of a place, None where none was started, or it was
    stopped. It may have ended: see `is_alive`.
    """
    path = state(place)
    try:
        record = json.loads(read_regular(path))
        family = record["family"]
        return Server(
            place=place,
            name=str(record["name"]),
            address=Address(str(record["host"]), int(record["port"]), bool(record["is_encrypted"])),
            family=process_tree.ProcessTree(
                int(family["keeper"]),
                int(family["started"]),
                str(family["mark"]),
                str(family["folder"]),
                str(family["log"]),
            ),
            boot=str(record["boot"]),
            since=str(record["since"]),
            grace_s=float(record["grace_s"]),
            is_ready=bool(record["is_ready"]),
            shared=tuple(str(name) for name in record["shared"]),
            facts={str(name): str(text) for name, text in record["facts"].items()},
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        hint = f"ps -eo pid,sid,args | grep -i vllm    shows what runs; then rm {path}"
        raise ServeError(f"{path} is damaged: what runs is not known", hint=hint) from exc


def is_alive(server: Server) -> bool:
    """Whether the server is under its keeper's eyes. Remains of one whose keeper was killed do not
    count; `stop` ends them.
    """
    reap(server)
    return (
        server.boot == boot()
        and process_tree.started_at(server.family.keeper) == server.family.started
    )


def how_ended(server: Server) -> Ended | None:
    """Return how a server ended, None where that is not known: it lives, or its keeper was
    killed.
    """
    try:
        record = json.loads(read_regular(ending(server.place, server.family.mark)))
        return Ended(int(record["status"]), bool(record["told"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(server: Server) -> None:
    record = {
        **{
            name: getattr(server, name)
            for name in ("name", "boot", "since", "grace_s", "is_ready", "shared")
        },
        **asdict(server.address),
        "family": asdict(server.family),
        "facts": dict(server.facts),
    }
    write_atomic(state(server.place), (json.dumps(record, indent=1) + "\n").encode(), mode=0o600)


def state(place: Path) -> Path:
    return place / "server.json"


def ending(place: Path, mark: str) -> Path:
    return place / f"ended-{mark}.json"


def reap(server: Server) -> None:
    """Wait for the keeper where it is a child of this process, so that it does not count as
    there.
    """
    with contextlib.suppress(ChildProcessError):
        os.waitpid(server.family.keeper, os.WNOHANG)


def boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


Lack = Literal["memory", "cache"]
READ_BYTES = 2 << 20
SHOWN_TAIL_LINES = 15
# "(EngineCore pid=12) ERROR 11-23 20:01:02 [core.py:1] ", colours aside (vllm/logger.py,
# vllm/utils/system_utils.py).
_PREFIX = re.compile(
    r"^(\([A-Za-z_ ]+\S* pid=\d+\)\s?|(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d"
    r" \d\d:\d\d:\d\d\s|\[[^\]]+:\d+\]\s?)+"
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(
    r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b(?::\s*\S.*)?$"
)
_OTHER = re.compile(
    r"\S*\s?(?:serve: )?error: .+|Fatal Python error: .+|(?:Segmentation fault|Illegal"
    r" instruction|Bus error|Aborted)\b.*|terminate called .+"
    r"|.*: (?:No such file|not found|Permission denied).*"
)
# What says that something went wrong elsewhere.
_HOLLOW = re.compile(
    r"Engine core initialization failed|EngineDeadError|EngineCore"
    r" encountered|cancelled|CancelledError|BrokenPipeError|EOFError"
    r"|ConnectionResetError|KeyboardInterrupt|Worker(Proc)? initialization failed|SystemExit"
)
_CACHE = re.compile(
    r"tokens that can be stored in (?:the )?KV cache|KV cache is needed|max seq len .* is larger"
    r" than|maximum model length",
    re.IGNORECASE,
)
_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|MemoryError|NV_ERR_NO_MEMORY|cannot allocate memory|can't"
    r" allocate memory|std::bad_alloc|no available memory for the cache"
    r"|less than desired (?:GPU|CPU) memory utilization|memory utilization or reduce|not enough"
    r" memory|CUBLAS_STATUS_ALLOC_FAILED|CUDA error: memory",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Reading:
    """What a log says. `lack` is `cache` where there was memory and too little of it was left for
    one request of full length.
    """

    first: str | None
    lack: Lack | None
    tail: tuple[str, ...]


def read_failure(log: Path, *, status: int | None) -> Reading:
    """Read the end of a log. `status` is how the front ended, as subprocess counts: SIGKILL is what
    the kernel sends when memory runs out.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - READ_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return judge(lines, status=status)


def judge(lines: list[str], *, status: int | None) -> Reading:
    """Decide. The first exception that is printed is the cause; those after it are what became of
    it in other processes.
    """
    plain = [plainly(line) for line in lines]
    found = [
        number for number, line in enumerate(plain) if _RAISED.match(line) or _OTHER.match(line)
    ]
    telling = [number for number in found if not _HOLLOW.search(plain[number])] or found
    first = _sentence(plain, telling[0]) if telling else None
    text = "\n".join(plain[number] for number in found) + (f"\n{first}" if first else "")
    lack: Lack | None = (
        "cache" if _CACHE.search(text) else "memory" if _MEMORY.search(text) else None
    )
    if lack is None and first is None and status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        lack = "memory"
    return Reading(first, lack, tuple(line for line in plain if line.strip())[-SHOWN_TAIL_LINES:])


def plainly(line: str) -> str:
    """A line of vLLM's log without who said it, when and in which colour."""
    return _PREFIX.sub("", _COLOUR.sub("", line)).rstrip()


def _sentence(plain: list[str], number: int) -> str:
    """The line, and with pydantic's, which only counts the errors, the one that follows."""
    said = plain[number].strip()
    following = next((line.strip() for line in plain[number + 1 : number + 4] if line.strip()), "")
    if re.search(r"ValidationError: \d+ validation error", said) and following:
        detail = next(
            (line.strip() for line in plain[number + 1 : number + 6] if "error, " in line),
            following,
        )
        said = re.sub(r"\s*\[type=\w+, input.*$", "", f"{said.rpartition('.')[2]}: {detail}")
    return said
