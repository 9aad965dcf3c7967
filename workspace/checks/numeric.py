"""Verdicts on numbers: operators against torch, models against Hugging Face, vLLM against itself.

They also judge a real model's answers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from workspace.checks.probe_runs import Answer
from workspace.checks.registry import Check, judged, number, rows, section
from workspace.core import records
from workspace.core.errors import counted

# Nats. Measured with vLLM 0.31.0 on an x86-64 CPU, 5 x 64 tokens, decode and prefill: 2e-5 (Qwen3)
# to 1e-4 (Llama) for a right build (on an emulated aarch64 1.5e-5 and 7.4e-5), 0.12 with an
# attention scale that is off by 1 %, which changed none of the 320 tokens.
MAX_DIFFERENCE = 1e-3
# Mixtral's router amplifies the rounding that the order of the experts' additions leaves: 5.2e-4
# for a right build on x86-64, 5.1e-4 on an H200; not measured on aarch64.
_LIMITS = {"mixtral": 5 * MAX_DIFFERENCE}
# Nats, the mean over a prompt's answer: bfloat16 rounds to 1 part in 256, and rounding errors have
# no sign. On the tiny gpt-oss bfloat16 costs Hugging Face itself 0.026, and vLLM 0.024 on an x86-64
# CPU with AMX, 0.022 on an H200; missing sinks cost 0.84, a window that is one longer costs 0.23.
MAX_MEAN_BFLOAT16 = 0.05
# The checks of probes/sampling.py: by its first engine, by the second, too, and by an adapter, too.
RAW = ("templates.tokens", "cache.blocks", "sampling.random", "sampling.ends")
PROCESSED = (
    "sampling.logprobs",
    "sampling.penalties",
    "sampling.masks",
    "sampling.filters",
)
ADAPTER = "cache.keys"
# The options of its engines, which `sampling` judges; on a GPU an adapter needs another type.
ENGINES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "cpu": ((), ("--processed", "--adapter")),
    "cuda": ((), ("--processed",), ("--adapter",)),
}
# The kinds of layers that parity.py compares, each with the forms that some tiny model must have.
LAYERS: Mapping[str, tuple[str, ...]] = {
    "embedding": (),
    "norm": ("an epsilon",),
    "linear": ("biases",),
    "rotary": ("rope scaled by llama3", "rope scaled by yarn"),
    "attention": ("a window",),
    "mlp": ("biases",),
}
# The checks of each part of probes/engine.py, which has an engine of its own.
ENGINE: Mapping[str, tuple[str, ...]] = {
    "memory": ("engine.preemption", "engine.abort"),
    "speculation": ("engine.speculation",),
    "adapters": ("engine.adapters",),
    "pooling": ("engine.pooling",),
}
# Seconds of loading and compilation from which on they are mentioned.
SHOWN_S = 1.0


def merged(answers: Iterable[Answer]) -> Mapping[str, object]:
    """Merge the documents of the parity probe for several models into one."""
    documents = [answer.record for answer in answers]
    parts = {
        name: {key: part for one in documents for key, part in section(one, name).items()}
        for name in ("models", "layers", "seconds")
    }
    return {**next(filter(None, documents), {}), **parts}


def kernels(answer: Answer, group: str) -> Check:
    """Judge one group of probes/kernels.py.

    Its seconds are without those that only a first run takes, to load and compile kernels.
    """
    identifier = f"kernels.{group}"
    found = section(section(answer.record, "groups"), group)
    first_s = max(0.0, number(found, "first_s")) if "first_s" in found else 0.0
    seconds = number(found, "seconds") - first_s if found else answer.seconds
    if answer.problem or not found:
        return judged(
            identifier,
            [answer.problem or str(answer.record.get("error") or "the probe did not report it")],
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
                f"{case.get('case')}: off by {difference:.3g}, the limit is {limit:g} (roundings)"
            )
    worst = max((number(case, "difference") / number(case, "limit") for case in cases), default=0.0)
    return judged(
        identifier,
        problems,
        f"{counted(len(cases), 'case')}, largest error {worst:.0%} of the tolerance"
        + (f"; loading and compilation {first_s:.1f} s" if first_s >= SHOWN_S else ""),
        seconds,
    )


def layers(answers: Mapping[str, Answer], kind: str) -> Check:
    """Judge the layers of one kind in the models of probes/parity.py, by name.

    A model that gave no answer fails its parity, and no check of layers that another model has.
    """
    answered = {name: answer for name, answer in answers.items() if is_answered(answer, name)}
    problems: list[str] = []
    forms: list[object] = []
    count, worst, seconds = 0, 0.0, 0.0
    for name, answer in answered.items() or answers.items():
        measured = _measured(answer, "layers", name)
        found = section(measured, kind)
        cases = rows(found, "rows")
        if not cases:
            problems.append(_failure_of(answer, measured) or f"{name}: no layer was compared")
            continue
        count, seconds = count + len(cases), seconds + number(found, "seconds")
        forms += [form for form in _list(found, "forms") if form not in forms]
        for case in cases:
            difference, limit = number(case, "difference"), number(case, "limit")
            worst = max(worst, difference / limit)
            if not difference <= limit:
                problems.append(
                    f"{name}, {case.get('case')}: off by {difference:.3g}, the limit is {limit:g}"
                    " (roundings)"
                )
    if not problems and len(answered) == len(answers):
        problems = [f"no tiny model has {form}" for form in LAYERS[kind] if form not in forms]
    fine = f"{counted(count, 'case')}, largest error {worst:.0%} of the tolerance"
    fine += f"; with {', '.join(map(str, forms))}" if forms else ""
    return judged(f"layers.{kind}", problems, fine, seconds)


def _list(record: Mapping[str, object], name: str) -> list[object]:
    found = record.get(name)
    return found if isinstance(found, list) else []


def sampling(raw: Answer, *others: Answer) -> list[tuple[tuple[Check, ...], Answer]]:
    """Judge what the engines of probes/sampling.py answered, in the order of ENGINES; some checks
    have a part in two of them.
    """
    processed, adapter = others[0], others[-1]
    keys = parameters(ADAPTER, raw, adapter)
    both = tuple(parameters(name, raw, processed) for name in PROCESSED)
    return [
        (tuple(parameters(name, raw) for name in RAW), raw),
        ((*both, keys), processed),
        *(((), answer) for answer in others[1:]),
    ]


def parameters(identifier: str, *answers: Answer) -> Check:
    """Judge one check by its cases in documents of probes/sampling.py or engine.py, each of which
    has some. A case may have a limit of its own.
    """
    problems: list[str] = []
    count, worst, seconds = 0, 0.0, 0.0
    for answer in answers:
        found = section(section(answer.record, "groups"), identifier)
        seconds += number(found, "seconds") if found else 0.0
        if problem := _failure_of(answer, found):
            problems.append(problem)
        for case in rows(found, "rows"):
            count += 1
            if case.get("problem"):
                problems.append(f"{case.get('case')} {case['problem']}")
            elif "difference" in case:
                difference = number(case, "difference")
                worst = max(worst, difference)
                limit = number(case, "limit") if "limit" in case else MAX_DIFFERENCE
                if not difference < limit:
                    problems.append(
                        f"{case.get('case')} differ by {difference:.1e}, the limit is {limit:g}"
                    )
    problems += [] if count or problems else ["nothing was compared"]
    fine = counted(count, "comparison") + (f", largest difference {worst:.1e}" if worst else "")
    return judged(identifier, problems, fine, seconds)


def parity(answer: Answer, name: str, identifier: str | None = None) -> Check:
    """Judge one model of probes/parity.py: equal tokens, every log-probability within the limit.

    A tie may fall either way: tokens may differ where the reference's second choice is nearer than
    the limit. Equal tokens are required in float32 only.
    """
    identifier = identifier or f"parity.{name}"
    found = _measured(answer, "models", name)
    seconds = sum(
        value for value in section(found, "seconds").values() if isinstance(value, int | float)
    )
    if problem := _failure_of(answer, found):
        return judged(identifier, [problem], "", seconds or answer.seconds)
    problems, evidence = _compare(found, _LIMITS.get(name, MAX_DIFFERENCE))
    return judged(identifier, problems, evidence, seconds)


def bfloat16(answer: Answer, name: str, identifier: str = "parity.bfloat16") -> Check:
    """Judge the log-probabilities of the reference's own tokens.

    Near-ties flip in bfloat16, and all tokens after a flip differ, so tokens are not compared.
    """
    found = _measured(answer, "models", name)
    if problem := _failure_of(answer, found):
        return judged(identifier, [problem], "", answer.seconds)
    mean, missing = number(found, "mean_difference"), number(found, "not_finite")
    problems = [f"{missing:g} log-probabilities are not finite numbers"] if missing else []
    evidence = f"mean difference of log-probabilities {mean:.1e}"
    problems += (
        [] if mean < MAX_MEAN_BFLOAT16 else [f"{evidence}, the limit is {MAX_MEAN_BFLOAT16:g}"]
    )
    return judged(identifier, problems, evidence, answer.seconds)


def mxfp4(answer: Answer) -> Check:
    """Judge a tiny gpt-oss as `bfloat16` does, which is a prefill, and by vLLM's decode.

    For its own tokens, vLLM's decode and prefill must agree.
    """
    check = bfloat16(answer, "gpt-oss", "parity.gpt-oss")
    own = number(_measured(answer, "models", "gpt-oss"), "own_difference")
    if check.verdict == "fail":
        return check
    evidence = f"{check.evidence}, of decode from prefill {own:.1e}"
    problems = (
        [] if own < MAX_MEAN_BFLOAT16 else [f"{evidence}, the limit is {MAX_MEAN_BFLOAT16:g}"]
    )
    return judged("parity.gpt-oss", problems, evidence, answer.seconds)


def consistency(answer: Answer, name: str) -> Check:
    """Judge a comparison of vLLM with itself: two runs, or two ways to ask for the same answer."""
    identifier = f"consistency.{name}"
    found = _measured(answer, "consistency", name)
    if problem := _failure_of(answer, found):
        return judged(identifier, [problem], "", answer.seconds)
    problems, evidence = _compare(found)
    if name == "prefix":
        hits = found.get("cached")
        if (
            not isinstance(hits, list)
            or not all(isinstance(hit, int) for hit in hits)
            or max(hits, default=0) <= 0
        ):
            problems.append("nothing was read from the prefix cache")
        else:
            evidence += f", {sum(hit > 0 for hit in hits)} of {len(hits)} prompts from the cache"
    if name == "chunked" and not number(found, "chunks") > 1:
        problems.append("the prompt was processed in one piece")
    return judged(identifier, problems, evidence, number(found, "seconds"))


def real(answer: Answer) -> tuple[Check, Check]:
    """Judge the answers of SmolLM2 from probes/real_model.py."""
    record = answer.record
    if answer.problem or record.get("error"):
        why = [answer.problem or str(record["error"])]
        return judged("real.answer", why, "", answer.seconds), judged("real.finish", why, "", 0.0)
    answered, run = str(record.get("answer"))[:60], number(record, "longest_run")
    compared = rows(record, "compared")
    equal = sum(number(row, "equal") for row in compared)
    problems = [] if compared else ["nothing was compared"]
    problems += [problem for row in compared for problem in _unlike(row)]
    problems += (
        []
        if run <= number(record, "most_repeated")
        else [f"one token repeats {run:g} times in a row"]
    )
    ends = [
        f"{row.get('case')}: {row.get('found')}, expected {row.get('expected')}"
        for row in rows(record, "finishes")
        if row.get("found") != row.get("expected")
    ]
    ends += [] if rows(record, "finishes") else ["the probe asked nothing"]
    return (
        judged("real.answer", problems, f"{equal:g} tokens equal, {answered!r}", answer.seconds),
        judged(
            "real.finish", ends, f"{len(rows(record, 'finishes'))} answers end as expected", 0.0
        ),
    )


def _unlike(row: Mapping[str, object]) -> list[str]:
    """Return the problems of an answer of SmolLM2; it may part from Hugging Face's at a tie."""
    equal, total = number(row, "equal"), number(row, "total")
    problems = (
        []
        if row.get("same_prompt") is True
        else [f"the tokens of {row.get('text')!r} differ from Hugging Face's"]
    )
    if not (equal == total > 0 or number(row, "parting") < MAX_DIFFERENCE):
        problems.append(
            f"{equal:g} of the first {total:g} tokens of the answer to {row.get('text')!r} are"
            " Hugging Face's"
        )
    return problems


