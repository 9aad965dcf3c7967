"""The doctor's checks of what builds: Python and its headers, git, uv, compiler, CMake, ninja and
the compiler cache.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workspace.core.errors import WorkspaceError
from workspace.machine import dotenv, interpreter, requirements, toolchain
from workspace.machine.case import WITHOUT_GPU, Case, Row, State, key
from workspace.machine.toolchain import Toolkit

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
    hint = None if is_new else "sudo apt install python3.12 python3.12-venv"
    yield Row(
        "ok" if is_new else "FAIL", "python", version, f"the tools need {oldest} or newer", hint
    )


def git(case: Case) -> Iterator[Row]:
    """Check that git runs."""
    program = case.which("git")
    said = case.first_line([program, "version"]) if program else None
    yield Row(
        "ok" if said else "FAIL",
        "git",
        said or "not there",
        "the tree and its patches are a git repository",
        None if said else "sudo apt install git",
    )


def uv(case: Case) -> Iterator[Row]:
    """Check that uv runs."""
    try:
        said = case.first_line([str(interpreter.uv(case.layout)), "--version"])
    except WorkspaceError:
        said = None
    hint = None if said else "rm -rf .workspace/tools && ./scripts/inv bootstrap"
    yield Row(
        "ok" if said else "FAIL",
        "uv",
        said or "not there, or does not run",
        "it makes .vllm and fills it",
        hint,
    )


def headers(case: Case) -> Iterator[Row]:
    """Check Python.h of the interpreter that `.vllm` has, or will have as far as that can be told
    without fetching one.
    """
    is_certain, version, folder, base = True, "", None, Path("/")
    there = case.python()
    if there:
        version, folder, base = there.version, there.headers, there.base
    else:
        try:
            choice = interpreter.foresee(case.layout, case.settings, supported=_supported(case))
        except WorkspaceError as exc:
            yield Row(
                "FAIL", "headers", exc.message, "the Python of .vllm cannot be told", exc.hint
            )
            return
        if choice is None:
            hint = f"{case.uv} python install {case.settings.text('PYTHON_VERSION')}"
            yield Row(
                "warn",
                "headers",
                "no Python for .vllm is installed yet",
                "uv fetches one, with its headers",
                hint,
            )
            return
        # Another one may still be fetched, or a torch wheel may decide.
        version, folder, is_certain = (
            choice.version,
            interpreter.headers_of(choice.path, case.settings),
            not choice.reason,
        )
        base = choice.path.parent.parent
    why = "compilers, FlashInfer's and Triton's at run time too, include Python.h"
    if folder:
        yield Row("ok", "headers", f"Python.h of {version}", f"in {folder}; {why}")
        return
    minor = ".".join(version.split(".")[:2])
    # Only a system's Python has a package beside it; others bring their headers, so take one of
    # those.
    own = f"{case.uv} python install {minor}" + (" && mv .vllm .vllm.old" if there else "")
    is_needed = (case.is_native or case.device == "cuda") and is_certain
    hint = f"sudo apt install python{minor}-dev" if base == Path("/usr") else own
    yield Row("FAIL" if is_needed else "warn", "headers", f"no Python.h for {version}", why, hint)


def compiler(case: Case) -> Iterator[Row]:
    """Check g++, or what CXX names, against what the pinned tree demands."""
    found, demand = (
        toolchain.compiler_version(case.settings),
        demanded_compiler(case.layout.vllm, device=case.device),
    )
    why = f"the tree needs {demand} or newer" if demand else "kernels are compiled with it"
    if found is None:
        yield Row(case.lacking, "compiler", "no g++ that runs", why, "sudo apt install g++")
    elif demand and key(found) < key(demand):
        major = key(demand)[0] + (1 if "." in demand else 0)
        yield Row(
            case.lacking,
            "compiler",
            f"g++ {found}",
            why,
            f"sudo apt install g++-{major} && export CC=gcc-{major} CXX=g++-{major}",
        )
    else:
        yield Row("ok", "compiler", f"g++ {found}", why)


def cmake(case: Case) -> Iterator[Row]:
    """Check the CMake that a build takes: that of `.vllm`, else the one on PATH."""
    found = _built_or_on_path(case, "cmake")
    said = case.first_line([found, "--version"]) if found else None
    version = re.search(r"version (\d+(?:\.\d+)+)", said or "")
    why = (
        f"vLLM needs {CMAKE_FROM} or newer, Triton in the same environment one below {CMAKE_BELOW}"
    )
    hint = f"{case.uv} pip install --python .vllm/bin/python 'cmake>={CMAKE_FROM},<{CMAKE_BELOW}'"
    own = case.layout.relative(Path(found)) if found else ""
    if not case.layout.environment_python.exists():
        yield Row("ok", "cmake", "not in .vllm yet", "bootstrap puts a fitting one there")
    elif version is None:
        yield Row(case.lacking, "cmake", f"{own} does not run" if found else "not there", why, hint)
    elif key(version[1]) < key(CMAKE_FROM):
        yield Row(case.lacking, "cmake", f"{version[1]}, {own}", why, hint)
    else:
        is_fitting = key(version[1]) < key(CMAKE_BELOW)
        yield Row(
            "ok" if is_fitting else "warn",
            "cmake",
            f"{version[1]}, {own}",
            why,
            None if is_fitting else hint,
        )


def ninja(case: Case) -> Iterator[Row]:
    """Check the ninja that a build takes: that of `.vllm`, else the one on PATH."""
    found = _built_or_on_path(case, "ninja")
    said = case.first_line([found, "--version"]) if found else None
    if not case.layout.environment_python.exists():
        yield Row("ok", "ninja", "not in .vllm yet", "bootstrap puts one there")
    elif found and said:
        yield Row(
            "ok",
            "ninja",
            f"{said}, {case.layout.relative(Path(found))}",
            "it runs the compilers, FlashInfer's at run time too",
        )
    else:
        hint = f"{case.uv} pip install --python .vllm/bin/python --reinstall ninja"
        yield Row(
            case.lacking,
            "ninja",
            "not there, or does not run",
            "it runs the compilers, FlashInfer's at run time too",
            hint,
        )


def patch(case: Case) -> Iterator[Row]:
    """Check for patch(1), with which the tree's CMake mends a header of torch for CUDA."""
    why = "the tree's CMakeLists.txt may mend a header of torch with it"
    if case.device == "cpu" or case.which("patch"):
        yield Row(
            "ok",
            "patch",
            "is there" if case.device == "cuda" else "not asked for: the device is cpu",
            why,
        )
    else:
        yield Row(case.lacking, "patch", "not there", why, "sudo apt install patch")


