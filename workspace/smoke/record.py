"""The record of one smoke: one JSON document that says what was judged, on what, and where. Read by `inv status` and by the gate."""

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from workspace.build import plan
from workspace.core.layout import Layout
from workspace.environment.machine import Machine
from workspace.smoke.checks import Check, Verdict

SCHEMA = 1
# What of the parity probe's document is worth comparing between days; the tokens themselves are not.
_MEASURES = ("equal", "total", "compared", "max_difference", "margin", "not_finite", "device", "gpu", "seconds")


@dataclass(frozen=True)
class Tree:
    """What vendor/vllm held: the tree of its commit, and a digest of edits on top, None without."""

    pin: str
    commit: str | None
    oid: str | None
    dirty: str | None


def verdict(checks: Sequence[Check]) -> Verdict:
    """Pass where there are checks and all pass."""
    return "pass" if checks and all(check.verdict == "pass" for check in checks) else "fail"


def tree(layout: Layout, observed: plan.Observation) -> Tree:
    """Name the sources that are judged; edited files count with their content as it is now."""
    stack = observed.stack
    return Tree(observed.pin.tag, stack.head if stack else None, stack.tree if stack else None, plan.edits_digest(layout, stack))


def compose(checks: Sequence[Check], *, tree: Tree, machine: Machine, parity: Mapping[str, object], seconds: float) -> dict[str, object]:
    """Put the record together. Times are UTC, durations seconds, differences nats."""
    torch = parity.get("torch")
    vllm = parity.get("vllm")
    return {
        "schema": SCHEMA,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "verdict": verdict(checks),
        "pin": tree.pin,
        "commit": tree.commit,
        "tree": tree.oid,
        "dirty": tree.dirty,
        "checks": [_row(check) for check in checks],
        "versions": {
            "vllm": vllm.get("version") if isinstance(vllm, dict) else None,
            "torch": torch.get("version") if isinstance(torch, dict) else None,
            "cuda": torch.get("cuda") if isinstance(torch, dict) else None,
            "transformers": parity.get("transformers"),
            "python": parity.get("python"),
        },
        "parity": {name: _writable(parity[name]) for name in _MEASURES if name in parity},
        "seconds": round(seconds, 2),
        "machine": asdict(machine),
    }


def _writable(measured: object) -> object:
    """JSON has no word for a number that is none."""
    if isinstance(measured, dict):
        return {name: _writable(part) for name, part in measured.items()}
    return None if isinstance(measured, float) and not math.isfinite(measured) else measured


def _row(check: Check) -> dict[str, object]:
    return {"id": check.identifier, "meaning": check.meaning, "verdict": check.verdict, "evidence": check.evidence, "seconds": round(check.seconds, 2)}


def encode(record: Mapping[str, object]) -> str:
    return json.dumps(record, indent=1, allow_nan=False)
