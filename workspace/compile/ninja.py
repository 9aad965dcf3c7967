"""ninja under the job server: its command line, its environment, and the cause of its failures.

The build directory stays between runs. After an interrupted run ninja decides what is complete: it
compiles again what its own records do not confirm.
"""

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from workspace.compile import job_server
from workspace.compile.costs import Costs, History, known_entries, unit_at
from workspace.compile.costs import Unit as CostUnit
from workspace.compile.jobs import Cells, Jobs, Memory, Meter, build_summary
from workspace.compile.launcher import REFUSAL
from workspace.compile.project import Unit
from workspace.compile.scheduler import Admission, Bounds, Finished, MemoryStatus
from workspace.core import hints, process
from workspace.core.console import RunLog, Step
from workspace.core.errors import BuildError
from workspace.core.files import read_regular
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import hardware, toolchain
from workspace.machine.failures import Symptom, find_in_build

SHOWN_LINES = 15
# The errors of a template may fill a book; the first lines matter.
_KEPT_LINES = 2000
# The form of NINJA_STATUS, which `_child_environment` sets.
_STATUS = re.compile(r"\[\d+/\d+\] ")
_ERROR = re.compile(
    r"\berror\b *[:\[(#]|CMake Error|\bfatal( error)?\b ?:|[a-z]+ fatal *:|undefined"
    r" reference|cannot find -l"
    r"|[A-Za-z]*(Error|Exception)\b ?:|\b[Kk]illed\b|died due to signal"
)
_NO_SPACE = "No space left on device"
# ninja, its children and the job server may open about 1,000 files each (RLIMIT_NOFILE); each
# waiting unit takes one.
MOST_VISIBLE = 900


@dataclass(frozen=True)
class Failure:
    """A failed command: the file it should have written, and its output."""

    output: str
    lines: tuple[str, ...]

    @property
    def symptom(self) -> Symptom | None:
        """The known symptom in the output."""
        found = find_in_build(self.lines)
        return found[1] if found else None

    @property
    def _at(self) -> int:
        if found := find_in_build(self.lines):
            return found[0]
        return next((index for index, line in enumerate(self.lines) if _ERROR.search(line)), 0)

    @property
    def error(self) -> str:
        """The line of the output that explains the failure, as far as it can be recognized."""
        return self.lines[self._at].strip() if self.lines else "it printed nothing"

    @property
    def shown(self) -> tuple[str, ...]:
        """The lines around `error`."""
        start = max(0, self._at - 2)
        return self.lines[start : start + SHOWN_LINES]


class Failures:
    """Reader of ninja's output that keeps the first failure with a cause of its own."""

    def __init__(self) -> None:
        self.has_no_space = False
        self._first: Failure | None = None
        self._silent: Failure | None = None
        self._output: str | None = None
        self._lines: list[str] = []
        self._is_command = False

    @property
    def first(self) -> Failure | None:
        """The first failure with output, else the first without; None if there is none."""
        self._close()
        return self._first or self._silent

    def read_line(self, line: str) -> None:
        """Process the next line of ninja's output."""
        self.has_no_space = self.has_no_space or _NO_SPACE in line
        if self._first:
            return
        if line.startswith("FAILED: "):
            self._close()
            # Newer versions of ninja put `[code=1]` before the outputs.
            self._output = re.sub(r"^FAILED: (\[code=\d+\] )?", "", line).split(" ")[0]
            self._is_command = True
        elif self._output is not None and (_STATUS.match(line) or line.startswith("ninja: ")):
            self._close()
        elif self._output is not None:
            if not self._is_command and len(self._lines) < _KEPT_LINES:
                self._lines.append(line)
            self._is_command = False

    def _close(self) -> None:
        """End the lines of a failure. Ignore a refused command; one without output counts only if
        there is no other.
        """
        if self._output is not None and not self._lines:
            self._silent = self._silent or Failure(self._output, ())
        elif self._output is not None and not all(
            line.startswith(REFUSAL) for line in self._lines if line
        ):
            self._first = self._first or Failure(self._output, tuple(self._lines))
        self._output, self._lines = None, []


# First bytes of the files in which ninja records what it has built.
_RECORDS = {".ninja_log": b"# ninja log v", ".ninja_deps": b"# ninjadeps\n"}
# Below this much free space, blame the disk for a build failure without a message.
_FULL_GIB = 0.0625


@dataclass(frozen=True)
class Compiled:
    """Result of a run of ninja. `summary` is a table."""

    finished: tuple[Finished, ...]
    seconds: float
    summary: tuple[Cells, ...]


