"""Whether a model fits: what it needs, what is free, and what to write if it does not fit.

On a Spark GPU and processor share one memory: vLLM counts what the kernel calls available there
(vllm/utils/mem_utils.py, psutil), droppable page cache included, while CUDA needs free memory.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from workspace.core import hints
from workspace.core.console import Console, Row, State
from workspace.core.errors import SettingsError
from workspace.machine import hardware, run_environment
from workspace.machine.failures import Lack
from workspace.machine.gpu import Resident
from workspace.machine.hardware import GIB
from workspace.machine.machine import Case, Machine
from workspace.repo import pins
from workspace.server import flags, models, recipes
from workspace.server.command import Command, replaced, typed
from workspace.server.recipes import DEFAULT_UTILIZATION, Recipe

Verdict = Literal["yes", "after drop-caches", "no"]
# Memory for the rest of the machine: a suggestion leaves at least this free.
MARGIN_GIB = 2.0
# A smaller cache serves one short request at a time.
LEAST_KV_GIB = 0.5
SHARE, SEQUENCES, LENGTH = "--gpu-memory-utilization", "--max-num-seqs", "--max-model-len"
# vLLM's own default, except on the largest GPUs (vllm/engine/arg_utils.py).
DEFAULT_SEQUENCES = 256
STEP, LEAST_SHARE, LEAST_LENGTH = 0.1, 0.05, 256
# Less page cache is not worth a command.
WORTHWHILE_GIB = 1.0
# How many steps were taken already, the flag, and its next value.
_Step = tuple[int, str, str]
_STATES: dict[Verdict, State] = {"yes": State.OK, "after drop-caches": State.WARN, "no": State.WARN}
_DEVICES = {"cuda": "on the GPU", "cpu": "on the processor"}


@dataclass(frozen=True)
class Free:
    """Memory that a model may take: the GPU's own, or the machine's if there is no GPU or it has no
    memory of its own (`is_unified`).

    `available_gib` includes memory that the kernel frees on demand; `droppable_gib` of it is page
    cache and not free yet.
    """

    total_gib: float
    available_gib: float
    droppable_gib: float
    is_unified: bool
    residents: tuple[Resident, ...] = ()


@dataclass(frozen=True)
class Fit:
    """Whether a model fits. `needs_gib` is the least, with one sequence of full length; `takes_gib`
    is what vLLM takes with these flags.

    `utilization` and `kv_gib` are smaller values that fit, None if none does; `hint` is the next
    command.
    """

    verdict: Verdict
    needs_gib: float
    takes_gib: float
    free: Free
    sentence: str
    hint: str | None = None
    utilization: float | None = None
    kv_gib: float | None = None


def observe(machine: Machine, *, device: str) -> Free:
    """Return the memory of machine and GPU; a driver that does not answer counts as no GPU."""
    host = machine.host()
    droppable = hardware.droppable_gib(hardware.read_meminfo())
    shared = Free(
        host.memory_gib, host.available_gib, min(droppable, host.available_gib), is_unified=False
    )
    if device != "cuda" or not machine.gpus:
        return shared
    driver = machine.driver
    own, residents = driver.memory(), tuple(map(_shortened, driver.residents()))
    if own is None:
        return replace(shared, is_unified=True, residents=residents)
    return Free(own.total_gib, own.free_gib, 0.0, is_unified=False, residents=residents)


def _shortened(resident: Resident) -> Resident:
    return replace(resident, name=Path(resident.name).name)


def needs_gib(recipe: Recipe, args: Sequence[str] = ()) -> float:
    """Return the least memory of a model: weights, overhead and the cache of one full sequence."""
    length = _number(recipe, args, "max-model-len", 0.0)
    return _fixed_gib(recipe) + length * recipe.memory.kv_kib_per_token / 2**20


def judge(
    recipe: Recipe,
    free: Free,
    *,
    device: str,
    environment: Mapping[str, str],
    args: Sequence[str] = (),
) -> Fit:
    """Decide whether a model fits. `args` are flags that override the recipe's.

    `environment` is the vLLM's: without a GPU VLLM_CPU_KVCACHE_SPACE is the size of the cache.
    """
    needs, fixed = needs_gib(recipe, args), _fixed_gib(recipe)
    given = _given_gib(recipe, args, free, device=device, environment=environment)
    takes = max(needs, given)
    seen = (
        f"needs {needs:.1f} GiB, takes {takes:.1f} GiB; {free.available_gib:.1f} of"
        f" {free.total_gib:.1f} GiB are available"
    )
    residents = ", ".join(_named(resident) for resident in free.residents)
    holding = f"; the GPU is held by {residents}" if residents else ""
    if given < needs <= free.available_gib:
        least = min(1.0, math.ceil((needs + LEAST_KV_GIB) / free.total_gib * 100) / 100)
        hint = hints.text("server.utilization_least", model=_typed(recipe), value=least)
        sentence = f"is given too little: {given:.1f} GiB with these flags; {seen}{holding}"
        return Fit("no", needs, given, free, sentence, hint, least)
    if takes <= free.available_gib:
        is_cached = (
            device == "cuda" and free.is_unified and takes > free.available_gib - free.droppable_gib
        )
        if not is_cached:
            return Fit("yes", needs, takes, free, f"fits: {seen}{holding}")
        sentence = (
            f"fits once page cache is dropped: {seen}, {free.droppable_gib:.1f} of them are page"
            f" cache{holding}"
        )
        return Fit(
            "after drop-caches", needs, takes, free, sentence, hints.text("server.drop_caches")
        )
    utilization, kv_gib = _suggestion(free, needs, fixed, device=device)
    hint = _hint(recipe, free, utilization, kv_gib, device=device)
    sentence = f"does not fit: {seen}{holding}"
    return Fit("no", needs, takes, free, sentence, hint, utilization, kv_gib)


def _fixed_gib(recipe: Recipe) -> float:
    return recipe.memory.weights_gib + recipe.memory.overhead_gib


def _given_gib(
    recipe: Recipe,
    args: Sequence[str],
    free: Free,
    *,
    device: str,
    environment: Mapping[str, str],
) -> float:
    """Return the memory that flags and environment give to vLLM."""
    if kv_bytes := _number(recipe, args, "kv-cache-memory-bytes", 0.0):
        return _fixed_gib(recipe) + kv_bytes / GIB
    cache_gib = environment.get("VLLM_CPU_KVCACHE_SPACE", "")
    if device == "cpu" and cache_gib.isdigit():
        return _fixed_gib(recipe) + int(cache_gib)
    # The flag counts without a GPU as well, despite its name (vllm/v1/worker/cpu_worker.py).
    return _number(recipe, args, "gpu-memory-utilization", DEFAULT_UTILIZATION) * free.total_gib


def _number(recipe: Recipe, args: Sequence[str], flag: str, otherwise: float) -> float:
    """Return a flag's value as a number, with a suffix as in 32k or 4G
    (vllm/utils/argparse_utils.py, human_readable_int).
    """
    text = flags.last(args, f"--{flag}") or str(recipe.flags.get(flag, ""))
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)([kKmMgGtT]?)", text.strip())
    if found is None:
        return otherwise
    unit = 1000.0 if found[2].islower() else 1024.0
    return float(found[1]) * math.pow(unit, " kmgt".index(found[2].lower()) if found[2] else 0)


def _suggestion(
    free: Free, needs: float, fixed: float, *, device: str
) -> tuple[float | None, float | None]:
    """Return a utilization, and a size of the cache in GiB, that fit into the free memory."""
    usable = free.available_gib - MARGIN_GIB
    kv_gib = math.floor((usable - fixed) * 10) / 10
    if usable < needs or kv_gib < min(LEAST_KV_GIB, max(0.0, needs - fixed)):
        return None, None
    utilization = math.floor(usable / free.total_gib * 100) / 100
    return (utilization if device == "cuda" else None), kv_gib


def _typed(recipe: Recipe) -> str:
    """Return what a user types for a recipe."""
    return recipe.name or recipe.model


def _hint(
    recipe: Recipe, free: Free, utilization: float | None, kv_gib: float | None, *, device: str
) -> str:
    if device == "cpu" and kv_gib is not None and kv_gib >= 1:
        return hints.text("server.cpu_cache", gib=math.floor(kv_gib))
    if utilization is not None and kv_gib is not None:
        return hints.text(
            "server.less_memory",
            model=_typed(recipe),
            utilization=utilization,
            bytes=math.floor(kv_gib * GIB),
        )
    if free.residents:
        pids = " ".join(str(resident.pid) for resident in free.residents)
        return hints.text("server.end_processes", pids=pids)
    return hints.text("server.recipes_fit")


def _named(resident: Resident) -> str:
    held = f", {resident.held_gib:.1f} GiB" if resident.held_gib is not None else ""
    return f"{resident.pid} ({resident.name}{held})"


@dataclass(frozen=True)
class Attempt:
    """A start that lacked memory: the name that the user typed, the recipe, the command line.

    `length` is the longest sequence of the model in tokens, None if it is not known.
    """

    name: str
    recipe: Recipe
    command: Command
    length: int | None = None
    detach: bool = False


def next_step(attempt: Attempt, free: Free, *, lack: Lack) -> str | None:
    """Return the next command after a lack of memory, None if no value is left to lower.

    The fallbacks take turns: drop page cache, a smaller share, half the sequences, half the length.
    If only the cache was too small, only the length helps.
    """
    name, command = attempt.name, attempt.command
    if lack == "memory" and free.is_unified and free.droppable_gib >= WORTHWHILE_GIB:
        again = typed(name, command.extra, detach=attempt.detach)
        return hints.text("server.drop_caches_then", command=again)
    fallbacks = [_length(attempt)]
    if lack == "memory":
        fallbacks = [_share(attempt), _sequences(attempt), *fallbacks]
    steps = [step for step in fallbacks if step]
    if not steps:
        return None
    _, flag, value = min(steps, key=lambda step: step[0])
    return typed(name, replaced(command.extra, flag, value), detach=attempt.detach)


def _share(attempt: Attempt) -> _Step | None:
    first, now = _first_and_now(attempt, SHARE, DEFAULT_UTILIZATION)
    lower = round(now - STEP, 2)
    if lower < LEAST_SHARE:
        return None
    return max(0, round((first - now) / STEP)), SHARE, f"{lower:g}"


def _sequences(attempt: Attempt) -> _Step | None:
    first, now = _first_and_now(attempt, SEQUENCES, DEFAULT_SEQUENCES)
    return (_halvings(first, now), SEQUENCES, str(int(now) // 2)) if now >= 2 else None


def _length(attempt: Attempt) -> _Step | None:
    first = _number_or(attempt.recipe.flags.get(LENGTH[2:]), float(attempt.length or 0))
    now = _number_or(flags.last(attempt.command.args, LENGTH), first)
    return (_halvings(first, now), LENGTH, str(int(now) // 2)) if now >= 2 * LEAST_LENGTH else None


def _first_and_now(attempt: Attempt, flag: str, default: float) -> tuple[float, float]:
    """Return a flag's value in the recipe and its value on the command line."""
    first = _number_or(attempt.recipe.flags.get(flag[2:]), default)
    return first, _number_or(flags.last(attempt.command.args, flag), default)


