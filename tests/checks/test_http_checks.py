"""Replies of a server, right, slightly wrong and hostile: each gets a verdict in a sentence."""

import json

import pytest

from workspace.checks import http_checks
from workspace.checks.http_checks import OfflineAnswer, Reply

ROW = OfflineAnswer("Hello", (1, 2, 3, 4, 5), (300, 7, 301, 302), (-0.5, -0.25, -1.0, -2.0))
TEXT = "<300>$<301><302>"
USED = {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}


def reply(document: object, status: int = 200) -> Reply:
    return Reply(status, json.dumps(document), "application/json")


def completed(**changes: object) -> Reply:
    return reply(
        {
            "choices": [{"index": 0, "text": TEXT, "finish_reason": "length"} | changes],
            "usage": USED,
        }
    )


def streamed(
    *pieces: str,
    end: str = "data: [DONE]\n\n",
    finish: str | None = "length",
    kind: str = "text/event-stream; charset=utf-8",
) -> Reply:
    events = [{"choices": [{"text": piece}]} for piece in pieces] + [
        {"choices": [{"text": "", "finish_reason": finish}]}
    ]
    return Reply(200, "".join(f"data: {json.dumps(event)}\n\n" for event in events) + end, kind)


def test_completion_is_read_by_the_tokens_that_its_text_names() -> None:
    assert http_checks.completions(completed(), [ROW], 4) == []
    for changes in (
        {"text": "<300>$<301>"},
        {"text": "<300>$<302><301>"},
        {"text": ""},
        {"text": None},
        {"index": 1},
        {"finish_reason": "stop"},
    ):
        assert len(http_checks.completions(completed(**changes), [ROW], 4)) == 1, changes


def test_completion_that_is_missing_or_counted_wrongly_is_wrong() -> None:
    assert "1 answers to 2 prompts" in http_checks.completions(completed(), [ROW, ROW], 4)
    assert (
        http_checks.completions(
            reply({"choices": [{"index": 0, "text": TEXT, "finish_reason": "length"}]}), [ROW], 4
        )
        != []
    )


def test_stop_string_cuts_before_its_first_place() -> None:
    assert http_checks.stopped(completed(text="<300>$", finish_reason="stop"), ROW, 301) == []
    for text in ("<300>$<301>", "", "<301>"):
        assert len(http_checks.stopped(completed(text=text, finish_reason="stop"), ROW, 301)) == 1
    assert http_checks.stopped(completed(text="<300>$", finish_reason="length"), ROW, 301) != []


def test_chat_equals_the_completion_and_counts_the_tokens_of_the_template() -> None:
    message = {"message": {"role": "assistant", "content": TEXT}, "finish_reason": "length"}
    used = {"prompt_tokens": 6, "completion_tokens": 4, "total_tokens": 10}
    assert http_checks.chat(reply({"choices": [message], "usage": used}), TEXT, 6, 4) == []
    assert http_checks.chat(reply({"choices": [message], "usage": USED}), TEXT, 6, 4) != []
    # What it is compared with may have gone wrong, too.
    empty = {"message": {"role": "assistant", "content": ""}, "finish_reason": "length"}
    assert http_checks.chat(reply({"choices": [empty], "usage": used}), "", 6, 4) != []


def test_conversation_has_exactly_the_expected_tokens() -> None:
    known = http_checks.Conversation([{"role": "user", "content": "a"}], {}, [0, 5], "")
    assert http_checks.rendered(reply({"prompt_token_ids": [0, 5]}), known) == []
    for found in ([0, 0, 5], [5], None):
        assert len(http_checks.rendered(reply({"prompt_token_ids": found}), known)) == 1
    assert http_checks.rendered(Reply(500, "no"), known) == ["HTTP 500: no"]


CASE = {"case": "stop", "params": {"stop": ["a"], "logprobs": 5}, "tokens": [5, 6], "text": "ab"}
CASE |= {"finish": "stop", "stop": "a"}
CHOICE = {"token_ids": [5, 6], "text": "ab", "finish_reason": "stop", "stop_reason": "a"}


