"""The doctor's checks of what builds: Python and its headers, git, uv, compiler, CMake, ninja and the compiler cache."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from workspace.core.errors import WorkspaceError
from workspace.environment import interpreter, requirements, toolchain
from workspace.environment.doctor_case import Case, Row, key

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

OLDEST_TOOLS_PYTHON = (3, 11)
# vLLM's own demand (pyproject.toml), and Triton's upper bound: both build in one environment.
CMAKE_FROM, CMAKE_BELOW = "3.26.1", "4"
# "GCC >= 11.3 is required to build vLLM", "X86 backend requires gcc/g++ >= 12.3".
_COMPILER_DEMAND = re.compile(r"(?:GCC|gcc/g\+\+|g\+\+)\s*>=\s*(\d+(?:\.\d+)*)")


def python(case: Case) -> Iterator[Row]:
    """Check the Python that runs the tools."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    oldest = ".".join(str(part) for part in OLDEST_TOOLS_PYTHON)
    is_new = sys.version_info[:2] >= OLDEST_TOOLS_PYTHON
    cure = None if is_new else "sudo apt install python3.12 python3.12-venv"
    yield Row("ok" if is_new else "FAIL", "python", version, f"the tools need {oldest} or newer", cure)


def git(case: Case) -> Iterator[Row]:
    """Check that git runs."""
    program = case.which("git")
    said = case.said([program, "version"]) if program else None
    yield Row("ok" if said else "FAIL", "git", said or "not there", "the tree and its patches are a git repository", None if said else "sudo apt install git")


def uv(case: Case) -> Iterator[Row]:
    """Check that uv runs."""
    try:
        said = case.said([str(interpreter.uv(case.layout)), "--version"])
    except WorkspaceError:
        said = None
    cure = None if said else "rm -rf .workspace/tools && ./scripts/inv bootstrap"
    yield Row("ok" if said else "FAIL", "uv", said or "not there, or does not run", "it makes .vllm and fills it", cure)


def headers(case: Case) -> Iterator[Row]:
    """Check Python.h of the interpreter that `.vllm` has, or will have as far as that can be told without fetching one."""
    is_certain, version, folder, base = True, "", None, Path("/")
    there = case.python()
    if there:
        version, folder, base = there.version, there.headers, there.base
    else:
        try:
            choice = interpreter.foresee(case.layout, case.settings, supported=_supported(case))
        except WorkspaceError as exc:
            yield Row("FAIL", "headers", exc.message, "the Python of .vllm cannot be told", exc.hint)
            return
        if choice is None:
            cure = f"{case.uv} python install {case.settings.text('PYTHON_VERSION')}"
            yield Row("warn", "headers", "no Python for .vllm is installed yet", "uv fetches one, with its headers", cure)
            return
        # Another one may still be fetched, or a torch wheel may decide.
        version, folder, is_certain = choice.version, interpreter.headers_of(choice.path, case.settings), not choice.reason
        base = choice.path.parent.parent
    why = "compilers, FlashInfer's and Triton's at run time too, include Python.h"
    if folder:
        yield Row("ok", "headers", f"Python.h of {version}", f"in {folder}; {why}")
        return
    minor = ".".join(version.split(".")[:2])
    # Only a system's Python has a package beside it; others bring their headers, so take one of those.
    own = f"{case.uv} python install {minor}" + (" && mv .vllm .vllm.old" if there else "")
    is_needed = (case.is_native or case.device == "cuda") and is_certain
    cure = f"sudo apt install python{minor}-dev" if base == Path("/usr") else own
    yield Row("FAIL" if is_needed else "warn", "headers", f"no Python.h for {version}", why, cure)


