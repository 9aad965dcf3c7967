"""The case that the doctor's checks examine: a clone, its settings and its machine.

A case observes each fact once, whichever check needs it first: checks run in parallel.
"""

import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from workspace.core import process
from workspace.core.console import State
from workspace.core.errors import ToolchainError
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import hardware, interpreter, toolchain, torch

# For a driver that may hang. A program that must work gets more time, because the machine may be
# loaded.
ANSWER_S = 3.0
PATIENCE_S = 20.0
KILL_S = 0.5
# Exit codes of timeout(1): it ended the program, or had to kill it.
TIMED_OUT = (124, 137)
WITHOUT_GPU = "./scripts/inv bootstrap --device cpu"
Value = TypeVar("Value")


@dataclass(frozen=True)
class Place:
    """A folder that will grow by `need_gib`. Without a vital one a build is impossible."""

    label: str
    path: Path
    need_gib: float
    is_vital: bool = True


@dataclass(frozen=True)
class Program:
    """A running program, as the kernel's process table lists it."""

    pid: int
    name: str
    argv: tuple[str, ...]


class Once(Generic[Value]):
    """A value that is computed on the first call and kept."""

    def __init__(self, look: Callable[[], Value]) -> None:
        self._look = look
        self._lock = threading.Lock()
        self._seen: list[Value] = []

    def __call__(self) -> Value:
        with self._lock:
            if not self._seen:
                self._seen.append(self._look())
            return self._seen[0]


class Case:
    """A clone on a machine, and what a verb will do there.

    `device` None means: detect it. `kernels` is precompiled, native, or another value for a wheel;
    `host` is the machine, where the caller has already observed it.
    """

    def __init__(
        self,
        layout: Layout,
        settings: Settings,
        *,
        device: str | None,
        kernels: str,
        places: tuple[Place, ...] | None = None,
        host: hardware.Machine | None = None,
    ) -> None:
        self.layout = layout
        self.settings = settings
        self.is_native = kernels == "native"
        self.host = Once(lambda: host or hardware.observe(settings))
        self.toolkit = Once(lambda: toolchain.find_toolkit(settings))
        self.python = Once(lambda: interpreter.describe(layout, settings))
        self.torch = Once(lambda: torch.observe(layout, settings))
        self.packages = Once(lambda: interpreter.installed(layout))
        self.programs = Once(_programs)
        self.driver_cuda = Once(self._driver_cuda)
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
        timeout_s: float = ANSWER_S,
    ) -> process.Completed | None:
        """Run a program that only reads; return None where it does not start or exceeds the time.

        timeout(1) then kills the program, whatever signals it traps.
        """
        environment = self.settings.child_environment("build", extra)
        timeout = shutil.which("timeout", path=environment.get("PATH", ""))
        bound = [timeout, "-k", f"{KILL_S:g}", f"{timeout_s:g}"] if timeout else []
        try:
            return process.capture(
                [*bound, *argv],
                env=environment,
                cwd=self._folder(),
                timeout_s=timeout_s + 2 * KILL_S,
            )
        except ToolchainError:
            return None

    def first_line(self, argv: Sequence[process.Argument]) -> str | None:
        """Return the first line of output of a program that succeeds, else None."""
        done = self.ask(argv, timeout_s=PATIENCE_S)
        return (
            done.stdout.strip().splitlines()[0]
            if done and done.returncode == 0 and done.stdout.strip()
            else None
        )

    def _folder(self) -> Path | None:
        """Return the root of the clone: uv and git read the folder that they run in."""
        return self.layout.root if self.layout.root.is_dir() else None

    def _device(self) -> str:
        """Decide DEVICE=auto: the build of torch in `.vllm`, else the GPUs that the driver shows.

        A CUDA build whose driver no longer answers is a fault to report, not a machine without GPU.
        """
        wanted = self.settings.text("DEVICE")
        if wanted != "auto":
            return wanted
        if build := self.torch():
            return "cuda" if build.cuda else "cpu"
        return "cuda" if self.host().gpus else "cpu"

    def _driver_cuda(self) -> str | None:
        """Return the newest CUDA that the driver supports, such as 13.0.

        Of nvidia-smi's formats only XML has it in a stable form.
        """
        if not self.host().gpus:
            return None
        program = shutil.which(
            "nvidia-smi", path=self.settings.child_environment("plain").get("PATH", "")
        )
        done = self.ask([program, "-q", "-x"]) if program else None
        found = (
            re.search(r"<cuda_version>\s*(\d+\.\d+)\s*</cuda_version>", done.stdout)
            if done
            else None
        )
        return found[1] if found else None


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
    uv_cache = Path(environment.get("UV_CACHE_DIR") or case.cache_home / "uv")
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


def _programs() -> tuple[Program, ...]:
    import psutil

    return tuple(
        Program(
            running.info["pid"], running.info["name"] or "", tuple(running.info["cmdline"] or ())
        )
        for running in psutil.process_iter(["pid", "name", "cmdline"])
    )
