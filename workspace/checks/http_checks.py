"""The verdicts on what a server replies: pure functions from an HTTP reply, and what the offline
engine says, to what is wrong, nothing where all is right.

A server that answers 200 with rubbish is as wrong as one that does not answer: whatever is read
here may be anything.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from workspace.checks.registry import rows, section

# The tiny model's tokens behind the letters are called after their numbers (probes/tiny_model.py):
# a text says which tokens it was made of.
FIRST_NAMED = 259
_NAME = re.compile(r"<(\d{1,9})>")
# What the model is to fill in, each place with few words to choose from: it was trained on nothing,
# and would go on for ever.
CHOICES: Mapping[str, tuple[object, ...]] = {
    "part": ("kernel", "patch", "pin"),
    "count": (1, 2, 3),
    "is_built": (True, False),
}
SCHEMA: Mapping[str, object] = {
    "type": "object",
    "properties": {name: {"enum": list(words)} for name, words in CHOICES.items()},
    "required": list(CHOICES),
    "additionalProperties": False,
}
SHOWN = 80


@dataclass(frozen=True)
class Row:
    """A prompt, and what the offline engine answers."""

    text: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    def named(self, count: int) -> list[int]:
        """Of the first tokens those that a text names."""
        return [token for token in self.tokens[:count] if token >= FIRST_NAMED]


@dataclass(frozen=True)
class Reply:
    """`status` is HTTP's, None where nobody replied; `text` the body, or why there is none."""

    status: int | None
    text: str
    kind: str = ""

    @property
    def document(self) -> Mapping[str, object]:
        return _document(self.text)

    @property
    def refused(self) -> str | None:
        """What was said instead of an answer, None where there is one."""
        if self.status == 200:
            return (
                None if self.document else f"it answers 200 with no document: {self.text[:SHOWN]!r}"
            )
        said = section(self.document, "error").get("message") or self.text
        return (
            f"HTTP {self.status}: {' '.join(str(said).split())[:200]}"
            if self.status
            else f"no answer: {self.text[:200]}"
        )


def offline(record: object) -> tuple[Row, ...]:
    """The rows that probes/parity.py has kept of a model; none where they are damaged."""
    try:
        return tuple(_row(row) for row in record) if isinstance(record, list) else ()
    except (KeyError, TypeError, ValueError, OverflowError):
        return ()


def completions(reply: Reply, expected: Sequence[Row], count: int) -> list[str]:
    """Judge the answers to all prompts at once: one each, in order, of the offline engine's tokens,
    counted rightly.
    """
    if reply.refused:
        return [reply.refused]
    choices = rows(reply.document, "choices")
    problems = (
        []
        if len(choices) == len(expected)
        else [f"{len(choices)} answers to {len(expected)} prompts"]
    )
    for place, (choice, row) in enumerate(zip(choices, expected, strict=False)):
        if choice.get("index") != place:
            problems.append(f"answer {place} calls itself {_shown(choice.get('index'))}")
        problems += _text(choice.get("text"), row, count) + _finish(choice, "length")
    prompt = sum(len(row.prompt) for row in expected)
    return problems + _usage(reply.document, prompt, count * len(expected))


def stopped(reply: Reply, row: Row, word: int) -> list[str]:
    """Judge an answer that was to end before the name of a token that it says."""
    if reply.refused:
        return [reply.refused]
    choice = _first(reply)
    text, named = choice.get("text"), row.named(len(row.tokens))
    is_cut = (
        isinstance(text, str)
        and f"<{word}>" not in text
        and _names(text) == named[: named.index(word)]
    )
    return ([] if is_cut else [f"asked to stop at <{word}> it says {_shown(text)}"]) + _finish(
        choice, "stop"
    )


def chat(reply: Reply, text: str, row: Row, count: int) -> list[str]:
    """Judge a chat's answer by that to the prompt which its template makes: one space behind the
    message.
    """
    if reply.refused:
        return [reply.refused]
    choice = _first(reply)
    message = section(choice, "message")
    problems = (
        []
        if message.get("role") == "assistant"
        else [f"who answers is {_shown(message.get('role'))}, no assistant"]
    )
    if not text or message.get("content") != text:
        problems.append(
            f"chat says {_shown(message.get('content'))}, completions say {_shown(text)}"
        )
    return problems + _finish(choice, "length") + _usage(reply.document, len(row.prompt) + 1, count)


