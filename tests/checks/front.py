"""Stands for the server of a built vLLM with a tiny model, where none is built: right in everything
but in one manner, which is the second word.

Run as `front.py PORT MANNER ROWS`; ROWS is the file with what the offline engine has said.
"""

import http.server
import json
import os
import re
import signal
import sys
import time
from pathlib import Path


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
            asked = json.loads(body)
            self.serve(
                asked,
                [asked["messages"][0]["content"] + " "] if "chat" in self.path else asked["prompt"],
            )
        except (ValueError, KeyError, TypeError, IndexError) as exc:
            self.answer({"error": {"message": str(exc)}}, 500 if MANNER == "raises" else 400)

    def serve(self, asked: dict, prompt: object) -> None:
        prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        if (
            asked["model"] != "tiny"
            or asked["max_tokens"] < 0
            or self.path == "/v1/nothing"
            or "nothing" in str(asked.get("response_format"))
        ):
            raise ValueError("refused")
        if MANNER == "dies" and asked["max_tokens"] > 1:
            print("ValueError: the engine is no more", flush=True)
            os._exit(3)
        if MANNER == "hangs" and asked["max_tokens"] > 1:
            sleep_for_ever()
        choices = [self.choice(number, one, asked) for number, one in enumerate(prompts)]
        if MANNER == "rubbish":
            choices = [{"text": "!!!", "message": {"content": "!!!"}}]
        used = sum(len(one) for one in prompts), asked["max_tokens"] * len(prompts)
        if asked.get("stream"):
            self.stream(choices[0])
        else:
            self.answer(
                {
                    "choices": choices,
                    "usage": {
                        "prompt_tokens": used[0],
                        "completion_tokens": used[1],
                        "total_tokens": sum(used),
                    },
                }
            )

    def choice(self, number: int, prompt: str | list[int], asked: dict) -> dict:
        known = ROWS.get(prompt if isinstance(prompt, str) else tuple(prompt))
        if (
            (isinstance(prompt, list) and known is None)
            or len(prompt) > 512
            or isinstance(asked["temperature"], str)
        ):
            raise ValueError("refused")
        tokens, chances = known["tokens"], known["logprobs"]
        text, end = decode(tokens[: asked["max_tokens"]]), "length"
        for word in asked.get("stop", []):
            text, end = text.partition(word)[0], "stop"
        if "response_format" in asked:
            text, end = '{"part": "pin", "count": 1, "is_built": true}', "stop"
        named = {
            "tokens": [f"token_id:{token}" for token in tokens],
            "token_logprobs": [chance + (0.01 if MANNER == "off" else 0.0) for chance in chances],
        }
        message = {"role": "assistant", "content": text}
        return {
            "index": number,
            "text": text,
            "message": message,
            "finish_reason": end,
            **({"logprobs": named} if "logprobs" in asked else {}),
        }

    def stream(self, choice: dict) -> None:
        is_chat = "chat" in self.path
        pieces = re.findall("<.*?>", choice.get("text", ""))
        events = [
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
        """Say nothing."""


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64


def sleep_for_ever() -> None:
    while True:
        time.sleep(60)


MANNER = sys.argv[2]
ROWS = {}
for row in json.loads(Path(sys.argv[3]).read_text()):
    ROWS |= {
        row["text"]: row,
        f"{row['text']} ": row | {"tokens": row["tokens"][::-1]},
        tuple(row["prompt"]): row,
    }
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
