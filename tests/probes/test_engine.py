"""probes/engine.py without torch: its comparisons, and the verdicts on its rows."""

from types import ModuleType

import pytest

from workspace.checks import numeric
from workspace.checks.probe_runs import Answer
from workspace.checks.registry import REGISTRY

EXPECTED = {"tokens": [5, 6, 7], "logprobs": [-0.5, -1.0, -2.0], "margins": [1.0, 1.0, 1.0]}


def verdict(rows: list[dict]) -> tuple[str, str]:
    part = {"rows": rows, "seconds": 0.1, "error": None}
    answer = Answer({"error": None, "groups": {"engine.abort": part}}, None, 1.0)
    check = numeric.parameters("engine.abort", answer)
    return check.verdict, check.evidence


def compare(probe: ModuleType, **changes: object) -> tuple[str, str]:
    found = EXPECTED | changes
    return verdict(list(probe.compared("an answer", found, EXPECTED)))


def test_equal_answers_pass(probe: ModuleType) -> None:
    assert compare(probe) == ("pass", "3 comparisons")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tokens": [5, 6, 8]}, "tokens [5, 6, 8], expected [5, 6, 7]"),
        (
            {"tokens": [5, 6, 7, 7], "logprobs": [-0.5, -1.0, -2.0, -2.0]},
            "number of tokens 4, expected 3",
        ),
        ({"logprobs": [-0.5, -1.0, -2.1]}, "differ by 1.0e-01, the limit is 0.001"),
        ({"logprobs": [-0.5, float("nan"), -2.0]}, "are no finite numbers"),
    ],
)
def test_other_answers_fail(probe: ModuleType, changes: dict, text: str) -> None:
    state, evidence = compare(probe, **changes)
    assert state == "fail"
    assert text in evidence


def test_tokens_behind_a_tie_are_not_compared(probe: ModuleType) -> None:
    tied = EXPECTED | {"margins": [1.0, 1e-4, 1.0]}
    found = EXPECTED | {"tokens": [5, 9, 9]}
    assert verdict(list(probe.compared("an answer", found, tied)))[0] == "pass"


def test_a_case_may_have_a_limit_of_its_own(probe: ModuleType) -> None:
    assert verdict([probe.apart("in bfloat16", [0.2], limit=0.5)])[0] == "pass"
    assert verdict([probe.apart("in bfloat16", [0.6], limit=0.5)])[0] == "fail"


def test_each_part_has_its_checks_in_the_registry() -> None:
    names = [name for names in numeric.ENGINE.values() for name in names]
    assert sorted(names) == sorted(name for name in REGISTRY if name.startswith("engine."))
    assert {REGISTRY[name].level for name in names} == {"full"}
