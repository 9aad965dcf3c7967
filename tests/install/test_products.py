"""Build products leave the tree with their pin, and the user's own files never do."""

from pathlib import Path

import pytest

from tests.small.materials import git
from workspace.core.paths import Layout
from workspace.install import stages

IGNORED = """# generated
/vllm/_version.py
vllm/flash/*
!vllm/flash/__init__.py
vllm/third_party/kernels/
vllm/vllm-rs
*.so
*.log
__pycache__/
*.egg-info/
.DS_Store
"""
BUILT = (
    "vllm.egg-info/PKG-INFO",
    "vllm/_C.so",
    "vllm/_version.py",
    "vllm/flash/deep/x.py",
    "vllm/third_party/kernels/a/b.py",
    "vllm/vllm-rs",
)
MINE = (
    "vllm/run.log",
    "vllm/.DS_Store",
    "vllm/third_party/kernels-of-mine.log",
    "run.log",
    "other/_C.so",
)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path)
    (made.vllm / "vllm" / "flash").mkdir(parents=True)
    git(made.vllm, "init", "--quiet")
    (made.vllm / ".gitignore").write_text(IGNORED)
    (made.vllm / "vllm" / "flash" / "__init__.py").write_text("")
    git(made.vllm, "add", "--all")
    for path in (*BUILT, *MINE, "vllm/third_party/kernels/a/__pycache__/b.cpython-311.pyc"):
        (made.vllm / path).parent.mkdir(parents=True, exist_ok=True)
        (made.vllm / path).write_text(path)
    return made


def test_products_are_what_upstream_names_and_no_log_of_the_users(layout: Layout) -> None:
    assert stages.build_products(layout.vllm) == BUILT
    (layout.vllm / ".gitignore").unlink()
    assert stages.build_products(layout.vllm) == ()


def test_products_that_exist_nowhere_else_are_moved_and_no_empty_package_stays(
    layout: Layout, tmp_path: Path
) -> None:
    kept, left = tmp_path / "kept", tmp_path / "left"
    (kept / "vllm").mkdir(parents=True)
    (kept / "vllm" / "_version.py").write_text("vllm/_version.py")
    (kept / "vllm" / "vllm-rs").write_text("another one")
    stages.take_products_away(
        layout, stages.build_products(layout.vllm), ours=("vllm/_C.so",), kept=kept, left=left
    )
    assert stages.build_products(layout.vllm) == ()
    assert all((layout.vllm / path).read_text() == path for path in MINE)
    found = {
        str(path.relative_to(left)): path.read_text() for path in left.rglob("*") if path.is_file()
    }
    assert found == {path: path for path in BUILT if path not in ("vllm/_C.so", "vllm/_version.py")}
    assert not (layout.vllm / "vllm" / "third_party" / "kernels").exists()
    assert (layout.vllm / "vllm" / "flash" / "__init__.py").exists()
    # Again, as after a kill: what is gone is passed over.
    stages.take_products_away(layout, BUILT, ours=(), kept=None, left=left)
