"""The doctor's checks of the build tools and of CUDA: Python and its headers, git, uv, compiler,
CMake, ninja, driver, toolkit, architectures, and the programs that hold the GPU.
"""

import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from workspace.core import hints, process
from workspace.core.console import Row, State
from workspace.core.errors import WorkspaceError
from workspace.core.process import Absent, Broken, NoAnswer, Slow, There
from workspace.machine import arch, interpreter, requirements
from workspace.machine.arch import OLDEST_CAPABILITY, key
from workspace.machine.machine import Case, unanswered, verdict
from workspace.machine.torch import CUDA_MAJOR

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

# vLLM's requirement (pyproject.toml), and Triton's upper bound: both build in one environment.
CMAKE_FROM, CMAKE_BELOW = "3.26.1", "4"
# The oldest driver that supports CUDA 13 (CUDA Toolkit Release Notes, table of driver versions).
DRIVER = "580"
NOT_NEEDED = "not needed: the device is cpu"
# "GCC >= 11.3 is required to build vLLM", "X86 backend requires gcc/g++ >= 12.3".
_COMPILER_REQUIREMENT = re.compile(r"(?:GCC|gcc/g\+\+|g\+\+)\s*>=\s*(\d+(?:\.\d+)*)")


def git(case: Case) -> Iterator[Row]:
    """Check that git runs."""
    answer, why = case.first_line(["git", "version"]), "the tree and its patches are git's"
    missing = Row(State.FAIL, "git", "missing", why, hints.text("machine.apt_git"))
    yield (
        Row(State.OK, "git", answer.value.removeprefix("git version "), why)
        if isinstance(answer, There)
        else unanswered(missing, answer, look=hints.text("machine.git_version"))
    )


def git_identity(case: Case) -> Iterator[Row]:
    """Check that git has the name and the address that a commit needs; neither is shown."""
    why = "a patch is a commit, and git makes none without a name and an address"
    hint = hints.text("machine.git_identity")
    lacking = []
    for name, variable in (("user.name", "GIT_AUTHOR_NAME"), ("user.email", "GIT_AUTHOR_EMAIL")):
        answer = case.ask(["git", "config", "--get", name])
        if isinstance(answer, Absent):
            return
        if not isinstance(answer, There):
            row = Row(State.WARN, "git identity", "unknown", why, hint)
            yield unanswered(row, answer, look=hints.text("machine.git_version"))
            return
        if not (answer.value.stdout.strip() or case.settings.shell.get(variable)):
            lacking.append(name)
    if lacking:
        text = f"git has no {' and no '.join(lacking)}"
        yield Row(State.WARN, "git identity", text, why, hint)
    else:
        yield Row(State.OK, "git identity", "name and address are set", why)


def uv(case: Case) -> Iterator[Row]:
    """Check that uv runs."""
    why = "it makes .vllm and installs the packages in it"
    hint = hints.text("machine.renew_tools")
    missing = Row(State.FAIL, "uv", "missing", why, hint)
    try:
        program = interpreter.uv(case.layout)
    except WorkspaceError:
        yield missing
        return
    answer = case.first_line([program, "--version"])
    yield (
        Row(State.OK, "uv", answer.value.removeprefix("uv "), why)
        if isinstance(answer, There)
        else unanswered(missing, answer, look=hint)
    )


def headers(case: Case) -> Iterator[Row]:
    """Check Python.h of the interpreter in `.vllm`.

    Before `.vllm` exists, check the interpreter that bootstrap will choose; this fetches nothing.
    """
    if interpreter.is_finished(case.layout) and (facts := case.python()):
        yield _headers_row(case, facts.version, facts.headers, base=facts.base, is_certain=True)
        return
    try:
        choice = interpreter.foresee(case.layout, case.settings, supported=_supported(case))
    except NoAnswer:
        raise
    except WorkspaceError as exc:
        why = "the Python of .vllm is unknown without it"
        yield Row(State.FAIL, "headers", exc.message, why, exc.hint)
        return
    if choice is None:
        hint = hints.text(
            "machine.uv_python", uv=case.uv, version=case.settings.text("PYTHON_VERSION")
        )
        seen = "no Python for .vllm is installed yet"
        yield Row(State.WARN, "headers", seen, "uv fetches one, with its headers", hint)
        return
    yield _headers_row(
        case,
        choice.version,
        choice.headers,
        base=choice.path.parent.parent,
        # Otherwise bootstrap may still fetch another Python, or a torch wheel may decide.
        is_certain=not choice.reason,
    )


