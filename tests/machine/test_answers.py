"""Absent, broken and slow are three answers: of every program that the machine room asks."""

import pytest

from tests.machine.test_doctor import tree
from workspace.core import process
from workspace.core.console import Console
from workspace.core.process import Absent, Broken, Completed, NoAnswer, Slow, There
from workspace.machine import (
    doctor,
    doctor_host,
    doctor_toolchain,
    hardware,
    interpreter,
    machine,
    toolchain,
    torch,
)
from workspace.machine.machine import Case

__all__ = ["tree"]
LIMITS = (
    (machine, "PATIENCE_S"),
    (toolchain, "ANSWER_S"),
    (toolchain, "LIST_S"),
    (interpreter, "ANSWER_S"),
    (torch, "PIP_ANSWER_S"),
    (hardware, "PATIENCE_S"),
)
SLOW, BROKEN, KILLED = "exec sleep 60", "echo 'it is broken' >&2; exit 3", "kill -KILL $$"


@pytest.fixture
def impatient(monkeypatch):
    """Shorten the limits of a program that never answers, to what a test can wait for."""

    def shorten(script=SLOW):
        for room, name in LIMITS if script == SLOW else ():
            monkeypatch.setattr(room, name, 0.3)

    return shorten


def fake(house, program: str, script: str) -> None:
    places = {
        "uv": house.layout.tools / "bin",
        "cmake": house.layout.environment / "bin",
        "ninja": house.layout.environment / "bin",
        "nvcc": house.layout.root.parent / "cuda" / "bin",
    }
    folder = places.get(program, house.bin)
    (folder / program).unlink(missing_ok=True)
    house.program(program, script, folder=folder)


CHECKS = {
    "git": (doctor_toolchain.git, "FAIL"),
    "uv": (doctor_toolchain.uv, "FAIL"),
    "g++": (doctor_toolchain.compiler, "FAIL"),
    "cmake": (doctor_toolchain.cmake, "FAIL"),
    "ninja": (doctor_toolchain.ninja, "FAIL"),
    "nvcc": (doctor_toolchain.toolkit, "FAIL"),
    "ccache": (doctor.ccache, "warn"),
}


def row_of(house, look):
    house.layout.stamp("environment").parent.mkdir(parents=True, exist_ok=True)
    house.layout.stamp("environment").write_text("{}")
    settings = house.settings(CUDA_HOME=str(house.layout.root.parent / "cuda"))
    case = Case(machine.Machine(house.layout, settings), device="cuda", is_native=True)
    (row,) = doctor._rows(doctor._check(look), case)
    return row


@pytest.mark.parametrize("program", CHECKS)
@pytest.mark.parametrize("script", [SLOW, KILLED], ids=["slow", "killed"])
def test_slow_program_is_a_warning_without_a_hint_that_changes_anything(
    house, built, tree, impatient, program, script
):
    built()
    impatient(script)
    fake(house, program, script)
    row = row_of(house, CHECKS[program][0])
    assert (row.state, row.hint) == ("warn", None)
    assert "no answer in 0.3 s" in row.text or "SIGKILL" in row.text


@pytest.mark.parametrize("program", CHECKS)
def test_broken_program_is_not_called_missing_and_its_own_line_is_shown(
    house, built, tree, program
):
    built()
    fake(house, program, BROKEN)
    look, state = CHECKS[program]
    row = row_of(house, look)
    assert (row.state, row.text) == (state, "does not run: it is broken")
    assert row.hint


def test_program_that_cannot_be_executed_is_broken_and_not_absent(house, tmp_path):
    (tmp_path / "closed").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    environment = house.settings().child_environment("plain")

    def asked(name):
        return process.ask([tmp_path / name], env=environment, limit_s=1)

    assert asked("closed") == Broken(f"{tmp_path / 'closed'} cannot be executed")
    assert isinstance(asked("dangling"), Broken)
    assert asked("gone") == Absent()


def test_answer_that_decides_is_never_taken_from_a_slow_or_a_killed_program():
    assert process.certain(There("13.0"), "nvcc") == "13.0"
    assert process.certain(Absent(), "nvcc") is None
    assert process.certain(Broken("no"), "nvcc") is None
    with pytest.raises(NoAnswer, match="nvcc gave no answer in 60 s"):
        process.certain(Slow(60), "nvcc")
    ended = process.output_of(There(Completed(-15, "", "")))
    with pytest.raises(NoAnswer, match="nvcc was killed by SIGTERM"):
        process.certain(ended, "nvcc")


