"""Text of others on the terminal: mails, branch names, logs, names of files and models."""

import io
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.strategies import fuzz
from workspace.core import records
from workspace.core.console import Console, Row, RunLog, State
from workspace.core.errors import WorkspaceError, printable

OWN_COLOUR = re.compile("\x1b\\[[0-9;]*m")
# A colour, a title, the clipboard, C1's own introducer, a line rewritten, a line turned around.
ATTACKS = (
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "\x1b]52;c;cm0gLXJmIH4=\x1b\\",
    "\x9b2J",
    "good\rbad",
    "gpj.\u202eexe",
    "a\bb\x7f",
)
TEXTS = st.text(max_size=40) | st.builds(
    lambda before, attack, after: f"{before}{attack}{after}",
    st.text(max_size=8),
    st.sampled_from(ATTACKS),
    st.text(max_size=8),
)
WAYS: dict[str, Callable[[Console, str], object]] = {
    "data": lambda console, text: console.data(text),
    "info": lambda console, text: console.info(text, style="dim"),
    "sentence": lambda console, text: console.sentence(text),
    "warn": lambda console, text: console.warn(text, hint=text),
    "command": lambda console, text: console.command(text),
    "error": lambda console, text: console.error(
        WorkspaceError(text, hint=text, details=(text, text))
    ),
    "row": lambda console, text: console.rows([Row(State.WARN, text, text, text, text)]),
    "json": lambda console, text: console.show([Row(State.OK, text, text)], as_json=True),
    "table": lambda console, text: console.table([(text, text), ("a", text)]),
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def obeyed(output: str) -> list[str]:
    """Return the characters that a terminal would obey."""
    return [
        letter
        for letter in output
        if (unicodedata.category(letter) in ("Cc", "Zl", "Zp") and letter not in "\n\t")
        or unicodedata.bidirectional(letter)
        in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    ]


@pytest.mark.parametrize("way", WAYS)
@fuzz(fast=30, deep=3000)
@given(text=TEXTS)
@example(text="".join(ATTACKS))
def test_no_text_of_others_commands_the_terminal(way: str, text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    file, terminal = io.StringIO(), Terminal()
    WAYS[way](Console(out=file, err=file), text)
    assert obeyed(file.getvalue()) == []
    # On a terminal there are colours of our own, where they are for a harmless text.
    WAYS[way](Console(out=terminal, err=terminal), text)
    assert obeyed(OWN_COLOUR.sub("", terminal.getvalue())) == []
    harmless = Terminal()
    WAYS[way](Console(out=harmless, err=harmless), printable(text))
    # JSON has its own escapes, from which a program gets the text itself.
    assert way == "json" or terminal.getvalue() == harmless.getvalue()


def test_control_characters_are_shown_and_other_letters_stay() -> None:
    assert printable("\x1b[31mä\x07\u202e 日本\t\n👩‍🔬") == "\\x1b[31mä\\x07\\u202e 日本\t\n👩‍🔬"


def test_name_of_a_file_does_not_forge_a_row() -> None:
    err = io.StringIO()
    Console(out=err, err=err).row(State.OK, "branch", "x\nok       smoke         passed")
    assert len(err.getvalue().splitlines()) == 1


def test_step_and_log_show_the_output_of_a_program_escaped(tmp_path: Path) -> None:
    terminal = Terminal()
    console = Console(out=terminal, err=terminal)
    with (
        RunLog(console, tmp_path, verb="x") as log,
        console.step("\x1b]0;pwn\x07 [red]title") as step,
    ):
        log.phase("\x1b[2J", step)
        log.line("\x1b]52;c;AAAA\x07")
        step.progress(1, 2, "\x1b]0;pwn\x07")
    assert "\x1b]" not in terminal.getvalue()
    assert log.path is not None
    assert "\x1b" not in log.path.read_text()


def test_damaged_file_is_reported_without_its_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "\x1b[31m.json"
    path.write_text("{")
    assert records.read(path, dict) is None
    assert "\\x1b[31m.json" in capsys.readouterr().err
