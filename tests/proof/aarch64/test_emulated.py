"""Rung 3: the workspace itself on arm64, run by QEMU: tools, tests, both bootstraps, verbs, smoke.

Needs Linux 6.7 on x86-64, qemu-user-static, apt with arm64 packages, a package index and 20 GiB;
root where the kernel forbids namespaces to others. An hour or two of a quiet machine. The system
stays in `.workspace/aarch64`, and the next run goes on with it; delete it when you are done.
"""

import re

import pytest

from tests.proof.aarch64 import emulation, spark
from tests.proof.aarch64.emulation import Result, System

FOLDER = spark.LAYOUT.state / "aarch64"
TESTS = spark.LAYOUT.root / "tests"
CUDA, CPU = "cuda", "cpu"
# A GB10 in the environment of the CUDA clone; without its driver no GPU is found.
ARCHS = {"TORCH_CUDA_ARCH_LIST": "12.1a"}
SHORT_S, LONG_S = 1800.0, 7200.0
VERBS = (
    "status",
    "doctor --offline",
    "env",
    "serve.list",
    "serve gpt-oss-120b --dry-run",
    "fix-triton --check",
    "rebuild --plan",
    "wheel",
    "report",
)


@pytest.fixture(scope="module")
def system() -> System:
    """Make the system of arm64. Fail with everything that this machine lacks for it."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if lacking := list(emulation.lacking(FOLDER)):
        pytest.fail("\n".join(lacking), pytrace=False)
    made = System(FOLDER)
    print(f"{made.build()} packages in {made.root}")
    return made


def naming_an_architecture() -> list[str]:
    """Return the files of the fast suite that name an architecture."""
    return [
        str(file.relative_to(spark.LAYOUT.root))
        for file in sorted(TESTS.rglob("test_*.py"))
        if "proof" not in file.parts and re.search("aarch64|x86_64", file.read_text())
    ]


def test_system_looks_like_a_spark(system: System) -> None:
    output = system.run("uname -m; nvidia-smi -L; free -g", limit_s=60.0, with_gpu=True).require()
    assert output.startswith("aarch64\nGPU 0: NVIDIA GB10")
    assert re.search(r"^Mem: +119 ", output, re.MULTILINE)


def test_failure_names_what_is_at_fault(system: System) -> None:
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    crashed = system.run(f'python3 -c "{crash}"', limit_s=60.0)
    with pytest.raises(AssertionError, match="at fault is the emulator, by its line: qemu: uncau"):
        crashed.require()
    with pytest.raises(AssertionError, match="at fault is the product"):
        system.run("exit 3", limit_s=60.0).require(0, 4)
    assert system.run("sleep 60", limit_s=1.0).blame().startswith("the emulator: the command was k")


def test_tools_are_made_and_the_verbs_are_listed(system: System) -> None:
    clone = system.clone(CUDA)
    output = system.run("./scripts/inv --list", clone=clone, limit_s=SHORT_S).require()
    assert "bootstrap" in output
    tools = system.root / "root" / CUDA / ".workspace" / "tools"
    assert (tools / "bin" / "uv").read_bytes()[18:20] == b"\xb7\x00"


@pytest.mark.parametrize("file", naming_an_architecture())
def test_tests_that_name_an_architecture_pass(system: System, file: str) -> None:
    command = f"./scripts/nox -s tests -- -n 2 {file}"
    output = system.run(command, clone=system.clone(CUDA), limit_s=LONG_S).require()
    found = re.search(r"^.*\d+ passed.*$", output, re.MULTILINE)
    assert found
    print(found[0])


def test_bootstrap_for_cuda_ends_verified(system: System) -> None:
    output = bootstrap(system, CUDA).require()
    assert "verify" in output
    assert "nothing to do" in bootstrap(system, CUDA).require()


def bootstrap(system: System, device: str) -> Result:
    command = f"./scripts/inv bootstrap --device {device} --no-first-token"
    variables = ARCHS if device == CUDA else {}
    return system.run(command, clone=system.clone(device), limit_s=LONG_S, variables=variables)


@pytest.mark.parametrize("verb", VERBS)
def test_verb_works_on_the_cuda_build(system: System, verb: str) -> None:
    clone = system.clone(CUDA)
    command = f"./scripts/inv {verb}"
    done = system.run(command, clone=clone, limit_s=SHORT_S, with_gpu=True, variables=ARCHS)
    print(done.output)
    done.require()


def test_bootstrap_for_cpu_ends_verified(system: System) -> None:
    assert "verify" in bootstrap(system, CPU).require()


def test_smoke_of_the_cpu_build_passes_with_real_tokens(system: System) -> None:
    # The kernels' check is a part of it; each probe takes minutes.
    command = f"./scripts/nox -s smoke -- --timeout-s {LONG_S:g}"
    output = system.run(command, clone=system.clone(CPU), limit_s=3 * LONG_S).require()
    print(output)
    assert re.search(r"ok +parity\.llama", output)
    assert re.search(r"ok +kernels\.activation", output)