def _headers_row(
    case: Case, version: str, folder: Path | None, *, base: Path, is_certain: bool
) -> Row:
    why = "compilers, FlashInfer's and Triton's at run time too, include Python.h"
    if folder:
        return Row(State.OK, "headers", f"Python.h of {version}", f"in {folder}; {why}")
    minor = ".".join(version.split(".")[:2])
    is_needed = (case.is_native or case.device == "cuda") and is_certain
    hint = hints.text("machine.apt_headers", minor=minor)
    if base != Path("/usr"):
        # Only the system's Python has a -dev package; uv's Pythons contain their headers.
        hint = hints.text("machine.uv_python", uv=case.uv, version=minor)
        if case.python():
            hint = hints.text("machine.uv_python_anew", uv=case.uv, version=minor)
    return Row(
        State.FAIL if is_needed else State.WARN, "headers", f"no Python.h for {version}", why, hint
    )


def compiler(case: Case) -> Iterator[Row]:
    """Check g++, or the compiler in CXX, against the version that the pinned tree requires."""
    argv, answer = case.machine.compiler()
    required = required_compiler(case.layout.vllm, device=case.device)
    why = f"the tree needs {required} or newer" if required else "it compiles the kernels"
    if not isinstance(answer, There):
        hint = hints.text("machine.apt_gxx")
        missing = Row(case.missing_state, "compiler", f"{argv[0]} is missing", why, hint)
        yield unanswered(missing, answer, look=hint)
        return
    found = answer.value
    if required and key(found) < key(required):
        hint = compiler_hint(case, required)
        yield Row(case.missing_state, "compiler", f"g++ {found}", why, hint)
    else:
        yield Row(State.OK, "compiler", f"g++ {found}", why)


def compiler_hint(case: Case, required: str) -> str:
    """Return how to get a g++ of this version on the distribution that is running."""
    major = key(required)[0] + (1 if "." in required else 0)
    if _is_not_packaged(case, f"g++-{major}", beside="g++"):
        return hints.text("machine.other_gxx", major=major)
    return hints.text("machine.apt_gxx_major", major=major)


def _is_not_packaged(case: Case, package: str, *, beside: str) -> bool:
    """Return whether apt has the package `beside` and not this one.

    Without apt, or with empty lists of packages, nothing is known.
    """
    answer = case.ask(["apt-cache", "policy", beside, package], extra={"LC_ALL": "C"})
    printed = answer.value.stdout if isinstance(answer, There) else ""
    found = re.finditer(r"^(\S+):\n.*\n +Candidate: (.+)$", printed, re.MULTILINE)
    offered = {row[1] for row in found if row[2] != "(none)"}
    return beside in offered and package not in offered


def cmake(case: Case) -> Iterator[Row]:
    """Check the CMake that a build uses: the one in `.vllm`, else the one on PATH."""
    if case.is_environment_due:
        yield Row(State.OK, "cmake", "not in .vllm yet", "bootstrap installs a suitable one there")
        return
    found = _built_or_on_path(case, "cmake")
    line = case.first_line([found or "cmake", "--version"])
    version = re.search(r"version (\d+(?:\.\d+)+)", line.value if isinstance(line, There) else "")
    why = f"vLLM needs {CMAKE_FROM} or newer, Triton in the same environment below {CMAKE_BELOW}"
    hint = hints.text("machine.pip_cmake", uv=case.uv, least=CMAKE_FROM, below=CMAKE_BELOW)
    own = case.layout.relative(Path(found)) if found else ""
    if version is None:
        seen = f"{own} prints no version" if found else "missing"
        row = Row(case.missing_state, "cmake", seen, why, hint)
        yield row if isinstance(line, There) else unanswered(row, line, look=hint)
    elif key(version[1]) < key(CMAKE_FROM):
        yield Row(case.missing_state, "cmake", f"{version[1]}, {own}", why, hint)
    else:
        row = Row(State.WARN, "cmake", f"{version[1]}, {own}", why, hint)
        yield verdict(key(version[1]) < key(CMAKE_BELOW), row)


