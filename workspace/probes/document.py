"""What probes share: their one JSON document on stdout, the forked child of which a part may be,
its rows, and the options of an engine.

A probe loads this file by its path: their folder is no place to import from (probes/imports.py).
"""

import faulthandler
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LIBRARY = re.compile(r".+\.so(\.\d+)*$")
# A part of a document.
Record = dict[str, Any]
Rows = Iterator[Record]
# Bytes have the tokens from here on in the tiny models' tokenizer (probes/small_model.py).
FIRST_BYTE = 3
KV_CACHE_BYTES = 256 << 20
# Triton and cuBLAS read these at their first use: float32 products in float32, sums in a fixed
# order.
FLOAT32 = {"TRITON_F32_DEFAULT": "ieee", "NVIDIA_TF32_OVERRIDE": "0"}
ORDERED = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


@contextmanager
def printed(record: Record, *, speaker: str = "") -> Iterator[None]:
    """Print the record on stdout once the block has ended; an exception becomes its error, after
    the name of its speaker.

    Libraries print to stdout: meanwhile that is stderr. A hang ends itself, with the stacks of all
    threads on stderr.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if limit := float(os.environ.get("WORKSPACE_SMOKE_LIMIT_S", "0")):
        faulthandler.dump_traceback_later(limit, exit=True)
    try:
        yield
    except Exception as exc:
        traceback.print_exc()
        record["error"] = f"{speaker}{sentence(exc)}"
    print(json.dumps(record), file=out, flush=True)


def sentence(exc: BaseException) -> str:
    """Return the name and the joined lines of an exception."""
    return f"{type(exc).__name__}: {' '.join(str(exc).split())[:200]}"


def row(case: str, found: object, expected: object) -> Record:
    """Return the row of a case that has one right outcome."""
    is_right = found == expected
    shown, wanted = str(found)[:80], str(expected)[:80]
    return {"case": case, "problem": None if is_right else f"{shown}, expected {wanted}"}


def tokens_of(start: int, count: int) -> list[int]:
    """Return a prompt that shares no block with one of another `start`."""
    return [FIRST_BYTE + (start + 7 * index) % 250 for index in range(count)]


def measured(runs: Iterable[tuple[str, Callable[[], Rows]]]) -> Record:
    """Run checks; return the rows of each, its seconds, and the error that ended it."""
    done: Record = {}
    for check, run in runs:
        part = done.setdefault(check, {"rows": [], "seconds": 0.0, "error": None})
        started = time.monotonic()
        try:
            part["rows"] += run()
        except Exception as exc:
            traceback.print_exc()
            part["error"] = sentence(exc)
        part["seconds"] += round(time.monotonic() - started, 3)
    return done


def engine_options(folder: str, device: str) -> Record:
    """Return the options of a vLLM that is compared with a reference."""
    options: Record = {
        "model": folder,
        "dtype": "float32",
        "enforce_eager": True,
        "seed": 0,
        "disable_log_stats": True,
        # Must be free at the start, beside other engines; the cache has its own bound.
        "gpu_memory_utilization": 0.1,
    }
    return options | ({"kv_cache_memory_bytes": KV_CACHE_BYTES} if device == "cuda" else {})


def mapped(tree: Path) -> list[str]:
    """Return the tree's libraries that this process has loaded (proc(5), maps), without the tree's
    path.
    """
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    files = {Path(parts[5]) for line in lines if len(parts := line.split(maxsplit=5)) == 6}
    return sorted(
        str(file.relative_to(tree))
        for file in files
        if LIBRARY.fullmatch(file.name) and file.is_relative_to(tree)
    )


class Child:
    """A function that runs in a forked child, with its result or the cause of its death."""

    def __init__(
        self,
        function: Callable[[], object],
        *,
        timeout_s: float,
        sentence_of: Callable[[BaseException], str] = sentence,
    ) -> None:
        self._timeout_s = timeout_s * int(os.environ.get("TIME_LIMIT_FACTOR") or 1)
        self._deadline = time.monotonic() + self._timeout_s
        fork = multiprocessing.get_context("fork")
        self._reader, writer = fork.Pipe(duplex=False)
        self._child = fork.Process(target=_reply, args=(writer, function, sentence_of))
        self._child.start()
        writer.close()

    def result(self) -> Record:
        """Wait. Return {"value": …} if the child answered, else {"error": a sentence, "signal": a
        name or None}.
        """
        try:
            if not self._reader.poll(max(0.0, self._deadline - time.monotonic())):
                self._child.kill()
                return {"error": f"did not end within {self._timeout_s:g} s", "signal": None}
            answer: Record = self._reader.recv()
            return answer
        except EOFError:
            self._child.join()
            status = self._child.exitcode or 0
            name = signal.Signals(-status).name if status < 0 else None
            return {
                "error": f"killed by {name}" if name else f"exited with {status} without a message",
                "signal": name,
            }
        finally:
            self._child.join()


def _reply(
    writer: "multiprocessing.connection.Connection[Record, None]",
    function: Callable[[], object],
    sentence_of: Callable[[BaseException], str],
) -> None:
    # A crash is a result; a core of several GiB is not wanted.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer: Record = {"value": function()}
    except BaseException as exc:
        answer = {"error": sentence_of(exc), "signal": None}
    writer.send(answer)
