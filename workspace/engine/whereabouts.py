"""What is known of a server that was started, written down whole or not at all: how it is found again, by whom and whenever, and how it ended.

Numbers of processes count together with the tick at which they were started and the boot of the machine, so that nobody else's is ever ended.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from workspace.core.errors import ServeError
from workspace.core.files import read_regular, write_atomic
from workspace.engine import kin
from workspace.engine.readiness import Address


@dataclass(frozen=True)
class Server:
    """A server that was started and how it is known again, also by another process on another day."""

    place: Path
    name: str
    address: Address
    family: kin.Family
    boot: str
    since: str
    grace_s: float
    is_ready: bool = False
    shared: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    # Held by the one who started it; when it closes the server ends. None for everybody else, and for one that was released.
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
    """How a server ended by itself: the front's status as subprocess counts, negative for a signal; `was_told` where somebody ended it."""

    status: int
    was_told: bool


def find(place: Path) -> Server | None:
    """Return what is known of the server of a place, None where none was started, or it was stopped. It may have ended: see `is_alive`."""
    path = state(place)
    try:
        record = json.loads(read_regular(path))
        family = record["family"]
        return Server(
            place=place,
            name=str(record["name"]),
            address=Address(str(record["host"]), int(record["port"]), bool(record["is_encrypted"])),
            family=kin.Family(int(family["keeper"]), int(family["started"]), str(family["mark"]), str(family["folder"]), str(family["log"])),
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
    """Whether the server is under its keeper's eyes. Remains of one whose keeper was killed do not count; `stop` ends them."""
    reap(server)
    return server.boot == boot() and kin.started_at(server.family.keeper) == server.family.started


def how_ended(server: Server) -> Ended | None:
    """Return how a server ended, None where that is not known: it lives, or its keeper was killed."""
    try:
        record = json.loads(read_regular(ending(server.place, server.family.mark)))
        return Ended(int(record["status"]), bool(record["told"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(server: Server) -> None:
    record = {
        **{name: getattr(server, name) for name in ("name", "boot", "since", "grace_s", "is_ready", "shared")},
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
    """Wait for the keeper where it is a child of this process, so that it does not count as there."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(server.family.keeper, os.WNOHANG)


def boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
