import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from workspace.core.console import Console, Row
from workspace.core.errors import ToolchainError
from workspace.machine import doctor, doctor_toolchain, hardware
from workspace.machine.machine import Case, Machine

CMAKE = 'message(FATAL_ERROR\n  "GCC >= 11.3 is required to build vLLM (found ${X}). ")\n'
CPU_CMAKE = 'message(FATAL_ERROR "X86 backend requires gcc/g++ >= 12.3")\n'


@pytest.fixture
def tree(house) -> Path:
    (house.layout.vllm / "cmake").mkdir(parents=True)
    (house.layout.vllm / "CMakeLists.txt").write_text(CMAKE)
    (house.layout.vllm / "cmake" / "cpu_extension.cmake").write_text(CPU_CMAKE)
    (house.layout.vllm / "pyproject.toml").write_text(
        "[project]\nrequires-python = '>=3.10,<3.15'\n"
    )
    return house.layout.vllm


def rows(
    house, settings, *, device="cpu", is_native=False, need=None, is_environment_due=False
) -> dict[str, Row]:
    found = doctor.preflight(
        Machine(house.layout, settings),
        device=device,
        is_native=is_native,
        need_gib=need or {house.layout.root: 0.001},
        is_environment_due=is_environment_due,
    )
    assert all(row.hint for row in found if row.state == "FAIL"), "every failure has its hint"
    return {row.name: row for row in found}


def fake_python(house, version: str, *, headers: bool, base: str = "/usr") -> None:
    """A machine on which uv finds one Python."""
    home = house.layout.root.parent / "python"
    (home / "include").mkdir(parents=True)
    if headers:
        (home / "include" / "Python.h").touch()
    output = {
        "version": version,
        "level": "final",
        "include": str(home / "include"),
        "prefix": base,
        "base": base,
        "executable": "",
    }
    path = house.program("python", f"echo '{json.dumps(output)}'", folder=home / "bin")
    missing = "echo 'error: No interpreter found' >&2; exit 2"
    minor = version.rpartition(".")[0]
    found = f'case "$*" in *{minor}|*">="*) echo "{path}";; *) {missing};; esac'
    uv = house.layout.tools / "bin" / "uv"
    uv.unlink(missing_ok=True)
    house.program(
        "uv", f'[ "$1" = --version ] && echo "uv 0.0.0" && exit\n{found}', folder=uv.parent
    )


def test_working_machine_passes_for_a_precompiled_wheel_on_cpu(house, built, tree):
    settings = built()
    found = rows(house, settings)
    assert {found[name].state for name in ("disk", "git", "uv")} == {"ok"}
    assert not {"driver", "toolkit", "compiler"} & set(found)


def test_disk_comes_first_and_places_on_one_file_system_share_what_is_free(house, built, tree):
    settings = built()
    free = hardware.free_gib(house.layout.root)
    need = {
        house.layout.root: free * 0.6,
        house.layout.root.parent / "cache" / "not made yet": free * 0.6,
    }
    found = doctor.preflight(
        Machine(house.layout, settings), device="cpu", is_native=False, need_gib=need
    )
    assert (found[0].state, found[0].name) == ("FAIL", "disk")
    assert len([row for row in found if row.name == "disk"]) == 1
    assert found[0].hint.startswith("df -h ")


def test_place_that_is_no_folder_or_not_writable_fails(house, built, tree, tmp_path):
    settings = built()
    (tmp_path / "file").touch()
    places = [tmp_path / "file" / "cache"]
    if os.geteuid() != 0:
        # root may write into a read-only folder.
        (tmp_path / "closed").mkdir(mode=0o555)
        places.append(tmp_path / "closed" / "cache")
    for place in places:
        row = rows(house, settings, need={place: 0.0})["folder"]
        assert row.state == "FAIL"
        assert ("chown" in row.hint) == (place.parent.name == "closed")


def test_missing_git_fails_with_the_command_that_installs_it(house, built, tree):
    built()
    (house.bin / "git").unlink(missing_ok=True)
    found = rows(house, house.settings(PATH=str(house.bin)))
    assert (found["git"].state, found["git"].hint) == ("FAIL", "sudo apt install git")


def test_uv_that_does_not_run_fails_before_anything_needs_it(house, built, tree):
    settings = built()
    (house.layout.tools / "bin" / "uv").unlink()
    house.program("uv", "exit 127", folder=house.layout.tools / "bin")
    assert rows(house, settings)["uv"].state == "FAIL"


@pytest.mark.parametrize(
    ("device", "is_native", "state"),
    [
        ("cpu", False, "warn"),
        ("cpu", True, "FAIL"),
        ("cuda", False, "FAIL"),
        ("cuda", True, "FAIL"),
    ],
)
def test_missing_headers_of_the_systems_python_fail_where_code_is_compiled(
    house, tree, device, is_native, state
):
    fake_python(house, "3.12.3", headers=False)
    python = house.layout.root.parent / "python" / "bin" / "python"
    environment = house.layout.environment / "bin"
    environment.mkdir(parents=True)
    text = python.read_text().replace('"prefix": "/usr"', f'"prefix": "{house.layout.environment}"')
    house.program("python", text.removeprefix("#!/bin/sh\n"), folder=environment)
    row = rows(house, house.settings(), device=device, is_native=is_native)["headers"]
    assert (row.state, row.hint) == (state, "sudo apt install python3.12-dev")


