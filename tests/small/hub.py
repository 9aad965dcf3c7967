"""A model hub on the loopback that speaks what huggingface_hub asks: repository, tree, files with
ranges. Real bytes, and faults on demand.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" + "0" * 34
CHUNK = 1 << 16


@dataclass
class Repository:
    """One model: its files, and whether it is behind a gate. Files above `large` bytes are kept as
    the hub keeps large ones.
    """

    files: dict[str, bytes]
    gated: bool = False
    token: str = ""
    large: int = 1000


@dataclass
class Hub:
    """`breaks` lists the byte counts after which transfers of a file break off, one transfer each;
    `ranges` what was asked for again.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    breaks: dict[str, list[int]] = field(default_factory=dict)
    held: dict[str, threading.Event] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    ranges: list[tuple[str, str]] = field(default_factory=list)
    sent: int = 0
    status: int = 0


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    try:
        yield hub
    finally:
        for event in hub.held.values():
            event.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(is_head=True)

    def do_GET(self) -> None:
        self._answer(is_head=False)

    def _answer(self, *, is_head: bool) -> None:
        path = self.path.split("?")[0]
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.hub.status:
            self._refuse(self.hub.status, "")
            return
        if found := re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(/auth-check|/revision/[^/]+|/tree/[^/]+)?", path
        ):
            self._api(found[1], found[2] or "")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(found[1], found[2], is_head=is_head)
        else:
            self._refuse(404, "EntryNotFound")

    def _api(self, name: str, what: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._refuse(401, "RepoNotFound")
        elif what == "/auth-check":
            self._json({}) if self._is_allowed(repository) else self._refuse(403, "GatedRepo")
        elif what.startswith("/tree"):
            self._json(
                [
                    {
                        "type": "file",
                        "path": path,
                        "oid": _blob(content),
                        "size": len(content),
                        **_lfs(repository, content),
                    }
                    for path, content in repository.files.items()
                ]
            )
        else:
            siblings = [
                {
                    "rfilename": path,
                    "size": len(content),
                    "blobId": _blob(content),
                    **_lfs(repository, content),
                }
                for path, content in repository.files.items()
            ]
            self._json(
                {
                    "id": name,
                    "modelId": name,
                    "sha": COMMIT,
                    "gated": "auto" if repository.gated else False,
                    "private": False,
                    "siblings": siblings,
                }
            )

    def _file(self, name: str, path: str, *, is_head: bool) -> None:
        repository = self.hub.repositories.get(name)
        content = repository.files.get(path) if repository else None
        if repository is None or content is None:
            self._refuse(404, "EntryNotFound" if repository else "RepoNotFound")
            return
        if not self._is_allowed(repository):
            self._refuse(403, "GatedRepo")
            return
        start, requested = 0, self.headers.get("Range")
        if requested and not is_head:
            self.hub.ranges.append((path, requested))
            found = re.fullmatch(r"bytes=(\d+)-.*", requested)
            assert found is not None
            start = int(found[1])
        lfs = _lfs(repository, content).get("lfs")
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{lfs["oid"] if lfs else _blob(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not is_head:
            self._send(path, content, start)

    def _send(self, path: str, content: bytes, start: int) -> None:
        breaks = self.hub.breaks.get(path, [])
        until = breaks.pop(0) if breaks else len(content)
        for at in range(start, min(until, len(content)), CHUNK):
            part = content[at : min(at + CHUNK, until)]
            try:
                self.wfile.write(part)
                self.wfile.flush()
            except OSError:
                return
            self.hub.sent += len(part)
        if until < len(content):
            if event := self.hub.held.get(path):
                event.wait(20)
            self.close_connection = True
            self.connection.close()

    def _is_allowed(self, repository: Repository) -> bool:
        return (
            not repository.gated
            or self.headers.get("Authorization") == f"Bearer {repository.token}"
        )

    def _json(self, document: object) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", f"{code}: not for you.")
        self.send_header("Content-Length", "0")
        self.end_headers()


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _lfs(repository: Repository, content: bytes) -> dict[str, dict[str, object]]:
    if len(content) <= repository.large:
        return {}
    digest = hashlib.sha256(content).hexdigest()
    return {"lfs": {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 134}}
