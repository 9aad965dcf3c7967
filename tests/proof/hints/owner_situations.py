"""Situations of files that belong to another user: root types, or Ada, who has sudo."""

import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.proof.hints.apt_situations import DOCTOR, other_machine
from tests.proof.hints.following import User, runs

# Root's own folders are those of the machine alone; the interpreter of the tests may be there.
ADA = (
    "useradd --no-create-home ada; chmod o+x /root",
    "echo 'ada ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/ada",
)


def as_ada(user: User) -> None:
    user.through = (
        *user.through, "setpriv", "--reuid=ada", "--regid=ada", "--init-groups", "env", "USER=ada",
        f"UV_CACHE_DIR={user.world.folder}/cache/uv",
    )  # fmt: skip


@contextmanager
def clone_of_ada(user: User) -> Iterator[None]:
    """Let the clone, its home and its cache belong to Ada, and go back to root afterwards."""
    parts = [str(user.world.folder / part) for part in ("clone", "cache", "home")]
    folders = {user.world.folder, user.world.materials.bin}
    folders |= {parent for folder in folders for parent in folder.parents}
    modes = {each: each.stat().st_mode for each in folders}
    with other_machine(user, *ADA, shlex.join(["chown", "-R", "ada:ada", *parts])):
        try:
            for each, mode in modes.items():
                each.chmod(mode | 0o011)
            yield
        finally:
            subprocess.run(["chown", "-R", "root:root", *parts], check=True)
            for each, mode in modes.items():
                each.chmod(mode)


@runs("machine.as_owner")
def root_in_the_clone_of_another(user: User) -> None:
    with clone_of_ada(user):
        command = user.meets("machine.as_owner", *DOCTOR)
        as_ada(user)
        done = user.type(command)
        assert (done.code, "not as root" in done.output) == (0, False), done.output
    user.followed.add("machine.as_owner")


@runs("machine.own_files_of_root", "machine.own_folder", "machine.own_token",
      "machine.close_folder_as_root", "repo.trust_or_own")  # fmt: skip
def files_of_root_in_the_clone_of_another(user: User) -> None:
    token = user.world.folder / "home" / ".cache" / "huggingface" / "token"
    token.parent.mkdir(parents=True)
    opened = user.world.folder / "open"
    opened.mkdir()
    with clone_of_ada(user):
        outer = user.through
        as_ada(user)
        ada = user.through

        def root(command: str) -> None:
            user.through = outer
            assert user.type(command).code == 0
            user.through = ada

        root("touch .workspace/of-root")
        user.follow("machine.own_files_of_root", *DOCTOR)
        root(f"echo hf_abc > {token}; chmod 600 {token}")
        user.follow("machine.own_token", *DOCTOR)
        root(f"chmod 777 {opened}")
        user.follow("machine.close_folder_as_root", *DOCTOR, TMPDIR=str(opened))
        root(f"chown root: {user.world.folder}/cache")
        user.follow("machine.own_folder", *DOCTOR)
        root("chmod 0 vendor/vllm; chown root: vendor/vllm")
        shown = user.type(user.meets("core.list_folder", "patch"))
        assert "d---------" in shown.out, shown.output
        root("chmod 755 vendor/vllm; chown -R root: vendor/vllm")
        user.follow("repo.trust_or_own", "patch")
