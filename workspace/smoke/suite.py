"""The sequence of the smoke: what was built, the probes one after the other, a verdict for each check.

A probe that hangs, dies or says nothing is a failed check and leaves no process.
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from workspace.build import plan
from workspace.core import process
from workspace.core.errors import BuildError, SmokeError, ToolchainError
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.engine import models, surroundings
from workspace.smoke import checks
from workspace.smoke.checks import Answer, Check, Expected

NAME_WIDTH = 19

# One process, no compilation, no network, little memory; what the developer's own shell says about engines does not count here.
ENVIRONMENT: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def expect(layout: Layout, observed: plan.Observation) -> Expected:
    """Read from the stamp what stands in `.vllm`. Raises SmokeError where the stamp names no torch or no version."""
    stamped = observed.kernels.recorded
    version = stamped.outcome.get("version") if stamped else None
    if stamped is None or version is None or observed.torch is None:
        raise SmokeError("the stamp of the build does not say what was built", hint="./scripts/inv bootstrap")
    torch = stamped.inputs.get("torch", observed.torch.version).split(" CUDA ")[0]
    libraries = {library.path: library.sha256 for library in stamped.libraries}
    return Expected(layout.vllm.resolve(), version, torch, observed.device, libraries)


def run(layout: Layout, settings: Settings, expected: Expected, *, journal: Journal, timeout_s: float) -> tuple[tuple[Check, ...], Mapping[str, object]]:
    """Return the verdicts, each shown as it falls, and the parity probe's document for the record. `timeout_s` bounds each probe."""
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as neutral:
        ask = _Asker(layout, settings, Path(neutral), journal, timeout_s)
        with _shown(journal, "binary.load") as show:
            loaded = show(checks.binary_load(ask("verify.py", str(layout.vllm), "--no-import"), expected))
        with _shown(journal, "parity.llama") as show:
            answer = _compare(layout, settings, ask, expected.device, journal)
            compared = show(checks.parity(answer))
        # The process that made the tokens says where it had its vLLM from; another one's word would prove less.
        with _shown(journal, "provenance.import") as show:
            origin = show(checks.provenance(answer, expected))
    return (loaded, compared, origin), answer.record


@contextlib.contextmanager
def _shown(journal: Journal, identifier: str) -> Iterator[Callable[[Check], Check]]:
    """A spinner while the block runs, and a row with the verdict that it was given."""
    with journal.console.step(identifier.ljust(NAME_WIDTH)) as view:

        def show(check: Check) -> Check:
            view.state, view.reason = "ok" if check.verdict == "pass" else "FAIL", check.evidence
            return check

        yield show


def _compare(layout: Layout, settings: Settings, ask: "_Asker", device: str, journal: Journal) -> Answer:
    started = time.monotonic()
    journal.phase("tiny model")
    try:
        folder = models.tiny(layout, settings, journal=journal)
    except (BuildError, ToolchainError) as exc:
        return Answer({}, exc.message, time.monotonic() - started)
    return ask("parity.py", str(folder), "--device", device)


class _Asker:
    """Runs a probe in a neutral folder, where no import can come from by accident."""

    def __init__(self, layout: Layout, settings: Settings, folder: Path, journal: Journal, timeout_s: float) -> None:
        self._layout, self._folder, self._journal, self._timeout_s = layout, folder, journal, timeout_s
        # What the shell says of torch's threads and vLLM's caches goes in, what it says of these does not.
        self._environment = surroundings.variables(layout, settings, more=ENVIRONMENT)

    def __call__(self, probe: str, *words: str) -> Answer:
        started = time.monotonic()
        argv: list[process.Argument] = [self._layout.environment_python, self._layout.probes / probe, *words]
        record: Mapping[str, object] = {}
        try:
            done = process.capture(argv, env=self._environment, cwd=self._folder, timeout_s=self._timeout_s)
        except ToolchainError as exc:
            seconds = time.monotonic() - started
            hangs = f"{probe} gave no answer in {self._timeout_s:g} s and was ended"
            return Answer(record, hangs if seconds >= self._timeout_s else exc.message, seconds)
        record, problem = read(done)
        if problem or record.get("error"):
            self._journal.phase(probe)
            for line in done.stderr.splitlines():
                self._journal.write(line)
        return Answer(record, problem, time.monotonic() - started)


def read(done: process.Completed) -> tuple[Mapping[str, object], str | None]:
    """Return a probe's document, and what is wrong with the way it ended, None where nothing is."""
    try:
        record = json.loads(done.stdout)
    except ValueError:
        record = None
    last = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "no word")
    if done.returncode != 0:
        return {}, f"the probe {process.describe_status(done.returncode)}: {last}"
    if not isinstance(record, dict):
        return {}, f"the probe printed no document: {last}"
    return record, None