def ninja(case: Case) -> Iterator[Row]:
    """Check the ninja that a build uses: the one in `.vllm`, else the one on PATH."""
    if case.is_environment_due:
        yield Row(State.OK, "ninja", "not in .vllm yet", "bootstrap installs one there")
        return
    found = _built_or_on_path(case, "ninja")
    answer = case.first_line([found or "ninja", "--version"])
    why = "it runs the compilers, FlashInfer's at run time too"
    if found and isinstance(answer, There):
        yield Row(State.OK, "ninja", f"{answer.value}, {case.layout.relative(Path(found))}", why)
    elif not isinstance(answer, There):
        hint = hints.text("machine.pip_ninja", uv=case.uv)
        missing = Row(case.missing_state, "ninja", "missing", why, hint)
        yield unanswered(missing, answer, look=hint)


def patch(case: Case) -> Iterator[Row]:
    """Check for patch(1): the tree's CMake may patch a header of torch for CUDA."""
    why = "the tree's CMakeLists.txt may patch a header of torch with it"
    if case.device == "cpu":
        yield Row(State.SKIPPED, "patch", NOT_NEEDED, why)
    elif case.which("patch"):
        yield Row(State.OK, "patch", "installed", why)
    else:
        yield Row(case.missing_state, "patch", "missing", why, hints.text("machine.apt_patch"))


def required_compiler(tree: Path, *, device: str) -> str | None:
    """Return the oldest g++ that the tree's CMake files accept for a device.

    It is read from the files' error messages; None where no message names a version.
    """
    files = [
        tree / "CMakeLists.txt",
        *([tree / "cmake" / "cpu_extension.cmake"] if device == "cpu" else []),
    ]
    found = [
        version
        for file in files
        if file.is_file()
        for version in _COMPILER_REQUIREMENT.findall(
            file.read_text(encoding="utf-8", errors="replace")
        )
    ]
    return max(found, key=key, default=None)


def _built_or_on_path(case: Case, name: str) -> str | None:
    own = case.layout.environment / "bin" / name
    return str(own) if os.access(own, os.X_OK) else case.which(name)


def _supported(case: Case) -> "SpecifierSet":
    """Return the Pythons that the tree supports, or those of recent releases without a tree."""
    from packaging.specifiers import SpecifierSet

    return (
        requirements.python_of(case.layout.vllm)
        if (case.layout.vllm / "pyproject.toml").is_file()
        else SpecifierSet(">=3.10,<3.15")
    )


def driver(case: Case) -> Iterator[Row]:
    """Check that the driver answers and shows a GPU that vLLM has kernels for."""
    if case.device == "cpu":
        yield Row(State.SKIPPED, "driver", NOT_NEEDED, "a CPU build needs no driver")
        return
    answer, gpus = case.machine.driver.gpus(), case.machine.gpus
    if not isinstance(answer, There):
        yield _no_gpu(case, answer)
        return
    cuda = case.machine.driver.cuda()
    seen = gpus[0].driver or "unknown version"
    yield Row(
        State.OK, "driver", seen + (f", supports CUDA {cuda}" if cuda else ""), "the driver answers"
    )
    counts = Counter((gpu.name, gpu.capability) for gpu in gpus)
    for (name, capability), count in counts.items():
        yield _gpu_row(f"{count} x {name}" if count > 1 else name, capability)


