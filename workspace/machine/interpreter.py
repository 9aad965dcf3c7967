"""The interpreter of `.vllm`: its choice, its virtual environment, and the packages that uv
installs in it.

Every package goes through `install`, whose errors explain a failure of uv in one sentence.
"""

import contextlib
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from workspace.core import hints, process, records
from workspace.core.child_variables import Phase
from workspace.core.console import RunLog
from workspace.core.errors import BuildError, ToolchainError, WorkspaceError
from workspace.core.files import read_regular, write_atomic
from workspace.core.paths import Layout
from workspace.core.process import Answer, Broken, There
from workspace.core.settings import Settings
from workspace.machine import toolchain
from workspace.machine.arch import key

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

# `.vllm` is made again where its Python does not run: a loaded machine gets time to start it.
ANSWER_S = 60.0
KEPT_LINES = 400
_FACTS = (
    "import json, sys, sysconfig; v = sys.version_info; print(json.dumps({'version': '%d.%d.%d' %"
    " v[:3], 'level': v.releaselevel, 'include': sysconfig.get_paths()['include'], 'prefix':"
    " sys.prefix, 'executable': sys.executable, 'base': sys.base_prefix}))"
)
_USER = re.compile(r"^(https?://)([^/@:]*)(?::([^/@]*))?@(.+)$")


@dataclass(frozen=True)
class Choice:
    """An interpreter for `.vllm`.

    `reason` explains to the user why it is not the preferred one, and is empty for the preferred.
    `headers` is the folder of Python.h, None where it is missing.
    """

    path: Path
    version: str
    reason: str = ""
    headers: Path | None = field(default=None, compare=False)


@dataclass(frozen=True)
class PythonFacts:
    """A Python that runs.

    `headers` is the folder of Python.h, None where it is missing; `base` is the prefix of the
    Python under a virtual environment.
    """

    path: Path
    version: str
    headers: Path | None
    base: Path


def uv(layout: Layout) -> Path:
    """Return the uv of the tool environment, else the one on PATH.

    Raises ToolchainError where neither exists.
    """
    own = layout.tools / "bin" / "uv"
    if os.access(own, os.X_OK):
        return own
    found = shutil.which("uv")
    if found is None:
        raise ToolchainError(
            "uv is missing, both in .workspace/tools and on PATH",
            hint=hints.text("inv.bootstrap"),
        )
    return Path(found)


def describe(layout: Layout, settings: Settings) -> PythonFacts | None:
    """Return the facts of the Python in `.vllm`.

    None where it is missing, does not run, or belongs to another environment. Raises NoAnswer where
    it is slow or was killed: `.vllm` would be made again.
    """
    if not os.access(layout.environment_python, os.X_OK):
        return None
    python = layout.environment_python
    facts = process.certain(_facts(python, settings), python)
    # A Python linked into a plain folder would install into the machine's own packages.
    return facts[0] if facts and facts[1].resolve() == layout.environment.resolve() else None


