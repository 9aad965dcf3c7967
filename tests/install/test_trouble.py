"""Each fault gives a sentence, a hint and its exit code; the next bootstrap resumes."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small.materials import VERSION, Materials
from tests.small.world import Ended, World


def test_index_without_the_version_is_named(world: World, materials: Materials) -> None:
    world.index.hide(materials.archive.name)
    sentence = world.run("bootstrap").error(11)
    assert "vllm" in sentence
    assert VERSION in sentence
    assert list(world.layout.vllm.iterdir()) == []


@pytest.mark.parametrize(
    "damage", ["\ufeffMAX_JOBS=2\n", "MAX_JOBS=2\r\n", "MAX_JOBS=many\n", "this is no line\n", None]
)
def test_damaged_dotenv_stops_before_anything_is_touched(world: World, damage: str | None) -> None:
    (
        world.layout.dotenv.mkdir()
        if damage is None
        else world.layout.dotenv.write_bytes(damage.encode())
    )
    assert ".env" in world.run("bootstrap").error(2)
    assert list(world.layout.vllm.iterdir()) == []
    assert not world.layout.environment.exists()


def test_too_little_disk_is_found_before_anything_is_fetched(world: World) -> None:
    ended = in_small_filesystem(world)
    sentence = ended.error(6)
    assert "disk" in sentence.lower() or "GiB" in sentence
    assert world.index.requests == []
    assert not world.layout.environment.exists()


def in_small_filesystem(world: World) -> Ended:
    """Run bootstrap with the cache on a file system of 64 MiB, in a separate mount namespace."""
    cache = world.folder / "cache"
    mount = [
        "unshare",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs -o size=64m small "$0" && exec "$@"',
        str(cache),
    ]
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine forbids to mount a small file system")
    return world.run("bootstrap", through=mount)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    mode = folder.stat().st_mode
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(mode)


def test_clone_that_cannot_be_written_is_named(world: World) -> None:
    with read_only(world.root):
        ended = world.run(
            "bootstrap",
            through=(
                ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
                if os.geteuid() == 0
                else []
            ),
        )
    sentence = ended.error(6)
    assert str(world.root) in sentence
    assert not world.layout.environment.exists()
