"""Requests over HTTP that have one right outcome, and the verdicts on their replies.

The outcome comes from Hugging Face, from the grammar or the limit that a request names, or from its
number of tokens. The plainer verdicts are in http_checks.py.
"""

import http.client
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from workspace.checks import http_checks
from workspace.checks.http_checks import TOP, Conversation, OfflineAnswer, Position, Reply
from workspace.checks.registry import rows, section
from workspace.core import records
from workspace.server.observation import Address

NAME = "tiny"
# Tokens of an answer that is compared with another request's; as few as in consistency.batch, since
# batches round differently.
TOKENS = 16
LENGTH = 512
# Tokens of the prompt of limits.toml.
SHORT = 8
LIMITS = Path(__file__).with_name("limits.toml")
LONGEST_REPLY = 16 << 20
# In the tiny models' tokenizer (probes/small_model.py) the bytes begin here, with those that print.
FIRST_BYTE, BYTES = 3, 256
LETTERS: Mapping[str, int] = {chr(code): code - 30 for code in range(33, 127)} | {" ": 223}
END, VOCABULARY = 1, 10240
# Whitespace that a grammar of JSON allows anywhere.
_BLANKS = (200, 201, 204, 223)
# An object with few choices; an untrained model would never end a longer text on its own.
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
# All texts of such an object, without blanks.
DOCUMENTS = {
    json.dumps(dict(zip(CHOICES, values, strict=True)), separators=(",", ":"))
    for values in itertools.product(*CHOICES.values())
}

Verdict = tuple[list[str], str]


@dataclass(frozen=True)
class Case:
    """A request with a changed parameter, and Hugging Face's answer."""

    case: str
    params: dict[str, object]
    tokens: list[int] | None
    text: str | None
    raw: list[Position]


@dataclass(frozen=True)
class Text:
    """A text, its tokens with special ones and without, and the text of the former."""

    text: str
    tokens: list[int]
    bare: list[int]
    decoded: str


@dataclass(frozen=True)
class Known:
    """Hugging Face's answers to one message, and its tokens; `block` is the size of a block."""

    message: str
    prompt: list[int]
    prompt_logprobs: list[Position]
    cases: list[Case]
    texts: list[Text]
    chats: list[Conversation]
    block: int

    @property
    def is_usable(self) -> bool:
        """Whether it has the cases and texts that the requests need."""
        named = {"logprobs", "logprob_token_ids", "allowed_token_ids"}
        return bool(self.texts and self.chats) and named <= {case.case for case in self.cases}

    @property
    def messages(self) -> list[dict[str, object]]:
        return [{"role": "user", "content": self.message}]

    def case(self, name: str) -> Case:
        return next(case for case in self.cases if case.case == name)


NOTHING = Known("", [], [], [], [], [], 0)


class Answers(NamedTuple):
    """What the requests are compared with; each part is empty if it is damaged."""

    rows: tuple[OfflineAnswer, ...]
    cases: tuple[Mapping[str, object], ...]
    known: Known


def answers(
    offline: object, sampled: Mapping[str, object], reference: Mapping[str, object]
) -> Answers:
    """Return the answers of probes/parity.py, sampling.py and reference.py."""
    return Answers(
        http_checks.offline(offline),
        http_checks.cases(reference),
        http_checks.converted({**section(reference, "sampling"), **sampled}, Known) or NOTHING,
    )


