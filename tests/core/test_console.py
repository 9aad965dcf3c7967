"""The console away from a terminal: plain lines, data and talk apart."""

import io

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
