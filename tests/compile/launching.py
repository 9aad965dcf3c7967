"""Shared by tests of job tokens: a folder with a compiler that logs its start and end, and real
launchers and ninjas in it.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from workspace.compile import job_server
from workspace.compile.costs import Costs, History
from workspace.compile.scheduler import Admission, Bounds

ROOT = Path(__file__).resolve().parents[2]
PLAIN = {"PATH": os.environ["PATH"]}
NINJA = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


class Site:
    """A build folder: sources, a compiler that logs its start and end, and the processes started so
    far.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server_folder = folder / job_server.FOLDER
        (folder / "CMakeFiles" / "t.dir").mkdir(parents=True)
        self.compiler("echo compiled")
        self.started: list[subprocess.Popen[str]] = []

    def compiler(self, script: str, *, writes_output: bool = True) -> None:
        """Write the compiler's script. $5 is the output; `gate` makes it wait until the test opens
        the gate.
        """
        output = ': > "$5"; echo "$5: $2" > "$5.d"' if writes_output else ""
        text = (
            '#!/bin/sh\ngate() { read -r line < gate || :; }\necho "+ $5 $$" >>'
            f' log\n{script}\nstatus=$?\necho "- $5 $$" >> log\n{output}\nexit $status\n'
        )
        (self.folder / "compiler").write_text(text)
        (self.folder / "compiler").chmod(0o755)
        if not (self.folder / "gate").exists():
            os.mkfifo(self.folder / "gate")

    def launch(self, name: str, *, argv: list[str] | None = None) -> "subprocess.Popen[str]":
        """Start a launcher, in a group of its own as ninja does."""
        command = [
            str(self.server_folder / job_server.LAUNCHER),
            *(
                argv
                or [
                    "./compiler",
                    "-c",
                    f"{name}.cu",
                    f"{name}.o",
                    "-o",
                    f"CMakeFiles/t.dir/{name}.cu.o",
                ]
            ),
        ]
        child = subprocess.Popen(
            command,
            cwd=self.folder,
            env=PLAIN,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )
        self.started.append(child)
        return child

    def write_build(self, names: list[str], *, has_deps: bool = False) -> None:
        lines = [
            "rule compile",
            (
                f"  command = {shlex.quote(str(self.server_folder / job_server.LAUNCHER))}"
                " ./compiler -c $in $out -o $out"
            ),
        ]
        if has_deps:
            lines += ["  depfile = $out.d", "  deps = gcc"]
        for name in names:
            (self.folder / f"{name}.cu").touch()
            lines.append(f"build CMakeFiles/t.dir/{name}.cu.o: compile {name}.cu")
        lines.append(
            "build all: phony " + " ".join(f"CMakeFiles/t.dir/{name}.cu.o" for name in names)
        )
        (self.folder / "build.ninja").write_text("\n".join(lines) + "\n")

    def ninja(
        self, names: list[str], *flags: str, has_deps: bool = False
    ) -> "subprocess.Popen[str]":
        self.write_build(names, has_deps=has_deps)
        assert NINJA is not None
        argv = [NINJA, "-j100", *flags]
        child = subprocess.Popen(
            argv,
            cwd=self.folder,
            env=PLAIN,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )
        self.started.append(child)
        return child

    @property
    def log(self) -> list[str]:
        return self.text("log").splitlines()

    def text(self, name: str) -> str:
        """Return the content of a file, empty if it does not exist."""
        return (self.folder / name).read_text() if (self.folder / name).exists() else ""

    def running(self) -> list[int]:
        """Return the pids of the compilers that have started and still live."""
        pids = [int(line.split()[2]) for line in self.log if line.startswith("+")]
        return [pid for pid in pids if pid in job_server.living()]

    def most(self) -> int:
        """Return the most compilers that ran at any time, by their own log."""
        now = most = 0
        for line in self.log:
            now += 1 if line.startswith("+") else -1
            most = max(most, now)
        return most

    def open_gate(self) -> None:
        """Let one compiler pass the gate, or wait until one arrives there."""
        with (self.folder / "gate").open("w") as gate:
            gate.write("\n")

    def end(self) -> None:
        for child in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()


def start_job_server(
    site: Site,
    *,
    jobs: int = 4,
    budget_gib: float = 1000.0,
    units: int = 1,
    memory: job_server.MemoryWatch | None = None,
    history: History | None = None,
) -> job_server.JobServer:
    """Return a job server in the folder of `site`, to be entered."""
    return job_server.JobServer(
        site.server_folder,
        Admission(Bounds(jobs, budget_gib)),
        Costs([]),
        units=units,
        memory=memory,
        history=history,
    )


def until(condition: Callable[[], object], *, timeout_s: float = 10.0) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never became true"
        time.sleep(0.01)


def command_of(pid: int) -> str:
    """Return the path of the launcher in a process's command line, empty if there is none."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return next(
        (
            os.fsdecode(argument)
            for argument in command
            if b"/" in argument and job_server.FOLDER.encode() in argument
        ),
        "",
    )
