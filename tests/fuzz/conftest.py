"""Two depths of the same properties: few and always the same examples by default, thousands of
random ones with --hypothesis-profile=deep.
"""

import random
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.fuzz.places import restored
from tests.fuzz.warm_inv import WarmInv
from tests.small.materials import Materials
from tests.small.world import World, make_world

settings.register_profile("deep", settings.get_profile("default"))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Before Hypothesis's own plugin reads it: a run that finds something can be repeated.
    if (
        config.getoption("--hypothesis-profile") == "deep"
        and config.getoption("--hypothesis-seed") is None
    ):
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))


def pytest_report_header(config: pytest.Config) -> str | None:
    seed = config.getoption("--hypothesis-seed")
    return (
        f"seed {seed}; the same examples again: --hypothesis-profile=deep --hypothesis-seed={seed}"
        if seed is not None
        else None
    )


@pytest.fixture(scope="package")
def _fresh(materials: Materials, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmInv]:
    folder = tmp_path_factory.mktemp("fresh")
    world = make_world(materials, folder)
    yield WarmInv(world)
    world.end()


@pytest.fixture
def fresh(_fresh: WarmInv) -> Iterator[WarmInv]:
    """A warm `inv` of a clone without a build; changes of a test are undone."""
    with restored(_fresh.world.root):
        yield _fresh


@pytest.fixture
def whole(built: World) -> WarmInv:
    """A warm `inv` of a bootstrapped clone."""
    return WarmInv(built)