def is_answered(answer: Answer, name: str) -> bool:
    """Return whether both engines gave an answer for the model, right or wrong."""
    return not _failure_of(answer, _measured(answer, "models", name))


def _measured(answer: Answer, kind: str, name: str) -> Mapping[str, object]:
    return section(section(answer.record, kind), name)


def _failure_of(answer: Answer, found: Mapping[str, object]) -> str | None:
    if answer.problem or not found:
        return answer.problem or str(answer.record.get("error") or "the probe did not report it")
    return str(found["error"]) if found.get("error") else None


@dataclass(frozen=True)
class _Measured:
    """The numbers of one comparison in float32; NaN where the probe gave none."""

    equal: float
    total: float
    compared: float
    wanted: float
    not_finite: float
    behind: float
    decode_difference: float
    prefill_difference: float
    # Where the tokens differ: how far the reference's second choice is behind its first.
    partings: tuple[object, ...]

    @property
    def summary(self) -> str:
        difference = max(self.decode_difference, self.prefill_difference)
        return (
            f"{self.equal:g}/{self.total:g} tokens equal,"
            f" largest log-probability difference {difference:.1e}"
        )

    @property
    def is_short(self) -> bool:
        """Whether a token differs or a comparison is missing."""
        return not (self.total > 0 and self.equal == self.total and self.compared == self.wanted)

    def is_tied(self, limit: float) -> bool:
        """Return whether all that is missing comes after a tie."""
        return (
            bool(self.partings)
            and all(isinstance(value, float) and value < limit for value in self.partings)
            and self.equal + self.behind == self.total
            and self.compared + self.behind == self.wanted
        )

    def shortfall(self, limit: float) -> str:
        """Return the sentence on tokens that differ and comparisons that are missing."""
        parted = ", ".join(f"{value:.1e}" for value in self.partings if isinstance(value, float))
        details = f"decode {self.decode_difference:.1e}, prefill {self.prefill_difference:.1e}"
        if parted:
            details += f", tokens differ where the second choice is {parted} behind"
        sampler = (
            "; its log-probabilities are right, so the choice of tokens is wrong"
            if self.decode_difference < limit
            and self.prefill_difference < limit
            and self.wanted == 2 * self.total
            and self.compared > self.total
            else ""
        )
        made = f"{self.compared:g} of {self.wanted:g} comparisons made"
        return f"{self.summary} ({details}); {made}{sampler}"


