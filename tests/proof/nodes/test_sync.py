"""inv node and inv node.sync over a real sshd, between two network namespaces."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.install.test_bundle import NOWHERE, lock_tools
from tests.proof.nodes.pair import ADDRESSES, Pair, run
from tests.small.materials import git
from tests.small.world import Ended, World

NODES = """[a]
address = "{0}"
interface = "{2}"
[b]
ssh = "spark-b"
folder = "~/clone"
address = "{1}"
interface = "{3}"
"""


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    # Below 16 characters with the end of the name of an interface.
    made = Pair(tmp_path, f"n1p{os.getpid() % 10000}")
    try:
        made.start()
        yield made
    finally:
        made.end()


@pytest.fixture
def first(built: World, pair: Pair) -> World:
    """The small world, bootstrapped, as the node `a`."""
    (built.root / "nodes.toml").write_text(NODES.format(*ADDRESSES, *pair.interfaces))
    built.layout.dotenv.write_text(
        f"PYTHON_VERSION={built.env['PYTHON_VERSION']}\n"
        "DEVICE=cpu\nSOURCE=release\nHF_TOKEN=hf_planted_secret\nMAX_JOBS=2\n"
    )
    built.env["PATH"] = f"{pair.programs()}:{built.env['PATH']}"
    # The link is all that the second node reaches: no package index, no git remote.
    lines = [f"export LC_ALL={built.env['LC_ALL']}", f"export PATH={built.env['PATH']}"]
    lines += [f"export {name}={value}" for name, value in NOWHERE.items()]
    (pair.home / "environment").write_text("\n".join(lines) + "\n")
    lock_tools(built)
    git(built.root, "commit", "--quiet", "-am", "Lock the tools")
    return built


def inv(world: World, pair: Pair, *args: str, is_online: bool = False) -> Ended:
    """Run a verb on the first node; `is_online`: outside of its network, where the index is."""
    began = time.monotonic()
    ended = world.run(*args, through=() if is_online else pair.on("a"))
    print(f"inv {' '.join(args)}: {ended.code}, {time.monotonic() - began:.1f} s")
    return ended


def rows(world: World, pair: Pair) -> dict[str, tuple[str, str]]:
    ended = inv(world, pair, "node", "--json")
    assert ended.code == 0, ended.output
    return {row["name"]: (row["state"], row["text"]) for row in json.loads(ended.out)["rows"]}


def test_second_node_gets_to_the_same_state_over_the_link_alone(first: World, pair: Pair) -> None:
    assert rows(first, pair)["b"] == ("FAIL", "b has no clone in ~/clone")
    ended = inv(first, pair, "node.sync", "b", "--bundle", is_online=True)
    print(ended.err)
    assert ended.code == 0, ended.output
    shown = rows(first, pair)
    print("\n".join(f"{state:<5} {name}: {text}" for name, (state, text) in shown.items()))
    for fact in ("workspace", "pin", "tree", "layers", "libraries", "kernels", "python", "torch"):
        assert shown[f"b {fact}"][0] == "ok", shown
    assert shown["b link"] == ("warn", f"{pair.interfaces[1]} up, 10 Gb/s, MTU 1500")
    assert "planted" not in (pair.home / "clone" / ".env").read_text()

    run(pair.on("b", "ip", "link", "set", pair.interfaces[1], "mtu", "1400"))
    assert rows(first, pair)["b mtu"][1] == "1400, and 1500 here: large packets are lost"
    run(pair.on("b", "ip", "link", "set", pair.interfaces[1], "mtu", "1500"))

    edited = pair.home / "clone" / "vendor" / "vllm" / "vllm" / "__init__.py"
    edited.write_text(edited.read_text() + "# mine\n")
    ended = inv(first, pair, "node.sync", "b")
    assert "b has edits: vendor/vllm/vllm/__init__.py" in ended.error(13)
    assert edited.read_text().endswith("# mine\n")


def test_host_key_that_is_unknown_or_changed_and_a_password_stop_before_anything(
    first: World, pair: Pair
) -> None:
    known = pair.folder / "known_hosts"
    kept = known.read_bytes()
    known.write_bytes(b"")
    assert "its host key is not known here" in inv(first, pair, "node.sync", "b").error(13)
    assert known.read_bytes() == b"", "a host key was added silently"
    known.write_bytes(kept)
    pair.close()
    pair.new_host_key()
    pair.open()
    assert "its host key is not the one in" in inv(first, pair, "node.sync", "b").error(13)
    pair.know()
    pair.make_key("other")
    shutil.copy(pair.folder / "other", pair.folder / "user_key")
    assert "takes none of your keys (publickey)" in inv(first, pair, "node.sync", "b").error(13)
    pair.close()
    assert rows(first, pair)["b"][1].endswith("Connection refused")
    run(pair.on("b", "ip", "link", "set", pair.interfaces[1], "down"))
    state, text = rows(first, pair)["a link"]
    assert (state, text.split(",")[0]) == ("FAIL", f"{pair.interfaces[0]} down")
    assert not (pair.home / "clone").exists()
