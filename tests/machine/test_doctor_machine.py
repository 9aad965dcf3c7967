"""Memory and disk of the machine that runs the tests, and of groups and folders made here."""

import getpass
import os
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from workspace.core.console import Row
from workspace.core.paths import Layout
from workspace.machine import doctor, doctor_host, doctor_toolchain, hardware
from workspace.machine.machine import Case, Place, grown


def case(house, *, device="cpu", is_native=False, places=None, host=None, **shell) -> Case:
    machine = house.machine(**shell)
    if host:
        machine.host = lambda: host
    return Case(machine, device=device, is_native=is_native, places=places)


@pytest.mark.parametrize("broken", ["missing", "folder", "garbage"])
def test_control_group_that_cannot_be_read_is_no_limit(tmp_path: Path, broken):
    for name, text in (
        ("memory.max", "1048576"),
        ("memory.current", "4096"),
        ("memory.stat", "inactive_file 0"),
    ):
        (tmp_path / name).write_text(text)
    assert list(hardware._limit(tmp_path, "memory.max", "memory.current")) == [(1048576.0, 4096.0)]
    (tmp_path / "memory.max").unlink()
    if broken == "folder":
        (tmp_path / "memory.max").mkdir()
    elif broken == "garbage":
        (tmp_path / "memory.max").write_text("no number")
    assert list(hardware._limit(tmp_path, "memory.max", "memory.current")) == []


def test_too_many_jobs_for_the_memory_are_a_warning(house):
    house.program("nvidia-smi", "echo 'NVIDIA GB10, 12.1, 580.95.05'")
    fitting = max(
        1,
        min(
            len(os.sched_getaffinity(0)),
            int(hardware.observe().memory_gib * 0.75 / 9.5),
        ),
    )
    (row,) = doctor_host.cores(case(house, device="cuda", MAX_JOBS="5000"))
    assert (row.state, row.hint) == ("warn", "sed -i 's/^MAX_JOBS=/# &/' .env")
    (row,) = doctor_host.cores(case(house, device="cuda"))
    noun = "compiler" if fitting == 1 else "compilers"
    assert (row.state, f"{fitting} {noun} at run time" in row.text) == ("ok", True)
    (row,) = doctor_host.cores(case(house, device="cuda", MAX_JOBS=str(fitting)))
    assert (row.state, row.hint) == ("ok", None)


def test_vital_place_without_room_fails_and_another_one_only_warns(house):
    free = hardware.free_gib(house.layout.root)
    for is_vital, state in ((True, "FAIL"), (False, "warn")):
        (row,) = doctor_host.disk(
            case(house, places=(Place("models", house.layout.root, free * 2, is_vital),))
        )
        assert (row.state, "models" in row.text) == (state, True)


def test_every_place_that_will_grow_follows_the_settings_of_the_user(house, tmp_path):
    shell = {
        "HF_HOME": str(tmp_path / "hf"),
        "UV_CACHE_DIR": str(tmp_path / "uv"),
        "TMPDIR": str(tmp_path / "tmp"),
        "XDG_CACHE_HOME": str(tmp_path / "xdg"),
    }
    places = {place.label: place.path for place in grown(case(house, **shell))}
    assert places == {
        "workspace": house.layout.root,
        "downloads": tmp_path / "xdg" / "vllm-workspace",
        "uv cache": tmp_path / "uv",
        "models": tmp_path / "hf" / "hub",
        "TMPDIR": tmp_path / "tmp",
    }


def test_cache_on_the_clones_own_file_system_does_not_count_twice(house, tmp_path):
    need = {
        place.label: place.need_gib
        for place in grown(case(house, UV_CACHE_DIR=str(tmp_path / "uv")))
    }
    assert need["uv cache"] == 0
    assert need["workspace"] > 1


def type_in_shell(house, hint: str | None) -> None:
    """Type a hint as the user would; sudo runs the command as this user."""
    house.program("sudo", 'exec "$@"')
    environment = {"PATH": f"{house.bin}:/usr/bin:/bin", "USER": getpass.getuser()}
    subprocess.run(["/bin/sh", "-c", hint or "false"], env=environment, check=True)


