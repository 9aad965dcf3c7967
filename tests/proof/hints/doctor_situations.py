"""Situations of the doctor's rows, with a driver and a compiler that are shell scripts."""

import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

from tests.machine.programs import NEW, OLD, PTXAS, SMI
from tests.proof.hints.following import User, printed, runs
from tests.small import wheels
from tests.small.index import Fault


def program(user: User, name: str, script: str) -> Path:
    """Write a shell script that comes first on PATH."""
    folder = user.root / ".workspace" / "programs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    if str(folder) not in user.world.env["PATH"].split(":"):
        user.world.env["PATH"] = f"{folder}:{user.world.env['PATH']}"
    return path


def driver(user: User, gpu: str = "NVIDIA GB10, 12.1, 580.95.05", cuda: str = "13.0") -> None:
    """Let a driver answer for a CUDA build."""
    user.world.env["DEVICE"] = "cuda"
    xml = f"echo '<nvidia_smi_log><cuda_version>{cuda}</cuda_version></nvidia_smi_log>'"
    program(user, "nvidia-smi", SMI.format(gpu=gpu, apps="true", xml=xml if cuda else "true"))


def without_row(user: User, name: str, command: str, *verb: str) -> None:
    """Type the command and the verb in one shell, and see that the hint is printed no more."""
    done = user.type(f"{command} && ./scripts/inv {' '.join(verb)}")
    assert "Traceback" not in done.err, done.output
    assert not printed(name, done), done.output
    user.followed.add(name)


@runs("machine.nvidia_smi_or_cpu")
def driver_that_fails(user: User) -> None:
    user.world.env["DEVICE"] = "cuda"
    words = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver"
    program(user, "nvidia-smi", f'echo "{words}"; exit 9')
    shown = user.type(user.meets("machine.nvidia_smi_or_cpu", "doctor"))
    assert (shown.code, shown.out.strip()) == (9, words)
    user.followed.add("machine.nvidia_smi_or_cpu")


@runs("machine.nvidia_smi", "machine.without_gpu")
def driver_that_says_too_little(user: User) -> None:
    driver(user, cuda="")
    user.look("machine.nvidia_smi", "doctor", shows="")
    driver(user, gpu="Tesla P4, 6.1, 580.95.05")
    user.follow("machine.without_gpu", "doctor", then=False)
    user.world.env["DEVICE"] = "cpu"
    assert user.world.status()["install"] == "ok"


@runs("machine.export_archs", "machine.set_archs")
def architectures_of_another_gpu(user: User) -> None:
    driver(user)
    verb = ("doctor",)
    command = user.meets("machine.export_archs", *verb, TORCH_CUDA_ARCH_LIST="8.0")
    without_row(user, "machine.export_archs", command, *verb)
    user.world.layout.dotenv.write_text("TORCH_CUDA_ARCH_LIST=8.0\n")
    without_row(user, "machine.set_archs", user.meets("machine.set_archs", *verb), *verb)
    assert "# TORCH_CUDA_ARCH_LIST=8.0" in user.world.layout.dotenv.read_text()


@runs("machine.drop_max_jobs")
def more_compilers_than_the_memory_has_room_for(user: User) -> None:
    driver(user)
    user.world.layout.dotenv.write_text("MAX_JOBS=900\n")
    verb = ("doctor",)
    without_row(user, "machine.drop_max_jobs", user.meets("machine.drop_max_jobs", *verb), *verb)
    assert user.world.layout.dotenv.read_text() == "# MAX_JOBS=900\n"


@runs("machine.ps")
def engine_that_runs(user: User) -> None:
    with subprocess.Popen(["bash", "-c", "exec -a VLLM::EngineCore sleep 60"]) as engine:
        try:
            while not Path(f"/proc/{engine.pid}/cmdline").read_bytes().startswith(b"VLLM::"):
                time.sleep(0.01)
            user.look(
                "machine.ps", "doctor", "--offline", shows=rf"{engine.pid} .*VLLM::EngineCore"
            )
        finally:
            engine.kill()