def history_file(settings: Settings) -> Path:
    """Return the file with this machine's compile times, shared by all clones. Its name has the
    host name, because several machines may share a home folder.
    """
    return settings.cache / f"compile-costs-{os.uname().nodename}.json"


def launchers(settings: Settings, launcher: Path) -> Mapping[str, str]:
    """Return CMake's variables that put `launcher` before each compiler and linker.

    ccache comes first, and requests a token itself after a cache miss (`environment`).
    """
    command = str(toolchain.find_ccache(settings) or launcher)
    compilers = {
        f"CMAKE_{language}_COMPILER_LAUNCHER": command for language in ("C", "CXX", "CUDA")
    }
    return compilers | {
        f"CMAKE_{language}_LINKER_LAUNCHER": str(launcher) for language in ("C", "CXX")
    }


def environment(
    layout: Layout, settings: Settings, jobs: Jobs, launcher: Path
) -> Mapping[str, str]:
    """Return the variables that configure and ninja get beside the settings: the bound for nested
    builds, and the compiler cache's settings.
    """
    variables = {
        **nested_environment(jobs, launcher=str(launcher)),
        **launchers(settings, launcher),
    }
    if toolchain.find_ccache(settings):
        variables |= {
            **toolchain.cache_configuration(layout, settings),
            "CCACHE_PREFIX": str(launcher),
            "CCACHE_PREFIX_CPP": str(launcher),
        }
    return variables


@dataclass(frozen=True)
class Work:
    """What to compile: the build directory, the limits, and the expected units if known. `setup`
    identifies what costs depend on; `command` resumes the build.
    """

    build: Path
    setup: str
    jobs: Jobs
    memory: Memory
    planned: tuple[CostUnit, ...] = ()
    command: str = "./scripts/inv rebuild"

    @classmethod
    def of_units(
        cls, build: Path, setup: str, jobs: Jobs, memory: Memory, units: Iterable[Unit]
    ) -> Self:
        """Return the work for the units of a project that have known costs."""
        planned = tuple(unit for unit in (unit_at(one.object) for one in units) if unit)
        return cls(build, setup, jobs, memory, planned)

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.jobs.count, self.memory.budget_gib)


def compile(
    layout: Layout,
    settings: Settings,
    work: Work,
    targets: Sequence[str],
    *,
    run_log: RunLog,
    step: Step,
) -> Compiled:
    """Bring `targets` up to date in the configured build directory `work.build`.

    Raises BuildError with the first error of the first failed unit, with all tried budgets if
    memory ran out too often, and with the full disk if there is one. The same call resumes an
    interrupted build.
    """
    if not targets:
        return Compiled((), 0.0, ())
    for sentence in repair(work.build):
        run_log.console.warn(sentence)
    argv: list[process.Argument] = [
        "ninja",
        "-C",
        work.build,
        f"-j{visible(len(work.planned), work.jobs)}",
        *targets,
    ]
    program = Program(argv, _child_environment(layout, settings, work.build, work.jobs))
    return under_job_server(settings, program, work, run_log=run_log, step=step)


@dataclass(frozen=True)
class Program:
    """A program that runs ninja: its command line, its environment and its working folder."""

    argv: Sequence[process.Argument]
    environment: Mapping[str, str]
    cwd: Path | None = None


def under_job_server(
    settings: Settings,
    program: Program,
    work: Work,
    *,
    run_log: RunLog,
    step: Step,
    on_line: Callable[[str, Meter], None] = lambda line, meter: None,
) -> Compiled:
    """Run a program whose compilers request job tokens in `work.build`, and show its progress.
    `on_line` gets each line of output, with the meter.

    Raises BuildError as `compile` does.
    """
    history = History(history_file(settings), setup=work.setup)
    costs = Costs(known_entries(), history.entries)
    server = _job_server(work, costs, history)
    meter = Meter(server, work.planned, costs, console=run_log.console, step=step)
    began, failures = time.monotonic(), Failures()

    def read_line(line: str) -> None:
        failures.read_line(line)
        on_line(line, meter)

    try:
        with _without_step(run_log), server, meter:
            process.run(
                program.argv,
                env=program.environment,
                run_log=run_log,
                on_line=read_line,
                hint=hints.text("compile.resume", command=work.command),
                cwd=program.cwd,
            )
    except (BuildError, OSError) as exc:
        raise _explained(exc, server, failures, settings, work, run_log) from exc
    return Compiled(
        server.finished,
        time.monotonic() - began,
        build_summary(server.finished),
    )


@contextlib.contextmanager
def _without_step(run_log: RunLog) -> Iterator[None]:
    """Let the progress bar show the meter's text, not ninja's newest line."""
    shown, run_log.step = run_log.step, None
    try:
        yield
    finally:
        run_log.step = shown


