"""What a server may not do: send without end, drip, announce what it does not send."""

import contextlib
import gzip
import http.server
import ssl
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from workspace.core import files
from workspace.core.errors import SourceError
from workspace.core.paths import Layout
from workspace.core.settings import Settings, load
from workspace.repo import index
from workspace.repo.git import remotes

MANNERS = (
    "endless",
    "announced",
    "absurd length",
    "drips",
    "headers drip",
    "chunk drips",
    "bomb",
    "redirects for ever",
    "redirect without end",
)
# A key and its certificate for 127.0.0.1, of these tests only.
CERTIFICATE = Path(__file__).with_name("localhost.pem")
# The bounds of the tests: what a wrong answer may take on a busy machine.
PATIENCE_S = 20


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        manner = self.path.strip("/").split("/")[0].replace("%20", " ")
        self.close_connection = True
        with contextlib.suppress(OSError):
            getattr(self, "do_" + manner.replace(" ", "_"))()

    def _head(self, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()

    def _drip(self) -> None:
        for _ in range(PATIENCE_S * 20):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.05)

    def do_endless(self) -> None:
        self._head(Content_Type="text/html")
        while True:
            self.wfile.write(b"x" * (1 << 16))

    def do_announced(self) -> None:
        self._head(Content_Type="text/html", Content_Length=str(1 << 40))
        self._drip()

    def do_absurd_length(self) -> None:
        self._head(Content_Type="text/html", Content_Length="9" * 5000)
        self._drip()

    def do_drips(self) -> None:
        self._head(Content_Type="text/html")
        self._drip()

    def do_headers_drip(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        self._drip()

    def do_chunk_drips(self) -> None:
        self._head(Content_Type="text/html", Transfer_Encoding="chunked")
        self.wfile.write(b"40000000\r\n")
        self._drip()

    def do_bomb(self) -> None:
        content = gzip.compress(b"x" * (64 << 20))
        self._head(
            Content_Type="text/html", Content_Encoding="gzip", Content_Length=str(len(content))
        )
        self.wfile.write(content)

    def do_redirects_for_ever(self) -> None:
        self._head(302, Location=self.path + "/on", Content_Length="0")

    def do_redirect_without_end(self) -> None:
        self._head(302, Location=self.path + "/on")
        sent = 0
        while True:
            sent += self.wfile.write(b"x" * (1 << 16))
            # A client that reads on takes all memory, also after the verb has given up.
            if sent > 64 << 20:
                self.server.is_read_on = True  # type: ignore[attr-defined]
                return

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(files, "ANSWER_S", 0.2)
    monkeypatch.setattr(files, "LARGEST_FILE", 3 << 20)
    monkeypatch.setattr(files, "LARGEST_PAGE", 3 << 20)
    monkeypatch.setattr(remotes, "LARGEST_BYTES", 3 << 20)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads = True
        server.is_read_on = False  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
        assert not server.is_read_on  # type: ignore[attr-defined]


def fetch(way: str, url: str, settings: Settings, place: Path) -> None:
    """Fetch a file, a patch or a page of an index."""
    if way == "file":
        files.download(url, place, expected_sha256=None, timeout_s=5)
    elif way == "patch":
        remotes.fetched(url, settings)
    else:
        index.project_page("vllm", settings)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("way", ["file", "patch", "index"])
def test_answer_has_one_bound_on_bytes_and_time(
    way: str, manner: str, place: str, tmp_path: Path
) -> None:
    url = f"{place}/{manner.replace(' ', '%20')}"
    settings = load(Layout(tmp_path), environ={"HOME": "/h", "UV_DEFAULT_INDEX": url})
    began = time.monotonic()
    with pytest.raises(SourceError) as caught:
        fetch(way, url, settings, tmp_path / "file")
    assert time.monotonic() - began < PATIENCE_S / 2
    assert caught.value.hint
    part = tmp_path / "file.part"
    assert not part.exists() or part.stat().st_size <= (3 << 20) + files.CHUNK_BYTES


class _Raw:
    """The slowest line of use, with its clock: its first bytes come late, and all of them come."""

    def __init__(self) -> None:
        self.chunks = [b"x" * files.SLOWEST_BYTES_PER_S] * 4 + [b""]
        self.now = 0.0

    def read1(self, amount: int, decode_content: bool) -> bytes:
        self.now += 0.4
        return self.chunks.pop(0)

    def monotonic(self) -> float:
        return self.now


def test_slow_line_that_goes_on_is_no_drip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ANSWER_S", 0.6)
    raw = _Raw()
    monkeypatch.setattr(files, "time", raw)
    reply = types.SimpleNamespace(headers={}, request=None, raw=raw)
    assert len(b"".join(files.received(reply, 1 << 20))) == 4 * files.SLOWEST_BYTES_PER_S


@pytest.mark.parametrize("way", ["file", "patch", "index"])
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "http://me:hunter2@127.0.0.1:1"])
def test_proxy_that_points_nowhere_is_named_without_its_password(
    way: str, proxy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy", "https_proxy", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    url = "https://pypi.invalid/simple"
    settings = load(Layout(tmp_path), environ={"HOME": "/h", "UV_DEFAULT_INDEX": url})
    with pytest.raises(SourceError) as caught:
        fetch(way, url, settings, tmp_path / "file")
    assert "through the proxy" in caught.value.message
    assert "127.0.0.1:1" in caught.value.message
    assert "HTTPS_PROXY" in caught.value.message
    assert "hunter2" not in caught.value.message


class _Plain(_Handler):
    def do_GET(self) -> None:
        self._head(Content_Length="5")
        self.wfile.write(b"whole")


@pytest.fixture
def secure_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server with a certificate that no authority of the system has signed."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Plain) as server:
        server.daemon_threads = True
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"https://127.0.0.1:{server.server_port}/whole"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_certificate_that_uv_takes_counts_for_downloads_too(
    name: str, secure_place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "whole"
    with pytest.raises(SourceError, match="certificate"):
        files.download(secure_place, place, expected_sha256=None, timeout_s=5)
    monkeypatch.setenv(name, str(CERTIFICATE))
    files.download(secure_place, place, expected_sha256=None, timeout_s=5)
    assert place.read_bytes() == b"whole"
