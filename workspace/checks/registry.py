"""The smoke's checks: their registry, their verdicts on build and imports, and the record.

Verdicts are pure functions: from a probe's answer and the stamps to pass or fail with evidence.
"""

import datetime
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from workspace.checks.probe_runs import Answer
from workspace.core import records
from workspace.core.console import Console, Row, State
from workspace.core.files import write_atomic
from workspace.core.paths import Layout
from workspace.install import plan

Level = Literal["quick", "full"]
# What a machine may lack. A check that is skipped for another reason counts as failed.
Need = Literal["gpu", "architectures"]

_REINSTALL = "checks.reinstall"
_DIFFERS = "checks.differs"
_ORIGIN = "checks.origin"
_SERVER = "checks.server_log"
_REBUILD = "checks.rebuild"
Verdict = Literal["pass", "fail", "skipped"]
_STATES = {"pass": State.OK, "fail": State.FAIL, "skipped": State.SKIPPED}
SCHEMA = 2
# The parts of the parity probe's document that are worth comparing between days; it omits the
# tokens.
_MEASURES = ("models", "consistency", "device", "gpu", "seconds", "compilation", "steps")


@dataclass(frozen=True)
class Entry:
    """A check in the registry: its meaning when it passes, the name of its hint when it fails."""

    meaning: str
    hint: str
    level: Level = "quick"
    need: Need | None = None


# In the order of display. Causes come before their effects: the hint of the first failed check is
# shown.
REGISTRY: Mapping[str, Entry] = {
    "provenance.libraries": Entry(
        "every compiled library has the size and SHA-256 that this build or its precompiled wheel"
        " installed, and there is no other library",
        _REINSTALL,
    ),
    "binary.load": Entry(
        "every compiled library is complete and loads with all symbols bound, each in its own"
        " process",
        _REINSTALL,
    ),
    "binary.cubins": Entry(
        "every compiled library holds code for this GPU", _REBUILD, need="architectures"
    ),
    "kernels.norm": Entry("RMS norms compute what plain torch computes", _DIFFERS),
    "kernels.activation": Entry("gated activations compute what plain torch computes", _DIFFERS),
    "kernels.rotary": Entry("rotary embeddings compute what plain torch computes", _DIFFERS),
    "kernels.attention": Entry(
        "paged attention over a cache that vLLM's operator filled computes what plain torch"
        " computes",
        _DIFFERS,
    ),
    "kernels.quantized": Entry(
        "8-bit matrix products compute what plain torch computes", _DIFFERS, need="gpu"
    ),
    "kernels.moe": Entry("experts compute what plain torch computes", _DIFFERS),
    "parity.llama": Entry(
        "a tiny Llama answers as Hugging Face does: the same greedy tokens and log-probabilities",
        _DIFFERS,
    ),
    "parity.qwen3": Entry("a tiny Qwen3 answers as Hugging Face does", _DIFFERS),
    "parity.mixtral": Entry(
        "a tiny Mixtral, with experts, answers as Hugging Face does", _DIFFERS, "full"
    ),
    "parity.model": Entry("the model of --model answers as Hugging Face does", _DIFFERS),
    "parity.bfloat16": Entry(
        "SmolLM2 in bfloat16 gives Hugging Face's tokens the same probability as Hugging Face",
        _DIFFERS,
        "full",
    ),
    "parity.gpt-oss": Entry(
        "a tiny gpt-oss, with MXFP4 experts, sinks and a sliding window, gives Hugging Face's"
        " tokens the same probability as Hugging Face",
        _DIFFERS,
        "full",
        "gpu",
    ),
    "consistency.repeat": Entry("the same prompts give the same answers in a second run", _DIFFERS),
    "consistency.batch": Entry("a prompt gives the same answer alone and in a batch", _DIFFERS),
    "consistency.parts": Entry(
        "the beginning of a long prompt gets the log-probabilities that it gets alone",
        _DIFFERS,
    ),
    "consistency.chunked": Entry(
        "a prompt that is processed in chunks gives the same answer", _DIFFERS
    ),
    "consistency.prefix": Entry(
        "prompts that share a beginning give the same answers from the prefix cache", _DIFFERS
    ),
    "consistency.compiled": Entry(
        "torch.compile changes no token and no log-probability", _DIFFERS, "full"
    ),
    "server.ready": Entry(
        "the server of the built tree starts, reports the version that was built, and completes a"
        " token",
        _SERVER,
        "full",
    ),
    "server.completions": Entry(
        "/v1/completions gives the offline engine's answers, counts their tokens, and stops at a"
        " stop string",
        _DIFFERS,
        "full",
    ),
    "server.chat": Entry(
        "/v1/chat/completions gives the completion of the prompt that the chat template makes",
        _DIFFERS,
        "full",
    ),
    "server.stream": Entry(
        "the pieces of a streamed answer make the complete answer, and it ends with [DONE]",
        _DIFFERS,
        "full",
    ),
    "server.logprobs": Entry(
        "tokens and log-probabilities over HTTP equal the offline engine's", _DIFFERS, "full"
    ),
    "server.structured": Entry("an answer obeys a JSON schema", _DIFFERS, "full"),
    "server.bad_request": Entry(
        "a bad request is refused with 4xx and a reason, and the server keeps running",
        _DIFFERS,
        "full",
    ),
    "server.concurrent": Entry(
        "each of many concurrent requests is answered as it is alone", _DIFFERS, "full"
    ),
    "server.stop": Entry(
        "a stopped server leaves no process, no port and no shared memory", _SERVER, "full"
    ),
    "provenance.import": Entry(
        "the process that generated the tokens imported vLLM from vendor/vllm, with the stamped"
        " torch and CUDA",
        _ORIGIN,
    ),
    "provenance.tree": Entry("vendor/vllm did not change while the checks ran", "nox.smoke"),
    "real.answer": Entry(
        "SmolLM2 knows the capital of France and does not repeat one token endlessly",
        _DIFFERS,
        "full",
    ),
    "real.finish": Entry(
        "an answer ends where it must: by itself, at its length limit, at a stop string",
        _DIFFERS,
        "full",
    ),
}


