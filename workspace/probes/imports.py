"""Imports of this interpreter: `imports.py companions|origin|torch`, one JSON object on stdout; and
`imports.py share SOCKET`, one import of vLLM for many probes.

companions: each installed companion of torch, with null if it can be imported beside this torch,
else its error in a line. origin: the file from which vLLM would be imported. torch: version, CUDA
version (null without CUDA) and file of the imported torch. share: import vLLM, then run a probe in
a forked child for each connection, until this process is ended.
"""

import argparse
import contextlib
import ctypes
import importlib
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
import traceback
from importlib.util import find_spec
from typing import Any

NOT_INITIALIZED = 3
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def companions() -> dict[str, str | None]:
    # A torch that cannot be imported ends the probe: `torch` reports that.
    import torch  # noqa: F401

    return {name: failure(name) for name in COMPANIONS if find_spec(name)}


def failure(name: str) -> str | None:
    """Import a module. Return None on success, else the error in a line."""
    try:
        # An extension that fails to load may print: stdout is for the document.
        with contextlib.redirect_stdout(sys.stderr):
            importlib.import_module(name)
    except Exception as exc:
        lines = str(exc).strip().splitlines()
        return f"{type(exc).__name__}: {lines[0] if lines else ''}"
    return None


def origin() -> dict[str, object]:
    # Without importing vLLM.
    found = find_spec("vllm")
    return {"schema": 1, "vllm": found.origin if found else None}


def torch_build() -> dict[str, object]:
    import torch

    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "file": torch.__file__,
    }


class Compilers:
    """Seconds for which compilers run at run time, in this process and all that are forked from it.

    torch.compile includes the Triton kernels that it compiles.
    """

    NAMES = ("Triton", "FlashInfer", "torch.compile")

    def __init__(self) -> None:
        # In shared memory; two processes that add at the same moment may lose one of the sums.
        self._seconds = multiprocessing.RawArray("d", len(self.NAMES))

    def add(self, name: str, seconds: float) -> None:
        self._seconds[self.NAMES.index(name)] += seconds

    def watch(self) -> None:
        """Measure each compiler that is installed and has the hook known here."""
        for hook in (self._watch_triton, self._watch_flashinfer, self._watch_torch):
            with contextlib.suppress(ImportError, AttributeError):
                hook()

    def _watch_triton(self) -> None:
        from triton import knobs

        def compiled(*, times: Any, cache_hit: bool, **_: object) -> None:
            # Microseconds (triton/knobs.py, CompileTimes).
            self.add("Triton", 0.0 if cache_hit else getattr(times, "total", 0) / 1e6)

        knobs.compilation.listener = compiled

    def _watch_flashinfer(self) -> None:
        # FlashInfer itself is not imported: it may ask for the GPU, which no parent of a fork may.
        # It builds with ninja (flashinfer/jit/cpp_ext.py).
        run = subprocess.run

        def measured(argv: Any, *args: Any, **options: Any) -> Any:
            started = time.monotonic()
            try:
                return run(argv, *args, **options)
            finally:
                if isinstance(argv, list) and argv and str(argv[0]).endswith("ninja"):
                    self.add("FlashInfer", time.monotonic() - started)

        subprocess.run = measured  # type: ignore[assignment]

    def _watch_torch(self) -> None:
        from torch._dynamo import callback

        started: list[float] = []
        callback.on_compile_start(lambda _: started.append(time.monotonic()))

        def ended(_: object) -> None:
            if started:
                self.add("torch.compile", time.monotonic() - started.pop())

        callback.on_compile_end(ended)

    def document(self) -> dict[str, float]:
        """Return the seconds of each compiler that ran for a noticeable time."""
        pairs = zip(self.NAMES, self._seconds, strict=True)
        return {name: round(seconds, 2) for name, seconds in pairs if seconds >= 0.1}


def is_driver_started() -> bool:
    """Return whether this process has started the CUDA driver, which does not work after a fork."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    # cuDeviceGetCount fails only before cuInit (CUDA Driver API, CUDA_ERROR_NOT_INITIALIZED).
    return bool(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != NOT_INITIALIZED)


def share(place: str) -> None:
    """Serve at a Unix socket. A connection brings one line with the probe's `argv` and the files
    `out` and `err`; it gets a line with the probe's pid, then one with its exit status and the
    seconds of compilers as JSON.

    The socket appears once vLLM is imported and requests are accepted.
    """
    # Its folder is no place to import from: transformers looks for a package `kernels`.
    sys.path.pop(0)
    import vllm.entrypoints.llm  # noqa: F401 - for all children

    if is_driver_started():
        # Without a socket each probe imports for itself.
        sys.exit("the import of vLLM has started the CUDA driver: no child could use the GPU")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{place}.new")
        listener.listen(64)
        os.rename(f"{place}.new", place)
        while True:
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    attend(connection)
                    os._exit(0)
            # Wait for the children that have ended.
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def attend(connection: socket.socket) -> None:
    """Run the probe of a connection in a child of this process, and report its end."""
    with connection.makefile("rw", encoding="utf-8") as stream:
        request = json.loads(stream.readline())
        compilers = Compilers()
        compilers.watch()
        pid = os.fork()
        if pid == 0:
            connection.close()
            os._exit(perform(request))
        stream.write(f"{pid}\n")
        stream.flush()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        # The smoke may be gone.
        with contextlib.suppress(OSError):
            stream.write(f"{status} {json.dumps(compilers.document())}\n")
            stream.flush()


def perform(request: dict[str, Any]) -> int:
    """Run a probe as if it was started by its command line. Return its exit status."""
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = list(request["argv"])
    status: object = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as exc:
        status = exc.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return status if isinstance(status, int) else 1 if status else 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what can be imported, or share an import.")
    parser.add_argument("subject", choices=("companions", "origin", "torch", "share"))
    parser.add_argument("place", nargs="?", help="the socket of share")
    arguments = parser.parse_args()
    if arguments.subject == "share":
        share(arguments.place)
    elif arguments.subject == "companions":
        print(json.dumps(companions()))
    else:
        print(json.dumps(origin() if arguments.subject == "origin" else torch_build()))


if __name__ == "__main__":
    main()
