"""Is a server ready: /health answers, /v1/models names a model, and that model completes a prompt by one token. Only the last proves that it computes."""

import http.client
import json
import ssl
from dataclasses import dataclass

# A first completion may compile kernels.
COMPLETION_TIMEOUT_S = 600.0
ASK_TIMEOUT_S = 5.0
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


@dataclass(frozen=True)
class Address:
    """Where a server listens, as it was told; `is_encrypted` where it has a certificate."""

    host: str
    port: int
    is_encrypted: bool = False

    @property
    def near(self) -> str:
        """The host under which this machine reaches it."""
        return _EVERYWHERE.get(self.host, self.host)

    @property
    def url(self) -> str:
        near = f"[{self.near}]" if ":" in self.near else self.near
        return f"{'https' if self.is_encrypted else 'http'}://{near}:{self.port}"


@dataclass(frozen=True)
class Answer:
    """What came back: an HTTP status, None where nobody answered, the document, and where there is none what was said instead."""

    status: int | None
    document: object
    said: str


def ask(address: Address, path: str, *, key: str | None = None, body: object = None, timeout_s: float = ASK_TIMEOUT_S) -> Answer:
    """Ask once. `key` is what the server was given as VLLM_API_KEY. Raises nothing: no answer is an answer."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        connection = _connection(address, timeout_s)
        try:
            connection.request("GET" if body is None else "POST", path, body=None if body is None else json.dumps(body), headers=headers)
            reply = connection.getresponse()
            said = reply.read().decode("utf-8", errors="replace")
        finally:
            connection.close()
    except (OSError, http.client.HTTPException) as exc:
        return Answer(None, None, str(exc) or type(exc).__name__)
    try:
        return Answer(reply.status, json.loads(said), said)
    except (ValueError, RecursionError):
        return Answer(reply.status, None, said)


def is_healthy(address: Address) -> bool:
    return ask(address, "/health").status == http.client.OK


def models(address: Address, *, key: str | None) -> tuple[str, ...]:
    """The names under which the server takes requests; none where it does not say."""
    document = ask(address, "/v1/models", key=key).document
    rows = document.get("data") if isinstance(document, dict) else None
    return tuple(str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row) if isinstance(rows, list) else ()


def complete(address: Address, model: str, *, key: str | None) -> str | None:
    """Have one token completed; return None where that went well, else what was said.

    A server without completions (404), such as one of embeddings, has nothing to complete, which is well.
    """
    body = {"model": model, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
    answer = ask(address, "/v1/completions", key=key, body=body, timeout_s=COMPLETION_TIMEOUT_S)
    if answer.status == http.client.NOT_FOUND:
        return None
    choices = answer.document.get("choices") if isinstance(answer.document, dict) else None
    if answer.status == http.client.OK and isinstance(choices, list) and choices:
        return None
    return f"{answer.status or 'no answer'}: {_message(answer)}"


def _connection(address: Address, timeout_s: float) -> http.client.HTTPConnection:
    if not address.is_encrypted:
        return http.client.HTTPConnection(address.near, address.port, timeout=timeout_s)
    # The certificate is the server's own and may name another host; it is this machine that is asked.
    context = ssl._create_unverified_context()
    return http.client.HTTPSConnection(address.near, address.port, timeout=timeout_s, context=context)


def _message(answer: Answer) -> str:
    error = answer.document.get("error") if isinstance(answer.document, dict) else None
    said = error.get("message") if isinstance(error, dict) else None
    return " ".join(str(said or answer.said).split())[:300]
