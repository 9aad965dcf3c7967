"""Every hint leads on: it is run in the situation that prints it, or the table says why not."""

from pathlib import Path

import pytest

from tests.hints.following import User
from tests.hints.table import ELSEWHERE, NOT_RUN, SITUATIONS, Situation
from tests.small.world import World
from workspace.core import hints

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {name for name, hint in hints.registry().items() if not hint.advice}
RUN = {name for situation in SITUATIONS for name in situation.hints}


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.run.__name__)
def test_hint_leads_on_in_its_situation(built: World, situation: Situation) -> None:
    user = User(built)
    situation.run(user)
    assert user.followed == set(situation.hints)


def test_every_hint_has_a_situation_a_test_or_a_reason() -> None:
    assert sorted(COMMANDS - RUN - set(ELSEWHERE) - set(NOT_RUN)) == []


def test_the_table_names_each_hint_once() -> None:
    assert sorted((RUN | set(ELSEWHERE) | set(NOT_RUN)) - COMMANDS) == []
    assert (
        sorted((RUN & set(NOT_RUN)) | (RUN & set(ELSEWHERE)) | (set(ELSEWHERE) & set(NOT_RUN)))
        == []
    )


def test_tests_of_the_table_exist() -> None:
    for place in ELSEWHERE.values():
        path, _, name = place.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(), place


def test_the_hints_that_nothing_runs_get_fewer() -> None:
    """A ceiling: a new hint needs a situation."""
    assert len(NOT_RUN) <= 400, len(NOT_RUN)
