"""The rows of perf on a small built clone: they are measured and recorded, and the user's files do
not change.
"""

import json

from tests.small.world import World
from tests.support.test_perf import kept, perf


def test_built_rows_are_measured_beside_what_is_typed_by_hand_and_the_tree_stays_as_it_is(
    built: World,
) -> None:
    before = kept(built)
    record = built.folder / "record.json"
    args = [argument for name in ("status", "no-op", "warm") for argument in ("--row", name)]
    ended = perf(built, *args, "--repeat", "1", "--json", str(record))
    assert ended.code == 0, ended.output
    assert ended.out == ""
    rows = {row["name"]: row for row in json.loads(record.read_text())["rows"]}
    assert list(rows) == ["status", "no-op", "warm"]
    for row in rows.values():
        ratio, samples = row["ratio"], row["samples_s"]
        assert isinstance(ratio, dict)
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        assert isinstance(samples, dict)
        assert [len(samples[side]) for side in ("measured", "against")] == [1, 1]
        assert row["verdict"] in ("met", "missed", "no aim")
    assert kept(built) == before
    assert built.status()["install"] == "ok"
    assert not list(built.layout.state.glob(".perf*"))
