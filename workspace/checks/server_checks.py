"""HTTP checks of the built tree's server: one start on the tiny Llama, requests, and a stop.

Each failure is a failed check that names the cause. After `limit_s` seconds the server is ended
with a stack dump. The verdicts on replies are in http_checks.py, more requests in http_requests.py.
"""

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from workspace.checks import http_checks, http_requests, probe_runs
from workspace.checks.http_checks import FIRST_NAMED, OfflineAnswer, Reply
from workspace.checks.http_requests import LENGTH, NAME, TOKENS, Answers, Client, Known, Verdict
from workspace.checks.numeric import MAX_DIFFERENCE
from workspace.checks.registry import Check, Expected, judged, section
from workspace.core.console import RunLog
from workspace.core.errors import ServeError, WorkspaceError
from workspace.core.paths import Layout
from workspace.server import flags, lifecycle, observation, process_tree
from workspace.server.observation import Address, Server, find, is_alive

CHECKS = (
    "ready",
    "completions",
    "chat",
    "stream",
    "logprobs",
    "parameters",
    "structured",
    "echo",
    "cache",
    "usage",
    "tokens",
    "limits",
    "bad_request",
    "concurrent",
    "stop",
)
# Index of the answer's named token that serves as the stop string.
STOP_TOKEN = 2
# Number of concurrent requests, and of those that the engine batches.
AT_ONCE, BATCH = 24, 16
# Seconds: a front-end that learns of its engine's end takes a moment to exit.
DYING_S = 10.0
# Seconds: vLLM exits within one second, on a loaded machine later.
STOP_S = 30.0
KEPT_LOG_LINES = 300
_MEMORY = ("--gpu-memory-utilization=0.1", "--kv-cache-memory-bytes=268435456")


