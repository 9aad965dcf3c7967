"""The cause of a failure, found in the output of the processes that failed: vLLM's front, engine
and workers, and the compilers below them or below a build.

symptoms.toml has the symptoms that users report, with the cause and the next command for each.
Nothing here raises on any output, and the time is linear in its size.
"""

import functools
import re
import shlex
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from workspace.core import process, records

Lack = Literal["memory", "cache"]
Speaker = Literal["front", "engine", "worker"]
TABLE = Path(__file__).with_name("symptoms.toml")
READ_BYTES = 2 << 20
SHOWN_TAIL_LINES = 15
LONGEST_LINE = 4000
LONGEST_SHOWN = 600
# The lines below an exception in which the output of the compiler that it reports may stand.
CARRIED_LINES = 80

# What stands before a message: "(EngineCore_DP0 pid=12) ", "ERROR 11-23 20:01:02 ", "[core.py:1] "
# (vllm/logger.py; before 0.7 "core.py:1] "), "[rank0]: " (torch), "INFO:     " (uvicorn).
# "[node b] ": the node of a server over several (server/node_link.py).
_NODE = re.compile(r"\[node ([\w.-]{1,64})\] ")
_PROCESS = re.compile(r"\(([A-Za-z_]+)[^()]{0,60}?\bpid=(\d+)[^()]{0,60}\)\s?")
_LEVEL = re.compile(
    r"(TRACE|DEBUG|INFO|WARNING|ERROR|CRITICAL)(?: \d\d-\d\d \d\d:\d\d:\d\d\s|: {2,})"
)
_PLACE = re.compile(r"\[?([^\]\s]{1,200}\.\w{1,4}):\d+\]\s?|\[rank\d+\]:\s?")
# "W1130 15:06:08.237000 18762 torch/x.py:53] " and "[W1130 …] " (glog, torch/_logging).
_GLOG = re.compile(r"\[?(?:rank\d+\]:\[?)?([IWEF])\d{3,4} \d\d:\d\d:\d\d[^\]]{0,200}\]\s?")
_GLOG_LEVELS = {"I": "INFO", "W": "WARNING", "E": "ERROR", "F": "CRITICAL"}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# The frame that Python draws around an exception group.
_GROUP = re.compile(r"\s{0,40}(?:\+[-+ \d]{1,120}$|\+ (?=Exception Group)|\| ?)")
_QUIET = frozenset({"TRACE", "DEBUG", "INFO"})

_TRACEBACK = "Traceback (most recent call last):"
# Errors of one request, and of a thread, do not end a server.
_BACKGROUND = re.compile(r"Exception (?:in thread|in ASGI application|ignored in)\b")
_HANDLING = "During handling of the above exception, another exception occurred:"
_CHAINS = (_HANDLING, "The above exception was the direct cause of the following exception:")
_RAISED = re.compile(
    r"(?:[A-Za-z_]\w*\.){0,12}[A-Z]\w*"
    r"(?:Error|Exception|Interrupt|Exit|Failure|Failed|Unsupported|OutOfResources)"
    r"(?::\s*\S.*|:?\s*)$"
)
_STRONG = re.compile(
    r"\S*\s?(?:serve: )?error: .+|Fatal Python error: .+|(?:Segmentation fault|Illegal"
    r" instruction|Bus error|Aborted)\b|terminate called .+|thread '[^']*' .{0,40}?panicked at .+"
    r"|double free or corruption|free\(\): invalid|malloc\(\): |corrupted (?:size|double)"
)
_WEAK = re.compile(r".*: (?:No such file|not found|Permission denied)")
# Errors that only follow from an error in another process.
_SECONDARY = re.compile(
    r"(?:Engine core|Frontend process).{0,40}initialization|EngineDeadError|EngineCore"
    r" encountered|cancelled|CancelledError|BrokenPipeError|EOFError|Worker failed with error"
    r"|ConnectionResetError|KeyboardInterrupt|Worker(?:Proc)? initialization failed|SystemExit"
    r"|Connection (?:closed|reset) by peer|DistBackendError|ExceptionGroup: "
)
# Failed look-ups that a program makes on purpose: the exception raised while it handles one is the
# cause.
_LOOKUP = re.compile(
    r"(?:builtins\.)?(?:KeyError|AttributeError|IndexError|StopIteration|LookupError"
    r"|ImportError|ModuleNotFoundError|FileNotFoundError|(?:queue\.)?Empty)\b"
)
_SHUTDOWN = re.compile(r"(?i)shut|exit|stop|clos|abort|terminat|clean|drain|finish|destroy|dump")
_COUNT = re.compile(r"ValidationError: \d+ validation error")
# Exceptions that report a program whose output follows.
_REPORTS = re.compile(r"(?i)compil|ninja|build|ptxas|subprocess|returned non-zero|command ")
_CARRIED = re.compile(
    r"\b(?:fatal )?error\s*:|\bfatal\s*:|undefined reference|cannot find -l|signal terminated"
    r"|died due to signal|^FAILED: "
)
# The process whose status is known: no line of its log names it.
_FRONT = "the server"
_SIGNAL = re.compile(r"-(\d+)\b")
# Exit statuses of a program that a signal ended, itself or a child of a shell.
_KILLED, _TERMINATED = "process-killed", "process-terminated"
_ENDS = {
    -signal.SIGKILL: _KILLED,
    128 + signal.SIGKILL: _KILLED,
    -signal.SIGTERM: _TERMINATED,
    128 + signal.SIGTERM: _TERMINATED,
}


