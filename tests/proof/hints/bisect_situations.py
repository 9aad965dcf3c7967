"""Situations of a bisect, in a checkout of the small upstream with its history."""

import shlex

from tests.proof.hints.following import User, runs
from tests.proof.hints.source_situations import anew
from tests.proof.hints.stack_situations import patch, series, unapplied
from tests.small import releases
from tests.small.materials import TAG
from tests.small.releases import RED
from workspace.bench import bisect_log

BISECT = ("./scripts/nox", "-s", "bisect", "--")
ABORT = "./scripts/nox -s bisect -- --abort"
# It is bad where the red release is.
BROKEN = "python -c \"import vllm, sys; sys.exit(hasattr(vllm, 'BROKEN'))\""
ENDS = ("--good", TAG, "--bad", f"v{RED}")


def with_history(user: User) -> None:
    user.world.env["VLLM_MIRROR"] = releases.make(user.world.materials).upstream.as_uri()
    anew(user)
    done = user.inv("bootstrap", "--source", "git")
    assert done.code == 0, done.output


def fetched(user: User) -> None:
    with_history(user)
    user.world.git("fetch", "--quiet", "origin", "tag", f"v{RED}")


@runs("bench.fetch_tag", "bench.good_example", "bench.good_and_bad", "bench.quote_command")
def ends_of_a_bisect_that_are_wrong(user: User) -> None:
    with_history(user)
    run = ("--run", BROKEN)
    user.follow("bench.fetch_tag", *BISECT, "--good", TAG, "--bad", f"v{RED}", *run, then=False)
    again = {"v0.30.0": f"{TAG} --bad v{RED}"}
    done = user.follow("bench.good_example", *BISECT, *run, put=again, then=False)
    assert f"Release {RED}" in done.err, done.output
    command = user.meets("bench.good_and_bad", *BISECT, "--good", f"v{RED}", "--bad", TAG, *run)
    assert command == shlex.join([*BISECT, "--good", "OLDER", "--bad", "NEWER", *run])
    quoted = user.meets("bench.quote_command", *BISECT, *ENDS, "--run", "sh -c 'exit 1")
    quoted = quoted.replace("COMMAND", "sh -c").replace("AN ARGUMENT", "exit 1")
    for typed in (
        command.replace("OLDER", TAG).replace("NEWER", f"v{RED}"),
        f"{quoted} {shlex.join(ENDS)}",
    ):
        stopped = user.type(typed)
        assert "in sandbox" in stopped.err or "suspect" in stopped.err, stopped.output
    assert user.type(ABORT).code == 0
    user.followed |= {"bench.good_and_bad", "bench.quote_command"}


@runs("bench.no_history")
def bisect_in_a_release_archive(user: User) -> None:
    upstream = releases.make(user.world.materials).upstream
    user.world.git("fetch", "--quiet", str(upstream), f"+refs/tags/v{RED}:refs/tags/v{RED}")
    verb = (*BISECT, "--good", f"v{RED}", "--run", "smoke")
    user.look("bench.no_history", *verb, shows="release archive")


def aborted(user: User, name: str, *verb: str) -> None:
    """Meet a hint that aborts the bisect, and see that none is left."""
    user.follow(name, *verb, then=False)
    assert not bisect_log.log_path(user.world.layout).exists()


@runs("bench.other_commit", "bench.count_as_bad", "bench.resume_other", "bench.bisect_abort")
def bisects_that_stop(user: User) -> None:
    fetched(user)
    verb = (*BISECT, *ENDS, "--run")
    aborted(user, "bench.other_commit", *verb, "sh -c 'exit 125'")
    check = user.root / "check"
    strange = f"sh {check}"
    check.write_text(BROKEN.replace("hasattr", "200 * hasattr") + "\n")
    counted = user.meets("bench.count_as_bad", *verb, strange)
    assert "…" in counted
    aborted(user, "bench.resume_other", *verb, BROKEN)
    user.meets("bench.count_as_bad", *verb, strange)
    text = series(user).read_text()
    series(user).write_text(text.replace(f"{patch(user).name}\n", ""))
    aborted(user, "bench.resume_other", *verb, strange)
    series(user).write_text(text)
    log = bisect_log.log_path(user.world.layout)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("{")
    aborted(user, "bench.bisect_abort", *verb, BROKEN)
    done = user.type(f"{counted.replace('…', strange)} {shlex.join(ENDS)}")
    assert (done.code, f"Release {RED}" in done.err) == (0, True), done.output
    user.followed.add("bench.count_as_bad")


def begins(user: User, name: str, command: str) -> None:
    """Type the command of a hint, and see that a bisect begins."""
    done = user.type(command)
    assert "the good end: " in done.err, done.output
    assert user.type(ABORT).code == 0
    user.followed.add(name)


@runs("bench.predicates", "bench.metrics", "bench.bisect_smoke")
def checks_that_a_bisect_does_not_have(user: User) -> None:
    fetched(user)
    ends = shlex.join(ENDS)
    command = user.meets("bench.predicates", *BISECT, *ENDS, "--run", "parity.model")
    begins(user, "bench.predicates", f"{command} {ends}")
    command = user.meets("bench.metrics", *BISECT, *ENDS, "--run", "bench:zzzzzz")
    begins(user, "bench.metrics", f"{command.replace('METRIC', 'latency')} {ends}")
    unapplied(user)
    series(user).write_text(series(user).read_text().replace(f"{patch(user).name}\n", ""))
    command = user.meets("bench.bisect_smoke", *BISECT, "--patches", "--run", "false")
    begins(user, "bench.bisect_smoke", command.replace("v0.30.0", f"{TAG} --bad v{RED}"))


@runs("bench.fix_patches_first")
def bisect_of_the_patches(user: User) -> None:
    verb = (*BISECT, "--patches", "--run")
    user.follow("bench.fix_patches_first", *verb, "sh -c 'exit 125'", then=False)
    assert user.type(ABORT).code == 0
