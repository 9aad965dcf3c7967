"""Hints lead on: each is run in the situation that prints it."""

import pytest

from tests.proof.hints.following import Situation, User
from tests.proof.hints.table import SITUATIONS
from tests.small.world import World


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.run.__name__)
def test_hint_leads_on_in_its_situation(built: World, situation: Situation) -> None:
    user = User(built)
    user.enter_home()
    situation.run(user)
    assert user.followed == set(situation.hints)
