"""probes/small_model.py without torch: its refusals, and the folder after a failure."""

import subprocess
import sys
from pathlib import Path

from workspace.core.paths import here

PROBE = here().probes / "small_model.py"


def run(*args: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, PROBE, *args], capture_output=True, text=True, timeout=60, check=False
    )


def test_existing_folder_is_not_touched(tmp_path: Path) -> None:
    kept = tmp_path / "model"
    kept.mkdir()
    (kept / "mine").write_text("mine")
    done = run(kept)
    assert done.returncode == 2
    assert "exists already" in done.stderr
    assert [path.name for path in kept.iterdir()] == ["mine"]


def test_dangling_link_in_its_place_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
    assert run(tmp_path / "model").returncode == 2
    assert not (tmp_path / "elsewhere").exists()


def test_failure_half_way_leaves_no_folder(tmp_path: Path) -> None:
    done = run(tmp_path / "model")
    assert "No module named 'torch'" in done.stderr
    assert done.returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path / "model", "--architecture", "gpt")
    assert done.returncode == 2
    assert "qwen3" in done.stderr
