"""Run a program and end its process with SIGKILL at the k-th changing call that the process itself
makes.

`python launcher.py LOG K DELAY_S … tasks.py WORD…`: calls are counted by an audit hook and written
to LOG. K of 0 only counts. DELAY_S of `before` kills before the call; a number lets a program
start, and kills so many seconds after it did.
"""

import contextlib
import os
import runpy
import signal
import sys
import threading
import time

CHANGING = {
    *(
        "os.rename",
        "os.remove",
        "os.mkdir",
        "os.rmdir",
        "os.link",
        "os.symlink",
        "os.truncate",
        "os.chmod",
        "os.chown",
        "os.utime",
    ),
    *("shutil.rmtree", "shutil.move", "shutil.copyfile", "subprocess.Popen"),
}
STARTED_WITHIN_S = 5.0


class Counter:
    """Counts, and kills at the chosen call."""

    def __init__(self, log: int, limit: int, delay: str) -> None:
        self.log, self.limit, self.delay = log, limit, delay
        self.count = 0

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.is_changing(event, arguments):
            return
        self.count += 1
        # Audited, but for reading and writing what is open there is no event.
        os.write(self.log, f"{self.count} {event} {str(arguments[:2])[:200]!r}\n".encode())
        if self.count == self.limit and self.delay == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.count == self.limit:
            threading.Thread(
                target=kill_after_start, args=(float(self.delay), children()), daemon=True
            ).start()

    def is_changing(self, event: str, arguments: tuple[object, ...]) -> bool:
        if event == "open":
            name, flags = str(arguments[0]), arguments[2]
            # A world may well lie in /dev/shm; what else is below these is no file.
            is_file = name.startswith("/dev/shm/") or not name.startswith(("/dev/", "/proc/"))
            return (
                is_file
                and isinstance(flags, int)
                and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            )
        return event in CHANGING


def kill_after_start(delay_s: float, before: set[str]) -> None:
    """Wait until there is a child that was not there before, and `delay_s` more."""
    deadline = time.monotonic() + STARTED_WITHIN_S
    while children() <= before and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(delay_s)
    os.kill(os.getpid(), signal.SIGKILL)


def children() -> set[str]:
    """The numbers of this process's children (proc(5), task/TID/children)."""
    found: set[str] = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/children") as file:
            found |= set(file.read().split())
    return found


def main() -> None:
    log, limit, delay, *rest = sys.argv[1:]
    while not rest[0].endswith(".py"):
        rest.pop(0)
    sys.argv = rest
    sys.path[0] = os.path.dirname(rest[0])
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    sys.addaudithook(Counter(descriptor, int(limit), delay))
    runpy.run_path(rest[0], run_name="__main__")


if __name__ == "__main__":
    main()
