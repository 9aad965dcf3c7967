"""Real servers of the built vLLM: they answer and stream, and leave nothing, however and whenever
they are ended.

CYCLES (50) is the number of starts that are ended at a random moment, SEED selects the moments,
MODEL (tiny) is the model.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from workspace.core.paths import Layout
from workspace.core.settings import load
from workspace.server import lifecycle, observation, process_tree

CYCLES, SEED, MODEL = (
    int(os.environ.get("CYCLES", "50")),
    int(os.environ.get("SEED", "0")),
    os.environ.get("MODEL", "tiny"),
)
START_TIMEOUT_S = 600
# Run by the built interpreter, which has vLLM's own openai client.
CLIENT = """
import asyncio, json, sys, time
import httpx, openai
url, model, what = sys.argv[1:]
messages = [{"role": "user", "content": "What is the capital of France?"}]
ask = {"model": model, "messages": messages, "temperature": 0}
if what == "chat":
    client = openai.OpenAI(base_url=url, api_key="none")
    create = client.chat.completions.create
    whole = create(**ask, max_tokens=12).choices[0].message.content
    stream = create(**ask, max_tokens=12, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    body = {**ask, "max_tokens": 4, "stream": True}
    lines = httpx.post(f"{url}/chat/completions", json=body, timeout=300).text.strip().splitlines()
    streamed = {"streamed": "".join(pieces), "chunks": len(pieces)}
    print(json.dumps({"whole": whole, **streamed, "last": lines[-1]}))
else:
    count, tokens = map(int, what.split("x"))
    async def one(client):
        try:
            done = await client.chat.completions.create(
                **ask, max_tokens=tokens, extra_body={"ignore_eos": True}
            )
            return done.usage.completion_tokens
        except openai.OpenAIError:
            return None
    async def main():
        all_at_once = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=600)
        client = openai.AsyncOpenAI(
            base_url=url, api_key="none", timeout=600, max_retries=0, http_client=all_at_once
        )
        print("asking", file=sys.stderr, flush=True)
        return await asyncio.gather(*(one(client) for _ in range(count)))
    started = time.monotonic()
    print(json.dumps({"tokens": asyncio.run(main()), "seconds": time.monotonic() - started}))
