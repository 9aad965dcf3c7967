"""The parts of `nox -s spark`: what each needs, and what it measures in a clone of its own.

A part runs verbs and sessions as child processes, as a user types them, and returns figures. It
leaves no process, and begins from any state in which a killed run left the clone.
"""

import contextlib
import os
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from workspace.bench import results
from workspace.bump import known_good
from workspace.compile import costs, job_server, jobs, ninja
from workspace.core import hints, process, records
from workspace.core.errors import BuildError, ServeError, ToolchainError, WorkspaceError, counted
from workspace.core.files import write_atomic
from workspace.core.paths import Layout
from workspace.machine import hardware
from workspace.repo.git import Git
from workspace.server import lifecycle, observation
from workspace.support import perf_pairs

Figures = dict[str, str]
CYCLES = 10
BUILD_UNITS = 40
# GiB of the server on a GPU, and what it holds in all beside the compilers of a build.
SERVER_GIB = 8
BESIDE_GIB = {"cpu": 6.0, "cuda": 12.0}
SAMPLE_S = 1.0
# With less available memory than this a part ends, whatever it holds itself.
LEAST_AVAILABLE_GIB = jobs.LEAST_RESERVED_GIB
# The edited kernel, the first that the tree has; and the target of the memory-bound build.
_EDITED = {
    "cuda": ("csrc/**/topk_softmax_kernels.cu", "csrc/**/activation_kernels.cu"),
    "cpu": ("csrc/cpu/activation.cpp", "csrc/cpu/*.c"),
}
_BUILT = {"cuda": "_C_stable_libtorch", "cpu": "_C"}
_MESSAGE = "Change nothing, for an acceptance\n\nUpstream-Status: Inappropriate [acceptance]\n"


@dataclass(frozen=True)
class Need:
    """What a part is expected to take: seconds, GiB of disk, GiB of memory."""

    seconds: float
    disk_gib: float
    memory_gib: float


@dataclass(frozen=True)
class Done:
    """A program that ended with an expected status."""

    seconds: float
    status: int
    out: str
    error: str