def demanded_compiler(tree: Path, *, device: str) -> str | None:
    """Return the oldest g++ that the tree's CMake files accept for a device, read from their own
    words; None where they say nothing.
    """
    files = [
        tree / "CMakeLists.txt",
        *([tree / "cmake" / "cpu_extension.cmake"] if device == "cpu" else []),
    ]
    found = [
        demand
        for file in files
        if file.is_file()
        for demand in _COMPILER_DEMAND.findall(file.read_text(encoding="utf-8", errors="replace"))
    ]
    return max(found, key=key, default=None)


def _built_or_on_path(case: Case, name: str) -> str | None:
    own = case.layout.environment / "bin" / name
    return str(own) if os.access(own, os.X_OK) else case.which(name)


def _supported(case: Case) -> "SpecifierSet":
    """What the tree supports; before it is there, what every recent vLLM does."""
    from packaging.specifiers import SpecifierSet

    return (
        requirements.python_of(case.layout.vllm)
        if (case.layout.vllm / "pyproject.toml").is_file()
        else SpecifierSet(">=3.10,<3.15")
    )


CUDA_MAJOR = "13"
# The oldest that serves CUDA 13 (CUDA Toolkit Release Notes, table of driver versions).
DRIVER = "580"
# The oldest that vLLM's CMakeLists.txt lists.
OLDEST_CAPABILITY = "7.5"
UPGRADE_DRIVER = f"sudo apt install nvidia-driver-{DRIVER}-open && sudo reboot"
_ENTRY = re.compile(r"(?P<number>\d+\.\d+)(?P<suffix>[af]?)(?P<ptx>\+PTX)?$")


