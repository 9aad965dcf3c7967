"""pin.bump and pin.rollback, killed again and again on their way through the real tree, beside a
file and a branch of the user's.

One bump to the next release and two returns are killed at moments drawn in each of their steps, and
every time resumed by the command that `inv` names as next. The result is compared with a bump that
nothing disturbed. Needs the network or warm caches, and 8 GB of disk.
"""

import contextlib
import json
import random
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

from tests.proof.kill import judge
from tests.proof.kill.real import Clone, make_clone
from tests.small.materials import git
from workspace.core.paths import Layout

NEXT = "v0.32.0"
LIMIT_S = 1200.0
MOST_COMMANDS = 12
POLL_S = 0.002
PATH = "vllm/utils/cpu_triton_utils.py"
# On a CPU the next release dies at its first token: its smoke is red until this is fixed in
# the sandbox of the bump.
FIX = (
    ("    block_size: int,\n", ""),
    (
        "    KV_CACHE_BLOCK_SIZE: int | None = None,\n    BLOCKS_PER_KV_BLOCK: int = 1,\n",
        "    KV_CACHE_BLOCK_SIZE: int,\n",
    ),
    (
        (
            "    if BLOCKS_PER_KV_BLOCK != 1:\n        assert block_size * BLOCKS_PER_KV_BLOCK =="
            " KV_CACHE_BLOCK_SIZE\n"
        ),
        "",
    ),
    ("        block_size,\n    )", "        KV_CACHE_BLOCK_SIZE,\n    )"),
)
EDITS = {
    "Say in the log who speaks": (
        "vllm/logger.py",
        '"""Logging configuration for vLLM."""',
        '"""Logging configuration for vLLM, with local patches."""',
    ),
    "Widen mcp": ("requirements/common.txt", "mcp >= 2.0.0, < 3.0.0", "mcp >= 1.0.0, < 4.0.0"),
}
# Step, as the lock names it, and the seconds after its begin within which a kill is drawn. In the
# order in which they come.
BUMP: tuple[tuple[str, float], ...] = (
    *(
        ("", 1.5),
        ("upstream", 1.0),
        ("fetch", 0.3),
        ("patches", 0.3),
        ("python", 0.5),
        ("torch", 6.0),
        ("requirements", 8.0),
        ("accelerators", 2.0),
    ),
    *(
        ("install", 4.0),
        ("verify", 4.0),
        ("tiny model", 10.0),
        ("tiny model", 10.0),
        ("promote", 0.2),
        ("promote", 0.6),
        ("promote", 1.2),
        ("promote", 6.0),
    ),
)
BACK: tuple[tuple[str, float], ...] = (
    ("", 1.0),
    ("back", 0.05),
    ("back", 0.3),
    ("back", 0.6),
    ("back", 1.5),
    ("tiny model", 10.0),
)


class Row(TypedDict):
    """A row of `inv pin.show --json`."""

    name: str
    facts: dict[str, object]


@dataclass(frozen=True)
class Stand:
    """A clone whose state is good; `side` is a commit of a branch of the user's, `commits` all that
    a reference led to.
    """

    clone: Clone
    side: str
    commits: frozenset[str]

    @property
    def layout(self) -> Layout:
        return self.clone.layout

    def inv(self, *args: str, codes: tuple[int, ...] = (0,)) -> str:
        return _ended(replace(self.clone, args=args), replace(self.clone, args=args).start(), codes)

    def smoke(self) -> None:
        """`nox -s smoke`: the judgement, and the record of what is good."""
        for session in ("smoke", "record-good"):
            argv = [
                str(self.layout.tools / "bin" / "python"),
                "-m",
                "workspace.cli.sessions",
                session,
            ]
            done = subprocess.run(
                argv,
                cwd=self.layout.root,
                env=self.clone.env,
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                check=False,
            )
            assert done.returncode == 0, f"{session}: exit {done.returncode}: {done.stderr}"

    def rows(self) -> list[Row]:
        child = subprocess.run(
            [self.layout.root / "scripts" / "inv", "pin.show", "--json", "--offline"],
            env=self.clone.env,
            capture_output=True,
            timeout=60,
            check=True,
        )
        rows: list[Row] = json.loads(child.stdout)["rows"]
        return rows

    def check(self) -> None:
        """Everything that is the user's is there, every commit is whole, and none that a reference
        led to is lost.
        """
        vllm = self.layout.vllm
        assert (vllm / "mine.txt").read_text() == "mine\n"
        assert (vllm / "vllm" / "mine.log").read_text() == "mine\n"
        assert (self.layout.root / "notes.txt").read_text() == "mine\n"
        assert git(vllm, "rev-parse", "side") == self.side
        assert not self.commits - _commits(vllm), "commits that no reference leads to"
        git(vllm, "fsck", "--connectivity-only", "--no-dangling", "--no-progress")


