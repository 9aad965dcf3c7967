"""The machine: cores, memory and free disk, its page cache, and the private names that a shared
report must not contain.

A container's limits count where they are tighter than the machine's.
"""

import contextlib
import getpass
import os
import platform
import pwd
import re
import shlex
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from workspace.core import hints, process
from workspace.core.console import Console
from workspace.core.errors import ToolchainError
from workspace.core.files import read_regular
from workspace.core.known_settings import secrets_of
from workspace.core.paths import Layout
from workspace.core.process import Broken
from workspace.core.settings import Settings

if TYPE_CHECKING:
    from workspace.core.redaction import Private

Value = TypeVar("Value")
GIB = 1 << 30
_CGROUPS = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
# Numbers of Arm's own cores (MIDR_EL1.PartNum in each core's Technical Reference Manual); the two
# kinds of a GB10, and those of servers.
_ARM = "0x41"
_ARM_CORES = {
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
    "0xd85": "Cortex-X925",
    "0xd87": "Cortex-A725",
}
# The page cache, and the kernel's cache of names (proc_sys_vm(5)).
ASSIGNMENT = "vm.drop_caches=3"
PATIENCE_S = 120.0
# Root's own PATH (sudoers(5), secure_path), without /usr/local, into which staff may write.
ROOT_PATH = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")
_ASSIGNMENT = re.compile(
    r"^\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=[ \t]*(.*?)\s*$", re.MULTILINE
)
_URL_HOST = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]*://(?:[^\s/\"']*@)?([A-Za-z0-9_.-]+)|\b[\w.+-]+@([A-Za-z0-9.-]+):"
)
TAIL_BYTES = 2 << 20
_ADDRESS_LIKE = re.compile(r"\d+(\.\d+){3}")
# Share of the last 10 s in which some task waited for memory (PSI, `some avg10`): from this value
# on, start no compiler and no server again.
PRESSURE_PERCENT = 10.0
# Folders whose paths are not private.
_PUBLIC_FOLDERS = frozenset(("", "/tmp", "/var/tmp", "/dev/shm", "/run", "/home", "/usr"))


class Once(Generic[Value]):
    """A value that is observed on the first call and kept, also where threads call it."""

    def __init__(self, look: Callable[[], Value]) -> None:
        self._look = look
        self._lock = threading.Lock()
        self._seen: list[Value] = []

    def __call__(self) -> Value:
        with self._lock:
            if not self._seen:
                self._seen.append(self._look())
            return self._seen[0]


@dataclass(frozen=True)
class Host:
    """The machine as this process may use it, without its GPUs.

    `cores` are those that it may run on; `memory_gib` is the control group's limit where that is
    tighter.
    """

    architecture: str
    cores: int
    memory_gib: float
    available_gib: float


def observe() -> Host:
    """Return processor and memory of this machine, within the limits of the control group."""
    return Host(platform.machine(), len(os.sched_getaffinity(0)), *memory_gib())


def memory_gib() -> tuple[float, float]:
    """Return the memory in GiB, all of it and what is available now."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = float(memory.total), float(memory.available)
    for limit, used in memory_limits():
        total = min(total, limit)
        available = min(available, max(0.0, limit - used))
    return total / GIB, available / GIB


def whole_memory_gib() -> float:
    """Return the memory of the machine, whatever the control group allows."""
    import psutil

    return float(psutil.virtual_memory().total) / GIB


def free_gib(path: Path) -> float:
    """Return the GiB that this user may still write on the file system of `path`.

    Where the path does not exist, its nearest existing parent counts.
    """
    state = os.statvfs(existing(path))
    return state.f_bavail * state.f_frsize / GIB


def has_nvidia_module() -> bool:
    """Return whether the kernel has loaded NVIDIA's driver."""
    return (_PROC / "driver/nvidia/version").exists()