@dataclass(frozen=True)
class Symptom:
    """A row of symptoms.toml, which describes the fields."""

    name: str
    patterns: tuple[str, ...]
    line: str
    cause: str
    source: str
    hint: str = ""
    flags: str = ""
    speaker: Speaker | None = None
    lack: Lack | None = None
    is_of_builds: bool = False
    is_report: bool = False
    is_last_resort: bool = False

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """Return one pattern for all of the row's."""
        return _joined(self.patterns)

    def next_command(self, *, name: str | None = None, typed: str | None = None) -> str | None:
        """Return the hint for a server: `name` of its model on the hub or recipe, and the command
        `typed` that started it.

        None if the hint needs one of them that is not known.
        """
        if self.flags:
            joint = " " if typed and " -- " in typed else " -- "
            return f"{typed}{joint}{self.flags}" if typed else None
        given = {"{name}": shlex.quote(name) if name else None, "{typed}": typed}
        hint = self.hint
        for place, value in given.items():
            if place in hint and value is None:
                return None
            hint = hint.replace(place, value or "")
        return hint


@dataclass(frozen=True)
class Harmless:
    """A row of the lines that are no cause."""

    pattern: str
    line: str
    why: str
    source: str


@dataclass(frozen=True)
class Line:
    """A line of a log without colours and prefix; `speaker` and `pid` are None without a prefix.

    `node` is the node of a server over several, with which `pid` then begins.
    """

    text: str
    speaker: Speaker | None = None
    pid: str | None = None
    level: str | None = None
    place: str = ""
    node: str = ""

    @property
    def marked(self) -> str:
        return f"node {self.node}: {self.text}" if self.node else self.text


@dataclass(frozen=True)
class Reading:
    """Failure as read from a log: the line with its cause, the missing resource, the last lines.

    `lack` is `cache` if the model fitted and too little memory was left for one request of full
    length. `speaker` is the kind of process that reported the cause, None if it is not known.
    """

    first: str | None
    lack: Lack | None
    tail: tuple[str, ...]
    symptom: Symptom | None = None
    speaker: Speaker | None = None

    @property
    def sentence(self) -> str | None:
        """Return the cause in words with the line that shows it; None if the log has none."""
        if self.symptom is None or self.symptom.is_last_resort:
            return self.first
        return f"{self.symptom.cause}: {self.first}"


@dataclass(frozen=True)
class _Candidate:
    """A line that may be the cause; the one of the lowest rank is, and of those the first."""

    rank: int
    index: int
    symptom: Symptom | None

    @property
    def order(self) -> tuple[int, bool, int]:
        return self.rank, self.symptom is None or self.symptom.is_report, self.index


# Ranks: an error of its own; a process that ended by a signal; an error that the process outlived
# or handled; a program that was not found; an error that follows from another one.
_OWN, _SIGNALLED, _OUTLIVED, _NOT_FOUND, _FOLLOWS = range(5)


@functools.cache
def symptoms() -> tuple[Symptom, ...]:
    """Return the known symptoms, in the order in which they are tried."""
    return records.convert(_table()["symptom"], tuple[Symptom, ...])


@functools.cache
def harmless() -> tuple[Harmless, ...]:
    """Return the lines that look like a cause and are none."""
    return records.convert(_table()["harmless"], tuple[Harmless, ...])


