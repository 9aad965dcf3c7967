"""One start of a server under the load of vLLM's own client; a stand-in plays both."""

import os
import sys
from pathlib import Path

import pytest

from tests.small.materials import ROOT
from workspace.bench import measure
from workspace.bench.subject import Workload
from workspace.core.console import Console, RunLog
from workspace.core.errors import ServeError, WorkspaceError
from workspace.core.paths import Layout
from workspace.server import observation

# It plays `vllm serve MODEL --port=N` and `vllm bench serve --max-concurrency=N …`; MODEL names the
# outcome.
VLLM = f"""#!{sys.executable} -S
import json, os, signal, sys
argv = sys.argv[1:]
flags = dict(flag.lstrip("-").partition("=")[::2] for flag in argv if flag.startswith("--"))
home = os.path.dirname(__file__)
if argv[0] == "serve":
    with open(home + "/starts", "a") as file:
        file.write(str(os.getpid()) + " ")
    python, standin = {sys.executable!r}, {str(ROOT / "tests" / "server" / "standin.py")!r}
    os.execv(python, [python, "-S", standin, flags["port"], "plain"])
at = int(flags["max-concurrency"])
if flags["model"] == "dies":
    os.kill(int(open(home + "/starts").read().split()[-1]), signal.SIGKILL)
    sys.exit("Initial test run failed - please make sure the server is up")
if flags["model"] == "breaks":
    sys.exit("a client that fails by itself")
done = 0 if flags["model"] == "empty" else 2
result = {{
    "completed": done, "failed": 2 - done, "request_throughput": 1.0 * at,
    "output_throughput": 9.0, "ttfts": [0.1, 0.2], "itls": [[0.01], [0.03]],
}}
with open(os.path.join(flags["result-dir"], flags["result-filename"]), "w") as file:
    json.dump(result, file)
"""


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path)
    program = made.environment / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.write_text(VLLM)
    program.chmod(0o755)
    return made


def measured(layout: Layout, model: str, *concurrencies: int) -> dict[str, tuple[float, ...]]:
    work = Workload("serve", model, model, (), (), {}, {}, concurrencies)
    folder = layout.root / "neutral"
    folder.mkdir()
    with RunLog(Console(), layout.logs, verb="bench", secrets=()) as run_log:
        return measure.measure_server(
            layout,
            work,
            {"PATH": os.environ["PATH"]},
            folder,
            run_log=run_log,
            look=lambda line: None,
        )


def starts(layout: Layout) -> list[int]:
    return [int(pid) for pid in (layout.environment / "bin" / "starts").read_text().split()]


def require_nothing_left(layout: Layout) -> None:
    assert observation.find(layout.state / "bench") is None
    assert [pid for pid in starts(layout) if Path(f"/proc/{pid}").exists()] == []


def test_all_loads_run_on_one_start_and_have_metrics_of_their_own(layout: Layout) -> None:
    found = measured(layout, "plain", 1, 4)
    assert (found["request_throughput@1"], found["request_throughput@4"]) == ((1.0,), (4.0,))
    assert found["ttft@4"] == (100.0, 200.0)
    assert len(starts(layout)) == 1
    require_nothing_left(layout)


def test_metric_of_a_single_load_has_no_concurrency_in_its_name(layout: Layout) -> None:
    assert measured(layout, "plain", 8)["ttft"] == (100.0, 200.0)


@pytest.mark.parametrize(
    ("model", "kind", "output"),
    [
        ("empty", WorkspaceError, "no request was completed, 2 failed"),
        ("dies", ServeError, r"^the server \S+ \([^)]*\) was killed \(SIGKILL\)$"),
        ("breaks", ServeError, "exit"),
    ],
)
def test_load_that_measures_nothing_fails_clearly_and_leaves_no_server(
    layout: Layout, model: str, kind: type[WorkspaceError], output: str
) -> None:
    with pytest.raises(kind, match=output):
        measured(layout, model, 2)
    require_nothing_left(layout)
