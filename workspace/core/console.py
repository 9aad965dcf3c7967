"""What a person sees and what the log keeps: data on stdout, messages on stderr, a run log.

A verb that shows prints its screen with `Console.stdout`: rows, their summary, the next command. A
verb that works prints its steps and its talk on stderr. Errors and warnings are always there.

Colour, bars and spinners appear on a terminal only. rich is imported only then, because the import
costs more than a verb with nothing to do. A log file appears with its first line, so a verb with
nothing to do leaves none.
"""

import contextlib
import datetime
import enum
import json
import re
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from workspace.core import files
from workspace.core.errors import WorkspaceError, printable
from workspace.core.lock import Held

if TYPE_CHECKING:
    import rich.console
    import rich.progress

# As the file of a record: stdout.
STDOUT = Path("-")
# Widths with the blanks behind the cell. A longer name widens its column.
STATE_WIDTH = 9
NAME_WIDTH = 14
# A longer cell between name and text sticks out of its column.
_CELL_WIDTH = 28
_GAP = 2
# The narrowest column of text beside the other cells, and the indent of a text below them.
_NARROWEST = 20
_BELOW = 4
# A command and its first argument, which stay on one line: `./scripts/inv bootstrap`.
_COMMAND = re.compile(r"(\./scripts/\w+) (?=\S)")
_NO_BREAK = "\u00a0"


class State(enum.StrEnum):
    """State of a row, in the order of gravity.

    Where rows decide on an exit code, FAIL alone fails the verb: with warn its result is right, and
    a later verb makes what is missing or stale. A screen that only shows a state exits with 0.
    """

    DONE = "done"
    OK = "ok"
    KEPT = "kept"
    SKIPPED = "skipped"
    MISSING = "missing"
    STALE = "stale"
    WARN = "warn"
    FAIL = "FAIL"

    @property
    def gravity(self) -> int:
        return list(State).index(self)


_STYLES = ("green", "green", "dim", "dim", "yellow", "yellow", "yellow", "bold red")


@dataclass(frozen=True)
class Row:
    """One row of a status screen.

    `text` is the observation, `why` the reason why it matters, which the screen has below a fault;
    `hint` is what to type next.
    """

    state: State
    name: str
    text: str
    why: str = ""
    hint: str | None = None

    @property
    def cells(self) -> tuple[str, ...]:
        """The columns of the screen after the state; the last is text."""
        return (self.name, self.text)

    def record(self) -> dict[str, object]:
        """Return the row for a program."""
        return {"state": self.state, "name": self.name, "text": self.text, "hint": self.hint}


def failed(rows: Iterable[Row]) -> list[Row]:
    """Return the rows that make a verb fail."""
    return [row for row in rows if row.state is State.FAIL]


@dataclass(frozen=True)
class _Live:
    """A text that is made when it is drawn."""

    make: Callable[[], str]

    def __str__(self) -> str:
        return printable(self.make())


