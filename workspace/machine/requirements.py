"""The requirements of a vLLM tree, read from its own files and sorted by how they are installed;
and the wheels that uv chooses for a list of requirements on any machine.

This module installs nothing, and never changes the tree.
"""

import contextlib
import hashlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from workspace.core import hints, process, records
from workspace.core.errors import BuildError, SourceError
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import interpreter, toolchain

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
ACCELERATORS = ("xgrammar", "triton", "flashinfer-python", "flashinfer-jit-cache")
# Triton, which may be built in the same environment, does not configure with CMake 4.
CMAKE = "cmake>=3.26.1,<4"
SCRIPT_S = 60.0
RESOLVE_S = 600.0
# The paths of the script: in tools/ since v0.31.0, in the root before.
_SCRIPTS = ("tools/use_existing_torch.py", "use_existing_torch.py")
_NEVER = 'sys_platform == "never"'
_LEFT_OUT: Mapping[str, str] = {
    "flashinfer-cubin": "not on the plain index; FlashInfer fetches its cubins at run time",
}


@dataclass(frozen=True)
class Requirements:
    """Requirements whose markers hold here, without the markers.

    `torch` is empty where an existing torch is kept. `overrides` are uv's: names that no dependency
    may install. `left_out` pairs a line with the reason.
    """

    build: tuple[str, ...]
    runtime: tuple[str, ...]
    torch: str
    companions: tuple[str, ...]
    accelerators: tuple[str, ...]
    overrides: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    python: "SpecifierSet"
    digest: str


@dataclass(frozen=True)
class _Line:
    text: str
    # As in `requirements/cuda.txt, line 7`.
    place: str


def read(
    tree: Path,
    *,
    device: str,
    machine: str,
    python_version: str,
    use_existing_torch: bool,
    settings: Settings,
) -> Requirements:
    """Read the requirements of `tree` for a device (cpu or cuda), a machine (x86_64, aarch64) and a
    Python version.

    Raises BuildError where a file is missing or a line is malformed, and, for an existing torch,
    where the tree's own script that removes torch is missing or leaves it in.
    """
    with (
        _editable_copy(tree, settings) if use_existing_torch else contextlib.nullcontext(tree)
    ) as root:
        project, text = _project(root)
        files: dict[str, str] = {"pyproject.toml": text}
        build_lines, runtime_lines = _device_lines(root, device, files)
    markers = _markers(machine, python_version)
    left_out: dict[str, str] = {}
    build = _evaluate(build_lines, markers, left_out)
    runtime = _evaluate(runtime_lines, markers, left_out)
    torch = _torch_of((*runtime, *build), device=device, use_existing_torch=use_existing_torch)
    special = {"torch", *COMPANIONS, *ACCELERATORS}
    accelerators = tuple(str(line) for line in runtime if line.name in ACCELERATORS)
    return Requirements(
        build=_bounded(str(line) for line in build if line.name not in special),
        runtime=_bounded(str(line) for line in runtime if line.name not in special),
        torch=torch,
        companions=tuple(str(line) for line in runtime if line.name in COMPANIONS),
        accelerators=accelerators,
        overrides=_overrides(
            project, accelerators, device=device, use_existing_torch=use_existing_torch
        ),
        left_out=tuple(left_out.items()),
        python=_python(project),
        digest=_digest(files),
    )


def _device_lines(
    root: Path, device: str, files: dict[str, str]
) -> tuple[list[_Line], list[_Line]]:
    """Return the lines for build and run; the names of their files differ between releases."""
    build = _first(
        root,
        f"requirements/build/{device}.txt",
        "requirements/build.txt",
        "requirements-build.txt",
    )
    build_lines = list(_lines(root, build, files))
    runtime = _first(root, f"requirements/{device}.txt", f"requirements-{device}.txt")
    return build_lines, list(_lines(root, runtime, files))


