"""Every row of perf on a small built clone: measured, recorded, and nothing of the user's touched."""

import json

from tests.perf.test_door import kept, perf, rows_of
from tests.small.world import World


def test_built_rows_are_measured_beside_what_is_typed_by_hand_and_the_tree_stays_as_it_is(built: World) -> None:
    before = kept(built)
    record = built.folder / "record.json"
    words = [word for name in ("wrapper-inv", "wrapper-nox", "status", "no-op", "warm") for word in ("--row", name)]
    ended = perf(built, *words, "--repeat", "1", "--json", str(record))
    assert ended.code == 0, ended.said
    rows = rows_of(ended)
    assert list(rows) == ["wrapper-inv", "wrapper-nox", "status", "no-op", "warm"]
    for row in rows.values():
        ratio, samples = row["ratio"], row["samples"]
        assert isinstance(ratio, dict)
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        assert isinstance(samples, dict)
        assert [len(samples[side]) for side in ("measured", "against")] == [1, 1]
        assert row["verdict"] in ("met", "missed", "no aim")
    assert json.loads(record.read_text()) == json.loads(ended.out)
    assert kept(built) == before
    assert built.status()["install"] == "ok"
    assert not list(built.layout.state.glob(".perf*"))
