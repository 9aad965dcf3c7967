"""Verdicts on growth and pauses, and the requests behind them against a stand-in for the server."""

import http.server
import json
import os
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from workspace.checks import growth
from workspace.checks.growth import Size, grown, paused
from workspace.checks.registry import Check, judged
from workspace.checks.server_checks import ServerUnderTest
from workspace.server.observation import Address


def sizes(*steps: tuple[int, int, float]) -> Check:
    return grown([{7: Size("VLLM::EngineCore", *step)} for step in steps], 1.0)


def test_steady_processes_pass_and_the_evidence_has_the_numbers() -> None:
    found = sizes((50, 30, 600.0), (51, 33, 600.2), (52, 33, 600.3))
    assert found.verdict == "pass"
    assert "at most 2 descriptors, 3 threads, 0.2 MiB more" in found.evidence


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        (((50, 30, 600.0), (150, 30, 600.0), (250, 30, 600.0)), "200 descriptors more"),
        (((50, 30, 600.0), (50, 130, 600.0), (50, 230, 600.0)), "200 threads more"),
        (((50, 30, 600.0), (50, 30, 602.0), (50, 30, 604.0)), "4 MiB more"),
    ],
)
def test_one_of_each_request_that_stays_fails_with_its_name(steps: Any, text: str) -> None:
    found = sizes(*steps)
    assert found.verdict == "fail"
    assert f"VLLM::EngineCore has {text} after 220 requests than after 20" in found.evidence


def test_memory_that_grows_in_one_half_only_is_an_allocators() -> None:
    assert sizes((50, 30, 600.0), (50, 30, 640.0), (50, 30, 640.5)).verdict == "pass"


def test_a_process_that_came_fails_and_one_that_is_missing_is_no_comparison() -> None:
    one, two = Size("a", 1, 1, 1.0), Size("b", 1, 1, 1.0)
    found = grown([{1: one}, {1: one}, {1: one, 2: two}], 1.0)
    assert found.evidence == "process 2, b, is new"
    assert grown([{1: one}], 1.0).verdict == "fail"


def test_four_answers_of_two_hundred_that_wait_fail_and_two_do_not() -> None:
    fast = [0.02] * 196
    assert paused([*fast, *[0.3] * 4], 0.01).evidence.startswith("4 of 200 answers wait: median")
    assert paused([*fast, 0.02, 0.02, 0.3, 0.3], 0.01).verdict == "pass"
    # Times the median counts where answers are slow, seconds where they are fast.
    assert paused([*[1.0] * 196, *[2.9] * 4], 0.01).verdict == "pass"


def test_a_loaded_machine_is_skipped_with_its_load() -> None:
    found = paused([0.02] * 100 + [9.0] * 100, 0.5)
    assert (found.verdict, found.evidence) == (
        "skipped",
        "loaded: other programs used 50% of the processors",
    )


def test_checks_that_were_not_made_are_failed_checks() -> None:
    found = growth.completed((judged("server.ready", ["no"], "", 0.0),))
    assert [check.identifier for check in found] == ["server.ready", *growth.CHECKS]
    assert {check.verdict for check in found} == {"fail"}
    assert growth.completed(found) == found


class Stand(http.server.ThreadingHTTPServer):
    """A stand-in for the server; `manner` is its one fault."""

    daemon_threads = True

    def __init__(self, manner: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.manner = manner
        self.made, self.running, self.used, self.held = 0, 0, 0.0, []  # type: ignore[var-annotated]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Stand

    def do_GET(self) -> None:
        stand = self.server
        lines = [
            f'vllm:generation_tokens_total{{engine="0"}} {stand.made}.0',
            f'vllm:num_requests_running{{engine="0"}} {stand.running}.0',
            f'vllm:kv_cache_usage_perc{{engine="0"}} {stand.used}',
        ]
        self.reply("\n".join(lines).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("stream"):
            self.reply(b"data: {}\n\n")
            self.server.made += 400 if self.server.manner == "goes on" else 9
            self.server.used = 0.25 if self.server.manner == "keeps blocks" else 0.0
            return
        if self.server.manner == "leaks":
            self.server.held.append(os.open("/dev/null", os.O_RDONLY))
        self.server.made += body["max_tokens"]
        self.reply(b'{"choices": []}')

    def reply(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Write no log."""


@pytest.fixture
def stand(request: pytest.FixtureRequest) -> Iterator[Stand]:
    with Stand(request.param) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
        for descriptor in server.held:
            os.close(descriptor)


def run(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> dict[str, Check]:
    monkeypatch.setattr(growth, "PATIENCE_S", 0.5)
    monkeypatch.setattr(growth, "POLL_S", 0.01)
    address = Address("127.0.0.1", stand.server_address[1])
    tested = ServerUnderTest((), dict(os.environ), address, "1", (), (), (), 60.0)
    server: Any = SimpleNamespace(
        members=lambda: {os.getpid()}, processes=SimpleNamespace(supervisor_pid=0)
    )
    settled = []
    found = growth.run(server, tested, settle=lambda: settled.append(time.monotonic()))
    assert len(settled) == 1
    return {check.identifier: check for check in found}


@pytest.mark.parametrize("stand", [""], indirect=True)
def test_right_server_passes(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(stand, monkeypatch)
    assert [*found] == [*growth.CHECKS]
    assert {found[name].verdict for name in growth.CHECKS[:2]} == {"pass"}


@pytest.mark.parametrize(
    ("stand", "check", "text"),
    [
        ("goes on", "server.abort", "all 1601 tokens were made for clients that had left"),
        ("keeps blocks", "server.abort", "25.00% of the blocks stay in use"),
        ("leaks", "server.growth", "200 descriptors more"),
    ],
    indirect=["stand"],
)
def test_fault_fails_the_check_that_names_it(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, check: str, text: str
) -> None:
    found = run(stand, monkeypatch)
    assert text in found[check].evidence
    assert [name for name in growth.CHECKS[:2] if found[name].verdict == "fail"] == [check]
