"""The first .env: what this machine suggests, every other setting left to its default.

Written only where there is none; a user's file is never touched.
"""

from workspace.core.files import write_atomic
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.environment import machine, toolchain

KV_CACHE_SHARE = 1 / 6
# The architecture of a GB10 must carry its suffix: its own instructions are not in plain 12.1.
_ARCH_WITH_SUFFIX = {"12.1": "12.1a"}


def write(layout: Layout, settings: Settings, *, device: str) -> str:
    """Write `.env`, readable by its owner only, and return what was put into it as `NAME=value` pairs."""
    lines = suggest(machine.observe(settings), toolchain.find_toolkit(settings), device=device, archs=settings.text("TORCH_CUDA_ARCH_LIST"))
    head = "# Settings of this clone; .env.example explains every one. A variable in the shell goes before a line here.\n"
    write_atomic(layout.dotenv, (head + "".join(f"{name}={text}\n" for name, text in lines.items())).encode(), mode=0o600)
    return ", ".join(f"{name}={text}" for name, text in lines.items()) or "no line is needed here"


def suggest(host: machine.Machine, toolkit: toolchain.Toolkit | None, *, device: str, archs: str = "") -> dict[str, str]:
    """Decide the lines from what the machine has; `archs` is what this run was told to build for, where no GPU says it."""
    lines: dict[str, str] = {}
    if device == "cuda":
        if toolkit:
            lines["CUDA_HOME"] = str(toolkit.home)
        capabilities = sorted({gpu.capability for gpu in host.gpus if gpu.capability})
        if capabilities:
            lines["TORCH_CUDA_ARCH_LIST"] = ";".join(_ARCH_WITH_SUFFIX.get(capability, capability) for capability in capabilities)
        elif archs:
            lines["TORCH_CUDA_ARCH_LIST"] = archs
    if device == "cpu":
        lines["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, int(host.memory_gib * KV_CACHE_SHARE)))
    return lines
