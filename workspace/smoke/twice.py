"""Which of the two it was: where vLLM and Hugging Face differ, both are asked once more, and one may not say the same again.

On one machine a right answer comes back bit for bit; an answer that does not is a race, memory that nobody wrote, or a processor that errs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from workspace.smoke.checks import Check

# Nats: a tenth of what parity allows. GPU kernels may add in another order the next time.
STEADY = 1e-4


@dataclass(frozen=True)
class Said:
    """The files of one round: the rows of each model as Hugging Face has them, and as vLLM has."""

    reference: Path
    vllm: Path


def settled(first: Check, second: Check, *, name: str, before: Said, after: Said) -> Check:
    """Return the verdict on a model whose parity failed. A failure stays one, but where the reference alone has changed, which then was none."""
    reference = _is_same(rows(before.reference, name), rows(after.reference, name))
    vllm = _is_same(rows(before.vllm, name), rows(after.vllm, name))
    seconds = first.seconds + second.seconds
    if not reference and vllm:
        return replace(second, evidence=f"{second.evidence}; what Hugging Face said before ({first.evidence}) it does not say again", seconds=seconds)
    if reference and vllm:
        told = "both say the same again"
    elif reference:
        told = f"vLLM does not say the same again, but {second.evidence}"
    else:
        told = f"neither of the two says the same again, but {second.evidence}"
    return replace(first, evidence=f"{first.evidence}; {told}", seconds=seconds)


def rows(file: Path, name: str) -> list[Mapping[str, object]]:
    """The rows of a model in a document of probes/reference.py or probes/parity.py --keep; none where there are none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["models"][name]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def _is_same(before: list[Mapping[str, object]], after: list[Mapping[str, object]]) -> bool:
    if not before or len(before) != len(after):
        return False
    return all(
        one.get("tokens") == other.get("tokens") and _is_near(one.get("logprobs"), other.get("logprobs")) for one, other in zip(before, after, strict=True)
    )


def _is_near(before: object, after: object) -> bool:
    if not isinstance(before, list) or not isinstance(after, list) or len(before) != len(after):
        return False
    pairs = zip(before, after, strict=True)
    return all(isinstance(one, float) and isinstance(other, float) and abs(one - other) < STEADY for one, other in pairs)
