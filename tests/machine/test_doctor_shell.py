"""Library folders, token and hidden settings."""

import os
import subprocess

import pytest

from workspace.core.console import Row
from workspace.machine import doctor_host, run_environment
from workspace.machine.machine import Case, Machine


def row(check, house, *, device="cpu", **shell) -> Row:
    (found,) = check(Case(house.machine(**shell), device=device, is_native=False))
    return found


@pytest.fixture
def torchs(house):
    """An environment whose torch brings libraries of its own."""
    names = ("nvidia/cu13/lib/libcublas.so.13", "nvidia/nccl/lib/libnccl.so.2")
    names += ("torch/lib/libc10.so", "torch/lib/libtorch_python.so")
    text = "__version__ = '2.13.0'\ncuda = '13.0'\n"
    files = dict.fromkeys(names, "") | {"torch/version.py": text}
    return house.package("torch", "2.13.0", files)


def libraries(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_folder_with_a_library_of_torch_is_named_and_removed_by_the_hint(house, torchs, tmp_path):
    bad = libraries(
        tmp_path / "bad", "libcublas.so.13.0.0.19", "libcublas.so.13", "libnccl.so.2.27.5"
    )
    good = libraries(tmp_path / "good", "libcublas.so.12", "libfoo.so.1")
    found = row(run_environment.library_path, house, LD_LIBRARY_PATH=f"{good}:{bad}:/nonexistent")
    assert found.state == "warn"
    assert "libcublas.so.13, libnccl.so.2" in found.text
    assert found.hint == f"export LD_LIBRARY_PATH={good}:/nonexistent"


def test_empty_entry_is_the_current_folder_and_reported(house, torchs, tmp_path):
    found = row(run_environment.library_path, house, LD_LIBRARY_PATH=f"{tmp_path}:")
    assert (found.state, found.hint) == ("warn", f"export LD_LIBRARY_PATH={tmp_path}")
    assert (
        row(run_environment.library_path, house, LD_LIBRARY_PATH=":").hint
        == "unset LD_LIBRARY_PATH"
    )


def test_folders_without_such_libraries_are_no_fault(house, torchs, tmp_path):
    assert (
        row(
            run_environment.library_path,
            house,
            LD_LIBRARY_PATH=str(libraries(tmp_path / "x", "libfoo.so.1")),
        ).state
        == "ok"
    )
    assert row(run_environment.library_path, house).state == "ok"


@pytest.mark.parametrize(("version", "state"), [("13.0", "ok"), ("13.1", "warn")])
def test_cuda_home_is_a_fault_only_where_it_is_not_of_torchs_cuda(
    house, torchs, tmp_path, version, state
):
    libraries(tmp_path / "cuda" / "lib64", "libcublas.so.13")
    house.program(
        "nvcc",
        f'[ "$1" = --version ] && echo "release {version}, V{version}.1"',
        folder=tmp_path / "cuda" / "bin",
    )
    assert row(run_environment.library_path, house, CUDA_HOME=str(tmp_path / "cuda")).state == state


def test_token_is_present_or_absent_and_its_value_never_shown(house, tmp_path):
    secret = "hf_" + "planted" * 3
    assert row(doctor_host.token, house, HF_HOME=str(tmp_path / "hf")).text == "absent"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(secret)
    for shell in (
        {"HF_HOME": str(tmp_path / "hf")},
        {"HF_TOKEN": secret},
        {"HF_TOKEN_PATH": str(tmp_path / "hf" / "token")},
    ):
        found = row(doctor_host.token, house, **shell)
        assert found.state == "ok"
        assert found.text.startswith("present")
        assert secret not in repr(found)


def test_token_file_that_cannot_be_read_is_a_warning(house, tmp_path):
    (tmp_path / "token").mkdir()
    assert row(doctor_host.token, house, HF_TOKEN_PATH=str(tmp_path / "token")).state == "warn"
    (tmp_path / "file").touch()
    assert (
        row(doctor_host.token, house, HF_TOKEN_PATH=str(tmp_path / "file" / "token")).state
        == "warn"
    )
    if os.geteuid() != 0:
        # root reads a file without permissions.
        (tmp_path / "closed").write_text("x")
        (tmp_path / "closed").chmod(0)
        assert (
            "chmod 600"
            in row(doctor_host.token, house, HF_TOKEN_PATH=str(tmp_path / "closed")).hint
        )


def test_variable_of_the_shell_that_hides_a_line_is_reported_with_its_unset(house):
    house.layout.dotenv.write_text("MAX_JOBS=4\n")
    found = row(doctor_host.settings, house, MAX_JOBS="8")
    assert (found.state, found.hint) == ("warn", "unset MAX_JOBS")
    assert row(doctor_host.settings, house, MAX_JOBS="4").state == "ok"


def test_line_that_hides_nothing_which_a_shell_needs_is_taken_out_of_dotenv(house):
    house.layout.dotenv.write_text("PATH=/own\n")
    case = Case(house.machine(PATH="/usr/bin:/bin"), device="cpu", is_native=False)
    found, _ = doctor_host.settings(case)
    assert (found.state, found.hint) == ("warn", "sed -i 's/^PATH=/# &/' .env")
    done = subprocess.run(found.hint, shell=True, cwd=house.layout.root, check=False)
    assert done.returncode == 0
    assert row(doctor_host.settings, house, PATH="/usr/bin:/bin").state == "ok"


def test_tmpdir_that_is_no_folder_is_a_row_since_nvcc_ends_there(house, tmp_path):
    """Seen with nvcc 13.0: `nvcc fatal : Could not open output file '/nonexistent/tmpxft…'`."""
    (tmp_path / "file").touch()
    for place in (tmp_path / "nowhere", tmp_path / "file"):
        found = row(doctor_host.folders, house, TMPDIR=str(place))
        assert (found.state, found.text, found.hint) == (
            "warn",
            f"TMPDIR {place} is no folder",
            "unset TMPDIR",
        )
    machine = house.machine(TMPDIR=str(tmp_path))
    assert not [*doctor_host.folders(Case(machine, device="cpu", is_native=False))]
    house.layout.dotenv.write_text(f"TMPDIR={tmp_path}/nowhere\n")
    found = row(doctor_host.folders, house)
    assert found.hint == "sed -i 's/^TMPDIR=/# &/' .env"


def test_repeated_setting_is_reported_with_the_line_without_effect(house):
    house.layout.dotenv.write_text("# a remark\nMAX_JOBS=4\nMAX_JOBS=8\n")
    found = row(doctor_host.settings, house)
    assert (found.state, found.text) == (
        "warn",
        ".env, line 2: MAX_JOBS is set again in line 3, which counts",
    )
    assert found.hint == "sed -i '2s/^/# /' .env"


def test_misspelt_setting_is_reported_with_its_line(house):
    house.layout.dotenv.write_text("# a remark\nMAX_JOB=4\n")
    found = row(doctor_host.settings, house)
    assert "did you mean MAX_JOBS" in found.text
    assert found.hint.endswith("+2 .env")


def test_missing_libnuma_is_named_and_its_package_cures_it(house, tmp_path, monkeypatch):
    monkeypatch.setattr(run_environment, "NUMA_LIBRARY", "libworkspace-nowhere.so.1")
    settings = house.settings(LD_LIBRARY_PATH=str(tmp_path))

    def look(**more):
        return list(run_environment.numa_library(Case(Machine(house.layout, settings), **more)))

    (missing,) = look(device="cpu")
    assert (missing.state, missing.text) == ("FAIL", "libworkspace-nowhere.so.1 is missing")
    # A native build does without it, and a CUDA build needs none.
    assert [row.state for row in look(device="cpu", is_native=True)] == ["warn"]
    assert look(device="cuda") == []
    # A file that is no library is not called missing.
    library = tmp_path / "libworkspace-nowhere.so.1"
    library.write_text("no library")
    (broken,) = look(device="cpu")
    assert broken.text.startswith("does not run: ")
    assert "file too short" in broken.text
    library.unlink()
    house.program("sudo", 'exec "$@"')
    made = tmp_path / "made.so"
    subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", "-o", made], check=True)
    house.program("apt", f'[ "$1 $2" = "install libnuma1" ] && cp {made} {library}')
    subprocess.run(["sh", "-c", missing.hint], env=settings.child_environment("plain"), check=True)
    assert [row.state for row in look(device="cpu")] == ["ok"]
