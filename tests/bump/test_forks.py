"""A bump to the branch of a fork; tests/proof/bump/test_forks.py goes on from there."""

import json
from pathlib import Path

import pytest

from tests.bump.conftest import ROWS
from tests.small.materials import TAG, Materials, git
from tests.small.releases import CLEAN, Releases
from tests.small.world import World
from workspace.repo import pins

BRANCH = "mine/feature"


@pytest.fixture
def fork(materials: Materials, tmp_path: Path) -> Path:
    """A fork without tags, with one commit on the pinned release."""
    path = tmp_path / "fork"
    git(tmp_path, "clone", "--quiet", "--no-tags", str(materials.upstream), str(path))
    git(path, "switch", "--quiet", "--create", BRANCH, materials.commit)
    change(path, "1")
    return path


def change(fork: Path, text: str) -> str:
    package = fork / "vllm" / "__init__.py"
    package.write_text(package.read_text() + f'MINE = "{text}"\n')
    git(fork, "commit", "--quiet", "--all", "-m", f"Mine {text}")
    return git(fork, "rev-parse", "HEAD")


def shown(world: World) -> dict[str, dict]:
    ended = world.run("pin.show", "--json")
    assert ended.code == 0, ended.output
    return {row["name"]: row for row in json.loads(ended.out)["rows"]}


def assert_is_built(world: World, mine: str, version: str) -> None:
    found = world.python("import vllm; print(vllm.__version__, getattr(vllm, 'MINE', ''))")
    assert found.split() == [f"{version}+cpu", *filter(None, [mine])]
    assert {name: state for name, state in world.status().items() if name in ROWS} == dict.fromkeys(
        ROWS, "ok"
    )
    assert world.git("status", "--porcelain") == ""


def test_fork_is_pinned_and_followed_only_on_request(
    clone: World, fork: Path, materials: Materials
) -> None:
    url, first = f"{fork.as_uri()}@{BRANCH}", git(fork, "rev-parse", "HEAD")
    before = clone.layout.pins.read_bytes()
    # The small world requests release archives, and a fork has none.
    refused = clone.run("pin.bump", url)
    assert "SOURCE requests release" in refused.error(2)
    assert f"hint: SOURCE=auto ./scripts/inv pin.bump {url} " in refused.err
    clone.env["SOURCE"] = "auto"
    ended = clone.run("pin.forecast", url)
    assert ended.code == 0, ended.output
    assert f"./scripts/inv pin.bump {url}" in ended.output
    assert clone.layout.pins.read_bytes() == before

    ended = clone.run("pin.bump", url)
    assert ended.code == 0, ended.output
    assert_is_built(clone, "1", "0.31.1.dev1")
    pin = pins.load(clone.layout.pins).vllm
    assert (pin.commit, pin.ref, pin.tag) == (first, f"refs/heads/{BRANCH}", BRANCH)
    assert pin.base == pins.Base(TAG, "0.31.0", materials.commit)
    assert pin.precompiled == pins.parse(before).vllm.precompiled
    assert f"move vLLM from {TAG} to {BRANCH}" in (
        clone.layout.state / "bump-message.txt"
    ).read_text(encoding="utf-8")
    rows = shown(clone)
    assert "1 commit ahead; compiled sources that differ: none" in rows["base"]["text"]
    assert "branch" not in rows
    assert rows["upstream"]["facts"]["behind"] == int(
        git(materials.upstream, "rev-list", "--count", f"{materials.commit}..HEAD")
    )

    # The branch moves: the pin is where it was, and `inv pin` reports it.
    second = change(fork, "2")
    row = shown(clone)["branch"]
    assert f"moved to {second[:12]}; the pin stays at {first[:12]}" in row["text"]
    assert row["hint"] == f"./scripts/inv pin.bump {url}"
    assert clone.run("bootstrap").code == 0
    assert clone.git("merge-base", "HEAD", first) == first


def test_base_that_was_named_is_in_the_command_for_a_branch_that_moved(
    clone: World, fork: Path, releases: Releases
) -> None:
    """The branch does not descend from that release, so no search would find it again."""
    clone.env |= {"SOURCE": "auto", "VLLM_MIRROR": releases.upstream.as_uri()}
    url = f"{fork.as_uri()}@{BRANCH}"
    ended = clone.run("pin.bump", url, "--base", f"v{CLEAN}")
    assert ended.code == 0, ended.output
    change(fork, "2")
    row = shown(clone)["branch"]
    assert row["hint"] == f"./scripts/inv pin.bump {url} --base v{CLEAN}"
    ended = clone.run(*row["hint"].split()[1:])
    assert ended.code == 0, ended.output
    assert pins.load(clone.layout.pins).vllm.base == pins.Base(
        f"v{CLEAN}", CLEAN, releases.commit(CLEAN)
    )
