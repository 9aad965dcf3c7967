"""What CMake says that it will build: targets, units, where their outcome goes. Read from its file API, never from its text for people."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Unit:
    """One source that a compiler turns into one object. `source` is relative to the tree where it lies below it, `object` to the build directory."""

    source: str
    object: str
    language: str


@dataclass(frozen=True)
class Target:
    """One target. `kind` is the file API's type; `recipe` tells alike two build directories that compile its units alike."""

    name: str
    kind: str
    units: tuple[Unit, ...]
    # Relative to the build directory.
    artifacts: tuple[str, ...]
    # Folders below the install prefix: vllm, vllm/vllm_flash_attn.
    installs: tuple[str, ...]
    # Relative to the tree where they lie below it.
    includes: tuple[str, ...]
    recipe: str
    depends: tuple[str, ...]


@dataclass(frozen=True)
class Project:
    """All targets, by name, and configure's own sentences `Not building …`."""

    targets: tuple[Target, ...]
    not_built: tuple[str, ...] = ()


@dataclass(frozen=True)
class Extension:
    """What the tree's setup.py would build: a CMake target, and whether a build without it is whole."""

    target: str
    is_optional: bool


def read(build: Path, tree: Path) -> Project | None:
    """Return the project that was configured in `build`, None where CMake's answer is not there or not whole."""
    return None


def extensions(tree: Path, device: Device) -> tuple[Extension, ...]:
    """Return what setup.py of `tree` lists for the device."""
    return ()
