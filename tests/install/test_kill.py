"""A test for each defect of bootstrap that tests/proof/kill has found."""

import shutil
from pathlib import Path

from tests.small.materials import git
from tests.small.world import World
from workspace.core.files import write_atomic


def test_half_removed_package_is_installed_again(built: World) -> None:
    info = next(built.layout.environment.glob("lib/*/site-packages/tokenizers-*.dist-info"))
    (info / "METADATA").unlink()
    built.bootstrap()
    assert (info / "METADATA").exists()


def test_half_linked_package_is_not_taken_for_whole(built: World) -> None:
    module = next(built.layout.environment.glob("lib/*/site-packages/regex/__init__.py"))
    module.unlink()
    built.layout.stamp("environment").unlink()
    built.bootstrap()
    assert module.exists()


def test_series_is_applied_in_a_clone_that_was_copied(built: World) -> None:
    built.git("checkout", "--quiet", "--detach", built.materials.archive_commit)
    copy = built.folder / "copy"
    shutil.copytree(built.root, copy, symlinks=True)
    shutil.rmtree(built.root)
    copy.rename(built.root)
    built.bootstrap()
    assert git(built.layout.vllm, "rev-parse", "HEAD") == git(
        built.layout.vllm, "rev-parse", "refs/patches/tip"
    )


def test_move_to_the_series_that_was_killed_is_finished_beside_a_new_file_of_the_users(
    built: World,
) -> None:
    built.git("checkout", "--quiet", "--detach", built.materials.archive_commit)
    built.begin_move(built.git("rev-parse", "refs/patches/tip"))
    (built.layout.vllm / "new.txt").write_text("mine\n")
    # As git leaves it between removing a file and writing it anew.
    (built.layout.vllm / "setup.py").unlink()
    (built.layout.vllm / ".git" / "index.lock").touch()
    built.bootstrap()
    assert git(built.layout.vllm, "rev-parse", "HEAD") == git(
        built.layout.vllm, "rev-parse", "refs/patches/tip"
    )
    assert git(built.layout.vllm, "status", "--porcelain") == "?? new.txt"


def test_file_that_a_killed_writer_left_beside_its_own_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".claim.json.abcdefgh").write_text("half")
    (tmp_path / ".claim.json.mine").write_text("of another name")
    write_atomic(tmp_path / "claim.json", b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".claim.json.mine", "claim.json"]
