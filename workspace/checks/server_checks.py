"""The server of the built tree, asked over HTTP as its users do: one start on the tiny Llama in a
place of its own, and nothing left of it.

Whatever it does, or does not, is a failed check that names the cause; after `limit_s` seconds it is
ended, and has told its stacks. What a right reply is, is in replies.py.
"""

import contextlib
import http.client
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from workspace.checks import http_checks, stack_dumps
from workspace.checks.http_checks import Reply, Row
from workspace.checks.numeric import MAX_DIFFERENCE
from workspace.checks.registry import Check, judged
from workspace.core.errors import ServeError, WorkspaceError
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.server import flags, lifecycle, observation, process_tree
from workspace.server.observation import Address, Server, find, is_alive

NAME = "tiny"
CHECKS = (
    "ready",
    "completions",
    "chat",
    "stream",
    "logprobs",
    "structured",
    "bad_request",
    "concurrent",
    "stop",
)
# Of an answer that is compared with itself, asked for in another way; as few as in
# consistency.batch, since batches round differently.
TOKENS = 16
# Which of the words that it says it is asked to stop at.
STOP_WORD = 2
# How many requests stand in line at once, and as how many are worked on at once.
AT_ONCE, BATCH = 24, 16
LENGTH = 512
LONGEST_REPLY = 16 << 20
# A front that has heard of its engine's end takes a moment to end, too.
DYING_S = 10.0
# vLLM ends within a second; on a machine that is busy with other things it may take longer.
STOP_S = 30.0
KEPT_LOG_LINES = 300
# The tiny model has no template (see recipes/tiny.toml); its special tokens are none that a
# template could name.
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
# As probes/parity.py: float32 products in float32, sums in a fixed order. The engine of a server is
# a process of its own.
ENVIRONMENT: Mapping[str, str] = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVIDIA_TF32_OVERRIDE": "0",
    "TRITON_F32_DEFAULT": "ieee",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    **stack_dumps.FAULTS,
}
_MEMORY = ("--gpu-memory-utilization=0.1", "--kv-cache-memory-bytes=268435456")

Verdict = tuple[list[str], str]


