"""Sandboxes on the small upstream: own tree, environment and, where sources differ, kernels.

The clone itself does not change.
"""

import io
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small import wheels
from tests.small.materials import git
from tests.small.world import World
from workspace.core import settings as settings_module
from workspace.core.console import Console, RunLog
from workspace.core.errors import BuildError, CheckoutError
from workspace.core.settings import Settings, Value
from workspace.install import sandbox as sandboxes
from workspace.install import stamp
from workspace.install.plan import Observation
from workspace.install.sandbox import Sandbox
from workspace.repo import pins
from workspace.repo.pins import Pin

QUIET = Console(out=io.StringIO(), err=io.StringIO())
ANSWER, PYTHON = "csrc/cpu/answer.c", "vllm/version.py"


def files_of_clone(world: World) -> dict[str, object]:
    kept = ("vendor/", "patches/", ".vllm/")
    return {
        path: facts
        for path, facts in world.listing().items()
        if path.startswith(kept) and not path.startswith("vendor/vllm/.git")
    }


@pytest.fixture
def with_sandbox(_bootstrapped: World) -> Iterator[World]:
    """A bootstrapped clone with a built sandbox `a` on the bare pin."""
    if "sandbox" not in _bootstrapped.kept:
        _bootstrapped.restore()
        before = files_of_clone(_bootstrapped)
        built(_bootstrapped, make_sandbox(_bootstrapped))
        assert files_of_clone(_bootstrapped) == before, "the build of a sandbox changed the clone"
        _bootstrapped.save("sandbox")
    _bootstrapped.restore("sandbox")
    yield _bootstrapped
    _bootstrapped.end()


@pytest.fixture
def run_log(tmp_path: Path) -> Iterator[RunLog]:
    with RunLog(QUIET, tmp_path / "logs", verb="test") as made:
        yield made


def settings(world: World, **flags: str) -> Settings:
    loaded = settings_module.load(world.layout, environ=world.env)
    return Settings(
        **{
            **vars(loaded),
            "values": {
                **loaded.values,
                **{name: Value(text, "flag") for name, text in flags.items()},
            },
        }
    )


def pin(world: World) -> Pin:
    return pins.load(world.layout.pins).vllm


def base(world: World) -> str:
    found = pin(world).archive
    assert found
    return found.commit


def make_sandbox(
    world: World, name: str = "a", *, tip: str | None = None, patches: Path | None = None
) -> Sandbox:
    with RunLog(QUIET, world.folder / "logs", verb="test") as run_log:
        return sandboxes.make(
            world.layout,
            name,
            pin=pin(world),
            patches=patches,
            tip=tip or base(world),
            settings=settings(world),
            run_log=run_log,
        )


def build(world: World, sandbox: Sandbox, **flags: str) -> Observation:
    """Build a sandbox in this process, with the world's PATH: it has uv on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", world.env["PATH"])
        return sandboxes.build_sandbox(sandbox, settings(world, **flags), console=QUIET)


def built(world: World, sandbox: Sandbox, **flags: str) -> str:
    """Build a sandbox and return the kind of its kernels."""
    observed = build(world, sandbox, **flags)
    recorded = observed.kernels.recorded
    assert recorded
    assert recorded.kernels
    return recorded.kernels.kind


def commit(world: World, path: str, old: str, new: str, *, parent: str | None = None) -> str:
    """Commit on the bare pin, or on `parent`, in a separate working tree."""
    work = world.folder / "work"
    git(
        world.layout.vllm,
        "worktree",
        "add",
        "--quiet",
        "--force",
        "--detach",
        str(work),
        parent or base(world),
    )
    file = work / path
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    git(work, "commit", "--quiet", "--all", "-m", f"Change {path}")
    made = git(work, "rev-parse", "HEAD")
    git(world.layout.vllm, "worktree", "remove", "--force", str(work))
    return made


def answer(sandbox: Sandbox, world: World) -> str:
    """Return the answer of the compiled library that the sandbox's own interpreter imports."""
    code = (
        "import ctypes, pathlib, vllm; print(ctypes.CDLL(str(pathlib.Path(vllm.__file__).parent /"
        " '_C.abi3.so')).vllm_small_answer(), vllm.__file__)"
    )
    output, place = (
        World(world.materials, world.folder, sandbox.layout, world.index, world.env)
        .python(code)
        .split()
    )
    assert Path(place).is_relative_to(sandbox.layout.vllm)
    return output


