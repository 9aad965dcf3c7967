"""The console away from a terminal: plain lines, data and talk apart."""

import io
import json
import re
from pathlib import Path

import pytest

from workspace.core.console import Console, Row, State, failed
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
    console.row(State.OK, "fourteen-chars", "fits")
    console.row(State.OK, "a-name-of-twenty-two-c", "is long")
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
    Console(err=narrow).row(
        State.WARN, "server", "no server runs, see ./scripts/inv serve.list for it"
    )
    assert narrow.lines() == [
        "warn     server        no server runs, see",
        "                       ./scripts/inv serve.list",
        "                       for it",
    ]


def test_long_detail_of_a_step_is_cut_and_its_title_is_not(narrow: Terminal) -> None:
    with Console(err=narrow).step("first token") as step:
        step.progress(0, None, "starting the engine, 25 s; the driver may be compiling _vllm_fa2_C")
        assert step._progress is not None
        step._progress.refresh()
    shown = [line for line in narrow.lines() if "starting" in line]
    assert shown
    assert all("first token" in line for line in shown)
    assert not any("_vllm_fa2_C" in line for line in shown)


def test_full_bar_moves_again_by_itself_without_a_total(narrow: Terminal) -> None:
    with Console(err=narrow).step("upstream") as step:
        step.progress(5, 5, "unpacking")
        step.progress(0, None, "committing")
        assert step._progress is not None
        task = step._progress.tasks[0]
        assert (task.completed, task.total, str(task.fields["detail"])) == (0, None, "committing")


def test_text_beside_a_spinner_is_made_anew_each_time_it_is_drawn(narrow: Terminal) -> None:
    texts = iter([f"second {count}" for count in range(1000)])
    with Console(err=narrow).step("parity") as step:
        step.watch(lambda: next(texts))
        assert step._progress is not None
        step._progress.refresh()
        step._progress.refresh()
    assert len({found for line in narrow.lines() for found in re.findall(r"second \d+", line)}) > 1


def test_line_of_a_command_follows_what_the_step_says_of_the_last_time(narrow: Terminal) -> None:
    with Console(err=narrow).step("start 1/6") as step:
        step.last = "last time 22 s  "
        step.line("")
        assert step._progress
        assert str(step._progress.tasks[0].fields["detail"]) == "last time 22 s  "
        step.line("loading")
        assert str(step._progress.tasks[0].fields["detail"]) == "last time 22 s  loading"


def test_sentence_is_cut_at_blanks_and_hint_stays_one_line(narrow: Terminal) -> None:
    sentence, hint = "a sentence with more letters than this terminal has columns", "x " * 40
    Console(err=narrow).error(SourceError(sentence, hint=hint.strip()))
    assert narrow.lines() == [
        "error: a sentence with more letters than this",
        "terminal has columns",
        f"hint: {hint.strip()}",
    ]


def test_record_goes_only_where_it_was_asked_for(tmp_path: Path) -> None:
    terminal, pipe, file = Terminal(), io.StringIO(), tmp_path / "deep" / "record.json"
    for out in (terminal, pipe):
        console = Console(out=out, err=io.StringIO())
        console.record('{"schema": 1}', None)
        console.record('{"schema": 1}', file)
        assert out.getvalue() == ""
        console.record('{"schema": 1}', Path("-"))
    assert file.read_text() == terminal.getvalue() == pipe.getvalue() == '{"schema": 1}\n'


def test_state_orders_rows_by_gravity_and_only_the_last_fails_a_verb() -> None:
    assert [state.value for state in sorted(State, key=lambda state: state.gravity)][-2:] == [
        "warn",
        "FAIL",
    ]
    rows = [Row(state, "row", "text") for state in State]
    assert [row.state for row in failed(rows)] == ["FAIL"]


def test_rows_of_one_screen_share_their_columns_and_end_with_what_to_type() -> None:
    console, _, err = consoles()
    console.rows(
        [
            Row(State.OK, "disk", "is large", why="it is needed", hint="df -h"),
            Row(State.FAIL, "a-name-of-twenty-two-c", "is wrong", why="it matters", hint="fix it"),
            Row(State.STALE, "smoke", "is old", hint="run it"),
        ]
    )
    assert err.getvalue().splitlines() == [
        "ok       disk                   is large",
        "FAIL     a-name-of-twenty-two-c is wrong",
        "                                it matters",
        "                                $ fix it",
        "stale    smoke                  is old",
        "                                $ run it",
    ]


def test_document_has_the_rows_of_the_screen() -> None:
    console, out, err = consoles()
    row = Row(State.WARN, "disk", "is full", hint="df")
    console.show([row], as_json=True, verdict="pass")
    assert err.getvalue() == ""
    assert json.loads(out.getvalue()) == {
        "schema": 1,
        "rows": [{"state": "warn", "name": "disk", "text": "is full", "hint": "df"}],
        "verdict": "pass",
    }


TABLE = [("target", "units", "reason"), ("_C", "3", "csrc/c.cu changed"), ("_moe_C", "12", "new")]


def test_columns_of_a_table_are_as_wide_as_their_widest_cell() -> None:
    console, _, err = consoles()
    console.table(TABLE, right={1})
    assert err.getvalue().splitlines() == [
        "target  units  reason",
        "_C          3  csrc/c.cu changed",
        "_moe_C     12  new",
    ]


def test_text_whose_words_have_no_room_beside_the_cells_is_below_them(narrow: Terminal) -> None:
    path = "csrc/libtorch_stable/topk_softmax.cu"
    Console(err=narrow).table([("a-target-of-some-length", "31", f"{path} changed")])
    assert narrow.lines() == ["a-target-of-some-length  31", f"    {path} changed"]


def test_cells_that_have_no_room_go_to_the_next_line_and_none_is_cut(narrow: Terminal) -> None:
    cells = ("a cell of some length", "another of that length", "a third one", "the text")
    Console(err=narrow).table([cells])
    assert narrow.lines() == [
        "a cell of some length  another of that length",
        "a third one",
        "    the text",
    ]


def test_hint_is_one_line_on_every_terminal(narrow: Terminal) -> None:
    hints = ["./scripts/inv " + "x" * length for length in (10, 30, 90)]
    for hint in hints:
        Console(err=narrow).rows([Row(State.FAIL, "disk", "is full", hint=hint)])
    assert narrow.lines()[1::2] == [
        f"{' ' * 23}$ {hints[0]}",
        f"    $ {hints[1]}",
        f"    $ {hints[2]}",
    ]
