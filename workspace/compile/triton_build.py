"""Triton from its tree: sources with patches, requirements, and the wheel.

setup.py runs CMake and ninja under the same job server and limits as a rebuild of vLLM. Triton's
own script (python/build_helpers.py) fetches LLVM, NVIDIA's tools and a JSON library while CMake
configures, and keeps them in TRITON_HOME. The build directory stays, so a second build compiles
only what changed. In the tree the build writes only files that git ignores.
"""

import hashlib
import json
import platform
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workspace.compile import job_server, ninja
from workspace.compile.costs import unit_at
from workspace.compile.jobs import Cells, Jobs, Memory, Meter
from workspace.core import hints, process, records
from workspace.core.console import RunLog, Step
from workspace.core.errors import BuildError, CheckoutError, SettingsError, SourceError
from workspace.core.files import write_atomic
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import interpreter, torch
from workspace.machine.machine import Machine
from workspace.repo import checkout, patches, pins
from workspace.repo.git import Git

FROM_SOURCE = "./scripts/inv fix-triton --from-source"
# One CMake serves vLLM and Triton (vLLM's requirements/build, Triton's pyproject.toml).
CMAKE = "cmake>=3.26.1,<4"
# setup.py needs these by import or on PATH; a build without isolation must have them.
_ALWAYS = ("setuptools", "wheel", "ninja")
MIRROR = "TRITON_DOWNLOADS_MIRROR"
# A link of all of LLVM takes several GiB, while the job tokens count compilers: limit the links.
LINKS_AT_ONCE = 2
# Variables of the run time. Triton's CMake takes them for an external assembler, and then builds a
# wheel without one.
_NOT_FOR_A_BUILD = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
_NO_NETWORK = re.compile(r"urllib\.error\.\w+|^\s*curl: \(\d+\)")
_STATUS = re.compile(r"^\[(\d+)/(\d+)\]")


@dataclass(frozen=True)
class Source:
    """A tree to build. `project` is the folder with its setup.py, the root or python/; `content` is
    its tree OID, `patches` the number of applied patches.
    """

    tree: Path
    project: Path
    ref: str
    commit: str
    content: str
    patches: int


def prepare_source(layout: Layout, settings: Settings, *, run_log: RunLog, step: Step) -> Source:
    """Put vendor/triton at the pin with its patches, and clone it if it is missing.

    Raises CheckoutError if it has edits, commits that are no patches, or an unfinished operation;
    SourceError if it cannot be fetched.
    """
    pin = pins.load(layout.pins).triton
    there = checkout.ensure(layout, pin, settings, choice="git", run_log=run_log, step=step)
    stack = patches.apply(layout, "triton", pin, there, run_log=run_log)
    shown = layout.relative(layout.triton)
    if stack.dirty:
        raise CheckoutError(
            f"{shown} has local edits ({', '.join(stack.dirty[:3])}) that are in no patch; they are"
            " kept, and nothing is built",
            hint=hints.text("compile.triton_edits", shown=shown),
        )
    project = next(
        (
            folder
            for folder in (layout.triton, layout.triton / "python")
            if (folder / "setup.py").is_file()
        ),
        None,
    )
    if project is None:
        raise BuildError(
            f"{shown} has no setup.py, neither in its root nor in python/",
            hint=hints.text("compile.triton_origin", shown=shown),
        )
    content = Git(layout.triton).tree("HEAD")
    step.reason = f"{pin.tag} {pin.commit[:12]}" + (
        f", {len(stack.names)} patches" if stack.names else ""
    )
    return Source(layout.triton, project, pin.tag, pin.commit, content, len(stack.names))


def requirements(source: Source) -> tuple[str, ...]:
    """Return what the build needs in `.vllm`: the tree's pyproject.toml and
    python/requirements.txt, except for CMake, which vLLM needs too.
    """
    lines: list[str] = []
    try:
        project = records.parse_toml((source.project / "pyproject.toml").read_bytes())
        system = records.convert(project.get("build-system", {}), dict[str, Any])
        lines += records.convert(system.get("requires", []), list[str])
    except FileNotFoundError:
        pass
    except records.DecodeError as exc:
        raise BuildError(
            f"pyproject.toml of Triton cannot be read: {exc}",
            hint=hints.text("core.git_status", folder=source.tree),
        ) from exc
    listed = source.tree / "python" / "requirements.txt"
    if listed.is_file():
        lines += [
            line.strip()
            for line in listed.read_text(encoding="utf-8").splitlines()
            if re.match(r"\s*[A-Za-z]", line)
        ]
    named = {re.split(r"[^A-Za-z0-9_.-]", line)[0].lower(): line for line in (*_ALWAYS, *lines)}
    named["cmake"] = CMAKE
    return tuple(named[name] for name in sorted(named))


def is_offline(environment: Mapping[str, str]) -> bool:
    """Return whether a build of Triton downloads nothing, as its setup.py reads the switch."""
    return environment.get("TRITON_OFFLINE_BUILD", "").lower() in ("1", "on", "yes", "true", "y")


