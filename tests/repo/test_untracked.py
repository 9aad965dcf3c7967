"""Files of the checkout that git does not track: named, and taken by the command that is said."""

import io
import os
import subprocess
from pathlib import Path

import pytest

from tests.repo.conftest import Workspace, commit, sh_git, write
from tests.repo.exporting import STATUS
from tests.repo.exporting import run as run_export
from workspace.core.console import Console
from workspace.install.status import patches_row
from workspace.repo import export, patches
from workspace.repo.git import Git
from workspace.repo.patches import State


def shown(done: export.Export) -> str:
    err = io.StringIO()
    export.show(done, console=Console(out=io.StringIO(), err=err))
    return err.getvalue()


def do(workspace: Workspace, hint: str, tmp_path: Path) -> None:
    """Run the git commands of a hint as a user whose editor writes a subject."""
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\nsed -i '1s/^/My own/' \"$1\"\n")
    editor.chmod(0o755)
    git, _, rest = hint.split("    ")[0].rpartition(" && ")
    assert rest == "./scripts/inv patch.export"
    identity = {f"GIT_{who}_NAME": "A" for who in ("AUTHOR", "COMMITTER")}
    identity |= {f"GIT_{who}_EMAIL": "a@b.c" for who in ("AUTHOR", "COMMITTER")}
    environ = {**os.environ, **identity, "GIT_CONFIG_GLOBAL": "/dev/null"}
    subprocess.run(
        git,
        shell=True,
        check=True,
        cwd=workspace.layout.root,
        env={**environ, "GIT_EDITOR": str(editor)},
    )


def test_new_file_beside_a_commit_all_is_named_by_each_verb_and_taken(
    applied: Workspace, tmp_path: Path
) -> None:
    export.set_template(Git(applied.vllm), applied.run_log)
    write(applied.vllm, {"README": "edited\n", "vllm/brand new.py": "new\n"})
    sh_git(applied.vllm, "commit", "--quiet", "--all", "--message", "Mine" + STATUS)
    stack = applied.stack()
    assert (stack.state, stack.untracked) == (State.UNEXPORTED, ("vllm/brand new.py",))
    name = "files that git does not track are in no patch: vllm/brand new.py"
    done = run_export(applied)
    assert name in shown(done)
    assert name in patches_row(applied.stack()).text
    hint = patches.next_command(applied.layout, applied.pin, applied.stack())
    assert hint in shown(done)
    do(applied, hint, tmp_path)
    done = run_export(applied)
    assert done.written == ("My-own.patch",)
    patch = applied.layout.patches("vllm") / "My-own.patch"
    assert b"vllm/brand new.py" in patch.read_bytes()
    assert (applied.stack().untracked, "does not track" in shown(done)) == ((), False)


def test_row_of_the_stack_names_it(applied: Workspace) -> None:
    write(applied.vllm, {"vllm/mine.py": "new\n"})
    first, *_ = applied.rows()
    assert "does not track are in no patch: vllm/mine.py" in first.subject


@pytest.mark.parametrize(
    ("path", "is_named"),
    [
        ("vllm/mine.py", True),  # the user's own ignore file names *.py
        ("top.rej", True),
        ("a b/ß\n.txt", True),
        ("vllm/_C.abi3.so", False),
        ("build/x.o", False),
    ],
)
def test_only_the_trees_own_gitignore_hides_a_file(
    applied: Workspace, path: str, is_named: bool
) -> None:
    write(applied.vllm, {path: "x\n"})
    assert applied.stack().untracked == ((path,) if is_named else ())


def test_file_that_the_user_excludes_is_taken_by_the_hint(
    applied: Workspace, hostile: Path, tmp_path: Path
) -> None:
    export.set_template(Git(applied.vllm), applied.run_log)
    (applied.vllm / ".git" / "info").mkdir(exist_ok=True)
    (applied.vllm / ".git" / "info" / "exclude").write_text("*.py\n")
    write(applied.vllm, {"vllm/mine.py": "new\n"})
    do(applied, patches.next_command(applied.layout, applied.pin, applied.stack()), tmp_path)
    assert run_export(applied).written == ("My-own.patch",)


def test_many_files_are_counted_and_taken_together(applied: Workspace, tmp_path: Path) -> None:
    export.set_template(Git(applied.vllm), applied.run_log)
    write(applied.vllm, {f"vllm/new{number}.py": "new\n" for number in range(30)})
    done = run_export(applied)
    assert "vllm/new0.py, vllm/new1.py, vllm/new10.py and 27 more" in shown(done)
    do(applied, patches.next_command(applied.layout, applied.pin, applied.stack()), tmp_path)
    assert applied.stack().untracked == ()


def test_export_that_only_compares_names_it_too(applied: Workspace) -> None:
    write(applied.vllm, {"vllm/mine.py": "new\n"})
    assert "does not track are in no patch: vllm/mine.py" in shown(run_export(applied, check=True))


def test_tracked_edits_alone_are_no_untracked_files(applied: Workspace) -> None:
    commit(applied.vllm, "Mine" + STATUS, {"vllm/mine.py": "new\n"})
    write(applied.vllm, {"README": "edited\n"})
    stack = applied.stack()
    assert (stack.dirty, stack.untracked) == (("README",), ())
