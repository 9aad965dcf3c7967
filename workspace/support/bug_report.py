"""inv report: one archive for a bug report, with everything private masked.

A part that cannot be collected is replaced by the reason; only a folder that cannot be written
stops a report. It takes no lock, so a verb that hangs can be reported while it hangs.
"""

import contextlib
import datetime
import gzip
import io
import json
import os
import platform
import re
import shlex
import sys
import tarfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from email import message_from_bytes
from email.policy import default as mail
from pathlib import Path

from workspace.core import hints, process
from workspace.core import settings as core_settings
from workspace.core.console import Console, State
from workspace.core.errors import SettingsError, ToolchainError, WorkspaceError, counted
from workspace.core.files import write_atomic
from workspace.core.known_settings import KNOWN, is_secret
from workspace.core.paths import PROJECTS, Layout
from workspace.core.process import Slow, There
from workspace.core.redaction import Redactor
from workspace.core.settings import Settings
from workspace.install import status
from workspace.machine import doctor, hardware, run_environment
from workspace.machine.machine import Machine
from workspace.repo.git import Git

KEPT_REPORTS = 5
SHOWN_LOGS = 5
SHOWN_CONFIGURES = 3
SHOWN_NAMES = 100
ANSWER_S = 8.0
# The import of torch from a cold disk takes most of it.
COLLECT_ENV_S = 60.0
_MEMORY_FILES = (
    *("memory.events", "memory.max", "memory.peak", "memory.swap.max"),
    *("memory.oom_control", "memory.limit_in_bytes"),
)
# Folders of .workspace that hold programs and downloads.
_NOT_SEARCHED = frozenset({"tools", "uv", "models", "reports", "site-packages"})
_CONFIGURE_LOGS = frozenset({"CMakeConfigureLog.yaml", "CMakeError.log", "CMakeOutput.log"})
_OOM = re.compile(
    r"out of memory|oom[-_ ]?(?:kill|reap)|killed process|NVRM: (?:Xid|.*NV_ERR_NO_MEMORY)",
    re.IGNORECASE,
)
_NAMES_OF_INTEREST = re.compile(
    r"(VLLM|TORCH|PYTORCH|TRITON|CUDA|NCCL|NVIDIA|HF|UV|PIP|LD|OMP|MKL|CMAKE|CC|CXX|CFLAGS|CXXFLAGS"
    r"|CCACHE|PYTHON|XDG|TMPDIR|PATH|HOME|LANG|LC)(_|$)"
)

Files = Mapping[str, str]
Collector = Callable[[Machine], Files]


@dataclass(frozen=True)
class Part:
    """One part of the archive: masked files by masked names; `lack` is why they are missing."""

    name: str
    files: Mapping[str, bytes]
    lack: str = ""


def settings_of(layout: Layout) -> Settings:
    """Return the settings, or defaults where .env or the shell has errors."""
    core_settings.forget_outer_git()
    try:
        return core_settings.load(layout)
    except SettingsError:
        # A folder without .env, and defaults instead of all values of the shell.
        return core_settings.load(
            Layout(layout.probes), flags={name: setting.default for name, setting in KNOWN.items()}
        )


def write(layout: Layout, settings: Settings, *, console: Console) -> Path:
    """Write the report, print its path on stdout and its parts as rows.

    Raises ToolchainError where .workspace cannot be written.
    """
    folder = layout.state / "reports"
    name = f"report-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S-%f')}"
    path = folder / f"{name}.tar.gz"
    with _writing(folder):
        # Before the collection, which takes half a minute.
        write_atomic(path, b"", mode=0o600)
    try:
        redactor = Redactor(hardware.private(layout, settings))
        parts = _collect(Machine(layout, settings), redactor, console, PARTS)
        with _writing(folder):
            write_atomic(path, _archive(parts, name), mode=0o600)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    for old in sorted(folder.glob("report-*.tar.gz"))[:-KEPT_REPORTS]:
        old.unlink(missing_ok=True)
    for part in parts:
        size = sum(len(content) for content in part.files.values())
        files = counted(len(part.files), "file")
        console.row(
            State.WARN if part.lack else State.OK,
            part.name,
            part.lack or f"{files}, {size / 1024:.1f} KiB",
        )
    console.info(
        f"{path.stat().st_size / 1024:.0f} KiB; secrets, names, addresses and places are masked"
    )
    console.info(
        f"read it before you share it: tar -xOzf {shlex.quote(layout.relative(path))} | less"
    )
    console.data(str(path))
    return path


