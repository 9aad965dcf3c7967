"""Shared fixtures: the small world. What it is made of is in tests/small."""

import compileall
import contextlib
import gc
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

from tests.screens import recorded
from tests.small.index import serve
from tests.small.materials import ROOT, Materials, gather, prepare
from tests.small.world import World, make_world

# Rooms whose modules use a world that takes long to make.
SHARE_A_WORLD = ("tests/bump", "tests/fuzz")
# Modules that read the whole library, which tests/parsed.py parses once a worker.
READ_THE_LIBRARY = (
    *("tests/test_architecture.py", "tests/test_children.py", "tests/test_hints.py"),
    *("tests/test_words.py", "tests/install/test_kernel_source.py"),
)
# A file system in memory: a run makes 150,000 files and folders, and git syncs many of them.
IN_MEMORY = Path("/dev/shm")
# A whole run leaves 0.9 GiB there.
ROOM_BYTES = 4 << 30


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--screens",
        metavar="FOLDER",
        type=lambda text: Path(text).resolve(),
        help="keep each error, row and message as a terminal of 100 columns shows it",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Containers set PYTHONDONTWRITEBYTECODE; each worker would then compile all tests again, and
    # each verb in a copy of this clone the library.
    sys.dont_write_bytecode = False
    if not hasattr(config, "workerinput"):
        compileall.compile_dir(ROOT / "workspace", quiet=2)
        # Where TMPDIR does not ask for another place.
        if "TMPDIR" not in os.environ and _has_room(IN_MEMORY):
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(IN_MEMORY))
    # A shell's background job ignores SIGINT, and so would the verbs that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # nohup ignores this one, for every child.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _has_room(folder: Path) -> bool:
    """Return whether programs run in the folder, and a run of the suite fits in it."""
    try:
        flags = os.statvfs(folder).f_flag
        # A file system in memory promises more than there is.
        free = min(shutil.disk_usage(folder).free, psutil.virtual_memory().available)
        return not flags & os.ST_NOEXEC and free >= ROOM_BYTES
    except OSError:
        return False


def pytest_xdist_auto_num_workers() -> int:
    """Half as many workers again as cores: a third of the time of the tests is waiting."""
    return (os.cpu_count() or 1) * 3 // 2 or 1


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    """Give each worker whole modules, and modules together that share what takes long to make."""
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = _unit
    return scheduler


def _unit(nodeid: str) -> str:
    module = nodeid.partition("::")[0]
    if module in READ_THE_LIBRARY:
        return "the library"
    return module if module.rpartition("/")[0] not in SHARE_A_WORLD else module.rpartition("/")[0]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let workers begin with what takes longest: the units with most tests in a small world."""
    if hasattr(config, "workerinput"):
        use_worlds = Counter(
            _unit(item.nodeid) for item in items if "materials" in getattr(item, "fixturenames", ())
        )
        items.sort(key=lambda item: -use_worlds[_unit(item.nodeid)])


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
        made = gather(folder, index)
        yield made
        made.warm.close()


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