def test_parameter_gives_exactly_the_references_answer() -> None:
    def judged(case: dict, **changes: object) -> list[str]:
        return http_checks.parameter(reply({"choices": [CHOICE | changes]}), case)

    assert judged(CASE) == []
    for name, wrong in (
        ("token_ids", [5]),
        ("text", "a"),
        ("finish_reason", "length"),
        ("stop_reason", None),
    ):
        assert len(judged(CASE, **{name: wrong})) == 1
    message = {"message": {"content": "ab"}, "text": None}
    assert judged(CASE, **message) == []
    assert judged(CASE | {"text": ""}, message={"content": None}, text=None) == []
    # Behind a tie everything may differ.
    cut = CASE | {"is_cut": True, "tokens": [5]}
    assert judged(cut, token_ids=[5, 9], text="?") == []
    assert len(judged(cut, token_ids=[9])) == 1
    assert http_checks.parameter(Reply(400, "no"), CASE) == ["stop: HTTP 400: no"]


def test_cases_are_those_that_a_request_can_have_and_three_strict_filters() -> None:
    plain = CASE | {"case": "logprobs"}
    offline = CASE | {"params": {"detokenize": False}}
    drawn = CASE | {"tokens": None}
    known = {"prompt": [1], "message": "Hello", "cases": [plain, CASE, offline, drawn]}
    found = http_checks.cases({"sampling": known})
    assert [case["case"] for case in found] == ["logprobs", "stop", *http_checks.STRICT]
    assert all((case["prompt"], case["message"]) == ([1], "Hello") for case in found)
    assert found[2]["params"] == plain["params"] | {"temperature": 1.5, "top_k": 1}  # type: ignore[operator]
    assert http_checks.cases({}) == ()


def test_samples_differ_and_repeat_with_their_seed() -> None:
    def texts(*found: str) -> Reply:
        return reply({"choices": [{"text": text} for text in found]})

    several = texts("a", "b", "c")
    assert http_checks.sampled(several, [texts("a"), texts("a"), texts("b")]) == []
    assert len(http_checks.sampled(texts("a", "a", "c"), [texts("a"), texts("a"), texts("b")])) == 1
    assert len(http_checks.sampled(several, [texts("a"), texts("b"), texts("c")])) == 1
    assert len(http_checks.sampled(several, [texts("a"), texts("a"), texts("a")])) == 1


def test_stream_needs_pieces_an_end_and_one_finish() -> None:
    assert http_checks.stream(streamed("<300>$", "<301><302>"), TEXT, is_chat=False) == ([], 2)
    for bad in (
        streamed("<300>$", "<302>"),
        streamed(TEXT),
        streamed("<300>$", "<301><302>", end=""),
        streamed("<300>$", "<301><302>", finish=None),
        streamed("<300>$", "<301><302>", kind="application/json"),
        streamed(
            "<300>$",
            "<301><302>",
            end='data: {"error": {"message": "the engine is dead"}}\n\ndata: [DONE]\n\n',
        ),
        streamed("<300>$", "<301><302>", end="data: {\n\ndata: [DONE]\n\n"),
        streamed("<300>$", "<301><302>", end="data: [DONE]\n\ndata: {}\n\n"),
        Reply(500, "no", ""),
    ):
        assert http_checks.stream(bad, TEXT, is_chat=False)[0] != [], bad
    assert http_checks.stream(streamed("", ""), "", is_chat=False)[0] != []


