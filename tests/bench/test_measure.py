"""`nox -s bench` on a small bootstrapped clone with a stand-in for vLLM: records, interruptions
and refusals.
"""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.small.world import Ended, World

LOGS = Path(__file__).parents[1] / "machine" / "logs"
SECRET = "hf_swordfish42"
# A vllm that measures or fails as FAKE_MANNER requests.
PROGRAM = """#!@PYTHON@ -Es
import json, os, sys, time
flags = dict(flag.partition("=")[::2] for flag in sys.argv[1:])
manner = os.environ.get("FAKE_MANNER", "")
folder = os.path.dirname(os.path.abspath(__file__))
with open(folder + "/calls", "a") as calls:
    calls.write("x")
count = os.path.getsize(folder + "/calls")
print("INFO 11-20 10:00:00 [cpu.py:100] Using Torch SDPA backend.")
if manner == "no model" or manner == "dies" and count > 2:
    sys.exit("ValueError: Unrecognized model in /nowhere")
if manner.endswith(".log"):
    print(open(manner).read())
    sys.exit(1)
if manner == "hangs" and count > 2:
    open(folder + "/hangs", "w").close()
    time.sleep(60)
middle = 0.5 * count if manner == "differs" else 0.5 + count / 1000
result = {"latencies": [] if manner == "nothing" else [middle, 0.1 + middle, middle - 0.1]}
with open(flags["--output-json"], "w") as file:
    json.dump(result, file)
"""


def place_vllm(built: World) -> None:
    """Put the stand-in, a model and no records into a built world."""
    program = built.layout.environment / "bin" / "vllm"
    program.unlink(missing_ok=True)
    program.write_text(PROGRAM.replace("@PYTHON@", sys.executable))
    program.chmod(0o755)
    (built.folder / "model").mkdir(exist_ok=True)
    for name in ("calls", "hangs"):
        (program.parent / name).unlink(missing_ok=True)
    shutil.rmtree(built.layout.results, ignore_errors=True)


@pytest.fixture
def measured(built: World) -> World:
    place_vllm(built)
    return built


def argv(world: World, *args: str) -> list[str]:
    return [sys.executable, "-Es", "-B", "-m", "workspace.cli.sessions", "bench", *args]


def bench(world: World, *args: str, env: Mapping[str, str] | None = None) -> Ended:
    model = ["--model", str(world.folder / "model")]
    before, after = (
        (args[: args.index("--")], args[args.index("--") :]) if "--" in args else (args, ())
    )
    return world.session("bench", *before, *model, *after, env=env)


def hinted(ended: Ended) -> list[str]:
    """Return the words of the command that a run ends with."""
    *_, last = ended.err.splitlines()
    return shlex.split(last.partition("hint: ")[2].partition("    ")[0])


def records_of(world: World) -> list[Path]:
    return list(world.layout.results.glob("*/*.json"))


def only(world: World) -> dict[str, Any]:
    (path,) = records_of(world)
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def test_path_for_vllm_means_the_folder_in_which_it_was_typed(measured: World) -> None:
    ended = bench(measured, "--repeat", "1", "--", "--tokenizer=./own", "--load-format", "dummy")
    assert ended.code == 0, ended.output
    flags = only(measured)["flags"]
    assert [flag for flag in flags if flag.endswith("/own") and flag != "--tokenizer=./own"]
    assert str(measured.folder) not in " ".join(flags)


def test_record_holds_samples_software_and_sources_and_nothing_private(measured: World) -> None:
    ended = bench(
        measured,
        "--repeat",
        "2",
        "--label",
        "first",
        "--",
        "--enforce-eager",
        env={"HF_TOKEN": SECRET, "OMP_NUM_THREADS": "1"},
    )
    assert ended.code == 0, ended.output
    path = Path(ended.out.strip())
    document = only(measured)
    assert (
        path
        == measured.layout.results
        / document["machine"]["name"]
        / f"{document['source']['tree'][:12]}-first.json"
    )
    assert [len(start["samples"]["latency"]) for start in document["starts"]] == [3, 3]
    assert document["backends"] == ["Using Torch SDPA backend"]
    assert document["flags"][0] == "--enforce-eager"
    assert document["environment"]["OMP_NUM_THREADS"] == "1"
    assert document["software"]["torch"]
    assert document["source"]["patches"]
    assert document["source"]["libraries"]
    text = path.read_text()
    assert SECRET not in text
    assert str(measured.folder) not in text


