"""Does a model fit: what it needs, what is free, and what to write where it does not. It only
looks; deciding is pure.

On a Spark GPU and processor share one memory: vLLM counts what the kernel calls available there
(vllm/utils/mem_utils.py, psutil), page cache that could be dropped included, while CUDA has to find
it free.
"""

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.core import process
from workspace.core.console import Console, State
from workspace.core.errors import SettingsError, ToolchainError
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import hardware, run_environment
from workspace.machine.case import Case
from workspace.machine.hardware import GIB, GPU_KILL_S, GPU_QUERY_S
from workspace.repo import pins
from workspace.server import flags, models, recipes
from workspace.server.command import Command, replaced, typed
from workspace.server.observation import Lack
from workspace.server.recipes import DEFAULT_UTILIZATION, Recipe

Verdict = Literal["yes", "after drop-caches", "no"]
# What the rest of the machine needs on top: a suggestion that leaves nothing is none.
MARGIN_GIB = 2.0
# A cache below this serves one short request at a time.
LEAST_KV_GIB = 0.5


@dataclass(frozen=True)
class Resident:
    """A process that holds the GPU. `held_gib` is None where the driver does not say it, as on
    unified memory.
    """

    number: int
    name: str
    held_gib: float | None


@dataclass(frozen=True)
class Free:
    """Memory that a model may take: a GPU's own, or where it has none of its own (`is_unified`), or
    none is there, the machine's.

    `available_gib` counts what the kernel gives back when it is asked; of that `droppable_gib` is
    page cache and is not free yet.
    """

    total_gib: float
    available_gib: float
    droppable_gib: float
    is_unified: bool
    residents: tuple[Resident, ...] = ()


@dataclass(frozen=True)
class Fit:
    """Whether a model fits. `needs_gib` is the least, with one sequence of full length; `takes_gib`
    what vLLM takes with these flags.

    `utilization` and `kv_gib` are what to write instead where that is too much, None where nothing
    helps; `hint` is the next command.
    """

    verdict: Verdict
    needs_gib: float
    takes_gib: float
    free: Free
    sentence: str
    hint: str | None = None
    utilization: float | None = None
    kv_gib: float | None = None


def observe(settings: Settings, *, device: str) -> Free:
    """Look at memory and GPU. A driver that hangs costs 8 s at most and counts as none."""
    host = hardware.observe(settings)
    droppable = hardware.droppable_gib(hardware.read_meminfo())
    if device == "cuda" and host.gpus:
        own = _own_memory(settings)
        residents = _residents(settings)
        if own:
            return Free(own[0], own[1], 0.0, is_unified=False, residents=residents)
        return Free(
            host.memory_gib,
            host.available_gib,
            min(droppable, host.available_gib),
            is_unified=True,
            residents=residents,
        )
    return Free(
        host.memory_gib, host.available_gib, min(droppable, host.available_gib), is_unified=False
    )


def needs_gib(recipe: Recipe, words: Sequence[str] = ()) -> float:
    """The least that the model runs with: weights, overhead and the cache of one sequence of full
    length.
    """
    cache = _number(recipe, words, "max-model-len", 0.0) * recipe.memory.kv_kib_per_token / 2**20
    return recipe.memory.weights_gib + recipe.memory.overhead_gib + cache


