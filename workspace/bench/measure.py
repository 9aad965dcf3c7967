"""The run of a benchmark: one start of the process after the other, each written down as soon as it
is measured, so that an interrupted run goes on.
"""

import contextlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from workspace.bench import compare, conditions, metrics, results, subject
from workspace.bench.compare import MIN_STARTS
from workspace.bench.results import Kind, Record, Start
from workspace.bench.subject import Workload
from workspace.core import lock, process
from workspace.core.console import Console
from workspace.core.errors import ServeError, SettingsError, WorkspaceError
from workspace.core.files import read_regular
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.server import lifecycle, observation, process_tree, supervisor
from workspace.server.command import built_environment
from workspace.server.observation import Address

START_TIMEOUT_S = 1800.0


def measure_start(
    layout: Layout,
    work: Workload,
    environment: Mapping[str, str],
    folder: Path,
    *,
    run_log: RunLog,
    look: Callable[[str], None],
) -> dict[str, tuple[float, ...]]:
    """Start the server at a free port, put each load on it, stop it, and return all samples.

    Raises ServeError where it does not come up or dies in the middle, WorkspaceError where a load
    measured nothing.
    """
    address = Address("127.0.0.1", lifecycle.free_port())
    argv = (
        str(layout.environment / "bin" / "vllm"),
        "serve",
        work.model,
        *work.engine,
        f"--host={address.host}",
        f"--port={address.port}",
    )

    def on_line(line: str) -> None:
        run_log.line(line)
        look(line)

    launch = lifecycle.Launch("bench", argv, environment, address)
    found: dict[str, tuple[float, ...]] = {}
    key = environment.get("VLLM_API_KEY")
    with lifecycle.running(
        layout.state / "bench", launch, key=key, timeout_s=START_TIMEOUT_S, on_line=on_line
    ) as (there, _):
        for at in work.concurrencies:
            result = folder / f"{at}.json"
            command = subject.client(layout, work, result, port=address.port, at=at)
            try:
                process.run(
                    command,
                    env={**environment, "OPENAI_API_KEY": key or "none"},
                    run_log=run_log,
                    cwd=folder,
                    failure=ServeError,
                    hint="the log says more",
                )
            except ServeError as exc:
                if not observation.is_healthy(address) and _has_ended(there):
                    raise lifecycle.failure(there) from exc
                raise
            found |= taken(work, result, at=at if len(work.concurrencies) > 1 else None)
    return found


def _has_ended(there: observation.Server) -> bool:
    """Wait for what is left of a server that answers no more: only when all of it is gone is it
    known how it ended.
    """
    deadline = time.monotonic() + lifecycle.GRACE_S + supervisor.KILL_GRACE_S
    while there.members():
        if time.monotonic() > deadline:
            return False
        observation.reap(there)
        time.sleep(process_tree.POLL_S)
    return True


# What vLLM's log says of the code that computes, whatever was asked for: `… [cpu.py:123] Using
# Torch SDPA backend.`
_BACKEND = re.compile(
    r"\] (Using [^\n]{0,160}?\b(?:backends?|kernels?|attention)\b[^\n]{0,80}?)\.?$", re.IGNORECASE
)
# Paths, addresses of objects and digests are of one start only.
_PASSING = re.compile(r"[0-9a-f]{12,}|/\S+")


@dataclass(frozen=True)
class BenchOptions:
    """What the command line said. `words` are for vLLM."""

    kind: Kind = "latency"
    model: str = subject.TINY
    label: str | None = None
    repeat: int = MIN_STARTS
    has_sweep: bool = False
    words: tuple[str, ...] = ()


def run(layout: Layout, settings: Settings, options: BenchOptions, *, console: Console) -> Path:
    """Measure until `asked.repeat` starts are in the record, and return its path.

    Raises SmokeError where nothing fresh is built, SettingsError for a record that is complete or
    of something else, WorkspaceError where vLLM fails.
    """
    from workspace.install.status import require_built
    from workspace.machine import check

    observed = require_built(layout, settings)
    check.require(layout, settings, console=console, device=observed.device)
    # What is measured must not change meanwhile.
    with (
        lock.hold(layout.lock, verb="nox -s bench") as held,
        RunLog(console, layout.logs, verb="bench", secrets=settings.secrets, held=held) as run_log,
    ):
        run_log.phase("model")
        work = subject.prepare(
            layout,
            settings,
            options.kind,
            options.model,
            options.words,
            has_sweep=options.has_sweep,
            run_log=run_log,
        )
        environment = built_environment(layout, settings, recipe=work.recipe, more=work.more)
        label = options.label or f"{options.kind}{'-sweep' if options.has_sweep else ''}"
        fresh = subject.describe(
            layout,
            settings,
            observed,
            work,
            label=label,
            repeat=options.repeat,
            environment=environment,
        )
        path = results.record_path(layout, fresh)
        so_far = _begun(layout, path, fresh)
        if so_far.starts:
            console.info(
                f"{layout.relative(path)} has {len(so_far.starts)} starts; going on from there"
            )
        with _kept(layout, path, console):
            _measure(layout, settings, work, environment, so_far, path=path, run_log=run_log)
    console.data(str(path))
    return path


