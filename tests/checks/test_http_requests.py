"""Requests with one right outcome: what they send, and a verdict on each wrong reply."""

import http.server
import json
import re
import threading
from collections.abc import Iterator

import pytest

from tests.checks.test_http_checks import BODIES
from tests.checks.test_server_checks import ANSWERS
from workspace.checks import http_checks, http_requests
from workspace.checks.http_checks import Position, Reply
from workspace.checks.http_requests import Client, Limit
from workspace.core import records
from workspace.server.observation import Address

KNOWN = ANSWERS.known
IDS, CHANCES = [300, 301, 302, 303, 304, 305, 306, 307], [-0.5 - by for by in range(8)]
LIKELY = Position(IDS, CHANCES, 300, -0.5, (1, 1))
RARE = Position(IDS, CHANCES, 7, -20.0, (9, 12))
FOUND = dict(zip(IDS[:5], CHANCES, strict=False))
USED = {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}


def judged(found: dict[int, float], expected: Position, *, is_listed: bool = False) -> list[str]:
    return http_checks.position_of("x", found, expected, is_listed=is_listed)


def reply(document: object, status: int = 200) -> Reply:
    return Reply(status, json.dumps(document), "application/json")


def streamed(*events: object) -> Reply:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return Reply(200, "".join([*lines, "data: [DONE]\n\n"]), "text/event-stream")


def test_position_has_exactly_the_most_likely_tokens_and_its_own() -> None:
    assert judged(FOUND, LIKELY) == []
    assert judged({**FOUND, 7: -20.0}, RARE) == []
    rounded = {**FOUND, 304: FOUND[304] + 9e-4}
    assert judged(rounded, LIKELY) == []
    wrong = (
        ({**FOUND, 304: FOUND[304] + 2e-3}, LIKELY, "differs by 2.0e-03, the limit is 0.001"),
        ({**FOUND, 305: -5.5}, LIKELY, "the tokens are [300, 301, 302, 303, 304, 305], expected"),
        ({token: FOUND[token] for token in IDS[:4]}, LIKELY, "the tokens are"),
        (FOUND, RARE, "expected [7, 300, 301, 302, 303, 304]"),
        ({**FOUND, 7: float("nan")}, RARE, "differs by inf"),
        ({}, LIKELY, "the tokens are []"),
    )
    for found, expected, output in wrong:
        assert output in judged(found, expected)[0], found


def test_tokens_that_tie_for_the_last_place_may_be_either() -> None:
    tied = Position(IDS, [*CHANCES[:4], -4.5, -4.5005, -6.0, -7.0], 300, -0.5, (1, 1))
    other = {**{token: FOUND[token] for token in IDS[:4]}, 305: -4.5005}
    assert judged(FOUND, tied) == judged(other, tied) == []
    assert judged({**other, 306: -6.0}, tied) != []


def test_listed_tokens_are_all_there_with_their_own_and_no_other() -> None:
    listed = Position([7, 8], [-9.0, -8.0], 300, -0.5)
    assert judged({7: -9.0, 8: -8.0, 300: -0.5}, listed, is_listed=True) == []
    for found in ({7: -9.0, 300: -0.5}, {7: -9.0, 8: -8.0, 9: -7.0, 300: -0.5}, {7: -9.0, 8: -8.0}):
        assert judged(found, listed, is_listed=True) != []


def named(tops: list[dict[int, float] | None]) -> dict[str, object]:
    """Return the log-probabilities of a completion of the token 300, in vLLM's names."""
    return {
        "tokens": ["token_id:0", "token_id:300"],
        "token_logprobs": [None, -0.5],
        "top_logprobs": [top and {f"token_id:{one}": top[one] for one in top} for top in tops],
    }


def test_echo_begins_without_a_log_probability() -> None:
    def scored(found: object) -> list[str]:
        one = reply({"choices": [{"logprobs": found}]})
        return http_checks.scored("x", one, [0, 300], [None, LIKELY])

    right = named([None, FOUND])
    assert scored(right) == []
    for wrong in (
        named([{0: -1.0}, FOUND]),
        named([None, None]),
        named([None, {**FOUND, 300: -0.6}]),
        named([None]),
        right | {"tokens": ["token_id:0", "token_id:301"]},
        right | {"tokens": ["<s>", "<300>"]},
        right | {"token_logprobs": [-1.0, -0.5]},
        None,
    ):
        assert len(scored(wrong)) == 1, wrong


