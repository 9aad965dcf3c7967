"""Situations of the server, whose vLLM is the stand-in of tests/server."""

import math
import os
import re
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.proof.hints.following import User, printed, runs
from tests.server.test_request import FLAGS, MODEL, fill
from tests.small import wheels
from tests.small.world import Ended
from workspace.machine import hardware
from workspace.server import lifecycle, observation

STANDIN = Path(__file__).parents[2] / "server" / "standin.py"

MORE = (
    "gpu-memory-utilization max-num-seqs max-model-len api-key hf-token model config uds headless"
    " dtype enforce-eager tensor-parallel-size"
)
VLLM = """#!/bin/sh
for arg; do
  case $arg in
    --help*) echo "usage: vllm serve [--port PORT]"; exit;;
    --headless) exit;;
    --port=*) port=${arg#--port=};;
  esac
  test "$last" = --port && port=$arg
  last=$arg
done
exec PYTHON -S STANDIN $port "$(cat "$0.manner" 2> /dev/null)"
"""


def serving(user: User) -> Path:
    """Let the small vLLM have a command line and a server; return the folder of a model."""
    lines = [f'    parser.add_argument("--{name}")' for name in f"{FLAGS} {MORE}".split()]
    source = "\n".join(["def make(parser):", *lines, ""])
    fill(user.vllm / "vllm", {"engine/arg_utils.py": source})
    program = user.world.layout.environment / "bin" / "vllm"
    program.write_text(VLLM.replace("PYTHON", sys.executable).replace("STANDIN", str(STANDIN)))
    program.chmod(0o755)
    return fill(user.root / "model", MODEL)


def manner(user: User, name: str) -> None:
    (user.world.layout.environment / "bin" / "vllm.manner").write_text(name)


@runs(
    "server.key_in_dotenv", "server.token_in_dotenv", "server.flags_of_config",
    "server.model_first", "server.needs_port", "server.run_headless", "server.vllm_help",
    "server.all_flags", "server.port", "server.host", "server.utilization", "server.positive",
    "server.max_model_len",
)  # fmt: skip
def flags_that_inv_serve_refuses(user: User) -> None:
    model = str(serving(user))
    again = {"serve MODEL": f"serve --dry-run {model}"}
    for flag, name, put in (
        ("--config=x.yaml", "server.flags_of_config", again | {"FLAGS": "--port 8001"}),
        ("--model=x", "server.model_first", again),
        ("--uds=x", "server.needs_port", again),
        ("--headless", "server.run_headless", {"MODEL": model}),
        ("--help", "server.vllm_help", {}),
        ("--zzzzzz", "server.all_flags", {}),
        ("--port=x", "server.port", again),
        ("--host=", "server.host", again),
        ("--gpu-memory-utilization=3", "server.utilization", again),
        ("--max-num-seqs=0", "server.positive", again),
        ("--max-model-len=x", "server.max_model_len", again),
        ("--api-key=x", "server.key_in_dotenv", {"=KEY": "=a-key-of-mine"}),
        ("--hf-token=x", "server.token_in_dotenv", {"=TOKEN": "=hf_abcdefghijklmnop"}),
    ):
        user.follow(name, "serve", model, "--dry-run", "--", flag, put=put, then=False)
    assert user.inv("serve", model, "--dry-run").code == 0
    assert "VLLM_API_KEY=a-key-of-mine" in user.world.layout.dotenv.read_text()


@runs("server.name", "server.memory", "server.restart", "server.least_memory")
def flags_of_inv_serve_itself(user: User) -> None:
    model = str(serving(user))
    verb = ("serve", model, "--dry-run")
    again = {"serve MODEL": f"serve --dry-run {model}"}
    for flag, name in (("--name", "A b"), ("--memory", "x"), ("--restart", "x")):
        user.follow(f"server.{flag[2:]}", *verb, flag, name, put=again, then=False)
    dry = {"inv serve": "inv serve --dry-run"}
    user.follow("server.least_memory", *verb, "--memory", "0.5", put=dry, then=False)


@runs("server.which", "server.of_name", "server.stop_of_then")
def several_servers(user: User) -> None:
    serving(user)
    model = str(user.root / "model")
    try:
        for name in ("a", "b"):
            port = str(lifecycle.free_port())
            done = user.inv("serve", model, "--name", name, "--port", port, "--detach")
            assert done.code == 0, done.output
        user.look("server.which", "serve.stop", shows="serves standin")
        user.look("server.which", "serve.logs", shows="serves standin")
        user.commit("[Core] Mine", vllm__mine_py="mine = 1\n")
        user.follow("server.stop_of_then", "serve.status", then=False)
        there = observation.find(observation.place_of(user.world.layout, "b"))
        assert there
        for pid in there.members():
            os.kill(pid, signal.SIGKILL)
        while there.members():
            time.sleep(0.02)
        user.look("server.of_name", "serve.status", shows="engine started")
    finally:
        done = user.inv("serve.stop", "--all")
        assert done.code == 0, done.output
        assert observation.servers(user.world.layout) == ()


