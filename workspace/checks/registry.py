"""The smoke's checks: their registry, their verdicts on build and imports, and what they cover of
vLLM's API: coverage.toml, held against the pinned tree.

Verdicts are pure functions: from a probe's answer and the stamps to pass or fail with evidence.
"""

import ast
import contextlib
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from workspace.checks.probe_runs import Answer
from workspace.core import records
from workspace.core.console import Row, State
from workspace.core.errors import counted

Level = Literal["quick", "full"]
# What a machine may lack. A check that is skipped for another reason counts as failed.
Need = Literal["gpu", "architectures", "idle"]

DIFFERS = "checks.differs"
Verdict = Literal["pass", "fail", "skipped"]
_STATES = {"pass": State.OK, "fail": State.FAIL, "skipped": State.SKIPPED}
# What a failure of each group of checks points to, causes before effects; see smoke.pattern.
CAUSES: Mapping[str, str] = {
    "provenance": "the installation; it is not what was built here, so install again first",
    "binary": "the compiled libraries; the failures after these follow from them",
    "kernels": "an operator: compiled sources, or the precompiled wheel; models that use it follow",
    "layers": "the code of a layer: of all models that have it",
    "parity": "",
    "templates": "the tokenizer or the chat template; the models compute correctly",
    "cache": "the prefix cache: the hash of its blocks; the models compute correctly",
    "consistency": "scheduler, batches or the cache; a prompt alone is answered correctly",
    "sampling": "the sampler; the models compute correctly",
    "engine": "scheduler, adapters or poolers; plain requests are answered correctly",
    "server": "the HTTP server; the engine answers correctly without it",
}


@dataclass(frozen=True)
class Entry:
    """A check in the registry: its meaning when it passes, the name of its hint when it fails."""

    meaning: str
    level: Level = "quick"
    need: Need | None = None
    hint: str = DIFFERS


