"""The sequence of the smoke: what was built, the probes one after the other, a verdict for each
check.

A probe that hangs, dies or says nothing is a failed check and leaves no process.
"""

import json
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from workspace.checks import http_checks, numeric, registry, server_checks, stack_dumps
from workspace.checks.registry import Answer, Check, Expected, Level, Need, chosen
from workspace.compile import device_code
from workspace.core import process
from workspace.core.console import State
from workspace.core.errors import (
    BuildError,
    SmokeError,
    SourceError,
    ToolchainError,
    WorkspaceError,
)
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import plan
from workspace.machine import hardware, interpreter
from workspace.server import models, process_tree
from workspace.server.command import built_environment

NAME_WIDTH = 22
# Of a probe's own watch: it ends before its caller's patience does, and tells the stacks.
LIMIT = "WORKSPACE_SMOKE_LIMIT_S"
# Of the caller's patience: what the probe's own watch has, and what it has until it is made to tell
# its stacks.
OWN_SHARE, SHARE = 0.8, 0.9
_STATES: Mapping[str, State] = {"pass": "ok", "fail": "FAIL", "skipped": "skipped"}
KERNELS = ("norm", "activation", "rotary", "attention", "quantized", "moe")
CONSISTENCY = ("repeat", "batch", "parts", "chunked", "prefix")

# One process, no compilation, no network, little memory; what the developer's own shell says about
# engines does not count here.
ENVIRONMENT: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    **stack_dumps.FAULTS,
}
COMPILED: Mapping[str, str] = {**ENVIRONMENT, "TORCHDYNAMO_DISABLE": "0"}


@dataclass(frozen=True)
class SmokeOptions:
    """What the user wants judged. `model` is tiny, smollm2, a folder, or a name on the hub whose
    files are on disk; `timeout_s` bounds each probe.

    `is_fail_fast` stops after the first probe of which a check failed.
    """

    level: Level = "quick"
    model: str = "tiny"
    timeout_s: float = 600.0
    is_fail_fast: bool = False


def expect(layout: Layout, observed: plan.Observation) -> Expected:
    """Read from the stamp what stands in `.vllm`. Raises SmokeError where the stamp names no torch
    or no version.
    """
    stamped = observed.kernels.recorded
    version = stamped.outcome.get("version") if stamped else None
    if stamped is None or version is None or observed.torch is None:
        raise SmokeError(
            "the stamp of the build does not say what was built", hint="./scripts/inv bootstrap"
        )
    torch, _, cuda = stamped.inputs.get(
        "torch", f"{observed.torch.version} CUDA {observed.torch.cuda or 'none'}"
    ).partition(" CUDA ")
    libraries = {library.path: (library.size, library.sha256) for library in stamped.libraries}
    triton = interpreter.installed(layout).get("triton") if observed.device == "cuda" else None
    return Expected(
        layout.vllm.resolve(),
        version,
        torch,
        observed.device,
        libraries,
        None if cuda in ("", "none") else cuda,
        triton,
    )


def run(
    layout: Layout,
    settings: Settings,
    expected: Expected,
    options: SmokeOptions,
    *,
    run_log: RunLog,
    look: Callable[[], object],
) -> tuple[tuple[Check, ...], Mapping[str, object]]:
    """Return the verdicts, each shown as it falls, and the parity probe's document for the record.
    `look` returns what of the tree must not change.
    """
    before = look()
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as neutral:
        suite = _Suite(layout, settings, expected, options, Path(neutral), run_log)
        for part in (
            suite.binary,
            suite.kernels,
            suite.compare,
            *((suite.serve, suite.more) if options.level == "full" else ()),
        ):
            part()
            if options.is_fail_fast and any(check.verdict == "fail" for check in suite.checks):
                return tuple(suite.checks), suite.document
    suite.found(lambda: (registry.tree(before, look(), 0.0),), "provenance.tree")
    missing = set(chosen(options.level, has_model=options.model != "tiny")) - {
        check.identifier for check in suite.checks
    }
    assert not missing, f"no verdict for {missing}"
    return tuple(suite.checks), suite.document