def existing(path: Path) -> Path:
    """Return the path itself, or its nearest parent that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def control_groups() -> Iterator[tuple[int, Path]]:
    """Yield the version (cgroups(7): 2, or 1 for memory) and folder of each control group around
    this process, the innermost first.
    """
    try:
        lines = (_PROC / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers in ("", "memory"):
            root = _CGROUPS / controllers
            group = root / place.strip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(root):
                    yield (1 if controllers else 2), folder


def pressure_percent() -> float:
    """Return the share of the last 10 s in which some task waited for memory; 0 if the kernel does
    not measure it.
    """
    found = _found(_PROC / "pressure" / "memory", r"^some avg10=([0-9.]+)")
    return float(found) if found else 0.0


def kills() -> int:
    """Return how many processes the kernel has killed because memory ran out: in this control group
    if counted there (cgroups(7)), else on the machine.
    """
    names = {1: "memory.oom_control", 2: "memory.events"}
    innermost = dict(reversed(list(control_groups())))
    counters = [innermost[version] / names[version] for version in (2, 1) if version in innermost]
    found = (_found(file, r"^oom_kill (\d+)$") for file in (*counters, _PROC / "vmstat"))
    return next((int(count) for count in found if count), 0)


def processor() -> tuple[str, frozenset[str]]:
    """Return the names of the processor's kinds of cores, as far as they are known, and its
    instruction sets.
    """
    text = _text(_PROC / "cpuinfo")
    sets = re.search(r"^(?:flags|Features)[^:]*:(.*)$", text, re.MULTILINE)
    return core_names(text) or platform.machine(), frozenset(sets[1].split() if sets else ())


def core_names(cpuinfo: str) -> str:
    """Return the kinds of cores in /proc/cpuinfo, such as `Cortex-X925, Cortex-A725`; empty where
    it names none.

    An Arm kernel prints numbers only; one without a name in the table keeps its own.
    """
    if names := re.findall(r"^(?:model name|Hardware)[^:]*:\s*(.+?)\s*$", cpuinfo, re.MULTILINE):
        return str(names[0])
    fields = re.findall(r"^CPU (?:implementer|part)\s*:\s*(0x\w+)\s*$", cpuinfo, re.MULTILINE)
    parts = dict.fromkeys(zip(fields[::2], fields[1::2], strict=False))
    return ", ".join(
        _ARM_CORES.get(part, f"part {part}") if maker == _ARM else f"{maker} {part}"
        for maker, part in parts
    )


def boot_id() -> str:
    """Return the id of the present boot of this machine."""
    return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def mapped_files(pid: int) -> Iterator[tuple[str, int]]:
    """Yield path and inode of each file that a process has mapped (proc_pid_maps(5)).

    psutil reads smaps, for which the kernel walks the pages of every mapping.
    """
    with (
        contextlib.suppress(OSError),
        (_PROC / str(pid) / "maps").open(encoding="utf-8", errors="replace") as file,
    ):
        for line in file:
            fields = line.rstrip("\n").split(None, 5)
            if len(fields) == 6:
                yield fields[5], int(fields[4])


def _found(path: Path, pattern: str) -> str | None:
    """Return what the group of a pattern finds in a file of the kernel; None without the file."""
    found = re.search(pattern, _text(path), re.MULTILINE)
    return found[1] if found else None


def _text(path: Path) -> str:
    """Return the text of a file of the kernel; empty without the file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def memory_limits() -> Iterator[tuple[float, float]]:
    """Yield limit and use, in bytes, of each control group around this process."""
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        2: ("memory.max", "memory.current"),
    }
    for version, folder in control_groups():
        yield from _limit(folder, *names[version])


def _limit(folder: Path, limit_name: str, used_name: str) -> Iterator[tuple[float, float]]:
    """Yield limit and use of a group. A limit counts although its use cannot be read."""
    limit, used = (_found(folder / name, r"^(\d+)$") for name in (limit_name, used_name))
    if limit:
        # The kernel frees the page cache of unused files when a program requests memory.
        cached = _found(folder / "memory.stat", r"^(?:total_)?inactive_file (\d+)$")
        yield float(limit), max(0.0, float(used or 0) - float(cached or 0))


