"""Decisions from the observed state: versions, sentences, and the stages that are due."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.small.world import World
from workspace.core import settings
from workspace.core.errors import SettingsError, ToolchainError
from workspace.core.paths import Layout
from workspace.install import bootstrap, plan, stamp, status
from workspace.machine import gpu
from workspace.machine.machine import Machine
from workspace.machine.torch import TorchBuild
from workspace.repo.git import Git


def due(observed: plan.Observation, world: World, **flags: str) -> list[str]:
    """Return the first step of each stage that is due."""
    return [stage.steps[0][0] for stage in bootstrap.stages_of(observed) if stage.is_due]


def loaded(world: World, **flags: str) -> settings.Settings:
    return settings.load(world.layout, flags=flags, environ=world.env)


def observed(world: World, **flags: str) -> plan.Observation:
    return plan.observe(world.layout, loaded(world, **flags))


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write("# edited\n")


def test_version_names_the_platform_in_its_letters(built: World) -> None:
    pin = observed(built).pin
    assert plan.version_of(pin, "cpu", TorchBuild("2.13.0+cpu", None)) == "0.31.0+cpu"
    assert plan.version_of(pin, "cuda", TorchBuild("2.13.0+cu130", "13.0")) == "0.31.0+cu130"
    assert plan.version_of(pin, "cuda", None) == "0.31.0+cu130"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (("csrc/a.c",), "; csrc/a.c differs from them"),
        (("csrc/a.c", "csrc/b.c"), "; csrc/a.c, csrc/b.c differ from them"),
        (
            tuple(f"csrc/{number}.c" for number in range(5)),
            "; csrc/0.c, csrc/1.c, csrc/2.c and 2 more differ from them",
        ),
    ],
)
def test_sentence_on_changed_sources_names_at_most_three(
    changed: tuple[str, ...], sentence: str
) -> None:
    assert plan.changed_sources_sentence(changed).endswith(sentence)


def test_nothing_is_due_in_a_built_clone_and_everything_in_an_empty_one(
    built: World, world: World
) -> None:
    assert due(observed(built), built) == []
    assert due(observed(world), world) == [".env", "source", "patches", "python", "kernels"]


def test_observe_changes_no_file_and_sends_no_request(built: World, world: World) -> None:
    for place in (built, world):
        before = place.listing()
        observed(place)
        assert place.listing() == before
        assert place.index.requests == []


def test_torch_that_was_swapped_makes_environment_and_kernels_stale(built: World) -> None:
    built.uv("install", "torch==2.14.0+cpu")
    seen = observed(built)
    assert "torch 2.13.0+cpu CUDA none → 2.14.0+cpu CUDA none" in seen.environment.reasons
    assert "torch 2.13.0+cpu CUDA none → 2.14.0+cpu CUDA none" in seen.kernels.reasons
    assert due(seen, built) == ["python", "kernels"]


def test_a_stale_layer_names_the_files_that_changed(built: World) -> None:
    append(built.layout.vllm / "setup.py")
    (built.layout.vllm / "requirements" / "new.txt").write_text("six\n")
    seen = observed(built)
    assert "metadata changed: requirements/new.txt, setup.py" in seen.install.reasons
    assert "requirements changed: requirements/new.txt" in seen.environment.reasons


def test_stamp_of_the_first_edition_explains_without_files(built: World) -> None:
    path = built.layout.stamp("vllm")
    record = json.loads(path.read_text())
    assert record.pop("files")["metadata"]["setup.py"].startswith("100644 ")
    path.write_text(json.dumps(record))
    append(built.layout.vllm / "setup.py")
    assert "metadata changed" in observed(built).install.reasons


def test_a_file_that_changed_during_the_build_or_has_no_text_for_a_name_is_not_recorded(
    built: World,
) -> None:
    git = Git(built.layout.vllm)
    inputs = {"metadata": git.digest(plan.METADATA_FILES)}
    assert "setup.py" in plan.digested_files(plan.Tree(git), inputs)["metadata"]
    append(built.layout.vllm / "setup.py")
    assert plan.digested_files(plan.Tree(git), inputs) == {}
    os.rename(
        built.layout.vllm / "setup.py",
        os.fsencode(built.layout.vllm / "requirements") + b"/\xff.txt",
    )
    assert plan.digested_files(plan.Tree(git), {"metadata": git.digest(plan.METADATA_FILES)}) == {}


def test_package_that_was_removed_is_named(built: World) -> None:
    built.uv("uninstall", "six", "regex")
    reasons = observed(built).environment.reasons
    assert "regex 2026.1.1 → none" in reasons


def test_package_of_the_users_own_makes_nothing_stale(built: World) -> None:
    built.uv("install", "cmake", "flashinfer-python", "--no-deps")
    assert due(observed(built), built) == []


def test_vllm_of_another_version_in_the_environment_makes_the_install_stale(built: World) -> None:
    built.uv("uninstall", "vllm")
    assert observed(built).install.reasons == ("installed vllm none → 0.31.0+cpu",)


def test_python_edits_make_nothing_stale(built: World) -> None:
    (built.layout.vllm / "vllm" / "version.py").write_text("__version__ = 'mine'\n")
    assert due(observed(built), built) == []


@pytest.mark.parametrize("name", ["setup.py", "requirements/common.txt", "pyproject.toml"])
def test_committing_an_edit_that_was_built_makes_nothing_stale(built: World, name: str) -> None:
    path = built.layout.vllm / name
    path.write_text(path.read_text() + "\n# mine\n")
    before = observed(built)
    built.git("commit", "--all", "-m", "Mine")
    after = observed(built)
    assert before.install.inputs == after.install.inputs
    assert before.environment.inputs == after.environment.inputs
    assert before.install.state == "stale"


def test_build_settings_count_for_native_kernels_only(built: World) -> None:
    built.env["CMAKE_BUILD_TYPE"] = "Debug"
    assert observed(built).kernels.state == "ok"
    assert observed(built, KERNELS="native").kernels.state == "stale"


def test_edited_compiled_source_makes_kernels_stale_but_no_bootstrap_due(
    built: World,
) -> None:
    (built.layout.vllm / "csrc" / "new.h").write_text("int more;\n")
    seen = observed(built)
    assert seen.kernels.state == "stale"
    assert due(seen, built) == []
    assert any("csrc/new.h" in reason for reason in seen.needs_compilation)


def test_changed_sources_do_not_hide_another_reason(built: World) -> None:
    (built.layout.vllm / "csrc" / "new.h").write_text("int more;\n")
    seen = observed(built)
    more = replace(
        seen,
        kernels=replace(seen.kernels, reasons=("vllm/_C.abi3.so changed", *seen.kernels.reasons)),
    )
    assert due(more, built) == ["kernels"]


def test_kernels_may_be_chosen_by_the_first_editions_name(built: World) -> None:
    assert (
        observed(built, KERNELS="donor").kernels_wanted
        == observed(built, KERNELS="precompiled").kernels_wanted
    )


@pytest.mark.parametrize("choice", ["nowhere.whl", "prebuilt", "", "tests"])
def test_kernels_of_an_unknown_kind_are_refused(built: World, choice: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="KERNELS="):
        observed(built, KERNELS=choice if choice != "tests" else str(tmp_path))


def test_device_stays_what_the_environment_was_made_for(built: World) -> None:
    built.env["DEVICE"] = "auto"
    assert observed(built).device == "cpu"
    assert due(observed(built), built) == []


def test_status_and_doctor_name_what_the_driver_will_compile_and_its_price(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    work = "_vllm_fa2_C (76 of 76 units for 12.1), _C_stable_libtorch (6 of 115 units for 12.1)"
    built = stamp.Stamp(inputs={}, outcome={status.DRIVER_WORK: work})
    layout.stamp("vllm").parent.mkdir(parents=True)
    stamp.write(layout.stamp("vllm"), built)
    (row,) = status.first_use(layout)
    assert row.state == "ok"
    assert row.text == status.driver_sentence(built)
    assert f"the driver compiles PTX at the first use of {work}" in row.text
    assert "203 s" in row.text
    assert "55 units, 173 compiler-minutes, and does not help" in row.text


@pytest.mark.parametrize("outcome", [{}, {status.DRIVER_WORK: ""}])
def test_nothing_is_said_of_the_driver_where_machine_code_serves_the_gpu(
    outcome: dict[str, str],
) -> None:
    assert status.driver_sentence(stamp.Stamp(inputs={}, outcome=outcome)) is None
    assert status.driver_sentence(None) is None


def test_price_is_named_for_the_attention_library_only() -> None:
    outcome = {status.DRIVER_WORK: "_moe_C_stable_libtorch (15 of 34 units for 9.0)"}
    sentence = status.driver_sentence(stamp.Stamp(inputs={}, outcome=outcome))
    assert sentence is not None
    assert "compiler-minutes" not in sentence


def driver_rows(world: World, tmp_path: Path, script: str, **env: str) -> tuple[list[str], ...]:
    """Return what status and doctor say of a driver whose nvidia-smi is `script`."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir(exist_ok=True)
    smi.write_text(f"#!/bin/sh\necho >> {tmp_path}/asked\n{script}\n")
    smi.chmod(0o755)
    environ = {**world.env, "PATH": f"{smi.parent}:{world.env['PATH']}", "DEVICE": "auto", **env}
    if gpu.is_library_there({}):
        # As in tests/machine/conftest.py: the program answers on a machine with a GPU, too.
        (smi.parent / gpu.LIBRARY).write_text("not a library")
        environ["LD_LIBRARY_PATH"] = str(smi.parent)
    machine = Machine(world.layout, settings.load(world.layout, environ=environ))
    found = (status.device_rows(machine), status.device_rows(machine, queries_driver=True))
    return tuple([row.text for row in rows] for rows in found)