def _torch_of(found: Sequence["Requirement"], *, device: str, use_existing_torch: bool) -> str:
    """Return the requirement of torch, empty for an existing one; raise where it is wrong."""
    torch = next((str(line) for line in found if line.name == "torch"), "")
    if use_existing_torch and torch:
        raise BuildError(
            f"the tree's use_existing_torch.py left {torch} in the requirements",
            hint=hints.text("machine.pinned_torch"),
        )
    if not use_existing_torch and not torch:
        raise BuildError(
            f"the tree's requirements for {device} name no torch",
            hint=hints.text("machine.existing_torch"),
        )
    return torch


def python_of(tree: Path) -> "SpecifierSet":
    """Return the Python versions that a tree supports.

    Raises BuildError where it has no readable pyproject.toml.
    """
    return _python(_project(tree)[0])


def _overrides(
    project: Mapping[str, object],
    accelerators: tuple[str, ...],
    *,
    device: str,
    use_existing_torch: bool,
) -> tuple[str, ...]:
    """Return overrides for names that other packages require and that must not be installed.

    Beside a CPU torch: torchvision and friends of the plain index are linked against CUDA, fail to
    import and break transformers; triton has no backend there, vLLM switches it off, and xgrammar,
    which requires it, takes its CPU path (checked: 0.2.7, vLLM 0.31.0). Beside a torch of the
    user's own: the companions require another torch.
    """
    never = list(COMPANIONS) if device == "cpu" or use_existing_torch else []
    if device == "cpu" and not any(re.match(r"triton\b(?!-)", line) for line in accelerators):
        never.append("triton")
    tool = project.get("tool")
    uv = tool.get("uv", {}) if isinstance(tool, dict) else {}
    # The tree's own settings for uv do not reach uv, because uv runs in another folder.
    never += [name for name in uv.get("exclude-dependencies", []) if isinstance(name, str)]
    return tuple(f"{name} ; {_NEVER}" for name in dict.fromkeys(never))


@contextlib.contextmanager
def _editable_copy(tree: Path, settings: Settings) -> Iterator[Path]:
    """Yield a copy of the tree's requirements from which its own script has removed torch."""
    script = next((tree / name for name in _SCRIPTS if (tree / name).is_file()), None)
    if script is None:
        raise BuildError(
            "the tree has no use_existing_torch.py, neither in tools/ nor in its root",
            hint=hints.text("machine.pinned_torch"),
        )
    with tempfile.TemporaryDirectory(prefix="requirements-") as name:
        copy = Path(name)
        if (tree / "requirements").is_dir():
            shutil.copytree(tree / "requirements", copy / "requirements")
        for file in (tree / "pyproject.toml", *tree.glob("requirements*.txt")):
            if file.is_file():
                shutil.copy(file, copy)
        # Its patterns are relative: outside the copy it would find no file, and report no error.
        done = process.capture(
            [sys.executable, script],
            env=settings.child_environment("plain"),
            cwd=copy,
            timeout_s=SCRIPT_S,
        )
        if done.returncode != 0:
            raise BuildError(
                f"{script} {process.describe_status(done.returncode)}",
                details=tuple(done.stderr.splitlines()[-10:]),
            )
        yield copy


def _project(root: Path) -> tuple[Mapping[str, object], str]:
    try:
        text = (root / "pyproject.toml").read_text(encoding="utf-8")
        return records.parse_toml(text), text
    except (OSError, ValueError) as exc:
        raise BuildError(
            f"{root / 'pyproject.toml'} cannot be read: {getattr(exc, 'strerror', exc)}",
            hint=hints.text("core.list_folder", folder=root),
        ) from exc


def _python(project: Mapping[str, object]) -> "SpecifierSet":
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    section = project.get("project")
    text = section.get("requires-python", "") if isinstance(section, dict) else ""
    try:
        return SpecifierSet(str(text))
    except InvalidSpecifier as exc:
        raise BuildError(
            f"pyproject.toml of the tree: requires-python = {text!r} is not a version range"
        ) from exc


