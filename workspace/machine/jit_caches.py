"""Kernels that are compiled while vLLM runs: where Triton, FlashInfer and torch compile keep them,
and which stack has written them.

A stack gets folders of its own below .workspace/jit, so that nothing of another tree, torch, triton
or architecture is ever loaded (vllm-project/vllm#41871). What lies at the usual places is the whole
user's: it is looked at, and moved aside, never deleted.
"""

import contextlib
import datetime
import hashlib
import json
import os
import pwd
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from workspace.core.errors import ToolchainError
from workspace.core.files import read_regular, write_atomic
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import hardware, interpreter, torch

Kind = Literal["triton", "flashinfer", "torch compile", "vllm"]
NONE = "none"
KEY_DIGITS = 12
RECORD = "stack.json"
# In the order in which a path of a cache names them: what is compiled below VLLM_CACHE_ROOT;
# models' facts and test assets lie there too.
COMPILED_BY_VLLM = ("torch_compile_cache", "deep_gemm", "flashinfer_autotune_cache")
# So many entries are read of one cache; a Triton cache has some thousands.
MOST_READ = 4000
# FlashInfer's build.ninja: `-isystem /…/site-packages/torch/include`.
_TORCH_INCLUDE = re.compile(r"-isystem\s+((?:(?!-isystem).)+)/torch/include(?=\s|$)", re.MULTILINE)


@dataclass(frozen=True)
class Stack:
    """What compiled kernels belong to. `tree` is the caller's word for vendor/vllm, such as its
    tree OID; the others say `none` where there is none.
    """

    tree: str
    torch: str
    triton: str
    flashinfer: str
    architecture: str

    @property
    def key(self) -> str:
        """The name of the folder of what comes from the tree: Triton's kernels and torch compile's
        graphs.
        """
        return _digest(self.tree, self.torch, self.triton, self.architecture)

    @property
    def library_key(self) -> str:
        """The same of FlashInfer's, which take half an hour to compile, and in which nothing is of
        the tree or of Triton.
        """
        return _digest("flashinfer", self.flashinfer, self.torch, self.architecture)


@dataclass(frozen=True)
class Cache:
    """A folder of compiled kernels that a run would load from. `is_own` below .workspace/jit."""

    kind: Kind
    place: Path
    is_own: bool


@dataclass(frozen=True)
class Foreign:
    """A cache with something of another stack in it: who wrote it, as far as that can be told, and
    when last.
    """

    cache: Cache
    wrote: str
    last: datetime.datetime


def observe(
    layout: Layout, settings: Settings, *, tree: str, capabilities: tuple[str, ...] | None = None
) -> Stack:
    """Return the stack that `.vllm` runs as. `capabilities` of the GPUs, such as 12.1, are asked of
    the driver where they are not given.

    Starts no Python; asking the driver costs up to a second.
    """
    build = torch.observe(layout, settings)
    there = interpreter.installed(layout)
    if capabilities is None:
        capabilities = (
            tuple(gpu.capability for gpu in hardware.observe(settings).gpus if gpu.capability)
            if build and build.cuda
            else ()
        )
    return Stack(
        tree=tree,
        torch=f"{build.version} CUDA {build.cuda or NONE}" if build else NONE,
        triton=there.get("triton", NONE),
        flashinfer=there.get("flashinfer-python", NONE),
        architecture=" ".join(sorted(set(capabilities))) or NONE,
    )


def variables(layout: Layout, settings: Settings, stack: Stack) -> Mapping[str, str]:
    """Return what a running vLLM is told so that it loads and keeps kernels in folders of this
    stack only. Touches nothing.

    A variable that the user has set, in the shell or in .env, is theirs and left out.
    """
    own, library = layout.jit / stack.key, layout.jit / stack.library_key
    keyed = {
        "TRITON_CACHE_DIR": own / "triton",
        "TORCHINDUCTOR_CACHE_DIR": own / "inductor",
        "VLLM_CACHE_ROOT": own / "vllm",
        "FLASHINFER_WORKSPACE_BASE": library,
    }
    # Triton would take its home only for what has no folder of its own, yet a user who names one
    # means all of it.
    if _set(settings, "TRITON_HOME"):
        del keyed["TRITON_CACHE_DIR"]
    return {name: str(place) for name, place in keyed.items() if not _set(settings, name)}


def record(layout: Layout, stack: Stack) -> None:
    """Write beside a stack's folders which stack they are of, for a person who wonders; once."""
    for key in (stack.key, stack.library_key):
        path = layout.jit / key / RECORD
        if not path.exists():
            write_atomic(path, (json.dumps(asdict(stack), indent=1) + "\n").encode())


def in_use(layout: Layout, settings: Settings, stack: Stack) -> tuple[Cache, ...]:
    """Return each folder that a run of this stack would load from, and each that one would which is
    started without `variables`.
    """
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


def foreign(layout: Layout, settings: Settings, stack: Stack) -> tuple[Foreign, ...]:
    """Find what another stack has written into a folder that a run would load from. It only
    reads.
    """
    found = []
    for cache in in_use(layout, settings, stack):
        wrote = next(_evidence(layout, cache, stack), None)
        if wrote:
            found.append(Foreign(cache, wrote, _last_written(cache.place)))
    return tuple(found)


