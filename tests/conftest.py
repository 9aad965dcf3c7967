"""Shared fixtures: the small world. What it is made of is in tests/small."""

import compileall
import contextlib
import gc
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.screens import recorded
from tests.small.index import serve
from tests.small.materials import ROOT, Materials, gather, prepare
from tests.small.world import World, make_world


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--screens",
        metavar="FOLDER",
        type=lambda text: Path(text).resolve(),
        help="keep each error, row and message as a terminal of 100 columns shows it",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Containers set PYTHONDONTWRITEBYTECODE; each worker would then compile all tests again, and
    # each verb in a copy of this clone the library.
    sys.dont_write_bytecode = False
    if not hasattr(config, "workerinput"):
        compileall.compile_dir(ROOT / "workspace", quiet=2)
    # A shell's background job ignores SIGINT, and so would the verbs that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # nohup ignores this one, for every child.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect without looking for garbage: what is made here stays until the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _screens(request: pytest.FixtureRequest) -> Iterator[None]:
    folder = request.config.getoption("--screens")
    with recorded(folder) if folder else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Materials]:
    """Upstream, archive, wheels and a package index, once a session."""
    folder = tmp_path_factory.mktemp("small")
    with serve(prepare(folder)) as index:
        yield gather(folder, index)


@pytest.fixture
def world(materials: Materials, tmp_path: Path) -> Iterator[World]:
    """A fresh clone in which nothing was built."""
    made = make_world(materials, tmp_path)
    yield made
    made.end()


@pytest.fixture(scope="session")
def _bootstrapped(materials: Materials, tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(materials, tmp_path_factory.mktemp("built"))
    # As on a machine that has a package index and no way to the git server.
    made.first = made.bootstrap(
        "--source", "auto", env={"VLLM_MIRROR": (made.folder / "nowhere").as_uri()}
    )
    made.save()
    return made


@pytest.fixture
def built(_bootstrapped: World) -> Iterator[World]:
    """A bootstrapped clone, put back to that state for each test; always at the same path, which
    its environment holds.
    """
    _bootstrapped.restore()
    yield _bootstrapped
    _bootstrapped.end()
