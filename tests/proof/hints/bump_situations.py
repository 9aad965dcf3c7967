"""Situations of a bump that stops: its smoke judges at once, and fails for the red release."""

from pathlib import Path

from tests.proof.hints.broken_situations import bound
from tests.proof.hints.following import User, printed, runs
from tests.proof.hints.pin_situations import publish
from tests.proof.hints.smoke_situations import MARKS, smoked
from tests.small.releases import CLEAN, CONFLICT, RED
from workspace.bump.staging import RedoLog
from workspace.core import records

CONTINUE = ("patch.continue",)


def sandbox_tree(user: User) -> Path:
    return user.world.layout.bump_sandbox / "vendor" / "vllm"


def fix(user: User) -> None:
    """Take the fault out of the red release, in the tree of the bump."""
    package = sandbox_tree(user) / "vllm" / "__init__.py"
    package.write_text(package.read_text().replace("BROKEN = True\n", ""))


def red(user: User) -> str:
    """Stop in a bump whose smoke fails; return what it prints."""
    smoked(user)
    publish(user, RED)
    stopped = user.inv("pin.bump", f"v{RED}")
    assert stopped.code not in (0, 2), stopped.output
    found = printed("bump.fix_then_continue", stopped)
    assert found, stopped.output
    return found


def is_promoted(user: User, version: str) -> bool:
    return f'tag = "v{version}"' in user.world.layout.pins.read_text()


@runs("bump.bump")
def release_that_has_no_conflict(user: User) -> None:
    smoked(user)
    publish(user, CLEAN)
    user.follow("bump.bump", "pin.forecast", f"v{CLEAN}", then=False)
    assert is_promoted(user, CLEAN)


@runs("bump.sandbox_commit")
def fix_that_is_not_committed(user: User) -> None:
    red(user)
    fix(user)
    user.follow("bump.sandbox_commit", *CONTINUE, then=False)
    assert is_promoted(user, RED)


@runs(
    "bump.fix_then_continue", "bump.reword_then_continue", "inv.patch_continue",
    "bump.sandbox_operation",
    "bump.sandbox_reflog", "bump.stash_then_again",
)  # fmt: skip
def trees_that_changed_during_a_bump(user: User) -> None:
    resume = red(user)
    assert user.meets("inv.patch_continue", "pin") == resume
    tree = sandbox_tree(user)
    shown = user.world.layout.relative(tree)
    tip = user.type(f"git -C {shown} rev-parse HEAD").out.strip()
    user.type(f"git -C {shown} checkout --quiet --orphan mine && git -C {shown} commit -qm Mine")
    user.look("bump.sandbox_reflog", *CONTINUE, shows=tip[:7])
    user.type(f"git -C {shown} checkout --quiet --detach {tip}")
    fix(user)
    user.type(f"git -C {shown} commit --quiet --all -m Fix")
    fixed = user.type(f"git -C {shown} rev-parse HEAD").out.strip()
    user.type(f"git -C {shown} checkout --quiet --detach {tip}")
    user.type(f"git -C {shown} cherry-pick --no-commit {fixed}")
    (Path(user.type(f"git -C {shown} rev-parse --absolute-git-dir").out.strip())
        / "CHERRY_PICK_HEAD").write_text(f"{fixed}\n")  # fmt: skip
    envs = user.vllm / "vllm" / "envs.py"
    envs.write_text(envs.read_text() + "# mine\n")
    stash = user.meets("bump.stash_then_again", *CONTINUE)
    assert user.type(stash).code == 0
    command, _, rest = user.meets("bump.sandbox_operation", *CONTINUE).partition(" && ")
    assert (user.type(command).code, rest) == (0, resume)
    # The commit lacks the line that each patch has.
    reword = printed("bump.reword_then_continue", stopped := user.type(resume))
    assert reword, stopped.output
    done = user.type(reword, GIT_SEQUENCE_EDITOR="sed -i '/Fix/s/^pick/reword/'")
    assert (done.code, is_promoted(user, RED)) == (0, True), done.output
    assert "# mine" in user.world.git("stash", "show", "--patch")
    user.followed |= {"bump.sandbox_operation", "bump.stash_then_again"}
    user.followed |= {"bump.fix_then_continue", "inv.patch_continue", "bump.reword_then_continue"}


