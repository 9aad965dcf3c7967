"""`inv bench.compare`: comparable records, printed verdicts and exit codes."""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.materials import arm, record, served
from tests.bench.test_record import kept
from workspace.bench import compare, subject
from workspace.bench.results import Gpu, Kind, Record
from workspace.bench.subject import _TINY_ENGINE, _TINY_WORK, _WORK, SWEEP
from workspace.core.console import Console
from workspace.core.errors import Regression, SettingsError


def output(
    folder: Path,
    first: Record,
    second: Record,
    *across: str,
    factor: str = "5",
    as_json: bool = False,
) -> tuple[str, str]:
    layout = kept(folder, first, second)
    out, err = io.StringIO(), io.StringIO()
    compare.show(
        layout,
        first.stem,
        second.stem,
        factor=factor,
        across=across,
        console=Console(out=out, err=err),
        as_json=as_json,
    )
    return out.getvalue(), err.getvalue()


def other(**parts: object) -> Record:
    return replace(record(tree="f" * 40), **parts)  # type: ignore[arg-type]


def test_regression_names_metric_and_size_and_exits_9(tmp_path: Path) -> None:
    first, second = record(arm(1, 12)), record(arm(2, 12, slow=0.2), tree="f" * 40)
    with pytest.raises(
        Regression,
        match=r"ffffffffffff-latency is slower than aaaaaaaaaaaa-latency: latency \+19\.8%",
    ) as caught:
        output(tmp_path, first, second)
    assert caught.value.exit_code == 9


def test_lower_throughput_is_a_regression_and_lower_latency_is_not(tmp_path: Path) -> None:
    with pytest.raises(Regression, match=r"tokens_per_second -2\d"):
        output(
            tmp_path,
            record(arm(1, 12), metric="tokens_per_second"),
            record(arm(2, 12, slow=-0.25), metric="tokens_per_second", tree="f" * 40),
        )
    out, _ = output(tmp_path, record(arm(1, 12)), record(arm(2, 12, slow=-0.25), tree="f" * 40))
    assert out.startswith("ok")
    assert "faster" in out


def test_too_few_starts_report_the_number_that_is_needed(tmp_path: Path) -> None:
    out, _ = output(tmp_path, record(), other(starts=record().starts[:3]))
    assert "inconclusive" in out
    hint = "./scripts/nox -s bench -- latency --label latency --repeat 6 -- --enforce-eager"
    assert f"hint: {hint}    keeps the measured starts, on the tree of ffffffffffff-latency" in out
    out, _ = output(tmp_path, other(starts=record().starts[:3], label="a"), record())
    assert "bench -- latency --label a --repeat 6 -- --enforce-eager" in out


@pytest.mark.parametrize(
    ("kind", "model", "flags", "arguments"),
    [
        ("latency", "tiny", (*_TINY_ENGINE, *_TINY_WORK["latency"]), ""),
        ("latency", "tiny", (*_TINY_ENGINE, "-O0", *_TINY_WORK["latency"]), "-- -O0"),
        ("throughput", "org/name", ("-O0", *_WORK["throughput"]), "--model org/name -- -O0"),
        ("serve", "smollm2", ("-O0", "--max-concurrency=8"), "--model smollm2 -- -O0"),
        ("serve", "tiny", (*_TINY_ENGINE, *(f"--max-concurrency={n}" for n in SWEEP)), "--sweep"),
        ("startup", "llama ab12cd34ef56", _WORK["startup"], "--model FOLDER"),
    ],
)
def test_arguments_of_a_record_measure_its_workload(
    kind: Kind, model: str, flags: tuple[str, ...], arguments: str
) -> None:
    made = subject.options_of(replace(record(), kind=kind, model=model, flags=flags))
    before, _, after = arguments.partition("-- ")
    label = ["--label", "x", "--repeat", "6"]
    given = ["--", *after.split()] if after else []
    assert subject.arguments(made, "x", 6) == [*before.split(), *label, *given]


def test_json_is_one_document_without_nan(tmp_path: Path) -> None:
    out, _ = output(tmp_path, record(), other(starts=record().starts[:1]), as_json=True)
    document = json.loads(out, parse_constant=pytest.fail)
    assert document["rows"][0]["judgement"] | {"reason": ""} == {
        "verdict": "inconclusive",
        "ratio": 1.0,
        "low": None,
        "high": None,
        "p": 1.0,
        "needed": 6,
        "reason": "",
    }


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ({"model": "smollm2"}, "model: tiny against smollm2"),
        ({"flags": ()}, "flags: --enforce-eager against nothing"),
        ({"kind": "throughput"}, "kind: latency against throughput"),
        (
            {"backends": ("Using TRITON_ATTN backend",)},
            "backends: Using FLASH_ATTN backend against Using TRITON_ATTN backend",
        ),
        ({"software": replace(record().software, torch="2.14.0")}, "torch: 2.13.0 against 2.14.0"),
        (
            {"machine": replace(record().machine, name="gb10-abcdef")},
            "machine: gb10-123456 against gb10-abcdef",
        ),
        (
            {"machine": replace(record().machine, gpus=(Gpu("NVIDIA GB10", "12.1", "590.1"),))},
            "driver: 580.95 against 590.1",
        ),
        (
            {"environment": {"OMP_NUM_THREADS": "4"}},
            "environment: OMP_NUM_THREADS unset against 4; VLLM_NO_USAGE_STATS 1 against unset",
        ),
    ],
)
def test_records_that_are_not_comparable_are_refused_with_the_field_that_differs(
    tmp_path: Path, parts: Mapping[str, object], field: str
) -> None:
    with pytest.raises(SettingsError, match="are not comparable") as caught:
        output(tmp_path, record(), other(**parts))
    assert field in caught.value.details


def test_field_of_across_may_differ(tmp_path: Path) -> None:
    graphs = other(flags=())
    assert output(tmp_path, record(), graphs, "flags")[0].startswith("ok")
    with pytest.raises(SettingsError, match="not comparable; they differ in model$"):
        output(tmp_path, record(), replace(graphs, model="smollm2"), "flags")


def test_field_that_no_record_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--across: 'speed' is not a field"):
        output(tmp_path, record(), other(), "speed")


def test_records_of_another_tree_pin_and_patches_are_comparable(tmp_path: Path) -> None:
    source = replace(record().source, tree="f" * 40, pin="v0.33.0", patches=(), libraries={})
    assert compare.differences(record(), other(source=source)) == {}


def test_records_without_a_common_metric_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="have no metric in common"):
        output(
            tmp_path,
            served((1,)),
            replace(served((4,)), source=replace(record().source, tree="f" * 40)),
        )


@pytest.mark.parametrize("factor", ["", "five", "nan", "inf", "-5", "0", "1e9", "0.1", "5 %%"])
def test_invalid_factor_is_refused(tmp_path: Path, factor: str) -> None:
    with pytest.raises(SettingsError, match="--factor"):
        output(tmp_path, record(), other(), factor=factor)


def test_slower_record_passes_with_a_larger_factor(tmp_path: Path) -> None:
    first, second = record(arm(1, 12)), record(arm(2, 12, slow=0.2), tree="f" * 40)
    assert output(tmp_path, first, second, factor="40%")[0].startswith("ok")


def test_row_has_its_verdict_once() -> None:
    first, second = record(arm(1, 8), label="one"), record(arm(2, 8, slow=0.5), label="two")
    err = io.StringIO()
    rows = compare.judge_records(first, second, factor=0.05)
    compare.print_rows(rows, console=Console(out=io.StringIO(), err=err))
    assert re.match(r"FAIL +latency +\+", err.getvalue()), err.getvalue()
