"""What is measured, and on what: the tree, its kernels, the machine and the software, as a record
holds them. It only looks.
"""

import datetime
import hashlib
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.bench.results import Gpu, Kind, Machine, Record, Software, Source
from workspace.core.errors import SettingsError
from workspace.core.files import sha256
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.redaction import Redactor
from workspace.core.settings import Settings, is_secret
from workspace.install import plan
from workspace.machine import hardware, interpreter
from workspace.machine import hardware as machines
from workspace.repo.git import Git
from workspace.server import models

KINDS: tuple[Kind, ...] = ("latency", "throughput", "serve", "startup")
TINY = "tiny"
CONCURRENCY = 8
SWEEP = (1, 4, 16, 32)

# The tiny model says nonsense and is there to see a difference with: some seconds a start, most of
# it imports. In float32, as bfloat16 can die of SIGILL with it on some processors.
_TINY_ENGINE = ("--enforce-eager", "--dtype=float32", "--max-model-len=512")
_TINY_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
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
    "startup": (),
    "serve": (),
}
# A model of real size: the shape of a chat, few enough for a process to be started six times and
# more.
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
    "startup": (),
    "serve": (),
}
# Each iteration is a process of its own, so that one of each makes one start.
_STARTUP = ("--num-iters-cold=1", "--num-iters-warmup=0", "--num-iters-warm=1")
_CLIENT = (
    "--dataset-name=random",
    "--ignore-eos",
    "--seed=0",
    "--percentile-metrics=ttft,tpot,itl,e2el",
    "--num-warmups=2",
)
# What the workspace itself tells the benchmark.
_OURS = (
    "--model",
    "--output-json",
    "--port",
    "--host",
    "--save-result",
    "--result-dir",
    "--result-filename",
)


@dataclass(frozen=True)
class Workload:
    """`engine` are the words that choose how vLLM runs, `work` those that say what it does;
    `concurrencies` are of serve only.
    """

    kind: Kind
    model: str
    called: str
    engine: tuple[str, ...]
    work: tuple[str, ...]
    recipe: Mapping[str, str]
    more: Mapping[str, str]
    concurrencies: tuple[int, ...] = ()

    @property
    def flags(self) -> tuple[str, ...]:
        """Everything that two records must have in common; at how many requests at once is in the
        metrics' names, or here.
        """
        return (*self.engine, *self.work, *(f"--max-concurrency={at}" for at in self.concurrencies))


def prepare(
    layout: Layout,
    settings: Settings,
    kind: Kind,
    model: str,
    words: Sequence[str],
    *,
    has_sweep: bool,
    run_log: RunLog,
) -> Workload:
    """Return what is to be run; a built-in model is made where there is none. `words` are the
    user's own, for vLLM.

    Raises SettingsError for words that are the workspace's to say, BuildError where the model
    cannot be made.
    """
    if taken := next(
        (word for word in words if word.split("=")[0].replace("_", "-") in _OURS), None
    ):
        raise SettingsError(
            f"{taken.split('=')[0]} after -- is what the workspace itself says",
            hint="nox -s bench -- latency --model NAME -- --enforce-eager",
        )
    more = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_CONFIGURE_LOGGING": "1", "VLLM_NO_USAGE_STATS": "1"}
    engine: tuple[str, ...] = tuple(words)
    recipe: Mapping[str, str] = {}
    place = model
    if model == TINY:
        place, engine = str(models.tiny(layout, settings, run_log=run_log)), (*_TINY_ENGINE, *words)
        more |= _TINY_ENVIRONMENT
        # A server's engine is a process of its own, whatever this says.
        more |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if kind in ("latency", "throughput") else {}
    elif model == "smollm2":
        place = str(models.smollm2(layout, settings, run_log=run_log))
        recipe = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}
    elif Path(model).is_dir():
        place, model = str(Path(model).resolve()), _called(Path(model).resolve())
    work = (_TINY_WORK if model == TINY else _WORK)[kind]
    if kind == "startup":
        work = _STARTUP
    return Workload(
        kind,
        place,
        model,
        engine,
        work,
        recipe,
        more,
        (SWEEP if has_sweep else (CONCURRENCY,)) if kind == "serve" else (),
    )