def _halvings(first: float, now: float) -> int:
    return max(0, round(math.log2(first / now))) if first > 0 and now > 0 else 0


def _number_or(value: object, otherwise: float) -> float:
    try:
        return float(str(value))
    except ValueError:
        return otherwise


def _row(recipe: Recipe, fit: Fit, folder: Path | None, *, device: str) -> Row:
    """Return the row of a recipe; `folder` holds its weights, None if they are not on disk."""
    if folder:
        place = f"on disk: {folder}"
    elif recipe.fetch_gib:
        place = f"{recipe.fetch_gib:.1f} GiB to fetch"
    else:
        place = "made at its first start"
    if recipe.asks_for_remote_code:
        place += "; runs code of the model's authors (trust-remote-code)"
    return Row(
        _STATES[fit.verdict],
        recipe.name,
        f"fits {_DEVICES[device]}: {fit.verdict}; needs {fit.needs_gib:.1f} GiB,"
        f" {fit.free.available_gib:.1f} GiB are free; {place}",
        hint=fit.hint if fit.hint and "serve.list" not in fit.hint else None,
    )


def _record(recipe: Recipe, fit: Fit, folder: Path | None) -> dict[str, object]:
    return {
        "name": recipe.name,
        "model": recipe.model,
        "summary": recipe.summary,
        "fits": fit.verdict,
        "needs_gib": round(fit.needs_gib, 2),
        "takes_gib": round(fit.takes_gib, 2),
        "on_disk": str(folder) if folder else None,
        "fetch_gib": recipe.fetch_gib,
        "hint": fit.hint,
    }


