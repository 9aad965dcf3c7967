"""probes/sampling.py without torch: its comparisons, and the test of its samples."""

import math
import random
from types import ModuleType, SimpleNamespace

import pytest

from workspace.checks import numeric
from workspace.checks.probe_runs import Answer
from workspace.checks.registry import REGISTRY, Check

CHANCES = [(5, 0.5), (6, 0.3), (7, 0.1)]


def chance(logprob: float, rank: int) -> SimpleNamespace:
    return SimpleNamespace(logprob=logprob, rank=rank)


def position(**changes: object) -> dict:
    known = {"ids": [5, 6, 7], "logprobs": [-0.5, -1.0, -2.0]}
    return known | {"token": 6, "logprob": -1.0, "ranks": [2, 2]} | changes


def problems(rows: object) -> list[str]:
    assert not isinstance(rows, dict)
    return [str(row["problem"]) for row in rows if row.get("problem")]  # type: ignore[attr-defined]


def differences(rows: list[dict]) -> list[float]:
    return [row["difference"] for row in rows if "difference" in row]


def compare(probe: ModuleType, found: dict, expected: dict, *, is_listed: bool = False) -> list:
    return list(probe.position("x", found, expected, is_listed=is_listed))


def test_position_has_the_rank_of_its_token_and_the_largest_difference(probe: ModuleType) -> None:
    found = {6: chance(-1.0, 2), 5: chance(-0.5, 1)}
    assert compare(probe, found, position()) == [{"case": "x", "difference": 0.0}]
    found[5] = chance(-0.75, 1)
    assert differences(compare(probe, found, position())) == [0.25]
    found[6] = chance(-1.0, 1)
    assert problems(compare(probe, found, position())) == [
        "token 6 has the rank 1, expected 2 to 2"
    ]


def test_token_that_is_none_of_the_most_likely_differs_by_its_distance(probe: ModuleType) -> None:
    found = {6: chance(-1.0, 2), 9: chance(-1.5, 3)}
    assert differences(compare(probe, found, position())) == [0.5]


def test_token_that_was_drawn_and_is_unlikely_is_not_compared(probe: ModuleType) -> None:
    expected = position()
    del expected["token"]
    found = {9: chance(-8.0, 400), 5: chance(-0.5, 1)}
    assert compare(probe, found, expected) == [{"case": "x", "difference": 0.0}]


def test_tokens_that_were_listed_are_all_there_and_no_others(probe: ModuleType) -> None:
    found = {6: chance(-1.0, 2), 5: chance(-0.5, 1)}
    assert problems(compare(probe, found, position(), is_listed=True)) == [
        "the tokens are [5, 6], expected [5, 6, 7]"
    ]


@pytest.mark.parametrize("found", [{6: chance(math.nan, 2)}, {}])
def test_log_probability_that_is_no_number_is_a_problem(probe: ModuleType, found: dict) -> None:
    expected = position()
    if not found:
        del expected["token"]
    assert problems(compare(probe, found, expected)) == ["are no finite numbers"]


def test_forbidden_token_may_be_minus_infinity(probe: ModuleType) -> None:
    expected = position(logprobs=[-0.5, -1.0, probe.NEVER])
    found = {6: chance(-1.0, 2), 7: chance(-math.inf, 3)}
    assert differences(compare(probe, found, expected)) == [0.0]


def output(tokens: list[int], **changes: object) -> SimpleNamespace:
    known = {"token_ids": tokens, "text": "ab", "finish_reason": "length", "stop_reason": None}
    known["logprobs"] = [{token: chance(-1.0, 2)} for token in tokens]
    return SimpleNamespace(outputs=[SimpleNamespace(**known | changes)])


def case(**changes: object) -> dict:
    known = {"case": "top_k", "params": {}, "tokens": [6, 6], "is_cut": False, "text": "ab"}
    return known | {"finish": "length", "raw": [position(), position()]} | changes


def test_answer_is_compared_in_tokens_text_and_end(probe: ModuleType) -> None:
    assert problems(probe.answered(case(), output([6, 6]), "raw")) == []
    found = output([6, 6], text="a", finish_reason="stop", stop_reason="b")
    assert problems(probe.answered(case(), found, "raw")) == [
        "a, expected ab",
        "('stop', 'b'), expected ('length', None)",
    ]


def test_answer_is_compared_up_to_a_tie_only(probe: ModuleType) -> None:
    cut = case(tokens=[6], is_cut=True, raw=[position()])
    assert problems(probe.answered(cut, output([6, 5], text="?"), "raw")) == []
    assert problems(probe.answered(cut, output([5, 6], text="?"), "raw")) == [
        "[5], expected [6]",
        "token 6 has the rank None, expected 2 to 2",
    ]


def test_answer_without_log_probabilities_is_a_problem(probe: ModuleType) -> None:
    assert problems(probe.answered(case(), output([6, 6], logprobs=None), "raw")) == [
        "0 of 2 positions have any"
    ]


