"""ninja under tickets: what it is told, what its children are told, and what its failures mean in
words.

The build directory stays from run to run. What an end in the middle leaves there is ninja's to
judge: it compiles again what its own records do not vouch for.
"""

import errno
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.compile import job_server, jobs, progress
from workspace.compile import jobs as bounds
from workspace.compile.costs import Costs, History, read_table, unit_at
from workspace.compile.costs import Unit as CostUnit
from workspace.compile.jobs import Jobs, Memory
from workspace.compile.progress import Meter
from workspace.compile.project import Unit
from workspace.compile.scheduler import Admission, Bounds, Finished
from workspace.core import process
from workspace.core.console import Step
from workspace.core.errors import BuildError, ToolchainError
from workspace.core.files import read_regular
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import hardware, toolchain

SHOWN_LINES = 15
# A template's error may fill a book; what matters stands at its beginning.
_KEPT_LINES = 2000
# NINJA_STATUS is set to this form.
_STATUS = re.compile(r"\[\d+/\d+\] ")
_ERROR = re.compile(
    r"\berror\b *[:\[(#]|CMake Error|\bfatal( error)?\b ?:|[a-z]+ fatal *:|undefined"
    r" reference|cannot find -l"
    r"|[A-Za-z]*(Error|Exception)\b ?:|\b[Kk]illed\b|died due to signal"
)
_NO_SPACE = "No space left on device"
REFUSAL = "not compiled: "


@dataclass(frozen=True)
class Failure:
    """A command that failed: what it should have made, and what it said."""

    output: str
    lines: tuple[str, ...]

    @property
    def _at(self) -> int:
        return next((number for number, line in enumerate(self.lines) if _ERROR.search(line)), 0)

    @property
    def error(self) -> str:
        """The line that says why, as far as that can be told."""
        return self.lines[self._at].strip() if self.lines else "it said nothing"

    @property
    def shown(self) -> tuple[str, ...]:
        """The lines around it."""
        start = max(0, self._at - 2)
        return self.lines[start : start + SHOWN_LINES]


class Failures:
    """Hears ninja's lines, and keeps the first failure that is one."""

    def __init__(self) -> None:
        self.has_no_space = False
        self._first: Failure | None = None
        self._silent: Failure | None = None
        self._output: str | None = None
        self._lines: list[str] = []
        self._is_command = False

    @property
    def first(self) -> Failure | None:
        self._close()
        return self._first or self._silent

    def hear(self, line: str) -> None:
        """Take in the next line of ninja's."""
        self.has_no_space = self.has_no_space or _NO_SPACE in line
        if self._first:
            return
        if line.startswith("FAILED: "):
            self._close()
            # Newer ninjas put `[code=1]` before the outputs.
            self._output = re.sub(r"^FAILED: (\[code=\d+\] )?", "", line).split(" ")[0]
            self._is_command = True
        elif self._output is not None and (_STATUS.match(line) or line.startswith("ninja: ")):
            self._close()
        elif self._output is not None:
            if not self._is_command and len(self._lines) < _KEPT_LINES:
                self._lines.append(line)
            self._is_command = False

    def _close(self) -> None:
        """The end of a failure's lines: those that were refused said nothing else. One that said
        nothing counts where no other does.
        """
        if self._output is not None and not self._lines:
            self._silent = self._silent or Failure(self._output, ())
        elif self._output is not None and not all(
            line.startswith(REFUSAL) for line in self._lines if line
        ):
            self._first = self._first or Failure(self._output, tuple(self._lines))
        self._output, self._lines = None, []


GO_ON = "./scripts/inv rebuild    goes on where it was"
# Called by their names, by whatever does not ask CMake: DeepGEMM's builder, torch's, a nested
# configure.
_COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc")
# How the files begin in which ninja keeps what it has done.
_RECORDS = {".ninja_log": b"# ninja log v", ".ninja_deps": b"# ninjadeps\n"}
# With less than this left, a failure that says nothing of the disk is the disk's all the same.
_FULL_GIB = 0.0625


@dataclass(frozen=True)
class Compiled:
    """What a run of ninja came to. `trace` opens in a trace viewer; `summary` are lines for a
    person.
    """

    finished: tuple[Finished, ...]
    seconds: float
    trace: Path | None
    summary: tuple[str, ...]


def find(layout: Layout, settings: Settings) -> Path:
    """Return the ninja of `.vllm`, else that of the tools, else the one on PATH. Raises
    ToolchainError where there is none.
    """
    for folder in (layout.environment / "bin", layout.tools / "bin"):
        if os.access(folder / "ninja", os.X_OK):
            return folder / "ninja"
    found = shutil.which("ninja", path=settings.child_environment("build").get("PATH", ""))
    if found is None:
        raise ToolchainError(
            "there is no ninja, neither in .vllm nor on PATH", hint="./scripts/inv bootstrap"
        )
    return Path(found)


