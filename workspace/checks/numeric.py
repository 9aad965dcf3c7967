"""The verdicts on what was computed: operators against torch, models against Hugging Face, vLLM
against itself, a real model against common knowledge.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from workspace.checks.registry import Answer, Check, judged, number, rows, section

# Nats. Measured with vLLM 0.31.0 on an x86-64 CPU, 5 x 64 tokens, decode and prefill: 2e-5 (Qwen3)
# to 1e-4 (Llama) where all is right, 0.12 with an attention scale that is off by 1 %, which left
# all 320 tokens as they were.
MAX_DIFFERENCE = 1e-3
# Mixtral's router multiplies what the experts' order of additions leaves: 5.2e-4 measured where all
# is right.
_LIMITS = {"mixtral": 5 * MAX_DIFFERENCE}
# Nats, the mean over a prompt's answer: bfloat16 rounds to 1 part in 256, and rounding errors have
# no sign. On the tiny gpt-oss bfloat16 costs Hugging Face itself 0.026, and vLLM's CPU kernels
# 0.024; no sinks cost 0.84, a window that is longer by one 0.23.
MAX_MEAN_BFLOAT16 = 0.05


def kernels(answer: Answer, group: str) -> Check:
    """Judge one group of probes/kernels.py."""
    identifier = f"kernels.{group}"
    found = section(section(answer.record, "groups"), group)
    seconds = number(found, "seconds") if found else answer.seconds
    if answer.problem or not found:
        return judged(
            identifier,
            [answer.problem or str(answer.record.get("error") or "the probe does not name it")],
            "",
            seconds,
        )
    if found.get("skipped"):
        return Check(identifier, "skipped", str(found["skipped"]), seconds)
    cases = rows(found, "rows")
    problems = (
        [str(found["error"])] if found.get("error") else [] if cases else ["nothing was compared"]
    )
    for case in cases:
        difference, limit = number(case, "difference"), number(case, "limit")
        if not difference <= limit:
            problems.append(
                f"{case.get('case')}: off by {difference:.3g}, allowed is {limit:g} (roundings)"
            )
    worst = max((number(case, "difference") / number(case, "limit") for case in cases), default=0.0)
    return judged(
        identifier,
        problems,
        f"{len(cases)} cases, the worst at {worst:.0%} of what rounding allows",
        seconds,
    )


def parity(answer: Answer, name: str, identifier: str | None = None) -> Check:
    """Judge one model of probes/parity.py: tokens equal, every log-probability finite and nearer
    than MAX_DIFFERENCE.

    Tokens may part where the reference's second choice is nearer than that, which is a tie. Equal
    tokens are asked for in float32 only.
    """
    identifier = identifier or f"parity.{name}"
    found = _measured(answer, "models", name)
    seconds = sum(
        value for value in section(found, "seconds").values() if isinstance(value, int | float)
    )
    if problem := _unanswered(answer, found):
        return judged(identifier, [problem], "", seconds or answer.seconds)
    problems, said = _same(found, _LIMITS.get(name, MAX_DIFFERENCE))
    return judged(identifier, problems, said, seconds)


def bfloat16(answer: Answer, name: str, identifier: str = "parity.bfloat16") -> Check:
    """Judge log-probabilities of the reference's own tokens: near-ties flip in bfloat16, and
    everything after a flip differs.
    """
    found = _measured(answer, "models", name)
    if problem := _unanswered(answer, found):
        return judged(identifier, [problem], "", answer.seconds)
    mean, missing = number(found, "mean_difference"), number(found, "not_finite")
    problems = [f"{missing:g} log-probabilities are not finite numbers"] if missing else []
    said = f"mean difference of log-probabilities {mean:.1e}"
    problems += [] if mean < MAX_MEAN_BFLOAT16 else [f"{said}, allowed is {MAX_MEAN_BFLOAT16:g}"]
    return judged(identifier, problems, said, answer.seconds)


def mxfp4(answer: Answer) -> Check:
    """Judge a tiny gpt-oss as `bfloat16` does, which is a prefill, and whether vLLM found its own
    tokens as probable when it made them, one by one.
    """
    check = bfloat16(answer, "gpt-oss", "parity.gpt-oss")
    own = number(_measured(answer, "models", "gpt-oss"), "own_difference")
    if check.verdict == "fail":
        return check
    said = f"{check.evidence}, of decode from prefill {own:.1e}"
    problems = [] if own < MAX_MEAN_BFLOAT16 else [f"{said}, allowed is {MAX_MEAN_BFLOAT16:g}"]
    return judged("parity.gpt-oss", problems, said, answer.seconds)


def consistency(answer: Answer, name: str) -> Check:
    """Judge one way in which probes/parity.py asked the same engine, or another one, for the
    same.
    """
    identifier = f"consistency.{name}"
    found = _measured(answer, "consistency", name)
    if problem := _unanswered(answer, found):
        return judged(identifier, [problem], "", answer.seconds)
    problems, said = _same(found)
    if name == "prefix":
        hits = found.get("cached")
        if (
            not isinstance(hits, list)
            or not all(isinstance(hit, int) for hit in hits)
            or max(hits, default=0) <= 0
        ):
            problems.append("nothing was read from the prefix cache")
        else:
            said += f", {sum(hit > 0 for hit in hits)} of {len(hits)} prompts from the cache"
    if name == "chunked" and not number(found, "chunks") > 1:
        problems.append("the prompt came in one piece")
    return judged(identifier, problems, said, number(found, "seconds"))


def real(answer: Answer) -> tuple[Check, Check]:
    """Judge what probes/real_model.py heard from SmolLM2."""
    record = answer.record
    if answer.problem or record.get("error"):
        why = [answer.problem or str(record["error"])]
        return judged("real.answer", why, "", answer.seconds), judged("real.finish", why, "", 0.0)
    said, run = str(record.get("answer")), number(record, "longest_run")
    problems = [] if "Paris" in said else [f"asked for the capital of France it says {said[:80]!r}"]
    problems += (
        [] if run <= number(record, "most_repeated") else [f"one token comes {run:g} times running"]
    )
    ends = [
        f"{row.get('case')}: {row.get('found')}, expected is {row.get('expected')}"
        for row in rows(record, "finishes")
        if row.get("found") != row.get("expected")
    ]
    ends += [] if rows(record, "finishes") else ["nothing was asked"]
    return (
        judged("real.answer", problems, repr(said[:60]), answer.seconds),
        judged(
            "real.finish", ends, f"{len(rows(record, 'finishes'))} answers end as they should", 0.0
        ),
    )


def is_answered(answer: Answer, name: str) -> bool:
    """Whether both sides have said something of a model, right or wrong."""
    return not _unanswered(answer, _measured(answer, "models", name))


def _measured(answer: Answer, kind: str, name: str) -> Mapping[str, object]:
    return section(section(answer.record, kind), name)


def _unanswered(answer: Answer, found: Mapping[str, object]) -> str | None:
    if answer.problem or not found:
        return answer.problem or str(answer.record.get("error") or "the probe does not name it")
    return str(found["error"]) if found.get("error") else None


def _same(found: Mapping[str, object], limit: float = MAX_DIFFERENCE) -> tuple[list[str], str]:
    """What is wrong with a comparison in float32, and what is said of it where nothing is."""
    equal, total, compared, wanted, missing, behind = (
        number(found, name)
        for name in ("equal", "total", "compared", "wanted", "not_finite", "behind")
    )
    decode, prefill = number(found, "decode_difference"), number(found, "prefill_difference")
    partings = found.get("partings")
    is_tied = (
        isinstance(partings, list)
        and bool(partings)
        and all(isinstance(one, float) and one < limit for one in partings)
    )
    difference = max(decode, prefill)
    said = f"{equal:g}/{total:g} tokens equal, largest log-probability difference {difference:.1e}"
    problems = (
        []
        if found.get("same_prompt") is True
        else ["the two make different tokens of the same prompt"]
    )
    if missing:
        problems.append(f"{missing:g} of {compared:g} log-probabilities are not finite numbers")
    is_short = not (total > 0 and equal == total and compared == wanted)
    if is_short and not (is_tied and equal + behind == total and compared + behind == wanted):
        agrees = prefill < limit and wanted == 2 * total
        why = (
            "; its log-probabilities are right, so what chooses among them is wrong"
            if agrees and compared > total
            else ""
        )
        parted = (
            ", ".join(f"{one:.1e}" for one in partings if isinstance(one, float))
            if isinstance(partings, list)
            else ""
        )
        sides = (
            f" (decode {decode:.1e}, prefill"
            f" {prefill:.1e}{f', parted where the second choice is {parted} behind' if parted else ''})"
        )
        problems.append(f"{said}{sides}; {compared:g} of {wanted:g} comparisons made{why}")
    elif not (decode < limit and prefill < limit):
        problems.append(f"{said}, allowed is {limit:g}")
    return problems, said + (f", {behind:g} behind a tie" if is_short else "")


# Nats: a tenth of what parity allows. GPU kernels may add in another order the next time.
STEADY = 1e-4


@dataclass(frozen=True)
class Said:
    """The files of one round: the rows of each model as Hugging Face has them, and as vLLM has."""

    reference: Path
    vllm: Path


def settle(first: Check, second: Check, *, name: str, before: Said, after: Said) -> Check:
    """Return the verdict on a model whose parity failed. A failure stays one, but where the
    reference alone has changed, which then was none.
    """
    reference = _is_same(rows_again(before.reference, name), rows_again(after.reference, name))
    vllm = _is_same(rows_again(before.vllm, name), rows_again(after.vllm, name))
    seconds = first.seconds + second.seconds
    if not reference and vllm:
        return replace(
            second,
            evidence=(
                f"{second.evidence}; what Hugging Face said before ({first.evidence}) it does not"
                " say again"
            ),
            seconds=seconds,
        )
    if reference and vllm:
        told = "both say the same again"
    elif reference:
        told = f"vLLM does not say the same again, but {second.evidence}"
    else:
        told = f"neither of the two says the same again, but {second.evidence}"
    return replace(first, evidence=f"{first.evidence}; {told}", seconds=seconds)


def rows_again(file: Path, name: str) -> list[Mapping[str, object]]:
    """The rows of a model in a document of probes/reference.py or probes/parity.py --keep; none
    where there are none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["models"][name]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def _is_same(before: list[Mapping[str, object]], after: list[Mapping[str, object]]) -> bool:
    if not before or len(before) != len(after):
        return False
    return all(
        one.get("tokens") == other.get("tokens")
        and _is_near(one.get("logprobs"), other.get("logprobs"))
        for one, other in zip(before, after, strict=True)
    )


def _is_near(before: object, after: object) -> bool:
    if not isinstance(before, list) or not isinstance(after, list) or len(before) != len(after):
        return False
    pairs = zip(before, after, strict=True)
    return all(
        isinstance(one, float) and isinstance(other, float) and abs(one - other) < STEADY
        for one, other in pairs
    )
