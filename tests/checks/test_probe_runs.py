"""Probes that share one import or run by themselves, and stacks of real processes that hang, in
Python and out of it.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from workspace.checks import probe_runs
from workspace.checks.probe_runs import Program, SharedImport
from workspace.core.paths import here
from workspace.core.process import Completed
from workspace.machine.gpu import Memory
from workspace.machine.hardware import Host
from workspace.server import lifecycle, process_tree

HANGS = """
import os, threading, time
def deep(): time.sleep(600)
if os.fork() == 0: deep()
threading.Thread(target=deep).start()
open(os.sys.argv[1], "w").write(str(os.getpid()))
threading.Lock().acquire(); os.waitpid(-1, 0)
"""
LOG = """a log line
Timeout (0:00:01)!
Thread 0x00007f01 (most recent call first):
  File "/x/a.py", line 3 in deep
  ...

Current thread 0x00007f02 [MainThread] (most recent call first):
  <no Python frame>

Extension modules: numpy (total: 1)
  File "/x/b.py", line 4 in none_of_ours
"""


def hanging(folder: Path, environment: dict[str, str]) -> "subprocess.Popen[str]":
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", HANGS, str(folder / "up")],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    deadline = time.monotonic() + 20
    while not (folder / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return child


def processes(child: "subprocess.Popen[str]") -> set[int]:
    return {child.pid} | process_tree.below({child.pid}, process_tree.living())


def test_every_thread_of_every_process_is_dumped_and_no_process_is_left(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "PYTHONFAULTHANDLER": "1"}
    with hanging(tmp_path, environment) as child:
        with probe_runs.Watch(0.05, lambda: processes(child)) as watch:
            output = child.communicate(timeout=20)[1]
        stacks = probe_runs.read_stacks(output)
    assert watch.has_fired
    assert output.count("Fatal Python error: Aborted") == 2
    assert sum("in deep" in line for line in stacks) == 2
    assert sum("thread 0x" in line.lower() for line in stacks) == 3
    assert not processes(child) & process_tree.living().keys()


def test_process_that_ignores_it_is_killed_and_one_that_is_gone_is_no_error(tmp_path: Path) -> None:
    with hanging(tmp_path, {"PATH": str(tmp_path)}) as child:
        lifecycle.end_with_stacks(lambda: processes(child) | {2**22 - 1})
        assert probe_runs.read_stacks(child.communicate(timeout=20)[1]) == ()


def test_watch_that_was_not_needed_leaves_no_thread() -> None:
    before = threading.active_count()
    with probe_runs.Watch(60.0, set) as watch:
        pass
    assert not watch.has_fired
    assert threading.active_count() == before


def test_only_faulthandlers_lines_are_read_out_of_a_log() -> None:
    assert probe_runs.read_stacks(LOG) == (
        "Timeout (0:00:01)!",
        "Thread 0x00007f01 (most recent call first):",
        '  File "/x/a.py", line 3 in deep',
        "  ...",
        "Current thread 0x00007f02 [MainThread] (most recent call first):",
        "  <no Python frame>",
    )
    assert not probe_runs.is_part("RuntimeError: the reason")
    assert probe_runs.is_part("Extension modules: numpy (total: 1)")


class Built:
    """A stand-in for the built environment: a vLLM that notes each import of it."""

    def __init__(self, folder: Path, code: str = "") -> None:
        self.folder = folder / "neutral"
        self.folder.mkdir()
        self._imports = folder / "imports"
        self._imports.write_text("")
        package = folder / "packages" / "vllm" / "entrypoints"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "llm.py").touch()
        (package.parent / "__init__.py").write_text(
            f"open({str(self._imports)!r}, 'a').write('x')\n{code}\n"
        )
        self._environment = {
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(folder / "packages"),
            "PYTHONFAULTHANDLER": "1",
        }

    @property
    def imports(self) -> int:
        return len(self._imports.read_text())

    def program(self, code: str, patience_s: float = 60.0) -> Program:
        file = self.folder / f"probe{len(list(self.folder.iterdir()))}.py"
        file.write_text(code)
        return Program((sys.executable, str(file)), self._environment, self.folder, patience_s)

    def share(self, patience_s: float = 60.0) -> SharedImport:
        probe, place = here().probes / "imports.py", self.folder / "socket"
        argv = (sys.executable, str(probe), "share", str(place))
        return SharedImport(Program(argv, self._environment, self.folder, patience_s))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    probe_runs.end_all()


ANSWERS = """import json, sys, vllm.entrypoints.llm
print(json.dumps({"error": None, "argv": sys.argv[1:], "name": __name__}))
"""


def test_probes_side_by_side_share_one_import_and_a_crash_is_that_probes_own(
    tmp_path: Path,
) -> None:
    built = Built(tmp_path)
    shared = built.share()
    crash = f"{ANSWERS}\nimport os; sys.stdout.flush(); os.kill(os.getpid(), 11)"
    programs = [built.program(code) for code in (ANSWERS, crash, ANSWERS)]
    with ThreadPoolExecutor(3) as pool:
        first, died, last = pool.map(lambda program: probe_runs.ask(program, shared), programs)
    for answer in (first, last):
        assert (answer.problem, answer.record["name"]) == (None, "__main__")
    assert "killed by SIGSEGV" in (died.problem or "")
    assert any("Segmentation fault" in line for line in died.stacks)
    assert built.imports == 1


@pytest.mark.parametrize("code", ["raise ImportError('no such symbol')", "import os; os.abort()"])
def test_probe_runs_by_itself_where_the_shared_import_fails(tmp_path: Path, code: str) -> None:
    built = Built(tmp_path, code)
    shared = built.share()
    fine = built.program("print('{\"error\": null}')")
    assert probe_runs.ask(fine, shared).record == {"error": None}
    own = probe_runs.ask(built.program(ANSWERS), shared)
    assert ("no such symbol" if "raise" in code else "killed by SIGABRT") in (own.problem or "")


def test_import_that_hangs_is_ended_and_the_probe_reports_it_with_its_stacks(
    tmp_path: Path,
) -> None:
    built = Built(tmp_path, "import time; time.sleep(600)")
    shared = built.share(patience_s=1.0)
    answer = probe_runs.ask(built.program(ANSWERS, patience_s=2.0), shared)
    assert "gave no answer in 2 s" in (answer.problem or "")
    assert any("vllm/__init__.py" in line for line in answer.stacks)


def test_hang_of_a_forked_probe_is_ended_and_its_neighbour_goes_on(tmp_path: Path) -> None:
    built = Built(tmp_path)
    shared = built.share()
    hang = built.program("import os, time; os.fork(); time.sleep(600)", patience_s=2.0)
    slow = built.program(f"import time; time.sleep(3)\n{ANSWERS}")
    with ThreadPoolExecutor(2) as pool:
        hung, fine = pool.map(lambda program: probe_runs.ask(program, shared), (hang, slow))
    assert "gave no answer in 2 s" in (hung.problem or "")
    assert sum(hang.name in line for line in hung.stacks) == 2
    assert (fine.problem, built.imports) == (None, 1)


def test_exit_status_and_messages_of_a_forked_probe_are_its_own(tmp_path: Path) -> None:
    built = Built(tmp_path)
    shared = built.share()
    probe = built.program("import sys; print('why', file=sys.stderr); sys.exit('the last line')")
    answer = probe_runs.ask(probe, shared)
    assert answer.problem == "the probe exited with 1: the last line"
    folder = built.program("import json, os; print(json.dumps({'error': None, 'at': os.getcwd()}))")
    assert probe_runs.ask(folder, shared).record["at"] == str(built.folder)


def test_cause_of_a_probe_is_judged_as_that_of_a_server(tmp_path: Path) -> None:
    """The engine reports the cause; what follows from it is last."""
    log = (Path(__file__).parents[1] / "machine" / "logs" / "bench-kv.log").read_text()
    _, failure = probe_runs.read(Completed(1, "", log))
    assert (failure or "").startswith(
        "the probe exited with 1: less memory is free than the KV cache is to take: ValueError:"
    )
    assert probe_runs.read(Completed(-9, "", ""))[1] == ("the probe was killed (SIGKILL)")


def test_memory_and_cores_limit_how_many_probes_run_at_once() -> None:
    def lanes(cores: int, available_gib: float) -> int:
        return probe_runs.lanes(Host("aarch64", cores, 119.0, available_gib))

    assert [lanes(20, 100.0), lanes(2, 20.0), lanes(20, 5.0), lanes(1, 100.0)] == [4, 2, 1, 1]
    assert lanes(20, 0.5) == 1
    # A discrete GPU has less than the machine.
    host = Host("x86_64", 20, 119.0, 100.0)
    assert [probe_runs.lanes(host, Memory(24.0, free)) for free in (23.0, 9.0, 1.0)] == [4, 2, 1]
    assert probe_runs.lanes(host, None) == 4


COMPILERS = {
    "triton": """class knobs:
    class compilation:
        listener = None
