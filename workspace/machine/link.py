"""The fast link between two nodes, as this machine has it: interface, RDMA, limits, firewall; and
releases of kernel and driver that are reported to break it (known_faults.toml).
"""

import os
import re
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.core import files, hints, process, records
from workspace.core.console import Row, State
from workspace.core.paths import user_name
from workspace.core.process import There
from workspace.machine.machine import PATIENCE_S

_FAULTS = Path(__file__).with_name("known_faults.toml")
# A ConnectX-7 port of a Spark has 200 Gb/s; below 100 the cable, or the interface, is another one.
SLOW_MBPS = 100_000
# systemd's compiled-in SYS_UID_MAX: logind keeps the IPC of system users (logind.conf(5)).
SYSTEM_UID = 999
UNLIMITED = -1
_SOCKETS = "NCCL then goes over TCP sockets"


@dataclass(frozen=True)
class Link:
    """A node's end of the fast link, and the limits of a program that uses it.

    `rdma` are the RDMA devices of the interface whose port is active, `idle_rdma` the others.
    `lacks` is what NCCL would not find or may not open. `firewall` is empty without one.
    """

    interface: str
    state: Literal["up", "down", "missing"]
    speed_mbps: int | None
    mtu: int | None
    addresses: tuple[str, ...]
    is_default_route: bool
    rdma: tuple[str, ...]
    idle_rdma: tuple[str, ...]
    lacks: str
    memlock_bytes: int
    firewall: str
    keeps_ipc: bool


@dataclass(frozen=True)
class Fault:
    """A release that is reported to break, and where it is reported."""

    component: Literal["kernel", "driver"]
    match: str
    text: str
    works: str
    source: str


@dataclass(frozen=True)
class _Faults:
    fault: tuple[Fault, ...]


@dataclass(frozen=True)
class _Address:
    local: str = ""


@dataclass(frozen=True)
class _Interface:
    """What is read here of `ip -json`: of an interface, or of a route."""

    addr_info: tuple[_Address, ...] = ()
    dev: str = ""


def observe(interface: str, environment: Mapping[str, str], root: Path = Path("/")) -> Link:
    """Return the state of an interface of this machine; `root` is where sys, dev and etc are."""
    folder = root / "sys/class/net" / interface
    state: Literal["up", "down", "missing"] = "missing"
    if folder.exists():
        # A veth or a tunnel reports `unknown` and has a carrier.
        state = "up" if _text(folder / "carrier") == "1" else "down"
    devices = sorted(folder.glob("device/infiniband/*"))
    active = [each for each in devices if "ACTIVE" in _text(each / "ports/1/state")]
    addresses = _ip(["address", "show", "dev", interface], environment)
    routes = _ip(["route", "show", "default"], environment)
    return Link(
        interface,
        state,
        _number(folder / "speed"),
        _number(folder / "mtu"),
        tuple(each.local for found in addresses for each in found.addr_info),
        any(route.dev == interface for route in routes),
        tuple(each.name for each in active),
        tuple(each.name for each in devices if each not in active),
        _lacking(root, active),
        resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        _firewall(root),
        _keeps_ipc(root),
    )


def _ip(arguments: list[str], environment: Mapping[str, str]) -> tuple[_Interface, ...]:
    argv = ["ip", "-json", *arguments]
    answer = process.output_of(process.ask(argv, env=environment, limit_s=PATIENCE_S))
    if not isinstance(answer, There) or not answer.value.strip():
        return ()
    return records.decode(answer.value, tuple[_Interface, ...])


