"""The verdicts of the smoke: pure functions from what a probe found, and what was stamped, to pass or fail with evidence.

Identifiers are stable: records of different days are compared by them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Verdict = Literal["pass", "fail"]

# Nats. Measured with vLLM 0.31.0 on an x86-64 CPU, 5 x 64 tokens, decode and prefill: 2e-5 (Qwen3) to 1e-4 (Llama) where all is right, 0.12 with an
# attention scale that is off by 1 %, which left all 320 tokens as they were. The reference's nearest second choice is 1e-2 away, so that within
# the limit no rounding can change a token.
MAX_DIFFERENCE = 1e-3

MEANINGS: Mapping[str, str] = {
    "binary.load": "every compiled library of the tree is the one that was verified, and loads with all symbols bound",
    "provenance.import": "vLLM comes from vendor/vllm and is, with its torch, the one that was installed",
    "parity.llama": f"a tiny Llama says what Hugging Face says: the same greedy tokens, log-probabilities within {MAX_DIFFERENCE:g}",
}


@dataclass(frozen=True)
class Check:
    """One judgement. `evidence` is what was observed, in one sentence; `seconds` what it took to find out."""

    identifier: str
    verdict: Verdict
    evidence: str
    seconds: float

    @property
    def meaning(self) -> str:
        return MEANINGS[self.identifier]


@dataclass(frozen=True)
class Expected:
    """What the stamps say was built. `libraries` maps a path below the tree to its SHA-256."""

    tree: Path
    version: str
    torch: str
    device: Literal["cpu", "cuda"]
    libraries: Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    """What came back from a probe: its document, or in `problem` why there is none."""

    record: Mapping[str, object]
    problem: str | None
    seconds: float


def binary_load(answer: Answer, expected: Expected) -> Check:
    """Judge probes/verify.py's libraries against the stamp's."""
    rows = _rows(answer.record, "libraries")
    problems = [answer.problem] if answer.problem else []
    problems += [str(answer.record["error"])] if answer.record.get("error") else []
    found = {str(row.get("path")): row for row in rows}
    problems += [f"{path}: {row.get('error')}" for path, row in found.items() if row.get("verdict") == "broken"]
    if not problems:
        problems += [f"{path} is missing" for path in expected.libraries if path not in found]
        changed = [path for path, digest in expected.libraries.items() if path in found and found[path].get("sha256") != digest]
        problems += [f"{path} is not the file that was verified" for path in changed]
        problems += [f"{path} was not there when the build was verified" for path in found if path not in expected.libraries]
        problems += [] if found else ["the tree holds no compiled library"]
    skipped = sum(row.get("verdict") in ("other cpu", "other python") for row in rows)
    fine = f"{len(found) - skipped} libraries" + (f", {skipped} for other processors or Pythons not tried" if skipped else "")
    return _check("binary.load", problems, fine, answer.seconds)


def provenance(answer: Answer, expected: Expected) -> Check:
    """Judge which vLLM the process that generated the tokens had imported."""
    record = answer.record
    vllm, torch = _section(record, "vllm"), _section(record, "torch")
    if answer.problem or not vllm.get("file"):
        why = answer.problem or str(record.get("error") or "the probe does not say it")
        return _check("provenance.import", [f"not known which vLLM is imported: {why}"], "", answer.seconds)
    problems = []
    if not Path(str(vllm["file"])).is_relative_to(expected.tree):
        problems.append(f"vllm was imported from {vllm['file']}, not from {expected.tree}")
    for name, found, stamped in (
        ("vllm", vllm.get("version"), expected.version),
        ("its platform", vllm.get("platform"), expected.device),
        ("torch", torch.get("version"), expected.torch),
    ):
        if found != stamped:
            problems.append(f"{name} is {found or 'none'}, stamped is {stamped}")
    if not record.get("error") and not vllm.get("kernels"):
        problems.append("vLLM generated without a compiled library of the tree")
    return _check("provenance.import", problems, f"vllm {vllm.get('version')}, torch {torch.get('version')}", answer.seconds)


def parity(answer: Answer, identifier: str = "parity.llama") -> Check:
    """Judge probes/parity.py's comparison: every token equal, every log-probability finite and nearer than MAX_DIFFERENCE.

    Equal tokens are asked for in float32 only; in bfloat16 near-ties flip and everything after a flip differs.
    """
    record = answer.record
    if answer.problem or record.get("error"):
        return _check(identifier, [answer.problem or str(record["error"])], "", answer.seconds)
    equal, total, compared, not_finite = (_number(record, name) for name in ("equal", "total", "compared", "not_finite"))
    difference = _number(record, "max_difference")
    said = f"{equal:g}/{total:g} tokens equal, largest log-probability difference {difference:.1e}"
    problems = []
    if any(row.get("same_prompt") is not True for row in _rows(record, "prompts")):
        problems.append("vLLM and Hugging Face make different tokens of the same prompt")
    if not_finite:
        problems.append(f"{not_finite:g} of {compared:g} log-probabilities are not finite numbers")
    # Each token is compared twice, as vLLM's own (decode) and given to it (prefill); fewer means that something was left out.
    if not (total > 0 and equal == total and compared == 2 * total):
        problems.append(f"{said}; {compared:g} of {2 * total:g} comparisons made")
    elif not difference < MAX_DIFFERENCE:
        problems.append(f"{said}, allowed is {MAX_DIFFERENCE:g}")
    return _check(identifier, problems, said, answer.seconds)


def _check(identifier: str, problems: list[str], fine: str, seconds: float) -> Check:
    if not problems:
        return Check(identifier, "pass", fine, seconds)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Check(identifier, "fail", problems[0] + more, seconds)


def _section(record: Mapping[str, object], name: str) -> Mapping[str, object]:
    section = record.get(name)
    return section if isinstance(section, dict) else {}


def _rows(record: Mapping[str, object], name: str) -> list[Mapping[str, object]]:
    rows = record.get(name)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _number(record: Mapping[str, object], name: str) -> float:
    """NaN for anything that is no number: it fails every comparison."""
    found = record.get(name)
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else math.nan