def stream(reply: Reply, whole: str, *, is_chat: bool) -> tuple[list[str], int]:
    """Judge a streamed answer by the one that came whole; return also in how many pieces it
    came.
    """
    if reply.status != 200:
        return [reply.refused or ""], 0
    problems = (
        []
        if reply.kind.startswith("text/event-stream")
        else [f"it is sent as {_shown(reply.kind)}, no stream of events"]
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
        problems.append("an event of it is no document")
    errors = [section(document, "error") for document in documents if document.get("error")]
    problems += [
        f"in the middle of it stands an error: {str(error.get('message'))[:SHOWN]}"
        for error in errors
    ]
    choices = [choice for document in documents for choice in rows(document, "choices")]
    pieces = [
        section(choice, "delta").get("content") if is_chat else choice.get("text")
        for choice in choices
    ]
    told = [piece for piece in pieces if isinstance(piece, str) and piece]
    if not whole or "".join(told) != whole:
        problems.append(f"its pieces make {_shown(''.join(told))}, whole it is {_shown(whole)}")
    if len(told) < 2:
        problems.append(f"it comes in {len(told)} pieces")
    finishes = [choice.get("finish_reason") for choice in choices if choice.get("finish_reason")]
    return problems + (
        []
        if finishes == ["length"]
        else [f"it ends by {_shown(finishes)}, expected is length, once"]
    ), len(told)


def logprobs(reply: Reply, expected: Sequence[Row], limit: float) -> tuple[list[str], str]:
    """Judge tokens and log-probabilities by the offline engine's; `limit` in nats. Return also what
    is said of them where all is right.
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
        same = [token == f"token_id:{one}" for token, _, one, _ in pairs]
        equal += sum(same)
        # Behind a token that differs nothing can be compared.
        differences += [
            _distance(chance, other)
            for _, chance, _, other in pairs[: same.index(False) if False in same else None]
        ]
    total = sum(len(row.tokens) for row in expected)
    worst = max(differences, default=math.inf)
    said = f"{equal} of {total} tokens as offline, largest log-probability difference {worst:.1e}"
    is_same = equal == total > 0 and len(differences) == total
    return ([] if is_same and worst < limit else [f"{said}, allowed is {limit:g}"]), said


def structured(reply: Reply) -> tuple[list[str], str]:
    """Judge whether an answer is what SCHEMA allows. Return also the answer."""
    if reply.refused:
        return [reply.refused], ""
    choice = _first(reply)
    content = section(choice, "message").get("content")
    found = _document(content if isinstance(content, str) else "")
    # A truth is a number to Python, and none to JSON.
    fits = found.keys() == CHOICES.keys() and all(
        (type(found[name]), found[name]) in [(type(word), word) for word in CHOICES[name]]
        for name in CHOICES
    )
    problems = [] if fits else [f"the schema is not obeyed: {_shown(content)}"]
    return problems + _finish(choice, "stop"), " ".join(str(content).split())


def refused(case: str, reply: Reply) -> list[str]:
    """Judge the reply to a request that nobody can serve: a status from 400 to 499 and a word
    why.
    """
    if reply.status is None or not 400 <= reply.status < 500:
        return [f"{case}: {reply.refused or 'it was answered with 200'}"]
    said = (
        section(reply.document, "error").get("message")
        or reply.document.get("detail")
        or reply.document.get("message")
    )
    return [] if said else [f"{case}: HTTP {reply.status} without a word why"]


def text_of(reply: Reply) -> str:
    """The text of the first answer, empty where there is none."""
    text = _first(reply).get("text")
    return text if isinstance(text, str) else ""


def _row(record: Mapping[str, list[float]]) -> Row:
    tokens, logprobs = tuple(map(int, record["tokens"])), tuple(map(float, record["logprobs"]))
    return Row(str(record["text"]), tuple(map(int, record["prompt"])), tokens, logprobs)


def _text(text: object, row: Row, count: int) -> list[str]:
    if isinstance(text, str) and row.named(count) and _names(text) == row.named(count):
        return []
    return [
        (
            f"to {row.text[:20]!r} it says {_shown(text)}, offline it says"
            f" {' '.join(f'<{token}>' for token in row.named(count)[:4])} …"
        )
    ]


def _names(text: object) -> list[int]:
    return [int(name) for name in _NAME.findall(text)] if isinstance(text, str) else []


def _finish(choice: Mapping[str, object], expected: str) -> list[str]:
    found = choice.get("finish_reason")
    return [] if found == expected else [f"it ends by {_shown(found)}, expected is {expected}"]


def _usage(document: Mapping[str, object], prompt: int, answer: int) -> list[str]:
    usage = section(document, "usage")
    found = [usage.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
    return (
        []
        if found == [prompt, answer, prompt + answer]
        else [f"it counts {_shown(found)} tokens, there are {[prompt, answer, prompt + answer]}"]
    )


def _first(reply: Reply) -> Mapping[str, object]:
    return next(iter(rows(reply.document, "choices")), {})


def _distance(one: object, other: float) -> float:
    return abs(one - other) if isinstance(one, float) and math.isfinite(one) else math.inf


def _shown(text: object) -> str:
    return repr(text[:SHOWN] if isinstance(text, str) else text)[: 2 * SHOWN]


def _document(text: str) -> Mapping[str, object]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
