"""The cache of the tiny model, with a stand-in for the probe that needs torch."""

import io
import sys
from pathlib import Path

import pytest

from workspace.core.console import Console, RunLog
from workspace.core.errors import BuildError
from workspace.core.paths import Layout
from workspace.core.settings import Settings, load
from workspace.server import models

PROBE = (
    "import sys, pathlib\nfolder = pathlib.Path(sys.argv[1])\nfolder.mkdir(parents=True)\n(folder /"
    " 'arguments').write_text(' '.join(sys.argv[2:]))\n"
)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path)
    made.environment_python.parent.mkdir(parents=True)
    made.environment_python.symlink_to(sys.executable)
    made.probes.mkdir(parents=True)
    (made.probes / "small_model.py").write_text(PROBE)
    install(made, "transformers", "5.17.0")
    return made


def install(layout: Layout, name: str, version: str) -> None:
    folder = layout.environment / "lib" / "python3.11" / "site-packages"
    for old in folder.glob(f"{name}-*"):
        (old / "METADATA").unlink()
        old.rmdir()
    made = folder / f"{name}-{version}.dist-info"
    made.mkdir(parents=True)
    (made / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")


def tiny(layout: Layout, architecture: models.Architecture = "llama") -> Path:
    settings: Settings = load(layout, environ={"PATH": "/usr/bin:/bin"})
    console = Console(out=io.StringIO(), err=io.StringIO())
    with RunLog(console, layout.logs, verb="test") as run_log:
        return models.tiny(layout, settings, run_log=run_log, architecture=architecture)


def test_model_is_made_once_and_the_second_call_runs_no_probe(layout: Layout) -> None:
    first = tiny(layout)
    assert (first / "arguments").read_text() == "--architecture llama --seed 0"
    (layout.environment_python).unlink()
    assert tiny(layout) == first


def test_other_recipe_is_another_model(layout: Layout) -> None:
    folders = {tiny(layout), tiny(layout, "qwen3")}
    (layout.probes / "small_model.py").write_text(PROBE + "# other weights\n")
    folders.add(tiny(layout))
    install(layout, "transformers", "5.18.0")
    folders.add(tiny(layout))
    assert len(folders) == 4


def test_failing_probe_is_an_error_with_a_hint(layout: Layout) -> None:
    (layout.probes / "small_model.py").write_text("raise ImportError('libtorch.so is missing')")
    with pytest.raises(BuildError, match="libtorch.so is missing") as caught:
        tiny(layout)
    assert caught.value.hint == "./scripts/inv bootstrap"
