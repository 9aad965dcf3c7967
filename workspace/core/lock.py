"""One lock for everything that writes.

The kernel releases a flock when its holder dies, so a dead holder's lock is no lock.
"""

import contextlib
import datetime
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from workspace.core.errors import LockError, ToolchainError

POLL_S = 0.2


@dataclass(frozen=True)
class Held:
    """The lock while it is held. Whoever inherits `descriptor` keeps it held; `note` says what the
    holder is doing.
    """

    descriptor: int
    note: Callable[[str], None]


@contextlib.contextmanager
def hold(
    path: Path, *, verb: str, wait: bool = False, on_wait: Callable[[str], None] | None = None
) -> Iterator[Held]:
    """Hold the workspace's lock for the duration of the block. `verb` is what was typed, such as
    `inv bootstrap`.

    Raises LockError, saying who holds it, since when and doing what, unless `wait` is set;
    `on_wait` then gets that sentence once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise ToolchainError(
            f"{path} is not a regular file, so it cannot be the lock",
            hint=f"ls -ld {path}    shows what it is",
        )
    # Python opens files close-on-exec: only a guard keeps the lock alive, until it has ended what a
    # killed verb began.
    with path.open("a+", encoding="utf-8") as file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                sentence = _holder(file.name)
                if not wait:
                    # A verb that can wait has somebody to tell that it does.
                    raise LockError(
                        sentence,
                        hint=f"wait for it{', or run the command with --wait' if on_wait else ''}",
                    ) from None
                if on_wait and not told:
                    on_wait(f"waiting: {sentence}")
                    told = True
                time.sleep(POLL_S)
        record = {
            "pid": str(os.getpid()),
            "verb": verb,
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }

        def note(doing: str) -> None:
            # One write: a reader sees the old or the new record, or none, and never a mixture.
            text = json.dumps({**record, "doing": doing})
            file.truncate(0)
            file.write(text)
            file.flush()

        note("")
        try:
            yield Held(file.fileno(), note)
        finally:
            file.truncate(0)


def _holder(name: str) -> str:
    try:
        record = json.loads(Path(name).read_text(encoding="utf-8"))
        doing = f", now {record['doing']}" if record["doing"] else ""
        return (
            f"{record['verb']} (process {record['pid']}) has been changing this workspace since"
            f" {record['since']}{doing}"
        )
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        return "another process is changing this workspace"
