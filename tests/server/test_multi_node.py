"""`inv serve --nodes`: which node runs which rank and with what, and each fault that is found
before anything is loaded. The other node is a clone on this machine, and an executable stands in
for ssh.
"""

import io
import json
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.server.test_request import MODEL, Request, fill
from tests.server.test_server import launch, until
from tests.small import ssh
from tests.small.world import World
from workspace.core import records
from workspace.core.console import Console
from workspace.core.errors import ServeError, SettingsError, WorkspaceError
from workspace.core.settings import load
from workspace.server import lifecycle, multi_node, node_link, observation, verbs
from workspace.server.flags import ServeOptions
from workspace.server.multi_node import Rank, Report
from workspace.server.nodes import Node

NODES = """
[a]
address = "127.0.0.1"
interface = "lo"
[b]
address = "127.0.0.2"
interface = "lo"
ssh = "b"
folder = "~/clone"
[c]
address = "127.0.0.3"
interface = "lo"
ssh = "c"
folder = "/c"
"""
RANK = Rank(1, 2, "127.0.0.1", 29501, "127.0.0.2", "lo")
SAME = Report(
    "tree", "digest", "", {"torch": "2.13.0"}, "cpu", "the model fits", True, {"VLLM_HOST_IP": "1"}
)
# Flags of the pinned tree that a server over nodes needs.
FLAGS = (
    "tensor-parallel-size pipeline-parallel-size data-parallel-size nnodes node-rank master-addr"
    " master-port headless distributed-executor-backend max-model-len max-num-seqs dtype"
    " gpu-memory-utilization enforce-eager"
)


def write_flags(source: Path, *names: str) -> None:
    """Add flags to the file in which the tree defines them."""
    switches = ("headless", "enforce-eager")
    lines = [
        f'    parser.add_argument("--{name}"'
        + (', action="store_true")' if name in switches else ")")
        for name in names
    ]
    former = source.read_text() if source.exists() else "def make(parser):"
    source.parent.mkdir(exist_ok=True)
    source.write_text("\n".join([former, *lines, ""]))


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    made = Request(tmp_path)
    write_flags(made.clone.layout.vllm / "vllm" / "engine" / "arg_utils.py", *FLAGS.split())
    (made.clone.layout.root / "nodes.toml").write_text(NODES)
    return made


def serve(request_: Request, *argv: str, **shell: str) -> tuple[str, str]:
    """Type `inv serve` with a dry run. Return what it prints on stdout and on stderr."""
    own, extra = list(argv), ()
    if "--" in own:
        place = own.index("--")
        own, extra = own[:place], tuple(own[place + 1 :])
    nodes = own[own.index("--nodes") + 1] if "--nodes" in own else ""
    options = ServeOptions(own[0], extra, nodes=nodes, dry_run=True)
    layout, out, err = request_.clone.layout, io.StringIO(), io.StringIO()
    settings = load(layout, environ=request_.clone.shell | shell)
    multi_node.run(layout, settings, options, console=Console(out=out, err=err))
    return out.getvalue(), err.getvalue()


def typed(hint: str | None) -> list[str]:
    """Return the arguments of `inv serve` in a hint."""
    assert hint
    words = shlex.split(hint.split("    ")[0])
    assert words[:2] == ["./scripts/inv", "serve"]
    return words[2:]


def test_each_node_gets_its_rank_and_this_one_is_the_head(request_: Request) -> None:
    out, _ = serve(request_, "tiny", "--nodes", "b,a", "--", "--max-num-seqs", "4")
    lines = out.splitlines()
    argv = shlex.split(lines[-1])
    assert "--headless" not in argv
    for flag, value in {
        "--nnodes": "2",
        "--node-rank": "0",
        "--master-addr": "127.0.0.1",
        "--tensor-parallel-size": "2",
        "--max-num-seqs": "4",
    }.items():
        assert argv[argv.index(flag) + 1] == value
    for variable in ("VLLM_HOST_IP=127.0.0.1", "GLOO_SOCKET_IFNAME=lo", "NCCL_SOCKET_IFNAME=lo"):
        assert f"export {variable}" in lines
    (far,) = (line for line in lines if line.startswith("# node b: "))
    assert f"serve.rank tiny --rank=1,2,127.0.0.1,{argv[argv.index('--master-port') + 1]}" in far
    assert far.count("--max-num-seqs 4") == 1


def test_variables_of_the_user_go_before_those_of_the_link(request_: Request) -> None:
    (request_.clone.layout.root / ".env").write_text("NCCL_SOCKET_IFNAME=eth7\n")
    out, _ = serve(request_, "tiny", "--nodes", "a,b", GLOO_SOCKET_IFNAME="eth8")
    assert "export NCCL_SOCKET_IFNAME=eth7" in out
    assert "GLOO_SOCKET_IFNAME=lo" not in out


