"""Verdicts on a server's HTTP replies: pure functions that return the problems of a reply.

They compare a reply with the offline engine's answer, or with Hugging Face's. A reply may contain
anything: a server that answers 200 with rubbish is as wrong as one that does not answer.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from workspace.checks.numeric import MAX_DIFFERENCE
from workspace.checks.registry import rows, section
from workspace.core import records

T = TypeVar("T")

# The tiny model's tokens after the letters are named by their ids (probes/small_model.py), so a
# text names the tokens that it was made from.
FIRST_NAMED = 259
_NAME = re.compile(r"<(\d{1,9})>")
SHOWN = 80
# The last event of a stream.
DONE = "data: [DONE]"
# Most likely tokens that a request is for.
TOP = 5
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
        return parsed(self.text)

    @property
    def failure(self) -> str | None:
        """The error of another status than 200, where an answer may be a stream."""
        return None if self.status == 200 else self.refused

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


@dataclass(frozen=True)
class _Logprobs:
    """The log-probabilities of a completion."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


@dataclass(frozen=True)
class _Ranked:
    """A log-probability of a prompt."""

    logprob: float
    rank: int
    decoded_token: str | None


def offline(record: object) -> tuple[OfflineAnswer, ...]:
    """Return the rows that probes/parity.py kept of a model; empty if they are damaged."""
    try:
        return tuple(_row(row) for row in record) if isinstance(record, list) else ()
    except (KeyError, TypeError, ValueError, OverflowError):
        return ()


@dataclass(frozen=True)
class Position:
    """Log-probabilities of a position: the most likely tokens or listed ones, and `token`, which is
    there, with the lowest and the highest rank that rounding allows.
    """

    ids: list[int]
    logprobs: list[float]
    token: int | None = None
    logprob: float = 0.0
    ranks: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Conversation:
    """The messages of a chat with further arguments of its request, and Hugging Face's text and
    tokens.
    """

    messages: list[dict[str, object]]
    more: dict[str, object]
    tokens: list[int]
    text: str


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
    choice, tokens = first(reply), case["tokens"]
    found = choice.get("token_ids")
    if case.get("is_cut") and isinstance(found, list) and isinstance(tokens, list):
        # What follows comes after a tie.
        return [] if found[: len(tokens)] == tokens else [f"{case.get('case')}: {shown(found)}"]
    text = section(choice, "message").get("content") or choice.get("text") or ""
    pairs = (
        (found, tokens),
        (text, case.get("text")),
        (choice.get("finish_reason"), case.get("finish")),
        (choice.get("stop_reason"), case.get("stop")),
    )
    return [
        f"{case.get('case')}: {shown(one)}, expected {shown(other)}"
        for one, other in pairs
        if one != other
    ]


def sampled(several: Reply, seeds: Sequence[Reply]) -> list[str]:
    """Judge three answers to one request, and two answers with one seed before one with another."""
    texts = [choice.get("text") for choice in rows(several.document, "choices")]
    first, again, other = map(text_of, seeds)
    problems = [] if len(set(map(str, texts))) == 3 else [f"n 3: the answers are {shown(texts)}"]
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
            problems.append(f"answer {index} has the index {shown(choice.get('index'))}")
        problems += _text(choice.get("text"), row, count) + finish(choice, "length")
    prompt = sum(len(row.prompt) for row in expected)
    return problems + usage(reply.document, prompt, count * len(expected))


def stopped(reply: Reply, row: OfflineAnswer, stop: int) -> list[str]:
    """Judge an answer that must stop before the name of the token `stop`."""
    if reply.refused:
        return [reply.refused]
    choice = first(reply)
    text, named = choice.get("text"), row.named(len(row.tokens))
    is_cut = (
        isinstance(text, str)
        and f"<{stop}>" not in text
        and _names(text) == named[: named.index(stop)]
    )
    problems = [] if is_cut else [f"with the stop string <{stop}> it answers {shown(text)}"]
    return problems + finish(choice, "stop")


def chat(reply: Reply, text: str, prompt: int, count: int) -> list[str]:
    """Judge a chat answer by the completion of its prompt, which has this many tokens."""
    if reply.refused:
        return [reply.refused]
    choice = first(reply)
    message = section(choice, "message")
    problems = (
        []
        if message.get("role") == "assistant"
        else [f"the role of the answer is {shown(message.get('role'))}, expected assistant"]
    )
    if not text or message.get("content") != text:
        problems.append(
            f"chat answers {shown(message.get('content'))}, completions answer {shown(text)}"
        )
    return problems + finish(choice, "length") + usage(reply.document, prompt, count)


