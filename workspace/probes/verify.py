"""Check which vLLM this interpreter imports, and whether every compiled library of the tree loads
with all symbols bound.

Each check runs in a forked child: vLLM's CPU libraries register the same operators and cannot share
a process, and a truncated library ends its process with a signal, which is a verdict here and not a
crash. One JSON document on stdout.
"""

import argparse
import ctypes
import hashlib
import json
import os
import re
import struct
import sys
from functools import partial
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

document = SimpleNamespace(**run_path(str(Path(__file__).with_name("document.py"))))
SCHEMA = 1
# A CUDA library of 800 MB took a minute with a cold page cache; importing vLLM takes 6 s warm on
# two cores.
LOAD_TIMEOUT_S = 120.0
IMPORT_TIMEOUT_S = 400.0
# PEP 3149: an extension for one version of CPython. DeepGEMM has one for each version
# (vllm/third_party/deep_gemm).
_FOR_PYTHON = re.compile(r".+\.cpython-(\d+)[a-z]*-.+\.so$")
_DRIVER = "libcuda.so.1"
# The library of torch that is linked against all others of it.
_OF_TORCH = "libtorch_python.so"
# A message of dlerror(3) begins with the file, often with its full path.
_DLERROR_PREFIX = re.compile(r"^/\S+?: ")

# A part of the document.
Record = dict[str, Any]


def _sentence(exc: BaseException) -> str:
    if isinstance(exc, OSError) and exc.errno is None:
        return _DLERROR_PREFIX.sub("", str(exc))
    return f"{type(exc).__name__}: {exc}".splitlines()[0]


# A child whose error is the first line of an exception.
Child = partial(document.Child, sentence_of=_sentence)


def compiled(tree: Path) -> list[Path]:
    """Return every shared library below the tree's package, sorted."""
    return sorted(
        path
        for path in (tree / "vllm").rglob("*.so*")
        if document.LIBRARY.fullmatch(path.name) and path.is_file()
    )


