"""Verdicts on the layers of the tiny models: a defect in one layer is its own check's."""

import math

import pytest

from workspace.checks import numeric
from workspace.checks.probe_runs import Answer
from workspace.checks.registry import Check

ROW = {"case": "model.norm", "difference": 1.5, "limit": 16.0}


def answer(name: str, kind: str, *rows: dict, forms: tuple[str, ...] = ()) -> Answer:
    found = {kind: {"rows": list(rows), "forms": list(forms), "seconds": 0.1}}
    record = {"error": None, "models": {name: {"total": 1}}, "layers": {name: found}}
    return Answer(record, None, 1.0)


def dead(name: str) -> Answer:
    broken = {"error": "vLLM: killed by SIGSEGV (stage load)"}
    return Answer({"error": None, "models": {name: broken}, "layers": {name: broken}}, None, 1.0)


def norm(*rows: dict) -> Check:
    return numeric.layers({"llama": answer("llama", "norm", *rows, forms=("an epsilon",))}, "norm")


def test_layers_within_rounding_pass_and_the_forms_are_named() -> None:
    check = norm(ROW, ROW | {"difference": 4.0})
    assert (check.identifier, check.verdict) == ("layers.norm", "pass")
    assert check.evidence == ("2 cases, largest error 25% of the tolerance; with an epsilon")


@pytest.mark.parametrize("difference", [16.5, math.nan, None])
def test_layer_that_is_off_fails_with_its_name(difference: float | None) -> None:
    check = norm(ROW, ROW | {"case": "model.layers.0.input_layernorm", "difference": difference})
    assert check.verdict == "fail"
    assert check.evidence.startswith("llama, model.layers.0.input_layernorm: off by ")


def test_form_that_no_model_has_fails_because_nothing_would_judge_it() -> None:
    check = numeric.layers({"llama": answer("llama", "attention", ROW)}, "attention")
    assert (check.verdict, check.evidence) == ("fail", "no tiny model has a window")


def test_forms_of_all_models_count_together() -> None:
    answers = {
        name: answer(name, "rotary", ROW, forms=(f"rope scaled by {form}",))
        for name, form in (("llama", "llama3"), ("qwen3", "yarn"))
    }
    assert numeric.layers(answers, "rotary").verdict == "pass"


def test_model_that_died_is_left_to_its_parity_if_another_answered() -> None:
    answers = {
        "llama": answer("llama", "norm", ROW, forms=("an epsilon",)),
        "qwen3": dead("qwen3"),
    }
    assert numeric.layers(answers, "norm").verdict == "pass"
    only = numeric.layers({"qwen3": dead("qwen3")}, "norm")
    assert (only.verdict, only.evidence) == ("fail", "vLLM: killed by SIGSEGV (stage load)")


def test_answer_without_layers_fails() -> None:
    record = {"error": None, "models": {"llama": {"total": 1}}}
    for layers in ({}, {"layers": {"llama": {"error": "vLLM: KeyError (stage layers)"}}}):
        check = numeric.layers({"llama": Answer(record | layers, None, 1.0)}, "norm")
        assert check.verdict == "fail"
    assert check.evidence == "vLLM: KeyError (stage layers)"
