"""One start of a server, and vLLM's own load on it: what `nox -s bench -- serve` measures of one start."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from workspace.bench import measure, workload
from workspace.bench.workload import Workload
from workspace.core import process
from workspace.core.errors import ServeError
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.engine import keeper, kin, readiness, server, whereabouts
from workspace.engine.readiness import Address

START_TIMEOUT_S = 1800.0


def measure_start(
    layout: Layout, work: Workload, environment: Mapping[str, str], folder: Path, *, journal: Journal, look: Callable[[str], None]
) -> dict[str, tuple[float, ...]]:
    """Start the server at a free port, put each load on it, stop it, and return all samples.

    Raises ServeError where it does not come up or dies in the middle, WorkspaceError where a load measured nothing.
    """
    address = Address("127.0.0.1", server.free_port())
    argv = (str(layout.environment / "bin" / "vllm"), "serve", work.model, *work.engine, f"--host={address.host}", f"--port={address.port}")

    def on_line(line: str) -> None:
        journal.line(line)
        look(line)

    launch = server.Launch("bench", argv, environment, address)
    found: dict[str, tuple[float, ...]] = {}
    key = environment.get("VLLM_API_KEY")
    with server.running(layout.state / "bench", launch, key=key, timeout_s=START_TIMEOUT_S, on_line=on_line) as (there, _):
        for at in work.concurrencies:
            result = folder / f"{at}.json"
            command = workload.client(layout, work, result, port=address.port, at=at)
            try:
                process.run(
                    command, env={**environment, "OPENAI_API_KEY": key or "none"}, journal=journal, cwd=folder, failure=ServeError, hint="the log says more"
                )
            except ServeError as exc:
                if not readiness.is_healthy(address) and _has_ended(there):
                    raise server.failure(there) from exc
                raise
            found |= measure.taken(work, result, at=at if len(work.concurrencies) > 1 else None)
    return found


def _has_ended(there: whereabouts.Server) -> bool:
    """Wait for what is left of a server that answers no more: only when all of it is gone is it known how it ended."""
    deadline = time.monotonic() + server.GRACE_S + keeper.KILL_GRACE_S
    while there.members():
        if time.monotonic() > deadline:
            return False
        whereabouts.reap(there)
        time.sleep(kin.POLL_S)
    return True
