"""A stand-in for vLLM's server with the tiny model, right except for one fault, its MANNER.

Run as `front.py PORT MANNER ROWS`; ROWS is the file with the offline engine's answers.
"""

import http.server
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, cast


class KnownRow(TypedDict):
    """A prompt and the offline engine's answer."""

    text: str
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


class Request(TypedDict, total=False):
    """The fields of a request that this server reads."""

    model: str
    max_tokens: int
    temperature: object
    prompt: "str | list[int] | list[str] | list[list[int]]"
    messages: list[dict[str, str]]
    stop: list[str]
    stream: bool
    return_token_ids: bool
    n: int
    seed: int
    logprobs: int
    response_format: object


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
            if "chat" in self.path:
                # The template adds one token, 0, at the beginning.
                self.serve(request, [[0, *ROWS[request["messages"][0]["content"]]["prompt"]]])
            else:
                self.serve(request, prompts_of(request["prompt"]))
        except (ValueError, KeyError, TypeError, IndexError) as exc:
            self.answer({"error": {"message": str(exc)}}, 500 if MANNER == "raises" else 400)

    def serve(self, request: Request, prompts: list[Prompt]) -> None:
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
        choices = [self.choice(index, prompt, request) for index, prompt in enumerate(prompts)]
        if MANNER == "rubbish":
            choices = [{"text": "!!!", "message": {"content": "!!!"}}]
        used = sum(map(len, prompts)), request["max_tokens"] * len(prompts)
        if request.get("stream"):
            self.stream(choices[0])
        else:
            usage = {
                "prompt_tokens": used[0],
                "completion_tokens": used[1],
                "total_tokens": sum(used),
            }
            document: dict[str, object] = {"choices": choices, "usage": usage}
            if request.get("return_token_ids"):
                begun = [0] if MANNER == "begins twice" else []
                document["prompt_token_ids"] = [*begun, *prompts[0]]
            self.answer(document)

    def choice(self, index: int, prompt: Prompt, request: Request) -> dict[str, object]:
        known = ROWS.get(prompt if isinstance(prompt, str) else tuple(prompt))
        if (
            (isinstance(prompt, list) and known is None)
            or len(prompt) > 512
            or isinstance(request["temperature"], str)
        ):
            raise ValueError("refused")
        if known is None:
            raise TypeError("an unknown text")
        tokens, chances = known["tokens"], known["logprobs"]
        # A sample begins at the token of its seed, or of its number.
        start = request.get("seed", index if "n" in request else 0)
        if MANNER != "ignores seeds":
            tokens = [*tokens[start:], *tokens[:start]]
        text, end = decode(tokens[: request["max_tokens"]]), "length"
        for stop in request.get("stop", []):
            text, end = text.partition(stop)[0], "stop"
        if "response_format" in request:
            text, end = '{"part": "pin", "count": 1, "is_built": true}', "stop"
        named = {
            "tokens": [f"token_id:{token}" for token in tokens],
            "token_logprobs": [chance + (0.01 if MANNER == "off" else 0.0) for chance in chances],
        }
        message = {"role": "assistant", "content": text}
        return {
            "index": index,
            "text": text,
            "message": message,
            "token_ids": tokens[: request["max_tokens"]],
            "finish_reason": end,
            **({"logprobs": named} if "logprobs" in request else {}),
        }

    def stream(self, choice: Mapping[str, object]) -> None:
        is_chat = "chat" in self.path
        pieces = re.findall("<.*?>", str(choice.get("text", "")))
        events: list[dict[str, object]] = [
            {"choices": [{"delta": {"content": piece}} if is_chat else {"text": piece}]}
            for piece in pieces
        ]
        events.append({"choices": [{"finish_reason": choice.get("finish_reason")}]})
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