def rendered(reply: Reply, expected: Conversation) -> list[str]:
    """Judge the tokens that the server makes of a conversation."""
    found = reply.document.get("prompt_token_ids")
    if reply.refused or found == list(expected.tokens):
        return [reply.refused] if reply.refused else []
    return [f"the tokens of {shown(expected.messages)} are {shown(found)}, not Hugging Face's"]


def stream(reply: Reply, whole: str, *, is_chat: bool) -> tuple[list[str], int]:
    """Judge a streamed answer by the complete one; return also the number of pieces."""
    if reply.status != 200:
        return [reply.refused or ""], 0
    problems = (
        []
        if reply.kind.startswith("text/event-stream")
        else [f"its content type is {shown(reply.kind)}, not text/event-stream"]
    )
    lines = [line for line in reply.text.splitlines() if line.strip()]
    if lines[-1:] != [DONE]:
        problems.append(f"it does not end with [DONE] but with {shown(lines[-1] if lines else '')}")
    documents = events(reply)
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
            f"its pieces make {shown(''.join(texts))}, the complete answer is {shown(whole)}"
        )
    if len(texts) < 2:
        problems.append(f"it comes in {len(texts)} pieces")
    finishes = [choice.get("finish_reason") for choice in choices if choice.get("finish_reason")]
    return problems + (
        []
        if finishes == ["length"]
        else [f"its finish reasons are {shown(finishes)}, expected length, once"]
    ), len(texts)


def events(reply: Reply) -> list[Mapping[str, object]]:
    """Return the documents of a stream, each empty if it is none; no document of another reply."""
    if not reply.kind.startswith("text/event-stream"):
        return []
    lines = [line for line in reply.text.splitlines() if line.strip()]
    return [parsed(line.removeprefix("data:")) for line in lines if line != DONE]


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


def answered(
    title: str, reply: Reply, text: str | None, size: int, count: int, *, ends: str = "length"
) -> list[str]:
    """Judge the text of an answer, if it is known, the reason of its end and its usage; a prompt
    has `size` tokens, an answer `count`.
    """
    if reply.refused:
        return [f"{title}: {reply.refused}"]
    choice = first(reply)
    found = section(choice, "message").get("content") or choice.get("text")
    problems = finish(choice, ends) + usage(reply.document, size, count)
    if text is not None and found != text:
        problems.insert(0, f"it answers {shown(found)}, expected {text!r:.80}")
    return [f"{title}: {problem}" for problem in problems]


def scored(
    title: str,
    reply: Reply,
    tokens: Sequence[int],
    positions: Sequence[Position | None],
    *,
    is_listed: bool = False,
) -> list[str]:
    """Judge tokens and log-probabilities of a completion by position; one without any is None."""
    found = converted(first(reply).get("logprobs"), _Logprobs)
    if reply.refused or not found:
        return [f"{title}: {reply.refused or 'it has no log-probabilities'}"]
    ids, parts = [token_id(token) for token in found.tokens], (found.token_logprobs, positions)
    if ids != list(tokens) or {len(ids)} != {len(found.top_logprobs), *map(len, parts)}:
        return [f"{title}: the tokens are {shown(ids)}, expected {tokens!r:.80}"]
    problems = []
    for index, (top, position) in enumerate(zip(found.top_logprobs, positions, strict=True)):
        chances = {token_id(token): chance for token, chance in (top or {}).items()}
        if chances.get(ids[index]) != found.token_logprobs[index]:
            problems.append(f"{title}: token {index} has two log-probabilities")
        elif position:
            problems += position_of(title, chances, position, is_listed=is_listed)
        elif top:
            problems.append(f"{title}: the first token of a prompt has a log-probability")
    return problems


