"""A wheel of Triton from its tree: setup.py drives CMake and ninja, under the same tickets, number
and memory as a rebuild of vLLM.

The build directory stays, so that a second build compiles what changed. The tree gets nothing but
what it ignores itself.
"""

import hashlib
import json
import platform
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from workspace.compile import job_server, ninja, triton_sources
from workspace.compile.costs import unit_at
from workspace.compile.jobs import Jobs, Memory
from workspace.compile.progress import Meter
from workspace.compile.triton_sources import FROM_SOURCE, Source, requirements
from workspace.core import process
from workspace.core.console import Step
from workspace.core.errors import BuildError, SourceError
from workspace.core.files import write_atomic
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import interpreter, toolchain, torch

GO_ON = f"{FROM_SOURCE}    goes on where it was"
# A link of all of LLVM holds some GiB, and the tickets reckon with compilers: more than so many at
# once are not worth it.
LINKS_AT_ONCE = 2
# Run-time words. Triton's CMake takes them for an assembler that is somewhere else, and builds a
# wheel without any.
_NOT_FOR_A_BUILD = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
_NO_NETWORK = re.compile(r"urllib\.error\.\w+|^\s*curl: \(\d+\)")
_STATUS = re.compile(r"^\[(\d+)/(\d+)\]")


@dataclass(frozen=True)
class Wheel:
    """What came out: the file, how long it took, and lines on the units for a person."""

    path: Path
    seconds: float
    units: int
    summary: tuple[str, ...]


def put_requirements(layout: Layout, settings: Settings, source: Source, *, run_log: RunLog) -> str:
    """Install what the build needs beside what is there; torch, and a Triton, stay as they are."""
    wanted = requirements(source)
    lacking = [line for line in wanted if not _is_there(layout, line)]
    if lacking:
        interpreter.install(
            layout, settings, lacking, run_log=run_log, constraints=torch.constraints(layout)
        )
    return f"{len(wanted)} wanted, {len(lacking)} installed"


def folder(layout: Layout, settings: Settings) -> Path:
    """The build directory: one for each Python and compiler, for CMake remembers both, whatever
    commit is built in it.
    """
    facts, told = interpreter.describe(layout, settings), settings.child_environment("build")
    compilers = [
        told.get("CC", ""),
        told.get("CXX", ""),
        toolchain.compiler_version(settings) or "",
    ]
    made_with = [str(layout.triton), facts.version if facts else "", platform.machine(), *compilers]
    return (
        layout.builds / f"triton-{hashlib.sha256(json.dumps(made_with).encode()).hexdigest()[:12]}"
    )


