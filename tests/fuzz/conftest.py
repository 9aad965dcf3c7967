"""Two depths of the same properties: few and always the same examples by default, thousands of
random ones with --hypothesis-profile=deep.
"""

import random
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.fuzz.door import Door
from tests.fuzz.places import restored
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
def _fresh(materials: Materials, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    folder = tmp_path_factory.mktemp("fresh")
    world = make_world(materials, folder)
    door = Door(world, folder)
    yield door
    door.close()
    world.end()


@pytest.fixture
def fresh(_fresh: Door) -> Iterator[Door]:
    """The door of a clone in which nothing was built; what a test changes there is put back."""
    with restored(_fresh.world.root):
        yield _fresh


@pytest.fixture
def whole(built: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """The door of a bootstrapped clone."""
    door = Door(built, tmp_path_factory.mktemp("whole"))
    yield door
    door.close()
