"""The subject of a benchmark: the workload that vLLM runs, the samples in its result file, and the
description of tree, kernels, machine and software that a record holds.

It measures nothing. Of files it writes only a missing built-in model.
"""

import hashlib
import math
import platform
import re
import statistics
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.bench import results
from workspace.bench.results import Kind, Record, Software, Source
from workspace.core import hints, records
from workspace.core.console import RunLog
from workspace.core.errors import SettingsError
from workspace.core.files import sha256
from workspace.core.known_settings import is_secret
from workspace.core.paths import Layout, typed
from workspace.core.redaction import Redactor
from workspace.core.settings import Settings
from workspace.install import plan
from workspace.install.precompiled import text_of
from workspace.machine import hardware
from workspace.machine.machine import Machine
from workspace.repo.git import Git
from workspace.server import command as server_command
from workspace.server import flags, models
from workspace.server.command import built_environment

KINDS: tuple[Kind, ...] = ("latency", "throughput", "serve", "startup")
TINY = "tiny"
# A hint's word for the path of a model, which no record has.
FOLDER = "FOLDER"
CONCURRENCY = 8
SWEEP = (1, 4, 16, 32)

# The tiny model writes nonsense; it is only there to show a difference. A start takes some seconds,
# most of them imports. It runs in float32 because in bfloat16 it dies of SIGILL on some processors.
_TINY_ENGINE = ("--enforce-eager", "--dtype=float32", "--max-model-len=512")
_TINY_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
# Each iteration is a process of its own, so one iteration of each kind makes one start.
_STARTUP = ("--num-iters-cold=1", "--num-iters-warmup=0", "--num-iters-warm=1")
_TINY_WORK: Mapping[Kind, tuple[str, ...]] = {
    "latency": (
        "--input-len=32",
        "--output-len=32",
        "--batch-size=8",
        "--num-iters-warmup=2",
        "--num-iters=6",
    ),
    "throughput": (
        "--dataset-name=random",
        "--random-input-len=64",
        "--random-output-len=32",
        "--num-prompts=32",
        "--num-warmups=4",
    ),
    "startup": _STARTUP,
    "serve": (),
}
# For a model of real size: requests shaped as in a chat, and few of them, because a verdict needs
# six starts or more.
_WORK: Mapping[Kind, tuple[str, ...]] = {
    "latency": (
        "--input-len=128",
        "--output-len=128",
        "--batch-size=1",
        "--num-iters-warmup=2",
        "--num-iters=5",
    ),
    "throughput": (
        "--dataset-name=random",
        "--random-input-len=512",
        "--random-output-len=128",
        "--num-prompts=64",
        "--num-warmups=8",
    ),
    "startup": _STARTUP,
    "serve": (),
}
_CLIENT = (
    "--dataset-name=random",
    "--ignore-eos",
    "--seed=0",
    "--percentile-metrics=ttft,tpot,itl,e2el",
    "--num-warmups=2",
)
# The flags that the workspace itself sets.
_OWN_FLAGS = (
    "--model",
    "--output-json",
    "--port",
    "--host",
    "--save-result",
    "--result-dir",
    "--result-filename",
)
NAME_DIGITS = 6
# The variables that may change how fast vLLM is. The cache folders of compiled kernels are named
# after the tree, so they are no difference.
_RELEVANT = re.compile(
    r"(VLLM|TORCH|TORCHDYNAMO|TORCHINDUCTOR|PYTORCH|TRITON|CUDA|NCCL|FLASHINFER|OMP|KMP|MKL|GOMP"
    r"|MALLOC|HF|TOKENIZERS|LD_PRELOAD|PYTHONHASHSEED)(_|$)"
)
_PLACES = re.compile(
    r".*(_DIR|_ROOT|_HOME|_BASE|_PATH|_FILE|_CACHE)$|HF_.*(TOKEN|ENDPOINT)|VLLM_WORKSPACE_.*"
)


@dataclass(frozen=True)
class WorkloadOptions:
    """The workload that the command line asks for; `vllm_args` go to vLLM unchanged."""

    kind: Kind
    model: str
    vllm_args: tuple[str, ...] = ()
    has_sweep: bool = False