def identity(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """Return the identity of the files that make the Python of `.vllm`, links followed."""
    found: list[tuple[int, ...]] = []
    for path in (layout.environment_python, layout.environment / "pyvenv.cfg"):
        with contextlib.suppress(OSError):
            state = path.stat()
            found.append((state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns))
    return tuple(found)


def choose(
    layout: Layout,
    settings: Settings,
    *,
    supported: "SpecifierSet",
    wheel_pythons: frozenset[str] | None = None,
) -> Choice:
    """Choose the Python for `.vllm`: PYTHON_VERSION where it is installed or can be fetched, else
    the supported one that uv finds first.

    `wheel_pythons` are the minor versions, such as 3.11, that a local torch wheel fits; they bind
    where one of them is installed. Raises ToolchainError without any supported Python.
    """
    preferred = settings.text("PYTHON_VERSION")
    choice = foresee(layout, settings, supported=supported, wheel_pythons=wheel_pythons)
    is_bound = (
        choice is not None
        and wheel_pythons is not None
        and _minor(choice.version) in wheel_pythons
        and _minor(preferred) not in wheel_pythons
    )
    is_fetch_useful = (choice is None or choice.reason) and not is_bound and preferred in supported
    if is_fetch_useful and toolchain.fetch_python(uv(layout), settings, preferred):
        choice = foresee(layout, settings, supported=supported, wheel_pythons=wheel_pythons)
    if choice is None:
        wanted = preferred if preferred in supported else "3.12"
        raise ToolchainError(
            f"no Python {supported} is installed, which the pinned vLLM needs, and Python {wanted}"
            " could not be fetched",
            hint=hints.text("machine.install_python", version=wanted),
        )
    return choice


def foresee(
    layout: Layout,
    settings: Settings,
    *,
    supported: "SpecifierSet",
    wheel_pythons: frozenset[str] | None = None,
) -> Choice | None:
    """Return the Python that `choose` would take from those installed now, None without any.

    Fetches nothing.
    """
    preferred = settings.text("PYTHON_VERSION")
    minors = sorted(wheel_pythons or (), key=key, reverse=True)
    first = [preferred] if _minor(preferred) in minors else minors
    versions = [version for version in (*first, *minors, preferred) if version in supported]
    for request in dict.fromkeys((*versions, str(supported))):
        path = toolchain.find_python(uv(layout), settings, request)
        # The path of a shim gives way to that of its interpreter: the choice must not depend on the
        # folder that a version manager reads. A slow Python does not make way for another version.
        facts = process.certain(_facts(path, settings, follow=True), path) if path else None
        if facts:
            found = facts[0]
            bound = wheel_pythons if _minor(found.version) in minors else None
            reason = _reason(found.version, preferred, supported, bound)
            return Choice(found.path, found.version, reason, found.headers)
    return None


def create(layout: Layout, settings: Settings, choice: Choice, *, run_log: RunLog) -> None:
    """Make `.vllm` with the chosen Python.

    A partial environment of ours is made again; a working one of the user's is kept. Raises
    ToolchainError for anything else at its path, and where the folder is not writable.
    """
    if _is_usable(layout, settings, choice):
        return
    _begin(layout)
    # Relocatable: a bump makes it in a folder of its own and renames it to its final path.
    options = ("--no-project", "--relocatable", "--allow-existing")
    process.run(
        [uv(layout), "venv", *options, "--python", choice.path, layout.environment],
        env=settings.child_environment("plain"),
        run_log=run_log,
        failure=ToolchainError,
        hint=hints.text("machine.does_python_work", python=choice.path),
    )
    if describe(layout, settings) is None:
        raise BuildError(
            f".vllm was made with {choice.path}, and its Python does not run",
            hint=hints.text("machine.python_version", python=layout.environment_python),
        )
    # uv does not sync: after a power cut its Python may run while the scripts beside it are empty.
    os.sync()
    _unfinished(layout).unlink()


def _is_usable(layout: Layout, settings: Settings, choice: Choice) -> bool:
    """Return whether `.vllm` works and has the chosen minor version.

    Raises ToolchainError where it works, has another version, and is not ours.
    """
    there = describe(layout, settings) if is_finished(layout) else None
    if there is None:
        return False
    is_chosen = _minor(there.version) == _minor(choice.version)
    if not is_chosen and not _made_here(layout).is_file():
        raise _foreign(
            f".vllm was not made by this workspace and has Python {there.version}; vLLM needs"
            f" {choice.version}"
        )
    return is_chosen


def _begin(layout: Layout) -> None:
    """Empty a partial environment of ours, or claim the path; raise where it is not ours."""
    environment, marker = layout.environment, _made_here(layout)
    is_ours = marker.is_file()
    if not is_ours:
        if environment.is_symlink() or (environment.exists() and not environment.is_dir()):
            raise _foreign(".vllm is a file or a broken link, not an environment")
        if environment.is_dir() and any(
            not _is_begun(entry, marker) for entry in environment.rglob("*")
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
            f".vllm is not writable: {exc.strerror}",
            hint=hints.text("core.list_folders", folders=[layout.root, environment]),
        ) from exc


def is_finished(layout: Layout) -> bool:
    """Return whether `.vllm` is complete: no environment, a finished one, or the user's own."""
    return not _unfinished(layout).exists()


def _unfinished(layout: Layout) -> Path:
    return layout.environment / ".workspace" / "unfinished"


def _made_here(layout: Layout) -> Path:
    return layout.environment / ".workspace" / "made-here"


def _is_begun(entry: Path, marker: Path) -> bool:
    """Return whether an entry of `.vllm` is of a run that was killed while it wrote its marker."""
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
) -> None:
    """Install into `.vllm` through uv.

    With `phase_env` it runs setup.py of vLLM, with these variables. Raises SourceError where the
    index cannot be reached or lacks a version, ToolchainError where the disk is full or not
    writable, and `failure` for everything else.
    """
    phase: Phase = "plain" if phase_env is None else "install"
    shown, secret = _without_credentials(arguments)
    environment = settings.child_environment(phase, {**(phase_env or {}), **secret}, layout=layout)
    lists = _written_lists(layout, constraints=constraints, overrides=overrides)
    output, watch = deque[str](maxlen=KEPT_LINES), toolchain.StallWatch()
    argv = (uv(layout), "pip", "install", "--python", layout.environment_python)
    try:
        # uv reads [tool.uv] in its working directory: never vLLM's, wherever the person works.
        with watch:
            process.run(
                [*argv, *lists, *shown],
                env=environment,
                cwd=layout.root,
                run_log=run_log,
                on_line=_keeping(output, watch.line, on_line),
                failure=failure,
            )
    except failure as exc:
        if watch.stalled:
            raise toolchain.stalled_error(settings, shown, exc.details) from exc
        known = toolchain.classify_uv_failure(
            output, layout=layout, env=environment, is_build=phase == "install", otherwise=exc
        )
        if known is exc:
            raise
        raise known from exc


