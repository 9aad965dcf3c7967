"""Situations of the pin, its releases, its downloads and of git itself."""

import datetime
import shutil

from tests.proof.hints.following import User, printed, runs
from tests.proof.hints.stack_situations import git_name, patch, series, unapplied
from tests.small import releases
from tests.small.materials import git
from tests.small.releases import CLEAN, CONFLICT


def publish(user: User, version: str, *, when: str = releases.OLD) -> None:
    releases.make(user.world.materials).publish(user.world, version, when=when)


@runs("bump.bump_with_conflicts", "bump.allow_recent")
def releases_that_are_newer(user: User) -> None:
    publish(user, CONFLICT, when=datetime.datetime.now(datetime.UTC).isoformat())
    stopped = user.type(user.meets("bump.bump_with_conflicts", "pin.forecast", f"v{CONFLICT}"))
    recent = printed("bump.allow_recent", stopped)
    assert recent, stopped.output
    stopped = user.type(recent)
    assert (stopped.code, "conflict" in stopped.err) == (4, True), stopped.output
    assert user.type("./scripts/inv patch.continue --abort").code == 0
    user.followed |= {"bump.bump_with_conflicts", "bump.allow_recent"}


@runs("bump.commit_or_stash")
def edit_where_a_bump_would_move_the_checkout(user: User) -> None:
    publish(user, CLEAN)
    setup = user.vllm / "setup.py"
    setup.write_text(setup.read_text() + "# mine\n")
    user.follow("bump.commit_or_stash", "pin.bump", f"v{CLEAN}", then=False)
    assert user.world.status()["patches"] == "ok"


@runs("repo.checkout")
def checkout_that_another_program_moved(user: User) -> None:
    mine = user.commit("[Core] Mine", vllm__mine_py="mine = 1\n")
    user.world.git("checkout", "--quiet", "--detach", "refs/patches/base")
    user.follow("repo.checkout", "patch", then=False)
    assert user.world.git("rev-parse", "HEAD") == mine


@runs("repo.fetch_and_detach")
def pin_that_git_pull_moved(user: User) -> None:
    made = releases.make(user.world.materials)
    user.world.git("remote", "add", "origin", str(made.upstream))
    commit = made.commit(CLEAN)
    text = user.world.layout.pins.read_text().replace(user.world.materials.commit, commit)
    text = text.replace("v0.31.0", f"v{CLEAN}", 1)
    text = text.replace(user.world.materials.archive_commit, "1" * 40)
    user.world.layout.pins.write_text(text)
    series(user).write_text(series(user).read_text().replace(user.world.materials.commit, commit))
    git(user.root, "update-index", "--cacheinfo", f"160000,{commit},vendor/vllm")
    user.follow("repo.fetch_and_detach", "patch", then=False)
    assert user.inv("patch.apply").code == 0


@runs("repo.stash_in_way")
def file_where_a_patch_makes_one(user: User) -> None:
    mine = user.commit("[Core] Theirs", vllm__theirs_py="theirs = 1\n")
    assert user.inv("patch.export").code == 0
    unapplied(user)
    (user.vllm / "vllm" / "theirs.py").write_text("mine\n")
    user.follow("repo.stash_in_way", "patch.apply")
    assert user.world.git("show", "stash@{0}^3:vllm/theirs.py") == "mine"
    assert user.world.git("rev-parse", "HEAD^{tree}") == user.world.git(
        "rev-parse", f"{mine}^{{tree}}"
    )


@runs("repo.push_branch")
def branch_that_is_to_be_pushed(user: User) -> None:
    git_name(user)
    fork = user.world.folder / "fork.git"
    git(user.root, "init", "--quiet", "--bare", str(fork))
    verb = ("patch.export", "--branch", "fix/a", "--patch", patch(user).name)
    mine = {"git@github.com:YOUR-NAME/vllm.git": str(fork)}
    user.follow("repo.push_branch", *verb, put=mine, then=False)
    assert git(fork, "rev-parse", "fix/a")


@runs("repo.am_by_hand")
def patch_that_does_not_apply_to_main(user: User) -> None:
    git_name(user)
    text = patch(user).read_text()
    line = next(line for line in text.splitlines() if "vllm/_C.abi3.so" in line)
    patch(user).write_text(text.replace(line, line.replace("_C.abi3", "_D.abi3"), 1))
    command = user.meets(
        "repo.am_by_hand", "patch.export", "--branch", "fix/a", "--patch", patch(user).name
    )
    folder = user.world.folder / "worktree"
    done = user.type(command.replace("NAME", "fix/a").replace("FOLDER", str(folder)))
    assert (done.code, (folder / "setup.py").exists()) == (0, True), done.output
    user.followed.add("repo.am_by_hand")


@runs("repo.upstream_has_it")
def patch_that_upstream_has(user: User) -> None:
    empty = user.commit("[Core] Theirs", vllm__theirs_py="theirs = 1\n")
    name = "Core-Theirs.patch"
    text = user.world.git("format-patch", "--zero-commit", "--stdout", "-1", empty) + "\n"
    user.world.git("reset", "--quiet", "--hard", "HEAD~1")
    unapplied(user)
    for other in ("Core-Theirs.patch", "Core-Again.patch"):
        subject = "Again" if "Again" in other else "Theirs"
        (series(user).parent / other).write_text(text.replace("] Theirs", f"] {subject}"))
        series(user).write_text(f"{series(user).read_text()}{other}\n")
    user.edits_with('sed -i "/Core-Again/d" "$file"')
    user.follow("repo.upstream_has_it", "patch.apply")
    assert name in series(user).read_text()


@runs("repo.network_or_mirror")
def remote_that_cannot_be_reached(user: User) -> None:
    shutil.rmtree(user.vllm)
    user.vllm.mkdir()
    user.world.env["VLLM_MIRROR"] = (user.world.folder / "nowhere").as_uri()
    shown = user.type(user.meets("repo.network_or_mirror", "bootstrap", "--source", "git"))
    assert "vllm mirror" in shown.output, shown.output
    user.followed.add("repo.network_or_mirror")


@runs("repo.present_stack")
def mail_that_is_in_the_stack(user: User) -> None:
    user.commit("[Core] Mine", vllm__mine_py="mine = 1\n")
    assert user.inv("patch.export").code == 0
    mail = user.root / "mine.patch"
    mail.write_text(user.world.git("format-patch", "--stdout", "-1") + "\n")
    user.look("repo.present_stack", "patch.import", str(mail), shows="applied")


@runs("repo.newer_releases")
def patch_that_main_has(user: User) -> None:
    git_name(user)
    upstream = user.world.materials.upstream
    shown = git(upstream, "log", "-2", "--format=%H %s", "main").splitlines()
    mail = git(upstream, "format-patch", "--zero-commit", "--stdout", "-1", shown[0].split()[0])
    (series(user).parent / "theirs.patch").write_text(mail + "\n")
    verb = ("patch.export", "--branch", "fix/a", "--patch", "theirs.patch")
    user.look("repo.newer_releases", *verb, shows="newer")
