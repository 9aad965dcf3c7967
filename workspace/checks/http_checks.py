"""Verdicts on a server's HTTP replies: pure functions that return the problems of a reply.

They compare a reply with the offline engine's answer. A reply may contain anything: a server that
answers 200 with rubbish is as wrong as a server that does not answer.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from workspace.checks.registry import rows, section
from workspace.core import records

# The tiny model's tokens after the letters are named by their ids (probes/small_model.py), so a
# text names the tokens that it was made from.
FIRST_NAMED = 259
_NAME = re.compile(r"<(\d{1,9})>")
# The fields that the model fills in, each with few choices: the model is untrained and would never
# end on its own.
CHOICES: Mapping[str, tuple[object, ...]] = {
    "part": ("kernel", "patch", "pin"),
    "count": (1, 2, 3),
    "is_built": (True, False),
}
SCHEMA: Mapping[str, object] = {
    "type": "object",
    "properties": {name: {"enum": list(values)} for name, values in CHOICES.items()},
    "required": list(CHOICES),
    "additionalProperties": False,
}
SHOWN = 80
# Filters of random samples that leave the most likely token only.
STRICT: Mapping[str, object] = {"top_k": 1, "top_p": 1e-6, "min_p": 1.0}
# Parameters of the engine that a request has not.
_OFFLINE = {"detokenize"}


@dataclass(frozen=True)
class OfflineAnswer:
    """A prompt and the offline engine's answer to it."""

    text: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    def named(self, count: int) -> list[int]:
        """Return those of the first `count` tokens that a text names."""
        return [token for token in self.tokens[:count] if token >= FIRST_NAMED]


@dataclass(frozen=True)
class Reply:
    """An HTTP reply. `status` is None without a reply; `text` is the body, or the failure."""

    status: int | None
    text: str
    kind: str = ""

    @property
    def document(self) -> Mapping[str, object]:
        return _document(self.text)

    @property
    def refused(self) -> str | None:
        """The error that came instead of an answer, None if there is an answer."""
        if self.status == 200:
            return (
                None
                if self.document
                else f"it answers 200 without a document: {self.text[:SHOWN]!r}"
            )
        message = section(self.document, "error").get("message") or self.text
        return (
            f"HTTP {self.status}: {' '.join(str(message).split())[:200]}"
            if self.status
            else f"no answer: {self.text[:200]}"
        )


def offline(record: object) -> tuple[OfflineAnswer, ...]:
    """Return the rows that probes/parity.py kept of a model; empty if they are damaged."""
    try:
        return tuple(_row(row) for row in record) if isinstance(record, list) else ()
    except (KeyError, TypeError, ValueError, OverflowError):
        return ()


@dataclass(frozen=True)
class Conversation:
    """The messages of a chat with further arguments of its request, and Hugging Face's tokens."""

    messages: tuple[object, ...]
    more: Mapping[str, object]
    tokens: tuple[int, ...]


def conversations(record: Mapping[str, object]) -> tuple[Conversation, ...]:
    """Return the conversations of probes/sampling.py; empty if they are damaged."""
    found = []
    for row in rows(record, "chats"):
        messages, tokens = row.get("messages"), row.get("tokens")
        if not isinstance(messages, list) or not isinstance(tokens, list):
            return ()
        found.append(Conversation(tuple(messages), section(row, "more"), tuple(tokens)))
    return tuple(found)


def cases(record: Mapping[str, object]) -> tuple[Mapping[str, object], ...]:
    """Return the cases of `reference.py --sampling` that have one right answer and whose
    parameters a request has, and the filters of STRICT; empty if there are none.
    """
    known = section(record, "sampling")
    found = [
        case
        for case in rows(known, "cases")
        if isinstance(case.get("tokens"), list) and not _OFFLINE & section(case, "params").keys()
    ]
    plain = next((case for case in found if case.get("case") == "logprobs"), {})
    strict = [
        {
            **plain,
            "case": name,
            "params": {**section(plain, "params"), "temperature": 1.5, name: value},
        }
        for name, value in STRICT.items()
        if plain
    ]
    both = {name: known.get(name) for name in ("prompt", "message")}
    return tuple({**case, **both} for case in (*found, *strict))


def parameter(reply: Reply, case: Mapping[str, object]) -> list[str]:
    """Judge the answer to a completion or a chat with a changed parameter by the reference's."""
    if reply.refused:
        return [f"{case.get('case')}: {reply.refused}"]
    choice, tokens = _first(reply), case["tokens"]
    found = choice.get("token_ids")
    if case.get("is_cut") and isinstance(found, list) and isinstance(tokens, list):
        # What follows comes after a tie.
        return [] if found[: len(tokens)] == tokens else [f"{case.get('case')}: {_shown(found)}"]
    text = section(choice, "message").get("content") or choice.get("text") or ""
    pairs = (
        (found, tokens),
        (text, case.get("text")),
        (choice.get("finish_reason"), case.get("finish")),
        (choice.get("stop_reason"), case.get("stop")),
    )
    return [
        f"{case.get('case')}: {_shown(one)}, expected {_shown(other)}"
        for one, other in pairs
        if one != other
    ]


