"""The environment of a running vLLM, which smoke, bench, serve, `inv run` and `inv shell` share,
the names that the pinned vLLM reads, and the folders of kernels that are compiled while it runs.

The user's values (shell, then .env) go before a recipe's, and those before defaults. Each stack has
cache folders of its own below .workspace/jit, so that nothing of another tree, torch, triton or
architecture is ever loaded (vllm-project/vllm#41871). The caches at the usual places belong to the
user, and no run of the workspace reads or writes them.
"""

import ast
import contextlib
import functools
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workspace.core import hints, process, records
from workspace.core.child_variables import Phase
from workspace.core.errors import SmokeError, ToolchainError, counted
from workspace.core.files import read_regular
from workspace.core.known_settings import KNOWN
from workspace.core.paths import Layout
from workspace.core.settings import Settings, shortened
from workspace.machine import interpreter, torch
from workspace.machine.machine import Machine

VARIABLE = re.compile(r"VLLM_[A-Z0-9_]+")
ANSWER_S = 20.0
VOCABULARIES = ("o200k_base.tiktoken", "cl100k_base.tiktoken")
ENCODINGS = "TIKTOKEN_ENCODINGS_BASE"
# A call in tiktoken's source: `load_tiktoken_bpe("https://…/NAME", expected_hash="…")`.
_PUBLISHED = re.compile(r"""["'](\w+://[^"']+/([^/"']+))["'],\s*expected_hash=["'](\w{64})["']""")
_REMOVED = Path(__file__).with_name("removed.toml")


@dataclass(frozen=True)
class Removed:
    """A variable or flag of former releases.

    `last` is the newest release that has it, `gone` the first without it; both are empty for a name
    that no release reads. `instead` replaces it, empty where nothing does; `values` is the count of
    arguments of a flag.
    """

    name: str
    last: str
    gone: str
    instead: str
    reference: str
    values: int = 0

    @property
    def sentence(self) -> str:
        when = f"is gone since vLLM {self.gone}" if self.last else "is read by no release of vLLM"
        return f"{when} ({self.reference}); " + (
            f"instead: {self.instead}" if self.instead else "nothing replaces it, remove it"
        )


@dataclass(frozen=True)
class Misread:
    """A value that vLLM refuses (`is_error`) or takes for another value than it looks like."""

    name: str
    message: str
    is_error: bool


@functools.lru_cache(maxsize=4)
def variables_of(source: bytes) -> frozenset[str]:
    """Return the names in vllm/envs.py's registry, the dictionary `environment_variables`.

    The set is empty where the source has no such dictionary.
    """
    return frozenset(
        name.value
        for node in ast.walk(parsed(source))
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict)
        if _is_registry(node)
        for name in node.value.keys
        if isinstance(name, ast.Constant) and isinstance(name.value, str)
    )


def _is_registry(node: ast.Assign | ast.AnnAssign) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return any(
        isinstance(target, ast.Name) and target.id == "environment_variables" for target in targets
    )


def parsed(source: bytes) -> ast.Module:
    """Return the syntax tree of a Python source, an empty tree for invalid source."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError):
        return ast.parse(source)
    return ast.Module(body=[], type_ignores=[])


def known_variables(layout: Layout) -> frozenset[str]:
    """Return the names that the tree in vendor/vllm reads, none without a tree."""
    with contextlib.suppress(OSError):
        return variables_of(read_regular(_source(layout)))
    return frozenset()


@functools.cache
def removed_names(kind: Literal["variables", "flags"]) -> Mapping[str, Removed]:
    """Return the names that former releases of vLLM have and later ones lack, by name.

    removed.toml describes how the list was established.
    """
    table = records.parse_toml(_REMOVED.read_bytes())[kind]
    rows = records.convert(table, dict[str, dict[str, Any]])
    return {name: Removed(name, **facts) for name, facts in rows.items()}


def misread_values(
    layout: Layout, settings: Settings, values: Mapping[str, str]
) -> tuple[Misread, ...]:
    """Run the tree's own functions on values of its registry and return the misread values.

    Nothing is reported where the functions cannot run.
    """
    if not values:
        return ()
    argv: list[process.Argument] = [
        sys.executable,
        "-I",
        "-S",
        layout.probes / "imports.py",
        "variables",
        _source(layout),
        *sorted(values),
    ]
    environment = {
        "PATH": settings.shell.get("PATH", ""),
        "HOME": settings.shell.get("HOME", "/"),
        **values,
    }
    try:
        done = process.capture(argv, env=environment, timeout_s=ANSWER_S)
        found = records.decode(done.stdout, dict[str, list[dict[str, str]] | None])
    except (ToolchainError, records.DecodeError):
        return ()
    return tuple(
        Misread(row["name"], shortened(row["said"]), is_error)
        for kind, is_error in (("refused", True), ("ignored", False))
        for row in found[kind] or ()
    )


def _source(layout: Layout) -> Path:
    return layout.vllm / "vllm" / "envs.py"


def built_environment(
    layout: Layout,
    settings: Settings,
    phase: Phase,
    *,
    stack: "Stack | None",
    recipe: Mapping[str, str] | None = None,
    given: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the environment of a vLLM that the workspace starts; see core/child_variables.py.

    `stack` decides the folders of compiled kernels (observe_stack; None: the usual folders),
    `recipe` is the environment of a recipe, and `given` the variables of the starting room.
    """
    facts: dict[str, str | None] = {}
    # The two lists take 30 ms to read: only for a variable of vLLM's that somebody has set.
    if any(
        VARIABLE.fullmatch(name) and name not in KNOWN
        for name in (*settings.shell, *settings.passed, *(recipe or {}))
    ):
        known = known_variables(layout)
        facts |= {name: None for name in removed_names("variables") if known and name not in known}
    if stack is not None:
        facts |= cache_variables(layout, settings, stack)
    facts[ENCODINGS] = _encodings(layout, settings, recipe or {})
    return settings.child_environment(
        phase, {**facts, **(given or {})}, layout=layout, recipe=recipe
    )


