"""Who can read and change what a verb uses: secrets, folders, files of root, and the proxy."""

import os
import shlex
import socket
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.strategies import fuzz
from tests.machine.conftest import House
from workspace.cli import main
from workspace.compile import scheduler
from workspace.core import paths
from workspace.core.console import Row
from workspace.core.paths import open_place
from workspace.machine import doctor_host
from workspace.machine.machine import Case, Place


def rows(house: House, *places: Path, **shell: str) -> list[Row]:
    case = Case(
        house.machine(**shell),
        device="cpu",
        places=tuple(Place("", place, 0.0) for place in places),
    )
    return list(doctor_host.rights(case))


def typed(house: House, hint: str | None) -> None:
    """Run a hint as it stands, in the root of the clone."""
    assert hint
    subprocess.run(hint, shell=True, check=True, cwd=house.layout.root)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o666])
@pytest.mark.parametrize("line", ["HF_TOKEN=hf_abcdefgh", "DB_PASS=x y", "MIRROR=https://u:p@h/x"])
def test_env_with_a_secret_that_others_read_gets_a_hint_that_closes_it(
    house: House, mode: int, line: str
) -> None:
    house.layout.dotenv.write_text(f"DEVICE=cpu\n{line.replace('x y', 'xyzzy')}\n")
    house.layout.dotenv.chmod(mode)
    first = rows(house)[0]
    assert (first.state, first.text) == ("warn", f".env has mode {mode:04o}")
    assert first.hint == "chmod 600 .env"
    typed(house, first.hint)
    assert rows(house) == []


def test_env_without_a_secret_may_be_read(house: House) -> None:
    house.layout.dotenv.write_text("DEVICE=cpu\nHF_TOKEN=\n")
    house.layout.dotenv.chmod(0o644)
    assert rows(house) == []


@pytest.mark.parametrize("name", ["token", "netrc"])
def test_other_file_with_a_secret_is_named(house: House, tmp_path: Path, name: str) -> None:
    home = tmp_path / "a home"
    path = home / (".netrc" if name == "netrc" else "hub/token")
    path.parent.mkdir(parents=True)
    path.write_text("hf_abcdefgh")
    path.chmod(0o644)
    (row,) = rows(house, HOME=str(home), HF_HOME=str(home / "hub"))
    typed(house, row.hint)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("variable", ["TMPDIR", "HOME", "WORKSPACE_CACHE_DIR", "HF_HUB_CACHE"])
def test_folder_that_everybody_writes_is_named_once_with_its_hint(
    house: House, tmp_path: Path, variable: str
) -> None:
    place = tmp_path / "it's open"
    (place / "inner").mkdir(parents=True)
    place.chmod(0o777)
    case = Case(house.machine(**{variable: str(place / "inner")}), device="cpu")
    (row,) = doctor_host.rights(case)
    assert row.state == "warn"
    assert str(place) in row.text
    assert row.hint == shlex.join(["chmod", "o-w", str(place)])
    typed(house, row.hint)
    assert list(doctor_host.rights(case)) == []


@fuzz(fast=200, deep=5000)
@given(st.lists(st.integers(0, 0o1777), min_size=1, max_size=3), st.integers(0, 0o777))
@example([0o1777], 0o644)
@example([0o777], 0o644)
def test_place_is_open_where_others_write_it_or_a_folder_above(
    tmp_path_factory: pytest.TempPathFactory, folders: list[int], file: int
) -> None:
    path = tmp_path_factory.mktemp("p")
    made = [path]
    for _ in folders:
        path = path / "d"
        path.mkdir()
        made.append(path)
    (path / "f").touch()
    (path / "f").chmod(file)
    for folder, mode in zip(reversed(made[1:]), folders, strict=True):
        folder.chmod(mode | 0o700)
    is_open = bool(file & 0o002) or any(
        mode & 0o002 and not mode & stat.S_ISVTX for mode in folders
    )
    assert (open_place(path / "f") is not None) == is_open
    for folder in made[1:]:
        folder.chmod(0o700)


def test_file_of_root_in_a_users_clone_is_named(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = house.layout.root / "vendor"
    inner.mkdir(exist_ok=True)
    (inner / "of-root").touch()
    owners = {"of-root": 0}
    real = Path.stat

    def stat_of(path: Path, **how: bool) -> os.stat_result:
        found = list(real(path, **how))
        found[stat.ST_UID] = owners.get(path.name, 1000)
        return os.stat_result(found)

    monkeypatch.setattr(Path, "stat", stat_of)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    (row,) = doctor_host.owner(Case(house.machine(), device="cpu"))
    assert (row.state, row.text) == ("warn", "vendor/of-root belongs to root")
    assert "--from=root" in (row.hint or "")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (row,) = doctor_host.owner(Case(house.machine(), device="cpu"))
    assert row.text.startswith("you are root, and the clone belongs to ")
    assert "chown" not in (row.hint or "")


@pytest.mark.parametrize(
    ("sudo", "owner", "user", "is_said"),
    [
        ("1000", 1000, 0, True),
        ("", 1000, 0, False),
        ("1000", 0, 0, False),
        ("1000", 1000, 1000, False),
    ],
)
def test_sudo_before_inv_is_said_at_once(
    house: House, sudo: str, owner: int, user: int, is_said: bool
) -> None:
    loaded = house.settings(**({"SUDO_UID": sudo} if sudo else {}))
    assert bool(main.sudo_warning(loaded, owner, user)) == is_said


def test_user_without_a_name_is_a_number_that_sudo_takes() -> None:
    assert paths.user_name(0) == "root"
    assert paths.user_name(4_000_000) == "#4000000"


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "http_proxy", "ALL_PROXY"])
def test_proxy_at_which_nothing_listens_fails_without_its_password(house: House, name: str) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{bound.getsockname()[1]}"
        machine = house.machine(**{name: f"http://me:hunter2@{place}"})
        (row,) = doctor_host.proxy(Case(machine, device="cpu"))
        assert (row.state, row.hint) == ("FAIL", f"unset {name}")
        assert row.text == f"{name}: {place}: Connection refused"
        bound.listen()
        (row,) = doctor_host.proxy(Case(machine, device="cpu"))
        assert row.state == "ok"
    assert list(doctor_host.proxy(Case(house.machine(), device="cpu"))) == []


def test_socket_of_a_build_is_its_users_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with scheduler.listen(tmp_path):
            assert (tmp_path / "socket").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)
