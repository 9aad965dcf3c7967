"""The nodes of nodes.toml, and commands on another node through the user's own ssh.

The user's `ssh` and `scp` run instead of Fabric: Paramiko reads neither `Match exec`,
`CanonicalizeHostname`, `UserKnownHostsFile`, `HostKeyAlias` nor host certificates, so `inv` could
fail, or trust another key, where `ssh NODE` in the same terminal works. No password is asked for
or stored, and an unknown host key is an error.
"""

import ipaddress
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from workspace.core import hints, process, records
from workspace.core.console import RunLog
from workspace.core.errors import NodeError, SettingsError, ToolchainError
from workspace.core.files import read_regular
from workspace.core.process import Completed
from workspace.core.redaction import without_secrets

NODES = "nodes.toml"
# A node that is off answers nothing: ssh would wait for two minutes (tcp(7), tcp_syn_retries).
CONNECT_S = 10
# A command that is done in seconds on an idle node, and an scp of a GB over 1 Gb/s.
ANSWER_S, COPY_S = 60.0, 600.0
KILL_S = 5.0
SSH_FAILED = 255
_OPTIONS = (
    "-oBatchMode=yes",
    f"-oConnectTimeout={CONNECT_S}",
    "-oStrictHostKeyChecking=yes",
    # A cut cable ends a command after half a minute instead of hours.
    "-oServerAliveInterval=10",
    "-oServerAliveCountMax=3",
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
# IFNAMSIZ is 16 with the final NUL (linux/if.h).
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,14}")
# ssh would take a leading dash for an option, and scp text after a colon for a path.
_ADDRESS = re.compile(r"(?:[\w.][\w.-]*@)?[\w.][\w.-]*")
# scp expands these in a remote path.
_PATTERN = re.compile(r"[*?\[\]{}\\\x00-\x1f]")


@dataclass(frozen=True)
class Node:
    """A machine of nodes.toml: where ssh and its clone are, and its end of the fast link.

    The node without `ssh` is this machine. `folder` is absolute or begins with `~/`.
    """

    name: str
    address: str
    interface: str
    ssh: str = ""
    folder: str = ""

    @property
    def is_here(self) -> bool:
        return not self.ssh


@dataclass(frozen=True)
class Nodes:
    """The nodes of a clone, in the order of its nodes.toml; exactly one is this machine."""

    all: tuple[Node, ...]

    @property
    def here(self) -> Node:
        return next(node for node in self.all if node.is_here)

    @property
    def others(self) -> tuple[Node, ...]:
        return tuple(node for node in self.all if not node.is_here)

    def named(self, name: str) -> Node:
        """Return the node of this name. Raises SettingsError."""
        for node in self.all:
            if node.name == name:
                return node
        names = ", ".join(node.name for node in self.all)
        raise SettingsError(
            f"{NODES} has no node {name}; it has {names}", hint=hints.text("server.nodes")
        )

    def another(self, name: str) -> Node:
        """Return the node of this name that is not this machine. Raises SettingsError."""
        node = self.named(name)
        if node.is_here:
            raise SettingsError(f"{name} is this machine", hint=hints.text("server.nodes"))
        return node


def read_nodes(root: Path) -> Nodes:
    """Return the nodes of the clone in `root`. Raises SettingsError where nodes.toml is missing or
    cannot be used.
    """
    try:
        document = records.parse_toml(read_regular(root / NODES))
    except FileNotFoundError:
        raise SettingsError(
            f"there is no {NODES}: this clone knows no other node",
            hint=hints.text("server.first_nodes"),
        ) from None
    except (OSError, records.DecodeError) as exc:
        raise _unusable(getattr(exc, "strerror", None) or str(exc)) from exc
    nodes = tuple(_node(name, table) for name, table in document.items())
    here = [node.name for node in nodes if node.is_here]
    if len(here) != 1:
        named = f"{' and '.join(here)} have no" if here else "each node has an"
        raise _unusable(f"{named} ssh address: exactly one node, this machine, has none")
    for subject in ("address", "ssh"):
        owners: dict[str, str] = {}
        for node in nodes:
            value = getattr(node, subject)
            if value and (other := owners.setdefault(value, node.name)) != node.name:
                raise _unusable(f"{other} and {node.name} have the same {subject}, {value}")
    return Nodes(nodes)


def _node(name: str, table: object) -> Node:
    """Return one table of nodes.toml as a node. Raises SettingsError."""
    keys = {"ssh", "folder", "address", "interface"}
    if not _NAME.fullmatch(name) or not isinstance(table, dict):
        raise _unusable(f"{name!r} is not the table of a node")
    if unknown := sorted(set(table) - keys):
        raise _unusable(f"[{name}] has an unknown key, {unknown[0]}")
    try:
        node = records.convert({"name": name, **table}, Node)
        # An IPv6 address without its square brackets, as NCCL and vLLM take it.
        ipaddress.ip_address(node.address)
    except ValueError as exc:
        raise _unusable(f"[{name}]: {exc}") from exc
    checks = (
        (bool(_INTERFACE.fullmatch(node.interface)), "interface", node.interface),
        (node.is_here or bool(_ADDRESS.fullmatch(node.ssh)), "ssh", node.ssh),
        (node.is_here or _is_folder(node.folder), "folder", node.folder),
    )
    for is_usable, key, value in checks:
        if not is_usable:
            raise _unusable(f"[{name}]: {key} = {value!r} cannot be used")
    return node


def _is_folder(folder: str) -> bool:
    return folder.startswith(("/", "~/")) and not _PATTERN.search(folder)


