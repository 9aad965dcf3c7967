import json
import platform
from pathlib import Path

import pytest

from workspace.core.errors import BuildError, SourceError
from workspace.machine import interpreter, torch
from workspace.machine.requirements import COMPANIONS

MACHINE = platform.machine()
HERE = f"cp311-cp311-manylinux_2_28_{MACHINE}"


def install(house, settings, *arguments: str, **more) -> None:
    with house.run_log(settings) as run_log:
        interpreter.install(house.layout, settings, arguments, run_log=run_log, **more)


def install_torch(house, settings, version: str, **more) -> None:
    """Install a torch from a file that no index and no configured folder offers."""
    install(
        house,
        settings,
        "--no-deps",
        str(house.torch(version, folder=house.layout.root.parent / "elsewhere", **more)),
    )


def packages(house) -> Path:
    return interpreter.site_packages(house.layout)[0]


def test_torch_is_read_without_starting_python_and_equals_the_import(house, built):
    settings = built()
    assert house.machine().torch() is None
    install_torch(house, settings, "2.13.0", cuda="13.0")
    seen = house.machine().torch()
    assert seen == torch.TorchBuild("2.13.0+cu130", "13.0") == torch.load(house.layout, settings)
    assert torch.constraints(house.layout) == ("torch==2.13.0",)


def test_cuda_is_read_from_the_form_with_and_without_a_type(house, built):
    settings = built()
    install_torch(house, settings, "2.13.0+cpu")
    place = packages(house) / "torch" / "version.py"
    place.write_text(
        "from typing import Optional\n__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip:"
        " Optional[str] = '13.0'\n"
    )
    assert house.machine().torch() == torch.TorchBuild("2.13.0+cpu", None)
    place.write_text("__version__ = '2.14.0a0+git12'\ncuda: str | None = '13.1'\n")
    assert house.machine().torch() == torch.TorchBuild("2.14.0a0+git12", "13.1")


def test_torch_without_its_files_is_no_torch(house, built):
    settings = built()
    install_torch(house, settings, "2.13.0+cpu")
    (packages(house) / "torch" / "version.py").unlink()
    assert house.machine().torch() is None


def test_torch_of_an_editable_build_is_seen_where_it_lies(house, built, tmp_path):
    built()
    source = tmp_path / "py torch"
    (source / "torch").mkdir(parents=True)
    (source / "torch" / "version.py").write_text("__version__ = '2.15.0a0+mine'\ncuda = '13.0'\n")
    described = packages(house) / "torch-2.15.0a0+mine.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Name: torch\n")
    (described / "direct_url.json").write_text(
        json.dumps({"url": source.as_uri(), "dir_info": {"editable": True}})
    )
    assert house.machine().torch() == torch.TorchBuild("2.15.0a0+mine", "13.0")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise ImportError('libcudart.so.13: cannot open')", r"libcudart\.so\.13"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGILL)", "SIGILL"),
    ],
)
def test_torch_that_cannot_be_imported_is_a_build_error_that_names_what_fails(
    house, built, source, message
):
    settings = built()
    install_torch(house, settings, "2.13.0+cpu")
    (packages(house) / "torch" / "__init__.py").write_text(f"{source}\n")
    with pytest.raises(BuildError, match=message):
        torch.load(house.layout, settings)


def test_installed_torch_that_no_index_offers_survives_whatever_depends_on_torch(house, built):
    settings = built()
    install_torch(house, settings, "9.9.9+local", cuda="13.0")
    house.torch("10.0.0", cuda="12.8")
    house.wheel("wants-any", "1.0", requires=("torch>=1.10",))
    with torch.held(house.layout, step="requirements"):
        install(house, settings, "wants-any", "torch", constraints=torch.constraints(house.layout))
        install(
            house, settings, "--upgrade", "wants-any", constraints=torch.constraints(house.layout)
        )
    assert interpreter.installed(house.layout) == {"torch": "9.9.9+local", "wants-any": "1.0"}


def test_package_that_needs_another_torch_fails_and_torch_stays(house, built):
    settings = built()
    install_torch(house, settings, "9.9.9+local")
    house.torch("10.0.0")
    house.wheel("wants-ten", "1.0", requires=("torch==10.0.0",))
    with pytest.raises((BuildError, SourceError)):
        install(house, settings, "wants-ten", constraints=torch.constraints(house.layout))
    assert interpreter.installed(house.layout) == {"torch": "9.9.9+local"}


