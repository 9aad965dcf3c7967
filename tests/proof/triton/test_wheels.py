"""inv fix-triton on the real wheels of Triton 3.5.1, 3.6.0 and 3.7.1; no GPU is needed.

The wheels come from the package index of this machine.

The assemblers of each wheel show what it can assemble. Seeded faults are found and fixed: a stale
cache, a shadow, broken paths, another wheel.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small.materials import Materials
from tests.small.wheels import write
from tests.small.world import Ended, World, make_world
from workspace.core.paths import Layout

OLD, MIDDLE, NEW = "3.5.1", "3.6.0", "3.7.1"
NO_SM = "Value 'sm_121a' is not defined for option 'gpu-name'"
TOOLKIT = Path("/usr/local/cuda/bin/ptxas")
# The parts of torch that are used without a GPU.
TORCH = "from torch import cuda, version\n"


@pytest.fixture
def context(materials: Materials, tmp_path: Path) -> Iterator[World]:
    """A clone with an empty environment, and the package index of this machine."""
    made = make_world(materials, tmp_path)
    made.venv()
    for name in (
        "UV_DEFAULT_INDEX",
        "PIP_INDEX_URL",
        "TORCH_INDEX_URL",
        "PIP_CONFIG_FILE",
        "UV_NO_CONFIG",
        "UV_CACHE_DIR",
        "DEVICE",
    ):
        made.env.pop(name, None)
    made.env |= {
        name: text
        for name, text in os.environ.items()
        if name.startswith(("UV_", "PIP_", "SSL_")) or name.lower().endswith("_proxy")
    }
    made.env["UV_CACHE_DIR"] = os.environ.get("UV_CACHE_DIR") or str(Path.home() / ".cache" / "uv")
    made.env["TMPDIR"] = str(tmp_path)
    yield made
    made.end()


def install(world: World, version: str) -> None:
    argv = [
        world.materials.bin / "uv",
        "pip",
        "install",
        "--quiet",
        "--python",
        world.layout.environment_python,
        "--no-deps",
        f"triton=={version}",
    ]
    done = subprocess.run(argv, env=world.env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(
            f"the wheel of triton {version} cannot be had here: {done.stderr.strip()[-200:]}"
        )


def torch(world: World, folder: Path, *, cuda: str | None = None) -> None:
    """Install a torch for the CPU, or one that pairs with 3.7.1; neither finds a GPU."""
    version = "2.13.0" if cuda else "2.13.0+cpu"
    files = {
        "torch/__init__.py": TORCH.encode(),
        "torch/version.py": f"__version__ = {version!r}\ncuda = {cuda!r}\n".encode(),
        "torch/cuda.py": b"def is_available():\n    return False\n",
    }
    made = write(folder, "torch", version, files, requires=(f"triton=={NEW}",) if cuda else ())
    world.uv("install", "--no-deps", str(made))


def rows(ended: Ended) -> dict[str, str]:
    """Return the first row of each name: its state and its text."""
    found: dict[str, str] = {}
    for line in ended.output.splitlines():
        fields = line.split(None, 2)
        if len(fields) == 3 and fields[0] in ("ok", "warn", "FAIL"):
            found.setdefault(fields[1], f"{fields[0]} {fields[2]}")
    return found


@pytest.mark.parametrize(
    ("version", "used", "code"), [(OLD, "ptxas", 6), (MIDDLE, "ptxas-bw", 0), (NEW, "ptxas-bw", 0)]
)
def test_diagnosis_assembles_to_judge_a_wheel(
    context: World, tmp_path: Path, version: str, used: str, code: int
) -> None:
    install(context, version)
    torch(context, tmp_path)
    ended = context.run("fix-triton", "--check")
    assert ended.code == code, ended.output
    output = rows(ended)
    assert output["triton"] == f"ok {version} from an index; torch 2.13.0+cpu pairs with no Triton"
    if version == OLD:
        assert NO_SM in ended.output
        assert output["kernel"].startswith("FAIL")
    else:
        assert output[used].endswith("assembles sm_121a")
        assert output["kernel"].startswith("ok compiled for sm_121a, PTX ")
        assert "not run: torch is for the CPU" in output["kernel"]
    assert not context.layout.dotenv.exists(), "only looked at"


@pytest.mark.skipif(not TOOLKIT.exists(), reason="there is no CUDA toolkit at /usr/local/cuda")
def test_old_wheel_is_fixed_with_the_toolkits_assembler_by_one_line_of_dotenv(
    context: World,
) -> None:
    install(context, OLD)
    context.layout.dotenv.write_text("MAX_JOBS=2\n")
    ended = context.run("fix-triton")
    assert ended.code == 0, ended.output
    lines = context.layout.dotenv.read_text().splitlines()
    assert (lines[0], lines[2]) == ("MAX_JOBS=2", f"TRITON_PTXAS_PATH={TOOLKIT.resolve()}")
    assert f"  +{lines[2]}" in ended.err, "the difference was shown"
    assert context.run("fix-triton", "--check").code == 0


def test_newer_wheel_is_not_given_the_toolkits_older_assembler(
    context: World, tmp_path: Path
) -> None:
    install(context, NEW)
    context.layout.dotenv.write_text(f"TRITON_PTXAS_BLACKWELL_PATH={tmp_path / 'nowhere'}\n")
    assert "ignores it silently" in context.run("fix-triton", "--check").output
    ended = context.run("fix-triton")
    assert ended.code == 0, ended.output
    assert (
        f"# TRITON_PTXAS_BLACKWELL_PATH={tmp_path / 'nowhere'}\n"
        in context.layout.dotenv.read_text()
    )
    assert [
        line for line in context.layout.dotenv.read_text().splitlines() if not line.startswith("#")
    ] == []


def test_path_that_is_no_program_stops_a_kernel_and_is_taken_out_of_dotenv(
    context: World, tmp_path: Path
) -> None:
    install(context, NEW)
    (tmp_path / "ptxas").touch()
    context.layout.dotenv.write_text(f"export TRITON_PTXAS_BLACKWELL_PATH='{tmp_path / 'ptxas'}'\n")
    ended = context.run("fix-triton", "--check")
    assert "PermissionError" in ended.output
    assert "ptxas-bw, kernel" in ended.error(6)
    assert context.run("fix-triton").code == 0


def test_path_in_the_shell_is_for_the_person_to_change(context: World, tmp_path: Path) -> None:
    install(context, NEW)
    context.env["TRITON_PTXAS_BLACKWELL_PATH"] = str(tmp_path / "nowhere")
    ended = context.run("fix-triton")
    assert "is set in the shell, where only you can change it" in ended.error(6)
    assert "unset TRITON_PTXAS_BLACKWELL_PATH" in ended.err


def test_stale_cache_and_shadow_are_found_and_moved(context: World) -> None:
    install(context, MIDDLE)
    home = Path(context.env["HOME"])
    cache = home / ".triton" / "cache"
    argv = [context.layout.environment_python, Layout(context.root).probes / "triton_kernel.py"]
    output = subprocess.run(
        argv,
        env=context.env | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(output.stdout)["cubin_bytes"] > 0
    install(context, NEW)
    packages = next((context.layout.environment / "lib").glob("python3*/site-packages"))
    (packages / "triton_kernels").mkdir()
    (packages / "triton_kernels" / "__init__.py").write_text("raise ImportError('shadow')\n")
    ended = context.run("fix-triton", "--check")
    assert "shadows, caches" in ended.error(6)
    assert f"written by triton {MIDDLE}, and {NEW} is installed" in ended.output
    ended = context.run("fix-triton")
    assert ended.code == 0, ended.output
    assert not cache.exists()
    assert len(list(cache.parent.glob("cache.of-*/*/kernel.cubin"))) == 1
    assert not (packages / "triton_kernels").exists()
    assert (
        len(
            list(
                context.layout.quarantine.glob(
                    "*/.vllm/lib/python3*/site-packages/triton_kernels/__init__.py"
                )
            )
        )
        == 1
    )
    assert context.run("fix-triton", "--check").code == 0


def test_wheel_that_torch_does_not_pair_with_is_replaced_by_the_one_that_it_does(
    context: World, tmp_path: Path
) -> None:
    install(context, NEW)
    install(context, OLD)
    torch(context, tmp_path, cuda="13.0")
    ended = context.run("fix-triton", "--check")
    assert "torch requires another version" in ended.output
    ended = context.run("fix-triton")
    assert ended.code == 0, ended.output
    assert (
        f"triton{f'=={NEW}'}, which torch pairs with, from the package index, instead of {OLD}"
        in ended.err
    )
    assert (
        f"ok       triton        {NEW} from an index; torch 2.13.0 pairs with {NEW}"
        in context.run("status").out
    )
    assert not context.layout.dotenv.exists(), "no setting for an assembler that was removed"


def test_incomplete_wheel_beside_a_torch_for_the_cpu_is_reported_as_not_fixable(
    context: World,
) -> None:
    install(context, NEW)
    packages = next((context.layout.environment / "lib").glob("python3*/site-packages"))
    shutil.rmtree(packages / "triton" / "_C")
    ended = context.run("fix-triton")
    assert "kernel" in ended.error(6)
    assert "ImportError" in ended.err or "ModuleNotFoundError" in ended.err