def imported(tree: Path, folder: Path | None = None) -> Record:
    """Import vLLM as `python -c` would in `folder`. Return its file, version, platform and the
    libraries that it loads on this machine.
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
        "kernels": document.mapped(tree),
    }


def load(path: Path) -> None:
    """Load a library and bind every symbol now: Python's import binds lazily if the library asks
    for it (dlopen(3), RTLD_NOW).
    """
    ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)


def missing_bytes(path: Path) -> int:
    """Return how many bytes a file lacks by its own ELF header (elf(5)); 0 for other files.

    Up to two thirds of a library are symbols that are never loaded: it loads although it is cut.
    """
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
        return 0
    offset: int = struct.unpack_from("<Q", header, 40)[0]
    size, count = struct.unpack_from("<HH", header, 58)
    return max(0, offset + int(size) * int(count) - path.stat().st_size)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def judge(path: Path, tree: Path) -> Record:
    """Load one library, and hash it meanwhile. A library for another Python is only hashed: this
    interpreter never imports it.
    """
    made_for = _FOR_PYTHON.match(path.name)
    is_foreign = (
        made_for is not None and made_for[1] != f"{sys.version_info.major}{sys.version_info.minor}"
    )
    child = Child(lambda: None if is_foreign else load(path), timeout_s=LOAD_TIMEOUT_S)
    row = {"path": str(path.relative_to(tree)), "size": path.stat().st_size, "sha256": sha256(path)}
    result = child.result()
    error = result.get("error")
    if missing := missing_bytes(path):
        error = f"{missing} bytes are missing at its end" + (f"; {error}" if error else "")
    verdict = "broken" if error else "other python" if is_foreign else "ok"
    return row | {
        "loads": "value" in result and not is_foreign,
        "verdict": verdict,
        "error": error,
        "signal": result.get("signal"),
    }


def excuse_other_cpu(rows: list[Record], kernels: list[str] | None) -> None:
    """Distinguish a library for another processor from a broken one.

    The x86 wheels have one library each for AVX2, AVX-512 and AVX-512 with bfloat16. Loading one
    that this processor cannot run ends in SIGILL, which is no fault if vLLM loads another one here
    (vllm/platforms/cpu.py, import_kernels).
    """
    for row in rows:
        if row["signal"] == "SIGILL" and kernels and row["path"] not in kernels:
            row |= {
                "verdict": "other cpu",
                "error": (
                    "has instructions that this processor lacks; vLLM loads another library here"
                ),
            }


def excuse_no_driver(rows: list[Record]) -> None:
    """Distinguish a library that only lacks the GPU's driver, which a build machine need not have,
    from a broken one.
    """
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        for row in rows:
            if row["error"] and row["error"].startswith(f"{_DRIVER}: "):
                row |= {"verdict": "no driver"}


def examine_only(tree: Path, libraries: list[str], torch: Path) -> list[Record]:
    """Load these libraries of the tree alone, with the libraries of the torch in a folder but
    without Python's torch, which takes seconds. Return a row for each.
    """
    # Without it a library that needs it does not load, and the caller verifies the whole.
    if (torch / "lib" / _OF_TORCH).is_file():
        ctypes.CDLL(str(torch / "lib" / _OF_TORCH), mode=os.RTLD_LAZY | os.RTLD_GLOBAL)
    rows = [judge(tree / path, tree) for path in libraries]
    excuse_no_driver(rows)
    return rows


def torch_record() -> Record:
    """Import torch. Return its version and its version of CUDA."""
    import torch

    return {"version": torch.__version__, "cuda": torch.version.cuda}


def examine(tree: Path, *, imports: bool, libraries: bool, inside: bool = False) -> Record:
    """Return the document."""
    record: Record = {
        "schema": SCHEMA,
        "error": None,
        "file": None,
        "version": None,
        "platform": None,
        "kernels": None,
        "libraries": [],
        "python": sys.version.split()[0],
        "torch": None,
    }
    try:
        # Once, for every child: it loads the libraries that vLLM's are linked against.
        record["torch"] = torch_record()
    except Exception as exc:
        record["error"] = f"torch cannot be imported: {_sentence(exc)}"
    # During the import, libraries are loaded and hashed.
    importing = Child(lambda: imported(tree), timeout_s=IMPORT_TIMEOUT_S) if imports else None
    if libraries:
        record["libraries"] = [judge(path, tree) for path in compiled(tree)]
        excuse_no_driver(record["libraries"])
    if importing is None and any(row["signal"] == "SIGILL" for row in record["libraries"]):
        importing = Child(lambda: imported(tree), timeout_s=IMPORT_TIMEOUT_S)
    # This child inherits the imported torch, which is half of the work.
    from_tree = Child(lambda: imported(tree, tree), timeout_s=IMPORT_TIMEOUT_S) if inside else None
    if importing:
        value, error = _imported(importing, record["error"])
        record |= value | {"error": error}
        excuse_other_cpu(record["libraries"], record["kernels"])
    if from_tree:
        value, error = _imported(from_tree, None)
        error = error and (record["error"] or error)
        unknown = {"error": error, "file": None, "version": None, "platform": None}
        record["inside"] = unknown | value
    return record


def _imported(child: Any, error: str | None) -> tuple[Record, str | None]:
    """Return the record of an import and its error, or else the error before it."""
    result = child.result()
    if "value" not in result:
        error = error or f"vllm cannot be imported: {result['error']}"
    return result.get("value", {}), error


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Print as JSON which vLLM is imported and whether its libraries load."
    )
    parser.add_argument("tree", type=Path, help="the checkout that vLLM should come from")
    parser.add_argument(
        "--no-import",
        action="store_true",
        help="load libraries only; import vLLM only if a library is for another processor",
    )
    parser.add_argument("--no-libraries", action="store_true", help="import only")
    parser.add_argument(
        "--inside",
        action="store_true",
        help="import also with the tree as working directory, where it may hide the installed vLLM",
    )
    parser.add_argument(
        "--only",
        metavar="LIBRARY",
        action="append",
        help="load only this library of the tree; may be repeated; needs --torch",
    )
    parser.add_argument("--torch", type=Path, help="with --only: the folder of the package torch")
    return parser


def main() -> None:
    parser = command_line()
    arguments = parser.parse_args()
    tree = arguments.tree.resolve()
    if not (tree / "vllm").is_dir():
        parser.error(f"{arguments.tree} holds no folder vllm")
    # vLLM logs to stdout: only the document may stay there.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # As with `python -c` and `python -m`: a tree, or an egg-info in it, that hides the installed
    # vLLM must show here.
    if sys.path and sys.path[0] == str(Path(__file__).resolve().parent):
        sys.path[0] = ""
    record = (
        {"schema": SCHEMA, "libraries": examine_only(tree, arguments.only, arguments.torch)}
        if arguments.only
        else examine(
            tree,
            imports=not arguments.no_import,
            libraries=not arguments.no_libraries,
            inside=arguments.inside,
        )
    )
    print(json.dumps(record), file=out, flush=True)


if __name__ == "__main__":
    main()
