"""The programs that a build uses: the CUDA toolkit, the C++ compiler, the compiler cache, and uv:
the Pythons that it finds or fetches, and the causes of its failures.
"""

import contextlib
import itertools
import re
import shlex
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workspace.core import hints, process
from workspace.core.errors import SourceError, ToolchainError, WorkspaceError
from workspace.core.files import read_regular
from workspace.core.paths import Layout
from workspace.core.process import Absent, Answer, Broken, Slow, There
from workspace.core.settings import Settings, without_user

if TYPE_CHECKING:
    import psutil

USUAL_HOME = Path("/usr/local/cuda")
# What decides how vLLM is built gets more time than it needs even on a loaded machine.
ANSWER_S = 60.0
# uv starts every Python and every shim that it finds: seconds where there are many.
LIST_S = 120.0
# Without a network uv gives up within this time, twice: on its own mirror, then on GitHub.
FETCH_ANSWER_S = 4
FETCH_S = 240.0
# UV_HTTP_TIMEOUT bounds one read: an index that sends a byte a second is never given up. In this
# time uv must print a line, start a program, or do this much work.
STALL_S = 600.0
STALL_CPU_S = 5.0
STALL_BYTES = 10 << 20
_INDEX_FLAGS = ("--default-index", "--index", "--index-url", "--extra-index-url", "--find-links")
_VERSION_LINE = re.compile(r"^(\d+(?:\.\d+)+)$", re.MULTILINE)
_RELEASE = re.compile(r"release (\d+\.\d+)")
# A dry run prints nvcc's own home, whatever script or link is in front of it; the source file need
# not exist.
_TOP = re.compile(r"^#\$ TOP=(.+)$", re.MULTILINE)

