"""The warm `inv` as property tests call it, and what must be true of however it ends."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.small.processes import CommandLine
from tests.small.world import Ended, World
from workspace.core.errors import ERRORS, INTERRUPTED_EXIT_CODE

CODES = {0, 2, INTERRUPTED_EXIT_CODE, 143, *(error.exit_code for error in ERRORS)}
TIMEOUT_S = 20.0


class WarmInv:
    """Runs `inv ARGS` in the clone of a world, some milliseconds each."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __call__(
        self,
        *args: str,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        tty: bool = False,
        encoding: str = "utf-8",
    ) -> Ended:
        """Run to the end, and raise TimeoutExpired where there is none. `env` is added to the
        world's; None takes a name out.
        """
        context = {**self.world.env, **(env or {})}
        line = CommandLine(
            self.world.root,
            args,
            {name: text for name, text in context.items() if text is not None},
            cwd or self.world.folder,
            tty=tty,
            encoding=encoding,
            bounded=True,
        )
        return Ended(*self.world.materials.warm.run(line, timeout_s=TIMEOUT_S))


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