def compiler(case: Case) -> Iterator[Row]:
    """Check g++, or what CXX names, against what the pinned tree demands."""
    found, demand = toolchain.compiler_version(case.settings), demanded_compiler(case.layout.vllm, device=case.device)
    why = f"the tree needs {demand} or newer" if demand else "kernels are compiled with it"
    if found is None:
        yield Row(case.lacking, "compiler", "no g++ that runs", why, "sudo apt install g++")
    elif demand and key(found) < key(demand):
        major = key(demand)[0] + (1 if "." in demand else 0)
        yield Row(case.lacking, "compiler", f"g++ {found}", why, f"sudo apt install g++-{major} && export CC=gcc-{major} CXX=g++-{major}")
    else:
        yield Row("ok", "compiler", f"g++ {found}", why)


def cmake(case: Case) -> Iterator[Row]:
    """Check the CMake that a build takes: that of `.vllm`, else the one on PATH."""
    found = _built_or_on_path(case, "cmake")
    said = case.said([found, "--version"]) if found else None
    version = re.search(r"version (\d+(?:\.\d+)+)", said or "")
    why = f"vLLM needs {CMAKE_FROM} or newer, Triton in the same environment one below {CMAKE_BELOW}"
    cure = f"{case.uv} pip install --python .vllm/bin/python 'cmake>={CMAKE_FROM},<{CMAKE_BELOW}'"
    own = case.layout.relative(Path(found)) if found else ""
    if not case.layout.environment_python.exists():
        yield Row("ok", "cmake", "not in .vllm yet", "bootstrap puts a fitting one there")
    elif version is None:
        yield Row(case.lacking, "cmake", f"{own} does not run" if found else "not there", why, cure)
    elif key(version[1]) < key(CMAKE_FROM):
        yield Row(case.lacking, "cmake", f"{version[1]}, {own}", why, cure)
    else:
        is_fitting = key(version[1]) < key(CMAKE_BELOW)
        yield Row("ok" if is_fitting else "warn", "cmake", f"{version[1]}, {own}", why, None if is_fitting else cure)


def ninja(case: Case) -> Iterator[Row]:
    """Check the ninja that a build takes: that of `.vllm`, else the one on PATH."""
    found = _built_or_on_path(case, "ninja")
    said = case.said([found, "--version"]) if found else None
    if not case.layout.environment_python.exists():
        yield Row("ok", "ninja", "not in .vllm yet", "bootstrap puts one there")
    elif found and said:
        yield Row("ok", "ninja", f"{said}, {case.layout.relative(Path(found))}", "it runs the compilers, FlashInfer's at run time too")
    else:
        cure = f"{case.uv} pip install --python .vllm/bin/python --reinstall ninja"
        yield Row(case.lacking, "ninja", "not there, or does not run", "it runs the compilers, FlashInfer's at run time too", cure)


def patch(case: Case) -> Iterator[Row]:
    """Check for patch(1), with which the tree's CMake mends a header of torch for CUDA."""
    why = "the tree's CMakeLists.txt may mend a header of torch with it"
    if case.device == "cpu" or case.which("patch"):
        yield Row("ok", "patch", "is there" if case.device == "cuda" else "not asked for: the device is cpu", why)
    else:
        yield Row(case.lacking, "patch", "not there", why, "sudo apt install patch")


def demanded_compiler(tree: Path, *, device: str) -> str | None:
    """Return the oldest g++ that the tree's CMake files accept for a device, read from their own words; None where they say nothing."""
    files = [tree / "CMakeLists.txt", *([tree / "cmake" / "cpu_extension.cmake"] if device == "cpu" else [])]
    found = [demand for file in files if file.is_file() for demand in _COMPILER_DEMAND.findall(file.read_text(encoding="utf-8", errors="replace"))]
    return max(found, key=key, default=None)


def _built_or_on_path(case: Case, name: str) -> str | None:
    own = case.layout.environment / "bin" / name
    return str(own) if os.access(own, os.X_OK) else case.which(name)


def _supported(case: Case) -> "SpecifierSet":
    """What the tree supports; before it is there, what every recent vLLM does."""
    from packaging.specifiers import SpecifierSet

    return requirements.python_of(case.layout.vllm) if (case.layout.vllm / "pyproject.toml").is_file() else SpecifierSet(">=3.10,<3.15")
