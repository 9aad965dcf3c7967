"""The stacks of processes that hang: each tells its own as it is ended, by Python's faulthandler;
py-spy tells them before, where it is there and may look.

On many a machine a debugger may not look at what it has not started (Yama, ptrace_scope 1); of
itself a process may always speak.
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

# Every Python that inherits it says on stderr where it stood when a fatal signal met it, however
# deep in C (docs.python.org, faulthandler).
FAULTS: Mapping[str, str] = {"PYTHONFAULTHANDLER": "1"}
# How long one process may take to tell.
TELL_S = 5.0
# Of a record; the log has all of them.
KEPT_LINES = 120
_BEGINS = re.compile(r"(Fatal Python error: .*|Timeout \(\d+:\d\d:\d\d.*\)!)$")
_GOES_ON = re.compile(
    r'  File ".*", line \d+ in |  <no Python frame>|  \.\.\.$|(?:Current t|T)hread 0x[0-9a-f]+|\s*$'
)
_ENDS = "Extension modules: "


class Watch:
    """Has processes tell their stacks, and ends them, where they take longer than `limit_s`. A
    context manager; `has_fired` says whether it did.

    `find` returns the numbers of the processes, `environment` has the PATH on which py-spy may be;
    `seen` is what that said.
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

    def told(self, text: str) -> tuple[str, ...]:
        """The stacks: what py-spy has seen, or what the processes have said among `text`."""
        return self.seen or read_stacks(text)

    def _fire(self) -> None:
        self.has_fired = True
        self.seen = look(self._find(), environment=self._environment)
        end_with_stacks(self._find)


def look(numbers: Iterable[int], *, environment: Mapping[str, str]) -> tuple[str, ...]:
    """What py-spy says of processes, an engine before its front; nothing where it is not there, or
    may not look at one of them.
    """
    lines: list[str] = []
    for number in sorted(numbers, reverse=True):
        try:
            done = process.capture(
                ["py-spy", "dump", "--pid", str(number)], env=environment, timeout_s=TELL_S
            )
        except ToolchainError:
            return ()
        if done.returncode != 0:
            return ()
        lines += [line.rstrip() for line in done.stdout.splitlines() if line.strip()]
    return tuple(lines)


def end_with_stacks(find: Callable[[], set[int]]) -> None:
    """Freeze processes, so that none reacts to another's end; then let one after the other tell its
    stacks and die, those started last first.
    """
    known = process_tree.living()
    numbers = sorted(find() & known.keys(), key=lambda number: known[number].started, reverse=True)
    for number in numbers:
        with contextlib.suppress(OSError):
            # A core of several GiB is not wanted with it.
            resource.prlimit(number, resource.RLIMIT_CORE, (0, 0))
            os.kill(number, signal.SIGSTOP)
    for number in numbers:
        deadline = time.monotonic() + TELL_S
        with contextlib.suppress(OSError):
            os.kill(number, signal.SIGABRT)
            os.kill(number, signal.SIGCONT)
            while process_tree.started_at(number) == known[number].started:
                if time.monotonic() > deadline:
                    os.kill(number, signal.SIGKILL)
                    break
                time.sleep(process_tree.POLL_S)


def read_stacks(text: str) -> tuple[str, ...]:
    """The stacks that faulthandler has written into a text, among whatever else stands there."""
    found: list[str] = []
    is_inside = False
    for line in text.splitlines():
        if begins := _BEGINS.search(line):
            is_inside = True
            found.append(begins.group())
        elif is_inside and _GOES_ON.match(line):
            found += [line.rstrip()] if line.strip() else []
        else:
            is_inside = False
    return tuple(found)


def is_part(line: str) -> bool:
    """Whether a line is faulthandler's, and no reason why something failed."""
    return bool(_BEGINS.search(line) or _GOES_ON.match(line) or line.startswith(_ENDS))