def test_bench_ends_with_median_and_spread_and_each_next_command_leads_on(measured: World) -> None:
    ended = bench(measured, "--repeat", "2")
    assert "latency       median 0.5015 s ± 0.1%, 0.501 to 0.502 in 2 starts" in ended.err
    assert hinted(ended)[:4] == ["./scripts/nox", "-s", "bench", "--"]
    assert hinted(ended)[-2:] == ["--repeat", "6"]
    more = bench(measured, *hinted(ended)[4:])
    assert more.code == 0, more.output
    assert len(only(measured)["starts"]) == 6
    after = bench(measured, *hinted(more)[4:])
    assert after.code == 0, after.output
    assert hinted(after) == ["./scripts/inv", "bench.compare", "latency", "after"]
    compared = measured.run(*hinted(after)[1:])
    assert compared.code == 0, compared.output


def test_starts_that_differ_too_much_are_warned_of_and_more_are_advised(measured: World) -> None:
    ended = bench(measured, "--repeat", "6", env={"FAKE_MANNER": "differs"})
    assert ended.code == 0, ended.output
    (row,) = (line for line in ended.err.splitlines() if " in 6 starts" in line)
    assert row.startswith("warn     latency")
    assert " noisy, 0.5 to 3 in 6 starts" in row
    assert hinted(ended)[-2:] == ["--repeat", "12"]


def test_label_is_given_afterwards_and_an_invalid_one_has_a_hint(measured: World) -> None:
    assert bench(measured, "--repeat", "1").code == 0
    refused = measured.run("bench.label", "latency", "../before")
    assert "'../before' is no label" in refused.error(2)
    done = measured.run(*hinted(refused)[1:])
    assert done.code == 0, done.output
    assert only(measured)["label"] == "before"
    (path,) = measured.layout.results.glob("*/*.json")
    assert path.name.endswith("-before.json")


def test_bench_that_dies_keeps_its_starts_and_resumes(measured: World) -> None:
    ended = bench(measured, "--repeat", "3", env={"FAKE_MANNER": "dies"})
    assert "Unrecognized model" in ended.error(1)
    assert "keeps 2 of 3 starts" in ended.err
    times = [start["time"] for start in only(measured)["starts"]]
    assert len(times) == 2
    ended = bench(measured, "--repeat", "3")
    assert ended.code == 0, ended.output
    assert "has 2 starts; resuming" in ended.err
    assert [start["time"] for start in only(measured)["starts"]][:2] == times
    assert len(only(measured)["starts"]) == 3