def show_recipes(machine: Machine, *, console: Console, as_json: bool = False) -> None:
    """Print the recipes, or their records as JSON. A damaged recipe is a row with its error."""
    layout, settings, device = machine.layout, machine.settings, Case(machine).device
    free = observe(machine, device=device)
    version = pins.load(layout.pins).vllm.version
    records: list[dict[str, object]] = []
    rows: list[Row] = []
    for name in recipes.names(layout):
        try:
            recipe = recipes.load(layout, name, version=version)
        except SettingsError as exc:
            records.append({"name": name, "error": exc.message})
            rows.append(Row(State.FAIL, name, exc.message))
            continue
        environment = run_environment.built_environment(
            layout, settings, "serve", stack=None, recipe=recipe.environment
        )
        judged = judge(recipe, free, device=device, environment=environment)
        folder = models.found_weights(layout, settings, recipe)
        rows.append(_row(recipe, judged, folder, device=device))
        records.append(_record(recipe, judged, folder))
    if as_json:
        memory = {
            "total_gib": round(free.total_gib, 2),
            "available_gib": round(free.available_gib, 2),
            "droppable_gib": round(free.droppable_gib, 2),
        }
        document = {"schema": 1, "device": device, "memory": memory, "rows": records}
        console.data(json.dumps(document, indent=1))
    else:
        console.rows(rows)