def require_local_folders(environment: Mapping[str, str]) -> None:
    """Raise SettingsError where an offline build lacks a folder, before any compilation."""
    missing = [name for name in ("LLVM_SYSPATH", "JSON_SYSPATH") if not environment.get(name)]
    if is_offline(environment) and missing:
        raise SettingsError(
            f"TRITON_OFFLINE_BUILD is on, but no local folder is set in {' and '.join(missing)}",
            hint=hints.text("compile.set_folder", variable=missing[0]),
        )


# The mirror of the downloads of Triton's build, which Python imports at its start as
# `sitecustomize`.
_MIRROR_PROGRAM = '''"""Mirror of the downloads of Triton's build.

Each https:// address is opened below TRITON_DOWNLOADS_MIRROR, the address of a server or of a
folder. A folder may also hold the files side by side.
"""

import os
import urllib.request
from typing import Any
from urllib.parse import unquote, urlsplit

VARIABLE = "TRITON_DOWNLOADS_MIRROR"


class Mirror(urllib.request.HTTPSHandler):
    """Handler of https:// addresses that opens the same file of the mirror."""

    def https_open(self, req: urllib.request.Request) -> Any:
        mirror = os.environ[VARIABLE].rstrip("/")
        address = f"{mirror}/{req.full_url.partition('://')[2]}"
        if mirror.startswith("file:") and not os.path.isfile(unquote(urlsplit(address).path)):
            address = f"{mirror}/{address.rpartition('/')[2]}"
        # An opener of its own: the mirror may be an https:// address, or redirect to one.
        plain = urllib.request.build_opener()
        request = urllib.request.Request(address, headers=req.headers)
        answer = plain.open(request, timeout=req.timeout)
        # A file has no status, and urllib requires one of each answer to an https:// request.
        answer.code, answer.msg = answer.code or 200, "OK"
        return answer


if VARIABLE in os.environ:
    urllib.request.install_opener(urllib.request.build_opener(Mirror))
'''


def mirror(layout: Layout, settings: Settings, folder: Path) -> dict[str, str]:
    """Return the variables that let Triton's script download from TRITON_DOWNLOADS_MIRROR.

    `folder` gets the module of the mirror under the name that Python imports at its start.
    """
    place = settings.text(MIRROR)
    if not place:
        return {}
    write_atomic(folder / "sitecustomize.py", _MIRROR_PROGRAM.encode())
    address = place if "://" in place else Path(place).expanduser().absolute().as_uri()
    return {"PYTHONPATH": str(folder), MIRROR: address}


def home_of(settings: Settings) -> Path:
    """Return TRITON_HOME of a build: the folder of the downloads of all clones."""
    named = settings.passed.get("TRITON_HOME")
    return Path(
        settings.shell.get("TRITON_HOME")
        or (named.text if named else "")
        or settings.cache / "triton"
    ).expanduser()


@dataclass(frozen=True)
class Wheel:
    """Built wheel: the file, the seconds and units it took, and lines to print."""

    path: Path
    seconds: float
    units: int
    summary: tuple[Cells, ...]


def install_requirements(
    layout: Layout, settings: Settings, source: Source, *, run_log: RunLog
) -> str:
    """Install the missing requirements of the build; torch and an installed Triton stay as they
    are.
    """
    wanted = requirements(source)
    interpreter.install(
        layout, settings, wanted, run_log=run_log, constraints=torch.constraints(layout)
    )
    return f"{len(wanted)} in .vllm"


def folder(machine: Machine) -> Path:
    """Return the build directory of this Python and compiler: CMake's cache keeps both, for any
    commit.
    """
    layout, facts = machine.layout, machine.python()
    variables = machine.settings.child_environment("build")
    compilers = [
        variables.get("CC", ""),
        variables.get("CXX", ""),
        machine.compiler_version() or "",
    ]
    made_with = [str(layout.triton), facts.version if facts else "", platform.machine(), *compilers]
    return (
        layout.builds / f"triton-{hashlib.sha256(json.dumps(made_with).encode()).hexdigest()[:12]}"
    )


def environment(layout: Layout, settings: Settings, jobs: Jobs, build: Path) -> dict[str, str]:
    """Return the environment of setup.py and its children."""
    launcher = job_server.install(build / job_server.FOLDER)
    present = settings.child_environment("build")
    launchers = [
        f"-D{name}={command}"
        for name, command in ninja.launchers(settings, launcher).items()
        if "_CUDA_" not in name
    ]
    arguments = [*map(shlex.quote, launchers), present.get("TRITON_APPEND_CMAKE_ARGS", "")]
    given: dict[str, str | None] = {
        **ninja.environment(layout, settings, jobs, launcher),
        **({} if is_offline(present) else dict.fromkeys(_NOT_FOR_A_BUILD)),
        "TRITON_BUILD_DIR": str(build / "cmake"),
        "TRITON_HOME": str(home_of(settings)),
        **mirror(layout, settings, build / "mirror"),
        "TRITON_PARALLEL_LINK_JOBS": str(min(jobs.count, LINKS_AT_ONCE)),
        "TRITON_APPEND_CMAKE_ARGS": " ".join(arguments).strip(),
        # setuptools reads it beside setup.cfg: it puts the assembled files into the build directory
        # instead of the tree.
        "DIST_EXTRA_CONFIG": str(_configured(build)),
    }
    return settings.child_environment("triton", given, layout=layout)


