"""What tests of tickets share: a folder with a compiler that tells when it begins and ends, and
real launchers and ninjas in it.
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

from workspace.compile import job_server, jobs
from workspace.compile.costs import Costs
from workspace.compile.scheduler import Admission, Bounds

ROOT = Path(__file__).resolve().parents[2]
PLAIN = {"PATH": os.environ["PATH"]}
NINJA = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


class Site:
    """A build folder: sources that are named, a compiler that tells when it begins and ends, and
    what has run so far.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tickets = folder / "tickets"
        (folder / "CMakeFiles" / "t.dir").mkdir(parents=True)
        self.compiler("echo compiled")
        self.started: list[subprocess.Popen[str]] = []

    def compiler(self, script: str, *, writes_output: bool = True) -> None:
        """What the compiler does. $5 is the output; `gate` holds it until the test opens it."""
        output = ': > "$5"; echo "$5: $2" > "$5.d"' if writes_output else ""
        text = (
            '#!/bin/sh\ngate() { read -r word < gate || :; }\necho "+ $5 $$" >>'
            f' log\n{script}\nstatus=$?\necho "- $5 $$" >> log\n{output}\nexit $status\n'
        )
        (self.folder / "compiler").write_text(text)
        (self.folder / "compiler").chmod(0o755)
        if not (self.folder / "gate").exists():
            os.mkfifo(self.folder / "gate")

    def launch(self, name: str, *, argv: list[str] | None = None) -> "subprocess.Popen[str]":
        """Start one launcher, in a group of its own as ninja does."""
        words = [
            str(self.tickets / "ticket"),
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
            words,
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
                f"  command = {shlex.quote(str(self.tickets / 'ticket'))} ./compiler -c $in $out -o"
                " $out"
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
        self, names: list[str], *words: str, has_deps: bool = False
    ) -> "subprocess.Popen[str]":
        self.write_build(names, has_deps=has_deps)
        assert NINJA is not None
        argv = [NINJA, "-j100", *words]
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
        """What a file holds; nothing where it is not there yet."""
        return (self.folder / name).read_text() if (self.folder / name).exists() else ""

    def running(self) -> list[int]:
        """Numbers of the compilers that have begun and still live."""
        pids = [int(line.split()[2]) for line in self.log if line.startswith("+")]
        return [pid for pid in pids if pid in jobs.living()]

    def most(self) -> int:
        """The most that ran at any time, by their own account."""
        now = most = 0
        for line in self.log:
            now += 1 if line.startswith("+") else -1
            most = max(most, now)
        return most

    def open_gate(self) -> None:
        """Let one compiler on that stands at the gate, or wait until one does."""
        with (self.folder / "gate").open("w") as gate:
            gate.write("\n")

    def end(self) -> None:
        for child in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()


def job_server_(
    site: Site, *, jobs: int = 4, budget_gib: float = 1000.0, units: int = 1, **more
) -> job_server.JobServer:
    return job_server.JobServer(
        site.tickets, Admission(Bounds(jobs, budget_gib)), Costs([]), units=units, **more
    )


def until(what: Callable[[], object], *, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


def command_of(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return next((os.fsdecode(word) for word in words if b"/" in word and b"tickets" in word), "")
