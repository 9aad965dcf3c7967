"""Verdicts on numbers."""

import math

import pytest

from workspace.checks import numeric
from workspace.checks.numeric import MAX_DIFFERENCE
from workspace.checks.probe_runs import Answer
from workspace.checks.registry import Check


def measured(**changes: object) -> dict:
    same = {
        "error": None,
        "same_prompt": True,
        "equal": 320,
        "total": 320,
        "compared": 640,
        "wanted": 640,
        "not_finite": 0,
        "behind": 0,
        "partings": [],
    }
    return (
        same
        | {
            "decode_difference": 9e-5,
            "prefill_difference": 1e-5,
            "mean_difference": 1e-5,
            "seconds": {"load": 1.0, "generate": 2.0},
        }
        | changes
    )


def parity(found: object) -> Check:
    return numeric.parity(Answer({"models": {"llama": found}}, None, 1.0), "llama")


def test_equal_tokens_and_near_log_probabilities_pass() -> None:
    check = parity(measured())
    assert (check.verdict, check.seconds) == ("pass", 3.0)


@pytest.mark.parametrize(
    "found",
    [
        measured(equal=319, compared=639),
        # An attention scale that is off by 1 % left all 320 tokens as they were.
        measured(prefill_difference=0.12),
        measured(decode_difference=MAX_DIFFERENCE),
        measured(decode_difference=math.nan),
        measured(prefill_difference=None),
        measured(not_finite=1),
        measured(compared=320),
        measured(equal=0, total=0, compared=0, wanted=0),
        measured(same_prompt=False),
        measured(equal=True, total=True),
        measured(equal="320", total="320"),
        measured(error="vLLM: killed by SIGSEGV (stage generate)"),
        # It parts where the reference is sure.
        measured(equal=300, behind=20, compared=620, partings=[0.5]),
        # One of two is no tie.
        measured(equal=300, behind=20, compared=620, partings=[1e-5, 0.5]),
        {},
        None,
    ],
)
def test_anything_short_of_parity_fails(found: object) -> None:
    assert parity(found).verdict == "fail"
    assert parity(found).evidence


def test_tie_may_fall_either_way() -> None:
    check = parity(measured(equal=300, behind=20, compared=620, partings=[6e-5]))
    assert check.verdict == "pass"
    assert "20 behind a tie" in check.evidence


def test_sampler_is_named_where_log_probabilities_are_right_and_tokens_are_not() -> None:
    assert (
        "so the choice of tokens is wrong"
        in parity(measured(equal=20, behind=300, compared=340, partings=[0.5])).evidence
    )
    assert (
        "so the choice"
        not in parity(
            measured(equal=20, behind=300, compared=340, partings=[0.5], prefill_difference=0.3)
        ).evidence
    )


@pytest.mark.parametrize("decode", [0.37, MAX_DIFFERENCE, math.nan])
def test_sampler_is_not_blamed_where_the_decode_is_off(decode: float) -> None:
    # The H200: decode attention off by 5 % changed 152 of 320 tokens, and its prefill was right.
    check = parity(
        measured(equal=168, behind=152, compared=488, partings=[0.5], decode_difference=decode)
    )
    assert check.verdict == "fail"
    assert "log-probabilities are right" not in check.evidence


def consistent(name: str, **changes: object) -> Check:
    found = measured(wanted=320, compared=320, seconds=1.5, cached=[0, 256], chunks=4) | changes
    return numeric.consistency(Answer({"consistency": {name: found}}, None, 1.0), name)


@pytest.mark.parametrize("name", ["repeat", "batch", "parts", "chunked", "prefix"])
def test_same_answers_pass_and_others_fail(name: str) -> None:
    assert (consistent(name).verdict, consistent(name).seconds) == ("pass", 1.5)
    assert consistent(name, equal=319, compared=319, behind=1, partings=[1e9]).verdict == "fail"
    assert consistent(name, error="vLLM: no answer").verdict == "fail"


def test_cache_that_was_never_read_and_a_prompt_in_one_piece_prove_nothing() -> None:
    assert consistent("prefix", cached=[0, 0]).evidence == "nothing was read from the prefix cache"
    assert consistent("prefix", cached=None).verdict == "fail"
    assert consistent("chunked", chunks=1).evidence == "the prompt was processed in one piece"


def kernels(**changes: object) -> Check:
    group = {
        "error": None,
        "skipped": None,
        "seconds": 0.2,
        "rows": [{"case": "rms_norm 7x256 float32", "difference": 2.0, "limit": 16.0}],
    } | changes
    return numeric.kernels(Answer({"groups": {"norm": group}}, None, 1.0), "norm")