ANSWERS = "echo 'NVIDIA GB10, 12.1, 580.95.05'"
MISMATCH = "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18"


def away(world: World) -> None:
    """Record that no driver answered when the environment was made."""
    path = world.layout.stamp("environment")
    recorded = stamp.read(path)
    assert recorded is not None
    stamp.write(path, replace(recorded, outcome={stamp.DRIVER: stamp.AWAY}))


def test_clone_built_for_the_cpu_without_a_driver_says_when_the_driver_is_back(
    built: World, tmp_path: Path
) -> None:
    away(built)
    in_status, in_doctor = driver_rows(built, tmp_path, ANSWERS)
    assert "now an NVIDIA driver is installed" in in_status[0]
    assert "now NVIDIA GB10 answers" in in_doctor[0]
    assert driver_rows(built, tmp_path, ANSWERS, DEVICE="cpu") == ([], [])
    # A driver that still fails is a fault of its own: another row of the doctor has it.
    assert driver_rows(built, tmp_path, MISMATCH)[1] == []


def test_status_of_a_cpu_build_never_asks_the_driver(built: World, tmp_path: Path) -> None:
    away(built)
    driver_rows(built, tmp_path, ANSWERS, DEVICE="cpu")
    environ = {**built.env, "PATH": f"{tmp_path}/bin:{built.env['PATH']}", "DEVICE": "auto"}
    machine = Machine(built.layout, settings.load(built.layout, environ=environ))
    assert any(row.name == "device" for row in status._rows(built.layout, plan.observe_on(machine)))
    assert not (tmp_path / "asked").exists()


