"""A package index on the loopback: PEP 503 and PEP 691, hashes and sizes, range requests, and
faults on request.

One server for a session; each world sees it through a view of its own, with its own files, faults
and counts.
"""

import contextlib
import http.server
import json
import re
import threading
import time
import urllib.parse
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from tests.small.wheels import sha256

GATE_TIMEOUT_S = 60.0
JSON_TYPE = "application/vnd.pypi.simple.v1+json"


@dataclass(frozen=True)
class Gate:
    """Holds a request from when it is `reached` until it is `opened`: a verb stopped at a known
    place.
    """

    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        """Wait until a request stands at the gate."""
        assert self.reached.wait(GATE_TIMEOUT_S), "no request came to the gate"


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a file or with a project's page: a status, a wrong hash, a line cut
    after some bytes, seconds of silence, a gate.
    """

    status: int | None = None
    says_sha256: str | None = None
    cut_after: int | None = None
    delay_s: float = 0.0
    gate: Gate | None = None

    def hold(self) -> None:
        time.sleep(self.delay_s)
        if self.gate:
            self.gate.reached.set()
            self.gate.opened.wait(GATE_TIMEOUT_S)


@dataclass
class View:
    """The index as one world sees it. Keys of `faults` are file names or project names, `published`
    is when a file came (PEP 700).
    """

    name: str
    port: int
    files: dict[str, Path]
    faults: dict[str, Fault] = field(default_factory=dict)
    published: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def gate(self, name: str) -> Gate:
        """Hold the requests for a file or a project's page."""
        made = Gate()
        self.faults[name] = Fault(gate=made)
        return made

    @property
    def url(self) -> str:
        """What stands in UV_DEFAULT_INDEX."""
        return f"http://127.0.0.1:{self.port}/{self.name}/simple/"

    def add(self, path: Path) -> None:
        self.files[path.name] = path

    def hide(self, *names: str) -> None:
        """Take files out of the index."""
        for name in names:
            del self.files[name]

    def requested(self, part: str) -> int:
        """Count the requests whose path has `part` in it."""
        return sum(part in path for path in self.requests)

    def fetched(self) -> list[str]:
        """The files that were asked for, in order, without pages and metadata."""
        return [
            Path(path).name
            for path in self.requests
            if "/files/" in path and not path.endswith(".metadata")
        ]


@dataclass
class Index:
    """The server behind the views."""

    port: int
    files: dict[str, Path]
    views: dict[str, View] = field(default_factory=dict)

    def view(self) -> View:
        made = View(f"view{len(self.views)}", self.port, dict(self.files))
        self.views[made.name] = made
        return made


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Index]:
    """Serve the wheels and archives of `folder` until the block ends."""
    index = Index(0, {path.name: path for path in sorted(folder.iterdir()) if path.is_file()})

    class Handler(_Handler):
        views = index.views

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    index.port = server.server_address[1]
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()
    try:
        yield index
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def project_of(filename: str) -> str:
    """The normalised project (PEP 503) that a wheel or archive belongs to."""
    stem = (
        filename.removesuffix(".tar.gz").rsplit("-", 1)[0]
        if filename.endswith(".tar.gz")
        else filename.split("-", 1)[0]
    )
    return re.sub(r"[-_.]+", "-", stem).lower()


class _Handler(http.server.BaseHTTPRequestHandler):
    views: ClassVar[dict[str, View]] = {}
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        with contextlib.suppress(ConnectionError):
            self._answer()

    def _answer(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        args = [arg for arg in path.split("/") if arg]
        view = self.views.get(args[0]) if args else None
        if view is None or len(args) != 3 or args[1] not in ("simple", "files"):
            self._send(404, b"no such page")
            return
        view.requests.append(path)
        name = args[2]
        fault = view.faults.get(name, Fault())
        fault.hold()
        if fault.status:
            self._send(fault.status, b"a fault")
        elif args[1] == "simple":
            self._page(view, name, fault)
        else:
            self._file(view, name, fault)

    def _page(self, view: View, project: str, fault: Fault) -> None:
        rows = [_row(view, name) for name in view.files if project_of(name) == project]
        if not rows:
            self._send(404, b"no such project")
        elif JSON_TYPE in self.headers.get("Accept", ""):
            page = {"meta": {"api-version": "1.0"}, "name": project, "files": rows}
            self._send(200, json.dumps(page).encode(), kind=JSON_TYPE, cut_after=fault.cut_after)
        else:
            links = "".join(
                f'<a href="{row["url"]}#sha256={row["hashes"]["sha256"]}">'  # type: ignore[index]
                f"{row['filename']}</a>\n"
                for row in rows
            )
            self._send(
                200,
                f"<!DOCTYPE html><html><body>{links}</body></html>".encode(),
                kind="text/html",
                cut_after=fault.cut_after,
            )

    def _file(self, view: View, name: str, fault: Fault) -> None:
        path = view.files.get(name.removesuffix(".metadata"))
        if path is None:
            self._send(404, b"no such file")
            return
        if name.endswith(".metadata"):
            with zipfile.ZipFile(path) as archive:
                self._send(
                    200,
                    archive.read(
                        next(
                            member
                            for member in archive.namelist()
                            if member.endswith(".dist-info/METADATA")
                        )
                    ),
                )
            return
        content = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and int(wanted[1]) < len(content):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            self._send(
                206,
                content[first : last + 1],
                span=f"bytes {first}-{last}/{len(content)}",
                cut_after=fault.cut_after,
            )
        else:
            self._send(
                416 if wanted else 200, b"" if wanted else content, cut_after=fault.cut_after
            )

    def _send(
        self,
        status: int,
        content: bytes,
        *,
        kind: str = "application/octet-stream",
        span: str | None = None,
        cut_after: int | None = None,
    ) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Accept-Ranges": "bytes",
            "Cache-Control": "no-cache",
        }
        for name, text in (headers | ({"Content-Range": span} if span else {})).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut_after is not None and cut_after < len(content):
            content = content[:cut_after]
            self.close_connection = True
        self.wfile.write(content)


def _row(view: View, name: str) -> dict[str, object]:
    """A file's entry in a project's page."""
    output = view.faults.get(name, Fault()).says_sha256 or sha256(view.files[name])
    is_wheel = name.endswith(".whl")
    url = f"/{view.name}/files/{urllib.parse.quote(name)}"
    row = {
        "filename": name,
        "url": url,
        "hashes": {"sha256": output},
        "size": view.files[name].stat().st_size,
        "core-metadata": is_wheel,
    }
    return row | ({"upload-time": view.published[name]} if name in view.published else {})