def pack(
    machine: Machine,
    more: Mapping[str, Collector],
    redactor: Redactor,
    path: Path,
    console: Console,
) -> None:
    """Write the parts of a report, and `more` before them, into one masked archive at `path`.

    Raises ToolchainError where its folder cannot be written.
    """
    parts = _collect(machine, redactor, console, {**more, **PARTS})
    with _writing(path.parent):
        write_atomic(path, _archive(parts, path.name.removesuffix(".tar.gz")), mode=0o600)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise ToolchainError(
            f"{folder} cannot be written: {exc.strerror}; a report needs a few MB there",
            hint=hints.text("core.disk_of", folder=hardware.existing(folder)),
        ) from exc


def _collect(
    machine: Machine, redactor: Redactor, console: Console, collectors: Mapping[str, Collector]
) -> tuple[Part, ...]:
    """Collect all parts in parallel: most of the time goes into waiting for programs."""
    with (
        console.step("collecting") as view,
        ThreadPoolExecutor(max_workers=len(collectors)) as pool,
    ):
        futures = {name: pool.submit(collector, machine) for name, collector in collectors.items()}
        try:
            parts = tuple(_part(name, future, redactor) for name, future in futures.items())
        except BaseException:
            _end_children()
            raise
        view.reason = f"{sum(not part.lack for part in parts)} of {len(parts)} parts"
    return parts


def _part(name: str, future: Future[Files], redactor: Redactor) -> Part:
    """Return the part with every byte, name and sentence masked."""
    try:
        files, lack = future.result(), ""
    except WorkspaceError as exc:
        lack = exc.message
        hint = (f"hint: {exc.hint}",) if exc.hint else ()
        lines = (f"error: {exc.message}", *hint, *exc.details)
        files = {f"{name}.txt": "".join(f"{line}\n" for line in lines)}
    except OSError as exc:
        lack = f"{exc.filename or name}: {exc.strerror or exc}"
        files = {f"{name}.txt": f"error: {lack}\n"}
    except Exception as exc:
        # A defect of the workspace belongs into the report.
        lack = f"{type(exc).__name__}: {exc}"
        files = {f"{name}.txt": "".join(traceback.format_exception(exc))}
    masked: dict[str, bytes] = {}
    for file, text in files.items():
        content = redactor.content(text.encode("utf-8", "replace"))
        shown = redactor.name(file)
        while shown in masked:
            shown += "+"
        masked[shown] = content if content is not None else b"left out: not text\n"
    return Part(name, masked, redactor.text(lack).replace("\n", " "))


def _end_children() -> None:
    """Terminate all programs after ^C: ^C does not reach their process groups."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.terminate()


def _archive(parts: Sequence[Part], name: str) -> bytes:
    """Pack the parts without an owner, host or file name in the headers."""
    packed = io.BytesIO()
    now = int(datetime.datetime.now(datetime.UTC).timestamp())
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=now) as zipped,
        tarfile.open(mode="w", fileobj=zipped, format=tarfile.PAX_FORMAT) as archive,
    ):
        for part in parts:
            for file, content in part.files.items():
                entry = tarfile.TarInfo(f"{name}/{file}")
                entry.size, entry.mtime, entry.mode = len(content), now, 0o644
                archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def _output(
    argv: Sequence[str],
    settings: Settings,
    *,
    timeout_s: float = ANSWER_S,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Return the output of a program, with its status if it failed.

    Raises ToolchainError where the program is missing or gives no answer in time.
    """
    environment = env or settings.child_environment("build")
    answer = process.ask(argv, env=environment, cwd=cwd, limit_s=timeout_s)
    if not isinstance(answer, There):
        reason = f"gave no answer in {timeout_s:g} s" if isinstance(answer, Slow) else "is missing"
        raise ToolchainError(f"{argv[0]} {reason}")
    done = answer.value
    failure = f"{Path(argv[0]).name} {process.describe_status(done.returncode)}\n"
    errors = f"-- stderr\n{done.stderr}" if done.stderr.strip() else ""
    return done.stdout + errors + (failure if done.returncode else "")


def _status(machine: Machine) -> Files:
    out = io.StringIO()
    status.show(machine, console=Console(out=out, err=io.StringIO()), as_json=True)
    return {"status.json": out.getvalue()}


def _doctor(machine: Machine) -> Files:
    out = io.StringIO()
    console = Console(out=out, err=io.StringIO())
    try:
        doctor.show(machine, console=console, as_json=True, offline=True)
    except ToolchainError:
        # The doctor prints its rows before it fails.
        if not out.getvalue():
            raise
    return {"doctor.json": out.getvalue()}