# In the order of display. Causes come before their effects: the hint of the first failed check is
# shown.
REGISTRY: Mapping[str, Entry] = {
    "provenance.libraries": Entry(
        "every compiled library has the size and SHA-256 that this build or its precompiled wheel"
        " installed, and there is no other library",
        hint="checks.reinstall",
    ),
    "binary.load": Entry(
        "every compiled library is complete and loads with all symbols bound, each in its own"
        " process",
        hint="checks.reinstall",
    ),
    "binary.cubins": Entry(
        "every compiled library holds code for this GPU",
        need="architectures",
        hint="checks.rebuild",
    ),
    "kernels.norm": Entry("RMS norms compute what plain torch computes"),
    "kernels.activation": Entry("gated activations compute what plain torch computes"),
    "kernels.rotary": Entry("rotary embeddings compute what plain torch computes"),
    "kernels.attention": Entry(
        "paged attention over a cache that vLLM's operator filled computes what plain torch"
        " computes",
    ),
    "kernels.quantized": Entry(
        "8-bit matrix products compute what plain torch computes", need="gpu"
    ),
    "kernels.moe": Entry("experts compute what plain torch computes"),
    "layers.embedding": Entry(
        "in the tiny models, embeddings and scores of tokens are those of float64"
    ),
    "layers.norm": Entry("in the tiny models, RMS norms compute what float64 computes"),
    "layers.linear": Entry(
        "in the tiny models, projections with their biases compute what float64 computes"
    ),
    "layers.rotary": Entry(
        "in the tiny models, scaled and plain rotations compute what float64 computes"
    ),
    "layers.attention": Entry(
        "in the tiny models, attention over all tokens or a window computes what float64 computes"
    ),
    "layers.mlp": Entry(
        "in the tiny models, gated layers and experts compute what float64 computes"
    ),
    "parity.llama": Entry(
        "a tiny Llama answers as Hugging Face does: the same greedy tokens and log-probabilities"
    ),
    "parity.qwen3": Entry("a tiny Qwen3 answers as Hugging Face does"),
    "parity.mixtral": Entry("a tiny Mixtral, with experts, answers as Hugging Face does", "full"),
    "parity.gpt-oss-float32": Entry(
        "a tiny gpt-oss without MXFP4 answers as Hugging Face does", "full"
    ),
    "parity.model": Entry("the model of --model answers as Hugging Face does"),
    "parity.bfloat16": Entry(
        "SmolLM2 in bfloat16 gives Hugging Face's tokens the same probability as Hugging Face",
        "full",
    ),
    "parity.gpt-oss": Entry(
        "a tiny gpt-oss, with MXFP4 experts, sinks and a sliding window, gives Hugging Face's"
        " tokens the same probability as Hugging Face",
        "full",
        "gpu",
    ),
    "consistency.repeat": Entry("the same prompts give the same answers in a second run"),
    "consistency.batch": Entry("a prompt gives the same answer alone and in a batch"),
    "consistency.parts": Entry(
        "the beginning of a long prompt gets the log-probabilities that it gets alone"
    ),
    "consistency.chunked": Entry("a prompt that is processed in chunks gives the same answer"),
    "consistency.prefix": Entry(
        "prompts that share a beginning give the same answers from the prefix cache"
    ),
    "templates.tokens": Entry(
        "the tokens of conversations and of texts, with one BOS, are those of Hugging Face's"
        " tokenizer and template",
    ),
    "cache.blocks": Entry(
        "of a prompt the tokens of exactly those blocks come from the cache that an earlier prompt"
        " shares from its beginning",
    ),
    "cache.keys": Entry(
        "a cached block is found only with the salt and the adapter with which it was computed"
    ),
    "sampling.logprobs": Entry(
        "log-probabilities and ranks, before and after all parameters, of answers and of prompts,"
        " are Hugging Face's",
    ),
    "sampling.penalties": Entry(
        "each penalty changes tokens and log-probabilities as in Hugging Face or in float64"
    ),
    "sampling.masks": Entry(
        "allowed tokens, bad words, biases and a least length choose the tokens that they must"
    ),
    "sampling.filters": Entry(
        "temperature, top-k, top-p and min-p leave the distribution that Hugging Face's leave"
    ),
    "sampling.random": Entry(
        "samples have the reference's probabilities, repeat with a seed, and differ without one"
    ),
    "sampling.ends": Entry(
        "an answer ends at a stop string, a stop token, the end of text or a repetition, with the"
        " text and the reason that it must have",
    ),
    "consistency.compiled": Entry("torch.compile changes no token and no log-probability", "full"),
    "engine.preemption": Entry(
        "requests that had to give their memory away answer as they do alone", "full"
    ),
    "engine.abort": Entry(
        "aborted requests free exactly their blocks and change no other answer", "full"
    ),
    "engine.speculation": Entry(
        "with guessed tokens, of which some are right, answers are the same", "full"
    ),
    "engine.adapters": Entry(
        "adapters in one batch answer as Hugging Face's merged weights do", "full"
    ),
    "engine.pooling": Entry("embeddings of each kind are Hugging Face's", "full"),
    "server.ready": Entry(
        "the server of the built tree starts, reports the version that was built, and completes a"
        " token",
        "full",
        hint="checks.server_log",
    ),
    "server.completions": Entry(
        "/v1/completions gives the offline engine's answers, counts their tokens, and stops at a"
        " stop string",
        "full",
    ),
    "server.chat": Entry(
        "/v1/chat/completions makes Hugging Face's tokens of a conversation, and answers with the"
        " completion of these tokens",
        "full",
    ),
    "server.stream": Entry(
        "the pieces of a streamed answer make the complete answer, and it ends with [DONE]", "full"
    ),
    "server.logprobs": Entry(
        "tokens and log-probabilities over HTTP equal the offline engine's, and Hugging Face's",
        "full",
    ),
    "server.parameters": Entry(
        "sampling parameters over HTTP give Hugging Face's answers, in completions and in chats",
        "full",
    ),
    "server.structured": Entry(
        "an answer has the one text that its form allows, in each form that the API has", "full"
    ),
    "server.echo": Entry("a prompt comes back, and has Hugging Face's log-probabilities", "full"),
    "server.cache": Entry("the number of cached tokens is exact by salt", "full"),
    "server.usage": Entry("a stream has its usage where it is asked for", "full"),
    "server.tokens": Entry("/tokenize and /detokenize do as Hugging Face", "full"),
    "server.limits": Entry(
        "a value at its limit is answered in full, a value above is refused", "full"
    ),
    "server.bad_request": Entry(
        "a bad request is refused with 4xx and a reason, and the server keeps running", "full"
    ),
    "server.concurrent": Entry(
        "each of many concurrent requests is answered as it is alone", "full"
    ),
    "server.abort": Entry("a client that leaves ends its request, which frees its blocks", "full"),
    "server.growth": Entry(
        "200 requests leave no descriptors, threads or memory in any process", "full"
    ),
    "server.pauses": Entry(
        "on an idle machine no answer takes far longer than the others", "full", "idle"
    ),
    "server.stop": Entry(
        "a stopped server leaves no process, no port and no shared memory",
        "full",
        hint="checks.server_log",
    ),
    "provenance.import": Entry(
        "the process that generated the tokens imported vLLM from vendor/vllm, with the stamped"
        " torch and CUDA",
        hint="checks.origin",
    ),
    "provenance.tree": Entry("vendor/vllm did not change while the checks ran", hint="nox.smoke"),
    "real.answer": Entry(
        "SmolLM2 answers questions with Hugging Face's first tokens and does not repeat one token"
        " endlessly",
        "full",
    ),
    "real.finish": Entry(
        "an answer ends where it must: by itself, at its length limit, at a stop string", "full"
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
    """What the stamps record about the build; `libraries` maps a path below the tree to size and
    SHA-256, `cuda` is None for torch without CUDA.
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
    if answer.problem:
        return judged("provenance.libraries", [answer.problem], "", answer.seconds)
    found = {str(row.get("path")): row for row in rows(answer.record, "libraries")}
    problems = [f"{path} is missing" for path in expected.libraries if path not in found]
    problems += [
        f"{path} is not the file that was verified"
        for path, file in expected.libraries.items()
        if path in found and (found[path].get("size"), found[path].get("sha256")) != file
    ]
    problems += [
        f"{path} did not exist when the build was verified"
        for path in found
        if path not in expected.libraries
    ]
    problems += [] if found else ["the tree holds no compiled library"]
    fine = f"{counted(len(found), 'library', 'libraries')}, as stamped"
    return judged("provenance.libraries", problems, fine, answer.seconds)


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
    fine = counted(len(found) - others, "library", "libraries")
    fine += f", {others} for other processors or Pythons not tried" if others else ""
    return judged("binary.load", problems, fine, answer.seconds)


def provenance(answer: Answer, expected: Expected) -> Check:
    """Judge which vLLM the process that generated the tokens had imported."""
    record = answer.record
    vllm, torch = section(record, "vllm"), section(record, "torch")
    if answer.problem or not vllm.get("file"):
        why = answer.problem or str(record.get("error") or "the probe did not report it")
        problem = f"it is unknown which vLLM was imported: {why}"
        return judged("provenance.import", [problem], "", answer.seconds)
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
    summary = f"vllm {vllm.get('version')}, torch {torch.get('version')}"
    summary += f", triton {expected.triton}" if expected.triton else ""
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
    why = f"skipped on a machine that has what it needs: {check.evidence}"
    return replace(check, verdict="fail", evidence=why)


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
    if isinstance(found, bool) or not isinstance(found, int | float):
        return math.nan
    return float(found)


def verdict(checks: Sequence[Check]) -> Verdict:
    """Return pass if a check passed and none failed.

    Whether a check may be skipped was judged before.
    """
    verdicts = {check.verdict for check in checks}
    return "pass" if "pass" in verdicts and "fail" not in verdicts else "fail"


def pattern(checks: Sequence[Check]) -> tuple[str, ...]:
    """Return the sentence on what the failed checks point to together, none if nothing is known.

    Groups of checks come in the order of cause and effect: the first one with a failure counts.
    """
    failed, passed = (
        [check.identifier.partition(".")[0] for check in checks if check.verdict == kind]
        for kind in ("fail", "pass")
    )
    cause = next((group for group in CAUSES if group in failed), "")
    sentence = CAUSES.get(cause)
    if cause == "parity":
        is_one = failed.count("parity") == 1 and "parity" in passed
        operators = "operators compute correctly" if "kernels" in passed else "operators not judged"
        where = "the code of that model" if is_one else "code that all models share"
        sentence = f"{operators}, and {'one model does' if is_one else 'models do'} not: {where}"
    return (f"this points to: {sentence}",) if sentence else ()


# What coverage.toml lists of the tree: the fields of these classes, and switches in these files.
COVERAGE = Path(__file__).with_name("coverage.toml")
_SAMPLING = "vllm/sampling_params.py"
_OPENAI = "vllm/entrypoints/openai"
FIELDS: Mapping[str, str] = {
    "SamplingParams": _SAMPLING,
    "StructuredOutputsParams": _SAMPLING,
    "RepetitionDetectionParams": _SAMPLING,
    "CompletionRequest": f"{_OPENAI}/completion/protocol.py",
    "ChatCompletionRequest": f"{_OPENAI}/chat_completion/protocol.py",
}
_SWITCHES = re.compile(r"vllm/config/\w+\.py")
_SWITCH = re.compile(r"(True|None|Field\(default=(True|None)\b.*)")


@functools.cache
def coverage() -> Mapping[str, Mapping[str, tuple[str, ...] | str]]:
    """Return coverage.toml: by part and name the checks, or the reason why there is none.

    Raises DecodeError if the file is damaged.
    """
    parts = records.parse_toml(COVERAGE.read_bytes())
    return {
        part: {
            name: tuple(map(str, entry)) if isinstance(entry, list) else str(entry)
            for name, entry in section(parts, part).items()
        }
        for part in parts
    }


def offered(path: str, content: str) -> set[tuple[str, str]]:
    """Return what a file of the tree offers, as part and name in coverage.toml.

    A source that does not parse offers nothing.
    """
    try:
        classes = [node for node in ast.parse(content).body if isinstance(node, ast.ClassDef)]
    except (SyntaxError, ValueError, RecursionError):
        return set()
    found: set[tuple[str, str]] = set()
    for node in classes:
        for line in node.body:
            if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
                continue
            name, default = line.target.id, ast.unparse(line.value) if line.value else ""
            if name.startswith("_"):
                continue
            if FIELDS.get(node.name) == path:
                found.add((node.name, name))
            is_switch = re.search(r"\bbool\b", ast.unparse(line.annotation))
            if _SWITCHES.fullmatch(path) and is_switch and _SWITCH.fullmatch(default):
                found.add(("features", f"{node.name}.{name}"))
    return found


def unlisted(tree: Path) -> list[str]:
    """Return what the tree offers and coverage.toml does not list."""
    paths = {
        *FIELDS.values(),
        *(f"vllm/config/{file.name}" for file in tree.glob("vllm/config/*.py")),
    }
    found: set[tuple[str, str]] = set()
    for path in paths:
        with contextlib.suppress(OSError):
            found |= offered(path, (tree / path).read_text(encoding="utf-8", errors="replace"))
    return [
        f"{part}.{name}" for part, name in sorted(found) if name not in coverage().get(part, {})
    ]
