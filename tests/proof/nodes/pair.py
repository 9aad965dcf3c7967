"""Two network namespaces joined by veth, with a real sshd and a home of its own in the second.

Needs root, ip(8) and Debian's openssh-server; without one of them the set-up fails and names it.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 1200.0
ADDRESSES = ("10.99.7.1", "10.99.7.2")
SSHD = "/usr/sbin/sshd"
# No PAM and no password: the keys of this proof alone open the door.
CONFIG = """ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile {folder}/sshd.pid
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
Subsystem sftp /usr/lib/openssh/sftp-server
ForceCommand /bin/sh {folder}/login
"""
# A login of the second node: a home of its own, and this interpreter for scripts/inv, whose tool
# environment would need a package index.
LOGIN = r"""export HOME={home}
cd "$HOME" || exit 1
. ./environment
typed=$(printf '%s\n' "$SSH_ORIGINAL_COMMAND" | sed 's#\./scripts/inv#{python} -Es -B tasks.py#')
exec sh -c "$typed"
"""
CLIENT = """Host spark-b
    HostName {address}
    User root
    IdentityFile {folder}/user_key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    HashKnownHosts yes
"""


def run(argv: list[str], *, env: Mapping[str, str] | None = None) -> str:
    """Run a program of the set-up; fail with its output where it does not succeed."""
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


@dataclass
class Pair:
    """Two namespaces `name`a and `name`b; `home` is the home folder of the second node."""

    folder: Path
    name: str
    sshd: "subprocess.Popen[bytes] | None" = None

    @property
    def home(self) -> Path:
        return self.folder / "home-b"

    @property
    def interfaces(self) -> tuple[str, str]:
        return f"{self.name}a0", f"{self.name}b0"

    def on(self, side: str, *argv: str) -> list[str]:
        """Return the command line that runs a program on a node, `a` or `b`."""
        return ["ip", "netns", "exec", f"{self.name}{side}", *argv]

    def start(self) -> None:
        for program in ("ip", "ssh", "ssh-keygen", SSHD):
            assert shutil.which(program), (
                f"{program} is missing: apt install iproute2 openssh-server"
            )
        assert os.getuid() == 0, "network namespaces need root"
        self.home.mkdir(parents=True)
        (self.home / "environment").write_text("")
        first, second = self.interfaces
        run(["ip", "netns", "add", f"{self.name}a"])
        run(["ip", "netns", "add", f"{self.name}b"])
        run(["ip", "link", "add", first, "type", "veth", "peer", "name", second])
        for side, interface, address in zip("ab", self.interfaces, ADDRESSES, strict=True):
            run(["ip", "link", "set", interface, "netns", f"{self.name}{side}"])
            run(self.on(side, "ip", "address", "add", f"{address}/24", "dev", interface))
            run(self.on(side, "ip", "link", "set", interface, "up"))
            run(self.on(side, "ip", "link", "set", "lo", "up"))
        self.make_key("user_key")
        self.new_host_key()
        config = CONFIG.format(address=ADDRESSES[1], folder=self.folder, home=self.home)
        (self.folder / "sshd_config").write_text(config)
        (self.folder / "login").write_text(LOGIN.format(home=self.home, python=sys.executable))
        (self.folder / "ssh_config").write_text(
            CLIENT.format(address=ADDRESSES[1], folder=self.folder)
        )
        self.know()
        self.open()

    def make_key(self, name: str) -> None:
        path = self.folder / name
        path.unlink(missing_ok=True)
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)])

    def new_host_key(self) -> None:
        self.make_key("host_key")

    def know(self) -> None:
        """Trust the host key of the second node, with a hashed name as Debian writes it."""
        key = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text(f"{ADDRESSES[1]} {key}")
        run(["ssh-keygen", "-q", "-H", "-f", str(self.folder / "known_hosts")])

    def open(self) -> None:
        """Start sshd on the second node."""
        Path("/run/sshd").mkdir(exist_ok=True)
        argv = self.on("b", SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config"))
        with (self.folder / "sshd.log").open("ab") as log:
            self.sshd = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        probe = self.on("a", "ssh-keyscan", "-T", "1", ADDRESSES[1])
        while not subprocess.run(probe, capture_output=True).stdout:
            assert time.monotonic() < deadline, (self.folder / "sshd.log").read_text()

    def close(self) -> None:
        if self.sshd is not None:
            self.sshd.terminate()
            self.sshd.wait()
            self.sshd = None

    def end(self) -> None:
        self.close()
        for side in "ab":
            subprocess.run(["ip", "netns", "delete", f"{self.name}{side}"], capture_output=True)

    def programs(self) -> Path:
        """Write ssh and scp that read the client configuration of this proof; return the folder."""
        folder = self.folder / "programs"
        folder.mkdir(exist_ok=True)
        for name in ("ssh", "scp"):
            path = folder / name
            path.write_text(
                f"#!/bin/sh\nexec ip netns exec {self.name}a /usr/bin/{name}"
                f' -F {self.folder}/ssh_config "$@"\n'
            )
            path.chmod(0o755)
        return folder