def _text(path: Path) -> str:
    """Return a small file; empty where it is not there or, as `speed` of a link down, not read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() and int(text) else None


def _lacking(root: Path, devices: list[Path]) -> str:
    """Return what keeps NCCL from the devices: it loads libibverbs and opens a node in /dev."""
    if not devices:
        return ""
    if not any(root.glob("usr/lib*/**/libibverbs.so.1")):
        return "libibverbs.so.1"
    for device in devices:
        for verbs in sorted(device.glob("device/infiniband_verbs/*")):
            if not os.access(root / "dev/infiniband" / verbs.name, os.R_OK | os.W_OK):
                return f"rights on /dev/infiniband/{verbs.name}"
    return ""


def _firewall(root: Path) -> str:
    if re.search(r"^ENABLED=yes", _text(root / "etc/ufw/ufw.conf"), re.MULTILINE):
        return "ufw"
    return "firewalld" if (root / "run/firewalld").exists() else ""


def _keeps_ipc(root: Path) -> bool:
    """Return whether semaphores of this user outlive the end of an ssh session (logind.conf(5))."""
    if not (root / "run/systemd/system").is_dir() or os.getuid() <= SYSTEM_UID:
        return True
    lingers = (root / "var/lib/systemd/linger" / user_name(os.getuid())).exists()
    configured = [_text(path) for path in sorted(root.glob("etc/systemd/logind.conf*"))]
    return lingers or any(re.search(r"^RemoveIPC=no", each, re.MULTILINE) for each in configured)


def rows(link: Link, address: str) -> Iterator[Row]:
    """Yield the doctor's rows of a node's end of the link, whose address is `address`."""
    yield _interface(link, address)
    yield _rdma(link)
    yield _memlock(link)
    yield _firewall_row(link)
    if not link.keeps_ipc:
        yield Row(
            State.WARN,
            "sessions",
            "logind deletes this user's semaphores when the last session ends (RemoveIPC)",
            "workers that were started over ssh then hang (eugr/spark-vllm-docker#352)",
            hints.text("machine.linger"),
        )


def _interface(link: Link, address: str) -> Row:
    speed = f"{link.speed_mbps / 1000:g} Gb/s" if link.speed_mbps else "speed unknown"
    text = f"{link.interface} {link.state}, {speed}, MTU {link.mtu or 'unknown'}"
    hint = hints.text("machine.list_links")
    if link.state != "up":
        why = "there is no such interface" if link.state == "missing" else "the cable or the port"
        return Row(State.FAIL, "link", text, why, hint)
    if address not in link.addresses:
        why = f"it has {', '.join(link.addresses) or 'none'}"
        hint = hints.text("machine.add_address", address=address, interface=link.interface)
        return Row(State.FAIL, "link", f"{text}; it does not have the address {address}", why, hint)
    if link.is_default_route:
        why = "one interface for both roles: the model's traffic and all other share it"
        return Row(State.WARN, "link", f"{text}; it carries the default route, too", why, hint)
    if link.speed_mbps and link.speed_mbps < SLOW_MBPS:
        why = "a Spark's ConnectX-7 port has 200 Gb/s: is this the interface of that cable?"
        return Row(State.WARN, "link", text, why, hint)
    return Row(State.OK, "link", text)


def _rdma(link: Link) -> Row:
    if link.lacks:
        text = f"{', '.join(link.rdma)}; NCCL lacks {link.lacks}"
        is_library = link.lacks.startswith("lib")
        hint = hints.text("machine.apt_verbs") if is_library else hints.text("machine.verbs_rights")
        return Row(State.WARN, "rdma", text, _SOCKETS, hint)
    if link.rdma:
        return Row(State.OK, "rdma", ", ".join(link.rdma))
    idle = f"the port of {', '.join(link.idle_rdma)} is not active"
    text = idle if link.idle_rdma else f"{link.interface} has no RDMA device"
    return Row(State.WARN, "rdma", text, _SOCKETS, hints.text("machine.rdma_links"))


def _memlock(link: Link) -> Row:
    if link.memlock_bytes == UNLIMITED:
        return Row(State.OK, "memlock", "unlimited")
    text = f"{link.memlock_bytes / (1 << 20):g} MiB"
    if not link.rdma:
        return Row(State.OK, "memlock", text)
    why = "RDMA locks the memory that it sends from: NCCL fails with ENOMEM"
    return Row(State.WARN, "memlock", text, why, hints.text("machine.memlock"))


def _firewall_row(link: Link) -> Row:
    if not link.firewall:
        return Row(State.OK, "firewall", "neither ufw nor firewalld is on")
    hint = (
        hints.text("machine.ufw_allow", interface=link.interface)
        if link.firewall == "ufw"
        else hints.text("machine.firewalld_allow", interface=link.interface)
    )
    why = "the nodes of one model talk on ports that the system chooses"
    return Row(State.WARN, "firewall", f"{link.firewall} is on", why, hint)


def faults() -> tuple[Fault, ...]:
    """Return the table of releases that are reported to break."""
    document = records.parse_toml(files.read_regular(_FAULTS))
    return records.convert(document, _Faults).fault


def fault_rows(driver: str | None, kernel: str) -> Iterator[Row]:
    """Yield a row for kernel and driver, where they are reported to break two nodes."""
    for component, release in (("kernel", kernel), ("driver", driver or "")):
        for fault in faults():
            if fault.component == component and re.match(fault.match, release):
                text = f"{release}: {fault.text}; {fault.works} works"
                hint = (
                    hints.text("machine.list_kernels")
                    if component == "kernel"
                    else hints.text("machine.nvidia_smi")
                )
                yield Row(State.WARN, component, text, f"reported in {fault.source}", hint)