def _first(root: Path, *names: str) -> str:
    found = next((name for name in names if (root / name).is_file()), None)
    if found is None:
        raise BuildError(
            f"the tree has none of {', '.join(names)}",
            hint=hints.text("core.git_status", folder="vendor/vllm"),
        )
    return found


def _lines(root: Path, name: str, files: dict[str, str]) -> Iterator[_Line]:
    """Yield the lines of a requirements file and of its included files, each file once.

    `files` collects the contents.
    """
    if name in files:
        return
    try:
        files[name] = (root / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise BuildError(
            f"{name} of the tree cannot be read: {getattr(exc, 'strerror', exc)}",
            hint=hints.text("core.git_status", folder="vendor/vllm"),
        ) from exc
    end = 0
    for logical in re.split(r"(?<!\\)\n", files[name]):
        end, start = end + logical.count("\n") + 1, end + 1
        text = re.sub(r"(^|\s)#.*$", "", logical.replace("\\\n", ""), flags=re.MULTILINE).strip()
        included = re.match(r"(?:-r|--requirement)[\s=]*(\S+)$", text)
        if included:
            yield from _lines(root, str(Path(name).parent / included[1]), files)
        elif text:
            yield _Line(text, f"{name}, line {start}")


def _evaluate(
    lines: list[_Line], markers: Mapping[str, str], left_out: dict[str, str]
) -> list["Requirement"]:
    """Return the requirements whose marker holds, without the marker.

    Those that the package index cannot serve go to `left_out`.
    """
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, Requirement] = {}
    for line in lines:
        if line.text.startswith("-"):
            left_out[line.text] = "an option for pip; only the configured package index is used"
            continue
        try:
            requirement = Requirement(line.text)
        except InvalidRequirement as exc:
            why = str(exc).splitlines()[0]
            raise BuildError(
                f"{line.place}: {line.text!r} is not a requirement: {why}",
                hint=hints.text("machine.requirements_diff"),
            ) from exc
        if requirement.marker is not None and not requirement.marker.evaluate(dict(markers)):
            continue
        requirement.marker, requirement.name = None, canonicalize_name(requirement.name)
        if requirement.url:
            left_out[f"{requirement.name} @ {requirement.url}"] = (
                "a file at an address of its own, not on the package index"
            )
        elif requirement.name in _LEFT_OUT:
            left_out[str(requirement)] = _LEFT_OUT[requirement.name]
        else:
            found.setdefault(str(requirement), requirement)
    return list(found.values())


def _markers(machine: str, python_version: str) -> dict[str, str]:
    """Return the environment in which markers are evaluated (PEP 508).

    It is Linux, CPython, and the version of the built interpreter.
    """
    parts = python_version.split(".")
    return {
        "implementation_name": "cpython",
        "implementation_version": ".".join([*parts, "0"][:3]),
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": ".".join([*parts, "0"][:3]),
        "python_version": ".".join(parts[:2]),
        "sys_platform": "linux",
        "extra": "",
    }


def _bounded(lines: Iterator[str]) -> tuple[str, ...]:
    return tuple(
        dict.fromkeys(CMAKE if re.match(r"cmake\b(?!-)", line) else line for line in lines)
    )