class _Suite:
    """One run: the probes that it asks, and the checks that have their verdict."""

    def __init__(
        self,
        layout: Layout,
        settings: Settings,
        expected: Expected,
        options: SmokeOptions,
        folder: Path,
        run_log: RunLog,
    ) -> None:
        self._layout, self._settings, self._expected, self._options, self._folder, self._run_log = (
            layout,
            settings,
            expected,
            options,
            folder,
            run_log,
        )
        self._lacks: frozenset[Need] = (
            frozenset({"gpu", "architectures"}) if expected.device == "cpu" else frozenset()
        )
        self.checks: list[Check] = []
        self.document: Mapping[str, object] = {}
        # Of what hung or crashed since the last verdict.
        self._stacks: list[str] = []

    def found(self, judge: Callable[[], tuple[Check, ...]], first: str) -> None:
        """Show a spinner while something is judged, then a row for each verdict."""
        with self._run_log.console.step(first.ljust(NAME_WIDTH)) as view:
            done = self._with_stacks(
                [registry.settled(check, lacks=self._lacks) for check in judge()]
            )
            view.state, view.reason = _STATES[done[0].verdict], done[0].evidence
        for check in done[1:]:
            self._run_log.console.row(
                _STATES[check.verdict], check.identifier.ljust(NAME_WIDTH), check.evidence
            )
        self.checks += done

    def _with_stacks(self, done: list[Check]) -> list[Check]:
        """The first check that failed tells the stacks, too."""
        lines, self._stacks = self._stacks[: stack_dumps.KEPT_LINES], []
        first = next((place for place, check in enumerate(done) if check.verdict == "fail"), None)
        if first is None or not lines:
            return done
        return [
            replace(check, problems=(*check.problems, *lines)) if place == first else check
            for place, check in enumerate(done)
        ]

    def binary(self) -> None:
        def judge() -> tuple[Check, ...]:
            answer = self._ask("verify.py", str(self._layout.vllm), "--no-import")
            return (
                registry.libraries(answer, self._expected),
                registry.binary_load(answer),
                self._cubins(),
            )

        self.found(judge, "provenance.libraries")

    def kernels(self) -> None:
        def judge() -> tuple[Check, ...]:
            answer = self._ask("kernels.py", "--device", self._expected.device)
            return tuple(numeric.kernels(answer, group) for group in KERNELS)

        self.found(judge, "kernels.norm")

    def compare(self) -> None:
        """Parity of the tiny models, consistency of one of them, and whose vLLM it was that
        spoke.
        """
        names: list[models.Architecture] = ["llama", "qwen3"]
        if self._options.level == "full":
            names.append("mixtral")

        def judge() -> tuple[Check, ...]:
            answer, folders = self._tiny(names)
            self.document = answer.record
            parity = self._twice(answer, folders, "tiny")
            same = tuple(numeric.consistency(answer, name) for name in CONSISTENCY)
            # The process that made the tokens says where it had its vLLM from; another one's word
            # would prove less.
            return *parity, *same, registry.provenance(answer, self._expected)

        self.found(judge, "parity.llama")
        if self._options.model != "tiny":
            self.found(self._named, "parity.model")

    def serve(self) -> None:
        """The tiny Llama over HTTP; what the offline engine has said of it is what is expected."""

        def judge() -> tuple[Check, ...]:
            started = time.monotonic()
            try:
                model = models.tiny(self._layout, self._settings, run_log=self._run_log)
                environment = built_environment(
                    self._layout, self._settings, more={**ENVIRONMENT, **server_checks.ENVIRONMENT}
                )
                wanted = {"version": self._expected.version, "device": self._expected.device}
                what = server_checks.subject(
                    self._layout,
                    environment,
                    model,
                    **wanted,
                    rows=self._offline(),
                    limit_s=self._options.timeout_s,
                )
            except WorkspaceError as exc:
                return server_checks.failed(exc.message, time.monotonic() - started)
            found, told = server_checks.run(
                self._layout.state / "smoke-server", what, run_log=self._run_log
            )
            self._stacks += told
            return found

        self.found(judge, "server.ready")

    def more(self) -> None:
        """What takes a while: torch.compile, and a model that was trained."""
        self.found(lambda: (self._compiled(),), "consistency.compiled")
        device = ("--device", self._expected.device)
        self.found(
            lambda: numeric.real(
                self._with_smollm2(lambda folder: self._ask("real_model.py", folder, *device))
            ),
            "real.answer",
        )

        def judge() -> tuple[Check, ...]:
            form = ("--dtype", "bfloat16", "--tokens", "16")
            return (
                numeric.bfloat16(
                    self._with_smollm2(
                        lambda folder: self._parity({"smollm2": folder}, "smollm2", form=form)
                    ),
                    "smollm2",
                ),
            )

        self.found(judge, "parity.bfloat16")
        self.found(lambda: (self._mxfp4(),), "parity.gpt-oss")

    def _cubins(self) -> Check:
        started = time.monotonic()
        if self._expected.device == "cpu":
            return Check(
                "binary.cubins",
                "skipped",
                "built for the CPU: no library holds code for a GPU",
                0.0,
            )
        capabilities = tuple(
            gpu.capability for gpu in hardware.observe(self._settings).gpus if gpu.capability
        )
        archs = self._settings.text("TORCH_CUDA_ARCH_LIST")
        if not capabilities and not archs:
            return Check(
                "binary.cubins",
                "skipped",
                "there is no GPU here, and no TORCH_CUDA_ARCH_LIST to judge against",
                0.0,
            )
        listed = device_code.list_cubins(
            self._layout,
            self._settings,
            [self._layout.vllm / path for path in self._expected.libraries],
        )
        said = device_code.judge(listed, capabilities=capabilities, archs=archs)
        problems = [f"{one.library} {one.sentence}" for one in said if one.state == "wrong"]
        fine = (
            f"{sum(one.state == 'ok' for one in said)} libraries serve"
            f" {', '.join(capabilities) or archs}"
        )
        return registry.judged("binary.cubins", problems, fine, time.monotonic() - started)

    def _tiny(self, names: list[models.Architecture]) -> tuple[Answer, Mapping[str, str]]:
        folders: dict[str, str] = dict.fromkeys(names, "")

        def ask() -> Answer:
            folders.update(
                {
                    name: str(
                        models.tiny(
                            self._layout, self._settings, run_log=self._run_log, architecture=name
                        )
                    )
                    for name in names
                }
            )
            return self._parity(folders, "tiny", "--consistency", "llama")

        self._run_log.phase("tiny models")
        return _made(ask), folders

    def _named(self) -> tuple[Check, ...]:
        folders = {"model": self._options.model}

        def ask(folder: str) -> Answer:
            folders["model"] = folder
            return self._parity(folders, "model")

        answer = (
            self._with_smollm2(ask)
            if self._options.model == "smollm2"
            else ask(self._options.model)
        )
        return self._twice(answer, folders, "model")

    def _twice(
        self, answer: Answer, folders: Mapping[str, str], round_name: str
    ) -> tuple[Check, ...]:
        """Judge the parity of each model; the two are asked again about those that they differ
        on.
        """
        found = {name: numeric.parity(answer, name) for name in folders}
        differ = {
            name: folders[name]
            for name, check in found.items()
            if check.verdict == "fail" and numeric.is_answered(answer, name)
        }
        if differ:
            again = self._parity(differ, f"{round_name}-again")
            before, after = self._said(round_name), self._said(f"{round_name}-again")
            for name in differ:
                found[name] = numeric.settle(
                    found[name], numeric.parity(again, name), name=name, before=before, after=after
                )
        return tuple(found.values())

    def _said(self, round_name: str) -> numeric.Said:
        return numeric.Said(
            self._folder / f"reference-{round_name}.json", self._folder / f"rows-{round_name}.json"
        )

    def _parity(
        self, folders: Mapping[str, str], round_name: str, *words: str, form: tuple[str, ...] = ()
    ) -> Answer:
        """Ask Hugging Face, then vLLM, and keep what both said in the files of that round; `form`
        is for both.
        """
        shared = [
            *(f"--model={name}={folder}" for name, folder in folders.items()),
            "--device",
            self._expected.device,
            *form,
        ]
        said = self._said(round_name)
        answer = self._ask("reference.py", *shared)
        if answer.problem:
            return Answer({}, f"Hugging Face: {answer.problem}", answer.seconds)
        said.reference.write_text(json.dumps(answer.record))
        return self._ask(
            "parity.py", *shared, "--against", str(said.reference), "--keep", str(said.vllm), *words
        )

    def _compiled(self) -> Check:
        rows = self._said("tiny").vllm
        if not rows.is_file():
            return registry.judged(
                "consistency.compiled",
                ["there is no answer of the eager engine to compare with"],
                "",
                0.0,
            )
        model = models.tiny(self._layout, self._settings, run_log=self._run_log)
        words = (
            f"--model=llama={model}",
            "--compiled",
            "--against",
            str(rows),
            "--device",
            self._expected.device,
        )
        return numeric.parity(
            self._ask("parity.py", *words, environment=COMPILED), "llama", "consistency.compiled"
        )

    def _mxfp4(self) -> Check:
        if self._expected.device == "cpu" and "amx_tile" not in Path("/proc/cpuinfo").read_text(
            encoding="utf-8", errors="replace"
        ):
            return Check(
                "parity.gpt-oss",
                "skipped",
                "vLLM's MXFP4 kernel for CPUs wants AMX, which this one lacks",
                0.0,
            )

        def ask() -> Answer:
            folder = models.tiny(
                self._layout, self._settings, run_log=self._run_log, architecture="gpt-oss"
            )
            # Hugging Face in float32: what vLLM's kernels round, which take bfloat16 only, is
            # enough.
            return self._parity({"gpt-oss": str(folder)}, "gpt-oss", "--dtype", "bfloat16")

        return numeric.mxfp4(_made(ask))

    def _offline(self) -> tuple[http_checks.Row, ...]:
        """What the offline engine has said of the tiny Llama; nothing where it has not got that
        far.
        """
        return http_checks.offline(numeric.rows_again(self._said("tiny").vllm, "llama"))

    def _with_smollm2(self, ask: Callable[[str], Answer]) -> Answer:
        return _made(
            lambda: ask(str(models.smollm2(self._layout, self._settings, run_log=self._run_log)))
        )

    def _ask(self, probe: str, *words: str, environment: Mapping[str, str] = ENVIRONMENT) -> Answer:
        """Run a probe in a neutral folder, where no import can come from by accident."""
        started, patience_s = time.monotonic(), self._options.timeout_s
        # What the shell says of torch's threads and vLLM's caches goes in, what it says of these
        # does not.
        variables = built_environment(
            self._layout, self._settings, more={**environment, LIMIT: f"{OWN_SHARE * patience_s:g}"}
        )
        argv: list[process.Argument] = [
            self._layout.environment_python,
            self._layout.probes / probe,
            *words,
        ]
        try:
            with stack_dumps.Watch(SHARE * patience_s, _guarded, environment=variables) as watch:
                done = process.capture(
                    argv, env=variables, cwd=self._folder, timeout_s=patience_s + stack_dumps.TELL_S
                )
        except ToolchainError as exc:
            return Answer(
                {},
                _late(probe, patience_s) if watch.has_fired else exc.message,
                time.monotonic() - started,
            )
        record, problem = read(done)
        problem = _late(probe, patience_s) if watch.has_fired else problem
        if problem or "error" in done.stdout:
            self._stacks += watch.told(done.stderr)
            self._run_log.phase(probe)
            self._run_log.write(shlex.join([str(word) for word in argv]))
            for line in (*watch.seen, *done.stderr.splitlines()):
                self._run_log.write(line)
        return Answer(record, problem, time.monotonic() - started)


