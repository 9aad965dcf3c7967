"""The table of every variable that the workspace gives to a child process, or keeps from it: name,
value, source, phases and the reason.

Settings.child_environment composes an environment from it and is the only function that does;
docs/settings-reference.md shows the table. What a child inherits of the shell and of .env is
decided by families of names in core/settings.py.
"""

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from workspace.core.paths import Layout, cache_home, here

# plain: no settings; build: the settings of a build, no secrets; run: those of a running vLLM.
Base = Literal["plain", "build", "run"]
# fmt: off
Phase = Literal[
    "plain", "git", "inv", "build", "install", "configure", "compile", "triton", "by-hand",
    "run", "verify", "first-token", "report", "shell", "fetch", "serve", "smoke", "smoke-serve",
    "upstream", "bench",
]
# fmt: on
# What a child of each phase inherits, and the programs of the phase.
PHASES: Mapping[Phase, tuple[Base, str]] = {
    "plain": ("plain", "uv, nvidia-smi and other programs that build and run nothing"),
    "git": ("plain", "git that contacts a remote"),
    "inv": ("plain", "a verb that `nox -s perf` or `nox -s spark` measures"),
    "build": ("build", "programs asked as a compiler would find them, such as `nvcc --version`"),
    "install": ("build", "uv with setup.py of vLLM"),
    "configure": ("build", "CMake"),
    "compile": ("build", "ninja and every compiler below it, and `cmake --install`"),
    "triton": ("build", "setup.py of Triton"),
    "by-hand": ("build", "the shell script that `nox -s perf` compares a bootstrap with"),
    "run": ("run", "checks that import torch, compile a kernel or make a small model"),
    "verify": ("run", "the import of the installed vLLM after an install"),
    "first-token": ("run", "the first token, with which `inv bootstrap` ends"),
    "report": ("run", "vLLM's collect_env in `inv report`, without secrets"),
    "shell": ("run", "`inv run`, `inv shell`, `inv env.export`, a command of `nox -s bisect`"),
    "fetch": ("run", "`inv serve.fetch`"),
    "serve": ("run", "`inv serve`, and what `inv serve --dry-run` prints"),
    "smoke": ("run", "the probes of `nox -s smoke`"),
    "smoke-serve": ("run", "the server of `nox -s smoke`"),
    "upstream": ("run", "pytest in `nox -s upstream`"),
    "bench": ("run", "`vllm bench` and the server in `nox -s bench`, ab and bisect"),
}

# What `inv run`, `inv shell` and `inv env.export` gave: NAME=DIGEST, with blanks between them.
EXPORTED = "WORKSPACE_EXPORTED"


class Special(Enum):
    """The value of a row without a text: the room that starts the child passes it (GIVEN) or
    removes the variable (DROPPED); REMOVED is always removed.
    """

    GIVEN = "given"
    DROPPED = "dropped"
    REMOVED = "removed"


GIVEN, DROPPED, REMOVED = Special.GIVEN, Special.DROPPED, Special.REMOVED
# constant: in this table; setting, machine, clone: computed from them; verb: from the arguments and
# the state of the running verb.
Source = Literal["constant", "setting", "machine", "clone", "verb"]


@dataclass(frozen=True)
class Child:
    """The facts that a value is computed from: the variables so far, the toolkit, the clone."""

    environment: Mapping[str, str]
    cuda_home: Path | None
    layout: Layout | None

    @property
    def clone(self) -> Layout:
        """The clone. Raises ValueError where a caller did not name it."""
        if self.layout is None:
            raise ValueError("a child of this phase needs the layout of the clone")
        return self.layout

    def first(self, name: str, folder: Path) -> str:
        """Return a list of folders with this folder first, once, and without empty entries."""
        others = self.environment.get(name, "").split(os.pathsep)
        kept = [entry for entry in others if entry and entry != str(folder)]
        return os.pathsep.join([str(folder), *kept])