"""


class Serving:
    """`inv serve` of this clone, with a watch on the processes and shared memory of its server."""

    def __init__(self, layout: Layout, *args: str, extra: tuple[str, ...] = ()) -> None:
        self.layout, self.port = layout, lifecycle.free_port()
        self.inv = [sys.executable, "-Es", str(layout.root / "tasks.py")]
        self.seen: dict[int, int] = {}
        self.shared: set[str] = set()
        self.folders: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        argv = [*self.inv, "serve", MODEL, *args, "--", "--port", str(self.port), *extra]
        self.verb = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            there = self.there()
            if there:
                members = there.members()
                known = process_tree.living()
                self.seen |= {pid: known[pid].started for pid in members if pid in known}
                self.shared |= process_tree.shared_by(members)
                self.folders.add(there.processes.folder)

    def there(self) -> observation.Server | None:
        return observation.find(self.layout.server)

    def wait(self) -> str:
        """Wait until the server is ready, and return its address."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ((there := self.there()) and there.is_ready):
            if self.verb.poll():
                pytest.fail(self.verb.communicate()[1])
            assert time.monotonic() < deadline
            time.sleep(0.2)
        return f"{there.address.url}/v1"

    def ask(self, url: str, what: str) -> "subprocess.Popen[str]":
        argv = [str(self.layout.environment_python), "-c", CLIENT, url, MODEL, what]
        environment = load(self.layout).child_environment("run")
        return subprocess.Popen(
            argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def stop(self) -> None:
        done = subprocess.run(
            [*self.inv, "serve.stop"], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr

    def front(self) -> int | None:
        there = self.there()
        known = process_tree.living()
        return next(
            (
                pid
                for pid, process in known.items()
                if there and process.parent == there.processes.supervisor_pid
            ),
            None,
        )

    def judge(self) -> None:
        """Assert that all processes, files and folders that were ever seen are gone."""
        self.verb.communicate(timeout=120)
        self._over.set()
        self._thread.join()
        known = process_tree.living()
        assert [
            pid
            for pid, started in self.seen.items()
            if pid in known and known[pid].started == started
        ] == []
        assert [name for name in self.shared if Path(name).exists()] == []
        assert [folder for folder in self.folders if Path(folder).exists()] == []
        assert self.there() is None
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", self.port))
        done = subprocess.run(
            [*self.inv, "serve.status", "--json"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert json.loads(done.stdout)["state"] == "none"


@pytest.fixture
def serving(layout: Layout) -> Iterator[Callable[..., Serving]]:
    started: list[Serving] = []

    def start(*args: str, extra: tuple[str, ...] = ()) -> Serving:
        started.append(Serving(layout, *args, extra=extra))
        return started[-1]

    yield start
    for one in started:
        one._over.set()
        one.stop()
        if one.verb.poll() is None:
            one.verb.kill()
        one.verb.communicate()


def test_chat_is_answered_and_streamed_and_200_requests_at_once_are_answered(
    serving,
) -> None:
    one = serving("--detach")
    url = one.wait()
    out, err = one.ask(url, "chat").communicate(timeout=300)
    output = json.loads(out or pytest.fail(err))
    assert output["whole"]
    assert output["streamed"] == output["whole"]
    assert output["chunks"] > 1
    assert output["last"] == "data: [DONE]"
    if MODEL == "smollm2":
        assert "Paris" in output["whole"]
    out, err = one.ask(url, "200x16").communicate(timeout=900)
    output = json.loads(out or pytest.fail(err))
    assert output["tokens"] == [16] * 200
    print(f"\n200 requests of 16 tokens in {output['seconds']:.1f} s")
    one.stop()
    one.judge()


def test_sigterm_in_the_middle_of_200_requests_leaves_nothing(serving) -> None:
    one = serving()
    url = one.wait()
    client = one.ask(url, "200x300")
    assert client.stderr.readline() == "asking\n"
    time.sleep(3)
    one.verb.send_signal(signal.SIGTERM)
    assert one.verb.wait(timeout=120) == 128 + signal.SIGTERM
    out, _ = client.communicate(timeout=300)
    assert None in json.loads(out)["tokens"]
    one.judge()


def test_any_end_at_any_moment_leaves_nothing(serving) -> None:
    moments = random.Random(SEED)
    one, began = serving("--detach"), time.monotonic()
    one.wait()
    # About one start of five becomes ready before its moment, on a machine of constant speed.
    longest_s = 1.25 * (time.monotonic() - began)
    one.stop()
    one.judge()
    for cycle in range(CYCLES):
        moment_s = moments.uniform(0, longest_s)
        how = moments.choice(
            [
                "stop",
                "stop",
                "stop",
                "SIGINT",
                "SIGTERM",
                "kill verb",
                "kill front",
                "kill supervisor",
                "kill all",
            ]
        )
        one = serving(
            *(["--detach"] if how in ("stop", "kill front", "kill supervisor", "kill all") else [])
        )
        started = time.monotonic()
        while (
            time.monotonic() - started < moment_s
            and one.verb.poll() is None
            and not ((there := one.there()) and there.is_ready)
        ):
            time.sleep(0.05)
        there, reached = one.there(), time.monotonic() - started
        phase = "ready" if there and there.is_ready else "starting" if there else "before"
        if how in ("SIGINT", "SIGTERM", "kill verb"):
            one.verb.send_signal(
                {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "kill verb": signal.SIGKILL}[
                    how
                ]
            )
            one.verb.communicate(timeout=120)
        elif there and how != "stop":
            pids = {
                "kill front": [one.front()],
                "kill supervisor": [there.processes.supervisor_pid],
                "kill all": sorted(there.members()),
            }[how]
            for pid in filter(None, pids):
                os.kill(pid, signal.SIGKILL)
        if how == "stop" and there is None:
            # There is no server to stop yet: end the task itself.
            one.verb.terminate()
            one.verb.communicate(timeout=120)
        ended = time.monotonic()
        one.stop()
        one.judge()
        print(
            f"\n{cycle + 1:2} of {CYCLES}: {how} after {reached:.1f} s ({phase}), {len(one.seen)}"
            f" processes, gone in {time.monotonic() - ended:.1f} s",
            end="",
            flush=True,
        )
