"""probes/parity.py as far as it goes without torch: its arguments, and the comparison of two answers."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from workspace.core.layout import here

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
    return {"prompt": [1, 2], "tokens": tokens, "logprobs": logprobs, "margin": 0.5}


def test_tokens_count_up_to_the_first_that_differs(probe: ModuleType) -> None:
    row = probe.compare(answer([5, 6, 7, 8], [-1.0] * 4), answer([5, 9, 7, 8], [-1.0] * 4), [-1.0] * 4)
    assert row["equal"] == 1


def test_decode_is_compared_on_equal_tokens_only_and_prefill_on_all(probe: ModuleType) -> None:
    row = probe.compare(answer([5, 6, 7], [-1.0, -2.0, -3.0]), answer([5, 6, 9], [-1.5, -2.0, -9.0]), [-1.0, -2.25, -3.0])
    assert (row["decode_difference"], row["prefill_difference"], row["compared"]) == (0.5, 0.25, 5)


def test_not_a_number_is_counted_and_hides_no_difference(probe: ModuleType) -> None:
    row = probe.compare(answer([5, 6], [-1.0, -2.0]), answer([5, 6], [math.nan, -2.5]), [-math.inf, -2.0])
    assert (row["not_finite"], row["decode_difference"], row["prefill_difference"]) == (2, 0.5, 0.0)


def test_vllm_that_stops_early_is_short_of_tokens_and_of_comparisons(probe: ModuleType) -> None:
    row = probe.compare(answer([5, 6, 7], [-1.0] * 3), answer([5], [-1.0]), [])
    assert (row["equal"], row["compared"]) == (1, 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["."], "holds no config.json"),
        (["MODEL", "--prompts", "0"], "--prompts is 1 to"),
        (["MODEL", "--prompts", "99"], "--prompts is 1 to"),
        (["MODEL", "--tokens", "0"], "--tokens at least 1"),
        (["MODEL", "--device", "tpu"], "invalid choice"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_imported(tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    words = [str(tmp_path / "model") if word == "MODEL" else word for word in words]
    done = subprocess.run([sys.executable, PROBE, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