# Errors of uv and of the kernel, in the order in which `classify_uv_failure` tries them.
_FULL = re.compile(r"No space left on device|Disk quota exceeded|\(os error (28|122)\)")
_READ_ONLY = re.compile(r"Read-only file system|Permission denied \(os error 13\)|\(os error 30\)")
_NO_NETWORK = re.compile(
    r"error sending request|dns error|client error \(Connect\)|operation timed out|network was"
    r" disabled|Network connectivity is disabled"
    r"|HTTP status (client|server) error|Failed to (fetch|download)[: ]|An index URL .* could not"
    r" be queried"
)
_NO_VERSION = re.compile(
    r"there (?:is no version of|are no versions of) (\S+?),? |(\S+) was not found in|only the"
    r" following versions? of (\S+) (?:is|are) available"
    r"|Because only (\S+?)[<>=!]\S* is available"
)
_CAUSE = re.compile(
    r"^\s*(?:error|cause|×|╰─▶|├─▶|Caused by):?\s|^\s+(?:And|we can) ", re.IGNORECASE
)


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit whose nvcc runs. `version` is major and minor, such as 13.0."""

    home: Path
    version: str
    nvcc: Path


def ask_toolkit(settings: Settings) -> Answer[Toolkit]:
    """Ask for the CUDA toolkit.

    CUDA_HOME alone counts where it is set; else nvcc on PATH, then /usr/local/cuda.
    """
    if home := settings.path("CUDA_HOME"):
        return _toolkit(home / "bin" / "nvcc", settings, home=home)
    found = shutil.which("nvcc", path=settings.child_environment("plain").get("PATH", ""))
    answer = _toolkit(Path(found), settings, home=None) if found else Absent()
    if isinstance(answer, There | Slow):
        return answer
    usual = _toolkit(USUAL_HOME / "bin" / "nvcc", settings, home=USUAL_HOME)
    return answer if isinstance(usual, Absent) else usual


def ask_compiler(settings: Settings) -> tuple[list[str], Answer[str]]:
    """Ask g++, or the program in CXX, for its version, such as 12.2.0; return the command and the
    answer.
    """
    text = settings.child_environment("build").get("CXX") or "g++"
    try:
        argv = [*shlex.split(text), "-dumpfullversion"]
    except ValueError as exc:
        return [text], Broken(f"CXX is not a command: {exc}")
    return argv, _answer(argv, settings, pattern=_VERSION_LINE)


def _toolkit(nvcc: Path, settings: Settings, *, home: Path | None) -> Answer[Toolkit]:
    version = _answer([str(nvcc), "--version"], settings, pattern=_RELEASE)
    if not isinstance(version, There):
        return version
    if home is None:
        answer = _answer([str(nvcc), "--dryrun", "x.cu"], settings, pattern=_TOP)
        top = process.certain(answer, nvcc)
        home = Path(top).resolve() if top else nvcc.resolve().parent.parent
    real = home / "bin" / "nvcc"
    return There(Toolkit(home, version.value, real)) if real.is_file() else Absent()


def _answer(argv: list[str], settings: Settings, *, pattern: re.Pattern[str]) -> Answer[str]:
    """Return what `pattern` finds in the output of a program; other output is a broken one."""
    answer = process.ask(argv, env=settings.child_environment("build"), limit_s=ANSWER_S)
    printed = process.output_of(answer)
    if not isinstance(answer, There) or not isinstance(printed, There):
        return printed
    found = pattern.search(answer.value.stdout + answer.value.stderr)
    return There(found[1].strip()) if found else Broken("it prints something else")


def find_ccache(settings: Settings) -> Path | None:
    """Return ccache; None without it.

    sccache, which vLLM's setup.py would take, compiles in a server of its own, where a build can
    neither measure a compiler nor lower its priority.
    """
    path = settings.child_environment("build").get("PATH", "")
    found = shutil.which("ccache", path=path)
    return Path(found) if found else None


def cache_configuration(layout: Layout, settings: Settings) -> Mapping[str, str]:
    """Return the variables of ccache that a build sets; a variable of the shell goes before ours.

    Paths below the clone are relative to the build's folder, and the folder itself is not hashed:
    objects of another clone are then hits.
    """
    shell = settings.child_environment("build")
    wanted = {"CCACHE_BASEDIR": str(layout.root)}
    if "CCACHE_HASHDIR" not in shell:
        wanted["CCACHE_NOHASHDIR"] = "1"
    # The shell cannot change this: `nvcc -E` prints what the GPU's compiler reads. Without depend
    # mode an edit in code for the host's compiler only (#ifndef __CUDA_ARCH__) is a hit on the
    # object from before it; nvcc's own list of dependencies has both.
    return {name: shell.get(name, text) for name, text in wanted.items()} | {"CCACHE_DEPEND": "1"}


def find_python(uv: Path, settings: Settings, request: str) -> Path | None:
    """Return an installed Python that uv finds for a version or a range of versions, None without.

    Raises ToolchainError where uv fails, NoAnswer where it is slow or was killed.
    """
    argv = [str(uv), "python", "find", "--system", "--no-python-downloads", request]
    done = process.capture(argv, env=settings.child_environment("plain"), timeout_s=LIST_S)
    process.require_not_killed(done, "uv python find")
    if done.returncode == 0:
        return Path(done.stdout.strip())
    # uv stops at a shim on PATH that leads to no interpreter.
    if re.search(r"No interpreter found|Failed to inspect Python interpreter", done.stderr):
        return None
    raise ToolchainError(
        f"uv python find fails: {done.stderr.strip()[-200:] or 'no output'}",
        hint=hints.text("machine.uv_pythons", uv=uv),
    )


def fetch_python(uv: Path, settings: Settings, version: str) -> bool:
    """Fetch a Python through uv and return whether that succeeds."""
    haste = {
        "UV_HTTP_TIMEOUT": str(FETCH_ANSWER_S),
        "UV_HTTP_CONNECT_TIMEOUT": str(FETCH_ANSWER_S),
        "UV_HTTP_RETRIES": "0",
    }
    environment = settings.child_environment("plain", haste)
    argv = [str(uv), "python", "install", "--no-bin", version]
    with contextlib.suppress(ToolchainError):
        return process.capture(argv, env=environment, timeout_s=FETCH_S).returncode == 0
    return False


class StallWatch:
    """Ends a uv that waits for an index which sends next to nothing; `stalled` is then true."""

    def __init__(self) -> None:
        self.stalled = False
        self._lines = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "StallWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def line(self, _: str) -> None:
        """Count a line of uv: a sign of progress."""
        self._lines += 1

    def _watch(self) -> None:
        since, before = time.monotonic(), _Work(0, 0.0, 0)
        while not self._is_over.wait(min(5.0, STALL_S / 4)):
            uv, now = _work_of_uv(self._lines)
            if uv is None or now.is_progress_after(before):
                since, before = time.monotonic(), now
            elif time.monotonic() - since >= STALL_S:
                self.stalled = True
                uv.terminate()
                return


@dataclass(frozen=True)
class _Work:
    """What a uv has done: its lines, CPU seconds and written bytes, and programs that it runs."""

    lines: int
    cpu_s: float
    written: int
    programs: int = 0

    def is_progress_after(self, before: "_Work") -> bool:
        return (
            bool(self.programs)
            or self.lines > before.lines
            or self.cpu_s - before.cpu_s >= STALL_CPU_S
            or self.written - before.written >= STALL_BYTES
        )


def _work_of_uv(lines: int) -> "tuple[psutil.Process | None, _Work]":
    """Return the uv that this process runs, if any, and its work so far."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            if child.name() == "uv":
                times, written = child.cpu_times(), child.io_counters().write_chars
                work = _Work(lines, times.user + times.system, written, len(child.children()))
                return child, work
    return None, _Work(lines, 0.0, 0)


