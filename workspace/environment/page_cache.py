"""`inv drop-caches`: give the page cache back before a large load. On unified memory CUDA does not count on what the kernel could give back."""

import os
import pwd
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from workspace.core import process
from workspace.core.console import Console
from workspace.core.errors import ToolchainError
from workspace.core.settings import Settings

GIB = 1 << 30
MEMINFO = Path("/proc/meminfo")
# Page cache, and the kernel's own of names (proc_sys_vm(5)).
ASSIGNMENT = "vm.drop_caches=3"
PATIENCE_S = 120.0
USUAL_SYSCTL = "/usr/sbin/sysctl"
SUDOERS = "/etc/sudoers.d/vllm-workspace"


def drop(settings: Settings, *, console: Console, is_root: bool | None = None) -> None:
    """Write what is dirty to the disk, drop the page cache, say how much came back. Raises ToolchainError where this user may not; nothing is changed then."""
    environment = settings.child_environment("plain")
    sysctl = shutil.which("sysctl", path=os.pathsep.join([environment.get("PATH", ""), "/usr/sbin", "/sbin"])) or USUAL_SYSCTL
    argv = command(sysctl, is_root=os.geteuid() == 0 if is_root is None else is_root)
    before = free_gib(read())
    if argv[0] == "sudo" and not _may(argv, environment):
        raise _refused(sysctl, "sudo does not allow it without asking")
    # What is not written yet cannot be dropped.
    os.sync()
    console.command(shlex.join(argv))
    done = process.capture(argv, env=environment, timeout_s=PATIENCE_S)
    if done.returncode != 0:
        raise _refused(sysctl, (done.stderr.strip().splitlines() or [process.describe_status(done.returncode)])[-1])
    after = free_gib(read())
    console.say(f"{max(0.0, after - before):.1f} GiB came back: {after:.1f} GiB are free, {before:.1f} were")


def command(sysctl: str, *, is_root: bool) -> list[str]:
    """What is run: the very words that the line in sudoers allows."""
    words = [sysctl, "-w", ASSIGNMENT]
    return words if is_root else ["sudo", "-n", *words]


def sudoers_line(user: str, sysctl: str) -> str:
    """The narrow right that is needed (sudoers(5)): this user, this one command, nothing else."""
    return f"{user} ALL=(root) NOPASSWD: {sysctl} -w {ASSIGNMENT.replace('=', chr(92) + '=')}"


def read() -> Mapping[str, int]:
    """The kernel's figures of memory in KiB by name (proc_meminfo(5)); none where they cannot be read."""
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines]
    return {word[0].rstrip(":"): int(word[1]) for word in words if len(word) >= 2 and word[1].isdigit()}


def free_gib(meminfo: Mapping[str, int]) -> float:
    return meminfo.get("MemFree", 0) * 1024 / GIB


def droppable_gib(meminfo: Mapping[str, int]) -> float:
    """Page cache that would come back: what is neither shared memory nor still to be written."""
    held = meminfo.get("Cached", 0) + meminfo.get("Buffers", 0) - meminfo.get("Shmem", 0) - meminfo.get("Dirty", 0)
    return max(0, held + meminfo.get("SReclaimable", 0)) * 1024 / GIB


def _may(argv: list[str], environment: Mapping[str, str]) -> bool:
    """Whether sudo would run it without asking; `-l` asks and runs nothing."""
    try:
        return process.capture(["sudo", "-n", "-l", *argv[2:]], env=environment, timeout_s=PATIENCE_S).returncode == 0
    except ToolchainError:
        return False


def _refused(sysctl: str, why: str) -> ToolchainError:
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = f"#{os.getuid()}"
    line = sudoers_line(user, sysctl)
    hint = f"echo {shlex.quote(line)} | sudo tee {SUDOERS} && sudo chmod 440 {SUDOERS} && sudo visudo -cf {SUDOERS}"
    return ToolchainError(f"the page cache was not dropped: {why}", hint=hint, details=(f"the one right that is needed, in {SUDOERS}:", line))