def require_own_tree(machine: Machine) -> None:
    """Raise SmokeError where vLLM is installed from the tree of another clone.

    `cp -a` and `mv` keep the path of an editable installation: the edits in this clone would have
    no effect, and those in the other one would.
    """
    layout, version = machine.layout, machine.packages().get("vllm")
    for folder in interpreter.site_packages(layout) if version else ():
        origin, place = torch.origin_of(folder / f"vllm-{version}.dist-info")
        if origin == "editable" and Path(place).resolve() != layout.vllm.resolve():
            raise SmokeError(
                f"environment stale: .vllm imports vLLM from {place}, not from this clone, which"
                " was copied or moved",
                hint=hints.text("inv.bootstrap"),
            )


def missing_vocabularies(folder: Path) -> tuple[str, ...]:
    """Return the vocabularies of gpt-oss that a folder lacks."""
    return tuple(name for name in VOCABULARIES if not (folder / name).is_file())


def _encodings(layout: Layout, settings: Settings, recipe: Mapping[str, str]) -> str | None:
    """Return the folder of vocabularies, the user's first, only where it has all of them.

    With a file missing gpt-oss fails after its load (vllm-project/vllm#22525).
    """
    own = settings.passed[ENCODINGS].text if ENCODINGS in settings.passed else None
    users = settings.shell.get(ENCODINGS, own)
    places = (recipe.get(ENCODINGS) if users is None else users, str(layout.encodings))
    return next(
        (place for place in places if place is not None and not missing_vocabularies(Path(place))),
        None,
    )


def published_vocabularies(layout: Layout) -> dict[str, tuple[str, str]]:
    """Return address and SHA-256 of each vocabulary from the source of the tiktoken in `.vllm`.

    Raises ToolchainError if they are not in the source.
    """
    found: dict[str, tuple[str, str]] = {}
    for folder in interpreter.site_packages(layout):
        with contextlib.suppress(OSError, ValueError):
            text = read_regular(folder / "tiktoken_ext" / "openai_public.py").decode()
            found |= {name: (address, digest) for address, name, digest in _PUBLISHED.findall(text)}
    if missing := [name for name in VOCABULARIES if name not in found]:
        raise ToolchainError(
            f"the tiktoken in .vllm has no address and hash of {' and '.join(missing)}",
            hint=hints.text("inv.bootstrap"),
        )
    return found


NONE = "none"
KEY_DIGITS = 12
STACK_FILE = "stack.json"
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


def observe_stack(machine: Machine, *, tree: str) -> Stack:
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


def cache_variables(layout: Layout, settings: Settings, stack: Stack) -> Mapping[str, str]:
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


def record_stack(layout: Layout, stack: Stack) -> None:
    """Write a stack's description beside its folders, once, for a person who reads them; and make
    the driver's folder, which it may only fill.
    """
    if stack.architecture != NONE:
        (layout.jit / DRIVER_CACHE).mkdir(parents=True, exist_ok=True)
    for key in (stack.key, stack.library_key):
        path = layout.jit / key / STACK_FILE
        if not path.exists():
            records.write(path, stack)


def compiled_since(environment: Mapping[str, str], start: float) -> str:
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
