"""Files: whole or not at all, and what a server may do to a download."""

import hashlib
import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from workspace.core import files
from workspace.core.errors import SourceError

CONTENT = bytes(range(256)) * 4096 * 3
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class _Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT with the fault named by `manner`."""

    manner = "ranges"
    block_on_close = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        requested = self.headers.get("Range")
        self.server.ranges.append(requested)
        if self.server.manner == "forbidden":
            self.send_error(403)
            return
        start = (
            int(requested.removeprefix("bytes=").removesuffix("-"))
            if requested and self.server.manner != "no ranges"
            else 0
        )
        if start >= len(CONTENT):
            self.send_error(416)
            return
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.server.manner == "breaks off" else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(server: _Server, target: Path, *, sha256: str = SHA256, **more) -> None:
    files.download(server.url, target, expected_sha256=sha256, timeout_s=5, **more)


def test_download_appears_whole_and_reports_its_way(server: _Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    fetch(
        server,
        tmp_path / "new" / "file",
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert (tmp_path / "new" / "file").read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_download_that_broke_off_is_no_file_and_goes_on_where_it_stopped(
    server: _Server, tmp_path: Path
) -> None:
    target = tmp_path / "file"
    server.manner = "breaks off"
    with pytest.raises(SourceError) as caught:
        fetch(server, target)
    assert "file could not be fetched" in caught.value.message
    assert not target.exists()
    kept = (tmp_path / "file.part").stat().st_size
    assert files.CHUNK_BYTES <= kept <= len(CONTENT) // 2
    server.manner = "ranges"
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={kept}-"]


def test_server_without_ranges_does_not_double_the_beginning(
    server: _Server, tmp_path: Path
) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    server.manner = "no ranges"
    fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_part_that_is_already_whole_is_taken(server: _Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT)
    fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_part_of_another_file_does_not_stay_in_the_way(server: _Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    with pytest.raises(SourceError):
        fetch(server, tmp_path / "file")
    fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_wrong_hash_leaves_no_file_and_names_both(server: _Server, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        fetch(server, tmp_path / "file", sha256="0" * 64)
    assert SHA256 in caught.value.message
    assert "0" * 64 in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_refusal_is_named_without_the_password_in_the_address(
    server: _Server, tmp_path: Path
) -> None:
    server.manner = "forbidden"
    url = server.url.replace("http://", "http://someone:hunter2@")
    with pytest.raises(SourceError) as caught:
        files.download(url, tmp_path / "file", expected_sha256=SHA256, timeout_s=5)
    assert caught.value.message == "file could not be fetched: the server answers 403 Forbidden"


def test_nobody_listening_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as bound, pytest.raises(SourceError, match="Connection refused"):
        bound.bind(("127.0.0.1", 0))
        files.download(
            f"http://127.0.0.1:{bound.getsockname()[1]}/file",
            tmp_path / "file",
            expected_sha256=SHA256,
            timeout_s=5,
        )


def test_atomic_write_replaces_content_and_mode_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a" / "file"
    files.write_atomic(target, b"old")
    files.write_atomic(target, b"new", mode=0o600)
    assert (target.read_bytes(), target.stat().st_mode & 0o777) == (b"new", 0o600)
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.mkdir()
    (target / "inner").touch()
    with pytest.raises(OSError, match="directory"):
        files.write_atomic(target, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_file_that_is_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 31)
    with pytest.raises(OSError, match="it is larger than 64 MiB"):
        files.read_regular(path)
