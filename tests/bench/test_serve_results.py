"""`inv bench.compare` on results of `vllm bench serve --save-result`, as far as they go."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.bench.materials import arm, record
from tests.bench.test_record import kept
from workspace.bench import compare, results
from workspace.core.console import Console
from workspace.core.errors import Regression, SettingsError
from workspace.core.paths import Layout


def result(ttft: float, **parts: object) -> dict[str, object]:
    """Return a result in vLLM's form (vllm/benchmarks/serve.py)."""
    made: dict[str, object] = {
        "date": "20261201-012949",
        "endpoint_type": "openai",
        "backend": "openai",
        "label": None,
        "model_id": "small",
        "tokenizer_id": "small",
        "num_prompts": 4,
        "request_rate": "inf",
        "burstiness": 1.0,
        "max_concurrency": 2,
        "duration": 0.5,
        "completed": 4,
        "failed": 0,
        "total_input_tokens": 64,
        "total_output_tokens": 32,
        "request_throughput": 8.0,
        "request_goodput": None,
        "output_throughput": 64.0,
        "latencies": [0.1, 0.2],
        "rtfx": 0.0,
        "mean_ttft_ms": ttft * 1.1,
        "median_ttft_ms": ttft,
        "std_ttft_ms": 1.0,
        "median_tpot_ms": 2.0,
        "median_itl_ms": 2.0,
        "p99_itl_ms": 3.0,
    }
    return made | parts


def write(path: Path, runs: Sequence[object]) -> str:
    """Write results as --append-result does: a line each, the last without an end."""
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("\n".join(json.dumps(run) for run in runs))
    return str(path)


def output(
    folder: Path, first: str, second: str, *across: str, as_json: bool = False
) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    console = Console(out=out, err=err)
    compare.show(
        Layout(folder),
        first,
        second,
        factor="5",
        across=across,
        console=console,
        as_json=as_json,
    )
    return out.getvalue(), " ".join(err.getvalue().split())


def test_two_files_have_figures_but_no_verdict_and_what_is_missing_is_named(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", [result(10.0)])
    second = write(tmp_path / "b.json", [result(20.0, median_e2el_ms=50.0)])
    out, err = output(tmp_path, first, second)
    assert "ttft" in out
    assert "inconclusive: +100.0%, 10 → 20 ms" in out
    assert "fail" not in out
    assert "name no machine, tree or version" in err
    assert "spread between requests; that between runs needs several: 6 for each side" in err
    assert "not compared, because one side lacks it: e2el" in err
    assert "hint" not in out


def test_six_runs_each_in_a_folder_and_in_one_file_have_a_verdict(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", [result(10 + n / 100) for n in range(6)])
    for n in range(6):
        write(tmp_path / "b" / f"{n}.json", [result(20 + n / 100)])
        write(tmp_path / "b" / f"{n}.pytorch.json", [[{"benchmark": {}}]])
    with pytest.raises(Regression, match=r"b is slower than .*a\.json: ttft \+99\.") as caught:
        output(tmp_path, first, str(tmp_path / "b"))
    assert caught.value.exit_code == 9
    out, err = output(tmp_path, str(tmp_path / "b"), first, as_json=True)
    verdicts = {row["metric"]: row["judgement"]["verdict"] for row in json.loads(out)["rows"]}
    assert verdicts["ttft"] == "pass"
    assert "spread between requests" not in err


def test_other_load_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", [result(10.0)])
    second = write(tmp_path / "b.json", [result(10.0, max_concurrency=8, request_rate=2.0)])
    with pytest.raises(SettingsError, match="differ in request_rate, max_concurrency") as caught:
        output(tmp_path, first, second)
    assert "max_concurrency: 2 against 8" in caught.value.details
    assert "--across request_rate --across max_concurrency" in (caught.value.hint or "")
    output(tmp_path, first, second, "request_rate", "max_concurrency")
    mixed = write(tmp_path / "c.json", [result(10.0), result(10.0, num_prompts=9)])
    with pytest.raises(SettingsError, match="differ in num_prompts"):
        output(tmp_path, first, mixed)


def test_failed_requests_are_named_and_a_run_without_any_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", [result(10.0)])
    second = write(tmp_path / "b.json", [result(10.0, completed=1)])
    assert "3 requests failed and count nowhere" in output(tmp_path, first, second)[1]
    values = dict.fromkeys(("request_throughput", "output_throughput", "median_tpot_ms"), 0.0)
    nothing = result(float("nan"), completed=0, median_itl_ms=0.0, **values)
    with pytest.raises(SettingsError, match="no metric in common"):
        output(tmp_path, first, write(tmp_path / "c.json", [nothing]))


def test_record_and_result_are_not_compared(tmp_path: Path) -> None:
    ours = record(arm(1, 6))
    kept(tmp_path, ours)
    theirs = write(tmp_path / "a.json", [result(10.0)])
    for pair in ((ours.stem, theirs), (theirs, ours.stem)):
        with pytest.raises(SettingsError, match="only one of .* is a result of `vllm bench serve`"):
            output(tmp_path, *pair)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{}", '{"request_throughput": 3}', json.dumps(result(1.0))[:-5]],
)
def test_other_or_cut_file_is_a_sentence(tmp_path: Path, text: str) -> None:
    other = tmp_path / "b" / "b.json"
    first = write(tmp_path / "b" / "a.json", [result(10.0)])
    other.write_text(text)
    with pytest.raises(SettingsError, match=r"b\.json is not a complete record of a benchmark"):
        output(tmp_path, first, str(other))
    # A folder is read as a whole.
    with pytest.raises(SettingsError, match=r"b\.json is no result of `vllm bench serve`"):
        results.serve_runs(str(tmp_path / "b"))
