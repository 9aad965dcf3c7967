"""Situations of programs that fail, of disks that are full, and of folders that nothing may write.

A program fails in the place of the real one, which it calls for everything else.
"""

import os
import shutil
from pathlib import Path

from tests.proof.hints.build_situations import torch_cache_of_another
from tests.proof.hints.doctor_situations import program
from tests.proof.hints.following import User, printed, runs
from tests.proof.hints.pin_situations import publish
from tests.proof.hints.source_situations import anew
from tests.small.releases import CONFLICT


def fails(user: User, name: str, arguments: str, manner: str) -> Path:
    """Let a program fail in this manner where its arguments match a pattern of the shell.

    `$real` is the program in whose place it stands.
    """
    own = str(user.root / ".workspace" / "programs")
    path = os.pathsep.join(each for each in user.world.env["PATH"].split(":") if each != own)
    real = shutil.which(name, path=path)
    case = f'case " $* " in *{arguments}*) {manner};; esac'
    return program(user, name, f'real={real}\n{case}\nexec "$real" "$@"')


def without_environment(user: User) -> tuple[str, ...]:
    shutil.rmtree(user.world.layout.environment)
    return ("bootstrap",)


@runs("machine.does_python_work", "machine.python_version", "machine.uv_pythons")
def uv_that_makes_no_python(user: User) -> None:
    verb = without_environment(user)
    fails(user, "uv", '" venv "', "echo error: no >&2; exit 2")
    user.look("machine.does_python_work", *verb, shows=r"Python 3\.")
    damaged = program(user, "damaged", "echo damaged >&2; exit 1")
    link = f"ln -sf {damaged} {user.world.layout.environment_python}"
    fails(user, "uv", '" venv "', f'"$real" "$@"; {link}; exit 0')
    # It shows the message of the damaged Python, and its exit code.
    shown = user.type(user.meets("machine.python_version", *verb))
    assert (shown.code, "damaged" in shown.err) == (1, True), shown.output
    fails(user, "uv", '" python list "', "echo no list >&2; exit 0")
    user.look("machine.uv_pythons", *verb, shows="no list")
    user.followed.add("machine.python_version")


@runs("machine.renew_tools")
def uv_of_the_tools_that_is_damaged(user: User) -> None:
    own = user.world.layout.tools / "bin" / "uv"
    own.parent.mkdir(parents=True)
    own.write_text("#!/bin/sh\nexit 1\n")
    own.chmod(0o755)
    user.follow("machine.renew_tools", "doctor", "--offline", then=False)
    ended = user.inv("doctor", "--offline")
    assert "fail  uv" not in ended.out, ended.output


def requirement_is_missing(user: User) -> None:
    """Let bootstrap have something to install."""
    common = user.vllm / "requirements" / "common.txt"
    first, *others = common.read_text().splitlines()
    common.write_text("\n".join([*others, ""]))
    assert user.inv("bootstrap").code == 0
    user.world.uv("uninstall", first.split()[0])
    common.write_text("\n".join([first, *others, ""]))


def bound(folder: Path, *options: str) -> str:
    """Return the commands that make a mount point of a folder."""
    then = f" && mount -o {','.join(('remount', 'bind', *options))} {folder}" if options else ""
    return f"mount --bind {folder} {folder}{then}"


@runs("machine.own_environment", "machine.cache_folder")
def folders_that_cannot_be_changed(user: User) -> None:
    cache = torch_cache_of_another(user)
    user.mounts(bound(cache))
    user.look("machine.cache_folder", "fix-triton", shows=cache.parent.name)
    requirement_is_missing(user)
    user.mounts(bound(user.world.layout.environment / "lib", "ro"))
    user.look("machine.own_environment", "bootstrap", shows=r"\.vllm")


@runs("machine.control_group")
def limit_of_memory_that_cannot_be_read(user: User) -> None:
    user.mounts(
        "mount -t tmpfs tmpfs /sys/fs/cgroup",
        "group=/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)",
        'mkdir -p "$group/memory.max"',
    )
    user.look("machine.control_group", "doctor", "--offline", shows="0::/")


@runs("core.disk_or_cache", "core.disk_of", "core.disk_and_rights")
def disks_that_are_full_or_closed(user: User) -> None:
    cache, reports = user.world.folder / "cache", user.world.layout.state / "reports"
    reports.mkdir()
    user.mounts(f"mount -t tmpfs -o size=1m tmpfs {cache}")
    user.look("core.disk_or_cache", "doctor", "--offline", shows="Filesystem")
    user.mounts(f"mount -t tmpfs -o size=4k tmpfs {reports}")
    user.look("core.disk_of", "report", shows="Filesystem")
    anew(user)
    vendor = user.root / "vendor"
    user.mounts(bound(vendor, "ro"))
    user.look("core.disk_and_rights", "bootstrap", "--source", "git", shows="Filesystem")


@runs("cli.look_further")
def index_of_git_that_is_damaged(user: User) -> None:
    (user.vllm / ".git" / "index").write_bytes(b"damaged")
    user.look("cli.look_further", "patch", shows="git")


@runs("repo.memory_again")
def git_that_is_killed(user: User) -> None:
    git = fails(user, "git", '" status "', "kill -9 $$")
    command = user.meets("repo.memory_again", "patch")
    git.unlink()
    assert "Mem:" in user.type(command).out
    assert user.inv("patch").code == 0
    user.followed.add("repo.memory_again")


@runs("repo.git_version", "repo.delete_store")
def git_that_cannot_merge(user: User) -> None:
    publish(user, CONFLICT)
    verb = ("pin.forecast", f"v{CONFLICT}")
    git = fails(user, "git", '" merge-tree "', "exit 129")
    user.look("repo.git_version", *verb, shows="git version")
    fails(user, "git", '" merge-tree "', "echo damaged >&2; exit 128")
    command = user.meets("repo.delete_store", *verb)
    git.unlink()
    assert user.type(command).code == 0
    again = user.inv(*verb)
    assert printed("bump.bump_with_conflicts", again), again.output
    user.followed.add("repo.delete_store")


@runs("machine.restore_torch")
def program_that_changes_torch_during_a_bootstrap(user: User) -> None:
    requirement_is_missing(user)
    python = user.world.layout.environment_python
    remove = f'"$real" "$@" && "$real" pip uninstall --quiet --python {python} torch; exit'
    uv = fails(user, "uv", '" torchaudio "', remove)
    command = user.meets("machine.restore_torch", "bootstrap")
    uv.unlink()
    done = user.type(command)
    assert (done.code, user.world.status()["environment"]) == (0, "ok"), done.output
    user.followed.add("machine.restore_torch")


@runs("compile.doctor_cmake", "compile.rebuild_clean")
def cmake_that_does_half_of_its_work(user: User) -> None:
    source = user.vllm / "csrc" / "cpu" / "answer.c"
    source.write_text(source.read_text().replace("42", "43"))
    replies = f"find {user.root}/.workspace -path '*/v1/reply/*' -delete"
    fails(user, "cmake", '" -G "', f'"$real" "$@" && {replies}; exit')
    user.look("compile.doctor_cmake", "rebuild", shows=r"ok +cmake")
    cmake = fails(user, "cmake", '" --install "', "echo no >&2; exit 1")
    command = user.meets("compile.rebuild_clean", "rebuild")
    cmake.unlink()
    done = user.type(command)
    assert (done.code, user.world.status()["kernels"]) == (0, "ok"), done.output
    user.followed.add("compile.rebuild_clean")
