"""The platform is found when it is first asked for, from the letters in the installed version."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from vllm.platforms.interface import CpuPlatform, CudaPlatform, Platform, UnspecifiedPlatform

if TYPE_CHECKING:
    current_platform: Platform


def _find() -> Platform:
    installed = version("vllm")
    if "cpu" in installed:
        return CpuPlatform()
    return CudaPlatform() if "+cu" in installed else UnspecifiedPlatform()


def __getattr__(name: str) -> Any:
    if name == "current_platform":
        globals()[name] = _find()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
