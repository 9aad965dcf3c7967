"""Situations of the checkout of vLLM, its patches and their series."""

import shutil
from pathlib import Path

from tests.proof.hints.following import SUBJECT, User, printed, runs


def series(user: User) -> Path:
    return user.world.layout.patches("vllm") / "series"


def patch(user: User) -> Path:
    return next(user.world.layout.patches("vllm").glob("*.patch"))


def unapplied(user: User) -> None:
    assert user.inv("patch.unapply").code == 0


@runs("inv.patch_apply")
def series_that_is_not_applied(user: User) -> None:
    unapplied(user)
    command = user.meets("inv.patch_apply", "patch")
    assert user.type(command).code == 0
    assert user.world.status()["patches"] == "ok"
    user.followed.add("inv.patch_apply")


@runs("inv.patch_export", "repo.export_later")
def commit_that_is_in_no_patch(user: User) -> None:
    user.commit(csrc__cpu__mine_py="mine = 1\n")
    user.follow("inv.patch_export", "patch")
    assert user.world.status()["patches"] == "ok"
    user.follow("repo.export_later", "patch", then=False)


@runs("repo.export_or_keep")
def commits_that_an_apply_would_drop(user: User) -> None:
    user.commit(vllm__mine_py="mine = 1\n")
    mine = user.world.git("rev-parse", "HEAD")
    user.follow("repo.export_or_keep", "patch.apply", then=False)
    assert user.world.git("rev-parse", "HEAD") == mine
    assert user.inv("patch.apply").code == 0


@runs("repo.stash_around")
def edit_where_an_unapply_would_move_the_checkout(user: User) -> None:
    setup = user.vllm / "setup.py"
    setup.write_text(setup.read_text() + "# mine\n")
    user.follow("repo.stash_around", "patch.unapply", then=False)
    assert "# mine" in setup.read_text()
    assert user.world.git("rev-parse", "HEAD") == user.world.git("rev-parse", "refs/patches/base")


@runs("repo.take_files")
def file_that_git_does_not_track(user: User) -> None:
    (user.vllm / "vllm" / "mine.py").write_text("mine = 1\n")
    user.follow("repo.take_files", "patch")
    taken = series(user).with_name("Misc-A-subject-of-the-user.patch")
    assert "vllm/mine.py" in taken.read_text()


@runs("repo.take_all_files")
def many_files_that_git_does_not_track(user: User) -> None:
    for number in range(30):
        (user.vllm / "vllm" / f"mine{number}.py").write_text("mine = 1\n")
    user.follow("repo.take_all_files", "patch")
    assert user.world.git("status", "--porcelain") == ""


@runs("repo.restore_file", "repo.which_moved", "inv.patch")
def series_for_another_base(user: User) -> None:
    base = user.world.materials.commit
    series(user).write_text(series(user).read_text().replace(base, "1" * 40))
    user.look("repo.which_moved", "patch", shows="The workspace")
    series(user).write_text("no base\n")
    user.follow("repo.restore_file", "patch")
    assert user.git("show", "stash@{0}:patches/vllm/series") == "no base"
    user.look("inv.patch", "patch.continue", shows="applied")


@runs("repo.series_lines", "repo.two_lines")
def series_with_wrong_lines(user: User) -> None:
    written = series(user).read_text()
    series(user).write_text(f"{written}patches/vllm/x.patch\n")
    user.edits_with('sed -i "\\$d" "$file"')
    user.follow("repo.series_lines", "patch")
    series(user).write_text(f"{written}{patch(user).name}\n")
    user.follow("repo.two_lines", "patch")


@runs("repo.restore_or_drop")
def patch_that_is_missing(user: User) -> None:
    patch(user).unlink()
    user.follow("repo.restore_or_drop", "patch")


@runs("repo.format_patch")
def patch_that_is_no_mail(user: User) -> None:
    patch(user).write_text("diff --git a/a b/a\n")
    command = user.meets("repo.format_patch", "patch")
    user.commit(vllm__mine_py="mine = 1\n")
    made = user.type(f"cd vendor/vllm && {command} -o ../../made")
    assert made.code == 0, made.output
    shutil.copy(user.root / made.out.strip().removeprefix("../../"), patch(user))
    assert user.inv("patch").code == 0
    user.followed.add("repo.format_patch")


