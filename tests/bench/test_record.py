"""Records on disk: complete or refused with a clear error, found by a name, and listed beside
damaged files.
"""

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from tests.bench.materials import record, served
from tests.fuzz.strategies import DEEP, damaged_document, fuzz
from workspace.bench import compare, results, subject
from workspace.bench.results import Record, read
from workspace.core import records
from workspace.core.console import Console
from workspace.core.errors import SettingsError
from workspace.core.paths import Layout

DOCUMENT: dict[str, Any] = json.loads(records.encode(record()))


def changed(**parts: object) -> bytes:
    return json.dumps({**DOCUMENT, **parts}).encode()


def kept(folder: Path, *made: Record) -> Layout:
    layout = Layout(folder)
    for entry in made:
        records.write(results.record_path(layout, entry), entry)
    return layout


def test_written_record_is_read_back_unchanged() -> None:
    for original in (record(), served((1, 8)), record(values=())):
        assert records.decode(records.encode(original), Record) == original


def test_summary_of_the_first_edition_is_ignored() -> None:
    assert records.decode(changed(summary={"latency": {"median": 1e9}}), Record) == record()


@fuzz(fast=150, deep=5000)
@given(damaged_document(DOCUMENT))
def test_damage_is_refused_or_leaves_a_record_with_valid_numbers(
    content: bytes,
) -> None:
    try:
        decoded = records.decode(content, Record)
    except records.NewerSchema:
        return
    except (ValueError, RecursionError) as exc:
        assert str(exc)
        return
    for name in decoded.metrics:
        assert all(value > 0 for value in decoded.values(name))
    records.encode(decoded)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        records.encode(record())[:-200],
        b"[]",
        DEEP[0].encode(),
        changed(schema="1"),
        changed(schema=True),
        changed(repeat=0),
        changed(label="../../x"),
        changed(kind="speed"),
        changed(starts=[{**DOCUMENT["starts"][0], "samples": {"latency": [0]}}]),
        changed(starts=[{**DOCUMENT["starts"][0], "samples": {"latency": ["1"]}}]),
        changed(starts=[{**DOCUMENT["starts"][0], "samples": {"speed": [1]}}]),
        changed(starts=[{**DOCUMENT["starts"][0], "samples": {"ttft@0": [1]}}]),
        changed(starts=None),
        json.dumps(DOCUMENT).replace("1.02", "NaN").encode(),
        json.dumps(DOCUMENT).replace("1.02", "1e999").encode(),
    ],
)
def test_incomplete_record_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(
        SettingsError, match="^a.json is not a complete record of a benchmark: .+"
    ) as caught:
        read(path, place="a.json")
    assert caught.value.hint


def test_record_of_a_newer_workspace_is_reported_as_such(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(changed(schema=2, starts="in another way"))
    with pytest.raises(
        SettingsError,
        match="^a.json cannot be read: it has schema 2, and this workspace reads schema 1: a"
        " newer workspace wrote it$",
    ):
        read(tmp_path / "a.json", place="a.json")


def test_metric_that_a_start_lacks_is_no_metric_of_the_record() -> None:
    swept = served((1, 8))
    first, *others = swept.starts
    samples = {name: values for name, values in first.samples.items() if name != "ttft@8"}
    starts = (replace(first, samples=samples), *others)
    assert "ttft@8" not in replace(swept, starts=starts).metrics


def test_label_file_name_its_beginning_and_path_find_a_record(tmp_path: Path) -> None:
    before, after = record(label="before"), record(label="after", tree="f" * 40)
    layout = kept(tmp_path, before, after)
    for name in ("before", "a" * 12 + "-before", "aaaa", str(results.record_path(layout, before))):
        assert results.find(layout, name).record == before, name


def test_label_of_several_trees_is_refused_with_their_paths(tmp_path: Path) -> None:
    layout = kept(tmp_path, record(), record(tree="f" * 40))
    with pytest.raises(SettingsError, match="latency matches 2 records") as caught:
        results.find(layout, "latency")
    assert len(caught.value.details) == 2


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("befor", "./scripts/inv bench    did you mean before?"),
        ("", "./scripts/inv bench"),
        ("../../etc", "./scripts/inv bench"),
        ("x" * 5000, ""),
    ],
)
def test_name_without_a_record_is_refused(tmp_path: Path, name: str, hint: str) -> None:
    layout = kept(tmp_path, record(label="before"))
    with pytest.raises(SettingsError, match="there is no record") as caught:
        results.find(layout, name)
    assert (caught.value.hint or "").startswith(hint)
    assert len(caught.value.message) < 400


def test_list_shows_newest_first_with_damaged_and_interrupted_records(tmp_path: Path) -> None:
    newer = replace(
        record(values=(1.0, 1.1), label="newer", tree="f" * 40), time="2026-11-21T10:00:00+00:00"
    )
    layout = kept(tmp_path, record(), newer)
    (layout.results / "gb10-123456" / "half.json").write_bytes(records.encode(record())[:300])
    out, err = io.StringIO(), io.StringIO()
    results.show_records(layout, console=Console(out=out, err=err), as_json=False)
    rows = out.getvalue().splitlines()
    assert [row.split()[:2] for row in rows[:3]] == [
        ["warn", "ffffffffffff-newer"],
        ["ok", "aaaaaaaaaaaa-latency"],
        ["FAIL", "half"],
    ]
    assert "2 of 6 starts, interrupted" in rows[0]
    assert "latency  1 s ± 1.4%" in rows[1]
    assert err.getvalue() == ""
    out = io.StringIO()
    results.show_records(layout, console=Console(out=out, err=err), as_json=True)
    assert [row.get("starts") for row in json.loads(out.getvalue())["records"]] == [2, 6, None]


