"""The verdicts, each shown what it must see and what it must let pass."""

import math
from pathlib import Path

import pytest

from workspace.smoke import checks
from workspace.smoke.checks import MAX_DIFFERENCE, Answer, Check, Expected

TREE = Path("/clone/vendor/vllm")
EXPECTED = Expected(TREE, "0.31.0+cpu", "2.13.0+cpu", "cpu", {"vllm/_C.abi3.so": "a" * 64, "vllm/spinloop.abi3.so": "b" * 64})


def libraries(**changes: dict) -> dict:
    rows = {path: {"path": path, "verdict": "ok", "error": None, "sha256": digest} for path, digest in EXPECTED.libraries.items()}
    for name, change in changes.items():
        rows[f"vllm/{name}.abi3.so"] |= change
    return {"error": None, "libraries": list(rows.values())}


def compared(**changes: object) -> dict:
    return {
        "error": None,
        "vllm": {"file": str(TREE / "vllm" / "__init__.py"), "version": "0.31.0+cpu", "platform": "cpu", "kernels": ["vllm/_C.abi3.so"]},
        "torch": {"version": "2.13.0+cpu", "cuda": None},
        "prompts": [{"same_prompt": True}] * 5,
        "equal": 320,
        "total": 320,
        "compared": 640,
        "max_difference": 9e-5,
        "not_finite": 0,
        **changes,
    }


def binary(record: dict) -> Check:
    return checks.binary_load(Answer(record, None, 1.0), EXPECTED)


def origin(record: dict) -> Check:
    return checks.provenance(Answer(record, None, 1.0), EXPECTED)


def parity(record: dict) -> Check:
    return checks.parity(Answer(record, None, 1.0))


def test_right_build_passes_every_check_and_each_has_a_meaning() -> None:
    found = [binary(libraries()), origin(compared()), parity(compared())]
    assert [check.verdict for check in found] == ["pass"] * 3
    assert {check.identifier for check in found} == set(checks.MEANINGS)
    assert all(check.meaning and check.evidence for check in found)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (libraries(_C={"verdict": "broken", "error": "killed by SIGBUS"}), "vllm/_C.abi3.so: killed by SIGBUS"),
        (libraries(_C={"sha256": "c" * 64}), "vllm/_C.abi3.so is not the file that was verified"),
        ({"error": None, "libraries": libraries()["libraries"][:1]}, "vllm/spinloop.abi3.so is missing"),
        (
            {"error": None, "libraries": [*libraries()["libraries"], {"path": "vllm/new.so", "verdict": "ok"}]},
            "vllm/new.so was not there when the build was verified",
        ),
        ({"error": "torch cannot be imported: no", "libraries": libraries()["libraries"]}, "torch cannot be imported: no"),
        ({"error": None, "libraries": []}, "vllm/_C.abi3.so is missing (and 2 more)"),
        ({"error": None, "libraries": "many"}, "vllm/_C.abi3.so is missing (and 2 more)"),
        ({}, "vllm/_C.abi3.so is missing (and 2 more)"),
    ],
)
def test_library_that_is_not_as_verified_fails(record: dict, said: str) -> None:
    assert (binary(record).verdict, binary(record).evidence) == ("fail", said)


def test_build_without_any_library_fails_even_when_none_was_stamped() -> None:
    none = Expected(TREE, "0.31.0+cpu", "2.13.0+cpu", "cpu", {})
    assert checks.binary_load(Answer({"error": None, "libraries": []}, None, 1.0), none).verdict == "fail"


def test_library_for_another_processor_passes_and_is_said() -> None:
    check = binary(libraries(_C={"verdict": "other cpu"}))
    assert (check.verdict, check.evidence) == ("pass", "1 libraries, 1 for other processors or Pythons not tried")


def vllm(**changes: object) -> dict:
    return compared(vllm=compared()["vllm"] | changes)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (vllm(file="/clone/.vllm/lib/python3.11/site-packages/vllm/__init__.py"), "not from /clone/vendor/vllm"),
        (vllm(file="/clone/vendor/vllm-old/vllm/__init__.py"), "not from /clone/vendor/vllm"),
        (vllm(version="0.31.1.dev1+g12345"), "vllm is 0.31.1.dev1+g12345, stamped is 0.31.0+cpu"),
        (vllm(platform=""), "its platform is none, stamped is cpu"),
        (compared(torch={"version": "2.14.0", "cuda": "13.0"}), "torch is 2.14.0, stamped is 2.13.0+cpu"),
        (vllm(kernels=[]), "without a compiled library"),
        (vllm(file=None), "not known which vLLM is imported"),
        (compared(vllm=None, error="vLLM: ImportError: no"), "not known which vLLM is imported: vLLM: ImportError: no"),
        ({}, "not known which vLLM is imported"),
    ],
)
def test_other_vllm_than_the_stamped_one_fails(record: dict, said: str) -> None:
    check = origin(record)
    assert check.verdict == "fail"
    assert said in check.evidence


def test_provenance_is_judged_although_the_generation_crashed() -> None:
    crashed = vllm(kernels=None) | {"error": "vLLM: killed by SIGSEGV (stage generate)"}
    assert origin(crashed).verdict == "pass"
    assert (parity(crashed).verdict, parity(crashed).evidence) == ("fail", "vLLM: killed by SIGSEGV (stage generate)")


@pytest.mark.parametrize(
    "record",
    [
        compared(equal=319, compared=639),
        # An attention scale that is off by 1 % left all 320 tokens as they were.
        compared(max_difference=0.12),
        compared(max_difference=MAX_DIFFERENCE),
        compared(max_difference=math.nan),
        compared(max_difference=None),
        compared(not_finite=1),
        compared(compared=320),
        compared(equal=0, total=0, compared=0),
        compared(prompts=[{"same_prompt": True}, {"same_prompt": False}]),
        compared(equal=True, total=True),
        compared(equal="320", total="320"),
        {},
    ],
)
def test_anything_short_of_parity_fails(record: dict) -> None:
    assert parity(record).verdict == "fail"
    assert parity(record).evidence


def test_probe_that_gave_no_document_fails_with_its_last_words() -> None:
    silent = Answer({}, "the probe was killed by SIGKILL", 3.0)
    for check in (checks.binary_load(silent, EXPECTED), checks.provenance(silent, EXPECTED), checks.parity(silent)):
        assert check.verdict == "fail"
        assert "was killed by SIGKILL" in check.evidence
