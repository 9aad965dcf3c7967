"""Two nodes on one machine: two network namespaces joined by a cable (veth), a real sshd in each,
and two clones of this one that share its built tree by hard links.

Needs root, iproute2, OpenSSH's sshd and a built clone; what is missing fails by name.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from workspace.core.paths import here
from workspace.server import process_tree

SSHD = "/usr/sbin/sshd"
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# What a clone needs of the state of the built one, beside .vllm and vendor.
STATE = ("constraints.txt", "overrides.txt", "requirements.txt", "models", "tools")


class Machine:
    """One of the two nodes: its namespace, its end of the cable, its sshd and its clone."""

    def __init__(self, name: str, number: int, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.space = f"w{os.getpid()}{name}"
        self.link = f"{self.space[:12]}v"
        self.address = f"10.98.{os.getpid() % 250}.{number}"
        self.clone = folder / name
        self.environment = {"PATH": f"{folder / 'bin'}:{PATH}", "HOME": str(folder / "home")}

    @property
    def shared(self) -> Path:
        """The memory that the node has at /dev/shm: two machines share none."""
        return self.folder / f"{self.name}.shm"

    def argv(self, *argv: str) -> list[str]:
        # ip(8) makes a mount namespace of its own for each command.
        script = f'mount --bind {self.shared} /dev/shm && exec "$@"'
        return ["ip", "netns", "exec", self.space, "sh", "-c", script, "sh", *argv]

    def inv(self, *argv: str) -> list[str]:
        return self.argv(str(self.clone / "scripts" / "inv"), *argv)

    def run(self, *argv: str, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
        """Run a verb in the clone of this node."""
        return subprocess.run(
            self.inv(*argv),
            cwd=self.clone,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def ask(self, code: str) -> str:
        """Run Python in the namespace and return what it prints."""
        argv = self.argv(sys.executable, "-I", "-c", code)
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout

    def pids(self) -> set[int]:
        """Return the processes of this clone: its path is in their command line or variables."""
        found, path = set(), str(self.clone).encode() + b"/"
        for pid in process_tree.living():
            with contextlib.suppress(OSError):
                texts = [
                    Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ")
                ]
                if path in texts[0] or b"=" + path in texts[1]:
                    found.add(pid)
        return found - {os.getpid()}

    def sessions(self) -> set[int]:
        """Return the processes of sshd in this namespace below the one that listens."""
        argv = ["ip", "netns", "pids", self.space]
        printed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        known, listening = (
            process_tree.living(),
            int((self.folder / f"{self.name}.pid").read_text()),
        )
        found = set()
        for pid in set(map(int, printed.split())) & known.keys() - {listening}:
            with contextlib.suppress(OSError):
                if b"sshd" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.add(pid)
        return found


class Pair:
    """Both nodes; `a` is the head."""

    def __init__(self, folder: Path) -> None:
        self.a, self.b = Machine("a", 1, folder), Machine("b", 2, folder)
        self.folder = folder

    @property
    def both(self) -> tuple[Machine, Machine]:
        return self.a, self.b

    def ip(self, *argv: str) -> None:
        subprocess.run(["ip", *argv], check=True, capture_output=True, text=True)

    def cable(self, *, is_up: bool) -> None:
        """Plug the cable in, or pull it."""
        self.ip("-n", self.b.space, "link", "set", self.b.link, "up" if is_up else "down")

    def disturb(self, *netem: str) -> None:
        """Delay or drop packets to the head; without arguments, end that."""
        root = ["dev", self.b.link, "root"]
        subprocess.run(["tc", "-n", self.b.space, "qdisc", "del", *root], capture_output=True)
        if netem:
            argv = ["tc", "-n", self.b.space, "qdisc", "add", *root, "netem", *netem]
            subprocess.run(argv, check=True, capture_output=True)

    def set_up(self) -> None:
        for each in self.both:
            self.ip("netns", "add", each.space)
            each.shared.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", each.name, str(each.shared)], check=True)
        peer = ("type", "veth", "peer", "name", self.b.link)
        self.ip("link", "add", self.a.link, *peer)
        for each in self.both:
            self.ip("link", "set", each.link, "netns", each.space)
            self.ip("-n", each.space, "addr", "add", f"{each.address}/24", "dev", each.link)
            self.ip("-n", each.space, "link", "set", "lo", "up")
            self.ip("-n", each.space, "link", "set", each.link, "up")
        self._keys()
        for each in self.both:
            self._sshd(each)
            copy_clone(each.clone)
        toml = "".join(
            f'[{each.name}]\naddress = "{each.address}"\ninterface = "{each.link}"\n'
            + (f'ssh = "{each.address}"\nfolder = "{each.clone}"\n' if each is self.b else "")
            for each in self.both
        )
        (self.a.clone / "nodes.toml").write_text(toml)

    def _keys(self) -> None:
        for name in ("bin", "home"):
            (self.folder / name).mkdir()
        for name in ("user", "host"):
            argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(argv, check=True)
        key = " ".join((self.folder / "host.pub").read_text().split()[:2])
        lines = [f"{each.address} {key}\n" for each in self.both]
        (self.folder / "known").write_text("".join(lines))
        # ssh reads the home folder of the password file, whatever HOME is.
        ssh = self.folder / "bin" / "ssh"
        options = f"-oIdentityFile={self.folder}/user -oUserKnownHostsFile={self.folder}/known"
        ssh.write_text(f'#!/bin/sh\nexec /usr/bin/ssh {options} "$@"\n')
        ssh.chmod(0o755)

    def _sshd(self, each: Machine) -> None:
        config = self.folder / f"{each.name}.sshd"
        config.write_text(
            f"ListenAddress {each.address}\nHostKey {self.folder}/host\n"
            f"AuthorizedKeysFile {self.folder}/user.pub\nPidFile {self.folder}/{each.name}.pid\n"
            f"StrictModes no\nUsePAM no\nPasswordAuthentication no\n"
            f"SetEnv PATH={each.environment['PATH']} HOME={each.environment['HOME']}\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        subprocess.run(each.argv(SSHD, "-f", str(config)), check=True)

    def tear_down(self) -> None:
        for each in self.both:
            for pid in each.pids():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(OSError, ValueError, subprocess.CalledProcessError):
                for pid in each.sessions():
                    os.kill(pid, signal.SIGKILL)
                os.kill(int((self.folder / f"{each.name}.pid").read_text()), signal.SIGTERM)
            subprocess.run(["ip", "netns", "del", each.space], capture_output=True)
            subprocess.run(["umount", "-l", str(each.shared)], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def copy_clone(target: Path) -> None:
    """Copy this clone: the built tree by hard links, but no file that names its clone."""
    root = here().root
    target.mkdir()
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=root, capture_output=True, text=True, check=True).stdout
    for name in names.split("\0"):
        if (root / name).is_file() and not name.startswith("vendor/"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)
    (target / ".workspace").mkdir()
    linked = [".vllm", "vendor", *(f".workspace/{name}" for name in STATE)]
    for name in linked:
        if (root / name).exists():
            argv = ["cp", "-al", str(root / name), str(target / name)]
            subprocess.run(argv, check=True)
    site = next((target / ".vllm" / "lib").glob("python*/site-packages"))
    for path in (
        *(target / ".vllm" / ".workspace").glob("*.json"),
        *site.glob("vllm-*.dist-info/direct_url.json"),
        *site.glob("__editable___vllm*.py"),
    ):
        text = path.read_text()
        path.unlink()
        path.write_text(text.replace(str(root), str(target)))
    for compiled in site.glob("__pycache__/__editable___vllm*"):
        compiled.unlink()
    # Bytecode lies below the path of its source, and without it each import costs a minute.
    bytecode = target / ".vllm" / ".workspace" / "bytecode"
    if (compiled := Path(f"{bytecode}{root}")).exists():
        moved = compiled.rename(bytecode / "moved")
        Path(f"{bytecode}{target}").parent.mkdir(parents=True, exist_ok=True)
        moved.rename(f"{bytecode}{target}")
    (target / ".env").write_text("DEVICE=cpu\nVLLM_CPU_KVCACHE_SPACE=1\n")


def missing() -> str:
    """Return what this machine lacks for two nodes, empty if it has all."""
    if os.geteuid() != 0:
        return "network namespaces and an sshd of its own need root"
    for program in ("ip", "tc", "ssh-keygen", SSHD):
        if shutil.which(program, path=PATH) is None:
            return f"{program} is missing: apt-get install iproute2 openssh-server"
    if not (here().environment / "bin" / "vllm").exists():
        return "this clone is not built: ./scripts/inv bootstrap --device cpu"
    return ""


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[Pair]:
    """Set up two nodes below `folder`, which is on the disk of this clone, for hard links."""
    if lack := missing():
        pytest.fail(lack)
    folder.mkdir(parents=True)
    pair = Pair(folder)
    try:
        pair.set_up()
        yield pair
    finally:
        pair.tear_down()


def until(is_true: object, timeout_s: float, what: str) -> float:
    """Wait for a condition. Return the seconds that it took; fail with `what` after `timeout_s`."""
    assert callable(is_true)
    began = time.monotonic()
    while not is_true():
        if time.monotonic() - began > timeout_s:
            pytest.fail(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.2)
    return time.monotonic() - began


def killed(pids: Sequence[int] | set[int], number: signal.Signals = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, number)