@dataclass
class Step:
    """A running step of a verb. `last` is the text in front of each line of its command."""

    title: str
    state: State = State.DONE
    reason: str = ""
    last: str = ""
    _progress: "rich.progress.Progress | None" = field(default=None, repr=False)

    def skip(self, reason: str) -> None:
        self.state, self.reason = State.SKIPPED, reason

    def progress(self, done: float, total: float | None, text: str = "") -> None:
        """Move the bar; `done` and `total` share a unit, which `text` names."""
        if self._progress is not None:
            task = self._progress.tasks[0]
            task.total = total  # Without one the bar moves by itself; update() ignores None.
            self._progress.update(task.id, completed=done, detail=printable(text))

    def watch(self, text: Callable[[], str]) -> None:
        """Show what `text` returns beside the spinner, called anew at each refresh."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], detail=_Live(text))

    def line(self, text: str) -> None:
        """Show the newest output line of a command beside the spinner."""
        if self._progress is not None:
            detail = printable(f"{self.last}{text.strip()[:60]}")
            self._progress.update(self._progress.task_ids[0], detail=detail)


class Console:
    """The terminal or file behind stdout and stderr. Every text passes `printable`."""

    def __init__(self, *, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._rich: rich.console.Console | None = None
        # Gets the title of each step that begins: a verb records it in its lock.
        self.on_step: Callable[[str], None] = lambda title: None
        self._stdout: Console | None = None
        # Whether commands are echoed; the log has them anyway.
        self.is_verbose = False
        if self._err.isatty():
            from rich.console import Console as Terminal

            self._rich = Terminal(file=self._err, highlight=False, soft_wrap=True)

    @property
    def width(self) -> int | None:
        """The columns of the terminal, None away from one."""
        return self._rich.width if self._rich is not None else None

    @property
    def stdout(self) -> "Console":
        """The console that prints on stdout, for what a person asked to see."""
        self._stdout = self._stdout or Console(out=self._out, err=self._out)
        return self._stdout

    def data(self, text: str) -> None:
        """Print data that a program may read."""
        print(printable(text), file=self._out, flush=True)

    def record(self, text: str, file: Path | None) -> None:
        """Write a record to the file that was asked for, `-` for stdout; None: write nothing."""
        if file == STDOUT:
            self.data(text)
        elif file:
            files.write_atomic(file, f"{text}\n".encode())

    def info(self, text: str, *, style: str | None = None) -> None:
        """Print a message line as it is, without markup."""
        text = printable(text)
        if self._rich is not None:
            self._rich.print(text, style=style, markup=False)
        else:
            print(text, file=self._err, flush=True)

    def sentence(self, text: str, *, style: str | None = None) -> None:
        """Print a message that is cut at blanks on a terminal."""
        self.info("\n".join(self.wrapped(text)), style=style)

    def warn(self, text: str, *, hint: str | None = None) -> None:
        self.sentence(f"warning: {text}", style="yellow")
        self.hint(hint)

    def hint(self, hint: str | None, *, indent: int = 0) -> None:
        """Print what to type next, below a row with `indent`.

        It is never wrapped, so that a person can copy it.
        """
        if hint:
            hint = printable(hint)
            if self.width and indent + len(hint) + len("$ ") > self.width:
                indent = min(indent, _BELOW)
            label = f"{' ' * indent}$" if indent else "hint:"
            self.info(f"{label} {hint}", style="bold" if indent else None)

    def is_confirmed(self, text: str) -> bool:
        """Print a text that asks for a yes; return whether it came, False away from a terminal."""
        if self._rich is None or not sys.stdin.isatty():
            return False
        self.info(f"{text} [y/N]")
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def command(self, text: str) -> None:
        """Echo a changing command in a form that can be copied into a shell."""
        self.info(f"+ {text}", style="dim")

    def error(self, error: WorkspaceError) -> None:
        """Print a failure: details first, then the sentence and its hint as the last lines."""
        for line in error.details:
            self.info(f"  {line}")
        self.sentence(f"error: {error.message}", style="bold red")
        self.hint(error.hint)

    def wrapped(self, text: str, *, indent: int = 0) -> list[str]:
        """Return the lines of a text that is cut at blanks to fit beside `indent` columns.

        Away from a terminal it is one line, which a program can search.
        """
        text = printable(text)
        if self.width is None:
            return [text]
        room = max(_NARROWEST, self.width - indent)
        lines = textwrap.wrap(
            _COMMAND.sub(rf"\1{_NO_BREAK}", text),
            room,
            break_long_words=False,
            break_on_hyphens=False,
        )
        return [line.replace(_NO_BREAK, " ") for line in lines] or [""]

    def show(self, rows: Iterable[Row], *, as_json: bool, **more: object) -> None:
        """Print a status screen on stdout, or one JSON document with its rows and `more`."""
        if as_json:
            records = [row.record() for row in rows]
            self.document({"schema": 1, "rows": records, **more})
        else:
            self.stdout.rows(rows)

    def document(self, document: Mapping[str, object]) -> None:
        """Print one JSON document on stdout, for a program."""
        self.data(json.dumps(document, indent=1))

    def rows(self, rows: Iterable[Row], *, least: int = NAME_WIDTH) -> None:
        """Print a status screen: below a row its hint, and the reason of a row that is not ok.

        A reason that did not matter hides its hint too. `least` is the least width of the names.
        """
        shown = tuple(rows)
        cells = [_cells(row.cells) for row in shown]
        name_width = max([least, *(len(name) + 1 for name, *_ in cells)])
        between = _widths([row[1:] for row in cells], most=_CELL_WIDTH)
        indent = STATE_WIDTH + name_width
        for row, columns in zip(shown, cells, strict=True):
            widths = (STATE_WIDTH, name_width, *between)
            self._line((row.state, *columns), widths, style=_STYLES[row.state.gravity])
            if row.why and row.state in (State.DONE, State.OK, State.SKIPPED):
                continue
            for line in self.wrapped(row.why, indent=indent) if row.why else ():
                self.info(" " * indent + line)
            self.hint(row.hint, indent=indent)

    def row(self, state: State, name: str, text: str, *, least: int = NAME_WIDTH) -> None:
        """Print one row of a screen whose rows are printed one by one."""
        self.rows([Row(state, name, text)], least=least)

    def table(self, lines: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> None:
        """Print lines of cells in aligned columns, those in `right` to the right.

        The last cell is text.
        """
        shown = [_cells(line) for line in lines]
        widths = _widths(shown)
        for cells in shown:
            self._line(cells, widths, right=right)

    def _line(
        self,
        cells: Sequence[str],
        widths: Sequence[int],
        *,
        right: Collection[int] = (),
        style: str = "",
    ) -> None:
        """Print one line of a table.

        On a terminal its text is wrapped beside the other cells, or below them where it has no
        room; other cells without room go to the next line.
        """
        *columns, text = cells
        head = "".join(
            _padded(cell, width, is_right=at in right)
            for at, (cell, width) in enumerate(zip(columns, widths, strict=True))
        )
        indent, more = len(head), self.wrapped(text, indent=len(head))
        if self.width and text and max(map(len, more)) + indent > self.width:
            *above, head = self.wrapped(head)
            for line in above:
                self.info(line)
            indent, more = _BELOW, ["", *self.wrapped(text, indent=_BELOW)]
        first = f"{head.replace(_NO_BREAK, ' ')}{more[0]}".rstrip()
        if self._rich is not None:
            from rich.text import Text

            begin = len(cells[0])
            self._rich.print(Text.assemble((first[:begin], style), first[begin:]))
        else:
            self.info(first)
        for line in more[1:]:
            self.info(" " * indent + line)

    @contextlib.contextmanager
    def step(self, title: str, *, least: int = NAME_WIDTH) -> Iterator[Step]:
        """Show a step while the block runs, then one row with state, reason and seconds."""
        step = Step(title)
        self.on_step(title)
        started = time.monotonic()
        try:
            with self._spinner(step):
                yield step
        except BaseException:
            # The reason why the step was due does not explain the failure; the error does.
            step.state, step.reason = State.FAIL, ""
            raise
        finally:
            is_timed = step.state is not State.SKIPPED
            seconds = f"  {time.monotonic() - started:.1f} s" if is_timed else ""
            self.row(step.state, title, f"{step.reason}{seconds}".strip(), least=least)

    @contextlib.contextmanager
    def _spinner(self, step: Step) -> Iterator[None]:
        if self._rich is None:
            yield
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.table import Column

        # A long detail is cut, never the title.
        title = Column(no_wrap=True, min_width=len(printable(step.title)))
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False, table_column=title),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[detail]!s}", markup=False),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._rich, transient=True) as progress:
            progress.add_task(printable(step.title), total=None, detail="")
            step._progress = progress
            try:
                yield
            finally:
                step._progress = None


def _cells(cells: Iterable[str]) -> tuple[str, ...]:
    """Return cells as they are shown; a line end in one, such as a file's name, forges no row."""
    return tuple(printable(cell).replace("\n", "\\n") for cell in cells)