@dataclass(frozen=True)
class Workload:
    """The arguments of a benchmark: `engine` chooses how vLLM runs, `work` what it does.

    `concurrencies` are for serve only.
    """

    kind: Kind
    model: str
    called: str
    engine: tuple[str, ...]
    work: tuple[str, ...]
    recipe: Mapping[str, str]
    given: Mapping[str, str]
    concurrencies: tuple[int, ...] = ()

    @property
    def flags(self) -> tuple[str, ...]:
        """All flags that two comparable records share, the concurrencies included."""
        return (*self.engine, *self.work, *(f"--max-concurrency={at}" for at in self.concurrencies))


@dataclass(frozen=True)
class Benchmark:
    """A workload for the build of one clone or sandbox, with the environment of its process."""

    layout: Layout
    settings: Settings
    work: Workload
    environment: Mapping[str, str]


def options_of(record: Record) -> WorkloadOptions:
    """Return the workload of a record. Its model is FOLDER where it has the name of a folder."""
    is_tiny, kind = record.model == TINY, record.kind
    loads = [flag for flag in record.flags if flag.startswith("--max-concurrency=")]
    given = list(record.flags[: len(record.flags) - (len(loads) if kind == "serve" else 0)])
    work = (_TINY_WORK if is_tiny else _WORK)[kind]
    if work and tuple(given[-len(work) :]) == work:
        del given[-len(work) :]
    if is_tiny and tuple(given[: len(_TINY_ENGINE)]) == _TINY_ENGINE:
        del given[: len(_TINY_ENGINE)]
    # A folder is recorded with its configuration: see `_called`.
    model = FOLDER if " " in record.model else record.model
    return WorkloadOptions(kind, model, tuple(given), has_sweep=kind == "serve" and len(loads) > 1)


def arguments(options: WorkloadOptions, label: str, repeat: int | None = None) -> list[str]:
    """Return the arguments of `nox -s bench` after the kind that measure this workload."""
    model = ["--model", options.model] if options.model != TINY else []
    sweep = ["--sweep"] if options.has_sweep else []
    starts = ["--repeat", str(repeat)] if repeat else []
    given = ["--", *options.vllm_args] if options.vllm_args else []
    return [*model, *sweep, "--label", label, *starts, *given]


def prepare(machine: Machine, options: WorkloadOptions, *, run_log: RunLog) -> Benchmark:
    """Return the benchmark to run; create a built-in model that is missing.

    Raises SettingsError for a flag that the workspace itself sets, BuildError where the model
    cannot be created.
    """
    flags = (argument.split("=")[0] for argument in options.vllm_args)
    taken = next((flag for flag in flags if flag.replace("_", "-") in _OWN_FLAGS), None)
    if taken:
        raise SettingsError(
            f"the workspace itself sets {taken}: leave it out after --",
            hint=hints.text("bench.enforce_eager"),
        )
    layout, settings = machine.layout, machine.settings
    work = _workload(layout, settings, options, run_log=run_log)
    environment = built_environment(machine, "bench", recipe=work.recipe, given=work.given)
    return Benchmark(layout, settings, work, environment)


def _workload(
    layout: Layout, settings: Settings, options: WorkloadOptions, *, run_log: RunLog
) -> Workload:
    kind, model, engine = options.kind, options.model, options.vllm_args
    given: dict[str, str] = {}
    recipe: Mapping[str, str] = {}
    place = model
    if model == TINY:
        place = str(models.tiny(layout, settings, run_log=run_log))
        engine = (*_TINY_ENGINE, *engine)
        given |= _TINY_ENVIRONMENT
        # The engine of a server is a process of its own, whatever this variable is.
        if kind in ("latency", "throughput"):
            given["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    elif model == "smollm2":
        place = str(models.smollm2(layout, settings, run_log=run_log))
        recipe = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}
    elif (folder := typed(model)).is_dir():
        place, model = str(folder.resolve()), _called(folder.resolve())
    named = flags.references(engine, place)
    if not all(server_command.is_here(settings, reference) for reference in named):
        given.pop("HF_HUB_OFFLINE", None)
        recipe = {name: text for name, text in recipe.items() if name != "HF_HUB_OFFLINE"}
    work = (_TINY_WORK if model == TINY else _WORK)[kind]
    loads = SWEEP if options.has_sweep else (CONCURRENCY,)
    return Workload(
        kind, place, model, engine, work, recipe, given, loads if kind == "serve" else ()
    )