def stalled_error(
    settings: Settings, arguments: Sequence[str], details: tuple[str, ...]
) -> SourceError:
    """Return the error for a stalled uv, with the indexes that its command line names."""
    named = [after for flag, after in itertools.pairwise(arguments) if flag in _INDEX_FLAGS]
    indexes = list(dict.fromkeys([*named, settings.index_url or "the default index of uv"]))
    return SourceError(
        f"the package index answers too slowly: uv did nothing for {STALL_S:g} s while it waited"
        f" for {' or '.join(map(without_user, indexes))}",
        hint=hints.text("machine.network_or_index"),
        details=details,
    )


class NotOffered(SourceError):
    """The index answers and has no suitable version: a retry does not help."""


_NEWER, _NEWER_VARIABLE = "exclude-newer", "UV_EXCLUDE_NEWER"
# Settings of uv with which it refuses what the index has: what it prints, and the key. A variable
# reaches uv for the first only (core/settings.py); for no-index uv has none.
_UV_SETTINGS = (
    (re.compile(r"`?exclude-newer`?"), _NEWER),
    (re.compile(r"`--require-hashes` mode"), "require-hashes"),
    (re.compile(r"building from source is disabled"), "no-build"),
    (re.compile(r"index lookups were disabled"), "no-index"),
)
# Keys of uv.toml; the variables that say the same never reach uv (core/settings.py).
_UV_CONSTRAINTS = (
    "constraint-dependencies",
    "override-dependencies",
    "exclude-dependencies",
)


def _place_of(names: Sequence[str], layout: Layout, environment: Mapping[str, str]) -> str | None:
    """Return the variable, or the file, that has one of these settings of uv, or None."""
    if found := next((name for name in names if environment.get(name)), None):
        return found
    home = environment.get("HOME", "/")
    files: tuple[str, ...] = (
        *((environment["UV_CONFIG_FILE"],) if environment.get("UV_CONFIG_FILE") else ()),
        *(f"{folder}/uv.toml" for folder in (layout.root, *layout.root.parents)),
        f"{environment.get('XDG_CONFIG_HOME') or f'{home}/.config'}/uv/uv.toml",
        "/etc/uv/uv.toml",
    )
    keys = "|".join(re.escape(name) for name in names if name.islower())
    for file in files:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if re.search(rf"^\s*({keys})\s*=", read_regular(Path(file)).decode(), re.MULTILINE):
                return file
    return None


def _without(place: str, key: str) -> str:
    """Return the hint for a setting of uv in a variable or in a file."""
    if key == _NEWER:
        return (
            hints.text("machine.newer_in_file", path=place)
            if "/" in place
            else hints.text("machine.newer", name=place)
        )
    if "/" in place:
        return hints.text("machine.uv_setting_in_file", key=key, path=place)
    return hints.text("machine.uv_setting", name=place)


