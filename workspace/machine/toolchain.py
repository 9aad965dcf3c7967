"""The CUDA toolkit and the C++ compiler that a build would use. It only looks."""

import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.core import process
from workspace.core.errors import ToolchainError
from workspace.core.paths import Layout
from workspace.core.settings import Settings

USUAL_HOME = Path("/usr/local/cuda")
ANSWER_S = 20.0
_VERSION_LINE = re.compile(r"^(\d+(?:\.\d+)+)$", re.MULTILINE)
_RELEASE = re.compile(r"release (\d+\.\d+)")
# nvcc names its own home in a dry run, whatever script or link stands before it; the source need
# not exist.
_TOP = re.compile(r"^#\$ TOP=(.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit whose nvcc runs. `version` is major and minor, such as 13.0."""

    home: Path
    version: str
    nvcc: Path


def find_toolkit(settings: Settings) -> Toolkit | None:
    """Find the toolkit: CUDA_HOME and nothing else where it is set, then nvcc on PATH, then
    /usr/local/cuda.
    """
    if home := settings.path("CUDA_HOME"):
        return _toolkit(home / "bin" / "nvcc", settings, home=home)
    found = shutil.which("nvcc", path=settings.child_environment("plain").get("PATH", ""))
    return (_toolkit(Path(found), settings, home=None) if found else None) or _toolkit(
        USUAL_HOME / "bin" / "nvcc", settings, home=USUAL_HOME
    )


def compiler_version(settings: Settings) -> str | None:
    """Return the version of g++, or of what CXX names, such as 12.2.0; None where none answers."""
    environment = settings.child_environment("build")
    try:
        words = shlex.split(environment.get("CXX") or "g++")
    except ValueError:
        return None
    return _answer([*words, "-dumpfullversion"], settings, pattern=_VERSION_LINE)


def _toolkit(nvcc: Path, settings: Settings, *, home: Path | None) -> Toolkit | None:
    if not nvcc.is_file():
        return None
    version = _answer([str(nvcc), "--version"], settings, pattern=_RELEASE)
    if version is None:
        return None
    if home is None:
        top = _answer([str(nvcc), "--dryrun", "x.cu"], settings, pattern=_TOP)
        home = Path(top).resolve() if top else nvcc.resolve().parent.parent
    return (
        Toolkit(home, version, home / "bin" / "nvcc") if (home / "bin" / "nvcc").is_file() else None
    )


def _answer(words: list[str], settings: Settings, *, pattern: re.Pattern[str]) -> str | None:
    """Return what `pattern` finds in the program's answer, None where it does not run, fails or
    says something else.
    """
    try:
        done = process.capture(words, env=settings.child_environment("build"), timeout_s=ANSWER_S)
    except ToolchainError:
        return None
    found = pattern.search(done.stdout + done.stderr) if done.returncode == 0 else None
    return found[1].strip() if found else None


@dataclass(frozen=True)
class Cache:
    """A compiler cache: its kind and where it lies."""

    kind: Literal["ccache", "sccache"]
    program: Path


def find_cache(settings: Settings) -> Cache | None:
    """Return ccache where it is, else sccache, unless VLLM_DISABLE_SCCACHE says no; None where
    there is neither.

    vLLM's setup.py prefers sccache. That one compiles in a server of its own, where a build can
    neither measure a compiler nor put it last in line.
    """
    environment = settings.child_environment("build")
    if found := shutil.which("ccache", path=environment.get("PATH", "")):
        return Cache("ccache", Path(found))
    if is_cache_on(environment.get("VLLM_DISABLE_SCCACHE", "")):
        return None
    found = shutil.which("sccache", path=environment.get("PATH", ""))
    return Cache("sccache", Path(found)) if found else None


def cache_configuration(layout: Layout, settings: Settings) -> Mapping[str, str]:
    """Return what a build sets of ccache's own variables, the shell's before ours.

    Paths below the clone count from the build's folder, and the folder itself does not count: then
    another clone's objects are hits.
    """
    shell = settings.child_environment("build")
    wanted = {"CCACHE_BASEDIR": str(layout.root)}
    if "CCACHE_HASHDIR" not in shell:
        wanted["CCACHE_NOHASHDIR"] = "1"
    # Not the shell's to say: `nvcc -E` shows what the GPU's compiler reads. Without this an edit of
    # what only the host's compiler includes (#ifndef __CUDA_ARCH__) is a hit on the object from
    # before it; nvcc's own list of dependencies has both.
    return {name: shell.get(name, text) for name, text in wanted.items()} | {"CCACHE_DEPEND": "1"}


def is_cache_on(text: str) -> bool:
    """Whether a switch of the environment is on, as ccache and vLLM write it."""
    return text.strip().lower() in ("1", "true", "yes", "on")
