"""Alternation, spreads and aims of a measurement, and the errors of a side that fails."""

import os
from pathlib import Path

import pytest

from workspace.core.errors import BuildError, ToolchainError
from workspace.support.perf import Aim, Comparison, SelfTimed, compare, time_once
from workspace.support.perf_pairs import Command


def shell(folder: Path, script: str, *args: str, statuses: tuple[int, ...] = (0,)) -> Command:
    return Command(("/bin/sh", "-c", script, *args), folder, dict(os.environ), statuses=statuses)


def comparison(*pairs: tuple[float, float]) -> Comparison:
    return Comparison(
        tuple(one for one, _ in pairs), tuple(other for _, other in pairs), seam_s=0.0
    )


def test_sides_alternate_and_who_begins_changes_with_each_pair(tmp_path: Path) -> None:
    one, other = shell(tmp_path, "printf A >> order"), shell(tmp_path, "printf B >> order")
    seen: list[tuple[int, int]] = []
    found = compare(
        one, other, pairs=4, warm_ups=0, on_run=lambda done, total: seen.append((done, total))
    )
    assert (tmp_path / "order").read_text() == "ABBAABBA"
    assert (len(found.measured), len(found.against)) == (4, 4)
    assert seen == [(number, 8) for number in range(1, 9)]


def test_warm_ups_are_run_but_not_counted(tmp_path: Path) -> None:
    found = compare(
        shell(tmp_path, "printf A >> order"),
        shell(tmp_path, "printf B >> order"),
        pairs=1,
        warm_ups=2,
    )
    assert (tmp_path / "order").read_text() == "ABBAAB"
    assert (len(found.measured), len(found.against)) == (1, 1)


def test_what_starting_a_program_costs_is_taken_off_both_sides(tmp_path: Path) -> None:
    sleeping, slept = shell(tmp_path, "sleep 0.3"), SelfTimed(lambda: 0.3)
    found = compare(sleeping, slept, pairs=3, warm_ups=0)
    assert found.seam_s > 0
    assert time_once(sleeping) > 0.3
    assert found.measured_s.median < 0.3 + found.seam_s


def test_a_side_that_takes_less_than_the_seam_has_a_positive_time(tmp_path: Path) -> None:
    found = compare(shell(tmp_path, ":"), shell(tmp_path, ":"), pairs=5, warm_ups=0)
    assert min(found.measured + found.against) > 0


def test_before_runs_ahead_of_every_start_and_is_not_timed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    made = Command(
        ("/bin/sh", "-c", "test -e fresh && rm fresh && echo ran >> log"),
        tmp_path,
        dict(os.environ),
        before=(tmp_path / "fresh").touch,
    )
    compare(made, made, pairs=1, warm_ups=1)
    assert log.read_text().split() == ["ran"] * 4


def test_a_status_that_does_not_count_ends_the_row_with_the_verbs_message(tmp_path: Path) -> None:
    failing = shell(
        tmp_path,
        "echo 'error: .vllm is broken' >&2; echo 'hint: ./scripts/inv bootstrap' >&2; exit 7",
    )
    with pytest.raises(BuildError, match="exited with 7: .vllm is broken") as caught:
        compare(failing, failing, pairs=1, warm_ups=0)
    assert caught.value.hint == "./scripts/inv bootstrap"


def test_a_password_on_the_command_line_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught:
        time_once(shell(tmp_path, "exit 1", "--index", "https://ada:hunter2@index.example"))
    assert "hunter2" not in str(caught.value)
    assert "it printed nothing" in str(caught.value)


def test_a_status_may_be_named_as_one_that_counts(tmp_path: Path) -> None:
    assert time_once(shell(tmp_path, "exit 6", statuses=(0, 6))) > 0


def test_a_program_that_is_not_there_is_an_expected_failure(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="is missing"):
        time_once(Command((tmp_path / "missing",), tmp_path, dict(os.environ)))


def test_ratios_are_those_within_a_pair_so_that_a_slow_minute_does_not_count() -> None:
    found = comparison((1.1, 1.0), (11.0, 10.0), (2.4, 2.0))
    assert found.ratio.median == pytest.approx(1.1)
    assert (found.ratio.low, found.ratio.high) == pytest.approx((1.1, 1.2))
    assert found.extra_s.median == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("aim", "text", "met", "missed"),
    [
        (Aim("ratio", 1.2), "1.2x", (1.2, 1.0), (1.3, 1.0)),
        (Aim("wall", 3.0), "3 s", (2.9, 0.1), (3.1, 9.9)),
    ],
)
def test_aims(aim: Aim, text: str, met: tuple[float, float], missed: tuple[float, float]) -> None:
    assert str(aim) == text
    assert aim.is_met(comparison(met))
    assert not aim.is_met(comparison(missed))