def test_record_whose_starts_differ_too_much_is_not_ok_in_the_list(tmp_path: Path) -> None:
    shaky = record(values=(1.0, 2.0), label="shaky", repeat=2)
    layout = kept(tmp_path, shaky, record(label="quiet"))
    out = io.StringIO()
    results.show_records(layout, console=Console(out=out), as_json=False)
    rows = dict(zip(("quiet", "shaky"), sorted(out.getvalue().splitlines()[:2]), strict=True))
    assert rows["quiet"].startswith("ok ")
    assert rows["shaky"].startswith("warn ")
    assert "latency  1.5 s ± 47.1% noisy  2 starts" in rows["shaky"]
    # Columns are aligned.
    assert rows["quiet"].index("6 starts") == rows["shaky"].index("2 starts")


def relabelled(layout: Layout, name: str, label: str) -> str:
    out = io.StringIO()
    results.relabel(layout, name, label, console=Console(out=out, err=out))
    return out.getvalue()


def test_record_gets_another_label_and_keeps_its_content(tmp_path: Path) -> None:
    before = record(label="latency")
    layout = kept(tmp_path, before)
    assert "is now results/gb10-123456/aaaaaaaaaaaa-eager.json" in relabelled(
        layout, "latency", "eager"
    )
    (entry,) = results.entries(layout)
    assert entry.record == replace(before, label="eager")
    assert entry.path == results.record_path(layout, entry.record)
    assert relabelled(layout, "eager", "eager").startswith("ok ")


def test_label_of_another_record_of_the_tree_is_refused_and_both_stay(tmp_path: Path) -> None:
    layout = kept(tmp_path, record(label="first"), record(label="second"))
    with pytest.raises(SettingsError, match=r"aaaaaaaaaaaa-second\.json exists"):
        relabelled(layout, "first", "second")
    assert len(results.entries(layout)) == 2


def test_shortest_name_is_the_label_where_it_is_unique(tmp_path: Path) -> None:
    one, other, alone = record(), record(tree="f" * 40), record(label="x-latency")
    layout = kept(tmp_path, one, other, alone)
    for each in (one, other, alone):
        name = compare.shortest_name(layout, each)
        assert results.find(layout, name).record == each
    assert compare.shortest_name(layout, alone) == "x-latency"
    assert compare.shortest_name(layout, one) == "aaaaaaaaaaaa-latency"


@pytest.mark.parametrize(
    ("kind", "result", "says"),
    [
        ("serve", {"completed": 0, "failed": 16}, "no request was completed, 16 failed"),
        (
            "serve",
            {"completed": 15, "failed": 1, "request_throughput": 3.0},
            "1 of 16 requests failed",
        ),
        ("latency", {"latencies": []}, "has no measured number"),
        (
            "latency",
            {"latencies": [float("nan"), -1, 0, True, "1", None]},
            "has no measured number",
        ),
        (
            "throughput",
            {"requests_per_second": 0.0, "tokens_per_second": 0.0},
            "has no measured number",
        ),
        ("startup", {}, "has no measured number"),
    ],
)
def test_result_without_samples_is_refused(kind: str, result: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        subject.samples(kind, result)


def test_samples_of_a_server_are_milliseconds_by_request_and_gap() -> None:
    result = {
        "completed": 2,
        "failed": 0,
        "request_throughput": 2.0,
        "output_throughput": 9.0,
        "ttfts": [0.1, 0.2],
        "itls": [[0.01, 0.03], []],
    }
    found = subject.samples("serve", result, at=8)
    assert found["ttft@8"] == (100.0, 200.0)
    assert found["itl@8"] == (10.0, 30.0)
    assert found["tpot@8"] == (20.0,)
    assert found["e2el@8"] == (pytest.approx(140.0), 200.0)
    assert found["request_throughput@8"] == (2.0,)


def test_startup_without_compilation_has_no_compilation_metric() -> None:
    found = subject.samples(
        "startup",
        {"cold_startup_times": [3.5], "cold_compilation_times": [0.0], "warm_startup_times": [2.5]},
    )
    assert found == {"cold_startup": (3.5,), "warm_startup": (2.5,)}


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("folder", "cannot be read: Is a directory"),
        ("pipe", "cannot be read: not a regular file"),
        ("sparse", "cannot be read: it is larger than 64 MiB"),
        ("bytes", "is not a complete record of a benchmark: it is not UTF-8"),
        ("json", "is not a complete record of a benchmark: schema is missing"),
        ("nothing", "there is no record"),
    ],
)
def test_path_of_something_else_is_a_sentence(tmp_path: Path, kind: str, fault: str) -> None:
    path = tmp_path / "a.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 1 << 31)
    elif kind != "nothing":
        path.write_bytes(b"\xff{}" if kind == "bytes" else b'{"tool": "another"}')
    with pytest.raises(SettingsError, match=fault) as failure:
        results.find(Layout(tmp_path), str(path))
    assert failure.value.hint