@dataclass(frozen=True)
class Subject:
    """What is started, and what is expected of it: the version that is stamped, and what the
    offline engine answers. `environment` is complete.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    address: Address
    version: str
    rows: tuple[Row, ...]
    limit_s: float


def subject(
    layout: Layout,
    environment: Mapping[str, str],
    model: Path,
    *,
    version: str,
    device: str,
    rows: tuple[Row, ...],
    limit_s: float,
) -> Subject:
    """Put together what is started, at a free port. Raises SettingsError and ToolchainError where
    the tree's command line does not know it.
    """
    address = Address("127.0.0.1", lifecycle.free_port())
    words = [
        "--enforce-eager",
        "--dtype=float32",
        "--seed=0",
        f"--max-model-len={LENGTH}",
        f"--max-num-seqs={BATCH}",
        f"--served-model-name={NAME}",
    ]
    words += [
        f"--chat-template={TEMPLATE}",
        f"--host={address.host}",
        f"--port={address.port}",
        *(_MEMORY if device == "cuda" else ()),
    ]
    judged_words = flags.judge(words, flags.known(layout)).words
    # Who knows the user's key could ask, and this server is nobody's but the smoke's.
    open_to_us = {name: text for name, text in environment.items() if name != "VLLM_API_KEY"}
    return Subject(
        (str(layout.environment / "bin" / "vllm"), "serve", str(model), *judged_words),
        open_to_us,
        address,
        version,
        rows,
        limit_s,
    )


def failed(why: str, seconds: float, names: tuple[str, ...] = CHECKS) -> tuple[Check, ...]:
    """The checks of a server that is not there."""
    return tuple(
        judged(f"server.{name}", [why], "", seconds if name == names[0] else 0.0) for name in names
    )


def run(
    place: Path, what: Subject, *, run_log: RunLog
) -> tuple[tuple[Check, ...], tuple[str, ...]]:
    """Start the server below `place`, ask it, stop it. Return the verdicts, and the stacks of what
    hung.
    """
    started = time.monotonic()
    if not what.rows or any(len(row.named(TOKENS)) <= STOP_WORD for row in what.rows):
        return failed("the offline engine gave no answer that could be compared with", 0.0), ()
    try:
        _end_former(place)
        there = lifecycle.start(
            place, lifecycle.Launch("smoke", what.argv, what.environment, what.address)
        )
    except WorkspaceError as exc:
        return failed(exc.message, time.monotonic() - started), ()
    try:
        with stack_dumps.Watch(
            what.limit_s,
            lambda: there.members() - {there.family.keeper},
            environment=what.environment,
        ) as watch:
            found = list(_asked(there, what, watch))
        found.append(_stopped(there, what))
    except BaseException:
        lifecycle.stop(there, at_once=True)
        raise
    said = there.log.read_text(encoding="utf-8", errors="replace")
    if any(check.verdict == "fail" for check in found):
        run_log.phase("server")
        for line in (*watch.seen, *said.splitlines()[-KEPT_LOG_LINES:]):
            run_log.write(line)
    return tuple(found), watch.told(said)


def _asked(there: Server, what: Subject, watch: stack_dumps.Watch) -> Iterator[Check]:
    """All verdicts but the last. One who has died is asked no more."""
    started = time.monotonic()
    try:
        # The watch ends it before.
        _, ready = lifecycle.wait_until_ready(there, timeout_s=2 * what.limit_s)
    except ServeError as exc:
        yield from failed(
            _late(what, "not ready") if watch.has_fired else exc.message,
            time.monotonic() - started,
            CHECKS[:-1],
        )
        return
    client = _Client(what)
    for place, name in enumerate(CHECKS[:-1]):
        at = time.monotonic()
        problems, fine = client.ready(ready) if name == "ready" else client.judges[name]()
        if problems and (why := _late(what, "not done") if watch.has_fired else _death(there)):
            yield from failed(why, time.monotonic() - at, CHECKS[place:-1])
            return
        yield judged(
            f"server.{name}",
            problems,
            fine,
            ready.seconds if name == "ready" else time.monotonic() - at,
        )


class _Client:
    """Asks, and has what comes back judged. An answer that others are compared with is kept."""

    def __init__(self, what: Subject) -> None:
        self._what, self._row, self._whole, self._texts = (
            what,
            what.rows[0],
            "",
            dict.fromkeys((row.text for row in what.rows), ""),
        )
        self._patience_s = what.limit_s + stack_dumps.TELL_S
        self.judges: Mapping[str, Callable[[], Verdict]] = {
            name: getattr(self, name) for name in CHECKS[1:-1]
        }

    def ready(self, ready: lifecycle.Ready) -> Verdict:
        version = self._post("/version", None).document.get("version")
        problems = (
            []
            if ready.models == (NAME,)
            else [f"it serves {', '.join(ready.models)}, asked for was {NAME}"]
        )
        problems += (
            []
            if version == self._what.version
            else [f"it calls itself vLLM {version}, stamped is {self._what.version}"]
        )
        return problems, f"vLLM {version} completes after {ready.seconds:.1f} s"

    def completions(self) -> Verdict:
        answers = self._complete([row.text for row in self._what.rows])
        problems = http_checks.completions(answers, self._what.rows, TOKENS)
        for row in self._what.rows:
            self._texts[row.text] = http_checks.text_of(self._complete(row.text))
        self._whole = self._texts[self._row.text]
        word = self._row.named(TOKENS)[STOP_WORD]
        problems += http_checks.stopped(
            self._complete(self._row.text, stop=[f"<{word}>"]), self._row, word
        )
        return (
            problems,
            f"{len(self._what.rows)} prompts at once answered as offline, one stopped at a word",
        )

    def chat(self) -> Verdict:
        text = http_checks.text_of(self._complete(f"{self._row.text} "))
        return (
            http_checks.chat(self._talk(), text, self._row, TOKENS),
            "as the completion of what its template makes",
        )

    def stream(self) -> Verdict:
        problems, pieces = http_checks.stream(
            self._complete(self._row.text, stream=True), self._whole, is_chat=False
        )
        whole = http_checks.text_of(self._complete(f"{self._row.text} "))
        more, others = http_checks.stream(self._talk(stream=True), whole, is_chat=True)
        return [
            *problems,
            *(f"chat: {problem}" for problem in more),
        ], f"{pieces} and {others} pieces make the whole, [DONE] ends both"

    def logprobs(self) -> Verdict:
        longest = max(len(row.tokens) for row in self._what.rows)
        prompts = [list(row.prompt) for row in self._what.rows]
        reply = self._complete(
            prompts, max_tokens=longest, logprobs=1, return_tokens_as_token_ids=True
        )
        return http_checks.logprobs(reply, self._what.rows, MAX_DIFFERENCE)

    def structured(self) -> Verdict:
        return http_checks.structured(
            self._talk(
                max_tokens=LENGTH // 2,
                ignore_eos=False,
                response_format=_formed(http_checks.SCHEMA),
            )
        )

    def bad_request(self) -> Verdict:
        cases: Mapping[str, tuple[str, object]] = {
            "no document": ("/v1/completions", b'{"model": "tiny", '),
            "no table": ("/v1/completions", ["tiny"]),
            "an unknown model": ("/v1/completions", self._body(prompt="a", model="none")),
            "a prompt that is too long": ("/v1/completions", self._body(prompt="a" * 2 * LENGTH)),
            "a token that is none": ("/v1/completions", self._body(prompt=[1 << 30])),
            "a negative length": ("/v1/completions", self._body(prompt="a", max_tokens=-1)),
            "a temperature in words": (
                "/v1/completions",
                self._body(prompt="a", temperature="hot"),
            ),
            "no messages": ("/v1/chat/completions", self._body()),
            "a schema that is none": (
                "/v1/chat/completions",
                self._chat_body(
                    response_format={
                        "type": "json_schema",
                        "json_schema": {"name": "x", "schema": {"type": "nothing"}},
                    }
                ),
            ),
            "an unknown path": ("/v1/nothing", self._body(prompt="a")),
        }
        problems = [
            problem
            for case, (path, body) in cases.items()
            for problem in http_checks.refused(case, self._post(path, body))
        ]
        if (again := http_checks.text_of(self._complete(self._row.text))) != self._whole:
            problems.append(
                f"after bad requests it answers a good one with {again[:40]!r}, before it was"
                f" {self._whole[:40]!r}"
            )
        return (
            problems,
            f"{len(cases)} refused with 4xx and a word why; a good one is answered as before",
        )

    def concurrent(self) -> Verdict:
        texts = [row.text for row in self._what.rows]
        asked = [texts[number % len(texts)] for number in range(AT_ONCE)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(self._complete, asked))
        problems = [answer.refused for answer in answers if answer.refused]
        others = sum(
            not answer.refused and http_checks.text_of(answer) != self._texts[text]
            for answer, text in zip(answers, asked, strict=True)
        )
        problems += (
            [f"{others} of {AT_ONCE} requests at once are answered otherwise than alone"]
            if others or not self._whole
            else []
        )
        return problems, f"{AT_ONCE} at once answered as alone"

    def _complete(self, prompt: object, **changes: object) -> Reply:
        return self._post("/v1/completions", self._body(prompt=prompt, **changes))

    def _talk(self, **changes: object) -> Reply:
        return self._post("/v1/chat/completions", self._chat_body(**changes))

    def _chat_body(self, **changes: object) -> dict[str, object]:
        return self._body(messages=[{"role": "user", "content": self._row.text}], **changes)

    def _body(self, **changes: object) -> dict[str, object]:
        return {"model": NAME, "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True} | changes

    def _post(self, path: str, body: object) -> Reply:
        return post(self._what.address, path, body, timeout_s=self._patience_s)


def post(address: Address, path: str, body: object, *, timeout_s: float) -> Reply:
    """Ask once, with bytes as they are, else with a document, or for nothing but the path. Raises
    nothing: no answer is an answer.
    """
    connection = http.client.HTTPConnection(address.near, address.port, timeout=timeout_s)
    sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        connection.request(
            "GET" if body is None else "POST",
            path,
            body=sent,
            headers={"Content-Type": "application/json"},
        )
        reply = connection.getresponse()
        return Reply(
            reply.status,
            reply.read(LONGEST_REPLY).decode("utf-8", errors="replace"),
            reply.headers.get("Content-Type", ""),
        )
    except (OSError, http.client.HTTPException, ValueError) as exc:
        return Reply(None, str(exc) or type(exc).__name__)
    finally:
        connection.close()


def _formed(schema: Mapping[str, object]) -> Mapping[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "part", "schema": schema}}


def _late(what: Subject, how: str) -> str:
    return f"the server was {how} after {what.limit_s:g} s and was ended; its stacks are in the log"


def _death(there: Server) -> str | None:
    """Why a server has ended, None where it lives on."""
    deadline = time.monotonic() + DYING_S
    while (
        is_alive(there)
        and not observation.is_healthy(there.address)
        and time.monotonic() < deadline
    ):
        time.sleep(lifecycle.POLL_S)
    return None if is_alive(there) else lifecycle.failure(there).message


def _end_former(place: Path) -> None:
    """A smoke that was killed at the wrong moment may have left a server there; only one smoke runs
    at a time.
    """
    with contextlib.suppress(ServeError):
        if there := find(place):
            lifecycle.stop(there, at_once=True)
    # What is damaged there is nobody's to mend.
    (place / "server.json").unlink(missing_ok=True)


def _stopped(there: Server, what: Subject) -> Check:
    """Stop the front alone and see what outlives it, before everything is ended."""
    known, members = process_tree.living(), there.members()
    fronts = [
        number
        for number in members
        if number in known and known[number].parent == there.family.keeper
    ]
    problems: list[str] = []
    seconds = 0.0
    if fronts and is_alive(there):
        problems, seconds = _outlived(there, fronts, min(STOP_S, what.limit_s))
    else:
        problems = ["it had ended before it was told to"]
    try:
        ended = lifecycle.stop(there, at_once=bool(problems))
        seconds = seconds or ended.seconds
    except ServeError as exc:
        problems.append(exc.message)
    return judged(
        "server.stop",
        problems,
        f"told to end it leaves no process, no port and no shared memory; {seconds:.1f} s",
        seconds,
    )


def _outlived(there: Server, fronts: list[int], patience_s: float) -> tuple[list[str], float]:
    """What of a server is left when its front was told to end, and the seconds that it took. Its
    keeper, who would tidy, is held meanwhile.
    """
    keeper = there.family.keeper
    shared = process_tree.shared_by(there.members())
    started = time.monotonic()
    os.kill(keeper, signal.SIGSTOP)
    try:
        for number in fronts:
            os.kill(number, signal.SIGTERM)
        while (left := there.members() - {keeper}) and time.monotonic() - started < patience_s:
            time.sleep(process_tree.POLL_S)
        seconds = time.monotonic() - started
        problems = [
            f"{patience_s:g} s after it was told to end process {number} is there:"
            f" {_called(number)}"
            for number in sorted(left)
        ]
        problems += [
            f"{name} is left in shared memory"
            for name in sorted(shared)
            if not left and os.path.exists(name)
        ]
        stack_dumps.end_with_stacks(lambda: left)
    finally:
        os.kill(keeper, signal.SIGCONT)
    return problems, seconds


def _called(number: int) -> str:
    try:
        words = (
            Path(f"/proc/{number}/cmdline")
            .read_bytes()
            .replace(b"\0", b" ")
            .decode("utf-8", errors="replace")
            .strip()
        )
    except OSError:
        return "ended meanwhile"
    return words[:120] or "no name"