def test_sandbox_of_the_bare_pin_has_all_kernels_of_the_wheel_although_its_setup_leaves_some_out(
    with_sandbox: World,
) -> None:
    sandbox = make_sandbox(with_sandbox)
    assert built(with_sandbox, sandbox) == "precompiled"
    names = [f"{name}.abi3.so" for name in wheels.LIBRARIES[wheels.this_machine()]]
    for name in names:
        library = sandbox.layout.vllm / "vllm" / name
        assert library.read_bytes() == (with_sandbox.layout.vllm / "vllm" / name).read_bytes()
    # The bare pin's setup.py takes these from no wheel; only one for x86-64 has them.
    assert '"vllm/_C_AVX2.abi3.so"' not in (sandbox.layout.vllm / "setup.py").read_text()
    assert with_sandbox.status()["kernels"] == "ok"


def test_python_change_builds_nothing_and_a_change_of_compiled_sources_gets_its_own_kernels(
    with_sandbox: World, run_log: RunLog
) -> None:
    sandbox = make_sandbox(with_sandbox)
    stamped = stamp.read(sandbox.layout.stamp("vllm"))
    live = sandboxes.move(
        sandbox,
        commit(with_sandbox, PYTHON, "__version__", "mine = 1\n__version__"),
        settings=settings(with_sandbox),
        run_log=run_log,
    )
    assert built(with_sandbox, live) == "precompiled"
    assert stamp.read(sandbox.layout.stamp("vllm")) == stamped
    assert "mine" in (sandbox.layout.vllm / PYTHON).read_text()
    changed = sandboxes.move(
        live,
        commit(with_sandbox, ANSWER, "42", "43"),
        settings=settings(with_sandbox),
        run_log=run_log,
    )
    assert stamp.read(sandbox.layout.stamp("vllm")) is None
    assert built(with_sandbox, changed) == "hybrid"
    assert answer(changed, with_sandbox) == "43"
    back = sandboxes.move(
        changed, base(with_sandbox), settings=settings(with_sandbox), run_log=run_log
    )
    assert built(with_sandbox, back) == "precompiled"
    library = Path("vllm/_C.abi3.so")
    assert (back.layout.vllm / library).read_bytes() == (
        with_sandbox.layout.vllm / library
    ).read_bytes()
    assert sandboxes.find(with_sandbox.layout, "a") == back


@pytest.mark.parametrize("missing", ["KERNELS", "compiler"])
def test_kernels_that_cannot_be_compiled_are_a_refusal_and_never_the_precompiled(
    with_sandbox: World, run_log: RunLog, missing: str
) -> None:
    sandbox = sandboxes.move(
        make_sandbox(with_sandbox),
        commit(with_sandbox, ANSWER, "42", "43"),
        settings=settings(with_sandbox),
        run_log=run_log,
    )
    if missing == "compiler":
        with_sandbox.env["CXX"] = with_sandbox.env["CC"] = "/nowhere/c++"
    choice = {"KERNELS": "precompiled"} if missing == "KERNELS" else {}
    with pytest.raises(BuildError) as caught:
        built(with_sandbox, sandbox, **choice)
    assert sandboxes.find(with_sandbox.layout, "a") == sandbox
    if choice:
        # The hint shows the setting, and names the value with which the same sandbox is built.
        assert caught.value.hint
        command, _, remark = caught.value.hint.partition("    ")
        shown = with_sandbox.run(*command.split()[1:], env=choice)
        assert shown.code == 0, shown.output
        assert re.search(r"KERNELS +precompiled +shell", shown.out + shown.err), shown.output
        assert remark.startswith("KERNELS=auto ")
        assert built(with_sandbox, sandbox, KERNELS="auto") == "hybrid"


def test_commit_that_does_not_descend_from_the_pin_is_built(with_sandbox: World) -> None:
    older = git(
        with_sandbox.layout.vllm, "commit-tree", "-m", "elsewhere", f"{base(with_sandbox)}^{{tree}}"
    )
    sandbox = make_sandbox(with_sandbox, tip=older)
    assert built(with_sandbox, sandbox) == "precompiled"
    assert git(sandbox.layout.vllm, "rev-parse", "HEAD") == older


