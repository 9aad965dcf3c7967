"""The record: what it names, and that it is one JSON document whatever was measured."""

import json
import math

from workspace.environment.machine import Machine
from workspace.smoke import record
from workspace.smoke.checks import Check

GOOD, BAD = Check("binary.load", "pass", "5 libraries", 1.23456), Check("parity.llama", "fail", "319/320", 16.0)
MACHINE = Machine("aarch64", 20, 128.0, 100.0, ())
TREE = record.Tree("v0.31.0", "c" * 40, "d" * 40, None)


def composed(*checks: Check, parity: dict | None = None) -> dict:
    return json.loads(record.encode(record.compose(checks, tree=TREE, machine=MACHINE, parity=parity or {}, seconds=20.0)))


def test_one_failed_check_or_none_at_all_is_no_pass() -> None:
    assert composed(GOOD)["verdict"] == "pass"
    assert composed(GOOD, BAD)["verdict"] == "fail"
    assert composed()["verdict"] == "fail"


def test_record_names_tree_checks_versions_and_machine() -> None:
    found = composed(GOOD, parity={"vllm": {"version": "0.31.0+cpu"}, "torch": {"version": "2.13.0+cpu", "cuda": None}, "equal": 320, "prompts": [1] * 999})
    assert found["schema"] == 1
    assert (found["pin"], found["tree"]) == ("v0.31.0", "d" * 40)
    assert found["checks"][0]["id"] == "binary.load"
    assert (found["versions"]["vllm"], found["versions"]["torch"]) == ("0.31.0+cpu", "2.13.0+cpu")
    assert found["machine"]["cores"] == 20
    assert found["parity"] == {"equal": 320}


def test_numbers_that_json_lacks_become_null_and_the_record_stays_readable() -> None:
    parity = {"max_difference": math.nan, "margin": -math.inf, "seconds": {"load": math.inf, "torch": 1.0}, "torch": "damaged", "vllm": None}
    text = record.encode(record.compose([BAD], tree=TREE, machine=MACHINE, parity=parity, seconds=1.0))
    assert json.loads(text, parse_constant=lambda word: f"not JSON: {word}")["parity"] == {
        "max_difference": None,
        "margin": None,
        "seconds": {"load": None, "torch": 1.0},
    }
