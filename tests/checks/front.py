"""A stand-in for vLLM's server with the tiny model, right except for one fault, its MANNER.

Run as `front.py PORT MANNER ROWS`; ROWS is the file with the offline engine's answers. A text has
as many tokens as letters, of which the first one counts as special and is shown as ^.
"""

import functools
import http.server
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, TypedDict, cast


class KnownRow(TypedDict):
    """A prompt and the offline engine's answer."""

    text: str
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


Request = dict[str, Any]
Prompt = str | list[int]


def prompts_of(prompt: "str | list[int] | list[str] | list[list[int]]") -> list[Prompt]:
    """Return the prompts of a request: one text, one list of tokens, or several of either."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return list(cast("list[Prompt]", prompt))


def decode(tokens: list[int]) -> str:
    return "".join(f"<{token}>" for token in tokens)


# The answer where letters are spelled, and those of a schema by its bias.
SPELLED, SPELLING = "a[b]", [61, 63, 67, 68]
PIN = '{"part":"pin","count":3,"is_built":false}'
KERNEL = '{"part":"kernel","count":1,"is_built":true}'
LONGEST, BLOCK = 512, 4
# Prompts that the cache holds, by salt.
CACHED: set[tuple[object, tuple[int, ...]]] = set()


def formed(request: Request) -> str | None:
    """Return the answer in the form that a request has, None without any."""
    form = {**request.get("structured_outputs", {}), **request.get("response_format", {})}
    if not form:
        return None
    if MANNER == "any form":
        return "{}"
    if form.get("json_object") or form.get("type") == "json_object":
        return '{"":""}'
    document = PIN if "75" in request.get("logit_bias", {}) else KERNEL
    if "triggers" in form:
        return f"~{document}!"
    if form.get("format", {}).get("type") == "tag":
        return f"<a>{document}</a>"
    return document if "json" in form or "json_schema" in form else SPELLED


@functools.cache
def limits() -> dict[str, list[dict[str, Any]]]:
    import tomllib

    place = Path(__file__).parents[2] / "workspace" / "checks" / "limits.toml"
    return tomllib.loads(place.read_text())


def refusal(request: Request, path: str) -> str | None:
    """Return the sentence that refuses a value of limits.toml, None if it is allowed."""
    allowed = {"stream_options"} if "stream" in request else set()
    allowed |= {"max_tokens"} if "echo" in request else set()
    for row in limits()["chats" if "chat" in path else "completions"]:
        name, value = row["name"], row.get("value")
        given = request.get(name)
        if (
            "refused" in row
            and name not in allowed
            and (type(value), value) == (type(given), given)
        ):
            return " ".join(row["refused"])
    return None


def chances(token: int, chance: float) -> dict[int, float]:
    """Return the five most likely tokens of a position, and the token that is there."""
    if token < 300:
        return {token: -20.0, **{400 + by: -1.0 - by for by in range(5)}}
    return {token + by: chance - by for by in range(5)}


class Front(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        documents = {
            "/v1/models": {"data": [{"id": "tiny"}]},
            "/version": {"version": "1+cpu" if MANNER != "other" else "2"},
            "/health": {},
        }
        self.answer(documents.get(self.path, {}), 200 if self.path in documents else 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            request = cast(Request, json.loads(body))
            if why := refusal(request, self.path):
                raise ValueError(why)
            if "messages" in request or "chat" in self.path:
                # The template adds one token, 0, at the beginning.
                content = request["messages"][0]["content"]
                known = ROWS.get(content, {"prompt": [300] * len(content)})
                prompts: list[Prompt] = [[0, *known["prompt"]]]
            else:
                prompts = prompts_of(request.get("prompt") or request["tokens"])
            if "tokenize" in self.path:
                self.tokenize(request, prompts[0])
            else:
                self.serve(request, prompts)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as exc:
            self.answer({"error": {"message": str(exc)}}, 500 if MANNER == "raises" else 400)

    def tokenize(self, request: Request, prompt: Prompt) -> None:
        ids = ROWS[prompt]["prompt"] if isinstance(prompt, str) else prompt
        if "tokens" in request:
            self.answer({"prompt": f"^{ROWS[tuple(ids)]['text']}"})
            return
        ids = ids if request.get("add_special_tokens", True) else ids[1:]
        ids = ids[::-1] if MANNER == "turns texts" else ids
        strings = ["^", *prompt] if isinstance(prompt, str) else None
        answer = {"tokens": ids, "count": len(ids), "max_model_len": LONGEST, "token_strs": strings}
        self.answer(answer)

    def serve(self, request: Request, prompts: list[Prompt]) -> None:
        is_chat = "chat" in self.path
        if "max_completion_tokens" in request:
            request["max_tokens"] = request["max_completion_tokens"]
        if request["max_tokens"] is None:
            request["max_tokens"] = LONGEST - len(prompts[0]) if is_chat else 16
        if (
            request["model"] != "tiny"
            or request["max_tokens"] < 0
            or self.path == "/v1/nothing"
            or "nothing" in str(request.get("response_format"))
        ):
            raise ValueError("refused")
        if MANNER == "dies" and request["max_tokens"] > 1:
            print("ValueError: the engine is no more", flush=True)
            os._exit(3)
        if MANNER == "hangs" and request["max_tokens"] > 1:
            sleep_for_ever()
        if request.get("n", 1) > 1:
            prompts = prompts * request["n"]
        if max(map(len, prompts)) + request["max_tokens"] > LONGEST:
            raise ValueError(f"maximum context length is {LONGEST} tokens")
        choices = [self.choice(index, prompt, request) for index, prompt in enumerate(prompts)]
        if MANNER == "rubbish":
            choices = [{"text": "!!!", "message": {"content": "!!!"}}]
        size = sum(map(len, prompts))
        made = sum(len(cast("list[int]", choice.get("token_ids", ()))) for choice in choices)
        usage: dict[str, object] = {
            "prompt_tokens": size,
            "completion_tokens": made,
            "total_tokens": size + made,
            "prompt_tokens_details": {"cached_tokens": self.cached(request, prompts[0])},
        }
        if request.get("stream"):
            self.stream(choices, usage, request)
            return
        document: dict[str, object] = {"choices": choices, "usage": usage}
        document["prompt_text"] = f"<0>{request['messages'][0]['content']}" if is_chat else None
        document["prompt_logprobs"] = choices[0].get("prompt_logprobs")
        if request.get("return_token_ids"):
            if "truncate_prompt_tokens" in request:
                prompts = [cast("list[int]", choices[0]["prompt_token_ids"])]
            begun = [0] if MANNER == "begins twice" else []
            begun += (
                [ROWS["Hello"]["prompt"][0]] if is_chat and "add_special_tokens" in request else []
            )
            document["prompt_token_ids"] = [*begun, *prompts[0]]
        self.answer(document)

    def cached(self, request: Request, prompt: Prompt) -> int:
        """Return the number of cached tokens of a prompt, which the cache holds from now on."""
        salt = None if MANNER == "forgets salts" else request.get("cache_salt")
        key = (salt, tuple(cast("list[int]", prompt)))
        is_known = key in CACHED
        CACHED.add(key)
        return (len(prompt) - 1) // BLOCK * BLOCK if is_known else 0

    def choice(self, index: int, prompt: Prompt, request: Request) -> dict[str, object]:
        known = ROWS.get(prompt if isinstance(prompt, str) else tuple(prompt))
        if isinstance(request["temperature"], str) or (
            isinstance(prompt, list) and max(prompt) > 10240
        ):
            raise ValueError("refused")
        if known is None and isinstance(prompt, str):
            raise TypeError("an unknown text")
        known = known or ROWS["Hello"]
        tokens = known["tokens"]
        # A sample begins at the token of its seed, or of its number.
        start = request.get("seed", index if "n" in request else 0)
        if MANNER != "ignores seeds":
            tokens = [*tokens[start:], *tokens[:start]]
        count = request["max_tokens"]
        tokens = (tokens * LONGEST)[:count]
        text, end = decode(tokens), "length"
        if request.get("allowed_token_ids") == SPELLING:
            tokens, text = [67, 61, 68, 63][:count], SPELLED[:count]
        for stop in request.get("stop", []):
            if stop in text:
                text, end = text.partition(stop)[0], "stop"
        if (shaped := formed(request)) is not None:
            text, end, tokens = shaped, "stop", [300] * (len(shaped) + 1)
        if "repetition_detection" in request:
            tokens, end = tokens[:6], "repetition"
        shown = {"token_ids": tokens, "finish_reason": end, "index": index, "stop_reason": None}
        if request.get("logprobs", False) is not False:
            shown["logprobs"] = self.logprobs(request, prompt, known, tokens)
        if "prompt_logprobs" in request:
            shown["prompt_logprobs"] = prompt_logprobs(cast("list[int]", prompt))
        ids = list(known["prompt"] if isinstance(prompt, str) else prompt)
        ids = ids if request.get("add_special_tokens", True) else ids[1:]
        if cut := request.get("truncate_prompt_tokens"):
            is_left = request.get("truncation_side") == "left" or MANNER == "cuts on the left"
            ids = ids[-cut:] if is_left else ids[:cut]
        if request.get("echo"):
            before = f"^{known['text']}" if isinstance(prompt, list) else prompt
            before = request["messages"][-1]["content"] if "messages" in request else before
            text = before + text
        message = {"role": "assistant", "content": text}
        return {"text": text, "message": message, "prompt_token_ids": ids, **shown}

    def logprobs(
        self, request: Request, prompt: Prompt, known: KnownRow, tokens: list[int]
    ) -> dict[str, object]:
        own = [*known["logprobs"], *[-0.5] * len(tokens)][: len(tokens)]
        off = 0.01 if ("chats are off" if "messages" in request else "off") == MANNER else 0.0
        rows = [
            (token, chances(token, chance + off)) for token, chance in zip(tokens, own, strict=True)
        ]
        if "messages" in request:
            named = "token_id:{}" if request.get("return_tokens_as_token_ids") else "<{}>"
            listed = request.get("logprob_token_ids")
            content = []
            for token, found in rows:
                top = listed_of(token, found, listed) if request["top_logprobs"] else {}
                tops = [{"token": named.format(one), "logprob": top[one]} for one in top]
                shown = {"token": named.format(token), "logprob": found[token]}
                encoded = list(f"<{token}>".encode())
                content.append(shown | {"bytes": encoded, "top_logprobs": tops})
            return {"content": content}
        if request.get("echo"):
            ids = cast("list[int]", prompt)
            asked = [(token, chances(token, 0.0)) for token in ids]
            rows = asked + (rows if request["max_tokens"] else [])
        listed = request.get("logprob_token_ids")
        first = [None] if request.get("echo") else []
        likely = [listed_of(token, found, listed) for token, found in rows]
        named_tops = [{f"token_id:{one}": top[one] for one in top} for top in likely]
        return {
            "tokens": [f"token_id:{token}" for token, _ in rows],
            "token_logprobs": [*first, *[found[token] for token, found in rows][len(first) :]],
            "top_logprobs": [*first, *named_tops[len(first) :]],
        }

    def stream(
        self, choices: list[dict[str, object]], usage: dict[str, object], request: Request
    ) -> None:
        is_chat = "chat" in self.path
        options = request.get("stream_options") or {}
        is_last = options.get("include_usage", False)
        is_each = is_last and options.get("continuous_usage_stats", False)
        size = cast("int", usage["prompt_tokens"])
        events: list[dict[str, object]] = []
        for choice in choices:
            made = 0
            ids = cast("list[int]", choice["token_ids"]) if "token_ids" in choice else []
            groups = [ids] if "stream_interval" in request else [[token] for token in ids]
            for index, group in enumerate(groups):
                piece = decode(group)
                shown: dict[str, object] = {"delta": {"content": piece}, "text": piece}
                shown.pop("text" if is_chat else "delta")
                shown |= {"token_ids": group} if request.get("return_token_ids") else {}
                is_end = index == len(groups) - 1
                shown |= {"finish_reason": choice["finish_reason"] if is_end else None}
                made += len(group) if MANNER != "counts pieces" else 2
                used = {"prompt_tokens": size, "completion_tokens": made}
                each = {"usage": {**used, "total_tokens": size + made}} if is_each else {}
                events.append({"choices": [shown], **each})
        if is_last:
            events.append({"choices": [], "usage": usage})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        self.send(
            "".join([*lines, "data: [DONE]\n\n"]).encode(), 200, "text/event-stream; charset=utf-8"
        )

    def answer(self, document: object, status: int = 200) -> None:
        self.send(json.dumps(document).encode(), status, "application/json")

    def send(self, body: bytes, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Write no log."""