@dataclass(frozen=True)
class Entry:
    """One word of TORCH_CUDA_ARCH_LIST: number, `a` or `f` behind it, and whether PTX is kept for
    newer GPUs.
    """

    text: str
    number: str
    suffix: str
    has_ptx: bool


def driver(case: Case) -> Iterator[Row]:
    """Check that the driver answers and shows a GPU that vLLM has kernels for."""
    gpus = case.host().gpus
    if case.device == "cpu":
        yield Row("ok", "driver", "not asked for: the device is cpu", "a CPU build needs none")
        return
    if not gpus:
        # Somebody who says for which GPU builds for another machine.
        is_meant = bool(case.settings.text("TORCH_CUDA_ARCH_LIST"))
        elsewhere = (
            "TORCH_CUDA_ARCH_LIST=12.1a ./scripts/inv bootstrap --device cuda    builds for a GPU"
            " that is not here"
        )
        why = (
            "what is built here runs elsewhere; no smoke, no server"
            if is_meant
            else "a CUDA build needs a GPU and its driver"
        )
        yield Row(
            "warn" if is_meant else "FAIL",
            "driver",
            "nvidia-smi shows no GPU",
            why,
            f"nvidia-smi  # without a GPU: {WITHOUT_GPU}, or {elsewhere}",
        )
        return
    cuda = case.driver_cuda()
    yield Row(
        "ok",
        "driver",
        f"{gpus[0].driver or 'of unknown version'}" + (f", serves CUDA {cuda}" if cuda else ""),
        "nvidia-smi answers",
    )
    why = f"vLLM has kernels for capability {OLDEST_CAPABILITY} and newer"
    for name, capability in dict.fromkeys((gpu.name, gpu.capability) for gpu in gpus):
        count = sum((gpu.name, gpu.capability) == (name, capability) for gpu in gpus)
        seen = f"{f'{count} x ' if count > 1 else ''}{name}, " + (
            f"capability {capability}" if capability else "of unknown capability"
        )
        if capability is None or not key(capability):
            yield Row(
                "warn", "gpu", seen, f"{why}; a driver before 510 does not tell", UPGRADE_DRIVER
            )
        else:
            is_served = key(capability) >= key(OLDEST_CAPABILITY)
            yield Row(
                "ok" if is_served else "FAIL", "gpu", seen, why, None if is_served else WITHOUT_GPU
            )


def toolkit(case: Case) -> Iterator[Row]:
    """Check that there is a CUDA toolkit of torch's major version."""
    found, home = case.toolkit(), case.settings.path("CUDA_HOME")
    if case.device == "cpu":
        yield Row(
            "ok",
            "toolkit",
            (f"CUDA {found.version} in {found.home}; " if found else "")
            + "not asked for: the device is cpu",
            "a CPU build needs none",
        )
        return
    why = (
        "it compiles the kernels"
        if case.is_native
        else "FlashInfer compiles kernels with it at run time"
    )
    wanted = f"/usr/local/cuda-{CUDA_MAJOR}.0"
    if found is None:
        seen = (
            f"CUDA_HOME={home} has no nvcc that runs"
            if home
            else "no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda"
        )
        yield Row(
            case.lacking,
            "toolkit",
            seen,
            why,
            f"sudo apt install cuda-toolkit-{CUDA_MAJOR}-0 && export CUDA_HOME={wanted}",
        )
    elif found.version.split(".")[0] != CUDA_MAJOR:
        hint = f"export CUDA_HOME={wanted}  # after: sudo apt install cuda-toolkit-{CUDA_MAJOR}-0"
        yield Row(
            case.lacking,
            "toolkit",
            f"CUDA {found.version} in {found.home}",
            f"torch is built for CUDA {CUDA_MAJOR}",
            hint,
        )
    else:
        yield Row("ok", "toolkit", f"CUDA {found.version} in {found.home}", why)


