"""The verdicts on what was built and what is imported: pure functions from what a probe found, and what was stamped, to pass or fail with evidence."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.smoke.catalogue import CATALOGUE, Need

Verdict = Literal["pass", "fail", "skipped"]


@dataclass(frozen=True)
class Check:
    """One judgement. `evidence` is what was observed, or why nothing was, in one sentence; `seconds` what it took to find out."""

    identifier: str
    verdict: Verdict
    evidence: str
    seconds: float
    # Everything that is wrong, where it is more than the evidence says.
    problems: tuple[str, ...] = ()

    @property
    def meaning(self) -> str:
        return CATALOGUE[self.identifier].meaning


@dataclass(frozen=True)
class Expected:
    """What the stamps say was built. `libraries` maps a path below the tree to its size and SHA-256; `cuda` is None for torch without."""

    tree: Path
    version: str
    torch: str
    device: Literal["cpu", "cuda"]
    libraries: Mapping[str, tuple[int, str]]
    cuda: str | None = None
    triton: str | None = None


@dataclass(frozen=True)
class Answer:
    """What came back from a probe: its document, or in `problem` why there is none."""

    record: Mapping[str, object]
    problem: str | None
    seconds: float


def libraries(answer: Answer, expected: Expected) -> Check:
    """Judge which files probes/verify.py has found. A library of another version, or one cut by a third, loads and computes the same."""
    found = {str(row.get("path")): row for row in rows(answer.record, "libraries")}
    problems = [answer.problem] if answer.problem else []
    if not answer.problem:
        problems += [f"{path} is missing" for path in expected.libraries if path not in found]
        for path, (size, digest) in expected.libraries.items():
            if path in found and (found[path].get("size"), found[path].get("sha256")) != (size, digest):
                problems.append(f"{path} is not the file that was verified")
        problems += [f"{path} was not there when the build was verified" for path in found if path not in expected.libraries]
        problems += [] if found else ["the tree holds no compiled library"]
    return judged("provenance.libraries", problems, f"{len(found)} libraries, as stamped", answer.seconds)


def binary_load(answer: Answer) -> Check:
    """Judge how probes/verify.py could load them."""
    found = rows(answer.record, "libraries")
    problems = [answer.problem] if answer.problem else []
    problems += [str(answer.record["error"])] if answer.record.get("error") else []
    problems += [f"{row.get('path')}: {row.get('error')}" for row in found if row.get("verdict") not in ("ok", "other cpu", "other python")]
    problems += [] if found or problems else ["the tree holds no compiled library"]
    others = sum(row.get("verdict") in ("other cpu", "other python") for row in found)
    fine = f"{len(found) - others} libraries" + (f", {others} for other processors or Pythons not tried" if others else "")
    return judged("binary.load", problems, fine, answer.seconds)


def provenance(answer: Answer, expected: Expected) -> Check:
    """Judge which vLLM the process that generated the tokens had imported."""
    record = answer.record
    vllm, torch = section(record, "vllm"), section(record, "torch")
    if answer.problem or not vllm.get("file"):
        why = answer.problem or str(record.get("error") or "the probe does not say it")
        return judged("provenance.import", [f"not known which vLLM is imported: {why}"], "", answer.seconds)
    problems = []
    if not Path(str(vllm["file"])).is_relative_to(expected.tree):
        problems.append(f"vllm was imported from {vllm['file']}, not from {expected.tree}")
    for name, found, stamped in (
        ("vllm", vllm.get("version"), expected.version),
        ("its platform", vllm.get("platform"), expected.device),
        ("torch", torch.get("version"), expected.torch),
        ("torch's CUDA", torch.get("cuda"), expected.cuda),
        ("triton", record.get("triton"), expected.triton),
    ):
        if found != stamped:
            problems.append(f"{name} is {found or 'none'}, stamped is {stamped or 'none'}")
    if not record.get("error") and not vllm.get("kernels"):
        problems.append("vLLM generated without a compiled library of the tree")
    said = f"vllm {vllm.get('version')}, torch {torch.get('version')}" + (f", triton {expected.triton}" if expected.triton else "")
    return judged("provenance.import", problems, said, 0.0)


def tree(before: object, after: object, seconds: float) -> Check:
    """Judge whether what was edited meanwhile makes the other verdicts worth nothing."""
    problems = [] if before == after else ["vendor/vllm was changed while it was judged"]
    return judged("provenance.tree", problems, "unchanged", seconds)


def settled(check: Check, *, lacks: frozenset[Need]) -> Check:
    """A check may be skipped only where the machine lacks what it needs."""
    need = CATALOGUE[check.identifier].need
    if check.verdict != "skipped" or need in lacks:
        return check
    return Check(check.identifier, "fail", f"skipped on a machine that has what it needs: {check.evidence}", check.seconds)


def judged(identifier: str, problems: Sequence[str], fine: str, seconds: float) -> Check:
    seconds = seconds if math.isfinite(seconds) else 0.0
    if not problems:
        return Check(identifier, "pass", fine, seconds)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Check(identifier, "fail", problems[0] + more, seconds, tuple(problems[1:]))


def section(record: Mapping[str, object], name: str) -> Mapping[str, object]:
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def rows(record: Mapping[str, object], name: str) -> list[Mapping[str, object]]:
    found = record.get(name)
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def number(record: Mapping[str, object], name: str) -> float:
    """NaN for anything that is no number: it fails every comparison."""
    found = record.get(name)
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else math.nan
