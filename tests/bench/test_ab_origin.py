"""Both arms of an A/B import their own vLLM: the probe's answer, read as the session reads it."""

import subprocess
import sys
from pathlib import Path

import pytest

from workspace.bench import ab_trees
from workspace.core.errors import BuildError
from workspace.core.paths import Layout, here
from workspace.install.sandbox import Sandbox


@pytest.fixture
def arm(tmp_path: Path) -> Sandbox:
    """A sandbox with a real interpreter and a package `vllm` in its tree, not installed."""
    layout = Layout(tmp_path / "outer/.workspace/sandboxes/ab-a")
    layout.root.mkdir(parents=True)
    (layout.root / "workspace").symlink_to(here().root / "workspace")
    (layout.vllm / "vllm").mkdir(parents=True)
    (layout.vllm / "vllm/__init__.py").touch()
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", layout.environment], check=True, timeout=60
    )
    return Sandbox("ab-a", Layout(tmp_path / "outer"), layout, "0" * 40)


def install(arm: Sandbox, tree: Path) -> None:
    (packages,) = arm.layout.environment.glob("lib/python*/site-packages")
    (packages / "vllm.pth").write_text(f"{tree}\n")


def test_an_arm_that_imports_its_own_tree_is_accepted(arm: Sandbox) -> None:
    install(arm, arm.layout.vllm)
    assert ab_trees.require_own_vllm(arm, {}) == arm.layout.vllm / "vllm/__init__.py"


def test_an_arm_that_imports_another_tree_or_none_is_refused(arm: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="imports vllm from nowhere"):
        ab_trees.require_own_vllm(arm, {})
    other = tmp_path / "other"
    (other / "vllm").mkdir(parents=True)
    (other / "vllm/__init__.py").touch()
    install(arm, other)
    with pytest.raises(BuildError, match=f"imports vllm from {other}/vllm/__init__.py"):
        ab_trees.require_own_vllm(arm, {})