def agreement(case: Case) -> Iterator[Row]:
    """Check that the driver serves the CUDA of torch and of the toolkit. A driver serves older
    ones, and newer ones of its major version.
    """
    if case.device == "cpu" or not case.host().gpus:
        return
    served, build, found = case.driver_cuda(), case.torch(), case.toolkit()
    wanted = {
        name: cuda
        for name, cuda in (
            ("torch", build.cuda if build else None),
            ("the toolkit", found.version if found else None),
        )
        if cuda
    }
    seen = f"driver {served or 'unknown'}, " + ", ".join(
        f"{name} {cuda}" for name, cuda in wanted.items()
    )
    if served is None:
        yield Row(
            "warn",
            "cuda fit",
            seen,
            "nvidia-smi does not say which CUDA the driver serves",
            "nvidia-smi",
        )
        return
    newer = [name for name, cuda in wanted.items() if key(cuda)[0] > key(served)[0]]
    ahead = [name for name, cuda in wanted.items() if key(cuda)[:2] > key(served)[:2]]
    if newer:
        state: State = "FAIL" if "torch" in newer else case.lacking
        yield Row(
            state,
            "cuda fit",
            seen,
            f"what {' and '.join(newer)} builds does not start on a driver of an older major"
            " version",
            UPGRADE_DRIVER,
        )
    elif ahead:
        why = f"{' and '.join(ahead)} is newer than the driver: its cubins run, its PTX does not"
        yield Row("warn", "cuda fit", seen, why, UPGRADE_DRIVER)
    else:
        yield Row("ok", "cuda fit", seen, "a driver serves its own CUDA and older ones")


def archs(case: Case) -> Iterator[Row]:
    """Check TORCH_CUDA_ARCH_LIST against the GPU, torch's own words and what nvcc knows."""
    text = case.settings.text("TORCH_CUDA_ARCH_LIST")
    if case.device == "cpu":
        yield Row("ok", "arch list", "not asked for: the device is cpu", "a CPU build needs none")
        return
    capabilities = tuple(
        dict.fromkeys(
            gpu.capability for gpu in case.host().gpus if gpu.capability and key(gpu.capability)
        )
    )
    found = case.toolkit()
    entries = parse(text)
    fault = fault_of(entries, capabilities, toolkit_version=found.version if found else None)
    if fault is None and found:
        fault = _unknown_to_nvcc(entries, _known_to_nvcc(case, found), found)
    seen = (text or "not set") + (
        f"; GPU {' and '.join(capabilities)}" if capabilities else "; no GPU here"
    )
    if fault is None:
        yield Row(
            "ok", "arch list", seen, "kernels are compiled for these architectures and no other"
        )
        return
    wanted = dotenv.suggest(case.host(), found, device="cuda").get("TORCH_CUDA_ARCH_LIST", "12.1a")
    is_in_shell = case.settings.source("TORCH_CUDA_ARCH_LIST") == "shell"
    line = f"sed -i '/^TORCH_CUDA_ARCH_LIST=/d' .env; echo 'TORCH_CUDA_ARCH_LIST={wanted}' >> .env"
    yield Row(
        case.lacking,
        "arch list",
        seen,
        fault,
        f"export TORCH_CUDA_ARCH_LIST='{wanted}'" if is_in_shell else line,
    )


def parse(text: str) -> tuple[Entry, ...]:
    """Read an architecture list; settings.py has refused what is none."""
    found = [(word, _ENTRY.match(word)) for word in re.split(r"[ ;,]+", text.strip(" ;,")) if word]
    return tuple(
        Entry(word, entry["number"], entry["suffix"], bool(entry["ptx"]))
        for word, entry in found
        if entry
    )


def runs_on(entry: Entry, capability: str) -> bool:
    """Decide whether kernels of an entry run on a GPU.

    Cubins run on their own major version from their minor version on; those with `a` on exactly
    their own; PTX is compiled for newer GPUs, but not with `a` (CUDA C++ Programming Guide, compute
    capabilities and feature sets).
    """
    own, gpu = key(entry.number), key(capability)
    if entry.suffix == "a":
        return own == gpu
    return (own[0] == gpu[0] and own <= gpu) or (entry.has_ptx and not entry.suffix and own <= gpu)


