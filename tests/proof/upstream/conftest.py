"""A small upstream with tests, and an index with this environment's pytest as wheels."""

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small import wheels
from tests.small.index import serve
from tests.small.materials import VERSION, Materials, gather, prepare
from tests.small.world import World, make_world

# pytest and its requirements. The others have no wheel here, and the small tests do not need them.
REAL = ("pytest", "pytest-xdist", "execnet", "iniconfig", "pluggy", "pygments")
EMPTY = ("pytest-asyncio", "pytest-forked", "pytest-rerunfailures", "tblib")
TIMEOUT = b"def pytest_addoption(parser):\n    parser.addoption('--timeout')\n"
TREE = {
    "vllm/alpha.py": "def answer():\n    return 42\n",
    "vllm/beta.py": "",
    "vllm/hub.py": "def ask():\n    return 'tokenizer'\n",
    "tests/__init__.py": "",
    # As in upstream's pyproject.toml.
    "tests/conftest.py": (
        "def pytest_configure(config):\n"
        "    config.addinivalue_line('markers', 'cpu_test: runs on CPUs')\n"
    ),
    "tests/test_alpha.py": (
        "import pytest\n\nfrom vllm.alpha import answer\n\n"
        "pytestmark = pytest.mark.cpu_test\n\n"
        "def test_answer():\n    assert answer() == 42\n\n"
        "def test_is_whole():\n    assert answer() % 1 == 0\n\n"
        "def test_old_wound():\n    assert answer() == 43\n"
    ),
    "tests/test_beta.py": "def test_on_a_gpu():\n    assert False\n",
    "tests/test_hub.py": (
        "import pytest\nfrom huggingface_hub.errors import OfflineModeIsEnabled\n\n"
        "from vllm import hub\n\npytestmark = pytest.mark.cpu_test\n\n"
        "def test_model():\n    raise OfflineModeIsEnabled('no model')\n\n"
        "def test_tokenizer():\n    assert hub.ask() == 'tokenizer'\n"
    ),
    # A small copy of the library: the parts that the tests use.
    "huggingface_hub/__init__.py": "",
    "huggingface_hub/errors.py": "class OfflineModeIsEnabled(ConnectionError):\n    pass\n",
}


def repack(folder: Path, name: str, version: str = "") -> None:
    """Make a wheel from an installed package."""
    found = importlib.metadata.distribution(name)
    version = version or found.version
    members = {}
    for file in found.files or ():
        if ".." not in file.parts and file.suffix != ".pyc" and ".dist-info" not in file.parts[0]:
            members[str(file)] = Path(str(found.locate_file(file))).read_bytes()
    if entries := found.read_text("entry_points.txt"):
        members[f"{name.replace('-', '_')}-{version}.dist-info/entry_points.txt"] = entries.encode()
    wheels.write(folder, name, version, members, requires=found.requires or ())


@pytest.fixture(scope="session")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Materials]:
    folder = tmp_path_factory.mktemp("small")
    served = prepare(folder)
    for name, text in TREE.items():
        path = folder / "upstream" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    wheels.write_archive(served, folder / "upstream", VERSION)
    for name in REAL:
        repack(served, name)
    # Instead of the stand-in in .vllm: pytest uses the installed package.
    repack(served, "packaging", {name: version for name, version, _ in wheels.PLAIN}["packaging"])
    for name in EMPTY:
        wheels.write(served, name, "1.0", {})
    entries = {
        "pytest_timeout-2.4.0.dist-info/entry_points.txt": b"[pytest11]\ntimeout = pytest_timeout\n"
    }
    wheels.write(served, "pytest-timeout", "2.4.0", {"pytest_timeout.py": TIMEOUT, **entries})
    with serve(served) as index:
        yield gather(folder, index)


@pytest.fixture(scope="session")
def _equipped(materials: Materials, tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(materials, tmp_path_factory.mktemp("equipped"))
    made.bootstrap()
    made.save()
    return made


@pytest.fixture
def built(_equipped: World) -> Iterator[World]:
    """A bootstrapped clone whose tree has tests, as bootstrap left it."""
    _equipped.restore()
    yield _equipped
    _equipped.end()