@pytest.mark.parametrize(
    ("tokens", "chances", "output"),
    [
        ((300, 7, 301, 302), (-0.5, -0.25, -1.0, -2.0005), None),
        (
            (300, 7, 301, 302),
            (-0.5, -0.25, -1.0, -2.002),
            (
                "4 of 4 tokens as offline, largest log-probability difference 2.0e-03, the limit is"
                " 0.001"
            ),
        ),
        (
            (300, 7, 301, 302),
            (-0.5, -0.25, -1.0, None),
            "4 of 4 tokens as offline, largest log-probability difference inf",
        ),
        (
            (300, 7, 301, 302),
            (-0.5, -0.25, -1.0, float("nan")),
            "largest log-probability difference inf",
        ),
        ((300, 8, 301, 302), (-0.5, -0.25, -1.0, -2.0), "3 of 4 tokens"),
        ((300, 7, 301), (-0.5, -0.25, -1.0), "3 of 4 tokens"),
        ((), (), "0 of 4 tokens"),
    ],
)
def test_logprobs_are_compared_token_by_token(
    tokens: tuple, chances: tuple, output: str | None
) -> None:
    found = {"tokens": [f"token_id:{token}" for token in tokens], "token_logprobs": list(chances)}
    problems, _ = http_checks.logprobs(reply({"choices": [{"logprobs": found}]}), [ROW], 1e-3)
    assert (output is None and problems == []) or (output is not None and output in problems[0])


def test_refusal_is_4xx_with_a_reason() -> None:
    error = {"error": {"message": "no such model"}}
    assert http_checks.refused("x", reply(error, 404)) == []
    assert http_checks.refused("x", reply({"detail": "Not Found"}, 404)) == []
    assert http_checks.refused("x", reply(error, 500)) == ["x: HTTP 500: no such model"]
    assert http_checks.refused("x", reply({"choices": []}, 200)) == ["x: the answer is 200"]
    assert http_checks.refused("x", reply({}, 400)) == ["x: HTTP 400 without a reason"]
    assert http_checks.refused("x", Reply(None, "Connection reset by peer")) == [
        "x: no answer: Connection reset by peer"
    ]


BODIES = (
    "",
    "null",
    "[]",
    "{}",
    "<html>it works</html>",
    "\x00\ufffd",
    "[" * 100_000,
    '{"a":' * 100_000,
    '{"choices": 3, "usage": []}',
    '{"choices": [null, [], {"text": {}, "message": [], "logprobs": 1, "delta": 2}]}',
    (
        '{"choices": [{"text": "<99999999999999999999>", "index": 1e999, "logprobs": {"tokens":'
        ' [1], "token_logprobs": [NaN]}}]}'
    ),
    '{"choices": [{"text": 1, "message": {"content": "{\\"part\\": {}, \\"count\\": [],'
    ' \\"is_built\\": NaN}"}}], "usage": {"prompt_tokens": 1' + "0" * 400 + "}}",
    '{"choices": [{"logprobs": {"tokens": ["token_id:300"], "token_logprobs": [1'
    + "0" * 400
    + "]}}]}",
    'data: {"choices": [{"text": "x"}]}\n\n' * 3,
    "data: [DONE]",
)


@pytest.mark.parametrize("status", [None, 200, 404, 500])
def test_whatever_comes_is_a_sentence_and_never_right(status: int | None) -> None:
    for body in BODIES:
        one = Reply(status, body)
        for problems in (
            http_checks.completions(one, [ROW], 4),
            http_checks.stopped(one, ROW, 301),
            http_checks.chat(one, TEXT, 6, 4),
            http_checks.stream(one, TEXT, is_chat=True)[0],
            http_checks.logprobs(one, [ROW], 1e-3)[0],
            http_checks.answered("x", one, TEXT, 5, 4),
            http_checks.scored("x", one, ROW.tokens, [None] * 4),
            http_checks.prompt_scored("x", one.document, one, []),
        ):
            assert problems, body[:60]
            assert all(problem and len(problem) < 600 for problem in problems), body[:60]


def test_rows_that_are_damaged_are_none() -> None:
    good = {"text": "a", "prompt": [1], "tokens": [300], "logprobs": [-0.5]}
    assert http_checks.offline([good]) == (OfflineAnswer("a", (1,), (300,), (-0.5,)),)
    for bad in (
        None,
        {},
        [None],
        [good | {"tokens": "x"}],
        [good | {"logprobs": [None]}],
        [{"text": "a"}],
        [good | {"logprobs": [10**400]}],
    ):
        assert http_checks.offline(bad) == ()