def chosen(level: Level, *, has_model: bool) -> tuple[str, ...]:
    """Return the identifiers of a level, in order."""
    return tuple(
        name
        for name, entry in REGISTRY.items()
        if level in ("full", entry.level) and (has_model or name != "parity.model")
    )


@dataclass(frozen=True)
class Check:
    """One verdict. `evidence` is the observation, or why there is none, in one sentence.

    `seconds` is the time that the check took.
    """

    identifier: str
    verdict: Verdict
    evidence: str
    seconds: float
    # Further problems, if there are more than the evidence names.
    problems: tuple[str, ...] = ()

    @property
    def row(self) -> Row:
        return Row(_STATES[self.verdict], self.identifier, self.evidence)

    @property
    def meaning(self) -> str:
        return REGISTRY[self.identifier].meaning


@dataclass(frozen=True)
class Expected:
    """What the stamps record about the build.

    `libraries` maps a path below the tree to size and SHA-256; `cuda` is None for torch without
    CUDA.
    """

    tree: Path
    version: str
    torch: str
    device: Literal["cpu", "cuda"]
    libraries: Mapping[str, tuple[int, str]]
    cuda: str | None = None
    triton: str | None = None


def libraries(answer: Answer, expected: Expected) -> Check:
    """Judge the files that probes/verify.py found.

    A library of another version, or one that is truncated, can still load and compute the same.
    """
    found = {str(row.get("path")): row for row in rows(answer.record, "libraries")}
    problems = [answer.problem] if answer.problem else []
    if not answer.problem:
        problems += [f"{path} is missing" for path in expected.libraries if path not in found]
        for path, (size, digest) in expected.libraries.items():
            if path in found and (found[path].get("size"), found[path].get("sha256")) != (
                size,
                digest,
            ):
                problems.append(f"{path} is not the file that was verified")
        problems += [
            f"{path} did not exist when the build was verified"
            for path in found
            if path not in expected.libraries
        ]
        problems += [] if found else ["the tree holds no compiled library"]
    return judged(
        "provenance.libraries", problems, f"{len(found)} libraries, as stamped", answer.seconds
    )


def binary_load(answer: Answer) -> Check:
    """Judge whether probes/verify.py could load the libraries."""
    found = rows(answer.record, "libraries")
    problems = [answer.problem] if answer.problem else []
    problems += [str(answer.record["error"])] if answer.record.get("error") else []
    problems += [
        f"{row.get('path')}: {row.get('error')}"
        for row in found
        if row.get("verdict") not in ("ok", "other cpu", "other python")
    ]
    problems += [] if found or problems else ["the tree holds no compiled library"]
    others = sum(row.get("verdict") in ("other cpu", "other python") for row in found)
    fine = f"{len(found) - others} libraries" + (
        f", {others} for other processors or Pythons not tried" if others else ""
    )
    return judged("binary.load", problems, fine, answer.seconds)


def provenance(answer: Answer, expected: Expected) -> Check:
    """Judge which vLLM the process that generated the tokens had imported."""
    record = answer.record
    vllm, torch = section(record, "vllm"), section(record, "torch")
    if answer.problem or not vllm.get("file"):
        why = answer.problem or str(record.get("error") or "the probe did not report it")
        return judged(
            "provenance.import", [f"unknown which vLLM was imported: {why}"], "", answer.seconds
        )
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
            problems.append(f"{name} is {found or 'none'}, but the stamp has {stamped or 'none'}")
    if not record.get("error") and not vllm.get("kernels"):
        problems.append("vLLM generated without a compiled library of the tree")
    summary = f"vllm {vllm.get('version')}, torch {torch.get('version')}" + (
        f", triton {expected.triton}" if expected.triton else ""
    )
    return judged("provenance.import", problems, summary, 0.0)


