"""The same on the real tree: a clone of this workspace, bootstrapped, whose bootstrap is ended at
random moments by random signals.

`python -m tests.proof.kill.real --seed N --times N [--folder DIR]`. Needs the network or warm
caches, and some 3 GB of disk.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.proof.kill import judge
from tests.small.materials import ROOT, git
from workspace.core.paths import Layout

LIMIT_S = 1800.0
KINDS = ("SIGKILL to the verb", "SIGKILL to all", "SIGTERM", "SIGINT")


@dataclass(frozen=True)
class Clone:
    """A clone of the workspace in a folder of its own."""

    layout: Layout
    env: Mapping[str, str]
    mark: str
    args: tuple[str, ...] = ("bootstrap",)

    def start(self) -> "subprocess.Popen[bytes]":
        with (self.layout.root.parent / "output").open("wb") as output:
            argv = [str(self.layout.root / "scripts" / "inv"), *self.args]
            return subprocess.Popen(
                argv,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def end(
        self,
        child: "subprocess.Popen[bytes]",
        number: signal.Signals = signal.SIGKILL,
        *,
        is_all: bool = False,
    ) -> tuple[int, float]:
        """Send the verb a signal, or SIGKILL to everything; return its code and the seconds until
        nothing of it lived. No stray, no traceback.
        """
        for entry in judge.strays(self.mark) if is_all else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(entry.split()[0]), signal.SIGKILL)
        child.send_signal(number)
        try:
            code = child.wait(timeout=60)
        except subprocess.TimeoutExpired:
            child.kill()
            raise AssertionError(f"still running 60 s after {number.name}: {self.output}") from None
        quiet_s, living = judge.await_no_stray(self.mark)
        assert not living, f"still alive: {living}"
        assert "Traceback" not in self.output, self.output
        return code, quiet_s

    @property
    def output(self) -> str:
        return (self.layout.root.parent / "output").read_text(errors="replace")

    def step(self) -> str:
        """The step that was running: the last one that the log names, or what came before there was
        a log of this run.
        """
        if "due:" not in self.output:
            return "tools" if "preparing" in self.output else "looking"
        done = [
            line.split()[1]
            for line in self.output.splitlines()
            if line.startswith(("done ", "skipped "))
        ]
        due = self.output.split("due:", 1)[1].splitlines()[0].replace(",", " ").split()
        return (
            next((name for name in due if name not in done), "closing")
            if "preflight" in done
            else "preflight"
        )


def make_clone(folder: Path) -> Clone:
    """Copy the working tree, tracked or not, but nothing that was built; commit it with its
    submodule entry.
    """
    root = folder / "clone"
    root.mkdir(parents=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    layout = Layout(root)
    layout.vllm.mkdir(parents=True, exist_ok=True)
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    link = git(ROOT, "ls-files", "-s", "vendor/vllm").split()
    if link:
        git(root, "update-index", "--add", "--cacheinfo", f"160000,{link[1]},vendor/vllm")
    git(root, "commit", "--quiet", "-m", "The workspace")
    (root / "notes.txt").write_text("mine\n")
    mark = f"KILL_MARK={folder}"
    return Clone(layout, dict(os.environ) | {"KILL_MARK": str(folder)}, mark)


def _no_vllm_stamp(layout: Layout) -> None:
    layout.stamp("vllm").unlink()


def _no_stamps(layout: Layout) -> None:
    _no_vllm_stamp(layout)
    layout.stamp("environment").unlink()


def _no_environment(layout: Layout) -> None:
    shutil.rmtree(layout.environment)


def _no_source(layout: Layout) -> None:
    shutil.rmtree(layout.vllm)
    layout.vllm.mkdir()
    _no_vllm_stamp(layout)


def _nothing(layout: Layout) -> None:
    _no_source(layout)
    _no_environment(layout)
    shutil.rmtree(layout.state)
    layout.dotenv.unlink()


STARTS: tuple[tuple[str, Callable[[Layout], None]], ...] = (
    ("no stamp of vllm", _no_vllm_stamp),
    ("no stamps", _no_stamps),
    ("no .vllm", _no_environment),
    ("no vendor/vllm", _no_source),
    ("a fresh clone", _nothing),
)


def prove(folder: Path, *, seed: int, times: int) -> int:
    """Kill `times` times; return how many cases were not completed rightly by the next run."""
    clone = make_clone(folder)
    print(f"seed {seed}, {times} times, in {folder}", flush=True)
    print(f"bootstrap of a fresh clone: {_complete(clone):.1f} s", flush=True)
    expected = judge.fingerprint(clone.layout)
    whole_s: dict[str, float] = {}
    for name, begin in STARTS:
        begin(clone.layout)
        whole_s[name] = _complete(clone)
        wrong = judge.differences(expected, judge.fingerprint(clone.layout))
        print(
            f"undisturbed from {name}: {whole_s[name]:.1f}"
            f" s{''.join(f'  DIFFERS {line}' for line in wrong)}",
            flush=True,
        )
    failures, number, struck = 0, -1, 0
    while struck < times:
        number += 1
        draw = random.Random(f"{seed} {number}")
        name, begin = STARTS[number % len(STARTS)]
        kind = draw.choice(KINDS)
        after_s = draw.random() * whole_s[name]
        begin(clone.layout)
        try:
            step, code, quiet_s = _disturb(clone, kind, after_s)
            if code == 0:
                # The verb was faster than the run that the moments are drawn from.
                print(
                    f"late {number:3}  from {name:18}{kind:20} at {after_s:5.1f} s: it had ended",
                    flush=True,
                )
                continue
            seconds = _complete(clone)
            wrong = judge.differences(expected, judge.fingerprint(clone.layout))
        except AssertionError as exc:
            step, code, quiet_s, seconds, wrong = "", 0, 0.0, 0.0, [str(exc)]
        struck += 1
        verdict = "ok" if not wrong else "FAIL"
        failures += bool(wrong)
        ended = f"{kind:20} at {after_s:5.1f} s in {step:13} exit {code:4}"
        print(
            f"{verdict:5}{number:3}  from {name:18}{ended}, quiet after {quiet_s:4.1f} s, completed"
            f" in {seconds:5.1f} s"
        )
        print("".join(f"      {line}\n" for line in wrong[:8]), end="", flush=True)
    print(f"{times} kills, {failures} not completed rightly, seed {seed}", flush=True)
    return failures


def _disturb(clone: Clone, kind: str, after_s: float) -> tuple[str, int, float]:
    child = clone.start()
    time.sleep(after_s)
    number = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}.get(kind, signal.SIGKILL)
    code, quiet_s = clone.end(child, number, is_all=kind == "SIGKILL to all")
    allowed = {"SIGTERM": (143, -15), "SIGINT": (130, -2)}.get(kind, (-9,))
    assert code in (0, *allowed), f"exit {code} after {kind}: {clone.output}"
    return clone.step(), code, quiet_s


def _complete(clone: Clone) -> float:
    started = time.monotonic()
    code = clone.start().wait(timeout=LIMIT_S)
    assert code == 0, f"the next bootstrap: exit {code}: {clone.output}"
    assert (clone.layout.root / "notes.txt").read_text() == "mine\n"
    return time.monotonic() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill-real-", dir=args.folder))
    # A shell's background job ignores SIGINT, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return 1 if prove(folder, seed=args.seed, times=args.times) else 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