def sampled(several: Reply, seeds: Sequence[Reply]) -> list[str]:
    """Judge three answers to one request, and two answers with one seed before one with another."""
    texts = [choice.get("text") for choice in rows(several.document, "choices")]
    first, again, other = map(text_of, seeds)
    problems = [] if len(set(map(str, texts))) == 3 else [f"n 3: the answers are {_shown(texts)}"]
    problems += [] if first and first == again else ["seed: the same seed does not repeat"]
    return problems + ([] if first != other else ["seed: another seed gives the same answer"])


def completions(reply: Reply, expected: Sequence[OfflineAnswer], count: int) -> list[str]:
    """Judge one reply to all prompts: the offline engine's tokens, in order and counted right."""
    if reply.refused:
        return [reply.refused]
    choices = rows(reply.document, "choices")
    problems = (
        []
        if len(choices) == len(expected)
        else [f"{len(choices)} answers to {len(expected)} prompts"]
    )
    for index, (choice, row) in enumerate(zip(choices, expected, strict=False)):
        if choice.get("index") != index:
            problems.append(f"answer {index} has the index {_shown(choice.get('index'))}")
        problems += _text(choice.get("text"), row, count) + _finish(choice, "length")
    prompt = sum(len(row.prompt) for row in expected)
    return problems + _usage(reply.document, prompt, count * len(expected))


def stopped(reply: Reply, row: OfflineAnswer, stop: int) -> list[str]:
    """Judge an answer that must stop before the name of the token `stop`."""
    if reply.refused:
        return [reply.refused]
    choice = _first(reply)
    text, named = choice.get("text"), row.named(len(row.tokens))
    is_cut = (
        isinstance(text, str)
        and f"<{stop}>" not in text
        and _names(text) == named[: named.index(stop)]
    )
    problems = [] if is_cut else [f"with the stop string <{stop}> it answers {_shown(text)}"]
    return problems + _finish(choice, "stop")


def chat(reply: Reply, text: str, prompt: int, count: int) -> list[str]:
    """Judge a chat answer by the completion of its prompt, which has this many tokens."""
    if reply.refused:
        return [reply.refused]
    choice = _first(reply)
    message = section(choice, "message")
    problems = (
        []
        if message.get("role") == "assistant"
        else [f"the role of the answer is {_shown(message.get('role'))}, expected assistant"]
    )
    if not text or message.get("content") != text:
        problems.append(
            f"chat answers {_shown(message.get('content'))}, completions answer {_shown(text)}"
        )
    return problems + _finish(choice, "length") + _usage(reply.document, prompt, count)


def rendered(reply: Reply, expected: Conversation) -> list[str]:
    """Judge the tokens that the server makes of a conversation."""
    found = reply.document.get("prompt_token_ids")
    if reply.refused or found == list(expected.tokens):
        return [reply.refused] if reply.refused else []
    return [f"the tokens of {_shown(expected.messages)} are {_shown(found)}, not Hugging Face's"]


def stream(reply: Reply, whole: str, *, is_chat: bool) -> tuple[list[str], int]:
    """Judge a streamed answer by the complete one; return also the number of pieces."""
    if reply.status != 200:
        return [reply.refused or ""], 0
    problems = (
        []
        if reply.kind.startswith("text/event-stream")
        else [f"its content type is {_shown(reply.kind)}, not text/event-stream"]
    )
    events = [line for line in reply.text.splitlines() if line.strip()]
    if events[-1:] != ["data: [DONE]"]:
        problems.append(
            f"it does not end with [DONE] but with {_shown(events[-1] if events else '')}"
        )
    documents = [
        _document(event.removeprefix("data:")) for event in events if event != "data: [DONE]"
    ]
    if not all(documents):
        problems.append("one of its events is not a document")
    errors = [section(document, "error") for document in documents if document.get("error")]
    problems += [f"it contains an error: {str(error.get('message'))[:SHOWN]}" for error in errors]
    choices = [choice for document in documents for choice in rows(document, "choices")]
    pieces = [
        section(choice, "delta").get("content") if is_chat else choice.get("text")
        for choice in choices
    ]
    texts = [piece for piece in pieces if isinstance(piece, str) and piece]
    if not whole or "".join(texts) != whole:
        problems.append(
            f"its pieces make {_shown(''.join(texts))}, the complete answer is {_shown(whole)}"
        )
    if len(texts) < 2:
        problems.append(f"it comes in {len(texts)} pieces")
    finishes = [choice.get("finish_reason") for choice in choices if choice.get("finish_reason")]
    return problems + (
        []
        if finishes == ["length"]
        else [f"its finish reasons are {_shown(finishes)}, expected length, once"]
    ), len(texts)


