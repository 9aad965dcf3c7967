"""`inv drop-caches`: nothing is dropped without the agreement of root."""

import io
import subprocess
from pathlib import Path

import pytest

from tests.machine.conftest import House
from workspace.core.console import Console
from workspace.core.errors import ToolchainError
from workspace.machine import hardware

MEMINFO = {
    "MemFree": 4 << 20,
    "Cached": 10 << 20,
    "Buffers": 1 << 20,
    "Shmem": 2 << 20,
    "Dirty": 1 << 20,
    "SReclaimable": 1 << 20,
}


def test_droppable_page_cache_is_without_shared_memory_and_dirty_pages() -> None:
    assert hardware.droppable_gib(MEMINFO) == 9.0
    assert hardware.droppable_gib({}) == 0.0
    assert hardware.free_memory_gib(MEMINFO) == 4.0


def dropped(house: House, *, is_root: bool, is_agreed: bool = False) -> str:
    err = io.StringIO()
    console = Console(out=io.StringIO(), err=err)
    hardware.drop_caches(house.settings(), console=console, is_root=is_root, is_agreed=is_agreed)
    return err.getvalue()


def recorded(house: House, name: str, script: str = "exit 0", folder: Path | None = None) -> Path:
    """A fake program that logs its arguments."""
    log = house.layout.root.parent / f"{name}.log"
    house.program(name, f'echo "$*" >> "{log}"\n{script}', folder=folder)
    return log


def test_user_drops_by_a_sudo_that_asks_no_password(house: House) -> None:
    log = recorded(house, "sudo")
    output = dropped(house, is_root=False)
    assert log.read_text() == "-n sysctl -w vm.drop_caches=3\n"
    assert "+ sudo -n sysctl -w vm.drop_caches=3" in output
    assert "freed " in output


@pytest.mark.parametrize("script", ["echo 'sudo: a password is required' >&2; exit 1", None])
def test_refusal_of_sudo_is_in_its_own_words_with_the_command_to_type(
    house: House, script: str | None
) -> None:
    if script:
        recorded(house, "sudo", script)
    why = "a password is required" if script else "there is no sudo"
    with pytest.raises(ToolchainError, match=f"not dropped: .*{why}") as caught:
        hardware.drop_caches(house.settings(PATH=str(house.bin)), console=Console(), is_root=False)
    assert caught.value.hint == "sudo sysctl -w vm.drop_caches=3"
    # On a terminal sudo asks, and runs the program of the command.
    recorded(house, "sudo", 'exec "$@"')
    log = recorded(house, "sysctl")
    environment = {"PATH": str(house.bin)}
    done = subprocess.run(
        ["/bin/bash", "-c", caught.value.hint], env=environment, check=False, timeout=60
    )
    assert done.returncode == 0
    assert log.read_text() == "-w vm.drop_caches=3\n"


def test_root_agrees_first_and_takes_no_program_of_the_users_path(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = recorded(house, "sysctl", folder=tmp_path / "sbin")
    monkeypatch.setattr(hardware, "ROOT_PATH", (str(tmp_path / "sbin"), "/usr/bin", "/bin"))
    house.program("sysctl", "exit 9")
    with pytest.raises(ToolchainError, match="root confirms it on a terminal or by") as caught:
        dropped(house, is_root=True)
    assert caught.value.hint == "./scripts/inv drop-caches --yes"
    assert not log.exists()
    dropped(house, is_root=True, is_agreed=True)
    assert log.read_text() == "-w vm.drop_caches=3\n"
