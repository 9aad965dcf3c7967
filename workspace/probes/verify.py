"""Which vLLM does this interpreter import, and does every compiled library of the tree load with
all symbols bound?

Each question is asked in a forked child: vLLM's CPU libraries register the same operators and
cannot share a process, and a truncated library ends its process with a signal, which is a verdict
here and not a crash. One JSON document on stdout.
"""

import argparse
import ctypes
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

SCHEMA = 1
# A cold page cache and a CUDA library of 800 MB have taken a minute; importing vLLM takes 6 s warm
# on two cores.
LOAD_TIMEOUT_S = 120.0
IMPORT_TIMEOUT_S = 400.0
_LIBRARY = re.compile(r".+\.so(\.\d+)*$")
# PEP 3149: an extension for one version of CPython. DeepGEMM's comes for each of them
# (vllm/third_party/deep_gemm).
_FOR_PYTHON = re.compile(r".+\.cpython-(\d+)[a-z]*-.+\.so$")
_DRIVER = "libcuda.so.1"
# dlopen(3) names the file first, and often by its whole path.
_DLERROR_PREFIX = re.compile(r"^/\S+?: ")


class Predicate:
    """A function that runs in a forked child; its answer, or its death, is read here."""

    def __init__(self, function: Callable[[], object], *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        fork = multiprocessing.get_context("fork")
        self._reader, writer = fork.Pipe(duplex=False)
        self._child = fork.Process(target=_reply, args=(writer, function))
        self._child.start()
        writer.close()

    def ask(self) -> dict:
        """Wait; {"value": …} where the child answered, else {"error": a sentence, "signal": a name
        or None}.
        """
        try:
            if not self._reader.poll(max(0.0, self._deadline - time.monotonic())):
                self._child.kill()
                return {"error": f"did not end within {self._timeout_s:g} s", "signal": None}
            return self._reader.recv()
        except EOFError:
            self._child.join()
            status = self._child.exitcode or 0
            name = signal.Signals(-status).name if status < 0 else None
            return {
                "error": f"killed by {name}" if name else f"exited with {status} without a word",
                "signal": name,
            }
        finally:
            self._child.join()


def _reply(writer: "multiprocessing.connection.Connection", function: Callable[[], object]) -> None:
    # A library that crashes is an answer; a core of several GiB is not wanted with it.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        said: dict = {"value": function()}
    except BaseException as exc:
        said = {"error": _sentence(exc), "signal": None}
    writer.send(said)


def _sentence(exc: BaseException) -> str:
    if isinstance(exc, OSError) and exc.errno is None:
        return _DLERROR_PREFIX.sub("", str(exc))
    return f"{type(exc).__name__}: {exc}".splitlines()[0]


def compiled(tree: Path) -> list[Path]:
    """Every shared library below the tree's package, sorted."""
    return sorted(
        path
        for path in (tree / "vllm").rglob("*.so*")
        if _LIBRARY.fullmatch(path.name) and path.is_file()
    )


def mapped(tree: Path) -> list[str]:
    """The tree's libraries that this process has loaded, relative to the tree (proc(5), maps)."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    files = {Path(parts[5]) for line in lines if len(parts := line.split(maxsplit=5)) == 6}
    return sorted(
        str(file.relative_to(tree))
        for file in files
        if _LIBRARY.fullmatch(file.name) and file.is_relative_to(tree)
    )


def imported(tree: Path, folder: Path | None = None) -> dict:
    """Import vLLM as `python -c` would in `folder`, and say what it is and which libraries it takes
    on this machine.
    """
    if folder:
        os.chdir(folder)
    import vllm
    from vllm.platforms import current_platform

    if hasattr(current_platform, "import_kernels"):
        current_platform.import_kernels()
    return {
        "file": str(Path(vllm.__file__).resolve()) if vllm.__file__ else None,
        "version": vllm.__version__,
        "platform": current_platform.device_type,
        "kernels": mapped(tree),
    }


def load(path: Path) -> None:
    """Bind every symbol now: Python's own import of an extension is lazy where a library asks for
    it (dlopen(3), RTLD_NOW).
    """
    ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)


def missing_bytes(path: Path) -> int:
    """How much of the file its own ELF header says is missing (elf(5)); 0 where nothing is, or
    where it is no ELF file.

    Two thirds of a library may be symbols that are never loaded: it loads although it was cut.
    """
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
        return 0
    (offset,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return max(0, offset + size * count - path.stat().st_size)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def judge(path: Path, tree: Path) -> dict:
    """Load one library, and hash it meanwhile. One for another Python is hashed only: this
    interpreter never imports it.
    """
    made_for = _FOR_PYTHON.match(path.name)
    is_foreign = (
        made_for is not None and made_for[1] != f"{sys.version_info.major}{sys.version_info.minor}"
    )
    question = Predicate(lambda: None if is_foreign else load(path), timeout_s=LOAD_TIMEOUT_S)
    row = {"path": str(path.relative_to(tree)), "size": path.stat().st_size, "sha256": sha256(path)}
    said = question.ask()
    error = said.get("error")
    if missing := missing_bytes(path):
        error = f"{missing} bytes are missing at its end" + (f"; {error}" if error else "")
    verdict = "broken" if error else "other python" if is_foreign else "ok"
    return row | {
        "loads": "value" in said and not is_foreign,
        "verdict": verdict,
        "error": error,
        "signal": said.get("signal"),
    }


def excuse_other_cpu(rows: list[dict], kernels: list[str] | None) -> None:
    """Tell a library for another processor from a broken one.

    The x86 wheels bring one library for each of AVX2, AVX-512 and AVX-512 with bfloat16. Loading
    one that is beyond this processor ends in SIGILL, and is no fault as long as vLLM takes another
    one here (vllm/platforms/cpu.py, import_kernels).
    """
    for row in rows:
        if row["signal"] == "SIGILL" and kernels and row["path"] not in kernels:
            row |= {
                "verdict": "other cpu",
                "error": (
                    "holds instructions that this processor lacks; vLLM takes another library here"
                ),
            }


def excuse_no_driver(rows: list[dict]) -> None:
    """Tell a library that lacks nothing but the GPU's driver, which the machine that it was built
    on need not have.
    """
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        for row in rows:
            if row["error"] and row["error"].startswith(f"{_DRIVER}: "):
                row |= {"verdict": "no driver"}


def torch_record() -> dict:
    import torch

    return {"version": torch.__version__, "cuda": torch.version.cuda}


def examine(tree: Path, *, imports: bool, libraries: bool, inside: bool = False) -> dict:
    record: dict = {
        "schema": SCHEMA,
        "error": None,
        "file": None,
        "version": None,
        "platform": None,
        "kernels": None,
        "libraries": [],
    }
    record |= {"python": sys.version.split()[0], "torch": None}
    try:
        # Once, for every child: it brings the libraries that vLLM's are linked against.
        record["torch"] = torch_record()
    except Exception as exc:
        record["error"] = f"torch cannot be imported: {_sentence(exc)}"
    # While it imports, libraries are loaded and hashed.
    asked = Predicate(lambda: imported(tree), timeout_s=IMPORT_TIMEOUT_S) if imports else None
    if libraries:
        record["libraries"] = [judge(path, tree) for path in compiled(tree)]
        excuse_no_driver(record["libraries"])
    if asked is None and any(row["signal"] == "SIGILL" for row in record["libraries"]):
        asked = Predicate(lambda: imported(tree), timeout_s=IMPORT_TIMEOUT_S)
    # torch is imported by now: a second child is spared the half of it.
    from_tree = (
        Predicate(lambda: imported(tree, tree), timeout_s=IMPORT_TIMEOUT_S) if inside else None
    )
    if asked:
        said = asked.ask()
        record |= said.get("value", {})
        if "value" not in said:
            record["error"] = record["error"] or f"vllm cannot be imported: {said['error']}"
        excuse_other_cpu(record["libraries"], record["kernels"])
    if from_tree:
        said = from_tree.ask()
        error = (
            None
            if "value" in said
            else record["error"] or f"vllm cannot be imported: {said['error']}"
        )
        record["inside"] = {
            "error": error,
            "file": None,
            "version": None,
            "platform": None,
        } | said.get("value", {})
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Print as JSON which vLLM is imported and whether its libraries load."
    )
    parser.add_argument("tree", type=Path, help="the checkout that vLLM should come from")
    parser.add_argument(
        "--no-import",
        action="store_true",
        help="load libraries only; vLLM is asked for its choice where one is for another processor",
    )
    parser.add_argument("--no-libraries", action="store_true", help="import only")
    parser.add_argument(
        "--inside",
        action="store_true",
        help="import also with the tree as working directory, where it may hide what is installed",
    )
    arguments = parser.parse_args()
    tree = arguments.tree.resolve()
    if not (tree / "vllm").is_dir():
        parser.error(f"{arguments.tree} holds no folder vllm")
    # vLLM logs on stdout; the document must stand there alone.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # As `python -c` and `python -m` do: a tree, or an egg-info in it, that hides the installed vLLM
    # must show here.
    if sys.path and sys.path[0] == str(Path(__file__).resolve().parent):
        sys.path[0] = ""
    record = examine(
        tree,
        imports=not arguments.no_import,
        libraries=not arguments.no_libraries,
        inside=arguments.inside,
    )
    print(json.dumps(record), file=out, flush=True)


if __name__ == "__main__":
    main()
