"""Runs of probes, several at once: each in its own process, or forked from one that has imported
vLLM. A probe that hangs is ended with a dump of its stacks.

The dump is from Python's faulthandler: each process writes its own stacks when a fatal signal ends
it. A debugger may not inspect a process that it did not start (Yama, ptrace_scope 1).
"""

import contextlib
import itertools
import json
import os
import re
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from workspace.core import process, records
from workspace.core.errors import BuildError, SourceError, ToolchainError
from workspace.core.process import Completed
from workspace.machine import failures
from workspace.machine.gpu import Memory
from workspace.machine.hardware import Host
from workspace.server import lifecycle, process_tree

# Most lines of stacks in a record; the log has all of them.
KEPT_LINES = 120
# The limit of a probe's own watch: the probe ends before its caller's limit and dumps its stacks.
LIMIT = "WORKSPACE_SMOKE_LIMIT_S"
# Shares of the caller's limit: for the probe's own watch, and until the caller dumps its stacks.
PROBE_SHARE, DUMP_SHARE = 0.8, 0.9
# More runnable threads than so many for each core and probe are those of other programs: a probe
# has a thread for each core, and compilers beside them.
LOADED = 2.0
# Probes that run at once, at most, and the GiB that must be available for each: an engine with its
# front-end and compilers. On a GB10 that is the GPU's memory, too.
MOST_LANES, LANE_GIB = 4, 4.0
# Seconds: processes of the smoke that are ended before they are done.
END_S = 5.0
_BEGINS = re.compile(r"(Fatal Python error: .*|Timeout \(\d+:\d\d:\d\d.*\)!)$")
_CONTINUES = re.compile(
    r'  File ".*", line \d+ in |  <no Python frame>|  \.\.\.$|(?:Current t|T)hread 0x[0-9a-f]+|\s*$'
)
_ENDS = "Extension modules: "


class Watch:
    """Context manager that ends the processes if the block takes longer than `limit_s`; each writes
    its stacks to its stderr.

    `find` returns their process ids. `has_fired` is true once the limit was reached.
    """

    def __init__(self, limit_s: float, find: Callable[[], set[int]]) -> None:
        self._find = find
        self._timer = threading.Timer(limit_s, self._fire)
        self._timer.daemon = True
        self.has_fired = False

    def __enter__(self) -> "Watch":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._timer.join()

    def _fire(self) -> None:
        self.has_fired = True
        lifecycle.end_with_stacks(self._find)


def read_stacks(text: str) -> tuple[str, ...]:
    """Return the stacks that faulthandler wrote, from a text that also has other lines."""
    found: list[str] = []
    is_inside = False
    for line in text.splitlines():
        if match := _BEGINS.search(line):
            is_inside = True
            found.append(match.group())
        elif is_inside and _CONTINUES.match(line):
            found += [line.rstrip()] if line.strip() else []
        else:
            is_inside = False
    return tuple(found)


def is_part(line: str) -> bool:
    """Return whether a line belongs to faulthandler's output and is not an error message."""
    return bool(_BEGINS.search(line) or _CONTINUES.match(line) or line.startswith(_ENDS))


def lanes(host: Host, memory: Memory | None = None) -> int:
    """Return how many probes may run at once on this machine; `memory` is the own memory of the GPU
    that they share, None without one.
    """
    free_gib = min(host.available_gib, memory.free_gib if memory else host.available_gib)
    return max(1, min(MOST_LANES, host.cores, int(free_gib / LANE_GIB)))


@dataclass(frozen=True)
class Answer:
    """The result of a probe: its document, or in `problem` why there is none.

    `stacks` are those of a probe that hung or crashed, `log` its command and its messages if
    something went wrong, `compilers` the seconds of each compiler that ran in it.
    """

    record: Mapping[str, object]
    problem: str | None
    seconds: float
    stacks: tuple[str, ...] = ()
    log: tuple[str, ...] = ()
    compilers: Mapping[str, float] = field(default_factory=dict)


# Models with their folders, or an answer with the reason why there are none.
Folders = Mapping[str, str] | Answer


