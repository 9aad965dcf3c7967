"""Situations of an installation, of wheels, and of a smoke that fails."""

import os
import re
import shutil
import zipfile
from pathlib import Path

from tests.bump.conftest import KERNELS, judge_at_once
from tests.proof.hints.following import User, printed, runs
from tests.proof.hints.smoke_situations import smoked
from workspace.install import stamp

SMOKE = ("./scripts/nox", "-s", "smoke")


def edit(user: User) -> None:
    source = user.vllm / "csrc" / "cpu" / "answer.c"
    source.write_text(source.read_text().replace("42", "43"))


@runs("install.after_change")
def clone_in_which_all_is_well(user: User) -> None:
    smoked(user)
    user.follow("install.after_change", "status", then=False)


@runs("install.plan_json", "install.check_triton")
def flags_that_do_not_go_together(user: User) -> None:
    edit(user)
    user.look("install.plan_json", "rebuild", "--json", shows='"schema"')
    user.look("install.check_triton", "fix-triton", "--check", "--from-source", shows="riton")


@runs("install.verb")
def build_that_is_not_verified(user: User) -> None:
    edit(user)
    user.follow("install.verb", "wheel", then=False)
    assert user.inv("wheel").code == 0


@runs("install.bootstrap_rebuild")
def environment_that_is_stale(user: User) -> None:
    common = user.vllm / "requirements" / "common.txt"
    text = common.read_text()
    common.write_text("\n".join(text.splitlines()[1:]) + "\n")
    user.follow("install.bootstrap_rebuild", "rebuild", then=False)
    assert user.world.status()["environment"] == "ok"


def packed(user: User) -> Path:
    """Return a wheel of this clone's build."""
    done = user.inv("wheel")
    assert done.code == 0, done.output
    return user.root / done.out.split()[-1]


def with_record(wheel: Path, copy: Path, old: bytes, new: bytes) -> None:
    """Copy a wheel, and change what it says of itself."""
    with zipfile.ZipFile(wheel) as read, zipfile.ZipFile(copy, "w") as written:
        for item in read.infolist():
            content = read.read(item)
            if item.filename.endswith(f".dist-info/{stamp.RECORD}"):
                content = re.sub(old, new, content, count=1, flags=re.DOTALL)
            written.writestr(item, content)


@runs(
    "install.copy_or_pack", "install.pack_again", "install.precompiled", "install.rebuild_differs"
)
def wheels_that_do_not_fit(user: User) -> None:
    wheel = packed(user)
    mine = user.root / "mine" / wheel.name
    mine.parent.mkdir()
    verb = ("bootstrap", "--kernels", str(mine))
    with_record(wheel, mine, rb'"schema": ?\d+', b'"schema": 999')
    user.follow("install.pack_again", *verb, then=False)
    with_record(wheel, mine, rb"^.*$", b"{")
    user.follow("install.copy_or_pack", *verb, then=False)
    with zipfile.ZipFile(mine, "w") as new:
        new.writestr("vllm/a.py", "")
    user.follow("install.precompiled", *verb, then=False)
    shutil.copy(wheel, mine)
    edit(user)
    user.follow("install.rebuild_differs", *verb, then=False)
    assert user.world.status()["kernels"] == "ok"


@runs("install.native")
def pins_without_a_wheel_for_this_machine(user: User) -> None:
    pins = user.world.layout.pins
    pins.write_text(re.sub(r"(?ms)^\[vllm\.precompiled\.cpu[^\[]*", "", pins.read_text()))
    shutil.rmtree(user.world.layout.environment)
    user.follow("install.native", "bootstrap", "--kernels", "precompiled", then=False)
    assert user.world.status()["kernels"] == "ok"


@runs("checks.reinstall", "checks.differs")
def smoke_that_fails(user: User) -> None:
    judge_at_once(user.world.layout.probes)
    kernels = user.world.layout.probes / "kernels.py"
    kernels.write_text(KERNELS.replace('"difference": 0.5', '"difference": 5.0'))
    user.look("checks.differs", *SMOKE, shows="1 file changed|vllm")
    kernels.write_text(KERNELS)
    library = next((user.vllm / "vllm").glob("*.so"))
    # As a damaged disk: size and time stay.
    stat, content = library.stat(), bytearray(library.read_bytes())
    content[-1] ^= 1
    library.write_bytes(content)
    os.utime(library, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    user.follow("checks.reinstall", *SMOKE)


@runs("checks.bootstrap_then_hook", "checks.clone_first")
def hooks_without_a_repository(user: User) -> None:
    (user.world.folder / "home" / ".gitconfig").write_text("")
    shutil.rmtree(user.vllm)
    user.vllm.mkdir()
    user.follow("checks.bootstrap_then_hook", "hook")
    shutil.rmtree(user.vllm)
    (user.root / ".git").rename(user.root / "kept.git")
    again = {"URL": f"kept.git {user.root / 'another'}"}
    user.follow("checks.clone_first", "hook", put=again, then=False)
    assert (user.root / "another" / "tasks.py").exists()


@runs("checks.relative_paths")
def tests_of_upstream_that_are_not_there(user: User) -> None:
    (user.vllm / "vllm" / "sampling_params.py").write_text("")
    verb = ("./scripts/nox", "-s", "upstream", "--", "--all-of")
    user.follow("checks.relative_paths", *verb, "no/such/path", then=False)


@runs("machine.drop_from_recipe")
def recipe_with_a_variable_that_nothing_reads(user: User) -> None:
    from tests.proof.hints.serve_situations import serving

    serving(user)
    recipe = user.root / "recipes" / "tiny.toml"
    recipe.write_text(recipe.read_text() + 'VLLM_CPU_KVCACHE_SPACE_GIB = "1"\n')
    user.look("machine.drop_from_recipe", "serve", "tiny", "--dry-run", shows="tiny")


@runs("core.what_it_is", "cli.disk_full", "core.cache_folder")
def places_that_cannot_be_written(user: User) -> None:
    lock = user.world.layout.lock
    lock.unlink()
    lock.mkdir()
    user.look("core.what_it_is", "patch.apply", shows="drwx")
    lock.rmdir()
    ended = user.type("./scripts/inv status > /dev/full")
    command = printed("cli.disk_full", ended)
    assert command, ended.output
    assert "Filesystem" in user.type(command).out
    user.followed.add("cli.disk_full")
    shutil.rmtree(user.vllm)
    user.vllm.mkdir()
    cache = user.root / "cache"
    cache.mkdir()
    (cache / "files").write_text("mine")
    verb = ("bootstrap", "--source", "release")
    shell = {"WORKSPACE_CACHE_DIR": str(cache)}
    command = user.meets("core.cache_folder", *verb, **shell)
    command = command.replace("/a/folder/of/yours", str(user.root / "folder"))
    done = user.type(f"{command} && ./scripts/inv bootstrap --source release", **shell)
    assert done.code == 0, done.output
    user.followed.add("core.cache_folder")
