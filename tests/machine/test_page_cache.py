"""`inv drop-caches`: one narrow right, and nothing changed without it."""

import io
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


def test_line_for_sudoers_allows_exactly_the_command_and_is_escaped() -> None:
    assert hardware.command("/usr/sbin/sysctl", is_root=False) == [
        "sudo",
        "-n",
        "/usr/sbin/sysctl",
        "-w",
        "vm.drop_caches=3",
    ]
    assert (
        hardware.sudoers_line("ada", "/usr/sbin/sysctl")
        == "ada ALL=(root) NOPASSWD: /usr/sbin/sysctl -w vm.drop_caches\\=3"
    )


def dropped(house: House, *, is_root: bool) -> str:
    err = io.StringIO()
    hardware.drop_caches(
        house.settings(), console=Console(out=io.StringIO(), err=err), is_root=is_root
    )
    return err.getvalue()


def sudo(house: House, script: str) -> Path:
    """A fake sudo that logs its arguments, and a fake sysctl that does nothing."""
    log = house.bin / "sudo.log"
    house.program("sudo", f'echo "$*" >> {log}\n{script}')
    house.program("sysctl", "exit 0")
    return log


def test_without_the_right_nothing_runs_and_the_line_is_printed(house: House) -> None:
    log = sudo(house, "exit 1")
    with pytest.raises(ToolchainError, match="sudo does not allow") as caught:
        dropped(house, is_root=False)
    assert log.read_text() == f"-n -l {house.bin}/sysctl -w vm.drop_caches=3\n"
    assert f"NOPASSWD: {house.bin}/sysctl -w vm.drop_caches\\=3" in caught.value.details[-1]
    assert "visudo -cf /etc/sudoers.d/" in (caught.value.hint or "")


def test_with_the_right_the_allowed_command_runs_and_the_freed_memory_is_printed(
    house: House,
) -> None:
    log = sudo(house, "exit 0")
    output = dropped(house, is_root=False)
    command = f"{house.bin}/sysctl -w vm.drop_caches=3"
    assert log.read_text().splitlines() == [f"-n -l {command}", f"-n {command}"]
    assert f"+ sudo -n {command}" in output
    assert "freed " in output


def test_root_needs_no_sudo_and_a_refusal_is_a_sentence(house: House) -> None:
    log = sudo(house, "exit 1")
    assert f"+ {house.bin}/sysctl -w vm.drop_caches=3" in dropped(house, is_root=True)
    house.program("sysctl", 'echo "sysctl: permission denied on key" >&2; exit 255')
    with pytest.raises(ToolchainError, match="permission denied"):
        dropped(house, is_root=True)
    assert not log.exists()


def test_machine_without_sudo_gets_the_line(house: House) -> None:
    house.program("sysctl", "exit 0")
    with pytest.raises(ToolchainError, match="not dropped"):
        dropped(house, is_root=False)