def conflict(user: User) -> None:
    """Let the patch of the series not apply: upstream's line is another one."""
    text = patch(user).read_text()
    line = next(line for line in text.splitlines() if "vllm/_C.abi3.so" in line)
    patch(user).write_text(text.replace(line, line.replace("_C.abi3", "_D.abi3"), 1))
    user.git("commit", "--quiet", "--all", "-m", "A patch that does not apply")


@runs("repo.stop_or_drop", "repo.apply_hunks", "repo.add_or_abort")
def patch_that_does_not_apply(user: User) -> None:
    unapplied(user)
    conflict(user)
    command = user.meets("repo.stop_or_drop", "bootstrap")
    stopped = user.type(command)
    assert stopped.code != 0
    user.followed.add("repo.stop_or_drop")
    hunks = printed("repo.apply_hunks", stopped)
    assert hunks, stopped.output
    # git apply exits with 1 where it writes a .rej file, which is what the hint promises.
    assert user.type(hunks).code == 1
    rejected = user.vllm / "setup.py.rej"
    assert rejected.exists()
    rejected.unlink()
    user.followed.add("repo.apply_hunks")
    setup = user.vllm / "setup.py"
    setup.write_text(setup.read_text() + "# resolved\n")
    user.follow("repo.add_or_abort", "patch.continue", then=False)
    assert user.inv("patch.export").code == 0


@runs("repo.skip_or_edit")
def patch_that_changes_nothing(user: User) -> None:
    two_sides(user)
    user.type("git -C vendor/vllm cherry-pick --abort")
    base = user.world.git("rev-parse", "HEAD")
    one = user.world.git("rev-parse", "one")
    mail = user.root / "one.patch"
    mail.write_text(user.world.git("format-patch", "--full-index", "--stdout", "-1", one))
    am = user.type(f"git -C vendor/vllm am --3way {mail}")
    assert "onflict" in am.output, am.output
    user.type("git -C vendor/vllm checkout --ours vllm/mine.py; git -C vendor/vllm add --all")
    user.follow("repo.skip_or_edit", "patch.continue", then=False)
    assert user.world.git("rev-parse", "HEAD") == base


@runs("repo.resolve_or")
def conflict_of_a_cherry_pick(user: User) -> None:
    two_sides(user)
    command = user.meets("repo.resolve_or", "patch.continue")
    (user.vllm / "vllm" / "mine.py").write_text("mine = 3\n")
    assert (ended := user.type(command)).code == 0, ended.output
    assert user.inv("patch.export").code == 0
    user.followed.add("repo.resolve_or")


def two_sides(user: User) -> None:
    """Stop in a cherry-pick of a commit that changes the line of another."""
    base = user.world.git("rev-parse", "HEAD")
    one = user.commit("[Core] One", vllm__mine_py="mine = 1\n")
    user.world.git("branch", "one", one)
    user.world.git("checkout", "--quiet", "--detach", base)
    user.commit("[Core] Two", vllm__mine_py="mine = 2\n")
    assert user.type(f"git -C vendor/vllm cherry-pick {one}").code == 1


@runs("repo.continue_or_abort", "repo.resume_or_abort")
def operation_that_is_under_way(user: User) -> None:
    two_sides(user)
    (user.vllm / "vllm" / "mine.py").write_text("mine = 3\n")
    user.type("git -C vendor/vllm add --all")
    command = user.meets("repo.resume_or_abort", "patch.apply")
    assert user.meets("repo.continue_or_abort", "patch.export") == command
    user.follow("repo.resume_or_abort", "patch.apply", then=False)
    assert user.inv("patch.export").code == 0
    user.followed.add("repo.continue_or_abort")


