"""A parity that failed, asked again: who does not say the same twice."""

import json
from pathlib import Path

import pytest

from workspace.checks import numeric
from workspace.checks.numeric import Said
from workspace.checks.registry import Check

WRONG, RIGHT = (
    Check("parity.llama", "fail", "275/320 tokens equal", 10.0),
    Check("parity.llama", "pass", "320/320 tokens equal", 20.0),
)
ROW = {"tokens": [7, 8], "logprobs": [-0.5, -0.25]}
OTHER = {"tokens": [7, 8], "logprobs": [-0.5, -0.26]}


def output(folder: Path, reference: object, vllm: object) -> Said:
    folder.mkdir()
    files = Said(folder / "reference.json", folder / "rows.json")
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
    return numeric.settle(
        WRONG,
        second,
        name="llama",
        before=output(folder / "before", *before),
        after=output(folder / "after", *after),
    )


def test_failure_that_comes_again_bit_for_bit_stays_one(tmp_path: Path) -> None:
    check = settled(tmp_path, before=([ROW], [OTHER]), after=([ROW], [OTHER]), second=WRONG)
    assert (check.verdict, check.seconds) == ("fail", 20.0)
    assert check.evidence == "275/320 tokens equal; both say the same again"


def test_vllm_that_is_right_the_second_time_has_failed_and_is_named(tmp_path: Path) -> None:
    check = settled(tmp_path, before=([ROW], [OTHER]), after=([ROW], [ROW]))
    assert check.verdict == "fail"
    assert (
        check.evidence
        == "275/320 tokens equal; vLLM does not say the same again, but 320/320 tokens equal"
    )


@pytest.mark.parametrize("second", [RIGHT, WRONG])
def test_reference_that_alone_has_changed_was_none_and_the_second_decides(
    tmp_path: Path, second: Check
) -> None:
    check = settled(tmp_path, before=([OTHER], [ROW]), after=([ROW], [ROW]), second=second)
    assert check.verdict == second.verdict
    assert check.evidence.startswith(second.evidence)
    assert (
        "what Hugging Face said before (275/320 tokens equal) it does not say again"
        in check.evidence
    )


@pytest.mark.parametrize(
    "after",
    [
        ([ROW], [OTHER]),
        # Nothing was heard the second time: that is no agreement.
        ([], []),
        (None, None),
        ([ROW, ROW], [ROW, ROW]),
        ([{"tokens": [7, 8], "logprobs": [-0.5, None]}], [ROW | {"tokens": [7]}]),
    ],
)
def test_two_that_both_change_leave_the_failure(
    tmp_path: Path, after: tuple[object, object]
) -> None:
    check = settled(tmp_path, before=([OTHER], [ROW]), after=after)
    assert check.verdict == "fail"
    assert "neither of the two does not" not in check.evidence
    assert "neither of the two says the same again" in check.evidence


def test_file_that_was_not_written_says_nothing(tmp_path: Path) -> None:
    assert numeric.rows_again(tmp_path / "none.json", "llama") == []
