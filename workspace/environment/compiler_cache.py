"""The compiler cache that a build takes, and how it must be set so that it hits in every clone and never hands out what is out of date."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.core.layout import Layout
from workspace.core.settings import Settings


@dataclass(frozen=True)
class Cache:
    """A compiler cache: its kind and where it lies."""

    kind: Literal["ccache", "sccache"]
    program: Path


def find(settings: Settings) -> Cache | None:
    """Return ccache where it is, else sccache, unless VLLM_DISABLE_SCCACHE says no; None where there is neither.

    vLLM's setup.py prefers sccache. That one compiles in a server of its own, where a build can neither measure a compiler nor put it last in line.
    """
    environment = settings.child_environment("build")
    if found := shutil.which("ccache", path=environment.get("PATH", "")):
        return Cache("ccache", Path(found))
    if is_on(environment.get("VLLM_DISABLE_SCCACHE", "")):
        return None
    found = shutil.which("sccache", path=environment.get("PATH", ""))
    return Cache("sccache", Path(found)) if found else None


def configuration(layout: Layout, settings: Settings) -> Mapping[str, str]:
    """Return what a build sets of ccache's own variables, the shell's before ours.

    Paths below the clone count from the build's folder, and the folder itself does not count: then another clone's objects are hits.
    """
    shell = settings.child_environment("build")
    wanted = {"CCACHE_BASEDIR": str(layout.root)}
    if "CCACHE_HASHDIR" not in shell:
        wanted["CCACHE_NOHASHDIR"] = "1"
    # Not the shell's to say: `nvcc -E` shows what the GPU's compiler reads. Without this an edit of what only the host's compiler includes
    # (#ifndef __CUDA_ARCH__) is a hit on the object from before it; nvcc's own list of dependencies has both.
    return {name: shell.get(name, text) for name, text in wanted.items()} | {"CCACHE_DEPEND": "1"}


def is_on(text: str) -> bool:
    """Whether a switch of the environment is on, as ccache and vLLM write it."""
    return text.strip().lower() in ("1", "true", "yes", "on")
