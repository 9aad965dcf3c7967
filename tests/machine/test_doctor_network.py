"""Remotes and indexes that answer, are missing, hang or refuse: all of them on this machine."""

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from workspace.core.console import Row
from workspace.machine import doctor_host
from workspace.machine.machine import Case


def rows(check, house, *, built=False, **shell) -> dict[str, Row]:
    if built:
        house.layout.stamp("vllm").parent.mkdir(parents=True, exist_ok=True)
        house.layout.stamp("vllm").touch()
    found = tuple(check(Case(house.machine(**shell), device="cpu", is_native=False)))
    assert all(row.hint for row in found if row.state == "FAIL"), "every failure has its hint"
    return {row.name: row for row in found}


@pytest.fixture
def pinned(house, tmp_path):
    """Pins whose remotes are folders; the repository appears where the test makes it."""
    house.layout.pins.parent.mkdir(parents=True, exist_ok=True)
    house.layout.pins.write_text(f"[vllm]\nurl = '{tmp_path / 'upstream'}'\n[triton]\nurl = 5\n")
    return tmp_path / "upstream"


def repository(house, path):
    case = Case(house.machine(), device="cpu", is_native=False)
    assert case.ask(["git", "init", "-q", "--bare", path]).value.returncode == 0
    return path


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def refusing() -> Iterator[str]:
    """A server that wants a password."""

    class Reply(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Reply) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_missing_remote_is_a_warning_while_the_archive_replaces_it(house, pinned):
    found = rows(doctor_host.vllm, house)["vllm git"]
    assert (found.state, "archive" in found.why) == ("warn", True)
    assert rows(doctor_host.vllm, house, SOURCE="git")["vllm git"].state == "FAIL"
    repository(house, pinned)
    assert rows(doctor_host.vllm, house, SOURCE="git")["vllm git"].state == "ok"


def test_mirror_that_answers_is_enough(house, pinned, tmp_path):
    mirror = repository(house, tmp_path / "mirror")
    assert {
        name: row.state
        for name, row in rows(doctor_host.vllm, house, VLLM_MIRROR=str(mirror)).items()
    } == {"vllm mirror": "ok"}
    found = rows(doctor_host.vllm, house, VLLM_MIRROR=str(tmp_path / "gone"))
    assert (found["vllm mirror"].state, found["vllm git"].state) == ("warn", "warn")


def test_remote_that_never_answers_costs_the_connect_time_out(house, pinned, silent):
    started = time.monotonic()
    found = rows(doctor_host.vllm, house, VLLM_MIRROR=f"{silent}/vllm.git", CONNECT_TIMEOUT_S="1")[
        "vllm mirror"
    ]
    assert time.monotonic() - started < 4
    assert "no answer in 1 s" in found.text


def test_password_in_a_mirrors_address_is_not_shown(house, pinned, refusing):
    found = rows(doctor_host.vllm, house, VLLM_MIRROR=f"http://me:hunter2@{refusing}/vllm.git")[
        "vllm mirror"
    ]
    assert found.state == "warn"
    assert "hunter2" not in repr(found)


@pytest.mark.parametrize("content", [None, "not toml [", "[vllm]\n", "vllm = 3\n"])
def test_pins_that_name_no_remote_fail_with_a_sentence(house, content):
    house.layout.pins.parent.mkdir(parents=True, exist_ok=True)
    if content is not None:
        house.layout.pins.write_text(content)
    assert rows(doctor_host.vllm, house)["vllm git"].state == "FAIL"


def test_missing_index_fails_for_a_fresh_clone_and_warns_for_a_built_one(house):
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}/simple"
    assert rows(doctor_host.index, house, UV_DEFAULT_INDEX=closed)["index"].state == "FAIL"
    assert (
        rows(doctor_host.index, house, built=True, UV_DEFAULT_INDEX=closed)["index"].state == "warn"
    )


def test_index_that_hangs_or_refuses_is_reported_without_its_password(house, silent, refusing):
    assert (
        "no answer in 1 s"
        in rows(doctor_host.index, house, UV_DEFAULT_INDEX=silent, CONNECT_TIMEOUT_S="1")[
            "index"
        ].text
    )
    found = rows(doctor_host.index, house, UV_DEFAULT_INDEX=f"http://me:hunter2@{refusing}/simple")[
        "index"
    ]
    assert "answers 401" in found.text
    assert "hunter2" not in repr(found)


@pytest.mark.parametrize(
    ("page", "state"),
    [
        ("<form action='/login?next=/simple/packaging/'><input name=password></form>", "FAIL"),
        ("", "FAIL"),
        ("<a href='../packaging-25.0-py3-none-any.whl'>packaging</a>", "ok"),
        ('{"files": [{"filename": "packaging-25.0-py3-none-any.whl"}]}', "ok"),
    ],
)
def test_login_page_is_no_index(house, page, state):
    class Reply(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Reply) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}/simple"
        row = rows(doctor_host.index, house, UV_DEFAULT_INDEX=endpoint)["index"]
        server.shutdown()
        thread.join()
    assert (row.state, "lists no wheel" in row.text) == (state, state == "FAIL")


def test_index_in_a_folder_exists_or_fails(house, tmp_path):
    assert rows(doctor_host.index, house, UV_DEFAULT_INDEX=tmp_path.as_uri())["index"].state == "ok"
    assert (
        rows(doctor_host.index, house, UV_DEFAULT_INDEX=(tmp_path / "gone").as_uri())["index"].state
        == "FAIL"
    )
