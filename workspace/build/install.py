"""The editable install of the tree, with compiled libraries from a wheel or with none.

Through the tree's own setup.py, without build isolation and without resolving dependencies anew: torch stays what it is.
"""

import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from workspace.build.plan import Observation
from workspace.core.errors import BuildError
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.environment import interpreter

# No program of this name exists: setuptools-rust then reports the optional frontend as not built, at once and without a network.
_NO_CARGO = "/nonexistent/cargo"
_NINJA_PROGRESS = re.compile(r"^\[(\d+)/(\d+)\]")


def from_wheel(layout: Layout, settings: Settings, observed: Observation, wheel: Path, *, journal: Journal) -> None:
    """Install editable, the libraries taken out of `wheel`. Raises BuildError with the first error line."""
    extra = {"VLLM_USE_PRECOMPILED": "1", "VLLM_PRECOMPILED_WHEEL_LOCATION": str(wheel), "CARGO": _NO_CARGO}
    _install(layout, settings, observed, extra, journal=journal)


def alone(layout: Layout, settings: Settings, observed: Observation, *, build: Mapping[str, str], journal: Journal) -> None:
    """Install editable without any library: they are compiled, and put into the tree afterwards. `build` bounds cargo, which comes from here.

    The tree's setup.py would compile in a new temporary folder each time, unless it is told of a wheel; so it is given one with nothing in it.
    """
    # The frontend in Rust is optional: setuptools-rust leaves it out where there is no cargo.
    cargo = {} if shutil.which("cargo", path=settings.child_environment("build").get("PATH", "")) else {"CARGO": _NO_CARGO}
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as folder:
        wheel = Path(folder) / f"vllm-{observed.pin.version}-py3-none-any.whl"
        zipfile.ZipFile(wheel, "w").close()
        extra = {"VLLM_USE_PRECOMPILED": "1", "VLLM_PRECOMPILED_WHEEL_LOCATION": str(wheel), **build, **cargo}
        _install(layout, settings, observed, extra, journal=journal)


def _install(layout: Layout, settings: Settings, observed: Observation, extra: Mapping[str, str], *, journal: Journal) -> None:
    environment = {
        "VLLM_TARGET_DEVICE": observed.device,
        "VLLM_VERSION_OVERRIDE": observed.version,
        # Build tools of the environment, such as cmake and ninja, go before the machine's.
        "PATH": os.pathsep.join([str(layout.environment / "bin"), settings.child_environment("build").get("PATH", "")]),
        **extra,
    }
    # uv's cache of editable builds knows nothing of these variables: always build anew.
    arguments = ["--no-build-isolation", "--no-deps", "--reinstall-package", "vllm", "--refresh-package", "vllm", "--verbose", "--editable", str(layout.vllm)]

    def show(line: str) -> None:
        found = _NINJA_PROGRESS.match(line.strip().removeprefix("DEBUG ").strip())
        if found and journal.step:
            journal.step.progress(int(found[1]), int(found[2]), f"{found[1]} of {found[2]} steps")

    interpreter.install(layout, settings, arguments, journal=journal, phase_env=environment, on_line=show, failure=BuildError)