def _called(folder: Path) -> str:
    """Name a model in a folder by what it is, not by where: two places of the same model are
    comparable, and a path is private.
    """
    config = folder / "config.json"
    return f"{folder.name} {sha256(config)[:12] if config.is_file() else 'without config.json'}"


def command(layout: Layout, work: Workload, result: Path) -> list[str]:
    """The command line of a benchmark that starts its own engine and writes its result file."""
    return [
        str(layout.environment / "bin" / "vllm"),
        "bench",
        work.kind,
        f"--model={work.model}",
        *work.work,
        *work.engine,
        f"--output-json={result}",
    ]


def client(layout: Layout, work: Workload, result: Path, *, port: int, at: int) -> list[str]:
    """The command line of the load on a server, `at` requests at once."""
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


NAME_DIGITS = 6
# What may change how fast a vLLM is. Where compiled kernels are kept is named after the tree, and
# is no difference.
_OF_INTEREST = re.compile(
    r"(VLLM|TORCH|TORCHDYNAMO|TORCHINDUCTOR|PYTORCH|TRITON|CUDA|NCCL|FLASHINFER|OMP|KMP|MKL|GOMP|MALLOC|HF|TOKENIZERS|LD_PRELOAD|PYTHONHASHSEED)(_|$)"
)
_PLACES = re.compile(
    r".*(_DIR|_ROOT|_HOME|_BASE|_PATH|_FILE|_CACHE)$|HF_.*(TOKEN|ENDPOINT)|VLLM_WORKSPACE_.*"
)


def describe(
    layout: Layout,
    settings: Settings,
    observed: plan.Observation,
    work: Workload,
    *,
    label: str,
    repeat: int,
    environment: Mapping[str, str],
    outer: Layout | None = None,
) -> Record:
    """Return a record without starts. `environment` is what the measured process is given; nothing
    private goes into the record.

    `outer` is the clone where `layout` is an arm in it.
    """
    clone = outer or layout
    redactor = Redactor(hardware.private(clone, settings))
    there, machine = interpreter.installed(layout), machines.observe(settings)
    build = observed.torch
    return Record(
        kind=work.kind,
        label=label,
        time=subject_now(),
        workspace=Git(clone.root).head() if (clone.root / ".git").exists() else None,
        source=_source(layout, observed),
        machine=_machine(machine),
        software=Software(
            vllm=there.get("vllm", "none"),
            torch=build.version if build else "none",
            triton=there.get("triton", "none"),
            cuda=(build.cuda if build else None) or "none",
            python=observed.python.version if observed.python else "none",
        ),
        device=observed.device,
        model=redactor.text(work.called),
        flags=tuple(redactor.text(word) for word in work.flags),
        environment=shown(environment, redactor),
        backends=(),
        repeat=repeat,
        starts=(),
    )


def subject_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def shown(environment: Mapping[str, str], redactor: Redactor) -> dict[str, str]:
    """The variables that matter, without places; a secret only as set."""
    names = sorted(
        name for name in environment if _OF_INTEREST.match(name) and not _PLACES.fullmatch(name)
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
        kernels=(
            " ".join(word for word in stamped.inputs.get("origin", "").split() if len(word) < 64)
            if stamped
            else "none"
        ),
        libraries=(
            {library.path: library.sha256 for library in stamped.libraries} if stamped else {}
        ),
    )


def _machine(machine: machines.Machine) -> Machine:
    processor = _processor()
    gpus = tuple(Gpu(gpu.name, gpu.capability, gpu.driver) for gpu in machine.gpus)
    kind = re.sub(
        r"[^a-z0-9]+",
        "-",
        (gpus[0].name if gpus else f"{machine.architecture}-{machine.cores}-cores").lower(),
    ).strip("-")
    return Machine(
        f"{kind}-{_digest()}",
        machine.architecture,
        processor,
        machine.cores,
        round(machine.memory_gib, 1),
        gpus,
    )


def _digest() -> str:
    """Tells this machine from another one of its kind without naming it: of machine-id(5), which
    must not be shown itself.
    """
    try:
        own = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        own = ""
    return hashlib.sha256(f"vllm workspace {own or platform.node()}".encode()).hexdigest()[
        :NAME_DIGITS
    ]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next(
        (
            line.partition(":")[2].strip()
            for line in lines
            if line.startswith(("model name", "CPU part", "Hardware"))
        ),
        platform.machine(),
    )