@runs("machine.git_version")
def git_that_does_not_answer(user: User) -> None:
    git = program(user, "git", "echo 'git: a library is damaged' >&2; exit 1")
    command = user.meets("machine.git_version", "doctor", "--offline")
    git.unlink()
    shown = user.type(command)
    assert (shown.code, shown.out.startswith("git version")) == (0, True), shown.output
    user.followed.add("machine.git_version")


def torchs_libraries(user: User, *names: str) -> Path:
    """Let torch have these libraries, and a folder of the user too."""
    lib = next(user.world.layout.environment.glob("lib/python3*/site-packages/torch")) / "lib"
    mine = user.root / "mine"
    for folder in (lib, mine):
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).touch()
    return mine


@runs("machine.drop_library_path", "machine.export_library_path", "machine.unset_library_path")
def libraries_that_come_before_those_of_torch(user: User) -> None:
    mine = torchs_libraries(user, "libcublas.so.13")
    verb = ("doctor", "--offline")
    shell = {"LD_LIBRARY_PATH": f"{mine}:/nonexistent"}
    command = user.meets("machine.export_library_path", *verb, **shell)
    without_row(user, "machine.export_library_path", command, *verb)
    assert command == "export LD_LIBRARY_PATH=/nonexistent"
    command = user.meets("machine.unset_library_path", *verb, LD_LIBRARY_PATH=str(mine))
    without_row(user, "machine.unset_library_path", command, *verb)
    user.world.layout.dotenv.write_text(f"LD_LIBRARY_PATH={mine}\n")
    command = user.meets("machine.drop_library_path", *verb)
    without_row(user, "machine.drop_library_path", command, *verb)