def test_rdma_devices_of_the_interface_are_named(tmp_path: Path) -> None:
    for device, interface in (("mlx5_1", "lo"), ("mlx5_0", "lo"), ("mlx5_2", "eth0")):
        (tmp_path / device / "device" / "net" / interface).mkdir(parents=True)
    assert RANK.environment(tmp_path)["NCCL_IB_HCA"] == "mlx5_0,mlx5_1"
    assert "NCCL_IB_HCA" not in replace(RANK, interface="eth9").environment(tmp_path)


@pytest.mark.parametrize(
    ("nodes", "args", "sentence"),
    [
        ("a", (), "a server over several takes two"),
        ("a,a", (), "a node is named twice"),
        ("b,c", (), "this machine, a, has to be among them"),
        ("a,b,c", ("--tensor-parallel-size", "2"), "tensor parallel 2 cannot be divided over 3"),
        ("a,b", ("--pipeline-parallel-size", "3"), "pipeline parallel 3 cannot be divided over 2"),
        ("a,b", ("--distributed-executor-backend", "ray"), "Ray has a cluster of its own"),
    ],
)
def test_nodes_that_cannot_serve_together_are_a_sentence_whose_hint_works(
    request_: Request, nodes: str, args: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(SettingsError, match=sentence) as caught:
        serve(request_, "tiny", "--nodes", nodes, "--", *args)
    out, _ = serve(request_, *typed(caught.value.hint))
    assert "vllm serve" in out


def test_recipe_for_two_nodes_is_not_started_on_one(request_: Request) -> None:
    path = request_.clone.layout.root / "recipes" / "tiny.toml"
    path.write_text(f"nodes = 2\n{path.read_text()}")
    with pytest.raises(ServeError, match="tiny takes 2 nodes") as caught:
        serve(request_, "tiny")
    out, _ = serve(request_, *typed(caught.value.hint))
    assert "--nnodes 2" in out


def test_meeting_point_that_is_not_of_this_machine_is_named(request_: Request) -> None:
    toml = request_.clone.layout.root / "nodes.toml"
    toml.write_text(NODES.replace("127.0.0.1", "203.0.113.7"))
    with pytest.raises(ServeError, match="the ranks cannot meet at 203.0.113.7") as caught:
        serve(request_, "tiny", "--nodes", "a,b")
    assert caught.value.hint
    command = shlex.split(caught.value.hint.split("    ")[0])
    assert b"127.0.0.1" in subprocess.run(command, capture_output=True, check=True).stdout


def write_inv(clone: Path, script: str) -> None:
    clone.mkdir(parents=True, exist_ok=True)
    argv = f"['sh', '-c', {script!r}, 'inv', *sys.argv[1:]]"
    (clone / "tasks.py").write_text(f"import subprocess, sys\nsys.exit(subprocess.call({argv}))")


def ask(tmp_path: Path, script: str) -> Report:
    """Have the node b run `script` in the place of the verb that checks its rank."""
    write_inv(tmp_path / "homes" / "b" / "clone", script)
    shell = ssh.stand_in(tmp_path / "bin", tmp_path / "homes")
    request_ = Request(tmp_path / "request")
    settings = load(request_.clone.layout, environ=request_.clone.shell | {"PATH": shell["PATH"]})
    node = Node("b", "127.0.0.2", "lo", "b", "~/clone")
    with socket.create_server(("127.0.0.1", 0)) as meeting:
        order = ["./scripts/inv", "serve.rank", "tiny", "--rank=1"]
        return multi_node.ask(settings, node, order, meeting)


def test_node_reports_what_it_would_run(tmp_path: Path) -> None:
    text = shlex.quote(json.dumps(asdict(SAME)))
    assert ask(tmp_path, f'[ "$3" = --check ] && echo {text}') == SAME


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo 'error: the model does not fit' >&2; exit 10", "its rank: the model does not fit"),
        ("echo nonsense", "it gave no report"),
    ],
)
def test_node_that_is_not_fit_for_its_rank_is_named(
    tmp_path: Path, script: str, sentence: str
) -> None:
    with pytest.raises(ServeError, match=sentence) as caught:
        ask(tmp_path, script)
    assert caught.value.message.startswith("node b ")
    assert caught.value.hint
    # The hint runs the status of that clone.
    clone = tmp_path / "homes" / "b" / "clone"
    write_inv(clone, "echo status of $PWD")
    command = shlex.split(caught.value.hint.split("    ")[0])
    shell = ssh.stand_in(tmp_path / "bin", tmp_path / "homes")
    done = subprocess.run(command, env=shell, capture_output=True, text=True, check=True)
    assert done.stdout == f"status of {clone}\n"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"tree": "other"}, "node b differs from a: vendor/vllm: tree, other"),
        ({"libraries": "other"}, "compiled files: digest, other"),
        ({"edits": "vllm/x.py"}, "edits: none, vllm/x.py"),
        ({"packages": {"torch": "2.12.0"}}, "torch: 2.13.0, 2.12.0"),
        ({"device": "cuda"}, "device: cpu, cuda"),
        ({"reach": "it cannot reach 127.0.0.1"}, "node b: it cannot reach 127.0.0.1"),
        ({"has_weights": False}, "the weights of tiny are missing on b"),
    ],
)
def test_difference_between_the_nodes_ends_before_the_load(
    changed: dict[str, object], sentence: str
) -> None:
    members = [Node("a", "127.0.0.1", "lo"), Node("b", "127.0.0.2", "lo", "b", "/b")]
    err = io.StringIO()
    console, options = Console(out=err, err=err), ServeOptions("tiny")
    multi_node.compare(members, [SAME, SAME], options, console=console)
    assert "node b: rank 1, VLLM_HOST_IP=1" in err.getvalue()
    other = replace(SAME, **changed)  # type: ignore[arg-type]
    with pytest.raises(WorkspaceError, match=sentence) as caught:
        multi_node.compare(members, [SAME, other], options, console=console)
    assert caught.value.hint


