"""The link between the nodes of one server. On the head it is the program above rank 0: it starts
the other ranks over ssh, writes their output beside rank 0's, and ends all when one ends. On each
other node it is a lease that the head renews; without it the rank there ends.

Both sides write a line every BEAT_S seconds, and who reads none for SILENCE_S seconds takes the
other for gone: ssh and vLLM notice neither a cut cable nor a machine without power.

Run as `python -I -S node_link.py PLACE NAME COUNT ARG… NAME COUNT ARG…`: PLACE is the folder of the
server's state, and each NAME is a node with the COUNT arguments that start its rank (0: all that
follow), rank 0 last.
Standard library only.
"""

import contextlib
import glob
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

BEAT_S = 2.0
SILENCE_S = 20.0
# Seconds for another node to end its rank, and for rank 0: its front, and then its supervisor.
END_S, HEAD_END_S = 20.0, 10.0
# Seconds after which a rank without a lease gives up a clean end: the lifeline of its supervisor
# closes.
LAST_S = 60.0
# A mark from the node means that its rank is started, a mark to it that the server is ready.
BEAT, MARK = b"\n", b"\x06\n"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SSH_FAILED, NOT_STARTED = 255, 127


@dataclass
class Part:
    """The rank of one node, as a child of this process: rank 0 itself, or the ssh to another node,
    whose stdin `writes` is. `status` is None while it runs.
    """

    name: str
    pid: int
    reads: int
    writes: int | None
    read_at: float
    is_up: bool = False
    rest: bytes = b""
    status: int | None = None

    @classmethod
    def start(cls, name: str, argv: Sequence[str], *, is_far: bool) -> "Part":
        """Start the child. An ssh ignores the signals that end the server: it ends with its rank.

        Signals are blocked meanwhile: the child would lose one that reaches the handlers here.
        """
        reads, output = os.pipe2(os.O_CLOEXEC)
        source, writes = os.pipe2(os.O_CLOEXEC)
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        pid = os.fork()
        if pid == 0:
            for descriptor, number in ((source, 0), (output, 1), (output, 2)):
                os.dup2(descriptor, number)
            signal.set_wakeup_fd(-1)
            for number in ENDING:
                signal.signal(number, signal.SIG_IGN if is_far else signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
            try:
                os.execvp(argv[0], list(argv))
            except OSError as exc:
                os.write(2, f"{argv[0]}: {exc.strerror}\n".encode())
                os._exit(NOT_STARTED)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        for descriptor in (source, output):
            os.close(descriptor)
        for descriptor in (reads, writes):
            os.set_blocking(descriptor, False)
        if not is_far:
            os.close(writes)
        return cls(name, pid, reads, writes if is_far else None, time.monotonic())

    def read(self) -> None:
        """Write the new lines of the node into the log, marked with its name; and look whether it
        has ended.
        """
        if self.status is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.status = os.waitstatus_to_exitcode(found[1])
        data = b""
        with contextlib.suppress(BlockingIOError):
            while more := os.read(self.reads, 1 << 16):
                data += more
        if data:
            self.read_at = time.monotonic()
        *lines, self.rest = (self.rest + data).split(b"\n")
        if self.status is not None and self.rest:
            lines, self.rest = [*lines, self.rest], b""
        if self.writes is not None:
            self.is_up |= MARK.strip() in lines
            lines = [line for line in lines if line not in (b"", MARK.strip())]
        write_all(b"".join(b"[node %s] %s\n" % (self.name.encode(), line) for line in lines))

    def send(self, text: bytes) -> None:
        """Send a beat; a pipe that is full or closed is found by the silence, or by the end."""
        if self.writes is not None:
            with contextlib.suppress(OSError):
                os.write(self.writes, text)

    def fault(self) -> str:
        """Return why the server has to end because of this node, empty if it has not to."""
        if self.status is None:
            is_silent = self.writes is not None and time.monotonic() - self.read_at > SILENCE_S
            return f"no sign of life from node {self.name} for {SILENCE_S:g} s" * is_silent
        if self.writes is None:
            return "rank 0 ended"
        if self.status == SSH_FAILED:
            return f"the connection to node {self.name} ended"
        return f"node {self.name} ended its rank, with exit status {self.status}"

    def request_end(self) -> None:
        """Ask the rank to end: an ssh by the end of its input, unless its node is silent."""
        if self.writes is None:
            self.kill(signal.SIGTERM)
        else:
            if self.fault():
                self.kill(signal.SIGKILL)
            os.close(self.writes)

    def kill(self, number: signal.Signals) -> None:
        if self.status is None:
            os.kill(self.pid, number)


def main(place: str, orders: Sequence[tuple[str, Sequence[str]]]) -> int:
    """Run all ranks until one ends or this process is asked to end. Return the exit status.

    Rank 0 is started once each other node has started its own.
    """
    woken, parent = catch_signals(), os.getppid()
    *others, head = orders
    parts = [Part.start(name, argv, is_far=True) for name, argv in others]
    fault, beat_at = "", 0.0
    while not fault and not is_requested(woken, parts) and os.getppid() == parent:
        for part in parts:
            part.read()
        if len(parts) == len(others) and all(part.is_up for part in parts):
            parts.append(Part.start(*head, is_far=False))
        if time.monotonic() > beat_at:
            is_ready = bool(glob.glob(f"{glob.escape(place)}/ended-*.ready"))
            for part in parts:
                part.send(MARK if is_ready else BEAT)
            beat_at = time.monotonic() + BEAT_S
        fault = next(filter(None, (part.fault() for part in parts)), "")
    own = parts[-1].status if len(parts) > len(others) else None
    if fault and own is None:
        write_all(f"inv serve: error: {fault}\n".encode())
    end(parts)
    return 1 if own is None else own if own >= 0 else 128 - own


def end(parts: Sequence[Part]) -> None:
    """End all ranks; kill what is left after the time that it has."""
    for part in parts:
        part.request_end()
    began = time.monotonic()
    while running := [part for part in parts if part.status is None]:
        for part in running:
            if time.monotonic() - began > (HEAD_END_S if part.writes is None else END_S):
                part.kill(signal.SIGKILL)
            part.read()
        time.sleep(BEAT_S / 40)
    for part in parts:
        part.read()


def catch_signals() -> int:
    """Return a descriptor that becomes readable with a signal that ends the server."""
    woken, wakes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wakes)
    for number in ENDING:
        signal.signal(number, lambda *_: None)
    return woken


