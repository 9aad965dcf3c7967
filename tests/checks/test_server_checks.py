"""The smoke's server in real processes: each fault fails the check that names it.

No process or file is left.
"""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from workspace.checks import server_checks
from workspace.checks.http_checks import offline
from workspace.checks.http_requests import answers
from workspace.checks.registry import Check
from workspace.core.console import Console, RunLog
from workspace.server import lifecycle, observation, process_tree
from workspace.server.observation import Address

FRONT = Path(__file__).with_name("front.py")
# Prompts as long as their texts, since a letter is a token to the tiny model.
ROWS = [
    {
        "text": text,
        "prompt": list(range(start, start + len(text))),
        "tokens": [300 + (start + step) % 700 for step in range(20)],
        "logprobs": [-0.5] * 20,
    }
    for start, text in enumerate(("Hello", "def add(a, b):"), 10)
]

CHATS = [
    {
        "messages": [{"role": "user", "content": row["text"]}],
        "more": {},
        "tokens": [0, *row["prompt"]],  # type: ignore[misc]
        "text": f"<0>{row['text']}",
    }
    for row in ROWS
]
BEGUN = [*CHATS[0]["messages"], {"role": "assistant", "content": "It is"}]  # type: ignore[misc]
CHATS.append(CHATS[0] | {"messages": BEGUN, "more": {"continue_final_message": True}})
PLAIN = ROWS[1]["tokens"][::-1][:16]  # type: ignore[index]
PROMPT = CHATS[1]["tokens"]


def position(token: int, **changes: object) -> dict[str, object]:
    """Return the stand-in's log-probabilities of a position."""
    ids, chances = [token + by for by in range(8)], [-0.5 - by for by in range(8)]
    own = {"token": token, "logprob": -0.5, "ranks": [1, 1]}
    if token < 300:
        ids, chances = [400 + by for by in range(8)], [-1.0 - by for by in range(8)]
        own |= {"logprob": -20.0, "ranks": [9, 9]}
    return {"ids": ids, "logprobs": chances, **own, **changes}


def case(name: str, positions: list[dict[str, object]], **params: object) -> dict[str, object]:
    made = {"tokens": PLAIN, "text": "".join(f"<{token}>" for token in PLAIN), "raw": positions}
    return {"case": name, "params": {"max_tokens": 16, **params}, "finish": "length", **made}


RAW = [position(token) for token in PLAIN]
LISTED = [position(token, ids=[300, 301], logprobs=[-9.0, -9.0]) for token in PLAIN]
SPELLED = case("allowed_token_ids", [], allowed_token_ids=[61, 63, 67, 68], max_tokens=4)
REFERENCE = {
    "message": ROWS[1]["text"],
    "prompt": PROMPT,
    "prompt_logprobs": [position(token) for token in PROMPT[1:]],  # type: ignore[index]
    "cases": [
        case("logprobs", RAW, logprobs=5),
        case("logprob_token_ids", LISTED, logprobs=2, logprob_token_ids=[300, 301]),
        SPELLED | {"text": "a[b]", "tokens": [67, 61, 68, 63]},
    ],
}
TEXTS = [
    {
        "text": row["text"],
        "tokens": row["prompt"],
        "bare": row["prompt"][1:],  # type: ignore[index]
        "decoded": f"^{row['text']}",
    }
    for row in ROWS
]
SAMPLED = {"chats": CHATS, "texts": TEXTS, "block": 4}
ANSWERS = answers(ROWS, SAMPLED, {"sampling": REFERENCE})


def args_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