def judge(
    recipe: Recipe,
    free: Free,
    *,
    device: str,
    environment: Mapping[str, str],
    words: Sequence[str] = (),
) -> Fit:
    """Decide. `environment` is the running vLLM's: without a GPU VLLM_CPU_KVCACHE_SPACE says how
    large the cache is.

    `words` are those of a command line, where it says something else than the recipe.
    """
    needs, fixed = needs_gib(recipe, words), recipe.memory.weights_gib + recipe.memory.overhead_gib
    given = _takes(recipe, words, free, fixed, device=device, environment=environment)
    takes = max(needs, given)
    in_use = [_named(one) for one in free.residents]
    holding = f"; the GPU is held by {', '.join(in_use)}" if in_use else ""
    seen = (
        f"needs {needs:.1f} GiB, takes {takes:.1f}, of {free.total_gib:.1f} GiB"
        f" {free.available_gib:.1f} are available"
    )
    if given < needs <= free.available_gib:
        least = min(1.0, math.ceil((needs + LEAST_KV_GIB) / free.total_gib * 100) / 100)
        hint = f"--gpu-memory-utilization {least:.2f}"
        return Fit(
            "no",
            needs,
            given,
            free,
            f"is given too little: {given:.1f} GiB with these flags; {seen}{holding}",
            hint,
            least,
        )
    if takes <= free.available_gib:
        is_cached = (
            device == "cuda" and free.is_unified and takes > free.available_gib - free.droppable_gib
        )
        if not is_cached:
            return Fit("yes", needs, takes, free, f"fits: {seen}{holding}")
        said = (
            f"fits once page cache is given back: {seen}, {free.droppable_gib:.1f} of them are page"
            f" cache{holding}"
        )
        return Fit("after drop-caches", needs, takes, free, said, "./scripts/inv drop-caches")
    utilization, kv_gib = _suggestion(free, needs, fixed, device=device)
    hint = _hint(free, utilization, kv_gib, device=device)
    return Fit(
        "no", needs, takes, free, f"does not fit: {seen}{holding}", hint, utilization, kv_gib
    )


def _takes(
    recipe: Recipe,
    words: Sequence[str],
    free: Free,
    fixed: float,
    *,
    device: str,
    environment: Mapping[str, str],
) -> float:
    if kv_bytes := _number(recipe, words, "kv-cache-memory-bytes", 0.0):
        return fixed + kv_bytes / GIB
    said = environment.get("VLLM_CPU_KVCACHE_SPACE", "")
    if device == "cpu" and said.isdigit():
        return fixed + int(said)
    # The flag counts without a GPU as well, despite its name (vllm/v1/worker/cpu_worker.py).
    return _number(recipe, words, "gpu-memory-utilization", DEFAULT_UTILIZATION) * free.total_gib


def _number(recipe: Recipe, words: Sequence[str], flag: str, otherwise: float) -> float:
    """A flag's value as a number, a suffix such as 32k or 4G included
    (vllm/utils/argparse_utils.py, human_readable_int).
    """
    said = flags.last(words, f"--{flag}") or str(recipe.flags.get(flag, ""))
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)([kKmMgGtT]?)", said.strip())
    if found is None:
        return otherwise
    unit = 1000.0 if found[2].islower() else 1024.0
    return float(found[1]) * math.pow(unit, " kmgt".index(found[2].lower()) if found[2] else 0)


def _suggestion(
    free: Free, needs: float, fixed: float, *, device: str
) -> tuple[float | None, float | None]:
    """A utilization, and a size of the cache in GiB, with which it would fit beside what is there
    now.
    """
    usable = free.available_gib - MARGIN_GIB
    kv_gib = math.floor((usable - fixed) * 10) / 10
    if usable < needs or kv_gib < min(LEAST_KV_GIB, max(0.0, needs - fixed)):
        return None, None
    utilization = math.floor(usable / free.total_gib * 100) / 100
    return (utilization if device == "cuda" else None), kv_gib


def _hint(free: Free, utilization: float | None, kv_gib: float | None, *, device: str) -> str:
    if device == "cpu" and kv_gib is not None and kv_gib >= 1:
        return f"VLLM_CPU_KVCACHE_SPACE={math.floor(kv_gib)} in .env leaves room for it"
    if utilization is not None and kv_gib is not None:
        return (
            f"--gpu-memory-utilization {utilization:.2f}, or --kv-cache-memory-bytes"
            f" {math.floor(kv_gib * GIB)}, leaves room for it"
        )
    if free.residents:
        return (
            "end what holds the GPU first: ps -fp"
            f" '{' '.join(str(one.number) for one in free.residents)}'"
        )
    return "./scripts/inv serve.list    says which recipes fit"


