"""Random kills of the real bootstrap on a real clone; needs warm caches or the network, 3 GB of disk, and about a minute a kill."""

from pathlib import Path

import pytest

from tests.proof.kill.real import prove


def test_killed_at_random_moments_on_the_real_tree(tmp_path: Path, seed: int, times: int, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        assert prove(tmp_path / "real", seed=seed, times=times) == 0