def history_file(settings: Settings) -> Path:
    """Where this machine's compile times are kept, for all clones; a home folder may be shared with
    another machine.
    """
    return settings.cache / f"compile-costs-{os.uname().nodename}.json"


def launchers(settings: Settings, ticket: Path) -> Mapping[str, str]:
    """Return CMake's variables that put a ticket before each compiler and linker.

    ccache comes first, and asks for a ticket itself once it has missed (`environment`); what
    sccache runs it runs in its server, so its caller holds one.
    """
    cache = toolchain.find_cache(settings)
    word = (
        str(ticket)
        if cache is None
        else str(cache.program)
        if cache.kind == "ccache"
        else f"{ticket};{cache.program}"
    )
    compilers = {f"CMAKE_{language}_COMPILER_LAUNCHER": word for language in ("C", "CXX", "CUDA")}
    return compilers | {
        f"CMAKE_{language}_LINKER_LAUNCHER": str(ticket) for language in ("C", "CXX")
    }


def environment(layout: Layout, settings: Settings, jobs: Jobs, ticket: Path) -> Mapping[str, str]:
    """Return what configure and ninja are told beside the settings: the bound, for what starts
    compilers by itself, and the compiler cache's settings.
    """
    path = [str(layout.environment / "bin"), settings.child_environment("build").get("PATH", "")]
    told = {
        "PATH": os.pathsep.join(path),
        **bounds.environment(jobs, ticket=str(ticket)),
        **launchers(settings, ticket),
    }
    cache = toolchain.find_cache(settings)
    if cache is not None and cache.kind == "ccache":
        told |= {
            **toolchain.cache_configuration(layout, settings),
            "CCACHE_PREFIX": str(ticket),
            "CCACHE_PREFIX_CPP": str(ticket),
        }
    return told


def compile(
    layout: Layout,
    settings: Settings,
    build: Path,
    targets: Sequence[str],
    *,
    setup: str,
    jobs: Jobs,
    memory: Memory,
    units: Sequence[Unit],
    run_log: RunLog,
    step: Step,
    keep_going: bool = False,
) -> Compiled:
    """Bring `targets` up to date in `build`, which is configured. `units` are those that are
    expected to be compiled; `setup` is what their costs depend on.

    Raises BuildError with the first error of the first unit that failed, with all budgets that were
    tried once memory has run out too often, and with what is full where a disk is. The same call
    goes on where this one ended.
    """
    if not targets:
        return Compiled((), 0.0, None, ())
    for sentence in mend(build):
        run_log.console.warn(sentence)
    planned = tuple(unit for unit in (unit_at(one.object) for one in units) if unit)
    argv: list[process.Argument] = [
        find(layout, settings),
        "-C",
        build,
        f"-j{bounds.visible(len(planned), jobs)}",
        *(["-k0"] if keep_going else []),
        *targets,
    ]
    work = Work(build, setup, jobs, memory, planned, keep_going=keep_going)
    return under_job_server(
        settings,
        argv,
        _child_environment(layout, settings, build, jobs),
        work,
        run_log=run_log,
        step=step,
    )


@dataclass(frozen=True)
class Work:
    """What a program that runs ninja compiles: where, within what, and which units, where that is
    known. `setup` is what costs depend on.
    """

    build: Path
    setup: str
    jobs: Jobs
    memory: Memory
    planned: tuple[CostUnit, ...] = ()
    keep_going: bool = False
    go_on: str = GO_ON


def under_job_server(
    settings: Settings,
    argv: Sequence[process.Argument],
    environment: Mapping[str, str],
    work: Work,
    *,
    run_log: RunLog,
    step: Step,
    on_line: Callable[[str, Meter], None] = lambda line, meter: None,
    cwd: Path | None = None,
) -> Compiled:
    """Run a program whose compilers ask for tickets in `work.build`, showing how far it is.
    `on_line` hears it too, with the meter.

    Raises BuildError as `compile` does.
    """
    history = History(history_file(settings), setup=work.setup)
    before, costs = history.entries, Costs(read_table()[0], history.entries)
    limits = Bounds(work.jobs.count, work.memory.budget_gib)
    job_server_ = job_server.JobServer(
        work.build / "tickets",
        Admission(limits),
        costs,
        look=lambda: jobs.memory_status(work.memory.reserve_gib),
        kills=jobs.kills,
        history=history,
        units=len(work.planned),
        keep_going=work.keep_going,
    )
    meter = Meter(
        job_server_, work.planned, costs, bounds=limits, console=run_log.console, step=step
    )
    began, failures, shown = time.monotonic(), Failures(), run_log.step
    # The bar shows what the meter says, not ninja's newest line.
    run_log.step = None

    def hear(line: str) -> None:
        failures.hear(line)
        on_line(line, meter)

    try:
        with job_server_, meter:
            process.run(
                argv, env=environment, run_log=run_log, on_line=hear, hint=work.go_on, cwd=cwd
            )
    except (BuildError, OSError) as exc:
        _write_trace(run_log, job_server_.finished, meter, began)
        raise _explained(exc, job_server_, failures, settings, work, run_log) from exc
    finally:
        run_log.step = shown
    seconds = time.monotonic() - began
    trace = _write_trace(run_log, job_server_.finished, meter, began)
    return Compiled(
        job_server_.finished, seconds, trace, progress.build_summary(job_server_.finished, before)
    )


