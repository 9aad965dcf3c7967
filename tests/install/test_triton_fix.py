"""inv fix-triton on small Tritons in a real environment: faults that show after another fix."""

import io
from collections.abc import Callable

import pytest

from tests.machine.conftest import House, built, house
from workspace.core.console import Console
from workspace.core.errors import WorkspaceError
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
