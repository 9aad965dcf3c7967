"""The idle check, with real processes that are not ours: children of a process that has ended."""

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from workspace.bench import measure
from workspace.core import settings
from workspace.core.console import Console
from workspace.core.errors import WorkspaceError
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import gpu


@pytest.fixture
def settings_(tmp_path: Path) -> Settings:
    return settings.load(Layout(tmp_path), environ={"PATH": os.environ["PATH"]})


@pytest.fixture
def orphan(tmp_path: Path) -> Iterator[None]:
    """Start a process that keeps a core busy, with the command line of a server."""
    program = tmp_path / "vllm"
    program.write_text("import signal\nprint(flush=True)\nsignal.alarm(60)\nwhile True: pass\n")
    begin = (
        "child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)"
    )
    code = f"import subprocess, sys; {begin}; child.stdout.readline(); print(child.pid)"
    done = subprocess.run(
        [sys.executable, "-c", code, sys.executable, str(program), "serve"],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    pid = int(done.stdout)
    yield
    os.kill(pid, signal.SIGKILL)


@pytest.mark.usefixtures("orphan")
def test_load_and_servers_of_others_are_named_and_refused_and_may_be_allowed(
    settings_: Settings,
) -> None:
    with pytest.raises(WorkspaceError) as refused:
        measure.require_idle(
            settings_,
            has_gpu=False,
            allow_busy=False,
            console=Console(out=io.StringIO(), err=io.StringIO()),
            wait_s=0,
        )
    assert "cores are busy" in refused.value.message
    # A vLLM of another user may be named first.
    assert re.search(r"vLLM runs as process \d+", refused.value.message)
    assert "--allow-busy" in (refused.value.hint or "")
    measure.require_idle(
        settings_,
        has_gpu=False,
        allow_busy=True,
        console=Console(out=io.StringIO(), err=io.StringIO()),
        wait_s=0,
    )


def test_own_children_are_not_reported(settings_: Settings, tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text("import time\nprint(flush=True)\ntime.sleep(60)\n")
    with subprocess.Popen([sys.executable, str(program), "serve"], stdout=subprocess.PIPE) as ours:
        assert ours.stdout
        ours.stdout.readline()
        found = measure.observe_others(settings_, has_gpu=False, look_s=0.05)
        ours.kill()
    assert not any(str(ours.pid) in phrase for phrase in found)


@pytest.mark.parametrize(
    ("output", "names"),
    [
        ("4711, /usr/bin/python3\n", ("python3 (4711) holds a GPU",)),
        ("", ()),
        ("Failed to initialize NVML\n", ()),
    ],
)
def test_processes_that_the_driver_lists_on_a_gpu_are_named(
    tmp_path: Path, output: str, names: tuple[str, ...]
) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text(f"#!/bin/sh\nprintf '{output}'\n")
    driver.chmod(0o755)
    # Hides the NVML of a machine with a GPU.
    (tmp_path / gpu.LIBRARY).write_text("not a library")
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LD_LIBRARY_PATH": str(tmp_path)}
    loaded = settings.load(Layout(tmp_path), environ=environ)
    assert (
        tuple(
            phrase
            for phrase in measure.observe_others(loaded, has_gpu=True, look_s=0.05)
            if "GPU" in phrase
        )
        == names
    )