@dataclass(frozen=True)
class ServerUnderTest:
    """The server to start, and the expected version and answers.

    `environment` is complete; `rows` are the offline engine's answers, `cases` requests with
    Hugging Face's answers, `known` its other answers and its tokens.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    address: Address
    version: str
    rows: tuple[OfflineAnswer, ...]
    cases: tuple[Mapping[str, object], ...]
    known: Known
    limit_s: float


def under_test(
    layout: Layout,
    environment: Mapping[str, str],
    model: Path,
    *,
    expected: Expected,
    answers: Answers,
    limit_s: float,
) -> ServerUnderTest:
    """Return the server to start, at a free port.

    Raises SettingsError and ToolchainError if the tree's command line lacks one of the flags.
    """
    address = Address("127.0.0.1", lifecycle.free_port())
    argv = [
        "--enforce-eager",
        "--enable-prompt-tokens-details",
        "--dtype=float32",
        "--seed=0",
        f"--max-model-len={LENGTH}",
        f"--max-num-seqs={BATCH}",
        f"--served-model-name={NAME}",
        f"--host={address.host}",
        f"--port={address.port}",
        *(_MEMORY if expected.device == "cuda" else ()),
    ]
    accepted = flags.judge(argv, flags.known(layout)).args
    return ServerUnderTest(
        (str(layout.environment / "bin" / "vllm"), "serve", str(model), *accepted),
        environment,
        address,
        expected.version,
        *answers,
        limit_s,
    )


def failed(why: str, seconds: float, names: tuple[str, ...] = CHECKS) -> tuple[Check, ...]:
    """Return the checks of a server that does not run."""
    return tuple(
        judged(f"server.{name}", [why], "", seconds if name == names[0] else 0.0) for name in names
    )


def run(
    place: Path,
    tested: ServerUnderTest,
    *,
    run_log: RunLog,
    more: Callable[[Server], Sequence[Check]] = lambda _: (),
) -> tuple[tuple[Check, ...], tuple[str, ...]]:
    """Start the server below `place`, run its checks and `more` of them, stop it.

    Returns the verdicts, and the stack dumps of processes that hung.
    """
    started = time.monotonic()
    if not tested.cases or not tested.known.is_usable:
        return failed("Hugging Face gave no answer to compare with", 0.0), ()
    if not tested.rows or any(len(row.named(TOKENS)) <= STOP_TOKEN for row in tested.rows):
        return failed("the offline engine gave no answer to compare with", 0.0), ()
    try:
        _end_abandoned(place)
        server = lifecycle.start(
            place, lifecycle.Launch("smoke", tested.argv, tested.environment, tested.address)
        )
    except WorkspaceError as exc:
        return failed(exc.message, time.monotonic() - started), ()
    try:
        with probe_runs.Watch(
            tested.limit_s, lambda: server.members() - {server.processes.supervisor_pid}
        ) as watch:
            found = list(_run_checks(server, tested, watch))
        found += more(server)
        found.append(_stop(server, tested))
    except BaseException:
        lifecycle.stop(server, at_once=True)
        raise
    server_log = server.log.read_text(encoding="utf-8", errors="replace")
    if any(check.verdict == "fail" for check in found):
        run_log.phase("server")
        for line in server_log.splitlines()[-KEPT_LOG_LINES:]:
            run_log.write(line)
    return tuple(found), probe_runs.read_stacks(server_log)


def _run_checks(
    server: Server, tested: ServerUnderTest, watch: probe_runs.Watch
) -> Iterator[Check]:
    """Yield all verdicts but the last; a dead server gets no further request."""
    started = time.monotonic()
    try:
        # The watch ends the server earlier.
        _, ready = lifecycle.wait_until_ready(server, timeout_s=2 * tested.limit_s)
    except ServeError as exc:
        yield from failed(
            _timeout_text(tested, "not ready") if watch.has_fired else exc.message,
            time.monotonic() - started,
            CHECKS[:-1],
        )
        return
    client = _Client(tested)
    for index, name in enumerate(CHECKS[:-1]):
        at = time.monotonic()
        problems, fine = client.ready(ready) if name == "ready" else client.judges[name]()
        if problems and (
            why := _timeout_text(tested, "not done") if watch.has_fired else _death(server)
        ):
            yield from failed(why, time.monotonic() - at, CHECKS[index:-1])
            return
        yield judged(
            f"server.{name}",
            problems,
            fine,
            ready.seconds if name == "ready" else time.monotonic() - at,
        )


class _Client(Client):
    """Client of the server under test; it keeps answers for later comparisons."""

    def __init__(self, tested: ServerUnderTest) -> None:
        patience_s = tested.limit_s + lifecycle.DUMP_S
        super().__init__(tested.address, tested.known.chats[0].messages, patience_s)
        self._tested, self._known, self._row = tested, tested.known, tested.rows[0]
        # The answer to the first row, and that to each row alone.
        self._whole, self._texts = "", dict.fromkeys((row.text for row in tested.rows), "")
        self.judges: Mapping[str, Callable[[], Verdict]] = {
            name: functools.partial(check, self, tested.known)
            for name, check in http_requests.CHECKS.items()
        } | {name: getattr(self, name) for name in CHECKS[1:-1] if hasattr(self, name)}

    def ready(self, ready: lifecycle.Ready) -> Verdict:
        version = self.post("/version", None).document.get("version")
        problems = (
            []
            if ready.models == (NAME,)
            else [f"it serves {', '.join(ready.models)}, expected {NAME}"]
        )
        problems += (
            []
            if version == self._tested.version
            else [f"it reports vLLM {version}, but the stamp has {self._tested.version}"]
        )
        return problems, f"vLLM {version} completes a token after {ready.seconds:.1f} s"

    def completions(self) -> Verdict:
        answers = self.complete([row.text for row in self._tested.rows])
        problems = http_checks.completions(answers, self._tested.rows, TOKENS)
        for row in self._tested.rows:
            self._texts[row.text] = http_checks.text_of(self.complete(row.text))
        self._whole = self._texts[self._row.text]
        stop = self._row.named(TOKENS)[STOP_TOKEN]
        problems += http_checks.stopped(
            self.complete(self._row.text, stop=[f"<{stop}>"]), self._row, stop
        )
        count = len(self._tested.rows)
        return (
            problems,
            f"{count} prompts in one request answered as offline, one with a stop string",
        )

    def chat(self) -> Verdict:
        first, *others = self._known.chats
        text = http_checks.text_of(self.complete(list(first.tokens)))
        problems = http_checks.chat(self.talk(), text, len(first.tokens), TOKENS)
        # A tool may be in the template without a parser of its calls.
        how = {"max_tokens": 1, "return_token_ids": True, "tool_choice": "none"}
        for chat in (first, *others):
            body = {"messages": chat.messages} | how
            reply = self.talk(**body, **chat.more)
            problems += http_checks.rendered(reply, chat)
        count = len(self._known.chats)
        return (
            problems,
            f"{count} conversations have Hugging Face's tokens, one is answered as a completion",
        )

    def stream(self) -> Verdict:
        problems, pieces = http_checks.stream(
            self.complete(self._row.text, stream=True), self._whole, is_chat=False
        )
        whole = http_checks.text_of(self.complete(list(self._known.chats[0].tokens)))
        more, others = http_checks.stream(self.talk(stream=True), whole, is_chat=True)
        return [
            *problems,
            *(f"chat: {problem}" for problem in more),
        ], f"{pieces} and {others} pieces make the complete answers, [DONE] ends both"

    def logprobs(self) -> Verdict:
        longest = max(len(row.tokens) for row in self._tested.rows)
        prompts = [list(row.prompt) for row in self._tested.rows]
        reply = self.complete(
            prompts, max_tokens=longest, logprobs=1, return_tokens_as_token_ids=True
        )
        problems, fine = http_checks.logprobs(reply, self._tested.rows, MAX_DIFFERENCE)
        more = _chat_logprobs(self, self._known)
        return [*problems, *more], f"{fine}; in chats as by Hugging Face"

    def parameters(self) -> Verdict:
        problems = []
        for case in self._tested.cases:
            params = {**section(case, "params"), "return_token_ids": True}
            problems += http_checks.parameter(self.complete(case["prompt"], **params), case)
            # In a chat the log-probabilities have other names.
            params = {name: value for name, value in params.items() if "logprob" not in name}
            messages = [{"role": "user", "content": case["message"]}]
            found = http_checks.parameter(self.talk(**params, messages=messages), case)
            problems += [f"in a chat {problem}" for problem in found]
        warm = {"prompt": self._row.text, "temperature": 1.5}
        seeds = [self.complete(**warm, seed=seed) for seed in (7, 7, 8)]
        problems += http_checks.sampled(self.complete(**warm, n=3), seeds)
        count = len(self._tested.cases)
        return problems, f"{count} cases answered as by Hugging Face, in completions and in chats"

    def structured(self) -> Verdict:
        problems, fine = http_requests.structured(self, self._known)
        # Here no bias decides, and blanks are allowed.
        schema = {"name": "part", "schema": http_requests.SCHEMA}
        free = {"type": "json_schema", "json_schema": schema}
        reply = self.talk(max_tokens=LENGTH // 2, ignore_eos=False, response_format=free)
        text = str(section(http_checks.first(reply), "message").get("content"))
        if "".join(text.split()) not in http_requests.DOCUMENTS:
            problems.append(f"a free choice: {reply.refused or http_checks.shown(text)}")
        return problems, fine

    def bad_request(self) -> Verdict:
        cases: Mapping[str, tuple[str, object]] = {
            "no document": ("/v1/completions", b'{"model": "tiny", '),
            "not an object": ("/v1/completions", ["tiny"]),
            "an unknown model": ("/v1/completions", self.body(prompt="a", model="none")),
            "a prompt that is too long": ("/v1/completions", self.body(prompt="a" * 2 * LENGTH)),
            "an unknown token": ("/v1/completions", self.body(prompt=[1 << 30])),
            "a negative length": ("/v1/completions", self.body(prompt="a", max_tokens=-1)),
            "a temperature as text": (
                "/v1/completions",
                self.body(prompt="a", temperature="hot"),
            ),
            "no messages": ("/v1/chat/completions", self.body()),
            "an invalid schema": (
                "/v1/chat/completions",
                self.chat_body(
                    response_format={
                        "type": "json_schema",
                        "json_schema": {"name": "x", "schema": {"type": "nothing"}},
                    }
                ),
            ),
            "an unknown path": ("/v1/nothing", self.body(prompt="a")),
        }
        problems = [
            problem
            for case, (path, body) in cases.items()
            for problem in http_checks.refused(case, self.post(path, body))
        ]
        if (again := http_checks.text_of(self.complete(self._row.text))) != self._whole:
            problems.append(
                f"after the bad requests it answers a good one with {again[:40]!r}, before with"
                f" {self._whole[:40]!r}"
            )
        return (
            problems,
            f"{len(cases)} refused with 4xx and a reason; a good one is answered as before",
        )

    def concurrent(self) -> Verdict:
        texts = [row.text for row in self._tested.rows]
        prompts = [texts[index % len(texts)] for index in range(AT_ONCE)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(self.complete, prompts))
        problems = [answer.refused for answer in answers if answer.refused]
        others = sum(
            not answer.refused and http_checks.text_of(answer) != self._texts[text]
            for answer, text in zip(answers, prompts, strict=True)
        )
        problems += (
            [f"{others} of {AT_ONCE} concurrent requests are not answered as they are alone"]
            if others or not self._whole
            else []
        )
        return problems, f"{AT_ONCE} concurrent requests answered as alone"


@dataclass(frozen=True)
class _Chance:
    """A token of a chat's answer, or one that could be there."""

    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: "list[_Chance] | None" = None


