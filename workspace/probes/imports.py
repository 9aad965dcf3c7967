"""Imports of this interpreter: `imports.py companions|torch`, one JSON object on stdout;
`imports.py variables ENVS.PY NAME…`, values that a tree's own vllm/envs.py misreads; and
`imports.py share SOCKET`, one import of vLLM for many probes.

companions: each installed companion of torch, with null if it can be imported beside this torch,
else its error in a line. torch: version, CUDA version (null without CUDA) and file of the imported
torch. variables: the values are in the environment; any Python can run it without site-packages.
share: import vLLM, then run a probe in a forked child for each connection, until this process is
ended.
"""

import argparse
import contextlib
import ctypes
import importlib
import importlib.util
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

NOT_INITIALIZED = 3
ON, OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")
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


def torch_build() -> dict[str, object]:
    import torch

    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "file": torch.__file__,
    }


def misread(path: str, names: list[str]) -> dict[str, object]:
    """Return which of the named variables the registry of this file refuses or misunderstands."""
    spec = importlib.util.spec_from_file_location("envs", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is not a Python module")
    envs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(envs)
    refused, ignored = [], []
    for name in names:
        getter = envs.environment_variables.get(name)
        text = os.environ.get(name)
        if getter is None or text is None:
            continue
        try:
            value = getter()
        except Exception as exc:
            if isinstance(exc, ImportError):
                # Some getters need torch or another package that is missing here, one of them only
                # to describe a wrong value.
                if not isinstance(exc.__context__, ValueError):
                    continue
                exc = exc.__context__
            refused.append({"name": name, "said": str(exc) or type(exc).__name__})
            continue
        if problem := ignored_value(name, getter, value, text):
            ignored.append({"name": name, "said": problem})
    return {"error": None, "refused": refused, "ignored": ignored}


def ignored_value(name: str, getter: Callable[[], object], value: object, text: str) -> str | None:
    """Return the problem with a switch that vLLM reads otherwise than it is meant.

    A switch that only knows 1 silently takes `yes` for off.
    """
    if not isinstance(value, bool):
        return None
    state = text.strip().lower()
    if state not in ON and state not in OFF:
        return f"it is a switch, and {'on' if value else 'off'} with this value; write 1 or 0"
    if value == (state in ON):
        return None
    os.environ[name] = "1" if state in ON else "0"
    try:
        # Some switches are off with any value, because of another variable.
        return (
            f"vLLM takes this value for {'on' if value else 'off'}; write {os.environ[name]}"
            if getter() != value
            else None
        )
    finally:
        os.environ[name] = text


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
        # A connection runs programs as this user.
        os.chmod(f"{place}.new", 0o600)
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
    parser.add_argument("subject", choices=("companions", "torch", "variables", "share"))
    parser.add_argument("place", nargs="?", help="the socket of share; the file of variables")
    parser.add_argument("names", nargs="*", help="the variables")
    arguments = parser.parse_args()
    if arguments.subject == "share":
        share(arguments.place)
        return
    answers: dict[str, Callable[[], object]] = {
        "companions": companions,
        "torch": torch_build,
        "variables": lambda: misread(arguments.place, arguments.names),
    }
    print(json.dumps(answers[arguments.subject]()))


if __name__ == "__main__":
    main()
