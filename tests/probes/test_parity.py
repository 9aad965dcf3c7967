"""probes/parity.py as far as it goes without torch: its arguments, and the comparison of two
answers.
"""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from workspace.core.paths import here

PROBE = here().probes / "parity.py"


@pytest.fixture(scope="module")
def probe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parity_probe", PROBE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(tokens: list[int], logprobs: list[float]) -> dict:
    return {
        "prompt": [1, 2],
        "tokens": tokens,
        "logprobs": logprobs,
        "margins": [0.5 + i for i in range(len(tokens))],
    }


def test_tokens_count_up_to_the_first_that_differs(probe: ModuleType) -> None:
    row = probe.compare(
        answer([5, 6, 7, 8], [-1.0] * 4), answer([5, 9, 7, 8], [-1.0] * 4), [-1.0] * 4
    )
    assert row["equal"] == 1


def test_decode_is_compared_on_equal_tokens_only_and_prefill_on_all(probe: ModuleType) -> None:
    row = probe.compare(
        answer([5, 6, 7], [-1.0, -2.0, -3.0]),
        answer([5, 6, 9], [-1.5, -2.0, -9.0]),
        [-1.0, -2.25, -3.0],
    )
    assert (row["decode_difference"], row["prefill_difference"], row["compared"]) == (0.5, 0.25, 5)


def test_not_a_number_is_counted_and_hides_no_difference(probe: ModuleType) -> None:
    row = probe.compare(
        answer([5, 6], [-1.0, -2.0]), answer([5, 6], [math.nan, -2.5]), [-math.inf, -2.0]
    )
    assert (row["not_finite"], row["decode_difference"], row["prefill_difference"]) == (2, 0.5, 0.0)


def test_vllm_that_stops_early_is_short_of_tokens_and_of_comparisons(probe: ModuleType) -> None:
    row = probe.compare(answer([5, 6, 7], [-1.0] * 3), answer([5], [-1.0]), [])
    assert (row["equal"], row["compared"]) == (1, 1)


def test_place_where_tokens_part_tells_how_sure_the_reference_was(probe: ModuleType) -> None:
    found = probe.summed(
        [answer([5, 6, 7], [-1.0] * 3)], [answer([5, 9, 7], [-1.0] * 3)], 3, [[-1.0] * 3]
    )
    assert (
        found["partings"],
        found["behind"],
        found["equal"],
        found["wanted"],
        found["compared"],
    ) == ([1.5], 2, 1, 6, 4)


def test_answer_that_is_too_short_is_short_of_what_is_wanted_and_not_of_what_came(
    probe: ModuleType,
) -> None:
    found = probe.summed([answer([5, 6], [-1.0] * 2)], [answer([5, 6], [-1.0] * 2)], 12)
    assert (found["total"], found["equal"]) == (12, 2)


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["--model", "a=."], "holds no config.json"),
        (["--model", "MODEL"], "is not NAME=FOLDER"),
        (["--model", "a=MODEL", "--tokens", "0"], "--tokens is at least 1"),
        (["--model", "a=MODEL", "--device", "tpu"], "invalid choice"),
        (["--model", "a=MODEL", "--consistency", "b"], "is none of the models"),
    ],
)
@pytest.mark.parametrize("name", ["parity", "reference"])
def test_bad_arguments_are_refused_before_anything_is_imported(
    tmp_path: Path, name: str, words: list[str], output: str
) -> None:
    if name == "reference" and "--consistency" in words:
        output = "unrecognized arguments"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    words = [word.replace("MODEL", str(tmp_path / "model")) for word in words]
    words += ["--against", "rows.json"] if name == "parity" else []
    done = subprocess.run(
        [sys.executable, PROBE.with_name(f"{name}.py"), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert output in done.stderr
    assert "Traceback" not in done.stderr