def test_users_work_in_a_sandbox_is_kept_and_leaves_the_tree(
    with_sandbox: World, run_log: RunLog
) -> None:
    sandbox = make_sandbox(with_sandbox)
    (sandbox.layout.vllm / PYTHON).write_text("edited\n")
    (sandbox.layout.vllm / "new.txt").write_text("new\n")
    python = commit(with_sandbox, PYTHON, "__version__", "mine = 1\n__version__")
    sandboxes.move(sandbox, python, settings=settings(with_sandbox), run_log=run_log)
    assert git(sandbox.layout.vllm, "status", "--porcelain") == ""
    (kept,) = git(
        with_sandbox.layout.vllm, "for-each-ref", "--format=%(refname)", sandboxes.LEFT_REFS
    ).splitlines()
    assert git(with_sandbox.layout.vllm, "show", f"{kept}:new.txt") == "new"
    assert git(with_sandbox.layout.vllm, "show", f"{kept}:{PYTHON}") == "edited"
    # A commit is kept too, and that of the workspace's own making is not.
    git(sandbox.layout.vllm, "commit", "--quiet", "--allow-empty", "-m", "mine")
    mine = git(sandbox.layout.vllm, "rev-parse", "HEAD")
    assert sandboxes.remove(with_sandbox.layout, "a") == f"{sandboxes.LEFT_REFS}/{mine[:12]}"
    make_sandbox(with_sandbox, "b", tip=python)
    assert sandboxes.remove(with_sandbox.layout, "b") is None
    assert sandboxes.remove(with_sandbox.layout, "never made") is None
    assert not any(with_sandbox.layout.sandboxes.iterdir())
    assert git(with_sandbox.layout.vllm, "worktree", "list").count("\n") == 0
    assert git(with_sandbox.layout.vllm, "for-each-ref", sandboxes.REFS) == ""


def test_patches_and_pins_of_a_sandbox_are_its_own_and_follow_the_request(
    with_sandbox: World,
) -> None:
    tip = with_sandbox.git("rev-parse", "HEAD")
    sandbox = make_sandbox(with_sandbox, tip=tip, patches=with_sandbox.layout.patches("vllm"))
    assert (sandbox.layout.patches("vllm") / with_sandbox.materials.patch.name).exists()
    bare = make_sandbox(with_sandbox)
    assert [path.name for path in bare.layout.patches("vllm").iterdir()] == ["series"]
    assert git(bare.layout.vllm, "rev-parse", "HEAD") == base(with_sandbox)


def test_sandbox_that_was_moved_is_made_anew_after_the_command_of_the_hint(
    with_sandbox: World,
) -> None:
    sandbox = make_sandbox(with_sandbox)
    other = commit(with_sandbox, ANSWER, "42", "43")
    git(sandbox.layout.vllm, "checkout", "--quiet", "--detach", other)
    with pytest.raises(CheckoutError, match="is not on") as caught:
        build(with_sandbox, sandbox)
    assert caught.value.hint
    command = caught.value.hint.partition("    ")[0]
    assert command == f"rm -rf {sandbox.shown}"
    subprocess.run(["/bin/sh", "-c", command], cwd=with_sandbox.root, check=True, timeout=60)
    again = make_sandbox(with_sandbox)
    assert git(again.layout.vllm, "rev-parse", "HEAD") == base(with_sandbox)
    assert git(again.layout.vllm, "status", "--porcelain") == ""
    assert built(with_sandbox, again)


@pytest.mark.parametrize("left", ["record", "tree", "move", "products", "half a folder"])
def test_next_run_resumes_from_any_state_that_a_kill_left(with_sandbox: World, left: str) -> None:
    sandbox, tip = make_sandbox(with_sandbox), commit(with_sandbox, ANSWER, "42", "43")
    own = sandbox.layout
    if left == "record":
        (own.root / sandboxes.RECORD).unlink()
    elif left == "tree":
        git(own.vllm, "update-ref", "-d", "refs/worktree/made")
        (own.vllm / ANSWER).write_text("")
    elif left == "move":
        note = own.moving("vllm")
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(f'{{"from": "{base(with_sandbox)}", "to": "{tip}"}}')
        (own.vllm / ANSWER).unlink()
    elif left == "products":
        own.stamp("vllm").unlink()
        (own.vllm / "vllm" / "_C.abi3.so").unlink()
    else:
        own.root.rename(own.root.with_name(".a.gone"))
        (own.root.parent / ".a.making-x").mkdir()
    again = make_sandbox(with_sandbox, tip=tip)
    assert git(again.layout.vllm, "status", "--porcelain") == ""
    assert git(again.layout.vllm, "rev-parse", "HEAD") == tip
    assert git(with_sandbox.layout.vllm, "for-each-ref", sandboxes.LEFT_REFS) == ""
    assert sorted(path.name for path in with_sandbox.layout.sandboxes.iterdir()) == ["a"]