def test_random_token_is_one_of_those_that_the_filter_leaves(probe: ModuleType) -> None:
    drawn = case(tokens=None, raw=[position(logprobs=[-0.5, -1.0, probe.NEVER])])
    del drawn["raw"][0]["token"]
    assert problems(probe.answered(drawn, output([6]), "raw")) == []
    for token in (7, 9):
        (problem, *_) = problems(probe.answered(drawn, output([token]), "raw"))
        assert problem == f"the token {token} is none that the filter leaves"


def test_tail_is_the_binomial_probability_of_both_sides(probe: ModuleType) -> None:
    assert probe.tail(5, 10, 0.5) == 1.0
    assert probe.tail(0, 10, 0.5) == pytest.approx(2 / 1024)
    assert probe.tail(10, 10, 0.5) == pytest.approx(2 / 1024)


def test_samples_of_the_distribution_pass_and_warmer_ones_do_not(probe: ModuleType) -> None:
    drawn = random.Random(1)
    for _ in range(20):
        right = drawn.choices([5, 6, 7, 8], [0.5, 0.3, 0.1, 0.1], k=probe.SAMPLES)
        assert problems(probe.distributed(right, CHANCES)) == []
    warm = drawn.choices([5, 6, 7, 8], [0.3, 0.3, 0.2, 0.2], k=probe.SAMPLES)
    assert problems(probe.distributed(warm, CHANCES))
    assert problems(probe.distributed([5] * probe.SAMPLES, CHANCES))
    assert "1, expected 512" in problems(probe.distributed([5], CHANCES))[0]


def test_prompts_of_the_cache_share_no_block(probe: ModuleType) -> None:
    prompts = [probe.tokens_of(start, 3 * 128 + 5) for start in range(4)]
    assert len({prompt[0] for prompt in prompts}) == 4
    bytes_of_the_tokenizer = range(probe.document.FIRST_BYTE, probe.document.FIRST_BYTE + 256)
    # One is added where a prompt differs from another.
    assert all(token + 1 in bytes_of_the_tokenizer for prompt in prompts for token in prompt)


def test_groups_of_the_probe_are_the_checks_that_are_judged(probe: ModuleType) -> None:
    parts = (probe.RAW, probe.PROCESSED, probe.ADAPTER)
    raw, processed, adapter = ({name for name, _ in part} for part in parts)
    assert processed == set(numeric.PROCESSED)
    assert adapter == {numeric.ADAPTER}
    assert raw == {*numeric.RAW, *numeric.PROCESSED, numeric.ADAPTER}
    assert raw == {
        name for name in REGISTRY if name.startswith(("cache.", "sampling.", "templates."))
    }


def judged(*rows: dict, name: str = "sampling.ends", **changes: object) -> Check:
    group = {"rows": list(rows), "seconds": 0.5, "error": None} | changes
    return numeric.parameters(name, Answer({"groups": {name: group}}, None, 1.0))


def test_each_problem_and_difference_fails_and_names_its_case() -> None:
    right = {"case": "stop: its text is", "problem": None}
    assert judged(right).evidence == "1 comparison"
    wrong = judged(right, {"case": "stop: its text is", "problem": "a, expected b"})
    assert (wrong.verdict, wrong.evidence) == ("fail", "stop: its text is a, expected b")
    far = judged({"case": "stop: raw log-probabilities", "difference": 0.5})
    assert far.evidence == "stop: raw log-probabilities differ by 5.0e-01, the limit is 0.001"
    assert judged({"case": "x", "difference": None}).verdict == "fail"


def test_group_without_rows_with_an_error_or_in_one_engine_only_fails() -> None:
    assert judged().evidence == "nothing was compared"
    right = {"case": "x", "problem": None}
    assert judged(right, error="KeyError: x").evidence == "KeyError: x"
    group = {"groups": {"cache.keys": {"rows": [right], "seconds": 0.5, "error": None}}}
    both = numeric.parameters("cache.keys", Answer(group, None, 1.0), Answer({}, "it died", 1.0))
    assert (both.verdict, both.evidence) == ("fail", "it died")


def test_engine_with_an_adapter_of_its_own_or_shared_is_judged_once() -> None:
    right = {"rows": [{"case": "x", "problem": None}], "seconds": 0.5, "error": None}
    names = (*numeric.RAW, *numeric.PROCESSED, numeric.ADAPTER)
    whole = Answer({"groups": dict.fromkeys(names, right)}, None, 1.0)
    for engines in numeric.ENGINES.values():
        found = numeric.sampling(*([whole] * len(engines)))
        assert len(found) == len(engines)
        checks = [check for part, _ in found for check in part]
        assert {check.identifier for check in checks} == set(names)
        assert len(checks) == len(names)
        assert {check.verdict for check in checks} == {"pass"}
    _, *parts = numeric.sampling(whole, whole, Answer({}, "it died", 1.0))
    failed = [check for part, _ in parts for check in part if check.verdict == "fail"]
    assert [check.identifier for check in failed] == ["cache.keys"]
