"""`inv pin`: one row for each pin, state and release; unreachable remotes are unknown."""

import json

from tests.small.index import Fault
from tests.small.world import World


def rows(world: World, *args: str) -> dict[str, dict]:
    ended = world.run("pin.show", "--json", *args)
    assert ended.code == 0, ended.output
    return {row["name"]: row for row in json.loads(ended.out)["rows"]}


def test_pin_stack_known_good_states_and_newer_releases_are_shown_with_their_age(
    clone: World,
) -> None:
    found = rows(clone)
    assert found["pin"]["facts"]["tag"] == "v0.31.0"
    assert found["patches"]["facts"]["state"] == "applied"
    assert found["good"]["facts"]["current"] is True
    assert list(found["newer"]["facts"]["versions"])[:1] == ["0.32.0"]
    assert "days)" in found["newer"]["text"]
    # Triton's remote cannot be reached from here.
    assert (found["triton"]["state"], "unknown" in found["triton"]["text"]) == ("warn", True)
    assert "bump" not in found


def test_without_a_network_everything_else_is_still_shown(clone: World) -> None:
    clone.index.faults["vllm"] = Fault(status=503)
    ended = clone.run("pin", "--offline")
    assert ended.code == 0, ended.output
    assert clone.index.requests == []
    assert ended.out.splitlines()[0].startswith("ok       pin           v0.31.0")
    assert "skipped  newer" in ended.out