def tree(before: object, after: object, seconds: float) -> Check:
    """Judge whether the tree changed during the smoke, which makes the other verdicts void."""
    problems = [] if before == after else ["vendor/vllm changed during the smoke"]
    return judged("provenance.tree", problems, "unchanged", seconds)


def without_unfounded_skip(check: Check, *, lacks: frozenset[Need]) -> Check:
    """Return the check; as failed, if it was skipped though the machine has what it needs."""
    need = REGISTRY[check.identifier].need
    if check.verdict != "skipped" or need in lacks:
        return check
    return Check(
        check.identifier,
        "fail",
        f"skipped on a machine that has what it needs: {check.evidence}",
        check.seconds,
    )


def judged(identifier: str, problems: Sequence[str], fine: str, seconds: float) -> Check:
    """Return a passed check, or one that failed with these problems."""
    seconds = seconds if math.isfinite(seconds) else 0.0
    if not problems:
        return Check(identifier, "pass", fine, seconds)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Check(identifier, "fail", problems[0] + more, seconds, tuple(problems[1:]))


def section(record: Mapping[str, object], name: str) -> Mapping[str, object]:
    """Return the object of this name in a record, empty if it is missing or something else."""
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def rows(record: Mapping[str, object], name: str) -> list[Mapping[str, object]]:
    """Return the list of objects of this name in a record, empty if there is none."""
    found = record.get(name)
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def number(record: Mapping[str, object], name: str) -> float:
    """Return the number of this name; NaN for anything else, so that every comparison fails."""
    found = record.get(name)
    return (
        float(found) if isinstance(found, int | float) and not isinstance(found, bool) else math.nan
    )


@dataclass(frozen=True)
class Tree:
    """The content of vendor/vllm: its git tree, and a digest of edits, None without edits.

    `built` is one digest of everything that was stamped.
    """

    pin: str
    commit: str | None
    oid: str | None
    dirty: str | None
    built: str | None = None


def verdict(checks: Sequence[Check]) -> Verdict:
    """Return pass if a check passed and none failed.

    Whether a check may be skipped was judged before.
    """
    verdicts = {check.verdict for check in checks}
    return "pass" if "pass" in verdicts and "fail" not in verdicts else "fail"


def tree_of(layout: Layout, observed: plan.Observation) -> Tree:
    """Name the sources under test; edited files count with their present content."""
    stack = observed.stack
    return Tree(
        observed.pin.tag,
        stack.head if stack else None,
        stack.tree if stack else None,
        plan.edits_digest(layout, stack),
        _built(observed),
    )


def is_record_of(record: Mapping[str, object], now: Tree) -> bool:
    """Return whether a record is of a smoke that passed on this tree, edits and build."""
    return (
        record.get("verdict") == "pass"
        and now.oid is not None
        and all(
            record.get(name) == text
            for name, text in (("tree", now.oid), ("dirty", now.dirty), ("built", now.built))
        )
    )


def _built(observed: plan.Observation) -> str:
    stamps = [
        asdict(layer.recorded) if layer.recorded else None
        for layer in (observed.environment, observed.kernels)
    ]
    # Build time and number of jobs do not describe what was built.
    names = ("inputs", "kernels", "packages", "libraries")
    parts = [{name: stamp[name] for name in names} if stamp else None for stamp in stamps]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def compose(
    checks: Sequence[Check],
    *,
    level: str,
    tree: Tree,
    machine: Mapping[str, object],
    parity: Mapping[str, object],
    seconds: float,
) -> dict[str, object]:
    """Return the record as a document. Times are UTC, durations seconds, differences nats."""
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
        "machine": machine,
    }


def _writable(measured: object) -> object:
    """Replace numbers that JSON lacks, NaN and infinity, by null."""
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
    """Return a record as JSON text."""
    return json.dumps(record, indent=1, allow_nan=False)


def write_record(
    path: Path, record: Mapping[str, object], *, console: Console, json_file: Path | None
) -> None:
    """Write a record to `path`, and to the file of the user, `-` for stdout."""
    text = encode(record)
    write_atomic(path, f"{text}\n".encode())
    console.record(text, json_file)


def last_record(layout: Layout) -> Mapping[str, object]:
    """Return the record of the last smoke, empty if there is none or it is unreadable."""
    return records.read(layout.smoke_record, dict[str, object]) or {}