class Client:
    """A client of the server at `address`. A request is greedy and has TOKENS tokens by default."""

    def __init__(self, address: Address, messages: Sequence[object], timeout_s: float) -> None:
        self._address, self._messages, self._timeout_s = address, messages, timeout_s

    def complete(self, prompt: object, **changes: object) -> Reply:
        return self.post("/v1/completions", self.body(prompt=prompt, **changes))

    def talk(self, **changes: object) -> Reply:
        return self.post("/v1/chat/completions", self.chat_body(**changes))

    def chat_body(self, **changes: object) -> dict[str, object]:
        return self.body(**({"messages": self._messages} | changes))

    def body(self, **changes: object) -> dict[str, object]:
        return {"model": NAME, "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True} | changes

    def post(self, path: str, body: object) -> Reply:
        """Send bytes unchanged, a document as JSON, or None as GET. Raises nothing."""
        near, port = self._address.near, self._address.port
        connection = http.client.HTTPConnection(near, port, timeout=self._timeout_s)
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        try:
            connection.request("GET" if body is None else "POST", path, body=sent, headers=headers)
            reply = connection.getresponse()
            return Reply(
                reply.status,
                reply.read(LONGEST_REPLY).decode("utf-8", errors="replace"),
                reply.headers.get("Content-Type", ""),
            )
        except (OSError, http.client.HTTPException, ValueError) as exc:
            return Reply(None, str(exc) or type(exc).__name__)
        finally:
            connection.close()


def echo(client: Client, known: Known) -> Verdict:
    """Ask for prompts that come back, with their log-probabilities and without."""
    plain, listed = known.case("logprobs"), known.case("logprob_token_ids")
    made, count = plain.tokens or [], len(plain.raw)
    scored = {"echo": True, "logprobs": TOP, "return_tokens_as_token_ids": True}
    whole = client.complete(known.prompt, max_tokens=count, **scored)
    alone = client.complete(known.prompt, max_tokens=0, **scored)
    positions = (None, *known.prompt_logprobs)
    problems = http_checks.scored("echo", whole, [*known.prompt, *made], (*positions, *plain.raw))
    problems += http_checks.scored("echo alone", alone, known.prompt, positions)
    few = {**listed.params, "return_tokens_as_token_ids": True}
    reply = client.complete(known.prompt, **few)
    problems += http_checks.scored("logprob_token_ids", reply, made, listed.raw, is_listed=True)
    options = {"prompt_logprobs": TOP, "max_tokens": 1}
    reply = client.complete(known.prompt, **options)
    problems += http_checks.prompt_scored(
        "prompt_logprobs", http_checks.first(reply), reply, known.prompt_logprobs
    )
    reply = client.talk(messages=known.messages, **options)
    problems += http_checks.prompt_scored(
        "prompt_logprobs of a chat", reply.document, reply, known.prompt_logprobs
    )
    for text in known.texts:
        answer = http_checks.text_of(client.complete(text.tokens))
        for prompt, shown in ((text.tokens, text.decoded), (text.text, text.text)):
            # An empty text is refused.
            if prompt:
                reply = client.complete(prompt, echo=True)
                title = f"echo of {prompt!r:.40}"
                problems += http_checks.answered(
                    title, reply, shown + answer, len(text.tokens), TOKENS
                )
    for chat in known.chats:
        if chat.more.get("continue_final_message"):
            begun = str(chat.messages[-1]["content"])
            answer = http_checks.text_of(client.complete(chat.tokens))
            reply = client.talk(messages=chat.messages, echo=True, **chat.more)
            size = len(chat.tokens)
            problems += http_checks.answered("echo of a chat", reply, begun + answer, size, TOKENS)
    size = len(known.prompt)
    return problems, f"{size} tokens of a prompt come back with Hugging Face's log-probabilities"


def structured(client: Client, known: Known) -> Verdict:
    """Ask for an answer in each form; each has one right text."""
    problems = []
    forms = {**_spelled(known), **_steered()}
    for name, (changes, text) in forms.items():
        options = {"max_tokens": LENGTH // 4, "ignore_eos": False, **changes}
        by_title = {
            name: client.complete(known.prompt, **options),
            f"{name} in a chat": client.talk(messages=known.messages, **options),
        }
        for title, reply in by_title.items():
            # A token for each letter, and the end of text.
            size = len(text) + 1
            problems += http_checks.answered(
                title, reply, text, len(known.prompt), size, ends="stop"
            )
    return problems, f"{len(forms)} forms have the text that they must have"


Forms = dict[str, tuple[dict[str, object], str]]


def _spelled(known: Known) -> Forms:
    """Return forms that allow the letters of the case allowed_token_ids, as often as its answer
    has any: Hugging Face's answer is the most likely one of them all.
    """
    case = known.case("allowed_token_ids")
    allowed, text = case.params["allowed_token_ids"], case.text or ""
    ids = allowed if isinstance(allowed, list) else []
    letters = [letter for letter, token in LETTERS.items() if token in ids]
    shown = "".join(f"\\{letter}" if letter in r"[]\^-" else letter for letter in letters)
    pattern = f"[{shown}]{{{len(text)}}}"
    # At each letter a choice leaves the text.
    choice = [text]
    for index, letter in enumerate(text):
        other = letters[letters.index(letter) - 1]
        choice.append(text[:index] + other + text[index + 1 :])
    tag = {"type": "structural_tag", "format": {"type": "regex", "pattern": pattern}}
    kinds: dict[str, object] = {
        "regex": pattern,
        "choice": choice,
        "grammar": f"root ::= {pattern}",
        "structural_tag": json.dumps(tag),
    }
    forms: Forms = {
        name: ({"structured_outputs": {name: kind}}, text) for name, kind in kinds.items()
    }
    return forms | {"response_format structural_tag": ({"response_format": tag}, text)}


def _steered() -> Forms:
    """Return forms of JSON in which biases decide between the characters that a form allows."""
    blank: dict[str, float] = {str(token): -100 for token in _BLANKS}
    end = {str(END): 100.0}

    def towards(letters: str, bias: float) -> dict[str, float]:
        return {str(LETTERS[letter]): bias for letter in letters}

    one = {"logit_bias": blank | end | towards("pi3f", 50)}
    other = {"logit_bias": blank | end | towards("k1t", 50)}
    pin = '{"part":"pin","count":3,"is_built":false}'
    kernel = '{"part":"kernel","count":1,"is_built":true}'
    # A quote ends a text; nothing but the end of an object is allowed after its value.
    some = {"logit_bias": blank | end | towards('"', 100) | towards("}", 50)}
    named = {"type": "json_schema", "json_schema": {"name": "part", "schema": SCHEMA}}
    inner = {"type": "json_schema", "json_schema": SCHEMA}
    tag = {"type": "tag", "begin": "<a>", "content": inner, "end": "</a>"}
    # The first token may be none but the trigger, the last one none but the end of text.
    free = {"logit_bias": one["logit_bias"] | towards("~", 90), "min_tokens": 1}
    structures = [{"begin": "~", "schema": SCHEMA, "end": "!"}]
    triggered = {"type": "structural_tag", "structures": structures, "triggers": ["~"]}
    return {
        "json": ({"structured_outputs": {"json": SCHEMA}, **one}, pin),
        "json as a text": ({"structured_outputs": {"json": json.dumps(SCHEMA)}, **other}, kernel),
        "json_object": ({"structured_outputs": {"json_object": True}, **some}, '{"":""}'),
        "response_format json_schema": ({"response_format": named, **other}, kernel),
        "response_format json_object": (
            {"response_format": {"type": "json_object"}, **some},
            '{"":""}',
        ),
        "response_format tag": (
            {"response_format": {"type": "structural_tag", "format": tag}, **one},
            f"<a>{pin}</a>",
        ),
        "response_format trigger": ({"response_format": triggered, **free}, f"~{pin}!"),
    }


def cache(client: Client, known: Known) -> Verdict:
    """Demand the exact number of cached tokens of prompts with different salts."""
    whole, problems = 2 * known.block, []
    # No other request begins so.
    prompt = [FIRST_BYTE + 5 * index % BYTES for index in range(whole + 3)]
    # As long as the prompt: a byte of a message is a token.
    first = known.chats[0]
    more = len(first.tokens) - len(str(first.messages[0]["content"]).encode())
    chat = [{"role": "user", "content": ("0123456789" * whole)[: whole + 3 - more]}]
    for salt, expected in ((None, 0), ("a", 0), ("b", 0), ("a", whole), (None, whole)):
        options = {"max_tokens": 1} | ({"cache_salt": salt} if salt else {})
        by_title = {
            "a prompt": client.complete(prompt, **options),
            "a chat": client.talk(messages=chat, **options),
        }
        if expected:
            counted = {"stream": True, "stream_options": {"include_usage": True}}
            by_title["a stream"] = client.complete(prompt, **options, **counted)
        for title, reply in by_title.items():
            # The usage of a stream is in its last event.
            last = (http_checks.events(reply) or [reply.document])[-1]
            used = section(section(last, "usage"), "prompt_tokens_details")
            if (found := used.get("cached_tokens")) != expected:
                why = f"{found} tokens are cached, expected {expected}"
                problems.append(f"{title} with the salt {salt}: {reply.failure or why}")
    return problems, f"0 or {whole} cached tokens by salt, in answers, chats and streams"


def usage(client: Client, known: Known) -> Verdict:
    """Ask for streams with each choice of usage; their tokens are Hugging Face's."""
    plain, problems = known.case("logprobs"), []
    made, size = plain.tokens or [], len(known.prompt)
    options = {"stream": True, "max_tokens": len(made), "return_token_ids": True}
    names = ("include_usage", "continuous_usage_stats")
    for chosen in ((), names[:1], names[1:], names):
        more = {**options, "stream_options": dict.fromkeys(chosen, True)}
        title = " and ".join(chosen) or "no usage"
        reply = client.complete(known.prompt, **more)
        problems += _streamed(f"{title}: a stream", reply, made, size, chosen)
        reply = client.talk(messages=known.messages, **more)
        problems += _streamed(f"{title}: a chat's stream", reply, made, size, chosen)
    reply = client.complete(known.prompt, stream_interval=len(made), **options)
    problems += _streamed("stream_interval", reply, made, size, ())
    if (count := len(http_checks.events(reply))) > 3:
        problems.append(f"stream_interval {len(made)}: {len(made)} tokens in {count} pieces")
    counted = {**options, "stream_options": {"include_usage": True}}
    found = http_checks.events(client.complete([known.prompt, known.prompt[:-1]], **counted))
    last = http_checks.usage(found[-1] if found else {}, 2 * size - 1, 2 * len(made))
    problems += [f"a stream of two prompts: {problem}" for problem in last]
    return problems, f"streams of {len(made)} tokens with usage at the end, in each piece, and none"


def _streamed(
    title: str, reply: Reply, tokens: list[int], size: int, chosen: Sequence[str]
) -> list[str]:
    """Judge tokens and usage of a stream, and where it has usage."""
    made: list[int] = []
    problems = [] if (found := http_checks.events(reply)) else [reply.failure or "it is empty"]
    is_last, is_each = "include_usage" in chosen, len(chosen) == 2
    for index, event in enumerate(found):
        choices, is_end = rows(event, "choices"), index == len(found) - 1
        for choice in choices:
            given = choice.get("token_ids")
            made += given if isinstance(given, list) else []
        if is_each or (is_last and is_end):
            problems += http_checks.usage(event, size, len(made))
        elif event.get("usage"):
            problems.append("a piece has its usage unasked")
        if bool(choices) == (is_last and is_end):
            problems.append(f"piece {index + 1} of {len(found)} has {len(choices)} answers")
    if made != tokens:
        problems.append(f"its tokens are {made}, expected {tokens}")
    return [f"{title}: {problem}" for problem in problems]


def tokens(client: Client, known: Known) -> Verdict:
    """Compare /tokenize and /detokenize, and prompts without special tokens or with more of them,
    with Hugging Face's tokenizer.
    """
    problems = []

    def ask(path: str, name: str, expected: object, **body: object) -> None:
        reply = client.post(path, {"model": NAME, **body})
        if reply.refused or reply.document.get(name) != expected:
            found = reply.refused or http_checks.shown(reply.document.get(name))
            given = http_checks.shown(list(body.values()))
            problems.append(f"{path} of {given}: {name} {found}, expected {expected!r:.80}")

    for text in known.texts:
        ask("/tokenize", "tokens", text.tokens, prompt=text.text)
        ask("/tokenize", "tokens", text.bare, prompt=text.text, add_special_tokens=False)
        ask("/detokenize", "prompt", text.decoded, tokens=text.tokens)
        if text.bare:
            reply = client.complete(text.text, add_special_tokens=False, return_token_ids=True)
            found = http_checks.first(reply).get("prompt_token_ids")
            if found != text.bare:
                problems.append(f"add_special_tokens: {found}, expected {text.bare!r:.80}")
    first = known.texts[0]
    begun, letters = first.tokens[: -len(first.bare)], [*first.decoded[: -len(first.text)]]
    ask("/tokenize", "count", len(first.tokens), prompt=first.text)
    ask("/tokenize", "max_model_len", LENGTH, prompt=first.text)
    strings = ["".join(letters), *first.text]
    ask("/tokenize", "token_strs", strings, prompt=first.text, return_token_strs=True)
    for chat in known.chats:
        ask("/tokenize", "tokens", chat.tokens, messages=chat.messages, **chat.more)
        options = {**chat.more, "messages": chat.messages, "tool_choice": "none", "max_tokens": 1}
        reply = client.talk(**options, return_prompt_text=True)
        if (shown := reply.document.get("prompt_text")) != chat.text:
            problems.append(f"return_prompt_text: {reply.failure or shown!r:.80}")
        more = client.talk(**options, add_special_tokens=True, return_token_ids=True)
        if (ids := more.document.get("prompt_token_ids")) != [*begun, *chat.tokens]:
            problems.append(f"add_special_tokens in a chat: {more.failure or ids!r:.80}")
    count = len(known.texts) + len(known.chats)
    return problems, f"{count} texts and conversations have Hugging Face's tokens, and back"


@dataclass(frozen=True)
class Limit:
    """A value of a parameter, with the number of tokens of its answer, or with parts of the
    sentence that refuses it.
    """

    name: str
    value: object = None
    tokens: int = 0
    refused: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.name} {self.value!r:.60}"


def limits(client: Client, known: Known) -> Verdict:
    """Ask for values below, at and above each limit."""
    found = [_bounded(*answer) for answer in _at_limits(client, known)]
    problems = [problem for each in found for problem in each]
    problems += _cut(client, known.prompt[:SHORT], known.chats[0])
    return problems, f"{len(found)} values at limits are answered in full, or refused by name"


def _at_limits(client: Client, known: Known) -> Iterator[tuple[Limit, Reply, int]]:
    """Yield limits and replies with the number of tokens of their prompts."""
    prompt, chat = known.prompt[:SHORT], known.chats[0]
    table = records.convert(records.parse_toml(LIMITS.read_bytes()), dict[str, list[Limit]])
    for limit in table["completions"]:
        options = {"prompt": prompt} | {limit.name: limit.value}
        yield limit, client.complete(**options), SHORT
    for limit in table["chats"]:
        options = {"messages": chat.messages, "logprobs": limit.name == "top_logprobs"}
        named = replace(limit, name=f"a chat with {limit.name}")
        yield named, client.talk(**(options | {limit.name: limit.value})), len(chat.tokens)
    # A byte of a message is a token.
    size, too_long = LENGTH - TOKENS, (f"maximum context length is {LENGTH} tokens",)
    first = chat.messages[0]
    content = str(first["content"]) + "a" * (size - len(chat.tokens))
    for limit in (
        Limit("max_completion_tokens", TOKENS, TOKENS),
        Limit("max_completion_tokens", TOKENS + 1, 0, too_long),
        Limit("max_tokens", None, TOKENS),
    ):
        options = {"messages": [{**first, "content": content}, *chat.messages[1:]]}
        named = replace(limit, name=f"a long chat with {limit.name}")
        yield named, client.talk(**options, **{limit.name: limit.value}), size
    for limit in (Limit("tokens", size, TOKENS), Limit("tokens", size + 1, 0, too_long)):
        given = [FIRST_BYTE + index % BYTES for index in range(int(str(limit.value)))]
        yield limit, client.complete(given), len(given)


def _cut(client: Client, prompt: list[int], chat: Conversation) -> list[str]:
    """Ask for the beginning and the end of a prompt, and for the end of a repeated pair."""
    problems = []
    for side, part in (("left", slice(-3, None)), ("right", slice(3))):
        cut = {"truncate_prompt_tokens": 3, "truncation_side": side, "return_token_ids": True}
        reply, talk = client.complete(prompt, **cut), client.talk(messages=chat.messages, **cut)
        found = [http_checks.first(reply).get("prompt_token_ids")]
        found.append(talk.document.get("prompt_token_ids"))
        if found != [prompt[part], chat.tokens[part]]:
            why = reply.failure or talk.failure
            problems.append(f"a prompt and a chat cut on the {side}: {why or found}")
    pair = {"max_pattern_size": 2, "min_pattern_size": 2, "min_count": 3}
    reply = client.complete(prompt, repetition_detection=pair, logit_bias={str(END): 100})
    title = "a pattern of two tokens, three times"
    return problems + http_checks.answered(title, reply, None, SHORT, 6, ends="repetition")


def _bounded(limit: Limit, reply: Reply, size: int) -> list[str]:
    """Judge the number of tokens of an answer, or the status and the sentence of a refusal."""
    if not limit.refused:
        return http_checks.answered(limit.title, reply, None, size, limit.tokens)
    sentence = str(section(reply.document, "error").get("message"))
    if reply.status == 400 and all(part in sentence for part in limit.refused):
        return []
    found, wanted = reply.failure or "the answer is 200", " and ".join(limit.refused)
    return [f"{limit.title}: {found}, expected HTTP 400 with {wanted}"]


CHECKS: Mapping[str, Callable[[Client, Known], Verdict]] = {
    "structured": structured,
    "echo": echo,
    "cache": cache,
    "usage": usage,
    "tokens": tokens,
    "limits": limits,
}
