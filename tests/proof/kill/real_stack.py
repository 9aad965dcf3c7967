"""The verbs of the patch stack, killed at random moments on the real tree with thirty patches,
beside a file and a branch of the user's.

Needs the release archive, from the cache or the network, and 0.3 GB of disk; no environment is
built.
"""

import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tests.proof.kill.moves import take_both_sides
from tests.proof.kill.real import Clone, make_clone
from tests.small.materials import git
from workspace.core import settings
from workspace.repo import index, pins

PATCHES = 30
VERBS = ("patch.apply", "patch.unapply", "patch.export", "patch.continue")
AGAIN_S = 300.0
# The patch in whose first line another one, put before it, conflicts.
DISPUTED = 15
MOST_COMMANDS = 6


@dataclass(frozen=True)
class Stand:
    """A clone with the real tree and an applied, exported stack; `tip` is its last commit, `side` a
    commit of a branch of the user's.
    """

    clone: Clone
    base: str
    tip: str
    side: str
    disputed: str = ""

    @property
    def vllm(self) -> Path:
        return self.clone.layout.vllm

    def inv(self, *args: str, codes: tuple[int, ...] = (0,)) -> int:
        child = replace(self.clone, args=args).start()
        code = child.wait(timeout=AGAIN_S)
        assert code in codes, f"inv {' '.join(args)}: exit {code}: {self.clone.output}"
        assert "Traceback" not in self.clone.output, self.clone.output
        return code

    def check(self) -> None:
        """Everything that is the user's is there, and every commit is whole and reachable."""
        assert (self.vllm / "mine.txt").read_text() == "mine\n"
        assert (self.clone.layout.root / "notes.txt").read_text() == "mine\n"
        assert git(self.vllm, "rev-parse", "side") == self.side
        assert git(self.vllm, "for-each-ref", "--contains", self.tip), (
            "the stack's commits are in no reference"
        )
        assert git(self.vllm, "status", "--porcelain") == "?? mine.txt"
        git(self.vllm, "fsck", "--connectivity-only", "--no-dangling", "--no-progress")


def make_stand(folder: Path) -> Stand:
    clone = make_clone(folder)
    layout = clone.layout
    pin = pins.load(layout.pins).vllm
    assert pin.archive is not None
    packed = index.fetch(
        pin.name, pin.archive.filename, pin.archive.sha256, settings=settings.load(layout)
    )
    pins.make_from_archive(packed, layout.vllm, pin)
    git(layout.vllm, "config", "user.name", "Me")
    git(layout.vllm, "config", "user.email", "me@localhost")
    stand = Stand(clone, pin.archive.commit, "", "")
    stand.inv("patch.apply")
    files = sorted((layout.vllm / "vllm").rglob("*.py"))[:PATCHES]
    for number, path in enumerate(files):
        commit(stand, path, number)
    stand.inv("patch.export")
    git(layout.root, "add", "patches")
    git(layout.root, "commit", "--quiet", "-m", "Thirty patches")
    git(layout.vllm, "branch", "side", "HEAD~3")
    (layout.vllm / "mine.txt").write_text("mine\n")
    disputed = str(files[DISPUTED].relative_to(layout.vllm))
    return replace(
        stand,
        tip=git(layout.vllm, "rev-parse", "HEAD"),
        side=git(layout.vllm, "rev-parse", "side"),
        disputed=disputed,
    )


def commit(stand: Stand, path: Path, number: int) -> None:
    path.write_text(f"# change {number}\n{path.read_text()}")
    git(
        stand.vllm,
        "commit",
        "--quiet",
        "--all",
        "-m",
        f"Change number {number}\n\nUpstream-Status: Pending",
    )


def prove(folder: Path, *, seed: int, times: int) -> int:
    """Kill `times` times; return how often the next run did not lead to what an undisturbed one
    does.
    """
    stand = make_stand(folder)
    whole_s: dict[str, float] = {}
    failures, number, struck = 0, -1, 0
    print(f"seed {seed}, {times} times, {PATCHES} patches on the real tree", flush=True)
    while struck < times:
        number += 1
        draw = random.Random(f"{seed} stack {number}")
        verb = VERBS[number % len(VERBS)]
        _begin(stand, verb, number)
        after_s = draw.random() * whole_s.get(verb, 3.0)
        is_all = draw.random() < 0.5
        started = time.monotonic()
        child = replace(stand.clone, args=(verb,)).start()
        try:
            time.sleep(after_s)
            if child.poll() is not None:
                whole_s[verb] = min(time.monotonic() - started, whole_s.get(verb, 9.0) * 0.9)
                _end(stand, verb)
                continue
            stand.clone.end(child, is_all=is_all)
            struck += 1
            if verb == "patch.continue":
                _go_on(stand)
            else:
                stand.inv(verb)
            _end(stand, verb)
            verdict = "ok"
        except AssertionError as exc:
            verdict, failures = f"FAIL {exc}", failures + 1
        how = "SIGKILL to all" if is_all else "SIGKILL to the verb"
        print(f"{number:3}  {verb:16}{how:20} after {after_s:.2f} s: {verdict}", flush=True)
    print(f"{times} kills, {failures} not completed rightly, seed {seed}", flush=True)
    return failures