def _no_gpu(case: Case, answer: Absent | Broken | Slow) -> Row:
    if isinstance(answer, Slow):
        # A busy machine answers later: nothing is known to be wrong.
        seen = f"no answer in {answer.limit_s:g} s"
        return Row(
            State.WARN,
            "driver",
            seen,
            "a busy machine or a driver that hangs",
            hints.text("machine.nvidia_smi"),
        )
    # A user who sets the architectures builds for another machine.
    is_intended = bool(case.settings.text("TORCH_CUDA_ARCH_LIST"))
    why = (
        "the build runs on another machine; no smoke, no server here"
        if is_intended
        else "a CUDA build needs a GPU and its driver"
    )
    return Row(
        State.WARN if is_intended else State.FAIL,
        "driver",
        answer.message if isinstance(answer, Broken) else "no NVIDIA driver is installed",
        why,
        hints.text("machine.nvidia_smi_or_cpu"),
    )


def _gpu_row(name: str, capability: str | None) -> Row:
    why = f"vLLM has kernels for capability {OLDEST_CAPABILITY} and newer"
    seen = f"{name}, " + (f"capability {capability}" if capability else "unknown capability")
    if capability is None or not key(capability):
        why += "; a driver before 510 does not report it"
        return Row(
            State.WARN, "gpu", seen, why, hints.text("machine.upgrade_driver", release=DRIVER)
        )
    if key(capability) >= key(OLDEST_CAPABILITY):
        return Row(State.OK, "gpu", seen, why)
    return Row(State.FAIL, "gpu", seen, why, hints.text("machine.without_gpu"))


def toolkit(case: Case) -> Iterator[Row]:
    """Check for a CUDA toolkit of torch's major version."""
    if case.device == "cpu":
        yield Row(State.SKIPPED, "toolkit", NOT_NEEDED, "a CPU build needs no toolkit")
        return
    found = case.toolkit()
    seen = f"CUDA {found.version} in {found.home}" if found else ""
    why = (
        "it compiles the kernels"
        if case.is_native
        else "FlashInfer compiles kernels with it at run time"
    )
    package, wanted = f"cuda-toolkit-{CUDA_MAJOR}-0", f"/usr/local/cuda-{CUDA_MAJOR}.0"
    if found is None:
        home = case.settings.path("CUDA_HOME")
        seen = (
            f"CUDA_HOME={home} has no nvcc that runs"
            if home
            else "no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda"
        )
        hint = hints.text("machine.apt_toolkit", package=package, folder=wanted)
        missing = Row(case.missing_state, "toolkit", seen, why, hint)
        answer = case.machine.toolkit_answer()
        yield missing if isinstance(answer, There) else unanswered(missing, answer, look=hint)
    elif found.version.split(".")[0] != CUDA_MAJOR:
        hint = hints.text("machine.cuda_home_after", folder=wanted, package=package)
        why = f"torch is built for CUDA {CUDA_MAJOR}"
        yield Row(case.missing_state, "toolkit", seen, why, hint)
    else:
        yield Row(State.OK, "toolkit", seen, why)


def agreement(case: Case) -> Iterator[Row]:
    """Check that the driver supports the CUDA of torch and of the toolkit.

    A driver supports older CUDA versions, and newer ones of its own major version.
    """
    if case.device == "cpu" or not case.machine.gpus:
        return
    supported, build, found = case.machine.driver.cuda(), case.torch(), case.toolkit()
    wanted = {}
    if build and build.cuda:
        wanted["torch"] = build.cuda
    if found and found.version:
        wanted["the toolkit"] = found.version
    versions = ", ".join(f"{name} {cuda}" for name, cuda in wanted.items())
    seen = f"driver {supported or 'unknown'}, {versions}"
    if supported is None:
        why = "the driver does not report which CUDA it supports"
        yield Row(State.WARN, "cuda fit", seen, why, hints.text("machine.nvidia_smi"))
        return
    newer = [name for name, cuda in wanted.items() if key(cuda)[0] > key(supported)[0]]
    ahead = [name for name, cuda in wanted.items() if key(cuda)[:2] > key(supported)[:2]]
    if newer:
        # A bootstrap that has torch still to install replaces the present one.
        is_kept = not case.is_environment_due or case.settings.switch("USE_EXISTING_TORCH")
        state = State.FAIL if "torch" in newer and is_kept else case.missing_state
        why = f"code of {' and '.join(newer)} does not start on a driver of an older major version"
        yield Row(
            state, "cuda fit", seen, why, hints.text("machine.upgrade_driver", release=DRIVER)
        )
    elif ahead:
        why = f"{' and '.join(ahead)} is newer than the driver: its cubins run, its PTX does not"
        yield Row(
            State.WARN, "cuda fit", seen, why, hints.text("machine.upgrade_driver", release=DRIVER)
        )
    else:
        yield Row(State.OK, "cuda fit", seen, "a driver supports its own CUDA and older ones")


