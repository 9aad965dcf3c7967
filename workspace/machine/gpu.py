"""The GPUs of this machine: the single entrance to the NVIDIA driver.

NVML answers, through nvidia-ml-py in a child process: a call into a broken driver may never
return. On a machine without NVML's library the program nvidia-smi answers.
"""

import contextlib
import ctypes
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from workspace.core import process, records
from workspace.core.process import Absent, Answer, Broken, Slow, There
from workspace.core.settings import Settings
from workspace.machine import hardware
from workspace.machine.hardware import GIB, Once

# The driver of a healthy, busy machine answers within a second; with the kill a query costs at
# most 5 s.
ANSWER_S = 3.0
LIBRARY = "libnvidia-ml.so.1"
# With -I no variable and no file of the user changes what the child imports.
_CHILD = (
    "import sys; sys.path.insert(0, sys.argv[1]); from workspace.machine import gpu;"
    " gpu.print_report()"
)
_ROOT = Path(__file__).resolve().parents[2]
_NOT_REPORTED = ("", "n/a", "not supported", "unknown error", "not found")
# GPUs without memory of their own: Xavier, Orin, Thor and GB10 (CUDA GPU compute capability).
_UNIFIED_CAPABILITIES = ("7.2", "8.7", "10.1", "11.0", "12.1")
# Every GPU of these has its own, however much memory its machine has: Volta to RTX 50, with GH200
# and GB300.
_OWN_CAPABILITIES = ("7.0", "7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0")
_UNIFIED_NAMES = re.compile(r"\b(GB10|Xavier|Orin|Thor)\b")
# A GPU that reports so nearly the machine's own memory reports the machine's own memory.
_SAME_MEMORY = 0.1
_SENSORS = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Gpu:
    """One GPU; a fact that the driver does not report is None."""

    name: str
    capability: str | None
    driver: str | None


@dataclass(frozen=True)
class Memory:
    """The memory of a GPU."""

    total_gib: float
    free_gib: float


@dataclass(frozen=True)
class Resident:
    """A process that holds a GPU; `held_gib` is None where the driver does not report it, as on
    unified memory. `gpu` is the number of the GPU on a machine with several.
    """

    pid: int
    name: str
    held_gib: float | None
    gpu: int | None = None


@dataclass(frozen=True)
class Sensors:
    """Clocks, temperature and power of a GPU now; None is not reported.

    `limits` is a bit field, why the driver limits the clocks (nvml.h, nvmlClocksEventReason*).
    """

    sm_mhz: float | None
    memory_mhz: float | None
    celsius: float | None
    watts: float | None
    limits: int | None


@dataclass(frozen=True)
class _Report:
    """All that NVML reports in one call; `memories` and `uuids` are those of `gpus`, in order."""

    cuda: str | None
    gpus: tuple[Gpu, ...]
    memories: tuple[Memory | None, ...]
    uuids: tuple[str | None, ...]
    sensors: tuple[Sensors, ...]
    residents: tuple[Resident, ...]


@dataclass(frozen=True)
class _Printed:
    """What the child prints: a report, or NVML's error."""

    report: _Report | None
    error: str = ""
    is_absent: bool = False


