"""An empty clone with a real uv, no network, and a folder of tiny wheels in place of an index."""

import io
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.small.wheels import write, write_torch
from workspace.core.console import Console, RunLog
from workspace.core.paths import Layout, here
from workspace.core.settings import Settings, load
from workspace.machine import gpu
from workspace.machine.machine import Machine

UV = shutil.which(
    "uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
)
# Without a version manager's shims: uv would start each of them.
SYSTEM_PATH = "/usr/bin:/bin"


@dataclass(frozen=True)
class House:
    """A clone, its folder of wheels and its folder of programs."""

    layout: Layout
    links: Path
    bin: Path

    def settings(self, **shell: str) -> Settings:
        """Return the settings in a shell of this house; `shell` adds variables."""
        base = {
            "PATH": f"{self.bin}{os.pathsep}{SYSTEM_PATH}",
            "HOME": str(self.layout.root.parent / "home"),
            "UV_CACHE_DIR": str(self.layout.root.parent / "uv-cache"),
            "UV_OFFLINE": "1",
            **self._no_nvml(),
            "UV_FIND_LINKS": str(self.links),
            "PIP_CONFIG_FILE": os.devnull,
        }
        return load(self.layout, environ=base | shell)

    def _no_nvml(self) -> Mapping[str, str]:
        """Return variables that hide the NVML of a machine with a GPU: the fake program answers."""
        if not gpu.is_library_there({}):
            return {}
        folder = self.layout.root.parent / "no-nvml"
        folder.mkdir(exist_ok=True)
        (folder / gpu.LIBRARY).write_text("not a library")
        return {"LD_LIBRARY_PATH": str(folder)}

    def machine(self, **shell: str) -> Machine:
        return Machine(self.layout, self.settings(**shell))

    def run_log(self, settings: Settings) -> RunLog:
        return RunLog(
            Console(out=io.StringIO(), err=io.StringIO()),
            self.layout.logs,
            verb="test",
            secrets=settings.secrets,
        )

    def log(self) -> str:
        return "".join(
            path.read_text(encoding="utf-8") for path in sorted(self.layout.logs.glob("*.log"))
        )

    def program(self, name: str, script: str, *, folder: Path | None = None) -> Path:
        """Write a shell script into `folder`, by default one on PATH."""
        path = (folder or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)
        return path

    def package(self, name: str, version: str, files: Mapping[str, str] | None = None) -> Path:
        """Make an installed package as far as its folders show it; return the packages' folder."""
        packages = self.layout.environment / "lib" / "python3.11" / "site-packages"
        info = f"{name}-{version}.dist-info"
        for path, text in {f"{info}/METADATA": "", **(files or {})}.items():
            (packages / path).parent.mkdir(parents=True, exist_ok=True)
            (packages / path).write_text(text)
        return packages

    def wheel(
        self,
        name: str,
        version: str,
        *,
        requires: tuple[str, ...] = (),
        files: Mapping[str, bytes] | None = None,
        folder: Path | None = None,
    ) -> Path:
        return write(
            folder or self.links,
            name,
            version,
            files or {f"{name.replace('-', '_')}/__init__.py": b""},
            requires=requires,
        )

    def torch(
        self,
        version: str,
        *,
        cuda: str | None = None,
        requires: tuple[str, ...] = (),
        folder: Path | None = None,
    ) -> Path:
        return write_torch(folder or self.links, version, cuda=cuda, requires=requires)


@pytest.fixture
def house(tmp_path: Path) -> House:
    layout = Layout(tmp_path / "clone with a blank")
    made = House(layout, tmp_path / "links", tmp_path / "bin")
    for folder in (
        layout.tools / "bin",
        made.links,
        made.bin,
        tmp_path / "home",
        layout.root / "workspace",
    ):
        folder.mkdir(parents=True)
    assert UV is not None, "uv is part of the tool environment"
    (layout.tools / "bin" / "uv").symlink_to(UV)
    layout.probes.symlink_to(here().probes)
    return made


@pytest.fixture
def built(house: House) -> Callable[[], Settings]:
    """Return a function that makes `.vllm` with the interpreter that runs the tests."""

    def make() -> Settings:
        from workspace.machine import interpreter

        settings = house.settings()
        choice = interpreter.Choice(
            Path(getattr(sys, "_base_executable", sys.executable)),
            ".".join(str(part) for part in sys.version_info[:3]),
        )
        with house.run_log(settings) as run_log:
            interpreter.create(house.layout, settings, choice, run_log=run_log)
        return settings

    return make
