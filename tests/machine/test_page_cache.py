"""`inv drop-caches`: one narrow right, and nothing changed without it."""

import io
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.strategies import fuzz
from tests.machine.conftest import House
from workspace.core import paths
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


def dropped(house: House, *, is_root: bool, is_agreed: bool = False) -> str:
    err = io.StringIO()
    hardware.drop_caches(
        house.settings(),
        console=Console(out=io.StringIO(), err=err),
        is_root=is_root,
        is_agreed=is_agreed,
        sysctl=str(house.bin / "sysctl"),
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
    assert f"+ {house.bin}/sysctl -w vm.drop_caches=3" in dropped(
        house, is_root=True, is_agreed=True
    )
    house.program("sysctl", 'echo "sysctl: permission denied on key" >&2; exit 255')
    with pytest.raises(ToolchainError, match="permission denied"):
        dropped(house, is_root=True, is_agreed=True)
    assert not log.exists()


def test_root_that_was_not_asked_drops_nothing_without_yes(house: House) -> None:
    log = sudo(house, "exit 1")
    house.program("sysctl", f"echo ran >> {log}")
    with pytest.raises(
        ToolchainError, match="root confirms it on a terminal or by --yes"
    ) as caught:
        dropped(house, is_root=True)
    assert caught.value.hint == "./scripts/inv drop-caches --yes"
    assert not log.exists()
    dropped(house, is_root=True, is_agreed=True)
    assert log.read_text() == "ran\n"


def test_machine_without_sudo_gets_the_line(house: House) -> None:
    house.program("sysctl", "exit 0")
    with pytest.raises(ToolchainError, match="not dropped"):
        dropped(house, is_root=False)


def test_program_of_the_users_path_gets_no_right(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = sudo(house, "exit 1")
    house.bin.chmod(0o777)
    with pytest.raises(ToolchainError) as caught:
        hardware.drop_caches(house.settings(), console=Console(), is_root=False)
    shown = "\n".join([caught.value.message, caught.value.hint or "", *caught.value.details])
    assert str(house.bin) not in shown
    assert not log.exists() or str(house.bin) not in log.read_text()


FOLDER, FILE = stat.S_IFDIR, stat.S_IFREG


def place(owner: int, mode: int) -> os.stat_result:
    return os.stat_result((mode, 0, 0, 1, owner, 0, 0, 0, 0, 0))


@fuzz(fast=200, deep=5000)
@given(st.sampled_from((0, 1, 1000)), st.sampled_from((FILE, FOLDER)), st.integers(0, 0o7777))
def test_only_root_can_change_what_is_roots(owner: int, kind: int, mode: int) -> None:
    others_write = bool(mode & 0o022) and not (kind == FOLDER and mode & stat.S_ISVTX)
    found = paths._is_kept(place(owner, kind | mode), {0}, 0o022)
    assert found == (owner == 0 and not others_write)


@pytest.mark.parametrize(
    ("file", "folder"), [(0o777, 0o755), (0o775, 0o755), (0o755, 0o777), (0o755, 0o775)]
)
def test_program_or_folder_that_others_write_is_skipped(
    tmp_path: Path, file: int, folder: int
) -> None:
    made = tmp_path / "sbin"
    made.mkdir()
    (made / "sysctl").write_text("#!/bin/sh\n")
    (made / "sysctl").chmod(file)
    made.chmod(folder)
    assert hardware.root_program("sysctl", [str(made)]) is None


def test_link_into_a_folder_of_others_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "open" / "sysctl").write_text("#!/bin/sh\n")
    (tmp_path / "open" / "sysctl").chmod(0o755)
    (tmp_path / "sbin").mkdir()
    (tmp_path / "sbin" / "sysctl").symlink_to(tmp_path / "open" / "sysctl")
    assert hardware.root_program("sysctl", [str(tmp_path / "sbin")]) is None


def test_roots_own_program_is_found() -> None:
    found = hardware.root_program("sh")
    assert found is not None
    assert Path(found).parent in map(Path, hardware.ROOT_PATH)


def test_line_names_the_user_by_number(house: House) -> None:
    """Sudoers would read the names ALL, %wheel or DOMAIN\\ada as something else."""
    sudo(house, "exit 1")
    with pytest.raises(ToolchainError) as caught:
        dropped(house, is_root=False)
    assert caught.value.details[-1].startswith(f"#{os.getuid()} ALL=(root) NOPASSWD: ")
