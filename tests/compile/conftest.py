"""A build folder for the tests of launchers, and the end of every process started in it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compile.launching import Site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path / "build")
    yield made
    made.end()
