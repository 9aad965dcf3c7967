"""inv rebuild on the small upstream, with real CMake, ninja and cc.

Reached targets are compiled; all other libraries stay those of the precompiled wheel.
"""

import hashlib
import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.install.test_bootstrap import asked
from tests.small.materials import git
from tests.small.world import World
from workspace.compile import project
from workspace.core import settings
from workspace.core.paths import Layout
from workspace.install import plan, stamp

ANSWER = Path("csrc/cpu/answer.c")


@pytest.fixture
def patched(built: World) -> World:
    """A clone with an edited source, as before a patch is committed."""
    edit(built, ANSWER, "42", "43")
    return built


def edit(world: World, path: Path, old: str, new: str) -> None:
    file = world.layout.vllm / path
    file.write_text(file.read_text().replace(old, new))


def rebuild(world: World, *args: str) -> str:
    ended = world.run("rebuild", *args)
    assert ended.code == 0, ended.output
    return ended.err


def answer(world: World) -> str:
    library = world.layout.vllm / "vllm" / "_C.abi3.so"
    return world.python(f"import ctypes; print(ctypes.CDLL({str(library)!r}).vllm_small_answer())")


def observed(world: World) -> plan.Observation:
    return plan.observe(world.layout, settings.load(world.layout, environ=world.env))


def library(world: World, name: str) -> bytes:
    return (world.layout.vllm / "vllm" / f"{name}.abi3.so").read_bytes()


def test_unchanged_tree_is_reported_and_no_file_is_changed(built: World) -> None:
    before = built.listing()
    assert "nothing to do" in rebuild(built)
    assert built.listing() == before


def test_python_edit_needs_no_compiler(built: World) -> None:
    (built.layout.vllm / "vllm" / "version.py").write_text("__version__ = 'mine'\n")
    assert "Python files are live" in rebuild(built)
    assert not built.layout.builds.exists()


def test_only_what_a_change_reaches_is_compiled_and_the_rest_is_the_precompiled(
    patched: World,
) -> None:
    precompiled = library(patched, "spinloop")
    output = rebuild(patched, "--jobs", "2")
    assert re.search(r"2 compilers at once \(--jobs 2", output)
    assert "is rebuilt\nhint: ./scripts/nox -s smoke" in output
    assert answer(patched) == "43"
    assert library(patched, "spinloop") == precompiled
    recorded = stamp.read(patched.layout.stamp("vllm"))
    assert recorded is not None
    assert "_C" in recorded.outcome["compiled here"].split()
    assert "spinloop" not in recorded.outcome["compiled here"]
    assert observed(patched).kernels.state == "ok"
    before = patched.listing()
    assert "nothing to do" in rebuild(patched)
    assert patched.listing() == before
    # Once more, now with objects: one unit a library, and the tree stands as before.
    edit(patched, ANSWER, "43", "44")
    rebuild(patched)
    assert answer(patched) == "44"


def test_source_that_is_edited_while_it_compiles_is_stale_afterwards(patched: World) -> None:
    folder = patched.folder / "compilers"
    folder.mkdir()
    program, source = folder / "cc", patched.layout.vllm / ANSWER
    edited = f'case "$*" in *{ANSWER.name}*) sed -i s/43/44/ "{source}";; esac'
    program.write_text(f'#!/bin/sh\n/usr/bin/cc "$@" || exit\n{edited}\n')
    program.chmod(0o755)
    ended = patched.run("rebuild", env={"PATH": f"{folder}:{patched.env['PATH']}"})
    assert ended.code == 0, ended.output
    assert "is rebuilt\nhint: ./scripts/inv rebuild\n" in ended.err
    assert f"compiled sources changed: {ANSWER}" in observed(patched).kernels.why


def test_plan_shows_target_and_reason_and_changes_no_file_of_the_tree(patched: World) -> None:
    before = {
        name: entry
        for name, entry in patched.listing().items()
        if not name.startswith(".workspace")
    }
    ended = patched.run("rebuild", "--plan")
    assert ended.code == 0, ended.output
    assert "_C" in ended.err + ended.out
    assert f"{ANSWER} changed" in ended.err + ended.out
    record = json.loads(patched.run("rebuild", "--plan", "--json").out)
    assert {row["target"] for row in record["rows"]} == {
        name for name in ("_C", "_C_AVX2", "_C_AVX512") if name in str(record)
    }
    assert {
        name: entry
        for name, entry in patched.listing().items()
        if not name.startswith(".workspace")
    } == before
    assert observed(patched).kernels.state == "stale"


