"""probes/real_model.py --first-token, with a vLLM that records what it is asked for."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from workspace.core.paths import here


def test_sampled_token_is_one_for_which_vllm_takes_flashinfers_sampler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM takes it for a request with a filter and without a seed."""
    asked: list[SimpleNamespace] = []

    def generate(
        _prompts: object, wanted: SimpleNamespace, **_options: object
    ) -> list[SimpleNamespace]:
        asked.append(wanted)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7])])]

    vllm = SimpleNamespace(
        LLM=lambda **_options: SimpleNamespace(generate=generate), SamplingParams=SimpleNamespace
    )
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    spec = importlib.util.spec_from_file_location("real_model", here().probes / "real_model.py")
    assert spec is not None
    assert spec.loader is not None
    probe = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(str(here().probes))
    spec.loader.exec_module(probe)

    assert probe.first_token(tmp_path, "cuda") == {"token": 7, "sampled": 7}
    greedy, sampled = asked
    assert greedy.temperature == 0
    assert sampled.temperature > 0
    assert sampled.top_k > 0
    assert sampled.top_p < 1
    assert getattr(sampled, "seed", None) is None
