"""What grows in the server under test with the number of requests, what of them waits, and whether
a client that leaves frees what its request had.

The verdicts are pure functions; `run` sends the requests to a server that has answered others.
"""

import contextlib
import http.client
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from workspace.checks import http_requests, probe_runs
from workspace.checks.http_checks import Reply
from workspace.checks.registry import Check, judged
from workspace.checks.server_checks import ServerUnderTest
from workspace.server.observation import Server

CHECKS = ("server.abort", "server.growth", "server.pauses")
# Requests after which the processes are measured: at first they import, compile and fill pools.
MARKS = (20, 120, 220)
# Long prompts, and several likely tokens at each position, so that what keeps an answer shows.
PROMPT, TOKENS, LOGPROBS = "kernel " * 60, 4, 20
# Streams that are left, and their tokens: an engine that goes on needs seconds for them.
LEAVERS, MOST = 4, 400
# Seconds until a request that was left has ended, and between two readings.
PATIENCE_S, POLL_S = 60.0, 0.1
# In 200 requests a leak of one in each is 200. A pool may still grow: threads of asyncio's default
# executor are at most 32, and connections close a moment after their answers.
MOST_DESCRIPTORS, MOST_THREADS = 40, 40
MOST_MIB = 2.0
# Share of all processors that other programs may use where a wait is judged.
LOADED = 0.1
# An answer waits if it takes as many times the median and as many seconds more. A machine without
# load has up to MOST_SLOW such answers by chance; a stop in each 50th answer makes four.
SLOW_TIMES, SLOW_S, MOST_SLOW = 3.0, 0.1, 2


@dataclass(frozen=True)
class Size:
    """What one process holds: open descriptors, threads, and memory of its own in MiB."""

    name: str
    descriptors: int
    threads: int
    mib: float


Sizes = Mapping[int, Size]


def grown(sizes: Sequence[Sizes], seconds: float) -> Check:
    """Judge the processes after each of MARKS.

    Memory counts as growing by the less of what it grew in both halves, twice: an allocator takes
    memory in large pieces now and then, a leak takes some with each request.
    """
    if len(sizes) < len(MARKS):
        return judged(CHECKS[1], ["the requests were not all answered"], "", seconds)
    first, middle, last = sizes
    problems = [f"process {pid}, {last[pid].name}, is new" for pid in last.keys() - first.keys()]
    most = [0.0, 0.0, 0.0]
    for pid in sorted(first.keys() & middle.keys() & last.keys()):
        begun, half, ended = first[pid], middle[pid], last[pid]
        grew = (
            ("descriptors", ended.descriptors - begun.descriptors, MOST_DESCRIPTORS),
            ("threads", ended.threads - begun.threads, MOST_THREADS),
            ("MiB", 2 * min(half.mib - begun.mib, ended.mib - half.mib), MOST_MIB),
        )
        problems += [
            f"{ended.name} has {count:.3g} {what} more after {MARKS[-1]} requests than after"
            f" {MARKS[0]}, the limit is {limit:g}"
            for what, count, limit in grew
            if count > limit
        ]
        most = [max(one, count) for one, (_, count, _) in zip(most, grew, strict=True)]
    fine = (
        f"{len(last)} processes after {MARKS[-1]} requests: at most {most[0]:g} descriptors,"
        f" {most[1]:g} threads, {most[2]:.1f} MiB more than after {MARKS[0]}"
    )
    return judged(CHECKS[1], problems, fine, seconds)


def paused(answers: Sequence[float], load: float) -> Check:
    """Judge the seconds of answers; `load` is the share of all processors that others used."""
    used = f"other programs used {load:.0%} of the processors"
    if not len(answers) > 1:
        return judged(CHECKS[2], ["the requests were not all answered"], "", 0.0)
    if not load < LOADED:
        return Check(CHECKS[2], "skipped", f"loaded: {used}", 0.0)
    median = statistics.median(answers)
    slow = [value for value in answers if value > SLOW_TIMES * median + SLOW_S]
    shown = f"median {median:.3f} s, longest {max(answers):.3f} s; {used}"
    problems = (
        [f"{len(slow)} of {len(answers)} answers wait: {shown}"] if len(slow) > MOST_SLOW else []
    )
    return judged(CHECKS[2], problems, f"{len(answers)} answers, {shown}", 0.0)


def completed(found: Sequence[Check]) -> tuple[Check, ...]:
    """Return the checks of a server, with those of here as failed if they were not made."""
    made = {check.identifier for check in found}
    why = ["the server did not answer"]
    missing = [judged(name, why, "", 0.0) for name in CHECKS if name not in made]
    return (*found, *missing)


def run(
    server: Server, tested: ServerUnderTest, *, settle: Callable[[], object]
) -> tuple[Check, ...]:
    """Send the requests, after `settle`, which waits until nothing else of the smoke runs."""
    settle()
    supervisor = {server.processes.supervisor_pid}
    with probe_runs.Watch(tested.limit_s, lambda: server.members() - supervisor):
        started = time.monotonic()
        problems = _left(tested)
        fine = f"{LEAVERS} clients left their streams, whose requests ended and freed their blocks"
        seconds = time.monotonic() - started
        abort = judged(CHECKS[0], problems, fine, seconds)
        return (abort, *_measured(server, tested))


