"""Kernels that are compiled while vLLM runs: the cache folders of Triton, FlashInfer and torch
compile, and the stack that wrote each of them.

Each stack has folders of its own below .workspace/jit, so that nothing of another tree, torch,
triton or architecture is ever loaded (vllm-project/vllm#41871). The caches at the usual places
belong to the user: they are read, and moved to a new name, never deleted.
"""

import contextlib
import datetime
import hashlib
import itertools
import json
import os
import pwd
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.core import hints, records
from workspace.core.errors import ToolchainError, counted
from workspace.core.files import read_regular
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import interpreter
from workspace.machine.machine import Machine

Kind = Literal["triton", "flashinfer", "torch compile", "vllm"]
NONE = "none"
KEY_DIGITS = 12
RECORD = "stack.json"
# The driver's own cache of compiled PTX, below .workspace/jit. The driver keys each entry by the
# code, the GPU and its own version, so one folder serves every stack.
DRIVER_CACHE = "driver"
# The largest size that the driver accepts, 4 GiB (CUDA C++ Programming Guide, CUDA Environment
# Variables). Its default is 1 GiB, on embedded systems 256 MiB, and it evicts what is older.
DRIVER_CACHE_BYTES = 4 << 30
# The folders of compiled code below VLLM_CACHE_ROOT, which also has facts of models and test
# assets.
COMPILED_BY_VLLM = ("torch_compile_cache", "deep_gemm", "flashinfer_autotune_cache")
# The most entries to read of one cache; a Triton cache has some thousands.
MOST_READ = 4000
# FlashInfer's build.ninja: `-isystem /…/site-packages/torch/include`.
_TORCH_INCLUDE = re.compile(r"-isystem\s+((?:(?!-isystem).)+)/torch/include(?=\s|$)", re.MULTILINE)


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


@dataclass(frozen=True)
class Cache:
    """A folder of compiled kernels that a run loads from; `is_own` means below .workspace/jit."""

    kind: Kind
    place: Path
    is_own: bool


@dataclass(frozen=True)
class Foreign:
    """A cache with entries of another stack: a sentence on its writer, and the last write."""

    cache: Cache
    wrote: str
    last: datetime.datetime


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


def in_use(layout: Layout, settings: Settings, stack: Stack) -> tuple[Cache, ...]:
    """Return each folder that a run of this stack loads from, with and without `variables`."""
    usual = {
        name: _set(settings, name) or ""
        for name in (
            "TRITON_CACHE_DIR",
            "TORCHINDUCTOR_CACHE_DIR",
            "VLLM_CACHE_ROOT",
            "FLASHINFER_WORKSPACE_BASE",
        )
    }
    own = variables(layout, settings, stack)
    found = [*_caches(settings, own, is_own=True), *_caches(settings, usual, is_own=False)]
    return tuple({cache.place: cache for cache in reversed(found) if cache.place.is_dir()}.values())


def foreign(machine: Machine, stack: Stack) -> tuple[Foreign, ...]:
    """Return the caches of this stack into which another stack has written. Only reads."""
    found = []
    since = _torch_installed(machine)
    for cache in in_use(machine.layout, machine.settings, stack):
        wrote = next(_evidence(machine.layout, cache, stack, since), None)
        if wrote:
            found.append(Foreign(cache, wrote, _last_written(cache.place)))
    return tuple(found)


def rename_foreign(found: Foreign) -> Path:
    """Rename a cache to a name with the date of its last write, and return the new path.

    Raises ToolchainError where that is not allowed.
    """
    present = found.cache.place
    name = f"{present.name}.of-{found.last.strftime('%Y%m%d-%H%M%S')}"
    names = (name, *(f"{name}-{index}" for index in range(2, 1000)))
    place = next(present.with_name(free) for free in names if not present.with_name(free).exists())
    try:
        present.rename(place)
    except OSError as exc:
        hint = hints.text("machine.cache_folder", folder=present.parent)
        raise ToolchainError(f"{present} cannot be renamed: {exc.strerror}", hint=hint) from exc
    return place


def _caches(settings: Settings, given: Mapping[str, str], *, is_own: bool) -> Iterator[Cache]:
    """Yield the folders that variables name, or the usual folder for an empty variable."""
    home = Path(settings.shell.get("HOME") or "~").expanduser()
    scratch = Path(settings.shell.get("TMPDIR") or "/tmp")
    usual = {
        "TRITON_CACHE_DIR": Path(_set(settings, "TRITON_HOME") or home) / ".triton" / "cache",
        "TORCHINDUCTOR_CACHE_DIR": scratch / f"torchinductor_{_user(settings)}",
        "VLLM_CACHE_ROOT": Path(settings.shell.get("XDG_CACHE_HOME") or home / ".cache") / "vllm",
        "FLASHINFER_WORKSPACE_BASE": home,
    }
    for name, text in given.items():
        place = Path(text).expanduser() if text else usual[name]
        if name == "TRITON_CACHE_DIR":
            yield Cache("triton", place, is_own)
        elif name == "TORCHINDUCTOR_CACHE_DIR":
            yield Cache("torch compile", place, is_own)
        elif name == "FLASHINFER_WORKSPACE_BASE":
            yield Cache("flashinfer", place / ".cache" / "flashinfer", is_own)
        else:
            yield from (Cache("vllm", place / folder, is_own) for folder in COMPILED_BY_VLLM)