def _commits(vllm: Path) -> frozenset[str]:
    return frozenset(git(vllm, "rev-list", "--all", "--reflog", "HEAD").split())


def _ended(clone: Clone, child: "subprocess.Popen[bytes]", codes: tuple[int, ...]) -> str:
    code = child.wait(timeout=LIMIT_S)
    assert code in codes, f"inv {' '.join(clone.args)}: exit {code}: {clone.output}"
    assert "Traceback" not in clone.output, clone.output
    return clone.output


def make_stand(folder: Path) -> Stand:
    clone = make_clone(folder)
    layout = clone.layout
    layout.dotenv.write_text("SOURCE=release\n")
    stand = Stand(clone, "", frozenset())
    stand.inv("bootstrap")
    git(layout.vllm, "config", "user.name", "Me")
    git(layout.vllm, "config", "user.email", "me@localhost")
    for subject, (path, old, new) in EDITS.items():
        edit(layout.vllm / path, (old, new))
        git(
            layout.vllm,
            "commit",
            "--quiet",
            "--all",
            "-m",
            f"{subject}\n\nUpstream-Status: Pending",
        )
    stand.inv("patch.export")
    stand.inv("bootstrap")
    git(layout.root, "add", "patches")
    git(layout.root, "commit", "--quiet", "-m", "Two patches more")
    git(layout.vllm, "branch", "side", "HEAD~1")
    (layout.vllm / "mine.txt").write_text("mine\n")
    (layout.vllm / "vllm" / "mine.log").write_text("mine\n")
    stand.smoke()
    return replace(stand, side=git(layout.vllm, "rev-parse", "side"), commits=_commits(layout.vllm))