def _widths(lines: Sequence[Sequence[str]], *, most: int | None = None) -> list[int]:
    """Return the width of each column but the last, with the blanks behind it."""
    lengths = [[len(cell) for cell in column] for column in zip(*lines, strict=True)]
    return [min(max(column), most or max(column)) + _GAP for column in lengths[:-1]]


def _padded(cell: str, width: int, *, is_right: bool) -> str:
    """Return a cell that is wrapped behind itself only, with one blank at least."""
    room = max(len(cell), width - _GAP)
    text = cell.rjust(room) if is_right else cell
    return f"{text.replace(' ', _NO_BREAK)} ".ljust(width)


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
        self._outer = console.on_step

    @property
    def path(self) -> Path | None:
        """The log file, or None while nothing was written."""
        return Path(self._file.name) if self._file else None

    def __enter__(self) -> "RunLog":
        self._outer = self.console.on_step
        if self.held:
            self.console.on_step = self._note
        return self

    def _note(self, title: str) -> None:
        """Record a step in the lock, and in that of the verb for which this one works."""
        assert self.held
        self.held.note(title)
        self._outer(title)

    def __exit__(self, *_: object) -> None:
        self.console.on_step = self._outer
        if self._file:
            with _naming(self._file):
                self._file.close()

    def phase(self, name: str, step: Step | None = None) -> None:
        """Begin a phase; the log names it before the first line that follows."""
        self._phase, self.step = name, step
        if self.held:
            self.held.note(name)

    def command(self, text: str) -> None:
        """Log a command that changes something; echo it if the console is verbose."""
        text = self.redact(text)
        if self.console.is_verbose:
            self.console.command(text)
        self.write(f"+ {text}")

    @contextlib.contextmanager
    def running(self, text: str) -> Iterator[None]:
        """Log a command, and name it in the error of a block that fails."""
        self.command(text)
        try:
            yield
        except WorkspaceError as exc:
            exc.details = (self.redact(f"+ {text}"), *exc.details)
            raise

    def line(self, text: str) -> None:
        """Log an output line of a command and show it beside the spinner."""
        self.write(text)
        if self.step:
            self.step.line(self.redact(text))

    def write(self, text: str) -> None:
        """Write one line to the log, secrets masked."""
        file = self._opened()
        if self._phase:
            print(printable(f"== {self._phase} · {_now()}"), file=file)
            self._phase = ""
        with _naming(file):
            print(printable(self.redact(text)), file=file, flush=True)

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
