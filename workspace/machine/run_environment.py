"""The environment of a running vLLM, which smoke, bench, serve, `inv run` and `inv shell` share,
the names that the pinned vLLM reads, settings that contradict each other or the machine, and the
check of LD_LIBRARY_PATH.

The user's values (shell, then .env) go before a recipe's, and those before defaults.
"""

import ast
import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workspace.core import hints, process, records
from workspace.core.child_variables import Phase
from workspace.core.console import Row, State
from workspace.core.errors import SmokeError, ToolchainError
from workspace.core.files import read_regular
from workspace.core.known_settings import KNOWN
from workspace.core.paths import Layout
from workspace.core.process import Broken, There
from workspace.core.settings import (
    Settings,
    shortened,
)
from workspace.machine import interpreter, jit_caches, torch
from workspace.machine.arch import key
from workspace.machine.machine import Case, Machine, unanswered

VARIABLE = re.compile(r"VLLM_[A-Z0-9_]+")
ANSWER_S = 20.0
VOCABULARIES = ("o200k_base.tiktoken", "cl100k_base.tiktoken")
ENCODINGS = "TIKTOKEN_ENCODINGS_BASE"
# A call in tiktoken's source: `load_tiktoken_bpe("https://…/NAME", expected_hash="…")`.
_PUBLISHED = re.compile(r"""["'](\w+://[^"']+/([^/"']+))["'],\s*expected_hash=["'](\w{64})["']""")
_SONAME = re.compile(r"lib[\w+-]+\.so(\.\d+)?")
NUMA_LIBRARY = "libnuma.so.1"
# Loads a library as Python does, and prints the loader's own sentence where it cannot.
_LOAD = """import ctypes, sys
try:
    ctypes.CDLL(sys.argv[1])
except OSError as exc:
    sys.exit(str(exc))"""
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
    stack: jit_caches.Stack | None,
    recipe: Mapping[str, str] | None = None,
    given: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the environment of a vLLM that the workspace starts; see core/child_variables.py.

    `stack` decides the folders of compiled kernels (jit_caches.observe; None: the usual folders),
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
        facts |= jit_caches.variables(layout, settings, stack)
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


def library_path(case: Case) -> Iterator[Row]:
    """Check that no folder of LD_LIBRARY_PATH has a library that torch brings too.

    The loader would take the library from that folder (ld.so(8)).
    """
    text = case.settings.child_environment("run").get("LD_LIBRARY_PATH", "")
    why = (
        "the loader takes a library from there before torch's own of the same name, whatever its"
        " version"
    )
    if not text:
        yield Row(State.OK, "library path", "not set", why)
        return
    # A blank does not separate entries; a semicolon does, as well as a colon.
    entries = re.split(r"[:;]", text)
    faults = dict(_library_faults(case, entries))
    if faults:
        hint = _library_hint(case, entries, faults)
        yield Row(State.WARN, "library path", "; ".join(faults.values()), why, hint)
        return
    folders = f"{len(entries)} folder{'s' if len(entries) > 1 else ''}"
    yield Row(State.OK, "library path", f"{folders}, none with a library of torch's", why)


def numa_library(case: Case) -> Iterator[Row]:
    """Check libnuma, which the CPU wheels' kernels name (NEEDED of _C.abi3.so) and no wheel brings.

    A CUDA build needs none of it; a native CPU build does without it.
    """
    if case.device != "cpu":
        return
    why = "the precompiled kernels for CPUs are linked against it"
    argv = [sys.executable, "-I", "-c", _LOAD, NUMA_LIBRARY]
    environment = case.settings.child_environment("run")
    answer = process.output_of(process.ask(argv, env=environment, limit_s=ANSWER_S))
    hint = hints.text("machine.apt_libnuma")
    state = State.WARN if case.is_native else State.FAIL
    missing = Row(state, "libnuma", f"{NUMA_LIBRARY} is missing", why, hint)
    if isinstance(answer, There):
        yield Row(State.OK, "libnuma", f"{NUMA_LIBRARY} is installed", why)
    elif isinstance(answer, Broken) and "No such file" in answer.message:
        yield missing
    else:
        yield unanswered(missing, answer, look=hint)


def _library_faults(case: Case, entries: list[str]) -> Iterator[tuple[str, str]]:
    """Yield each harmful entry of LD_LIBRARY_PATH with a sentence on it."""
    own = _libraries_of_torch(case)
    for entry in dict.fromkeys(entries):
        if not entry:
            yield entry, "an empty entry, which means the current folder"
        elif not _is_torchs_toolkit(case, Path(entry)) and (
            shadows := sorted(own & _libraries(Path(entry)))
        ):
            more = f" and {len(shadows) - 3} more" if len(shadows) > 3 else ""
            yield entry, f"{entry} has {', '.join(shadows[:3])}{more}"


def _library_hint(case: Case, entries: list[str], faults: Mapping[str, str]) -> str:
    # Children always get CUDA_HOME's own folder; to remove it from the shell's list changes
    # nothing.
    home = case.settings.path("CUDA_HOME")
    if home and set(faults) == {str(home / "lib64")}:
        wanted = (build.cuda if (build := case.torch()) else None) or "13.0"
        return hints.text(
            "machine.cuda_home_dotenv", version=wanted, package=wanted.replace(".", "-")
        )
    passed = case.settings.passed.get("LD_LIBRARY_PATH")
    if passed and passed.source == ".env":
        return hints.text("machine.drop_library_path")
    toolkits = str((home or Path("/nonexistent")) / "lib64")
    kept = ":".join(
        entry for entry in dict.fromkeys(entries) if entry not in faults and entry != toolkits
    )
    return (
        hints.text("machine.export_library_path", path=kept)
        if kept
        else hints.text("machine.unset_library_path")
    )