def _digest(files: Mapping[str, str]) -> str:
    """Return the SHA-256 of names and contents, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{name}\0{hashlib.sha256(files[name].encode()).hexdigest()}\n".encode())
    return total.hexdigest()


@dataclass(frozen=True)
class Platform:
    """A Linux machine that wheels are chosen for: versions are as 3.12 and 2.39."""

    machine: str
    python: str
    glibc: str


@dataclass(frozen=True)
class Wheel:
    """A wheel of an index; `size` is None where the index has none."""

    hashes: Mapping[str, str]
    url: str = ""
    size: int | None = None

    @property
    def filename(self) -> str:
        return unquote(urlsplit(self.url).path.rpartition("/")[2])


@dataclass(frozen=True)
class Package:
    """A resolved package with its wheels, as pylock.toml has it (PEP 751)."""

    name: str
    version: str = ""
    wheels: tuple[Wheel, ...] = ()


@dataclass(frozen=True)
class _Lock:
    packages: tuple[Package, ...]


@dataclass(frozen=True)
class Request:
    """Requirements to resolve: lines, arguments for uv, overrides, and constraints."""

    lines: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()


class Unsolved(SourceError):
    """The index answers, and has no versions that fit together."""


def resolve(
    request: Request, target: Platform, *, layout: Layout, settings: Settings
) -> tuple[Package, ...]:
    """Return the packages that uv chooses for a machine, wheels only; it downloads metadata alone.

    Raises Unsolved where the indexes have no such packages, SourceError where one gives no answer.
    """
    lists = {"overrides": request.overrides, "constraints": request.constraints}
    environment = settings.child_environment("plain")
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as name:
        folder = Path(name)
        argv: list[str | Path] = [interpreter.uv(layout), "pip", "compile", "--quiet"]
        argv += ["--format", "pylock.toml", "--only-binary", ":all:", "--no-python-downloads"]
        argv += ["--python-version", target.python, "--python-platform"]
        argv += [f"{target.machine}-manylinux_{target.glibc.replace('.', '_')}"]
        argv += ["--default-index", settings.index_url] if settings.index_url else []
        for flag, lines in lists.items():
            (folder / flag).write_text("\n".join(lines))
            argv += [f"--{flag}", folder / flag]
        (folder / "wanted.txt").write_text("\n".join(request.lines))
        argv += [*request.arguments, folder / "wanted.txt"]
        done = process.capture(argv, env=environment, cwd=folder, timeout_s=RESOLVE_S)
    if done.returncode == 0:
        return records.convert(records.parse_toml(done.stdout), _Lock).packages
    output = done.stderr.splitlines()
    failed = Unsolved(
        f"uv finds no wheels for {target.machine}, Python {target.python}",
        hint=hints.text("machine.network_or_index"),
        details=tuple(output[-10:]),
    )
    known = toolchain.classify_uv_failure(
        output, layout=layout, env=environment, is_build=False, otherwise=failed
    )
    if isinstance(known, toolchain.NotOffered):
        raise Unsolved(known.message, hint=known.hint, details=known.details)
    raise known


def best_wheel(package: Package, target: Platform, *, locked: str = "") -> Wheel:
    """Return the wheel that uv would install on a machine; its hash is in `locked`, if given.

    Raises SourceError where no wheel fits.
    """
    from packaging import tags
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    version = tuple(map(int, target.python.split(".")))
    name = f"cp{target.python.replace('.', '')}"
    minors = range(int(target.glibc.partition(".")[2]), 4, -1)
    platforms = [f"manylinux_2_{minor}_{target.machine}" for minor in minors]
    older = ("manylinux2014", "manylinux2010", "manylinux1", "linux")
    platforms += [f"{form}_{target.machine}" for form in older]
    order = [
        *tags.cpython_tags(version, abis=[name], platforms=platforms),
        *tags.compatible_tags(version, interpreter=name, platforms=platforms),
    ]
    ranks = {tag: rank for rank, tag in reversed(list(enumerate(order)))}
    found: list[tuple[int, Wheel]] = []
    for wheel in package.wheels:
        with contextlib.suppress(InvalidWheelFilename):
            fitting = ranks.keys() & parse_wheel_filename(wheel.filename)[3]
            if fitting and (not locked or wheel.hashes.get("sha256", "-") in locked):
                found.append((min(ranks[tag] for tag in fitting), wheel))
    if not found:
        raise SourceError(
            f"{package.name} {package.version} has no wheel for {target.machine}, Python"
            f" {target.python}",
            hint=hints.text("machine.other_index"),
        )
    return min(found, key=lambda pair: pair[0])[1]