def test_file_in_the_place_of_a_folder_is_moved_by_the_hint(house, tmp_path):
    file = tmp_path / "a file"
    file.write_text("mine")
    needed = case(house, places=(Place("models", file / "hub", 0.0),))
    (row,) = doctor_host.folders(needed)
    assert (row.state, row.text) == ("FAIL", f"{file} is a file, not a folder")
    type_in_shell(house, row.hint)
    assert list(doctor_host.folders(needed)) == []
    assert (tmp_path / "a file.old").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "states"),
    [
        *((name, ["FAIL", "FAIL"]) for name in ("a:b", "a#b", "a${HOME}b")),
        *((name, ["warn", "FAIL"]) for name in ("a;b", 'a"b', "a[b", "a\\b", "a|b")),
        ("a'b $HOME `id` %20 ,(){}*?&<>!~@=+^ö", []),
    ],
)
def test_path_of_the_clone_that_a_program_misreads_is_named_before_anything_is_made(
    house, tmp_path, name, states
):
    there = replace(house, layout=Layout(tmp_path / name / "clone"))
    there.layout.root.mkdir(parents=True)
    cases = [Case(there.machine(), device="cpu", is_native=native) for native in (False, True)]
    found = [row for each in cases for row in doctor_host.folders(each)]
    assert [row.state for row in found] == states
    assert all(name in row.text and "plain name" in row.hint for row in found)


def test_place_below_a_folder_of_others_is_made_and_that_folder_stays_theirs(
    house, tmp_path, monkeypatch
):
    # root may write into every folder.
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and real(path, mode))
    wanted = tmp_path / "a cache" / "hub"
    needed = case(house, places=(Place("models", wanted, 0.0),))
    (row,) = doctor_host.folders(needed)
    assert (row.state, row.text) == ("FAIL", f"{tmp_path} is not writable")
    assert f"chown -R {tmp_path}" not in (row.hint or "")
    type_in_shell(house, row.hint)
    assert wanted.is_dir()
    assert list(doctor_host.folders(needed)) == []


def test_service_that_stops_programs_in_time_is_found_among_those_that_run(house, tmp_path):
    shutil.copy("/bin/sleep", tmp_path / "earlyoom")
    with subprocess.Popen([tmp_path / "earlyoom", "60"]) as running:
        try:
            (row,) = doctor_host.oom_daemon(case(house))
        finally:
            running.kill()
    assert (row.state, row.text) == ("ok", "earlyoom")


@pytest.mark.parametrize(
    ("available_gib", "is_native", "state"),
    [(100.0, True, "ok"), (9.0, True, "FAIL"), (9.0, False, "warn")],
)
def test_memory_for_less_than_one_nvcc_stops_a_native_build(house, available_gib, is_native, state):
    host = hardware.Host("aarch64", 20, 120.0, available_gib)
    (row,) = doctor_host.memory(case(house, device="cuda", is_native=is_native, host=host))
    assert row.state == state


def test_limit_of_the_control_group_is_shown_beside_what_the_machine_has(house):
    (row,) = doctor_host.memory(case(house, host=hardware.Host("aarch64", 20, 0.5, 0.4)))
    assert (row.state, "the control group's limit, the machine has" in row.text) == ("warn", True)


def test_processor_without_released_wheels_gets_the_hint_to_compile(house):
    (row,) = doctor_host.architecture(case(house, host=hardware.Host("riscv64", 4, 8.0, 8.0)))
    assert (row.state, row.hint) == (
        "warn",
        "./scripts/inv bootstrap --device cpu --kernels native",
    )


def test_git_without_a_name_or_an_address_is_a_row_with_the_command_that_sets_both(house) -> None:
    home = house.layout.root.parent / "home"
    home.mkdir(exist_ok=True)

    def look() -> Row:
        (row,) = doctor_toolchain.git_identity(case(house))
        return row

    row = look()
    assert (row.state, row.text) == ("warn", "git has no user.name and no user.email")
    assert row.hint
    for command in row.hint.split(" && "):
        done = subprocess.run(
            shlex.split(command), env={"HOME": str(home), "PATH": os.environ["PATH"]}, check=False
        )
        assert done.returncode == 0
    assert look().state == "ok"
    without = case(house, PATH=str(house.bin / "nothing"))
    assert list(doctor_toolchain.git_identity(without)) == [], "the row of git has the fault"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_hint_for_a_shell_without_completion_is_enough(house, shell):
    home = house.layout.root.parent / "home"
    (home / ".config" / "fish").mkdir(parents=True)

    def look(program: str = f"/usr/bin/{shell}") -> Row:
        (row,) = doctor.completion(case(house, SHELL=program))
        return row

    row = look()
    assert (row.state, row.text) == ("ok", f"{shell} does not complete verbs and values")
    assert row.hint
    subprocess.run(["sh", "-c", row.hint], check=True)
    assert look().text.startswith(f"{shell} completes inv, by {home}")
    assert look().hint is None
    assert list(doctor.completion(case(house, SHELL="/bin/dash"))) == []