@runs("server.api_key")
def server_for_everyone_without_a_key(user: User) -> None:
    verb = ("serve", str(serving(user)), "--dry-run", "--", "--host", "0.0.0.0")
    user.follow("server.api_key", *verb, put={"=KEY": "=a-key-of-mine"})


@runs("server.tokenizer", "server.read_or_tokenizer", "core.read_log", "core.list_names")
def model_that_vllm_would_refuse_late(user: User) -> None:
    model = serving(user)
    verb = ("serve", str(model), "--dry-run")
    (model / "tokenizer.json").unlink()
    again = {"serve MODEL": f"serve --dry-run {model}", "NAME": "gpt2"}
    user.follow("server.tokenizer", *verb, put=again, then=False)
    (model / "tokenizer.json").write_text("{damaged")
    user.look("server.read_or_tokenizer", *verb, shows="damaged")
    (model / "config.json").write_text("{broken")
    user.look("core.read_log", *verb, shows="broken")
    (model / "config.json").unlink()
    user.look("core.list_names", *verb, shows="model.safetensors")


@runs("core.list_files", "core.list_folder", "server.installed")
def flags_that_point_nowhere(user: User) -> None:
    verb = ("serve", str(serving(user)), "--dry-run", "--")
    pem = user.root / "mine.pem"
    pem.write_text("none")
    flags = (f"--ssl-certfile={pem}", f"--ssl-keyfile={pem}")
    user.look("core.list_files", *verb, *flags, shows="mine.pem")
    user.look("core.list_folder", *verb, "--chat-template=/nowhere/t.jinja", shows="/")
    user.look("server.installed", *verb, "--middleware=no_such.Module", shows="torch")


@runs("server.install_plugin")
def model_that_needs_a_plugin(user: User) -> None:
    serving(user)
    (user.root / "m.gguf").write_text("x")
    folder = user.root / "plugin"
    folder.mkdir()
    files = {"vllm_gguf_plugin/__init__.py": b""}
    user.world.index.add(wheels.write(folder, "vllm-gguf-plugin", "0.0.2", files))
    user.follow("server.install_plugin", "serve", str(user.root / "m.gguf"), "--dry-run")


@runs("server.unset_offline", "server.online_dotenv")
def hub_that_may_not_be_asked(user: User) -> None:
    verb = ("serve", str(serving(user)), "--dry-run", "--", "--tokenizer", "acme/other")
    command = user.meets("server.unset_offline", *verb, HF_HUB_OFFLINE="1")
    done = user.type(f"{command} && ./scripts/inv {shlex.join(verb)}", HF_HUB_OFFLINE="1")
    assert done.code == 0, done.output
    user.followed.add("server.unset_offline")
    user.world.layout.dotenv.write_text("HF_HUB_OFFLINE=1\n")
    user.follow("server.online_dotenv", *verb)
    assert user.world.layout.dotenv.read_text() == "# HF_HUB_OFFLINE=1\n"


@runs("server.edit_recipe", "server.edit_recipe_keys", "server.keys", "inv.serve_list")
def recipes_with_errors(user: User) -> None:
    serving(user)
    recipe = user.root / "recipes" / "tiny.toml"
    text = recipe.read_text()
    (user.root / "right.toml").write_text(text)
    user.edits_with(f'cp {user.root / "right.toml"} "$file"')
    for name, wrong in (
        ("server.edit_recipe", "[memory\n"),
        ("server.edit_recipe_keys", text.replace("weights_gib = 0.1", 'weights_gib = "x"')),
        ("server.keys", text.replace("[memory]", "[memory]\nweight = 1")),
    ):
        recipe.write_text(wrong)
        user.follow(name, "serve", "tiny", "--dry-run")
        assert recipe.read_text() == text
    user.look("inv.serve_list", "serve", "qqqqqq", "--dry-run", shows="tiny")


FETCH = """import json, sys
from pathlib import Path

kind = (Path(__file__).parents[2] / "kind").read_text()
if kind == "killed":
    sys.exit("killed")
if kind == "fine":
    cache = Path.home() / ".cache/huggingface/hub/models--acme--tiny"
    commit = "0" * 40
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    folder = cache / "snapshots" / commit
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    print(json.dumps({"error": None, "folder": str(folder), "bytes": 6, "seconds": 1.0}))
else:
    print(json.dumps({"error": {"kind": kind, "said": "no"}}))
"""