@runs("inv.pin", "bump.edit_then_continue", "bump.export_then_again", "bump.git_continue")
def clone_that_changed_during_a_bump(user: User) -> None:
    smoked(user)
    publish(user, CONFLICT)
    assert user.inv("pin.bump", f"v{CONFLICT}").code == 4
    user.look("inv.pin", "status", shows="conflicts")
    setup = sandbox_tree(user) / "setup.py"
    lines = setup.read_text().splitlines(keepends=True)
    setup.write_text("".join(line for line in lines if line[:7] not in MARKS))
    base = user.world.git("rev-parse", "HEAD")
    mine = user.commit("[Core] Mine", vllm__mine_py="mine = 1\n")
    user.world.git("checkout", "--quiet", "--detach", base)
    user.world.git("cherry-pick", "--no-commit", mine)
    (user.vllm / ".git" / "CHERRY_PICK_HEAD").write_text(f"{mine}\n")
    stopped = user.inv(*CONTINUE)
    user.follow("bump.git_continue", *CONTINUE, then=False)
    user.follow("bump.export_then_again", *CONTINUE, then=False)
    assert (user.world.layout.patches("vllm") / "Core-Mine.patch").exists(), stopped.output
    assert user.type("./scripts/inv patch.continue --abort").code == 0
    assert user.inv("pin.bump", f"v{CONFLICT}").code == 4
    lines = setup.read_text().splitlines(keepends=True)
    setup.write_text("".join(line for line in lines if line[:7] not in MARKS))
    user.follow("bump.edit_then_continue", "pin", put={"PATHS": "setup.py"}, then=False)
    assert is_promoted(user, CONFLICT)


@runs("bump.read_state", "bump.give_rollback_up")
def note_of_a_rollback_that_is_damaged(user: User) -> None:
    smoked(user)
    note = user.world.layout.returning
    note.write_text("{")
    user.look("bump.read_state", "pin.rollback", shows="A smoke for the small world")
    records.write(note, RedoLog({"good": "none", "present": "none"}))
    user.follow("bump.give_rollback_up", "pin.rollback", then=False)
    assert user.world.status()["install"] == "ok"
    assert user.inv("patch.apply").code == 0


@runs("bump.doctor_or")
def smoke_that_fails_after_a_move(user: User) -> None:
    smoked(user)
    publish(user, CLEAN)
    assert user.inv("pin.bump", f"v{CLEAN}").code == 0
    probe = user.world.layout.probes / "kernels.py"
    probe.write_text("raise SystemExit('it broke')\n")
    shown = user.type(user.meets("bump.doctor_or", "pin.rollback", "--force"))
    assert "git" in shown.out, shown.output
    user.followed.add("bump.doctor_or")


@runs("bump.disk_of_all", "bump.unmount", "inv.pin_rollback")
def environment_that_cannot_be_renamed(user: User) -> None:
    smoked(user)
    publish(user, CLEAN)
    assert user.inv("pin.bump", f"v{CLEAN}").code == 0
    environment = user.world.layout.environment
    back = ("pin.rollback", "--force")
    copy = user.world.folder / "disk"
    copy.mkdir()
    user.mounts(
        f"mount -t tmpfs tmpfs {copy}",
        f"cp -a {environment}/. {copy}",
        f"mount --bind {copy} {environment}",
    )
    user.look("bump.disk_of_all", *back, shows="Filesystem")
    user.mounts(bound(environment))
    user.look("bump.unmount", *back, shows=str(environment))
    user.through = ()
    user.follow("inv.pin_rollback", "patch.apply")
    assert not is_promoted(user, CLEAN)
