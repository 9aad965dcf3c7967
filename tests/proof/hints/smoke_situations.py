"""Situations of known-good states, of a bump and of its rollback; the smoke judges at once."""

from tests.bump.conftest import judge_at_once
from tests.proof.hints.following import User, printed, runs
from tests.proof.hints.pin_situations import publish
from tests.small.releases import CLEAN, CONFLICT

# Lines of git in a conflict.
MARKS = ("<<<<<<<", "|||||||", "=======", ">>>>>>>")
RECORD = "./scripts/nox -s record-good"


def smoked(user: User) -> None:
    """Let the smoke judge at once, and record this state as good."""
    judge_at_once(user.world.layout.probes)
    user.git("commit", "--quiet", "--all", "-m", "A smoke for the small world")
    for session in ("smoke", "record-good"):
        done = user.type(f"./scripts/nox -s {session}")
        assert done.code == 0, done.output


@runs("nox.smoke", "bump.smoke_records", "bump.good_when_smoked")
def tree_that_was_never_smoked(user: User) -> None:
    judge_at_once(user.world.layout.probes)
    user.follow("nox.smoke", "status")
    user.follow("bump.smoke_records", "pin", then=False)
    user.follow("bump.good_when_smoked", "pin.rollback", then=False)
    assert user.type(RECORD).code == 0
    assert "known-good" not in user.inv("pin").err


@runs("checks.call_hook")
def hooks_in_a_folder_that_others_share(user: User) -> None:
    smoked(user)
    user.follow("checks.call_hook", "hook", then=False)


@runs("bump.commit_vllm_with", "bump.stash_or_force")
def bump_and_the_way_back(user: User) -> None:
    smoked(user)
    publish(user, CLEAN)
    old = user.world.git("rev-parse", "HEAD")
    user.follow("bump.commit_vllm_with", "pin.bump", f"v{CLEAN}", then=False)
    assert user.git("log", "-1", "--format=%s") == f"pin: move vLLM from v0.31.0 to v{CLEAN}"
    envs = user.vllm / "vllm" / "envs.py"
    envs.write_text(envs.read_text() + "# mine\n")
    user.follow("bump.stash_or_force", "pin.rollback", then=False)
    assert user.world.git("rev-parse", "HEAD") == old


@runs("repo.resolve", "bump.resume_or_give_up", "bump.finish_promotion")
def bump_that_stops_at_a_conflict(user: User) -> None:
    smoked(user)
    publish(user, CONFLICT)
    stopped = user.inv("pin.bump", f"v{CONFLICT}")
    resolve = printed("repo.resolve", stopped)
    assert resolve, stopped.output
    resume = user.meets("bump.resume_or_give_up", "pin.bump", f"v{CLEAN}")
    assert user.meets("bump.finish_promotion", "pin.rollback") == resume
    setup = user.world.layout.bump_sandbox / "vendor" / "vllm" / "setup.py"
    lines = setup.read_text().splitlines(keepends=True)
    setup.write_text("".join(line for line in lines if line[:7] not in MARKS))
    assert user.type(resolve.partition(" && ")[0]).code == 0
    done = user.type(resume)
    assert (done.code, user.world.status()["install"]) == (0, "ok"), done.output
    user.followed |= {"repo.resolve", "bump.resume_or_give_up", "bump.finish_promotion"}