def environment(layout: Layout, settings: Settings, jobs: Jobs, build: Path) -> dict[str, str]:
    """Return what setup.py and all that it starts are told."""
    ticket = job_server.install(build / "tickets")
    told = settings.child_environment("build", ninja.environment(layout, settings, jobs, ticket))
    if told.get("TRITON_OFFLINE_BUILD", "").lower() not in ("1", "on", "yes", "true", "y"):
        told = {name: text for name, text in told.items() if name not in _NOT_FOR_A_BUILD}
    launchers = [
        f"-D{name}={word}"
        for name, word in ninja.launchers(settings, ticket).items()
        if "_CUDA_" not in name
    ]
    return told | {
        "TRITON_BUILD_DIR": str(build / "cmake"),
        "TRITON_HOME": str(triton_sources.home_of(settings)),
        # Its own way to ccache would come instead of the launcher that asks for a ticket, and then
        # ask ccache by itself.
        "TRITON_BUILD_WITH_CCACHE": "OFF",
        "TRITON_PARALLEL_LINK_JOBS": str(min(jobs.count, LINKS_AT_ONCE)),
        "TRITON_APPEND_CMAKE_ARGS": (
            " ".join(
                [*map(shlex.quote, launchers), told.get("TRITON_APPEND_CMAKE_ARGS", "")]
            ).strip()
        ),
        # setuptools reads it beside setup.cfg: what it assembles lies in the build directory, not
        # in the tree.
        "DIST_EXTRA_CONFIG": str(_configured(build)),
        "NINJA_STATUS": "[%f/%t] ",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def build_wheel(
    layout: Layout,
    settings: Settings,
    source: Source,
    *,
    jobs: Jobs,
    memory: Memory,
    run_log: RunLog,
    step: Step,
) -> Wheel:
    """Compile what changed and pack it. Raises BuildError with the first error of the first unit
    that failed; the same call goes on there.
    """
    build = folder(layout, settings)
    told = environment(layout, settings, jobs, build)
    out = build / "dist"
    shutil.rmtree(out, ignore_errors=True)
    _clear_assembled(build)
    for place in _cmake_folders(build):
        for sentence in ninja.mend(place):
            run_log.console.warn(sentence)
    argv: list[process.Argument] = [
        interpreter.uv(layout),
        "build",
        "--wheel",
        "--no-build-isolation",
        "--no-config",
        "--python",
        layout.environment_python,
    ]
    argv += ["--out-dir", out, source.project]
    work = ninja.Work(
        build,
        f"triton {platform.machine()} {toolchain.compiler_version(settings) or 'none'}",
        jobs,
        memory,
        go_on=GO_ON,
    )
    known, configured = False, Configure()

    def hear(line: str, meter: Meter) -> None:
        nonlocal known
        configured.hear(line)
        found = _STATUS.match(line.strip())
        if found and not known:
            known = True
            _expect(build, int(found[2]), meter)

    try:
        made = ninja.under_job_server(
            settings, argv, told, work, run_log=run_log, step=step, on_line=hear, cwd=layout.root
        )
    except BuildError as exc:
        if configured.network:
            why = (
                "the build of Triton fetches something by itself, and could not:"
                f" {configured.network}"
            )
            hint = (
                "the log says what; a network, or its own variable for a local folder, then"
                f" {FROM_SOURCE}"
            )
            raise SourceError(why, hint=hint, details=exc.details) from exc
        if not configured.error:
            raise
        raise BuildError(
            f"Triton cannot be configured: {configured.error}", hint=exc.hint, details=exc.details
        ) from exc
    wheels = sorted(out.glob("triton-*.whl"))
    if len(wheels) != 1:
        raise BuildError(
            f"the build ended well and left {len(wheels)} wheels of Triton in"
            f" {layout.relative(out)}",
            hint=f"log: {run_log.path}",
        )
    return Wheel(wheels[0], made.seconds, len(made.finished), made.summary)


class Configure:
    """Hears what CMake says, for the paragraph below the heading of its first error; and of a
    download that Triton's own script makes.
    """

    def __init__(self) -> None:
        self.network = ""
        self._lines: list[str] | None = None
        self._is_over = False

    @property
    def error(self) -> str:
        return " ".join(self._lines or ())

    def hear(self, line: str) -> None:
        self.network = self.network or (line.strip() if _NO_NETWORK.search(line) else "")
        if self._lines is not None and not self._is_over:
            self._is_over = not line.strip()
            self._lines += [line.strip()] if line.strip() else []
        elif self._lines is None and line.lstrip().startswith("CMake Error at "):
            self._lines = []


def _expect(build: Path, due: int, meter: Meter) -> None:
    """Tell the meter all units where as many steps are due: of a few that are due, only ninja knows
    which.
    """
    for place in _cmake_folders(build):
        try:
            entries = json.loads((place / "compile_commands.json").read_bytes())
            units = [unit for entry in entries if (unit := unit_at(entry["output"]))]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if due >= len(units):
            meter.expect(units)


def _cmake_folders(build: Path) -> tuple[Path, ...]:
    """Where CMake configures: in TRITON_BUILD_DIR itself, or in a folder of the platform below it,
    as trees of some ages have it.
    """
    return tuple(
        path.parent
        for path in sorted((build / "cmake").glob("**/CMakeCache.txt"))
        if len(path.relative_to(build).parts) <= 3
    )


def _configured(build: Path) -> Path:
    path = build / "setuptools.cfg"
    text = f"[build]\nbuild_base = {build / 'assembled'}\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomic(path, text.encode())
    return path


def _clear_assembled(build: Path) -> None:
    """Remove what setuptools copied for an earlier wheel: it takes files along that the tree no
    longer has. What was linked there stays, for ninja.
    """
    for path in sorted((build / "assembled").glob("**/*"), reverse=True):
        if "_C" in path.relative_to(build).parts:
            continue
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        else:
            path.unlink()


def _is_there(layout: Layout, line: str) -> bool:
    """Whether `.vllm` has what a line asks for; one whose marker is of no concern here counts as
    there.
    """
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    try:
        wanted = Requirement(line)
    except InvalidRequirement as exc:
        raise BuildError(
            f"Triton asks for {line!r}, which is no requirement: {exc}",
            hint=f"git -C {layout.relative(layout.triton)} log -1",
        ) from exc
    if wanted.marker and not wanted.marker.evaluate(
        {"extra": "", "python_version": _minor(layout)}
    ):
        return True
    version = interpreter.installed(layout).get(canonicalize_name(wanted.name))
    return version is not None and wanted.specifier.contains(version, prereleases=True)


def _minor(layout: Layout) -> str:
    folders = interpreter.site_packages(layout)
    return (
        folders[0].parent.name.removeprefix("python")
        if folders
        else f"{sys.version_info[0]}.{sys.version_info[1]}"
    )