def edit(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"{path}: {old!r}"
        text = text.replace(old, new)
    path.write_text(text)


def lead_on(stand: Stand, tag: str, verb: Sequence[str]) -> None:
    """Run the command that `inv pin` names as next until `tag` is built and recorded as good."""
    for _ in range(MOST_COMMANDS):
        rows = stand.rows()
        names = {row["name"] for row in rows}
        if "back" in names:
            stand.inv("pin.rollback")
        elif "bump" in names or pinned_of(rows) != tag:
            stand.inv(*(("patch.continue",) if "bump" in names else verb), codes=(0, 8))
            if "checks failed" in stand.clone.output:
                fix(stand)
        elif any(row["name"] == "good" and row["facts"].get("current") for row in rows) and _passed(
            stand
        ):
            assert "nothing to do" in stand.inv("bootstrap")
            return
        else:
            stand.inv("bootstrap")
            stand.smoke()
    raise AssertionError(f"{MOST_COMMANDS} commands did not lead to {tag}: {rows}")


def _passed(stand: Stand) -> bool:
    output = json.loads((stand.layout.state / "smoke.json").read_text())
    return bool(
        output["verdict"] == "pass"
        and output["tree"] == git(stand.layout.vllm, "rev-parse", "HEAD^{tree}")
    )


def pinned_of(rows: list[Row]) -> str:
    return str(next(row["facts"]["tag"] for row in rows if row["name"] == "pin"))


def fix(stand: Stand) -> None:
    """Commit a fix in the sandbox of the bump once, with a fixed identity and date."""
    tree = Layout(stand.layout.bump_sandbox).vllm
    if FIX[0][0] not in (tree / PATH).read_text():
        return
    edit(tree / PATH, *FIX)
    who = {"NAME": "Me", "EMAIL": "me@localhost", "DATE": "2026-01-01T00:00:00Z"}
    dated = {
        f"GIT_{role}_{what}": text for role in ("AUTHOR", "COMMITTER") for what, text in who.items()
    }
    git(
        tree,
        "commit",
        "--quiet",
        "--all",
        "-m",
        "Take the block size that the caller passes\n\nUpstream-Status: Pending",
        env=dated,
    )


def doing(layout: Layout, process: int) -> str | None:
    """Return the step of a running verb as its lock names it, that of the sandbox first, or None.

    The name of a killed verb's step stays in the lock.
    """
    for lock in (Layout(layout.bump_sandbox).lock, layout.lock):
        with contextlib.suppress(OSError, ValueError, KeyError):
            record = json.loads(lock.read_text())
            if record["doing"] and record["pid"] == str(process):
                return str(record["doing"])
    return None


def strike(
    stand: Stand, verb: Sequence[str], step: str, window_s: float, draw: random.Random
) -> str | None:
    """Kill a verb at a moment drawn within a step; return how, None where it ended before. A red
    smoke is fixed.
    """
    after_s, is_all, layout = draw.random() * window_s, draw.random() < 0.5, stand.layout
    child = replace(stand.clone, args=tuple(verb)).start()
    while step and doing(layout, child.pid) != step and child.poll() is None:
        time.sleep(POLL_S)
    time.sleep(after_s)
    at = doing(layout, child.pid) or "looking"
    if child.poll() is not None:
        _ended(replace(stand.clone, args=tuple(verb)), child, (0, 8))
        if child.returncode == 8:
            fix(stand)
        return None
    stand.clone.end(child, is_all=is_all)
    return (
        f"SIGKILL to {'all' if is_all else 'the verb'} {after_s:.2f} s into {step or 'its start'},"
        f" at {at}"
    )


def way_on(stand: Stand, verb: Sequence[str], tag: str, draw: random.Random) -> tuple[str, ...]:
    """Return the command after a kill: the verb itself, or the one that `inv pin` names as next."""
    rows = stand.rows()
    names = {row["name"] for row in rows}
    if "bump" in names:
        return ("patch.continue",) if draw.random() < 0.5 else tuple(verb)
    if "back" in names:
        return ("pin.rollback",)
    # Once the pin has moved, what is left is bootstrap's and the smoke's.
    return tuple(verb) if pinned_of(rows) != tag else ("bootstrap",)


def round_of(
    stand: Stand,
    verb: Sequence[str],
    tag: str,
    steps: Sequence[tuple[str, float]],
    draw: random.Random,
) -> tuple[int, int]:
    """Kill one move in each of the steps, take it up again each time, and bring it to its end;
    return kills and failures.
    """
    kills = failures = 0
    for number, (step, window_s) in enumerate(steps):
        args = way_on(stand, verb, tag, draw)
        started = time.monotonic()
        try:
            how = strike(stand, args, step, window_s, draw)
            stand.check()
        except AssertionError as exc:
            how, failures = f"FAIL {exc}", failures + 1
        kills += how is not None
        print(
            f"{number:3}  {' '.join(args):20} {how or f'had ended before {step}'} "
            f" ({time.monotonic() - started:.0f} s)",
            flush=True,
        )
    started = time.monotonic()
    try:
        lead_on(stand, tag, verb)
        stand.check()
    except AssertionError as exc:
        failures += 1
        print(f"FAIL {exc}", flush=True)
    print(f"     completed at {tag} in {time.monotonic() - started:.0f} s", flush=True)
    return kills, failures


def fingerprint(stand: Stand) -> dict[str, str]:
    """What is compared: not what a return leaves under its date, nor which good states there
    are.
    """
    found = dict(judge.fingerprint(stand.layout))
    passing = (
        ".workspace/good/",
        ".workspace/bump-message",
        ".workspace/models",
        ".workspace/left-",
    )
    for name in [name for name in found if name.startswith(passing) or "/refs/" in name]:
        del found[name]
    for name in ("clone refs", "vllm refs"):
        found[name] = "\n".join(
            line
            for line in found[name].splitlines()
            if not line.startswith(("refs/left/", "refs/good/", "refs/pins/", "refs/tags/"))
        )
    return found


def prove(folder: Path, *, seed: int) -> int:
    """Kill a bump and two returns; return how often what followed was not what an undisturbed move
    leads to.
    """
    started = time.monotonic()
    stand = make_stand(folder)
    print(
        f"seed {seed}, the real tree with {len(EDITS) + 1} patches, bootstrapped and smoked in"
        f" {time.monotonic() - started:.0f} s",
        flush=True,
    )
    tag, bump = pinned_of(stand.rows()), ("pin.bump", NEXT)
    first = fingerprint(stand)
    draw = random.Random(f"{seed} pin")
    kills, failures = round_of(stand, bump, NEXT, BUMP, draw)
    second = fingerprint(stand)
    returns = 0
    for to, expected in ((tag, first), (NEXT, second), (tag, first)):
        struck, failed = round_of(stand, ("pin.rollback",), to, BACK, draw)
        wrong = judge.differences(expected, fingerprint(stand))
        print("".join(f"      {line}\n" for line in wrong[:8]), end="", flush=True)
        returns, failures = returns + struck, failures + failed + bool(wrong)
        if returns >= 2 * len(BACK):
            break
    lead_on(stand, tag, ("pin.rollback",))
    shutil.rmtree(stand.layout.known_good_states / good_of(stand, NEXT))
    started = time.monotonic()
    lead_on(stand, NEXT, bump)
    print(f"an undisturbed bump: {time.monotonic() - started:.0f} s", flush=True)
    wrong = judge.differences(fingerprint(stand), second)
    print("".join(f"      {line}\n" for line in wrong[:8]), end="", flush=True)
    failures += bool(wrong)
    print(
        f"{kills} kills of pin.bump, {returns} of pin.rollback, {failures} not completed rightly,"
        f" seed {seed}",
        flush=True,
    )
    return failures


def good_of(stand: Stand, tag: str) -> str:
    return str(
        next(
            row["facts"]["name"]
            for row in stand.rows()
            if row["name"] == "good" and row["facts"]["tag"] == tag
        )
    )
