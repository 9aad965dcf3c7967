"""What the doctor's checks share: the row they give, the case they look at, and a question to a
program that may hang.

A case looks at each thing once, whichever check asks first: checks run beside each other.
"""

import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from workspace.core import process
from workspace.core.errors import ToolchainError
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import hardware, interpreter, toolchain, torch

State = Literal["ok", "warn", "FAIL"]
# For a driver that may hang; a program that must work is given more, on a machine that is busy.
ANSWER_S = 3.0
PATIENCE_S = 20.0
KILL_S = 0.5
# timeout(1): it ended the program, or had to kill it.
TIMED_OUT = (124, 137)
WITHOUT_GPU = "./scripts/inv bootstrap --device cpu"
Seen = TypeVar("Seen")


@dataclass(frozen=True)
class Row:
    """One finding: what was looked at, what was seen, why it matters, and the command that mends
    it.
    """

    state: State
    name: str
    seen: str
    why: str
    hint: str | None = None


@dataclass(frozen=True)
class Place:
    """A folder that will grow by `need_gib`. Without a vital one nothing can be built."""

    label: str
    path: Path
    need_gib: float
    is_vital: bool = True


@dataclass(frozen=True)
class Program:
    """A running program, as the kernel's table shows it."""

    number: int
    name: str
    words: tuple[str, ...]


class Once(Generic[Seen]):
    """Something that is looked at when it is first asked for, and then known."""

    def __init__(self, look: Callable[[], Seen]) -> None:
        self._look = look
        self._lock = threading.Lock()
        self._seen: list[Seen] = []

    def __call__(self) -> Seen:
        with self._lock:
            if not self._seen:
                self._seen.append(self._look())
            return self._seen[0]


class Case:
    """A clone on a machine, and what is to be done there.

    `device` None lets it be told; `kernels` is precompiled, native or anything else for a wheel;
    `host` is the machine, where it was looked at already.
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
        self._told_device = Once(lambda: device or self._device())
        self._places = places

    @property
    def device(self) -> str:
        return self._told_device()

    @property
    def lacking(self) -> State:
        """What the lack of something that compiles is: an end where kernels are to be compiled,
        else a warning.
        """
        return "FAIL" if self.is_native else "warn"

    @property
    def is_built(self) -> bool:
        return self.layout.stamp("vllm").is_file()

    @property
    def places(self) -> tuple[Place, ...]:
        return self._places if self._places is not None else grown(self)

    @property
    def uv(self) -> str:
        """How a person would call uv in the root of the clone."""
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
        """The user's cache folder (XDG Base Directory Specification)."""
        base = self.settings.shell.get("XDG_CACHE_HOME")
        return Path(base) if base else self.home / ".cache"

    def which(self, name: str) -> str | None:
        """Find a program where a build would: among the settings' folders, then on PATH."""
        return shutil.which(name, path=self.settings.child_environment("build").get("PATH", ""))

    def ask(
        self,
        words: Sequence[process.Argument],
        *,
        extra: Mapping[str, str] | None = None,
        timeout_s: float = ANSWER_S,
    ) -> process.Completed | None:
        """Run a program that only looks; None where it does not run or gives no answer in time. It
        is killed then, whatever it traps.
        """
        environment = self.settings.child_environment("build", extra)
        timeout = shutil.which("timeout", path=environment.get("PATH", ""))
        bound = [timeout, "-k", f"{KILL_S:g}", f"{timeout_s:g}"] if timeout else []
        try:
            return process.capture(
                [*bound, *words],
                env=environment,
                cwd=self._folder(),
                timeout_s=timeout_s + 2 * KILL_S,
            )
        except ToolchainError:
            return None

    def first_line(self, words: Sequence[process.Argument]) -> str | None:
        """The first line that a program prints when it succeeds."""
        done = self.ask(words, timeout_s=PATIENCE_S)
        return (
            done.stdout.strip().splitlines()[0]
            if done and done.returncode == 0 and done.stdout.strip()
            else None
        )

    def _folder(self) -> Path | None:
        """uv and git read what lies in the folder that they run in."""
        return self.layout.root if self.layout.root.is_dir() else None

    def _device(self) -> str:
        """Decide DEVICE=auto: what the torch in `.vllm` is built for, else what the driver shows.

        A CUDA build whose driver no longer answers is a fault to be found, not a machine without a
        GPU.
        """
        build = self.torch() if self.settings.text("DEVICE") == "auto" else None
        if build is not None:
            return "cuda" if build.cuda else "cpu"
        asked = self.settings.text("DEVICE")
        return asked if asked != "auto" else ("cuda" if self.host().gpus else "cpu")

    def _driver_cuda(self) -> str | None:
        """The newest CUDA that the driver serves, such as 13.0. Only nvidia-smi's XML has it in a
        machine's form.
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


# GiB that a bootstrap adds to the clone, or to uv's cache where that lies on another file system
# (files are linked otherwise).
GROWTH_GIB = {"cpu": 5.0, "cuda": 14.0}
# Objects and intermediate files of a compilation: an estimate.
NATIVE_GIB = {"cpu": 2.0, "cuda": 10.0}
DOWNLOADS_GIB = 1.0
# The models of the smoke; a served model says its own size.
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
    """Return where Hugging Face keeps models and token."""
    return case.settings.path("HF_HOME") or case.cache_home / "huggingface"


def key(version: str) -> tuple[int, ...]:
    """Return a version such as 12.9 as numbers to compare; what is not a number ends it."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def without_user(url: str) -> str:
    """An address as it may be shown: without name and password."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", url)


def _programs() -> tuple[Program, ...]:
    import psutil

    seen = psutil.process_iter(["pid", "name", "cmdline"])
    return tuple(
        Program(one.info["pid"], one.info["name"] or "", tuple(one.info["cmdline"] or ()))
        for one in seen
    )