def fault_of(
    entries: tuple[Entry, ...], capabilities: tuple[str, ...], *, toolkit_version: str | None
) -> str | None:
    """Decide what is wrong with a list, in a sentence; None for nothing."""
    if not entries:
        if any(capability == "12.1" for capability in capabilities) or not capabilities:
            return "torch's CMake then makes compute_20 of a GB10's 12.1, which no nvcc knows"
        return "every architecture that vLLM knows is compiled then, which takes many times as long"
    families = [entry.text for entry in entries if entry.suffix == "f"]
    if families:
        return f"torch.utils.cpp_extension refuses {families[0]}: Unknown CUDA arch"
    for capability in capabilities:
        fitting = [entry for entry in entries if runs_on(entry, capability)]
        if not fitting:
            return (
                f"kernels for {' and '.join(entry.text for entry in entries)} do not run on"
                f" capability {capability}"
            )
        if (
            capability == "12.1"
            and all(entry.number == "12.0" for entry in fitting)
            and toolkit_version
            and key(toolkit_version) < (13,)
        ):
            return (
                f"with CUDA {toolkit_version} vLLM makes 12.0a of 12.0, which does not run on a"
                " GB10; only CUDA 13 makes the family 12.0f of it"
            )
    return None


def _known_to_nvcc(case: Case, found: Toolkit) -> frozenset[str]:
    """The numbers of the architectures that nvcc compiles for, such as 121; empty where it does not
    say.
    """
    done = case.ask([found.nvcc, "--list-gpu-arch"])
    return (
        frozenset(re.findall(r"^compute_(\d+)[af]?$", done.stdout, re.MULTILINE))
        if done and done.returncode == 0
        else frozenset()
    )


def _unknown_to_nvcc(
    entries: tuple[Entry, ...], known: frozenset[str], found: Toolkit
) -> str | None:
    unknown = [
        entry.text for entry in entries if known and entry.number.replace(".", "") not in known
    ]
    return f"nvcc {found.version} does not know {' and '.join(unknown)}" if unknown else None


def residents(case: Case) -> Iterator[Row]:
    """Check what already holds the GPU, or the memory that a Spark shares with it."""
    on_gpu: dict[int, str] = {}
    if case.host().gpus and (
        program := shutil.which(
            "nvidia-smi", path=case.settings.child_environment("plain").get("PATH", "")
        )
    ):
        done = case.ask(
            [program, "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"]
        )
        lines = done.stdout.splitlines() if done and done.returncode == 0 else []
        words = [[word.strip() for word in line.split(",")] for line in lines]
        on_gpu = {int(word[0]): word[1] for word in words if len(word) == 3 and word[0].isdigit()}
    serving = {
        one.number: " ".join(one.words)[:60].strip()
        for one in case.programs()
        if is_vllm(one.words)
    }
    found = on_gpu | serving
    why = "it holds memory that a build, a smoke or a server needs" + (
        "; on a Spark GPU and CPU share it" if case.device == "cuda" else ""
    )
    if not found:
        yield Row(
            "ok", "residents", "no vLLM" + (", nothing on the GPU" if case.host().gpus else ""), why
        )
        return
    shown = ", ".join(f"{number} ({name})" for number, name in sorted(found.items())[:4]) + (
        f" and {len(found) - 4} more" if len(found) > 4 else ""
    )
    numbers = " ".join(str(number) for number in sorted(serving or found))
    yield Row(
        "warn", "residents", shown, why, f"kill {numbers}" if serving else f"ps -fp '{numbers}'"
    )


def is_vllm(words: tuple[str, ...]) -> bool:
    """Tell a vLLM by its command line, or by the name that its engine gives itself
    (VLLM::EngineCore); not a git that looks at vendor/vllm.
    """
    names = [word.rpartition("/")[2] for word in words[:4]]
    if not names:
        return False
    is_script = "vllm" in (names[:1] if not names[0].startswith("python") else names[1:2])
    return (
        is_script
        or words[0].startswith("VLLM::")
        or "EngineCore" in words[0]
        or any(word.startswith("vllm.entrypoints") for word in words[1:4])
    )