def _called(folder: Path) -> str:
    """Name a model by its folder's name and config, not by its path.

    The same model in two places is comparable, and a path is private.
    """
    config = folder / "config.json"
    return f"{folder.name} {sha256(config)[:12] if config.is_file() else 'without config.json'}"


def command(layout: Layout, work: Workload, result: Path) -> list[str]:
    """Return the argv of a benchmark that starts its own engine and writes its result file."""
    return [
        str(layout.environment / "bin" / "vllm"),
        "bench",
        work.kind,
        f"--model={work.model}",
        *work.work,
        *work.engine,
        f"--output-json={result}",
    ]


def server(layout: Layout, work: Workload, *, host: str, port: int) -> tuple[str, ...]:
    """Return the argv of the server that a serve benchmark measures."""
    return (
        str(layout.environment / "bin" / "vllm"),
        "serve",
        work.model,
        *work.engine,
        f"--host={host}",
        f"--port={port}",
    )


def client(layout: Layout, work: Workload, result: Path, *, port: int, at: int) -> list[str]:
    """Return the argv of the client that puts load on a server, `at` requests at once."""
    shape = (
        ("--random-input-len=64", "--random-output-len=32")
        if work.called == TINY
        else ("--random-input-len=512", "--random-output-len=128")
    )
    where = (
        "--host=127.0.0.1",
        f"--port={port}",
        f"--model={work.model}",
        f"--max-concurrency={at}",
        f"--num-prompts={max(16, 4 * at)}",
    )
    kept = (
        "--save-result",
        "--save-detailed",
        f"--result-dir={result.parent}",
        f"--result-filename={result.name}",
    )
    return [
        str(layout.environment / "bin" / "vllm"),
        "bench",
        "serve",
        *where,
        *shape,
        *_CLIENT,
        *kept,
    ]


def describe(
    benchmark: Benchmark,
    observed: plan.Observation,
    *,
    label: str,
    repeat: int,
    outer: Layout | None = None,
) -> Record:
    """Return a record without starts and without private values.

    `outer` is the layout of the clone, where the benchmark runs in a sandbox.
    """
    layout, settings, work = benchmark.layout, benchmark.settings, benchmark.work
    clone = outer or layout
    redactor = Redactor(hardware.private(clone, settings))
    installed, machine = observed.machine.packages(), observed.machine
    build = observed.torch
    return Record(
        kind=work.kind,
        label=label,
        time=records.utc_now(),
        workspace=Git(clone.root).head() if (clone.root / ".git").exists() else None,
        source=_source(layout, observed),
        machine=recorded_machine(machine),
        software=Software(
            vllm=installed.get("vllm", "none"),
            torch=build.version if build else "none",
            triton=installed.get("triton", "none"),
            cuda=(build.cuda if build else None) or "none",
            python=observed.python.version if observed.python else "none",
        ),
        device=observed.device,
        model=redactor.text(work.called),
        flags=tuple(redactor.text(flag) for flag in work.flags),
        environment=_recorded_variables(benchmark.environment, redactor),
        backends=(),
        repeat=repeat,
        starts=(),
    )


def _recorded_variables(environment: Mapping[str, str], redactor: Redactor) -> dict[str, str]:
    """Return the relevant variables, without paths; of a secret only that it is set."""
    names = sorted(
        name for name in environment if _RELEVANT.match(name) and not _PLACES.fullmatch(name)
    )
    return {name: "set" if is_secret(name) else redactor.text(environment[name]) for name in names}


