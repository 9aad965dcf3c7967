"""The verdict on a real engine: a seeded slow-down of 8 % is a regression, 0 % and 2 % never are;
by resampled starts, and by live runs of A/B.

AB_PROOF_CLONE names a bootstrapped clone that may be changed; without it the proof makes a clone.
Starts stay in results/ there, so that an interrupted proof resumes; the output of the live runs is
in verdict.tsv. AB_PROOF_COLLECT, AB_PROOF_STARTS and AB_PROOF_RUNS set the numbers, and with
AB_PROOF_BUSY the proof measures beside other programs.
"""

import os
import random
import re
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.small.materials import git
from workspace.bench import compare, measure, results
from workspace.bench.compare import FACTOR, MIN_STARTS, Verdict
from workspace.bench.results import Record
from workspace.cli import main
from workspace.core.paths import Layout, here

KINDS = (0, 2, 8)
METRIC = "latency"
# The requirements of the proof.
DRAWN, VERDICTS, LEAST = 30, 20, 19
COLLECT, STARTS, RUNS = (
    int(os.environ.get(f"AB_PROOF_{name}", count))
    for name, count in (("COLLECT", DRAWN), ("STARTS", 2 * MIN_STARTS), ("RUNS", 3))
)
ALLOW_LOAD = bool(os.environ.get("AB_PROOF_BUSY"))
IDLE_S, AGAIN_S = 1800.0, 30.0
# The tests run without bytecode, but a build must write it.
ENVIRONMENT = {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

CORE = "vllm/v1/engine/core.py"
# Every step of an engine is called by this name, with and without a queue of batches, in every
# process.
STEP = """        self.step_fn = (
            self.step if self.batch_queue is None else self.step_with_batch_queue
        )
"""
# Each step adds a share of its time to a debt, which sleeps of a millisecond or more pay off: after
# a sleep that is too long the next sleep is shorter.
SEED = """        unseeded, owed, ended = self.step_fn, 0.0, None

        def seeded():
            nonlocal owed, ended
            began = time.perf_counter() if ended is None else ended
            done = unseeded()
            ended = time.perf_counter()
            owed += {share} * (ended - began)
            if owed > 0.001:
                time.sleep(owed)
                slept = time.perf_counter()
                owed -= slept - ended
                ended = slept
            return done

        self.step_fn = seeded  # {remark}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    if named := os.environ.get("AB_PROOF_CLONE"):
        return Layout(Path(named))
    folder = tmp_path_factory.mktemp("proof") / "clone"
    subprocess.run(["git", "clone", "--quiet", here().root, folder], check=True)
    subprocess.run(["./scripts/inv", "bootstrap"], cwd=folder, env=ENVIRONMENT, check=True)
    return Layout(folder)


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Collect rows, and print them at the end although pytest captures output."""
    rows: list[str] = []
    yield rows
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", *rows, sep="\n")


@contextmanager
def seeded(layout: Layout, kind: int, remark: str) -> Iterator[None]:
    """Make each step of the engine `kind` % longer; edits of an interrupted proof are dropped."""
    clean = git(layout.vllm, "show", f"HEAD:{CORE}") + "\n"
    assert clean.count(STEP) == 1, f"{CORE} no longer chooses its step so"
    path = layout.vllm / CORE
    try:
        path.write_text(clean.replace(STEP, STEP + SEED.format(share=kind / 100, remark=remark)))
        yield
    finally:
        path.write_text(clean)


def run(layout: Layout, module: str, *args: str) -> subprocess.CompletedProcess[str]:
    argv = [layout.tools / "bin" / "python", "-m", module, *args]
    return subprocess.run(
        argv,
        cwd=layout.root,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=7200,
        check=False,
    )


def label(kind: int) -> str:
    return f"seeded-{kind}"


def measured(layout: Layout, kind: int) -> Record | None:
    tree = git(layout.vllm, "rev-parse", "HEAD^{tree}")
    found = [
        entry.record
        for entry in results.entries(layout)
        if entry.record and (entry.record.label, entry.record.source.tree) == (label(kind), tree)
    ]
    assert len(found) < 2, f"results/ holds {label(kind)} of several machines"
    return found[0] if found else None


@pytest.fixture(scope="module")
def collected(built: Layout) -> Mapping[int, Record]:
    """Measure COLLECT starts of each kind in turn, so that a drift affects all kinds alike."""
    settings = main.load_settings(built)
    for number in range(1, COLLECT + 1):
        for kind in KINDS:
            if (there := measured(built, kind)) and len(there.starts) >= number:
                continue
            with seeded(built, kind, "collected"):
                measure.require_idle(
                    settings,
                    has_gpu=False,
                    allow_busy=ALLOW_LOAD,
                    console=main.console(),
                    wait_s=IDLE_S,
                )
                done = run(
                    built, "bench", "latency", "--label", label(kind), "--repeat", str(number)
                )
            assert done.returncode == 0, done.stderr
    found = {kind: measured(built, kind) for kind in KINDS}
    return {
        kind: replace(record, repeat=COLLECT, starts=record.starts[:COLLECT])
        for kind, record in found.items()
        if record
    }


def draw(record: Record, chance: random.Random, starts: int) -> Record:
    return replace(record, repeat=starts, starts=tuple(chance.choices(record.starts, k=starts)))


def verdicts(records: Mapping[int, Record], kind: int, starts: int) -> Counter[Verdict]:
    """Count the verdicts on draws with replacement: no slow-down against `kind`."""
    chance, output = random.Random(f"{kind} {starts}"), Counter[Verdict]()
    for _ in range(VERDICTS):
        first, second = draw(records[0], chance, starts), draw(records[kind], chance, starts)
        compare.require_comparable(first, second)
        (row,) = compare.judge_records(first, second, factor=FACTOR)
        assert row.metric == METRIC
        output[row.judgement.verdict] += 1
    return output


def counted(output: Mapping[Verdict, int]) -> str:
    return "  ".join(f"{name} {output.get(name, 0):2}" for name in ("pass", "fail", "inconclusive"))


@pytest.mark.parametrize("kind", KINDS)
def test_resampled_starts_are_judged_as_they_were_seeded(
    collected: Mapping[int, Record], table: list[str], kind: int
) -> None:
    values = collected[kind].values(METRIC)
    ratio = statistics.median(values) / statistics.median(collected[0].values(METRIC))
    varied = (
        f"CV {statistics.stdev(values) / statistics.fmean(values):.1%}" if len(values) > 1 else ""
    )
    table.append(
        f"{kind} %: {len(values)} starts, median {statistics.median(values):.4f} s"
        f" ({compare.percent(ratio)}), {varied}"
    )
    output = {
        starts: verdicts(collected, kind, starts) for starts in (MIN_STARTS, 2 * MIN_STARTS, DRAWN)
    }
    table.extend(
        f"    {VERDICTS} verdicts of {starts:2} starts an arm: {counted(of)}"
        for starts, of in output.items()
    )
    assert len(values) >= DRAWN, f"{len(values)} starts prove nothing, {DRAWN} do"
    if kind == KINDS[-1]:
        assert output[DRAWN]["fail"] >= LEAST
    else:
        assert not any(of["fail"] for of in output.values())


def ab(layout: Layout) -> subprocess.CompletedProcess[str]:
    """Run an A/B against the series to its end; retry while other programs use the machine."""
    deadline = time.monotonic() + IDLE_S
    while True:
        done = run(
            layout,
            "ab",
            "--base",
            "HEAD",
            "--repeat",
            str(STARTS),
            *(["--allow-busy"] if ALLOW_LOAD else []),
        )
        if (
            "something else uses this machine" not in done.stderr.splitlines()[-2:][0]
            or time.monotonic() > deadline
        ):
            return done
        time.sleep(AGAIN_S)


@pytest.mark.parametrize("turn", range(1, RUNS + 1))
@pytest.mark.parametrize("kind", KINDS)
def test_live_runs_never_fail_a_change_within_the_factor_nor_pass_a_larger_change(
    built: Layout, table: list[str], kind: int, turn: int
) -> None:
    began = time.monotonic()
    # The remark makes a tree of its own, and so a comparison of its own.
    with seeded(built, kind, f"live {turn}"):
        done = ab(built)
    row = re.search(rf"^(ok|FAIL|warn) +{METRIC} +(.*)$", done.stderr, re.MULTILINE)
    noise = re.search(r"^\w+ +A/A +\S+: (.*)$", done.stderr, re.MULTILINE)
    facts = (
        f"{kind} %",
        f"run {turn}",
        f"exit {done.returncode}",
        f"{row[1]}: {row[2]}" if row else done.stderr[-400:],
        noise[1] if noise else "",
    )
    with (built.state / "verdict.tsv").open("a") as file:
        file.write(
            "\t".join(
                (*facts, f"{STARTS} starts", f"{(time.monotonic() - began) / 60:.1f} min")
            ).replace("\n", " ")
            + "\n"
        )
    table.append("    ".join(facts))
    assert row, done.stderr
    if kind == KINDS[-1]:
        assert done.returncode in (0, 9), done.stderr
        assert row[1] != "ok", done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert row[1] != "FAIL", done.stderr
