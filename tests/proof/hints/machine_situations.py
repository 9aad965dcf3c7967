"""Situations of the machine, of the installation, and of what is measured and served with it."""

import os
import shutil
from dataclasses import replace

from tests.bench.materials import record
from tests.proof.hints.following import User, printed, runs
from workspace.bench.results import Record
from workspace.core import records


@runs("machine.unset")
def shell_that_hides_a_line_of_dotenv(user: User) -> None:
    user.world.layout.dotenv.write_text("MAX_JOBS=2\n")
    command = user.meets("machine.unset", "env.check", MAX_JOBS="3")
    ended = user.type(f"{command} && ./scripts/inv env.check", MAX_JOBS="3")
    assert (ended.code, printed("machine.unset", ended)) == (0, None), ended.output
    user.followed.add("machine.unset")


@runs("machine.close_file", "machine.close_folder")
def places_that_others_can_write(user: User) -> None:
    user.world.layout.dotenv.write_text("HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz\n")
    user.world.layout.dotenv.chmod(0o644)
    user.follow("machine.close_file", "doctor", "--offline")
    folder = user.world.folder / "open"
    folder.mkdir()
    folder.chmod(0o777)
    user.follow("machine.close_folder", "doctor", "--offline", TMPDIR=str(folder))


@runs("machine.ls_remote")
def mirror_that_points_nowhere(user: User) -> None:
    mirror = user.world.folder / "nowhere"
    user.world.env["VLLM_MIRROR"] = mirror.as_uri()
    # It shows git's own words for the fault, and its exit code.
    shown = user.type(user.meets("machine.ls_remote", "doctor"))
    assert (shown.code, "does not appear to be a git repository" in shown.err) == (128, True)
    user.followed.add("machine.ls_remote")


@runs("machine.replace_dotenv")
def dotenv_with_another_value_than_the_machine_suggests(user: User) -> None:
    user.world.layout.dotenv.write_text("VLLM_CPU_KVCACHE_SPACE=1\n")
    user.follow("machine.replace_dotenv", "env.init")
    assert "1" in user.world.layout.dotenv.read_text()


@runs("machine.set_venv_aside")
def environment_that_is_not_ours(user: User) -> None:
    shutil.rmtree(user.world.layout.environment)
    user.world.layout.environment.mkdir()
    (user.world.layout.environment / "notes").write_text("mine")
    user.follow("machine.set_venv_aside", "bootstrap")
    assert (user.root / ".vllm.old" / "notes").read_text() == "mine"


@runs("inv.bootstrap")
def clone_without_its_environment(user: User) -> None:
    shutil.rmtree(user.world.layout.environment)
    user.follow("inv.bootstrap", "run", "--", "python", "-c", "import vllm")


@runs("install.no_first_token")
def engine_that_gives_no_token(user: User) -> None:
    (user.root / "no-token").write_text("it broke")
    shutil.rmtree(user.world.layout.environment)
    user.follow("install.no_first_token", "bootstrap", then=False)
    assert user.world.status()["install"] == "ok"


@runs("install.operation_under_way", "install.no_descendant", "install.foreign_checkout")
def status_of_a_checkout_that_moved(user: User) -> None:
    base = user.world.git("rev-parse", "HEAD")
    one = user.commit("[Core] One", vllm__mine_py="mine = 1\n")
    user.world.git("checkout", "--quiet", "--detach", base)
    user.type(f"git -C vendor/vllm cherry-pick --no-commit {one}")
    (user.vllm / ".git" / "CHERRY_PICK_HEAD").write_text(f"{one}\n")
    user.follow("install.operation_under_way", "status")
    made = user.world.git("commit-tree", "-m", "Mine", "HEAD^{tree}")
    user.world.git("checkout", "--quiet", "--detach", made)
    user.look("install.no_descendant", "status", shows="foreign")
    shutil.rmtree(user.vllm)
    user.type("git init --quiet vendor/vllm")
    user.world.git("commit", "--quiet", "--allow-empty", "-m", "Mine")
    user.look("install.foreign_checkout", "status", shows="nothing to commit")


@runs("server.recipes", "server.recipe_alike", "server.run_command")
def servers_that_do_not_exist(user: User) -> None:
    user.look("server.recipes", "serve.logs", shows="tiny")
    user.look("server.recipe_alike", "serve", "tinny", "--dry-run", shows="tiny")
    user.follow("server.run_command", "run", then=False)


@runs("checks.compare_hooks")
def hooks_of_the_user(user: User) -> None:
    (user.world.folder / "home" / ".gitconfig").write_text("")
    for repository in (user.root / ".git", user.vllm / ".git"):
        folder = repository / "hooks"
        folder.mkdir(exist_ok=True)
        for name in ("pre-push", "pre-push.before-workspace"):
            (folder / name).write_text("#!/bin/sh\n")
    user.look("checks.compare_hooks", "hook", shows="")


def measured(user: User, made: Record) -> str:
    """Write a record of the user's into a folder that is not results/."""
    path = user.world.folder / f"{made.label}.json"
    records.write(path, made)
    return str(path)


@runs("bench.compare_anyway", "bench.fields", "bench.factor_default", "bench.metrics_of")
def records_that_do_not_compare(user: User) -> None:
    first, second = (
        measured(user, record(label="one")),
        measured(user, record(label="two", tree="b" * 40)),
    )
    pair = {"A B": f"{first} {second}", "FIELD": "device"}
    verb = ("bench.compare", first, second)
    user.follow("bench.fields", *verb, "--across", "colour", put=pair, then=False)
    del pair["FIELD"]
    user.follow("bench.factor_default", *verb, "--factor", "x", put=pair, then=False)
    other = measured(user, record(label="other", metric="cold_startup"))
    user.look("bench.metrics_of", "bench.compare", first, other, shows="no records")
    cpu = measured(user, replace(record(label="cpu"), device="cpu", model="other"))
    user.follow(
        "bench.compare_anyway", "bench.compare", first, cpu, "--across", "model", then=False
    )


@runs("inv.bench", "bench.list_alike", "bench.compare_two", "bench.path_of_record")
def records_that_are_not_there(user: User) -> None:
    for machine in ("one", "two"):
        path = user.root / "results" / machine / "dddddddddddd-latency.json"
        path.parent.mkdir(parents=True)
        records.write(path, record(label="latency"))
    user.look("bench.list_alike", "bench.compare", "latenci", "latency", shows="latency")
    user.look("inv.bench", "bench.compare", "qqq", "latency", shows="latency")
    user.look("bench.path_of_record", "bench.compare", "latency", "latency", shows="latency")
    pair = {"A B": "results/one/dddddddddddd-latency.json results/two/dddddddddddd-latency.json"}
    user.follow("bench.compare_two", "bench", put=pair, then=False)


@runs("core.list_file")
def record_that_cannot_be_read(user: User) -> None:
    path = user.world.folder / "loop.json"
    path.write_text("{}")
    path.chmod(0)
    if os.geteuid() == 0:
        path.unlink()
        patch = next(user.world.layout.patches("vllm").glob("*.patch"))
        patch.unlink()
        patch.mkdir()
        user.look("core.list_file", "patch", shows=patch.name)
    else:
        user.look("core.list_file", "bench.compare", str(path), str(path), shows="loop.json")