def drop_caches(
    settings: Settings, *, console: Console, is_agreed: bool = False, is_root: bool | None = None
) -> None:
    """Write dirty pages to the disk, drop the page cache, and report how much memory that frees.

    Root is asked first unless `is_agreed`, and finds sysctl in ROOT_PATH only; sudo has such a path
    of its own. Raises ToolchainError where root does not agree, or this user may not; nothing is
    dropped then.
    """
    environment, argv = settings.child_environment("plain"), ["sysctl", "-w", ASSIGNMENT]
    if os.geteuid() == 0 if is_root is None else is_root:
        environment["PATH"] = os.pathsep.join(ROOT_PATH)
        harm = "every program of this machine then reads its files from the disk again"
        if not (is_agreed or console.is_confirmed(f"drop caches? {harm}")):
            message = f"nothing was dropped: {harm}, so root confirms it on a terminal or by --yes"
            raise ToolchainError(message, hint=hints.text("machine.drop_caches_yes"))
    else:
        argv = ["sudo", "-n", *argv]
    before = free_memory_gib(read_meminfo())
    # A dirty page cannot be dropped.
    os.sync()
    console.command(shlex.join(argv))
    answer = process.output_of(process.ask(argv, env=environment, limit_s=PATIENCE_S))
    if process.certain(answer, argv[0]) is None:
        why = answer.message if isinstance(answer, Broken) else f"there is no {argv[0]}"
        raise ToolchainError(
            f"the page cache was not dropped: {why}", hint=hints.text("machine.drop_as_root")
        )
    after = free_memory_gib(read_meminfo())
    freed = max(0.0, after - before)
    console.info(f"freed {freed:.1f} GiB: {after:.1f} GiB are free now, {before:.1f} before")


def read_meminfo() -> Mapping[str, int]:
    """Return the kernel's memory figures in KiB by name (proc_meminfo(5)).

    The mapping is empty where they cannot be read.
    """
    try:
        lines = (_PROC / "meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    rows = [line.split() for line in lines]
    return {row[0].rstrip(":"): int(row[1]) for row in rows if len(row) >= 2 and row[1].isdigit()}


def free_memory_gib(meminfo: Mapping[str, int]) -> float:
    """Return the free memory in GiB, without the page cache."""
    return meminfo.get("MemFree", 0) * 1024 / GIB


def droppable_gib(meminfo: Mapping[str, int]) -> float:
    """Return the page cache in GiB that a drop frees: not shared memory, not dirty pages."""
    held = (
        meminfo.get("Cached", 0)
        + meminfo.get("Buffers", 0)
        - meminfo.get("Shmem", 0)
        - meminfo.get("Dirty", 0)
    )
    return max(0, held + meminfo.get("SReclaimable", 0)) * 1024 / GIB


def private(layout: Layout, settings: Settings) -> "Private":
    """Return this machine's and this clone's private names, as far as their files contain them."""
    from workspace.core.redaction import Private
    from workspace.machine import interpreter

    shell = settings.shell
    home = Path(shell.get("HOME") or "/")
    gits = (layout.root / ".git", layout.vllm / ".git")
    configs = (home / ".gitconfig", layout.root / ".gitmodules", *(git / "config" for git in gits))
    files = (*configs, layout.dotenv, layout.pins)
    contents = (read_small(path).decode("utf-8", "replace") for path in files)
    configured = "\n".join([*shell.values(), *contents])
    users, homes = _account()
    users |= {home.name, *(shell.get(name, "") for name in ("USER", "LOGNAME", "SUDO_USER"))}
    homes |= {str(home), str(home.resolve())}
    versions = interpreter.installed(layout).values()
    return Private(
        secrets=_sorted({*_secrets(layout, settings), *secrets_of([("", configured)])}),
        users=_sorted(users),
        hosts=_sorted(_hosts(shell) | _url_hosts(configured)),
        places=_places(layout, settings, homes),
        versions=frozenset(text for text in versions if _ADDRESS_LIKE.fullmatch(text)),
    )


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(filter(None, names)))


