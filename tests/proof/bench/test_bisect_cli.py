"""`nox -s bisect` by its command line, on a small bootstrapped clone: real builds, trees that
break, hang or cannot be built, kills, and abort.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.bench.histories import Made, make
from tests.bump.conftest import _good, clone, releases, user_files
from tests.small.materials import git
from tests.small.world import Ended, World

__all__ = ["_good", "clone", "releases"]

JUDGE = """import os, pathlib, sys, time
import vllm
tree = pathlib.Path(vllm.__file__).parent
print("tested", tree)
assert os.getcwd() not in str(tree) and not os.listdir(".")
with open(os.environ["TESTED"], "a") as file:
    file.write("x")
if (tree / "hangs.txt").exists():
    time.sleep(600)
sys.exit(int((tree / "code.txt").read_text()) if (tree / "code.txt").exists() else 0)
"""


def argv(*args: str) -> list[str]:
    return [sys.executable, "-Es", "-B", "-m", "workspace.cli.sessions", "bisect", *args]


def bisect(world: World, *args: str) -> Ended:
    done = subprocess.run(
        argv(*args),
        cwd=world.root,
        env=world.env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def judged(clone: World) -> World:
    (clone.folder / "judge.py").write_text(JUDGE)
    clone.env["TESTED"] = str(clone.folder / "tested")
    return clone


def command(world: World) -> str:
    return f"python {world.folder / 'judge.py'}"


def base_of(world: World) -> str:
    return git(world.layout.vllm, "rev-parse", "refs/patches/base")


def edits(count: int) -> list[Made]:
    return [
        Made(f"c{number}", {f"vllm/edit{number}.txt": f"{number}\n"})
        for number in range(1, count + 1)
    ]


def history(world: World, commits: Sequence[Made]) -> dict[str, str]:
    base = base_of(world)
    return {"base": base, **make(world.layout.vllm, commits, onto=base)}


def ends(made: dict[str, str], last: str) -> list[str]:
    return ["--good", made["base"], "--bad", made[last]]


def living(world: World) -> list[str]:
    """Return the command lines of running processes that name the clone's folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(world.folder) in line:
                found.append(line)
    return found


def is_gone(world: World) -> bool:
    layout = world.layout
    return (
        not (layout.state / "bisect.json").exists()
        and not (layout.sandboxes / "bisect").exists()
        and "bisect" not in git(layout.vllm, "worktree", "list")
    )


def test_commit_is_found_beside_a_broken_build_and_a_hang_and_the_users_tree_is_unchanged(
    judged: World,
) -> None:
    commits, setup = edits(12), git(judged.layout.vllm, "show", f"{base_of(judged)}:setup.py")
    commits[5] = Made("c6", {"setup.py": f"raise SystemExit('no build')\n{setup}\n"})
    commits[6] = Made("c7", {"setup.py": f"{setup}\n", "vllm/hangs.txt": "x"})
    commits[7] = Made("c8", {"vllm/hangs.txt": None})
    commits[9] = Made("c10", {"vllm/code.txt": "3"})
    made, before, found = history(judged, commits), user_files(judged), judged.folder / "found.json"
    ended = bisect(
        judged,
        *ends(made, "c12"),
        "--run",
        command(judged),
        "--timeout-s",
        "10",
        "--json",
        str(found),
    )
    assert (ended.code, ended.out.strip()) == (0, made["c10"]), ended.output
    assert "vllm/code.txt | 1 +" in ended.err
    assert "exited with 3: tested" in ended.err
    document: dict[str, Any] = json.loads(found.read_text())
    skipped = {
        tried["commit"]: tried["evidence"]
        for tried in document["tries"]
        if tried["verdict"] == "skip"
    }
    assert "it cannot be built" in skipped[made["c6"]]
    assert is_gone(judged)
    assert user_files(judged) == before
    assert git(judged.layout.vllm, "for-each-ref", "refs/sandboxes") == ""
    # An end that hangs is refused.
    ended = bisect(judged, *ends(made, "c7"), "--run", command(judged), "--timeout-s", "5")
    assert "the bad end, " in ended.error(1)
    assert "cannot be tried: it did not end in 5 s" in ended.err
    assert bisect(judged, "--abort").code == 0
    assert is_gone(judged)
    assert user_files(judged) == before