@runs("inv.patch_abort")
def merge_that_is_to_be_given_up(user: User) -> None:
    two_sides(user)
    user.type("git -C vendor/vllm cherry-pick --abort")
    assert user.type("git -C vendor/vllm merge one").code == 1
    ended = user.inv("patch.continue")
    assert "./scripts/inv patch.continue --abort" in ended.err, ended.output
    mine = user.world.git("rev-parse", "HEAD")
    assert user.type("./scripts/inv patch.continue --abort").code == 0
    assert user.world.git("rev-parse", "HEAD") == mine
    user.followed.add("inv.patch_abort")


@runs("inv.patch_continue_or_abort")
def merge_that_has_no_step_to_skip(user: User) -> None:
    two_sides(user)
    user.type("git -C vendor/vllm cherry-pick --abort")
    user.type("git -C vendor/vllm merge one")
    (user.vllm / "vllm" / "mine.py").write_text("mine = 3\n")
    user.type("git -C vendor/vllm add --all")
    user.follow("inv.patch_continue_or_abort", "patch.continue", "--skip", then=False)


def foreign_head(user: User) -> str:
    """Commit the tree of vendor/vllm without a parent, on no branch."""
    made = user.world.git("commit-tree", "-m", SUBJECT, "HEAD^{tree}")
    user.world.git("checkout", "--quiet", "--detach", made)
    return made


@runs("repo.on_a_branch", "repo.branch_then", "repo.detach", "repo.detach_then")
def checkout_that_is_not_on_the_pin(user: User) -> None:
    mine = foreign_head(user)
    command = user.follow("repo.on_a_branch", "patch.apply", then=False).err
    assert "git -C vendor/vllm branch mine-" in command
    assert user.world.git("rev-parse", f"mine-{mine[:12]}") == mine
    assert user.inv("patch.apply").code == 0
    assert user.inv("patch.unapply").code == 0
    user.world.git("checkout", "--quiet", "--detach", mine)
    user.follow("repo.on_a_branch", "patch.export", then=False)
    assert user.inv("patch.apply").code == 0
    user.followed |= {"repo.branch_then", "repo.detach", "repo.detach_then"}


@runs("repo.take_file_or_commit", "repo.stash_patch")
def patch_file_that_was_edited(user: User) -> None:
    text = patch(user).read_text()
    patch(user).write_text(text.replace("+    ", "+     ", 1))
    user.commit("[Core] Mine", vllm__mine_py="mine = 1\n")
    user.follow("repo.take_file_or_commit", "patch.export", then=False)
    assert user.inv("patch.export").code == 0
    patch(user).write_text("no patch\n")
    user.follow("repo.stash_patch", "patch.export")


@runs("repo.apply_or_drop", "repo.apply_and_pick")
def patch_of_a_colleague_that_is_not_applied(user: User) -> None:
    mine = user.commit("[Core] Theirs", vllm__theirs_py="theirs = 1\n")
    text = user.world.git("format-patch", "--zero-commit", "--stdout", "-1", mine) + "\n"
    user.world.git("reset", "--quiet", "--hard", "HEAD~1")
    (series(user).parent / "Core-Theirs.patch").write_text(text)
    series(user).write_text(series(user).read_text() + "Core-Theirs.patch\n")
    user.commit("[Core] Mine", vllm__mine_py="mine = 1\n")
    user.follow("repo.apply_or_drop", "patch.export", then=False)
    assert (ended := user.inv("patch.export")).code == 0, ended.output
    assert {path.name for path in (user.vllm / "vllm").glob("*ine.py")} == {"mine.py"}
    assert (user.vllm / "vllm" / "theirs.py").exists()
    user.followed.add("repo.apply_and_pick")


@runs("repo.foreign_folder")
def folder_in_the_place_of_the_checkout(user: User) -> None:
    shutil.move(user.vllm, user.root / "kept")
    user.vllm.mkdir()
    (user.vllm / "notes").write_text("mine")
    user.look("repo.foreign_folder", "bootstrap", shows="notes")


@runs("repo.keep_or_clone")
def checkout_of_another_kind(user: User) -> None:
    user.follow("repo.keep_or_clone", "bootstrap", "--source", "git", then=False)


