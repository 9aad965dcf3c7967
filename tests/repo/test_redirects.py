"""Redirects of a fetched patch: only on the host that the user typed, and to GitHub's own."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from workspace.core.errors import SourceError
from workspace.core.paths import Layout
from workspace.core.settings import load
from workspace.repo.git import remotes

TYPED = "https://github.com/o/r/pull/1.patch"


@pytest.mark.parametrize(
    "target",
    [
        "https://localhost/x",
        "https://localhost.:8080/x",
        "https://2130706433/x",
        "https://0x7f000001/x",
        "https://127.1/x",
        "https://user@127.0.0.1/x",
        "https://github.com@127.0.0.1/x",
        "http://github.com/x",
        "file:///etc/passwd",
        "ftp://ftp.example.org/x",
        "https://[::1",
        "https://127.0.0.1:99999/x",
        "https://169.254.169.254/x",
        "https://example.org/x",
        "https://github.com.example.org/x",
        "https://githubusercontent.com.example.org/x",
        "https://patch-diff.githubusercontent.com:8443/x",
    ],
)
def test_another_host_or_protocol_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="redirects to|Invalid|out of range"):
        remotes._check_redirect(TYPED, target)


@pytest.mark.parametrize(
    ("typed", "target"),
    [
        ("http://127.0.0.1:8000/a", "http://127.0.0.1:8000/b"),
        ("http://10.0.0.5/a", "https://10.0.0.5/b"),
        ("http://localhost:8000/a", "https://localhost/b"),
        (TYPED, "https://patch-diff.githubusercontent.com/raw/o/r/pull/1.patch"),
    ],
)
def test_redirect_on_the_typed_host_and_to_githubs_own_is_followed(typed: str, target: str) -> None:
    remotes._check_redirect(typed, target)


class _Handler(http.server.BaseHTTPRequestHandler):
    target = ""
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        self.send_response(302 if self.target else 200)
        self.send_header("Location", self.target)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def serving(target: str) -> http.server.ThreadingHTTPServer:
    handler = type("Handler", (_Handler,), {"target": target, "requests": []})
    return http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.ThreadingHTTPServer]:
    """A service of this machine that no page may reach."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with serving("") as made:
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        made.shutdown()


def test_service_of_this_machine_is_not_requested(
    service: http.server.ThreadingHTTPServer, tmp_path: Path
) -> None:
    with serving(f"http://localhost:{service.server_port}/secret") as page:
        threading.Thread(target=page.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(SourceError, match="redirects to another host"):
            remotes.fetched(
                f"http://127.0.0.1:{page.server_port}/1.patch",
                load(Layout(tmp_path), environ={"HOME": "/h"}),
            )
        page.shutdown()
    assert service.RequestHandlerClass.requests == []
