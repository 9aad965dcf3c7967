"""The run of `nox -s bench`: start the measured process again and again, and record each start with
its conditions: load, clocks, why a GPU's driver limits them; and the idle check before a start.

The record is written after each start, so that the same command resumes an interrupted run.
"""

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from workspace.bench import compare, results, subject
from workspace.bench.compare import MIN_STARTS
from workspace.bench.results import Clocks, Conditions, Record, Start
from workspace.bench.subject import Benchmark, Workload, WorkloadOptions
from workspace.core import hints, lock, process, records
from workspace.core.child_variables import with_given
from workspace.core.console import Console, Row, RunLog, State
from workspace.core.errors import ServeError, SettingsError, WorkspaceError, counted
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import failures
from workspace.machine.doctor_toolchain import is_vllm
from workspace.machine.gpu import Driver, Sensors
from workspace.machine.machine import Machine, running_programs
from workspace.server import lifecycle, observation, process_tree
from workspace.server.observation import Address

START_TIMEOUT_S = 1800.0
# The line of vLLM's log that names the code that computes, whatever was requested:
# `… [cpu.py:123] Using Torch SDPA backend.`
_BACKEND = re.compile(
    r"\] (Using [^\n]{0,160}?\b(?:backends?|kernels?|attention)\b[^\n]{0,80}?)\.?$", re.IGNORECASE
)
# Paths, addresses of objects and digests change with each start.
_PASSING = re.compile(r"[0-9a-f]{12,}|/\S+")
# The reasons why the driver limits the clocks (nvml.h, nvmlClocksEventReason*). An idle GPU and
# clocks that the user set are left out: they are no fault.
_BITS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software heat limit",
    0x40: "hardware heat limit",
    0x80: "power brake",
}
LOOK_S = 1.0
# Long enough to notice a loaded core before each start.
GLANCE_S = 0.2
# After this time the processes of a build or of the last start are gone.
WAIT_S = 30.0
# The load of other programs, in cores, that a measurement tolerates: 0.2 of two cores, one of the
# twenty cores of a Spark.
LEAST_CORES, MOST_SHARE = 0.2, 0.05
SHOWN = 3


@dataclass(frozen=True)
class BenchOptions:
    """The options of `nox -s bench`."""

    workload: WorkloadOptions
    label: str
    repeat: int


def run(layout: Layout, settings: Settings, options: BenchOptions, *, console: Console) -> Path:
    """Measure until the record has `options.repeat` starts, and return its path.

    Raises SmokeError where there is no fresh build, SettingsError for a record that is complete or
    was measured with other settings, WorkspaceError where vLLM fails.
    """
    from workspace.install.status import require_built
    from workspace.machine import check

    observed = require_built(Machine(layout, settings))
    check.require(observed.machine, console=console, device=observed.device)
    # The lock keeps the tree unchanged while it is measured.
    with (
        lock.hold(layout.lock, verb="nox -s bench") as held,
        RunLog(console, layout.logs, verb="bench", secrets=settings.secrets, held=held) as run_log,
    ):
        run_log.phase("model")
        benchmark = subject.prepare(observed.machine, options.workload, run_log=run_log)
        fresh = subject.describe(benchmark, observed, label=options.label, repeat=options.repeat)
        path = results.record_path(layout, fresh)
        so_far = _record_to_resume(layout, path, fresh, options.workload)
        if so_far.starts:
            console.info(f"{layout.relative(path)} has {len(so_far.starts)} starts; resuming")
        with kept_reported(console, lambda: _kept(layout, path)):
            done, loads = _measure(benchmark, so_far, path=path, run_log=run_log)
    console.data(str(path))
    _show_result(layout, options, done, loads, console=console)
    return path


