"""Kernels that are compiled while vLLM runs: the cache folders of Triton, FlashInfer and torch
compile, and the stack that wrote each of them.

Each stack has folders of its own below .workspace/jit, so that nothing of another tree, torch,
triton or architecture is ever loaded (vllm-project/vllm#41871). The caches at the usual places
belong to the user, and no run of the workspace reads or writes them.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from workspace.core import records
from workspace.core.errors import counted
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine.machine import Machine

NONE = "none"
KEY_DIGITS = 12
RECORD = "stack.json"
# The driver's own cache of compiled PTX, below .workspace/jit. The driver keys each entry by the
# code, the GPU and its own version, so one folder serves every stack.
DRIVER_CACHE = "driver"
# The largest size that the driver accepts, 4 GiB (CUDA C++ Programming Guide, CUDA Environment
# Variables). Its default is 1 GiB, on embedded systems 256 MiB, and it evicts what is older.
DRIVER_CACHE_BYTES = 4 << 30


@dataclass(frozen=True)
class Stack:
    """The software and GPU that compiled kernels belong to.

    `tree` identifies vendor/vllm, by its tree OID for example; the others are `none` where missing.
    """

    tree: str
    torch: str
    triton: str
    flashinfer: str
    architecture: str

    @property
    def key(self) -> str:
        """Return the name of the folder of Triton's kernels and torch compile's graphs."""
        return _digest(self.tree, self.torch, self.triton, self.architecture)

    @property
    def library_key(self) -> str:
        """Return the name of FlashInfer's folder.

        Its libraries take half an hour to compile and contain nothing of the tree or of Triton.
        """
        return _digest("flashinfer", self.flashinfer, self.torch, self.architecture)


def observe(machine: Machine, *, tree: str) -> Stack:
    """Return the stack that `.vllm` runs as.

    The driver is asked for the GPUs only where torch is built for CUDA. Starts no Python.
    """
    build, there = machine.torch(), machine.packages()
    capabilities = machine.capabilities if build and build.cuda else ()
    return Stack(
        tree=tree,
        torch=f"{build.version} CUDA {build.cuda or NONE}" if build else NONE,
        triton=there.get("triton", NONE),
        flashinfer=there.get("flashinfer-python", NONE),
        architecture=" ".join(sorted(set(capabilities))) or NONE,
    )


def variables(layout: Layout, settings: Settings, stack: Stack) -> Mapping[str, str]:
    """Return the variables with which a vLLM keeps its kernels in this stack's folders only.

    A variable that the user sets, in the shell or in .env, is left out. Changes nothing.
    """
    own, library = layout.jit / stack.key, layout.jit / stack.library_key
    keyed = {
        "TRITON_CACHE_DIR": own / "triton",
        "TORCHINDUCTOR_CACHE_DIR": own / "inductor",
        "VLLM_CACHE_ROOT": own / "vllm",
        "FLASHINFER_WORKSPACE_BASE": library,
    }
    found = {name: str(place) for name, place in keyed.items()}
    if stack.architecture != NONE:
        found["CUDA_CACHE_PATH"] = str(layout.jit / DRIVER_CACHE)
        found["CUDA_CACHE_MAXSIZE"] = str(DRIVER_CACHE_BYTES)
    # Triton uses its home only for what has no folder of its own, but a user who sets it means all
    # of Triton's files.
    if _set(settings, "TRITON_HOME"):
        del found["TRITON_CACHE_DIR"]
    return {name: text for name, text in found.items() if not _set(settings, name)}


def record(layout: Layout, stack: Stack) -> None:
    """Write a stack's description beside its folders, once, for a person who reads them; and make
    the driver's folder, which it may only fill.
    """
    if stack.architecture != NONE:
        (layout.jit / DRIVER_CACHE).mkdir(parents=True, exist_ok=True)
    for key in (stack.key, stack.library_key):
        path = layout.jit / key / RECORD
        if not path.exists():
            records.write(path, stack)


def written_since(environment: Mapping[str, str], start: float) -> str:
    """Return what a run with this environment has compiled since a time, such as `Triton 3
    kernels, the driver 12 MB`; FlashInfer's libraries by name. Empty if nothing is finished yet.
    """

    def fresh(variable: str, pattern: str) -> list[Path]:
        place = environment.get(variable)
        found = Path(place).glob(pattern) if place else ()
        with contextlib.suppress(OSError):
            return [path for path in found if path.is_file() and path.stat().st_mtime >= start]
        return []

    # Triton has a folder for each kernel, with several files.
    kernels = len({path.parent for path in fresh("TRITON_CACHE_DIR", "*/*.json")})
    libraries = fresh("FLASHINFER_WORKSPACE_BASE", ".cache/flashinfer/*/*/cached_ops/*/build.ninja")
    names = ", ".join(sorted(path.parent.name for path in libraries)[:3])
    size = sum(path.stat().st_size for path in fresh("CUDA_CACHE_PATH", "*/*/*"))
    parts = (
        f"Triton {counted(kernels, 'kernel')}" if kernels else "",
        f"FlashInfer {names}" if names else "",
        f"the driver {size / 1e6:.1f} MB" if size else "",
    )
    return ", ".join(part for part in parts if part)


def _set(settings: Settings, name: str) -> str | None:
    value = settings.passed.get(name)
    return settings.shell.get(name) or (value.text if value else None)


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:KEY_DIGITS]