def _guarded() -> set[int]:
    """The processes of a probe: what stands below the guards that this process has started, who
    stay to tell how it ended.
    """
    known = process_tree.living()
    return process_tree.below(
        {number for number, one in known.items() if one.parent == os.getpid()}, known
    )


def _late(probe: str, patience_s: float) -> str:
    return f"{probe} gave no answer in {patience_s:g} s and was ended"


def _made(ask: Callable[[], Answer]) -> Answer:
    """What a question brings, or why its model could not be made."""
    started = time.monotonic()
    try:
        return ask()
    except (BuildError, SourceError, ToolchainError) as exc:
        return Answer({}, exc.message, time.monotonic() - started)


def read(done: process.Completed) -> tuple[Mapping[str, object], str | None]:
    """Return a probe's document, and what is wrong with the way it ended, None where nothing is."""
    try:
        record = json.loads(done.stdout)
    except ValueError:
        record = None
    last = next(
        (
            line.strip()
            for line in reversed(done.stderr.splitlines())
            if not stack_dumps.is_part(line)
        ),
        "no word",
    )
    if done.returncode != 0:
        return {}, f"the probe {process.describe_status(done.returncode)}: {last}"
    if not isinstance(record, dict):
        return {}, f"the probe printed no document: {last}"
    return record, None