def _named(one: Resident) -> str:
    held = f", {one.held_gib:.1f} GiB" if one.held_gib is not None else ""
    return f"{one.number} ({one.name}{held})"


def _own_memory(settings: Settings) -> tuple[float, float] | None:
    """Total and free GiB of the first GPU; None where it has no memory of its own."""
    rows = _ask(settings, "--query-gpu=memory.total,memory.free")
    found = [[_mib(word) for word in row] for row in rows[:1]]
    return (
        (found[0][0] / 1024, found[0][1] / 1024)
        if found and len(found[0]) == 2 and found[0][0] is not None and found[0][1] is not None
        else None
    )


def _residents(settings: Settings) -> tuple[Resident, ...]:
    rows = [
        row
        for row in _ask(settings, "--query-compute-apps=pid,process_name,used_memory")
        if len(row) == 3 and row[0].isdigit()
    ]
    held = [(row, _mib(row[2])) for row in rows]
    return tuple(
        Resident(int(row[0]), Path(row[1]).name, mib / 1024 if mib is not None else None)
        for row, mib in held
    )


def _mib(word: str) -> float | None:
    return float(word) if word.replace(".", "", 1).isdigit() else None


def _ask(settings: Settings, query: str) -> list[list[str]]:
    environment = settings.child_environment("plain")
    program = shutil.which("nvidia-smi", path=environment.get("PATH", ""))
    if program is None:
        return []
    bound = ["timeout", "-k", f"{GPU_KILL_S:g}", f"{GPU_QUERY_S:g}"]
    try:
        done = process.capture(
            [*bound, program, query, "--format=csv,noheader,nounits"],
            env=environment,
            timeout_s=GPU_QUERY_S + GPU_KILL_S + 0.5,
        )
    except ToolchainError:
        return []
    return (
        [
            [word.strip() for word in line.split(",")]
            for line in done.stdout.splitlines()
            if line.strip()
        ]
        if done.returncode == 0
        else []
    )


SHARE, SEQUENCES, LENGTH = "--gpu-memory-utilization", "--max-num-seqs", "--max-model-len"
# vLLM's own default, where a GPU is not one of the largest (vllm/engine/arg_utils.py).
DEFAULT_SEQUENCES = 256
STEP, LEAST_SHARE, LEAST_LENGTH = 0.1, 0.05, 256
# Less page cache than this is not worth a command.
WORTHWHILE_GIB = 1.0


def next_step(
    name: str,
    recipe: Recipe,
    command: Command,
    free: Free,
    *,
    lack: Lack,
    length: int | None,
    detach: bool = False,
) -> str | None:
    """Return the next command, None where nothing is left to lower. `length` is the model's own
    longest, where it is known.

    In turn: page cache given back, a smaller share, half the sequences, half the length; where only
    the cache was too small, the length.
    """
    if lack == "memory" and free.is_unified and free.droppable_gib >= WORTHWHILE_GIB:
        return f"./scripts/inv drop-caches && {typed(name, command.extra, detach=detach)}"
    rungs = (
        [_length(recipe, command, length)]
        if lack == "cache"
        else [
            _share(recipe, command),
            _sequences(recipe, command),
            _length(recipe, command, length),
        ]
    )
    there = [(taken, flag, value) for rung in rungs if rung for taken, flag, value in [rung]]
    if not there:
        return None
    _, flag, value = min(there, key=lambda rung: rung[0])
    return typed(name, replaced(command.extra, flag, value), detach=detach)


def _share(recipe: Recipe, command: Command) -> tuple[int, str, str] | None:
    first, now = (
        _number_or(recipe.flags.get(SHARE[2:]), DEFAULT_UTILIZATION),
        _said(command.words, SHARE, DEFAULT_UTILIZATION),
    )
    lower = round(now - STEP, 2)
    return (
        (max(0, round((first - now) / STEP)), SHARE, f"{lower:g}") if lower >= LEAST_SHARE else None
    )