def _show_result(
    layout: Layout, options: BenchOptions, done: Record, loads: Sequence[str], *, console: Console
) -> None:
    """Print median and spread of the metrics, a warning if others used the machine, and the next
    command. `loads` has what used the machine before each start of this run, empty if it was idle.
    """
    console.rows(_result_row(done, name) for name in done.shown_metrics)
    if len(done.shown_metrics) < len(done.metrics):
        console.info("only the highest load is shown; ./scripts/inv bench.report plots the others")
    if others := [text for text in loads if text]:
        console.warn(
            f"other programs used this machine before {len(others)} of"
            f" {counted(len(loads), 'start')}, at last: {others[-1]}"
        )
    count = len(done.starts)
    if count < MIN_STARTS or any(map(done.is_noisy, done.shown_metrics)):
        needed = MIN_STARTS if count < MIN_STARTS else count + MIN_STARTS
        arguments = subject.arguments(options.workload, done.label, needed)
        console.hint(hints.text("bench.add_starts", kind=done.kind, arguments=arguments))
    elif first := compare.newest_like(layout, done, differing=()):
        a, b = (compare.shortest_name(layout, record) for record in (first, done))
        console.hint(hints.text("bench.compare_these", first=a, second=b))
    else:
        label = "after" if done.label != "after" else "changed"
        arguments = subject.arguments(options.workload, label, count)
        console.hint(hints.text("bench.after_change", kind=done.kind, arguments=arguments))


def _result_row(done: Record, name: str) -> Row:
    values = done.values(name)
    text = (
        f"median {results.value_text(done, name)},"
        f" {min(values):.4g} to {max(values):.4g} in {counted(len(values), 'start')}"
    )
    return Row(State.WARN if done.is_noisy(name) else State.OK, name, text)


def _record_to_resume(
    layout: Layout, path: Path, fresh: Record, options: WorkloadOptions
) -> Record:
    """Return the existing record of the same benchmark, or the fresh one.

    Raises SettingsError for a record that is damaged, complete, or measured with other settings.
    """
    shown = layout.relative(path)
    another = hints.text(
        "bench.label_another", kind=fresh.kind, arguments=subject.arguments(options, "another")
    )
    try:
        existing = results.read(path, place=shown) if path.exists() else None
    except SettingsError:
        if not path.is_file():
            raise
        raise SettingsError(f"{shown} is damaged, and is not overwritten", hint=another) from None
    if existing is None:
        return fresh
    differing = [name for name in compare.differences(existing, fresh) if name != "backends"]
    differing += [
        name
        for name, a, b in (
            ("edits", existing.source.dirty, fresh.source.dirty),
            ("kernels", existing.source.libraries, fresh.source.libraries),
        )
        if a != b
    ]
    if differing:
        raise SettingsError(f"{shown} was measured with other {', '.join(differing)}", hint=another)
    count = len(existing.starts)
    if count >= fresh.repeat:
        arguments = subject.arguments(options, fresh.label, count + MIN_STARTS)
        hint = hints.text("bench.repeat_or_label", kind=fresh.kind, arguments=arguments)
        raise SettingsError(f"{shown} already has its {counted(count, 'start')}", hint=hint)
    return replace(existing, repeat=fresh.repeat)