def build_wheel(
    machine: Machine,
    source: Source,
    *,
    jobs: Jobs,
    memory: Memory,
    run_log: RunLog,
    step: Step,
) -> Wheel:
    """Compile what changed and pack it.

    Raises BuildError with the first error of a failed unit; the same call resumes the build.
    """
    layout, settings, build = machine.layout, machine.settings, folder(machine)
    variables = environment(layout, settings, jobs, build)
    out = build / "dist"
    _prepare(build, out, run_log)
    setup = f"triton {platform.machine()} {machine.compiler_version() or 'none'}"
    work = ninja.Work(build, setup, jobs, memory, command=FROM_SOURCE)
    program = ninja.Program(_command_line(layout, source, out), variables, layout.root)
    output = BuildOutput(build)
    try:
        made = ninja.under_job_server(
            settings, program, work, run_log=run_log, step=step, on_line=output.read_line
        )
    except BuildError as exc:
        raise _explained(exc, output) from exc
    wheels = sorted(out.glob("triton-*.whl"))
    if len(wheels) != 1:
        raise BuildError(
            f"the build succeeded but left {len(wheels)} wheels of Triton in"
            f" {layout.relative(out)}",
            hint=hints.text("core.read_log", path=run_log.path),
        )
    return Wheel(wheels[0], made.seconds, len(made.finished), made.summary)


def _prepare(build: Path, out: Path, run_log: RunLog) -> None:
    """Remove what earlier builds left: wheels, assembled files, damaged records of ninja."""
    # setuptools would also pack files that the tree no longer has.
    for old in (out, build / "assembled"):
        shutil.rmtree(old, ignore_errors=True)
    for place in _cmake_folders(build):
        for sentence in ninja.repair(place):
            run_log.console.warn(sentence)


def _command_line(layout: Layout, source: Source, out: Path) -> list[process.Argument]:
    return [
        interpreter.uv(layout),
        "build",
        "--wheel",
        "--no-build-isolation",
        "--no-config",
        "--python",
        layout.environment_python,
        "--out-dir",
        out,
        source.project,
    ]


def _explained(exc: BuildError, output: "BuildOutput") -> BuildError | SourceError:
    """Return the error for a failed build: a download, CMake's first error, or `exc` itself."""
    if output.network_error:
        return SourceError(
            f"Triton's build cannot download a file: {output.network_error}",
            hint=hints.text("compile.triton_mirror"),
            # The log only: the last lines are tracebacks of setup.py.
            details=exc.details[-1:],
        )
    if output.cmake_error:
        return BuildError(
            f"Triton cannot be configured: {output.cmake_error}",
            hint=exc.hint,
            details=exc.details,
        )
    return exc


class BuildOutput:
    """Reader of a build's output: CMake's first error, a failed download of Triton's script, and
    ninja's number of steps, with which the units become known.
    """

    def __init__(self, build: Path) -> None:
        self.network_error = ""
        self._build = build
        self._lines: list[str] | None = None
        self._is_over = self._has_units = False

    @property
    def cmake_error(self) -> str:
        return " ".join(self._lines or ())

    def read_line(self, line: str, meter: Meter) -> None:
        """Process a line of the output."""
        self._read_error(line)
        found = _STATUS.match(line.strip())
        if found and not self._has_units:
            self._has_units = True
            _expect(self._build, int(found[2]), meter)

    def _read_error(self, line: str) -> None:
        """Keep the paragraph below the heading of CMake's first error."""
        if not self.network_error and _NO_NETWORK.search(line):
            self.network_error = line.strip()
        if self._lines is not None and not self._is_over:
            self._is_over = not line.strip()
            self._lines += [line.strip()] if line.strip() else []
        elif self._lines is None and line.lstrip().startswith("CMake Error at "):
            self._lines = []


def _expect(build: Path, due: int, meter: Meter) -> None:
    """Give the meter all units if all of them are due: if fewer steps are due, only ninja knows
    which.
    """
    for place in _cmake_folders(build):
        try:
            entries = records.load(place / "compile_commands.json", list[dict[str, str]]) or ()
            units = [unit for entry in entries if (unit := unit_at(entry["output"]))]
        except (LookupError, records.DecodeError):
            continue
        if due >= len(units):
            meter.expect(units)


def _cmake_folders(build: Path) -> tuple[Path, ...]:
    """Return the folders that CMake configured: TRITON_BUILD_DIR, or a platform folder in it (some
    versions).
    """
    return tuple(
        path.parent
        for path in sorted((build / "cmake").glob("**/CMakeCache.txt"))
        if len(path.relative_to(build).parts) <= 3
    )


def _configured(build: Path) -> Path:
    """Write the configuration of setuptools, and return its path."""
    path = build / "setuptools.cfg"
    text = f"[build]\nbuild_base = {build / 'assembled'}\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomic(path, text.encode())
    return path
