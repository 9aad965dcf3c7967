"""The record of one smoke: one JSON document that says what was judged, on what, and where. Read by `inv status` and by the gate."""

import contextlib
import datetime
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from workspace.build import plan
from workspace.core.files import read_regular
from workspace.core.layout import Layout
from workspace.environment.machine import Machine
from workspace.smoke.checks import Check, Verdict

SCHEMA = 2
# What of the parity probe's document is worth comparing between days; the tokens themselves are not in it.
_MEASURES = ("models", "consistency", "device", "gpu", "seconds")


@dataclass(frozen=True)
class Tree:
    """What vendor/vllm held: the tree of its commit, and a digest of edits on top, None without. `built` is one of everything that was stamped."""

    pin: str
    commit: str | None
    oid: str | None
    dirty: str | None
    built: str | None = None


def verdict(checks: Sequence[Check]) -> Verdict:
    """Pass where there are checks, some pass and none fails; whether one may be skipped was judged before."""
    said = {check.verdict for check in checks}
    return "pass" if "pass" in said and "fail" not in said else "fail"


def tree(layout: Layout, observed: plan.Observation) -> Tree:
    """Name the sources that are judged; edited files count with their content as it is now."""
    stack = observed.stack
    return Tree(observed.pin.tag, stack.head if stack else None, stack.tree if stack else None, plan.edits_digest(layout, stack), _built(observed))


def is_of(said: Mapping[str, object], now: Tree) -> bool:
    """Whether a record is of a smoke that passed on this tree, these edits and this build."""
    return (
        said.get("verdict") == "pass"
        and now.oid is not None
        and all(said.get(name) == text for name, text in (("tree", now.oid), ("dirty", now.dirty), ("built", now.built)))
    )


def _built(observed: plan.Observation) -> str:
    stamps = [asdict(layer.recorded) if layer.recorded else None for layer in (observed.environment, observed.kernels)]
    # How long it took, and with how many jobs, is no part of what was built.
    parts = [{name: stamp[name] for name in ("inputs", "packages", "libraries")} if stamp else None for stamp in stamps]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def compose(checks: Sequence[Check], *, level: str, tree: Tree, machine: Machine, parity: Mapping[str, object], seconds: float) -> dict[str, object]:
    """Put the record together. Times are UTC, durations seconds, differences nats."""
    torch = parity.get("torch")
    vllm = parity.get("vllm")
    return {
        "schema": SCHEMA,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "verdict": verdict(checks),
        "level": level,
        "pin": tree.pin,
        "commit": tree.commit,
        "tree": tree.oid,
        "dirty": tree.dirty,
        "built": tree.built,
        "checks": [_row(check) for check in checks],
        "versions": {
            "vllm": vllm.get("version") if isinstance(vllm, dict) else None,
            "torch": torch.get("version") if isinstance(torch, dict) else None,
            "cuda": torch.get("cuda") if isinstance(torch, dict) else None,
            "triton": parity.get("triton"),
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
    row: dict[str, object] = {
        "id": check.identifier,
        "meaning": check.meaning,
        "verdict": check.verdict,
        "evidence": check.evidence,
        "seconds": round(check.seconds, 2),
    }
    return row | ({"problems": list(check.problems)} if check.problems else {})


def encode(record: Mapping[str, object]) -> str:
    return json.dumps(record, indent=1, allow_nan=False)


def last(layout: Layout) -> Mapping[str, object]:
    """What the last smoke wrote, nothing where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        said = json.loads(read_regular(layout.smoke_record))
        return said if isinstance(said, dict) else {}
    return {}