def _job_server(work: Work, costs: Costs, history: History) -> job_server.JobServer:
    return job_server.JobServer(
        work.build / job_server.FOLDER,
        Admission(work.bounds),
        costs,
        memory=job_server.MemoryWatch(
            lambda: memory_status(work.memory.reserve_gib), hardware.kills
        ),
        history=history,
        units=len(work.planned),
    )


def repair(build: Path) -> tuple[str, ...]:
    """Remove damaged records, which stop or crash ninja, and return a message for each."""
    removed = []
    for name, head in _RECORDS.items():
        record = build / name
        try:
            is_valid = read_regular(record).startswith(head)
        except FileNotFoundError:
            continue
        except OSError:
            is_valid = False
        if not is_valid:
            is_folder = record.is_dir() and not record.is_symlink()
            shutil.rmtree(record) if is_folder else record.unlink()
            removed.append(
                f"{build.name}/{name} was damaged and is removed: the units it recorded are"
                " compiled again"
            )
    return tuple(removed)


def _child_environment(
    layout: Layout, settings: Settings, build: Path, jobs: Jobs
) -> dict[str, str]:
    """Return the environment of ninja itself."""
    launcher = job_server.install(build / job_server.FOLDER)
    given = environment(layout, settings, jobs, launcher)
    return settings.child_environment("compile", given, layout=layout)


def _explained(
    exc: BuildError | OSError,
    server: job_server.JobServer,
    failures: Failures,
    settings: Settings,
    work: Work,
    run_log: RunLog,
) -> Exception:
    """Return the error for a failure of ninja: memory, disk, a compiler's error, or `exc`."""
    log = (f"log: {run_log.path}",)
    alone = hints.text("compile.one_job", command=work.command)
    if server.trouble:
        return BuildError(server.trouble, hint=alone, details=log)
    has_no_space = failures.has_no_space or (
        isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT)
    )
    if full := _full_disks(settings, work, has_no_space=has_no_space):
        left = " and ".join(
            f"{place} has {hardware.free_gib(place) * 1024:.0f} MiB left" for place in full
        )
        hint = hints.text("compile.disk_then_resume", folders=list(full), command=work.command)
        return BuildError(f"the disk is full: {left}", hint=hint, details=log)
    if isinstance(exc, OSError) or not (failure := failures.first):
        return exc
    unit, symptom = unit_at(failure.output), failure.symptom
    name = f"{unit.source} of {unit.target}" if unit else failure.output
    cause = f"{symptom.cause}: " if symptom else ""
    hint = hints.text("compile.resume", command=work.command)
    if symptom and symptom.lack:
        hint = alone
    elif symptom:
        hint = hints.text("compile.then_resume", fix=symptom.hint, command=work.command)
    return BuildError(
        run_log.redact(f"{name} failed: {cause}{failure.error}"),
        hint=hint,
        details=(*(run_log.redact(line) for line in failure.shown), *log),
    )


def _full_disks(settings: Settings, work: Work, *, has_no_space: bool) -> list[Path]:
    """Return the folders of the build on a full disk; all of them if only the output reports it."""
    places = [work.build, Path(settings.child_environment("build").get("TMPDIR") or "/tmp")]
    full = [place for place in places if hardware.free_gib(place) < _FULL_GIB]
    return full or (places if has_no_space else [])


def nested_environment(jobs: Jobs, *, launcher: str) -> Mapping[str, str]:
    """Return environment variables that keep nested builds to the same number of compilers.

    `launcher` is the compiler launcher (job_server.install). Nested CMake, torch's own builder,
    cargo and make each have their own variable.
    """
    count = str(jobs.count)
    return {
        "MAX_JOBS": count,
        "NVCC_THREADS": str(jobs.nvcc_threads),
        "CARGO_BUILD_JOBS": count,
        "CMAKE_BUILD_PARALLEL_LEVEL": count,
        "RUSTC_WRAPPER": launcher,
        "CMAKE_C_COMPILER_LAUNCHER": launcher,
        "CMAKE_CXX_COMPILER_LAUNCHER": launcher,
        "CMAKE_CUDA_COMPILER_LAUNCHER": launcher,
    }


def visible(units: int, jobs: Jobs) -> int:
    """Return ninja's -j: all units, because the scheduler orders only units that have requested a
    token. The job tokens keep to `jobs`.
    """
    return max(jobs.count, min(units, MOST_VISIBLE))


def memory_status(reserve_gib: float) -> MemoryStatus:
    """Return the memory available beyond `reserve_gib`: of the machine, or of the control group if
    that has less.
    """
    _, available_gib = hardware.memory_gib()
    return MemoryStatus(available_gib - reserve_gib, hardware.pressure_percent())
