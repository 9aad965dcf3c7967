"""A complete bootstrap from an empty clone to a verified vLLM; a second one changes nothing."""

import json
import re
import stat
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.small.materials import VERSION, Materials, git
from tests.small.wheels import LIBRARIES, compile_library, this_machine
from tests.small.world import World
from workspace.core.console import Console, Step
from workspace.install import bootstrap, status
from workspace.install.stages import Run
from workspace.machine import gpu

ROWS = ("pin", "source", "patches", "environment", "kernels", "install")


def libraries() -> set[str]:
    return {f"vllm/{name}.abi3.so" for name in LIBRARIES[this_machine()]}


def test_bootstrap_from_the_release_archive_ends_with_an_importable_vllm_of_the_tree(
    built: World,
) -> None:
    where = built.python("import vllm; print(vllm.__file__, vllm.__version__)").split()
    assert where == [str(built.layout.vllm / "vllm" / "__init__.py"), f"{VERSION}+cpu"]
    assert (
        built.python(
            "from vllm.platforms import current_platform as p; print(p.device_type)",
            cwd=built.layout.vllm,
        )
        == "cpu"
    )
    assert {name: state for name, state in built.status().items() if name in ROWS} == dict.fromkeys(
        ROWS, "ok"
    )


def test_libraries_are_the_precompiled_and_python_files_are_the_trees(built: World) -> None:
    taken = {str(path.relative_to(built.layout.vllm)) for path in built.layout.vllm.rglob("*.so")}
    assert taken == libraries()
    assert (
        "a Python file of the precompiled wheel"
        not in (built.layout.vllm / "vllm" / "__init__.py").read_text()
    )
    assert built.git("status", "--porcelain") == ""


def test_the_checkout_of_the_archive_is_its_tree_and_the_patch_on_it(
    built: World, materials: Materials
) -> None:
    assert built.git("rev-parse", "HEAD~1^{tree}") == materials.archive_tree
    assert built.git("diff", "--name-only", "HEAD~1", "HEAD") == "setup.py"
    assert (
        not (built.layout.vllm / "vllm.egg-info").exists()
        or "+cpu" in (built.layout.vllm / "vllm.egg-info" / "PKG-INFO").read_text()
    )
    assert (built.layout.vllm / "build" / "kept.txt").exists(), (
        "a member that .gitignore names was lost"
    )


def test_stamps_lie_in_the_environment_and_name_every_library(built: World) -> None:
    record = json.loads(built.layout.stamp("vllm").read_text())
    assert {item["path"] for item in record["libraries"]} == libraries()
    assert record["outcome"]["version"] == f"{VERSION}+cpu"
    assert record["outcome"]["tree"] == built.git("rev-parse", "HEAD^{tree}")
    assert "torch" in json.loads(built.layout.stamp("environment").read_text())["packages"]


def test_dotenv_is_readable_by_its_owner_only(built: World) -> None:
    assert stat.S_IMODE(built.layout.dotenv.stat().st_mode) == 0o600


def test_second_bootstrap_touches_no_file_asks_nobody_and_leaves_no_log(built: World) -> None:
    # After a copy no inode is what git's index holds: whoever lets git refresh that index is seen
    # here.
    before = built.listing()
    ended = built.bootstrap()
    assert built.listing() == before
    assert "nothing to do" in ended.err
    assert built.index.requests == []
    assert ended.out == ""


def test_verbs_with_nothing_to_do_do_not_ask_the_gpu(built: World) -> None:
    folder = built.folder / "driver"
    folder.mkdir()
    asked, program = folder / "asked", folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$*" >> "{asked}"\n')
    program.chmod(0o755)
    # An NVML that is noticed when it is loaded, and the program beside it.
    note = f'__attribute__((constructor)) void note(void) {{ fclose(fopen("{asked}", "a")); }}'
    made = compile_library(folder, "nvml", f"#include <stdio.h>\n{note}\n")
    (folder / gpu.LIBRARY).write_bytes(made)
    driver = {"PATH": f"{folder}:{built.env['PATH']}", "LD_LIBRARY_PATH": str(folder)}
    for verb in ("bootstrap", "rebuild", "status"):
        ended = built.run(verb, env=driver)
        assert ended.code == 0, ended.output
    assert not asked.exists()
    built.run("doctor", "--offline", env=driver)
    assert not asked.exists(), "a build for the CPU needs no driver"
    built.run("doctor", "--offline", env=driver | {"DEVICE": "cuda"})
    assert asked.exists()


