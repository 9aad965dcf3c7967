"""What a build directory is made for, its key; and what else a configure in it depends on."""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from workspace.build.native import ninja
from workspace.build.native.project import Device
from workspace.core import files
from workspace.core.layout import Layout
from workspace.core.settings import Settings, is_secret
from workspace.environment import interpreter, toolchain
from workspace.environment.torch import TorchBuild
from workspace.source.pins import Pin

# setup.py's cmake_build_ext.configure.
BUILD_TYPE = "RelWithDebInfo"
KEY_DIGITS = 12
# Compilers read them, and nothing of it stands in a command that ninja could compare.
_READ_BY_COMPILERS = ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "CUDAHOSTCXX", "NVCC_CCBIN")
# cmake-env-variables(7): what becomes a variable of the first configure.
_READ_BY_CMAKE = (
    "CC",
    "CXX",
    "CUDACXX",
    "CFLAGS",
    "CXXFLAGS",
    "CUDAFLAGS",
    "CUDAARCHS",
    "LDFLAGS",
    "CMAKE_PREFIX_PATH",
    "VERBOSE",
    "DEEPGEMM_PYTHON_INTERPRETERS",
)
_READ_BY_TREE = re.compile(r"\$?ENV\{(\w+)\}")
# The tree's files put something before these for a helper that they run; overrides of external projects stand among the sources.
_NOT_ASKED = re.compile(r"PATH|HOME|PYTHONPATH|LD_LIBRARY_PATH|\w+_(SRC|ROOT)_DIR|FETCHCONTENT_\w+")


@dataclass(frozen=True)
class Inputs:
    """`place` is the checkout, `archs` and `cuda` are empty for the CPU. `configure` is not part of the key."""

    device: Device
    place: str
    pin: str
    archs: str
    torch: str
    cuda: str
    compiler: str
    build_type: str
    configure: Mapping[str, str]

    @property
    def key(self) -> str:
        text = json.dumps([self.device, self.place, self.pin, self.archs, self.torch, self.cuda, self.compiler, self.build_type])
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]

    @property
    def named(self) -> Mapping[str, str]:
        """Everything by name, as a record keeps it."""
        own = {name: str(getattr(self, name)) for name in ("device", "place", "pin", "archs", "torch", "cuda", "compiler")}
        return {**own, "build type": self.build_type, **self.configure}

    def differences(self, recorded: Mapping[str, str]) -> tuple[str, ...]:
        """Say what is otherwise than it was recorded by `named`: `torch 2.13.0 → 2.14.0`."""
        return files.differences(recorded, {**dict.fromkeys(recorded, ""), **self.named})


def observe(layout: Layout, settings: Settings, *, device: Device, pin: Pin, torch: TorchBuild) -> Inputs:
    """Look at what a build of the tree for `device` would be made with. It starts the compilers, and no Python."""
    environment = settings.child_environment("build")
    toolkit = toolchain.find_toolkit(settings) if device == "cuda" else None
    installed = interpreter.installed(layout)
    unseen = [f"{name}={environment[name]}" for name in _READ_BY_COMPILERS if environment.get(name)]
    compiler = f"{_compiler(environment)} {toolchain.compiler_version(settings) or 'none'}"
    configure = {
        "CMAKE_ARGS": settings.text("CMAKE_ARGS"),
        "CMake": installed.get("cmake", "on PATH"),
        "ninja": installed.get("ninja", "on PATH"),
        "Python": " ".join(str(folder) for folder in interpreter.site_packages(layout)),
        # The place of the ticket is that of the build directory, and so no input.
        "launchers": " ".join(f"{name}={word}" for name, word in ninja.launchers(settings, Path("ticket")).items()),
    }
    if device == "cuda":
        configure |= {"NVCC_THREADS": settings.text("NVCC_THREADS") or "1", "CUDA_HOME": str(toolkit.home) if toolkit else ""}
    named = {*_READ_BY_CMAKE, *(name for name in _asked_by(layout.vllm) if not _NOT_ASKED.fullmatch(name))}
    configure |= {name: environment[name] for name in sorted(named) if environment.get(name) and not is_secret(name)}
    return Inputs(
        device=device,
        place=str(layout.vllm),
        pin=f"{pin.tag} {pin.commit[:12]}",
        archs=settings.text("TORCH_CUDA_ARCH_LIST") if device == "cuda" else "",
        torch=torch.version,
        cuda=(toolkit.version if toolkit else "none") if device == "cuda" else "",
        compiler=" ".join([compiler, *unseen]),
        build_type=settings.text("CMAKE_BUILD_TYPE") or BUILD_TYPE,
        configure=configure,
    )


def folder(layout: Layout, inputs: Inputs) -> Path:
    """The build directory for these inputs; see Layout.builds."""
    return layout.builds / f"{inputs.device}-{inputs.key}"


def listfiles(tree: Path) -> tuple[Path, ...]:
    """CMakeLists.txt and everything below cmake/ of a tree: patches and scripts that a configure runs lie there too."""
    below = (Path(top) / name for top, _, names in os.walk(tree / "cmake") for name in names)
    return tuple(sorted(path for path in (tree / "CMakeLists.txt", *below) if path.is_file() and "__pycache__" not in path.parts))


def _compiler(environment: Mapping[str, str]) -> str:
    try:
        return Path(shlex.split(environment.get("CXX") or "g++")[0]).name
    except (ValueError, IndexError):
        return environment["CXX"]


def _asked_by(tree: Path) -> frozenset[str]:
    """The variables of the environment that the tree's CMake files ask for."""
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in listfiles(tree) if path.name == "CMakeLists.txt" or path.suffix == ".cmake")
    return frozenset(name for text in texts for name in _READ_BY_TREE.findall(text))