@dataclass(frozen=True)
class Variable:
    """A row: variables that the children of some phases get, in the order of the table.

    `names` are names and patterns with blanks between them. With `is_default` a value of the user
    or of a recipe goes before this one.
    """

    names: str
    value: str | Callable[[Child], str | None] | Special
    source: Source
    phases: tuple[Phase, ...]
    why: str
    is_default: bool = False

    def has(self, name: str) -> bool:
        """Return whether the row is about this name."""
        return any(fnmatchcase(name, pattern) for pattern in self.names.split())


# The largest compiler process seen in a build of vLLM for a GB10 (scaled_mm_sm120_fp8, qutlass
# gemm), GiB, and the share of all memory that compilers may have beside a running model's.
LARGEST_COMPILER_GIB, COMPILERS_SHARE = 9.5, 0.75


def fitting_jobs(cores: int, memory_gib: float) -> int:
    """Return how many compilers of the largest size fit into memory at once.

    FlashInfer gets this number at run time; otherwise it starts one compiler for each core
    (flashinfer-ai/flashinfer#3634).
    """
    return max(1, min(cores, int(memory_gib * COMPILERS_SHARE / LARGEST_COMPILER_GIB)))


def _jobs_at_run_time(_: Child) -> str:
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return str(fitting_jobs(len(os.sched_getaffinity(0)), memory_gib))


def _toolkit_first(name: str, below: str) -> Callable[[Child], str | None]:
    def value(child: Child) -> str | None:
        if child.cuda_home is None:
            return child.environment.get(name)
        return child.first(name, child.cuda_home / below)

    return value


def _uv_cache(child: Child) -> str | None:
    """Return a cache for uv where its usual one cannot be written: uv stops there."""
    try:
        place = cache_home(child.environment)
    except RuntimeError:
        return None
    return str(place / "uv") if place.is_relative_to(here().root) else None


def _of_base(*bases: Base) -> tuple[Phase, ...]:
    return tuple(phase for phase, (base, _) in PHASES.items() if base in bases)


_BUILT: tuple[Phase, ...] = (
    *("first-token", "shell", "fetch", "serve", "smoke", "smoke-serve", "upstream", "bench"),
)
_COMPILING: tuple[Phase, ...] = ("compile", "triton")
_SETUP: tuple[Phase, ...] = ("install", "by-hand")
_SMOKES: tuple[Phase, ...] = ("smoke", "smoke-serve")
_SERVERS: tuple[Phase, ...] = ("serve", "smoke-serve", "bench")

# Settings that a child of every kind gets; core/process.py and the probes read this one.
TO_ALL = ("TIME_LIMIT_FACTOR",)

