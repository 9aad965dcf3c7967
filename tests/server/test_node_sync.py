"""inv node and inv node.sync between two clones; an executable stands in for ssh."""

import json
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.install.test_bundle import NOWHERE, lock_tools
from tests.small.materials import git
from tests.small.ssh import stand_in
from tests.small.world import HOSTILE_GIT, World
from workspace.core.errors import NodeError
from workspace.machine.link import Link
from workspace.repo.git import Git
from workspace.server.node_sync import Facts, _look, ask, compare, shared
from workspace.server.nodes import Node, Remote

NODES = """[a]
address = "127.0.0.1"
interface = "lo"
[b]
ssh = "b"
folder = "~/clone"
address = "::1"
interface = "lo"
"""
IDENTITY = {
    f"GIT_{role}_{key}": f"a@{role}.invalid"
    for role in ("AUTHOR", "COMMITTER")
    for key in ("NAME", "EMAIL")
}
# As the small world has them in the shell; ssh hands no variable over.
DOTENV = """DEVICE=cpu
SOURCE=release
PYTHON_VERSION={PYTHON_VERSION}
TORCH_INDEX_URL={TORCH_INDEX_URL}
HF_TOKEN=hf_planted_secret
MAX_JOBS=2
HF_HOME=/nowhere/models
"""


@pytest.fixture
def pair(built: World, tmp_path: Path) -> Path:
    """Two nodes: the built world, and the home folder `b`, which is returned."""
    (tmp_path / "homes" / "b").mkdir(parents=True)
    hostile = "[merge]\n\tverifySignatures = true\n\tff = false\n"
    (tmp_path / "homes" / "b" / ".gitconfig").write_text(HOSTILE_GIT + hostile)
    environment = stand_in(tmp_path / "programs", tmp_path / "homes")
    programs = environment["PATH"].split(":")[0]
    built.env["PATH"] = f"{programs}:{built.env['PATH']}"
    (built.root / "nodes.toml").write_text(NODES)
    built.layout.dotenv.write_text(DOTENV.format(**built.env))
    return tmp_path / "homes" / "b"


def rows(world: World) -> dict[str, tuple[str, str, str | None]]:
    ended = world.run("node", "--json")
    found = json.loads(ended.out)["rows"]
    fails = any(row["state"] == "FAIL" for row in found)
    assert ended.code == (13 if fails else 0), ended.output
    return {row["name"]: (row["state"], row["text"], row["hint"]) for row in found}


