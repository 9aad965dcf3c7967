"""inv rebuild and inv wheel, killed: the tree's libraries are those of the stamp or there is none,
and no wheel is a half one.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.proof.kill.cases import KillCase, check_planted, plant, write_dotenv
from tests.small.world import World
from workspace.core.files import sha256
from workspace.install import stamp
from workspace.install.rebuild_job import COMPILED_HERE

REBUILD = ("rebuild", "--jobs", "2")
NATIVE = ("rebuild", "--kernels", "native", "--jobs", "2")


def source(world: World) -> Path:
    return world.layout.vllm / "csrc" / "cpu" / "answer.c"


def edit(world: World, old: str, new: str) -> None:
    source(world).write_text(source(world).read_text().replace(old, new))


def built(world: World) -> None:
    """A bootstrapped clone in which a user works, and has a library of their own beside those of
    the build.
    """
    plant(world)
    write_dotenv(world)
    world.bootstrap()
    world.git("branch", "topic")
    (world.layout.vllm / "new.txt").write_text("mine\n")
    (world.layout.vllm / ".git" / "info").mkdir(exist_ok=True)
    (world.layout.vllm / ".git" / "info" / "exclude").write_text("*.log\n")
    (world.layout.vllm / "vllm" / "run.log").write_text("mine\n")


def edited(world: World) -> None:
    built(world)
    edit(world, "42", "43")


def edited_again(world: World) -> None:
    """A build directory with objects, one of which is out of date."""
    edited(world)
    typed(world, *REBUILD)
    edit(world, "43", "44")


def rebuilt(world: World) -> None:
    edited(world)
    typed(world, *REBUILD)


def typed(world: World, *args: str) -> str:
    ended = world.run(*args)
    assert ended.code == 0, f"inv {' '.join(args)}: {ended.output}"
    return ended.err


def check(world: World, answer: str) -> None:
    check_planted(world)
    assert f"return {answer};" in source(world).read_text()
    assert (
        (world.layout.vllm / "new.txt").read_text()
        == (world.layout.vllm / "vllm" / "run.log").read_text()
        == "mine\n"
    )
    assert world.git("rev-parse", "topic") == world.git("rev-parse", "HEAD")
    assert world.git("status", "--porcelain") == (
        "?? new.txt" if answer == "42" else "M csrc/cpu/answer.c\n?? new.txt"
    )


def is_true(world: World, answer: str) -> None:
    """What is claimed is so: a stamp is of the libraries that lie there, and fresh are those that
    give the answer of the sources.
    """
    recorded = stamp.read(world.layout.stamp("vllm"))
    if recorded is None:
        return
    lying = {
        library.path: sha256(world.layout.vllm / library.path) for library in recorded.libraries
    }
    assert lying == {library.path: library.sha256 for library in recorded.libraries}, (
        "the stamp is of other libraries"
    )
    rows = world.status()
    if (
        rows["kernels"] == rows["install"] == "ok"
        and "_C" in recorded.outcome.get(COMPILED_HERE, "").split()
    ):
        library = world.layout.vllm / "vllm" / "_C.abi3.so"
        found = world.python(
            f"import ctypes; print(ctypes.CDLL({str(library)!r}).vllm_small_answer())"
        )
        assert found == answer, f"status reports it as fresh, and it answers {found}"
    elif rows["kernels"] == "ok":
        assert world.git("status", "--porcelain", "csrc") == "", (
            "status reports a precompiled wheel's kernels as those of an edit"
        )


def again(world: World, args: tuple[str, ...], answer: str) -> None:
    is_true(world, answer)
    typed(world, *args)
    rows = world.status()
    assert (rows["kernels"], rows["install"]) == ("ok", "ok"), rows
    is_true(world, answer)
    assert "nothing to do" in typed(world, *args)


def again_wheel(world: World) -> None:
    is_true(world, "43")
    for path in (world.root / "dist").glob("*.whl"):
        assert zipfile.ZipFile(path).testzip() is None
    typed(world, "wheel")
    assert [path.suffix for path in (world.root / "dist").iterdir()] == [".whl"]


def of(name: str, prepare: Callable[[World], None], args: tuple[str, ...], answer: str) -> KillCase:
    return KillCase(
        name,
        prepare,
        args,
        lambda world: check(world, answer),
        lambda world: again(world, args, answer),
        full_from="done *configure",
    )


BUILDS = (
    of("rebuild of an edit", edited, REBUILD, "43"),
    of("rebuild of another edit", edited_again, REBUILD, "44"),
    of("rebuild of everything", built, NATIVE, "42"),
    KillCase(
        "wheel of a rebuild",
        rebuilt,
        ("wheel",),
        lambda world: check(world, "43"),
        again_wheel,
        full_from="",
    ),
)
