"""inv fix-triton on small Tritons in a real environment: faults that show after another fix."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.machine.conftest import House, built, house
from workspace.core.console import Console
from workspace.core.errors import ToolchainError, WorkspaceError
from workspace.core.settings import Settings
from workspace.install import triton_fix
from workspace.machine import hardware, interpreter

__all__ = ["built", "house"]

# As much of Triton as probes/triton_kernel.py needs.
INIT = """
import os
from types import SimpleNamespace
from triton import knobs
__version__ = "{version}"
{more}
def jit(kernel):
    return kernel
def compile(source, target):
    ptx = f".version 8.8\\n.target sm_{{target.arch}}a\\n"
    return SimpleNamespace(asm=dict(ptx=ptx, cubin=b"ELF"))
"""
KNOBS = """
from types import SimpleNamespace
nvidia = SimpleNamespace(
    ptxas=SimpleNamespace(path="ptxas"), ptxas_blackwell=SimpleNamespace(path="ptxas-blackwell")
)
"""
# As another clone on this machine would do, which has other Tritons.
REFILLED = """
import json, pathlib
cache = pathlib.Path(os.environ["HOME"], ".triton", "cache", "key")
count = len(list(cache.parent.parent.glob("cache.of-*")))
cache.mkdir(parents=True, exist_ok=True)
metadata = dict(triton_version=f"3.0.{count}", target=dict(backend="cuda", arch=121))
(cache / "kernel.json").write_text(json.dumps(metadata))
"""


def wheel(house: House, version: str, more: str = "") -> None:
    files = {
        "__init__.py": INIT.format(version=version, more=more),
        "knobs.py": KNOBS,
        "language.py": "",
        "backends/__init__.py": "",
        "backends/compiler.py": "class GPUTarget:\n    def __init__(self, _, arch, __):\n"
        "        self.arch = arch\n",
        "compiler/__init__.py": "def ASTSource(*_, **__): ...\n",
    }
    house.wheel(
        "triton", version, files={f"triton/{name}": text.encode() for name, text in files.items()}
    )


def install(house: House, settings: Settings, *packages: str) -> None:
    with house.run_log(settings) as run_log:
        interpreter.install(house.layout, settings, ["--no-deps", *packages], run_log=run_log)


def fix(house: House, settings: Settings, errors: io.StringIO) -> None:
    triton_fix.run(
        house.layout,
        settings,
        triton_fix.FixOptions(),
        console=Console(out=io.StringIO(), err=errors),
        provide=lambda: None,
    )


def fill(cache: Path, version: str) -> None:
    (cache / "key").mkdir(parents=True)
    metadata = {"triton_version": version, "target": {"backend": "cuda", "arch": 121}}
    (cache / "key" / "kernel.json").write_text(json.dumps(metadata))


@pytest.fixture
def cache(house: House) -> Path:
    return house.layout.root.parent / "home" / ".triton" / "cache"


def test_cache_of_a_wrong_triton_is_renamed_in_the_run_that_replaces_the_triton(
    house: House, built: Callable[[], Settings], cache: Path
) -> None:
    settings, errors = built(), io.StringIO()
    wheel(house, "3.6.0")
    wheel(house, "3.7.1")
    house.torch("2.13.0+cu130", cuda="13.0", requires=("triton==3.7.1",))
    install(house, settings, "torch", "triton==3.6.0")
    fill(cache, "3.6.0")
    fix(house, settings, errors)
    assert "Triton has no fault" in errors.getvalue()
    assert interpreter.installed(house.layout)["triton"] == "3.7.1"
    assert len(list(cache.parent.glob("cache.of-*/key/kernel.json"))) == 1
    assert not cache.exists()


@pytest.mark.parametrize(("device", "following"), [("cpu", "nox -s smoke"), ("cuda", "inv status")])
def test_next_command_is_no_smoke_where_the_build_needs_a_gpu_that_is_not_here(
    house: House,
    built: Callable[[], Settings],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    following: str,
) -> None:
    built()
    monkeypatch.setattr(hardware, "has_nvidia_module", lambda: False)
    settings, errors = house.settings(DEVICE=device), io.StringIO()
    wheel(house, "3.7.1")
    house.torch("2.13.0+cu130", cuda="13.0", requires=("triton==3.7.1",))
    install(house, settings, "torch", "triton==3.7.1")
    fix(house, settings, errors)
    assert errors.getvalue().endswith(f"Triton has no fault\nhint: ./scripts/{following}\n")


def test_rounds_end_where_another_program_fills_the_cache_each_time(
    house: House, built: Callable[[], Settings], cache: Path
) -> None:
    settings, errors = built(), io.StringIO()
    wheel(house, "3.7.1", REFILLED)
    house.torch("2.13.0+cpu")
    install(house, settings, "torch", "triton==3.7.1")
    with pytest.raises(ToolchainError, match="Triton has faults: caches"):
        fix(house, settings, errors)
    assert f"faults remain after {triton_fix.ROUNDS} rounds of fixes" in errors.getvalue()
    assert len(list(cache.parent.glob("cache.of-*"))) == triton_fix.ROUNDS


def test_wheel_that_does_not_help_is_installed_once(
    house: House, built: Callable[[], Settings]
) -> None:
    settings, errors = built(), io.StringIO()
    wheel(house, "3.7.1", "raise ImportError('no libtriton')")
    house.torch("2.13.0+cu130", cuda="13.0", requires=("triton==3.7.1",))
    install(house, settings, "torch", "triton==3.7.1")
    # The build from source, which follows, has no sources here.
    with pytest.raises(WorkspaceError):
        fix(house, settings, errors)
    assert errors.getvalue().count("wheel: install triton==3.7.1") == 1
    assert "no cheaper fix has helped" in errors.getvalue()