@runs("repo.fetch_pin")
def repository_without_the_pin(user: User) -> None:
    shutil.rmtree(user.vllm)
    user.type("git init --quiet vendor/vllm")
    user.world.git("commit", "--quiet", "--allow-empty", "-m", "Mine")
    user.follow("repo.fetch_pin", "bootstrap", then=False)


@runs("repo.one_of", "repo.branch_name", "repo.patch_vllm")
def branch_of_a_patch(user: User) -> None:
    user.look("repo.one_of", "patch.export", "--branch", "a", "--patch", "b", shows=".patch")
    user.look("repo.patch_vllm", "patch", "--project", "llvm", shows="applied")
    git_name(user)
    name = patch(user).name
    user.follow(
        "repo.branch_name", "patch.export", "--branch", "a b", "--patch", name,
        put={"FILE": name}, then=False,
    )  # fmt: skip


def git_name(user: User) -> None:
    user.type("git config --global user.name Ada && git config --global user.email a@b.c")


@runs("cli.export_branch_patch", "repo.other_branch", "repo.set_name")
def branch_of_a_patch_without_its_name(user: User) -> None:
    name = patch(user).name
    user.follow("repo.set_name", "patch.export", "--branch", "fix/a", "--patch", name)
    user.follow(
        "cli.export_branch_patch", "patch.export", "--branch", "fix/b",
        put={"NAME": "fix/b", "FILE": name}, then=False,
    )  # fmt: skip
    taken = ("patch.export", "--branch", "fix/a", "--patch", name)
    user.follow("repo.other_branch", *taken, then=False)


@runs("repo.rebase", "repo.rebase_interactive")
def commits_that_cannot_be_patches(user: User) -> None:
    base = user.world.git("rev-parse", "HEAD")
    one = user.commit("[Core] One", vllm__one_py="one = 1\n")
    user.world.git("checkout", "--quiet", "--detach", base)
    user.commit("[Core] Two", vllm__two_py="two = 1\n")
    user.world.git("merge", "--quiet", "--no-ff", "-m", "Merge", one)
    user.follow("repo.rebase", "patch.export")
    nothing = "[Core] Nothing\n\nUpstream-Status: None"
    user.world.git("commit", "--quiet", "--allow-empty", "-m", nothing)
    command = user.meets("repo.rebase_interactive", "patch.export")
    ended = user.type(command, GIT_SEQUENCE_EDITOR="sed -i '$d;/Nothing/d'")
    assert ended.code == 0, ended.output
    assert user.inv("patch.export").code == 0
    user.followed.add("repo.rebase_interactive")


@runs("inv.status")
def export_from_a_folder_that_is_no_checkout(user: User) -> None:
    shutil.move(user.vllm, user.root / "kept")
    user.vllm.mkdir()
    (user.vllm / "notes").write_text("mine")
    user.look("inv.status", "patch.export", shows="source")


MAIL = """From 1111111111111111111111111111111111111111 Mon Sep 17 00:00:00 2001
From: Eve <eve@example.com>
Date: Mon, 1 Jun 2026 10:00:00 +0000
Subject: [PATCH] [Core] Theirs

---
diff --git a/vllm/version.py b/vllm/version.py
--- a/vllm/version.py
+++ b/vllm/version.py
@@ -1,1 +1,1 @@
-no such line
+another line
--
2.39
"""


@runs("repo.what_to_import", "repo.by_hand_conflict")
def mails_that_cannot_be_imported(user: User) -> None:
    user.commit("[Core] Mine", vllm__mine_py="mine = 1\n")
    good = user.root / "good.patch"
    good.write_text(user.type("git -C vendor/vllm format-patch --stdout -1").out)
    user.world.git("reset", "--quiet", "--hard", "HEAD~1")
    user.follow(
        "repo.what_to_import", "patch.import", "no-such-file", put={"FILE": str(good)}, then=False
    )
    bad = user.root / "bad.patch"
    bad.write_text(MAIL)
    stopped = user.type(user.meets("repo.by_hand_conflict", "patch.import", str(bad)))
    assert stopped.code == 4, stopped.output
    assert user.inv("patch.continue", "--abort").code == 0
    user.followed.add("repo.by_hand_conflict")