def _begun(layout: Layout, path: Path, fresh: Record) -> Record:
    """Return the record to go on from: the one that is there where it is of the same, else the
    fresh one.
    """
    try:
        there = results.read(path, place=layout.relative(path)) if path.exists() else None
    except SettingsError:
        if not path.is_file():
            raise
        raise SettingsError(
            f"{layout.relative(path)} is damaged, and nothing is written over it",
            hint=f"mv {path} {path}.damaged, or --label another",
        ) from None
    if there is None:
        return fresh
    differing = [name for name in compare.differences(there, fresh) if name != "backends"]
    differing += [
        name
        for name, a, b in (
            ("edits", there.source.dirty, fresh.source.dirty),
            ("kernels", there.source.libraries, fresh.source.libraries),
        )
        if a != b
    ]
    if differing:
        raise SettingsError(
            f"{layout.relative(path)} was measured otherwise: {', '.join(differing)}",
            hint="--label another",
        )
    if len(there.starts) >= fresh.repeat:
        hint = f"--repeat {len(there.starts) + MIN_STARTS} adds to it, --label another begins anew"
        raise SettingsError(
            f"{layout.relative(path)} has its {len(there.starts)} starts already", hint=hint
        )
    return replace(there, repeat=fresh.repeat)


@contextlib.contextmanager
def _kept(layout: Layout, path: Path, console: Console) -> Iterator[None]:
    """Say, however the run ends, what is there to go on from."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(WorkspaceError, OSError):
            there = results.read(path, place=layout.relative(path))
            console.info(
                f"{layout.relative(path)} keeps {len(there.starts)} of {there.repeat} starts; the"
                " same command goes on from there"
            )
        raise


def _measure(
    layout: Layout,
    settings: Settings,
    work: Workload,
    environment: Mapping[str, str],
    so_far: Record,
    *,
    path: Path,
    run_log: RunLog,
) -> None:
    took: list[float] = []
    for number in range(len(so_far.starts) + 1, so_far.repeat + 1):
        name = f"start {number}/{so_far.repeat}"
        with run_log.console.step(name) as view:
            run_log.phase(name, view)
            start, backends = once(
                layout,
                settings,
                work,
                environment,
                has_gpu=bool(so_far.machine.gpus),
                run_log=run_log,
            )
            so_far = replace(
                so_far,
                starts=(*so_far.starts, start),
                backends=tuple(sorted({*so_far.backends, *backends})),
            )
            results.write(path, so_far)
            took.append(start.seconds)
            left = (so_far.repeat - number) * sum(took) / len(took)
            only = replace(so_far, starts=(start,))
            view.reason = "  ".join(
                results.measured_text(only, metric) for metric in only.metrics[:1]
            ) + (f"  about {left / 60:.1f} min left" if left else "")


def once(
    layout: Layout,
    settings: Settings,
    work: Workload,
    environment: Mapping[str, str],
    *,
    has_gpu: bool,
    run_log: RunLog,
    watch: Callable[[], None] = lambda: None,
) -> tuple[Start, tuple[str, ...]]:
    """Start the process once, and return what it measured and which backends its log names. `watch`
    is called at each line of its log.

    Raises ServeError, or WorkspaceError for a benchmark without a server, where it fails or
    measures nothing.
    """
    seen: set[str] = set()

    def look(line: str) -> None:
        watch()
        if found := _BACKEND.search(line):
            seen.add(_PASSING.sub("…", found[1]))

    before, at, began = (
        conditions.observe(settings, has_gpu=has_gpu),
        subject.subject_now(),
        time.monotonic(),
    )
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as neutral:
        if work.kind == "serve":
            samples = measure_start(
                layout, work, environment, Path(neutral), run_log=run_log, look=look
            )
        else:
            result = Path(neutral) / "result.json"
            hint = "the log says more; words after -- go to vllm bench"
            process.run(
                subject.command(layout, work, result),
                env=environment,
                run_log=run_log,
                cwd=Path(neutral),
                on_line=look,
                failure=WorkspaceError,
                hint=hint,
            )
            samples = taken(work, result)
    seconds = round(time.monotonic() - began, 2)
    return Start(
        at, seconds, before, conditions.observe(settings, has_gpu=has_gpu), samples
    ), tuple(seen)


def taken(work: Workload, result: Path, *, at: int | None = None) -> dict[str, tuple[float, ...]]:
    """Read the samples of a result file. Raises WorkspaceError where there are none."""
    try:
        document = json.loads(read_regular(result))
        return metrics.samples(work.kind, document if isinstance(document, dict) else {}, at=at)
    except (OSError, ValueError, RecursionError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else exc
        raise WorkspaceError(
            f"vllm bench {work.kind} measured nothing: {why}",
            hint="the newest log in .workspace/logs says what it did",
        ) from exc