def archs(case: Case) -> Iterator[Row]:
    """Check TORCH_CUDA_ARCH_LIST against the GPUs, torch and nvcc."""
    if case.device == "cpu":
        yield Row(State.SKIPPED, "arch list", NOT_NEEDED, "a CPU build has no architectures")
        return
    text = case.settings.text("TORCH_CUDA_ARCH_LIST")
    capabilities = arch.known_capabilities(case.machine.capabilities)
    if capabilities:
        here = f"GPU {' and '.join(capabilities)}"
    else:
        here = "a GPU of unknown capability" if case.machine.gpus else "no GPU here"
    seen = f"{text or 'not set'}; {here}"
    fault = _arch_fault(case, arch.parse(text), capabilities)
    if fault is None:
        yield Row(State.OK, "arch list", seen, "kernels are compiled for these architectures only")
        return
    wanted = arch.suggest_list(sorted(set(case.machine.capabilities))) or "12.1a"
    hint = (
        hints.text("machine.export_archs", archs=wanted)
        if case.settings.source("TORCH_CUDA_ARCH_LIST") == "shell"
        else hints.text("machine.set_archs", archs=wanted)
    )
    yield Row(case.missing_state, "arch list", seen, fault, hint)


def _arch_fault(
    case: Case, entries: tuple[arch.Entry, ...], capabilities: tuple[str, ...]
) -> str | None:
    found = case.toolkit()
    fault = arch.fault_of(entries, capabilities)
    if fault or found is None:
        return fault
    listing = process.certain(
        process.output_of(case.ask([found.nvcc, "--list-gpu-arch"])), found.nvcc
    )
    unsupported = arch.unsupported(entries, arch.archs_of_nvcc(listing or ""))
    return (
        f"nvcc {found.version} does not support {' and '.join(unsupported)}"
        if unsupported
        else None
    )


def running_programs(case: Case) -> Iterator[Row]:
    """Check which programs hold the GPU, or the memory that a Spark shares with it."""
    serving = {
        program.pid: textwrap.shorten(" ".join(program.argv), 60, placeholder=" …")
        for program in case.programs()
        if is_vllm(program.argv)
    }
    has_gpu = case.device == "cuda" and bool(case.machine.gpus)
    residents = case.machine.driver.residents() if has_gpu else ()
    found = {resident.pid: resident.name for resident in residents} | serving
    why = "a running process holds memory that a build, a smoke or a server needs" + (
        "; on a Spark GPU and CPU share it" if case.device == "cuda" else ""
    )
    if not found:
        seen = "no vLLM is running" + (", nothing on the GPU" if has_gpu else "")
        yield Row(State.OK, "running", seen, why)
        return
    seen = ", ".join(f"{pid} ({name})" for pid, name in sorted(found.items())[:4])
    seen += f" and {len(found) - 4} more" if len(found) > 4 else ""
    pids = " ".join(str(pid) for pid in sorted(serving or found))
    yield Row(
        State.WARN,
        "running",
        seen,
        why,
        hints.text("machine.ps", pids=pids),
    )


def is_vllm(argv: tuple[str, ...]) -> bool:
    """Return whether a command line is a vLLM's, also by the process title VLLM::EngineCore.

    A git that reads vendor/vllm does not count.
    """
    names = [argument.rpartition("/")[2] for argument in argv[:4]]
    if not names:
        return False
    is_script = "vllm" in (names[:1] if not names[0].startswith("python") else names[1:2])
    return (
        is_script
        or argv[0].startswith("VLLM::")
        or "EngineCore" in argv[0]
        or any(argument.startswith("vllm.entrypoints") for argument in argv[1:4])
    )
