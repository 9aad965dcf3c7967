"""What this machine lacks for a bootstrap, each lack with the command that mends it.

Rows are plain statements: printing and stopping is the caller's. It looks and changes nothing.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from workspace.core import process
from workspace.core.errors import ToolchainError, WorkspaceError
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.environment import interpreter, machine, requirements, toolchain

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

State = Literal["ok", "warn", "FAIL"]
OLDEST_TOOLS_PYTHON = (3, 11)
CUDA_MAJOR = "13"
ANSWER_S = 20.0
WITHOUT_GPU = "./scripts/inv bootstrap --device cpu"
# "GCC >= 11.3 is required to build vLLM", "X86 backend requires gcc/g++ >= 12.3".
_COMPILER_DEMAND = re.compile(r"(?:GCC|gcc/g\+\+|g\+\+)\s*>=\s*(\d+(?:\.\d+)*)")


@dataclass(frozen=True)
class Row:
    """One finding: what was looked at, what was seen, why it matters, and the command that mends it."""

    state: State
    name: str
    seen: str
    why: str
    cure: str | None = None


def device(settings: Settings, host: machine.Machine) -> Literal["cuda", "cpu"]:
    """Decide DEVICE=auto: cuda where the driver shows a GPU."""
    asked = settings.text("DEVICE")
    if asked == "auto":
        return "cuda" if host.gpus else "cpu"
    return "cuda" if asked == "cuda" else "cpu"


def preflight(layout: Layout, settings: Settings, *, device: str, kernels: str, need_gib: Mapping[Path, float]) -> tuple[Row, ...]:
    """Check what a bootstrap needs, disk first. `kernels` is donor, native, or anything else for a wheel; `need_gib` maps folders to GiB."""
    rows = [*_disk(need_gib), *_writable(need_gib), *_tools(layout, settings), _headers(layout, settings, device=device, kernels=kernels)]
    if device == "cuda":
        rows += _cuda(settings, machine.observe(settings), kernels=kernels)
    if device == "cuda" or kernels == "native":
        rows.append(_compiler(layout, settings, device=device, is_needed=kernels == "native"))
    return tuple(rows)


def _disk(need_gib: Mapping[Path, float]) -> Iterator[Row]:
    """One row per file system: folders on the same one share what is free."""
    places: dict[int, tuple[Path, float]] = {}
    for path, need in need_gib.items():
        number = machine.existing(path).stat().st_dev
        first, sum_gib = places.get(number, (path, 0.0))
        places[number] = (first, sum_gib + need)
    for path, need in places.values():
        free = machine.free_gib(path)
        seen = f"{free:.1f} GiB free for {path}"
        if free < need:
            yield Row("FAIL", "disk", seen, f"{need:.1f} GiB are needed there", f"df -h {machine.existing(path)}; uv cache prune")
        else:
            yield Row("ok", "disk", seen, f"{need:.1f} GiB are needed there")


def _writable(need_gib: Mapping[Path, float]) -> Iterator[Row]:
    for path in need_gib:
        place = machine.existing(path)
        if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
            yield Row("FAIL", "folder", f"{place} cannot be written", f"{path} is made or changed there", f'sudo chown -R "$USER" {place}')


def _tools(layout: Layout, settings: Settings) -> Iterator[Row]:
    version = ".".join(str(part) for part in sys.version_info[:3])
    oldest = ".".join(str(part) for part in OLDEST_TOOLS_PYTHON)
    state: State = "ok" if sys.version_info[:2] >= OLDEST_TOOLS_PYTHON else "FAIL"
    yield Row(state, "python", version, f"the tools need {oldest} or newer", None if state == "ok" else "sudo apt install python3.12 python3.12-venv")
    environment = settings.child_environment("plain")
    git = shutil.which("git", path=environment.get("PATH", ""))
    said = _said([git, "version"], settings) if git else None
    yield Row("ok" if said else "FAIL", "git", said or "not there", "the tree and its patches are a git repository", None if said else "sudo apt install git")
    try:
        said = _said([str(interpreter.uv(layout)), "--version"], settings)
    except ToolchainError:
        said = None
    cure = None if said else "rm -rf .workspace/tools && ./scripts/inv bootstrap"
    yield Row("ok" if said else "FAIL", "uv", said or "not there, or does not run", "it makes .vllm and fills it", cure)


def _headers(layout: Layout, settings: Settings, *, device: str, kernels: str) -> Row:
    """Python.h of the interpreter that `.vllm` has, or will have as far as that can be told without fetching one."""
    is_certain, python, headers, base = True, "", None, Path("/")
    if there := interpreter.describe(layout, settings):
        python, headers, base = there.version, there.headers, there.base
    else:
        try:
            choice = interpreter.foresee(layout, settings, supported=_supported(layout))
        except WorkspaceError as exc:
            return Row("FAIL", "headers", exc.message, "the Python of .vllm cannot be told", exc.hint)
        if choice is None:
            cure = f"uv python install {settings.text('PYTHON_VERSION')}"
            return Row("warn", "headers", "no Python for .vllm is installed yet", "uv fetches one, with its headers", cure)
        # Another one may still be fetched, or a torch wheel may decide.
        python, headers, base, is_certain = choice.version, interpreter.headers_of(choice.path, settings), choice.path.parent.parent, not choice.reason
    if headers:
        return Row("ok", "headers", f"Python.h of {python}", f"in {headers}")
    minor = ".".join(python.split(".")[:2])
    # Only a system's Python has a package beside it; others bring their headers, so take one of those.
    cure = f"sudo apt install python{minor}-dev" if base == Path("/usr") else f"uv python install {minor}" + (" && mv .vllm .vllm.old" if there else "")
    is_needed = (kernels == "native" or device == "cuda") and is_certain
    why = "compilers, FlashInfer's and Triton's at run time too, include Python.h"
    return Row("FAIL" if is_needed else "warn", "headers", f"no Python.h for {python}", why, cure)


def _cuda(settings: Settings, host: machine.Machine, *, kernels: str) -> Iterator[Row]:
    if host.gpus:
        gpu = host.gpus[0]
        seen = f"{gpu.driver or 'a driver'}, {gpu.name}" + (f", capability {gpu.capability}" if gpu.capability else "")
        yield Row("ok", "driver", seen, "nvidia-smi answers")
    else:
        yield Row("FAIL", "driver", "nvidia-smi shows no GPU", "a CUDA build needs a GPU and its driver", f"nvidia-smi; without a GPU: {WITHOUT_GPU}")
    lacking: State = "FAIL" if kernels == "native" else "warn"
    why = "it compiles the kernels" if kernels == "native" else "FlashInfer compiles kernels with it at run time"
    toolkit, home = toolchain.find_toolkit(settings), settings.path("CUDA_HOME")
    if toolkit is None:
        seen = f"CUDA_HOME={home} has no nvcc that runs" if home else "no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda"
        yield Row(lacking, "toolkit", seen, why, f"sudo apt install cuda-toolkit-{CUDA_MAJOR}-0 && export CUDA_HOME=/usr/local/cuda-{CUDA_MAJOR}.0")
    elif toolkit.version.split(".")[0] != CUDA_MAJOR:
        cure = f"export CUDA_HOME=/usr/local/cuda-{CUDA_MAJOR}.0  # after: sudo apt install cuda-toolkit-{CUDA_MAJOR}-0"
        yield Row(lacking, "toolkit", f"CUDA {toolkit.version} in {toolkit.home}", f"torch is built for CUDA {CUDA_MAJOR}", cure)
    else:
        yield Row("ok", "toolkit", f"CUDA {toolkit.version} in {toolkit.home}", why)


def _compiler(layout: Layout, settings: Settings, *, device: str, is_needed: bool) -> Row:
    lacking: State = "FAIL" if is_needed else "warn"
    found, demand = toolchain.compiler_version(settings), demanded_compiler(layout.vllm, device=device)
    why = f"the tree needs {demand} or newer" if demand else "kernels are compiled with it"
    if found is None:
        return Row(lacking, "compiler", "no g++ that runs", why, "sudo apt install g++")
    if demand and _key(found) < _key(demand):
        major = _key(demand)[0] + (1 if "." in demand else 0)
        return Row(lacking, "compiler", f"g++ {found}", why, f"sudo apt install g++-{major} && export CC=gcc-{major} CXX=g++-{major}")
    return Row("ok", "compiler", f"g++ {found}", why)


def demanded_compiler(tree: Path, *, device: str) -> str | None:
    """Return the oldest g++ that the tree's CMake files accept for a device, read from their own words; None where they say nothing."""
    files = [tree / "CMakeLists.txt", *([tree / "cmake" / "cpu_extension.cmake"] if device == "cpu" else [])]
    found = [demand for file in files if file.is_file() for demand in _COMPILER_DEMAND.findall(file.read_text(encoding="utf-8", errors="replace"))]
    return max(found, key=_key, default=None)


def _said(argv: list[str], settings: Settings) -> str | None:
    try:
        done = process.capture(argv, env=settings.child_environment("plain"), timeout_s=ANSWER_S)
    except ToolchainError:
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def _supported(layout: Layout) -> "SpecifierSet":
    """What the tree supports; before it is there, what every recent vLLM does."""
    from packaging.specifiers import SpecifierSet

    return requirements.python_of(layout.vllm) if (layout.vllm / "pyproject.toml").is_file() else SpecifierSet(">=3.10,<3.15")


def _key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