class Unfit(WorkspaceError):
    """A part that ended, and found a fault: what was measured is kept."""

    def __init__(self, message: str, figures: Figures, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.figures = figures


@dataclass(frozen=True)
class Trial:
    """A clone in which the parts run. `folder` keeps their records; all processes of a part hold at
    most `bound_gib` together.
    """

    context: perf_pairs.Context
    clone: Layout
    folder: Path
    device: Literal["cuda", "cpu"]
    bound_gib: float
    is_unified: bool
    model: str

    @property
    def is_built(self) -> bool:
        return self.clone.stamp("vllm").is_file()

    def make_clone(self) -> None:
        """Make the clone, or make it anew: without a build."""
        self.clone.root.parent.mkdir(parents=True, exist_ok=True)
        perf_pairs.make_clone(self.context, self.clone.root)

    def renew_clone(self) -> None:
        """Bring the workspace of the clone to that of the user, who may have changed it since."""
        if self.clone.root.exists():
            perf_pairs.copy_workspace(self.context, self.clone.root)

    def inv(self, *args: str, statuses: Sequence[int] = (0,)) -> Done:
        """Run a verb. Raises ToolchainError where the machine lacks something, else BuildError."""
        return self._run((self.clone.root / "scripts" / "inv", *args), statuses)

    def nox(self, session: str, *args: str, statuses: Sequence[int] = (0,)) -> Done:
        """Run a session. Raises as `inv` does."""
        nox = self.clone.root / "scripts" / "nox"
        return self._run((nox, "-s", session, "--", *args), statuses)

    def _run(self, argv: Sequence[process.Argument], statuses: Sequence[int]) -> Done:
        root = self.clone.root
        environment = self.context.environment | {"PWD": str(root)}
        began = time.monotonic()
        done = process.capture(argv, env=environment, cwd=root)
        seconds = time.monotonic() - began
        shown = " ".join([Path(argv[0]).name, *map(str, argv[1:])])
        with (self.folder / "output.log").open("a", encoding="utf-8") as log:
            status = process.describe_status(done.returncode)
            print(f"+ {shown}\n{done.stdout}{done.stderr}-- {status}, {seconds:.1f} s", file=log)
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if done.returncode in statuses:
            return Done(seconds, done.returncode, done.stdout, next(reversed(errors), ""))
        message = next(reversed(errors or lines), "it printed nothing")
        found = [line.removeprefix("hint: ") for line in lines if line.startswith("hint: ")]
        kind = ToolchainError if done.returncode == ToolchainError.exit_code else BuildError
        text = f"{shown} {process.describe_status(done.returncode)}: {message}"
        raise kind(text, hint=next(reversed(found), None))

    def settle(self) -> None:
        """Stop every server of the clone and take edits back, those of a killed run, too."""
        if observation.servers(self.clone):
            self.inv("serve.stop", "--all")
        if self.is_built:
            Git(self.clone.vllm).write("checkout", "--quiet", "--", ".")


@dataclass
class Watch:
    """Samples of the memory while a part runs, a context manager. It ends a part that holds more
    than its bound, or that leaves the machine too little.
    """

    trial: Trial
    breach: str = ""
    is_over: bool = False
    peak_gib: float = 0.0
    least_gib: float = field(default_factory=observation.available_gib)
    pressure_percent: float = 0.0
    load: float = 0.0

    def __enter__(self) -> "Watch":
        self._first_gib = self.least_gib
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_end, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample_until_end(self) -> None:
        self._sample()
        while not self._ended.wait(SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        status, bound, known = ninja.memory_status(0.0), self.trial.bound_gib, job_server.living()
        pids, available = self._pids(known), status.available_gib
        held = sum(known[pid].held_gib for pid in pids if pid in known)
        if self.trial.is_unified:
            # The GPU's allocations belong to no process that the kernel counts.
            held = max(held, self._first_gib - available)
        self.peak_gib, self.least_gib = max(self.peak_gib, held), min(self.least_gib, available)
        self.pressure_percent = max(self.pressure_percent, status.pressure_percent)
        self.load = max(self.load, os.getloadavg()[0])
        self.is_over = self.is_over or held > bound
        if self.is_over:
            self.breach = f"it held {held:.1f} GiB, more than its {bound:.1f}"
        elif available < LEAST_AVAILABLE_GIB:
            self.breach = f"the machine had {available:.1f} GiB left while it held {held:.1f}"
        # Servers end with their supervisor.
        for pid in pids if self.breach else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _pids(self, known: Mapping[int, job_server.Process]) -> set[int]:
        """Return the processes of the part: those below this one, and the servers of the clone."""
        own = os.getpid()
        pids = job_server.below(frozenset({own}), known)[own]
        with contextlib.suppress(ServeError):
            for server in observation.servers(self.trial.clone):
                pids |= server.members()
        return pids


@dataclass(frozen=True)
class Part:
    """A part with its needs by device; most need the build of the part `bootstrap`."""

    name: str
    title: str
    cpu: Need
    cuda: Need
    work: Callable[[Trial], Figures]

    @property
    def needs_build(self) -> bool:
        return self.name not in ("doctor", "bootstrap")

    def need(self, device: str) -> Need:
        return self.cuda if device == "cuda" else self.cpu


@dataclass(frozen=True)
class _Row:
    state: str
    name: str
    seen: str


@dataclass(frozen=True)
class _Screen:
    rows: tuple[_Row, ...]


def _doctor(trial: Trial) -> Figures:
    done = trial.inv("doctor", "--json", statuses=(0, ToolchainError.exit_code))
    rows = records.decode(done.out, _Screen).rows
    states = [row.state for row in rows]
    figures = {
        "doctor": f"{states.count('ok')} ok, {states.count('warn')} warn,"
        f" {states.count('FAIL')} FAIL; {done.seconds:.1f} s"
    }
    for state in ("warn", "FAIL"):
        found = [f"{row.name}: {row.seen}" for row in rows if row.state == state]
        figures |= {f"doctor, {state}": "; ".join(found)} if found else {}
    if done.status:
        raise Unfit(done.error, figures, hint=hints.text("machine.doctor"))
    return figures


def _bootstrap(trial: Trial) -> Figures:
    """Build from nothing, in a clone of this moment; then a cold and a warm first token."""
    trial.make_clone()
    before, disk = _received_gib(), hardware.free_gib(trial.clone.root)
    built = trial.inv("bootstrap", "--no-first-token")
    received = _received_gib() - before
    cold = trial.inv("bootstrap")
    stamp = trial.clone.stamp("first-token")
    figures = {
        "fresh clone to a verified build": f"{built.seconds:.1f} s",
        "received by this machine meanwhile": f"{received:.2f} GiB",
        "taken from the disk": f"{max(0.0, disk - hardware.free_gib(trial.clone.root)):.1f} GiB",
    }
    if not stamp.is_file():
        return figures | {"first token": "none: there is no GPU here"}
    stamp.unlink()
    warm = trial.inv("bootstrap").seconds
    return figures | {
        "first token, cold: a greedy and a sampled one": f"{cold.seconds:.1f} s",
        "the same again": f"{warm:.1f} s; JIT and cold files {cold.seconds - warm:.1f} s",
    }


def _received_gib() -> float:
    """Return the GiB that this machine has received from others since its boot."""
    import psutil

    counters = psutil.net_io_counters(pernic=True).items()
    return float(sum(count.bytes_recv for name, count in counters if name != "lo")) / hardware.GIB


@dataclass(frozen=True)
class _Check:
    verdict: str


@dataclass(frozen=True)
class _Smoke:
    checks: tuple[_Check, ...]


def _smoke(level: str, times: Sequence[str]) -> Callable[[Trial], Figures]:
    def work(trial: Trial) -> Figures:
        figures: Figures = {}
        for which in times:
            file = trial.folder / f"smoke-{level}.json"
            file.unlink(missing_ok=True)
            done = trial.nox("smoke", "--level", level, "--json", str(file), statuses=(0, 8))
            record = records.load(file, _Smoke)
            verdicts = [check.verdict for check in record.checks] if record else []
            counts = ", ".join(f"{verdicts.count(one)} {one}" for one in dict.fromkeys(verdicts))
            figures[f"smoke {level}{which}"] = f"{done.seconds:.1f} s; checks: {counts or 'none'}"
            if done.status:
                raise Unfit(done.error or "the smoke failed", figures, hint=hints.text("nox.smoke"))
        return figures

    return work


def _triton(trial: Trial) -> Figures:
    done = trial.inv("fix-triton", "--check", statuses=(0, ToolchainError.exit_code))
    figures = {"fix-triton --check": f"{done.error or 'no fault'}; {done.seconds:.1f} s"}
    if done.status:
        raise Unfit(done.error, figures, hint=hints.text("install.fix_triton"))
    return figures


@dataclass(frozen=True)
class _Plan:
    units: int
    minutes: float
    peak_gib: float


def _planned(trial: Trial, *args: str) -> _Plan:
    return records.decode(trial.inv("rebuild", "--plan", "--json", *args).out, _Plan)


def _kernel(trial: Trial) -> Figures:
    """Edit a kernel in a target without objects, edit it again, and take the edits back."""
    tree = trial.clone.vllm
    found = (path for pattern in _EDITED[trial.device] for path in sorted(tree.glob(pattern)))
    source = next(found, None)
    if source is None:
        raise ToolchainError(f"the tree has none of {', '.join(_EDITED[trial.device])}")
    shutil.rmtree(trial.clone.builds, ignore_errors=True)
    _edit(source, "// One edit of an acceptance.")
    planned = _planned(trial)
    memory = f"{trial.bound_gib:.1f}"
    cold = trial.inv("rebuild", "--memory", memory)
    _edit(source, "// Another edit of an acceptance.")
    warm = trial.inv("rebuild", "--memory", memory)
    trial.settle()
    back = trial.inv("rebuild")
    return {
        "edited": str(source.relative_to(tree)),
        "planned for the first edit": f"{counted(planned.units, 'unit')},"
        f" {planned.minutes:.1f} minutes, {planned.peak_gib:.1f} GiB",
        "first edit to a verified library, no objects": f"{cold.seconds:.1f} s",
        "second edit to a verified library": f"{warm.seconds:.1f} s",
        "the edit taken back": f"{back.seconds:.1f} s",
        **_write_costs(trial),
    }


def _edit(source: Path, line: str) -> None:
    with source.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def _build(trial: Trial) -> Figures:
    """Compile a target within a bound of memory, beside a server that keeps answering."""
    shutil.rmtree(trial.clone.builds, ignore_errors=True)
    target = ("--target", _BUILT[trial.device])
    planned = _planned(trial, *target)
    memory = max(jobs.LEAST_BUDGET_GIB, trial.bound_gib - BESIDE_GIB[trial.device])
    ready = _serve(trial)
    built = trial.inv("rebuild", *target, "--memory", f"{memory:.1f}")
    state = records.decode(trial.inv("serve.status", "--json").out, _Server).state
    trial.settle()
    figures = {
        "target": f"{target[1]}, {counted(planned.units, 'unit')}"
        + ("" if planned.units >= BUILD_UNITS else f"; {BUILD_UNITS} were wanted"),
        "bound of its compilers": f"{memory:.1f} GiB",
        "planned": f"{planned.minutes:.1f} minutes, {planned.peak_gib:.1f} GiB",
        "compiled and linked": f"{built.seconds:.1f} s",
        "the server beside it": f"ready after {ready.seconds:.1f} s, at the end {state}",
        **_write_costs(trial),
    }
    if state != "ready":
        raise Unfit(f"the server beside the build is {state}", figures)
    return figures


def _write_costs(trial: Trial) -> Figures:
    """Write the table of what was compiled on this machine, in the form of the shipped one."""
    setup, entries = costs.newest_setup(ninja.history_file(trial.context.settings))
    if not entries:
        return {}
    place = trial.folder / costs.own_table().name
    text = costs.table_text(entries, setup=setup, date=records.utc_now()[:10])
    write_atomic(place, text.encode())
    largest = max(entries, key=lambda one: one.peak_gib)
    return {
        "cost table": f"{place.name}, {counted(len(entries), 'unit')}, {setup}",
        "largest compiler": f"{largest.peak_gib:.2f} GiB, {largest.source} of {largest.target}",
    }


@dataclass(frozen=True)
class _Server:
    state: str


def _serve(trial: Trial) -> Done:
    """Start a server that stays, and return when it has generated."""
    trial.settle()
    port = ("--port", str(lifecycle.free_port()))
    memory = ("--memory", str(SERVER_GIB)) if trial.device == "cuda" else ()
    return trial.inv("serve", trial.model, "--detach", *port, *memory)


def _cycles(trial: Trial) -> Figures:
    """Start and stop a server; each start ends when it generates, each stop when all is free."""
    starts, stops = [], []
    for _ in range(CYCLES):
        starts.append(_serve(trial).seconds)
        stops.append(trial.inv("serve.stop").seconds)
    figures = {
        "model": trial.model,
        f"{CYCLES} starts until it generates": _spread(starts),
        f"{CYCLES} stops until all is free": _spread(stops),
    }
    if observation.servers(trial.clone):
        raise Unfit("after the last stop there is a server", figures)
    return figures


def _spread(seconds: Sequence[float]) -> str:
    median = statistics.median(seconds)
    return f"median {median:.1f} s, {min(seconds):.1f} to {max(seconds):.1f}"


def _bench(trial: Trial) -> Figures:
    """Measure the default model; the record is kept beside the others."""
    for old in trial.clone.results.glob("*/*.json"):
        # A complete record of a killed run refuses its label; an interrupted one is resumed.
        if results.read(old, place=old.name).is_complete:
            old.unlink()
    done = trial.nox("bench", "latency", "--label", "spark")
    path = Path(done.out.splitlines()[-1])
    record = results.read(path, place=path.name)
    write_atomic(trial.folder / "bench-latency.json", path.read_bytes())
    figures = {name: results.value_text(record, name) for name in record.shown_metrics}
    return {
        "model": f"{record.model}; {counted(len(record.starts), 'start')}",
        **figures,
        "flags": " ".join(record.flags),
    }


def _rollback(trial: Trial) -> Figures:
    """Commit and export a change, and return to the known-good state that the smoke recorded."""
    tree, good = Git(trial.clone.vllm), known_good.states(trial.clone)
    if not good:
        raise BuildError("there is no known-good state", hint=hints.text("support.spark_quick"))
    if tree.head() == good[0].head:
        _edit(trial.clone.vllm / "vllm" / "envs.py", "# A line of an acceptance.")
        tree.write("commit", "--quiet", "--all", "--message", _MESSAGE)
    trial.inv("patch.export")
    done = trial.inv("pin.rollback", "--force")
    figures = {"rollback with its smoke": f"{done.seconds:.1f} s"}
    if tree.head() != good[0].head:
        raise Unfit(f"vendor/vllm is not on {good[0].name} after the rollback", figures)
    return figures


_QUICK, _FULL = _smoke("quick", (", first time", ", again")), _smoke("full", ("",))
# Of a CPU, bootstrap, quick, serve and rollback are from docs/evidence/spark-rehearsal-cpu.md, two
# cores at a load of 18, rounded up; all others are estimates, those of a GPU from docs/evidence/
# gpu.md (an H200 with 16 cores) and costs.tsv: no GB10 was measured.
PARTS: tuple[Part, ...] = (
    Part("doctor", "what the machine lacks", Need(20, 0.2, 1), Need(20, 0.2, 1), _doctor),
    Part("bootstrap", "a fresh clone to a token", Need(400, 5, 4), Need(900, 15, 16), _bootstrap),
    Part("quick", "the smoke, twice", Need(300, 0.2, 6), Need(300, 1, 16), _QUICK),
    Part("full", "the full smoke", Need(300, 1, 8), Need(300, 2, 24), _FULL),
    Part("triton", "inv fix-triton --check", Need(20, 0, 1), Need(60, 0.1, 4), _triton),
    Part("kernel", "two edits and their costs", Need(900, 2, 6), Need(900, 3, 16), _kernel),
    Part("build", "with a bound, beside a server", Need(900, 2, 10), Need(1800, 4, 20), _build),
    Part("serve", "a server, ten times", Need(1100, 0.2, 6), Need(600, 1, 16), _cycles),
    Part("bench", "the default model", Need(300, 0.1, 4), Need(300, 0.1, 16), _bench),
    Part("rollback", "to the known-good state", Need(240, 0.2, 6), Need(180, 1, 16), _rollback),
)
NAMES = tuple(part.name for part in PARTS)
