"""Situations of the package index, of uv's settings and of what was downloaded."""

import re
import shutil

from tests.proof.hints.following import User, printed, runs
from tests.proof.hints.stack_situations import two_sides, unapplied


def bare(user: User) -> None:
    """Take the environment away, so that bootstrap asks the index."""
    shutil.rmtree(user.world.layout.environment)


def again(user: User, name: str, **env: str) -> None:
    """Meet a hint of bootstrap, and type its command and bootstrap in one shell."""
    command = user.meets(name, "bootstrap", **env)
    done = user.type(f"{command} && ./scripts/inv bootstrap", **env)
    assert (done.code, user.world.status()["environment"]) == (0, "ok"), done.output
    user.followed.add(name)


@runs("machine.newer")
def date_in_the_shell_that_leaves_torch_out(user: User) -> None:
    bare(user)
    again(user, "machine.newer", UV_EXCLUDE_NEWER="2020-01-01")


@runs("machine.newer_in_file", "machine.uv_setting_in_file")
def settings_of_uv_that_leave_torch_out(user: User) -> None:
    bare(user)
    del user.world.env["UV_NO_CONFIG"]
    file = user.world.folder / "home" / ".config" / "uv" / "uv.toml"
    file.parent.mkdir(parents=True)
    file.write_text('exclude-newer = "2020-01-01"\n')
    user.look("machine.newer_in_file", "bootstrap", shows="1:exclude-newer")
    file.write_text("[pip]\nrequire-hashes = true\n")
    user.look("machine.uv_setting_in_file", "bootstrap", shows="2:require-hashes")
    file.unlink()
    assert user.inv("bootstrap").code == 0


@runs("machine.network_or_index", "machine.other_index")
def index_that_does_not_answer_or_lacks_a_package(user: User) -> None:
    index = user.world.index.url
    bare(user)
    nowhere = "http://127.0.0.1:9/simple"
    user.world.env |= {"UV_DEFAULT_INDEX": nowhere, "PIP_INDEX_URL": nowhere}
    user.world.env["TORCH_INDEX_URL"] = nowhere
    shown = user.type(user.meets("machine.network_or_index", "bootstrap"))
    assert re.search(r"(FAIL|warn) +index", shown.out), shown.output
    user.followed.add("machine.network_or_index")
    user.world.env |= {"UV_DEFAULT_INDEX": index, "PIP_INDEX_URL": index, "TORCH_INDEX_URL": index}
    hidden = [name for name in user.world.index.files if name.startswith("torch-")]
    user.world.index.hide(*hidden)
    command = user.meets("machine.other_index", "bootstrap")
    user.world.index.files = dict(user.world.materials.index.files)
    done = user.type(f"{command.replace('…', index)} && ./scripts/inv bootstrap")
    assert done.code == 0, done.output
    user.followed.add("machine.other_index")


@runs("machine.pip_torch")
def torch_of_the_user_that_is_not_there(user: User) -> None:
    user.world.uv("uninstall", "torch")
    user.world.env["USE_EXISTING_TORCH"] = "1"
    command = user.meets("machine.pip_torch", "bootstrap")
    done = user.type(f"{command} && ./scripts/inv bootstrap")
    assert (done.code, user.world.status()["environment"]) == (0, "ok"), done.output
    user.followed.add("machine.pip_torch")


@runs("repo.pins_diff", "repo.other_index")
def pins_that_were_changed_by_hand(user: User) -> None:
    pins = user.world.layout.pins
    text = pins.read_text()
    shutil.rmtree(user.vllm)
    user.vllm.mkdir()
    pins.write_text(re.sub(r'(\[vllm\.archive\][^\[]*tree = ")\w', r"\g<1>f", text))
    user.look("repo.pins_diff", "bootstrap", shows="tree = ")
    shutil.rmtree(user.world.folder / "cache")
    (user.world.folder / "cache").mkdir()
    pins.write_text(re.sub(r'(\[vllm\.archive\][^\[]*sha256 = ")\w', r"\g<1>f", text))
    command = user.meets("repo.other_index", "bootstrap")
    pins.write_text(text)
    done = user.type(f"{command.replace('URL', user.world.index.url)} && ./scripts/inv bootstrap")
    assert done.code == 0, done.output
    user.followed.add("repo.other_index")


@runs("repo.delete_lock")
def lock_that_a_program_holds(user: User) -> None:
    lock = user.vllm / ".git" / "index.lock"
    with lock.open("w"):
        command = user.meets("repo.delete_lock", "patch.unapply")
    assert user.type(command).code == 0
    unapplied(user)
    user.followed.add("repo.delete_lock")


@runs("repo.skip_or_abort")
def conflict_that_is_skipped(user: User) -> None:
    two_sides(user)
    mine = user.world.git("rev-parse", "HEAD")
    ended = user.inv("patch.continue")
    assert printed("repo.resolve_or", ended), ended.output
    assert "or ./scripts/inv patch.continue --skip, or --abort" in ended.err
    assert (done := user.type("./scripts/inv patch.continue --skip")).code == 0, done.output
    assert user.world.git("rev-parse", "HEAD") == mine
    user.followed.add("repo.skip_or_abort")


@runs("machine.uv_setting")
def shell_in_which_uv_asks_no_index(user: User) -> None:
    bare(user)
    uv_cache = user.root / "no-packages"
    again(user, "machine.uv_setting", UV_OFFLINE="1", UV_CACHE_DIR=str(uv_cache))