def _read_measured(found: Mapping[str, object]) -> _Measured:
    return _Measured(
        equal=number(found, "equal"),
        total=number(found, "total"),
        compared=number(found, "compared"),
        wanted=number(found, "wanted"),
        not_finite=number(found, "not_finite"),
        behind=number(found, "behind"),
        decode_difference=number(found, "decode_difference"),
        prefill_difference=number(found, "prefill_difference"),
        partings=tuple(_list(found, "partings")),
    )


def _compare(found: Mapping[str, object], limit: float = MAX_DIFFERENCE) -> tuple[list[str], str]:
    """Return the problems of a comparison in float32, and the evidence for a pass."""
    measured = _read_measured(found)
    problems = (
        []
        if found.get("same_prompt") is True
        else ["the two engines make different tokens of the same prompt"]
    )
    if measured.not_finite:
        problems.append(
            f"{measured.not_finite:g} of {measured.compared:g} log-probabilities are not finite"
            " numbers"
        )
    if measured.is_short and not measured.is_tied(limit):
        problems.append(measured.shortfall(limit))
    elif not (measured.decode_difference < limit and measured.prefill_difference < limit):
        problems.append(f"{measured.summary}, the limit is {limit:g}")
    tie = f", {measured.behind:g} behind a tie" if measured.is_short else ""
    return problems, measured.summary + tie


@dataclass(frozen=True)
class _Answers:
    """The rows of each model, in a document of a probe."""

    models: Mapping[str, list[dict[str, object]]]


def read_rows(file: Path, name: str) -> list[Mapping[str, object]]:
    """Return a model's rows from a document of probes/reference.py or `probes/parity.py --keep`.

    Empty if there are none.
    """
    found = records.read(file, _Answers)
    return list(found.models.get(name, ())) if found else []
