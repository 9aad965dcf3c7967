"""The warm `inv` from the tests' side, and what must be true of however it ends."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.fuzz.warm import HANGS
from tests.small.world import Ended, World
from workspace.core.errors import ERRORS, INTERRUPTED_EXIT_CODE

CODES = {0, 2, INTERRUPTED_EXIT_CODE, 143, *(error.exit_code for error in ERRORS)}
TIMEOUT_S = 20.0


class WarmInv:
    """Runs `inv ARGS` in the clone of a world, some milliseconds each."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self._out, self._err = folder / "out", folder / "err"
        for file in (self._out, self._err):
            file.touch()
        argv = [
            sys.executable,
            "-Es",
            "-B",
            str(Path(__file__).with_name("warm.py")),
            str(world.root),
        ]
        self._warm = subprocess.Popen(
            argv, env=world.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._answer() == "ready"

    def __call__(
        self,
        *args: str,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        tty: bool = False,
        encoding: str = "utf-8",
    ) -> Ended:
        """Run to the end. `env` is added to the world's; None takes a name out."""
        for file in (self._out, self._err):
            file.write_bytes(b"")
        context = {
            name: text
            for name, text in {**self.world.env, **(env or {})}.items()
            if text is not None
        }
        request = {
            "args": args,
            "env": context,
            "cwd": str(cwd or self.world.folder),
            "tty": tty,
            "encoding": encoding,
        }
        request |= {"out": str(self._out), "err": str(self._err), "timeout_s": TIMEOUT_S}
        assert self._warm.stdin is not None
        print(json.dumps(request), file=self._warm.stdin, flush=True)
        code = self._answer()
        out, err = (
            file.read_bytes().decode(encoding, errors="backslashreplace")
            for file in (self._out, self._err)
        )
        assert code != HANGS, f"inv {args} hangs\n{err}"
        return Ended(int(code), out, err)

    def _answer(self) -> str | int:
        assert self._warm.stdout is not None
        answer: str | int = json.loads(self._warm.stdout.readline())
        return answer

    def close(self) -> None:
        self._warm.communicate()


def is_decent(ended: Ended, *, secrets: Sequence[str] = ()) -> None:
    """No traceback, a code of the table, for an error one sentence and a way on; and no secret
    anywhere.
    """
    assert "Traceback (most recent call last)" not in ended.err, ended.output
    assert ended.code in CODES, ended.output
    lines = ended.err.splitlines()
    if ended.code not in (0, INTERRUPTED_EXIT_CODE, 143):
        sentences = [line for line in lines if line.startswith("error: ")]
        assert len(sentences) == 1, ended.output
        assert len(sentences[0]) > len("error: "), ended.output
        assert any(line.startswith("hint: ") and len(line) > len("hint: ") for line in lines), (
            ended.output
        )
    for secret in secrets:
        assert secret not in ended.out + ended.err, ended.output