def or_problem(make: Callable[[], Mapping[str, str]]) -> Folders:
    """Return the folders of models, or an answer with the reason why they could not be made."""
    started = time.monotonic()
    try:
        return make()
    except (BuildError, SourceError, ToolchainError) as exc:
        return Answer({}, exc.message, time.monotonic() - started)


@dataclass(frozen=True)
class Program:
    """A probe with its arguments, which runs in `folder`, from which nothing can be imported by
    accident. `patience_s` is its caller's limit.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    folder: Path
    patience_s: float

    @property
    def name(self) -> str:
        return Path(self.argv[1]).name


@dataclass(frozen=True)
class _Ended:
    """The exit status of a forked probe, the files of its output, and the seconds of compilers."""

    returncode: int
    out: Path
    err: Path
    compilers: Mapping[str, float]

    def read(self) -> Completed:
        texts = (path.read_text("utf-8", errors="replace") for path in (self.out, self.err))
        return Completed(self.returncode, *texts)


class SharedImport:
    """A process that has imported vLLM and runs probes in forked children (probes/imports.py).

    Several threads may use it. It serves until it is ended from outside, by `end_all`.
    """

    def __init__(self, program: Program) -> None:
        self._program, self._place = program, Path(program.argv[-1])
        self._numbers = itertools.count(1)
        self._guards: set[int] = set()
        self._deadline = time.monotonic() + program.patience_s
        self._server = threading.Thread(target=self._serve, daemon=True)
        self._server.start()

    def _serve(self) -> None:
        with contextlib.suppress(ToolchainError):
            process.capture(
                self._program.argv,
                env=self._program.environment,
                cwd=self._program.folder,
                on_start=self._guards.add,
            )

    def wait(self) -> bool:
        """Wait for the import. Return whether it succeeded within the program's time limit."""
        while self._server.is_alive() and not self._place.exists():
            if time.monotonic() > self._deadline:
                _end_below(self._guards)
            self._server.join(process_tree.POLL_S)
        return self._place.exists() and self._server.is_alive()

    def run(self, program: Program, on_start: Callable[[int], None]) -> _Ended | None:
        """Run a probe. Return None if this process has ended: the probe then has to run by itself,
        and reports the reason.
        """
        number = next(self._numbers)
        out, err = (program.folder / f"{program.name}-{number}.{name}" for name in ("out", "err"))
        request = {"argv": program.argv[1:], "out": str(out), "err": str(err)}
        status = None
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self._place))
            with connection.makefile("rw", encoding="utf-8") as stream:
                stream.write(f"{json.dumps(request)}\n")
                stream.flush()
                if not (pid := stream.readline()):
                    return None
                on_start(int(pid))
                status = stream.readline()
        if status is None:
            return None
        # Without a status the process above the probe was killed.
        code, _, compilers = (status or f"-{signal.SIGKILL:d} {{}}").partition(" ")
        return _Ended(int(code), out, err, records.decode(compilers, dict[str, float]))


def ask(program: Program, shared: SharedImport | None = None) -> Answer:
    """Run a probe, forked from `shared` where that can be, and read its document."""
    started = time.monotonic()
    is_shared = shared is not None and shared.wait()
    # A forked probe, or the guard above a probe with a process of its own. The guard stays, to
    # report how the probe ended.
    forked: set[int] = set()
    guards: set[int] = set()

    def processes() -> set[int]:
        known = process_tree.living()
        return process_tree.below(forked | guards, known) | (forked & known.keys())

    watch = Watch(DUMP_SHARE * program.patience_s, processes)
    try:
        with watch:
            ended = shared.run(program, forked.add) if shared and is_shared else None
            done = ended or process.capture(
                program.argv,
                env=program.environment,
                cwd=program.folder,
                timeout_s=program.patience_s + lifecycle.DUMP_S,
                on_start=guards.add,
            )
    except ToolchainError as exc:
        problem = timeout_text(program) if watch.has_fired else exc.message
        return Answer({}, problem, time.monotonic() - started)
    # After the watch: the stacks of a forked probe that hung are complete.
    completed = done.read() if isinstance(done, _Ended) else done
    compilers = done.compilers if isinstance(done, _Ended) else {}
    record, failure = read(completed)
    failure = timeout_text(program) if watch.has_fired else failure
    stacks: tuple[str, ...] = ()
    log: tuple[str, ...] = ()
    if failure or "error" in completed.stdout:
        stacks = read_stacks(completed.stderr)
        log = (shlex.join(program.argv), *completed.stderr.splitlines())
    return Answer(record, failure, time.monotonic() - started, stacks, log, compilers)