class Place:
    """A folder with all that one smoke of a server leaves."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.place = folder, folder / "server"
        self.rows = folder / "rows.json"
        self.rows.write_text(json.dumps(ROWS))
        self.stacks: tuple[str, ...] = ()

    def run(
        self, manner: str = "", *, limit_s: float = 20.0, rows: object = ROWS
    ) -> dict[str, Check]:
        port = lifecycle.free_port()
        argv = (sys.executable, "-S", str(FRONT), str(port), manner, str(self.rows))
        tested = server_checks.ServerUnderTest(
            argv,
            {"PATH": "/usr/bin:/bin", "PYTHONFAULTHANDLER": "1"},
            Address("127.0.0.1", port),
            "1+cpu",
            offline(rows),
            ANSWERS.cases,
            ANSWERS.known,
            limit_s,
        )
        before = process_tree.living().keys()
        with RunLog(
            Console(out=io.StringIO(), err=io.StringIO()), self.folder / "logs", verb="smoke"
        ) as run_log:
            checks, self.stacks = server_checks.run(self.place, tested, run_log=run_log)
        assert [check.identifier for check in checks] == [
            f"server.{name}" for name in server_checks.CHECKS
        ]
        assert not [
            pid for pid in process_tree.living().keys() - before if str(port) in args_of(pid)
        ]
        assert observation.find(self.place) is None
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
        return {check.identifier.removeprefix("server."): check for check in checks}

    def failed(self, manner: str, **options: object) -> dict[str, str]:
        return {
            name: check.evidence
            for name, check in self.run(manner, **options).items()
            if check.verdict == "fail"
        }  # type: ignore[arg-type]

    def log(self) -> str:
        return "".join(path.read_text() for path in (self.folder / "logs").glob("*.log"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(lifecycle, "POLL_S", 0.02)
    return Place(tmp_path)


def test_right_server_passes_with_evidence_for_each_check_and_no_log(place: Place) -> None:
    found = place.run()
    assert {name: check.evidence for name, check in found.items() if check.verdict != "pass"} == {}
    assert all(check.evidence for check in found.values())
    assert place.stacks == ()
    assert place.log() == ""


def test_rubbish_with_200_fails_all_that_reads_answers_and_the_server_is_still_stopped(
    place: Place,
) -> None:
    failed = place.failed("rubbish")
    # All at once it is the same rubbish as alone; its usage is right.
    assert set(failed) == {
        *("completions", "chat", "stream", "logprobs", "parameters", "structured"),
        *("echo", "usage", "tokens", "limits"),
    }
    assert failed["completions"].startswith("1 answers to 2 prompts")


@pytest.mark.parametrize(
    ("manner", "checks", "output"),
    [
        (
            "off",
            "logprobs echo",
            "40 of 40 tokens as offline, largest log-probability difference 1.0e-02",
        ),
        ("raises", "bad_request limits", "no document: HTTP 500"),
        ("ignores seeds", "parameters", "n 3: the answers are ["),
        (
            "begins twice",
            "chat tokens limits",
            "the tokens of [{'role': 'user', 'content': 'Hello'}] are [0, 0",
        ),
        ("other", "ready", "it reports vLLM 2, but the stamp has 1+cpu"),
        ("chats are off", "logprobs", "logprobs of a chat: a log-probability differs by 1.0e-02"),
        ("any form", "structured", "regex: it answers '{}', expected 'a[b]'"),
        ("ranks from zero", "echo", "prompt_logprobs: token 11 has the rank 0, expected 9 to 9"),
        ("forgets salts", "cache", "a prompt with the salt a: 8 tokens are cached, expected 0"),
        ("counts pieces", "usage", "include_usage and continuous_usage_stats: a stream: its usage"),
        ("turns texts", "tokens", "/tokenize of ['Hello']: tokens [14, 13, 12, 11, 10], expected"),
        ("cuts on the left", "limits", "a prompt and a chat cut on the right: [["),
    ],
)
def test_one_fault_fails_the_check_that_names_it_and_no_unrelated_one(
    place: Place, manner: str, checks: str, output: str
) -> None:
    failed = place.failed(manner)
    assert set(failed) == {*checks.split()}
    assert failed[checks.split()[0]].startswith(output)


def test_crash_at_start_is_reported_by_the_servers_own_error(place: Place) -> None:
    failed = place.failed("raises at start")
    assert set(failed) == set(server_checks.CHECKS)
    assert failed["ready"].endswith("exited with 1: RuntimeError: no such kernel")
    assert "no such kernel" in place.log()


def test_crash_in_the_middle_is_the_cause_of_all_later_failures_and_no_check_waits(
    place: Place,
) -> None:
    started = time.monotonic()
    failed = place.failed("dies")
    assert set(failed) == {*server_checks.CHECKS[1:]}
    assert all(
        text.endswith("exited with 3: ValueError: the engine is no more")
        for name, text in failed.items()
        if name != "stop"
    )
    assert time.monotonic() - started < server_checks.DYING_S


@pytest.mark.parametrize(
    ("manner", "first", "output"),
    [("hangs at start", "ready", "not ready"), ("hangs", "completions", "not done")],
)
def test_hang_is_ended_at_the_limit_with_a_stack_dump(
    place: Place, manner: str, first: str, output: str
) -> None:
    failed = place.failed(manner, limit_s=1.0)
    assert (
        failed[first]
        == f"the server was {output} after 1 s and was ended; its stacks are in the log"
    )
    assert any("front.py" in line and "sleep_for_ever" in line for line in place.stacks)
    assert "sleep_for_ever" in place.log()


def test_process_that_outlives_its_front_is_named_and_ended(place: Place) -> None:
    failed = place.failed("leaks", limit_s=1.5)
    assert set(failed) == {"stop"}
    assert "front.py" in failed["stop"]
    assert any("sleep_for_ever" in line for line in place.stacks)


def test_damaged_state_and_a_server_that_a_killed_smoke_has_left_are_no_obstacle(
    place: Place,
) -> None:
    place.place.mkdir()
    (place.place / "server.json").write_text("{")
    assert place.failed("raises at start")["ready"].endswith("no such kernel")
    port = lifecycle.free_port()
    launch = lifecycle.Launch(
        "smoke",
        (sys.executable, "-S", str(FRONT), str(port), "", str(place.rows)),
        {},
        Address("127.0.0.1", port),
    )
    former = lifecycle.start(place.place, launch, is_detached=True)
    os.kill(former.processes.supervisor_pid, signal.SIGSTOP)
    assert place.failed("raises at start")["ready"].endswith("no such kernel")
    assert former.members() == set()


def test_nothing_is_started_without_an_offline_answer_to_compare_with(
    place: Place,
) -> None:
    for rows in ([], [{"text": 1}], "x", [ROWS[0] | {"tokens": [0] * 20}]):
        assert set(place.failed("", rows=rows).values()) == {
            "the offline engine gave no answer to compare with"
        }
    assert not place.place.exists()


def test_interrupt_leaves_nothing(place: Place) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from tests.checks.test_server_checks import Place\n"
        "Place(Path(sys.argv[2])).run('hangs at start', limit_s=60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(FRONT.parents[2]), str(place.folder)],
        stderr=subprocess.DEVNULL,
    ) as verb:
        deadline = time.monotonic() + 20
        while not ((there := observation.find(place.place)) and len(there.members()) > 1):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        verb.send_signal(signal.SIGINT)
    assert there.members() == set()
    assert observation.find(place.place) is None