def _begin(stand: Stand, verb: str, number: int) -> None:
    if verb == "patch.apply":
        stand.inv("patch.unapply")
    elif verb == "patch.export":
        # One commit more, and one file less in it: written, and removed.
        git(stand.vllm, "reset", "--quiet", "--hard", "HEAD~2")
        commit(stand, sorted((stand.vllm / "vllm").rglob("*.py"))[PATCHES + 1], 1000 + number)
    elif verb == "patch.continue":
        stand.inv("patch.unapply")
        commit(stand, stand.vllm / stand.disputed, 2000)
        folder = stand.clone.layout.patches("vllm")
        args = (
            "format-patch",
            "--stdout",
            "--zero-commit",
            "--full-index",
            "--no-signature",
            "--keep-subject",
            "-1",
        )
        (folder / "Change-number-2000.patch").write_text(git(stand.vllm, *args) + "\n")
        lines = (folder / "series").read_text().splitlines()
        (folder / "series").write_text(
            "\n".join([*lines[:2], "Change-number-2000.patch", *lines[2:]]) + "\n"
        )
        git(stand.vllm, "checkout", "--quiet", "--detach", stand.base)
        stand.inv("patch.apply", codes=(4,))
        _resolve(stand)


def _resolve(stand: Stand) -> None:
    """Take both sides of the conflict, as a user would."""
    assert git(stand.vllm, "diff", "--name-only", "--diff-filter=U") == stand.disputed, (
        stand.clone.output
    )
    take_both_sides(stand.vllm / stand.disputed)
    git(stand.vllm, "add", stand.disputed)


def _go_on(stand: Stand) -> None:
    """Go on by what is hinted at, until nothing is under way; an `am` that was begun anew has its
    conflict resolved again.
    """
    for _ in range(MOST_COMMANDS):
        if git(stand.vllm, "rev-parse", "HEAD") == stand.base:
            stand.inv("patch.apply", codes=(4,))
            _resolve(stand)
        if (
            stand.inv("patch.continue", codes=(0, 3, 4)) == 0
            or "no am, rebase" in stand.clone.output
        ):
            return
        stand.inv(
            "patch.continue",
            "--skip" if "--skip    if that is right" in stand.clone.output else "--abort",
        )
    raise AssertionError(f"{MOST_COMMANDS} commands did not lead to the end: {stand.clone.output}")


def _end(stand: Stand, verb: str) -> None:
    """Hold what came of it against what should have, and bring the stack back."""
    if verb == "patch.unapply":
        assert git(stand.vllm, "rev-parse", "HEAD") == stand.base
        stand.inv("patch.apply")
    if verb == "patch.continue":
        assert git(stand.vllm, "diff", "--name-only", stand.tip, "HEAD") == stand.disputed
        assert (
            (stand.vllm / stand.disputed)
            .read_text()
            .startswith(f"# change 2000\n# change {DISPUTED}\n")
        )
        git(stand.vllm, "branch", "--force", "continued")
        _restore(stand)
    if verb == "patch.export":
        stand.inv("patch.export", "--check")
        git(stand.vllm, "branch", "--force", "exported")
        _restore(stand)
    assert git(stand.vllm, "rev-parse", "HEAD^{tree}") == git(
        stand.vllm, "rev-parse", f"{stand.tip}^{{tree}}"
    )
    stand.check()


def _restore(stand: Stand) -> None:
    git(stand.vllm, "reset", "--quiet", "--hard", stand.tip)
    git(stand.clone.layout.root, "checkout", "--quiet", "--", "patches")
    git(stand.clone.layout.root, "clean", "--quiet", "-fd", "patches")
    stand.inv("patch.export")
    assert git(stand.clone.layout.root, "status", "--porcelain", "patches") == ""
