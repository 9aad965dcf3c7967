"""A system of arm64 in a folder of an x86-64 machine, in which this clone works as on a DGX Spark.

The distribution's packages are unpacked and not configured: nothing of arm64 runs while it is made.
QEMU runs its programs in a user namespace, so that nothing of this machine changes.
"""

import os
import platform
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.proof.aarch64 import packages, spark

MACHINE = Path(__file__).with_name("machine")
# Essential packages are named: apt resolves dependencies on the others only.
PACKAGES = (
    *("base-files", "base-passwd", "bash", "coreutils", "dash", "debianutils", "diffutils"),
    *("findutils", "grep", "gzip", "hostname", "libc-bin", "mawk", "ncurses-base", "perl-base"),
    *("sed", "tar", "util-linux", "procps", "xz-utils", "ca-certificates", "curl", "git", "make"),
    *("gcc", "g++", "python3", "python3-dev", "python3-venv", "libnuma1"),
)
# What the packages' own scripts would set up.
LINKS = {"cc": "gcc", "c++": "g++", "awk": "mawk"}
# The system, one environment for CUDA with the cache of uv that it is linked to, and one for CPUs.
NEEDED_GIB = 20.0
# Every instruction of Arm that QEMU knows; pointers are signed by a simple function instead of the
# architecture's (pauth-impdef): a loop of Debian 12's Python took 0.97 s with QEMU 7.2, not 1.38 s.
CPU = "max,pauth-impdef=on"
# The workspace's time limits are for hardware; with this factor none ended a program at a load of
# 10 to 30.
SLOWER = 30
# QEMU's own lines, and ends for want of time or memory: not the product's.
_EMULATOR = (
    re.compile(r"^qemu(-aarch64[\w-]*)?: .+", re.MULTILINE),
    re.compile(r"^.*(?:gave no answer in|did not end within) [\d.]+ s.*", re.MULTILINE),
    re.compile(r"^.*Exec format error.*", re.MULTILINE),
)
# The user's package indexes and mirrors, which must be reachable from here.
_INDEXES = ("UV_DEFAULT_INDEX", "PIP_INDEX_URL", "TORCH_INDEX_URL", "VLLM_MIRROR")
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)


