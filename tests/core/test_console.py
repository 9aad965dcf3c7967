"""The console away from a terminal: plain lines, data and talk apart."""

import io
import re

import pytest

from workspace.core.console import Console
from workspace.core.errors import SourceError


def consoles() -> tuple[Console, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Console(out=out, err=err), out, err


def test_data_and_talk_do_not_mix() -> None:
    console, out, err = consoles()
    console.data("{}")
    console.info("[bold]as it is[/bold]")
    assert (out.getvalue(), err.getvalue()) == ("{}\n", "[bold]as it is[/bold]\n")


def test_sentence_and_way_on_stand_last() -> None:
    console, _, err = consoles()
    console.error(SourceError("it failed", hint="inv status", details=("a", "b")))
    assert err.getvalue() == "  a\n  b\nerror: it failed\nhint: inv status\n"


def test_step_that_raises_is_shown_as_failed() -> None:
    console, _, err = consoles()
    with pytest.raises(ZeroDivisionError), console.step("source"):
        raise ZeroDivisionError
    assert err.getvalue().startswith("FAIL     source ")


def test_skipped_step_says_why_and_no_seconds() -> None:
    console, _, err = consoles()
    with console.step("source") as step:
        step.skip("is there")
    assert err.getvalue() == "skipped  source        is there\n"


def test_name_of_any_length_has_a_blank_before_the_text() -> None:
    console, _, err = consoles()
    console.row("ok", "fourteen-chars", "fits")
    console.row("ok", "a-name-of-twenty-two-c", "is long")
    assert err.getvalue() == (
        "ok       fourteen-chars fits\nok       a-name-of-twenty-two-c is long\n"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        return re.sub("\x1b\\[[0-9;]*m", "", self.getvalue()).splitlines()


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def test_row_continues_below_its_text_on_a_terminal(narrow: Terminal) -> None:
    Console(err=narrow).row("warn", "server", "no server runs, see ./scripts/inv serve.list for it")
    assert narrow.lines() == [
        "warn     server        no server runs, see",
        "                       ./scripts/inv serve.list",
        "                       for it",
    ]


def test_sentence_is_cut_at_blanks_and_hint_stays_one_line(narrow: Terminal) -> None:
    sentence, hint = "a sentence with more letters than this terminal has columns", "x " * 40
    Console(err=narrow).error(SourceError(sentence, hint=hint.strip()))
    assert narrow.lines() == [
        "error: a sentence with more letters than this",
        "terminal has columns",
        f"hint: {hint.strip()}",
    ]