class Driver:
    """The NVIDIA driver. Each fact is asked at most once, when it is first needed; another object
    asks anew. The answers other than `gpus` are empty or None where the driver has none.
    """

    def __init__(self, settings: Settings) -> None:
        self._environment = Once(lambda: settings.child_environment("plain"))
        self._report = Once(self._ask_nvml)
        self.gpus = Once(self._gpus)
        self.cuda = Once(self._cuda)
        self.memories = Once(self._memories)
        self.uuids = Once(self._uuids)
        self.residents = Once(self._residents)
        self.sensors = Once(self._sensors)

    def _ask_nvml(self) -> Answer[_Report]:
        """Ask NVML; absent means that the program is to be asked, also where the child crashes."""
        environment = self._environment()
        if not is_library_there(environment):
            return Absent()
        argv = [sys.executable, "-I", "-c", _CHILD, str(_ROOT)]
        answer = process.output_of(process.ask(argv, env=environment, limit_s=ANSWER_S))
        if isinstance(answer, There):
            return _decoded(answer.value)
        return answer if isinstance(answer, Slow) else Absent()

    def _gpus(self) -> Answer[tuple[Gpu, ...]]:
        """Return the GPUs. A driver that works and shows none is broken."""
        report = self._report()
        answer = There(report.value.gpus) if isinstance(report, There) else self._listed()
        return Broken("the driver shows no GPU") if answer == There(()) else answer

    def _listed(self) -> Answer[tuple[Gpu, ...]]:
        # Memory is not queried: on unified memory it is N/A.
        rows = self._rows("--query-gpu=name,compute_cap,driver_version")
        if not isinstance(rows, There):
            return rows
        return There(tuple(_gpu(row) for row in rows.value if not row[0].startswith("No devices")))

    def _cuda(self) -> str | None:
        """Return the newest CUDA that the driver supports, such as 13.0.

        Of nvidia-smi's formats only XML has it in a stable form.
        """
        if isinstance(report := self._report(), There):
            return report.value.cuda
        if not isinstance(self.gpus(), There):
            return None
        text = _value_of(self._program("-q", "-x"), "")
        found = re.search(r"<cuda_version>\s*(\d+\.\d+)\s*</cuda_version>", text)
        return found[1] if found else None

    def _memories(self) -> tuple[Memory | None, ...]:
        """Return each GPU's own memory; None for a GPU that has none, or reports none.

        Some drivers report the machine's memory as the GPU's, so more than one sign counts.
        """
        gpus = _value_of(self.gpus(), ())
        reported = self._reported_memories() if gpus else ()
        return tuple(
            None if _is_unified(gpu, memory) else memory
            for gpu, memory in zip(gpus, [*reported, *[None] * len(gpus)], strict=False)
        )

    def _reported_memories(self) -> tuple[Memory | None, ...]:
        if isinstance(report := self._report(), There):
            return report.value.memories
        rows = _value_of(self._rows("--query-gpu=memory.total,memory.free", nounits=True), ())
        return tuple(_read_memory(row) for row in rows)

    def _uuids(self) -> tuple[str | None, ...]:
        """Return the UUID of each GPU, by which CUDA_VISIBLE_DEVICES may name it."""
        if isinstance(report := self._report(), There):
            return report.value.uuids
        return tuple(row[0] for row in _value_of(self._rows("--query-gpu=uuid"), ()))

    def _residents(self) -> tuple[Resident, ...]:
        """Return the processes that compute on a GPU."""
        if isinstance(report := self._report(), There):
            return report.value.residents
        uuids = self.uuids() if len(_value_of(self.gpus(), ())) > 1 else ()
        query = "--query-compute-apps=pid,process_name,used_memory"
        rows = _value_of(self._rows(query + (",gpu_uuid" if uuids else ""), nounits=True), ())
        return tuple(
            Resident(
                int(row[0]),
                row[1] or "a process",
                _gib(row[2]) if len(row) > 2 else None,
                uuids.index(row[3]) if len(row) > 3 and row[3] in uuids else None,
            )
            for row in rows
            if len(row) in (2, 3, 4) and row[0].isdigit()
        )

    def _sensors(self) -> tuple[Sensors, ...]:
        """Return clocks, temperature and power of each GPU."""
        if isinstance(report := self._report(), There):
            return report.value.sensors
        rows = _value_of(self._rows(f"--query-gpu={_SENSORS}", nounits=True), ())
        return tuple(_read_sensors(row) for row in rows)

    def _rows(self, query: str, *, nounits: bool = False) -> Answer[tuple[list[str], ...]]:
        answer = self._program(query, f"--format=csv,noheader{',nounits' if nounits else ''}")
        if not isinstance(answer, There):
            return answer
        lines = [line for line in answer.value.splitlines() if line.strip()]
        return There(tuple([field.strip() for field in line.split(",")] for line in lines))

    def _program(self, *flags: str) -> Answer[str]:
        """Run nvidia-smi, unless NVML has failed: both speak to the same driver."""
        if isinstance(report := self._report(), Broken | Slow):
            return report
        return process.output_of(
            process.ask(["nvidia-smi", *flags], env=self._environment(), limit_s=ANSWER_S)
        )


def _value_of(answer: Answer[_Value], otherwise: _Value) -> _Value:
    return answer.value if isinstance(answer, There) else otherwise


def is_installed(environment: Mapping[str, str]) -> bool:
    """Return whether a driver is loaded, or its program installed; this asks and loads nothing."""
    program = shutil.which("nvidia-smi", path=environment.get("PATH", ""))
    return program is not None or hardware.has_nvidia_module()


def is_library_there(environment: Mapping[str, str]) -> bool:
    """Return whether the loader finds NVML's library; this does not start the driver."""
    folders = environment.get("LD_LIBRARY_PATH", "").split(":")
    if any((Path(folder) / LIBRARY).exists() for folder in folders if folder):
        return True
    with contextlib.suppress(OSError):
        ctypes.CDLL(LIBRARY)
        return True
    return False


