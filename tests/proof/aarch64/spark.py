"""What a DGX Spark would install, asked from a package index without one: the workspace's own uv
resolves for another platform and downloads metadata only.
"""

import os
import subprocess
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.core import settings as settings_module
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import interpreter, requirements
from workspace.repo import index, pins
from workspace.repo.index import Release
from workspace.repo.pins import PrecompiledWheel

LAYOUT = Layout(Path(__file__).resolve().parents[3])
LOCK = LAYOUT.root / "requirements" / "tools.txt"
MACHINE = "aarch64"
# DGX OS 7 is Ubuntu 24.04, which has glibc 2.39 and Python 3.12; uv installs 3.13 beside it.
PLATFORM = f"{MACHINE}-manylinux_2_39"
PYTHONS = ("3.12", "3.13")
LIMIT_S = 300.0


class Unresolvable(Exception):
    """A list has no set of wheels for a Spark; the message is uv's."""


@dataclass(frozen=True)
class Wheel:
    filename: str
    sha256: str
    size: int

    @property
    def fits(self) -> bool:
        """Whether the name has a platform of a Spark, or none."""
        platform = self.filename.removesuffix(".whl").rpartition("-")[2]
        return platform == "any" or MACHINE in platform


@dataclass(frozen=True)
class Package:
    """A package of a resolved list, with every wheel of it that a Spark may install."""

    name: str
    version: str
    wheels: tuple[Wheel, ...]


def own_settings() -> Settings:
    """Return the settings of this clone, with the index that its user has configured."""
    return settings_module.load(LAYOUT)


def resolve(
    lines: str, *, python: str, folder: Path, overrides: Sequence[str] = ()
) -> tuple[Package, ...]:
    """Resolve a list of requirements for a Spark with this minor version of Python, wheels only.

    Raises Unresolvable. The form of the answer is PEP 751's: it names each wheel and its hash.
    """
    settings, answer = own_settings(), folder / "pylock.toml"
    wanted, over = folder / "wanted.txt", folder / "overrides.txt"
    wanted.write_text(lines)
    over.write_text("\n".join(overrides))
    argv: list[str | Path] = [interpreter.uv(LAYOUT), "pip", "compile", "--quiet"]
    argv += ["--format", "pylock.toml", "--only-binary", ":all:", "--no-python-downloads"]
    argv += ["--python-platform", PLATFORM, "--python-version", python, "--overrides", over]
    index = ["--default-index", settings.index_url] if settings.index_url else []
    done = subprocess.run(
        [*argv, *index, "--output-file", answer, wanted],
        env=settings.child_environment("plain"),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    if done.returncode != 0:
        raise Unresolvable(done.stderr.strip())
    return tuple(
        Package(
            package["name"],
            package["version"],
            tuple(
                Wheel(wheel["url"].rpartition("/")[2], wheel["hashes"]["sha256"], wheel["size"])
                for wheel in package.get("wheels", ())
            ),
        )
        for package in tomllib.loads(answer.read_text())["packages"]
    )


def closure(
    device: str, *, python: str, folder: Path, tree: Path = LAYOUT.vllm
) -> tuple[Package, ...]:
    """Resolve everything that bootstrap installs for a device (cuda or cpu) and a tree of vLLM.

    Raises Unresolvable, and BuildError where the tree's requirements cannot be read. The CPU build
    of torch is on PyTorch's own index only: the public version stands for it.
    """
    found = requirements.read(
        tree,
        device=device,
        machine=MACHINE,
        python_version=f"{python}.0",
        use_existing_torch=False,
        settings=own_settings(),
    )
    torch = found.torch.partition("+")[0]
    companions = found.companions if device == "cuda" else ()
    lines = (*found.build, *found.runtime, *found.accelerators, torch, *companions)
    return resolve("\n".join(lines), python=python, folder=folder, overrides=found.overrides)


def precompiled_wheels() -> dict[str, PrecompiledWheel]:
    """Return the precompiled wheels that the pin names for a Spark, by device."""
    named = pins.load(LAYOUT.pins).vllm.precompiled
    return {
        key.partition("-")[0]: wheel for key, wheel in named.items() if key.endswith(f"-{MACHINE}")
    }


def target_of_bump() -> Release:
    """Return the release that $TARGET names, else the one after the pinned, else the pinned."""
    pin, settings = pins.load(LAYOUT.pins).vllm, own_settings()
    newer = index.newer_releases(pin, settings=settings)
    version = os.environ.get("TARGET") or (newer[0].version if newer else pin.version)
    return index.find_release(pin, version, settings=settings)


def unpack_requirements(release: Release, folder: Path) -> Path:
    """Fetch the archive of a release of vLLM, and unpack the files that name its requirements."""
    assert release.sdist is not None, release.lacking
    sdist = release.sdist
    archive = index.fetch("vllm", sdist.filename, sdist.sha256, settings=own_settings())
    tree = folder / sdist.filename.removesuffix(".tar.gz")
    names = [f"{tree.name}/{name}" for name in ("pyproject.toml", "requirements")]
    subprocess.run(["tar", "-xzf", archive, "--no-same-owner", "-C", folder, *names], check=True)
    return tree
