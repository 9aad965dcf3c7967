"""`inv serve` and the other serve tasks on their command line, on a small clone with a stand-in for
vLLM: failures are sentences, and a running server is found again.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.small.materials import ROOT
from tests.small.world import World
from workspace.server import lifecycle, observation

ARGUMENTS = "".join(
    f'group.add_argument("--{name}")\n'
    for name in ("host", "port", "max-num-seqs", "gpu-memory-utilization", "served-model-name")
)
# Replaces .vllm/bin/vllm: `vllm serve MODEL --port N …`; the name of the model's folder is the
# manner of the stand-in.
STANDIN = ROOT / "tests" / "server" / "standin.py"
FRONT = f"""#!{sys.executable} -S
import os, sys
argv = sys.argv
port, manner = argv[argv.index("--port") + 1], os.path.basename(argv[2])
os.execv({sys.executable!r}, [{sys.executable!r}, "-S", {str(STANDIN)!r}, port, manner])
"""


@pytest.fixture
def clone(built: World) -> Iterator[World]:
    """A built clone whose vLLM has a command line, and a folder with a model."""
    source = built.layout.vllm / "vllm" / "engine" / "arg_utils.py"
    source.parent.mkdir(exist_ok=True)
    source.write_text(ARGUMENTS)
    program = built.layout.environment / "bin" / "vllm"
    program.unlink(missing_ok=True)
    program.write_text(FRONT)
    program.chmod(0o755)
    for manner in ("plain", "crash", "slow"):
        model = built.folder / manner
        model.mkdir(exist_ok=True)
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (model / name).write_text("{}")
    yield built
    if there := observation.find(built.layout.server):
        lifecycle.stop(there, at_once=True)
    for manner in ("plain", "crash", "slow"):
        for path in (built.folder / manner).iterdir():
            path.unlink()


def serve(clone: World, manner: str, *extra: str, port: int | None = None) -> list[str]:
    return [
        "serve",
        str(clone.folder / manner),
        "--",
        "--port",
        str(port or lifecycle.free_port()),
        "--gpu-memory-utilization",
        "0.1",
        *extra,
    ]


def until(clone: World, is_true: Callable[[observation.Server], object]) -> observation.Server:
    deadline = time.monotonic() + 60
    while not ((there := observation.find(clone.layout.server)) and is_true(there)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return there


def test_detached_server_is_seen_read_refused_twice_and_stopped(clone: World) -> None:
    line = serve(clone, "plain")
    started = clone.run("serve", "--detach", *line[1:])
    assert started.code == 0, started.output
    assert "/bin/vllm serve " in started.err
    assert "export " not in started.err
    status = json.loads(clone.run("serve.status", "--json").out)
    assert (status["state"], status["changed"]) == ("ready", None)
    assert "engine started" in clone.run("serve.logs").out
    assert "runs already" in clone.run(*serve(clone, "plain")).error(10)
    # No lock is held while it runs, and a new build is reported.
    clone.layout.stamp("vllm").write_bytes(clone.layout.stamp("vllm").read_bytes() + b"\n")
    assert "kernels or environment were built anew since its start" in clone.run("serve.status").out
    stopped = clone.run("serve.stop")
    assert (stopped.code, "is free" in stopped.err) == (0, True), stopped.output
    assert clone.run("serve.stop").err == "no server runs\n"
    assert json.loads(clone.run("serve.status", "--json").out)["state"] == "none"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_server_in_the_foreground_ends_with_its_task(
    clone: World, number: signal.Signals, code: int
) -> None:
    verb = clone.start(*serve(clone, "plain"))
    there = until(clone, lambda there: there.is_ready)
    verb.send_signal(number)
    _, err = verb.communicate(timeout=60)
    assert (verb.returncode, there.members(), "stopping" in err) == (code, set(), True), err
    assert observation.find(clone.layout.server) is None


def test_start_up_that_is_killed_is_no_success(clone: World) -> None:
    verb = clone.start(*serve(clone, "slow"))
    there = until(clone, lambda there: len(there.members()) > 2)
    # As `kill -9` of all processes does.
    for pid in there.members():
        os.kill(pid, signal.SIGKILL)
    _, err = verb.communicate(timeout=60)
    assert verb.returncode == 10, err
    assert observation.find(clone.layout.server) is None


def test_crash_for_memory_has_the_next_step_as_hint(clone: World) -> None:
    line = [arg if arg != "0.1" else "0.3" for arg in serve(clone, "crash")]
    ended = clone.run("serve", "--force", *line[1:])
    error, hint = ended.err.splitlines()[-2:]
    assert ended.code == 10
    assert error.endswith(
        "exited with 1: the GPU had too little memory: torch.OutOfMemoryError: CUDA out of memory."
        " Tried to allocate 2.00 GiB."
    )
    assert hint.startswith(f"hint: ./scripts/inv serve {clone.folder / 'crash'} -- --port ")


def test_public_recipe_is_served_without_its_container_and_its_command_is_repeatable(
    clone: World,
) -> None:
    port, path = lifecycle.free_port(), clone.folder / "shared one.yaml"
    path.write_text(
        f"model: {clone.folder / 'plain'}\nruntime: vllm\ncontainer: acme/vllm\n"
        f"defaults: {{port: {port}, host: 0.0.0.0}}\n"
        "command: |\n  vllm serve {model} \\\n    --host {host} --port {port}\n"
    )
    dry = clone.run("serve", "--dry-run", str(path))
    assert dry.code == 0, dry.output
    wanted = f"/bin/vllm serve {clone.folder}/plain --port {port} --host 127.0.0.1"
    assert dry.out.splitlines()[-1].endswith(wanted)
    assert "not used here, where no container is started: container" in dry.err
    started = clone.run("serve", "--detach", str(path), "--", "--gpu-memory-utilization", "0.1")
    assert started.code == 0, started.output
    there = observation.find(clone.layout.server)
    assert there is not None
    assert there.facts["typed"] == (
        f"./scripts/inv serve '{path}' --detach -- --gpu-memory-utilization 0.1"
    )
    assert clone.run("serve.stop").code == 0
    path.write_text(path.read_text().rstrip() + " && touch never\n")
    assert "needs a shell" in clone.run("serve", "--dry-run", str(path)).error(2)
    (clone.folder / "empty").mkdir(exist_ok=True)
    path.write_text(f"command: vllm serve {clone.folder}/empty --port {port}\n")
    for verb in (["serve", str(path)], ["serve.fetch", str(path)]):
        assert "empty lacks config.json" in clone.run(*verb).error(10)


def test_dry_run_prints_lines_for_a_shell_and_starts_no_server(clone: World) -> None:
    line = serve(clone, "plain", port=8123)
    shown = clone.run(
        "serve",
        "--dry-run",
        *line[1:],
        env={"VLLM_API_KEY": "swordfish-key", "PYTHONPATH": "/nowhere"},
    )
    assert shown.code == 0, shown.output
    assert "swordfish" not in shown.output
    assert "# VLLM_API_KEY is set, and not shown" in shown.out
    assert shown.out.splitlines()[-1].endswith(
        f"/bin/vllm serve {clone.folder}/plain --port 8123 --gpu-memory-utilization 0.1 --host"
        " 127.0.0.1"
    )
    assert "unset PYTHONPATH" in shown.out
    assert observation.find(clone.layout.server) is None


def test_model_that_cannot_be_served_is_an_error(clone: World, tmp_path: Path) -> None:
    no_config, odd_config, no_weights, no_tokenizer, odd_tokenizer = (
        tmp_path / name for name in ("a", "b", "c", "d", "e")
    )
    files = {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors": "{}"}
    for folder, changed in (
        (no_config, {"config.json": None}),
        (odd_config, {"config.json": "{"}),
        (no_weights, {"model.safetensors": None}),
        (no_tokenizer, {"tokenizer.json": None}),
        (odd_tokenizer, {"tokenizer.json": "\0"}),
    ):
        folder.mkdir()
        for name, text in (files | changed).items():
            if text is not None:
                (folder / name).write_text(text)
    share = ("--gpu-memory-utilization", "0.1")
    for folder, output in (
        (no_config, "has no config.json"),
        (odd_config, "config.json cannot be read"),
        (no_weights, "lacks weights"),
        (no_tokenizer, "has no tokenizer"),
        (odd_tokenizer, "tokenizer.json cannot be read"),
        (tmp_path / "nowhere", "is not a folder with a model"),
    ):
        assert output in clone.run(
            "serve", str(folder), "--", "--port", str(lifecycle.free_port()), *share
        ).error(10)
    assert "there is no recipe 'tinny'" in clone.run("serve", "tinny").error(2)
    assert "not a port from 1 to 65535" in clone.run(
        *serve(clone, "plain", "--port", "99999")
    ).error(2)
    assert "not a share above 0" in clone.run(
        *serve(clone, "plain", "--gpu-memory-utilization", "-1")
    ).error(2)
    assert "without a key" in clone.run(*serve(clone, "plain", "--host", "0.0.0.0")).error(2)
    assert "no flag --max-num-sequ" in clone.run(
        *serve(clone, "plain", "--max-num-sequ", "3")
    ).error(2)
    assert "--lines: 'many'" in clone.run("serve.logs", "--lines", "many").error(2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        assert "cannot be used: Address already in use" in clone.run(
            *serve(clone, "plain", port=taken.getsockname()[1])
        ).error(10)
