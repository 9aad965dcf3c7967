"""Stacks of real processes that hang, in Python and out of it, beside py-spy and without."""

import subprocess
import sys
import threading
import time
from pathlib import Path

from workspace.checks import stack_dumps
from workspace.server import process_tree

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
        with stack_dumps.Watch(0.05, lambda: processes(child), environment=environment) as watch:
            output = child.communicate(timeout=20)[1]
        stacks = watch.stacks(output)
    assert watch.has_fired
    assert output.count("Fatal Python error: Aborted") == 2
    assert sum("in deep" in line for line in stacks) == 2
    assert sum("thread 0x" in line.lower() for line in stacks) == 3
    assert not processes(child) & process_tree.living().keys()


def test_what_py_spy_sees_counts_and_a_py_spy_that_may_not_look_does_not(tmp_path: Path) -> None:
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONFAULTHANDLER": "1"}
    program = tmp_path / "py-spy"
    for code, expected in ((0, "Thread 7 (idle)"), (1, "Fatal Python error: Aborted")):
        program.write_text(f"#!/bin/sh\necho 'Thread 7 (idle)'; exit {code}\n")
        program.chmod(0o755)
        (tmp_path / "up").unlink(missing_ok=True)
        with hanging(tmp_path, environment) as child:
            with stack_dumps.Watch(
                0.05, lambda child=child: processes(child), environment=environment
            ) as watch:  # type: ignore[misc]
                output = child.communicate(timeout=20)[1]
            assert watch.stacks(output)[0] == expected


def test_process_that_ignores_it_is_killed_and_one_that_is_gone_is_no_error(tmp_path: Path) -> None:
    with hanging(tmp_path, {"PATH": str(tmp_path)}) as child:
        stack_dumps.end_with_stacks(lambda: processes(child) | {2**22 - 1})
        assert stack_dumps.read_stacks(child.communicate(timeout=20)[1]) == ()


def test_watch_that_was_not_needed_leaves_no_thread() -> None:
    before = threading.active_count()
    with stack_dumps.Watch(60.0, set, environment={}) as watch:
        pass
    assert (watch.has_fired, watch.stacks("")) == (False, ())
    assert threading.active_count() == before


def test_only_faulthandlers_lines_are_read_out_of_a_log() -> None:
    assert stack_dumps.read_stacks(LOG) == (
        "Timeout (0:00:01)!",
        "Thread 0x00007f01 (most recent call first):",
        '  File "/x/a.py", line 3 in deep',
        "  ...",
        "Current thread 0x00007f02 [MainThread] (most recent call first):",
        "  <no Python frame>",
    )
    assert not stack_dumps.is_part("RuntimeError: the reason")
    assert stack_dumps.is_part("Extension modules: numpy (total: 1)")