def test_cpu_build_beside_a_driver_that_answered_is_meant(built: World, tmp_path: Path) -> None:
    path = built.layout.stamp("environment")
    recorded = stamp.read(path)
    assert recorded is not None
    stamp.write(path, replace(recorded, outcome={}))
    assert driver_rows(built, tmp_path, ANSWERS) == ([], [])


def test_build_for_a_gpu_that_is_not_here_is_packed_and_not_smoked(
    built: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu = observed(built)
    for_gpu = replace(on_cpu, device="cuda")
    monkeypatch.setattr(gpu, "is_installed", lambda _: False)
    assert status.next_command(on_cpu) == "./scripts/nox -s smoke"
    hint = status.next_command(for_gpu)
    assert hint.split("    ")[0] == "./scripts/inv wheel"
    monkeypatch.setattr(plan, "observe_on", lambda _: for_gpu)
    with pytest.raises(ToolchainError, match="no NVIDIA driver") as caught:
        status.require_runnable(for_gpu.machine)
    assert caught.value.hint == hint
    # What only reads the state, as serve --dry-run does, goes on.
    assert status.require_built(for_gpu.machine) is for_gpu
    # A driver that is installed and fails is a fault of its own, which the smoke meets.
    monkeypatch.setattr(gpu, "is_installed", lambda _: True)
    assert status.next_command(for_gpu) == "./scripts/nox -s smoke"
    assert status.require_runnable(for_gpu.machine) is for_gpu
    assert built.run(hint.split()[1]).code == 0


def test_second_bootstrap_needs_less_disk_by_what_the_first_has_installed(tmp_path: Path) -> None:
    assert bootstrap._used_gib(tmp_path / "none") == 0
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "lib").write_bytes(os.urandom(3 << 20))
    (tmp_path / "link").symlink_to(tmp_path / "torch" / "lib")
    assert bootstrap._used_gib(tmp_path) == pytest.approx(3 / 1024, rel=0.1)