@pytest.mark.parametrize(
    ("step", "argument", "edited"),
    [("requirements", "-r", "requirements/new.txt"), ("install", "--editable", "setup.py")],
)
def test_step_whose_files_are_edited_meanwhile_is_done_again(
    built: World, tmp_path: Path, step: str, argument: str, edited: str
) -> None:
    program, made, file = tmp_path / "uv", tmp_path / "made", built.layout.vllm / edited
    edit = f'[ -e "{made}" ] || echo "# meanwhile" | tee "{made}" >> "{file}"'
    real = built.materials.bin / "uv"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *" {argument} "*) {edit};; esac\nexec "{real}" "$@"\n'
    )
    program.chmod(0o755)
    common = built.layout.vllm / "requirements" / "common.txt"
    common.write_text(common.read_text() + "# before\n")
    ended = built.bootstrap(env={"PATH": f"{tmp_path}:{built.env['PATH']}"})
    assert ended.err.count(f"done     {step} ") == 2, ended.err
    assert "nothing to do" in built.bootstrap().err


QUESTIONS = {
    "nvidia-smi": 'case "$*" in *compute_cap*) echo "NVIDIA GB10, 12.1, 580.95.05";; esac',
    "nvcc": "echo 'Cuda compilation tools, release 13.0, V13.0.48'; echo '#$ TOP=/usr/local/cuda'",
    "g++": 'exec /usr/bin/g++ "$@"',
}


def asked(world: World, *args: str, device: str) -> list[str]:
    """Run a verb, and return what it asked of the driver, the toolkit, the compiler and Python."""
    folder = world.folder / "questions"
    folder.mkdir(exist_ok=True)
    log = folder / "log"
    log.write_text("")
    for name, script in QUESTIONS.items():
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "{log}"\n{script}\n')
        (folder / name).chmod(0o755)
    # Python runs the line twice in a virtual environment.
    note = f"sys.modules.setdefault('noted', open({str(log)!r}, 'a')).write('python\\n')"
    once = f"import sys; 'noted' in sys.modules or {note}\n"
    for packages in world.layout.environment.glob("lib/python3*/site-packages"):
        (packages / "note.pth").write_text(once)
    env = {"PATH": f"{folder}:{world.env['PATH']}", "DEVICE": device}
    if gpu.is_library_there({}):
        # The program answers on a machine with a GPU, too.
        (folder / gpu.LIBRARY).write_text("not a library")
        env["LD_LIBRARY_PATH"] = str(folder)
    ended = world.run(*args, env=env)
    assert "Traceback" not in ended.err, ended.err
    return sorted(log.read_text().splitlines())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_verb_asks_the_machine_each_question_at_most_once(built: World, device: str) -> None:
    flags = "\n".join(f'    parser.add_argument("--{name}")' for name in ("host", "port"))
    source = built.layout.vllm / "vllm" / "engine" / "arg_utils.py"
    source.parent.mkdir(exist_ok=True)
    source.write_text(f"def make(parser):\n{flags}\n")
    serve = asked(built, "serve", "acme/tiny", "--dry-run", device=device)
    doctor = asked(built, "doctor", "--offline", device=device)
    others = [asked(built, verb, device=device) for verb in ("status", "rebuild", "bootstrap")]
    for questions in (serve, doctor, *(others if device == "cpu" else others[:1])):
        assert questions == sorted(set(questions))
        assert "python" in questions
    assert {words.split()[0] for words in doctor} == (
        {"python", "g++"} if device == "cpu" else {"python", "g++", "nvcc", "nvidia-smi"}
    )