def _source(layout: Layout, observed: plan.Observation) -> Source:
    stack, stamped = observed.stack, observed.kernels.recorded
    return Source(
        pin=observed.pin.tag,
        base=observed.checkout.base,
        commit=stack.head if stack else None,
        tree=(stack.tree if stack else None) or "unknown",
        dirty=plan.edits_digest(layout, stack),
        patches=tuple(stack.names) if stack else (),
        kernels=text_of(stamped.kernels if stamped else None),
        libraries=(
            {library.path: library.sha256 for library in stamped.libraries} if stamped else {}
        ),
    )


def recorded_machine(machine: Machine) -> results.Machine:
    """Return the machine as a record keeps it; its name is the same in every run."""
    host = machine.host()
    gpus = tuple(results.Gpu(gpu.name, gpu.capability, gpu.driver) for gpu in machine.gpus)
    kind = re.sub(
        r"[^a-z0-9]+",
        "-",
        (gpus[0].name if gpus else f"{host.architecture}-{host.cores}-cores").lower(),
    ).strip("-")
    return results.Machine(
        f"{kind}-{_machine_digest()}",
        host.architecture,
        hardware.processor()[0],
        host.cores,
        round(host.memory_gib, 1),
        gpus,
    )


def _machine_digest() -> str:
    """Return a digest of machine-id(5), which itself must stay private.

    It keeps the records of two machines of one kind apart.
    """
    try:
        own = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        own = ""
    return hashlib.sha256(f"vllm workspace {own or platform.node()}".encode()).hexdigest()[
        :NAME_DIGITS
    ]


def samples(
    kind: str, result: Mapping[str, object], *, at: int | None = None
) -> dict[str, tuple[float, ...]]:
    """Return the samples in a result file of `vllm bench` by metric; `at`: a sweep's concurrency.

    Raises ValueError for a file without samples, and for a server with failed requests.
    """
    found: dict[str, Iterable[object]] = {}
    if kind == "latency":
        found["latency"] = _list(result.get("latencies"))
    elif kind == "throughput":
        found = {name: [result.get(name)] for name in ("requests_per_second", "tokens_per_second")}
    elif kind == "startup":
        found = {
            f"{phase}_{step}": _list(result.get(f"{phase}_{step}_times"))
            for phase in ("cold", "warm")
            for step in ("startup", "compilation")
        }
    else:
        found = _served(result)
    suffix = f"@{at}" if at else ""
    kept = {
        f"{name}{suffix}": tuple(float(value) for value in values if _is_sample(value))
        for name, values in found.items()
    }
    kept = {name: values for name, values in kept.items() if values}
    if not kept:
        raise ValueError("its result file has no measured number")
    return kept


def _served(result: Mapping[str, object]) -> dict[str, Iterable[object]]:
    completed, failed = result.get("completed"), result.get("failed", 0)
    if not isinstance(completed, int) or completed <= 0:
        raise ValueError(f"no request was completed, {failed} failed")
    if failed:
        raise ValueError(
            f"{failed} of {completed + failed if isinstance(failed, int) else failed} requests"
            " failed: the times of the others mean little"
        )
    found: dict[str, Iterable[object]] = {
        name: [result.get(name)] for name in ("request_throughput", "output_throughput")
    }
    first, between = (
        _list(result.get("ttfts")),
        [[gap for gap in _list(gaps) if _is_sample(gap)] for gaps in _list(result.get("itls"))],
    )
    found["ttft"] = [time * 1000 for time in first if _is_sample(time)]
    found["itl"] = [gap * 1000 for gaps in between for gap in gaps]
    found["tpot"] = [statistics.fmean(gaps) * 1000 for gaps in between if gaps]
    found["e2el"] = [
        (time + sum(gaps)) * 1000
        for time, gaps in zip(first, between, strict=False)
        if _is_sample(time)
    ]
    return found


def _list(found: object) -> Sequence[object]:
    return found if isinstance(found, list) else ()


def _is_sample(found: object) -> typing.TypeGuard[float]:
    return (
        isinstance(found, int | float)
        and not isinstance(found, bool)
        and math.isfinite(found)
        and found > 0
    )
