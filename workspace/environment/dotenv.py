"""The first .env: what this machine suggests, every other setting left to its default. And single lines of it, changed before the user's eyes.

The whole is written only where there is none. Of a user's file no line is lost: one that is changed stays as a remark.
"""

import difflib
import re
import shlex
from collections.abc import Mapping

from workspace.core.files import read_regular, write_atomic
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.environment import machine, toolchain

KV_CACHE_SHARE = 1 / 6
# The architecture of a GB10 must carry its suffix: its own instructions are not in plain 12.1.
_ARCH_WITH_SUFFIX = {"12.1": "12.1a"}
_PLAIN = re.compile(r"[\w/.,:;+@%=-]*")


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


def changed(text: str, changes: Mapping[str, str | None], *, why: str) -> str:
    """Return the text of a .env with other values; None takes a name out. A line that no longer counts becomes a remark, with `why` above it."""
    lines = [f"{line}\n" for line in text.splitlines()]
    for name, value in changes.items():
        own = re.compile(rf"\s*(export\s+)?{re.escape(name)}\s*=")
        after: list[str] = []
        at = 0
        for line in lines:
            is_own = own.match(line) is not None
            after += [f"# {why}\n"] if is_own and not at else []
            after.append(f"# {line}" if is_own else line)
            at = len(after) if is_own else at
        if value is not None:
            after += [] if at else [f"# {why}\n"]
            after.insert(at or len(after), f"{name}={value if _PLAIN.fullmatch(value) else shlex.quote(value)}\n")
        lines = after
    return "".join(lines)


def change(layout: Layout, changes: Mapping[str, str | None], *, why: str) -> tuple[str, ...]:
    """Write `changed` and return the difference, line by line as diff(1) shows it. Raises OSError where .env cannot be written."""
    try:
        before, mode = read_regular(layout.dotenv).decode(), layout.dotenv.stat().st_mode & 0o777
    except FileNotFoundError:
        before, mode = "", 0o600
    after = changed(before, changes, why=why)
    # Through a link: the file that it leads to is the user's.
    write_atomic(layout.dotenv.resolve(), after.encode(), mode=mode)
    return tuple(difflib.unified_diff(before.splitlines(), after.splitlines(), ".env", ".env", n=0, lineterm=""))
