"""Every bootstrap keeps the user's work in the clone."""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

from tests.small import wheels
from tests.small.materials import VERSION, git
from tests.small.world import World
from workspace.core import settings
from workspace.core.errors import SmokeError
from workspace.install import status
from workspace.machine.machine import Machine


def require_built(world: World) -> None:
    known = settings.load(world.layout, environ=world.env)
    status.require_built(Machine(world.layout, known))


def test_commit_and_edit_survive_a_bootstrap_and_are_live(built: World) -> None:
    version = built.layout.vllm / "vllm" / "version.py"
    version.write_text(version.read_text() + "COMMITTED = 1\n")
    built.git("commit", "--all", "-m", "Mine")
    mine = built.git("rev-parse", "HEAD")
    version.write_text(version.read_text() + "EDITED = 2\n")
    (built.layout.vllm / "vllm" / "new.py").write_text("NEW = 3\n")
    built.bootstrap()
    assert built.git("rev-parse", "HEAD") == mine
    assert built.git("status", "--porcelain").splitlines() == [
        "M vllm/version.py",
        "?? vllm/new.py",
    ]
    assert (
        built.python(
            "from vllm.version import COMMITTED, EDITED; from vllm.new import NEW; print(COMMITTED,"
            " EDITED, NEW)"
        )
        == "1 2 3"
    )
    require_built(built)


def test_edit_of_a_compiled_source_makes_the_kernels_stale_and_smoke_refuses(built: World) -> None:
    require_built(built)
    source = built.layout.vllm / "csrc" / "cpu" / "answer.c"
    source.write_text(source.read_text().replace("42", "43"))
    rows = built.status()
    assert rows["kernels"] == "stale"
    assert rows["next"] == "./scripts/inv rebuild"
    with pytest.raises(SmokeError, match=r"kernels stale: .*csrc/cpu/answer\.c") as caught:
        require_built(built)
    assert caught.value.hint == "./scripts/inv rebuild"
    # Only a compiler can fix that: bootstrap reports it, and does not loop.
    ended = built.bootstrap()
    assert "csrc/cpu/answer.c" in ended.err
    assert "43" in source.read_text()


def test_repository_with_another_history_is_left_as_it_is(world: World) -> None:
    git(world.layout.vllm, "init", "--quiet")
    (world.layout.vllm / "setup.py").write_text("print('another project')\n")
    git(world.layout.vllm, "add", "--all")
    git(world.layout.vllm, "commit", "--quiet", "-m", "Another project")
    head = git(world.layout.vllm, "rev-parse", "HEAD")
    ended = world.run("bootstrap")
    assert ended.code == 3, ended.output
    assert git(world.layout.vllm, "rev-parse", "HEAD") == head
    assert (world.layout.vllm / "setup.py").read_text() == "print('another project')\n"


def test_torch_that_a_requirement_swaps_is_an_error_that_names_the_step(
    world: World, tmp_path: Path
) -> None:
    # A package that writes over torch's own files: no resolver sees that.
    says = b"__version__ = '2.99.0+swapped'\ncuda = None\ndebug = False\nhip = None\n"
    world.index.add(
        wheels.write(
            tmp_path / "evil",
            "regex",
            "2026.9.9",
            {"regex/__init__.py": b"", "torch/version.py": says},
        )
    )
    ended = world.run("bootstrap")
    assert ended.code == 7, ended.output
    assert "2.13.0+cpu" in ended.err
    assert "2.99.0+swapped" in ended.err
    assert "requirements" in next(
        line for line in ended.err.splitlines() if line.startswith("error:")
    )


def test_use_existing_torch_keeps_a_torch_that_no_index_has_and_edits_no_file_of_the_tree(
    built: World, tmp_path: Path
) -> None:
    built.uv("install", str(wheels.write_torch(tmp_path, "9.9.9+local", cuda=None)))
    assert built.status()["environment"] == "stale"
    built.env["USE_EXISTING_TORCH"] = "1"
    built.bootstrap()
    assert (
        built.python("import torch, vllm; print(torch.__version__, vllm.__version__)")
        == f"9.9.9+local {VERSION}+cpu"
    )
    assert built.git("status", "--porcelain") == ""
    assert "torch==2.13.0" in (built.layout.vllm / "requirements" / "cpu.txt").read_text()
    assert set(built.status().values()) >= {"ok"}
    assert "stale" not in built.status().values()


@pytest.mark.parametrize("moment", ["files written", "index written"])
def test_patches_that_were_killed_while_they_were_written_are_no_edits_of_the_user(
    built: World, moment: str
) -> None:
    # What SIGKILL leaves of `git reset`: new files under the old HEAD, with the old index and its
    # lock, or with the new index.
    tip = built.git("rev-parse", "HEAD")
    built.git("update-ref", "--no-deref", "HEAD", "HEAD~1")
    built.begin_move(tip)
    if moment == "files written":
        built.git("read-tree", "HEAD")
        (built.layout.vllm / ".git" / "index.lock").touch()
    built.bootstrap()
    assert built.git("rev-parse", "HEAD") == tip
    assert built.git("status", "--porcelain") == ""


def copied(built: World) -> Path:
    """A copy of the whole clone, as `cp -a` makes it."""
    copy = Path(tempfile.mkdtemp(dir=built.folder)) / "copy"
    subprocess.run(["cp", "-a", built.root, copy], check=True)
    return copy


def verb_in(root: Path, world: World, *args: str) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-Es", "-B", root / "tasks.py", *args]
    return subprocess.run(argv, env=world.env, text=True, capture_output=True, check=False)


IMPORT = ("run", "--", "python", "-c", "import vllm; print('FROM', vllm.__file__)")


@pytest.mark.parametrize("verb", [IMPORT, ("shell",), ("run", "--", "true")], ids=" ".join)
def test_copied_clone_runs_no_code_of_the_original(built: World, verb: tuple[str, ...]) -> None:
    copy = copied(built)
    ended = verb_in(copy, built, *verb)
    assert (ended.returncode, "FROM" in ended.stdout) == (8, False)
    assert f".vllm imports vLLM from {built.layout.vllm}, not from this clone" in ended.stderr
    assert "hint: ./scripts/inv bootstrap" in ended.stderr
    # The original is not concerned.
    assert built.run(*IMPORT).out.strip() == f"FROM {built.layout.vllm}/vllm/__init__.py"


def test_copied_clone_runs_its_own_code_after_a_bootstrap(built: World) -> None:
    copy = copied(built)
    done = verb_in(copy, built, "bootstrap", "--no-first-token")
    assert done.returncode == 0, done.stderr
    ended = verb_in(copy, built, *IMPORT)
    assert ended.stdout.strip() == f"FROM {copy}/vendor/vllm/vllm/__init__.py"


def test_moved_clone_refuses_and_a_link_to_a_clone_does_not(built: World) -> None:
    link = Path(tempfile.mkdtemp(dir=built.folder)) / "link"
    link.symlink_to(built.root)
    assert verb_in(link, built, *IMPORT).returncode == 0
    copy = copied(built)
    moved = copy.rename(copy.parent / "moved")
    assert verb_in(moved, built, *IMPORT).returncode == 8


def test_report_of_a_copied_clone_does_not_run_the_originals_collect_env(built: World) -> None:
    copy = copied(built)
    verb_in(copy, built, "report")
    (bundle,) = (copy / ".workspace" / "reports").glob("*.tar.gz")
    with tarfile.open(bundle) as archive:
        (name,) = [name for name in archive.getnames() if name.endswith("collect-env.txt")]
        member = archive.extractfile(name)
        assert member is not None
        assert "was copied or moved" in member.read().decode()
