"""Screens as text: `screen` runs a program on a terminal, for snapshots, and `pytest --screens
FOLDER` keeps each error, row and message as a terminal shows it, for reading.

For the latter the workspace's own Console renders at 100 columns. A text that differs from another
one in numbers and digests only is kept once. An error is kept where it is made, so that those which
a test catches, and a verb would print, are there too.
"""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from workspace.core.console import Console
from workspace.core.errors import WorkspaceError

COLUMNS, ROWS = 100, 30
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_VARIES = re.compile(r"[0-9a-f]{6,}|\d+")

# What differs from run to run or from machine to machine, and what stands for it in a snapshot.
_NORMAL: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"\b(?=[0-9a-f]*\d)[0-9a-f]{12,64}\b", lambda found: "#" * len(found[0])),
    (r"(?<=  )\d+\.\d+ s$", "N.N s"),
    (r"\b\d{8}-\d{6}-\d{6}\b", "TIME"),
    (r"(CPU_KVCACHE_SPACE=)\d+", r"\1N"),
    (r"\b3\.\d+\.\d+\b", "3.N.N"),
    (r"x86_64|aarch64", "ARCH"),
    # A bar that is not drawn leaves its line.
    (r"^\n(?=(?:done|ok|FAIL|skipped) )", ""),
)


class Terminal(io.StringIO):
    """The terminal behind stderr."""

    def isatty(self) -> bool:
        return True


def rendered(show: Callable[[Console], None]) -> str:
    """Return what `show` prints on a terminal of COLUMNS columns, without colours."""
    terminal = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(COLUMNS))
        patch.setenv("TERM", "xterm")
        show(Console(out=io.StringIO(), err=terminal))
    return _COLOUR.sub("", terminal.getvalue())


def normalised(text: str) -> str:
    """Return a screen in which seconds, hashes, times and versions have stand-ins."""
    text = _COLOUR.sub("", text.replace("\r\n", "\n"))
    for pattern, instead in _NORMAL:
        text = re.sub(pattern, instead, text, flags=re.MULTILINE)
    return text


def screen(
    argv: Sequence[str], *, cwd: Path, env: Mapping[str, str], columns: int = COLUMNS
) -> str:
    """Return what a program prints on a terminal of 100x30, or so many columns, normalised."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    # On a dumb terminal rich draws no bars and no colours.
    of_terminal = {"TERM": "dumb", "COLUMNS": str(columns), "LINES": str(ROWS)}
    program = subprocess.Popen(
        argv, cwd=cwd, env={**env, **of_terminal}, stdin=subprocess.DEVNULL, stdout=end, stderr=end
    )
    os.close(end)
    seen = b""
    # EIO says that the last writer has closed its end.
    with contextlib.suppress(OSError):
        while piece := os.read(terminal, 65536):
            seen += piece
    os.close(terminal)
    program.wait(timeout=60)
    return normalised(seen.decode())


@contextlib.contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Keep what the block prints, in one file of this process below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    # One text prints others: a screen its rows, an error its hint.
    is_open = False

    @contextlib.contextmanager
    def kept(show: Callable[[Console], None]) -> Iterator[None]:
        nonlocal is_open
        if is_open:
            yield
            return
        is_open = True
        try:
            text = rendered(show)
            if (key := _VARIES.sub("N", text)) not in seen:
                seen.add(key)
                content = f"{text}\n".encode(errors="backslashreplace")
                with (folder / f"{os.getpid()}.txt").open("ab") as file:
                    file.write(content)
            yield
        finally:
            is_open = False

    def made(self: WorkspaceError, *args: object, **more: object) -> None:
        make(self, *args, **more)
        with kept(lambda console: console.error(self)):
            pass

    def keeping(name: str) -> Callable[..., None]:
        method: Callable[..., None] = getattr(Console, name)

        def call(self: Console, *args: object, **more: object) -> None:
            if isinstance(self._err, Terminal):
                method(self, *args, **more)
                return
            # The rows of a screen may be an iterator.
            again = tuple(tuple(each) if isinstance(each, Iterator) else each for each in args)
            with kept(lambda console: method(console, *again, **more)):
                method(self, *again, **more)

        return call

    make: Callable[..., None] = WorkspaceError.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkspaceError, "__init__", made)
        for name in ("rows", "table", "info", "sentence", "warn", "hint"):
            patch.setattr(Console, name, keeping(name))
        yield
