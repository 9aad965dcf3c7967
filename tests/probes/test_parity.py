"""probes/parity.py without torch: its arguments, and the comparison of two answers."""

import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from workspace.core.child_variables import VARIABLES
from workspace.core.paths import here

PROBE = here().probes / "parity.py"


def answer(tokens: list[int], logprobs: list[float]) -> dict[str, object]:
    return {
        "prompt": [1, 2],
        "tokens": tokens,
        "logprobs": logprobs,
        "margins": [0.5 + i for i in range(len(tokens))],
    }


def test_tokens_count_up_to_the_first_difference(probe: ModuleType) -> None:
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


def test_nan_is_counted_and_hides_no_difference(probe: ModuleType) -> None:
    row = probe.compare(
        answer([5, 6], [-1.0, -2.0]), answer([5, 6], [math.nan, -2.5]), [-math.inf, -2.0]
    )
    assert (row["not_finite"], row["decode_difference"], row["prefill_difference"]) == (2, 0.5, 0.0)


def test_short_answer_lacks_tokens_and_comparisons(probe: ModuleType) -> None:
    row = probe.compare(answer([5, 6, 7], [-1.0] * 3), answer([5], [-1.0]), [])
    assert (row["equal"], row["compared"]) == (1, 1)


def test_first_different_token_has_the_references_margin(probe: ModuleType) -> None:
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


def test_short_answer_is_measured_against_the_wanted_length(
    probe: ModuleType,
) -> None:
    found = probe.summed([answer([5, 6], [-1.0] * 2)], [answer([5, 6], [-1.0] * 2)], 12)
    assert (found["total"], found["equal"]) == (12, 2)


@pytest.mark.parametrize(
    ("argv", "output"),
    [
        (["--model", "a=."], "holds no config.json"),
        (["--model", "MODEL"], "is not NAME=FOLDER"),
        (["--model", "a=MODEL", "--tokens", "0"], "--tokens is at least 1"),
        (["--model", "a=MODEL", "--device", "tpu"], "invalid choice"),
        (["--model", "a=MODEL", "--consistency", "b"], "is none of the models"),
    ],
)
@pytest.mark.parametrize("name", ["parity", "reference"])
def test_bad_arguments_are_refused_before_any_import(
    tmp_path: Path, name: str, argv: list[str], output: str
) -> None:
    if name == "reference" and "--consistency" in argv:
        output = "unrecognized arguments"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    argv = [arg.replace("MODEL", str(tmp_path / "model")) for arg in argv]
    argv += ["--against", "rows.json"] if name == "parity" else []
    done = subprocess.run(
        [sys.executable, PROBE.with_name(f"{name}.py"), *argv],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert output in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("is_compiled", [False, True])
def test_only_an_eager_engine_runs_in_the_mode_in_which_inductor_refuses_to_benchmark(
    probe: ModuleType, monkeypatch: pytest.MonkeyPatch, *, is_compiled: bool
) -> None:
    modes: list[bool] = []
    torch = SimpleNamespace(
        set_float32_matmul_precision=lambda precision: None,
        manual_seed=lambda seed: None,
        backends=SimpleNamespace(cudnn=SimpleNamespace(allow_tf32=True)),
        use_deterministic_algorithms=lambda mode, warn_only: modes.append(mode),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    probe.beside("reference").forbid_tf32(is_compiled=is_compiled)
    assert modes == [not is_compiled]
    assert torch.backends.cudnn.allow_tf32 is False


def test_no_probe_of_a_compiled_engine_sets_a_mode_that_inductor_refuses() -> None:
    """Compiled engines run in parity.py, which takes the setting of reference.py that the test
    above holds, and refuses another; engine.py sets it for Hugging Face's model and is eager.
    """
    names = {
        file.name
        for file in PROBE.parent.glob("*.py")
        if re.search(
            r"use_deterministic|set_deterministic|inductor.*deterministic", file.read_text()
        )
    }
    assert names == {"engine.py", "parity.py", "reference.py"}
    assert '"enforce_eager": True' in PROBE.with_name("document.py").read_text()
    assert "enforce_eager" not in PROBE.with_name("engine.py").read_text()
    given = {
        name
        for row in VARIABLES
        if {"smoke", "smoke-serve"} & set(row.phases)
        for name in row.names.split()
    }
    assert "TORCHDYNAMO_DISABLE" in given
    assert not [name for name in given if "DETERMINISTIC" in name or "BATCH_INVARIANT" in name]
