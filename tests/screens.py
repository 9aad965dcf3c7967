"""`pytest --screens FOLDER`: keep each error, row and message as a terminal shows it, for reading.

The workspace's own Console renders it at 100 columns. A text that differs from another one in
numbers and digests only is kept once. An error is kept where it is made, so that those which a test
catches, and a verb would print, are there too.
"""

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from workspace.core.console import Console
from workspace.core.errors import WorkspaceError

COLUMNS = 100
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_VARIES = re.compile(r"[0-9a-f]{6,}|\d+")


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
