"""The processes of this machine: which is below which, what they hold, and how those of a compiler are ended."""

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from workspace.environment import machine

_PAGE_GIB = os.sysconf("SC_PAGE_SIZE") / machine.GIB


@dataclass(frozen=True)
class Process:
    """A process: its parent, its group, and the GiB that it holds (resident, shared pages included)."""

    parent: int
    group: int
    held_gib: float


def living() -> dict[int, Process]:
    """Return all processes that live, in one pass (proc_pid_stat(5))."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            # One that ends meanwhile is none.
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:
                state, parent, group, *rest = file.read().rpartition(b")")[2].split()
                if state not in (b"Z", b"X"):
                    found[int(entry)] = Process(int(parent), int(group), int(rest[18]) * _PAGE_GIB)
    return found


def parents(number: int) -> Iterator[int]:
    """Yield the parent of a process, its parent, and so on."""
    with contextlib.suppress(OSError):
        while number > 1:
            number = int(Path(f"/proc/{number}/stat").read_bytes().rpartition(b")")[2].split()[1])
            yield number


def below(roots: frozenset[int], known: Mapping[int, Process]) -> dict[int, set[int]]:
    """Return, for each of `roots`, the processes below it, without itself."""
    found: dict[int, set[int]] = {root: set() for root in roots}
    for number in known:
        path: list[int] = []
        at = number
        while at in known and at not in path:
            if at in roots:
                found[at].update(path)
            path.append(at)
            at = known[at].parent
    return found


def tell(roots: frozenset[int], groups: frozenset[int], number: signal.Signals) -> None:
    """Signal what lives below `roots`, and in `groups`, this process's own group aside."""
    known = living()
    told = {pid for pids in below(roots, known).values() for pid in pids}
    told |= {pid for pid, process in known.items() if process.group in groups - {0, os.getpgrp()}}
    for pid in told:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