def lacking(folder: Path) -> Iterator[str]:
    """Yield what this machine lacks for an emulated one, each with the way to get it."""
    if platform.machine() != "x86_64":
        yield f"this machine is {platform.machine()}; the emulation was made for x86_64"
    for program, package in (
        *(("apt-get", "apt"), ("dpkg-deb", "dpkg"), ("unshare", "util-linux")),
        (emulator() or "qemu-aarch64-static", "qemu-user-static"),
    ):
        if shutil.which(program) is None:
            yield f"{program} is not there: sudo apt install {package}"
    free_gib = shutil.disk_usage(folder).free / 2**30
    if free_gib < NEEDED_GIB - used_gib(folder):
        yield f"{free_gib:.1f} GiB are free below {folder}, {NEEDED_GIB:g} are needed"
    done = subprocess.run(
        [*namespaces(), "mount", "-t", "binfmt_misc", "none", "/proc/sys/fs/binfmt_misc"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        yield (
            f"no emulator can be registered in a user namespace (Linux 6.7; root, where the"
            f" kernel forbids namespaces to others): {done.stderr.strip()}"
        )


def used_gib(folder: Path) -> float:
    """Return what a former run has left in the folder, of what is needed."""
    done = subprocess.run(["du", "-s", "-k", folder], capture_output=True, text=True)
    return int(done.stdout.split()[0]) / 2**20


def emulator() -> str | None:
    """Return QEMU for programs of arm64, linked statically: it works in another root, too."""
    names = ("qemu-aarch64-static", "qemu-aarch64")
    return next((found for name in names if (found := shutil.which(name))), None)


def namespaces() -> list[str]:
    """Return the command that starts a command in namespaces, which end with it."""
    flags = ["--user", "--map-root-user", "--mount", "--pid", "--fork", "--mount-proc"]
    return ["unshare", *flags, "--kill-child"]


@dataclass(frozen=True)
class Result:
    """The end of a command in the emulated system."""

    command: str
    status: int
    output: str
    seconds: float

    def blame(self) -> str:
        """Return whether the emulator or the product is at fault, and by which line."""
        for pattern in _EMULATOR:
            if found := pattern.search(self.output):
                return f"the emulator, by its line: {found[0].strip()}"
        if self.status in _KILLED:
            return "the emulator: the command was killed, for want of time or memory"
        return "the product: no line of the emulator is in the output"

    def require(self, *statuses: int) -> str:
        """Return the output of a command that ended with one of these statuses, 0 if none is
        given. Raises AssertionError with what is at fault and the end of the output.
        """
        if self.status not in (statuses or (0,)):
            tail = "\n".join(self.output.splitlines()[-40:])
            raise AssertionError(
                f"{self.command}: exit code {self.status} after {self.seconds:.0f} s\n"
                f"at fault is {self.blame()}\n{tail}"
            )
        return self.output


@dataclass(frozen=True)
class System:
    """An unpacked system of arm64 below `folder`, with clones of this repository in it."""

    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def build(self) -> int:
        """Make the system, unless it is there, and return the number of its packages."""
        if (self.root / "opt" / "spark").is_dir():
            return len(list((self.folder / "packages" / "archives").glob("*.deb")))
        count = packages.unpack(
            PACKAGES, self.folder / "packages", self.root, with_dependencies=True
        )
        for name, target in LINKS.items():
            (self.root / "usr" / "bin" / name).unlink(missing_ok=True)
            (self.root / "usr" / "bin" / name).symlink_to(target)
        for name in ("dev", "proc", "sys", "tmp", "root", "opt", "etc/ssl/certs"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        for name in ("resolv.conf", "hosts", "ssl/certs/ca-certificates.crt"):
            shutil.copyfile(Path("/etc", name), self.root / "etc" / name)
        (self.root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/bash\n")
        (self.root / "etc" / "group").write_text("root:x:0:\n")
        shutil.copytree(MACHINE, self.folder / "spark", dirs_exist_ok=True)
        (self.folder / "spark" / "cpuinfo").write_text("\n".join(cpuinfo()))
        # Written last: the system is whole.
        shutil.copytree(self.folder / "spark", self.root / "opt" / "spark")
        return count

    def clone(self, name: str) -> str:
        """Make a clone of this repository in the system, unless it is there; return its path."""
        place = self.root / "root" / name
        if not place.is_dir():
            subprocess.run(["git", "clone", "-q", spark.LAYOUT.root, place], check=True)
        return f"/root/{name}"

    def run(
        self,
        command: str,
        *,
        clone: str = "/root",
        limit_s: float,
        with_gpu: bool = False,
        variables: Mapping[str, str] | None = None,
    ) -> Result:
        """Run a line of shell in a folder of the system, killed after `limit_s` seconds. Print its
        status and seconds: they are the figures of the record.
        """
        program = emulator()
        assert program is not None
        argv: list[str | Path] = [*namespaces(), "sh", MACHINE / "enter.sh", self.root]
        argv += [Path(program).resolve(), "/bin/bash", "-c", f"cd {clone} && {command}"]
        path = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        certificates = "/etc/ssl/certs/ca-certificates.crt"
        names = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT", "GIT_SSL_CAINFO")
        environment = {
            **dict.fromkeys(names, certificates),
            **{name: os.environ[name] for name in _INDEXES if name in os.environ},
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "PATH": f"/opt/spark:{path}" if with_gpu else path,
            "QEMU_CPU": CPU,
            "TIME_LIMIT_FACTOR": str(SLOWER),
            "UV_HTTP_TIMEOUT": "300",
            **(variables or {}),
        }
        began = time.monotonic()
        child = subprocess.Popen(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            output, _ = child.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
        finally:
            # Ends everything in its namespaces, after ^C too.
            child.kill()
        seconds = time.monotonic() - began
        print(f"{command}: exit code {child.returncode}, {seconds:.0f} s", flush=True)
        return Result(command, child.returncode, output, seconds)


def cpuinfo() -> Iterator[str]:
    """Yield the lines of /proc/cpuinfo for a GB10: ten Cortex-A725 and ten Cortex-X925, in turns
    of five.
    """
    for number in range(20):
        yield f"processor\t: {number}"
        yield "BogoMIPS\t: 2000.00"
        yield "Features\t: fp asimd aes pmull sha1 sha2 crc32 atomics sve sve2 i8mm bf16"
        yield "CPU implementer\t: 0x41"
        yield "CPU architecture: 8"
        yield "CPU variant\t: 0x0"
        yield f"CPU part\t: {('0xd87', '0xd85')[number // 5 % 2]}"
        yield "CPU revision\t: 1\n"