def _settings(machine: Machine) -> Files:
    """Return names of settings, and values only of known settings that are not secret."""
    layout, settings = machine.layout, machine.settings
    assignments = hardware.assignments(layout.dotenv)
    written = {name: _shown(name, text) for name, text in assignments}
    record: dict[str, object] = {
        "settings": {
            name: f"{_shown(name, value.text)} ({value.source})"
            for name, value in settings.values.items()
        },
        ".env": written if layout.dotenv.exists() else None,
        "shell hides .env": sorted(
            name for name, text in assignments if settings.shell.get(name, text) != text
        ),
        "set in the shell": sorted(
            name for name in settings.shell if _NAMES_OF_INTEREST.match(name)
        ),
    }
    try:
        core_settings.load(layout)
    except SettingsError as exc:
        record["problem"] = exc.message
    return {"settings.json": json.dumps(record, indent=1) + "\n"}


def _shown(name: str, text: str) -> str:
    return text if text and name in KNOWN and not is_secret(name) else "set" if text else "unset"


def _stamps(machine: Machine) -> Files:
    layout = machine.layout
    folder = layout.stamp("vllm").parent
    if not folder.is_dir():
        raise ToolchainError("there is no .vllm with stamps", hint=hints.text("inv.bootstrap"))
    paths = [path for path in sorted(folder.glob("*")) if path.is_file()]
    others = (layout.lock, layout.state / "constraints.txt")
    paths += [path for path in others if path.is_file() and path.stat().st_size]
    return {f"stamps/{path.name}": hardware.tail_of(path) for path in paths}


def _pins(machine: Machine) -> Files:
    """Return pins and series; of each patch only its headers and the size of its changes."""
    layout = machine.layout
    files = {"pins.toml": hardware.tail_of(layout.pins)}
    for project in PROJECTS:
        folder = layout.patches(project)
        if (folder / "series").exists():
            patches = [_described(path, machine) for path in sorted(folder.glob("*.patch"))]
            text = "\n".join((hardware.tail_of(folder / "series"), *patches))
            files[f"patches/{project}.txt"] = text
    return files


def _described(path: Path, machine: Machine) -> str:
    """Return a patch's subject and status, and each file with its added and removed lines."""
    raw = hardware.read_small(path)
    subject = str(message_from_bytes(raw, policy=mail).get("Subject", "no subject"))
    status = re.search(rb"^Upstream-Status: .*$", raw, re.MULTILINE)
    lines = [
        path.name,
        f"  Subject: {' '.join(subject.split())}",
        f"  {status[0].decode('utf-8', 'replace') if status else 'no Upstream-Status'}",
    ]
    argv = ["git", "apply", "--numstat", str(path)]
    # In a subfolder of a repository git leaves out the paths above it.
    sizes = _output(argv, machine.settings, cwd=machine.layout.root)
    lines += [f"  {line}" for line in sizes.splitlines()]
    return "\n".join(lines) + "\n"


def _logs(machine: Machine) -> Files:
    logs = sorted(machine.layout.logs.glob("*.log"))[-SHOWN_LOGS:]
    if not logs:
        raise ToolchainError("no verb has written a log yet")
    return {f"logs/{path.name}": hardware.tail_of(path) for path in logs}


def _configures(machine: Machine) -> Files:
    found: list[Path] = []
    state = machine.layout.state
    for place, folders, names in os.walk(state):
        folders[:] = [name for name in folders if name not in _NOT_SEARCHED]
        found += [Path(place, name) for name in names if name in _CONFIGURE_LOGS]
    if not found:
        raise ToolchainError("no build folder below .workspace was configured")
    newest = sorted(found, key=lambda path: path.stat().st_mtime)[-SHOWN_CONFIGURES:]
    return {f"cmake/{path.relative_to(state)}": hardware.tail_of(path) for path in newest}


def _versions(machine: Machine) -> Files:
    """Return facts of the machine, and the packages; the doctor has the versions of programs."""
    release = hardware.read_small(Path("/etc/os-release")).decode("utf-8", "replace")
    memory = [
        f"{name}: {kib} kB"
        for name, kib in hardware.read_meminfo().items()
        if name.startswith(("Mem", "Swap", "Cached"))
    ]
    kernel = (
        f"kernel {platform.system()} {platform.release()} {platform.version()}"
        f" {platform.machine()}, {' '.join(platform.libc_ver())}"
    )
    cores = f"{os.cpu_count()} CPUs, {len(os.sched_getaffinity(0))} usable"
    python = f"python of the tools {sys.version}"
    lines = [kernel, cores, *release.splitlines()[:6], *memory, python]
    driver = machine.driver
    lines += ["", f"{driver.gpus()}, CUDA {driver.cuda()}, own memory: {driver.memories()}"]
    packages = "".join(
        f"{name}=={version}\n" for name, version in sorted(machine.packages().items())
    )
    return {
        "versions.txt": "\n".join(lines) + "\n",
        "packages.txt": packages or "there are no packages in .vllm\n",
    }


