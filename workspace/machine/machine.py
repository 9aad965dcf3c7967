"""The machine of a verb, observed once, and the case that the doctor's checks examine: the machine
and what the verb will do there, and the row that a check returns.
"""

import copy
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from workspace.core import process
from workspace.core.console import Row, State
from workspace.core.errors import ToolchainError
from workspace.core.paths import Layout
from workspace.core.process import Absent, Answer, Broken, Slow, There
from workspace.core.settings import Settings
from workspace.machine import hardware, interpreter, toolchain, torch
from workspace.machine.gpu import Driver, Gpu
from workspace.machine.hardware import Once

# A healthy program answers within a second; a loaded machine takes many times as long.
PATIENCE_S = 20.0


@dataclass(frozen=True)
class Place:
    """A folder that will grow by `need_gib`. Without a vital one a build is impossible."""

    label: str
    path: Path
    need_gib: float
    is_vital: bool = True


def unanswered(row: Row, answer: Absent | Broken | Slow, *, look: str) -> Row:
    """Return the row of a program that gave no good answer: `row` is the one for a missing program.

    A broken program gets its own message and `look`, a command that shows it; a slow one a warning
    without a hint: nothing is known to be wrong.
    """
    if isinstance(answer, Slow) or (isinstance(answer, Broken) and answer.is_killed):
        seen = (
            f"no answer in {answer.limit_s:g} s: the machine is busy"
            if isinstance(answer, Slow)
            else f"it {answer.message}"
        )
        return replace(row, state=State.WARN, text=seen, hint=None)
    if isinstance(answer, Broken):
        return replace(row, text=f"does not run: {answer.message}", hint=look)
    return row


def verdict(is_good: bool, fault: Row) -> Row:
    """Return the row of a fault, or the same row as OK and without a hint."""
    return replace(fault, state=State.OK, hint=None) if is_good else fault


@dataclass(frozen=True)
class Program:
    """A running program, as the kernel's process table lists it."""

    pid: int
    name: str
    argv: tuple[str, ...]


class Machine:
    """The machine that a verb runs on, and the environment in its clone.

    Each fact is observed at most once, when it is first needed, whichever thread needs it first. A
    verb makes one and hands it down.
    """

    def __init__(self, layout: Layout, settings: Settings) -> None:
        self.layout = layout
        self.settings = settings
        self.driver = Driver(settings)
        self.toolkit_answer = Once(lambda: toolchain.ask_toolkit(settings))
        self.compiler = Once(lambda: toolchain.ask_compiler(settings))
        self._observe_changing()

    def _observe_changing(self) -> None:
        layout, settings = self.layout, self.settings
        self.host = Once(hardware.observe)
        self.programs = Once(running_programs)
        self._python_files = interpreter.identity(layout)
        self.python = Once(lambda: interpreter.describe(layout, settings))
        self.packages = Once(lambda: interpreter.installed(layout))
        self.torch = Once(lambda: torch.observe(layout, self.packages()))
        self.triton = Once(lambda: torch.observe_triton(layout, self.packages()))
        self.paired_triton = Once(lambda: torch.paired_triton(layout, self.packages()))

    def reread(self) -> "Machine":
        """Return the same machine after a step that changed it: its driver, toolkit and compiler
        stay, its memory, its programs and the environment are observed anew. The Python of `.vllm`
        is asked again only where its files are others than before: it takes 60 ms.
        """
        other = copy.copy(self)
        other._observe_changing()
        if other._python_files == self._python_files:
            other.python = self.python
        return other

    def toolkit(self) -> toolchain.Toolkit | None:
        """Return the CUDA toolkit; None where no nvcc runs. Raises NoAnswer where it is slow."""
        return process.certain(self.toolkit_answer(), "nvcc --version")

    def compiler_version(self) -> str | None:
        """Return the version of the C++ compiler; None where none runs. Raises NoAnswer where it is
        slow.
        """
        argv, answer = self.compiler()
        return process.certain(answer, shlex.join(argv))

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """The GPUs; none where the driver does not answer."""
        answer = self.driver.gpus()
        return answer.value if isinstance(answer, There) else ()

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The capability of each GPU that reports its own, in the driver's order."""
        return tuple(gpu.capability for gpu in self.gpus if gpu.capability)

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        """The device of DEVICE; `auto` is cuda where a driver is there, even if it does not work.

        A driver that fails is a fault to report, not a machine without GPU.
        """
        wanted = self.settings.text("DEVICE")
        if wanted == "auto":
            return "cpu" if isinstance(self.driver.gpus(), Absent) else "cuda"
        return "cuda" if wanted == "cuda" else "cpu"

    def record(self) -> dict[str, object]:
        """Return processor, memory and GPUs as a record keeps them."""
        return {**asdict(self.host()), "gpus": [asdict(gpu) for gpu in self.gpus]}


