"""The verdicts on what was built and what is imported: pure functions from what a probe found, and
what was stamped, to pass or fail with evidence.
"""

import contextlib
import datetime
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from workspace.core.files import read_regular
from workspace.core.paths import Layout
from workspace.install import plan
from workspace.machine.hardware import Machine

Level = Literal["quick", "full"]
# What a machine may lack. A check that is skipped although it lacks nothing is a failed one.
Need = Literal["gpu", "architectures"]

_ANEW = (
    "rm .vllm/.workspace/vllm.json && ./scripts/inv bootstrap   # takes the compiled libraries anew"
)
_DIFFERS = "git -C vendor/vllm diff refs/patches/base --stat   # what differs from the pin"
_WHO = "./scripts/inv status   # then: rm .vllm/.workspace/vllm.json && ./scripts/inv bootstrap"
_SERVER = "ls -t .workspace/smoke-server/logs   # the newest is the server's own log"
_REBUILD = "./scripts/inv rebuild   # compiles for the GPU that is here"


@dataclass(frozen=True)
class Entry:
    meaning: str
    hint: str
    level: Level = "quick"
    need: Need | None = None


# In the order in which they are shown. What explains the others comes first: the cure of the first
# that failed is the hint.
REGISTRY: Mapping[str, Entry] = {
    "provenance.libraries": Entry(
        "every compiled library is, by size and SHA-256, the one that this build or its precompiled"
        " wheel brought, and none is left over",
        _ANEW,
    ),
    "binary.load": Entry(
        "every compiled library is whole and loads with all symbols bound, each in a process of"
        " its own",
        _ANEW,
    ),
    "binary.cubins": Entry(
        "every compiled library holds code for this GPU", _REBUILD, need="architectures"
    ),
    "kernels.norm": Entry("RMS norms compute what plain torch computes", _DIFFERS),
    "kernels.activation": Entry("gated activations compute what plain torch computes", _DIFFERS),
    "kernels.rotary": Entry("rotary embeddings compute what plain torch computes", _DIFFERS),
    "kernels.attention": Entry(
        "paged attention over a cache that the cache's operator filled computes what plain torch"
        " computes",
        _DIFFERS,
    ),
    "kernels.quantized": Entry(
        "8-bit matrix products compute what plain torch computes", _DIFFERS, need="gpu"
    ),
    "kernels.moe": Entry("experts compute what plain torch computes", _DIFFERS),
    "parity.llama": Entry(
        "a tiny Llama says what Hugging Face says: the same greedy tokens and log-probabilities",
        _DIFFERS,
    ),
    "parity.qwen3": Entry("a tiny Qwen3 says what Hugging Face says", _DIFFERS),
    "parity.mixtral": Entry(
        "a tiny Mixtral, with experts, says what Hugging Face says", _DIFFERS, "full"
    ),
    "parity.model": Entry("the model of --model says what Hugging Face says", _DIFFERS),
    "parity.bfloat16": Entry(
        "SmolLM2 in bfloat16 finds Hugging Face's tokens as probable as Hugging Face does",
        _DIFFERS,
        "full",
    ),
    "parity.gpt-oss": Entry(
        "a tiny gpt-oss, with MXFP4 experts, sinks and a sliding window, finds Hugging Face's"
        " tokens as probable as Hugging Face does",
        _DIFFERS,
        "full",
        "gpu",
    ),
    "consistency.repeat": Entry("the same prompts give the same answers again", _DIFFERS),
    "consistency.batch": Entry("a prompt gives the same answer alone and in a batch", _DIFFERS),
    "consistency.parts": Entry(
        "what a long prompt begins with is judged as it is when it stands alone", _DIFFERS
    ),
    "consistency.chunked": Entry("a prompt that comes in chunks gives the same answer", _DIFFERS),
    "consistency.prefix": Entry(
        "prompts that share a beginning give the same answers from the prefix cache", _DIFFERS
    ),
    "consistency.compiled": Entry(
        "torch.compile changes no token and no log-probability", _DIFFERS, "full"
    ),
    "server.ready": Entry(
        "the server of the built tree comes up, is the version that was built, and completes a"
        " token",
        _SERVER,
        "full",
    ),
    "server.completions": Entry(
        "/v1/completions answers what the offline engine answers, counts its tokens, stops at a"
        " word",
        _DIFFERS,
        "full",
    ),
    "server.chat": Entry(
        "/v1/chat/completions answers as the completion of the prompt that the template makes",
        _DIFFERS,
        "full",
    ),
    "server.stream": Entry(
        "a streamed answer comes in pieces that make the whole one, and ends with [DONE]",
        _DIFFERS,
        "full",
    ),
    "server.logprobs": Entry(
        "tokens and log-probabilities over HTTP are the offline engine's", _DIFFERS, "full"
    ),
    "server.structured": Entry("an answer obeys a JSON schema", _DIFFERS, "full"),
    "server.bad_request": Entry(
        "what cannot be served is refused with 4xx and a word why, and the server lives on",
        _DIFFERS,
        "full",
    ),
    "server.concurrent": Entry(
        "many requests at once are answered as each alone", _DIFFERS, "full"
    ),
    "server.stop": Entry(
        "told to end, the server leaves no process, no port and no shared memory", _SERVER, "full"
    ),
    "provenance.import": Entry(
        "the process that made the tokens had vLLM from vendor/vllm, with torch and CUDA as"
        " stamped",
        _WHO,
    ),
    "provenance.tree": Entry(
        "vendor/vllm is, after all checks, what it was before the first", "./scripts/nox -s smoke"
    ),
    "real.answer": Entry(
        "SmolLM2 knows the capital of France, and says no token over and over", _DIFFERS, "full"
    ),
    "real.finish": Entry(
        "an answer ends where it has to: by itself, at its length, at a stop word", _DIFFERS, "full"
    ),
}


