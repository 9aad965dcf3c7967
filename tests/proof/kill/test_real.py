"""Random kills on the real tree: of bootstrap, which needs warm caches or the network, 3 GB of disk and about a minute a kill, and of the stack's verbs."""

from pathlib import Path

import pytest

from tests.proof.kill import real, real_stack


def test_killed_at_random_moments_on_the_real_tree(tmp_path: Path, seed: int, times: int, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        assert real.prove(tmp_path / "real", seed=seed, times=times) == 0


def test_stack_verbs_killed_at_random_moments_on_the_real_tree(tmp_path: Path, seed: int, times: int, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        assert real_stack.prove(tmp_path / "stack", seed=seed, times=times) == 0