@pytest.mark.parametrize("due", ["nothing", "the install of the wheel"])
def test_plan_is_a_document_where_nothing_is_compiled_and_installs_nothing(
    built: World, due: str
) -> None:
    if due != "nothing":
        built.layout.stamp("vllm").unlink()
    before = built.status()
    document = json.loads(built.run("rebuild", "--plan", "--json").out)
    assert (document["schema"], document["rows"], document["units"]) == (1, [], 0)
    ended = built.run("rebuild", "--plan")
    assert ended.out, ended.output
    assert ended.code == 0
    assert "rebuilt" not in ended.err
    assert built.status() == before


def test_target_that_was_only_requested_is_compiled_ahead_and_the_precompiled_library_stays(
    built: World,
) -> None:
    precompiled = library(built, "spinloop")
    output = rebuild(built, "--target", "spinloop")
    assert "compiled spinloop in .workspace/build/" in output
    assert "the rest of vllm 0.31.0" in output
    assert "is rebuilt" not in output
    assert "hint: ./scripts/nox -s smoke" in output
    assert library(built, "spinloop") == precompiled
    assert observed(built).kernels.state == "ok"


def test_requested_target_of_a_stale_native_tree_leaves_the_rest_to_the_next_rebuild(
    patched: World,
) -> None:
    output = rebuild(patched, "--kernels", "native", "--target", "spinloop")
    assert "no library in the tree was changed\nhint: ./scripts/inv rebuild" in output
    assert "up to date" not in output
    assert observed(patched).kernels.state == "stale"


def test_bad_input_is_refused_with_a_hint(built: World) -> None:
    for args, sentence in (
        ("--jobs 0", "--jobs"),
        ("--jobs=-1", "--jobs"),
        ("--jobs four", "--jobs"),
        ("--memory 99999", "--memory"),
        ("--memory little", "--memory"),
        ("--kernels nonsense", "KERNELS=nonsense"),
        ("--target no_such_target", "no_such_target"),
        ("--json", "--json"),
    ):
        assert sentence in built.run("rebuild", *args.split()).error(2)
    assert observed(built).kernels.state == "ok"


def test_rebuild_names_the_git_operation_that_is_not_finished(built: World) -> None:
    """Which operations there are is known to one function: tests/repo/test_resume.py has all."""
    (Path(built.git("rev-parse", "--absolute-git-dir")) / "rebase-merge").mkdir()
    ended = built.run("rebuild")
    assert "vendor/vllm is in the middle of git rebase" in ended.error(3)
    assert "patch.continue" in ended.err


def test_rebuild_in_the_middle_of_a_bisect_names_it_and_the_command_that_ends_it(
    built: World,
) -> None:
    head = built.git("rev-parse", "HEAD")
    # A history beside the pin, as upstream's main is.
    commits = [built.git("commit-tree", "-m", "0", "HEAD^{tree}")]
    for number in "12":
        parent = ("-p", commits[-1])
        commits.append(built.git("commit-tree", "-m", number, *parent, "HEAD^{tree}"))
    built.git("bisect", "start", commits[2], commits[0])
    assert built.git("rev-parse", "HEAD") != head
    ended = built.run("rebuild")
    assert "vendor/vllm is in the middle of git bisect" in ended.error(3)
    assert "git bisect" in built.run("patch").out
    hint = ended.err.splitlines()[-1].removeprefix("hint: ").partition("    ")[0]
    assert built.run("status").out.splitlines()[-1] == ended.err.splitlines()[-1]
    subprocess.run(hint.split(), cwd=built.root, env=built.env, check=True, capture_output=True)
    assert built.git("rev-parse", "HEAD") == head
    assert "nothing to do" in rebuild(built)


def test_bootstrap_leaves_compilation_to_rebuild_and_names_it(built: World) -> None:
    edit(built, ANSWER, "42", "43")
    built.layout.stamp("vllm").unlink()
    ended = built.bootstrap()
    assert "hint: ./scripts/inv rebuild" in ended.err
    assert observed(built).kernels.reasons == (
        f"compiled from the pin's sources; {ANSWER} differs from them",
    )


def verified(output: str) -> str:
    """Return the row of the last step."""
    return next(
        line for line in reversed(output.splitlines()) if line.startswith("done     verify")
    )


@pytest.fixture
def warm(built: World) -> World:
    """A clone with objects of its kernels, and one more edit of a kernel."""
    if "warm" in built.kept:
        built.restore("warm")
        return built
    edit(built, ANSWER, "42", "43")
    rebuild(built)
    edit(built, ANSWER, "43", "44")
    built.save("warm")
    return built


