"""nodes.toml, and commands on another node; an executable stands in for ssh."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.small.ssh import stand_in
from workspace.core.errors import NodeError, SettingsError, ToolchainError
from workspace.server.nodes import Node, Remote, read_nodes

ROOT = Path(__file__).resolve().parents[2]
TWO = """
[a]
address = "10.0.0.1"
interface = "veth0"
[b]
ssh = "me@b"
folder = "~/clone of b"
address = "10.0.0.2"
interface = "veth0"
"""


@pytest.fixture
def homes(tmp_path: Path) -> Path:
    (tmp_path / "homes" / "b" / "clone of b").mkdir(parents=True)
    return tmp_path / "homes"


@pytest.fixture
def environment(tmp_path: Path, homes: Path) -> dict[str, str]:
    return stand_in(tmp_path / "programs", homes)


def node(ssh: str) -> Node:
    return Node("b", "10.0.0.2", "veth0", ssh, "~/clone of b")


def run_hint(command: str | None, folder: Path, environment: dict[str, str]) -> int:
    """Return the exit status of a hint's command, typed in `folder`."""
    assert command
    text = command.split("    ")[0]
    done = subprocess.run(["sh", "-c", text], cwd=folder, env=environment, capture_output=True)
    return done.returncode


def test_nodes_are_read_in_order_and_one_of_them_is_this_machine(tmp_path: Path) -> None:
    (tmp_path / "nodes.toml").write_text(TWO)
    nodes = read_nodes(tmp_path)
    assert nodes.here == Node("a", "10.0.0.1", "veth0")
    assert nodes.others == (nodes.named("b"),)
    assert nodes.another("b").folder == "~/clone of b"
    with pytest.raises(SettingsError, match="a is this machine"):
        nodes.another("a")


def test_first_nodes_come_from_the_example(tmp_path: Path) -> None:
    shutil.copy(ROOT / "nodes.toml.example", tmp_path)
    with pytest.raises(SettingsError, match=r"there is no nodes\.toml") as caught:
        read_nodes(tmp_path)
    assert run_hint(caught.value.hint, tmp_path, {"PATH": "/usr/bin:/bin"}) == 0
    assert [each.name for each in read_nodes(tmp_path).all] == ["spark-a", "spark-b"]


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "nodes.toml").write_text(TWO)
    with pytest.raises(SettingsError, match=r"has no node c; it has a, b") as caught:
        read_nodes(tmp_path).named("c")
    assert run_hint(caught.value.hint, tmp_path, {"PATH": "/usr/bin:/bin"}) == 0


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"10.0.0.2"', '"10.0.0.1"', "a and b have the same address, 10.0.0.1"),
        ('"10.0.0.2"', '"spark"', "does not appear to be an IPv4 or IPv6 address"),
        ('"10.0.0.2"', "7", "Expected `str`, got `int`"),
        ('ssh = "me@b"\n', "", "a and b have no ssh address"),
        ("[b]", 'ssh = "c"\nfolder = "/x"\n[b]', "each node has an ssh address"),
        ('"me@b"', '"-oProxyCommand=reboot"', "ssh = '-oProxyCommand=reboot' cannot be used"),
        ('"~/clone of b"', '"clone"', "folder = 'clone' cannot be used"),
        ('"~/clone of b"', '"/cl*"', r"folder = '/cl\*' cannot be used"),
        ('interface = "veth0"\n[b]', "[b]", "missing required field `interface`"),
        ("folder =", "fodler =", "unknown key, fodler"),
        ("[b]", "[b", "nodes.toml: Expected"),
        ("[b]", "x = 1\n[b]", r"\[a\] has an unknown key, x"),
    ],
)
def test_unusable_nodes_are_a_sentence_and_exit_2(
    tmp_path: Path, old: str, new: str, sentence: str
) -> None:
    shutil.copy(ROOT / "nodes.toml.example", tmp_path)
    assert old in TWO
    (tmp_path / "nodes.toml").write_text(TWO.replace(old, new))
    with pytest.raises(SettingsError, match=sentence) as caught:
        read_nodes(tmp_path)
    assert run_hint(caught.value.hint, tmp_path, {"PATH": "/usr/bin:/bin"}) == 0