def _evidence(layout: Layout, cache: Cache, stack: Stack, since: float) -> Iterator[str]:
    """Yield sentences on the other stack that wrote there, the surest first.

    `since` is when torch was installed.
    """
    if cache.kind in ("triton", "torch compile", "vllm"):
        yield from _triton_entries(cache.place, stack)
    if cache.kind == "flashinfer":
        yield from _flashinfer_entries(layout, cache, stack, since)
    if (
        cache.kind in ("torch compile", "vllm")
        and not cache.is_own
        and any(path.stat().st_mtime < since for path in _files(cache.place))
    ):
        yield f"written before torch {stack.torch} was installed here"


@dataclass(frozen=True)
class _TritonKernel:
    """What is read here of Triton's description of a kernel."""

    triton_version: str
    target: dict[str, object]


def _triton_entries(place: Path, stack: Stack) -> Iterator[str]:
    """Compare the version and target that Triton notes beside each kernel.

    See triton/compiler/compiler.py, metadata.
    """
    if stack.triton == NONE:
        # No run reads the cache then.
        return
    archs = {text.replace(".", "") for text in stack.architecture.split() if text != NONE}
    # A version built from source ends with its commit in one place and not in the other.
    installed = stack.triton.partition("+")[0]
    for path in itertools.islice(place.rglob("*.json"), MOST_READ):
        # Other files of the folder are no descriptions of kernels.
        with contextlib.suppress(OSError, KeyError, records.DecodeError):
            facts = records.decode(read_regular(path), _TritonKernel)
            version, target = facts.triton_version.partition("+")[0], facts.target
            if version != installed:
                yield f"written by triton {version}, and {stack.triton} is installed"
            elif archs and target["backend"] == "cuda" and str(target["arch"]) not in archs:
                yield f"written for sm_{target['arch']}, and the GPU here is {stack.architecture}"


def _flashinfer_entries(layout: Layout, cache: Cache, stack: Stack, since: float) -> Iterator[str]:
    """Find libraries that are linked against another torch.

    Those of another FlashInfer are in a folder of its version, and are never loaded.
    """
    own = [folder.resolve() for folder in interpreter.site_packages(layout)]
    for path in (cache.place / stack.flashinfer).glob("*/cached_ops/*/build.ninja"):
        with contextlib.suppress(OSError, ValueError):
            # ninja writes a dollar sign before a blank.
            found = _TORCH_INCLUDE.search(read_regular(path).decode().replace("$ ", " "))
            if found and Path(found[1]).resolve() not in own:
                yield f"compiled against the torch in {found[1]}"
            elif found and not cache.is_own and path.stat().st_mtime < since:
                yield f"compiled before torch {stack.torch} was installed"


def _torch_installed(machine: Machine) -> float:
    """Return when torch was installed in `.vllm`, by the time of its RECORD; 0 without torch.

    uv links the other files, which keep their times.
    """
    places = [
        folder / f"torch-{machine.packages().get('torch')}.dist-info" / "RECORD"
        for folder in interpreter.site_packages(machine.layout)
    ]
    return next((place.stat().st_mtime for place in places if place.is_file()), 0.0)


def _last_written(place: Path) -> datetime.datetime:
    newest = max((path.stat().st_mtime for path in _files(place)), default=place.stat().st_mtime)
    return datetime.datetime.fromtimestamp(newest, tz=datetime.UTC)


def _files(place: Path) -> Iterator[Path]:
    for top, _, names in os.walk(place):
        for name in names:
            path = Path(top) / name
            with contextlib.suppress(OSError):
                if path.is_file():
                    yield path


def _set(settings: Settings, name: str) -> str | None:
    value = settings.passed.get(name)
    return settings.shell.get(name) or (value.text if value else None)


def _user(settings: Settings) -> str:
    """Return the user name in the name of torch's folder.

    torch/_inductor/runtime/cache_dir_utils.py takes it from getpass.getuser.
    """
    named = next(
        (
            settings.shell[name]
            for name in ("LOGNAME", "USER", "LNAME", "USERNAME")
            if settings.shell.get(name)
        ),
        None,
    )
    try:
        return re.sub(r'[\\/:*?"<>|]', "_", named or pwd.getpwuid(os.getuid()).pw_name)
    except KeyError:
        return f"uid_{os.getuid()}"


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:KEY_DIGITS]