def test_both_directions_of_the_link_are_tried() -> None:
    with socket.create_server(("127.0.0.1", 0)) as meeting:
        rank = replace(RANK, port=meeting.getsockname()[1])
        with multi_node.answering(meeting):
            assert multi_node.reach(rank) == ""
            away = replace(rank, address="203.0.113.7")
            assert multi_node.reach(away).startswith("it has no address 203.0.113.7")
    assert multi_node.reach(rank).startswith("it cannot reach 127.0.0.1 port ")


def test_rank_is_read_as_it_was_written() -> None:
    assert Rank.parse(RANK.argument) == RANK
    with pytest.raises(SettingsError, match="is no rank"):
        Rank.parse("1,2")


def test_status_of_another_node_shows_the_rank_that_it_runs(request_: Request) -> None:
    layout, out = request_.clone.layout, io.StringIO()
    facts = {"rank": "rank 1 of 2, head 10.0.0.1"}
    order = replace(launch("slow"), facts=facts)
    server = lifecycle.start(observation.place_of(layout, ""), order)
    try:
        settings = load(layout, environ=request_.clone.shell)
        for stage in ("starting", "ready"):
            out.seek(0)
            out.truncate()
            verbs.status(layout, settings, console=Console(out=out, err=out), as_json=True)
            (row,) = json.loads(out.getvalue())["servers"]
            assert row["state"] == stage
            server = lifecycle.mark_ready(server)
    finally:
        lifecycle.stop(server, at_once=True)


PROGRAM = """
import mmap, os, sys, time
path = f"/dev/shm/rank-{os.getpid()}"
with open(path, "w+b") as file:
    file.truncate(4096)
    shared = mmap.mmap(file.fileno(), 4096)
print(path, *sys.argv[1:], flush=True)
time.sleep(60)
"""


def test_verb_of_a_rank_reports_what_it_would_run_and_runs_until_its_lease_ends(
    built: World, tmp_path: Path
) -> None:
    package = built.layout.vllm / "vllm"
    write_flags(package / "engine" / "arg_utils.py", "model", "port", "host", *FLAGS.split())
    envs = package / "envs.py"
    known = '"VLLM_HOST_IP": lambda: None,\n    "MAX_JOBS"'
    envs.write_text(envs.read_text().replace('"MAX_JOBS"', known, 1))
    model = fill(tmp_path / "model", MODEL)
    with socket.create_server(("127.0.0.1", 0)) as meeting:
        rank = replace(RANK, port=meeting.getsockname()[1])
        argv = ["serve.rank", str(model), f"--rank={rank.argument}"]
        with multi_node.answering(meeting):
            ended = built.run(*argv, "--check")
    assert ended.code == 0, ended.output
    report = records.decode(ended.out, Report)
    assert (report.reach, report.device, report.has_weights) == ("", "cpu", True)
    assert report.edits == "vllm/envs.py"
    assert report.libraries
    assert report.variables["VLLM_HOST_IP"] == "127.0.0.2"

    program = built.layout.environment / "bin" / "vllm"
    program.write_text(f"#!{sys.executable}\n{PROGRAM}")
    program.chmod(0o755)
    with subprocess.Popen(
        built.argv(*argv),
        env=built.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        assert child.stdin
        assert child.stdout
        assert child.stderr
        lines = iter(child.stdout.readline, b"")
        assert node_link.MARK in lines
        path, *typed = next(line for line in lines if line.strip()).decode().split()
        assert "--headless" in typed
        assert typed[typed.index("--node-rank") + 1] == "1"
        child.stdin.write(node_link.MARK)
        child.stdin.flush()
        until(lambda: '"ready"' in built.run("serve.status", "--json").out)
        # The head is gone.
        child.stdin.close()
        errors = child.stderr.read()
        assert child.wait(30) == 128 + signal.SIGTERM, errors
    assert not Path(path).exists()
    assert json.loads(built.run("serve.status", "--json").out)["servers"] == []
