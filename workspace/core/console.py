"""What a person sees and what the log keeps: data on stdout, messages on stderr, a run log.

Colour, bars and spinners appear on a terminal only. rich is imported only then, because the import
costs more than a verb with nothing to do. A log file appears with its first line, so a verb with
nothing to do leaves none.
"""

import contextlib
import datetime
import re
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from workspace.core.errors import WorkspaceError
from workspace.core.lock import Held

if TYPE_CHECKING:
    import rich.console
    import rich.progress

State = Literal["done", "skipped", "ok", "warn", "FAIL", "stale", "missing", "kept"]
_STYLES: dict[str, str] = {
    "done": "green",
    "ok": "green",
    "skipped": "dim",
    "kept": "dim",
    "warn": "yellow",
    "stale": "yellow",
    "missing": "yellow",
    "FAIL": "bold red",
}
STATE_WIDTH = 9
NAME_WIDTH = 14
# The narrowest column of text beside the names, however long those are.
_NARROWEST = 20
# A command and its first argument, which stay on one line: `./scripts/inv bootstrap`.
_COMMAND = re.compile(r"(\./scripts/\w+) (?=\S)")
_NO_BREAK = "\u00a0"


@dataclass
class Step:
    """A running step of a verb: its title, state and reason."""

    title: str
    state: State = "done"
    reason: str = ""
    _progress: "rich.progress.Progress | None" = field(default=None, repr=False)

    def skip(self, reason: str) -> None:
        self.state, self.reason = "skipped", reason

    def progress(self, done: float, total: float | None, text: str = "") -> None:
        """Move the bar; `done` and `total` share a unit, which `text` names."""
        if self._progress is not None:
            self._progress.update(
                self._progress.task_ids[0], completed=done, total=total, detail=text
            )

    def line(self, text: str) -> None:
        """Show the newest output line of a command beside the spinner."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], detail=text.strip()[:60])


class Console:
    """The terminal or file behind stdout and stderr."""

    def __init__(self, *, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._rich: rich.console.Console | None = None
        if self._err.isatty():
            from rich.console import Console as Terminal

            self._rich = Terminal(file=self._err, highlight=False, soft_wrap=True)

    @property
    def is_terminal(self) -> bool:
        return self._rich is not None

    def data(self, text: str) -> None:
        """Print data that a program may read."""
        print(text, file=self._out, flush=True)

    def info(self, text: str, *, style: str | None = None) -> None:
        """Print a message line as it is, without markup."""
        if self._rich is not None:
            self._rich.print(text, style=style, markup=False)
        else:
            print(text, file=self._err, flush=True)

    def warn(self, text: str) -> None:
        self.info("\n".join(self.wrapped(f"warning: {text}")), style="yellow")

    def command(self, text: str) -> None:
        """Echo a changing command in a form that can be copied into a shell."""
        self.info(f"+ {text}", style="dim")

    def error(self, error: WorkspaceError) -> None:
        """Print a failure: details first, then the sentence and its hint as the last lines."""
        for line in error.details:
            self.info(f"  {line}")
        self.info("\n".join(self.wrapped(f"error: {error.message}")), style="bold red")
        if error.hint:
            # Never wrapped, so that a person can copy it.
            self.info(f"hint: {error.hint}")

    def wrapped(self, text: str, *, indent: int = 0) -> list[str]:
        """Return the lines of a text that is cut at blanks to fit beside `indent` columns.

        Away from a terminal it is one line, which a program can search.
        """
        if self._rich is None:
            return [text]
        room = max(_NARROWEST, self._rich.width - indent)
        lines = textwrap.wrap(
            _COMMAND.sub(rf"\1{_NO_BREAK}", text),
            room,
            break_long_words=False,
            break_on_hyphens=False,
        )
        return [line.replace(_NO_BREAK, " ") for line in lines] or [""]

    def row(self, state: State, name: str, text: str, *, hint: str | None = None) -> None:
        """Print one row of a status screen: state, name, reason; below it the command."""
        label = f"{name:<{NAME_WIDTH}}"
        label += "" if label.endswith(" ") else " "
        first, *more = self.wrapped(text, indent=STATE_WIDTH + len(label))
        if self._rich is not None:
            from rich.text import Text

            style = _STYLES.get(state, "")
            self._rich.print(Text.assemble((f"{state:<{STATE_WIDTH}}", style), label, first))
        else:
            self.info(f"{state:<{STATE_WIDTH}}{label}{first}".rstrip())
        indent = " " * (STATE_WIDTH + len(label))
        for line in more:
            self.info(indent + line)
        if hint:
            # Never wrapped, so that a person can copy it.
            self.info(f"{indent}$ {hint}", style="bold")

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Show a step while the block runs, then one line with state, reason and seconds."""
        step = Step(title)
        started = time.monotonic()
        try:
            with self._spinner(step):
                yield step
        except BaseException:
            # The reason why the step was due does not explain the failure; the error does.
            step.state, step.reason = "FAIL", ""
            raise
        finally:
            seconds = f"  {time.monotonic() - started:.1f} s" if step.state != "skipped" else ""
            self.row(step.state, title, f"{step.reason}{seconds}".strip())

    @contextlib.contextmanager
    def _spinner(self, step: Step) -> Iterator[None]:
        if self._rich is None:
            yield
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._rich, transient=True) as progress:
            progress.add_task(step.title, total=None, detail="")
            step._progress = progress
            try:
                yield
            finally:
                step._progress = None


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
            with _naming(self._file):
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
        with _naming(file):
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


@contextlib.contextmanager
def _naming(file: TextIO) -> Iterator[None]:
    """Add the name of the file to an error such as that of a full disk."""
    try:
        yield
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, file.name) from exc


def _now() -> str:
    return datetime.datetime.now().isoformat(timespec="seconds")