def commit(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    git(folder, "add", name)
    git(folder, "commit", "--quiet", "-m", f"Add {name}")


def typed(hint: str | None, world: World) -> "subprocess.CompletedProcess[str]":
    """Run the command of a hint in the clone, as a person types it."""
    assert hint
    return subprocess.run(
        ["sh", "-c", hint.split("    ")[0]],
        cwd=world.root,
        env=world.env | IDENTITY,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def hint_of(err: str) -> str:
    return next(line for line in err.splitlines() if line.startswith("hint: "))[len("hint: ") :]


def test_sync_makes_a_second_clone_that_is_equal(built: World, pair: Path) -> None:
    assert rows(built)["b"][1] == "b has no clone in ~/clone"
    ended = built.run(*rows(built)["b"][2].removeprefix("./scripts/inv ").split())
    assert ended.code == 0, ended.output
    assert "b | " in ended.err
    assert ended.err.endswith("b has the state of this clone\n")
    shown = rows(built)
    for fact in ("workspace", "pin", "tree", "layers", "libraries", "kernels", "torch", "python"):
        assert shown[f"b {fact}"][0] == "ok", shown
    assert shown["b tree"][1] == built.git("rev-parse", "HEAD^{tree}")[:12]
    written = (pair / "clone" / ".env").read_text()
    assert "SOURCE='release'" in written or "SOURCE=release" in written
    for other in ("planted", "MAX_JOBS=2", "/nowhere"):
        assert other not in written
    # Done twice, it changes nothing.
    before = (pair / "clone" / ".env").read_bytes()
    again = built.run("node.sync", "b")
    assert again.code == 0, again.output
    assert (pair / "clone" / ".env").read_bytes() == before

    # A commit there is never lost, and comes here by the command of the hint.
    commit(pair / "clone", "theirs", "kept\n")
    ended = built.run("node.sync", "b")
    assert "b has commits that this clone lacks" in ended.error(13)
    assert hint_of(ended.err) == "git pull 'b:~/clone'"
    assert (pair / "clone" / "theirs").read_text() == "kept\n"
    git(pair / "clone", "reset", "--quiet", "--hard", "HEAD~1")

    # So is an edit of a file of the workspace, or of vLLM.
    for place in ("README.md", "vendor/vllm/vllm/__init__.py"):
        path = pair / "clone" / place
        former = path.read_bytes() if path.exists() else None
        path.write_text("edited there\n")
        ended = built.run("node.sync", "b")
        assert f"b has edits: {place}" in ended.error(13)
        assert Path(place).name in typed(hint_of(ended.err), built).stdout
        assert path.read_text() == "edited there\n"
        path.unlink() if former is None else path.write_bytes(former)

    # A value of .env that differs there stays, too.
    (pair / "clone" / ".env").write_text(written.replace("release", "git"))
    ended = built.run("node.sync", "b")
    assert "the .env of b has another SOURCE, and stays as it is" in ended.error(13)
    (pair / "clone" / ".env").write_text("HF_HOME=/theirs")

    # A new commit here is a difference with the command that ends it.
    commit(built.root, "ours", "new\n")
    state, text, hint = rows(built)["b workspace"]
    assert (state, hint) == ("warn", "./scripts/inv node.sync b")
    assert git(built.root, "rev-parse", "HEAD")[:12] in text
    ended = built.run("node.sync", "b")
    assert ended.code == 0, ended.output
    assert (pair / "clone" / "ours").read_text() == "new\n"
    written = (pair / "clone" / ".env").read_text()
    assert written.startswith("HF_HOME=/theirs\n")
    assert "SOURCE=release\n" in written


def test_sync_refuses_what_no_commit_or_patch_has(built: World, pair: Path) -> None:
    (built.root / "note").write_text("mine\n")
    ended = built.run("node.sync", "b")
    assert "not committed here: note" in ended.error(3)
    command = hint_of(ended.err).replace("commit", "-c commit.gpgSign=false commit -m x")
    assert typed(command, built).returncode == 0
    (built.layout.vllm / "vllm" / "__init__.py").write_text("mine\n")
    ended = built.run("node.sync", "b")
    assert "no patch has vendor/vllm/vllm/__init__.py" in ended.error(3)
    git(built.layout.vllm, "checkout", "--", "vllm/__init__.py")
    built.layout.stamp("vllm").unlink()
    assert "this clone is not built: kernels" in built.run("node.sync", "b").error(8)
    assert not (pair / "clone").exists()


def test_sync_names_a_folder_that_is_no_clone(built: World, pair: Path) -> None:
    (pair / "clone").mkdir()
    (pair / "clone" / "thesis").write_text("mine\n")
    ended = built.run("node.sync", "b")
    assert "~/clone exists and is no clone" in ended.error(13)
    assert "thesis" in typed(hint_of(ended.err), built).stdout
    assert [path.name for path in (pair / "clone").iterdir()] == ["thesis"]


def test_an_older_workspace_there_is_a_row_with_the_sync_as_hint(built: World, pair: Path) -> None:
    git(pair, "clone", "--quiet", str(built.root), "clone")
    program = pair / "clone" / "workspace" / "cli" / "program.py"
    program.write_text(program.read_text().replace("verbs_serve.node_facts, ", ""))
    assert rows(built)["b"] == (
        "FAIL",
        "b has an older workspace",
        "./scripts/inv node.sync b",
    )


def test_sync_sends_a_bundle_to_a_node_that_fetches_nothing(built: World, pair: Path) -> None:
    lock_tools(built)
    git(built.root, "commit", "--quiet", "-am", "Lock the tools")
    exports = (f"export {name}={text}\n" for name, text in NOWHERE.items())
    # A login that greets, and a first sync that was ended in its middle.
    (pair / "environment").write_text("".join(exports) + "echo Welcome\n")
    git(pair, "init", "--quiet", "clone")
    (pair / "clone" / ".workspace" / "sync").mkdir(parents=True)
    (pair / "clone" / ".workspace" / "sync" / "workspace.bundle").write_text("half")
    ended = built.run("node.sync", "b")
    assert ended.error(13).startswith("error: b: ")
    hint = hint_of(ended.err).split("    ")[0]
    ended = built.run(*hint.removeprefix("./scripts/inv ").split())
    assert ended.code == 0, ended.output
    assert rows(built)["b libraries"][0] == "ok"
    assert not (pair / "clone" / ".workspace" / "sync").exists()


def test_kernels_that_were_compiled_here_are_those_of_the_other_node(
    built: World, pair: Path
) -> None:
    built.bootstrap("--kernels", "native", "--jobs", "2")
    ended = built.run("node.sync", "b")
    assert ended.code == 0, ended.output
    shown = rows(built)
    assert {shown[f"b {fact}"][0] for fact in ("libraries", "kernels", "layers")} == {"ok"}
    assert ".whl" in shown["b kernels"][1]
    library = Path("vendor", "vllm", "vllm", "_C.abi3.so")
    assert (pair / "clone" / library).read_bytes() == (built.root / library).read_bytes()


LINK = Link("lo", "up", None, 9000, ("10.0.0.1",), False, (), (), "", -1, "", True)
FACTS = Facts(
    **dict.fromkeys(("workspace", "pin", "tree", "libraries", "kernels", "python", "torch"), "x"),
    device="cpu",
    **dict.fromkeys(("driver", "cuda", "kernel", "machine"), "y"),
    layers="ok",
    edited=(),
    unsaved=(),
    has_commits=False,
    free_memory_gib=1.5,
    free_disk_gib=20.0,
    settings={},
    link=LINK,
    time=0.0,
)


def test_differences_that_no_sync_ends_have_a_command_each(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    environment = stand_in(tmp_path / "programs", tmp_path)
    for name in ("sudo", "timedatectl"):
        (tmp_path / "programs" / name).write_text('#!/bin/sh\nexec [ "$1" != fail ]\n')
        (tmp_path / "programs" / name).chmod(0o755)
    node = Node("b", "10.0.0.1", "lo", "b", "/clone")
    there = replace(FACTS, driver="z", torch="z", free_disk_gib=1, link=replace(LINK, mtu=1500))
    found = {row.name: row for row in compare(FACTS, there, node, -2.5)}
    assert found["b driver"].text == "z, and y here"
    assert found["b torch"].hint == "./scripts/inv node.sync b"
    assert found["b mtu"].text.startswith("1500, and 9000 here")
    assert (found["b clock"].state, found["b clock"].text) == ("warn", "2.5 s ahead")
    assert (found["b free"].state, found["b free"].hint) == ("warn", "ssh -t b 'df -h /clone'")
    for fact in ("driver", "mtu", "clock"):
        hint = (found[f"b {fact}"].hint or "").split("    ")[0]
        subprocess.run(["sh", "-c", hint], env=environment, check=True, cwd=tmp_path)
    equal = compare(FACTS, FACTS, node, 0.1)
    assert {row.name for row in equal if row.state != "ok"} == {"b rdma"}


ANSWER = json.dumps({"schema": 1, **asdict(FACTS)}, indent=2)


def remote_that_runs(script: str, folder: Path) -> Remote:
    """Return a node whose ssh is this script."""
    (folder / "ssh").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "ssh").chmod(0o755)
    return Remote(Node("b", "::1", "lo", "b", "/clone"), {"PATH": f"{folder}:/usr/bin:/bin"})


def test_facts_are_found_between_a_greeting_and_a_farewell(tmp_path: Path) -> None:
    text = f"Welcome to {{spark}}\n{ANSWER}\nGood {{bye}}"
    assert ask(remote_that_runs(f"printf '%s\\n' '{text}'", tmp_path)) == FACTS


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("kill -KILL $$", "b: was killed by SIGKILL"),
        ("exit 7", "b: exited with 7"),
        ("echo 'error: it is broken' >&2; exit 7", "b: it is broken"),
        ("echo 'a page'", "b reports no facts: it is not valid JSON"),
    ],
)
def test_node_without_facts_is_reported_by_what_it_printed_or_how_it_ended(
    tmp_path: Path, script: str, sentence: str
) -> None:
    with pytest.raises(NodeError, match=sentence):
        ask(remote_that_runs(script, tmp_path))