def logprobs(
    reply: Reply, expected: Sequence[OfflineAnswer], limit: float
) -> tuple[list[str], str]:
    """Judge tokens and log-probabilities by the offline engine's; `limit` in nats.

    Returns also the evidence for a pass.
    """
    if reply.refused:
        return [reply.refused], ""
    equal = 0
    differences: list[float] = []
    for choice, row in zip(rows(reply.document, "choices"), expected, strict=False):
        found = section(choice, "logprobs")
        tokens, chances = found.get("tokens"), found.get("token_logprobs")
        pairs = (
            list(zip(tokens, chances, row.tokens, row.logprobs, strict=False))
            if isinstance(tokens, list) and isinstance(chances, list)
            else []
        )
        same = [token == f"token_id:{wanted}" for token, _, wanted, _ in pairs]
        equal += sum(same)
        # After the first different token nothing is comparable.
        differences += [
            _distance(chance, other)
            for _, chance, _, other in pairs[: same.index(False) if False in same else None]
        ]
    total = sum(len(row.tokens) for row in expected)
    worst = max(differences, default=math.inf)
    evidence = (
        f"{equal} of {total} tokens as offline, largest log-probability difference {worst:.1e}"
    )
    is_same = equal == total > 0 and len(differences) == total
    return ([] if is_same and worst < limit else [f"{evidence}, the limit is {limit:g}"]), evidence


def structured(reply: Reply) -> tuple[list[str], str]:
    """Judge whether an answer obeys SCHEMA; return also the answer."""
    if reply.refused:
        return [reply.refused], ""
    choice = _first(reply)
    content = section(choice, "message").get("content")
    found = _document(content if isinstance(content, str) else "")
    # True equals 1 in Python, but not in JSON.
    fits = found.keys() == CHOICES.keys() and all(
        (type(found[name]), found[name]) in [(type(value), value) for value in CHOICES[name]]
        for name in CHOICES
    )
    problems = [] if fits else [f"the answer does not obey the schema: {_shown(content)}"]
    return problems + _finish(choice, "stop"), " ".join(str(content).split())


def refused(case: str, reply: Reply) -> list[str]:
    """Judge the reply to a bad request: a status from 400 to 499 and a reason."""
    if reply.status is None or not 400 <= reply.status < 500:
        return [f"{case}: {reply.refused or 'the answer is 200'}"]
    message = (
        section(reply.document, "error").get("message")
        or reply.document.get("detail")
        or reply.document.get("message")
    )
    return [] if message else [f"{case}: HTTP {reply.status} without a reason"]


def text_of(reply: Reply) -> str:
    """Return the text of the first answer, empty without one."""
    text = _first(reply).get("text")
    return text if isinstance(text, str) else ""


def _row(record: Mapping[str, list[float]]) -> OfflineAnswer:
    tokens, logprobs = tuple(map(int, record["tokens"])), tuple(map(float, record["logprobs"]))
    return OfflineAnswer(str(record["text"]), tuple(map(int, record["prompt"])), tokens, logprobs)


def _text(text: object, row: OfflineAnswer, count: int) -> list[str]:
    if isinstance(text, str) and row.named(count) and _names(text) == row.named(count):
        return []
    return [
        (
            f"the answer to {row.text[:20]!r} is {_shown(text)}, offline it is"
            f" {' '.join(f'<{token}>' for token in row.named(count)[:4])} …"
        )
    ]


def _names(text: object) -> list[int]:
    return [int(name) for name in _NAME.findall(text)] if isinstance(text, str) else []


def _finish(choice: Mapping[str, object], expected: str) -> list[str]:
    found = choice.get("finish_reason")
    return (
        [] if found == expected else [f"its finish reason is {_shown(found)}, expected {expected}"]
    )


def _usage(document: Mapping[str, object], prompt: int, answer: int) -> list[str]:
    usage = section(document, "usage")
    found = [usage.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
    return (
        []
        if found == [prompt, answer, prompt + answer]
        else [f"its usage is {_shown(found)}, expected {[prompt, answer, prompt + answer]}"]
    )


def _first(reply: Reply) -> Mapping[str, object]:
    return next(iter(rows(reply.document, "choices")), {})


def _distance(found: object, expected: float) -> float:
    return abs(found - expected) if isinstance(found, float) and math.isfinite(found) else math.inf


def _shown(text: object) -> str:
    return repr(text[:SHOWN] if isinstance(text, str) else text)[: 2 * SHOWN]


def _document(text: str) -> Mapping[str, object]:
    try:
        return records.decode(text, dict[str, object])
    except records.DecodeError:
        return {}