def test_prompt_has_log_probabilities_ranks_and_names() -> None:
    def scored(**changes: object) -> list[str]:
        found = {
            str(token): {"logprob": chance, "rank": 9, "decoded_token": f"<{token}>"}
            for token, chance in {**FOUND, 7: -20.0}.items()
        }
        part = {"prompt_logprobs": [None, {**found, **changes}]}
        return http_checks.prompt_scored("x", part, reply(part), [RARE])

    own = {"logprob": -20.0, "rank": 9, "decoded_token": "$"}
    assert scored() == scored(**{"7": own}) == []
    assert scored(**{"7": own | {"rank": 13}}) == ["x: token 7 has the rank 13, expected 9 to 12"]
    other = {"logprob": -0.5, "rank": 1, "decoded_token": "<301>"}
    assert scored(**{"300": other}) == ["x: the token 300 is called '<301>'"]
    for part in ({}, {"prompt_logprobs": []}, {"prompt_logprobs": [{}, {}]}):
        assert len(http_checks.prompt_scored("x", part, reply(part), [RARE])) == 1


def test_answer_has_the_text_the_end_and_the_usage_that_it_must_have() -> None:
    def answered(expected: str | None = "ab", **changes: object) -> list[str]:
        choice = {"text": "ab", "finish_reason": "length"} | changes
        one = reply({"choices": [choice], "usage": changes.get("usage", USED)})
        return http_checks.answered("x", one, expected, 5, 4)

    assert answered() == answered(None, text="?") == []
    assert answered(text=None, message={"content": "ab"}) == []
    assert answered(text="b") == ["x: it answers 'b', expected 'ab'"]
    assert len(answered(finish_reason="stop")) == 1
    assert len(answered(usage=USED | {"completion_tokens": 3})) == 1


@pytest.mark.parametrize(
    ("limit", "one", "problem"),
    [
        (
            Limit("n", 0, 0, ("n must", "1")),
            reply({"error": {"message": "n must be 1"}}, 400),
            None,
        ),
        (
            Limit("n", 0, 0, ("n must", "2")),
            reply({"error": {"message": "n must be 1"}}, 400),
            "n 0",
        ),
        (
            Limit("n", 0, 0, ("n",)),
            reply({"error": {"message": "n"}}, 500),
            "n 0: HTTP 500: n, exp",
        ),
        (Limit("n", 0, 0, ("n",)), reply({"choices": []}), "n 0: the answer is 200, expected HTTP"),
        (Limit("n", 1, 4), reply({"error": {"message": "n"}}, 400), "n 1: HTTP 400: n"),
        (Limit("n", 1, 4), Reply(None, "reset"), "n 1: no answer: reset"),
    ],
)
def test_limit_is_answered_or_refused_by_name(
    limit: Limit, one: Reply, problem: str | None
) -> None:
    found = http_requests._bounded(limit, one, 5)
    assert found == [] if problem is None else found[0].startswith(problem)


def event(*tokens: int, **more: object) -> dict[str, object]:
    return {"choices": [{"token_ids": list(tokens)}], **more}


def used(made: int) -> dict[str, object]:
    return {"usage": {"prompt_tokens": 5, "completion_tokens": made, "total_tokens": 5 + made}}


LAST, EACH = ("include_usage",), ("include_usage", "continuous_usage_stats")


@pytest.mark.parametrize(
    ("chosen", "events", "is_right"),
    [
        ((), [event(1), event(2)], True),
        ((), [event(1), event(2, **used(2))], False),
        ((), [event(1), event(2), {"choices": [], **used(2)}], False),
        ((), [event(1)], False),
        ((), [event(1), event(3)], False),
        ((), [], False),
        (LAST, [event(1), event(2), {"choices": [], **used(2)}], True),
        (LAST, [event(1), event(2), {"choices": [], **used(3)}], False),
        (LAST, [event(1), event(2, **used(2))], False),
        (LAST, [event(1, **used(1)), event(2), {"choices": [], **used(2)}], False),
        (EACH, [event(**used(0)), event(1, **used(1)), event(2, **used(2)), used(2)], True),
        (EACH, [event(1, **used(1)), event(2, **used(1)), used(2)], False),
        (EACH, [event(1), event(2, **used(2)), used(2)], False),
    ],
)
def test_stream_has_its_usage_where_it_is_asked_for(
    chosen: tuple[str, ...], events: list[object], is_right: bool
) -> None:
    found = http_requests._streamed("x", streamed(*events), [1, 2], 5, chosen)
    assert (found == []) == is_right, found