def test_look_at_a_node_that_fails_takes_its_clone_for_no_other_folder(tmp_path: Path) -> None:
    remote, outer = remote_that_runs("echo 'no memory' >&2; exit 9", tmp_path), Git(tmp_path)
    with pytest.raises(NodeError, match="^b: no memory$"):
        _look(remote, outer)


def test_layer_that_is_stale_on_both_nodes_is_no_equality() -> None:
    node, stale = Node("b", "::1", "lo", "b", "/clone"), replace(FACTS, layers="kernels stale")
    found = {row.name: row for row in compare(stale, stale, node, 0.0)}
    assert (found["b layers"].state, found["b layers"].text) == ("warn", "kernels stale")


def test_settings_of_one_machine_and_secrets_are_not_shared() -> None:
    alike = {"DEVICE": "cuda", "HF_HUB_OFFLINE": "1", "VLLM_MIRROR": "https://host/vllm.git"}
    own = {
        "MAX_JOBS": "8",
        "CUDA_HOME": "/usr/local/cuda",
        "HF_TOKEN": "hf_x",
        "VLLM_HOST_IP": "10.0.0.1",
        "NCCL_SOCKET_IFNAME": "roce0",
        "NCCL_IB_HCA": "rocep1s0f0",
        "TORCH_INDEX_URL": "https://me:hunter2@host/simple",
        "TRITON_MIRROR": "../triton",
        "https_proxy": "http://proxy:3128",
    }
    assert shared(alike | own) == alike