def test_bootstrap_does_not_demand_what_it_would_have_installed(house, built, tree):
    settings = built()
    settings = house.settings(PATH=str(house.bin))
    for name in ("git", "g++", "env", "sh", "timeout", "df"):
        (house.bin / name).unlink(missing_ok=True)
        (house.bin / name).symlink_to(shutil.which(name))
    assert house.layout.environment_python.exists()
    unfinished = rows(house, settings, is_native=True)
    assert {unfinished[name].state for name in ("cmake", "ninja")} == {"ok"}
    house.layout.stamp("environment").parent.mkdir(parents=True, exist_ok=True)
    house.layout.stamp("environment").write_text("{}")
    finished = rows(house, settings, is_native=True)
    assert {finished[name].state for name in ("cmake", "ninja")} == {"FAIL"}
    # The tree may need another CMake than that of a finished environment: bootstrap brings it.
    again = rows(house, settings, is_native=True, is_environment_due=True)
    assert {again[name].state for name in ("cmake", "ninja")} == {"ok"}


def test_headers_of_an_environment_that_is_made_again_are_those_of_its_next_python(
    house, built, tree
):
    built()
    unfinished = house.layout.environment / ".workspace" / "unfinished"
    unfinished.parent.mkdir(exist_ok=True)
    unfinished.touch()
    fake_python(house, "3.12.3", headers=True)
    row = rows(house, house.settings(), is_native=True)["headers"]
    assert (row.state, row.text) == ("ok", "Python.h of 3.12.3")


def test_missing_headers_of_a_python_that_may_be_replaced_are_a_warning_only(house, tree):
    fake_python(house, "3.11.2", headers=False)
    assert rows(house, house.settings(), is_native=True)["headers"].state == "warn"


def test_headers_of_the_made_environment_are_those_of_its_base(house, built, tree):
    settings = built()
    row = rows(house, settings, is_native=True)["headers"]
    assert row.text.endswith(".".join(str(part) for part in sys.version_info[:3]))


def test_missing_gpu_fails_for_cuda_with_the_hint_for_a_cpu_build(house, built, tree):
    settings = built()
    row = rows(house, settings, device="cuda")["driver"]
    assert row.state == "FAIL"
    assert "--device cpu" in row.hint


def test_missing_nvcc_stops_a_native_build_and_only_warns_beside_a_precompiled_wheel(
    house, built, tree
):
    built()
    settings = house.settings(CUDA_HOME="/nonexistent/cuda")
    house.program("nvidia-smi", "echo 'NVIDIA GB10, 12.1, 580.95.05'")
    assert rows(house, settings, device="cuda")["toolkit"].state == "warn"
    row = rows(house, settings, device="cuda", is_native=True)["toolkit"]
    assert row.state == "FAIL"
    assert "CUDA_HOME=/nonexistent/cuda" in row.text


def test_toolkit_of_another_major_version_than_torch_is_not_ok(house, built, tree, tmp_path):
    built()
    house.program(
        "nvcc",
        '[ "$1" = --version ] && echo "release 12.9, V12.9.1"',
        folder=tmp_path / "cuda" / "bin",
    )
    found = rows(
        house, house.settings(CUDA_HOME=str(tmp_path / "cuda")), device="cuda", is_native=True
    )
    assert found["toolkit"].state == "FAIL"
    assert "12.9" in found["toolkit"].text


def test_compiler_must_have_the_version_that_the_tree_requires_for_the_device(house, built, tree):
    settings = built()
    house.program("g++", "echo 12.2.0")
    house.program("apt-cache", "exit 100")
    row = rows(house, settings, is_native=True)["compiler"]
    assert (row.state, row.text) == ("FAIL", "g++ 12.2.0")
    assert "CXX=g++-13" in row.hint
    house.program("nvidia-smi", "echo 'NVIDIA GB10, 12.1, 580.95.05'")
    assert rows(house, settings, device="cuda", is_native=True)["compiler"].state == "ok"
    house.program("g++", "echo 12.3.0")
    assert rows(house, settings, is_native=True)["compiler"].state == "ok"


def test_compiler_that_is_missing_stops_a_native_build(house, built, tree):
    built()
    settings = house.settings(CXX="no-such-compiler")
    assert rows(house, settings, is_native=True)["compiler"].state == "FAIL"


def test_device_is_the_setting_and_otherwise_what_the_driver_shows(house):
    assert house.machine().device == "cpu"
    assert house.machine(DEVICE="cuda").device == "cuda"
    house.program("nvidia-smi", "echo 'NVIDIA GB10, 12.1, 580'")
    assert house.machine().device == "cuda"
    assert house.machine(DEVICE="cpu").device == "cpu"