def _measured(server: Server, tested: ServerUnderTest) -> tuple[Check, Check]:
    """Send requests one after the other, and measure the processes and each answer."""
    sizes: list[Sizes] = []
    answers: list[float] = []
    before = _processor_seconds(server)
    started = time.monotonic()
    body = _body(PROMPT, TOKENS) | {"logprobs": LOGPROBS}
    for index in range(1, MARKS[-1] + 1):
        at = time.monotonic()
        reply = _post(tested, body)
        if reply.refused:
            problem = [f"request {index}: {reply.refused}"]
            return judged(CHECKS[1], problem, "", 0.0), judged(CHECKS[2], problem, "", 0.0)
        answers.append(time.monotonic() - at)
        if index in MARKS:
            sizes.append(_sizes(server))
        if index == MARKS[0]:
            answers.clear()
            before, started = _processor_seconds(server), time.monotonic()
    seconds = time.monotonic() - started
    others = sum(
        after - former for after, former in zip(_processor_seconds(server), before, strict=True)
    )
    load = max(0.0, others) / seconds / (os.cpu_count() or 1)
    return grown(sizes, seconds), paused(answers, load)


def _body(prompt: str, tokens: int) -> dict[str, object]:
    given: dict[str, object] = {"model": http_requests.NAME, "prompt": prompt}
    return given | {"temperature": 0, "ignore_eos": True, "max_tokens": tokens}


def _post(tested: ServerUnderTest, body: object, path: str = "/v1/completions") -> Reply:
    return http_requests.Client(tested.address, (), tested.limit_s).post(path, body)


def _sizes(server: Server) -> Sizes:
    """Measure each process: the least of a few readings, because connections close late."""
    import psutil

    found: dict[int, Size] = {}
    for _ in range(5):
        time.sleep(POLL_S)
        for pid in server.members():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                memory = process.memory_info()
                # Without the pages of files, which are read again and again.
                own = (memory.rss - memory.shared) / (1 << 20)
                size = Size(process.name(), process.num_fds(), process.num_threads(), own)
                least = found.get(pid, size)
                found[pid] = Size(
                    size.name,
                    min(size.descriptors, least.descriptors),
                    min(size.threads, least.threads),
                    min(size.mib, least.mib),
                )
    return found


def _processor_seconds(server: Server) -> tuple[float, float]:
    """Return processor seconds of the machine, and those of the server and of here, negative."""
    import psutil

    times = psutil.cpu_times()
    own = 0.0
    for pid in {*server.members(), os.getpid()}:
        with contextlib.suppress(psutil.Error):
            used = psutil.Process(pid).cpu_times()
            own += used.user + used.system
    return float(sum(times)) - times.idle - times.iowait - times.guest - times.guest_nice, -own


def _left(tested: ServerUnderTest) -> list[str]:
    """Leave streams after their first piece; return the problems of the requests behind them."""
    before = _metrics(tested)
    for _ in range(LEAVERS):
        if problem := _leave(tested):
            return [problem]
    deadline = time.monotonic() + PATIENCE_S
    while (now := _metrics(tested)).get("num_requests_running") and time.monotonic() < deadline:
        time.sleep(POLL_S)
    # The share of used blocks is that after the last step of the engine.
    if refused := _post(tested, _body("a", 1)).refused:
        return [f"after clients left their streams: {refused}"]
    while (now := _metrics(tested)).get("kv_cache_usage_perc") and time.monotonic() < deadline:
        time.sleep(POLL_S)
    made = now.get("generation_tokens_total", 0) - before.get("generation_tokens_total", 0)
    problems = [
        f"vLLM has no metric {name}"
        for name in ("num_requests_running", "kv_cache_usage_perc", "generation_tokens_total")
        if name not in now
    ]
    if now.get("num_requests_running"):
        problems.append(f"{now['num_requests_running']:g} requests run that nobody reads")
    if now.get("kv_cache_usage_perc"):
        problems.append(f"{now['kv_cache_usage_perc']:.2%} of the blocks stay in use")
    if made >= LEAVERS * MOST:
        problems.append(f"all {made:g} tokens were made for clients that had left")
    return problems


def _leave(tested: ServerUnderTest) -> str | None:
    """Read the first piece of a stream, and close its connection. Return what went wrong."""
    address = tested.address
    connection = http.client.HTTPConnection(address.near, address.port, timeout=tested.limit_s)
    try:
        body = json.dumps(_body("b", MOST) | {"stream": True})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        first = reply.readline()
        reply.close()
    except (OSError, http.client.HTTPException) as exc:
        return f"a stream does not begin: {str(exc) or type(exc).__name__}"
    finally:
        connection.close()
    return None if first.startswith(b"data:") else f"a stream begins with {first[:60]!r}"


def _metrics(tested: ServerUnderTest) -> Mapping[str, float]:
    """Return the numbers of /metrics by name, without `vllm:`; the sum over their labels."""
    found: dict[str, float] = {}
    text = _post(tested, None, "/metrics").text
    for name, value in re.findall(r"^vllm:(\w+)(?:\{.*\})? ([\d.e+-]+)$", text, re.MULTILINE):
        found[name] = found.get(name, 0.0) + float(value)
    return found