def test_pipe_in_the_place_of_the_nodes_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "nodes.toml")
    with pytest.raises(SettingsError, match=r"nodes\.toml: not a regular file"):
        read_nodes(tmp_path)


def test_a_command_runs_in_the_clone_of_the_node(
    homes: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    remote = Remote(node("me@b"), environment)
    done = remote.run(["sh", "-c", 'pwd; echo "$1" >&2; exit 3', "sh", "it's * $HOME"])
    assert done.returncode == 3
    assert (done.stdout, done.stderr) == (f"{homes}/b/clone of b\n", "it's * $HOME\n")
    (tmp_path / "file").write_text("content")
    remote.copy(tmp_path / "file", "there")
    assert (homes / "b" / "clone of b" / "there").read_text() == "content"
    for line in (homes / "log").read_text().splitlines():
        assert "-oBatchMode=yes" in line
        assert "-oStrictHostKeyChecking=yes" in line


def test_a_command_that_hangs_is_ended_on_the_node(environment: dict[str, str]) -> None:
    assert Remote(node("b"), environment).run(["sleep", "60"], limit_s=0.2).returncode == 124


@pytest.mark.parametrize(
    ("host", "sentence", "command"),
    [
        ("denied", r"takes none of your keys \(publickey,password\)", "ssh-copy-id me@denied"),
        ("changed", "its host key is not the one in /home/me", "ssh-keygen -l -F changed"),
        ("unknown", "its host key is not known here", "ssh me@unknown true"),
        ("refused", "cannot be reached: ssh: connect to host refused port 22", "ssh me@refused"),
    ],
)
def test_a_node_that_ssh_does_not_reach_is_named_with_its_reason(
    tmp_path: Path, environment: dict[str, str], host: str, sentence: str, command: str
) -> None:
    remote = Remote(node(f"me@{host}"), environment)
    for ask in (lambda: remote.run(["true"]), lambda: remote.copy(tmp_path / "x", "x")):
        with pytest.raises(NodeError, match=sentence) as caught:
            ask()
        assert (caught.value.hint or "").startswith(command)
        (tmp_path / "homes" / host).mkdir()
        for name in ("ssh-copy-id", "ssh-keygen"):
            shutil.copy(tmp_path / "programs" / "ssh", tmp_path / "programs" / name)
        assert run_hint(caught.value.hint, tmp_path, environment) == 0
        (tmp_path / "homes" / host).rmdir()


def test_a_copy_that_finds_no_room_names_the_node_and_shows_its_disk(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "programs" / "scp").write_text(
        "#!/bin/sh\necho 'scp: write remote \"x\": No space left on device' >&2; exit 1\n"
    )
    with pytest.raises(NodeError, match='b: scp: write remote "x": No space left') as caught:
        Remote(node("b"), environment).copy(tmp_path / "x", "x")
    assert caught.value.hint == "ssh -t b 'df -h ~/'\"'\"'clone of b'\"'\"''"
    assert run_hint(caught.value.hint, tmp_path, environment) == 0


def test_what_a_node_prints_of_its_secrets_is_masked(environment: dict[str, str]) -> None:
    line = "HF_TOKEN=hf_abcdefghijklmnopqrst https://me:p4ssw0rd@example.org/x denied"
    done = Remote(node("b"), environment).run(["sh", "-c", f"echo '{line}' >&2; exit 1"])
    assert "hf_abc" not in done.stderr
    assert "p4ss" not in done.stderr
    assert done.stderr.endswith("denied\n")


def test_a_machine_without_ssh_has_the_package_as_hint(tmp_path: Path) -> None:
    (tmp_path / "sudo").write_text('#!/bin/sh\n[ "$*" = "apt install openssh-client" ]\n')
    (tmp_path / "sudo").chmod(0o755)
    with pytest.raises(ToolchainError, match="ssh is missing") as caught:
        Remote(node("b"), {"PATH": str(tmp_path)}).run(["true"])
    assert run_hint(caught.value.hint, tmp_path, {"PATH": f"{tmp_path}:/bin"}) == 0
