"""Run log: what the console shows and the log file keeps of one run of a verb.

The file appears with the first line written to it, so a verb with nothing to do leaves none.
"""

import datetime
from pathlib import Path
from typing import TextIO

from workspace.core.console import Console, Step
from workspace.core.lock import Held

KEPT_LOGS = 30


class RunLog:
    """Console and log file of one run, a context manager; phases are the titles of steps."""

    def __init__(
        self,
        console: Console,
        folder: Path,
        *,
        verb: str,
        secrets: tuple[str, ...] = (),
        held: Held | None = None,
    ) -> None:
        self.console = console
        self.held = held
        self.step: Step | None = None
        self._folder = folder
        self._verb = verb
        self._secrets = tuple(secret for secret in secrets if secret)
        self._file: TextIO | None = None
        self._phase = ""

    @property
    def path(self) -> Path | None:
        """The log file, or None while nothing was written."""
        return Path(self._file.name) if self._file else None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def phase(self, name: str, step: Step | None = None) -> None:
        """Begin a phase; the log names it before the first line that follows."""
        self._phase, self.step = name, step
        if self.held:
            self.held.note(name)

    def command(self, text: str) -> None:
        text = self.redact(text)
        self.console.command(text)
        self.write(f"+ {text}")

    def line(self, text: str) -> None:
        """Log an output line of a command and show it beside the spinner."""
        self.write(text)
        if self.step:
            self.step.line(self.redact(text))

    def write(self, text: str) -> None:
        """Write one line to the log, secrets masked."""
        file = self._opened()
        if self._phase:
            print(f"== {self._phase} · {_now()}", file=file)
            self._phase = ""
        print(self.redact(text), file=file, flush=True)

    def redact(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "****")
        return text

    def _opened(self) -> TextIO:
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for old in sorted(self._folder.glob("*.log"))[: -KEPT_LOGS + 1]:
                old.unlink(missing_ok=True)
            stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
            self._file = (self._folder / f"{stamp}-{self._verb}.log").open(
                "w", encoding="utf-8", errors="backslashreplace"
            )
        return self._file


def _now() -> str:
    return datetime.datetime.now().isoformat(timespec="seconds")