@runs(
    "server.gate", "server.disk_or_home", "server.network", "server.resume_fetch",
    "server.serve_recipe",
)  # fmt: skip
def model_that_the_hub_does_not_give(user: User) -> None:
    serving(user)
    (user.world.layout.probes / "fetch_model.py").write_text(FETCH)
    kind, verb = user.root / "kind", ("serve.fetch", "acme/tiny")
    kind.write_text("gated")
    user.follow("server.gate", *verb, put={"=TOKEN": "=hf_abcdefghijklmnop"}, then=False)
    kind.write_text("disk")
    user.look("server.disk_or_home", *verb, shows="Filesystem")
    kind.write_text("broken")
    shown = user.type(user.meets("server.network", *verb))
    assert re.search(r"index", shown.out), shown.output
    user.followed.add("server.network")
    kind.write_text("killed")
    command = user.meets("server.resume_fetch", *verb)
    kind.write_text("fine")
    done = user.type(command)
    serve = printed("server.serve_recipe", done)
    assert (done.code, bool(serve)) == (0, True), done.output
    done = user.type(f"{serve} --dry-run")
    assert done.code == 0, done.output
    user.followed |= {"server.resume_fetch", "server.serve_recipe"}


@contextmanager
def started(user: User) -> Iterator[tuple[str, ...]]:
    """Run a server in the background, and end it."""
    verb = (
        "serve", str(user.root / "model"), "--detach", "--",
        "--port", str(lifecycle.free_port()),
    )  # fmt: skip
    try:
        yield verb
    finally:
        there = observation.find(user.world.layout.server)
        if there:
            lifecycle.stop(there, at_once=True)


@runs("server.started", "server.status_or_stop", "server.last_lines", "server.other_port",
      "server.stop_then", "server.logs_or_stop", "inv.serve_stop")  # fmt: skip
def server_that_runs(user: User) -> None:
    serving(user)
    with started(user) as verb:
        user.look("server.started", *verb, shows="serves standin")
        user.look("server.status_or_stop", *verb, shows="serves standin")
        user.look("server.last_lines", "serve.logs", "--lines", "0", shows="engine started")
        user.commit("[Core] Mine", vllm__mine_py="mine = 1\n")
        user.follow("server.stop_then", "serve.status", then=False)
        status = user.inv("serve.status")
        assert "serves standin" in status.out, status.output
        assert "another tree" not in status.out, status.output
        there = observation.find(user.world.layout.server)
        assert there
        os.kill(there.processes.supervisor_pid, signal.SIGKILL)
        while observation.is_alive(there):
            time.sleep(0.02)
        user.follow("inv.serve_stop", "serve.status", then=False)
        assert "no server runs" in user.inv("serve.status").out
        assert user.inv(*verb).code == 0
        there = observation.find(user.world.layout.server)
        assert there
        for pid in there.members():
            os.kill(pid, signal.SIGKILL)
        while there.members():
            time.sleep(0.02)
        user.follow("server.logs_or_stop", "serve.status", then=False)
        assert "no server runs" in user.inv("serve.status").out
        with socket.create_server(("127.0.0.1", int(verb[-1]))):
            user.look("server.other_port", *verb, shows=verb[-1])


@runs("server.damaged_state", "inv.serve_logs")
def server_whose_state_is_damaged_or_that_is_deaf(user: User) -> None:
    serving(user)
    with started(user) as verb:
        assert user.inv(*verb).code == 0
        there = observation.find(user.world.layout.server)
        assert there
        front = [pid for pid in there.members() if pid != there.processes.supervisor_pid]
        for pid in front:
            os.kill(pid, signal.SIGSTOP)
        try:
            user.look("inv.serve_logs", "serve.status", shows="engine started")
        finally:
            for pid in front:
                os.kill(pid, signal.SIGCONT)
        assert user.inv("serve.stop").code == 0
    path = observation.state(user.world.layout.server)
    path.write_text("{")
    ended = user.inv("serve.status")
    command = printed("server.damaged_state", ended)
    assert command, ended.output
    user.type(command)
    rest = re.search(r"then (rm \S+)", ended.err)
    assert rest, ended.output
    assert user.type(rest[1]).code == 0
    assert user.inv("serve.status").code == 0
    user.followed.add("server.damaged_state")


@runs("server.follow", "inv.serve_status")
def server_that_is_stopped_during_its_start(user: User) -> None:
    serving(user)
    manner(user, "slow")
    with started(user) as verb, ThreadPoolExecutor(1) as typing:
        starting = user.world.start(*verb)
        while (there := observation.find(user.world.layout.server)) is None:
            time.sleep(0.05)
        while "engine started" not in there.log.read_text():
            time.sleep(0.05)
        followed = typing.submit(user.type, user.meets("server.follow", "serve.status"))
        assert user.inv("serve.stop").code == 0
        log = followed.result(timeout=60)
        assert (log.code, "engine started" in log.out) == (0, True), log.output
        out, err = starting.communicate(timeout=60)
        command = printed("inv.serve_status", Ended(starting.returncode, out, err))
        assert command, err
        assert "no server runs" in user.type(command).out
    user.followed |= {"server.follow", "inv.serve_status"}


@runs("server.cpu_cache")
def cache_that_the_memory_has_no_room_for(user: User) -> None:
    most = math.floor(hardware.observe().memory_gib)
    user.world.layout.dotenv.write_text(f"VLLM_CPU_KVCACHE_SPACE={most}\n")
    user.follow("server.cpu_cache", "serve", str(serving(user)), "--dry-run")
