"""Stack dumps of processes that hang, from py-spy if it works, else from Python's faulthandler.

On many machines a debugger may not inspect a process that it did not start (Yama, ptrace_scope 1).
faulthandler always works: each process writes its own stacks when a fatal signal ends it.
"""

import contextlib
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from workspace.core import process
from workspace.core.errors import ToolchainError
from workspace.server import process_tree

# Seconds that one process may take to write its stacks.
DUMP_S = 5.0
# Most lines of stacks in a record; the log has all of them.
KEPT_LINES = 120
_BEGINS = re.compile(r"(Fatal Python error: .*|Timeout \(\d+:\d\d:\d\d.*\)!)$")
_CONTINUES = re.compile(
    r'  File ".*", line \d+ in |  <no Python frame>|  \.\.\.$|(?:Current t|T)hread 0x[0-9a-f]+|\s*$'
)
_ENDS = "Extension modules: "


class Watch:
    """Context manager that dumps and ends the processes if the block takes longer than `limit_s`.

    `find` returns their process ids; `environment` has the PATH on which py-spy may be. `has_fired`
    is true once the limit was reached; `seen` is py-spy's output.
    """

    def __init__(
        self, limit_s: float, find: Callable[[], set[int]], *, environment: Mapping[str, str]
    ) -> None:
        self._find, self._environment = find, environment
        self._timer = threading.Timer(limit_s, self._fire)
        self._timer.daemon = True
        self.has_fired = False
        self.seen: tuple[str, ...] = ()

    def __enter__(self) -> "Watch":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._timer.join()

    def stacks(self, text: str) -> tuple[str, ...]:
        """Return the stacks: py-spy's output, else those that the processes wrote to `text`."""
        return self.seen or read_stacks(text)

    def _fire(self) -> None:
        self.has_fired = True
        self.seen = dump_with_py_spy(self._find(), environment=self._environment)
        end_with_stacks(self._find)


def dump_with_py_spy(pids: Iterable[int], *, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return py-spy's dump, an engine before its front-end; empty if py-spy is missing or fails."""
    lines: list[str] = []
    for pid in sorted(pids, reverse=True):
        try:
            done = process.capture(
                ["py-spy", "dump", "--pid", str(pid)], env=environment, timeout_s=DUMP_S
            )
        except ToolchainError:
            return ()
        if done.returncode != 0:
            return ()
        lines += [line.rstrip() for line in done.stdout.splitlines() if line.strip()]
    return tuple(lines)


def end_with_stacks(find: Callable[[], set[int]]) -> None:
    """Freeze all processes, so that none reacts to another's end; then let each dump and die.

    The process that started last goes first.
    """
    known = process_tree.living()
    pids = sorted(find() & known.keys(), key=lambda pid: known[pid].started, reverse=True)
    for pid in pids:
        with contextlib.suppress(OSError):
            # Without a core dump, which could have several GiB.
            resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
            os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        deadline = time.monotonic() + DUMP_S
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGABRT)
            os.kill(pid, signal.SIGCONT)
            while process_tree.started_at(pid) == known[pid].started:
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                    break
                time.sleep(process_tree.POLL_S)


def read_stacks(text: str) -> tuple[str, ...]:
    """Return the stacks that faulthandler wrote, from a text that also has other lines."""
    found: list[str] = []
    is_inside = False
    for line in text.splitlines():
        if match := _BEGINS.search(line):
            is_inside = True
            found.append(match.group())
        elif is_inside and _CONTINUES.match(line):
            found += [line.rstrip()] if line.strip() else []
        else:
            is_inside = False
    return tuple(found)


def is_part(line: str) -> bool:
    """Return whether a line belongs to faulthandler's output and is not an error message."""
    return bool(_BEGINS.search(line) or _CONTINUES.match(line) or line.startswith(_ENDS))