""",
    "torch/_dynamo/callback": """START, END = [], []
on_compile_start, on_compile_end = START.append, END.append
""",
}
COMPILES = """import os
if os.fork() == 0:
    from types import SimpleNamespace as N
    from triton import knobs
    for is_hit in (True, False):
        knobs.compilation.listener(src=None, times=N(total=2_500_000), cache_hit=is_hit)
    import subprocess
    subprocess.run(["./ninja", "0.3"])
    subprocess.run(["sleep", "0.3"])
    os.kill(os.getpid(), 9)
os.wait()
print('{"error": null}')
"""


def test_seconds_of_compilers_are_counted_apart_even_in_a_child_that_is_killed(
    tmp_path: Path,
) -> None:
    built = Built(tmp_path)
    for name, code in COMPILERS.items():
        file = tmp_path / "packages" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        for folder in file.parents[: len(Path(name).parts) - 1]:
            (folder / "__init__.py").touch()
        file.write_text(code)
    (built.folder / "ninja").symlink_to("/bin/sleep")
    answer = probe_runs.ask(built.program(COMPILES), built.share())
    assert answer.problem is None
    assert set(answer.compilers) == {"Triton", "FlashInfer"}
    assert answer.compilers["Triton"] == 2.5
    assert answer.compilers["FlashInfer"] >= 0.3
    again = probe_runs.ask(built.program("print('{}')"), built.share())
    assert probe_runs.compilation([answer, answer, again])["Triton"] == 5.0


def test_wait_names_each_probe_with_its_models_and_the_seconds_of_last_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.5, 0.5))
    record = tmp_path / "smoke.json"
    assert probe_runs.Running(record).text("parity.llama") == ""
    record.write_text('{"schema": 2, "parity": {"llama": {}, "steps": {"parity.llama": 41.4}}}')
    running = probe_runs.Running(record)
    llama, both = ("--model=llama=/m/a",), ("--model=llama=/m/a", "--model=qwen3=/m/b")
    with running.noted("reference.py", both), running.noted("parity.py", llama):
        shown = running.text("parity.llama")
    assert shown == "last time 41 s; Hugging Face llama qwen3 0 s; vLLM llama 0 s"
    assert running.text("kernels.norm") == ""
    with running.timed("kernels.norm"):
        pass
    assert running.steps["kernels.norm"] < 41


def test_wait_says_that_the_machine_is_busy_where_others_load_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, load = probe_runs.Running(tmp_path / "smoke.json"), [4.5]
    monkeypatch.setattr(os, "getloadavg", lambda: (load[0], 0.0, 0.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    busy = "the machine is busy, load {} on 2 cores; "
    with running.noted("parity.py", ()):
        assert running.text("parity.llama") == busy.format(4) + "vLLM 0 s"
        # The threads of two probes are the smoke's own.
        with running.noted("reference.py", ()):
            assert running.text("parity.llama") == "vLLM 0 s; Hugging Face 0 s"
            load[0] = 14.2
            assert running.text("parity.llama").startswith(busy.format(14))