def test_interrupted_bench_leaves_no_process_and_a_record_to_resume(measured: World) -> None:
    hangs = measured.layout.environment / "bin" / "hangs"
    child = subprocess.Popen(
        argv(measured, "--repeat", "4", "--model", str(measured.folder / "model")),
        cwd=measured.root,
        env=measured.env | {"FAKE_MANNER": "hangs"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not hangs.exists():
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130, err
    assert "keeps 2 of 4 starts; run the same command again to resume" in err
    assert len(only(measured)["starts"]) == 2


def test_model_that_cannot_be_loaded_fails_clearly_and_leaves_no_record(measured: World) -> None:
    ended = bench(measured, env={"FAKE_MANNER": "no model"})
    assert "ValueError: Unrecognized model in /nowhere" in ended.error(1)
    assert list(measured.layout.results.glob("*/*.json")) == []


def test_cause_below_the_errors_of_other_processes_is_named_with_its_command(
    measured: World,
) -> None:
    """The log is that of `vllm bench latency` where the KV cache found no memory; the second one
    differs in the line of the cause, as an engine on a GPU writes it.
    """
    failed = bench(measured, env={"FAKE_MANNER": str(LOGS / "bench-kv.log")})
    assert failed.error(1).startswith(
        "error: vllm bench latency exited with 1: less memory is free than the KV cache is to take:"
        " ValueError: Available memory on node 0 (15.9/23.54 GiB)"
    )
    assert hinted(failed)[0] == "less"
    assert Path(hinted(failed)[1]).is_file()
    on_gpu = re.sub(
        r"Available memory on node 0 .*",
        "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when"
        " initializing the engine.",
        (LOGS / "bench-kv.log").read_text(),
    )
    log = measured.folder / "gpu.log"
    log.write_text(on_gpu)
    failed = bench(measured, env={"FAKE_MANNER": str(log)})
    assert (
        "exited with 1: the weights left no memory for the KV cache: ValueError: No available"
        in (failed.error(1))
    )
    assert hinted(failed) == ["./scripts/inv", "drop-caches"]


def test_hint_of_a_comparison_resumes_the_record_with_too_few_starts(measured: World) -> None:
    """The flags of vLLM and the model are the record's."""
    eager = ("--", "--gpu-memory-utilization=0.2", "--enforce-eager")
    model = str(measured.folder / "model")
    assert bench(measured, "--repeat", "6").code == 0
    assert bench(measured, "--label", "eager", "--repeat", "2", *eager).code == 0
    compared = measured.run("bench.compare", "latency", "eager", "--across", "flags")
    assert "these have 6 and 2" in compared.out
    hint = compared.out.splitlines()[-1].partition("hint: ")[2]
    assert hint.endswith("; FOLDER is that of model without config.json")
    argv = shlex.split(hint.partition("    ")[0].replace("FOLDER", model))
    more = measured.session("bench", *argv[4:])
    assert more.code == 0, more.output
    counts = {path.stem[13:]: json.loads(path.read_text()) for path in records_of(measured)}
    assert {label: len(found["starts"]) for label, found in counts.items()} == {
        "latency": 6,
        "eager": 6,
    }
    again = measured.run("bench.compare", "latency", "eager", "--across", "flags")
    assert "each arm needs" not in again.out


def test_bench_that_measured_nothing_writes_no_record(measured: World) -> None:
    assert "measured nothing: its result file has no measured number" in bench(
        measured, env={"FAKE_MANNER": "nothing"}
    ).error(1)
    assert list(measured.layout.results.glob("*/*.json")) == []


def test_used_label_is_refused_for_a_complete_a_different_and_a_damaged_record(
    measured: World,
) -> None:
    assert bench(measured, "--repeat", "1").code == 0
    assert "already has its 1 start" in bench(measured, "--repeat", "1").error(2)
    assert "was measured with other flags" in bench(
        measured, "--repeat", "2", "--", "--dtype=float32"
    ).error(2)
    (path,) = measured.layout.results.glob("*/*.json")
    half = path.read_bytes()[:400]
    path.write_bytes(half)
    assert "is damaged, and is not overwritten" in bench(measured, "--repeat", "2").error(2)
    assert path.read_bytes() == half


@pytest.mark.parametrize(
    "args",
    [
        ("--repeat", "0"),
        ("--repeat", "x"),
        ("--label", "../x"),
        ("speed",),
        ("--sweep",),
        ("latency", "--", "--output-json=/tmp/x"),
    ],
)
def test_misuse_is_refused_before_anything_runs(measured: World, args: tuple[str, ...]) -> None:
    assert bench(measured, *args).code == 2
    assert not (measured.layout.environment / "bin" / "calls").exists()


def test_unbuilt_tree_is_not_measured(world: World) -> None:
    (world.folder / "model").mkdir()
    assert bench(world).error(8)