def put_aside(one: Foreign) -> Path:
    """Rename a cache to a name beside it that says when it was written last, and return that.
    Raises ToolchainError where that is not allowed.
    """
    name = f"{one.cache.place.name}.of-{one.last.strftime('%Y%m%d-%H%M%S')}"
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    place = next(
        one.cache.place.with_name(free)
        for free in names
        if not one.cache.place.with_name(free).exists()
    )
    try:
        one.cache.place.rename(place)
    except OSError as exc:
        hint = (
            f"ls -ld {one.cache.place.parent}    or name another folder: it is of no use to this"
            " stack"
        )
        raise ToolchainError(
            f"{one.cache.place} cannot be moved aside: {exc.strerror}", hint=hint
        ) from exc
    return place


def _caches(settings: Settings, told: Mapping[str, str], *, is_own: bool) -> Iterator[Cache]:
    """The folders that variables lead to; the usual place where one is empty, nothing where it is
    not there.
    """
    home = Path(settings.shell.get("HOME") or "~").expanduser()
    usual = {
        "TRITON_CACHE_DIR": Path(_set(settings, "TRITON_HOME") or home) / ".triton" / "cache",
        "TORCHINDUCTOR_CACHE_DIR": (
            Path(settings.shell.get("TMPDIR") or "/tmp") / f"torchinductor_{_user(settings)}"
        ),
        "VLLM_CACHE_ROOT": Path(settings.shell.get("XDG_CACHE_HOME") or home / ".cache") / "vllm",
        "FLASHINFER_WORKSPACE_BASE": home,
    }
    for name, text in told.items():
        place = Path(text).expanduser() if text else usual[name]
        if name == "TRITON_CACHE_DIR":
            yield Cache("triton", place, is_own)
        elif name == "TORCHINDUCTOR_CACHE_DIR":
            yield Cache("torch compile", place, is_own)
        elif name == "FLASHINFER_WORKSPACE_BASE":
            yield Cache("flashinfer", place / ".cache" / "flashinfer", is_own)
        else:
            yield from (Cache("vllm", place / folder, is_own) for folder in COMPILED_BY_VLLM)


def _evidence(layout: Layout, cache: Cache, stack: Stack) -> Iterator[str]:
    """Yield sentences on who else has written there, first the surest."""
    if cache.kind in ("triton", "torch compile", "vllm"):
        yield from _triton_entries(cache.place, stack)
    if cache.kind == "flashinfer":
        yield from _flashinfer_entries(layout, cache, stack)
    if cache.kind in ("torch compile", "vllm") and not cache.is_own:
        yield from _older_than_torch(layout, cache.place, stack)


def _triton_entries(place: Path, stack: Stack) -> Iterator[str]:
    """What Triton notes beside each kernel: its own version and the target
    (triton/compiler/compiler.py, metadata).
    """
    if stack.triton == NONE:
        # Nothing reads them then.
        return
    archs = {text.replace(".", "") for text in stack.architecture.split() if text != NONE}
    for number, path in enumerate(place.rglob("*.json")):
        if number >= MOST_READ:
            return
        with contextlib.suppress(
            OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError
        ):
            said = json.loads(read_regular(path))
            # A version from source ends with its commit in one place and not in the other.
            version, target = str(said["triton_version"]).partition("+")[0], said["target"]
            if version != stack.triton.partition("+")[0]:
                yield f"written by triton {version}, installed is {stack.triton}"
            elif archs and target["backend"] == "cuda" and str(target["arch"]) not in archs:
                yield f"written for sm_{target['arch']}, the GPU here is {stack.architecture}"


def _flashinfer_entries(layout: Layout, cache: Cache, stack: Stack) -> Iterator[str]:
    """Libraries linked against another torch. Those of another FlashInfer lie in a folder of its
    version, and are never loaded.
    """
    own = [folder.resolve() for folder in interpreter.site_packages(layout)]
    for path in (cache.place / stack.flashinfer).glob("*/cached_ops/*/build.ninja"):
        with contextlib.suppress(OSError, ValueError):
            # ninja's own mark before a blank.
            found = _TORCH_INCLUDE.search(read_regular(path).decode().replace("$ ", " "))
            if found and Path(found[1]).resolve() not in own:
                yield f"compiled against the torch in {found[1]}"
            elif (
                found
                and not cache.is_own
                and path.stat().st_mtime < (_installed_at(layout, "torch") or 0)
            ):
                yield f"compiled before torch {stack.torch} was installed"


def _older_than_torch(layout: Layout, place: Path, stack: Stack) -> Iterator[str]:
    at = _installed_at(layout, "torch")
    if at is not None and any(path.stat().st_mtime < at for path in _files(place)):
        yield f"written before torch {stack.torch} was installed here"


def _installed_at(layout: Layout, name: str) -> float | None:
    """When a package came into `.vllm`: uv links its files, which keep their times, and writes this
    one anew.
    """
    version = interpreter.installed(layout).get(name)
    places = [
        folder / f"{name}-{version}.dist-info" / "RECORD"
        for folder in interpreter.site_packages(layout)
    ]
    return next((place.stat().st_mtime for place in places if place.is_file()), None)


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
    """The name that torch puts into its folder's (torch/_inductor/runtime/cache_dir_utils.py, by
    getpass.getuser).
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
