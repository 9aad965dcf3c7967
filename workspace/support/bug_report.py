"""One archive for a bug report: what is here, what the machine is, what went wrong last, with
everything private masked.

A part that cannot be had is replaced by the sentence that says why; nothing but a place to write to
stops a report. It takes no lock: what hangs can be reported while it hangs.
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
import shutil
import signal
import sys
import tarfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from email import message_from_bytes
from email.policy import default as mail
from pathlib import Path

from workspace.core import process
from workspace.core import settings as core_settings
from workspace.core.console import Console
from workspace.core.errors import SettingsError, ToolchainError, WorkspaceError
from workspace.core.files import write_atomic
from workspace.core.paths import PROJECTS, Layout
from workspace.core.redaction import Redactor
from workspace.core.settings import KNOWN, Settings, is_secret
from workspace.install import status
from workspace.machine import doctor, hardware, interpreter, toolchain
from workspace.repo.git import Git

KEPT_REPORTS = 5
SHOWN_LOGS = 5
SHOWN_CONFIGURES = 3
SHOWN_COMMITS = 5
SHOWN_NAMES = 100
ANSWER_S = 8.0
KILL_S = 1.0
# Importing torch from a cold disk takes most of it.
COLLECT_ENV_S = 60.0
# Folders of .workspace that hold programs and downloads.
_NOT_SEARCHED = frozenset({"tools", "uv", "models", "reports", "site-packages"})
_CONFIGURE_LOGS = frozenset({"CMakeConfigureLog.yaml", "CMakeError.log", "CMakeOutput.log"})
_OOM = re.compile(
    r"out of memory|oom[-_ ]?(?:kill|reap)|killed process|NVRM: (?:Xid|.*NV_ERR_NO_MEMORY)",
    re.IGNORECASE,
)
_NAMES_OF_INTEREST = re.compile(
    r"(VLLM|TORCH|PYTORCH|TRITON|CUDA|NCCL|NVIDIA|HF|UV|PIP|LD|OMP|MKL|CMAKE|CC|CXX|CFLAGS|CXXFLAGS|CCACHE|PYTHON|XDG|TMPDIR)(_|$)"
)

Files = Mapping[str, str]
Collector = Callable[[Layout, Settings], Files]


@dataclass(frozen=True)
class Part:
    """One part as it goes into the archive: masked files by their masked names. `lack` says why
    there are none.
    """

    name: str
    files: Mapping[str, bytes]
    lack: str = ""


def settings_of(layout: Layout) -> Settings:
    """Read the settings as far as they can be read: what is wrong with .env or the shell is a part
    of the report and does not stop it.
    """
    core_settings.forget_outer_git()
    try:
        return core_settings.load(layout)
    except SettingsError:
        # The place of no .env, and defaults in the place of whatever value the shell has.
        return core_settings.load(
            Layout(layout.probes), flags={name: setting.default for name, setting in KNOWN.items()}
        )


def write(layout: Layout, settings: Settings, *, console: Console) -> Path:
    """Write the report, print its path on stdout and its contents as rows. Raises ToolchainError
    where .workspace cannot be written.
    """
    folder = layout.state / "reports"
    name = f"report-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S-%f')}"
    path = folder / f"{name}.tar.gz"
    with _writing(folder):
        # Tried first, for collecting takes half a minute.
        write_atomic(path, b"", mode=0o600)
    try:
        parts = _collect(layout, settings, Redactor(hardware.private(layout, settings)), console)
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
        console.row(
            "warn" if part.lack else "ok",
            part.name,
            part.lack
            or f"{len(part.files)} {'file' if len(part.files) == 1 else 'files'}, {size / 1024:.1f} KiB",
        )
    console.info(
        f"{path.stat().st_size / 1024:.0f} KiB; secrets, names, addresses and places are masked"
    )
    console.info(
        f"look through it before you give it away: tar -xOzf {shlex.quote(layout.relative(path))} |"
        " less"
    )
    console.data(str(path))
    return path


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise ToolchainError(
            f"{folder} cannot be written: {exc.strerror}, and a report needs a few MB there",
            hint=shlex.join(["df", "-h", str(hardware.existing(folder))]),
        ) from exc


def _collect(
    layout: Layout, settings: Settings, redactor: Redactor, console: Console
) -> tuple[Part, ...]:
    """Look at everything at once: most of the time is spent waiting for programs."""
    with console.step("collecting") as view, ThreadPoolExecutor(max_workers=len(PARTS)) as pool:
        futures = {
            name: pool.submit(collector, layout, settings) for name, collector in PARTS.items()
        }
        try:
            parts = tuple(_part(name, future, redactor) for name, future in futures.items())
        except BaseException:
            _end_children()
            raise
        view.reason = f"{sum(not part.lack for part in parts)} of {len(parts)} parts"
    return parts


def _part(name: str, future: Future[Files], redactor: Redactor) -> Part:
    """The last step for every byte, name and sentence: masking."""
    try:
        files, lack = future.result(), ""
    except WorkspaceError as exc:
        lack = exc.message
        files = {
            f"{name}.txt": (
                "\n".join(
                    (
                        f"error: {exc.message}",
                        *([f"hint: {exc.hint}"] if exc.hint else []),
                        *exc.details,
                    )
                )
                + "\n"
            )
        }
    except OSError as exc:
        lack = f"{exc.filename or name}: {exc.strerror or exc}"
        files = {f"{name}.txt": f"error: {lack}\n"}
    except Exception as exc:
        # A fault of ours is what a report is for.
        lack = f"{type(exc).__name__}: {exc}"
        files = {f"{name}.txt": "".join(traceback.format_exception(exc))}
    masked: dict[str, bytes] = {}
    for file, text in files.items():
        content = redactor.content(text.encode("utf-8", "replace"))
        shown = redactor.name(file)
        while shown in masked:
            shown += "+"
        masked[shown] = content if content is not None else b"left out: not a text\n"
    return Part(name, masked, redactor.text(lack).replace("\n", " "))


def _end_children() -> None:
    """^C: the programs that the other threads wait for run in groups of their own and would be
    waited for.
    """
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.terminate()


def _archive(parts: Sequence[Part], name: str) -> bytes:
    """Pack without owner, host or file name in any header."""
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


def _said(
    words: Sequence[str],
    settings: Settings,
    *,
    timeout_s: float = ANSWER_S,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """What a program that may hang says, and how it ended where that is not well. A driver in
    trouble never lets nvidia-smi end.
    """
    limited = ["timeout", "-k", f"{KILL_S:g}", f"{timeout_s:g}", *words]
    done = process.capture(
        limited,
        env=env or settings.child_environment("build"),
        cwd=cwd,
        timeout_s=timeout_s + KILL_S + 1.0,
    )
    # timeout(1) ends with 124, or by its own SIGKILL where that was needed.
    if done.returncode in (124, -signal.SIGKILL):
        raise ToolchainError(f"{words[0]} gave no answer in {timeout_s:g} s")
    ended = (
        ""
        if done.returncode == 0
        else f"{Path(words[0]).name} {process.describe_status(done.returncode)}\n"
    )
    return done.stdout + (f"-- stderr\n{done.stderr}" if done.stderr.strip() else "") + ended


def _status(layout: Layout, settings: Settings) -> Files:
    out = io.StringIO()
    status.show(layout, settings, console=Console(out=out, err=io.StringIO()), as_json=True)
    return {"status.json": out.getvalue()}


def _doctor(layout: Layout, settings: Settings) -> Files:
    out = io.StringIO()
    try:
        doctor.show(
            layout,
            settings,
            console=Console(out=out, err=io.StringIO()),
            as_json=True,
            offline=True,
        )
    except ToolchainError:
        # It prints, then fails where something is in the way.
        if not out.getvalue():
            raise
    return {"doctor.json": out.getvalue()}


def _settings(layout: Layout, settings: Settings) -> Files:
    """Names, and values only of settings that are known and no secrets."""
    written = {name: _shown(name, text) for name, text in hardware.assignments(layout.dotenv)}
    record: dict[str, object] = {
        "settings": {
            name: f"{_shown(name, value.text)} ({value.source})"
            for name, value in settings.values.items()
        },
        ".env": written if layout.dotenv.exists() else None,
        "shell hides .env": sorted(
            name
            for name, text in hardware.assignments(layout.dotenv)
            if settings.shell.get(name, text) != text
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


def _stamps(layout: Layout, _: Settings) -> Files:
    folder = layout.stamp("vllm").parent
    if not folder.is_dir():
        raise ToolchainError("there is no .vllm with stamps in it", hint=status.BOOTSTRAP)
    beside = [
        path
        for path in (layout.lock, layout.state / "constraints.txt")
        if path.is_file() and path.stat().st_size
    ]
    return {
        f"stamps/{path.name}": hardware.tail_of(path)
        for path in (*sorted(folder.glob("*")), *beside)
        if path.is_file()
    }


def _pins(layout: Layout, _: Settings) -> Files:
    """Pins and series as they stand; of a patch what it is called and how much it changes, not
    what.
    """
    files = {"pins.toml": hardware.tail_of(layout.pins)}
    for project in PROJECTS:
        folder = layout.patches(project)
        if (folder / "series").exists():
            patches = [_described(path) for path in sorted(folder.glob("*.patch"))]
            files[f"patches/{project}.txt"] = (
                hardware.tail_of(folder / "series") + "\n" + "\n".join(patches)
            )
    return files


def _described(path: Path) -> str:
    """Headers decoded, for what mail encodes nobody would find."""
    raw = hardware.read_small(path)
    subject = str(message_from_bytes(raw, policy=mail).get("Subject", "no subject"))
    stand = re.search(rb"^Upstream-Status: .*$", raw, re.MULTILINE)
    lines = [
        path.name,
        f"  Subject: {' '.join(subject.split())}",
        f"  {stand[0].decode('utf-8', 'replace') if stand else 'no Upstream-Status'}",
    ]
    for change in re.split(rb"^diff --git ", raw, flags=re.MULTILINE)[1:]:
        head, _, body = change.partition(b"\n")
        added, removed = (
            len(re.findall(rb"^" + sign + rb"(?!" + sign + sign + rb" )", body, re.MULTILINE))
            for sign in (rb"\+", b"-")
        )
        lines.append(f"  +{added} -{removed} {head.decode('utf-8', 'replace').split(' b/')[-1]}")
    return "\n".join(lines) + "\n"


def _logs(layout: Layout, _: Settings) -> Files:
    logs = sorted(layout.logs.glob("*.log"))[-SHOWN_LOGS:]
    if not logs:
        raise ToolchainError("no verb has written a log yet")
    return {f"logs/{path.name}": hardware.tail_of(path) for path in logs}


def _configures(layout: Layout, _: Settings) -> Files:
    found: list[Path] = []
    for place, folders, names in os.walk(layout.state):
        folders[:] = [name for name in folders if name not in _NOT_SEARCHED]
        found += [Path(place, name) for name in names if name in _CONFIGURE_LOGS]
    if not found:
        raise ToolchainError("no build folder below .workspace was configured")
    newest = sorted(found, key=lambda path: path.stat().st_mtime)[-SHOWN_CONFIGURES:]
    return {f"cmake/{path.relative_to(layout.state)}": hardware.tail_of(path) for path in newest}


def _versions(layout: Layout, settings: Settings) -> Files:
    """The machine and its programs, each with the place that PATH finds it in."""
    release = hardware.read_small(Path("/etc/os-release")).decode("utf-8", "replace")
    memory = [
        line
        for line in hardware.read_small(Path("/proc/meminfo")).decode().splitlines()
        if line.startswith(("Mem", "Swap", "Cached"))
    ]
    kernel = (
        f"kernel {platform.system()} {platform.release()} {platform.version()}"
        f" {platform.machine()}, {' '.join(platform.libc_ver())}"
    )
    cores = f"{os.cpu_count()} CPUs, {len(os.sched_getaffinity(0))} usable"
    lines = [
        kernel,
        cores,
        *release.splitlines()[:6],
        *memory,
        f"python of the tools {sys.version}",
    ]
    toolkit = toolchain.find_toolkit(settings)
    own = [str(layout.environment / "bin" / name) for name in ("cmake", "ninja")]
    names: list[tuple[str, ...]] = [
        ("git", "version"),
        *((name, "--version") for name in ("gcc", "g++", "ld", "cmake", "ninja", *own, "ccache")),
    ]
    if toolkit:
        names.append((str(toolkit.nvcc), "--version"))
    names += [
        (str(layout.environment_python), "-VV"),
        ("nvidia-smi", "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv"),
    ]
    with contextlib.suppress(ToolchainError):
        names.insert(0, (str(interpreter.uv(layout)), "--version"))
    lines += [line for words in names for line in _version(words, settings)]
    packages = "".join(
        f"{name}=={version}\n" for name, version in sorted(interpreter.installed(layout).items())
    )
    return {
        "versions.txt": "\n".join(lines) + "\n",
        "packages.txt": packages or "there are no packages in .vllm\n",
    }


def _version(words: Sequence[str], settings: Settings) -> Iterator[str]:
    place = shutil.which(words[0], path=settings.child_environment("build").get("PATH", ""))
    yield f"\n$ {' '.join(words)}" + (f"    # {place}" if place and place != words[0] else "")
    try:
        said = _said(words, settings).strip().splitlines() if place else ["not there"]
    except ToolchainError as exc:
        said = [exc.message]
    # Lines with figures; the rest is about licences, or all that a broken program says.
    yield from (
        [
            line
            for line in said
            if re.search(r"\d", line) and "Copyright" not in line and "License" not in line
        ]
        or said
    )[:4]


def _kernel(_: Layout, settings: Settings) -> Files:
    """Whom the kernel killed for memory, and what the control group allows (cgroups(7), versions 1
    and 2).
    """
    try:
        said = _said(["dmesg"], settings)
        kills = [line for line in said.splitlines() if _OOM.search(line)][-SHOWN_NAMES:]
        refused = said.rstrip() if "dmesg exited" in said else ""
    except ToolchainError as exc:
        kills, refused = [], exc.message
    lines = ["# dmesg: out of memory, NVIDIA Xid", *(kills or [refused or "nothing of the kind"])]
    if refused:
        lines.append(
            "dmesg needs more rights; to see it yourself: sudo dmesg | grep -iE 'out of"
            " memory|killed process'"
        )
    for entry in hardware.read_small(Path("/proc/self/cgroup")).decode().splitlines():
        _number, controllers, group = entry.split(":", 2)
        if controllers in ("", "memory"):
            root = Path("/sys/fs/cgroup") / controllers
            for folder in (root / group.strip("/"), *(root / group.strip("/")).parents):
                if folder.is_relative_to(root):
                    lines += [
                        f"# {folder}/{name}\n{hardware.read_small(folder / name).decode().strip()}"
                        for name in (
                            "memory.events",
                            "memory.max",
                            "memory.peak",
                            "memory.swap.max",
                            "memory.oom_control",
                            "memory.limit_in_bytes",
                        )
                        if (folder / name).exists()
                    ]
    return {"kernel.txt": "\n".join(lines) + "\n"}


def _collect_env(layout: Layout, settings: Settings) -> Files:
    """vLLM's own questionnaire, which its maintainers ask for, without any secret in its
    environment.
    """
    if not os.access(layout.environment_python, os.X_OK):
        raise ToolchainError("there is no .vllm to ask", hint=status.BOOTSTRAP)
    environment = {
        name: text
        for name, text in settings.child_environment("run").items()
        if not is_secret(name)
    }
    folders = [
        str(layout.tools / "bin"),
        str(layout.environment / "bin"),
        environment.get("PATH", ""),
    ]
    # It asks `uv pip list` for the packages and takes the answer unseen.
    environment |= {"VIRTUAL_ENV": str(layout.environment), "PATH": os.pathsep.join(folders)}
    words = (str(layout.environment_python), "-m", "vllm.collect_env")
    return {
        "collect-env.txt": _said(
            words, settings, timeout_s=COLLECT_ENV_S, env=environment, cwd=layout.environment
        )
    }


def _smoke(layout: Layout, _: Settings) -> Files:
    if not layout.smoke_record.exists():
        raise ToolchainError("smoke has not run yet", hint="./scripts/nox -s smoke")
    return {"smoke.json": hardware.tail_of(layout.smoke_record)}


def _git(layout: Layout, _: Settings) -> Files:
    pinned = {"https://github.com/vllm-project/vllm.git"} | set(
        re.findall(
            r'^url = "(.*)"$',
            hardware.read_small(layout.pins).decode("utf-8", "replace"),
            re.MULTILINE,
        )
    )
    return {
        "git.txt": (
            "\n".join(
                line
                for path in (layout.root, layout.vllm, layout.triton)
                for line in _repository(layout, path, pinned)
            )
            + "\n"
        )
    }


def _repository(layout: Layout, path: Path, pinned: set[str]) -> Iterator[str]:
    yield f"# {layout.relative(path)}"
    try:
        git = Git(path)
        place = git.place() if path.is_dir() else None
        if place is None or place.top.resolve() != path.resolve():
            yield "no repository of its own"
            return
        origin, head = git.setting("remote.origin.url"), git.head()
        yield (
            f"HEAD {head or 'has no commit'}; origin:"
            f" {'none' if origin is None else 'the pinned one' if origin in pinned else 'another one'}"
        )
        yield f"under way: {git.under_way() or 'nothing'}"
        if link := git.gitlink("vendor/vllm"):
            yield f"gitlink vendor/vllm {link.commit}"
        for number in range(SHOWN_COMMITS if head else 0):
            commit, parent = git.resolve(f"HEAD~{number}"), git.resolve(f"HEAD~{number + 1}")
            if commit:
                yield (
                    f"  {commit[:12]}"
                    f" {git.slugs(parent, commit)[-1] if parent else '(the first commit)'}"
                )
        edited = git.edits()
        new = (
            [name for name in git.changed_files("HEAD") if name not in set(edited)] if head else []
        )
        yield from (
            f"{mark} {name}"
            for mark, names in (("edited", edited), ("new", new))
            for name in names[:SHOWN_NAMES]
        )
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
