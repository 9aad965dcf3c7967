"""A second run after a failed parity: which engine does not repeat its answer."""

import json
from pathlib import Path

import pytest

from workspace.checks import numeric
from workspace.checks.numeric import Round
from workspace.checks.registry import Check

WRONG, RIGHT = (
    Check("parity.llama", "fail", "275/320 tokens equal", 10.0),
    Check("parity.llama", "pass", "320/320 tokens equal", 20.0),
)
ROW = {"tokens": [7, 8], "logprobs": [-0.5, -0.25]}
OTHER = {"tokens": [7, 8], "logprobs": [-0.5, -0.26]}


def write_round(folder: Path, reference: object, vllm: object) -> Round:
    folder.mkdir()
    files = Round(folder / "reference.json", folder / "rows.json")
    for file, rows in ((files.reference, reference), (files.vllm, vllm)):
        file.write_text(json.dumps({"models": {"llama": rows}}))
    return files


def settled(
    folder: Path,
    *,
    before: tuple[object, object],
    after: tuple[object, object],
    second: Check = RIGHT,
) -> Check:
    return numeric.settle_recheck(
        WRONG,
        second,
        name="llama",
        before=write_round(folder / "before", *before),
        after=write_round(folder / "after", *after),
    )


def test_failure_that_repeats_bit_for_bit_stays_a_failure(tmp_path: Path) -> None:
    check = settled(tmp_path, before=([ROW], [OTHER]), after=([ROW], [OTHER]), second=WRONG)
    assert (check.verdict, check.seconds) == ("fail", 20.0)
    assert check.evidence == "275/320 tokens equal; both repeat their answers"


def test_vllm_that_is_right_only_the_second_time_fails_and_is_named(tmp_path: Path) -> None:
    check = settled(tmp_path, before=([ROW], [OTHER]), after=([ROW], [ROW]))
    assert check.verdict == "fail"
    assert (
        check.evidence
        == "275/320 tokens equal; vLLM does not repeat its answer, but 320/320 tokens equal"
    )


@pytest.mark.parametrize("second", [RIGHT, WRONG])
def test_second_run_decides_if_the_reference_alone_changed(tmp_path: Path, second: Check) -> None:
    check = settled(tmp_path, before=([OTHER], [ROW]), after=([ROW], [ROW]), second=second)
    assert check.verdict == second.verdict
    assert check.evidence.startswith(second.evidence)
    repeated = "Hugging Face did not repeat its first answer (275/320 tokens equal)"
    assert repeated in check.evidence


@pytest.mark.parametrize(
    "after",
    [
        ([ROW], [OTHER]),
        # Without a second answer there is no agreement.
        ([], []),
        (None, None),
        ([ROW, ROW], [ROW, ROW]),
        ([{"tokens": [7, 8], "logprobs": [-0.5, None]}], [ROW | {"tokens": [7]}]),
    ],
)
def test_failure_stays_if_both_engines_change(tmp_path: Path, after: tuple[object, object]) -> None:
    check = settled(tmp_path, before=([OTHER], [ROW]), after=after)
    assert check.verdict == "fail"
    assert "neither engine repeats its answer" in check.evidence


def test_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert numeric.read_rows(tmp_path / "none.json", "llama") == []