def listed_of(token: int, found: dict[int, float], listed: object) -> dict[int, float]:
    """Return the most likely tokens, or the listed ones with the token that is there."""
    if not isinstance(listed, list):
        return found
    return {token: found[token], **dict.fromkeys(listed, -9.0)}


def prompt_logprobs(prompt: list[int]) -> list[dict[int, dict[str, object]] | None]:
    """Return the log-probabilities and ranks of a prompt, none of its first token."""
    rank = 0 if MANNER == "ranks from zero" else 9
    return [
        None,
        *(
            {
                one: {"logprob": chance, "rank": rank, "decoded_token": f"<{one}>"}
                for one, chance in chances(token, 0.0).items()
            }
            for token in prompt[1:]
        ),
    ]


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64


def sleep_for_ever() -> None:
    while True:
        time.sleep(60)


MANNER = sys.argv[2]
ROWS: dict[str | tuple[int, ...], KnownRow] = {}
for row in cast("list[KnownRow]", json.loads(Path(sys.argv[3]).read_text())):
    ROWS[row["text"]] = ROWS[tuple(row["prompt"])] = row
    # A chat's prompt has an answer of its own.
    ROWS[(0, *row["prompt"])] = {**row, "tokens": row["tokens"][::-1]}
if MANNER == "raises at start":
    sys.exit("RuntimeError: no such kernel")
if MANNER == "hangs at start":
    sleep_for_ever()
if MANNER == "leaks" and os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep_for_ever()
with Server(("127.0.0.1", int(sys.argv[1])), Front) as server:
    server.serve_forever()