def _is_torchs_toolkit(case: Case, folder: Path) -> bool:
    """Return whether a folder is CUDA_HOME's and of torch's own CUDA: it is then harmless."""
    home, build, found = case.settings.path("CUDA_HOME"), case.torch(), case.toolkit()
    return (
        home is not None
        and folder == home / "lib64"
        and build is not None
        and build.cuda is not None
        and found is not None
        and key(found.version)[:2] == key(build.cuda)[:2]
    )


def _libraries_of_torch(case: Case) -> frozenset[str]:
    """Return the names of torch's own libraries and of those in NVIDIA's wheels beside it."""
    packages = interpreter.site_packages(case.layout)
    folders = [
        folder
        for package in packages
        for folder in (package / "torch" / "lib", *package.glob("nvidia/*/lib"))
    ]
    return frozenset().union(*(_libraries(folder) for folder in folders))


def _libraries(folder: Path) -> frozenset[str]:
    """Return the libraries in a folder by name and major version, such as libcublas.so.13.

    The set is empty where the folder cannot be read.
    """
    try:
        found = (_SONAME.match(name) for name in os.listdir(folder))
    except OSError:
        return frozenset()
    return frozenset(name[0] for name in found if name and name[1])


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


# Variables that name a file or folder to read, without those that vLLM creates itself.
_NAMES_A_FILE = re.compile(r"VLLM_(?!\w*(CACHE|DUMP|RPC|RUST|XLA))\w+_(PATH|FILE|FOLDER)")
# The Triton that introduced the second assembler, and the first GPU that uses it
# (triton/backends/nvidia/compiler.py).
_SECOND_ASSEMBLER, _FIRST_GPU_OF_IT = (3, 6), (10, 0)


@dataclass(frozen=True)
class Finding:
    """A message on one variable. Without a hint of its own the hint is to remove the variable."""

    name: str
    message: str
    is_error: bool = False
    hint: str | None = None


def conflict_findings(case: Case, given: Mapping[str, str]) -> Iterator[Finding]:
    """Find settings that contradict each other or the machine.

    `given` has the values that the user or a recipe sets, by name, without defaults.
    """
    given = {name: text for name, text in given.items() if text}
    for look in (_toolkit, _assemblers, _files, _vocabularies, _memory):
        yield from look(case, given)


def _toolkit(case: Case, given: Mapping[str, str]) -> Iterator[Finding]:
    home = case.settings.path("CUDA_HOME") if "CUDA_HOME" in given else None
    if home and not home.is_dir():
        yield Finding("CUDA_HOME", "no such folder", is_error=case.device == "cuda")
    elif home and not (home / "bin" / "nvcc").is_file():
        yield Finding("CUDA_HOME", "it has no bin/nvcc, which FlashInfer and a native build run")


def _assemblers(case: Case, given: Mapping[str, str]) -> Iterator[Finding]:
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        own = case.settings.path(name) if name in given else None
        if own and not own.exists():
            message = "no such program; Triton skips it without a message and uses its own"
            yield Finding(name, message)
        elif own and (own.is_dir() or not os.access(own, os.X_OK)):
            message = "it cannot be executed: Triton stops there"
            yield Finding(name, message, is_error=case.device == "cuda")
    if "TRITON_PTXAS_PATH" in given and "TRITON_PTXAS_BLACKWELL_PATH" not in given:
        version = case.machine.packages().get("triton", "")
        capabilities = case.machine.capabilities
        newest = max(map(key, capabilities), default=())
        if key(version) >= _SECOND_ASSEMBLER and newest >= _FIRST_GPU_OF_IT:
            yield Finding(
                "TRITON_PTXAS_PATH",
                f"Triton {version} assembles for this GPU with TRITON_PTXAS_BLACKWELL_PATH, or its"
                " own assembler, and does not use this one",
            )


def _files(case: Case, given: Mapping[str, str]) -> Iterator[Finding]:
    for name, text in given.items():
        if _NAMES_A_FILE.fullmatch(name) and "/" in text and not Path(text).expanduser().exists():
            yield Finding(name, "no such file or folder")
    home = case.settings.path("HF_HOME") if "HF_HOME" in given else None
    if home and home.exists() and not home.is_dir():
        yield Finding("HF_HOME", "it is not a folder", is_error=True)


def _vocabularies(case: Case, given: Mapping[str, str]) -> Iterator[Finding]:
    """Find a folder of vocabularies that lacks a file.

    gpt-oss dies of it after its load, also with the harmony that has them built in
    (openai/harmony#95).
    """
    if ENCODINGS not in given:
        return
    missing = missing_vocabularies(Path(given[ENCODINGS]))
    built_in = case.machine.packages().get("oss-harmony")
    why = (
        f"oss-harmony {built_in} in .vllm has them built in"
        if built_in
        else "./scripts/inv serve.fetch fetches them for the models that need them"
    )
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        yield Finding(
            ENCODINGS,
            f"{' and '.join(missing)} {verb} missing, so gpt-oss would fail; the workspace"
            f" does not pass it on. {why}",
        )
    elif built_in:
        yield Finding(ENCODINGS, f"not needed: {why}")


def _memory(case: Case, given: Mapping[str, str]) -> Iterator[Finding]:
    name = "VLLM_CPU_KVCACHE_SPACE"
    if name not in given:
        return
    if case.device == "cuda":
        yield Finding(
            name,
            "a vLLM with a GPU does not read it; --gpu-memory-utilization or"
            " --kv-cache-memory-bytes sets the size of the cache",
        )
    elif given[name].isdigit() and int(given[name]) > case.host().memory_gib:
        yield Finding(
            name,
            f"this machine, or its control group, has {case.host().memory_gib:.1f} GiB",
            is_error=True,
        )
