"""Whether a model fits: what it needs, what is free, and what to write if it does not fit.

On a Spark GPU and processor share one memory: vLLM counts what the kernel calls available there
(vllm/utils/mem_utils.py, psutil), droppable page cache included, while CUDA needs free memory.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from workspace.core import hints, records
from workspace.core.errors import counted
from workspace.machine import hardware
from workspace.machine.failures import Lack
from workspace.machine.gpu import Driver, Resident
from workspace.machine.hardware import GIB
from workspace.machine.machine import Machine
from workspace.server import flags, models
from workspace.server.command import Command, replaced, typed
from workspace.server.recipes import DEFAULT_UTILIZATION, Recipe

Verdict = Literal["yes", "after drop-caches", "no"]
# Memory for the rest of the machine: a suggestion leaves at least this free.
MARGIN_GIB = 2.0
# A smaller cache serves one short request at a time.
LEAST_KV_GIB = 0.5
SHARE, SEQUENCES, LENGTH = flags.SHARE, "--max-num-seqs", "--max-model-len"
# vLLM's own default, except on the largest GPUs (vllm/engine/arg_utils.py).
DEFAULT_SEQUENCES = 256
STEP, LEAST_SHARE, LEAST_LENGTH = 0.1, 0.05, 256
# Less page cache is not worth a command.
WORTHWHILE_GIB = 1.0
# How many steps were taken already, the flag, and its next value.
_Step = tuple[int, str, str]
# Worst last.
_VERDICTS: tuple[Verdict, ...] = ("yes", "after drop-caches", "no")
# vllm/engine/arg_utils.py.
_SHORT = {
    "tensor-parallel-size": "-tp",
    "pipeline-parallel-size": "-pp",
    "data-parallel-size": "-dp",
    "data-parallel-size-local": "-dpl",
    "data-parallel-rank": "-dpr",
    "prefill-context-parallel-size": "-pcp",
    "nnodes": "-n",
}


@dataclass(frozen=True)
class Free:
    """Memory that a model may take: the GPU's own, or the machine's if there is no GPU or it has no
    memory of its own (`is_unified`).

    `available_gib` includes memory that the kernel frees on demand; `droppable_gib` of it is page
    cache and not free yet. `gpu` names the GPU on a machine that has several;
    `host_gib` is available beside a GPU's own. `promised_gib` is what other servers of this clone
    will still take; it is not available.
    """

    total_gib: float
    available_gib: float
    droppable_gib: float
    is_unified: bool
    residents: tuple[Resident, ...] = ()
    gpu: str = ""
    host_gib: float = 0.0
    promised_gib: float = 0.0

    @property
    def beside(self) -> str:
        promised = f"{self.promised_gib:.1f} GiB that other servers here will still take"
        return f" beside {promised}" if self.promised_gib else ""

    def without(self, promised_gib: float) -> "Free":
        left = max(0.0, self.available_gib - promised_gib)
        return replace(self, available_gib=left, promised_gib=promised_gib)


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


def observe(
    machine: Machine,
    *,
    device: str,
    environment: Mapping[str, str] | None = None,
    args: Sequence[str] = (),
) -> tuple[Free, ...]:
    """Return the memory of each GPU that environment and flags show to vLLM, in its order; without
    a GPU the machine's. A driver that does not answer counts as no GPU.

    CUDA_VISIBLE_DEVICES numbers the GPUs as the driver does where CUDA_DEVICE_ORDER is PCI_BUS_ID,
    and vLLM asks for that where the GPUs differ (vllm/platforms/cuda.py).
    """
    host = machine.host()
    droppable = hardware.droppable_gib(hardware.read_meminfo())
    shared = Free(
        host.memory_gib, host.available_gib, min(droppable, host.available_gib), is_unified=False
    )
    if device != "cuda" or not machine.gpus:
        return (shared,)
    driver = machine.driver
    residents = tuple(map(_shortened, driver.residents()))
    frees = []
    shown = _visible(driver, (environment or {}).get("CUDA_VISIBLE_DEVICES"))
    for number in _chosen(driver, shown, flags.last(args, "--device-ids")):
        own = driver.memories()[number]
        name = f"GPU {number}, {machine.gpus[number].name}" if len(machine.gpus) > 1 else ""
        free = (
            Free(own.total_gib, own.free_gib, 0.0, is_unified=False, host_gib=shared.available_gib)
            if own
            else replace(shared, is_unified=True)
        )
        here = tuple(each for each in residents if each.gpu in (None, number))
        frees.append(replace(free, residents=here, gpu=name))
    return tuple(frees)


def _visible(driver: Driver, text: str | None) -> Sequence[int]:
    """Return the numbers of the GPUs that CUDA_VISIBLE_DEVICES shows, all where it is not set.

    CUDA stops at the first entry that names no GPU (CUDA C++ Programming Guide, environment).
    """
    count = len(driver.memories())
    if text is None:
        return range(count)
    numbers: list[int] = []
    for entry in (part.strip() for part in text.split(",")):
        named = [
            number
            for number in range(count)
            if str(number) == entry
            or (entry.startswith("GPU-") and (driver.uuids()[number] or "").startswith(entry))
        ]
        if len(named) != 1:
            break
        numbers += named
    return numbers


def _chosen(driver: Driver, shown: Sequence[int], text: str | None) -> Sequence[int]:
    """Return the GPUs of --device-ids: places in the visible ones, or UUIDs (arg_utils.py)."""
    if not text:
        return shown
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entry.isdigit() for entry in entries):
        return _visible(driver, text)
    return [shown[int(entry)] for entry in entries if int(entry) < len(shown)]


def _shortened(resident: Resident) -> Resident:
    return replace(resident, name=Path(resident.name).name)


def weights_gib(folder: Path) -> float:
    """Return the size of the weights that vLLM loads from a folder, or of one file."""
    found = ([*folder.glob(pattern)] for pattern in models.WEIGHTS)
    files = [folder] if folder.is_file() else next((files for files in found if files), [])
    return sum(path.stat().st_size for path in files if path.is_file()) / GIB


def needs_gib(recipe: Recipe, args: Sequence[str] = ()) -> float:
    """Return the least memory of a model: weights, overhead and the cache of one full sequence."""
    length = _number(recipe, args, "max-model-len", 0.0)
    return _fixed_gib(recipe) + length * recipe.memory.kv_kib_per_token / 2**20


def judge(
    recipe: Recipe,
    frees: Sequence[Free],
    *,
    device: str,
    environment: Mapping[str, str],
    args: Sequence[str] = (),
) -> Fit:
    """Decide whether a model fits into the GPUs that its command line uses; `frees` are the visible
    ones. The GPU with the worst verdict decides.

    The environment is as for `judge_one`.
    """
    split = _split(recipe, args)
    if device == "cuda" and split.local > len(frees):
        return _too_few(recipe, frees, split, args)
    weights, cache = _offloaded(recipe, args)
    offloaded = weights * split.local + cache
    if device == "cuda" and not frees[0].is_unified and offloaded > frees[0].host_gib:
        sentence = (
            f"the model does not fit: {offloaded:.1f} GiB are to be offloaded, and"
            f" {frees[0].host_gib:.1f} GiB of the machine's memory are available"
        )
        hint = hints.text("server.recipes_fit")
        return Fit("no", needs_gib(recipe, args), offloaded, frees[0], sentence, hint)
    used = frees[: split.local] if device == "cuda" else frees[:1]
    judged = []
    for free in used:
        part = _part(recipe, args, split, free) if device == "cuda" else recipe
        judged.append(judge_one(part, free, device=device, environment=environment, args=args))
    return max(judged, key=lambda fit: _VERDICTS.index(fit.verdict))


@dataclass(frozen=True)
class _Split:
    """How a command line divides a model: `parts` hold it once, `local` GPUs work on this machine,
    `sentence` has the factors.
    """

    parts: int
    local: int
    sentence: str


def parallel_sizes(recipe: Recipe, args: Sequence[str]) -> dict[str, int]:
    """Return into how many parts each kind of parallelism divides the work."""
    return {
        name: max(1, int(_number(recipe, args, f"{name}-parallel-size", 1.0)))
        for name in ("tensor", "pipeline", "data", "prefill-context")
    }


def _split(recipe: Recipe, args: Sequence[str]) -> _Split:
    sizes = parallel_sizes(recipe, args)
    parts = sizes["tensor"] * sizes["pipeline"]
    nodes = max(1, int(_number(recipe, args, "nnodes", float(recipe.nodes))))
    # Every node runs its share of the data-parallel ranks, or of the parts.
    ranks = int(_number(recipe, args, "data-parallel-size-local", float(sizes["data"])))
    if _text(recipe, args, "data-parallel-rank"):
        ranks = 1
    is_elsewhere = _text(recipe, args, "distributed-executor-backend") == "ray"
    local = 1 if is_elsewhere else max(1, parts * sizes["prefill-context"] * ranks // nodes)
    factors = " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return _Split(parts, local, factors)


def _part(recipe: Recipe, args: Sequence[str], split: _Split, free: Free) -> Recipe:
    """Return the recipe with the memory that one GPU holds: weights and cache are divided.

    What is offloaded leaves a GPU with memory of its own, and stays in unified memory.
    """
    weights, cache = _offloaded(recipe, args)
    memory = recipe.memory
    part = replace(
        memory,
        weights_gib=max(
            0.0, memory.weights_gib / split.parts - (0 if free.is_unified else weights)
        ),
        overhead_gib=memory.overhead_gib + (cache if free.is_unified else 0.0),
        kv_kib_per_token=memory.kv_kib_per_token / split.parts,
    )
    return replace(recipe, memory=part)


def _offloaded(recipe: Recipe, args: Sequence[str]) -> tuple[float, float]:
    """Return the GiB of weights of each GPU, and of cache in all, that the machine's memory holds
    (vllm/config/offload.py and cache.py).
    """
    weights = _number(recipe, args, "cpu-offload-gb", 0.0)
    return weights, _number(recipe, args, "kv-offloading-size", 0.0)


def _too_few(recipe: Recipe, frees: Sequence[Free], split: _Split, args: Sequence[str]) -> Fit:
    visible = f"{len(frees)} {'is' if len(frees) == 1 else 'are'} visible"
    factors = f" ({split.sentence})" if split.sentence else ""
    return Fit(
        "no",
        needs_gib(recipe, args),
        0.0,
        frees[0] if frees else Free(0.0, 0.0, 0.0, is_unified=False),
        f"the model takes {counted(split.local, 'GPU')}{factors}, {visible}",
        hints.text("server.gpus"),
    )


def judge_one(
    recipe: Recipe,
    free: Free,
    *,
    device: str,
    environment: Mapping[str, str],
    args: Sequence[str] = (),
) -> Fit:
    """Decide whether a model fits into one GPU, or into the machine. `args` are flags that override
    the recipe's.

    `environment` is the vLLM's: without a GPU VLLM_CPU_KVCACHE_SPACE is the size of the cache.
    """
    needs, fixed = needs_gib(recipe, args), _fixed_gib(recipe)
    given = _given_gib(recipe, args, free, device=device, environment=environment)
    takes = max(needs, given)
    seen = (
        f"needs {needs:.1f} GiB, takes {takes:.1f} GiB; {free.available_gib:.1f} of"
        f" {free.total_gib:.1f} GiB are available{f' on {free.gpu}' if free.gpu else ''}"
        f"{free.beside}"
    )
    residents = ", ".join(_named(resident) for resident in free.residents)
    holding = f"; the GPU is held by {residents}" if residents else ""
    if given < needs <= free.available_gib:
        least = min(1.0, math.ceil((needs + LEAST_KV_GIB) / free.total_gib * 100) / 100)
        hint = hints.text("server.utilization_least", model=_typed(recipe), value=least)
        sentence = f"the model gets too little: {given:.1f} GiB with these flags; {seen}{holding}"
        return Fit("no", needs, given, free, sentence, hint)
    if takes <= free.available_gib:
        is_cached = (
            device == "cuda" and free.is_unified and takes > free.available_gib - free.droppable_gib
        )
        if not is_cached:
            return Fit("yes", needs, takes, free, f"the model fits: {seen}{holding}")
        sentence = (
            f"the model fits once the page cache is dropped: {seen}, {free.droppable_gib:.1f} of"
            f" them are page cache{holding}"
        )
        return Fit(
            "after drop-caches", needs, takes, free, sentence, hints.text("server.drop_caches")
        )
    utilization, kv_gib = _suggestion(free, needs, fixed, device=device)
    hint = _hint(recipe, free, utilization, kv_gib, device=device)
    sentence = f"the model does not fit: {seen}{holding}"
    return Fit("no", needs, takes, free, sentence, hint)


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
    text = _text(recipe, args, flag)
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)([kKmMgGtT]?)", text.strip())
    if found is None:
        return otherwise
    unit = 1000.0 if found[2].islower() else 1024.0
    return float(found[1]) * math.pow(unit, " kmgt".index(found[2].lower()) if found[2] else 0)


def _text(recipe: Recipe, args: Sequence[str], flag: str) -> str:
    """Return a flag's value, by its long or its short name, else the recipe's, else nothing."""
    short = _SHORT.get(flag)
    given = flags.last(args, f"--{flag}") or (flags.last(args, short) if short else None)
    if flag == SHARE[2:]:
        given = given or flags.last(args, "--device-memory-utilization")
    return given or str(recipe.flags.get(flag, ""))


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
    own: tuple[str, ...] = ()


def next_step(attempt: Attempt, free: Free, *, lack: Lack) -> str | None:
    """Return the next command after a lack of memory, None if no value is left to lower.

    The fallbacks take turns: drop page cache, a smaller share, half the sequences, half the length.
    If only the cache was too small, only the length helps.
    """
    name, command = attempt.name, attempt.command
    if lack == "memory" and free.is_unified and free.droppable_gib >= WORTHWHILE_GIB:
        again = typed(name, command.extra, detach=attempt.detach, own=attempt.own)
        return hints.text("server.drop_caches_then", command=again)
    fallbacks = [_length(attempt)]
    if lack == "memory":
        fallbacks = [_share(attempt), _sequences(attempt), *fallbacks]
    steps = [step for step in fallbacks if step]
    if not steps:
        return None
    _, flag, value = min(steps, key=lambda step: step[0])
    return typed(name, replaced(command.extra, flag, value), detach=attempt.detach, own=attempt.own)


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


def length_of(folder: Path | None) -> int | None:
    """Return the longest sequence of a model in tokens, None if its configuration has none."""
    try:
        path = folder / "config.json" if folder and folder.is_dir() else None
        known = records.load(path, dict[str, object]) if path else None
    except records.DecodeError:
        return None
    found = known.get("max_position_embeddings") if known else None
    return found if isinstance(found, int) else None