@contextlib.contextmanager
def kept_reported(console: Console, kept: Callable[[], str]) -> Iterator[None]:
    """Report what is kept if the block ends early; `kept` returns nothing where nothing is."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(WorkspaceError, OSError):
            if text := kept():
                console.info(f"{text}; run the same command again to resume")
        raise


def _kept(layout: Layout, path: Path) -> str:
    found, shown = results.read(path, place=layout.relative(path)), layout.relative(path)
    return f"{shown} keeps {len(found.starts)} of {found.repeat} starts"


def _measure(
    benchmark: Benchmark, so_far: Record, *, path: Path, run_log: RunLog
) -> tuple[Record, list[str]]:
    """Measure the starts that are left. Return the record, and what used the machine before each
    of these starts.
    """
    took: list[float] = []
    loads: list[str] = []
    has_gpu = bool(so_far.machine.gpus)
    # Which backends compute is known after a start.
    former = compare.newest_like(benchmark.layout, so_far, differing=("backends",))
    last = [start.seconds for record in (former, so_far) if record for start in record.starts]
    for count in range(len(so_far.starts) + 1, so_far.repeat + 1):
        title = f"start {count}/{so_far.repeat}"
        with run_log.console.step(title) as view:
            run_log.phase(title, view)
            view.last = f"last time {[*last, *took][-1]:.0f} s  " if last or took else ""
            view.line("")
            others = observe_others(benchmark.settings, has_gpu=has_gpu, look_s=GLANCE_S)
            loads.append("; ".join(others))
            start, backends = measure_once(benchmark, has_gpu=has_gpu, run_log=run_log)
            so_far = replace(
                so_far,
                starts=(*so_far.starts, start),
                backends=tuple(sorted({*so_far.backends, *backends})),
            )
            records.write(path, so_far)
            took.append(start.seconds)
            left_s = (so_far.repeat - count) * sum(took) / len(took)
            view.reason = start_summary(replace(so_far, starts=(start,)), left_s)
    return so_far, loads


def start_summary(record: Record, left_s: float | None) -> str:
    """Return the first metric of a record with one start, and the time that is left."""
    measured = "  ".join(
        f"{metric} {results.value_text(record, metric)}" for metric in record.metrics[:1]
    )
    return measured + (f"  about {left_s / 60:.1f} min left" if left_s else "")


def measure_once(
    benchmark: Benchmark,
    *,
    has_gpu: bool,
    run_log: RunLog,
    watch: Callable[[], None] = lambda: None,
) -> tuple[Start, tuple[str, ...]]:
    """Start the process once; return its measurements and the backends that its log names.

    Calls `watch` at each line of the log. Raises ServeError, or WorkspaceError for a benchmark
    without a server, where the process fails or measures nothing.
    """
    settings, seen = benchmark.settings, set[str]()

    def look(line: str) -> None:
        watch()
        if found := _BACKEND.search(line):
            seen.add(_PASSING.sub("…", found[1]))

    before = observe_conditions(settings, has_gpu=has_gpu)
    time_of_start, began = records.utc_now(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as neutral:
        samples = _samples(benchmark, Path(neutral), run_log=run_log, look=look)
    seconds = round(time.monotonic() - began, 2)
    after = observe_conditions(settings, has_gpu=has_gpu)
    return Start(time_of_start, seconds, before, after, samples), tuple(seen)


def _samples(
    benchmark: Benchmark, folder: Path, *, run_log: RunLog, look: Callable[[str], None]
) -> dict[str, tuple[float, ...]]:
    layout, work, environment = benchmark.layout, benchmark.work, benchmark.environment
    if work.kind == "serve":
        return measure_server(layout, work, environment, folder, run_log=run_log, look=look)
    result = folder / "result.json"
    process.run(
        subject.command(layout, work, result),
        env=environment,
        run_log=run_log,
        cwd=folder,
        on_line=look,
        failure=WorkspaceError,
        judge=failures.ending,
    )
    return read_samples(work, result, log=run_log.path)


def measure_server(
    layout: Layout,
    work: Workload,
    environment: Mapping[str, str],
    folder: Path,
    *,
    run_log: RunLog,
    look: Callable[[str], None],
) -> dict[str, tuple[float, ...]]:
    """Start the server at a free port, run each load on it, stop it, and return all samples.

    Raises ServeError where the server does not start or dies, WorkspaceError where a load measures
    nothing.
    """
    address = Address("127.0.0.1", lifecycle.free_port())
    argv = subject.server(layout, work, host=address.host, port=address.port)

    def on_line(line: str) -> None:
        run_log.line(line)
        look(line)

    launch = lifecycle.Launch("bench", argv, environment, address)
    found: dict[str, tuple[float, ...]] = {}
    key = environment.get("VLLM_API_KEY")
    with lifecycle.running(
        layout.state / "bench", launch, key=key, timeout_s=START_TIMEOUT_S, on_line=on_line
    ) as (server, _):
        for at in work.concurrencies:
            result = folder / f"{at}.json"
            try:
                process.run(
                    subject.client(layout, work, result, port=address.port, at=at),
                    env=with_given(environment, "bench", {"OPENAI_API_KEY": key or "none"}),
                    run_log=run_log,
                    cwd=folder,
                    failure=ServeError,
                    judge=failures.ending,
                )
            except ServeError as exc:
                if not observation.is_healthy(address) and _has_ended(server):
                    raise lifecycle.failure(server) from exc
                raise
            several = len(work.concurrencies) > 1
            found |= read_samples(work, result, log=run_log.path, at=at if several else None)
    return found


def _has_ended(server: observation.Server) -> bool:
    """Wait until all processes of an unhealthy server are gone; only then its exit is known."""
    deadline = time.monotonic() + lifecycle.GRACE_S + process_tree.KILL_GRACE_S
    while server.members():
        if time.monotonic() > deadline:
            return False
        observation.reap(server)
        time.sleep(process_tree.POLL_S)
    return True


def read_samples(
    work: Workload, result: Path, *, log: Path | None, at: int | None = None
) -> dict[str, tuple[float, ...]]:
    """Read the samples of a result file. Raises WorkspaceError where it has none."""
    try:
        document = records.load(result, dict[str, object]) or {}
        return subject.samples(work.kind, document, at=at)
    except ValueError as exc:
        raise WorkspaceError(
            f"vllm bench {work.kind} measured nothing: {exc}",
            hint=hints.text("core.read_log", path=log),
        ) from exc


def observe_conditions(settings: Settings, *, has_gpu: bool) -> Conditions:
    """Observe load and clocks now; a driver takes up to 1 s, a driver with a fault 5 s."""
    import psutil

    # A new driver each time: what it says changes.
    sensors = Driver(settings).sensors() if has_gpu else ()
    # None where the kernel reports no clock, as in some virtual machines.
    clock = getattr(psutil.cpu_freq(), "current", None)
    return Conditions(
        round(os.getloadavg()[0], 2),
        round(clock, 1) if clock else None,
        tuple(map(_clocks, sensors)),
    )


def _clocks(seen: Sensors) -> Clocks:
    limits = None
    if seen.limits is not None:
        limits = ", ".join(name for bit, name in _BITS.items() if seen.limits & bit) or "nothing"
    return Clocks(seen.sm_mhz, seen.memory_mhz, seen.celsius, seen.watts, limits)


def require_idle(
    settings: Settings, *, has_gpu: bool, allow_busy: bool, console: Console, wait_s: float = WAIT_S
) -> None:
    """Wait up to `wait_s` until the machine is idle.

    Raises WorkspaceError naming the programs that use the machine, unless `allow_busy`.
    """
    if allow_busy:
        return
    deadline, is_reported = time.monotonic() + wait_s, False
    while others := observe_others(settings, has_gpu=has_gpu):
        if time.monotonic() >= deadline:
            raise WorkspaceError(
                f"something else uses this machine: {'; '.join(others)}",
                hint=hints.text("bench.allow_busy"),
            )
        if not is_reported:
            console.info(
                f"waiting up to {wait_s:.0f} s for the machine to be idle: {'; '.join(others)}"
            )
            is_reported = True


def observe_others(settings: Settings, *, has_gpu: bool, look_s: float = LOOK_S) -> tuple[str, ...]:
    """Return a phrase for each other use of the machine, none if it is idle; takes `look_s`."""
    known = process_tree.living()
    ours = process_tree.below({os.getpid()}, known) | {os.getpid()}
    programs = running_programs()
    load = _load_of_others(ours, look_s)
    servers = [
        f"vLLM runs as process {program.pid}"
        for program in programs
        if program.pid not in ours and is_vllm(program.argv)
    ][:SHOWN]
    return (*load, *servers, *(_on_gpus(settings, ours) if has_gpu else ()))


def _load_of_others(ours: Collection[int], look_s: float) -> list[str]:
    """Describe the load of `look_s` that is not ours, if it matters."""
    import psutil

    known = _processor_seconds()
    shares = psutil.cpu_percent(look_s, percpu=True)
    used = {
        program: (seconds - known.get(program, seconds)) / look_s
        for program, seconds in _processor_seconds().items()
    }
    cores = os.sched_getaffinity(0)
    own = sum(share for (pid, _), share in used.items() if pid in ours)
    load = sum(shares[core] for core in cores) / 100 - own
    if load <= max(LEAST_CORES, len(cores) * MOST_SHARE):
        return []
    others = [one for one in used if one[0] not in ours and used[one] >= LEAST_CORES / 2]
    top = sorted(others, key=lambda one: -used[one])[:SHOWN]
    names = ", ".join(f"{name} ({pid}) {used[pid, name]:.1f}" for pid, name in top)
    return [
        f"{load:.1f} of {len(cores)} cores are busy"
        + (f": {names}" if names else " with processes that are hidden from this user")
    ]


def _processor_seconds() -> dict[tuple[int, str], float]:
    """Return the processor time of each process so far, by PID and name."""
    import psutil

    return {
        (running.pid, running.info["name"] or "a process"): times.user + times.system
        for running in psutil.process_iter(["cpu_times", "name"])
        if (times := running.info["cpu_times"]) is not None
    }


def _on_gpus(settings: Settings, ours: Collection[int]) -> tuple[str, ...]:
    """Return a phrase for each other process that the driver lists on a GPU."""
    others = dict.fromkeys(
        f"{resident.name.rpartition('/')[2]} ({resident.pid}) holds a GPU"
        for resident in Driver(settings).residents()
        if resident.pid not in ours
    )
    return tuple(others)[:SHOWN]