def mend(build: Path) -> tuple[str, ...]:
    """Remove what is no record of ninja's where one should be, and say so: it would stop, or crash,
    on some of it.
    """
    said = []
    for name, head in _RECORDS.items():
        record = build / name
        try:
            is_right = read_regular(record).startswith(head)
        except FileNotFoundError:
            continue
        except OSError:
            is_right = False
        if not is_right:
            (
                shutil.rmtree(record)
                if record.is_dir() and not record.is_symlink()
                else record.unlink()
            )
            said.append(
                f"{build.name}/{name} was damaged and is begun anew: what it vouched for is"
                " compiled again"
            )
    return tuple(said)


def _child_environment(
    layout: Layout, settings: Settings, build: Path, jobs: Jobs
) -> dict[str, str]:
    """The environment of ninja itself: on its PATH each compiler takes a ticket, also one that a
    command calls by its name.
    """
    ticket = job_server.install(build / "tickets")
    told = settings.child_environment("build", environment(layout, settings, jobs, ticket))
    found = {
        name: [program] for name in _COMPILERS if (program := shutil.which(name, path=told["PATH"]))
    }
    for variable in ("CC", "CXX"):
        if words := _words(told.get(variable, "")):
            name = f"{variable}-{Path(words[-1]).name}"
            found[name], told[variable] = (
                words,
                str(build / "tickets" / job_server.STAND_INS / name),
            )
    stand_ins = job_server.stand_in(build / "tickets", found)
    # torch's builder calls the toolkit's nvcc by its path, or what this names
    # (torch/utils/cpp_extension.py).
    if "PYTORCH_NVCC" in told:
        told["PYTORCH_NVCC"] = f"{shlex.quote(str(ticket))} {told['PYTORCH_NVCC']}"
    elif "nvcc" in found:
        told["PYTORCH_NVCC"] = str(stand_ins / "nvcc")
    told.pop("CCACHE_NODEPEND", None)
    # ccache counts the g++ that nvcc will find on PATH as a part of the object, by date and size;
    # those of a stand-in are of this clone only.
    told.setdefault("CCACHE_PATH", told["PATH"])
    return told | {
        "PATH": os.pathsep.join([str(stand_ins), told["PATH"]]),
        "NINJA_STATUS": "[%f/%t] ",
    }


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        # Quotes that do not match: what takes the variable for a command will say so.
        return []


def _write_trace(
    run_log: RunLog, finished: Sequence[Finished], meter: Meter, began: float
) -> Path | None:
    """A trace that cannot be written is no reason to fail."""
    if run_log.path is None or not finished:
        return None
    try:
        return progress.write_timeline(run_log.path, finished, meter.samples, began=began)
    except OSError:
        return None


def _explained(
    exc: BuildError | OSError,
    job_server_: job_server.JobServer,
    failures: Failures,
    settings: Settings,
    work: Work,
    run_log: RunLog,
) -> Exception:
    """What a failure of ninja's means: memory, a disk, a compiler's own error, or what it said
    itself.
    """
    is_full = failures.has_no_space or (
        isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT)
    )
    log = (f"log: {run_log.path}",)
    if job_server_.trouble:
        one_by_one = (
            f"{work.go_on.partition('    ')[0]} --jobs 1    goes on where it was, one compiler at a"
            " time"
        )
        return BuildError(job_server_.trouble, hint=one_by_one, details=log)
    places = [work.build, Path(settings.child_environment("build").get("TMPDIR") or "/tmp")]
    full = [place for place in places if hardware.free_gib(place) < _FULL_GIB]
    if full or is_full:
        said = " and ".join(
            f"{place} has {hardware.free_gib(place) * 1024:.0f} MiB left"
            for place in full or places
        )
        hint = f"{shlex.join(['df', '-h', *map(str, full or places)])}    then {work.go_on}"
        return BuildError(f"the disk is full: {said}", hint=hint, details=log)
    if isinstance(exc, OSError) or not (failure := failures.first):
        return exc
    unit = unit_at(failure.output)
    name = f"{unit.source} of {unit.target}" if unit else failure.output
    return BuildError(
        run_log.redact(f"{name} failed: {failure.error}"),
        hint=work.go_on,
        details=(*(run_log.redact(line) for line in failure.shown), *log),
    )
