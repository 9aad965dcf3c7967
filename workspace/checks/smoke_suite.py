"""The smoke's sequence: the probes, side by side where the machine allows, and a verdict for each
check.

A probe that hangs, dies or prints no document is a failed check of its own and leaves no process.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from workspace.checks import growth, http_requests, numeric, probe_runs, registry, server_checks
from workspace.checks.probe_runs import Answer, Folders, Program, SharedImport
from workspace.checks.registry import REGISTRY, Check, Expected, Level, Need, chosen
from workspace.compile import device_code
from workspace.core import records
from workspace.core.console import Row, RunLog, State
from workspace.core.errors import WorkspaceError
from workspace.core.paths import typed
from workspace.machine import hardware
from workspace.machine.machine import Machine
from workspace.server import models, process_tree
from workspace.server.command import built_environment

NAME_WIDTH = 22
KERNELS = ("norm", "activation", "rotary", "attention", "quantized", "moe")
CONSISTENCY = ("repeat", "batch", "parts", "chunked", "prefix")

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


def run(
    machine: Machine,
    expected: Expected,
    options: SmokeOptions,
    *,
    run_log: RunLog,
    look: Callable[[], object],
) -> tuple[tuple[Check, ...], Mapping[str, object]]:
    """Run all probes; return the verdicts, and the parity probe's document for the record.

    Each verdict is printed as soon as it and those before it are known. `look` returns the state of
    the tree, which must not change.
    """
    before = look()
    with (
        tempfile.TemporaryDirectory(prefix="vllm-workspace-") as neutral,
        _Suite(machine, expected, options, Path(neutral), run_log) as suite,
    ):
        for first, wait in suite.parts():
            suite.show(first, wait)
            if options.is_fail_fast and any(check.verdict == "fail" for check in suite.checks):
                return tuple(suite.checks), suite.document
    suite.show("provenance.tree", lambda: [((registry.tree(before, look(), 0.0),), _NOTHING)])
    judged = {check.identifier for check in suite.checks}
    missing = set(chosen(options.level, has_model=options.model != "tiny")) - judged
    assert not missing, f"no verdict for {missing}"
    measured = {"compilation": suite.compiled, "steps": suite.steps}
    return tuple(suite.checks), {**suite.document, **measured}


# The checks that an answer decided, with the answer. A part of the smoke has one or more.
_Found = list[tuple[tuple[Check, ...], Answer]]
_NOTHING = Answer({}, None, 0.0)
_Part = tuple[str, Callable[[], _Found]]


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
        lacks: tuple[Need, ...] = ("gpu", "architectures") if expected.device == "cpu" else ()
        # growth.py itself measures whether the machine is idle.
        self._lacks = frozenset({*lacks, "idle"})
        self._device = ("--device", expected.device)
        self._adapters = ("--adapters", str(folder / "adapters"))
        own = machine.driver.memories()[:1] if expected.device == "cuda" else ()
        self._lanes = probe_runs.lanes(machine.host(), *own)
        self._pool = ThreadPoolExecutor(self._lanes)
        self._begun: list[Future[_Found] | Future[Answer]] = []
        place = str(folder / "imports.socket")
        self._shared = SharedImport(self._program("imports.py", "share", place))
        # Seconds of compilers in each part of the smoke, by its first check.
        self.compiled: dict[str, Mapping[str, float]] = {}
        self._running = probe_runs.Running(machine.layout.smoke_record)
        self.steps = self._running.steps
        self.checks: list[Check] = []
        self._sampled = _NOTHING
        self.document: Mapping[str, object] = {}

    def __enter__(self) -> "_Suite":
        return self

    def __exit__(self, *_: object) -> None:
        """End the probes that still run, and the shared import."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        while True:
            # Again and again: a probe may just have begun.
            probe_runs.end_all()
            if all(future.done() for future in self._begun):
                return
            time.sleep(process_tree.POLL_S)

    def show(self, first: str, wait: Callable[[], _Found]) -> None:
        """Show a spinner while a part runs, then a row for each verdict."""
        with self._run_log.console.step(first, least=NAME_WIDTH) as view:
            view.watch(lambda: self._running.text(first))
            with self._running.timed(first):
                found = wait()
            judged = [check for checks, answer in found for check in self._settled(checks, answer)]
            done = sorted(judged, key=lambda check: list(REGISTRY).index(check.identifier))
            view.state, view.reason = done[0].row.state, done[0].evidence
        self._run_log.console.rows([check.row for check in done[1:]], least=NAME_WIDTH)
        self.checks += done
        if compilers := probe_runs.compilation([answer for _, answer in found]):
            self.compiled[first] = compilers
            seconds = ", ".join(f"{name} {value:.1f} s" for name, value in compilers.items())
            self._run_log.console.rows([Row(State.OK, "compilation", seconds)], least=NAME_WIDTH)
        for lines in [answer.log for _, answer in found if answer.log]:
            self._run_log.phase(first)
            for line in lines:
                self._run_log.write(line)

    def _settled(self, checks: tuple[Check, ...], answer: Answer) -> list[Check]:
        """Judge unfounded skips, and add the stack dumps to the first check that failed."""
        done = [registry.without_unfounded_skip(check, lacks=self._lacks) for check in checks]
        lines = answer.stacks[: probe_runs.KEPT_LINES]
        failed = [index for index, check in enumerate(done) if check.verdict == "fail"]
        if failed and lines:
            check = done[failed[0]]
            done[failed[0]] = replace(check, problems=(*check.problems, *lines))
        return done

    def parts(self) -> Iterator[_Part]:
        """Begin the probes, and yield each part of the smoke with the function that awaits it.

        A probe waits only for those begun before it, so that one lane is enough.
        """
        names: list[models.Architecture] = ["llama", "qwen3"]
        if self._options.level == "full":
            names += ["mixtral", "gpt-oss-float32"]
        binary = self._begin(self._binary)
        self._run_log.phase("tiny models")
        folders = self._tiny_folders(*names)
        reference = self._pool.submit(self._reference, folders, "tiny")
        kernels = self._begin(self._kernels)
        engines = {
            name: self._pool.submit(self._compared, reference.result, folders, name, "tiny")
            for name in names
        }
        sampling = [
            self._pool.submit(self._sampling, reference.result, folders, *form)
            for form in numeric.ENGINES[self._expected.device]
        ]
        self._begun += [reference, *engines.values(), *sampling]
        named = None if self._options.model == "tiny" else self._begin_named_model()
        yield "provenance.libraries", binary.result
        yield "kernels.norm", kernels.result
        yield "layers.embedding", lambda: self._tiny(engines)
        yield "templates.tokens", lambda: self._judge_sampling(*sampling)
        if named:
            yield "parity.model", named.result
        if self._options.level == "full":
            yield from self._more()

    def _begin(self, judge: Callable[[], _Found]) -> "Future[_Found]":
        future = self._pool.submit(judge)
        self._begun.append(future)
        return future

    def _more(self) -> Iterator[_Part]:
        """Begin and yield what takes longer: a server, torch.compile, and trained models."""
        # A server runs in this thread, which an interrupt reaches, because no guard is above it. So
        # do the fetch and the making of SmolLM2.
        is_alone = self._lanes == 1 or not models.found_built_in(self._layout, "smollm2")
        if is_alone:
            yield "server.ready", self._server
        smollm2 = self._smollm2()
        gpt_oss: Folders | str = "vLLM's MXFP4 kernel for CPUs requires AMX, which this CPU lacks"
        if self._expected.device == "cuda" or "amx_tile" in hardware.processor()[1]:
            gpt_oss = self._tiny_folders("gpt-oss")
        llama = self._tiny_folders("llama")
        merged = self._pool.submit(self._merged, llama)
        self._begun.append(merged)
        begun = {
            "parity.gpt-oss": self._begin(lambda: self._mxfp4(gpt_oss)),
            "consistency.compiled": self._begin(self._compiled),
            "real.answer": self._begin(lambda: self._real(smollm2)),
            "parity.bfloat16": self._begin(lambda: self._bfloat16(smollm2)),
            **{
                names[0]: self._begin(partial(self._engine, part, llama, merged.result))
                for part, names in numeric.ENGINE.items()
            },
        }
        if not is_alone:
            yield "server.ready", self._server
        for first, future in begun.items():
            yield first, future.result

    def _binary(self) -> _Found:
        answer = self._ask("verify.py", str(self._layout.vllm), "--no-import")
        checks = registry.libraries(answer, self._expected), registry.binary_load(answer)
        return [((*checks, self._cubins()), answer)]

    def _kernels(self) -> _Found:
        answer = self._ask_shared("kernels.py", *self._device)
        return [(tuple(numeric.kernels(answer, group) for group in KERNELS), answer)]

    def _tiny(self, engines: "Mapping[models.Architecture, Future[Answer]]") -> _Found:
        """Judge parity of the tiny models, consistency of one, and which vLLM was imported."""
        answers: dict[str, Answer] = {name: done.result() for name, done in engines.items()}
        first = answers["llama"]
        self.document = numeric.merged(answers.values())
        # The process that generated the tokens reports its own import.
        others = (
            *(numeric.layers(answers, kind) for kind in numeric.LAYERS),
            *(numeric.consistency(first, name) for name in CONSISTENCY),
            registry.provenance(first, self._expected),
        )
        parity = [((numeric.parity(answer, name),), answer) for name, answer in answers.items()]
        return [*parity, (others, _NOTHING)]

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
            self._layout, [self._layout.vllm / path for path in self._expected.libraries]
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

    def _tiny_folders(self, *names: models.Architecture) -> Folders:
        return probe_runs.or_problem(lambda: {name: str(self._tiny_model(name)) for name in names})

    def _smollm2(self, name: str = "smollm2") -> Folders:
        return probe_runs.or_problem(
            lambda: {name: str(models.smollm2(self._layout, self._settings, run_log=self._run_log))}
        )

    def _begin_named_model(self) -> "Future[_Found]":
        """Begin to judge parity of the model that the user named."""
        model = self._options.model
        folder = typed(model)
        named = {"model": str(folder) if folder.is_dir() else model}
        folders = self._smollm2("model") if model == "smollm2" else named

        def judge() -> _Found:
            answer = self._parity(folders, "model", "model")
            return [((numeric.parity(answer, "model"),), answer)]

        return self._begin(judge)

    def _sampling(self, hugging_face: Callable[[], Answer], folders: Folders, *form: str) -> Answer:
        """Change each sampling parameter of vLLM once Hugging Face has answered."""
        return self._against(hugging_face(), folders, "tiny", "sampling.py", *form)

    def _against(
        self, reference: Answer, folders: Folders, round_name: str, probe: str, *more: str
    ) -> Answer:
        """Run a probe on the tiny Llama that reads the reference's answers, or return why not."""
        if reference.problem or isinstance(folders, Answer):
            return reference
        against = ("--against", str(self._reference_file(round_name)))
        return self._ask_shared(probe, folders["llama"], *against, *self._device, *more)

    def _judge_sampling(self, *engines: "Future[Answer]") -> _Found:
        self._sampled, *others = (engine.result() for engine in engines)
        return numeric.sampling(self._sampled, *others)

    def _reference_file(self, round_name: str) -> Path:
        """Return the file of Hugging Face's answers in one round of the smoke."""
        return self._folder / f"reference-{round_name}.json"

    def _rows_file(self, round_name: str, name: str) -> Path:
        """Return the file of vLLM's answers with one model."""
        return self._folder / f"rows-{round_name}-{name}.json"

    def _parity(
        self,
        folders: Folders,
        name: str,
        round_name: str,
        form: tuple[str, ...] = (),
    ) -> Answer:
        """Run Hugging Face, then vLLM, on one model; `form` is for both."""
        only = folders if isinstance(folders, Answer) else {name: folders[name]}
        reference = self._reference(only, round_name, form)
        return self._compared(lambda: reference, only, name, round_name, form)

    def _reference(
        self,
        folders: Folders,
        round_name: str,
        form: tuple[str, ...] = (),
    ) -> Answer:
        """Run Hugging Face, in a process without vLLM, and keep its answers in the round's file."""
        if isinstance(folders, Answer):
            return folders
        sampled = ("--sampling", "llama") if round_name == "tiny" else ()
        answer = self._ask("reference.py", *_named(folders), *self._device, *form, *sampled)
        if answer.problem:
            return replace(answer, record={}, problem=f"Hugging Face: {answer.problem}")
        self._reference_file(round_name).write_text(json.dumps(answer.record))
        return answer

    def _compared(
        self,
        hugging_face: Callable[[], Answer],
        folders: Folders,
        name: str,
        round_name: str,
        form: tuple[str, ...] = (),
    ) -> Answer:
        """Run vLLM on one model once Hugging Face has answered."""
        reference = hugging_face()
        if reference.problem or isinstance(folders, Answer):
            return reference
        rows = str(self._rows_file(round_name, name))
        kept = ("--against", str(self._reference_file(round_name)), "--keep", rows)
        own: tuple[str, ...] = ("--layers",) if round_name.startswith("tiny") else ()
        own += ("--consistency", name) if (round_name, name) == ("tiny", "llama") else ()
        model = _named({name: folders[name]})
        return self._ask_shared("parity.py", *model, *self._device, *form, *kept, *own)

    def _answers(self) -> http_requests.Answers:
        reference = records.read(self._reference_file("tiny"), dict[str, object]) or {}
        offline = numeric.read_rows(self._rows_file("tiny", "llama"), "llama")
        return http_requests.answers(offline, self._sampled.record, reference)

    def _server(self) -> _Found:
        """Judge the tiny Llama over HTTP by the offline engine's answers."""
        started = time.monotonic()
        try:
            tested = server_checks.under_test(
                self._layout,
                built_environment(self._machine, "smoke-serve"),
                self._tiny_model("llama"),
                expected=self._expected,
                answers=self._answers(),
                limit_s=self._options.timeout_s,
            )
        except WorkspaceError as exc:
            seconds = time.monotonic() - started
            failed = server_checks.failed(exc.message, seconds)
            return [(growth.completed(failed), _NOTHING)]
        # An answer's seconds are judged when nothing else of the smoke runs.
        found, stacks = server_checks.run(
            self._layout.state / "smoke-server",
            tested,
            run_log=self._run_log,
            more=lambda server: growth.run(server, tested, settle=self._settle),
        )
        return [(growth.completed(found), replace(_NOTHING, stacks=stacks))]

    def _settle(self) -> None:
        """Wait for all probes that were begun."""
        for future in self._begun:
            future.exception()

    def _compiled(self) -> _Found:
        name, rows = "consistency.compiled", self._rows_file("tiny", "llama")
        if not rows.is_file():
            problems = ["the eager engine gave no answer to compare with"]
            return [((registry.judged(name, problems, "", 0.0),), _NOTHING)]
        model = _named({"llama": str(self._tiny_model("llama"))})
        args = ("parity.py", *model, "--compiled", "--against", str(rows), *self._device)
        # Not from the other import, in which decorators found torch.compile disabled.
        place = str(self._folder / "compiled.socket")
        shared = SharedImport(self._program("imports.py", "share", place, is_compiled=True))
        answer = probe_runs.ask(self._program(*args, is_compiled=True), shared)
        return [((numeric.parity(answer, "llama", name),), answer)]

    def _real(self, folders: Folders) -> _Found:
        answer = self._reference(folders, "chats", ("--chats", "--tokens", "24"))
        if not (answer.problem or isinstance(folders, Answer)):
            against = ("--against", str(self._reference_file("chats")))
            answer = self._ask_shared("real_model.py", folders["smollm2"], *against, *self._device)
        return [(numeric.real(answer), answer)]

    def _bfloat16(self, folders: Folders) -> _Found:
        options = ("--dtype", "bfloat16", "--tokens", "16")
        answer = self._parity(folders, "smollm2", "smollm2", options)
        return [((numeric.bfloat16(answer, "smollm2"),), answer)]

    def _mxfp4(self, folders: Folders | str) -> _Found:
        if isinstance(folders, str):
            return [((Check("parity.gpt-oss", "skipped", folders, 0.0),), _NOTHING)]
        # Hugging Face runs in float32: vLLM's bfloat16 is rounding enough.
        reference, form = self._reference(folders, "gpt-oss"), ("--dtype", "bfloat16")
        answer = self._compared(lambda: reference, folders, "gpt-oss", "gpt-oss", form)
        return [((numeric.mxfp4(answer),), answer)]

    def _merged(self, folders: Folders) -> Answer:
        """Run Hugging Face with adapters and as a pooling model, and keep its answers."""
        if isinstance(folders, Answer):
            return folders
        answer = self._ask("engine.py", folders["llama"], *self._device, *self._adapters)
        self._reference_file("engine").write_text(json.dumps(answer.record))
        return answer

    def _engine(self, part: str, folders: Folders, hugging_face: Callable[[], Answer]) -> _Found:
        more = (f"--part={part}", *self._adapters)
        answer = self._against(hugging_face(), folders, "engine", "engine.py", *more)
        return [(tuple(numeric.parameters(name, answer) for name in numeric.ENGINE[part]), answer)]

    def _ask(self, probe: str, *args: str, shared: SharedImport | None = None) -> Answer:
        with self._running.noted(probe, args):
            return probe_runs.ask(self._program(probe, *args), shared)

    def _ask_shared(self, probe: str, *args: str) -> Answer:
        return self._ask(probe, *args, shared=self._shared)

    def _program(self, probe: str, *args: str, is_compiled: bool = False) -> Program:
        """Return a probe with its environment; `is_compiled` leaves torch.compile on."""
        given = {"TORCHDYNAMO_DISABLE": "0"} if is_compiled else {}
        given[probe_runs.LIMIT] = f"{probe_runs.PROBE_SHARE * self._options.timeout_s:g}"
        return Program(
            (str(self._layout.environment_python), str(self._layout.probes / probe), *args),
            built_environment(self._machine, "smoke", given=given),
            self._folder,
            self._options.timeout_s,
        )


def _named(folders: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"--model={name}={folder}" for name, folder in folders.items())