@pytest.mark.parametrize("script", [SLOW, KILLED], ids=["slow", "killed"])
def test_slow_compiler_or_toolkit_makes_no_kernels_stale(house, impatient, script):
    impatient(script)
    fake(house, "g++", script)
    fake(house, "nvcc", script)
    machine = house.machine(CUDA_HOME=str(house.layout.root.parent / "cuda"))
    with pytest.raises(NoAnswer):
        machine.compiler_version()
    with pytest.raises(NoAnswer):
        machine.toolkit()


@pytest.mark.parametrize("script", [SLOW, KILLED], ids=["slow", "killed"])
def test_environment_whose_python_is_slow_is_not_made_again(house, built, impatient, script):
    settings = built()
    impatient(script)
    mine = house.layout.environment / "mine"
    mine.touch()
    python = house.layout.environment_python
    python.unlink()
    house.program("python", script, folder=python.parent)
    with pytest.raises(NoAnswer), house.run_log(settings) as run_log:
        interpreter.create(
            house.layout, settings, interpreter.Choice(python, "3.11.7"), run_log=run_log
        )
    assert mine.exists()


def test_slow_python_does_not_make_way_for_another_version(house, tree, tmp_path, impatient):
    impatient()
    listed = tmp_path / "python3.12"
    house.program("python3.12", SLOW, folder=tmp_path)
    fake(house, "uv", f"echo '{listed}'")
    with pytest.raises(NoAnswer, match=r"python3\.12 gave no answer"):
        interpreter.foresee(
            house.layout,
            house.settings(),
            supported=doctor_toolchain._supported(Case(house.machine())),
        )


def test_search_for_a_python_that_takes_long_is_a_warning_of_the_headers(house, tree, impatient):
    impatient()
    fake(house, "uv", SLOW)
    row = row_of(house, doctor_toolchain.headers)
    assert (row.state, row.hint) == ("warn", None)


def test_slow_assembler_is_not_replaced_by_an_older_one(house, tmp_path, impatient):
    impatient()
    program = house.program("ptxas", SLOW, folder=tmp_path)
    case = Case(house.machine(), device="cuda")
    with pytest.raises(NoAnswer, match="ptxas gave no answer"):
        doctor.try_ptxas(program, "12.1", case.ask)


def test_slow_pip_does_not_change_the_source_of_torch(house, impatient):
    impatient()
    house.program("python3", SLOW)
    settings = house.settings(PIP_FIND_LINKS="", UV_FIND_LINKS="")
    with pytest.raises(NoAnswer, match="pip config list"):
        torch.plan("torch==2.13.0", device="cpu", settings=settings)


def test_slow_sudo_is_not_a_refusal(house, impatient):
    impatient()
    house.program("sudo", SLOW)
    with pytest.raises(NoAnswer, match="sudo gave no answer"):
        hardware.drop_caches(house.settings(), console=Console(), is_root=False)


def test_limits_leave_a_loaded_machine_its_time():
    assert machine.PATIENCE_S >= 20
    assert min(toolchain.ANSWER_S, interpreter.ANSWER_S, torch.PIP_ANSWER_S) >= 60


def test_limit_that_cannot_be_read_is_not_a_missing_one(house, monkeypatch, tmp_path):
    group = tmp_path / "cgroup" / "job"
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/job\n")
    group.mkdir(parents=True)
    monkeypatch.setattr(hardware, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path / "cgroup")
    assert (list(hardware.memory_limits()), doctor_host._limit_fault()) == ([], None)
    # A limit counts, whatever else is unreadable.
    (group / "memory.max").write_text("1000\n")
    (group / "memory.current").mkdir()
    assert list(hardware.memory_limits()) == [(1000.0, 0.0)]
    # Root may read every file: a folder in its place cannot be read by anybody.
    (group / "memory.max").unlink()
    (group / "memory.max").mkdir()
    assert "memory.max cannot be read: Is a directory" in (doctor_host._limit_fault() or "")
    found = {row.name: row.state for row in doctor_host.memory(Case(house.machine()))}
    assert found["memory limit"] == "warn"
