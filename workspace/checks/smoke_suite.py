"""The smoke's sequence: the probes one after the other, and a verdict for each check.

A probe that hangs, dies or prints no document is a failed check and leaves no process.
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
from workspace.core.console import RunLog, State
from workspace.core.errors import (
    BuildError,
    SmokeError,
    SourceError,
    ToolchainError,
    WorkspaceError,
)
from workspace.core.paths import Layout
from workspace.install import plan
from workspace.machine import hardware, interpreter
from workspace.machine.machine import Machine
from workspace.server import models, process_tree
from workspace.server.command import built_environment

NAME_WIDTH = 22
# The limit of a probe's own watch: the probe ends before its caller's limit and dumps its stacks.
LIMIT = "WORKSPACE_SMOKE_LIMIT_S"
# Shares of the caller's limit: for the probe's own watch, and until the caller dumps its stacks.
PROBE_SHARE, DUMP_SHARE = 0.8, 0.9
_STATES: Mapping[str, State] = {"pass": "ok", "fail": "FAIL", "skipped": "skipped"}
KERNELS = ("norm", "activation", "rotary", "attention", "quantized", "moe")
CONSISTENCY = ("repeat", "batch", "parts", "chunked", "prefix")

# One process, no compilation, no network, little memory. The user's own shell settings for engines
# do not apply here.
ENVIRONMENT: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    **stack_dumps.FAULTS,
}
COMPILED: Mapping[str, str] = {**ENVIRONMENT, "TORCHDYNAMO_DISABLE": "0"}


# Warm on two cores: 4 s and 16 s. With a cold page cache and kernels that compile at the first
# start, one start took 123 s.
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class SmokeOptions:
    """What to judge. `timeout_s` limits each probe.

    `model` is tiny, smollm2, a folder, or a name on the hub whose files are on disk. `is_fail_fast`
    stops after the first probe with a failed check.
    """

    level: Level = "quick"
    model: str = "tiny"
    timeout_s: float = TIMEOUT_S
    is_fail_fast: bool = False


def expect(layout: Layout, observed: plan.Observation) -> Expected:
    """Read from the stamp what `.vllm` has. Raises SmokeError if it lacks torch or a version."""
    stamped = observed.kernels.recorded
    version = stamped.outcome.get("version") if stamped else None
    if stamped is None or version is None or observed.torch is None:
        raise SmokeError("the stamp of the build is incomplete", hint="./scripts/inv bootstrap")
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
    machine: Machine,
    expected: Expected,
    options: SmokeOptions,
    *,
    run_log: RunLog,
    look: Callable[[], object],
) -> tuple[tuple[Check, ...], Mapping[str, object]]:
    """Run all probes; return the verdicts, and the parity probe's document for the record.

    Each verdict is printed as soon as it is known. `look` returns the state of the tree, which
    must not change.
    """
    before = look()
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as neutral:
        suite = _Suite(machine, expected, options, Path(neutral), run_log)
        parts = [suite.binary, suite.kernels, suite.compare]
        parts += [suite.serve, suite.more] if options.level == "full" else []
        for part in parts:
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
    """One run of the smoke: it starts the probes and collects the verdicts."""

    def __init__(
        self,
        machine: Machine,
        expected: Expected,
        options: SmokeOptions,
        folder: Path,
        run_log: RunLog,
    ) -> None:
        self._machine, self._run_log = machine, run_log
        self._layout, self._settings = machine.layout, machine.settings
        self._expected, self._options, self._folder = expected, options, folder
        self._lacks: frozenset[Need] = (
            frozenset({"gpu", "architectures"}) if expected.device == "cpu" else frozenset()
        )
        self.checks: list[Check] = []
        self.document: Mapping[str, object] = {}
        # Stack dumps of probes that hung or crashed since the last verdict.
        self._stacks: list[str] = []

    def found(self, judge: Callable[[], tuple[Check, ...]], first: str) -> None:
        """Show a spinner while `judge` runs, then a row for each verdict."""
        with self._run_log.console.step(first.ljust(NAME_WIDTH)) as view:
            done = self._with_stacks(
                [registry.without_unfounded_skip(check, lacks=self._lacks) for check in judge()]
            )
            view.state, view.reason = _STATES[done[0].verdict], done[0].evidence
        for check in done[1:]:
            self._run_log.console.row(
                _STATES[check.verdict], check.identifier.ljust(NAME_WIDTH), check.evidence
            )
        self.checks += done

    def _with_stacks(self, done: list[Check]) -> list[Check]:
        """Add the stack dumps to the first check that failed."""
        lines, self._stacks = self._stacks[: stack_dumps.KEPT_LINES], []
        failed = [index for index, check in enumerate(done) if check.verdict == "fail"]
        if failed and lines:
            check = done[failed[0]]
            done[failed[0]] = replace(check, problems=(*check.problems, *lines))
        return done

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
        """Judge parity of the tiny models, consistency of one, and which vLLM was imported."""
        names: list[models.Architecture] = ["llama", "qwen3"]
        if self._options.level == "full":
            names.append("mixtral")

        def judge() -> tuple[Check, ...]:
            answer, folders = self._tiny_parity(names)
            self.document = answer.record
            parity = self._recheck(answer, folders, "tiny")
            same = tuple(numeric.consistency(answer, name) for name in CONSISTENCY)
            # The process that generated the tokens reports its own import; another process would
            # prove less.
            return *parity, *same, registry.provenance(answer, self._expected)

        self.found(judge, "parity.llama")
        if self._options.model != "tiny":
            self.found(self._named_model, "parity.model")

    def serve(self) -> None:
        """Judge the tiny Llama over HTTP by the offline engine's answers."""

        def judge() -> tuple[Check, ...]:
            started = time.monotonic()
            try:
                tested = server_checks.under_test(
                    self._layout,
                    built_environment(
                        self._machine,
                        more={**ENVIRONMENT, **server_checks.ENVIRONMENT},
                    ),
                    self._tiny_model("llama"),
                    expected=self._expected,
                    rows=self._offline_rows(),
                    limit_s=self._options.timeout_s,
                )
            except WorkspaceError as exc:
                return server_checks.failed(exc.message, time.monotonic() - started)
            found, stacks = server_checks.run(
                self._layout.state / "smoke-server", tested, run_log=self._run_log
            )
            self._stacks += stacks
            return found

        self.found(judge, "server.ready")

    def more(self) -> None:
        """Judge what takes longer: torch.compile, and trained models."""
        self.found(lambda: (self._compiled(),), "consistency.compiled")
        device = ("--device", self._expected.device)
        self.found(
            lambda: numeric.real(
                self._with_smollm2(lambda folder: self._ask("real_model.py", folder, *device))
            ),
            "real.answer",
        )
        form = ("--dtype", "bfloat16", "--tokens", "16")

        def in_bfloat16(folder: str) -> Answer:
            return self._parity({"smollm2": folder}, "smollm2", form=form)

        self.found(
            lambda: (numeric.bfloat16(self._with_smollm2(in_bfloat16), "smollm2"),),
            "parity.bfloat16",
        )
        self.found(lambda: (self._mxfp4(),), "parity.gpt-oss")

    def _cubins(self) -> Check:
        started = time.monotonic()
        if self._expected.device == "cpu":
            why = "built for the CPU: no library has code for a GPU"
            return Check("binary.cubins", "skipped", why, 0.0)
        capabilities = self._machine.capabilities
        archs = self._settings.text("TORCH_CUDA_ARCH_LIST")
        if not capabilities and not archs:
            why = "this machine has no GPU, and TORCH_CUDA_ARCH_LIST is not set"
            return Check("binary.cubins", "skipped", why, 0.0)
        listed = device_code.list_cubins(
            self._layout,
            self._settings,
            [self._layout.vllm / path for path in self._expected.libraries],
        )
        judged = device_code.judge(listed, capabilities=capabilities, archs=archs)
        problems = [
            f"{verdict.library} {verdict.sentence}"
            for verdict in judged
            if verdict.state == "wrong"
        ]
        count = sum(verdict.state == "ok" for verdict in judged)
        fine = f"{count} libraries serve {', '.join(capabilities) or archs}"
        return registry.judged("binary.cubins", problems, fine, time.monotonic() - started)

    def _tiny_model(self, architecture: models.Architecture) -> Path:
        return models.tiny(
            self._layout, self._settings, run_log=self._run_log, architecture=architecture
        )

    def _tiny_parity(self, names: list[models.Architecture]) -> tuple[Answer, Mapping[str, str]]:
        folders: dict[str, str] = dict.fromkeys(names, "")

        def ask() -> Answer:
            folders.update({name: str(self._tiny_model(name)) for name in names})
            return self._parity(folders, "tiny", "--consistency", "llama")

        self._run_log.phase("tiny models")
        return _or_problem(ask), folders

    def _named_model(self) -> tuple[Check, ...]:
        """Judge parity of the model that the user named."""
        folders = {"model": self._options.model}

        def ask(folder: str) -> Answer:
            folders["model"] = folder
            return self._parity(folders, "model")

        is_smollm2 = self._options.model == "smollm2"
        answer = self._with_smollm2(ask) if is_smollm2 else ask(self._options.model)
        return self._recheck(answer, folders, "model")

    def _recheck(
        self, answer: Answer, folders: Mapping[str, str], round_name: str
    ) -> tuple[Check, ...]:
        """Judge the parity of each model; re-run both engines for the models on which they differ.

        The second run separates a vLLM defect from a flaky reference.
        """
        found = {name: numeric.parity(answer, name) for name in folders}
        differ = {
            name: folders[name]
            for name, check in found.items()
            if check.verdict == "fail" and numeric.is_answered(answer, name)
        }
        if differ:
            again = self._parity(differ, f"{round_name}-again")
            before, after = self._round(round_name), self._round(f"{round_name}-again")
            for name in differ:
                found[name] = numeric.settle_recheck(
                    found[name], numeric.parity(again, name), name=name, before=before, after=after
                )
        return tuple(found.values())

    def _round(self, round_name: str) -> numeric.Round:
        return numeric.Round(
            self._folder / f"reference-{round_name}.json", self._folder / f"rows-{round_name}.json"
        )

    def _parity(
        self, folders: Mapping[str, str], round_name: str, *args: str, form: tuple[str, ...] = ()
    ) -> Answer:
        """Run Hugging Face, then vLLM, and keep both answers in the round's files.

        `args` are for vLLM's probe, `form` for both.
        """
        device = ("--device", self._expected.device)
        shared = [*(f"--model={name}={path}" for name, path in folders.items()), *device, *form]
        files = self._round(round_name)
        answer = self._ask("reference.py", *shared)
        if answer.problem:
            return Answer({}, f"Hugging Face: {answer.problem}", answer.seconds)
        files.reference.write_text(json.dumps(answer.record))
        kept = ("--against", str(files.reference), "--keep", str(files.vllm))
        return self._ask("parity.py", *shared, *kept, *args)

    def _compiled(self) -> Check:
        name, rows = "consistency.compiled", self._round("tiny").vllm
        if not rows.is_file():
            return registry.judged(
                name, ["the eager engine gave no answer to compare with"], "", 0.0
            )
        args = (f"--model=llama={self._tiny_model('llama')}", "--compiled", "--against", str(rows))
        device = ("--device", self._expected.device)
        answer = self._ask("parity.py", *args, *device, environment=COMPILED)
        return numeric.parity(answer, "llama", name)

    def _mxfp4(self) -> Check:
        if self._expected.device == "cpu" and "amx_tile" not in hardware.processor()[1]:
            why = "vLLM's MXFP4 kernel for CPUs requires AMX, which this CPU lacks"
            return Check("parity.gpt-oss", "skipped", why, 0.0)

        def ask() -> Answer:
            folder = self._tiny_model("gpt-oss")
            # Hugging Face runs in float32: vLLM's kernels take bfloat16 only, and their rounding
            # is error enough.
            return self._parity({"gpt-oss": str(folder)}, "gpt-oss", "--dtype", "bfloat16")

        return numeric.mxfp4(_or_problem(ask))

    def _offline_rows(self) -> tuple[http_checks.Row, ...]:
        """Return the offline engine's answers of the tiny Llama, empty if it has none."""
        return http_checks.offline(numeric.read_rows(self._round("tiny").vllm, "llama"))

    def _with_smollm2(self, ask: Callable[[str], Answer]) -> Answer:
        return _or_problem(
            lambda: ask(str(models.smollm2(self._layout, self._settings, run_log=self._run_log)))
        )

    def _ask(self, probe: str, *args: str, environment: Mapping[str, str] = ENVIRONMENT) -> Answer:
        """Run a probe in a neutral folder, from which nothing can be imported by accident."""
        started, patience_s = time.monotonic(), self._options.timeout_s
        # The user's settings of torch threads and vLLM caches apply; those in `environment` do not.
        variables = built_environment(
            self._machine,
            more={**environment, LIMIT: f"{PROBE_SHARE * patience_s:g}"},
        )
        argv: list[process.Argument] = [
            self._layout.environment_python,
            self._layout.probes / probe,
            *args,
        ]
        limit_s = patience_s + stack_dumps.DUMP_S
        try:
            with stack_dumps.Watch(
                DUMP_SHARE * patience_s, _probe_processes, environment=variables
            ) as watch:
                done = process.capture(argv, env=variables, cwd=self._folder, timeout_s=limit_s)
        except ToolchainError as exc:
            problem = _timeout_text(probe, patience_s) if watch.has_fired else exc.message
            return Answer({}, problem, time.monotonic() - started)
        record, failure = read(done)
        failure = _timeout_text(probe, patience_s) if watch.has_fired else failure
        if failure or "error" in done.stdout:
            self._stacks += watch.stacks(done.stderr)
            self._run_log.phase(probe)
            self._run_log.write(shlex.join([str(arg) for arg in argv]))
            for line in (*watch.seen, *done.stderr.splitlines()):
                self._run_log.write(line)
        return Answer(record, failure, time.monotonic() - started)


def _probe_processes() -> set[int]:
    """Return the processes of a probe: those below the guards that this process started.

    The guards stay, to report how the probe ended.
    """
    known = process_tree.living()
    guards = {pid for pid, found in known.items() if found.parent == os.getpid()}
    return process_tree.below(guards, known)


def _timeout_text(probe: str, patience_s: float) -> str:
    return f"{probe} gave no answer in {patience_s:g} s and was ended"


def _or_problem(ask: Callable[[], Answer]) -> Answer:
    """Return the answer, or why the model could not be made."""
    started = time.monotonic()
    try:
        return ask()
    except (BuildError, SourceError, ToolchainError) as exc:
        return Answer({}, exc.message, time.monotonic() - started)


def read(done: process.Completed) -> tuple[Mapping[str, object], str | None]:
    """Return a probe's document, and what is wrong with how it ended, None if it ended well."""
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
        "no output",
    )
    if done.returncode != 0:
        return {}, f"the probe {process.describe_status(done.returncode)}: {last}"
    if not isinstance(record, dict):
        return {}, f"the probe printed no document: {last}"
    return record, None