def chosen(level: Level, *, has_model: bool) -> tuple[str, ...]:
    """The identifiers of a level, in their order."""
    return tuple(
        name
        for name, entry in REGISTRY.items()
        if level in ("full", entry.level) and (has_model or name != "parity.model")
    )


Verdict = Literal["pass", "fail", "skipped"]


@dataclass(frozen=True)
class Check:
    """One judgement. `evidence` is what was observed, or why nothing was, in one sentence;
    `seconds` what it took to find out.
    """

    identifier: str
    verdict: Verdict
    evidence: str
    seconds: float
    # Everything that is wrong, where it is more than the evidence says.
    problems: tuple[str, ...] = ()

    @property
    def meaning(self) -> str:
        return REGISTRY[self.identifier].meaning


@dataclass(frozen=True)
class Expected:
    """What the stamps say was built. `libraries` maps a path below the tree to its size and
    SHA-256; `cuda` is None for torch without.
    """

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
    """Judge which files probes/verify.py has found. A library of another version, or one cut by a
    third, loads and computes the same.
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
            f"{path} was not there when the build was verified"
            for path in found
            if path not in expected.libraries
        ]
        problems += [] if found else ["the tree holds no compiled library"]
    return judged(
        "provenance.libraries", problems, f"{len(found)} libraries, as stamped", answer.seconds
    )


def binary_load(answer: Answer) -> Check:
    """Judge how probes/verify.py could load them."""
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
        why = answer.problem or str(record.get("error") or "the probe does not say it")
        return judged(
            "provenance.import", [f"not known which vLLM is imported: {why}"], "", answer.seconds
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
            problems.append(f"{name} is {found or 'none'}, stamped is {stamped or 'none'}")
    if not record.get("error") and not vllm.get("kernels"):
        problems.append("vLLM generated without a compiled library of the tree")
    said = f"vllm {vllm.get('version')}, torch {torch.get('version')}" + (
        f", triton {expected.triton}" if expected.triton else ""
    )
    return judged("provenance.import", problems, said, 0.0)


def tree(before: object, after: object, seconds: float) -> Check:
    """Judge whether what was edited meanwhile makes the other verdicts worth nothing."""
    problems = [] if before == after else ["vendor/vllm was changed while it was judged"]
    return judged("provenance.tree", problems, "unchanged", seconds)


def settled(check: Check, *, lacks: frozenset[Need]) -> Check:
    """A check may be skipped only where the machine lacks what it needs."""
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
    return (
        float(found) if isinstance(found, int | float) and not isinstance(found, bool) else math.nan
    )


SCHEMA = 2
# What of the parity probe's document is worth comparing between days; the tokens themselves are not
# in it.
_MEASURES = ("models", "consistency", "device", "gpu", "seconds")


@dataclass(frozen=True)
class Tree:
    """What vendor/vllm held: the tree of its commit, and a digest of edits on top, None without.
    `built` is one of everything that was stamped.
    """

    pin: str
    commit: str | None
    oid: str | None
    dirty: str | None
    built: str | None = None


def verdict(checks: Sequence[Check]) -> Verdict:
    """Pass where there are checks, some pass and none fails; whether one may be skipped was judged
    before.
    """
    said = {check.verdict for check in checks}
    return "pass" if "pass" in said and "fail" not in said else "fail"


def tree_of(layout: Layout, observed: plan.Observation) -> Tree:
    """Name the sources that are judged; edited files count with their content as it is now."""
    stack = observed.stack
    return Tree(
        observed.pin.tag,
        stack.head if stack else None,
        stack.tree if stack else None,
        plan.edits_digest(layout, stack),
        _built(observed),
    )


def is_of(said: Mapping[str, object], now: Tree) -> bool:
    """Whether a record is of a smoke that passed on this tree, these edits and this build."""
    return (
        said.get("verdict") == "pass"
        and now.oid is not None
        and all(
            said.get(name) == text
            for name, text in (("tree", now.oid), ("dirty", now.dirty), ("built", now.built))
        )
    )


def _built(observed: plan.Observation) -> str:
    stamps = [
        asdict(layer.recorded) if layer.recorded else None
        for layer in (observed.environment, observed.kernels)
    ]
    # How long it took, and with how many jobs, is no part of what was built.
    parts = [
        {name: stamp[name] for name in ("inputs", "packages", "libraries")} if stamp else None
        for stamp in stamps
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def compose(
    checks: Sequence[Check],
    *,
    level: str,
    tree: Tree,
    machine: Machine,
    parity: Mapping[str, object],
    seconds: float,
) -> dict[str, object]:
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


def last_record(layout: Layout) -> Mapping[str, object]:
    """What the last smoke wrote, nothing where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        said = json.loads(read_regular(layout.smoke_record))
        return said if isinstance(said, dict) else {}
    return {}