def _unusable(why: str) -> SettingsError:
    return SettingsError(f"{NODES}: {why}", hint=hints.text("server.form_of_nodes"))


@dataclass(frozen=True)
class Remote:
    """Commands in the clone of another node; `environment` is the one of ssh on this machine."""

    node: Node
    environment: Mapping[str, str]

    def run(self, argv: Sequence[str], *, limit_s: float = ANSWER_S) -> Completed:
        """Run a program in the node's clone and return its output; the caller judges the status.

        timeout(1) ends the program on the node after `limit_s` seconds. Raises NodeError where the
        node cannot be reached, or gives no answer in time.
        """
        bounded = f"exec timeout -k {KILL_S:g} {limit_s:g} {shlex.join(argv)}"
        return self.shell(f"cd {self.quoted()} && {bounded}", limit_s=limit_s)

    def shell(self, script: str, *, limit_s: float = ANSWER_S) -> Completed:
        """Run a POSIX script in the node's home folder, as `run` runs a program."""
        done = self._captured(self._ssh(script), limit_s + KILL_S + CONNECT_S)
        if done.returncode == SSH_FAILED:
            raise unreachable(self.node, done.stderr)
        return done

    def follow(
        self, argv: Sequence[str], *, run_log: RunLog, on_line: Callable[[str], None]
    ) -> None:
        """Run a program in the node's clone without a limit, and pass on each line of its output.

        Raises NodeError with the first error line where it fails.
        """
        process.run(
            self.argv(argv),
            env=self.environment,
            run_log=run_log,
            on_line=on_line,
            failure=NodeError,
        )

    def argv(self, argv: Sequence[str]) -> list[str]:
        """Return the ssh command line that runs a program in the node's clone without a limit."""
        return self._ssh(f"cd {self.quoted()} && exec {shlex.join(argv)}")

    def copy(self, source: Path, target: str, *, limit_s: float = COPY_S) -> None:
        """Copy a file to a path below the node's clone. Raises NodeError."""
        # SFTP begins in the home folder; not every server expands a tilde.
        folder = self.node.folder.removeprefix("~/")
        place = f"{self.node.ssh}:{folder}/{target}"
        done = self._captured(["scp", "-q", *_OPTIONS, str(source), place], limit_s)
        if done.returncode == SSH_FAILED:
            raise unreachable(self.node, done.stderr)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["scp failed"]
            raise NodeError(f"{self.node.name}: {lines[-1]}", hint=look_at_disk(self.node))

    def quoted(self) -> str:
        """Return the folder of the node's clone as a POSIX shell takes it."""
        is_home, folder = self.node.folder.startswith("~/"), self.node.folder.removeprefix("~/")
        return f"~/{shlex.quote(folder)}" if is_home else shlex.quote(folder)

    def _ssh(self, script: str) -> list[str]:
        # The login shell may be another one than a POSIX shell.
        return ["ssh", "-T", *_OPTIONS, self.node.ssh, f"exec sh -c {shlex.quote(script)}"]

    def _captured(self, argv: Sequence[str], limit_s: float) -> Completed:
        try:
            done = process.capture(argv, env=self.environment, timeout_s=limit_s)
        except process.NoAnswer as exc:
            raise NodeError(
                f"{self.node.name} gave no answer in {limit_s:g} s", hint=_by_hand(self.node)
            ) from exc
        except ToolchainError as exc:
            raise ToolchainError(exc.message, hint=hints.text("server.install_ssh")) from exc
        # The secrets of the node are not known here, so what looks like one is masked.
        shown = "\n".join(map(without_secrets, done.stderr.split("\n")))
        return replace(done, stderr=shown)


def unreachable(node: Node, output: str) -> NodeError:
    """Return the error for a node that ssh or scp does not reach, from what it printed."""
    host = node.ssh.rpartition("@")[2]
    if "HOST IDENTIFICATION HAS CHANGED" in output:
        known = re.search(r"Offending .*key in (\S+)", output)
        where = f" in {known[1]}" if known else ""
        return NodeError(
            f"{node.name}: its host key is not the one{where}",
            hint=hints.text("server.known_key", host=host),
        )
    if "host key is known for" in output or "Host key verification failed" in output:
        return NodeError(f"{node.name}: its host key is not known here", hint=_by_hand(node))
    if denied := re.search(r"Permission denied \(([\w,-]*)\)", output):
        return NodeError(
            f"{node.name} takes none of your keys ({denied[1]}), and inv asks for no password",
            hint=hints.text("server.copy_key", address=node.ssh),
        )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return NodeError(
        f"{node.name} cannot be reached: {lines[-1] if lines else 'ssh printed nothing'}",
        hint=_by_hand(node),
    )


def _by_hand(node: Node) -> str:
    return hints.text("server.ssh", address=node.ssh)


def look_there(node: Node) -> str:
    """Return the command that shows the states of both repositories on the node."""
    command = f"cd {Remote(node, {}).quoted()} && git status -uall && git -C vendor/vllm status"
    return hints.text("server.on_node", address=node.ssh, command=command)


def look_at_disk(node: Node) -> str:
    """Return the command that shows the room on the node's disk."""
    command = f"df -h {Remote(node, {}).quoted()}"
    return hints.text("server.on_node", address=node.ssh, command=command)


def message(done: Completed) -> list[str]:
    """Return the lines of a command on a node that failed, or how it ended."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines or [process.describe_status(done.returncode)]


def failed(node: Node, done: Completed) -> NodeError:
    """Return the error for a command that failed in the clone of the node."""
    return NodeError(f"{node.name}: {message(done)[-1]}", hint=look_there(node))
