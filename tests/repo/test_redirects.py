"""Redirects of a fetched patch: to public hosts, and to the host that the user typed."""

import http.server
import ipaddress
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.strategies import fuzz
from workspace.core.errors import SourceError
from workspace.core.paths import Layout
from workspace.core.settings import load
from workspace.repo import importing

TYPED = "https://github.com/o/r/pull/1.patch"


@fuzz(fast=200, deep=20_000)
@given(st.ip_addresses(), st.sampled_from(("http", "https")), st.sampled_from(("", ":80", ":8000")))
@example(ipaddress.ip_address("169.254.169.254"), "http", "")
@example(ipaddress.ip_address("::ffff:127.0.0.1"), "https", "")
@example(ipaddress.ip_address("fe80::1"), "https", "")
@example(ipaddress.ip_address("0.0.0.0"), "https", ":8000")
@example(ipaddress.ip_address("8.8.8.8"), "https", "")
def test_redirect_to_an_address_is_followed_only_where_it_is_public(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, scheme: str, port: str
) -> None:
    host = f"[{address}]" if address.version == 6 else str(address)
    plain = getattr(address, "ipv4_mapped", None) or address
    is_followed = scheme == "https" and plain.is_global and not plain.is_multicast
    try:
        importing._check_redirect(TYPED, f"{scheme}://{host}{port}/x")
    except ValueError:
        assert not is_followed
    else:
        assert is_followed


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
    ],
)
def test_spelling_of_this_machine_or_of_another_protocol_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="redirects to|Invalid|out of range"):
        importing._check_redirect(TYPED, target)


@pytest.mark.parametrize(
    ("typed", "target"),
    [
        ("http://127.0.0.1:8000/a", "http://127.0.0.1:8000/b"),
        ("http://10.0.0.5/a", "https://10.0.0.5/b"),
        ("http://localhost:8000/a", "https://localhost/b"),
        (TYPED, "https://no-such-host.invalid/x"),
    ],
)
def test_redirect_on_the_typed_host_is_followed(typed: str, target: str) -> None:
    importing._check_redirect(typed, target)


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


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_service_of_this_machine_is_not_requested(
    host: str, service: http.server.ThreadingHTTPServer, tmp_path: Path
) -> None:
    with serving(f"http://{host}:{service.server_port}/secret") as page:
        threading.Thread(target=page.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(SourceError, match="which is not public"):
            importing._fetched(
                f"http://127.0.0.1:{page.server_port}/1.patch",
                load(Layout(tmp_path), environ={"HOME": "/h"}),
            )
        page.shutdown()
    assert service.RequestHandlerClass.requests == []


def test_name_whose_second_answer_is_this_machine_is_not_requested(
    service: http.server.ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve, answers = socket.getaddrinfo, iter(["8.8.8.8"])

    def getaddrinfo(host: str, *args: object, **kwargs: object) -> object:
        found = next(answers, "127.0.0.1") if host == "moves.example" else host
        return resolve(found, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setenv("NO_PROXY", "*")
    with serving(f"http://moves.example:{service.server_port}/secret") as page:
        threading.Thread(target=page.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(
            SourceError, match=r"moves\.example \(127\.0\.0\.1\), which is not public"
        ):
            importing._fetched(
                f"http://127.0.0.1:{page.server_port}/1.patch",
                load(Layout(tmp_path), environ={"HOME": "/h"}),
            )
        page.shutdown()
    assert service.RequestHandlerClass.requests == []