class Case:
    """A machine, and what a verb will do there.

    `device` None means: detect it. With `is_native` the verb compiles. With `is_environment_due` it
    completes `.vllm` first: what is missing there comes then.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        device: str | None = None,
        is_native: bool = False,
        places: tuple[Place, ...] | None = None,
        is_environment_due: bool = False,
    ) -> None:
        self.machine = machine
        self.is_environment_due = (
            is_environment_due or not machine.layout.stamp("environment").is_file()
        )
        self.layout, self.settings = machine.layout, machine.settings
        self.is_native = is_native
        self.host, self.toolkit, self.programs = machine.host, machine.toolkit, machine.programs
        self.python, self.torch, self.triton = machine.python, machine.torch, machine.triton
        self._chosen_device = Once(lambda: device or self._device())
        self._places = places

    @property
    def device(self) -> str:
        return self._chosen_device()

    @property
    def missing_state(self) -> State:
        """Return the state of a missing build tool: FAIL for native builds, else warn."""
        return State.FAIL if self.is_native else State.WARN

    @property
    def is_built(self) -> bool:
        return self.layout.stamp("vllm").is_file()

    @property
    def places(self) -> tuple[Place, ...]:
        return self._places if self._places is not None else grown(self)

    @property
    def uv(self) -> str:
        """Return the uv command that a person types in the root of the clone."""
        try:
            found = interpreter.uv(self.layout)
        except ToolchainError:
            return "uv"
        return self.layout.relative(found) if found.is_relative_to(self.layout.root) else "uv"

    @property
    def home(self) -> Path:
        return Path(self.settings.shell.get("HOME") or "~").expanduser()

    @property
    def cache_home(self) -> Path:
        """Return the user's cache folder (XDG Base Directory Specification)."""
        base = self.settings.shell.get("XDG_CACHE_HOME")
        return Path(base) if base else self.home / ".cache"

    def which(self, name: str) -> str | None:
        """Find a program where a build finds it: in the folders of the settings, then on PATH."""
        return shutil.which(name, path=self.settings.child_environment("build").get("PATH", ""))

    def ask(
        self,
        argv: Sequence[process.Argument],
        *,
        extra: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Answer[process.Completed]:
        """Run a program that only reads, as a build would; the default limit is PATIENCE_S."""
        environment = self.settings.child_environment("build", extra)
        limit_s = PATIENCE_S if timeout_s is None else timeout_s
        return process.ask(argv, env=environment, cwd=self._folder(), limit_s=limit_s)

    def first_line(self, argv: Sequence[process.Argument]) -> Answer[str]:
        """Return the first line of output of a program; without any it is broken."""
        answer = process.output_of(self.ask(argv))
        if not isinstance(answer, There):
            return answer
        lines = answer.value.strip().splitlines()
        return There(lines[0]) if lines else Broken("it prints nothing")

    def _folder(self) -> Path | None:
        """Return the root of the clone: uv and git read the folder that they run in."""
        return self.layout.root if self.layout.root.is_dir() else None

    def _device(self) -> str:
        """Decide DEVICE=auto: the build of torch in `.vllm`, else the driver."""
        build = self.torch() if self.settings.text("DEVICE") == "auto" else None
        return ("cuda" if build.cuda else "cpu") if build else self.machine.device


# GiB that a bootstrap adds to the clone, or to uv's cache where that is on another file system (on
# the same one uv links the files).
GROWTH_GIB = {"cpu": 5.0, "cuda": 14.0}
# Objects and intermediate files of a compilation: an estimate.
NATIVE_GIB = {"cpu": 2.0, "cuda": 10.0}
DOWNLOADS_GIB = 1.0
# The models of the smoke; for a served model its own size counts.
MODELS_GIB = 2.0
TEMPORARY_GIB = 1.0


def grown(case: Case) -> tuple[Place, ...]:
    """Return every folder that will grow, and by how much."""
    environment = case.settings.child_environment("run")
    growth = (1.0 if case.is_built else GROWTH_GIB[case.device]) + (
        NATIVE_GIB[case.device] if case.is_native else 0.0
    )
    of_uv = case.settings.child_environment("plain").get("UV_CACHE_DIR")
    uv_cache = Path(of_uv or case.cache_home / "uv")
    is_linked = (
        hardware.existing(uv_cache).stat().st_dev
        == hardware.existing(case.layout.root).stat().st_dev
    )
    hub = Path(environment.get("HF_HUB_CACHE") or hub_home(case) / "hub")
    return (
        Place("workspace", case.layout.root, growth),
        Place("downloads", case.settings.cache, DOWNLOADS_GIB),
        Place("uv cache", uv_cache, 0.0 if is_linked or case.is_built else growth),
        Place("models", hub, MODELS_GIB, is_vital=False),
        Place("TMPDIR", Path(environment.get("TMPDIR") or "/tmp"), TEMPORARY_GIB, is_vital=False),
    )


def hub_home(case: Case) -> Path:
    """Return the folder where Hugging Face keeps models and the token."""
    return case.settings.path("HF_HOME") or case.cache_home / "huggingface"


def running_programs() -> tuple[Program, ...]:
    import psutil

    return tuple(
        Program(
            running.info["pid"], running.info["name"] or "", tuple(running.info["cmdline"] or ())
        )
        for running in psutil.process_iter(["pid", "name", "cmdline"])
    )