@pytest.mark.parametrize(
    ("script", "state", "seen"),
    [
        (
            "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18",
            "FAIL",
            "Failed to initialize NVML: Driver/library version mismatch",
        ),
        ("echo 'No devices were found'", "FAIL", "the driver shows no GPU"),
        ("sleep 60", "warn", "no answer in 3 s"),
    ],
)
def test_machine_whose_driver_fails_or_is_slow_is_not_taken_for_one_without_a_gpu(
    house, script, state, seen
):
    house.program("nvidia-smi", script)
    machine = house.machine()
    assert machine.device == "cuda"
    (row,) = doctor_toolchain.driver(Case(machine))
    assert (row.state, row.text) == (state, seen)
    assert ("--device cpu" in row.hint) == (state == "FAIL")


def shown(house, settings, *, as_json=False) -> tuple[str, str, ToolchainError | None]:
    """What a doctor without network rows prints on stdout and stderr, and what it raises."""
    out, err = io.StringIO(), io.StringIO()
    try:
        doctor.show(
            Machine(house.layout, settings),
            console=Console(out=out, err=err),
            as_json=as_json,
            offline=True,
        )
    except ToolchainError as exc:
        return out.getvalue(), err.getvalue(), exc
    return out.getvalue(), err.getvalue(), None


def test_json_has_every_row_with_its_five_keys_and_a_verdict(house, built, tree):
    built()
    house.program("nvidia-smi", "exit 9")
    out, _, error = shown(house, house.settings(DEVICE="cuda"), as_json=True)
    output = json.loads(out)
    assert (output["schema"], output["verdict"]) == (1, "FAIL")
    assert {tuple(sorted(row)) for row in output["rows"]} == {
        ("hint", "name", "seen", "state", "why")
    }
    assert {row["state"] for row in output["rows"]} <= {"ok", "warn", "FAIL"}
    assert error is not None
    assert (error.exit_code, "driver" in error.message) == (6, True)
    assert error.hint in {row["hint"] for row in output["rows"] if row["state"] == "FAIL"}


def test_screen_has_a_line_for_what_is_well_and_the_command_for_what_is_not(house, built, tree):
    settings = built()
    house.program("g++", "echo 9.1.0")
    policy = "printf '%s:\\n  Installed: (none)\\n  Candidate: %s\\n' g++ 4:12.2 g++-13"
    house.program("apt-cache", f"{policy} '(none)'")
    line = next(line for line in shown(house, settings)[0].splitlines() if "CXX=" in line)
    command = line.strip().removeprefix("$ ").split("    ")[0]
    assert command == "export CC=/path/to/gcc CXX=/path/to/g++"
    assert subprocess.run(["/bin/sh", "-c", command], check=False).returncode == 0
    house.program("apt-cache", f"{policy} 13.2")
    out, err, error = shown(house, settings)
    assert err == ""
    # What the device does not need was not looked at.
    assert "skipped  driver        not needed: the device is cpu" in out.splitlines()
    assert " skipped" in out.splitlines()[-1]
    assert error is None
    lines = out.splitlines()
    assert len([line for line in lines if line.startswith("ok       uv")]) == 1
    assert (
        "                       $ sudo apt install g++-13 && export CC=gcc-13 CXX=g++-13" in lines
    )


def test_doctor_on_a_machine_with_no_program_at_all_names_them_and_does_not_break(house, tmp_path):
    settings = house.settings(PATH=str(tmp_path / "nothing"))
    out, _, error = shown(house, settings, as_json=True)
    found = {row["name"]: row for row in json.loads(out)["rows"]}
    assert (found["git"]["state"], found["compiler"]["state"]) == ("FAIL", "warn")
    assert error is not None


def test_doctor_only_reads(house, built, tree):
    settings = built()
    before = {path: path.lstat().st_mtime_ns for path in house.layout.root.rglob("*")}
    shown(house, settings)
    assert {path: path.lstat().st_mtime_ns for path in house.layout.root.rglob("*")} == before


def test_check_that_raises_does_not_end_the_others(house):
    def hostile(_):
        raise ValueError("'N/A' is no number")
        yield

    def sound(_):
        yield Row("ok", "sound", "", "")

    case = Case(house.machine(), device="cpu", is_native=False)
    found = doctor.examine(
        case, [doctor.Check(hostile, frozenset()), doctor.Check(sound, frozenset())]
    )
    assert [(row.state, row.name) for row in found] == [("warn", "hostile"), ("ok", "sound")]


def test_preflight_is_a_selection_from_the_doctors_own_rows(house, built, tree):
    settings = built()
    names = {row["name"] for row in json.loads(shown(house, settings, as_json=True)[0])["rows"]}
    for is_native in (False, True):
        assert set(rows(house, settings, is_native=is_native)) <= names


def test_unknown_device_is_the_one_that_the_torch_in_the_environment_is_built_for(house, tree):
    text = "__version__ = '2.13.0'\ncuda = '13.0'\n"
    house.package("torch", "2.13.0", {"torch/version.py": text})
    # Its driver no longer answers: a fault, not a machine without a GPU.
    out, _, _ = shown(house, house.settings(), as_json=True)
    assert {row["name"]: row["state"] for row in json.loads(out)["rows"]}["driver"] == "FAIL"