def prompt_scored(
    title: str, part: Mapping[str, object], reply: Reply, known: Sequence[Position]
) -> list[str]:
    """Judge the log-probabilities of a prompt, their ranks and their names."""
    found = converted(part.get("prompt_logprobs"), list[dict[str, _Ranked] | None])
    if reply.refused or not found or len(found) != len(known) + 1 or found[0]:
        return [f"{title}: {reply.refused or 'it has not one for each token but the first'}"]
    problems = []
    for chances, position in zip(found[1:], known, strict=True):
        ranked = {int(token): chance for token, chance in (chances or {}).items()}
        plain = {token: chance.logprob for token, chance in ranked.items()}
        problems += position_of(title, plain, position, is_listed=False)
        own, (low, high) = ranked.get(position.token or 0), position.ranks
        if own and not low <= own.rank <= high:
            text = f"token {position.token} has the rank {own.rank}, expected {low} to {high}"
            problems.append(f"{title}: {text}")
        for token, chance in ranked.items():
            if token >= FIRST_NAMED and chance.decoded_token != f"<{token}>":
                problems.append(f"{title}: the token {token} is called {chance.decoded_token!r}")
    return problems


def position_of(
    title: str, found: Mapping[int, float], expected: Position, *, is_listed: bool
) -> list[str]:
    """Judge the log-probabilities of one position: of the listed tokens, or of the TOP most likely
    ones up to ties, and of the token that is there.
    """
    known = dict(zip(expected.ids, expected.logprobs, strict=True))
    own = {expected.token} if expected.token is not None else set()
    known |= dict.fromkeys(own, expected.logprob)
    certain = possible = {*expected.ids}
    if not is_listed:
        last, next_one = expected.logprobs[TOP - 1], expected.logprobs[TOP]
        certain = {token for token in known if known[token] > next_one + MAX_DIFFERENCE}
        possible = {token for token in known if known[token] > last - MAX_DIFFERENCE}
    if not certain | own <= found.keys() <= possible | own:
        text = f"the tokens are {sorted(found)}, expected {sorted(certain | own)}"
        return [f"{title}: {text}"]
    worst = max((_distance(found[token], known[token]) for token in found), default=0.0)
    if worst < MAX_DIFFERENCE:
        return []
    return [f"{title}: a log-probability differs by {worst:.1e}, the limit is {MAX_DIFFERENCE:g}"]


def token_id(token: str) -> int:
    """Return the ID of a token that a reply calls token_id:ID, -1 for another name."""
    name = token.removeprefix("token_id:")
    return int(name) if name != token and name.isdigit() and len(name) < 10 else -1


def converted(document: object, kind: type[T]) -> T | None:
    try:
        return records.convert(document, kind)
    except records.DecodeError:
        return None


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
    text = first(reply).get("text")
    return text if isinstance(text, str) else ""


def _row(record: Mapping[str, list[float]]) -> OfflineAnswer:
    tokens, logprobs = tuple(map(int, record["tokens"])), tuple(map(float, record["logprobs"]))
    return OfflineAnswer(str(record["text"]), tuple(map(int, record["prompt"])), tokens, logprobs)


def _text(text: object, row: OfflineAnswer, count: int) -> list[str]:
    if isinstance(text, str) and row.named(count) and _names(text) == row.named(count):
        return []
    return [
        (
            f"the answer to {row.text[:20]!r} is {shown(text)}, offline it is"
            f" {' '.join(f'<{token}>' for token in row.named(count)[:4])} …"
        )
    ]


def _names(text: object) -> list[int]:
    return [int(name) for name in _NAME.findall(text)] if isinstance(text, str) else []


def finish(choice: Mapping[str, object], expected: str) -> list[str]:
    found = choice.get("finish_reason")
    return (
        [] if found == expected else [f"its finish reason is {shown(found)}, expected {expected}"]
    )


def usage(document: Mapping[str, object], prompt: int, answer: int) -> list[str]:
    usage = section(document, "usage")
    found = [usage.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
    return (
        []
        if found == [prompt, answer, prompt + answer]
        else [f"its usage is {shown(found)}, expected {[prompt, answer, prompt + answer]}"]
    )


def first(reply: Reply) -> Mapping[str, object]:
    return next(iter(rows(reply.document, "choices")), {})


def _distance(found: object, expected: float) -> float:
    return abs(found - expected) if isinstance(found, float) and math.isfinite(found) else math.inf


def shown(text: object) -> str:
    return repr(text[:SHOWN] if isinstance(text, str) else text)[: 2 * SHOWN]


def parsed(text: str) -> Mapping[str, object]:
    try:
        return records.decode(text, dict[str, object])
    except records.DecodeError:
        return {}
