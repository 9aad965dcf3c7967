"""Alternation, ratios and aims of a measurement, and the errors of a side that fails."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from workspace.core.errors import BuildError, ToolchainError
from workspace.support.perf import Aim, Comparison, compare
from workspace.support.perf_pairs import Side, command


def shell(
    folder: Path,
    script: str,
    *args: str,
    before: Callable[[], None] = lambda: None,
    statuses: tuple[int, ...] = (0,),
) -> Side:
    argv = ("/bin/sh", "-c", script, *args)
    return command(argv, folder, dict(os.environ), before=before, statuses=statuses)


def test_sides_alternate_and_warm_ups_are_not_counted(tmp_path: Path) -> None:
    one, other = shell(tmp_path, "printf A >> order"), shell(tmp_path, "printf B >> order")
    seen: list[tuple[int, int]] = []
    found = compare(
        one, other, pairs=3, warm_ups=1, on_run=lambda done, total: seen.append((done, total))
    )
    assert (tmp_path / "order").read_text() == "BAABBAAB"
    assert (len(found.measured), len(found.against)) == (3, 3)
    assert seen == [(number, 8) for number in range(1, 9)]


def test_before_runs_ahead_of_every_start_and_is_not_timed(tmp_path: Path) -> None:
    script = "test -e fresh && rm fresh && echo ran >> log"
    made = shell(tmp_path, script, before=(tmp_path / "fresh").touch)
    compare(made, made, pairs=1, warm_ups=1)
    assert (tmp_path / "log").read_text().split() == ["ran"] * 4


def test_a_status_that_does_not_count_ends_the_row_with_the_verbs_message(tmp_path: Path) -> None:
    script = "echo 'error: .vllm is broken' >&2; echo 'hint: ./scripts/inv bootstrap' >&2; exit 7"
    with pytest.raises(BuildError, match="exited with 7: error: .vllm is broken") as caught:
        shell(tmp_path, script)()
    assert caught.value.details[-1] == "hint: ./scripts/inv bootstrap"
    assert shell(tmp_path, script, statuses=(0, 7))() > 0


def test_a_password_on_the_command_line_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught:
        shell(tmp_path, "exit 1", "--index", "https://ada:hunter2@index.example")()
    assert "hunter2" not in str(caught.value)
    assert "it printed nothing" in str(caught.value)


def test_a_program_that_is_not_there_is_an_expected_failure(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="is missing"):
        command((tmp_path / "missing",), tmp_path, dict(os.environ))()


def test_ratios_are_those_within_a_pair_so_that_a_slow_minute_does_not_count() -> None:
    ratio = Comparison((1.1, 11.0, 2.4), (1.0, 10.0, 2.0)).ratio
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.1, 1.1, 1.2))


@pytest.mark.parametrize(
    ("aim", "text", "met", "missed"),
    [
        (Aim("ratio", 1.2), "1.2x", (1.2, 1.0), (1.3, 1.0)),
        (Aim("wall", 3.0), "3 s", (2.9, 0.1), (3.1, 9.9)),
    ],
)
def test_aims(aim: Aim, text: str, met: tuple[float, float], missed: tuple[float, float]) -> None:
    assert str(aim) == text
    assert aim.is_met(Comparison((met[0],), (met[1],)))
    assert not aim.is_met(Comparison((missed[0],), (missed[1],)))