BROKEN_DRIVERS = {
    "mismatch": "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18",
    "no contact": 'echo "NVIDIA-SMI couldn\'t communicate with the NVIDIA driver."; exit 9',
    "no devices": "echo 'No devices were found'; exit 6",
    "no devices, exit 0": "echo 'No devices were found'",
    "container": "echo 'Failed to initialize NVML: Unknown Error'; exit 255",
}


def with_driver(world: World, script: str) -> dict[str, str]:
    """Variables of a machine whose driver is there and fails, and that leaves the choice to us."""
    folder = Path(tempfile.mkdtemp(dir=world.folder))
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    env = {"PATH": f"{folder}:{world.env['PATH']}", "DEVICE": "auto"}
    if gpu.is_library_there({}):
        # As in tests/machine/conftest.py: the program answers on a machine with a GPU, too.
        (folder / gpu.LIBRARY).write_text("not a library")
        env["LD_LIBRARY_PATH"] = str(folder)
    return env


@pytest.mark.parametrize("script", BROKEN_DRIVERS.values(), ids=BROKEN_DRIVERS)
def test_machine_whose_driver_fails_is_not_built_for_the_cpu(world: World, script: str) -> None:
    ended = world.run("bootstrap", env=with_driver(world, script))
    assert ended.code == 6, ended.output
    assert "--device cpu" in ended.err
    assert not world.layout.environment.exists()
    assert list(world.layout.vllm.iterdir()) == []
    assert not world.layout.dotenv.exists()


def test_other_verbs_do_not_take_a_failed_driver_for_a_cpu(world: World) -> None:
    env = with_driver(world, BROKEN_DRIVERS["mismatch"])
    world.run("env.init", env=env)
    assert "VLLM_CPU_KVCACHE_SPACE" not in world.layout.dotenv.read_text()
    doctor = world.run("doctor", "--offline", env=env)
    assert doctor.code == 6
    assert "Driver/library version mismatch" in doctor.output


def test_clone_built_for_the_cpu_stays_so_beside_a_failed_driver(built: World) -> None:
    env = with_driver(built, BROKEN_DRIVERS["mismatch"])
    assert "nothing to do" in built.run("bootstrap", env=env).err
    assert built.run("status", env=env).code == 0


def test_superproject_does_not_see_the_release_checkout_as_a_moved_submodule(
    built: World, materials: Materials
) -> None:
    git(built.root, "add", "--all")
    assert git(built.root, "ls-files", "-s", "vendor/vllm").split()[1] == materials.commit
    assert git(built.root, "status", "--porcelain") == ""


def test_log_is_named_at_the_end_and_holds_every_command(built: World) -> None:
    assert built.first is not None
    logs = list(built.layout.logs.glob("*.log"))
    assert len(logs) == 1
    assert f"log: {built.layout.relative(logs[0])}" in built.first.err
    assert "uv pip install" not in built.first.err
    lines = logs[0].read_text().splitlines()
    assert [line for line in lines if line.startswith("+ ") and "uv pip install" in line]


@pytest.mark.parametrize(("args", "env"), [(("--verbose",), {}), ((), {"VERBOSE": "1"})])
def test_commands_are_on_the_screen_where_that_was_asked_for(
    built: World, args: tuple[str, ...], env: dict[str, str]
) -> None:
    common = built.layout.vllm / "requirements" / "common.txt"
    common.write_text(common.read_text() + "# a word\n")
    ended = built.run("bootstrap", *args, env=env)
    assert ended.code == 0, ended.output
    assert re.search(r"^\+ .*uv pip install", ended.err, re.MULTILINE)