# fmt: off
VARIABLES: tuple[Variable, ...] = (
    Variable("TIME_LIMIT_FACTOR", lambda child: child.environment.get("TIME_LIMIT_FACTOR"),
             "setting", tuple(PHASES),
             "the time limit of a program is multiplied by it: the machine is slower than usual"),
    Variable("PATH", _toolkit_first("PATH", "bin"), "setting", _of_base("build", "run"),
             "CUDA_HOME/bin first: its nvcc, not another toolkit's"),
    Variable("LD_LIBRARY_PATH", _toolkit_first("LD_LIBRARY_PATH", "lib64"), "setting",
             _of_base("build", "run"), "CUDA_HOME/lib64 first: the libraries of its nvcc"),
    Variable("PATH", lambda child: child.first("PATH", child.clone.environment / "bin"), "clone",
             (*_COMPILING, "install", "configure", *_BUILT),
             ".vllm/bin first: its cmake and ninja, with which FlashInfer compiles too"),
    Variable("VIRTUAL_ENV", lambda child: str(child.clone.environment), "clone",
             (*_BUILT, "report"), "uv and pip work on .vllm, not on what the shell has activated"),
    Variable("PYTHONDONTWRITEBYTECODE", REMOVED, "constant", (*_BUILT, "verify"),
             "containers set it, and each process then compiles thousands of modules again"),
    Variable("PYTHONPYCACHEPREFIX", lambda child: str(child.clone.bytecode), "clone",
             (*_BUILT, "verify"), "bytecode is inside .vllm and vanishes with it", is_default=True),
    Variable("MAX_JOBS", _jobs_at_run_time, "machine", _of_base("run"),
             "FlashInfer would start a compiler for each core (flashinfer-ai/flashinfer#3634)",
             is_default=True),
    Variable("TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR VLLM_CACHE_ROOT FLASHINFER_WORKSPACE_BASE"
             " CUDA_CACHE_PATH CUDA_CACHE_MAXSIZE", GIVEN, "machine", _BUILT,
             "kernels of each stack have folders of their own (vllm-project/vllm#41871)",
             is_default=True),
    Variable("TIKTOKEN_ENCODINGS_BASE", GIVEN, "clone", _BUILT,
             "a folder with all vocabularies of gpt-oss, the user's first, else none"
             " (vllm-project/vllm#22525)"),
    Variable("VLLM_*", DROPPED, "machine", _BUILT,
             "names of former releases that the tree does not read (machine/removed.toml)"),
    Variable("HF_HUB_DISABLE_PROGRESS_BARS", "1", "constant", ("fetch",),
             "the workspace shows its own progress"),
    Variable("TRITON_CACHE_DIR", GIVEN, "verb", ("run",),
             "the test kernel of fix-triton is compiled, never read from a cache"),
    Variable("PYTHONPATH", GIVEN, "verb", ("run",),
             "the test kernel is compiled with a built Triton before that is installed"),
    Variable("HF_HUB_OFFLINE", GIVEN, "verb", ("run",), "a small model is made without the hub"),
    Variable("VLLM_NO_USAGE_STATS", "1", "constant", ("serve",),
             "nothing is sent to vLLM's statistics", is_default=True),
    Variable("VLLM_NO_USAGE_STATS", "1", "constant",
             ("by-hand", "verify", "first-token", *_SMOKES, "upstream", "bench"),
             "a test or a measurement sends nothing"),
    Variable("HF_HUB_OFFLINE", "1", "constant", ("first-token", *_SMOKES),
             "every model of the smoke is on disk"),
    Variable("VLLM_CPU_KVCACHE_SPACE", "1", "constant", ("first-token", *_SMOKES, "upstream"),
             "little memory"),
    Variable("PYTHONFAULTHANDLER", "1", "constant", (*_SMOKES, "serve"),
             "a hung process prints its stacks"),
    Variable("TORCHDYNAMO_DISABLE", "1", "constant", _SMOKES, "nothing is compiled"),
    Variable("TORCHDYNAMO_DISABLE", GIVEN, "verb", ("smoke",), "0 for consistency.compiled"),
    Variable("VLLM_ENABLE_V1_MULTIPROCESSING", "0", "constant", ("first-token", "smoke"),
             "a probe is one process"),
    Variable("OMP_WAIT_POLICY", "PASSIVE", "constant", ("smoke",),
             "threads that spin keep a neighbour's from its core: with two engines on two busy"
             " cores, 320 tokens took 22 to 34 s, and below 1 s with this"),
    Variable("VLLM_ENABLE_V1_MULTIPROCESSING", "1", "constant", ("smoke-serve",),
             "the engine of a server is a process of its own"),
    Variable("WORKSPACE_SMOKE_LIMIT_S", GIVEN, "verb", ("smoke",),
             "a probe ends before its caller's limit and prints its stacks"),
    Variable("CUBLAS_WORKSPACE_CONFIG", ":4096:8", "constant", ("smoke-serve",),
             "sums in a fixed order, as in probes/parity.py"),
    Variable("NVIDIA_TF32_OVERRIDE", "0", "constant", ("smoke-serve",),
             "float32 products in float32, as in probes/parity.py"),
    Variable("TRITON_F32_DEFAULT", "ieee", "constant", ("smoke-serve",),
             "float32 products in float32, as in probes/parity.py"),
    Variable("VLLM_API_KEY", REMOVED, "constant", ("smoke-serve",),
             "the smoke has no key to send; the server listens on localhost only"),
    Variable("VLLM_CPU_CI_ENV", "1", "constant", ("upstream",),
             "as upstream's CPU job (.buildkite/scripts/hardware_ci/run-cpu-test.sh)"),
    Variable("VLLM_WORKER_MULTIPROC_METHOD", "spawn", "constant", ("upstream",),
             "as upstream's CPU job"),
    Variable("HF_HUB_OFFLINE HF_DATASETS_OFFLINE TRANSFORMERS_OFFLINE", GIVEN, "verb",
             ("upstream",), "1 without --online: no test asks the hub"),
    Variable("PYTHONPATH", GIVEN, "verb", ("upstream",),
             "the test libraries, and the pin's tree before the editable install"),
    Variable("VLLM_LOGGING_LEVEL", "INFO", "constant", ("bench",), "the log names the backends"),
    Variable("VLLM_CONFIGURE_LOGGING", "1", "constant", ("bench",), "the log names the backends"),
    Variable("HF_HUB_OFFLINE TORCHDYNAMO_DISABLE VLLM_CPU_KVCACHE_SPACE"
             " VLLM_ENABLE_V1_MULTIPROCESSING", GIVEN, "verb", ("bench",),
             "the tiny model starts in seconds, in one process where there is no server"),
    Variable("OPENAI_API_KEY", GIVEN, "verb", ("bench",),
             "the key of the measured server, for its client"),
    Variable("VLLM_CPU_KVCACHE_SPACE", GIVEN, "verb", ("serve",),
             "what --memory leaves for the cache where there is no GPU"),
    Variable("TMPDIR WORKSPACE_SERVER", GIVEN, "verb", _SERVERS,
             "a folder of each server, and the tag by which its processes are found"),
    Variable("VLLM_TARGET_DEVICE", GIVEN, "verb", (*_SETUP, "configure"),
             "the device of the plan; setup.py would guess"),
    Variable("VLLM_VERSION_OVERRIDE VLLM_USE_PRECOMPILED VLLM_PRECOMPILED_WHEEL_LOCATION CARGO",
             GIVEN, "verb", _SETUP,
             "the pin's version, and a wheel with kernels: setup.py compiles none"),
    Variable("UV PYTHON ARCHIVE TAG PROBE PATH", GIVEN, "verb", ("by-hand",),
             "the arguments of the script"),
    Variable("MAX_JOBS NVCC_THREADS CMAKE_BUILD_PARALLEL_LEVEL RUSTC_WRAPPER CMAKE_*_LAUNCHER",
             GIVEN, "verb", _COMPILING,
             "nested builds keep to the bound, and each compiler requests a job token"),
    Variable("CARGO_BUILD_JOBS", GIVEN, "verb", (*_COMPILING, "install"), "the bound for cargo"),
    Variable("CCACHE_BASEDIR CCACHE_NOHASHDIR CCACHE_DEPEND CCACHE_PREFIX CCACHE_PREFIX_CPP",
             GIVEN, "clone", (*_COMPILING, "build"),
             "objects of another clone are hits; a miss requests a job token"),
    Variable("CCACHE_NODEPEND", REMOVED, "constant", ("compile",),
             "without depend mode ccache returns objects from before an edit"),
    Variable("DESTDIR", REMOVED, "constant", ("compile",), "CMake would install below it"),
    Variable("CMAKE_INSTALL_MODE", REMOVED, "constant", ("compile",),
             "CMake would install links to the build directory"),
    Variable("NINJA_STATUS", "[%f/%t] ", "constant", _COMPILING, "the progress is read from it"),
    Variable("*_SRC_DIR *_ROOT_DIR FETCHCONTENT_*", GIVEN, "verb", ("configure",),
             "sources of other projects, fetched before"),
    Variable("TRITON_PTXAS_PATH TRITON_PTXAS_BLACKWELL_PATH", DROPPED, "verb", ("triton",),
             "unless TRITON_OFFLINE_BUILD is on: the wheel would lack an assembler"),
    Variable("TRITON_BUILD_DIR TRITON_HOME TRITON_PARALLEL_LINK_JOBS TRITON_APPEND_CMAKE_ARGS"
             " DIST_EXTRA_CONFIG", GIVEN, "verb", ("triton",),
             "build directory, downloads, bound for links, compiler launchers"),
    Variable("PYTHONPATH TRITON_DOWNLOADS_MIRROR", GIVEN, "verb", ("triton",),
             "its script downloads from the mirror"),
    Variable("TRITON_BUILD_WITH_CCACHE", "OFF", "constant", ("triton",),
             "it would replace the launcher, and compile without a job token"),
    Variable("PYTHONDONTWRITEBYTECODE", "1", "constant", ("triton",),
             "the checkout stays as it is"),
    Variable("PYTHONUNBUFFERED", "1", "constant", ("triton",), "the progress is shown at once"),
    Variable("UV_HTTP_TIMEOUT UV_HTTP_CONNECT_TIMEOUT UV_HTTP_RETRIES", GIVEN, "verb",
             ("plain",), "short where uv may have to do without a network"),
    Variable("UV_CACHE_DIR", _uv_cache, "machine", ("plain", "build", "install", "shell"),
             "a cache below .workspace where the home folder is read-only", is_default=True),
    Variable("UV_INDEX_*", GIVEN, "setting", ("plain", "install"),
             "user and password of an index, which no argument and no log may show"),
    Variable("GIT_* LC_ALL", GIVEN, "constant", ("git", "build"),
             "git asks nothing, speaks English and writes the same for every user"),
    Variable("PATH PS1 ZDOTDIR VLLM_WORKSPACE_ZDOTDIR", GIVEN, "verb", ("shell",),
             "inv shell has inv and nox on PATH, and a prompt that shows it"),
    Variable(EXPORTED, GIVEN, "verb", ("shell",),
             "names the values that the workspace gave: a verb in that shell does not take them for"
             " the user's own"),
    Variable("PATH", GIVEN, "clone", ("report",), "the tools of the workspace, then .vllm/bin"),
    Variable("*", GIVEN, "setting", ("inv",), "the settings of the shell and of the command line"),
)
# fmt: on


