"""The interpreter of `.vllm`: which one, the virtual environment around it, and what uv puts into
it.

All packages go in through `install`, which says in one sentence what stood in the way.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from workspace.core import process
from workspace.core.errors import (
    BuildError,
    SettingsError,
    SourceError,
    ToolchainError,
    WorkspaceError,
)
from workspace.core.files import read_regular, write_atomic
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

ANSWER_S = 20.0
# Without a network uv gives up within these, twice: its own mirror, then GitHub.
FETCH_ANSWER_S = 4
FETCH_S = 240.0
FETCH_AGAIN_S = 24 * 3600.0
KEPT_LINES = 400
_FACTS = (
    "import json, sys, sysconfig; v = sys.version_info; print(json.dumps({'version': '%d.%d.%d' %"
    " v[:3], 'level': v.releaselevel, 'include': sysconfig.get_paths()['include'], 'prefix':"
    " sys.prefix, 'executable': sys.executable, 'base': sys.base_prefix}))"
)


@dataclass(frozen=True)
class Choice:
    """An interpreter to make `.vllm` with. `reason` is empty for the preferred one, else why it is
    another, to be said aloud.
    """

    path: Path
    version: str
    reason: str = ""


@dataclass(frozen=True)
class PythonFacts:
    """A Python that runs. `headers` is the folder that holds Python.h, None where it is missing;
    `base` the prefix of the Python below.
    """

    path: Path
    version: str
    headers: Path | None
    base: Path


class NotOffered(SourceError):
    """An index that was reached has no version that fits: to ask again does not help."""


def uv(layout: Layout) -> Path:
    """Return the uv of the tool environment, else the one on PATH. Raises ToolchainError where
    there is none.
    """
    own = layout.tools / "bin" / "uv"
    if os.access(own, os.X_OK):
        return own
    found = shutil.which("uv")
    if found is None:
        raise ToolchainError(
            "uv is not there, neither in .workspace/tools nor on PATH",
            hint="./scripts/inv bootstrap",
        )
    return Path(found)


def describe(layout: Layout, settings: Settings) -> PythonFacts | None:
    """Look at `.vllm`. None where it is missing, or its Python does not run or belongs to another
    environment.
    """
    if not os.access(layout.environment_python, os.X_OK):
        return None
    facts = _facts(layout.environment_python, settings)
    # A python that was linked into a plain folder would install into the machine's own packages.
    return facts[0] if facts and facts[1].resolve() == layout.environment.resolve() else None


def headers_of(python: Path, settings: Settings) -> Path | None:
    """Return the folder with Python.h that a build with this interpreter would use, None where it
    is missing.
    """
    facts = _facts(python, settings)
    return facts[0].headers if facts else None


def choose(
    layout: Layout,
    settings: Settings,
    *,
    supported: "SpecifierSet",
    wheel_pythons: frozenset[str] | None = None,
    run_log: RunLog | None = None,
) -> Choice:
    """Choose the Python for `.vllm`: PYTHON_VERSION where it is installed or soon fetched, else the
    newest supported one.

    `wheel_pythons` are the minor versions, such as 3.11, that a local torch wheel fits; they bind
    where one of them is installed. Raises ToolchainError where no supported Python is to be had.
    """
    preferred = _preferred(settings)
    choice = foresee(layout, settings, supported=supported, wheel_pythons=wheel_pythons)
    is_bound = (
        choice is not None
        and wheel_pythons is not None
        and _minor(choice.version) in wheel_pythons
        and _minor(preferred) not in wheel_pythons
    )
    if (
        (choice is None or choice.reason)
        and not is_bound
        and preferred in supported
        and _fetch(layout, settings, preferred, run_log)
    ):
        choice = foresee(layout, settings, supported=supported, wheel_pythons=wheel_pythons)
    if choice is None:
        wanted = preferred if preferred in supported else "3.12"
        raise ToolchainError(
            f"no Python {supported} is installed, which the pinned vLLM needs, and Python {wanted}"
            " could not be fetched",
            hint=(
                f"uv python install {wanted}  # or: sudo apt install python{wanted}"
                f" python{wanted}-dev"
            ),
        )
    return choice


def foresee(
    layout: Layout,
    settings: Settings,
    *,
    supported: "SpecifierSet",
    wheel_pythons: frozenset[str] | None = None,
) -> Choice | None:
    """Return what `choose` would take of what is installed now; None where nothing is supported.
    Fetches nothing.
    """
    preferred = _preferred(settings)
    there = [found for found in _installed_pythons(layout, settings) if found[0] in supported]
    fitting = [
        found for found in there if wheel_pythons is None or _minor(found[0]) in wheel_pythons
    ]
    candidates = fitting or there
    ranked = sorted(
        candidates,
        key=lambda found: (_is_version(found[0], preferred), _key(found[0])),
        reverse=True,
    )
    for version in dict.fromkeys(found[0] for found in ranked):
        # Of a shim, what it stands for: the choice must not change with the folder that a version
        # manager looks at.
        running = [
            facts
            for candidate, path in ranked
            if candidate == version and (facts := _facts(path, settings, follow=True))
        ]
        if running:
            best = next((facts for facts, _ in running if facts.headers), running[0][0])
            return Choice(
                best.path,
                best.version,
                _reason(best.version, preferred, supported, wheel_pythons if fitting else None),
            )
    return None


def create(layout: Layout, settings: Settings, choice: Choice, *, run_log: RunLog) -> None:
    """Make `.vllm` with the chosen Python. A half-made one of ours is made anew, a working one of
    anybody is adopted.

    Raises ToolchainError for anything else at its place, and where the folder cannot be written.
    """
    environment, marker = layout.environment, layout.environment / ".workspace" / "made-here"
    is_ours = marker.is_file()
    there = describe(layout, settings) if is_finished(layout) else None
    if there and (_minor(there.version) == _minor(choice.version) or not is_ours):
        if _minor(there.version) != _minor(choice.version):
            raise _foreign(
                f".vllm was not made by this workspace and has Python {there.version}, needed is"
                f" {choice.version}"
            )
        return
    if not is_ours and (
        environment.is_symlink() or (environment.exists() and not environment.is_dir())
    ):
        raise _foreign(".vllm is a file or a link that leads nowhere, not an environment")
    if (
        not is_ours
        and environment.is_dir()
        and any(not _is_begun(entry, marker) for entry in environment.rglob("*"))
    ):
        raise _foreign(".vllm was not made by this workspace and holds no working Python")
    try:
        if is_ours:
            _clear(environment, keep=marker)
        else:
            write_atomic(marker, b"A half-made environment with this file in it is made anew.\n")
        write_atomic(_unfinished(layout), b"")
    except OSError as exc:
        raise ToolchainError(
            f".vllm cannot be written: {exc.strerror}", hint=f"ls -ld {layout.root} {environment}"
        ) from exc
    # Relocatable: a bump makes it in a place of its own and renames it to where it will be used.
    argv: list[process.Argument] = [
        uv(layout),
        "venv",
        "--no-project",
        "--relocatable",
        "--allow-existing",
        "--python",
        choice.path,
        environment,
    ]
    process.run(
        argv,
        env=settings.child_environment("plain"),
        run_log=run_log,
        failure=ToolchainError,
        hint=f"{choice.path} -V  # does this Python work?",
    )
    if describe(layout, settings) is None:
        raise BuildError(
            f".vllm was made with {choice.path}, and its Python does not run",
            hint=f"{layout.environment_python} -V",
        )
    # uv syncs nothing: after a power cut its Python may run while the scripts beside it are empty.
    os.sync()
    _unfinished(layout).unlink()


def is_finished(layout: Layout) -> bool:
    """Whether `.vllm`, if it is there, was made to its end, or by somebody else."""
    return not _unfinished(layout).exists()


def _unfinished(layout: Layout) -> Path:
    return layout.environment / ".workspace" / "unfinished"


def _is_begun(entry: Path, marker: Path) -> bool:
    """Whether an entry of `.vllm` is what a run leaves that was killed while it wrote its
    marker.
    """
    return entry == marker.parent or (
        entry.parent == marker.parent and entry.name.startswith(f".{marker.name}.")
    )


def install(
    layout: Layout,
    settings: Settings,
    arguments: Sequence[str],
    *,
    run_log: RunLog,
    constraints: Sequence[str] = (),
    overrides: Sequence[str] = (),
    phase_env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
    failure: type[WorkspaceError] = BuildError,
    hint: str | None = None,
) -> None:
    """Install into `.vllm` through uv. `phase_env` makes it a build: the child then sees the build
    settings, and these on top.

    Raises SourceError where the index cannot be reached or lacks a version, ToolchainError where
    the disk is full or cannot be written, and `failure` with `hint` for anything else.
    """
    environment = (
        settings.child_environment("plain")
        if phase_env is None
        else settings.child_environment("build", phase_env)
    )
    words, secret = _without_credentials(arguments)
    # The files stay, so that the command shown can be copied into a shell.
    for flag, lines in (("--constraints", constraints), ("--overrides", overrides)):
        if lines:
            listed = layout.state / f"{flag.strip('-')}.txt"
            write_atomic(listed, "".join(f"{line}\n" for line in lines).encode())
            words = [flag, str(listed), *words]
    said: deque[str] = deque(maxlen=KEPT_LINES)

    def show(line: str) -> None:
        said.append(line)
        if on_line:
            on_line(line)

    argv: list[process.Argument] = [
        uv(layout),
        "pip",
        "install",
        "--python",
        layout.environment_python,
        *words,
    ]
    try:
        # uv reads [tool.uv] of the folder that it runs in: not vLLM's, wherever the person stands.
        process.run(
            argv,
            env=environment | secret,
            cwd=layout.root,
            run_log=run_log,
            on_line=show,
            failure=failure,
            hint=hint,
        )
    except failure as exc:
        # A compiler's log may hold any words; of those only a full disk is certain.
        known = classify(said, layout=layout, is_build=phase_env is not None, otherwise=exc)
        if known is exc:
            raise
        raise known from exc


def installed(layout: Layout) -> Mapping[str, str]:
    """Return the canonical name and version of every package in `.vllm`, from the folders that
    describe them, without starting Python.
    """
    from packaging.utils import canonicalize_name

    folders = (
        folder
        for folder in site_packages(layout)
        for folder in folder.glob("*.dist-info")
        if (folder / "METADATA").is_file()
    )
    pairs = (folder.name.removesuffix(".dist-info").split("-", 1) for folder in folders)
    return {canonicalize_name(pair[0]): pair[1] for pair in sorted(pairs) if len(pair) == 2}


def site_packages(layout: Layout) -> tuple[Path, ...]:
    """Return the package folder of `.vllm`: that of the Python that pyvenv.cfg names, should an
    older one have left its own.
    """
    folders = sorted((layout.environment / "lib").glob("python3.*/site-packages"))
    try:
        found = re.search(
            r"^version(?:_info)?\s*=\s*(3\.\d+)",
            read_regular(layout.environment / "pyvenv.cfg").decode(),
            re.MULTILINE,
        )
    except (OSError, ValueError):
        found = None
    return tuple(
        folder for folder in folders if found is None or folder.parent.name == f"python{found[1]}"
    )


# What uv and the kernel say, in the order in which a sentence is chosen; (words, is it certain
# within a compiler's log).
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


def classify(
    said: Sequence[str], *, layout: Layout, is_build: bool, otherwise: WorkspaceError
) -> WorkspaceError:
    """Turn the output of a failed uv into the error that says what to do; `otherwise` where it says
    nothing known.
    """
    verdict = [
        line.strip() for line in said if is_build or _CAUSE.match(line) or line.startswith("hint: ")
    ]
    text = "\n".join(verdict)
    cause = next(
        (line for line in reversed(verdict) if _FULL.search(line) or _READ_ONLY.search(line)), ""
    )
    if _FULL.search(text):
        return ToolchainError(
            f"the disk is full: {cause}",
            hint=f"df -h {layout.root}; uv cache prune",
            details=otherwise.details,
        )
    if is_build:
        return otherwise
    if _READ_ONLY.search(text):
        hint = f"ls -ld {layout.environment}  # the clone and uv's cache must belong to you"
        return ToolchainError(
            f"a folder cannot be written: {cause}", hint=hint, details=otherwise.details
        )
    if _NO_NETWORK.search(text):
        first = re.sub(r"^\w+: ", "", next(line for line in verdict if _NO_NETWORK.search(line)))
        return SourceError(
            f"the package index could not be reached: {first}",
            hint=(
                "check the network and run the same command again; export UV_DEFAULT_INDEX=… names"
                " a mirror, HTTPS_PROXY=… a proxy"
            ),
            details=otherwise.details,
        )
    if missing := _NO_VERSION.search(text):
        # uv writes the marker of a dependency behind its name, in braces.
        name = next(group for group in missing.groups() if group).split("{")[0]
        hint = (
            "export UV_DEFAULT_INDEX=…  # another index; TORCH_INDEX_URL in .env is one for torch"
        )
        return NotOffered(
            f"the package index has no {name} that fits", hint=hint, details=otherwise.details
        )
    return otherwise


def _facts(
    python: Path, settings: Settings, *, follow: bool = False
) -> tuple[PythonFacts, Path] | None:
    """Ask an interpreter about itself: facts and prefix. None where it does not run, or is no
    released Python.
    """
    try:
        done = process.capture(
            [python, "-I", "-c", _FACTS],
            env=settings.child_environment("plain"),
            timeout_s=ANSWER_S,
        )
        said = json.loads(done.stdout)
    except (ToolchainError, ValueError):
        return None
    if done.returncode != 0 or said["level"] != "final":
        return None
    include = Path(said["include"])
    path = Path(said["executable"]) if follow and said["executable"] else python
    return PythonFacts(
        path,
        said["version"],
        include if (include / "Python.h").is_file() else None,
        Path(said["base"]),
    ), Path(said["prefix"])


def _installed_pythons(layout: Layout, settings: Settings) -> Iterator[tuple[str, Path]]:
    """Yield version and path of what uv finds. Shims that lead nowhere only make it print
    warnings.
    """
    done = _listed(uv(layout), tuple(sorted(settings.child_environment("plain").items())))
    try:
        listed = json.loads(done.stdout)
    except ValueError as exc:
        _listed.cache_clear()
        raise ToolchainError(
            f"uv python list gave no list: {done.stderr.strip()[-200:]}",
            hint=f"{uv(layout)} python list",
        ) from exc
    for python in listed:
        usual = (
            python.get("implementation") == "cpython"
            and python.get("variant", "default") == "default"
        )
        if usual and python.get("path") and re.fullmatch(r"\d+(\.\d+)+", python["version"]):
            yield python["version"], Path(python["path"])


@functools.cache
def _listed(program: Path, environment: tuple[tuple[str, str], ...]) -> process.Completed:
    # Preflight and the environment both ask, and uv starts every Python and every shim that it
    # finds: seconds where there are many.
    argv: list[process.Argument] = [
        program,
        "python",
        "list",
        "--only-installed",
        "--output-format",
        "json",
    ]
    return process.capture(argv, env=dict(environment), timeout_s=ANSWER_S * 3)


def _fetch(layout: Layout, settings: Settings, version: str, run_log: RunLog | None) -> bool:
    """Let uv fetch a Python, once a day where that fails."""
    tried = layout.state / f"python-{version}-not-fetched"
    with contextlib.suppress(OSError):
        if 0 <= time.time() - tried.stat().st_mtime < FETCH_AGAIN_S:
            return False
    haste = {
        "UV_HTTP_TIMEOUT": str(FETCH_ANSWER_S),
        "UV_HTTP_CONNECT_TIMEOUT": str(FETCH_ANSWER_S),
        "UV_HTTP_RETRIES": "0",
    }
    environment = settings.child_environment("plain", haste)
    argv = [str(uv(layout)), "python", "install", "--no-bin", version]
    if run_log:
        run_log.command(" ".join(argv))
    with contextlib.suppress(ToolchainError):
        if process.capture(argv, env=environment, timeout_s=FETCH_S).returncode == 0:
            _listed.cache_clear()
            return True
    with contextlib.suppress(OSError):
        write_atomic(tried, b"")
    return False


def _reason(
    version: str, preferred: str, supported: "SpecifierSet", wheel_pythons: frozenset[str] | None
) -> str:
    if _is_version(version, preferred):
        return ""
    if preferred not in supported:
        return f"instead of {preferred}, which the pinned vLLM does not support ({supported})"
    if wheel_pythons is not None and _minor(preferred) not in wheel_pythons:
        return (
            f"instead of {preferred}, because the local torch wheel fits"
            f" {' and '.join(sorted(wheel_pythons, key=_key))} only"
        )
    return f"instead of {preferred}, which is not installed here and could not be fetched"


def _clear(environment: Path, *, keep: Path) -> None:
    """Empty the environment, stamps first, the marker never: interrupted here it is still known as
    ours.
    """
    for child in (
        *(entry for entry in keep.parent.iterdir() if entry != keep),
        *(entry for entry in environment.iterdir() if entry != keep.parent),
    ):
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _foreign(message: str) -> ToolchainError:
    return ToolchainError(message, hint="mv .vllm .vllm.old && ./scripts/inv bootstrap")


_USER = re.compile(r"^(https?://)([^/@:]*)(?::([^/@]*))?@(.+)$")


def _without_credentials(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Take user and password out of index addresses, which are shown and logged, into variables
    that uv reads for a named index.
    """
    words, secret = list(arguments), dict[str, str]()
    for number, word in enumerate(words):
        found = _USER.match(word)
        if found and number and words[number - 1] in ("--index", "--default-index"):
            name = f"workspace{number}"
            words[number] = f"{name}={found[1]}{found[4]}"
            secret |= {
                f"UV_INDEX_{name.upper()}_USERNAME": unquote(found[2]),
                f"UV_INDEX_{name.upper()}_PASSWORD": unquote(found[3] or ""),
            }
    return words, secret


def _preferred(settings: Settings) -> str:
    text = settings.text("PYTHON_VERSION")
    if not re.fullmatch(r"3\.\d+(\.\d+)?", text):
        raise SettingsError(
            f"PYTHON_VERSION={text}: is not a version such as 3.12",
            hint="write PYTHON_VERSION=3.12 into .env, or leave it out",
        )
    return text


def _is_version(version: str, wanted: str) -> bool:
    return version == wanted or version.startswith(f"{wanted}.")


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
