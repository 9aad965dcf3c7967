"""The record: what it names, and that it is one JSON document whatever was measured."""

import json
import math

from workspace.checks import smoke
from workspace.checks.registry import Check

GOOD, BAD = (
    Check("binary.load", "pass", "5 libraries", 1.23456),
    Check("parity.llama", "fail", "319/320", 16.0),
)
MACHINE = {"architecture": "aarch64", "cores": 20}
TREE = smoke.Tree("v0.31.0", "c" * 40, "d" * 40, None)


def composed(*checks: Check, parity: dict | None = None) -> dict:
    return json.loads(
        smoke.encode(
            smoke.compose(
                checks, level="quick", tree=TREE, machine=MACHINE, parity=parity or {}, seconds=20.0
            )
        )
    )


def test_one_failed_check_or_none_at_all_is_no_pass() -> None:
    assert composed(GOOD)["verdict"] == "pass"
    assert composed(GOOD, BAD)["verdict"] == "fail"
    assert composed()["verdict"] == "fail"


def test_record_names_tree_checks_versions_and_machine() -> None:
    found = composed(
        GOOD,
        parity={
            "vllm": {"version": "0.31.0+cpu"},
            "torch": {"version": "2.13.0+cpu", "cuda": None},
            "models": {"llama": {"equal": 320}},
            "prompts": [1] * 999,
        },
    )
    assert found["schema"] == 2
    assert (found["pin"], found["tree"]) == ("v0.31.0", "d" * 40)
    assert found["checks"][0]["id"] == "binary.load"
    assert (found["versions"]["vllm"], found["versions"]["torch"]) == ("0.31.0+cpu", "2.13.0+cpu")
    assert found["machine"]["cores"] == 20
    assert found["parity"] == {"models": {"llama": {"equal": 320}}}


def test_numbers_that_json_lacks_become_null_and_the_record_stays_readable() -> None:
    parity = {
        "models": {"llama": {"max_difference": math.nan, "margin": -math.inf}},
        "seconds": {"load": math.inf, "torch": 1.0},
        "torch": "damaged",
        "vllm": None,
    }
    text = smoke.encode(
        smoke.compose([BAD], level="quick", tree=TREE, machine=MACHINE, parity=parity, seconds=1.0)
    )
    assert json.loads(text, parse_constant=lambda token: f"not JSON: {token}")["parity"] == {
        "models": {"llama": {"max_difference": None, "margin": None}},
        "seconds": {"load": None, "torch": 1.0},
    }


def test_record_is_of_this_tree_only_where_edits_and_build_are_the_same_and_it_passed() -> None:
    now = smoke.Tree("v0.31.0", "c" * 40, "d" * 40, None, "b" * 64)
    output = {"verdict": "pass", "tree": "d" * 40, "dirty": None, "built": "b" * 64}
    assert smoke.is_record_of(output, now)
    for change in (
        {"verdict": "fail"},
        {"tree": "e" * 40},
        {"dirty": "f" * 64},
        {"built": "a" * 64},
    ):
        assert not smoke.is_record_of(output | change, now)
    assert not smoke.is_record_of({}, now)
    assert not smoke.is_record_of(
        {"verdict": "pass", "tree": None, "dirty": None, "built": None},
        smoke.Tree("v0.31.0", None, None, None),
    )


def test_skipped_checks_alone_are_no_pass() -> None:
    skipped = Check("binary.cubins", "skipped", "no GPU", 0.0)
    assert composed(skipped)["verdict"] == "fail"
    assert composed(GOOD, skipped)["verdict"] == "pass"