def time_limit_factor(environment: Mapping[str, str]) -> int:
    """Return the setting TIME_LIMIT_FACTOR, which is among the variables of every child."""
    return int(environment.get("TIME_LIMIT_FACTOR") or 1)


def with_given(
    environment: Mapping[str, str], phase: Phase, given: Mapping[str, str | None]
) -> dict[str, str]:
    """Return the environment with the variables that the starting room computes; None removes one.

    Raises ValueError for a variable that no row of the phase lets it pass.
    """
    result = dict(environment)
    for name, text in given.items():
        kinds = (GIVEN,) if text is not None else (GIVEN, DROPPED)
        if not any(
            phase in row.phases and row.value in kinds and row.has(name) for row in VARIABLES
        ):
            raise ValueError(f"{name} is in no row of VARIABLES for a child of {phase}")
        if text is None:
            result.pop(name, None)
        else:
            result[name] = text
    return result


def with_rows(
    environment: Mapping[str, str], phase: Phase, *, cuda_home: Path | None, layout: Layout | None
) -> dict[str, str]:
    """Return the environment with every row of the phase whose value the table itself decides.

    Raises ValueError where a row needs the layout and there is none.
    """
    result = dict(environment)
    for row in VARIABLES:
        value = row.value
        if phase not in row.phases or (row.is_default and row.names in result):
            continue
        if callable(value):
            text = value(Child(result, cuda_home, layout))
            value = REMOVED if text is None else text
        if isinstance(value, str):
            result[row.names] = value
        elif value is REMOVED:
            result.pop(row.names, None)
    return result


def exported(
    environment: Mapping[str, str], outer: Mapping[str, str], *, apart: Collection[str]
) -> str:
    """Return the value of EXPORTED: what `environment` has and `outer` lacks, without the names in
    `apart`.
    """
    names = sorted(environment.keys() - outer.keys() - {EXPORTED, *apart})
    return " ".join(f"{name}={_digest(environment[name])}" for name in names)


def without_exported(shell: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a shell without those that the workspace gave it. A value that was
    changed there since is the user's.
    """
    given = dict(entry.partition("=")[::2] for entry in shell.get(EXPORTED, "").split())
    return {
        name: text
        for name, text in shell.items()
        if name != EXPORTED and not (name in given and given[name] == _digest(text))
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]