def test_bootstrap_ended_in_the_middle_is_completed_by_the_next(built: World) -> None:
    # A change of the user's in the tree's requirements gives it something to do, and must be there
    # afterwards.
    common = built.layout.vllm / "requirements" / "common.txt"
    common.write_text(common.read_text() + "triton\n")
    assert built.status()["environment"] == "stale"
    # The tests share uv's cache, which may have the file already.
    built.env["UV_CACHE_DIR"] = str(built.folder / "empty-uv-cache")
    gate = built.index.gate("triton-3.7.1-py3-none-any.whl")
    child = built.start("bootstrap")
    gate.wait()
    built.run("bootstrap").error(12)
    built.kill(child)
    gate.opened.set()
    built.index.faults.clear()
    assert not built.layout.stamp("environment").exists()
    built.bootstrap()
    assert "triton" in built.uv("list")
    assert common.read_text().endswith("triton\n")


def test_verification_leaves_bytecode_in_the_environment(built: World) -> None:
    layout = built.layout
    below = layout.bytecode / str(layout.vllm).lstrip("/") / "vllm"
    assert any(path.name.startswith("__init__.") for path in below.glob("*.pyc"))


def test_bootstrap_ends_with_a_token_of_the_built_vllm_and_never_repeats_it(built: World) -> None:
    assert built.first is not None
    lines = built.first.err.splitlines()
    assert [line for line in lines if line.startswith("done     first token   on cpu")]
    record = json.loads(built.layout.stamp("first-token").read_text())
    assert record["inputs"]["version"] == f"{VERSION}+cpu"
    again = built.bootstrap()
    assert "skipped  first token   was generated on cpu" in again.err


def test_another_build_generates_its_own_first_token(built: World) -> None:
    wheel = next(built.layout.root.parent.glob("cache/files/*/*.whl"))
    ended = built.bootstrap("--kernels", str(wheel))
    assert "done     first token" in ended.err


def test_first_token_is_left_out_on_request_and_made_up_for_by_the_next_bootstrap(
    built: World,
) -> None:
    built.layout.stamp("first-token").unlink()
    before = built.listing()
    ended = built.bootstrap("--no-first-token")
    assert "first token" not in ended.err
    assert built.listing() == before
    assert "due: first token" in built.bootstrap().err


def test_vllm_that_generates_no_token_is_an_error_with_its_cause(built: World) -> None:
    built.layout.stamp("first-token").unlink()
    (built.root / "no-token").write_text("CUDA error: no kernel image is available")
    sentence = built.run("bootstrap").error(7)
    assert "no kernel image is available" in sentence
    assert not built.layout.stamp("first-token").exists()
    assert built.status()["install"] == "ok"
    (built.root / "no-token").unlink()
    built.bootstrap()


def test_wait_for_the_first_token_is_named_each_time_with_its_stage_and_what_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bootstrap, "WAIT_LINE_S", 0.02)
    kernel = tmp_path / "driver" / "a" / "b" / "kernel"
    kernel.parent.mkdir(parents=True)
    console = Console(err=sys.stderr)
    built = SimpleNamespace(outcome={status.DRIVER_WORK: "_vllm_fa2_C (76 of 76 units for 12.1)"})
    run = SimpleNamespace(
        run_log=SimpleNamespace(console=console),
        observed=SimpleNamespace(kernels=SimpleNamespace(recorded=built)),
    )
    environment = {"CUDA_CACHE_PATH": str(tmp_path / "driver")}
    wait = bootstrap._Wait(cast(Run, run), Step("first token"), environment)
    with wait.shown():
        wait.read("@ generating a token")
        kernel.write_bytes(b"x" * 2_000_000)
        deadline = time.monotonic() + 20
        shown = ""
        while "2.0 MB" not in shown and time.monotonic() < deadline:
            time.sleep(0.02)
            shown += capsys.readouterr().err
    assert re.search(
        r"^first token: generating a token, 0 s; the driver may be compiling _vllm_fa2_C;"
        r" compiled so far: the driver 2\.0 MB$",
        shown,
        re.MULTILINE,
    )
    assert wait.error is not None, "no document was printed yet"
    wait.read('{"schema": 1, "error": null, "token": 7}')
    assert wait.error is None