def _chat_logprobs(client: Client, known: Known) -> list[str]:
    """Compare log-probabilities in chats with Hugging Face's."""
    problems = []
    for name in ("logprobs", "logprob_token_ids"):
        case = known.case(name)
        params = {**case.params, "logprobs": True, "top_logprobs": case.params["logprobs"]}
        options = {**params, "messages": known.messages, "return_tokens_as_token_ids": True}
        content = _chances(client.talk(**options))
        title, is_listed = f"{name} of a chat", name != "logprobs"
        ids = [http_checks.token_id(chance.token) for chance in content]
        if ids != case.tokens:
            problems.append(f"{title}: the tokens are {ids}, expected {case.tokens}")
            continue
        for chance, position in zip(content, case.raw, strict=True):
            found = {
                http_checks.token_id(each.token): each.logprob for each in chance.top_logprobs or ()
            }
            if found.get(http_checks.token_id(chance.token)) != chance.logprob:
                problems.append(f"{title}: {chance.token} has two log-probabilities")
            problems += http_checks.position_of(title, found, position, is_listed=is_listed)
    plain = known.case("logprobs")
    count = len(plain.raw)
    options = {"messages": known.messages, "max_tokens": count, "logprobs": True}
    content = _chances(client.talk(**options, top_logprobs=0))
    named = [f"<{token}>" for token in plain.tokens or () if token >= FIRST_NAMED]
    shown = [chance.token for chance in content if chance.token.startswith("<")]
    if shown != named or any(chance.top_logprobs for chance in content):
        problems.append(f"top_logprobs 0: the tokens are {shown}, expected {named} alone")
    for chance in content:
        if chance.token in named and bytes(chance.bytes or ()) != chance.token.encode():
            problems.append(f"the bytes of {chance.token} are {chance.bytes}")
    return problems