def read(
    log: Path, *, status: int | None, begin: int = 0, end: int | None = None, kills: int = 0
) -> Reading:
    """Read the end of a log, or of its part from byte `begin` to `end`, and find the cause as
    `judge` does.
    """
    try:
        with log.open("rb") as file:
            end = log.stat().st_size if end is None else end
            first = file.seek(max(begin, end - READ_BYTES))
            lines = file.read(max(0, end - first)).decode("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return judge(lines, status=status, kills=kills)


def judge(lines: Sequence[str], *, status: int | None, kills: int = 0) -> Reading:
    """Find the cause of a failure in a log, None if nothing in it may be one.

    `status` is the front's exit status as subprocess counts it, or None if this workspace ended it.
    `kills` are the processes that the kernel killed meanwhile because memory ran out: without one
    SIGKILL may be anybody's. The SIGTERM of earlyoom means that memory ran out.
    """
    plain = [parse(line) for line in lines]
    parsed = [_unframed(line) for line in plain]
    candidates = list(_candidates(parsed))
    ended = _proven(_by_status(status), kills)
    best = min(candidates, key=lambda one: one.order, default=None)
    shown = [line.marked for line in plain if line.text.strip()]
    tail = tuple(line[:LONGEST_SHOWN] for line in shown[-SHOWN_TAIL_LINES:])
    if ended and (best is None or best.rank > _SIGNALLED):
        return Reading(_who_ended(ended, None, _FRONT), ended.lack, tail, ended)
    if best is None:
        return Reading(None, None, tail)
    line, symptom = parsed[best.index], _proven(best.symptom, kills)
    if symptom and symptom.is_last_resort:
        first = _who_ended(symptom, line.text, _who(line.text))
    else:
        first = _with_detail(parsed, best)
    first = f"node {line.node}: {first}" if line.node else first
    return Reading(first, symptom.lack if symptom else None, tail, symptom, line.speaker)


def how_ended(status: int | None, reading: Reading, *, otherwise: str = "") -> str:
    """Return how a program ended, and why: the end of a sentence that begins with its name.

    `otherwise` is the reason where the log shows no cause. A status of None: its supervisor was
    killed, too.
    """
    how = "was killed with its supervisor" if status is None else process.describe_status(status)
    why = reading.sentence or otherwise
    if reading.symptom and reading.symptom.is_last_resort and why.startswith(f"{_FRONT} "):
        # It is about this process, and has its signal.
        return why.removeprefix(f"{_FRONT} ")
    return f"{how}: {why}" if why else how


def ending(lines: Sequence[str], status: int) -> tuple[str, str | None]:
    """Judge the output of a program that is no server, for process.run."""
    reading = judge(lines, status=status)
    hint = reading.symptom.next_command() if reading.symptom else None
    return how_ended(status, reading), hint


def find_in_build(lines: Sequence[str]) -> tuple[int, Symptom] | None:
    """Return the first line of a compiler's output that shows a known symptom, and the symptom."""
    for index, line in enumerate(lines):
        symptom = match(parse(line))
        if symptom and symptom.is_of_builds:
            return index, symptom
    return None


def match(line: Line) -> Symptom | None:
    """Return the symptom that a line shows; harmless lines show none."""
    text = line.text
    if not _any_symptom().search(text) or _any_harmless().search(text):
        return None
    return next(
        (
            symptom
            for symptom in symptoms()
            if (symptom.speaker is None or line.speaker in (None, symptom.speaker))
            and symptom.pattern.search(text)
        ),
        None,
    )


def parse(line: str) -> Line:
    """Split a line into its prefix and its text, without colours."""
    rest = _COLOUR.sub("", line[:LONGEST_LINE])
    parsed = Line("")
    if found := _NODE.match(rest):
        # Two nodes may have the same pid.
        parsed, rest = Line("", pid=found[1], node=found[1]), rest[found.end() :]
    for _ in range(6):
        if found := _PROCESS.match(rest):
            pid = f"{parsed.node} {found[2]}" if parsed.node else found[2]
            parsed = replace(parsed, speaker=_speaker(found[1]), pid=pid)
        elif found := _LEVEL.match(rest):
            parsed = replace(parsed, level=found[1])
        elif found := _GLOG.match(rest):
            parsed = replace(parsed, level=_GLOG_LEVELS[found[1]])
        elif found := _PLACE.match(rest):
            parsed = replace(parsed, place=found[1] or parsed.place)
        else:
            break
        rest = rest[found.end() :]
    return replace(parsed, text=rest.rstrip())


def without_prefix(line: str) -> str:
    """Return a line of vLLM's log without its process, level, time, source and colours."""
    return parse(line).marked


def _candidates(parsed: Sequence[Line]) -> Iterator[_Candidate]:
    """Yield the lines that may be the cause, with their ranks."""
    outlived = _last_quiet_lines(parsed)
    for index, is_background in _messages(parsed):
        line = parsed[index]
        symptom = match(line)
        if symptom and symptom.is_last_resort:
            yield _Candidate(_SIGNALLED, index, symptom)
            continue
        if line.level == "WARNING" or _any_harmless().search(line.text):
            continue
        text = line.text.strip()
        if symptom or _RAISED.match(text) or _STRONG.match(text):
            is_over = is_background or index < outlived.get(line.pid, -1)
            rank = _OUTLIVED if is_over or _is_handled(parsed, index) else _OWN
            rank = _FOLLOWS if not symptom and _SECONDARY.search(text) else rank
            yield _Candidate(rank, index, symptom)
        elif _WEAK.match(text):
            yield _Candidate(_NOT_FOUND, index, None)


def _last_quiet_lines(parsed: Sequence[Line]) -> Mapping[str | None, int]:
    """Return for each process the last line that shows it at work: it outlived what is above."""
    return {
        line.pid: index
        for index, line in enumerate(parsed)
        if line.pid and line.level in _QUIET and not _SHUTDOWN.search(line.text)
    }


def _messages(parsed: Sequence[Line]) -> Iterator[tuple[int, bool]]:
    """Yield the lines that are messages, and whether they belong to a thread in the background.

    Lines of ordinary work, which may quote a user's prompt, and the source code in tracebacks are
    left out.
    """
    inside: set[str | None] = set()
    background: set[str | None] = set()
    former: dict[str | None, str] = {}
    for index, line in enumerate(parsed):
        text, key = line.text, line.pid
        if line.level in _QUIET or line.place.startswith("dump_input"):
            continue
        if text.rstrip().endswith(_TRACEBACK):
            inside.add(key)
            if former.get(key, "") not in _CHAINS:
                background.discard(key)
            if _BACKGROUND.match(former.get(key, "")):
                background.add(key)
        elif text.strip() and not (key in inside and text[0].isspace()):
            inside.discard(key)
            former[key] = text.strip()
            yield index, key in background


def _is_handled(parsed: Sequence[Line], index: int) -> bool:
    """Return whether a look-up failed on purpose: another exception was raised on its account."""
    line = parsed[index]
    if not _LOOKUP.match(line.text.strip()) or match(line):
        return False
    following = (other for other in parsed[index + 1 : index + 6] if other.pid == line.pid)
    return any(_HANDLING in other.text for other in following)


def _with_detail(parsed: Sequence[Line], best: _Candidate) -> str:
    """Return the line of the cause with what the lines around it add."""
    line = parsed[best.index]
    error = line.text.strip()
    above = parsed[best.index - 1].text if best.index else ""
    below = [
        other.text.strip()
        for other in parsed[best.index + 1 : best.index + CARRIED_LINES]
        if other.pid in (line.pid, None) and other.level not in _QUIET
    ]
    following = next((text for text in below[:3] if text), "")
    # pydantic's first line only counts the errors.
    if _COUNT.search(above):
        error = f"{above.strip().rpartition('.')[2]}: {error}"
    elif _COUNT.search(error) and following:
        detail = next((text for text in below[:5] if "error, " in text), following)
        error = f"{error.rpartition('.')[2]}: {detail}"
    elif following and re.match("thread .* panicked at .*:$|terminate called", error):
        error = f"{error} {following}"
    elif (not best.symptom or best.symptom.is_report) and _REPORTS.search(error):
        error = f"{error} {next((text for text in below if _CARRIED.search(text)), '')}"
    error = re.sub(r"\s*\[type=\w+, input.*$", "", error)
    return " ".join(error.split())[:LONGEST_SHOWN]


def _by_status(status: int | None) -> Symptom | None:
    """Return the symptom of a front that a signal ended, which the workspace did not send."""
    name = _ENDS.get(status or 0)
    return next((symptom for symptom in symptoms() if symptom.name == name), None)


def _proven(symptom: Symptom | None, kills: int) -> Symptom | None:
    """Return a symptom; that of SIGKILL with its reason where the kernel has killed a process."""
    if symptom is None or symptom.name != _KILLED or not kills:
        return symptom
    hint = next(row.hint for row in symptoms() if row.name == _TERMINATED)
    cause = f"{symptom.cause}: memory ran out"
    return replace(symptom, cause=cause, hint=hint, lack="memory")


def _who_ended(symptom: Symptom, text: str | None, who: str) -> str:
    found = _SIGNAL.search(text or "")
    try:
        name = signal.Signals(int(found[1])).name if found else ""
    except ValueError:
        name = ""
    return symptom.cause.format(who=who, signal=name)


def _who(text: str) -> str:
    return "a worker" if "Worker" in text else "the engine" if "ngine" in text else "a process"


def _speaker(name: str) -> Speaker | None:
    lower = name.lower()
    if "worker" in lower:
        return "worker"
    if lower.startswith(("engine", "dpcoordinator")):
        return "engine"
    return "front" if lower.startswith(("api", "front", "main")) else None


def _unframed(line: Line) -> Line:
    """Return a line without the frame around an exception group."""
    found = _GROUP.match(line.text)
    return replace(line, text=line.text[found.end() :]) if found else line


@functools.cache
def _table() -> records.Document:
    return records.parse_toml(TABLE.read_bytes())


@functools.cache
def _any_symptom() -> re.Pattern[str]:
    return _joined(symptom.pattern.pattern for symptom in symptoms())


@functools.cache
def _any_harmless() -> re.Pattern[str]:
    return _joined(row.pattern for row in harmless())


def _joined(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
