"""Whether a model is on disk, by its files alone: an incomplete model does not count."""

import json
from pathlib import Path

import pytest

from tests.machine.conftest import House, house
from workspace.core.paths import Layout
from workspace.core.settings import load
from workspace.server import models, recipes

__all__ = ["house"]
MODEL = "some/model"


def snapshot(cache: Path, names: dict[str, str | None], *, commit: str = "abc1") -> Path:
    """Make a repository in the cache; a file without content is a link to a missing blob."""
    repository = cache / "models--some--model"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    for name, content in names.items():
        (folder / name).symlink_to(repository / "blobs" / name)
        if content is not None:
            (repository / "blobs").mkdir(exist_ok=True)
            (repository / "blobs" / name).write_text(content)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return folder


INDEX = json.dumps(
    {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
)


@pytest.mark.parametrize(
    ("files", "is_complete"),
    [
        ({"config.json": "{}", "model.safetensors": "x"}, True),
        (
            {
                "config.json": "{}",
                "model-00001-of-00002.safetensors": "x",
                "model-00002-of-00002.safetensors": "x",
                "model.safetensors.index.json": INDEX,
            },
            True,
        ),
        (
            {
                "config.json": "{}",
                "model-00001-of-00002.safetensors": "x",
                "model.safetensors.index.json": INDEX,
            },
            False,
        ),
        ({"config.json": "{}", "model-00001-of-00002.safetensors": "x"}, False),
        (
            {
                "config.json": "{}",
                "model-00001-of-00002.safetensors": "x",
                "model-00002-of-00002.safetensors": None,
            },
            False,
        ),
        ({"config.json": "{}"}, False),
        ({"model.safetensors": "x"}, False),
        ({"config.json": None, "model.safetensors": "x"}, False),
        (
            {"config.json": "{}", "model.safetensors": "x", "model.safetensors.index.json": "{"},
            False,
        ),
        (
            {"config.json": "{}", "model.safetensors": "x", "model.safetensors.index.json": "[]"},
            True,
        ),
    ],
)
def test_snapshot_counts_only_with_all_of_its_parts(
    tmp_path: Path, files: dict[str, str | None], is_complete: bool
) -> None:
    folder = snapshot(tmp_path, files)
    assert models.snapshot(tmp_path, MODEL) == (folder if is_complete else None)


@pytest.mark.parametrize("content", [b"", b"../../../etc", b"\xff", b"abc1\0", None])
def test_damaged_reference_is_no_model(tmp_path: Path, content: bytes | None) -> None:
    snapshot(tmp_path, {"config.json": "{}", "model.safetensors": "x"})
    reference = tmp_path / "models--some--model" / "refs" / "main"
    reference.unlink()
    if content is not None:
        reference.write_bytes(content)
    assert models.snapshot(tmp_path, MODEL) is None


@pytest.mark.parametrize(
    ("shell", "place"),
    [
        ({"HF_HUB_CACHE": "/c"}, "/c"),
        ({"HF_HOME": "/h"}, "/h/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({}, "/home/someone/.cache/huggingface/hub"),
    ],
)
def test_cache_is_in_the_folder_of_huggingface_hub(
    tmp_path: Path, shell: dict[str, str], place: str
) -> None:
    assert models.hub_cache(
        load(Layout(tmp_path), environ={"PATH": "/bin", "HOME": "/home/someone", **shell})
    ) == Path(place)


def test_folder_counts_only_with_weights(house: House, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text("{}")
    assert models.found_weights(house.machine(), recipes.unnamed(str(own))) is None
    (own / "a.safetensors").touch()
    assert models.found_weights(house.machine(), recipes.unnamed(str(own))) == own