@runs("machine.doctor", "machine.set_index", "machine.ls_remote_plain")
def network_that_refuses_or_is_slow(user: User) -> None:
    url = user.world.index.url
    nowhere = "http://127.0.0.1:9/simple"
    shell = {"UV_DEFAULT_INDEX": nowhere, "PIP_INDEX_URL": nowhere}
    command = user.meets("machine.set_index", "doctor", **shell)
    without_row(user, "machine.set_index", command.replace("URL", url), "doctor")
    user.world.index.faults["packaging"] = Fault(delay_s=8)
    shown = user.type(user.meets("machine.doctor", "doctor", CONNECT_TIMEOUT_S="1"))
    assert re.search(r"warn +index", shown.out), shown.output
    user.followed.add("machine.doctor")
    del user.world.env["VLLM_MIRROR"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/vllm.git"
        pins = user.world.layout.pins
        pins.write_text(pins.read_text().replace("https://git.invalid/vllm.git", url))
        command = user.meets("machine.ls_remote_plain", "doctor", CONNECT_TIMEOUT_S="1")
    # It shows git's own words for the fault, and its exit code.
    shown = user.type(command)
    assert (shown.code, "unable to access" in shown.err) == (128, True), shown.output
    user.followed.add("machine.ls_remote_plain")


@runs("machine.pinned_torch", "machine.existing_torch", "machine.requirements_diff")
def requirements_that_were_edited(user: User) -> None:
    for script in user.vllm.glob("**/use_existing_torch.py"):
        script.unlink()
    shutil.rmtree(user.world.layout.environment)
    shell = {"USE_EXISTING_TORCH": "1"}
    user.world.venv()
    user.world.uv("install", "torch")
    command = user.meets("machine.pinned_torch", "bootstrap", **shell)
    done = user.type(f"{command} && ./scripts/inv bootstrap", **shell)
    assert done.code == 0, done.output
    user.followed.add("machine.pinned_torch")
    user.world.git("stash")
    for file in (user.vllm / "requirements").rglob("*.txt"):
        file.write_text(re.sub(r"(?m)^torch\b.*\n", "", file.read_text()))
    command = user.meets("machine.existing_torch", "bootstrap")
    done = user.type(f"{command} && ./scripts/inv bootstrap")
    assert done.code == 0, done.output
    user.followed.add("machine.existing_torch")
    with (user.vllm / "requirements" / "common.txt").open("a") as common:
        common.write("no requirement ===\n")
    user.look("machine.requirements_diff", "bootstrap", shows="no requirement ===", **shell)


@runs("machine.ccache_config")
def compiler_cache_that_does_not_run(user: User) -> None:
    verb = ("doctor", "--offline")
    program(user, "ccache", "[ $1 = --show-config ] && echo nonsense")
    user.look("machine.ccache_config", *verb, shows="nonsense")


def in_environment(user: User, name: str, script: str) -> Path:
    path = user.world.layout.environment / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@runs("machine.pip_cmake", "machine.pip_ninja")
def tools_of_a_build_that_are_damaged(user: User) -> None:
    verb = ("doctor", "--offline")
    for name, hint in (("cmake", "machine.pip_cmake"), ("ninja", "machine.pip_ninja")):
        broken = in_environment(user, name, "exit 1")
        command = user.meets(hint, *verb, KERNELS="native")
        # The small index has packages of these names, without programs.
        broken.unlink()
        done = user.type(command)
        assert (done.code, f"{name}==" in done.err) == (0, True), done.output
        user.followed.add(hint)


def assembler(path: Path, release: str, known: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{PTXAS.format(release=release, known=known)}\n")
    path.chmod(0o755)


@runs("machine.set_ptxas", "machine.pip_triton")
def assemblers_that_do_not_know_the_gpu(user: User) -> None:
    driver(user)
    user.world.uv("install", "--no-deps", "triton==3.7.1")
    packages = next(user.world.layout.environment.glob("lib/python3*/site-packages"))
    own = packages / "triton" / "backends" / "nvidia" / "bin"
    assembler(own / "ptxas", "12.8", OLD)
    assembler(own / "ptxas-blackwell", "12.8", OLD)
    home = user.root / "cuda"
    assembler(home / "bin" / "ptxas", "13.0", NEW)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text('#!/bin/sh\ntest "$1" = --version && echo "release 13.0, V13.0.1"\n')
    nvcc.chmod(0o755)
    user.world.env["CUDA_HOME"] = str(home)
    without_row(user, "machine.set_ptxas", user.meets("machine.set_ptxas", "doctor"), "doctor")
    (own / "ptxas").write_text("#!/bin/sh\nexit 1\n")
    user.follow("machine.pip_triton", "doctor", then=False)


@runs("machine.hf_login")
def token_that_is_empty(user: User) -> None:
    token = user.world.folder / "home" / ".cache" / "huggingface" / "token"
    token.parent.mkdir(parents=True)
    token.touch(0o600)
    in_environment(user, "hf", f'test "$*" = "auth login" && echo hf_abc > {token}')
    user.follow("machine.hf_login", "doctor", "--offline")


@runs("install.build_for_gpu", "machine.cuda_index")
def driver_that_answers_again(user: User) -> None:
    driver(user)
    command = user.meets("install.build_for_gpu", "doctor", "--offline")
    index = printed("machine.cuda_index", user.type(command))
    assert index
    folder = user.root / "wheels"
    folder.mkdir()
    user.world.index.add(wheels.write_torch(folder, "2.13.0+cu130", cuda="13.0"))
    added = index.replace("=URL", f"={user.world.index.url}")
    done = user.type(f"{added} && {command}")
    # What comes after torch needs a GPU.
    assert "torch         2.13.0+cu130, CUDA 13.0" in done.err, done.output
    user.followed |= {"install.build_for_gpu", "machine.cuda_index"}


@runs("machine.cuda_home_dotenv")
def toolkit_whose_libraries_come_before_those_of_torch(user: User) -> None:
    torchs_libraries(user, "libcublas.so.13")
    home = user.root / "cuda"
    (home / "lib64").mkdir(parents=True)
    (home / "lib64" / "libcublas.so.13").touch()
    user.world.layout.dotenv.write_text(f"CUDA_HOME={home}\n")
    verb = ("doctor", "--offline")
    command = user.meets("machine.cuda_home_dotenv", *verb)
    without_row(user, "machine.cuda_home_dotenv", command, *verb)
    assert f"# CUDA_HOME={home}" in user.world.layout.dotenv.read_text()


@runs("machine.cpu_native")
def processor_without_precompiled_wheels(user: User) -> None:
    user.through = ("linux32",)
    user.follow("machine.cpu_native", "doctor", "--offline", then=False)
    assert user.world.status()["kernels"] == "ok"
