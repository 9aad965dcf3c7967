"""Why a server ended, from its log: the first real error line, and whether memory was what it lacked. Pure but for reading the log's end."""

import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Lack = Literal["memory", "cache"]
READ_BYTES = 2 << 20
SHOWN_TAIL_LINES = 15
# "(EngineCore pid=12) ERROR 11-23 20:01:02 [core.py:1] ", colours aside (vllm/logger.py, vllm/utils/system_utils.py).
_PREFIX = re.compile(r"^(\([A-Za-z_ ]+\S* pid=\d+\)\s?|(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d\s|\[[^\]]+:\d+\]\s?)+")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b(?::\s*\S.*)?$")
_OTHER = re.compile(
    r"\S*\s?(?:serve: )?error: .+|Fatal Python error: .+|(?:Segmentation fault|Illegal instruction|Bus error|Aborted)\b.*|terminate called .+"
    r"|.*: (?:No such file|not found|Permission denied).*"
)
# What says that something went wrong elsewhere.
_HOLLOW = re.compile(
    r"Engine core initialization failed|EngineDeadError|EngineCore encountered|cancelled|CancelledError|BrokenPipeError|EOFError"
    r"|ConnectionResetError|KeyboardInterrupt|Worker(Proc)? initialization failed|SystemExit"
)
_CACHE = re.compile(r"tokens that can be stored in (?:the )?KV cache|KV cache is needed|max seq len .* is larger than|maximum model length", re.IGNORECASE)
_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|MemoryError|NV_ERR_NO_MEMORY|cannot allocate memory|can't allocate memory|std::bad_alloc|no available memory for the cache"
    r"|less than desired (?:GPU|CPU) memory utilization|memory utilization or reduce|not enough memory|CUBLAS_STATUS_ALLOC_FAILED|CUDA error: memory",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Reading:
    """What a log says. `lack` is `cache` where there was memory and too little of it was left for one request of full length."""

    first: str | None
    lack: Lack | None
    tail: tuple[str, ...]


def read(log: Path, *, status: int | None) -> Reading:
    """Read the end of a log. `status` is how the front ended, as subprocess counts: SIGKILL is what the kernel sends when memory runs out."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - READ_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return judge(lines, status=status)


def judge(lines: list[str], *, status: int | None) -> Reading:
    """Decide. The first exception that is printed is the cause; those after it are what became of it in other processes."""
    plain = [plainly(line) for line in lines]
    found = [number for number, line in enumerate(plain) if _RAISED.match(line) or _OTHER.match(line)]
    telling = [number for number in found if not _HOLLOW.search(plain[number])] or found
    first = _sentence(plain, telling[0]) if telling else None
    text = "\n".join(plain[number] for number in found) + (f"\n{first}" if first else "")
    lack: Lack | None = "cache" if _CACHE.search(text) else "memory" if _MEMORY.search(text) else None
    if lack is None and first is None and status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        lack = "memory"
    return Reading(first, lack, tuple(line for line in plain if line.strip())[-SHOWN_TAIL_LINES:])


def plainly(line: str) -> str:
    """A line of vLLM's log without who said it, when and in which colour."""
    return _PREFIX.sub("", _COLOUR.sub("", line)).rstrip()


def _sentence(plain: list[str], number: int) -> str:
    """The line, and with pydantic's, which only counts the errors, the one that follows."""
    said = plain[number].strip()
    following = next((line.strip() for line in plain[number + 1 : number + 4] if line.strip()), "")
    if re.search(r"ValidationError: \d+ validation error", said) and following:
        detail = next((line.strip() for line in plain[number + 1 : number + 6] if "error, " in line), following)
        said = re.sub(r"\s*\[type=\w+, input.*$", "", f"{said.rpartition('.')[2]}: {detail}")
    return said