def _decoded(text: str) -> Answer[_Report]:
    """Return the report that the child printed."""
    try:
        printed = records.decode(text, _Printed)
    except records.DecodeError:
        return Absent()
    if printed.report is not None:
        return There(printed.report)
    return Absent() if printed.is_absent else Broken(printed.error)


def _gpu(row: Sequence[str]) -> Gpu:
    """Read one row of nvidia-smi: name, capability and driver."""
    known = [None if text.strip("[]").lower() in _NOT_REPORTED else text for text in row]
    name, capability, driver = [*known, None, None][:3]
    return Gpu(name or "GPU", capability, driver)


def _read_sensors(row: Sequence[str]) -> Sensors:
    """Read one row of nvidia-smi. On unified memory some fields are `[N/A]`."""
    sm, memory, celsius, watts = (_number(field) for field in [*row[:4], *[""] * 4][:4])
    limits = None
    with contextlib.suppress(ValueError, IndexError):
        limits = int(row[4], 16)
    return Sensors(sm, memory, celsius, watts, limits)


def _read_memory(row: Sequence[str]) -> Memory | None:
    figures = [_gib(field) for field in row]
    if len(figures) != 2 or figures[0] is None or figures[1] is None:
        return None
    return Memory(figures[0], figures[1])


def _is_unified(gpu: Gpu, reported: Memory | None) -> bool:
    """Return whether a GPU has no memory of its own: by its capability or its name, or because it
    reports none, or that of the machine.
    """
    if gpu.capability in _UNIFIED_CAPABILITIES or _UNIFIED_NAMES.search(gpu.name):
        return True
    if reported is None or not reported.total_gib:
        return True
    machine_gib = hardware.whole_memory_gib()
    is_same = abs(reported.total_gib - machine_gib) <= machine_gib * _SAME_MEMORY
    return is_same and gpu.capability not in _OWN_CAPABILITIES


def _number(field: str) -> float | None:
    try:
        return float(field)
    except ValueError:
        return None


def _gib(mib: str) -> float | None:
    number = _number(mib)
    return None if number is None else number / 1024


def print_report() -> None:
    """Print NVML's report as JSON: the program of the child process."""
    import pynvml

    try:
        pynvml.nvmlInit()
        printed = _Printed(_observe_nvml(pynvml))
    except pynvml.NVMLError as exc:
        is_absent = isinstance(exc, pynvml.NVMLError_LibraryNotFound)
        printed = _Printed(None, str(exc), is_absent)
    print(json.dumps(asdict(printed)))


def _observe_nvml(nvml: ModuleType) -> _Report:
    version = _known(nvml.nvmlSystemGetDriverVersion)
    cuda = _known(nvml.nvmlSystemGetCudaDriverVersion)
    handles = [nvml.nvmlDeviceGetHandleByIndex(at) for at in range(nvml.nvmlDeviceGetCount())]
    residents = [
        Resident(
            running.pid,
            _known(nvml.nvmlSystemGetProcessName, running.pid) or "a process",
            None if running.usedGpuMemory is None else running.usedGpuMemory / GIB,
            at if len(handles) > 1 else None,
        )
        for at, handle in enumerate(handles)
        for running in _known(nvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()
    ]
    return _Report(
        f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
        tuple(_gpu_of_nvml(nvml, handle, version) for handle in handles),
        tuple(_memory_of_nvml(nvml, handle) for handle in handles),
        tuple(_known(nvml.nvmlDeviceGetUUID, handle) for handle in handles),
        tuple(_sensors_of_nvml(nvml, handle) for handle in handles),
        tuple(residents),
    )


def _gpu_of_nvml(nvml: ModuleType, handle: object, version: str | None) -> Gpu:
    capability = _known(nvml.nvmlDeviceGetCudaComputeCapability, handle)
    name = _known(nvml.nvmlDeviceGetName, handle) or "GPU"
    return Gpu(name, ".".join(map(str, capability)) if capability else None, version)


def _memory_of_nvml(nvml: ModuleType, handle: object) -> Memory | None:
    held = _known(nvml.nvmlDeviceGetMemoryInfo, handle)
    return Memory(held.total / GIB, held.free / GIB) if held else None


def _sensors_of_nvml(nvml: ModuleType, handle: object) -> Sensors:
    milliwatts = _known(nvml.nvmlDeviceGetPowerUsage, handle)
    return Sensors(
        _known(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
        _known(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
        _known(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        None if milliwatts is None else milliwatts / 1000,
        _known(nvml.nvmlDeviceGetCurrentClocksEventReasons, handle),
    )


def _known(look: Callable[..., _Value], *arguments: object) -> _Value | None:
    """Return what NVML reports, None where this driver or this GPU does not report it."""
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        return look(*arguments)
    return None
