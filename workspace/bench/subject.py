"""What is measured, and on what: the tree, its kernels, the machine and the software, as a record holds them. It only looks."""

import datetime
import hashlib
import platform
import re
from collections.abc import Mapping
from pathlib import Path

from workspace.bench.record import Gpu, Machine, Record, Software, Source
from workspace.bench.workload import Workload
from workspace.build import identity, plan
from workspace.core.layout import Layout
from workspace.core.redaction import Redactor
from workspace.core.settings import Settings, is_secret
from workspace.environment import interpreter
from workspace.environment import machine as machines
from workspace.source.git import Git

NAME_DIGITS = 6
# What may change how fast a vLLM is. Where compiled kernels are kept is named after the tree, and is no difference.
_OF_INTEREST = re.compile(
    r"(VLLM|TORCH|TORCHDYNAMO|TORCHINDUCTOR|PYTORCH|TRITON|CUDA|NCCL|FLASHINFER|OMP|KMP|MKL|GOMP|MALLOC|HF|TOKENIZERS|LD_PRELOAD|PYTHONHASHSEED)(_|$)"
)
_PLACES = re.compile(r".*(_DIR|_ROOT|_HOME|_BASE|_PATH|_FILE|_CACHE)$|HF_.*(TOKEN|ENDPOINT)|VLLM_WORKSPACE_.*")


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
    """Return a record without starts. `environment` is what the measured process is given; nothing private goes into the record.

    `outer` is the clone where `layout` is an arm in it.
    """
    clone = outer or layout
    redactor = Redactor(identity.private(clone, settings))
    there, machine = interpreter.installed(layout), machines.observe(settings)
    build = observed.torch
    return Record(
        kind=work.kind,
        label=label,
        time=now(),
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


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def shown(environment: Mapping[str, str], redactor: Redactor) -> dict[str, str]:
    """The variables that matter, without places; a secret only as set."""
    names = sorted(name for name in environment if _OF_INTEREST.match(name) and not _PLACES.fullmatch(name))
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
        kernels=" ".join(word for word in stamped.inputs.get("origin", "").split() if len(word) < 64) if stamped else "none",
        libraries={library.path: library.sha256 for library in stamped.libraries} if stamped else {},
    )


def _machine(machine: machines.Machine) -> Machine:
    processor = _processor()
    gpus = tuple(Gpu(gpu.name, gpu.capability, gpu.driver) for gpu in machine.gpus)
    kind = re.sub(r"[^a-z0-9]+", "-", (gpus[0].name if gpus else f"{machine.architecture}-{machine.cores}-cores").lower()).strip("-")
    return Machine(f"{kind}-{_digest()}", machine.architecture, processor, machine.cores, round(machine.memory_gib, 1), gpus)


def _digest() -> str:
    """Tells this machine from another one of its kind without naming it: of machine-id(5), which must not be shown itself."""
    try:
        own = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        own = ""
    return hashlib.sha256(f"vllm workspace {own or platform.node()}".encode()).hexdigest()[:NAME_DIGITS]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part", "Hardware"))), platform.machine())