def is_requested(woken: int, parts: Sequence[Part]) -> bool:
    """Wait for output, for a beat's time at most. Return whether a signal came."""
    poll = select.poll()
    for descriptor in (woken, *(part.reads for part in parts)):
        poll.register(descriptor, select.POLLIN)
    events = poll.poll(BEAT_S * 1000 / 4)
    if all(event & select.POLLHUP for _, event in events) and events:
        # A child closes its output a moment before it ends.
        time.sleep(BEAT_S / 40)
    return woken in {descriptor for descriptor, _ in events}


def write_all(text: bytes) -> None:
    """Write into the log; a full disk costs lines and nothing else."""
    with contextlib.suppress(OSError):
        while text:
            text = text[os.write(1, text) :]


class Lease:
    """The right of this process to run a rank, as long as the head sends beats on stdin.
    `on_ready` is called for each beat once the server is ready.

    When the head closes stdin or is silent, the process gets SIGTERM, and ends its server.
    """

    def __init__(self, on_ready: Callable[[], object]) -> None:
        self._on_ready = on_ready
        self._output = select.poll()
        self._output.register(1, select.POLLOUT)
        threading.Thread(target=self._watch, daemon=True).start()

    def report_start(self) -> None:
        """Tell the head that the rank is started."""
        os.write(1, MARK)

    def _watch(self) -> None:
        read_at = time.monotonic()
        stdin = select.poll()
        stdin.register(0, select.POLLIN | select.POLLHUP)
        while time.monotonic() - read_at < SILENCE_S:
            if stdin.poll(BEAT_S * 1000 / 2):
                text = os.read(0, 1 << 12)
                if not text:
                    break
                read_at = time.monotonic()
                if MARK.strip() in text:
                    self._on_ready()
            # A beat must not wait in a full pipe.
            if self._events() & select.POLLOUT:
                with contextlib.suppress(OSError):
                    os.write(1, BEAT)
        self._end()

    def _events(self) -> int:
        return sum(event for _, event in self._output.poll(0))

    def _end(self) -> None:
        """End this process; if its output has no reader any more, without waiting for one."""
        events = self._events()
        if events & select.POLLERR or not events & select.POLLOUT:
            silence = os.open(os.devnull, os.O_WRONLY)
            for number in (1, 2):
                os.dup2(silence, number)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LAST_S)
        os._exit(1)


def orders(argv: Sequence[str]) -> list[tuple[str, Sequence[str]]]:
    """Return the nodes and their commands from the command line, rank 0 last."""
    found: list[tuple[str, Sequence[str]]] = []
    rest = list(argv)
    while rest:
        name, count, *rest = rest
        size = int(count) or len(rest)
        found.append((name, rest[:size]))
        rest = rest[size:]
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], orders(sys.argv[2:])))