def test_warm_edit_loads_the_changed_library_alone_and_the_stamp_has_its_hash(warm: World) -> None:
    other = library(warm, "spinloop")
    assert "the same symbols as before; nothing else changed" in verified(rebuild(warm))
    assert answer(warm) == "44"
    recorded = stamp.read(warm.layout.stamp("vllm"))
    assert recorded is not None
    digests = {entry.path: entry.sha256 for entry in recorded.libraries}
    for name in ("_C", "spinloop"):
        content = (warm.layout.vllm / "vllm" / f"{name}.abi3.so").read_bytes()
        assert digests[f"vllm/{name}.abi3.so"] == hashlib.sha256(content).hexdigest()
    assert library(warm, "spinloop") == other
    assert {warm.status()[row] for row in ("kernels", "install")} == {"ok"}


def test_warm_edit_starts_python_and_asks_the_compiler_once(warm: World) -> None:
    assert asked(warm, "rebuild", device="cpu") == ["g++ -dumpfullversion", "python"]
    assert answer(warm) == "44"


def test_edit_of_python_beside_it_verifies_the_whole(warm: World) -> None:
    (warm.layout.vllm / "vllm" / "mine.py").write_text("answer = 42\n")
    assert "all symbols bound" in verified(rebuild(warm))
    edit(warm, ANSWER, "44", "45")
    assert "the same symbols as before" in verified(rebuild(warm)), "the edit was verified"


def test_python_that_no_longer_imports_is_found_in_a_warm_edit(warm: World) -> None:
    (warm.layout.vllm / "vllm" / "__init__.py").write_text("import nowhere_to_be_found\n")
    assert "nowhere_to_be_found" in warm.run("rebuild").error(7)


def test_other_undefined_symbol_verifies_the_whole(warm: World) -> None:
    file = warm.layout.vllm / ANSWER
    file.write_text(
        file.read_text() + "extern int getppid(void);\nint vllm_small_parent(void)\n"
        "{ return getppid(); }\n"
    )
    assert "all symbols bound" in verified(rebuild(warm))


def test_symbol_that_nobody_defines_is_an_error_of_the_whole_verification(warm: World) -> None:
    file = warm.layout.vllm / ANSWER
    file.write_text(
        file.read_text() + "extern int nobody_has_this(void);\nint vllm_small_nobody(void)\n"
        "{ return nobody_has_this(); }\n"
    )
    assert "nobody_has_this" in warm.run("rebuild").error(7)


def test_library_that_crashes_while_it_loads_is_found_although_its_symbols_are_the_same(
    warm: World,
) -> None:
    file = warm.layout.vllm / ANSWER
    file.write_text(
        file.read_text() + "static int *volatile nowhere;\n"
        "__attribute__((constructor)) static void crash(void) { *nowhere = 1; }\n"
    )
    assert "SIGSEGV" in warm.run("rebuild").error(7)


def test_clangd_finds_the_database_of_the_build_and_git_sees_no_new_file(patched: World) -> None:
    def untracked() -> list[str]:
        return [git(folder, "status", "-s") for folder in (patched.root, patched.layout.vllm)]

    before = untracked()
    link = patched.layout.compile_commands
    rebuild(patched)
    # clangd looks in every folder above a source.
    assert link.parent in (patched.layout.vllm / ANSWER).parents
    entries = json.loads(link.read_text())
    assert str(patched.layout.vllm / ANSWER) in [entry["file"] for entry in entries]
    assert link.resolve().is_relative_to(patched.layout.builds)
    assert untracked() == before
    rebuild(patched, "--clean")
    assert link.is_symlink() == link.exists()


def test_database_of_the_user_is_kept(patched: World) -> None:
    mine = patched.layout.compile_commands
    mine.write_text("[]\n")
    rebuild(patched)
    assert not mine.is_symlink()
    assert mine.read_text() == "[]\n"


def test_link_to_the_database_goes_with_the_build_directory(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.compile_commands.parent.mkdir()
    one, other = layout.builds / "one", layout.builds / "other"
    for build in (one, other):
        build.mkdir(parents=True)
        (build / project.DATABASE).write_text("[]\n")
        assert project.link_database(layout, build)
        assert layout.compile_commands.resolve() == build / project.DATABASE
    assert project.link_database(layout, layout.builds)
    assert not layout.compile_commands.is_symlink()
    (tmp_path / "mine.json").write_text("[]\n")
    layout.compile_commands.symlink_to(tmp_path / "mine.json")
    assert not project.link_database(layout, one)
    assert layout.compile_commands.readlink() == tmp_path / "mine.json"
