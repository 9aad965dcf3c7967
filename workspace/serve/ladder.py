"""What to try next when a server dies for want of memory: one rung at a time, as a command that can be copied. Pure."""

import math
from collections.abc import Sequence

from workspace.engine import flags
from workspace.engine.failures import Lack
from workspace.serve.command import Command, replaced, typed
from workspace.serve.fit import Free
from workspace.serve.recipes import DEFAULT_UTILIZATION, Recipe

SHARE, SEQUENCES, LENGTH = "--gpu-memory-utilization", "--max-num-seqs", "--max-model-len"
# vLLM's own default, where a GPU is not one of the largest (vllm/engine/arg_utils.py).
DEFAULT_SEQUENCES = 256
STEP, LEAST_SHARE, LEAST_LENGTH = 0.1, 0.05, 256
# Less page cache than this is not worth a command.
WORTHWHILE_GIB = 1.0


def next_rung(name: str, recipe: Recipe, command: Command, free: Free, *, lack: Lack, length: int | None, detach: bool = False) -> str | None:
    """Return the next command, None where nothing is left to lower. `length` is the model's own longest, where it is known.

    In turn: page cache given back, a smaller share, half the sequences, half the length; where only the cache was too small, the length.
    """
    if lack == "memory" and free.is_unified and free.droppable_gib >= WORTHWHILE_GIB:
        return f"./scripts/inv drop-caches && {typed(name, command.extra, detach=detach)}"
    rungs = [_length(recipe, command, length)] if lack == "cache" else [_share(recipe, command), _sequences(recipe, command), _length(recipe, command, length)]
    there = [(taken, flag, value) for rung in rungs if rung for taken, flag, value in [rung]]
    if not there:
        return None
    _, flag, value = min(there, key=lambda rung: rung[0])
    return typed(name, replaced(command.extra, flag, value), detach=detach)


def _share(recipe: Recipe, command: Command) -> tuple[int, str, str] | None:
    first, now = _number(recipe.flags.get(SHARE[2:]), DEFAULT_UTILIZATION), _said(command.words, SHARE, DEFAULT_UTILIZATION)
    lower = round(now - STEP, 2)
    return (max(0, round((first - now) / STEP)), SHARE, f"{lower:g}") if lower >= LEAST_SHARE else None


def _sequences(recipe: Recipe, command: Command) -> tuple[int, str, str] | None:
    first, now = _number(recipe.flags.get(SEQUENCES[2:]), DEFAULT_SEQUENCES), _said(command.words, SEQUENCES, DEFAULT_SEQUENCES)
    return (_halved(first, now), SEQUENCES, str(int(now) // 2)) if now >= 2 else None


def _length(recipe: Recipe, command: Command, length: int | None) -> tuple[int, str, str] | None:
    first = _number(recipe.flags.get(LENGTH[2:]), float(length or 0))
    now = _said(command.words, LENGTH, first)
    return (_halved(first, now), LENGTH, str(int(now) // 2)) if now >= 2 * LEAST_LENGTH else None


def _halved(first: float, now: float) -> int:
    return max(0, round(math.log2(first / now))) if first > 0 and now > 0 else 0


def _said(words: Sequence[str], flag: str, otherwise: float) -> float:
    return _number(flags.last(words, flag), otherwise)


def _number(said: object, otherwise: float) -> float:
    try:
        return float(str(said))
    except ValueError:
        return otherwise