def _kernel(machine: Machine) -> Files:
    """Return the kernel's kills for memory, and the limits of the control group."""
    try:
        output = _output(["dmesg"], machine.settings)
        kills = [line for line in output.splitlines() if _OOM.search(line)][-SHOWN_NAMES:]
        refused = output.rstrip() if "dmesg exited" in output else ""
    except ToolchainError as exc:
        kills, refused = [], exc.message
    lines = ["# dmesg: out of memory, NVIDIA Xid", *(kills or [refused or "no such line"])]
    if refused:
        lines.append(
            "dmesg needs more rights; to see it yourself: sudo dmesg | grep -iE 'out of"
            " memory|killed process'"
        )
    return {"kernel.txt": "\n".join((*lines, *_memory_limits())) + "\n"}


def _memory_limits() -> Iterator[str]:
    """Yield the files of the control groups' memory (cgroups(7), versions 1 and 2)."""
    for _, folder in hardware.control_groups():
        for file in (folder / name for name in _MEMORY_FILES):
            if file.exists():
                yield f"# {file}\n{hardware.read_small(file).decode().strip()}"


def _collect_env(machine: Machine) -> Files:
    """Run vLLM's collect_env, which its maintainers ask for, with variables that may be shown."""
    layout, settings = machine.layout, machine.settings
    if not os.access(layout.environment_python, os.X_OK):
        raise ToolchainError("there is no .vllm for collect_env", hint=hints.text("inv.bootstrap"))
    run_environment.require_own_tree(machine)
    inherited = settings.child_environment("run").get("PATH", "")
    # collect_env runs `uv pip list` and does not check its result.
    path = os.pathsep.join([str(layout.tools / "bin"), str(layout.environment / "bin"), inherited])
    variables = settings.child_environment("report", {"PATH": path}, layout=layout)
    shown = {
        name: text
        for name, text in variables.items()
        if _NAMES_OF_INTEREST.match(name) and not is_secret(name)
    }
    argv = (str(layout.environment_python), "-m", "vllm.collect_env")
    output = _output(argv, settings, timeout_s=COLLECT_ENV_S, env=shown, cwd=layout.environment)
    return {"collect-env.txt": output}


def _smoke(machine: Machine) -> Files:
    record = machine.layout.smoke_record
    if not record.exists():
        raise ToolchainError("smoke has not run yet", hint=hints.text("nox.smoke"))
    return {"smoke.json": hardware.tail_of(record)}


def _git(machine: Machine) -> Files:
    layout = machine.layout
    pins = hardware.read_small(layout.pins).decode("utf-8", "replace")
    pinned = {"https://github.com/vllm-project/vllm.git"}
    pinned |= set(re.findall(r'^url = "(.*)"$', pins, re.MULTILINE))
    paths = (layout.root, layout.vllm, layout.triton)
    lines = (line for path in paths for line in _repository(layout, path, pinned))
    return {"git.txt": "\n".join(lines) + "\n"}


def _repository(layout: Layout, path: Path, pinned: set[str]) -> Iterator[str]:
    yield f"# {layout.relative(path)}"
    try:
        git = Git(path)
        place = git.place() if path.is_dir() else None
        if place is None or place.top.resolve() != path.resolve():
            yield "not a repository"
            return
        url, head = git.setting("remote.origin.url"), git.head()
        origin = "none" if url is None else "pinned" if url in pinned else "not the pinned one"
        yield f"HEAD {head or 'has no commit'}; origin: {origin}"
        yield f"under way: {git.under_way() or 'nothing'}"
        edited = git.edits()
        new = (
            [name for name in git.changed_files("HEAD") if name not in set(edited)] if head else []
        )
        yield from (f"edited {name}" for name in edited[:SHOWN_NAMES])
        yield from (f"new {name}" for name in new[:SHOWN_NAMES])
        yield f"{len(edited)} edited, {len(new)} new"
    except WorkspaceError as exc:
        yield f"error: {exc.message}"


PARTS: Mapping[str, Collector] = {
    "status": _status,
    "doctor": _doctor,
    "settings": _settings,
    "stamps": _stamps,
    "pins": _pins,
    "git": _git,
    "versions": _versions,
    "logs": _logs,
    "cmake": _configures,
    "kernel": _kernel,
    "smoke": _smoke,
    "collect-env": _collect_env,
}