def _chances(reply: Reply) -> list[_Chance]:
    """Return the log-probabilities of a chat's answer, empty without any."""
    logprobs = section(http_checks.first(reply), "logprobs")
    return http_checks.converted(logprobs.get("content"), list[_Chance]) or []


def _timeout_text(tested: ServerUnderTest, how: str) -> str:
    return (
        f"the server was {how} after {tested.limit_s:g} s and was ended; its stacks are in the log"
    )


def _death(server: Server) -> str | None:
    """Return why the server ended, None if it runs."""
    deadline = time.monotonic() + DYING_S
    while (
        is_alive(server)
        and not observation.is_healthy(server.address)
        and time.monotonic() < deadline
    ):
        time.sleep(lifecycle.POLL_S)
    return None if is_alive(server) else lifecycle.failure(server).message


def _end_abandoned(place: Path) -> None:
    """End a server that a killed smoke left at this place; only one smoke runs at a time."""
    with contextlib.suppress(ServeError):
        if server := find(place):
            lifecycle.stop(server, at_once=True)
    # A damaged state file cannot be repaired.
    (place / "server.json").unlink(missing_ok=True)


def _stop(server: Server, tested: ServerUnderTest) -> Check:
    """Stop the front-end alone, check what survives it, then end everything."""
    known, members = process_tree.living(), server.members()
    fronts = [
        pid
        for pid in members
        if pid in known and known[pid].parent == server.processes.supervisor_pid
    ]
    problems: list[str] = []
    seconds = 0.0
    if fronts and is_alive(server):
        problems, seconds = _survivors(server, fronts, min(STOP_S, tested.limit_s))
    else:
        problems = ["it ended before it was stopped"]
    try:
        ended = lifecycle.stop(server, at_once=bool(problems))
        seconds = seconds or ended.seconds
    except ServeError as exc:
        problems.append(exc.message)
    return judged(
        "server.stop",
        problems,
        f"it stops without a process, port or shared memory left; {seconds:.1f} s",
        seconds,
    )


def _survivors(server: Server, fronts: list[int], patience_s: float) -> tuple[list[str], float]:
    """Return the problems after the front-end got SIGTERM, and the seconds until all ended.

    The supervisor, which would clean up, is frozen meanwhile.
    """
    supervisor = server.processes.supervisor_pid
    shared = process_tree.shared_by(server.members())
    started = time.monotonic()
    os.kill(supervisor, signal.SIGSTOP)
    try:
        for pid in fronts:
            os.kill(pid, signal.SIGTERM)
        while (left := server.members() - {supervisor}) and time.monotonic() - started < patience_s:
            time.sleep(process_tree.POLL_S)
        seconds = time.monotonic() - started
        problems = [
            f"{patience_s:g} s after SIGTERM process {pid} still runs: {_command_of(pid)}"
            for pid in sorted(left)
        ]
        problems += [
            f"{name} is left in shared memory"
            for name in sorted(shared)
            if not left and os.path.exists(name)
        ]
        lifecycle.end_with_stacks(lambda: left)
    finally:
        os.kill(supervisor, signal.SIGCONT)
    return problems, seconds


def _command_of(pid: int) -> str:
    import psutil

    try:
        command = " ".join(psutil.Process(pid).cmdline()).strip()
    except psutil.Error:
        return "ended meanwhile"
    return command[:120] or "no name"