def _sequences(recipe: Recipe, command: Command) -> tuple[int, str, str] | None:
    first, now = (
        _number_or(recipe.flags.get(SEQUENCES[2:]), DEFAULT_SEQUENCES),
        _said(command.words, SEQUENCES, DEFAULT_SEQUENCES),
    )
    return (_halved(first, now), SEQUENCES, str(int(now) // 2)) if now >= 2 else None


def _length(recipe: Recipe, command: Command, length: int | None) -> tuple[int, str, str] | None:
    first = _number_or(recipe.flags.get(LENGTH[2:]), float(length or 0))
    now = _said(command.words, LENGTH, first)
    return (_halved(first, now), LENGTH, str(int(now) // 2)) if now >= 2 * LEAST_LENGTH else None


def _halved(first: float, now: float) -> int:
    return max(0, round(math.log2(first / now))) if first > 0 and now > 0 else 0


def _said(words: Sequence[str], flag: str, otherwise: float) -> float:
    return _number_or(flags.last(words, flag), otherwise)


def _number_or(said: object, otherwise: float) -> float:
    try:
        return float(str(said))
    except ValueError:
        return otherwise


NAME_WIDTH = 16
_STATES: dict[Verdict, State] = {"yes": "ok", "after drop-caches": "warn", "no": "warn"}
_DEVICES = {"cuda": "on the GPU", "cpu": "on the processor"}


def show_recipes(
    layout: Layout, settings: Settings, *, console: Console, as_json: bool = False
) -> None:
    """Print the recipes; as JSON on stdout where a program asks. A recipe with something wrong in
    it is a row that says so.
    """
    device = Case(layout, settings, device=None, kernels=settings.text("KERNELS")).device
    free = observe(settings, device=device)
    version = pins.load(layout.pins).vllm.version
    rows: list[dict[str, object]] = []
    for name in recipes.names(layout):
        try:
            recipe = recipes.load(layout, name, version=version)
        except SettingsError as exc:
            rows.append({"name": name, "error": exc.message})
            if not as_json:
                console.row("FAIL", f"{name:<{NAME_WIDTH}}", exc.message)
            continue
        judged = judge(
            recipe,
            free,
            device=device,
            environment=run_environment.run_variables(
                layout, settings, stack=None, recipe=recipe.environment
            ),
        )
        there = models.found_weights(layout, settings, recipe)
        place = (
            f"on disk: {there}"
            if there
            else (
                f"to be fetched, {recipe.fetch_gib:.1f} GiB"
                if recipe.fetch_gib
                else "made at its first start"
            )
        )
        if not as_json:
            remote = (
                "; runs code of the model's authors (trust-remote-code)"
                if recipe.asks_for_remote_code
                else ""
            )
            hint = f"; {judged.hint}" if judged.hint and "serve.list" not in judged.hint else ""
            text = (
                f"fits {_DEVICES[device]}: {judged.verdict}; needs {judged.needs_gib:.1f} GiB, free"
                f" {free.available_gib:.1f}; {place}{remote}"
            )
            console.row(_STATES[judged.verdict], f"{name:<{NAME_WIDTH}}", text + hint)
        rows.append(
            {
                "name": name,
                "model": recipe.model,
                "summary": recipe.summary,
                "fits": judged.verdict,
                "needs_gib": round(judged.needs_gib, 2),
                "takes_gib": round(judged.takes_gib, 2),
                "on_disk": str(there) if there else None,
                "fetch_gib": recipe.fetch_gib,
                "hint": judged.hint,
            }
        )
    if as_json:
        memory = {
            "total_gib": round(free.total_gib, 2),
            "available_gib": round(free.available_gib, 2),
            "droppable_gib": round(free.droppable_gib, 2),
        }
        console.data(
            json.dumps({"schema": 1, "device": device, "memory": memory, "rows": rows}, indent=1)
        )