def test_step_that_changes_torch_is_an_error_that_names_step_old_and_new(house, built):
    settings = built()
    install_torch(house, settings, "9.9.9+local", cuda="13.0")
    house.torch("10.0.0", cuda="12.8")
    with (
        pytest.raises(
            BuildError,
            match=(
                r"xgrammar and friends changed torch from 9\.9\.9\+local with CUDA 13\.0 to"
                r" 10\.0\.0\+cu128 with CUDA 12\.8"
            ),
        ),
        torch.held(house.layout, step="xgrammar and friends"),
    ):
        install(house, settings, "torch==10.0.0")
    with pytest.raises(BuildError, match="to none"), torch.held(house.layout, step="x"):
        (packages(house) / "torch" / "version.py").unlink()


def test_same_version_for_another_cuda_is_a_change(house, built):
    settings = built()
    install_torch(house, settings, "9.9.9+local", cuda="13.0")
    with (
        pytest.raises(BuildError, match=r"CUDA 13\.0 to 9\.9\.9\+local with CUDA 12\.8"),
        torch.held(house.layout, step="x"),
    ):
        install(
            house,
            settings,
            "--reinstall",
            str(house.torch("9.9.9+local", cuda="12.8", folder=house.layout.root / "other")),
        )


def test_error_inside_a_held_step_is_not_hidden_by_torch(house, built):
    settings = built()
    install_torch(house, settings, "9.9.9+local")
    with pytest.raises(SourceError), torch.held(house.layout, step="x"):
        install(house, settings, "--no-index", "torch==77")


def test_constraints_hold_what_is_paired_with_torch_and_nothing_else(house, built):
    settings = built()
    install_torch(
        house,
        settings,
        "2.13.0+cu130",
        cuda="13.0",
        requires=("triton==3.7.1; platform_system == 'Linux'",),
    )
    for name, version, requires in (
        ("torchvision", "0.28.0", ("torch==2.13.0",)),
        ("torchaudio", "2.9.0", ("torch==2.9.0",)),
        ("torchcodec", "0.14.0", ()),
    ):
        install(house, settings, "--no-deps", str(house.wheel(name, version, requires=requires)))
    install(house, settings, "--no-deps", str(house.wheel("triton", "3.9.0+git1234")))
    assert torch.constraints(house.layout) == (
        "torch==2.13.0+cu130",
        "torchvision==0.28.0",
        "torchcodec==0.14.0",
    )
    install(house, settings, "--no-deps", "--reinstall", str(house.wheel("triton", "3.7.1")))
    assert "triton==3.7.1" in torch.constraints(house.layout)


