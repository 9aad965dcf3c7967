"""Command lines of the library in a warm interpreter: a real process for each, without its
imports.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.small.warm import HANGS


@dataclass(frozen=True)
class CommandLine:
    """What a warm interpreter is to run, and where.

    `root` is the clone, `bounded` is whether its memory is.
    """

    root: Path
    args: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    is_session: bool = False
    tty: bool = False
    encoding: str = "utf-8"
    bounded: bool = False


@dataclass
class Warm:
    """The interpreter that has the library of `root` loaded; it starts when it is first used."""

    root: Path
    folder: Path
    process: "subprocess.Popen[str] | None" = field(default=None, compare=False)

    def run(self, line: CommandLine, *, timeout_s: float) -> tuple[int, str, str]:
        """Run to the end; return exit code as a shell counts it, stdout and stderr.

        Raises TimeoutExpired, after the process was killed.
        """
        out, err = self.folder / "warm-out", self.folder / "warm-err"
        for file in (out, err):
            # A server that the former command line left may still write into its own.
            file.unlink(missing_ok=True)
            file.touch()
        request = {
            **{name: getattr(line, name) for name in ("args", "is_session", "tty", "encoding")},
            **{name: str(getattr(line, name)) for name in ("root", "cwd")},
            "env": dict(line.env),
            "bounded": line.bounded,
            "timeout_s": timeout_s,
            "out": str(out),
            "err": str(err),
        }
        code = self._answer(request)
        output, talk = (
            file.read_bytes().decode(line.encoding, errors="backslashreplace")
            for file in (out, err)
        )
        if code == HANGS:
            raise subprocess.TimeoutExpired(["inv", *line.args], timeout_s, output, talk)
        return int(code), output, talk

    def close(self) -> None:
        if self.process:
            self.process.communicate()
            self.process = None

    def _answer(self, request: Mapping[str, object]) -> int | str:
        if not self.process:
            program = Path(__file__).with_name("warm.py")
            self.process = subprocess.Popen(
                [sys.executable, "-Es", "-B", str(program), str(self.root)],
                env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert self._read() == "ready"
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> int | str:
        assert self.process is not None
        assert self.process.stdout is not None
        answer: int | str = json.loads(self.process.stdout.readline())
        return answer