def test_forms_that_spell_allow_the_answer_and_differ_from_it_at_each_letter() -> None:
    forms = http_requests._spelled(KNOWN)
    text = "a[b]"
    assert {name: expected for name, (_, expected) in forms.items()} == dict.fromkeys(forms, text)
    wanted = {name: form.get("structured_outputs", {}) for name, (form, _) in forms.items()}
    pattern = wanted["regex"]["regex"]  # type: ignore[index]
    assert re.fullmatch(pattern, text)
    assert not re.fullmatch(pattern, text + "a")
    assert not re.fullmatch(pattern, "a[bc")
    choice = wanted["choice"]["choice"]  # type: ignore[index]
    assert choice[0] == text
    assert [sum(a != b for a, b in zip(one, text, strict=True)) for one in choice] == [
        0,
        1,
        1,
        1,
        1,
    ]


def test_forms_that_steer_have_documents_of_the_schema() -> None:
    choices = http_requests.SCHEMA["properties"]
    for _, text in http_requests._steered().values():
        document = json.loads(re.sub(r"^(<a>|~)|(</a>|!)$", "", text))
        if document == {"": ""}:
            continue
        assert document.keys() == choices.keys()  # type: ignore[attr-defined]
        assert re.search(r"\{.*\}", text).group() in http_requests.DOCUMENTS  # type: ignore[union-attr]
        for name, value in document.items():
            assert value in choices[name]["enum"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ('{"part":"pin","count":1,"is_built":true}', True),
        ('{"part":"pin","count":true,"is_built":true}', False),
        ('{"part":"pin","count":1,"is_built":1}', False),
        ('{"part":"pin","count":1.0,"is_built":true}', False),
        ('{"part":"pin","count":1}', False),
        ('{"part":"pin","count":1,"is_built":true,"more":1}', False),
        ('{"part":"pin","count":1,"is_built":true', False),
        ("", False),
        ("None", False),
    ],
)
def test_schema_is_obeyed_to_the_letter(text: str, is_one: bool) -> None:
    assert (text in http_requests.DOCUMENTS) == is_one


def test_limits_name_the_parameter_that_they_refuse() -> None:
    table = records.parse_toml(http_requests.LIMITS.read_bytes())
    rows = [row for part in ("completions", "chats") for row in table[part]]  # type: ignore[attr-defined]
    assert all(("tokens" in row) != ("refused" in row) for row in rows)
    assert all(row["tokens"] > 0 if "tokens" in row else row["refused"] for row in rows)


def test_answers_that_are_damaged_are_none() -> None:
    assert KNOWN.is_usable
    for sampled in ({}, {"texts": 1}, {"texts": [], "chats": [], "block": 4}):
        assert not http_requests.answers([], sampled, {}).known.is_usable
    assert not http_requests.answers([], {}, {"sampling": {"cases": [{"case": 1}]}}).known.is_usable


@pytest.fixture
def hostile() -> Iterator[tuple[Client, list[bytes]]]:
    """Return a client of a server that answers everything with one body, and that body."""
    body = [b""]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            self.wfile.write(body[0])

        def log_message(self, *_: object) -> None:
            """Write no log."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Client(Address("127.0.0.1", server.server_port), [], 10.0), body
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("index", range(len(BODIES)))
def test_whatever_comes_fails_each_check_and_raises_nothing(
    hostile: tuple[Client, list[bytes]], index: int
) -> None:
    client, body = hostile
    body[0] = BODIES[index].encode("utf-8", errors="replace")
    for name, check in http_requests.CHECKS.items():
        # `limits` has nearly a hundred requests.
        if name != "limits" or index < 2:
            problems, _ = check(client, KNOWN)
            assert problems, name
            assert all(len(problem) < 600 for problem in problems), name
