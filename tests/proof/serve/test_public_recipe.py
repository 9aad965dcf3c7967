"""A recipe in the form that others share serves tiny in the built clone, and `vllm bench serve` of
the pin measures it.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small.materials import ROOT
from workspace.core.paths import Layout, here
from workspace.server import lifecycle, models, observation

SHARED = Path(__file__).parents[2] / "server" / "public" / "tiny.yaml"
START_S, RUN_S = 600.0, 300.0


def inv(*argv: str | Path, limit_s: float = RUN_S) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [ROOT / "scripts" / "inv", *argv], capture_output=True, text=True, timeout=limit_s
    )


@pytest.fixture
def url(layout: Layout, tmp_path: Path) -> Iterator[str]:
    """The address of a server that was started from the file."""
    assert observation.find(layout.server) is None, "a server runs in this clone"
    recipe, port = tmp_path / "tiny.yaml", lifecycle.free_port()
    shutil.copy(SHARED, recipe)
    started = inv("serve", recipe, "--detach", "--", "--port", str(port), limit_s=START_S)
    assert started.returncode == 0, started.stderr
    assert "serves shared" in started.stderr
    yield f"http://127.0.0.1:{port}"
    assert inv("serve.stop").returncode == 0


def test_tiny_is_served_from_a_shared_file_and_vllms_own_results_are_compared(
    url: str, tmp_path: Path
) -> None:
    status = json.loads(inv("serve.status", "--json").stdout)
    assert status["state"] == "ready"
    assert status["name"] == str(tmp_path / "tiny.yaml")
    model = models.found_built_in(here(), "tiny")
    assert model is not None
    bench = (
        *("run", "--", "vllm", "bench", "serve", "--backend", "openai", "--base-url", url),
        *("--model", "shared", "--tokenizer", model, "--dataset-name", "random"),
        *("--random-input-len", "16", "--random-output-len", "8", "--num-prompts", "4"),
        *("--save-result", "--append-result", "--result-dir", tmp_path),
    )
    for name, count in (("a", 2), ("b", 1)):
        for _ in range(count):
            done = inv(*bench, "--result-filename", f"{name}.json")
            assert done.returncode == 0, done.stderr
    compared = inv("bench.compare", tmp_path / "a.json", tmp_path / "b.json")
    assert compared.returncode == 0, compared.stderr
    # Two tokens of tiny may come at once, so that itl is 0 in a run.
    for metric in ("request_throughput", "output_throughput", "ttft"):
        assert f" {metric} " in compared.stdout
    assert "these have 2 and 1" in compared.stdout
    assert "name no machine, tree or version" in compared.stderr
    done = inv(*bench, "--result-filename", "c.json", "--max-concurrency", "1")
    assert done.returncode == 0, done.stderr
    refused = inv("bench.compare", tmp_path / "a.json", tmp_path / "c.json")
    assert refused.returncode == 2
    assert "they differ in max_concurrency" in refused.stderr