def _refused_by_setting(
    verdict: Sequence[str],
    *,
    layout: Layout,
    environment: Mapping[str, str],
    otherwise: WorkspaceError,
) -> WorkspaceError | None:
    """Return the error for what a setting of uv leaves out, with uv's own line, or None."""
    for pattern, key in _UV_SETTINGS:
        line = next((line for line in verdict if pattern.search(line)), None)
        names = (_NEWER_VARIABLE, key) if key == _NEWER else (key,)
        place = _place_of(names, layout, environment) if line else None
        # Our own arguments may ask for the same, except for this one.
        if line is None or (place is None and key != _NEWER):
            continue
        own = re.sub(r"^\w+: ", "", line)
        where = f" ({place})" if place else ""
        return ToolchainError(
            f"uv fails because of its setting {key}{where}: {own}",
            hint=_without(place or _NEWER_VARIABLE, key),
            details=otherwise.details,
        )
    return None


def classify_uv_failure(
    output: Sequence[str],
    *,
    layout: Layout,
    env: Mapping[str, str],
    is_build: bool,
    otherwise: WorkspaceError,
) -> WorkspaceError:
    """Turn the output of a failed uv into an error with a hint, `otherwise` for unknown output.

    A compiler's log may contain any words: for a build only a full disk is certain.
    """
    verdict = [
        line.strip()
        for line in output
        if is_build or _CAUSE.match(line) or line.startswith("hint: ")
    ]
    text, own = "\n".join(verdict), layout.tools / "bin" / "uv"
    if _FULL.search(text):
        return ToolchainError(
            f"the disk is full: {_last_disk_error(verdict)}",
            hint=hints.text(
                "core.disk_or_cache",
                folder=layout.root,
                uv=layout.relative(own) if own.exists() else "uv",
            ),
            details=otherwise.details,
        )
    if is_build:
        return otherwise
    if _READ_ONLY.search(text):
        hint = hints.text("machine.own_environment", folder=layout.environment)
        message = f"a folder is not writable: {_last_disk_error(verdict)}"
        return ToolchainError(message, hint=hint, details=otherwise.details)
    if refused := _refused_by_setting(verdict, layout=layout, environment=env, otherwise=otherwise):
        return refused
    return _unreached(verdict, layout, env, otherwise) or _unsolved(verdict, layout, env, otherwise)


def _unreached(
    verdict: Sequence[str], layout: Layout, env: Mapping[str, str], otherwise: WorkspaceError
) -> WorkspaceError | None:
    """Return the error for an index that did not answer, or None."""
    line = next((line for line in verdict if _NO_NETWORK.search(line)), None)
    if line is None:
        return None
    first = re.sub(r"^\w+: ", "", line)
    hint = hints.text("machine.network_or_index")
    offline = _place_of(("UV_OFFLINE", "offline"), layout, env)
    if "disabled" in first and offline:
        hint = _without(offline, "offline")
    message = f"the package index could not be reached: {first}"
    return SourceError(message, hint=hint, details=otherwise.details)


def _unsolved(
    verdict: Sequence[str], layout: Layout, env: Mapping[str, str], otherwise: WorkspaceError
) -> WorkspaceError:
    """Return the error for versions that do not exist or contradict each other, or `otherwise`."""
    text = "\n".join(verdict)
    if missing := _NO_VERSION.search(text):
        # uv writes the marker of a dependency after its name, in braces.
        name = next(group for group in missing.groups() if group).split("{")[0]
        message = f"the package index has no {name} that fits"
        hint = hints.text("machine.other_index")
        return NotOffered(message, hint=hint, details=otherwise.details)
    if "No solution found" in text:
        cause = next((line for line in verdict if "ecause " in line), verdict[0])
        place = _place_of(_UV_CONSTRAINTS, layout, env)
        return type(otherwise)(
            f"uv finds no versions that fit: {re.sub(r'^[^B]*', '', cause)}"
            + (f" Your setting in {place} may be the reason" if place else ""),
            hint=_without(place, "dependencies") if place else otherwise.hint,
            details=otherwise.details,
        )
    return otherwise


def _last_disk_error(lines: Sequence[str]) -> str:
    found = (line for line in reversed(lines) if _FULL.search(line) or _READ_ONLY.search(line))
    return re.sub(r"^(error|cause): ", "", next(found, ""))
