"""What a move takes along and leaves: compiled kernels, files beside them, and the user's torch."""

import os
from pathlib import Path

from tests.bump.conftest import smoke
from tests.proof.bump.test_bump import assert_is_on
from tests.small import wheels
from tests.small.releases import CLEAN
from tests.small.world import World
from workspace.bump import known_good
from workspace.install import stamp
from workspace.install.precompiled import text_of

STRAY = 'const char *of_the_old_pin(void) { return "old"; }\n'


def origin(world: World) -> str:
    made = stamp.read(world.layout.stamp("vllm"))
    assert made is not None
    return text_of(made.kernels)


def answer(world: World) -> str:
    library = world.layout.vllm / "vllm" / "_C.abi3.so"
    return world.python(f"import ctypes; print(ctypes.CDLL({str(library)!r}).vllm_small_answer())")


def patched(world: World) -> None:
    """A patch on compiled sources."""
    source = world.layout.vllm / "csrc" / "cpu" / "answer.c"
    source.write_text(source.read_text().replace("42", "43"))
    world.git("commit", "--quiet", "--all", "-m", "Answer otherwise\n\nUpstream-Status: Pending")
    assert world.run("patch.export").code == 0


def compiled(world: World, tmp_path: Path) -> Path:
    """Make a clone with natively compiled kernels; return a library that no later pin has.

    It also has a log file of the user.
    """
    tree = world.layout.vllm
    patched(world)
    world.bootstrap("--kernels", "native", "--jobs", "2")
    (tree / ".git" / "info").mkdir()
    (tree / ".git" / "info" / "exclude").write_text("*.log\n")
    (tree / "vllm" / "run.log").write_text("mine\n")
    stray = tree / "vllm" / "_of_the_old_pin.so"
    stray.write_bytes(wheels.compile_library(tmp_path, "stray", STRAY))
    # Verify and stamp it with the other libraries.
    world.layout.stamp("vllm").unlink()
    world.bootstrap("--kernels", "native", "--jobs", "2")
    assert smoke(world).code == 0
    return stray


def test_compiled_kernels_belong_to_one_pin_and_return_with_it(
    clone: World, tmp_path: Path
) -> None:
    tree, stray = clone.layout.vllm, compiled(clone, tmp_path)
    own = {path.name: path.read_bytes() for path in (tree / "vllm").glob("*.so")}
    assert answer(clone) == "43"
    ended = clone.run("pin.bump", f"v{CLEAN}")
    assert ended.code == 0, ended.output
    assert_is_on(clone, CLEAN)
    # Compiled in the sandbox from the new pin's sources, because the old kernels were compiled too.
    assert origin(clone) == "native"
    assert not stray.exists()
    assert (tree / "vllm" / "run.log").read_text() == "mine\n"
    assert answer(clone) == "43"

    assert clone.run("pin.rollback").code == 0
    assert_is_on(clone, "0.31.0")
    assert origin(clone) == "native"
    assert {path.name: path.read_bytes() for path in (tree / "vllm").glob("*.so")} == own
    assert (tree / "vllm" / "run.log").read_text() == "mine\n"
    assert not list(clone.layout.state.glob("left-*")), "what a good state keeps is kept there"


def test_sandbox_compiles_what_a_patch_changes_and_takes_the_rest_from_the_precompiled_wheel(
    clone: World,
) -> None:
    patched(clone)
    assert clone.run("rebuild", "--jobs", "2").code == 0
    assert smoke(clone).code == 0
    ended = clone.run("pin.bump", f"v{CLEAN}")
    assert ended.code == 0, ended.output
    assert_is_on(clone, CLEAN)
    assert origin(clone).startswith("hybrid precompiled ")
    assert CLEAN in origin(clone)
    assert answer(clone) == "43"
    assert clone.run("pin.rollback").code == 0
    assert_is_on(clone, "0.31.0")
    assert (origin(clone).startswith("hybrid precompiled "), CLEAN in origin(clone)) == (
        True,
        False,
    )
    assert answer(clone) == "43"


def test_precompiled_kernels_do_not_mix_with_those_that_were_compiled_here(
    clone: World, tmp_path: Path
) -> None:
    tree, stray = clone.layout.vllm, compiled(clone, tmp_path)
    clone.git("revert", "--no-edit", "HEAD")
    clone.git("reset", "--quiet", "--soft", "HEAD~2")
    assert clone.run("patch.export").code == 0
    before = {path.read_bytes() for path in (tree / "vllm").glob("_C*.so")}
    # This state was never smoked: only files that exist nowhere else are kept.
    clone.env["KERNELS"] = "precompiled"
    ended = clone.run("pin.bump", f"v{CLEAN}")
    assert ended.code == 0, ended.output
    assert_is_on(clone, CLEAN)
    assert origin(clone).startswith("precompiled ")
    left = next(clone.layout.state.glob("left-*"))
    assert (left / "products" / "vllm" / "_version.py").exists()
    assert left.name in ended.err
    assert not stray.exists()
    assert not before & {path.read_bytes() for path in (tree / "vllm").glob("_C*.so")}
    wanted = next(
        found
        for found in known_good.states(clone.layout)
        if found.tag == "v0.31.0" and text_of(found.kernels) == "native"
    )
    del clone.env["KERNELS"]
    assert clone.run("pin.rollback", "--good", wanted.name).code == 0
    assert origin(clone) == "native"
    assert answer(clone) == "43"


def torch_version(world: World) -> str:
    return world.python("import torch; print(torch.__version__)")


def torch_file(world: World) -> os.stat_result:
    return next(world.layout.environment.glob("lib/python*/site-packages/torch/version.py")).stat()


def bump_with_own_torch(world: World, tmp_path: Path) -> os.stat_result:
    """Install a torch that no index has and move the pin; return its file as it was before.

    The torch must move along, and no file may name the sandbox.
    """
    world.uv("install", str(wheels.write_torch(tmp_path, "9.9.9+local", cuda=None)))
    world.env["USE_EXISTING_TORCH"] = "1"
    world.bootstrap()
    assert smoke(world).code == 0
    mine = torch_file(world)
    ended = world.run("pin.bump", f"v{CLEAN}")
    assert ended.code == 0, ended.output
    assert_is_on(world, CLEAN)
    assert torch_version(world) == "9.9.9+local"
    named = [
        path
        for path in world.layout.environment.rglob("*")
        if path.is_file() and b".workspace/bump" in path.read_bytes()
    ]
    assert [path for path in named if path.suffix != ".pyc"] == []
    return mine


def test_torch_of_the_user_moves_along_and_comes_back(clone: World, tmp_path: Path) -> None:
    mine = bump_with_own_torch(clone, tmp_path)
    ended = clone.run("pin.rollback")
    assert ended.code == 0, ended.output
    assert_is_on(clone, "0.31.0")
    back = torch_file(clone)
    assert (back.st_ino, back.st_mtime_ns) == (mine.st_ino, mine.st_mtime_ns)
    assert torch_version(clone) == "9.9.9+local"


def test_torch_in_an_environment_that_the_user_made_moves_along(
    clone: World, tmp_path: Path
) -> None:
    clone.layout.environment.rename(tmp_path / "former")
    clone.venv()
    bump_with_own_torch(clone, tmp_path)