def test_operator_within_rounding_passes_and_beyond_it_is_named() -> None:
    assert kernels().evidence == "1 case, largest error 12% of the tolerance"
    far = kernels(rows=[{"case": "rms_norm 7x256 float32", "difference": 84000.0, "limit": 16.0}])
    assert (far.verdict, far.evidence) == (
        "fail",
        "rms_norm 7x256 float32: off by 8.4e+04, the limit is 16 (roundings)",
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": []},
        {"error": "killed by SIGILL", "rows": []},
        {"rows": [{"case": "x", "difference": None, "limit": 1.0}]},
    ],
)
def test_operator_that_was_not_compared_fails(changes: dict) -> None:
    assert kernels(**changes).verdict == "fail"


def test_operator_that_the_build_lacks_is_skipped_with_the_reason() -> None:
    check = kernels(skipped="this build has no oneDNN", rows=[])
    assert (check.verdict, check.evidence) == ("skipped", "this build has no oneDNN")


def one_answer(**changes: object) -> dict[str, object]:
    row = {"text": "Why?", "same_prompt": True, "equal": 24, "total": 24, "parting": None}
    return row | changes


def real(**changes: object) -> list[str]:
    finishes = [{"case": "by itself", "found": "stop", "expected": "stop"}]
    record = {
        "error": None,
        "answer": "The capital of France is Paris.",
        "compared": [one_answer()],
        "longest_run": 2,
        "most_repeated": 6,
        "finishes": finishes,
    } | changes
    return [check.verdict for check in numeric.real(Answer(record, None, 1.0))]


def test_real_model_answers_as_the_reference_and_ends_where_it_should() -> None:
    assert real() == ["pass", "pass"]
    # It may part from Hugging Face's answer at a tie only.
    assert real(compared=[one_answer(equal=3, parting=1e-5)]) == ["pass", "pass"]
    for row in (
        one_answer(equal=3, parting=0.5),
        one_answer(equal=3),
        one_answer(same_prompt=False),
        one_answer(equal=None, total=None),
    ):
        assert real(compared=[one_answer(), row]) == ["fail", "pass"]
    assert real(compared=[]) == ["fail", "pass"]
    assert real(longest_run=40) == ["fail", "pass"]
    assert real(longest_run=None) == ["fail", "pass"]
    assert real(finishes=[{"case": "by itself", "found": "length", "expected": "stop"}]) == [
        "pass",
        "fail",
    ]
    assert real(finishes=[]) == ["pass", "fail"]
    assert real(error="killed") == ["fail", "fail"]


def test_bfloat16_is_judged_by_the_mean() -> None:
    answer = Answer({"models": {"smollm2": measured(equal=3, mean_difference=0.01)}}, None, 1.0)
    assert numeric.bfloat16(answer, "smollm2").verdict == "pass"
    for changes in (
        {"mean_difference": 0.2},
        {"mean_difference": math.nan},
        {"not_finite": 1},
        {"error": "no"},
    ):
        assert (
            numeric.bfloat16(
                Answer({"models": {"smollm2": measured(**changes)}}, None, 1.0), "smollm2"
            ).verdict
            == "fail"
        )


def test_gpt_oss_is_judged_where_it_decodes_too() -> None:
    fine = measured(equal=3, mean_difference=0.024, own_difference=0.001)
    assert numeric.mxfp4(Answer({"models": {"gpt-oss": fine}}, None, 1.0)).verdict == "pass"
    for changes in (
        {"mean_difference": 0.23},
        {"own_difference": 0.2},
        {"own_difference": None},
        {"own_difference": math.nan},
        {"not_finite": 1},
        {"error": "no"},
    ):
        check = numeric.mxfp4(Answer({"models": {"gpt-oss": fine | changes}}, None, 1.0))
        assert (check.identifier, check.verdict) == ("parity.gpt-oss", "fail")
    assert numeric.mxfp4(Answer({}, "Hugging Face: killed", 1.0)).evidence == "Hugging Face: killed"


def test_seconds_of_a_first_run_are_shown_apart_from_the_checks() -> None:
    group = {"error": None, "skipped": None, "seconds": 203.5, "first_s": 201.25}
    group |= {"rows": [{"case": "one", "difference": 0.5, "limit": 1.0}]}
    slow = numeric.kernels(Answer({"groups": {"norm": group}}, None, 204.0), "norm")
    assert (slow.verdict, slow.seconds) == ("pass", 2.25)
    assert slow.evidence.endswith("; loading and compilation 201.2 s")
    quick = numeric.kernels(
        Answer({"groups": {"norm": group | {"seconds": 0.1, "first_s": -0.01}}}, None, 1.0), "norm"
    )
    assert quick.seconds == 0.1
    assert "compilation" not in quick.evidence