# What the screen calls a probe.
_TITLES = {
    "verify.py": "libraries",
    "kernels.py": "operators",
    "reference.py": "Hugging Face",
    "parity.py": "vLLM",
    "sampling.py": "sampling",
    "engine.py": "engine",
    "real_model.py": "vLLM smollm2",
}


@dataclass(frozen=True)
class _LastParity:
    steps: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _LastSmoke:
    """What is read here of the record of the last smoke."""

    parity: _LastParity = _LastParity()


class Running:
    """The probes that run now, and the seconds of each step of the last smoke, for the screen."""

    def __init__(self, record: Path) -> None:
        self._last = (records.read(record, _LastSmoke) or _LastSmoke()).parity.steps
        # Seconds of each step of this smoke, for the next.
        self.steps: dict[str, float] = {}
        # Monotonic seconds by title. Threads write, and one reads.
        self._began: dict[str, float] = {}

    @contextlib.contextmanager
    def noted(self, probe: str, args: Iterable[str]) -> Iterator[None]:
        """Name a probe and its models on the screen while it runs."""
        models = " ".join(arg.split("=")[1] for arg in args if arg.startswith("--model="))
        title = f"{_TITLES[probe]} {models}".rstrip()
        self._began[title] = time.monotonic()
        try:
            yield
        finally:
            self._began.pop(title, None)

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Measure a step of the smoke."""
        began = time.monotonic()
        yield
        self.steps[step] = round(time.monotonic() - began, 2)

    def text(self, step: str) -> str:
        """Return the seconds of a step in the last smoke, and of each probe that runs now; first,
        whether other programs make both longer.
        """
        now = time.monotonic()
        parts = [f"{title} {now - began:.0f} s" for title, began in [*self._began.items()]]
        last = [f"last time {self._last[step]:.0f} s"] if step in self._last else []
        load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
        is_loaded = load > LOADED * cores * max(1, len(parts))
        loaded = [f"the machine is busy, load {load:.0f} on {cores} cores"] if is_loaded else []
        return "; ".join([*loaded, *last, *parts])


def timeout_text(program: Program) -> str:
    return f"{program.name} gave no answer in {program.patience_s:g} s and was ended"


def read(done: Completed) -> tuple[Mapping[str, object], str | None]:
    """Return a probe's document, and what is wrong with how it ended, None if it ended well."""
    try:
        record = records.decode(done.stdout, dict[str, object])
    except records.DecodeError:
        record = None
    lines = [line for line in done.stderr.splitlines() if line.strip() and not is_part(line)]
    last = lines[-1].strip() if lines else "no output"
    if done.returncode != 0:
        reading = failures.judge(lines, status=done.returncode)
        return {}, f"the probe {failures.how_ended(done.returncode, reading, otherwise=last)}"
    if record is None:
        return {}, f"the probe printed no document: {last}"
    return record, None


def compilation(answers: Iterable[Answer]) -> Mapping[str, float]:
    """Return the seconds of each compiler that ran in these probes."""
    total: dict[str, float] = {}
    for answer in answers:
        for name, seconds in answer.compilers.items():
            total[name] = total.get(name, 0.0) + seconds
    return total


def end_all() -> None:
    """End every process below the guards of this process, probes that still run included."""
    known = process_tree.living()
    _end_below({pid for pid, found in known.items() if found.parent == os.getpid()})


def _end_below(guards: set[int]) -> None:
    with contextlib.suppress(TimeoutError):
        process_tree.end(
            lambda: process_tree.below(guards, process_tree.living()),
            grace_s=END_S,
            kill_grace_s=END_S,
        )
