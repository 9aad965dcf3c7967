"""Random kills on the real tree: of bootstrap (warm caches or the network, 3 GB of disk, a minute a
kill), of the verbs on the stack and on the pin.
"""

from pathlib import Path

import pytest

from tests.proof.kill import real, real_pin, real_stack


def test_killed_at_random_moments_on_the_real_tree(
    tmp_path: Path, seed: int, times: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        assert real.prove(tmp_path / "real", seed=seed, times=times) == 0


def test_stack_verbs_killed_at_random_moments_on_the_real_tree(
    tmp_path: Path, seed: int, times: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        assert real_stack.prove(tmp_path / "stack", seed=seed, times=times) == 0


def test_pin_verbs_killed_at_random_moments_on_the_real_tree(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        assert real_pin.prove(tmp_path / "pin", seed=seed) == 0