def _secrets(layout: Layout, settings: Settings) -> set[str]:
    """Return the values of secret settings and variables, also of a broken .env."""
    return {*settings.secrets, *secrets_of(assignments(layout.dotenv))}


def _places(layout: Layout, settings: Settings, homes: set[str]) -> tuple[tuple[str, str], ...]:
    """Return the private folders, each with the label that replaces it."""
    shell, root = settings.shell, layout.root.resolve()
    clones = {str(layout.root), str(root)}
    # The root of the clone as the shell spells it, through a link say.
    if "PWD" in shell and Path(shell["PWD"]).resolve() == layout.root:
        clones.add(shell["PWD"])
    scratch = {shell.get(name, "") for name in ("TMPDIR", "TMP", "TEMP", "XDG_RUNTIME_DIR")}
    labels = ((clones, "<clone>"), (homes, "~"), (scratch, "<tmp>"))
    places = [(place, label) for found, label in labels for place in found]
    places.append((str(settings.cache), "<cache>"))
    return tuple(
        sorted(
            (place, label) for place, label in places if place.rstrip("/") not in _PUBLIC_FOLDERS
        )
    )


def _url_hosts(configured: str) -> set[str]:
    """Return the hosts in URLs that have a domain; others are masked by their place in the URL.

    A host without a dot, such as `mirror`, is an ordinary word elsewhere.
    """
    return {
        name
        for pair in _URL_HOST.findall(configured)
        for name in pair
        if "." in name and not _ADDRESS_LIKE.fullmatch(name)
    }


def _account() -> tuple[set[str], set[str]]:
    """Return the login names and homes that the system has for this user."""
    users, homes = set[str](), set[str]()
    with contextlib.suppress(OSError, KeyError):
        users.add(getpass.getuser())
    with contextlib.suppress(KeyError):
        entry = pwd.getpwuid(os.getuid())
        users.add(entry.pw_name)
        homes |= {entry.pw_dir, str(Path(entry.pw_dir).resolve())}
    return users, homes


def _hosts(shell: Mapping[str, str]) -> set[str]:
    """Return this machine's names, those of the kernel and the shell, with and without a domain."""
    named = (shell.get(name, "") for name in ("HOSTNAME", "HOST", "CONTAINER_NAME"))
    names = {platform.node(), *named}
    pairs = (name.partition(".") for name in names)
    return names | {part for host, _, domain in pairs if domain for part in (host, domain)}


def assignments(path: Path) -> list[tuple[str, str]]:
    """Return names and values of a dotenv file, as far as they can be read in a broken one."""
    text = read_small(path).decode("utf-8-sig", "replace")
    return [(name, value.strip("\"'")) for name, value in _ASSIGNMENT.findall(text)]


def read_small(path: Path) -> bytes:
    """Return a small file, empty bytes where it cannot be read."""
    try:
        return read_regular(path)
    except OSError:
        return b""


def tail_of(path: Path) -> str:
    """Return the end of a file, from the start of a line, or why it cannot be read.

    Half a token would not be recognized as a secret.
    """
    if path.exists() and not path.is_file():
        return "error: it cannot be read: not a regular file\n"
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            content = file.read(TAIL_BYTES)
    except OSError as exc:
        return f"error: it cannot be read: {exc.strerror}\n"
    if size <= TAIL_BYTES:
        return content.decode("utf-8", "replace")
    return f"... {size - TAIL_BYTES} bytes before this are left out\n" + content.partition(b"\n")[
        2
    ].decode("utf-8", "replace")