def offer(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_torch_for_a_cpu_comes_from_the_folder_that_pip_is_configured_with(house, tmp_path):
    empty = offer(tmp_path / "empty")
    folder = offer(
        tmp_path / "wheels",
        f"torch-2.13.0+cpu-{HERE}.whl",
        f"torch-2.12.0+cpu-{HERE}.whl",
        "torch-no-wheel.whl",
    )
    settings = house.settings(PIP_FIND_LINKS=f"{empty} {folder}")
    wanted = torch.plan("torch==2.13.0+cpu", device="cpu", settings=settings)
    assert (wanted.requirement, wanted.arguments, wanted.alternatives) == (
        "torch==2.13.0+cpu",
        ("--find-links", str(folder)),
        (("--torch-backend", "cpu"),),
    )
    assert (
        torch.plan("torch==2.13.0", device="cpu", settings=settings).requirement
        == "torch==2.13.0+cpu"
    )
    assert torch.local_wheel_pythons("torch==2.13.0", settings) == frozenset({"3.11"})


def test_folder_is_found_in_pips_own_files_when_no_variable_names_it(house, tmp_path):
    folder = offer(tmp_path / "wheels", f"torch-2.13.0+cpu-{HERE}.whl")
    house.program(
        "python3",
        f"""[ "$*" = "-m pip config list" ] && printf '%s\\n' "global.index-url='x'" \\
"global.find-links='/nowhere\\\\n{folder}'" """,
    )
    assert torch.plan("torch==2.13.0", device="cpu", settings=house.settings()).arguments == (
        "--find-links",
        str(folder),
    )


def test_machine_without_pip_has_no_wheel_folder(house):
    house.program("python3", "echo 'No module named pip' >&2; exit 1")
    settings = house.settings(UV_FIND_LINKS="")
    assert torch.plan("torch==2.13.0+cpu", device="cpu", settings=settings).arguments == (
        "--torch-backend",
        "cpu",
    )
    assert torch.local_wheel_pythons("torch==2.13.0+cpu", settings) is None


@pytest.mark.parametrize(
    "name",
    [
        f"torch-2.12.0+cpu-{HERE}.whl",
        "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_riscv64.whl",
        "torch-2.13.0+cpu-cp311-cp311-win_amd64.whl",
        f"torch-2.13.0+cu130-{HERE}.whl",
        f"torch-2.13.0+cpu-cp313-cp313t-manylinux_2_28_{MACHINE}.whl",
    ],
)
def test_wheel_of_another_version_machine_device_or_kind_of_python_is_not_taken(
    house, tmp_path, name
):
    settings = house.settings(PIP_FIND_LINKS=str(offer(tmp_path / "wheels", name)))
    assert torch.plan("torch==2.13.0", device="cpu", settings=settings).arguments == (
        "--torch-backend",
        "cpu",
    )


def test_pythons_of_all_fitting_wheels_count_and_a_wheel_for_any_python_frees_the_choice(
    house, tmp_path
):
    folder = offer(
        tmp_path / "wheels",
        f"torch-2.13.0+cpu-{HERE}.whl",
        f"torch-2.13.0+cpu-{HERE.replace('cp311', 'cp312')}.whl",
    )
    settings = house.settings(PIP_FIND_LINKS=folder.as_uri())
    assert torch.local_wheel_pythons("torch==2.13.0", settings) == frozenset({"3.11", "3.12"})
    offer(folder, f"torch-2.13.0+cpu-cp310-abi3-manylinux_2_28_{MACHINE}.whl")
    assert torch.local_wheel_pythons("torch==2.13.0", settings) is None


def test_torch_index_url_goes_before_every_other_place(house, tmp_path):
    folder = offer(tmp_path / "wheels", f"torch-2.13.0+cpu-{HERE}.whl")
    settings = house.settings(
        PIP_FIND_LINKS=str(folder), TORCH_INDEX_URL="https://torch.example/simple"
    )
    for device in ("cpu", "cuda"):
        assert torch.plan("torch==2.13.0", device=device, settings=settings).arguments == (
            "--index",
            "https://torch.example/simple",
        )
    assert torch.local_wheel_pythons("torch==2.13.0", settings) is None


def test_torch_for_cuda_13_comes_from_pytorch_and_otherwise_from_the_plain_index(house, tmp_path):
    folder = offer(tmp_path / "wheels", f"torch-2.13.0+cpu-{HERE}.whl")
    wanted = torch.plan(
        "torch==2.13.0", device="cuda", settings=house.settings(PIP_FIND_LINKS=str(folder))
    )
    assert (wanted.arguments, wanted.alternatives) == (("--torch-backend", "cu130"), ((),))


def test_companions_come_from_where_torch_came(house, built, tmp_path):
    settings = built()
    folder = offer(tmp_path / "wheels", f"torch-2.13.0+cpu-{HERE}.whl")
    local = torch.plan(
        "torch==2.13.0", device="cpu", settings=house.settings(PIP_FIND_LINKS=str(folder))
    )
    assert torch.companion_arguments(house.layout, local, device="cpu") is None
    offer(folder, *(f"{name}-1.0-py3-none-any.whl" for name in COMPANIONS))
    assert torch.companion_arguments(house.layout, local, device="cpu") == (
        "--no-index",
        "--find-links",
        str(folder),
    )
    for_cuda = torch.plan("torch==2.13.0", device="cuda", settings=settings)
    install_torch(house, settings, "2.13.0", cuda="13.0")
    assert torch.companion_arguments(house.layout, for_cuda, device="cuda") == ()
    install_torch(house, settings, "2.13.0+cu130", cuda="13.0")
    assert torch.companion_arguments(house.layout, for_cuda, device="cuda") == (
        "--torch-backend",
        "cu130",
    )


def test_broken_companion_is_named_by_the_probe_with_its_error_in_a_line(house, built):
    from workspace.core import process

    settings = built()
    install_torch(house, settings, "2.13.0+cpu")
    install(house, settings, str(house.wheel("torchaudio", "1.0")))
    broken = (
        b"print('noise')\nraise RuntimeError('operator torchvision::nms does not exist\\nand"
        b" more')\n"
    )
    install(
        house,
        settings,
        "--no-deps",
        str(house.wheel("torchvision", "1.0", files={"torchvision/__init__.py": broken})),
    )
    done = process.capture(
        [house.layout.environment_python, house.layout.probes / "imports.py", "companions"],
        env=settings.child_environment("run"),
    )
    assert json.loads(done.stdout) == {
        "torchvision": "RuntimeError: operator torchvision::nms does not exist",
        "torchaudio": None,
    }