def test_check_of_the_smoke_finds_the_commit_after_which_the_tokens_differ(judged: World) -> None:
    commits = edits(8)
    text = git(judged.layout.vllm, "show", f"{base_of(judged)}:vllm/__init__.py")
    commits[4] = Made("c5", {"vllm/__init__.py": f"{text}\nBROKEN = True\n"})
    made = history(judged, commits)
    ended = bisect(judged, *ends(made, "c8"), "--run", "parity.llama")
    assert (ended.code, ended.out.strip()) == (0, made["c5"]), ended.output
    assert "parity.llama: 0/2 tokens equal" in ended.err
    assert is_gone(judged)


def test_exit_code_without_a_meaning_stops_the_bisect_and_keeps_the_tries(judged: World) -> None:
    made = history(judged, [*edits(3), Made("c4", {"vllm/code.txt": "200"})])
    ended = bisect(judged, *ends(made, "c4"), "--run", command(judged))
    assert "exited with 200" in ended.error(1)
    assert "neither good nor bad" in ended.err
    assert "1 step, " in ended.err


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_bisect_leaves_no_process_and_resumes_and_another_is_refused(
    judged: World, signum: signal.Signals
) -> None:
    commits = edits(6)
    commits[3] = Made("c4", {"vllm/code.txt": "1"})
    made = history(judged, commits)
    args = [*ends(made, "c6"), "--run", command(judged)]
    tested = judged.folder / "tested"
    tested.unlink(missing_ok=True)
    hang = judged.folder / "judge.py"
    # The third tree that is tested hangs, once.
    hang.write_text(
        JUDGE.replace(
            'if (tree / "hangs.txt").exists():', f"if os.path.getsize({str(tested)!r}) == 3:"
        )
    )
    child = subprocess.Popen(
        argv(*args),
        cwd=judged.root,
        env=judged.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until(lambda: tested.exists() and tested.stat().st_size == 3)
    assert child.poll() is None
    os.kill(child.pid, signum)
    child.communicate(timeout=60)
    until(lambda: not living(judged))
    hang.write_text(JUDGE)
    other = bisect(judged, *ends(made, "c5"), "--run", command(judged))
    assert "another bisect is in progress, 2 steps" in other.error(2)
    ended = bisect(judged, *args)
    assert (ended.code, ended.out.strip()) == (0, made["c4"]), ended.output
    assert "resuming after 2 steps" in ended.err
    assert is_gone(judged)


def test_patch_is_found_by_its_name_and_abort_without_a_bisect_is_reported(judged: World) -> None:
    for number in (1, 2, 3):
        path = judged.layout.vllm / "vllm" / ("code.txt" if number == 2 else f"patch{number}.txt")
        path.write_text("1\n")
        judged.git("add", "--all")
        judged.git("commit", "--quiet", "-m", f"Number {number}\n\nUpstream-Status: Pending")
    assert judged.run("patch.export").code == 0
    ended = bisect(judged, "--patches", "--run", command(judged))
    assert (ended.code, ended.out.strip()) == (0, "Number-2.patch"), ended.output
    assert "no bisect is in progress" in bisect(judged, "--abort").err


@pytest.mark.parametrize(
    ("args", "output"),
    [
        ((), "--run is needed"),
        (("--run", "smoke", "--patches", "--good", "v0.30.0"), "--patches searches from"),
        (("--run", "smoke", "--timeout-s", "0"), "--timeout-s must be a number"),
        (("--run", "parity.lama"), "did you mean parity.llama?"),
        (("--run", "bench:latency", "--factor", "x"), "is not a percentage"),
        (("--run", "smoke", "--good", "v0.31"), "has no 'v0.31'"),
        (("--run", "smoke"), "there is no known-good state"),
    ],
)
def test_misuse_is_refused_before_anything_is_made(
    judged: World, args: tuple[str, ...], output: str
) -> None:
    ended = bisect(judged, *args)
    assert ended.code == 2
    assert output in ended.err
    assert is_gone(judged)


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)