def _keeping(output: deque[str], *callbacks: Callable[[str], None] | None) -> Callable[[str], None]:
    """Return a callback that keeps each line and passes it on."""

    def keep(line: str) -> None:
        output.append(line)
        for callback in filter(None, callbacks):
            callback(line)

    return keep


def _written_lists(
    layout: Layout, *, constraints: Sequence[str], overrides: Sequence[str]
) -> list[str]:
    """Write constraints and overrides to files, and return uv's arguments for them.

    The files remain, so that a person can copy the logged command into a shell.
    """
    arguments: list[str] = []
    for flag, lines in (("--overrides", overrides), ("--constraints", constraints)):
        if lines:
            path = layout.state / f"{flag.strip('-')}.txt"
            write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
            arguments += [flag, str(path)]
    return arguments


def installed(layout: Layout) -> Mapping[str, str]:
    """Return the canonical name and version of every package in `.vllm`.

    They come from the dist-info folders, without a start of Python.
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
    """Return the package folder of `.vllm`, of the Python that pyvenv.cfg names.

    An older Python may have left its own folder.
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


def _facts(
    python: Path, settings: Settings, *, follow: bool = False
) -> Answer[tuple[PythonFacts, Path]]:
    """Return the facts and the prefix of an interpreter; one that is no final release is broken.

    With `follow` the interpreter behind a shim takes its place.
    """
    environment = settings.child_environment("plain")
    answer = process.output_of(
        process.ask([python, "-I", "-c", _FACTS], env=environment, limit_s=ANSWER_S)
    )
    if not isinstance(answer, There):
        return answer
    try:
        facts = records.decode(answer.value, dict[str, str])
    except records.DecodeError:
        return Broken("it prints something else")
    if facts["level"] != "final":
        return Broken(f"Python {facts['version']} is not a final release")
    include = Path(facts["include"])
    found = PythonFacts(
        path=Path(facts["executable"]) if follow and facts["executable"] else python,
        version=facts["version"],
        headers=include if (include / "Python.h").is_file() else None,
        base=Path(facts["base"]),
    )
    return There((found, Path(facts["prefix"])))


def _reason(
    version: str, preferred: str, supported: "SpecifierSet", wheel_pythons: frozenset[str] | None
) -> str:
    if _is_version(version, preferred):
        return ""
    if preferred not in supported:
        return f"instead of {preferred}, which the pinned vLLM does not support ({supported})"
    if wheel_pythons is not None and _minor(preferred) not in wheel_pythons:
        fitting = " and ".join(sorted(wheel_pythons, key=key))
        return f"instead of {preferred}, because the local torch wheel fits {fitting} only"
    return f"instead of {preferred}, which is not installed here and could not be fetched"


def _clear(environment: Path, *, keep: Path) -> None:
    """Empty the environment, stamps first, its marker never.

    An interrupted run thus leaves a folder that is recognized as ours.
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
    return ToolchainError(message, hint=hints.text("machine.set_venv_aside"))


def _without_credentials(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Move user and password of index URLs into variables that uv reads for a named index.

    The arguments are printed and logged.
    """
    shown, secret = list(arguments), dict[str, str]()
    for index, argument in enumerate(arguments):
        found = _USER.match(argument)
        if found and index and arguments[index - 1] in ("--index", "--default-index"):
            name = f"workspace{index}"
            shown[index] = f"{name}={found[1]}{found[4]}"
            secret |= {
                f"UV_INDEX_{name.upper()}_USERNAME": unquote(found[2]),
                f"UV_INDEX_{name.upper()}_PASSWORD": unquote(found[3] or ""),
            }
    return shown, secret


def _is_version(version: str, wanted: str) -> bool:
    return version == wanted or version.startswith(f"{wanted}.")


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
